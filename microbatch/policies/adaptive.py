"""A policy that learns how many jobs can be done in a given time."""

import math
from collections import deque

from microbatch._basics.arguments import check_count, check_positive
from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.log import report as log
from microbatch.policies.base import GATES, BatchingPolicy, BatchReport, Window, exact, policy_repr

__all__ = ["Adaptive"]


_EXPLORING = (1.25, 1.0, 1.0, 1.0, 1.0, 0.8, 1.0, 1.0, 1.0, 1.0)  # one in five off the best, one in ten to either side


class Adaptive(BatchingPolicy[object]):
    """A batch goes when it holds as many jobs as, by experience, can be done in *target* seconds, and never holds more.

    It fits a line to the last batches, so much for the batch and so much for each job of it, and solves that for the
    target: the cost model of ``BatchElements`` in Apache Beam. Until batches of different sizes have been seen, and where
    a line explains nothing, it goes by the last batch alone: one step more if that was done in time, a quarter less if it
    was not (additive increase, multiplicative decrease, as in Clipper, Crankshaw and others, NSDI 2017). A batch in ten is
    made somewhat smaller or larger, so that it goes on learning. Batches with a failed job teach nothing, for they may
    have ended early.

    Alone it waits for as long as it takes; compose it with `Natural` or `Interval`:

    >>> from microbatch import BatchInfo, Natural
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
        self._last: deque[tuple[int, float]] = deque(maxlen=50)  # sizes and times
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

    def _solved(self) -> float | None:
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
        return policy_repr(self, Adaptive, f"{exact(self.target)}, {bounds}")


GATES.update({Adaptive: 0})
