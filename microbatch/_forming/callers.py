"""Callers that wait for each result and then submit their next job soon. Policies may wait for their next jobs.

Suppose a batch is dispatched as soon as there is a job and a free worker. The callers of the previous batch are just
being woken then, so their next jobs miss that batch. From then on, the callers form two groups, and each batch has half
the size. To prevent this, a policy needs to know how many callers are about to submit a job.
"""

import threading
from collections.abc import Iterable

from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.base import CallerActivity

__all__ = ["Caller", "Callers"]

_SOON = 0.02
"""A caller may take this many seconds to submit its next job, even if a quarter of the service time is less.

A hundred threads are woken in less time, and a delay of this length is not noticed.
"""


class Caller:
    """A thread that waits for results."""

    __slots__ = ("ident", "return_deadline", "returns")

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self.return_deadline = NOW  # if it submits its next job by then, it is expected to return after that job too
        self.returns = False  # whether it met the last deadline


class _Local(threading.local):
    caller: Caller | None = None


class Callers:
    """The threads that wait for results. Any thread may call any method at any time: each step is atomic.

    After a result, a caller is expected to submit its next job within a quarter of the service time of that result, or
    within `_SOON` if that is longer, but not longer than the service time itself. It is expected only if it met this
    deadline the last time. The deadline is short because the jobs of other callers wait for the expected job, which may
    never come. A thread that is late once is not expected after its next result.

    If the policy sets `Hints.recalls`, this object also remembers when each caller last submitted a job or got a
    result. It leaves out the callers that wait for a result now.

    Attributes:
        away: The callers that got a result and have not submitted a job since, by thread, in order of their results.
        return_by: The latest of their deadlines. Those of them that met their last deadline are expected by then.
        recalls: The value of `Hints.recalls`, in seconds.
    """

    def __init__(self, watched: bool, recalls: float = 0.0) -> None:
        self.away: dict[int, Caller] = {}
        self.return_by = NOW
        self._expects = watched
        self.watched = watched or recalls > 0  # otherwise the policy needs none of this
        self.recalls = recalls
        # When each caller that does not wait now last submitted a job or got a result, by thread, the latest last.
        self._not_waiting: dict[int, float] = {}
        self._local = _Local()

    def watches_like(self, other: "Callers") -> bool:
        """Return whether this object records the same as *other*."""
        return (self._expects, self.recalls) == (other._expects, other.recalls)

    def record_wait(self) -> Caller:
        """Record that the calling thread waits for a result, and return its `Caller`."""
        caller = self._local.caller
        if caller is None:
            caller = self._local.caller = Caller(threading.get_ident())
        if caller.ident in self.away:
            # It waits for another result without submitting a job first, so it is not expected any more.
            self._give_up(caller.ident)
        return caller

    def begin_to_wait(self, ident: int) -> bool:
        """Record (for `Hints.recalls`) that a thread waits now. Return whether it was the last one that did not."""
        return self._not_waiting.pop(ident, None) is not None and not self._not_waiting

    def _record_activity(self, ident: int, now: float) -> None:
        self._not_waiting.pop(ident, None)
        self._not_waiting[ident] = now
        while self._not_waiting.get(oldest := self._least_recent(), NEVER) <= now - self.recalls:
            self._not_waiting.pop(oldest, None)

    def _least_recent(self) -> int:
        for ident in self._not_waiting.copy():
            return ident
        return 0

    def activity(self) -> CallerActivity:
        """Return what `Window.callers` shows to a policy."""
        returning = [caller.returns for caller in self.away.copy().values()].count(True) if self.away else 0
        heard = next(reversed(self._not_waiting.copy().values()), NOW) if self.recalls else NOW
        return CallerActivity(returning, self.return_by, heard)

    def record_results(self, callers: Iterable[Caller | None], now: float, service_time: float) -> None:
        """Record that callers get their results.

        Args:
            callers: The callers of one batch. None stands for a thread that is not watched.
            now: The moment at which they get their results.
            service_time: How many seconds the processor took for these results.
        """
        for ident, late in self.away.copy().items():  # L6
            if late.return_deadline < now:
                self._give_up(ident)
        soon = now + min(service_time, max(service_time / 4, _SOON))
        for caller in callers:
            if caller is not None:
                caller.return_deadline = soon
                self.away[caller.ident] = caller
                if self.recalls:
                    self._record_activity(caller.ident, now)
        if self._expects:
            self.return_by = soon

    def record_submission(self, ident: int, now: float) -> None:
        """Record that a thread submits a job."""
        caller = self.away.pop(ident, None)
        if caller is not None:
            caller.returns = self._expects and now <= caller.return_deadline
        if self.recalls:
            self._record_activity(ident, now)

    def _give_up(self, ident: int) -> None:
        caller = self.away.pop(ident, None)
        if caller is not None:
            caller.returns = False
