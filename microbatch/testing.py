"""Doubles for deterministic tests of code that uses microbatch: a clock, an executor and a processor.

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

    It rules every wait of the batcher: intervals, ``expires_in``, and the timeouts of `Batcher.submit`,
    `Batcher.flush` and `Batcher.shutdown`. ``Future.result(timeout)`` is not the batcher's and waits in real time.
    A job that was submitted before `advance` was called sees the new time, even if the worker thread has not looked at
    it yet, so that a test need not wait in between.

    Args:
        start: the moment at which the clock stands, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = check_number("start", start, below=NEVER)
        self._changed = threading.Condition()  # guards both; never held while another lock is taken
        self._sleepers: list[tuple[threading.Condition, float]] = []

    def now(self) -> float:
        """Return the moment at which the clock stands."""
        with self._changed:
            return self._now

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass at once, and wake the threads whose moment has come by then."""
        seconds = check_number("seconds", seconds, below=NEVER)
        with self._changed:
            self._now += seconds
            due = self._due()
        for condition in due:
            with condition:
                condition.notify_all()

    def _due(self) -> list[threading.Condition]:
        return [condition for condition, moment in self._sleepers if moment <= self._now]

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """Wait, with *condition* held, until it is notified or the clock has been advanced to *moment*."""
        sleeper = (condition, moment)
        with self._changed:
            if moment <= self._now:
                return
            # From here on advance() finds this thread, and has to wait for the condition until it really sleeps.
            self._sleepers.append(sleeper)
            self._changed.notify_all()
        try:
            condition.wait()
        finally:
            with self._changed:
                self._sleepers.remove(sleeper)

    def wait_for_sleeper(self, moment: float, timeout: float = 10.0) -> None:
        """Block until some thread waits for exactly *moment*: a batcher that has a timer set for it, say.

        Args:
            moment: on this clock.
            timeout: in seconds of real time.

        Raises:
            TimeoutError: no thread did in that time.
        """
        moment = check_number("moment", moment)
        check_number("timeout", timeout, below=threading.TIMEOUT_MAX)
        with self._changed:
            if not self._changed.wait_for(lambda: any(each == moment for _, each in self._sleepers), timeout):
                moments = sorted(each for _, each in self._sleepers if each != NEVER)
                raise TimeoutError(f"no thread waits for {moment}; awaited are {moments}")


class InlineExecutor(Executor):
    """Runs each call at once, in the thread that submits it: ``Batcher(..., executor=InlineExecutor())``.

    In a batcher that is its worker thread, so that a batch has been processed before the next one is formed.
    """

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> "Future[Result]":
        """Call *fn* and return a future that is done."""
        future: Future[Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class RecordingProcessor(Generic[Job]):
    """A processor that remembers the batches it was called with, and can be made to block.

    Attributes:
        batches: the jobs of each call, in the order of the calls.

    Args:
        function: gives the result of one job; by default the job itself. It may return an exception, which fails that
            job, or raise one, which fails the batch.
    """

    def __init__(self, function: Callable[[Job], Any] | None = None) -> None:
        if function is not None:
            check_callable("function", function)
        self.batches: list[list[Job]] = []
        self._function = function
        self._called = threading.Condition()  # guards batches
        self._open = threading.Event()
        self._open.set()

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        with self._called:
            self.batches.append(list(jobs))
            self._called.notify_all()
        self._open.wait()
        return list(jobs) if self._function is None else [self._function(job) for job in jobs]

    def hold(self) -> None:
        """Make every call block, after it was recorded, until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Let the calls go on."""
        self._open.set()

    def wait_for_batches(self, count: int, timeout: float = 10.0) -> list[list[Job]]:
        """Block until *count* batches have come, and return all of them.

        Raises:
            TimeoutError: they did not come within *timeout* seconds of real time.
        """
        check_count("count", count, 0)
        check_number("timeout", timeout, below=threading.TIMEOUT_MAX)
        with self._called:
            if not self._called.wait_for(lambda: len(self.batches) >= count, timeout):
                raise TimeoutError(f"expected {count} batches within {timeout:g} s, got {len(self.batches)}")
            return list(self.batches)
