"""A policy that learns up to which size larger batches take less time per job."""

import logging
import math
from bisect import bisect_left, insort
from collections.abc import Iterator

from microbatch._basics.arguments import check_count
from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.log import report as log
from microbatch.policies.base import BatchReport, BuiltInPolicy, Window

__all__ = ["BestSize"]

_MEMORY = 64
"""Of the batches of about one size, about this many count. Older ones count less and less."""

_FORGOTTEN = 50
"""If no batch of a size has ended for this many batches, the size counts only a third, because the cost may drift."""

_GAIN, _LEAST_GAIN = 0.03, 0.005
"""By which share the time per job must fall when the size doubles. The second value holds under constant pressure."""

_PRESSURE = 64
"""The pressure is constant if each of this many batches left a job behind that did not fit."""

_PROBE_SMALLER, _PROBE_LARGER, _RARELY = 8, 16, 400
"""After how many full batches the next smaller and the next larger size are tried. See rule 5."""

_OWN_TIME = 0.00001
"""How many seconds are added to each service time, because the batcher itself takes time for a batch too.

It takes a few times as long. But if all of that counted, calls of about a millisecond would seem to pay when they save
only a few percent, and several workers lose more than that if one of them takes a large batch.
"""

_OUTLIER = 8
"""A batch that takes this many times as long per job as others of its size counts as if it took only that long."""

_FEW = 4
"""With fewer batches of a size, it is unknown how much their times vary."""

_HEAVY = 1e100
"""If a batch weighs more, its weight is ignored, because floating-point numbers could overflow."""

_LARGEST = 100_000
"""Above this size there are no more steps, except the limit of the policy."""

_FAST, _ENOUGH, _SAMPLE = 0.001, 16, 8
"""Of the batches that take less than a millisecond, only one in eight counts, after the first 16 of a size.

To count a batch takes 20 to 60 µs, which would slow down a fast processor.
"""


