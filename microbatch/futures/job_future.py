"""The future of one job. Only this file knows the internals of `concurrent.futures.Future`.

A `Future` creates a condition, two lists and a lock for threads that may wait for it. Few jobs need these, and they take
three quarters of the time that a job costs. A `JobFuture` creates each of them when it is first needed, and all futures
of a batch are settled together. The rules of ``_engine/__init__.py`` hold, and these:

F1. `JobFuture._stage` says where the job is, and so whether it has an outcome. `_state`, which the standard library
    reads, is computed from it. The outcome is written first and the stage last, with the mutex held. Cancellation, expiry
    and dispatch may race: the one that moves the job out of the waiting stages wins.
F2. A thread that finds no outcome registers a waiter or a callback with the mutex held, and the thread that settles the
    future wakes the waiters with the mutex held. A thread that finds an outcome needs no lock, because an outcome never
    changes. (Attributes are read and written in order, even by a Python without the GIL.)
F3. ``concurrent.futures.wait`` and ``as_completed`` ask for the `_condition` of a future, and hold it while the states of
    their futures must not change. From then on, the future is *watched*. To its watchers it is not done until they have
    been notified, with its `_condition` held. Each of them is notified once. If the lock of the condition is taken, the
    thread that holds it notifies the watchers when it releases it (R11). One of the two threads always does: the first
    writes the outcome and then tries the lock, and the second releases the lock and then looks for the outcome. If a
    caller cancels, the batcher thread notifies the watchers, because a signal could keep the caller from releasing the
    lock.
F4. Callbacks run without any lock, in the thread that settles or cancels.
F5. In a forked child, a thread that does not exist there may hold the mutex. Nothing needs the mutex once there is an
    outcome. The same is true of a `_condition`, so each process has its own.
F6. A future keeps the exception that the processor raised. Callers get their own copy when they ask for it: see
    ``exceptions.py``.
"""

import os
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import CancelledError, Future, InvalidStateError, TimeoutError, _base
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar

from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.log import report
from microbatch._basics.waiting import Flag, Waiter, Waiters
from microbatch.futures.exceptions import Failures
from microbatch.results import OVER, WAITING, BatchInfo, JobResult, JobState, Service, make_result

if TYPE_CHECKING:
    import contextvars

__all__ = ["Attachments", "FutureOwner", "JobFuture", "KeepAlive", "Settled", "are_errors", "settle_all"]

Value = TypeVar("Value")

# As globals they are found in a fraction of the time.
_QUEUED, _RUNNING = JobState.QUEUED, JobState.RUNNING
_SUCCEEDED, _FAILED, _CANCELLED = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED
_AllCompletedWaiter: Any = _base._AllCompletedWaiter
_STANDARD_WAITERS = (_AllCompletedWaiter, _base._FirstCompletedWaiter, _base._AsCompletedWaiter)
_HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


class FutureOwner(Protocol):
    """The batcher's side of a future: decides races between cancellation, expiry and dispatch."""

    mutex: Any

    def current_caller(self) -> Any:
        """Return the `Caller` of the calling thread, which waits for a result. Call this with the mutex held."""

    def explain(self, future: "JobFuture[Any]") -> str:
        """Return why the job has no outcome yet."""

    def try_cancel(self, future: "JobFuture[Any]") -> None:
        """Cancel the job if it still waits, and have the batcher thread notify the watchers of its future."""

    def is_own_thread(self) -> bool:
        """Return whether the calling thread is one of the batcher's."""


class Attachments(Waiters):
    """The waiters, watchers and callbacks of a future. Guarded by the mutex.

    Attributes:
        watched: Whether the future is watched (F3).
        all_notified: Whether all watchers have been notified of the outcome.
        notified: The watchers that have been notified.
        callbacks: The done-callbacks that have not run yet.
    """

    watched = False
    all_notified = False

    def __init__(self) -> None:
        self.notified: list[Any] = []
        self.callbacks: list[Callable[[Any], object]] = []


class KeepAlive:
    """A done-callback that keeps *owner* alive until the job is done. It does not count as asking for the outcome."""

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __call__(self, future: Any) -> None:
        """Do nothing."""


