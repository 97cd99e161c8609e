"""``python -m microbatch run``: sends JSON Lines through a processor of the user, in order and with bounded memory.

The main thread reads lines and submits them, so that a signal ends the program immediately. A second thread waits for
the results in order and writes them, so that a result does not wait for the next line of input. A bounded queue
connects them.
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

__all__ = ["in_one_line", "process_lines", "wrap_processor"]

_BATCHES_AHEAD = 4  # the number of batches per worker that may be read before the first one is written
_LONGEST_PAUSE = 10.0  # between two attempts, in seconds
_NOT_THE_JOBS = (ConnectionError, TimeoutError, ResultCountError)
"""Errors that no single job causes, so a batch is not split. Other kinds of `OSError` may come from one job."""


def wrap_processor(
    processor: Callable[[Any], Any], bisect: bool, retries: int, size: int, interrupted: threading.Event
) -> Callable[[Any], Any]:
    """Return *processor*, wrapped so that it bisects and retries batches that fail, according to the options.

    A batch that fails is bisected first, so only the jobs that cause the error are retried after a pause.

    Args:
        processor: The processor of the user.
        bisect: Split a batch that raises, until each job that causes the error is alone.
        retries: How many times to retry the jobs that failed.
        size: The maximum number of jobs in a batch.
        interrupted: Once this is set, no job is retried.

    Raises:
        ImportError: *retries* is not 0, and `tenacity` is not installed.
    """
    if bisect:  # until each bad job is alone, which takes less than two calls per job, even if all jobs fail
        processor = bisecting(processor, on=Exception, unless=_NOT_THE_JOBS, max_calls=2 * size)
    if retries:
        import tenacity

        enough = tenacity.stop_any(tenacity.stop_after_attempt(1 + retries), tenacity.stop_when_event_set(interrupted))
        pause = tenacity.wait_random_exponential(max=_LONGEST_PAUSE)

        def wait(state: tenacity.RetryCallState) -> float:
            """Wait here, and let `tenacity` wait 0 seconds, because *interrupted* does not end its sleep."""
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
    """Process each line of *source*, write the results to *sink* in order, and return how many lines failed.

    If a line is not JSON, or its job fails, its result is ``null``. The line is then reported to standard error with
    its number, and to *errors* as a JSON object. Blank lines are skipped. Only a few batches are in memory at any time.

    If an exception such as `KeyboardInterrupt` is raised in the calling thread, the jobs that have not been dispatched
    are dropped. This still waits for the running batches, and writes their results. A second exception ends the wait.

    Args:
        processor: Called with the jobs of a batch.
        policy: When a batch is dispatched.
        source: The input, one JSON value per line.
        sink: The output, one JSON value per line.
        size: The maximum number of jobs in a batch.
        workers: The number of batches that may run at the same time.
        errors: The output for a JSON object per failed line.
        interrupted: Set after the first exception in the calling thread, before the wait for the running batches.

    Raises:
        OSError: *source* can't be read, or *sink* or *errors* can't be written. It is raised after the running batches
            have finished.
    """
    ahead = _BATCHES_AHEAD * size * workers
    # With exit_timeout=0, a second Ctrl-C ends the program without another wait for the running batches.
    batcher: Batcher[Any, Any] = Batcher(
        processor, policy, max_workers=workers, max_pending=ahead, name="microbatch run", exit_timeout=0
    )
    # If the results go to a terminal, they show the progress themselves.
    with show_progress("lines", keep=True, wanted=not sink.isatty()) as progress:
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
            try:
                batcher.shutdown(cancel_futures=True)
                writer.finish()
            except BaseException:
                writer.give_up()
                raise
            raise
    if writer.error is not None:
        raise writer.error
    return writer.failed


class Entry(NamedTuple):
    """A line of the input, and its outcome."""

    number: int
    text: str
    """The line if it is JSON, otherwise a JSON string that contains it."""
    outcome: JobFuture[Any] | ValueError
    """The future of its job, or the error if the line is not JSON."""


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
    """Writes results in the order of their lines, in a thread of its own."""

    def __init__(self, sink: BinaryIO, errors: BinaryIO | None, ahead: int, progress: Progress) -> None:
        self.failed = 0
        self.error: BaseException | None = None  # the reason why nothing more is written
        self._stopped = False
        self._sink = sink
        self._errors = errors
        self._progress = progress
        self._entries: queue.Queue[Entry | None] = queue.Queue(ahead)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="microbatch-writer", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue a line, so that its result will be written. Blocks while the queue is full."""
        self._entries.put(entry)

    def finish(self) -> None:
        """Block until all results are written. May be called again."""
        self._entries.put(None)
        self._ended.wait()  # because before Python 3.13, an interrupted join() marks the thread as ended
        self._thread.join()

    def give_up(self) -> None:
        """Write nothing more. The interpreter may abort if another thread writes to a standard stream while it exits."""
        self._stopped = True

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
            self._stopped = True  # entries are still removed, so that the main thread does not block in put()

    def _write(self, entry: Entry) -> None:
        try:
            if isinstance(entry.outcome, ValueError):
                raise entry.outcome
            line = json.dumps(entry.outcome.result().value, ensure_ascii=False, allow_nan=False).encode()
        except BaseException as error:
            if isinstance(entry.outcome, JobFuture) and entry.outcome.cancelled():
                self._stopped = True  # after an interrupt; the results end here, without a gap
            if self._stopped:
                return
            self._report(entry, error)
            line = b"null"
        self._sink.write(line + b"\n")
        if self._entries.empty():  # another program may be waiting for these results
            self._flush()
        try:
            self._progress.update()
        except OSError:  # no program reads standard error any more
            pass

    def _flush(self) -> None:
        self._sink.flush()
        if self._errors is not None:
            self._errors.flush()

    def _report(self, entry: Entry, error: BaseException) -> None:
        self.failed += 1
        text = in_one_line(error)
        with contextlib.suppress(OSError):  # as in `_write`
            self._progress.clear()
            print(f"line {entry.number}: {text}", file=sys.stderr)
        if self._errors is not None:
            line = (
                f'{{"number": {entry.number}, "input": {entry.text}, "error": {json.dumps(text, ensure_ascii=False)}}}'
            )
            self._errors.write(line.encode() + b"\n")


def in_one_line(error: BaseException) -> str:
    """Return the class of *error* and the beginning of its text, in one line. The class `ValueError` is left out."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as another:  # raised by a class of the user
        text = f"(its text is not available: {type(another).__name__})"
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:1000]).split())
    return text if type(error) is ValueError and text else f"{name}: {text}" if text else name
