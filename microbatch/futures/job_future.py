"""The future of one job. Only this file knows the internals of `concurrent.futures.Future`.

A `Future` creates a condition, two lists and a lock for threads that may wait for it. Few jobs need these, but they
take three quarters of the time that a job costs. So a `JobFuture` creates each of them when it is first needed, and all
futures of a batch are settled together. The rules of ``_engine/__init__.py`` hold here, and also these:

F1. A thread settles a future by deleting `JobFuture._unsettled`, which only one thread can do. It then writes the
    outcome, and the `_stage` last. Until then, the job waits if it is in `FutureOwner.waiting`, and otherwise a worker
    has it. The thread that removes it from there wins the race between cancellation, expiry and dispatch.
F2. A thread that finds no outcome attaches a waiter or a callback, and then looks for the outcome again. A thread that
    settles the future writes the outcome, and then looks for waiters and callbacks. So at least one of them sees the
    other. An outcome never changes.
F3. ``concurrent.futures.wait`` and ``as_completed`` read the `_condition` of a future, and hold it while the states of
    their futures must not change. From then on, the future is *watched*, and they add *watchers* to it. To them, the
    future is not done until the watchers have been notified, with the `_condition` held. Each watcher is notified once.
    If another thread holds the lock of the condition, that thread notifies the watchers when it releases the lock (L7).
    One of the two threads always does: the first writes the outcome and then tries the lock, and the second releases
    the lock and then checks for an outcome. If a caller cancels, the leader notifies the watchers, because a signal
    could keep the caller from releasing the lock.
F4. Callbacks run without any lock, in a thread that settles the future, cancels it, or adds a callback.
F5. In a forked child, a thread that does not exist there may hold a `_condition`. So each process has its own.
F6. A future keeps the exception that the processor raised. If several jobs fail with it, each gets a copy when a caller
    asks for it: see ``exceptions.py``.
"""

import os
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError, TimeoutError, _base
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.log import report
from microbatch._basics.waiting import Flag, Inbox, Waiter, Waiters, is_unlocked
from microbatch.futures.exceptions import Failures
from microbatch.results import BatchInfo, JobResult, JobState, Service, make_result

if TYPE_CHECKING:
    import contextvars

__all__ = [
    "NOT_ACCEPTED",
    "Attachments",
    "FutureOwner",
    "JobFuture",
    "KeepAlive",
    "are_errors",
    "settle_all",
]

Value = TypeVar("Value")

# Globals, because looking up a member of an enum takes much longer.
_QUEUED, _BATCHED, _RUNNING = JobState.QUEUED, JobState.BATCHED, JobState.RUNNING
_SUCCEEDED, _FAILED = JobState.SUCCEEDED, JobState.FAILED
_CANCELLED, _DROPPED = JobState.CANCELLED, JobState.DROPPED
_AllCompletedWaiter: Any = _base._AllCompletedWaiter
_STANDARD_WAITERS = (_AllCompletedWaiter, _base._FirstCompletedWaiter, _base._AsCompletedWaiter)
_HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


NOT_ACCEPTED = sys.maxsize
"""The epoch of a job that is not accepted yet."""


class FutureOwner(Protocol):
    """The batcher's side of a future. See `JobQueue` for its attributes."""

    waiting: "dict[JobFuture[Any], None]"
    cancelled: "Inbox[JobFuture[Any]]"
    dropped: "Inbox[JobFuture[Any]]"
    has_news: bool
    call_leader: Callable[[], None]
    this_thread: Any

    def post(self, call: Callable[[], None]) -> None:
        """Make the next leader run *call*."""

    def current_caller(self) -> Any:
        """Return the `Caller` of the calling thread, which waits for a result."""

    def explain(self, future: "JobFuture[Any]") -> str:
        """Return why the job has no outcome yet."""

    def is_batched(self, future: "JobFuture[Any]") -> bool:
        """Return whether the job is in an open batch."""


