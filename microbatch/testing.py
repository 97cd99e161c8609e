"""A clock, an executor and a processor for deterministic tests of code that uses a batcher.

>>> from microbatch import Batcher, Interval, Size
>>> clock, processor = ManualClock(), RecordingProcessor()
>>> batcher = Batcher(processor, Size(100) | Interval(60), clock=clock, executor=InlineExecutor())
>>> future = batcher.submit("job")
>>> clock.advance(60)
>>> future.result(timeout=10).batch.trigger
'interval'
>>> processor.batches
[['job']]
>>> batcher.shutdown()
True
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, Generic, TypeVar

from microbatch._basics.arguments import check_callable, check_count, check_number
from microbatch._basics.clock import NEVER

__all__ = ["InlineExecutor", "ManualClock", "RecordingProcessor"]

Job = TypeVar("Job")
Result = TypeVar("Result")


class ManualClock:
    """A clock that stands still until `advance` is called: ``Batcher(..., clock=ManualClock())``.

    It controls every wait of the batcher: intervals, *expires_in*, and the timeouts of `Batcher.submit`,
    `Batcher.flush` and `Batcher.shutdown`. It does not control ``result(timeout)`` of a future, which waits in real
    time.

    You can call `advance` right after `Batcher.submit`. The batcher thread need not have seen the job yet.

    Args:
        start: The moment that the clock shows at first, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = check_number("start", start, below=NEVER)
        self._changed = threading.Condition()  # guards both attributes; never held while another lock is acquired
        self._sleepers: list[tuple[threading.Condition, float]] = []

    def now(self) -> float:
        """Return the moment that the clock shows."""
        with self._changed:
            return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward by *seconds*, and wake the threads whose moment has come.

        Does not wait until these threads have done anything.
        """
        seconds = check_number("seconds", seconds, below=NEVER)
        with self._changed:
            self._now += seconds
            due = self._due()
        for condition in due:
            with condition:
                condition.notify_all()

    def _due(self) -> list[threading.Condition]:  # rule L9 of `microbatch._engine`
        return [condition for condition, moment in self._sleepers if moment <= self._now]

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """Wait until *condition* is notified or the clock is advanced to *moment*. The caller holds *condition*."""
        sleeper = (condition, moment)
        with self._changed:
            if moment <= self._now:
                return
            # From here on, advance() finds this thread. A notification can't come too early: this thread holds the
            # condition until it sleeps, and a condition of a batcher remembers the notification.
            self._sleepers.append(sleeper)
            self._changed.notify_all()
        try:
            condition.wait()
        finally:
            with self._changed:
                self._sleepers.remove(sleeper)

    def wait_for_sleeper(self, moment: float, timeout: float = 10.0) -> None:
        """Block until a thread waits for exactly *moment*, as a batcher does for the end of an interval.

        Args:
            moment: A moment on this clock.
            timeout: The longest time to block, in seconds of real time.

        Raises:
            TimeoutError: No thread waited for *moment* in that time.
        """
        moment = check_number("moment", moment)
        check_number("timeout", timeout, below=threading.TIMEOUT_MAX)
        with self._changed:
            if not self._changed.wait_for(lambda: any(each == moment for _, each in self._sleepers), timeout):
                moments = sorted(each for _, each in self._sleepers if each != NEVER)
                others = f"only for {', '.join(map(str, moments))}" if moments else "or for any other moment"
                raise TimeoutError(f"no thread waits for moment {moment}, {others}")


class InlineExecutor(Executor):
    """An executor that runs each call in the thread that submits it: ``Batcher(..., executor=InlineExecutor())``.

    In a batcher, this is the batcher thread. So each batch has been processed before the next one is formed.
    """

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> "Future[Result]":
        """Call *fn*, and return a future that is done."""
        future: Future[Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class RecordingProcessor(Generic[Job]):
    """A processor that records the batches that it was called with. `hold` makes it block.

    Attributes:
        batches: The jobs of each call, in the order of the calls.

    Args:
        function: Returns the result of one job. By default, the result is the job itself. If *function* returns an
            exception, that job fails. If it raises one, the whole batch fails.
    """

    def __init__(self, function: Callable[[Job], Any] | None = None) -> None:
        if function is not None:
            check_callable("function", function)
        self.batches: list[list[Job]] = []
        self._function = function
        self._called = threading.Condition()  # guards `batches`
        self._open = threading.Event()
        self._open.set()

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        with self._called:
            self.batches.append(list(jobs))
            self._called.notify_all()
        self._open.wait()
        return list(jobs) if self._function is None else [self._function(job) for job in jobs]

    def hold(self) -> None:
        """Make each call block until `release` is called. Its batch is recorded before it blocks."""
        self._open.clear()

    def release(self) -> None:
        """Let the blocked calls continue, and make later calls not block."""
        self._open.set()

    def wait_for_batches(self, count: int, timeout: float = 10.0) -> list[list[Job]]:
        """Block until the processor has been called with *count* batches, and return all recorded batches.

        Args:
            count: The number of batches to wait for.
            timeout: The longest time to block, in seconds of real time.

        Raises:
            TimeoutError: There were fewer batches in that time.
        """
        check_count("count", count, 0)
        check_number("timeout", timeout, below=threading.TIMEOUT_MAX)
        with self._called:
            if not self._called.wait_for(lambda: len(self.batches) >= count, timeout):
                raise TimeoutError(f"expected {count} batches within {timeout:g} s, got {len(self.batches)}")
            return list(self.batches)
