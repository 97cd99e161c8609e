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
from typing import Any, NamedTuple

from microbatch import Batcher, BatchingPolicy, JobFuture, ResultCountError
from microbatch.cli.files import Files, GzipSink
from microbatch.cli.journal import Journal, Recorder
from microbatch.cli.lines import Line, Outcome, outcome_of, read_lines
from microbatch.cli.progress import Progress, show_progress
from microbatch.cli.summary import Summary
from microbatch.processors import bisecting, retrying

__all__ = ["process_lines", "wrap_processor"]

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
    files: Files,
    summary: Summary,
    *,
    size: int,
    workers: int,
    interrupted: threading.Event,
) -> None:
    """Process each line of the input, and write the results in order.

    If a line is not JSON, or its job fails, its result is ``null``. The line is then reported to standard error with
    its number, and to the file for errors as a JSON object. Blank lines are skipped. Only a few batches are in memory
    at any time. If there is a journal, lines whose outcome it has are not processed.

    If an exception such as `KeyboardInterrupt` is raised in the calling thread, the jobs that have not been dispatched
    are dropped. This still waits for the running batches, and writes their results. A second exception ends the wait.

    Args:
        processor: Called with the `Line` objects of a batch.
        policy: When a batch is dispatched.
        files: The input, the outputs and the journal.
        summary: Counts the lines, the batches and the failures.
        size: The maximum number of jobs in a batch.
        workers: The number of batches that may run at the same time.
        interrupted: Set after the first exception in the calling thread, before the wait for the running batches.

    Raises:
        OSError: The input can't be read, or an output or the journal can't be written. It is raised after the running
            batches have finished.
        JournalError: The journal is not of this input.
    """
    ahead = _BATCHES_AHEAD * size * workers
    recorder = Recorder(files.journal, interrupted)
    # With exit_timeout=0, a second Ctrl-C ends the program without another wait for the running batches.
    batcher: Batcher[Line, Any] = Batcher(
        processor,
        policy,
        max_workers=workers,
        max_pending=ahead,
        name="microbatch run",
        listeners=[recorder, summary],
        exit_timeout=0,
    )
    # If the results go to a terminal, they show the progress themselves.
    with show_progress("lines", keep=True, wanted=not files.sink.isatty()) as progress:
        writer = _Writer(files, summary, ahead, progress)
        try:
            for line in read_lines(files.source):
                if writer.error or recorder.error:
                    break
                writer.put(Entry(line, _known(line, files.journal) or batcher.submit(line)))
            else:
                if files.journal is not None:
                    files.journal.finish()
            batcher.shutdown(wait=False, cancel_futures=bool(writer.error or recorder.error))
            writer.finish()
            batcher.shutdown()
        except BaseException:
            interrupted.set()
            try:
                batcher.shutdown(cancel_futures=True)
                writer.finish()
            except BaseException:
                writer.give_up()
                raise
            raise
    if error := writer.error or recorder.error:
        raise error
    summary.finished = True


def _known(line: Line, journal: Journal | None) -> Outcome | None:
    """Return the outcome of *line* if it is known already."""
    if line.problem:
        return Outcome(None, "not JSON", line.problem)
    return journal.take(line) if journal is not None else None


class Entry(NamedTuple):
    """A line of the input, and its outcome."""

    line: Line
    outcome: JobFuture[Any] | Outcome


class _Writer:
    """Writes results in the order of their lines, in a thread of its own."""

    def __init__(self, files: Files, summary: Summary, ahead: int, progress: Progress) -> None:
        self.error: BaseException | None = None  # the reason why nothing more is written
        self._stopped = False
        self._sink = files.sink
        self._errors = files.errors
        self._summary = summary
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
            self._try(self._end)
        self._ended.set()

    def _try(self, step: Callable[..., None], *arguments: Entry) -> None:
        try:
            step(*arguments)
        except BaseException as error:
            self.error = error
            self._stopped = True  # entries are still removed, so that the main thread does not block in put()

    def _write(self, entry: Entry) -> None:
        outcome = entry.outcome
        if isinstance(outcome, JobFuture):
            future, outcome = outcome, outcome_of(outcome)
            if future.cancelled():
                self._stopped = True  # after an interrupt; the results end here, without a gap
            if self._stopped and outcome.error:
                return
        else:
            self._summary.resumed += not entry.line.problem
        if outcome.error:
            self._report(entry.line, outcome)
        self._sink.write((outcome.result or "null").encode() + b"\n")
        self._summary.jobs += 1
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

    def _end(self) -> None:
        for file in (self._sink, self._errors):
            if isinstance(file, GzipSink):
                file.finish()
            elif file is not None:
                file.flush()

    def _report(self, line: Line, outcome: Outcome) -> None:
        self._summary.failures[outcome.kind] += 1
        with contextlib.suppress(OSError):  # as in `_write`
            self._progress.clear()
            print(f"line {line.number}: {outcome.error}", file=sys.stderr)
        if self._errors is not None:
            error = json.dumps(outcome.error, ensure_ascii=False)
            text = f'{{"number": {line.number}, "input": {line.text}, "error": {error}}}\n'
            self._errors.write(text.encode())