class _Watchers(list[Any]):
    """The watchers of a future: the objects through which ``wait`` and ``as_completed`` are notified.

    Each gets a `Flag` in place of its event. Otherwise a signal that interrupts one of these calls could leave the lock
    of the event locked, and the thread that settles the future would block on it.
    """

    def append(self, waiter: Any) -> None:
        """Add a watcher, before its thread begins to wait."""
        if isinstance(getattr(waiter, "event", None), threading.Event):
            waiter.event = Flag(waiter.event.is_set())
        super().append(waiter)


class _Condition:
    """The lock that ``wait`` and ``as_completed`` hold while they look at a future or change its list of watchers.

    Attributes:
        waiters: The watchers. The standard library calls them waiters.
    """

    def __init__(self, future: "JobFuture[Any]") -> None:
        self.waiters = _Watchers()
        self.lock: Any = threading.RLock()
        self.acquire = self.lock.acquire
        self._future = weakref.ref(future)

    def release(self) -> None:
        """Release the lock, and notify the watchers if the future was settled in the meantime."""
        try:
            self.lock.release()
        finally:  # after a signal too
            future = self._future()
            if future is not None:
                future._try_to_notify_watchers(self)

    # In one step, so that a signal can't leave the lock acquired.
    __enter__ = property(lambda self: self.lock.__enter__)

    def __exit__(self, *exception: object) -> None:
        self.release()


