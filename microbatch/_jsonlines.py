"""``python -m microbatch run``: JSON Lines through a user's processor, in order and in bounded memory.

The main thread reads and submits, so that a signal ends the program at once; a second thread waits for the results in
order and writes them, so that a result need not wait for the next line of input. Between them is a bounded queue.
"""

import contextlib
import json
import queue
import sys
import threading
from typing import Any, BinaryIO, Callable, Iterator, NoReturn, Optional, Protocol, Tuple, Union

from microbatch import Batcher, BatchingPolicy, JobFuture
from microbatch._clock import SystemClock

__all__ = ["process_lines"]

_BATCHES_AHEAD = 4  # per worker: read before the first of them is written

Entry = Tuple[int, Union["JobFuture[Any]", ValueError]]
"""A line's number, and its job or what is wrong with it."""


def process_lines(
    processor: Callable[[Any], Any],
    policy: BatchingPolicy[object],
    source: BinaryIO,
    sink: BinaryIO,
    *,
    size: int,
    workers: int,
) -> int:
    """Write one JSON value to *sink* for every line of *source*, in order, and return how many lines failed.

    A line that is not JSON, or whose job failed, is reported to standard error with its number and written nowhere.
    Blank lines are passed over. Holds only a few batches of *size* in memory.

    Raises:
        OSError: *source* can't be read or *sink* can't be written, after the batches that run have ended.
    """
    ahead = _BATCHES_AHEAD * size * workers
    # If a second Ctrl-C breaks off the wait for the batches that run, nothing shall wait for them again.
    batcher: Batcher[Any, Any] = Batcher(
        processor, policy, max_workers=workers, max_pending=ahead, name="microbatch run", exit_timeout=0
    )
    with batcher, _progress() as progress:
        writer = _Writer(sink, ahead, progress)
        try:
            for number, line in enumerate(source, start=1):
                if writer.error is not None:
                    break
                if line.strip():
                    writer.put((number, _submit(batcher, line)))
            batcher.shutdown(wait=False, cancel_futures=writer.error is not None)
            writer.finish()
        except BaseException:
            writer.stop()
            batcher.shutdown(wait=False, cancel_futures=True)
            raise
    if writer.error is not None:
        raise writer.error
    return writer.failed


def _submit(batcher: Batcher[Any, Any], line: bytes) -> Union["JobFuture[Any]", ValueError]:
    try:
        job = json.loads(line, parse_constant=_refuse_constant)
    except RecursionError:
        return ValueError("not JSON: nested too deeply")
    except ValueError as error:
        return ValueError(f"not JSON: {error}")
    return batcher.submit(job)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


class Progress(Protocol):
    """Is told of each line that is done: a `tqdm` is one."""

    def update(self) -> object:
        """One more is done."""


class _Writer:
    """The thread that writes results in the order of their lines."""

    def __init__(self, sink: BinaryIO, ahead: int, progress: Progress) -> None:
        self.failed = 0
        self.error: Optional[OSError] = None  # why nothing is written any more
        self._stopped = False
        self._sink = sink
        self._progress = progress
        self._entries: "queue.Queue[Optional[Entry]]" = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._run, name="microbatch-writer", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Have the result of a line written. Blocks while the results lag behind."""
        self._entries.put(entry)

    def stop(self) -> None:
        """Write and report nothing more."""
        self._stopped = True

    def finish(self) -> None:
        """Block until all is written."""
        self._entries.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (entry := self._entries.get()) is not None:
            if self.error is None and not self._stopped:
                try:
                    self._write(*entry)
                except OSError as error:
                    self.error = error  # and go on taking entries, so that the reader is not left blocked

    def _write(self, number: int, outcome: Union["JobFuture[Any]", ValueError]) -> None:
        try:
            if isinstance(outcome, ValueError):
                raise outcome
            line = json.dumps(outcome.result().value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except BaseException as error:
            self._report(number, error)
        else:
            self._sink.write(line)
        if self._entries.empty():  # somebody may be waiting for the little there is
            self._sink.flush()
        self._progress.update()

    def _report(self, number: int, error: BaseException) -> None:
        if not self._stopped:
            self.failed += 1
            print(f"line {number}: {_in_one_line(error)}", file=sys.stderr)


def _in_one_line(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as another:  # of a user's class
        text = f"(its text can't be had: {type(another).__name__})"
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:1000]).split())
    return text if type(error) is ValueError and text else f"{name}: {text}" if text else name


class _Counter:
    """Counts on one line of a terminal, a few times a second."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._count = 0
        self._shown = self._clock.now()

    def update(self) -> None:
        """See `Progress`."""
        self._count += 1
        if self._clock.now() - self._shown >= 0.1:
            self._show("")

    def _show(self, end: str) -> None:
        self._shown = self._clock.now()
        print(f"\r{self._count:,} lines", end=end, file=sys.stderr, flush=True)

    def __enter__(self) -> "_Counter":
        return self

    def __exit__(self, *_: object) -> None:
        self._show("\n")


class _Silence:
    def update(self) -> None:
        """See `Progress`."""


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _Silence()
        return
    try:
        from microbatch.integrations.tqdm import Bar
    except ImportError:
        with _Counter() as counter:
            yield counter
    else:
        with Bar(unit=" lines", file=sys.stderr) as bar:
            yield bar