class BestSize(BuiltInPolicy):
    """Dispatches a batch when it holds as many jobs as is most efficient, a number that the policy learns.

    Usually, a larger batch takes less time per job. But if the processor pads its inputs, holds a lock, or runs out of
    memory, a larger batch may take more. Then jobs are processed more slowly, so more of them wait, and batches become
    even larger. This policy measures the time per job, and stops at the size above which it no longer falls:

    >>> from microbatch import BatchInfo
    >>> policy = BestSize(most=100)
    >>> for size in (1, 2, 3, 4, 6, 8, 12):
    ...     time = 0.01 + 0.001 * size ** 2
    ...     policy.observe(BatchReport(BatchInfo(1, size, size, None, ""), time, failed=0))
    >>> [policy.fits(Window(count=count), weight=1.0) for count in (1, 2, 3)]
    [True, True, False]

    These are the rules:

    1. Sizes are compared in steps: 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on. The time of a step is the mean of its last
       batches. If jobs have weights, it is corrected by linear regression to the mean weight of all jobs.
    2. A larger batch is assumed to take at least as long as a smaller one. If the means of some steps say otherwise,
       that is taken for chance, and these steps get their common mean.
    3. As long as larger batches have always taken less time per job, a batch may hold *most* jobs.
    4. Otherwise, it may hold as many as the smallest step that no larger one beats. To beat a step, a larger one must
       take at least 3 % less time per job for each doubling of the size. If 64 batches in a row left jobs behind that
       did not fit, 0.5 % is enough. If the largest known step beats all others, the next two steps may be tried.
    5. To keep learning, the policy tries a smaller step after 8 full batches, and the next larger one after 16. The
       smaller one is halfway to the next smaller step that the policy knows. If it knows none, the smaller one is tried
       after the first batch. If the smaller one is new, batches that are not full count too. A step that is certainly
       worse is tried only after 400.

    It ignores batches in which all jobs failed, because these may have ended early. Alone, it waits for a full batch,
    however long that takes. Combine it with `Natural` or `Interval`.

    Args:
        most: The highest number of jobs that a batch may hold.
    """

    _gates = 0

    def __init__(self, most: int = 100) -> None:
        self.most: int = check_count("most", most)
        self._bounds = list(_steps(self.most))
        self._steps = [_Step(bound) for bound in self._bounds]
        self._known: list[int] = []  # the steps with batches, in order
        self._place = len(self._bounds) - 1  # the step that batches may fill now, unless another one is tried
        self._trial: int | None = None  # the step that is tried
        self._size = self.most  # how many jobs the open batch may hold
        self._grows = True  # larger batches have always taken less time per job
        self._weights = _Mean()
        self._skipped = 0
        self._observed = 0  # the number of batches that counted
        self._refused = False  # a job did not fit since the last report
        self._pressure = 0  # how many batches in a row left jobs behind
        self._smaller, self._larger = _Trial(_PROBE_SMALLER), _Trial(_PROBE_LARGER)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.count >= self._size else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        if window.count < self._size:
            return True
        self._refused = True
        return False

    def _room(self, window: Window[object]) -> float:
        """See `BatchingPolicy._room`."""
        return self._size - window.count

    def observe(self, report: BatchReport) -> None:
        """Learn from the size, the weight and the service time of a batch."""
        size, before = report.batch.size, self._size
        place = bisect_left(self._bounds, min(size, self.most))
        if report.service_time < _FAST and self._steps[place].batches > _ENOUGH and place != self._trial:
            self._skipped += 1
            if self._skipped % _SAMPLE:
                return
        weight, time = report.batch.weight, report.service_time + _OWN_TIME
        was_trial = place == self._trial
        if was_trial:  # not before, because the open batch may have been larger already
            self._trial = None
        if report.failed >= size or not 0 <= time < NEVER:
            self._allow(self._place if self._trial is None else self._trial)
            return
        weight = weight if weight < _HEAVY else size
        self._pressure = self._pressure + 1 if self._refused else 0
        self._refused = False
        self._weights.add(size, weight)
        times = [self._steps[known].time_per_job(self._weights.mean) for known in self._known]
        if not self._steps[place].batches:
            insort(self._known, place)
        self._observed += 1
        self._steps[place].add(size, weight, time, min(times, default=NEVER), self._observed)
        chosen = self._chosen()
        if chosen != self._place:
            self._place, self._trial = chosen, None
            self._smaller, self._larger = _Trial(_PROBE_SMALLER), _Trial(_PROBE_LARGER)
        if self._trial is None and not was_trial:
            full = size >= min(before, self._bounds[chosen])
            self._trial = self._next_trial(chosen if full else place, full)
        self._allow(chosen if self._trial is None else self._trial)

    def _allow(self, place: int) -> None:
        self._learned += self._size != self._bounds[place]
        self._size = self._bounds[place]

    def _chosen(self) -> int:
        """Return the step that batches may fill, by rules 3 and 4."""
        last, times = len(self._steps) - 1, self._times()
        gain = -math.log2(1 - (_LEAST_GAIN if self._pressure >= _PRESSURE else _GAIN))
        best, largest, to_beat = 0, max(times), NEVER
        for place in sorted(times, reverse=True):
            time = times[place] * 2 ** (self._steps[place].doublings * gain)
            if time <= to_beat:
                best, to_beat = place, time
        if best < largest and self._grows:
            self._grows = False
            log("%r: %s", self, self._described(best), level=logging.INFO)
        if best < largest:
            return best
        return last if self._grows else min(last, best + 2)

    def _times(self) -> dict[int, float]:
        """Return the time per job of each known step, by rule 2.

        This is isotonic regression, by pooling adjacent violators: M. Ayer et al., An Empirical Distribution Function
        for Sampling with Incomplete Information, 1955.
        """
        pools: list[tuple[float, float, list[int]]] = []  # the time of a batch, how much it counts, and the steps
        for place in self._known:
            step, places = self._steps[place], [place]
            time, count = step.time_per_job(self._weights.mean) * self._bounds[place], step.count(self._observed)
            while pools and pools[-1][0] > time:
                other_time, other_count, others = pools.pop()
                time = (time * count + other_time * other_count) / (count + other_count)
                count, places = count + other_count, others + places
            pools.append((time, count, places))
        return {place: time / self._bounds[place] for time, _, places in pools for place in places}

    def _described(self, place: int) -> str:
        return f"batches hold at most {self._bounds[place]:,} jobs now, because larger ones took no less time per job"

    def _note(self) -> str:
        """See `BatchingPolicy._note`."""
        return "" if self._grows or self._place == len(self._bounds) - 1 else self._described(self._place)

    def _next_trial(self, place: int, full: bool) -> int | None:
        """Return the step to try after a batch of a step, by rule 5, or None."""
        below = max([known for known in self._known if known < place], default=-1)
        if full and place < len(self._steps) - 1 and self._larger.is_due(self._is_worse(place + 1, place)):
            return place + 1
        smaller = max(0, place + below) // 2
        is_new = not self._steps[smaller].batches
        if place and (full or is_new) and (self._smaller.is_due(self._is_worse(smaller, place)) or below < 0):
            return smaller
        return None

    def _is_worse(self, place: int, than: int) -> bool:
        """Return whether batches of a step certainly take more time per job than those of another step."""
        other, used, mean = self._steps[place], self._steps[than], self._weights.mean
        if min(other.batches, used.batches) < _FEW:
            return False
        return other.time_per_job(mean) - 2 * math.hypot(other.error, used.error) > used.time_per_job(mean)


