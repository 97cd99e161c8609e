"""``python -m microbatch run``: JSON Lines through a user's processor, in order and in bounded memory.

The main thread reads and submits, so that a signal ends the program at once; a second thread waits for the results in
order and writes them, so that a result need not wait for the next line of input. Between them is a bounded queue.
"""

import contextlib
import json
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, NoReturn

from microbatch import Batcher, BatchingPolicy, JobFuture, ResultCountError
from microbatch.cli.progress import Progress, show_progress
from microbatch.processors import bisecting, retrying

__all__ = ["in_one_line", "process_lines", "sturdy"]

_BATCHES_AHEAD = 4  # per worker: read before the first of them is written
_LONGEST_PAUSE = 10.0  # seconds between two attempts
_NOT_THE_JOBS = (ConnectionError, TimeoutError, ResultCountError)
"""Errors that would hit both halves of a batch. Another `OSError` may be about one job, such as a missing file."""


def sturdy(
    processor: Callable[[Any], Any], *, bisect: bool, retries: int, size: int, interrupted: threading.Event
) -> Callable[[Any], Any]:
    """Return *processor*, called again for the jobs of a batch that fail.

    A batch is bisected before anything is retried, so that only the jobs that cause the error are retried, and wait.

    Args:
        processor: the user's.
        bisect: split a batch that raises until each job that causes the error is alone.
        retries: how many more times to try the jobs that failed.
        size: the most jobs in a batch.
        interrupted: once it is set, nothing is retried.

    Raises:
        ImportError: *retries* is not 0, and `tenacity` is not installed.
    """
    if bisect:  # to the end: that takes less than two calls for each job, even if all fail
        processor = bisecting(processor, unless=_NOT_THE_JOBS, max_calls=2 * size)
    if retries:
        import tenacity

        enough = tenacity.stop_any(tenacity.stop_after_attempt(1 + retries), tenacity.stop_when_event_set(interrupted))
        pause = tenacity.wait_random_exponential(max=_LONGEST_PAUSE)

        def wait(state: tenacity.RetryCallState) -> float:
            """Wait here and not in `tenacity`, whose sleep no interrupt ends."""
            if not enough(state):
                interrupted.wait(pause(state))
            return 0.0

        processor = retrying(processor, stop=enough, wait=wait)
    return processor


def process_lines(
    processor: Callable[[Any], Any],
    policy: BatchingPolicy[object],
    source: BinaryIO,
    sink: BinaryIO,
    *,
    size: int,
    workers: int,
    errors: BinaryIO | None = None,
    interrupted: threading.Event | None = None,
) -> int:
    """Write one JSON value to *sink* for every line of *source*, in order, and return how many lines failed.

    A line that is not JSON, or whose job failed, is ``null`` there. It is reported to standard error with its number, and
    to *errors* as a JSON object. Blank lines are passed over. Holds only a few batches of *size* in memory.

    An exception in the calling thread, such as `KeyboardInterrupt`, drops the jobs that no worker has taken. The
    results of the jobs before them are still written. A second exception ends the wait for these.

    Args:
        interrupted: set after such an exception, before the wait for the running batches.

    Raises:
        OSError: *source* can't be read, or *sink* or *errors* can't be written, after the batches that run have ended.
    """
    ahead = _BATCHES_AHEAD * size * workers
    # If a second Ctrl-C breaks off the wait for the batches that run, nothing shall wait for them again.
    batcher: Batcher[Any, Any] = Batcher(
        processor, policy, max_workers=workers, max_pending=ahead, name="microbatch run", exit_timeout=0
    )
    with show_progress("lines", keep=True, wanted=not sink.isatty()) as progress:  # results on a terminal are progress
        writer = _Writer(sink, errors, ahead, progress)
        lines = ((number, line) for number, line in enumerate(source, start=1) if line.strip())
        try:
            for number, line in lines:
                if writer.error is not None:
                    break
                writer.put(_submit(batcher, number, line))
            batcher.shutdown(wait=False, cancel_futures=writer.error is not None)
            writer.finish()
            batcher.shutdown()
        except BaseException:
            if interrupted is not None:
                interrupted.set()
            batcher.shutdown(cancel_futures=True)
            writer.finish()
            raise
    if writer.error is not None:
        raise writer.error
    return writer.failed


class Entry(NamedTuple):
    """A line of the input."""

    number: int
    text: str
    """The line if it is JSON, otherwise a JSON string that holds it."""
    outcome: JobFuture[Any] | ValueError
    """Its job, or what is wrong with it."""


def _submit(batcher: Batcher[Any, Any], number: int, line: bytes) -> Entry:
    try:
        text = line.decode("utf-8-sig")
        job = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        text = line.decode(errors="backslashreplace").strip()
        return Entry(number, json.dumps(text, ensure_ascii=False), ValueError(f"not JSON: {problem}"))
    return Entry(number, text.strip(), batcher.submit(job))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


class _Writer:
    """The thread that writes results in the order of their lines."""

    def __init__(self, sink: BinaryIO, errors: BinaryIO | None, ahead: int, progress: Progress) -> None:
        self.failed = 0
        self.error: BaseException | None = None  # why nothing is written any more
        self._stopped = False
        self._sink = sink
        self._errors = errors
        self._progress = progress
        self._entries: queue.Queue[Entry | None] = queue.Queue(ahead)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="microbatch-writer", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Have the result of a line written. Blocks while the results lag behind."""
        self._entries.put(entry)

    def finish(self) -> None:
        """Block until all is written. May be called again."""
        self._entries.put(None)
        self._ended.wait()  # since before Python 3.13, a `join` that a signal broke off takes the thread for ended
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._entries.get()) is not None:
            if not self._stopped:
                self._try(self._write, entry)
        if self.error is None:
            self._try(self._flush)
        self._ended.set()

    def _try(self, step: Callable[..., None], *arguments: Entry) -> None:
        try:
            step(*arguments)
        except BaseException as error:
            self.error = error
            self._stopped = True  # but entries are still taken, so that the reader is not left blocked

    def _write(self, entry: Entry) -> None:
        try:
            if isinstance(entry.outcome, ValueError):
                raise entry.outcome
            line = json.dumps(entry.outcome.result().value, ensure_ascii=False, allow_nan=False).encode()
        except BaseException as error:
            if isinstance(entry.outcome, JobFuture) and entry.outcome.cancelled():
                self._stopped = True  # by an interrupt: the results end here, without a gap before
                return
            self._report(entry, error)
            line = b"null"
        self._sink.write(line + b"\n")
        if self._entries.empty():  # a reader may be waiting for these few results
            self._flush()
        try:
            self._progress.update()
        except OSError:  # of a standard error that nobody reads any more
            pass

    def _flush(self) -> None:
        self._sink.flush()
        if self._errors is not None:
            self._errors.flush()

    def _report(self, entry: Entry, error: BaseException) -> None:
        self.failed += 1
        text = in_one_line(error)
        with contextlib.suppress(OSError):  # as above
            self._progress.clear()
            print(f"line {entry.number}: {text}", file=sys.stderr)
        if self._errors is not None:
            line = (
                f'{{"number": {entry.number}, "input": {entry.text}, "error": {json.dumps(text, ensure_ascii=False)}}}'
            )
            self._errors.write(line.encode() + b"\n")


def in_one_line(error: BaseException) -> str:
    """Return what to say of an exception: its class, unless that is just `ValueError`, and the beginning of its text."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as another:  # of a user's class
        text = f"(its text can't be had: {type(another).__name__})"
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:1000]).split())
    return text if type(error) is ValueError and text else f"{name}: {text}" if text else name
