"""Policies that go by the load: by free workers, and by callers who wait."""

import sys

from microbatch._basics.arguments import check_positive
from microbatch.policies.base import GATES, BatchingPolicy, Window, exact, policy_repr
from microbatch.policies.limits import Size

__all__ = ["AllWaiting", "DEFAULT_POLICY", "Natural"]


class Natural(BatchingPolicy[object]):
    """A batch goes as soon as a worker is free, with all that has come by then: the slower the processor, the larger.

    With several workers, starts are spaced by the service time over the workers, so that idle workers don't each take one
    job; but not while all of them are idle, for the last batches may have taken much longer than others will:

    >>> [Natural().due(Window(opened=10.0, sent=[9.75], in_flight=1, service_time=2.0, workers=n)) for n in (1, 4, 8)]
    [10.0, 10.25, 10.0]
    >>> Natural().due(Window(opened=10.0, sent=[9.75], in_flight=0, service_time=2.0, workers=4))
    10.0

    And where callers who just got their results are likely to come back at once, it does not leave them without a worker,
    but waits, as long as that costs those who are here less than it saves those who are not:

    >>> [Natural().due(Window(count=n, newest=10.0, service_time=2.0, returning=1, return_by=11.0)) for n in (1, 4, 40)]
    [11.0, 10.5, 10.05]
    """

    watches_callers = True

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        due = window.opened
        if window.full:
            return due  # nobody can join
        # In which a worker becomes free, when all are busy.
        pace = window.service_time / min(window.workers, sys.maxsize)
        if window.workers > 1 and window.in_flight and window.sent:
            due = max(due, window.sent[-1] + pace)
        if window.returning and window.in_flight == window.workers - 1:
            patience = pace * window.returning / window.count
            due = max(due, min(window.newest + patience, window.return_by))
        return due

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return max(1, window.returning - window.returning // 8)

    def __repr__(self) -> str:
        return policy_repr(self, Natural, "")


class AllWaiting(BatchingPolicy[object]):
    """A batch goes as soon as every caller who could add a job to it waits for a result.

    A lone script that calls ``submit().result()`` never waits for more jobs, callers in a loop go together as soon as the
    last of them is back, and where somebody submits without waiting, a batch lingers until nobody who does not wait has
    been heard of for *recent* seconds. Bound that with `Interval`. Whoever waits by ``concurrent.futures.wait``, by
    ``as_completed``, by a callback or in asyncio counts as not waiting.

    >>> from microbatch import NOW, Interval
    >>> policy = AllWaiting(recent=0.1) | Interval(0.005)
    >>> policy.due(Window(count=1, opened=10.0, heard=10.0))
    10.005
    >>> policy.due(Window(count=1, opened=10.0, heard=NOW))
    -inf
    """

    watches_flow = False

    def __init__(self, recent: float = 0.1) -> None:
        self.recent = self.recalls = check_positive("recent", recent)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.heard + self.recent

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return policy_repr(self, AllWaiting, exact(self.recent))


GATES.update({Natural: 1, AllWaiting: 1})

DEFAULT_POLICY: BatchingPolicy[object] = Size(100) | Natural()
"""Natural batching: a batch goes as soon as a worker is free, so a lone job never waits and batches grow with the load."""
