"""The limits on waiting jobs: on their number, on their total weight, and on their number for each key."""

import weakref
from _weakref import _remove_dead_weakref  # type: ignore[attr-defined]
from collections.abc import Hashable
from typing import Any

from microbatch._basics.clock import NEVER, let_others_run
from microbatch._basics.waiting import Waiter, Waiters
from microbatch._forming.lanes import safe
from microbatch.errors import BacklogFull
from microbatch.futures.job_future import NOT_ACCEPTED, JobFuture

__all__ = ["Bound", "Bounds", "CountBound"]

AnyJob = JobFuture[Any]


class CountBound:
    """The limit on the number of waiting jobs. Any thread may call any method at any time.

    Unlike a `Bound`, it needs no count of its own, because the jobs that wait are in one dict, in order.

    Attributes:
        name: The name of the limit: an argument of `Batcher`.
        line: The callers that wait to enter, in order.
    """

    name, key = "max_pending", None

    def __init__(self, limit: int, waiting: dict[AnyJob, None], line: Waiters) -> None:
        self._limit = limit
        self._waiting = waiting
        self.line = line

    def enter(self, job: AnyJob, waiter: Waiter | None = None) -> bool:
        """Add a job to those that wait if there is room, and return whether there is."""
        while self.has_room():
            self._waiting[job] = None
            if self.keep(job):
                return True
        return False

    def keep(self, job: AnyJob) -> bool:
        """Return whether a job that was added may stay there. If it may not, remove it.

        Of the jobs that several threads have added, the first ones stay.
        """
        waiting = self._waiting
        if len(waiting) <= self._limit or job in list(waiting)[: self._limit]:
            return True
        return waiting.pop(job, self) is self  # it is gone, so another thread has decided about it

    def has_room(self) -> bool:
        """Return whether one more job may enter."""
        return len(self._waiting) < self._limit

    def is_exceeded(self) -> bool:
        """Return whether jobs must be dropped."""
        return len(self._waiting) > self._limit

    def oldest(self) -> AnyJob | None:
        """Return the job that entered first, or None."""
        return _oldest(self._waiting)

    def blocks_callers(self) -> bool:
        """Return whether a caller waits to enter and can't."""
        return bool(self.line) and not self.has_room()

    def error(self) -> BacklogFull:
        """Return the exception for a caller whose job can't enter."""
        return BacklogFull(self._limit)


