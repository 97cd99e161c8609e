"""When does the open batch go, and may one more job join it?

A policy is a pure decider. It sees a `Window` and answers with a moment; it reads no clock, takes no lock, never sleeps
and knows no thread, so that it can be tested by hand and run in virtual time. One thread at a time asks it.

>>> policy = Size(3) | Interval(0.5)
>>> policy.due(Window(count=2, opened=10.0))
10.5
>>> policy.due(Window(count=3, opened=10.0)) == NOW
True
>>> policy.reason(Window(count=3, opened=10.0))
'size'
"""

import math
import sys
from collections import deque
from typing import Deque, Optional, Tuple

from microbatch._arguments import check_count, check_number, check_positive
from microbatch._clock import NEVER, NOW
from microbatch._log import report as log
from microbatch._policy import GATES, BatchingPolicy, BatchReport, Window

__all__ = [
    "Adaptive",
    "AllWaiting",
    "BatchReport",
    "BatchingPolicy",
    "DEFAULT_POLICY",
    "FixedWindow",
    "Interval",
    "NEVER",
    "NOW",
    "Natural",
    "Rate",
    "Session",
    "Size",
    "Weight",
    "Window",
]


class Size(BatchingPolicy[object]):
    """A batch goes when it holds *n* jobs, and never holds more.

    Alone, it waits for *n* jobs however long that takes, so a single caller that waits for its result waits for ever. Add
    ``| Interval(seconds)`` to bound the wait, or ``| Natural()`` to dispatch as soon as a worker is free.

    >>> [Size(3).due(Window(count=count)) for count in (2, 3)]
    [inf, -inf]
    >>> [Size(3).fits(Window(count=count), weight=1.0) for count in (2, 3)]
    [True, False]
    """

    watches_flow = False

    def __init__(self, n: int) -> None:
        self.n = check_count("n", n)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.count >= self.n else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return window.count < self.n

    def room(self, window: Window[object]) -> float:
        """See `BatchingPolicy.room`."""
        return self.n - window.count

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return max(1, self.n - window.count)

    def needs(self) -> int:
        """See `BatchingPolicy.needs`."""
        return self.n

    def __repr__(self) -> str:
        return _call(self, Size, str(self.n))


class Interval(BatchingPolicy[object]):
    """A batch goes *seconds* after its first job was submitted; later jobs do not push that back.

    ``Interval(0)`` sends as soon as a worker is free, with all that has come by then.

    >>> Interval(0.5).due(Window(count=2, opened=10.0, newest=10.4))
    10.5
    """

    watches_flow = False

    def __init__(self, seconds: float) -> None:
        self.seconds = check_number("seconds", seconds)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + self.seconds

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return _call(self, Interval, _exact(self.seconds))


class Weight(BatchingPolicy[object]):
    """A batch goes when its weight reaches *limit*, or when the next job would bring it above, and never weighs more.

    Without ``weigh`` every job weighs 1. A job that alone weighs more than *limit* is `JobTooLarge`.

    >>> [Weight(10).due(Window(count=3, weight=weight, full=full)) for weight, full in ((9, False), (10, False), (9, True))]
    [inf, -inf, -inf]
    >>> [Weight(10).fits(Window(count=3, weight=9.0), weight=weight) for weight in (1.0, 1.5)]
    [True, False]
    """

    watches_flow = False

    def __init__(self, limit: float) -> None:
        self.limit = check_positive("limit", limit)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.full or window.weight >= self.limit else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return window.weight + weight <= self.limit

    def __repr__(self) -> str:
        return _call(self, Weight, _exact(self.limit))


class FixedWindow(BatchingPolicy[object]):
    """A batch goes at the next multiple of *seconds* since the batcher started: so many times a minute, like a clock.

    >>> [FixedWindow(5).due(Window(started=100.0, opened=opened)) for opened in (101.0, 104.5, 105.0, 105.1)]
    [105.0, 105.0, 105.0, 110.0]
    """

    watches_flow = False

    def __init__(self, seconds: float) -> None:
        self.seconds = check_positive("seconds", seconds)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + (window.started - window.opened) % self.seconds

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return _call(self, FixedWindow, _exact(self.seconds))


