"""The limits on waiting jobs: on their number, on their number for each key, and on their total weight."""

import threading
import weakref
from _weakref import _remove_dead_weakref  # type: ignore[attr-defined]
from collections.abc import Hashable
from typing import Any

from microbatch._basics.clock import NEVER, Clock, let_others_run
from microbatch._basics.waiting import Waiter, Waiters, first_of
from microbatch._forming.lanes import safe
from microbatch.errors import BacklogFull, JobTooLarge
from microbatch.futures.job_future import NOT_ACCEPTED, JobFuture

__all__ = ["Bound", "Bounds", "KeyBound"]

AnyJob = JobFuture[Any]

_TURN = 1.0
"""How many seconds an event loop has to use its turn in a line (L10)."""


class Bound:
    """The limit on the number of waiting jobs. Any thread may call any method at any time.

    A job enters a bound before it waits in the queue, and leaves when it waits no more.

    Attributes:
        name: The name of the limit: an argument of `Batcher`.
        key: The key of the jobs, if the limit is one for each key.
        in_order: Whether only the first caller in the line may enter.
        limit: The limit.
        jobs: The jobs in the bound, the first one first. For the limit on all jobs, this is `JobQueue.waiting` itself.
        line: The callers that wait until their jobs can enter.
    """

    __slots__ = ("limit", "jobs", "line", "__weakref__")
    name, in_order = "max_pending", False
    key: Hashable = None

    def __init__(self, limit: float, jobs: dict[AnyJob, Any], line: Waiters) -> None:
        self.limit = limit
        self.jobs = jobs
        self.line = line

    def enter(self, job: AnyJob) -> bool:
        """Add a job if there is space, and return whether it is in the bound now. It may have been in it before."""
        if job in self.jobs:
            return True
        while not self.is_full(job):
            self.jobs[job] = None
            if self.keep(job):
                return True
        return False

    def keep(self, job: AnyJob) -> bool:
        """Return whether a job that was added may stay. If it may not, remove it.

        Of the jobs that several threads have added, the first ones stay.
        """
        jobs = self.jobs
        if len(jobs) <= self.limit or job in list(jobs)[: int(self.limit)]:
            return True
        return jobs.pop(job, self) is self  # it is gone, so another thread has decided about it

    def add(self, job: AnyJob) -> None:
        """Add a job, even beyond the limit."""
        self.jobs[job] = None

    def leave(self, job: AnyJob) -> None:
        """Remove a job if it is still there, and let the first caller in the line look again."""
        self.jobs.pop(job, None)
        if self.line:
            self.line.notify()

    def is_full(self, job: AnyJob) -> bool:
        """Return whether there is no space for a job like this one."""
        return len(self.jobs) >= self.limit

    def is_exceeded(self) -> bool:
        """Return whether the oldest job has to make space."""
        return len(self.jobs) > self.limit

    def blocks_callers(self) -> bool:
        """Return whether the first caller in the line can't enter."""
        first = first_of(self.line)
        if first is not None and first.interrupted:
            # A signal handler or a finalizer has interrupted that caller and may wait too. Then it has to enter first.
            first = [waiter for waiter in [first, *self.line.copy()] if waiter.thread == first.thread][-1]
        return first is not None and self.is_full(first.job)

    def look_again(self) -> float:
        """Return when a caller that waits may enter even if it is not notified."""
        return NEVER

    def pass_on(self) -> None:
        """Let the first caller in the line look again, if there is space for its job."""
        if self.line and not self.blocks_callers():
            self.line.notify()

    def oldest(self) -> AnyJob | None:
        """Return the job that entered first, or None."""
        return first_of(self.jobs)

    def error(self) -> BacklogFull:
        """Return the exception for a caller whose job can't enter."""
        return BacklogFull(self.limit, self.name, self.key)


class KeyBound(Bound):
    """The limit on the number of waiting jobs of one key."""

    __slots__ = ("key",)
    name = "max_pending_per_key"

    def __init__(self, limit: int, key: Hashable) -> None:
        super().__init__(limit, {}, Waiters())
        self.key = key


