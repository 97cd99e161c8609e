"""The command line: ``python -m microbatch``, or ``microbatch``."""

from microbatch.cli.commands import main

__all__ = ["main"]
