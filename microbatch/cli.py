"""The command line: ``python -m microbatch``, or ``microbatch``."""

import argparse
import contextlib
import importlib
import os
import sys
from functools import reduce
from typing import Any, BinaryIO, Callable, ContextManager, NoReturn, Optional, Sequence

from microbatch import BatchingPolicy, Interval, Natural, Size, __version__
from microbatch._arguments import MOST_THREADS, check_callable
from microbatch._demo import run_demo
from microbatch._jsonlines import process_lines
from microbatch._simulate import compare, load_of, plot, table
from microbatch._words import parse_cost, parse_policy
from microbatch.traces import Trace, read_trace

__all__ = ["main"]


class BadUsage(Exception):
    """An option, a target or a file that can't be used."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, where argparse would print the usage first."""
        raise BadUsage(message)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return its exit status.

    0 when all went well, 1 when a line or a job failed, 2 for a bad option, target or file.
    """
    try:
        options = _parser().parse_args(arguments)
        for name in ("stdin", "stdout"):
            if getattr(sys, name) is None:
                raise BadUsage(f"{name} is closed")
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except BadUsage as error:
        print(f"microbatch: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who read our output has gone, and that is all right. Python would complain when it flushes at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="microbatch", description="Turn many single jobs into few batches.")
    parser.add_argument("--version", action="version", version=f"microbatch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="insert rows into a database, one by one and in batches, and compare")
    demo.add_argument("--threads", type=_threads, default=32, metavar="N", help="callers at once (%(default)s)")
    demo.add_argument("--jobs", type=_count, metavar="N", help="rows (as many as the disk takes in about 20 s)")
    _add_policy(demo)
    demo.set_defaults(command=_demo)

    run = commands.add_parser("run", help="process JSON Lines with a function of yours")
    run.add_argument("target", metavar="MODULE:CALLABLE", help="takes a list of jobs, returns one result for each")
    run.add_argument("file", nargs="?", default="-", metavar="FILE", help="one JSON value a line; - for standard input")
    run.add_argument("--workers", type=_threads, default=1, metavar="N", help="batches at once (%(default)s)")
    run.add_argument("-o", "--output", default="-", metavar="FILE", help="for the results, in the order of the input")
    _add_policy(run)
    run.set_defaults(command=_run)

    simulation = commands.add_parser("simulate", help="try policies on a load, in virtual time, and compare")
    simulation.add_argument(
        "policy", nargs="+", metavar="POLICY", help="in words of Python: 'Size(64) | Interval(0.005)'"
    )
    simulation.add_argument(
        "--cost", type=_cost, help="of a batch, and of each job in it: 5ms+20us (with --trace, as it was there)"
    )
    load = simulation.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=_rate, metavar="N", help="jobs a second, that know nothing of each other")
    load.add_argument(
        "--callers", type=_count, metavar="N", help="callers who each wait for a result before the next job"
    )
    load.add_argument("--trace", type=_trace, metavar="FILE", help="as in a file of microbatch.traces.TraceRecorder")
    simulation.add_argument("--jobs", type=_count, default=20_000, metavar="N", help="jobs in all (%(default)s)")
    simulation.add_argument("--workers", type=_threads, default=1, metavar="N", help="batches at once (%(default)s)")
    simulation.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (%(default)s)")
    simulation.add_argument(
        "--plot",
        metavar="FILE",
        help="draw latency and calls from a hundredth of the load up to all of it (needs matplotlib)",
    )
    simulation.set_defaults(command=_simulate)
    return parser


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_count, default=100, metavar="N", help="most jobs in a batch (%(default)s)")
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="longest wait for more jobs (0: as soon as a worker is free)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _threads(text: str) -> int:
    if _count(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be an integer of at most {MOST_THREADS}, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return Interval(float(text)).seconds
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds of at least 0, got {text!r}") from None


def _rate(text: str) -> float:
    if _seconds(text) == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return float(text)


def _cost(text: str) -> Callable[[int], float]:
    try:
        return parse_cost(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _trace(path: str) -> Trace:
    try:
        with open(path, encoding="utf-8") as file:
            return read_trace(file)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _policy(options: argparse.Namespace) -> BatchingPolicy[object]:
    return Size(options.size) | (Interval(options.interval) if options.interval else Natural())


def _simulate(options: argparse.Namespace) -> int:
    trace: Optional[Trace] = options.trace
    cost: Optional[Callable[[int], float]] = options.cost
    if cost is None and trace is not None:
        cost = trace.service_time
    if cost is None:
        raise BadUsage("--cost is needed without --trace")
    load = load_of(options.rate, options.callers, trace.arrivals if trace else (), options.jobs)
    try:
        policies = [parse_policy(text) for text in options.policy]
    except ValueError as error:
        raise BadUsage(f"a policy {error}") from None
    try:
        print(*table(compare(policies, load(1), cost, max_workers=options.workers, seed=options.seed)), sep="\n")
    except ValueError as error:  # a job that is too large for a policy, say
        raise BadUsage(str(error)) from None
    if options.plot is not None:
        try:
            plot(options.plot, policies, load, cost, max_workers=options.workers, seed=options.seed)
        except ImportError:
            raise BadUsage("--plot needs matplotlib: pip install 'microbatch[plot]'") from None
        except (OSError, ValueError) as error:  # ValueError for a format that matplotlib does not know
            raise BadUsage(str(error)) from None
    return 0


def _demo(options: argparse.Namespace) -> int:
    return 0 if run_demo(options.threads, _policy(options), options.jobs, print) else 1


def _run(options: argparse.Namespace) -> int:
    processor = _load(options.target)
    if "-" not in (options.file, options.output) and _same_file(options.file, options.output):
        raise BadUsage(f"{options.output} can't be read and written at once")
    try:
        with _open(options.file, "rb") as source, _open(options.output, "wb") as sink:
            failed = process_lines(
                processor, _policy(options), source, sink, size=options.size, workers=options.workers
            )
            sink.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadUsage(str(error)) from error
    return 1 if failed else 0


def _load(target: str) -> Callable[[Any], Any]:
    name, colon, path = target.partition(":")
    if not (name and colon and path):
        raise BadUsage(f"the target must be MODULE:CALLABLE, got {target!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        processor: Any = reduce(getattr, path.split("."), importlib.import_module(name))
        check_callable("processor", processor)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise BadUsage(f"can't use {target}: {type(error).__name__}: {error}") from error
    return processor  # type: ignore[no-any-return]


def _open(path: str, mode: str) -> ContextManager[BinaryIO]:
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer if mode == "rb" else sys.stdout.buffer)
    return open(path, mode)  # type: ignore[return-value]


def _same_file(one: str, other: str) -> bool:
    return os.path.exists(other) and os.path.exists(one) and os.path.samefile(one, other)
