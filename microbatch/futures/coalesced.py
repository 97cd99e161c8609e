"""Several callers share one job. Each has a future of its own, which has the outcome of the `SharedJob`.

The future of a caller stores no outcome, so it needs nothing done to it when the job is settled: it is done when the
job is done, or when its caller has cancelled it. The rules of ``job_future.py`` hold here, and also these:

C1. A caller adds its future to `SharedJob.callers`, and then checks that the job is joinable and has no outcome (L8).
    Otherwise, it takes the future out, and needs another job.
C2. The job stops being joinable when it has an outcome, and before its last caller cancels it. The thread that deletes
    `SharedJob.is_joinable` removes the job from the jobs in flight (L2, L3).
C3. A caller that cancels removes its future from `SharedJob.callers`. If that was not the last one, only this future is
    cancelled. Otherwise, the future is put back, and has the outcome of `SharedJob.cancel`.
"""

from collections.abc import Hashable
from typing import Any, TypeVar

from microbatch._basics.clock import NEVER
from microbatch._basics.waiting import Waiter
from microbatch.futures.exceptions import separate
from microbatch.futures.job_future import Attachments, FutureOwner, JobFuture, KeepAlive
from microbatch.results import JobResult, JobState

__all__ = ["CoalescedFuture", "SharedJob"]

Value = TypeVar("Value")

_CANCELLED = JobState.CANCELLED


_NOTHING = KeepAlive(None)


def _ignore(self: Any, value: object) -> None:
    """Do nothing: the setter of an attribute that depends on the callers."""


class SharedJob(JobFuture[Any]):
    """The future of a job that several callers share. Only the batcher and the futures of the callers use it.

    Attributes:
        callers: The futures of the callers, without those that cancelled. At the end, they are taken out.
        has_several: Whether there have ever been several callers.
        is_joinable: Whether callers may join.
    """

    has_several = False
    is_joinable = False

    def __init__(self, job: Any, owner: FutureOwner, in_flight: "dict[Hashable, SharedJob]", place: Hashable) -> None:
        super().__init__(job, owner)
        self.callers: dict[CoalescedFuture[Any], None] = {}
        self.is_joinable = True  # deleted by the thread that removes this job from the jobs in flight (C2)
        self._in_flight = in_flight
        self._place = place
        self._attachments = Attachments()
        self._attachments.callbacks = [_NOTHING]  # so that the batcher calls `_run_callbacks`

    def add(self, caller: "CoalescedFuture[Any]") -> bool:
        """Have a caller join, and return whether it has joined."""
        caller.shared = self
        self.callers[caller] = None
        if len(self.callers) > 1:
            self.has_several = True
        if self._stage is None and self.is_joinable:  # C1
            return True
        self.callers.pop(caller, None)
        return False

    def retire(self) -> None:
        """Let no more callers join."""
        try:
            del self.is_joinable
        except AttributeError:  # another thread has
            return
        if self._in_flight.get(self._place) is self:  # otherwise it was never entered
            self._in_flight.pop(self._place, None)

    # The job expires when all of its callers would let it expire.
    _expires: float = property(  # type: ignore[assignment]
        lambda self: max([caller._expires for caller in list(self.callers)], default=NEVER), _ignore
    )
    expires_in: float = property(lambda self: self._expires - self.submitted, _ignore)  # type: ignore[assignment]

    def _notify_watchers(self) -> None:
        super()._notify_watchers()
        for caller in list(self.callers):
            caller._notify_watchers()

    def _run_callbacks(self) -> None:
        self.retire()
        super()._run_callbacks()
        for caller in list(self.callers):
            caller._run_callbacks()
            if not caller._is_unannounced():  # otherwise, the leader still has to notify its watchers (F3)
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
        self._all.pop(waiter, None)
        return super().pop(waiter, default)


class CoalescedFuture(JobFuture[Value]):
    """The future of one caller of a `SharedJob`.

    Attributes:
        shared: The job.
    """

    shared: SharedJob
    _has_left = False  # whether this caller cancelled and others did not

    _stage: JobState | None = property(  # type: ignore[assignment]
        lambda self: _CANCELLED if self._has_left else self.shared._stage
    )
    _epoch: int = property(lambda self: self.shared._epoch)  # type: ignore[assignment]
    key: Hashable = property(lambda self: self.shared.key)
    weight: float = property(lambda self: self.shared.weight)  # type: ignore[assignment]

    @property
    def state(self) -> JobState:
        """See `JobFuture.state`."""
        return _CANCELLED if self._has_left else self.shared.state

    @property
    def _is_waiting(self) -> bool:
        return not self._has_left and self.shared._is_waiting

    def cancel(self) -> bool:
        """Cancel this future if no worker has taken the job, and return whether it is cancelled. Never blocks.

        The job is cancelled when all of its callers have cancelled.
        """
        shared = self.shared
        callers = shared.callers
        if not self._is_waiting:
            return self._stage is _CANCELLED
        try:
            del callers[self]
        except KeyError:
            return self._stage is _CANCELLED
        # No interruption is possible until the next call (L3).
        if callers:
            self._has_left = True
            self._tell()
            return True
        callers[self] = None  # C3
        shared.retire()
        if len(callers) > 1:  # another caller has joined before that
            return self.cancel()
        if shared.cancel():
            return True
        if shared.done():  # without the GIL, perhaps while this future was not among the callers
            shared._notify_watchers()
            shared._run_callbacks()
        return False

    def _tell(self) -> None:
        """Wake all waiters and run the callbacks. The leader notifies the watchers (F3)."""
        try:
            self._wake_waiters()
            self._run_callbacks()
        except BaseException:  # from a signal handler
            self._wake_waiters()
            self._run_callbacks()
            raise
        finally:
            if self._is_unannounced():
                self._owner.post(self._notify_watchers)

    def _attach(self) -> Attachments:
        attachments: Attachments = vars(self).setdefault("_attachments", _CallerAttachments(self.shared))
        return attachments

    def _explain(self) -> str:
        return self.shared._explain()

    def _get_result(self) -> JobResult[Value] | None:
        return self.shared._get_result()

    def _get_exception(self) -> BaseException | None:
        if self._caller_error is None:
            error = self.shared._get_exception()
            if error is not None:
                if self.shared.has_several:
                    error = separate(error)
                # In one step, because another thread may do the same.
                vars(self).setdefault("_caller_error", (error, error.__traceback__))
        return None if self._caller_error is None else self._caller_error[0]

    def _note_asked(self) -> None:
        self.shared._note_asked()