class Session(BatchingPolicy[object]):
    """A batch goes *gap* seconds after its newest job: when a burst is over. Each job pushes that back, so bound it.

    >>> (Session(0.5) | Interval(3)).due(Window(count=7, opened=10.0, newest=12.0))
    12.5
    >>> (Session(0.5) | Interval(3)).due(Window(count=8, opened=10.0, newest=12.75))
    13.0
    """

    watches_flow = False

    def __init__(self, gap: float) -> None:
        self.gap = check_number("gap", gap)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.newest + self.gap

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return _call(self, Session, _exact(self.gap))


class Rate(BatchingPolicy[object]):
    """A batch goes not before fewer than *n* went in the last *per* seconds, under all keys together. Compose it with ``&``.

    >>> [Rate(2, per=60).due(Window(count=1, sent=sent)) for sent in ([], [30.0], [10.0, 30.0], [10.0, 30.0, 80.0])]
    [-inf, -inf, 70.0, 90.0]

    A flush keeps to it, a shutdown does not.
    """

    def __init__(self, n: int, per: float) -> None:
        self.n = check_count("n", n)
        self.per = check_positive("per", per)
        self.history = max(self.n, BatchingPolicy.history)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return self.earliest(window)

    def earliest(self, window: Window[object]) -> float:
        """See `BatchingPolicy.earliest`."""
        return NOW if len(window.sent) < self.n else window.sent[-self.n] + self.per

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return _call(self, Rate, f"{self.n}, per={_exact(self.per)}")


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
        return _call(self, Natural, "")


