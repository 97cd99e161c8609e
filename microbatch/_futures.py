"""The future of one job. The only file that knows the insides of `concurrent.futures.Future`.

Rules of this file:

1. `JobFuture.stage` says where the job is. It is written with the batcher's lock held. Who moves it out of the waiting
   stages has won: cancellation, expiry and hand-over can race, and one wins.
2. The winner calls `JobFuture.publish` and then `JobFuture.call_back`, without the batcher's lock: a signal handler or
   finalizer that uses the batcher may interrupt a thread that holds the future's own condition, and nobody may wait for
   that one with the batcher's lock held. The worker thread publishes a cancellation too, for a signal may break off the
   caller of `cancel`, in whose thread the callbacks are run.
3. What ``concurrent.futures.wait``, ``as_completed`` and ``asyncio`` read is written here exactly as `Future` does.
"""

import math
import threading
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED
from dataclasses import dataclass
from enum import Enum
from typing import Any, Callable, Generic, Hashable, List, NoReturn, Optional, Protocol, Tuple, TypeVar

from microbatch._log import report

__all__ = ["BatchInfo", "JobFuture", "JobResult", "JobState"]

Value = TypeVar("Value")


class JobState(Enum):
    """Where a job is. Jobs wait in the first two states, and end in one of the last four."""

    QUEUED = "queued"
    """Accepted."""
    BATCHED = "batched"
    """In an open batch, which has not gone yet."""
    RUNNING = "running"
    """A worker has it; it can no longer be cancelled."""
    SUCCEEDED = "succeeded"
    """The processor gave a result for it."""
    FAILED = "failed"
    """The processor gave an exception for it, or for its whole batch."""
    CANCELLED = "cancelled"
    """Cancelled before a worker took it."""
    EXPIRED = "expired"
    """Its ``expires_in`` ran out before a worker took it."""


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """What is known of the batch that a job went in.

    Attributes:
        id: counts the batches of a batcher, from 1.
        size: how many jobs it held.
        weight: their weights, added up; the size where nothing weighs.
        key: what their ``key`` is; None without a key function.
        trigger: why it went: the policy's word, or ``"flush"`` or ``"shutdown"``.
    """

    id: int
    size: int
    weight: float
    key: Hashable
    trigger: str


@dataclass(frozen=True)
class JobResult(Generic[Value]):
    """What became of one job.

    Attributes:
        value: what the processor returned for it.
        batch: the batch that it went in.
        queue_time: seconds from its acceptance to the call of the processor.
        service_time: seconds from the call of the processor until its value was there.
    """

    __slots__ = ("value", "batch", "queue_time", "service_time")  # made by dataclass, they would break JobResult[int]()

    value: Value
    batch: BatchInfo
    queue_time: float
    service_time: float

    def __reduce__(self) -> Tuple[Any, ...]:
        return JobResult, (self.value, self.batch, self.queue_time, self.service_time)


class Keeper(Protocol):
    """Knows where each of a batcher's jobs is, and decides races between cancellation, expiry and hand-over."""

    def withdraw(self, future: "JobFuture[Any]") -> None:
        """Move *future* to the stage `CANCELLED`, if it still waits."""

    def is_own_thread(self) -> bool:
        """Return whether the calling thread is one of the batcher's."""


class _Condition(threading.Condition):
    """One that a signal can't leave locked.

    ``with`` takes and releases the lock itself, each in one step, where the methods of a `threading.Condition` are Python
    code: a signal that raises in there, in a thread that is in `JobFuture.result`, would leave the lock taken for ever.
    """

    __enter__ = property(lambda self: self._lock.__enter__)
    __exit__ = property(lambda self: self._lock.__exit__)


