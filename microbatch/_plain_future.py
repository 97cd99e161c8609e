"""The future of a job where that of the standard library has other insides than ``_futures.py`` knows."""

import threading
from concurrent.futures import Future, InvalidStateError, as_completed, wait
from contextlib import suppress
from typing import Any, Callable, Optional, Type, TypeVar

from microbatch._clock import NOW
from microbatch._futures import Fittings, JobFuture, Keeper, conclude
from microbatch._results import OVER, BatchInfo, JobResult, JobState, Service

__all__ = ["PlainFuture", "new_future"]

Value = TypeVar("Value")


class PlainFuture(JobFuture[Value]):
    """Uses nothing but the public methods of a `Future`, and is always watched.

    Slower; and a signal that raises in the standard library's own code can leave a lock taken there. Otherwise the same.
    """

    _condition: Any = None
    _result: Any = None
    _state: Any = None
    _waiters: Any = None

    def __init__(self, job: Any, keeper: Keeper) -> None:
        Future.__init__(self)
        super().__init__(job, keeper)
        self._lock = threading.RLock()
        self._own_fittings = self.fittings = Fittings()
        self.fittings.watched = True

    done = Future.done
    cancelled = Future.cancelled

    def result(self, timeout: Optional[float] = None) -> JobResult[Value]:
        """See `JobFuture.result`."""
        try:
            self._refuse_endless_wait(timeout)
            return Future.result(self, timeout)
        finally:
            del self

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """See `JobFuture.exception`."""
        self._refuse_endless_wait(timeout)
        return Future.exception(self, timeout)

    def add_done_callback(self, fn: Callable[[JobFuture[Value]], object]) -> None:
        """See `JobFuture.add_done_callback`."""
        with self._keeper.mutex:
            if not self._own_fittings.told and self.stage is not JobState.CANCELLED:
                self._own_fittings.callbacks.append(fn)
                return
        self._call(fn)

    def call_back(self) -> None:
        """See `JobFuture.call_back`."""
        if self.stage is JobState.CANCELLED:
            Future.cancel(self)
        super().call_back()

    def _get_lock(self) -> Any:
        return self._lock

    def _tell_watchers(self) -> None:
        if self.stage not in OVER or self._own_fittings.told:
            return
        with suppress(InvalidStateError, RuntimeError):  # after a signal that broke this off before it was noted
            if self.stage is JobState.CANCELLED:
                Future.cancel(self)
                Future.set_running_or_notify_cancel(self)
            elif self._exception is not None:
                Future.set_exception(self, self._exception)
            else:
                Future.set_result(self, self._get_result())  # type: ignore[misc]
        self._own_fittings.told = True

    def disinherit(self, error: BaseException) -> None:
        """See `JobFuture.disinherit`."""
        if not self._own_fittings.told:
            outcome = error if self.stage not in OVER else self._exception
            Future.__init__(self)  # a thread that does not exist here may have held its lock, and ours
            self._lock = threading.RLock()
            self._exception = outcome
            self.stage = self.stage if self.stage in OVER else JobState.FAILED
            self._own_fittings.callbacks = []
            self._tell_watchers()


class _Nobody:
    """Keeps the future that `_insides_are_known` tries."""

    mutex = threading.RLock()

    def know_caller(self) -> Any:
        """See `Keeper.know_caller`."""

    def withdraw(self, future: JobFuture[Any]) -> None:
        """See `Keeper.withdraw`."""

    def is_own_thread(self) -> bool:
        """See `Keeper.is_own_thread`."""
        return False


def _insides_are_known() -> bool:
    """Try whether the functions of `concurrent.futures` can be made to believe in a `JobFuture`."""
    try:
        known = {"_condition", "_state", "_result", "_exception", "_waiters", "_done_callbacks"}
        future, other, third = (JobFuture[Any](None, _Nobody()) for _ in range(3))
        waits = wait([future], timeout=0).not_done == {future} and not future._waiters
        future.stage = third.stage = JobState.RUNNING
        watched = conclude([future], [ValueError()], None).watched
        future.publish(lambda: conclude([future], [ValueError()], None, held=True))
        ends = wait([future, other], return_when="FIRST_COMPLETED").done == {future} == set(as_completed([future]))
        # All that a future ever holds, while few have been made: attributes that come later, Python does not keep in the
        # compact form that objects of a class share (PEP 412).
        third.submitted, third.epoch = NOW, 0
        conclude([third], [None], Service(BatchInfo(0, 0, 0.0, None, ""), NOW, 0.0))
        return vars(Future()).keys() == known and waits and len(watched) == 1 and ends
    except Exception:
        return False


new_future: Type[JobFuture[Any]] = JobFuture if _insides_are_known() else PlainFuture
"""Makes the future of a job."""
