"""A policy that learns how many jobs the processor can process in a given time."""

import math
from collections import deque

from microbatch._basics.arguments import check_count, check_positive
from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.log import report as log
from microbatch.policies.base import BuiltInPolicy, BatchReport, Window

__all__ = ["Adaptive"]


# The size of each of ten batches, relative to the best known size: one is larger and one is smaller.
_EXPLORING = (1.25, 1.0, 1.0, 1.0, 1.0, 0.8, 1.0, 1.0, 1.0, 1.0)


class Adaptive(BuiltInPolicy):
    """Dispatches a batch when it holds as many jobs as the processor can do in *target* seconds.

    It learns this number from past batches. No batch holds more jobs than that. Alone, the policy waits for that many
    jobs, however long it takes. Combine it with `Natural` or `Interval`:

    >>> from microbatch import BatchInfo, Natural
    >>> policy = Adaptive(target=0.1, warm_up=0) | Natural()
    >>> for size in (10, 10, 20, 20):
    ...     policy.observe(BatchReport(BatchInfo(1, size, size, None, ""), service_time=0.02 + 0.002 * size, failed=0))
    >>> policy
    Adaptive(0.1, least=1, most=1000, warm_up=0) | Natural()
    >>> [policy.fits(Window(count=count), weight=1.0) for count in (39, 40)]
    [True, False]

    The policy assumes that a batch takes a fixed time, plus a time for each job. It fits that line to the last 50
    batches by least squares, and solves it for *target*. This is the cost model of ``BatchElements`` in Apache Beam.

    If all these batches had the same size, or if larger ones did not take longer, there is no such line. Then only the
    last batch counts. If it took at most *target* seconds, the next one may hold one job more; otherwise, a quarter
    less. This is additive increase, multiplicative decrease, as in Clipper (Crankshaw et al., NSDI 2017).

    To keep learning, the policy makes one batch in ten a quarter larger, and another a fifth smaller. It ignores
    batches with a failed job, because these may have ended early.

    Args:
        target: How many seconds a batch may take.
        least: The lowest value that the learned number of jobs may have. The first batches hold at most this many.
        most: The highest value that the learned number of jobs may have.
        warm_up: How many of the first batches to ignore. These may be slow because caches are cold and connections
            closed.
    """

    _gates = 0

    def __init__(self, target: float, *, least: int = 1, most: int = 1_000, warm_up: int = 3) -> None:
        self.target: float = check_positive("target", target)
        self.least: int = check_count("least", least)
        self.most: int = check_count("most", most, self.least)
        self.warm_up: int = check_count("warm_up", warm_up, 0)
        self._seen = 0
        self._best = self.least  # the best known number of jobs that take *target* seconds
        self._size = self.least  # how many jobs the open batch may hold
        self._last: deque[tuple[int, float]] = deque(maxlen=50)  # the size and the service time of each batch
        self._alike = 0  # how many of the latest batches have the same size
        self._largest = 0

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.count >= self._size else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return window.count < self._size

    def _room(self, window: Window[object]) -> float:
        """See `BatchingPolicy._room`."""
        return self._size - window.count

    def observe(self, report: BatchReport) -> None:
        """Learn from the size and the service time of a batch."""
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
            if self._alike < len(self._last) or not math.isfinite(time):  # otherwise no line can be fitted
                self._largest = max(self._last)[0]
                solution = self._solved()
            self._best = self._within(solution or self._stepped(size, time))
            self._size = self._within(self._best * _EXPLORING[self._seen % len(_EXPLORING)])
        except (ArithmeticError, ValueError):
            log("%r can't learn from a batch of %d jobs that took %g s", self, report.batch.size, report.service_time)
            self._last.clear()
            self._best = self._size = self.least
        self._learned += self._size != before

    def _within(self, size: float) -> int:
        # At most twice the largest size that was tried, because the line may not hold far beyond it.
        most = min(self.most, 2 * self._largest)
        return max(self.least, int(min(size, most) + 1e-9))

    def _solved(self) -> float | None:
        """Return how many jobs take *target* seconds by the line through the last batches; None if there is no line."""
        sizes, times = zip(*self._last)
        mean_size, mean_time = math.fsum(sizes) / len(sizes), math.fsum(times) / len(times)
        spread = math.fsum((size - mean_size) ** 2 for size in sizes)
        slope = math.fsum((size - mean_size) * time for size, time in self._last)
        if slope <= 0:
            return None
        return mean_size + (self.target - mean_time) * spread / slope

    def _stepped(self, size: int, time: float) -> float:
        return size + 1 if time <= self.target else size * 0.75
