"""Several callers share one job. Each has a future of its own, which has the outcome of the `SharedJob`.

The rules of ``job_future.py`` hold here, and also these:

C1. Callers join and leave one at a time. A thread that does so deletes `SharedJob._free`, makes its changes, and
    restores it. Between these statements there is no call, so nothing can interrupt the thread (L3). Without the GIL,
    another thread that finds `_free` missing tries again. Python 3.10 could interrupt the thread where it finds that
    there is nothing to change, so that is checked before.
C2. A caller can join a job that was accepted and is not settled. If the last caller cancels, it first keeps others from
    joining, and then the job itself decides whether it is cancelled (F1).
C3. A thread that removes a job from `JobsInFlight` deletes `JobsInFlight._free` in the same way. Others then can't
    remove the next job instead. This may compare keys of users' classes, and so run users' code, so a thread that finds
    `_free` missing does not try for ever. The next caller removes a job that is left.
C4. The future of a caller stores no outcome, but reads that of the job. The first thread that reads an outcome, or
    leaves the job, writes it to `CoalescedFuture._fate`, which never changes then (F2).
"""

from collections.abc import Hashable
from typing import Any, TypeVar

from microbatch._basics.clock import NEVER, let_others_run
from microbatch._basics.waiting import Waiter
from microbatch.futures.exceptions import separate
from microbatch.futures.job_future import NOT_ACCEPTED, Attachments, FutureOwner, JobFuture, KeepAlive
from microbatch.results import JobResult, JobState

__all__ = ["TRIES", "CoalescedFuture", "JobsInFlight", "SharedJob"]

Value = TypeVar("Value")

_CANCELLED = JobState.CANCELLED
_NOTHING = KeepAlive(None)

TRIES = 2_000
"""How often a thread tries what it can't do while another one does something else, which it may have interrupted."""


class JobsInFlight(dict[Hashable, "SharedJob"]):
    """The jobs that callers may join, by their `SharedJob.place`. A job is added with `setdefault`."""

    def __init__(self) -> None:
        super().__init__()
        self._free = True

    def try_to_remove(self, job: "SharedJob") -> bool:
        """Remove a job if it is there, and no other job. Return False if another thread removes one now."""
        try:
            del self._free
        except AttributeError:  # C3
            return False
        try:
            if self.get(job.place) is job:
                del self[job.place]
        finally:
            self._free = True
        return True


class SharedJob(JobFuture[Any]):
    """The future of a job that several callers share. Only the batcher and the futures of the callers use it.

    Attributes:
        place: Its key in the dict of the jobs in flight.
        callers: The futures of the callers that have not cancelled. In the end, they are taken out.
        has_several: Whether there have ever been several callers.
        is_closing: Whether no caller can join now, because the job may be about to be cancelled or to expire.
    """

    has_several: bool = False
    is_closing: bool = False
    expires_in: float = NEVER

    def __init__(self, job: Any, owner: FutureOwner, in_flight: JobsInFlight, place: Hashable) -> None:
        super().__init__(job, owner)
        self.callers: dict[CoalescedFuture[Any], None] = {}
        self._in_flight = in_flight
        self.place = place
        self._free = True
        self._attachments = Attachments()
        self._attachments.callbacks = [_NOTHING]  # so that the batcher calls `_run_callbacks`

    def add(self, caller: "CoalescedFuture[Any]") -> bool:
        """Have a caller join, and return whether it has joined."""
        caller.shared = self  # before any other thread finds the caller
        self._put_off(caller)  # before the check, which fails if the job is about to expire
        joined = self._add(caller)
        if joined:
            self._put_off(caller)  # in case another caller has overwritten it, without the GIL
        if self._stage is not None:  # nobody waits for this caller yet, so there is nothing to tell it
            self.callers.pop(caller, None)
        return joined

    def _add(self, caller: "CoalescedFuture[Any]") -> bool:
        while self._stage is None and self._epoch != NOT_ACCEPTED and not self.is_closing:
            joined = self._try_to_add(caller)
            if joined is not None:
                return joined
            let_others_run()
        return False

    def _put_off(self, caller: "CoalescedFuture[Any]") -> None:
        if caller._expires > self._expires:
            self._expires, self.expires_in = caller._expires, caller._expires - self.submitted

    def _try_to_add(self, caller: "CoalescedFuture[Any]") -> bool | None:
        try:
            del self._free
        except AttributeError:  # C1
            return None
        try:
            joined = self._stage is None and self._epoch != NOT_ACCEPTED and not self.is_closing
            if joined:
                self.callers[caller] = None
                self.has_several = True
        finally:
            self._free = True
        return joined

    def _expires_by(self, now: float) -> bool:
        while (expires := self._try_to_expire(now)) is None:
            let_others_run()
        return expires

    def _try_to_expire(self, now: float) -> bool | None:
        try:
            del self._free
        except AttributeError:  # C1
            return None
        try:
            expires = self._expires <= now
            self.is_closing |= expires  # so that no caller joins a job that is about to expire
        finally:
            self._free = True
        return expires

    def leave(self, caller: "CoalescedFuture[Any]") -> bool:
        """Take a caller out, unless it is the last one. Return whether it is, and then no other caller can join."""
        is_last = self._leave(caller)
        if is_last:
            self.callers[caller] = None
        return is_last

    def _leave(self, caller: "CoalescedFuture[Any]") -> bool:
        while caller in self.callers:
            is_last = self._try_to_leave(caller)
            if is_last is not None:
                return is_last
            let_others_run()
        return False

    def _try_to_leave(self, caller: "CoalescedFuture[Any]") -> bool | None:
        try:
            del self._free
        except AttributeError:  # C1
            return None
        try:
            try:
                del self.callers[caller]
                is_last = self.is_closing = not self.callers
            except KeyError:
                is_last = False
        finally:
            self._free = True
        return is_last

    def retire(self) -> None:
        """Make way for an equal job, once this one is done."""
        for _ in range(TRIES):
            if self._in_flight.try_to_remove(self):
                return
            let_others_run()

    def _notify_watchers(self) -> None:
        super()._notify_watchers()
        for caller in list(self.callers):
            caller._notify_watchers()
        if self._stage is _CANCELLED:  # only now are these callers told everything (F3)
            self._run_callbacks()

    def _run_callbacks(self) -> None:
        self.retire()
        super()._run_callbacks()
        for caller in list(self.callers):
            caller._run_callbacks()
            if not caller._is_unannounced():
                self.callers.pop(caller, None)