class JobFuture(Future[JobResult[Value]]):
    """The future of one job: a `concurrent.futures.Future` in every respect, made by `Batcher.submit`.

    Attributes:
        job: the job, as it was submitted.
        key: what the batcher's ``key`` says of it.
        weight: what the batcher's ``weigh`` says of it, or 1.
        submitted: the moment of its acceptance, on the batcher's clock.
        expires: the moment at which it expires if no worker has taken it; infinite for never.
    """

    def __init__(self, job: Any, keeper: Keeper, key: Hashable, weight: float, expires_in: float) -> None:
        super().__init__()
        self._condition = _Condition()
        self.job = job
        self.key = key
        self.weight = weight
        self.expires_in = expires_in
        self.submitted = math.nan
        self.expires = math.inf
        self.epoch = 0
        self.stage = JobState.QUEUED
        self._done_callbacks: List[Callable[["JobFuture[Value]"], object]]  # made by Future
        self._keeper: Optional[Keeper] = keeper

    @property
    def state(self) -> JobState:
        """Where the job is now; stale by nature until it is one of the last four."""
        return self.stage

    @property
    def waiting(self) -> bool:
        """Whether no worker has the job, and nothing else has become of it."""
        return self.stage is JobState.QUEUED or self.stage is JobState.BATCHED

    @property
    def published(self) -> bool:
        """Whether the outcome can be read: as `done`, but takes no lock."""
        return self._state in (CANCELLED_AND_NOTIFIED, FINISHED)

    def cancel(self) -> bool:
        """Cancel the job if no worker has taken it, and return whether it is cancelled. Never blocks."""
        keeper = self._keeper
        try:
            if keeper is not None:
                keeper.withdraw(self)
        finally:  # after a signal too
            if self.stage is JobState.CANCELLED:
                self.publish()
                self.call_back()
        return self.stage is JobState.CANCELLED

    def running(self) -> bool:
        """Return whether a worker has the job now."""
        return self.stage is JobState.RUNNING

    def result(self, timeout: Optional[float] = None) -> JobResult[Value]:
        """Return the result of the job, waiting for it up to *timeout* seconds; None for as long as it takes.

        Raises:
            TimeoutError: there is none in that time (`concurrent.futures.TimeoutError` on Python 3.10).
            CancelledError: the job was cancelled.
            RuntimeError: it is not there, and the wait, in one of the batcher's own threads and without *timeout*,
                might never end: that thread is needed to do the job.
            Exception: whatever the job failed with.
        """
        try:
            self._refuse_endless_wait(timeout)
            return super().result(timeout)
        finally:
            del self  # an exception refers to this frame, which must not refer to the future that holds it

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """Return what the job failed with, or None if it succeeded; otherwise as `result`."""
        self._refuse_endless_wait(timeout)
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[["JobFuture[Value]"], object]) -> None:
        """Have *fn* called with this future when it is done; at once if it is. What it raises is logged."""
        with self._condition:
            if not self.published:
                self._done_callbacks.append(fn)
                return
        self._call(fn)

    def _refuse_endless_wait(self, timeout: Optional[float]) -> None:
        keeper = self._keeper
        if timeout is None and keeper is not None and keeper.is_own_thread():
            raise RuntimeError("a thread of the batcher can't wait for its jobs without a timeout: it has to do them")

    def publish(self, result: Optional[JobResult[Value]] = None, error: Optional[BaseException] = None) -> None:
        """Make the outcome readable and wake all who wait for it. For the batcher only."""
        with self._condition:
            if not self.published:
                self._keeper = None  # a future that is kept does not keep the batcher's queue
                self._result = result
                self._exception = error
                self._state = CANCELLED_AND_NOTIFIED if self.stage is JobState.CANCELLED else FINISHED
                for waiter in self._waiters:
                    if self.stage is JobState.CANCELLED:
                        waiter.add_cancelled(self)
                    elif error is not None:
                        waiter.add_exception(self)
                    else:
                        waiter.add_result(self)
            self._condition.notify_all()  # once more, should a signal have broken off the canceller before

    def publish_cancellation(self) -> None:
        """Publish, should a signal have broken off the canceller. One whom it only interrupts will do so afterwards."""
        # The lock may be held by that one, and the handler of the signal may wait for this thread.
        if self._condition.acquire(timeout=1):
            try:
                self.publish()
            finally:
                self._condition.release()

    def call_back(self) -> None:
        """Run the done-callbacks, once; one that raises is logged and stops nothing. For the batcher only."""
        with self._condition:
            callbacks, self._done_callbacks = self._done_callbacks, []
        for callback in callbacks:
            self._call(callback)

    _invoke_callbacks = call_back

    def _call(self, callback: Callable[["JobFuture[Value]"], object]) -> None:
        try:
            callback(self)
        except BaseException:
            report("exception calling callback for %r", self, logger="concurrent.futures")

    def disinherit(self, error: BaseException) -> None:
        """Fail in a forked child, unless there is an outcome. The callbacks are the parent's, and are not run here."""
        # A thread that does not exist here may have held the old condition, or the lock of one of the waiters.
        self._condition = _Condition()
        self._waiters = []
        self._done_callbacks = []
        if not self.published:
            self.stage = JobState.FAILED
            self.publish(error=error)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a JobFuture belongs to its batcher, and can't be copied or pickled: pass on its result()")

    def __repr__(self) -> str:
        return f"<JobFuture at {id(self):#x} {self.stage.value}>"