class Attachments(Waiters):
    """The waiters, watchers and callbacks of a future.

    Attributes:
        watched: Whether the future is watched (F3).
        all_notified: Whether all watchers have been notified of the outcome.
        notified: The watchers that have been notified.
        callbacks: The done-callbacks that have not run yet.
    """

    # The defaults are in the class, because most futures have only waiters.
    watched = False
    all_notified = False
    notified: Sequence[Any] = ()
    callbacks: Sequence[Callable[[Any], object]] = ()


class KeepAlive:
    """A done-callback that keeps *owner* alive until the job is done. It does not count as asking for the outcome."""

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __call__(self, future: Any) -> None:
        """Do nothing."""


class _WatcherFlag(Flag):
    """The flag of a watcher. ``as_completed`` takes out what has finished, and then clears it."""

    def __init__(self, watcher: Any) -> None:
        super().__init__(watcher.event.is_set())
        self._watcher = watcher

    def clear(self) -> None:
        """Clear the flag, unless another future has finished in the meantime."""
        super().clear()
        if self._watcher.finished_futures:
            self.set()


class _Watchers(list[Any]):
    """The watchers of a future: the objects through which ``wait`` and ``as_completed`` are notified.

    Each gets a `Flag` in place of its event, and nothing in place of its lock. Otherwise a signal that interrupts one
    of these calls could leave a lock locked, and the thread that settles the future would block on it. With the GIL,
    the steps that the lock of a watcher guards are atomic anyway (L3), except the one that `_WatcherFlag` corrects.
    """

    def append(self, waiter: Any) -> None:
        """Add a watcher, before its thread begins to wait."""
        if isinstance(getattr(waiter, "event", None), threading.Event):
            waiter.event = _WatcherFlag(waiter)
            if _HAS_GIL:
                waiter.lock = nullcontext()
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

    # The defaults are in the class, so that attributes that few jobs need cost no time and no memory in a future.
    key: Hashable = None
    weight: float = 1.0
    expires_in = NEVER
    _expires = NEVER
    _epoch = NOT_ACCEPTED
    submitted: float
    _stage: JobState | None = None  # None until there is an outcome
    _value: Any = None
    _service: Service | None = None
    _cached_result: JobResult[Any] | None = None
    _error: BaseException | None = None
    _failures: Failures | None = None
    # The exception for the caller, and its traceback before it is raised.
    _caller_error: tuple[BaseException, Any] | None = None
    _context: "contextvars.Context | None" = None
    _attachments: Attachments | None = None
    _bounds: Sequence[Any] = ()  # the limits of the queue that the job has entered

    def __init__(self, job: Any, owner: FutureOwner) -> None:
        self._job = job
        self._owner = owner
        self._unsettled = True  # deleted by the thread that settles this future (F1)

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
        """The state of the job now. Until it is one of the last five, it may change at any time."""
        if self._is_waiting:
            return _BATCHED if self._owner.is_batched(self) else _QUEUED
        return self._stage or _RUNNING

    @property
    def _is_waiting(self) -> bool:
        """Whether the job still waits for a worker, and is neither cancelled nor expired."""
        return self in self._owner.waiting

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
        owner = self._owner
        try:
            try:
                del owner.waiting[self]
            except KeyError:  # another thread has decided what happens to the job
                return self._stage is _CANCELLED
            # No interruption is possible until the end of `append` (L3).
            del self._unsettled
            self._stage = _CANCELLED
            try:
                owner.cancelled.append(self)
            finally:
                owner.has_news = True
                try:
                    owner.call_leader()
                except RuntimeError as error:
                    if not is_unlocked(error):  # if it is, another thread has called the leader already
                        raise
        finally:  # after a signal too
            if self._stage is _CANCELLED:
                try:
                    self._wake_waiters()
                    self._run_callbacks()
                except BaseException:  # from a signal handler
                    self._wake_waiters()
                    self._run_callbacks()
                    raise
        return True

    def cancelled(self) -> bool:
        """Return whether the job was cancelled."""
        return self._stage is _CANCELLED

    def running(self) -> bool:
        """Return whether the batch of the job runs now."""
        return not self._is_waiting and self._stage is None

    def done(self) -> bool:
        """Return whether the future has an outcome: a result, an exception or a cancellation."""
        return self._stage is not None

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
        if self._stage is None:
            self._wait(timeout)
        if self._stage is not _SUCCEEDED:
            error = self.exception()
            if error is not None:
                # Without the frames that earlier calls have added to the traceback.
                trace = self._caller_error[1] if self._caller_error is not None else None
                try:
                    raise BaseException.with_traceback(error, trace)
                finally:
                    del self, error, trace  # the exception refers to this frame, so this would be a cycle
        return self._get_result()  # type: ignore[return-value]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result`, and return the exception with which the job failed, or None if it succeeded."""
        if self._stage is None:
            self._wait(timeout)
        if self._stage is _CANCELLED:
            raise CancelledError
        return self._get_exception()

    def add_done_callback(self, fn: Callable[["JobFuture[Value]"], object]) -> None:
        """Call *fn* with this future when it is done, immediately if it already is. Exceptions of *fn* are logged."""
        if self._stage is None:
            attachments = self._attach()
            callbacks = vars(attachments).setdefault("callbacks", [])
            callbacks.append(fn)
            if self.done():  # F2
                self._run_each(callbacks)
        else:
            self._run_callback(lambda: fn)

    def set_running_or_notify_cancel(self) -> NoReturn:
        """Raise `InvalidStateError`, because only the batcher settles this future."""
        raise InvalidStateError("only the batcher can settle the future of a job")

    def set_result(self, result: object) -> NoReturn:
        """Raise `InvalidStateError`, because only the batcher settles this future."""
        self.set_running_or_notify_cancel()

    def set_exception(self, exception: object) -> NoReturn:
        """Raise `InvalidStateError`, because only the batcher settles this future."""
        self.set_running_or_notify_cancel()

    def __await__(self) -> NoReturn:
        raise TypeError("a JobFuture can't be awaited: write `await microbatch.aio.submit(batcher, job)`")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a JobFuture can't be copied or pickled, because it belongs to its batcher: use its result()")

    def __repr__(self) -> str:
        return f"<JobFuture at {id(self):#x} {self.state.value}>"

    def _wait(self, timeout: float | None) -> None:
        owner = self._owner
        if timeout is None and owner.this_thread.must_not_wait() and not self.done():
            raise RuntimeError(
                "a thread of the batcher can't wait for one of its jobs without a timeout: that could deadlock"
            )
        attachments, waiter = self._attach(), Waiter()
        waiter.caller = owner.current_caller()
        try:
            attachments[waiter] = None
            if self._stage is None and not waiter.wait(timeout) and self._stage is None:
                raise TimeoutError(self._explain())
        finally:
            attachments.pop(waiter, None)

    def _explain(self) -> str:
        return self._owner.explain(self)

    def _wait_until(self, moment: float, clock: Any) -> None:
        """Wait for the outcome until a moment on the clock of the batcher."""
        attachments, waiter = self._attach(), Waiter()
        try:
            attachments[waiter] = None
            if self._stage is None:
                clock.wait_until(waiter, moment)
        finally:
            attachments.pop(waiter, None)

    def _attach(self) -> Attachments:
        """Return the attachments of this future. The caller adds something, and then looks for the outcome again."""
        attachments: Attachments = vars(self).setdefault("_attachments", Attachments())
        return attachments

    def _run_callback(self, take: Callable[[], Any]) -> None:
        """Run the callback that *take* returns, and log its exception. If *take* raises IndexError, none is left."""
        callback = None
        try:
            callback = take()
            if type(callback) is not KeepAlive:
                self._note_asked()
            callback(self)
        except BaseException as error:
            if callback is not None or not isinstance(error, IndexError):  # otherwise another thread took the last one
                report("exception calling callback for %r", self, logger="concurrent.futures")

    # -- for the batcher --

    def _notify_watchers(self) -> None:
        """Notify the watchers of the outcome, or leave that to the thread that holds the condition now (F3)."""
        attachments = self._attachments
        if attachments is not None and attachments.watched:
            condition = self._make_condition()
            if not condition.lock._is_owned():  # if it is, then by code that this call has interrupted
                self._try_to_notify_watchers(condition)

    def _try_to_notify_watchers(self, condition: _Condition) -> None:
        """Notify the watchers of the outcome, if there is one, unless *condition* is locked."""
        # Checked before the lock is acquired, because a thread that acquires it always notifies them.
        if not self._is_unannounced():
            return
        lock = condition.lock
        if lock._is_owned():  # because a signal kept an earlier call in this thread from releasing it
            self._notify_each(condition.waiters)
            return
        try:
            try:
                if lock.acquire(False):
                    self._notify_each(condition.waiters)
            except BaseException:  # from a signal handler
                if lock._is_owned():
                    self._notify_each(condition.waiters)
                raise
            finally:  # L5
                if lock._is_owned():
                    lock.release()
        finally:  # L5: an exception may come just before the release too
            if lock._is_owned():
                lock.release()

    def _announce(self) -> None:
        """Wake all waiters and notify all watchers, in case the thread that wrote the outcome was interrupted."""
        self._wake_waiters()
        self._notify_watchers()

    def _wake_waiters(self) -> None:
        """Wake all threads that wait for the outcome."""
        attachments = self._attachments
        if attachments is not None:
            attachments.notify_all()

    def _run_callbacks(self) -> None:
        """Run each of the done-callbacks once. If one raises, the exception is logged, and the others still run."""
        attachments = self._attachments
        if attachments is not None:
            self._run_each(attachments.callbacks)

    def _run_each(self, callbacks: Any) -> None:
        while callbacks:
            self._run_callback(partial(callbacks.pop, 0))

    def _drop(self, error: BaseException) -> bool:
        """Fail the job if it waits for a worker, and return whether it did. The leader notifies the waiters."""
        owner, caller_error = self._owner, (error, None)
        try:
            del owner.waiting[self]
        except KeyError:  # another thread has decided what happens to the job
            return False
        # No interruption is possible until the end of `append` (L3).
        del self._unsettled
        self._caller_error = caller_error
        self._stage = _DROPPED
        owner.dropped.append(self)
        return True

    def _expires_by(self, now: float) -> bool:
        """Return whether the job really expires now, if it still waits."""
        return True

    def _fail_after_fork(self, error: BaseException) -> None:
        """Fail with *error* in a forked child, unless there is an outcome. Only the parent runs the callbacks."""
        if not self.done():
            self._caller_error = error, None
            self._stage = _FAILED
            self._wake_waiters()  # a signal handler that forks may have interrupted a wait
            vars(self).pop("_attachments", None)

    # -- attributes that ``concurrent.futures`` and ``asyncio`` read --

    def _get_state(self) -> str:
        stage = self._stage  # read once, because it may change at any time
        if stage is None:
            return PENDING if self._is_waiting else RUNNING
        if stage is _CANCELLED:
            return CANCELLED if self._is_unannounced() else CANCELLED_AND_NOTIFIED
        return RUNNING if self._is_unannounced() else FINISHED

    def _get_result(self) -> JobResult[Value] | None:
        # Created on the first read, because many are never read, and kept, so that all callers get the same object.
        result = self._cached_result
        if result is None and self._service is not None:
            made = make_result(self._value, self._service, self.submitted)
            if _HAS_GIL:
                # On one line and without a call (L3), so that no other thread runs between the check and the write.
                self._cached_result = result = made if self._cached_result is None else self._cached_result
            else:
                result = vars(self).setdefault("_cached_result", made)
        return result

    def _get_exception(self) -> BaseException | None:
        failures = self._failures
        if failures is not None and self._error is not None:
            error = failures.exception_for_caller(self._error)
            # In one step, because another thread may do the same.
            vars(self).setdefault("_caller_error", (error, error.__traceback__))
            failures.note_asked(self)
            self._failures = None
        return None if self._caller_error is None else self._caller_error[0]

    def _note_asked(self) -> None:
        failures = self._failures  # read once, because another thread may set it to None
        if failures is not None:
            failures.note_asked(self)

    def _get_condition(self) -> Any:
        if self._stage is None:
            self._attach().watched = True
        self._note_asked()
        return self._make_condition()

    def _make_condition(self) -> _Condition:
        condition: _Condition = vars(self).setdefault(f"_condition_of_{os.getpid()}", _Condition(self))
        return condition

    def _get_waiters(self) -> Any:
        if self._owner.this_thread.must_not_wait() and not self.done():
            raise RuntimeError("a thread of the batcher can't wait for one of its jobs: that could deadlock")
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
        """Whether there is an outcome that the watchers have not been notified of."""
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
            elif not attachments.all_notified and waiter not in attachments.notified:
                if self.cancelled():
                    waiter.add_cancelled(self)
                elif self._stage is _SUCCEEDED:
                    waiter.add_result(self)
                else:
                    waiter.add_exception(self)
                attachments.notified = [*attachments.notified, waiter]
        attachments.all_notified, attachments.notified = True, ()  # they refer to this future

    def _notify_once(self, waiter: Any, attachments: Attachments) -> None:
        """Do what the methods of a standard waiter do, but only once, even if an exception interrupts this anywhere."""
        counts = type(waiter) is _AllCompletedWaiter
        notified, added, finished = vars(attachments).setdefault("notified", []), [waiter], [self]
        with getattr(waiter, "lock", None) or nullcontext():
            # In one step (L3): there is no call from here to the end of the block.
            if not attachments.all_notified and waiter not in notified:
                notified += added
                waiter.finished_futures += finished
                if counts:
                    waiter.num_pending_calls -= 1
        failed = self._stage is not _SUCCEEDED and self._stage is not _CANCELLED
        if not counts or not waiter.num_pending_calls or failed and waiter.stop_on_exception:
            waiter.event.set()  # even if it was notified before, because an exception may have prevented just this


