"""Who is about to come back: callers that wait for each result, and then soon submit the next job.

A batch that goes as soon as there is a job and a free worker leaves without the callers of the batch before, who are just
being woken: they travel in two groups of half the size from then on. So a policy may want to know whom to wait for.
"""

import threading
from typing import Dict, Iterable, List, Optional

from microbatch._bells import Bell
from microbatch._clock import NOW, Clock

__all__ = ["Caller", "Callers"]


class Caller:
    """A thread that waits for results."""

    __slots__ = ("ident", "soon", "returns")

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.soon = NOW  # until when it has to wait for the next result, for us to expect it the time after
        self.returns = False  # whether it did so the last time


class Callers:
    """The threads that wait for results. Guarded by the mutex of the queue.

    A caller is expected back for as long after a result as the processor took for that, if it came back as soon the last
    time. Threads that wait for one result, or do something else in between, are never waited for twice.

    Attributes:
        away: until when those who got their results are expected back, by thread, in the order in which they got them.
    """

    def __init__(self, clock: Clock, watched: bool) -> None:
        self.away: Dict[int, float] = {}
        self._now = clock.now
        self.watched = watched  # otherwise none of this is needed
        self._mine = threading.local()

    def wait(self) -> Optional[Caller]:
        """Note that the calling thread waits for a result, and return what is known of it."""
        if not self.watched:
            return None
        try:
            caller: Caller = self._mine.caller
        except AttributeError:
            caller = self._mine.caller = Caller()
        caller.returns = self._now() <= caller.soon
        return caller

    def release(self, bells: Iterable[Bell], now: float, service_time: float) -> None:
        """Note that those who have hung up these bells get their results, after a time that the processor took."""
        for ident, soon in self.away.copy().items():  # a finalizer that comes in and waits lets others come back
            if soon < now:
                self.away.pop(ident, None)
        for bell in bells:
            caller: Optional[Caller] = bell.caller
            if caller is not None:
                caller.soon = now + service_time
                if caller.returns:
                    self.away[caller.ident] = caller.soon

    def expected(self) -> List[float]:
        """Return until when each of those who are away is expected back."""
        return list(self.away.values())
