"""The commands, their options and their exit statuses."""

import argparse
import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn, TypeVar

from microbatch import DEFAULT_POLICY, BatchingPolicy, Interval, JobTooLarge, Natural, Size, __version__
from microbatch._basics.arguments import MOST_THREADS, check_callable
from microbatch.cli.advise import Question, advise
from microbatch.cli.files import open_files
from microbatch.cli.journal import JournalError
from microbatch.cli.lines import in_one_line
from microbatch.cli.parsing import parse_buckets, parse_cost, parse_rate, parse_seconds, parse_weights
from microbatch.cli.run import process_lines, wrap_processor
from microbatch.cli.simulate import load_of, plot, table
from microbatch.cli.summary import Summary
from microbatch.policies.text import parse_policy
from microbatch.simulation import SimulationReport, simulate
from microbatch.simulation.plots import check_plot
from microbatch.traces import Trace, read_trace

__all__ = ["main"]


_Parsed = TypeVar("_Parsed")

_COMMON_POLICIES: Sequence[BatchingPolicy[Any]] = (
    DEFAULT_POLICY,
    Size(100) | Interval(0.005),
    Size(100) | Interval(0.05),
)
"""What `simulate` compares if you name no policy: the default, and two fixed waits, because most systems use one."""


class BadUsage(Exception):
    """An option, a target or a file is invalid."""