class JobFuture(Future[JobResult[Value]]):
    """The future of one job. `Batcher.submit` returns it. You can use it like any `concurrent.futures.Future`.

    Attributes:
        key: The key of the job, or None without a *key* function.
        weight: The weight of the job, or 1 without a *weigh* function.
        submitted: The moment at which the job was accepted, on the clock of the batcher.
        expires_in: How many seconds after that moment the job expires if no worker has taken it. Infinite if it never
            expires.
    """

    # Defaults in the class, so that attributes which few jobs need take no time and no memory in each future.
    key: Hashable = None
    weight: float = 1.0
    expires_in = NEVER
    _expires = NEVER
    _epoch: int
    submitted: float
    _value: Any = None
    _service: Service | None = None
    _own_result: JobResult[Any] | None = None
    _error: BaseException | None = None
    _failures: Failures | None = None
    _own: tuple[BaseException, Any] | None = None  # the exception for the caller, and its traceback before it is raised
    _context: "contextvars.Context | None" = None

    def __init__(self, job: Any, owner: FutureOwner) -> None:
        self._job = job
        self._stage = _QUEUED
        self._attachments: Attachments | None = None
        self._owner = owner

    @property
    def job(self) -> Any:
        """The job, as it was submitted.

        A future keeps its job alive, so that callers can tell which job it belongs to. If you keep many futures of
        large jobs, drop each job with ``del future.job``. That raises `InvalidStateError` until the future is done.
        """
        try:
            return self._job
        except AttributeError:
            raise AttributeError("the job was deleted from its future") from None

    @job.deleter
    def job(self) -> None:
        if not self.done():
            raise InvalidStateError("the job can't be deleted until its future is done")
        vars(self).pop("_job", None)

    @property
    def state(self) -> JobState:
        """The state of the job now. Until it is one of the last four, it may change at any time."""
        return self._stage

    @property
    def _is_waiting(self) -> bool:
        """Whether the job still waits for a worker, and was neither cancelled nor has expired."""
        return self._stage in WAITING

    @property
    def context(self) -> "contextvars.Context | None":
        """The `contextvars` context in which the job was submitted, or None if no listener wants it.

        See `BatchListener`. Each access returns a new copy, because two threads can't enter the same context at once.
        """
        return None if self._context is None else self._context.copy()

    def _keep_context(self) -> None:
        """Keep the context of the calling thread. Call this before the job is accepted."""
        import contextvars  # few listeners want it

        self._context = contextvars.copy_context()

    def cancel(self) -> bool:
        """Cancel the job if no worker has taken it, and return whether it is cancelled. Never blocks."""
        try:
            if self._stage not in OVER:
                self._owner.try_cancel(self)
        finally:  # after a signal too
            if self._stage is _CANCELLED:
                self._call_back()
        return self._stage is _CANCELLED

    def cancelled(self) -> bool:
        """Return whether the job was cancelled."""
        return self._stage is _CANCELLED

    def running(self) -> bool:
        """Return whether the batch of the job runs now."""
        return self._stage is _RUNNING

    def done(self) -> bool:
        """Return whether the future has an outcome: a result, an exception or a cancellation."""
        return self._stage in OVER

    def result(self, timeout: float | None = None) -> JobResult[Value]:
        """Wait for the outcome of the job, and return its result.

        Args:
            timeout: The maximum number of seconds to wait. None means no limit.

        Raises:
            TimeoutError: The job has no outcome after that time (`concurrent.futures.TimeoutError` on Python 3.10). The
                message says why the job still waits.
            CancelledError: The job was cancelled.
            RuntimeError: One of the batcher's own threads calls this without a *timeout*, and the job has no outcome
                yet. The wait could deadlock, because that thread may be needed to process the job.
            Exception: The exception with which the job failed.
        """
        if self._stage not in OVER:
            self._wait(timeout)
        if self._stage is not _SUCCEEDED:
            error = self.exception()
            if error is not None:
                # Without the frames that earlier calls have added to the traceback.
                trace = self._own[1] if self._own is not None else None
                try:
                    raise BaseException.with_traceback(error, trace)
                finally:
                    del self, error, trace  # the exception refers to this frame, so this would be a cycle
        return self._get_result()  # type: ignore[return-value]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result`, and return the exception with which the job failed, or None if it succeeded."""
        if self._stage not in OVER:
            self._wait(timeout)
        if self._stage is _CANCELLED:
            raise CancelledError
        return self._get_exception()

    def add_done_callback(self, fn: Callable[["JobFuture[Value]"], object]) -> None:
        """Call *fn* with this future when it is done, or at once if it is done already. Exceptions of *fn* are logged."""
        if self._stage not in OVER:
            with self._owner.mutex:
                attachments = self._attach()
                if self._stage not in OVER:  # R5
                    attachments.callbacks.append(fn)
                    return
        self._call(lambda: fn)

    def set_running_or_notify_cancel(self) -> NoReturn:
        """Raise `InvalidStateError`, because only the batcher settles this future."""
        raise InvalidStateError("the future of a job is settled by its batcher")

    def set_result(self, result: object) -> NoReturn:
        """Raise `InvalidStateError`, because only the batcher settles this future."""
        self.set_running_or_notify_cancel()

    def set_exception(self, exception: object) -> NoReturn:
        """Raise `InvalidStateError`, because only the batcher settles this future."""
        self.set_running_or_notify_cancel()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a JobFuture belongs to its batcher, and can't be copied or pickled: pass on its result()")

    def __repr__(self) -> str:
        return f"<JobFuture at {id(self):#x} {self._stage.value}>"

    def _wait(self, timeout: float | None) -> None:
        owner = self._owner
        if timeout is None and owner.is_own_thread() and not self.done():
            raise RuntimeError("a thread of the batcher can't wait for its jobs without a timeout: it has to do them")
        waiter = Waiter(owner.mutex)
        with owner.mutex:
            attachments = self._attach()
            waiter.caller = owner.current_caller()
        try:
            attachments[waiter] = None
            if self._stage not in OVER and not waiter.hear(timeout) and self._stage not in OVER:
                raise TimeoutError(self._owner.explain(self))
        finally:
            attachments.pop(waiter, None)

    def _attach(self) -> Attachments:
        if self._attachments is None:
            attachments = Attachments()
            if self._attachments is None:  # still: a finalizer may have created them
                self._attachments = attachments
        return self._attachments

    def _call(self, take: Callable[[], Any]) -> None:
        callback = None
        try:
            callback = take()
            if type(callback) is not KeepAlive:
                self._note_asked()
            callback(self)
        except BaseException as error:
            if callback is not None or not isinstance(error, IndexError):  # or another thread took the last one
                report("exception calling callback for %r", self, logger="concurrent.futures")

    # -- for the batcher --

    def _notify_watchers(self) -> None:
        """Notify the watchers of the outcome, or leave that to the thread that looks at this future now (F3)."""
        if self._attachments is not None and self._attachments.watched:
            condition = self._make_condition()
            if not condition.lock._is_owned():  # by the code that this call interrupts
                self._try_to_notify_watchers(condition)

    def _try_to_notify_watchers(self, condition: _Condition) -> None:
        """Notify the watchers of the outcome, if there is one, unless *condition* is locked."""
        # Checked before the lock is acquired: a thread that acquires it always notifies them, so others may leave.
        if not self._is_unannounced():
            return
        lock = condition.lock
        if lock._is_owned():  # still, since a signal kept an earlier call from its release
            self._notify_each(condition.waiters)
            return
        try:
            try:
                if lock.acquire(False):
                    self._notify_each(condition.waiters)
            finally:  # R8
                if lock._is_owned():
                    lock.release()
        finally:  # an exception may come in just before the release, too
            if lock._is_owned():
                lock.release()

    def _announce(self) -> None:
        """Wake all waiters and notify all watchers, in case an exception kept the thread that wrote the outcome from it."""
        with self._owner.mutex:
            self._wake_waiters()
        self._notify_watchers()

    def _wake_waiters(self) -> None:
        """Wake all threads that wait for the outcome, which exists. Call this with the mutex held."""
        if self._attachments is not None:
            self._attachments.notify_all()

    def _call_back(self) -> None:
        """Run the done-callbacks, each once. What one raises is logged, and the others run nevertheless."""
        callbacks = self._attachments.callbacks if self._attachments is not None else None
        while callbacks:
            self._call(partial(list.pop, callbacks, 0))

    def _fail_after_fork(self, error: BaseException) -> None:
        """Fail in a forked child, unless there is an outcome. The callbacks belong to the parent, and are not run."""
        self._attachments = None
        if not self.done():
            self._own = error, None
            self._stage = _FAILED

    # -- what ``concurrent.futures`` and ``asyncio`` look at --

    def _get_state(self) -> str:
        stage = self._stage  # once: it changes at any time
        if stage not in OVER:
            return RUNNING if stage is _RUNNING else PENDING
        attachments = self._attachments
        unannounced = attachments is not None and attachments.watched and not attachments.all_notified
        if stage is _CANCELLED:
            return CANCELLED if unannounced else CANCELLED_AND_NOTIFIED
        return RUNNING if unannounced else FINISHED

    def _get_result(self) -> JobResult[Value] | None:
        # Made on the first read, since many are never read; then kept, so that all readers get the same object.
        result = self._own_result
        if result is None and self._service is not None:
            made = make_result(self._value, self._service, self.submitted)
            if _HAS_GIL:
                # On one line and without a call (R5), so that no other thread comes between the look and the store either.
                self._own_result = result = made if self._own_result is None else self._own_result
            else:
                result = vars(self).setdefault("_own_result", made)
        return result

    def _get_exception(self) -> BaseException | None:
        failures = self._failures
        if failures is not None and self._error is not None:
            own = failures.exception_for_caller(self._error)
            vars(self).setdefault("_own", (own, own.__traceback__))  # in one step: another thread may ask, too
            failures.note_asked(self)
            self._failures = None
        return None if self._own is None else self._own[0]

    def _note_asked(self) -> None:
        failures = self._failures  # which another thread that asks takes away
        if failures is not None:
            failures.note_asked(self)

    def _get_condition(self) -> Any:
        with nullcontext() if self.done() else self._owner.mutex:
            if not self.done():
                self._attach().watched = True
        self._note_asked()
        return self._make_condition()

    def _make_condition(self) -> _Condition:
        condition: _Condition = vars(self).setdefault(f"_condition_of_{os.getpid()}", _Condition(self))
        return condition

    def _get_waiters(self) -> Any:
        if self._owner.is_own_thread() and not self.done():
            raise RuntimeError("a thread of the batcher can't wait for its jobs: it has to do them")
        return self._make_condition().waiters

    def _get_snapshot(self) -> tuple[bool, bool, JobResult[Value] | None, BaseException | None]:
        # Read by asyncio on Python 3.14.
        return self.done(), self.cancelled(), self._get_result(), self._get_exception()

    _state: str = property(_get_state)  # type: ignore[assignment]
    _result: JobResult[Value] = property(_get_result)  # type: ignore[assignment]
    _exception: BaseException | None = property(_get_exception)  # type: ignore[assignment]
    _condition: threading.Condition = property(_get_condition)  # type: ignore[assignment]
    _waiters: list[Any] = property(_get_waiters)  # type: ignore[assignment]

    def _is_unannounced(self) -> bool:
        attachments = self._attachments
        return attachments is not None and attachments.watched and not attachments.all_notified and self.done()

    def _notify_each(self, waiters: list[Any]) -> None:
        attachments = self._attachments
        if attachments is None or not self._is_unannounced():
            return
        if waiters:
            self._note_asked()
        for waiter in waiters:
            if type(waiter) in _STANDARD_WAITERS:
                self._notify_once(waiter, attachments)
            elif waiter not in attachments.notified:
                if self.cancelled():
                    waiter.add_cancelled(self)
                elif self._stage is _SUCCEEDED:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
                attachments.notified.append(waiter)
        attachments.all_notified = True

    def _notify_once(self, waiter: Any, attachments: Attachments) -> None:
        """Do what the methods of the waiter do, but once, wherever an exception breaks this off."""
        counts = type(waiter) is _AllCompletedWaiter
        if waiter not in attachments.notified:
            told, added = [waiter], [self]
            with getattr(waiter, "lock", None) or nullcontext():
                # In one step (R4): there is no call from here to the end of the block.
                attachments.notified += told
                waiter.finished_futures += added
                if counts:
                    waiter.num_pending_calls -= 1
        failed = self._stage is not _SUCCEEDED and self._stage is not _CANCELLED
        if not counts or not waiter.num_pending_calls or failed and waiter.stop_on_exception:
            waiter.event.set()  # even if told before, since an exception may have prevented just this


