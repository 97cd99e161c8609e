"""Logging for places in which no exception may be raised."""

import contextlib
import logging
import sys

__all__ = ["report"]


def report(
    message: str,
    *arguments: object,
    level: int = logging.ERROR,
    logger: str = "microbatch",
    error: BaseException | None = None,
) -> None:
    """Log *message*, with *error* or the exception that is being handled.

    Never raises, even if a log handler or the repr of an argument does.
    """
    with contextlib.suppress(BaseException):
        exc_info = error if error is not None else sys.exc_info()[0] is not None
        logging.getLogger(logger).log(level, message, *arguments, exc_info=exc_info)