class AllWaiting(BatchingPolicy[object]):
    """A batch goes as soon as every caller who could add a job to it waits for a result.

    A lone script that calls ``submit().result()`` never waits for more jobs, callers in a loop go together as soon as the
    last of them is back, and where somebody submits without waiting, a batch lingers until nobody who does not wait has
    been heard of for *recent* seconds. Bound that with `Interval`. Whoever waits by ``concurrent.futures.wait``, by
    ``as_completed``, by a callback or in asyncio counts as not waiting.

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
        return _call(self, AllWaiting, _exact(self.recent))


class Adaptive(BatchingPolicy[object]):
    """A batch goes when it holds as many jobs as, by experience, can be done in *target* seconds, and never holds more.

    It fits a line to the last batches, so much for the batch and so much for each job of it, and solves that for the
    target: the cost model of ``BatchElements`` in Apache Beam. Until batches of different sizes have been seen, and where
    a line explains nothing, it goes by the last batch alone: one step more if that was done in time, a quarter less if it
    was not (additive increase, multiplicative decrease, as in Clipper, Crankshaw and others, NSDI 2017). A batch in ten is
    made somewhat smaller or larger, so that it goes on learning. Batches with a failed job teach nothing, for they may
    have ended early.

    Alone it waits for as long as it takes; compose it with `Natural` or `Interval`:

    >>> from microbatch import BatchInfo
    >>> policy = Adaptive(target=0.1, warm_up=0) | Natural()
    >>> for size in (10, 10, 20, 20):
    ...     policy.observe(BatchReport(BatchInfo(1, size, size, None, ""), service_time=0.02 + 0.002 * size, failed=0))
    >>> policy
    Adaptive(0.1, least=1, most=1000, warm_up=0) | Natural()
    >>> policy.room(Window(count=10))
    30

    Args:
        target: how many seconds a batch may take.
        least: the fewest jobs that it ever holds a batch to.
        most: the most.
        warm_up: how many of the first batches teach nothing, for they find caches cold and connections closed.
    """

    def __init__(self, target: float, *, least: int = 1, most: int = 1_000, warm_up: int = 3) -> None:
        self.target = check_positive("target", target)
        self.least = check_count("least", least)
        self.most = check_count("most", most, self.least)
        self.warm_up = check_count("warm_up", warm_up, 0)
        self._seen = 0
        self._best = self.least  # how many jobs can be done in time, as far as it knows
        self._size = self.least  # how many the open batch may hold
        self._last: Deque[Tuple[int, float]] = deque(maxlen=50)  # sizes and times
        self._alike = 0  # how many of the latest have the same size
        self._largest = 0

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.count >= self._size else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return window.count < self._size

    def room(self, window: Window[object]) -> float:
        """See `BatchingPolicy.room`."""
        return self._size - window.count

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return max(1, self._size - window.count)

    def observe(self, report: BatchReport) -> None:
        """Learn from a batch."""
        if report.failed:
            return
        self._seen += 1
        if self._seen <= self.warm_up:
            return
        before = self._size
        try:
            size, time = report.batch.size, report.service_time
            self._alike = self._alike + 1 if self._last and self._last[-1][0] == size else 1
            self._last.append((size, time))
            self._largest = size
            solution = None
            if self._alike < len(self._last) or not math.isfinite(time):  # otherwise there is no line through them
                self._largest = max(self._last)[0]
                solution = self._solved()
            self._best = self._within(solution or self._stepped(size, time))
            self._size = self._within(self._best * _EXPLORING[self._seen % len(_EXPLORING)])
        except (ArithmeticError, ValueError):
            log("%r can't make sense of a batch of %d jobs in %g s", self, report.batch.size, report.service_time)
            self._last.clear()
            self._best = self._size = self.least
        self._learned += self._size != before

    def _within(self, size: float) -> int:
        # No more than double of what was tried: a line is no guide to where nobody has been.
        most = min(self.most, 2 * self._largest)
        return max(self.least, int(min(size, most) + 1e-9))

    def _solved(self) -> Optional[float]:
        """Return how many jobs take as long as the target, by the line through the last batches; None if there is none."""
        sizes, times = zip(*self._last)
        mean_size, mean_time = math.fsum(sizes) / len(sizes), math.fsum(times) / len(times)
        spread = math.fsum((size - mean_size) ** 2 for size in sizes)
        slope = math.fsum((size - mean_size) * time for size, time in self._last)
        if slope <= 0:
            return None
        return mean_size + (self.target - mean_time) * spread / slope

    def _stepped(self, size: int, time: float) -> float:
        return size + 1 if time <= self.target else size * 0.75

    def __repr__(self) -> str:
        bounds = f"least={self.least}, most={self.most}, warm_up={self.warm_up}"
        return _call(self, Adaptive, f"{_exact(self.target)}, {bounds}")


def _call(policy: BatchingPolicy[object], kind: type, arguments: str) -> str:
    """Return code that creates a policy that decides as *policy* did when it was new.

    A subclass of *kind* that has a constructor of its own may take other arguments, so nothing is claimed for it.
    """
    own = type(policy)
    same = all(getattr(own, maker) is getattr(kind, maker) for maker in ("__init__", "__new__"))
    return f"{own.__name__}({arguments})" if same else object.__repr__(policy)


def _exact(number: float) -> str:
    """Return the shortest literal that is read as *number*: ``60``, ``0.005``, ``1e999`` for infinity."""
    return "1e999" if number == math.inf else repr(abs(number)).removesuffix(".0")  # abs() for minus zero


GATES.update({Size: 0, Interval: 0, Weight: 0, FixedWindow: 0, Session: 0, Adaptive: 0})
GATES.update({Rate: 1, Natural: 1, AllWaiting: 1})

_EXPLORING = (1.25, 1.0, 1.0, 1.0, 1.0, 0.8, 1.0, 1.0, 1.0, 1.0)  # one in five off the best, one in ten to either side

DEFAULT_POLICY: BatchingPolicy[object] = Size(100) | Natural()
"""Natural batching: a batch goes as soon as a worker is free, so a lone job never waits and batches grow with the load."""