def are_errors(outcomes: list[Any]) -> Iterable[bool]:
    """Tell which of the outcomes are exceptions. By their types, for `isinstance` asks a value, which is a user's code."""
    return map(issubclass, map(type, outcomes), repeat(BaseException))


class Settled(NamedTuple):
    """What became of futures that were to get their outcomes."""

    done: list[JobFuture[Any]]
    """All futures that have an outcome now."""
    failures: int
    """The number of futures in `done` that have failed."""
    waiters: list[Waiter]
    """The waiters of all of them, which have been woken."""
    unannounced: list[JobFuture[Any]]
    """Those of them that have watchers or callbacks: the watchers are not notified yet, and the callbacks have not run."""


def settle_all(
    futures: Iterable[JobFuture[Any]],
    outcomes: list[Any],
    service: Service | None,
    failures: Failures | None,
    failed: JobState = _FAILED,
) -> Settled:
    """Give running jobs their outcomes. Jobs that have one are passed over. Call this with the mutex held.

    Args:
        futures: The futures of the jobs.
        outcomes: A value or an exception for each of them.
        service: The run of the processor that returned the values, or None if it did not.
        failures: Gives the exceptions to the callers. None if no outcome is an exception.
        failed: The stage of the jobs whose outcome is an exception.
    """
    done, count, waiters, unannounced = [], 0, list[Waiter](), []
    for future, outcome, broken in zip(futures, outcomes, are_errors(outcomes)):
        if broken and future._stage is _RUNNING and failures is not None:
            failures.add(future, outcome)
        # R5 from the look at the attachments on, or a callback that a finalizer adds could be missed.
        if future._stage is not _RUNNING:
            continue
        attachments = future._attachments
        if broken:
            future._error = outcome
            future._failures = failures
            future._stage = failed
            count += 1
        else:
            future._value = outcome
            future._service = service
            future._stage = _SUCCEEDED
        done.append(future)
        if attachments is not None:
            waiters += attachments.copy()
            if attachments.watched or attachments.callbacks:
                unannounced.append(future)
    for waiter in waiters:
        waiter.ring()
    return Settled(done, count, waiters, unannounced)


def _settle_attribute_layout() -> None:
    """Make a future with all the attributes that most futures ever hold, before any other is made.

    Objects of a class share a compact layout, which holds only the attributes that the first objects had (PEP 412).
    """
    nobody: Any = None
    future = JobFuture[None](None, nobody)
    future.submitted, future._epoch = NOW, 0
    future._value, future._service = None, Service(BatchInfo(0, 0, 0.0, None, ""), NOW, 0.0)
    future._get_result()


_settle_attribute_layout()