class WeightBound(Bound):
    """The limit on the total weight of the waiting jobs.

    Callers enter in order, so that light jobs can't keep out a heavy one forever. But an event loop that has space for
    its job, and does not use it for a second, loses its turn (L10).

    A thread that changes the bound deletes `_free`, makes its changes, and restores `_free`. Between these statements
    there is no call, so nothing can interrupt the thread (L3). With the GIL, no other thread runs meanwhile. Without
    the GIL, another thread that finds `_free` missing tries again.
    """

    __slots__ = ("_clock", "_weight", "_free")
    name, in_order = "max_pending_weight", True

    def __init__(self, limit: float, clock: Clock) -> None:
        super().__init__(limit, {}, Waiters())
        self._clock = clock
        self._weight = 0.0
        self._free = True

    def enter(self, job: AnyJob) -> bool:
        """See `Bound.enter`."""
        # If this thread is first itself, this may also be a signal handler or a finalizer that has interrupted it.
        first = first_of(self.line)
        if first is None or first.job is job or first.thread == threading.get_ident():
            return self._enter(job, self.limit)
        if job in self.jobs or not self._is_late(first):
            return job in self.jobs
        self.line.pop(first, None)
        first.wake()  # so that it joins the line again
        self.line.notify()
        return self.enter(job)

    def _is_late(self, first: Waiter) -> bool:
        if first.late_at is None:
            return False
        now = self._clock.now()
        first.late_at = NEVER if self.is_full(first.job) else min(first.late_at, now + _TURN)
        return now >= first.late_at

    def look_again(self) -> float:
        """See `Bound.look_again`."""
        first = first_of(self.line)
        return NEVER if first is None or first.late_at is None else first.late_at

    def add(self, job: AnyJob) -> None:
        """See `Bound.add`."""
        self._enter(job, NEVER)

    def _enter(self, job: AnyJob, limit: float) -> bool:
        while job not in self.jobs and self._weight + job.weight <= limit:
            entered = self._try_to_enter(job, job.weight, limit)
            if entered is not None:
                return entered
            let_others_run()
        return job in self.jobs

    def leave(self, job: AnyJob) -> None:
        """See `Bound.leave`."""
        while job in self.jobs and not self._try_to_leave(job):
            let_others_run()
        if self.line:
            self.line.notify()

    def _try_to_enter(self, job: AnyJob, weight: float, limit: float) -> bool | None:
        """Return None if another thread changes the bound now."""
        try:
            del self._free
        except AttributeError:
            return None
        try:
            entered = job in self.jobs
            if not entered and self._weight + weight <= limit:
                self.jobs[job] = weight
                self._weight += weight
                entered = True
        finally:
            self._free = True
        return entered

    def _try_to_leave(self, job: AnyJob) -> bool:
        """Return False if another thread changes the bound now."""
        try:
            del self._free
        except AttributeError:
            return False
        try:
            if job in self.jobs:
                self._weight -= self.jobs[job]
                del self.jobs[job]
            self._weight *= not not self.jobs  # without the rounding errors of the sums, if there is no job left
        finally:
            self._free = True
        return True

    def is_full(self, job: AnyJob) -> bool:
        """See `Bound.is_full`."""
        return self._weight + job.weight > self.limit

    def is_exceeded(self) -> bool:
        """See `Bound.is_exceeded`."""
        return self._weight > self.limit and len(self.jobs) > 1


class Bounds:
    """All limits of one queue except that on the number of all jobs."""

    def __init__(self, max_weight: float, max_per_key: int, clock: Clock) -> None:
        self._weight = WeightBound(max_weight, clock) if max_weight else None
        self._max_per_key = max_per_key
        # The bound of each key. Only jobs keep it alive. A dead one is removed in one step.
        self._by_key: dict[Hashable, weakref.ref[KeyBound]] = {}
        self._purge_at = 64  # with this many entries, it is worth looking for dead ones

    def __bool__(self) -> bool:
        return self._weight is not None or self._max_per_key > 0

    def of(self, job: AnyJob) -> list[Bound]:
        """Return the bounds that a job has to enter, in this order.

        Raises:
            JobTooLarge: The job alone is heavier than the limit.
        """
        if self._weight is not None and job.weight > self._weight.limit:
            raise JobTooLarge(job.weight, self._weight.limit, "the queue")
        # The bound of the key comes first, so that callers that wait for it don't take up weight of other keys.
        bounds = [self._of_key(job.key) if self._max_per_key else None, self._weight]
        return [bound for bound in bounds if bound is not None]

    def clear(self) -> None:
        """Forget all jobs, in a forked child."""
        for bound in self._all():
            bound.jobs.clear()

    def forget_gone(self, waiting: dict[AnyJob, None]) -> None:
        """Remove the jobs that do not wait any more, in case an exception kept a thread from doing so."""
        for bound in self._all():
            _forget_gone(bound, waiting)

    def _all(self) -> list[Bound]:
        bounds = [self._weight, *[known() for known in self._by_key.copy().values()]]
        return [bound for bound in bounds if bound is not None]

    def _of_key(self, key: Hashable) -> KeyBound:
        place = safe(key)
        known = self._by_key.get(place)
        bound = None if known is None else known()
        while bound is None:
            new = KeyBound(self._max_per_key, key)
            bound = self._by_key.setdefault(place, weakref.ref(new))()
            if bound is None:
                _remove_dead_weakref(self._by_key, place)  # unless another thread has replaced it
        if len(self._by_key) > self._purge_at:
            self._purge()
        return bound

    def _purge(self) -> None:
        for place in list(self._by_key):
            _remove_dead_weakref(self._by_key, place)
        self._purge_at = 64 + 2 * len(self._by_key)


def _forget_gone(bound: Bound, waiting: dict[AnyJob, None]) -> None:
    for job in list(bound.jobs):
        if job._epoch != NOT_ACCEPTED and job not in waiting:
            bound.leave(job)