class _Signalled(KeyboardInterrupt):
    """A signal tells the program to end. Its argument is the number of the signal."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report the error in one line. argparse would print the usage first."""
        raise BadUsage(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0 if all went well, 1 if a line or a job failed, and 2 for an invalid option, target or file. After a
    signal, it is 128 plus the number of the signal.

    Args:
        arguments: The arguments of the command line, without the name of the program. None for those of this process.
    """
    if sys.stderr is None:  # closed by the shell; `print` would then write to standard output instead
        sys.stderr = open(os.devnull, "w")
    try:
        options, unknown = _parser().parse_known_args(arguments)
        if getattr(options, "file", "") is None:
            options.file = _late_file(unknown)
        if unknown:
            _refuse(options, f"unrecognized arguments: {' '.join(unknown)}")
        if closed := _closed_streams():
            _refuse(options, f"{closed[0]} is closed")
        status: int = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        status = 0  # the program that read the output has ended, which is not an error
    except (BadUsage, OSError) as error:
        with contextlib.suppress(OSError):  # raised if no program reads standard error any more
            print(f"microbatch: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt as interrupt:
        status = 128 + (interrupt.args[0] if isinstance(interrupt, _Signalled) else signal.SIGINT)
    _give_up_output()
    return status


def _late_file(unknown: list[str]) -> str:
    """Return FILE, and remove it from *unknown*. Some versions of argparse don't recognize it after an option."""
    is_file = len(unknown) == 1 and (unknown == ["-"] or not unknown[0].startswith("-"))
    return unknown.pop() if is_file else "-"


def _closed_streams() -> list[str]:  # a function of its own: rule L9 of `microbatch._engine`
    return [name for name in ("stdin", "stdout") if getattr(sys, name) is None]


def _give_up_output() -> None:
    """Discard output that can't be written. Otherwise, Python would fail when it flushes the streams at exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _signals_raised(once: bool = False) -> Iterator[None]:
    """Raise an exception on signals that tell the program to end, so that it cleans up. Ignored signals stay ignored.

    Args:
        once: Ignore further signals after the first one, because they would interrupt the cleanup.
    """
    raised = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not (once and raised):
            raised = True
            raise _Signalled(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # other threads can't set a handler
        numbers = []
    untouched = (signal.SIG_DFL, signal.default_int_handler)
    previous = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in untouched}
    try:
        for number in previous:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    called = "python -m microbatch" if os.path.basename(sys.argv[0]) == "__main__.py" else "microbatch"
    more = f"To see the options of a command, run {called} COMMAND --help."
    parser = _Parser(prog=called, description="Group single jobs into batches.", epilog=more)
    parser.add_argument("--version", action="version", version=f"microbatch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands.add_parser("demo", help="insert rows into a database, one by one and in batches, and compare"))
    _add_run(commands.add_parser("run", help="process JSON Lines with a function of yours"))
    _add_simulate(commands.add_parser("simulate", help="try policies on a load, in virtual time, and compare"))
    _add_advise(commands.add_parser("advise", help="find the policy with the fewest calls that is fast enough"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threads", type=_threads, default=32, metavar="N", help="callers at the same time (default: %(default)s)")
    add("--jobs", type=_count, metavar="N", help="rows (default: as many as the disk takes in about 20 s)")
    _add_policy(parser)
    parser.set_defaults(command=_demo, parser=parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    target = "a function that takes a list of jobs and returns one result per job"
    source = (
        "one JSON value per line; - for standard input (the default); files whose names end with .gz are compressed, "
        "outputs too"
    )
    errors = "a file for one JSON object per failed line: number, input and error (in the output, the line is null)"
    bisect = "split a batch that raises until only the lines that cause the error fail; others may be processed again"
    retry = "retry a failed line up to N times, after random pauses of at most 10 s (needs tenacity)"
    resume = "a file for outcomes: after a kill, the same command continues from there (implies --summary)"
    summary = "print jobs, calls, times and failures to standard error at the end"
    add("target", metavar="MODULE:CALLABLE", help=target)
    add("file", nargs="?", metavar="FILE", help=source)
    _add_workers(parser)
    add("-o", "--output", default="-", metavar="FILE", help="the file for the results, in the order of the input")
    add("--errors", metavar="FILE", help=errors)
    add("--bisect", action="store_true", help=bisect)
    add("--retry", type=partial(_count, least=0), default=0, metavar="N", help=retry)
    add("--resume", metavar="JOURNAL", help=resume)
    add("--summary", action="store_true", help=summary)
    _add_policy(parser)
    parser.set_defaults(command=_run, parser=parser)


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    policy = "a Python expression: 'Size(64) | Interval(0.005)' (default: the default policy and two common ones)"
    plotted = "draw latency and calls for a hundredth of the load up to all of it (needs matplotlib)"
    add("policy", nargs="*", metavar="POLICY", help=policy)
    _add_load(parser, "total number of jobs (default: %(default)s)")
    add("--plot", metavar="FILE", help=plotted)
    parser.set_defaults(command=_simulate, parser=parser)


def _add_advise(parser: argparse.ArgumentParser) -> None:
    add, seconds = parser.add_argument, _argument(parse_seconds)
    p99 = "99 %% of the jobs shall take at most this: 50ms (default: as with the default policy)"
    most = "maximum jobs in a batch (default: 100, or the size of the largest recorded batch if that is more)"
    plotted = "draw the calls of all policies over their p99 (needs matplotlib)"
    _add_load(parser, "total number of jobs; of a longer trace, only some stretches are used (default: %(default)s)")
    add("--p99", type=seconds, metavar="SECONDS", help=p99)
    add("--max-size", type=_count, metavar="N", help=most)
    add("--plot", metavar="FILE", help=plotted)
    parser.set_defaults(command=_advise, parser=parser)


def _add_load(parser: argparse.ArgumentParser, jobs: str) -> None:
    """Add the options that describe what is simulated. *jobs* is the help for the number of jobs."""
    add = parser.add_argument
    cost = (
        "the time for a batch, and for each job in it: 5ms+20us (default with --trace: as recorded); or with factors, "
        "'4ms + 0.2ms*padded': count (of jobs), weight, or padded (count times the heaviest weight)"
    )
    weights = "random weights of jobs, such as lengths of texts: 5,17,256 for the least, the median and the greatest"
    buckets = "upper bounds of weights: 16,64,256; only jobs of one bucket share a batch, and each weighs as its bound"
    callers = "callers that each wait for a result before they submit the next job"
    add("--cost", type=_argument(parse_cost), help=cost)
    load = parser.add_mutually_exclusive_group(required=True).add_argument
    load("--rate", type=_argument(parse_rate), metavar="N", help="independent jobs per second: 100/s")
    load("--callers", type=_count, metavar="N", help=callers)
    load("--trace", type=_argument(_trace), metavar="FILE", help="a load that microbatch.traces.TraceRecorder recorded")
    add("--weights", type=_argument(parse_weights), metavar="N,N,N", help=weights)
    add("--buckets", type=_argument(parse_buckets), metavar="N,N,...", help=buckets)
    expiry = "a job expires if it still waits for a worker after this time: 50ms; the table shows how many are in time"
    add("--expires-in", type=_argument(parse_seconds), metavar="SECONDS", help=expiry)
    add("--jobs", type=_count, default=20_000, metavar="N", help=jobs)
    _add_workers(parser)
    add("--seed", type=int, default=0, metavar="N", help="the seed of the random numbers (default: %(default)s)")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    text = "batches that run at the same time (default: %(default)s)"
    parser.add_argument("--workers", type=_threads, default=1, metavar="N", help=text)


def _add_policy(parser: argparse.ArgumentParser) -> None:
    add, interval = parser.add_argument, _argument(parse_seconds)
    wait = "longest wait for more jobs: 0.005 or 5ms (default: 0, dispatch as soon as a worker is free)"
    add("--size", type=_count, default=100, metavar="N", help="maximum jobs in a batch (default: %(default)s)")
    add("--interval", type=interval, default=0.0, metavar="SECONDS", help=wait)


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return int(text)


def _threads(text: str) -> int:
    if _count(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be an integer of at most {MOST_THREADS}, got {text!r}")
    return int(text)


def _refuse(options: argparse.Namespace, message: str) -> NoReturn:
    parser: _Parser = options.parser
    parser.error(message)


def _argument(parse: Callable[[str], _Parsed]) -> Callable[[str], _Parsed]:
    """Return a function like *parse* that keeps its error messages, which argparse would replace."""

    def parsed(text: str) -> _Parsed:
        try:
            return parse(text)
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _trace(path: str) -> Trace:
    with open(path, encoding="utf-8") as file:
        return read_trace(file)


def _policy(options: argparse.Namespace) -> BatchingPolicy[object]:
    return Size(options.size) | (Interval(options.interval) if options.interval else Natural())


def _simulate(options: argparse.Namespace) -> int:
    simulated = _simulated(options)
    trace: Trace | None = options.trace
    load = load_of(options.rate, options.callers, trace.arrivals if trace else (), options.jobs)
    try:
        policies = [parse_policy(text) for text in options.policy] or _COMMON_POLICIES
    except ValueError as error:
        _refuse(options, str(error))
    time_of = trace.service_time if trace and not options.cost else None
    simulated = partial(simulated, service_time=time_of, seed=options.seed)
    with _simulation_errors(options):
        arrivals = load(1)
        reports = {repr(policy): simulated(policy, arrivals) for policy in policies}
        print(*table(reports), sep="\n", flush=True)
        if options.plot is not None:
            plot(options.plot, policies, load, simulated)
    return 0


def _advise(options: argparse.Namespace) -> int:
    simulated = _simulated(options)
    question = Question(
        target=options.p99,
        most=options.max_size,
        rate=options.rate,
        callers=options.callers,
        trace=options.trace,
        cost=options.cost,
        weights=options.weights,
        bucket=options.buckets,
        expires=options.expires_in is not None,
        workers=options.workers,
        jobs=options.jobs,
        seed=options.seed,
        plot=options.plot,
    )
    with _simulation_errors(options):
        for line in advise(question, simulated):
            print(line, flush=True)
    return 0


def _simulated(options: argparse.Namespace) -> Callable[..., SimulationReport]:
    """Return `simulate` with the options of `_add_load`, except the load and the seed. Refuse invalid ones."""
    if options.cost is None and options.trace is None:
        _refuse(options, "--cost is needed unless there is a --trace: for example, --cost 5ms+20us")
    if options.plot is not None:
        _check_plot(options)
    return partial(
        simulate,
        cost=options.cost,
        weights=options.weights,
        key=options.buckets,
        weigh=options.buckets,
        expires_in=options.expires_in,
        max_workers=options.workers,
    )


@contextlib.contextmanager
def _simulation_errors(options: argparse.Namespace) -> Iterator[None]:
    """Turn the errors of a simulation into messages."""
    try:
        yield
    except JobTooLarge as error:
        raise BadUsage(str(error)) from None
    except ValueError as error:
        _refuse(options, str(error))


def _check_plot(options: argparse.Namespace) -> None:
    """Refuse a plot that can't be written. Computing it first would take a minute."""
    try:
        check_plot(options.plot)
    except ImportError:
        _refuse(options, _without("matplotlib", "--plot", "plot"))
    except (OSError, ValueError) as error:
        _refuse(options, str(error))


def _without(library: str, option: str, extra: str) -> str:
    return (
        f"{option} needs {library}: python -m pip install '.[{extra}]' in a clone, "
        f"python -m pip install 'microbatch[{extra}]' elsewhere"
    )


def _demo(options: argparse.Namespace) -> int:
    try:
        import sqlite3
    except ImportError:
        raise BadUsage("the demo needs sqlite3, which this Python was built without") from None

    from microbatch.cli.demo import run_demo

    with _signals_raised(once=True):
        try:
            same = run_demo(options.threads, _policy(options), options.jobs, partial(print, flush=True))
        except sqlite3.Error as error:  # for example, the disk is full
            raise BadUsage(f"the demo's database: {error}") from None
    return 0 if same else 1


def _run(options: argparse.Namespace) -> int:
    if options.output == options.errors == "-":
        _refuse(options, "the results and the errors can't both go to standard output")
    if options.resume == "-":
        _refuse(options, "--resume needs the name of a file for the journal, got '-'")
    if options.retry:
        try:
            importlib.import_module("tenacity")
        except ImportError:
            _refuse(options, _without("tenacity", "--retry", "retry"))
    summary, interrupted = Summary(), threading.Event()
    with _signals_raised(), contextlib.ExitStack() as stack:
        stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
        if "-" in (options.output, options.errors):  # the output of the user's module must not mix with the results
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        processor = summary.counting(_load(options))
        processor = wrap_processor(processor, options.bisect, options.retry, options.size, interrupted)
        paths = options.file, options.output, options.errors, options.resume
        try:
            files = open_files(*paths, _deciding(options), stdin=stdin, stdout=stdout, stack=stack)
        except (OSError, ValueError, JournalError) as error:
            _refuse(options, str(error))
        if options.summary or options.resume is not None:
            stack.callback(_print_summary, summary)  # even after an interrupt
        try:
            limits = {"size": options.size, "workers": options.workers}
            process_lines(processor, _policy(options), files, summary, **limits, interrupted=interrupted)
        except JournalError as error:
            _refuse(options, str(error))
    return 1 if summary.failures else 0


def _deciding(options: argparse.Namespace) -> str:
    """Return the arguments that decide the outcomes, so that they must not change when a run is resumed."""
    retry = f" --retry {options.retry}" if options.retry else ""
    return f"{options.target}{' --bisect' if options.bisect else ''}{retry}"


def _print_summary(summary: Summary) -> None:
    with contextlib.suppress(OSError):  # raised if no program reads standard error any more
        print(*summary.rows(), sep="\n", file=sys.stderr)


def _load(options: argparse.Namespace) -> Callable[[Any], Any]:
    name, colon, path = options.target.partition(":")
    if not (name and colon and path):
        _refuse(options, f"the target must be MODULE:CALLABLE, got {options.target!r}")
    if name.endswith(".py") and os.path.isfile(name):
        module = os.path.relpath(name).removesuffix(".py").replace(os.sep, ".")
        _refuse(options, f"the target must be a module, as in {module}:{path}, not a file, got {options.target!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        processor: Any = pkgutil.resolve_name(options.target)
        check_callable("processor", processor)
    except (Exception, SystemExit) as error:  # the import runs the user's module, which may raise anything
        _raise_interrupt(error)
        _refuse(options, f"can't use {options.target}: {in_one_line(error)}{_place(error)}")
    return processor  # type: ignore[no-any-return]


def _raise_interrupt(error: BaseException | None) -> None:
    """Raise the `KeyboardInterrupt` that has caused *error*, if there is one. Some imports turn it into an error."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        error = error.__cause__ or error.__context__


def _place(error: BaseException) -> str:
    """Return the last place in the user's code, or else in a library, that raised *error*.

    Return an empty string if the place is unknown, or if the text of the error contains it.
    """
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if os.path.isfile(frame.filename)]
    frames = [frame for frame in frames if not _is_ours_or_of_python(frame.filename)]
    own = [frame for frame in frames if not _is_installed(frame.filename)]
    return "".join(f", in {frame.filename}, line {frame.lineno}" for frame in (own or frames)[-1:])


def _is_ours_or_of_python(file: str) -> bool:
    ours, python = (os.path.join(folder, "") for folder in (os.path.dirname(__file__), sysconfig.get_path("stdlib")))
    return file.startswith(ours) or file.startswith(python) and not _is_installed(file)


def _is_installed(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file