class _CallerAttachments(Attachments):
    """The attachments of a caller. Its waiters are among those of the job too, so they are woken with all others."""

    def __init__(self, shared: SharedJob) -> None:
        super().__init__()
        self._all = shared._attach()

    def __setitem__(self, waiter: Waiter, value: None) -> None:
        super().__setitem__(waiter, value)
        self._all[waiter] = value

    def pop(self, waiter: Waiter, default: Any = None) -> Any:
        """Remove a waiter from both."""
        self._all.pop(waiter, None)
        return super().pop(waiter, default)


class CoalescedFuture(JobFuture[Value]):
    """The future of one caller of a `SharedJob`.

    Attributes:
        shared: The job.
    """

    shared: SharedJob
    _fate: JobState | None = None  # the state in which the job, or this caller, has ended

    def _get_stage(self) -> JobState | None:
        fate = self._fate
        if fate is None and (stage := self.shared._stage) is not None:
            fate = vars(self).setdefault("_fate", stage)  # in one step, because another thread may do the same
        return fate

    _stage: JobState | None = property(_get_stage)  # type: ignore[assignment]
    _epoch: int = property(lambda self: self.shared._epoch)  # type: ignore[assignment]
    key: Hashable = property(lambda self: self.shared.key)
    weight: float = property(lambda self: self.shared.weight)  # type: ignore[assignment]

    @property
    def job(self) -> Any:
        """See `JobFuture.job`."""
        return JobFuture.job.fget(self)  # type: ignore[attr-defined]

    @job.deleter
    def job(self) -> None:
        JobFuture.job.fdel(self)  # type: ignore[attr-defined]
        vars(self.shared).pop("_job", None)

    @property
    def state(self) -> JobState:
        """See `JobFuture.state`."""
        return self._stage or self.shared.state

    @property
    def _is_waiting(self) -> bool:
        return self._fate is None and self.shared._is_waiting

    def cancel(self) -> bool:
        """Cancel this future if no worker has taken the job, and return whether it is cancelled. Never blocks.

        The job is cancelled when all of its callers have cancelled.
        """
        if self._is_waiting:
            shared = self.shared
            try:
                # If a worker has just taken the job, it may be done already, which this caller may not have been told.
                if shared.leave(self) and not shared.cancel() and shared.done():
                    shared._notify_watchers()
                    shared._run_callbacks()
            finally:
                try:
                    self._end_if_left()
                except BaseException:  # from a signal handler
                    self._end_if_left()
                    raise
        return self._stage is _CANCELLED

    def give_up(self) -> None:
        """Cancel, because an exception has kept `Coalescer.submit` from returning this future."""
        if "shared" in vars(self):
            self.cancel()

    def _end_if_left(self) -> None:
        """If this caller has left its job, wake its waiters and run its callbacks. Can be called again."""
        shared = self.shared
        if self in shared.callers:  # it was the last one, and the job was not cancelled
            shared.is_closing = False
        else:
            if not shared.callers:
                shared.cancel()
            vars(self).setdefault("_fate", shared._stage or _CANCELLED)
            self._wake_waiters()
            self._run_callbacks()
            if self._is_unannounced():
                self._owner.post(self._notify_watchers)  # F3

    def _attach(self) -> Attachments:
        attachments: Attachments = vars(self).setdefault("_attachments", _CallerAttachments(self.shared))
        return attachments

    def _explain(self) -> str:
        return self.shared._explain()

    def _get_result(self) -> JobResult[Value] | None:
        return self.shared._get_result()

    def _get_exception(self) -> BaseException | None:
        if self._caller_error is None and self._stage is not _CANCELLED:
            error = self.shared._get_exception()
            if error is not None:
                if self.shared.has_several:
                    error = separate(error)
                # In one step, because another thread may do the same.
                vars(self).setdefault("_caller_error", (error, error.__traceback__))
        return None if self._caller_error is None else self._caller_error[0]

    def _note_asked(self) -> None:
        if self._stage is not _CANCELLED:
            self.shared._note_asked()