class _Trial:
    """Counts the batches until another size is tried."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._count = 0

    def is_due(self, hopeless: bool) -> bool:
        """Count a batch, and return whether to try the size now. If that is hopeless, it is tried rarely."""
        self._count += 1
        due = self._count >= (_RARELY if hopeless else self._patience)
        if due:
            self._count = 0
        return due


def _steps(most: int) -> Iterator[int]:
    size = 1
    while size < min(most, _LARGEST):
        yield size
        if size > 1 and 3 * size // 2 < most:
            yield 3 * size // 2
        size *= 2
    yield most


class _Mean:
    """The mean weight of a job. Older jobs count less and less."""

    mean = 1.0

    def __init__(self) -> None:
        self._size = self._weight = 0.0

    def add(self, size: int, weight: float) -> None:
        """Record a batch."""
        self._size, self._weight = self._size * 0.9975 + size, self._weight * 0.9975 + weight
        self.mean = self._weight / self._size


class _Step:
    """What is known of the batches of about the same size.

    Attributes:
        doublings: The binary logarithm of the largest of these sizes.
        batches: The number of these batches so far.
        error: The standard error of the time per job, or 0 if there were too few batches.
    """

    def __init__(self, bound: int) -> None:
        self.doublings = math.log2(bound)
        self.batches = 0
        self.error = 0.0
        self._newest = 0
        self._sums = [0.0] * 7
        self._time = self._weight = self._slope = 0.0

    def time_per_job(self, weight: float) -> float:
        """Return the time per job in seconds, if a job weighs *weight* on average."""
        return max(self._time + self._slope * (weight - self._weight), self._time / 5)

    def count(self, observed: int) -> float:
        """Return how much the step counts after so many batches of any size: less if its last batch was long ago."""
        return min(self.batches, _MEMORY) * (1 - 1 / _FORGOTTEN) ** (observed - self._newest)

    def add(self, size: int, weight: float, time: float, typical: float, number: int) -> None:
        """Record the batch with this number. *typical* is the time per job in batches of any size."""
        self._newest = number
        most = _OUTLIER * (self._time if self.batches else typical)
        time = min(time, most * size)
        # Weighted by the size: the sums of 1, of weight, time and their products per job, and of the batches.
        terms = size, weight, time, weight * weight / size, weight * time / size, time * time / size, 1
        self._sums = [old * (1 - 1 / _MEMORY) + new for old, new in zip(self._sums, terms)]
        jobs, weights, times, squares, products, time_squares, batches = self._sums
        self.batches += 1
        self._time, self._weight = times / jobs, weights / jobs
        spread, common = squares - weights * self._weight, products - weights * self._time
        self._slope = max(0.0, common / spread) if spread > 1e-9 * squares else 0.0
        if self.batches >= _FEW:
            unexplained = time_squares - times * self._time - self._slope * common
            self.error = math.sqrt(max(0.0, unexplained / jobs) / batches)