class Bound:
    """A limit on the sum of the amounts of the jobs that are in it. Any thread may call any method at any time.

    A job enters before it waits in the queue, and leaves when it waits no more.

    A thread that changes the bound deletes `_free`, makes its changes, and restores `_free`. Between these statements
    there is no call, so nothing can interrupt the thread (L3). With the GIL, no other thread runs meanwhile. Without
    the GIL, another thread that finds `_free` missing tries again.

    Attributes:
        name: The name of the limit: an argument of `Batcher`.
        key: The key of the jobs, if the limit is one for each key.
        limit: The limit.
        used: The sum of the amounts.
        jobs: The jobs in it, the oldest first, and the amount of each.
        line: The callers that wait to enter, in order. Only the first one may enter.
    """

    __slots__ = ("name", "key", "limit", "used", "jobs", "line", "_free", "__weakref__")

    def __init__(self, name: str, limit: float, key: Hashable = None) -> None:
        self.name = name
        self.key = key
        self.limit = limit
        self.used = 0.0
        self.jobs: dict[AnyJob, float] = {}
        self.line = Waiters()
        self._free = True

    def amount(self, job: AnyJob) -> float:
        """Return how much of the limit a job takes up."""
        return job.weight if self.name == "max_pending_weight" else 1

    def enter(self, job: AnyJob, waiter: Waiter | None = None) -> bool:
        """Add a job if the limit allows it, and return whether it does. *waiter* is that of the caller in the line."""
        if self.line and list(self.line)[:1] != [waiter]:
            return False
        return self._enter(job, self.limit)

    def add(self, job: AnyJob) -> None:
        """Add a job, even beyond the limit."""
        self._enter(job, NEVER)

    def _enter(self, job: AnyJob, limit: float) -> bool:
        amount = self.amount(job)
        while (entered := self._try_to_enter(job, amount, limit)) is None:
            let_others_run()
        return entered

    def leave(self, job: AnyJob) -> None:
        """Remove a job, if it is still there, and let the first caller in the line look again."""
        while not self._try_to_leave(job):
            let_others_run()
        if self.line:
            self.line.notify()

    def _try_to_enter(self, job: AnyJob, amount: float, limit: float) -> bool | None:
        """Return None if another thread changes the bound now."""
        try:
            del self._free
        except AttributeError:
            return None
        try:
            fits = self.used + amount <= limit
            if fits and job not in self.jobs:
                self.jobs[job] = amount
                self.used += amount
        finally:
            self._free = True
        return fits

    def _try_to_leave(self, job: AnyJob) -> bool:
        """Return False if another thread changes the bound now."""
        try:
            del self._free
        except AttributeError:
            return False
        try:
            if job in self.jobs:
                self.used -= self.jobs[job]
                del self.jobs[job]
            if not self.jobs:
                self.used = 0.0  # without the rounding errors of the sums
        finally:
            self._free = True
        return True

    def has_room(self) -> bool:
        """Return whether the next job may fit."""
        return self.used < self.limit

    def is_exceeded(self) -> bool:
        """Return whether jobs must be dropped."""
        return self.used > self.limit

    def oldest(self) -> AnyJob | None:
        """Return the job that entered first, or None."""
        return _oldest(self.jobs)

    def blocks_callers(self) -> bool:
        """Return whether a caller waits to enter and can't."""
        return any([self.used + self.amount(waiter.job) > self.limit for waiter in list(self.line)[:1]])

    def error(self) -> BacklogFull:
        """Return the exception for a caller whose job can't enter."""
        return BacklogFull(self.limit, self.name, self.key)

    def forget_gone(self, waiting: dict[AnyJob, None]) -> None:
        """Remove the jobs that do not wait any more. There are none unless an exception kept a thread from doing so."""
        for job in list(self.jobs):
            if job._epoch != NOT_ACCEPTED and job not in waiting:
                self.leave(job)


def _oldest(jobs: dict[AnyJob, Any]) -> AnyJob | None:
    while (found := _try_to_find_oldest(jobs)) is jobs:
        pass
    return found  # type: ignore[return-value]


def _try_to_find_oldest(jobs: dict[AnyJob, Any]) -> object:
    """Return *jobs* itself if another thread changes it now. It is not copied, because that would take too long (L6)."""
    try:
        return next(iter(jobs), None)
    except RuntimeError:
        return jobs


class Bounds:
    """All limits of one queue except that on the number of jobs.

    Attributes:
        weight: The limit on the weight of all waiting jobs. None if there is no limit.
    """

    def __init__(self, max_weight: float, max_per_key: int) -> None:
        self.weight = Bound("max_pending_weight", max_weight) if max_weight else None
        self._max_per_key = max_per_key
        # The bound of each key. Its jobs keep it alive. Threads add and remove entries in one step each.
        self._by_key: dict[Hashable, weakref.ref[Bound]] = {}
        self._purge_at = 64  # so many entries make it worth looking for dead ones

    def __bool__(self) -> bool:
        return self.weight is not None or self._max_per_key > 0

    def of(self, job: AnyJob) -> tuple[Bound, ...]:
        """Return the bounds that a job has to enter, in this order."""
        # The one of the key comes first, so that callers that wait for it don't take up room of other keys.
        bounds = (self._of_key(job.key),) if self._max_per_key else ()
        return bounds if self.weight is None else (*bounds, self.weight)

    def forget_gone(self, waiting: dict[AnyJob, None]) -> None:
        """See `Bound.forget_gone`."""
        for bound in [self.weight, *[known() for known in self._by_key.copy().values()]]:
            if bound is not None:
                bound.forget_gone(waiting)

    def _of_key(self, key: Hashable) -> Bound:
        place = safe(key)
        known = self._by_key.get(place)
        bound = None if known is None else known()
        while bound is None:
            new = Bound("max_pending_per_key", self._max_per_key, key)
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
