"""Who is about to come back: callers that wait for each result, and then soon submit the next job.

A batch that goes as soon as there is a job and a free worker leaves without the callers of the batch before, who are just
being woken: they travel in two groups of half the size from then on. So a policy may want to know whom to wait for.
"""

import threading
from collections.abc import Iterable

from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.base import CallerActivity

__all__ = ["Caller", "Callers"]

_SOON = 0.02
"""How many seconds callers may take to come back in any case: a hundred threads are woken in less, and nobody notices."""


class Caller:
    """A thread that waits for results."""

    __slots__ = ("ident", "return_deadline", "returns")

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self.return_deadline = NOW  # until when it has to submit the next job, for us to expect it the time after
        self.returns = False  # whether it did so the last time


class _Mine(threading.local):
    caller: Caller | None = None


class Callers:
    """The threads that wait for results. Guarded by the mutex of the queue.

    A caller is expected back for a quarter of the time that the processor took for its result, if the last time it
    submitted the next job as soon: not for longer, since whoever is held back for it then waits that much longer, and maybe
    in vain. Threads that wait for one result, for one job after another, or for jobs of others, are never waited for twice.

    For a policy that recalls them, it also knows when callers who do not wait were last heard of.

    Attributes:
        away: those who got their results lately and have not come back yet, by thread, in the order in which they got them.
        returning: how many of those returned the last time, and so are expected back.
        return_by: until when the last of them is.
        all_waited: counts how often the last of the callers who were heard of has begun to wait.
    """

    def __init__(self, watched: bool, recalls: float = 0.0) -> None:
        self.away: dict[int, Caller] = {}
        self.returning = 0
        self.return_by = NOW
        self._expects = watched
        self.watched = watched or recalls > 0  # otherwise none of this is needed
        self.recalls = recalls  # for how many seconds to remember who may submit
        self.all_waited = 0
        self._at_large: dict[int, float] = {}  # when those who do not wait were last heard of, the latest last
        self._mine = _Mine()

    def wait(self) -> Caller:
        """Note that the calling thread waits for a result, and return what is known of it."""
        caller = self._mine.caller
        if caller is None:
            caller = self._mine.caller = Caller(threading.get_ident())
        if self.away:
            self._give_up(caller.ident)  # it waits for a job that it had before, or for one of another thread
        if self.recalls:
            self.begin_to_wait(caller.ident)
        return caller

    def begin_to_wait(self, ident: int) -> None:
        """Note that a thread waits for a result."""
        heard = self._at_large.pop(ident, None)
        if heard is not None and not self._at_large:
            self.all_waited += 1

    def _hear_of(self, ident: int, now: float) -> None:
        self._at_large.pop(ident, None)
        self._at_large[ident] = now
        while self._at_large.get(longest := self._longest_at_large(), NEVER) <= now - self.recalls:
            self._at_large.pop(longest, None)

    def _longest_at_large(self) -> int:
        # Not by `next`: a handler that comes in before that call, and waits, lets it raise.
        for ident in self._at_large:
            return ident
        return 0

    def activity(self) -> CallerActivity:
        """Return what a policy is shown of the callers."""
        return CallerActivity(self.returning, self.return_by, self._last_heard())

    def _last_heard(self) -> float:
        """Return when a caller who does not wait was last heard of; `NOW` if there is none."""
        return next(reversed(self._at_large.copy().values()), NOW)

    def release(self, callers: Iterable[Caller | None], now: float, service_time: float) -> None:
        """Note that these callers, as far as they are known, get their results, after a time that the processor took."""
        for ident, late in self.away.copy().items():  # a finalizer that comes in and waits lets others come back
            if late.return_deadline < now:
                self._give_up(ident)
        soon = now + min(service_time, max(service_time / 4, _SOON))
        for caller in callers:
            if caller is not None:
                caller.return_deadline = soon
                self.away[caller.ident] = caller
                if self.recalls:
                    self._hear_of(caller.ident, now)
        if self._expects:
            self.return_by = soon
            self.returning = [caller.returns for caller in self.away.copy().values()].count(True)

    def come_back(self, ident: int, now: float) -> None:
        """Note that a thread submits a job."""
        caller = self.away.pop(ident, None)
        if caller is not None:
            self.returning -= caller.returns
            caller.returns = self._expects and now <= caller.return_deadline
        if self.recalls:
            self._hear_of(ident, now)

    def _give_up(self, ident: int) -> None:
        caller = self.away.pop(ident, None)
        if caller is not None:
            self.returning -= caller.returns
            caller.returns = False