def are_errors(outcomes: list[Any]) -> Iterable[bool]:
    """Return whether each of the outcomes is an exception.

    This looks at the types, because `isinstance` also reads the ``__class__`` of a value, which may run a user's code.
    """
    return map(issubclass, map(type, outcomes), repeat(BaseException))


def settle_all(
    futures: Iterable[JobFuture[Any]],
    outcomes: list[Any],
    service: Service | None,
    failures: Failures | None,
    failed: JobState = _FAILED,
) -> tuple[list[JobFuture[Any]], int]:
    """Settle those jobs that are not settled yet. Return their futures, and how many of them have failed.

    Args:
        futures: The futures of the jobs. None of them waits for a worker.
        outcomes: A value or an exception for each job, in order.
        service: The data that all results share. None if the processor returned no values.
        failures: Gives each caller its exception. None if all outcomes are values.
        failed: The state of a job whose outcome is an exception.
    """
    done, count = [], 0
    for future, outcome, broken in zip(futures, outcomes, repeat(False) if failures is None else are_errors(outcomes)):
        if broken and future._stage is None and failures is not None:
            failures.add(future, outcome)
        try:
            del future._unsettled
        except AttributeError:  # another thread has settled it
            if failures is not None:
                failures.note_asked(future)
            continue
        # No interruption is possible until the stage is written (L3).
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
    return done, count


def _settle_attribute_layout() -> None:
    """Create a future with all attributes that most futures ever have, before any other future is created.

    The objects of a class share a compact layout, which has only the attributes of the first objects (PEP 412).
    """
    nobody: Any = None
    future = JobFuture[None](None, nobody)
    future.submitted, future._epoch = NOW, 0
    future._value, future._service, future._stage = None, Service(BatchInfo(0, 0, 0.0, None, ""), NOW, 0.0), _SUCCEEDED
    future._get_result()


_settle_attribute_layout()
