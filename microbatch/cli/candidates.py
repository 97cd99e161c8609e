"""The policies that ``microbatch advise`` tries, and how it searches for the best one."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, repeat
from typing import Any, NamedTuple

from microbatch.policies import (
    Adaptive,
    AllWaiting,
    BestSize,
    FixedWindow,
    InTime,
    Interval,
    Natural,
    Padded,
    Rate,
    Session,
    Size,
    Weight,
)
from microbatch.policies.base import BatchingPolicy
from microbatch.simulation import SimulationReport
from microbatch.simulation.plots import percentile

__all__ = ["ALIKE", "ROUNDS", "Candidate", "Family", "Needs", "choose", "families", "front", "measured", "search"]

ROUNDS = 18
"""How many more policies are tried, close to the best ones of the grid."""

_CLOSE = 0.005
"""Two numbers that differ by less than this share count as equal, so nothing between them is tried."""

ALIKE = 1.02
"""Policies are alike if their figures differ by at most this factor."""

_NEARLY = 1.01
"""How many times more calls than the best policy another one may make, if its p99 is lower."""


class Needs(NamedTuple):
    """What decides which policies are worth trying.

    Attributes:
        target: The p99 to reach, in seconds.
        most: How many jobs a batch may hold.
        time_of: Returns about how many seconds a batch of a given size takes.
        callers: Whether each caller waits for its result before it submits the next job.
        expires: Whether jobs expire.
        weights: The mean weight and the greatest weight of a job, or None if all jobs weigh the same.
    """

    target: float
    most: int
    time_of: Callable[[int], float]
    callers: bool = False
    expires: bool = False
    weights: tuple[float, float] | None = None


class Family(NamedTuple):
    """Policies that differ only in one number, and the values of that number to begin with."""

    make: Callable[[float], BatchingPolicy[Any]]
    values: Sequence[float]


class Candidate(NamedTuple):
    """A policy, and how it did in a simulation.

    Attributes:
        policy: The policy.
        report: The report, without what takes much memory.
        p99: The 99th percentile of the latency, in seconds. A job that expired counts as infinitely late.
        largest: The size of the largest batch.
    """

    policy: BatchingPolicy[Any]
    report: SimulationReport
    p99: float
    largest: int

    @property
    def calls(self) -> int:
        """The number of calls of the processor."""
        return self.report.batches


def measured(policy: BatchingPolicy[Any], report: SimulationReport) -> Candidate:
    """Return the policy with what its report says."""
    p99 = percentile(sorted([*report.latencies, *repeat(math.inf, report.expired)]), 0.99)
    largest = max(report.batch_sizes, default=0)
    return Candidate(policy, replace(report, batch_sizes=(), runs=(), latencies=()), p99, largest)


def families(needs: Needs) -> Iterator[Family]:
    """Yield the grid.

    Times are shares of the target. Sizes are shares of the largest batch that takes at most as long as the target.
    """
    most, full = needs.most, Size(needs.most)
    fitting = bisect_right(range(1, most + 1), needs.target, key=needs.time_of)
    sizes = sorted({max(1, round(share * fitting)) for share in (0.15, 0.25, 0.35, 0.5, 0.7, 1)})

    def times(*shares: float) -> list[float]:
        return [share * needs.target for share in shares]

    yield Family(lambda n: Size(round(n)) | Natural(), [*sizes, most])
    yield Family(lambda time: full | Interval(time), times(1 / 16, 1 / 4, 1 / 2, 3 / 4, 1, 2, 4))
    for size in sizes:
        yield Family(partial(_interval, Size(size)), times(1 / 4, 1 / 2, 1))
    yield Family(partial(_interval, BestSize(most)), times(1 / 4, 1 / 2, 1))
    yield Family(lambda time: full | Session(_rounded(time / 8)) | Interval(time), times(1 / 2, 1, 2))
    yield Family(lambda time: full | Session(_rounded(time / 3)) | Interval(time), times(1 / 2, 1, 2))
    yield Family(lambda time: full | FixedWindow(time), times(1 / 4, 1 / 2, 1))
    yield Family(lambda time: (full | Natural()) & Rate(1, per=time), times(1 / 4, 1 / 2, 1))
    yield Family(lambda time: Adaptive(time, most=most) | Natural(), times(1 / 2, 1))
    yield Family(lambda time: Adaptive(time, most=most) | Interval(time), times(1 / 4, 1 / 2))
    yield Family(lambda time: full | Interval(time) & Natural(), times(1 / 4, 1 / 2))
    if needs.callers:
        yield Family(lambda time: full | AllWaiting() | Interval(time), times(1 / 2, 1, 2))
    if needs.expires:
        yield Family(lambda time: full | Interval(time) | InTime(), times(1 / 2, 1, 2))
    if needs.weights is not None:
        mean, heaviest = needs.weights
        limits = [max(heaviest, _rounded(mean * fitting * share)) for share in (0.25, 0.5, 1, 2)]
        for kind in (Weight, Padded):
            yield Family(partial(_natural, full, kind), limits)
            for limit in limits[:3]:
                yield Family(partial(_interval, full | kind(limit)), times(1 / 4, 1 / 2))


def _natural(
    full: BatchingPolicy[Any], kind: Callable[[float], BatchingPolicy[Any]], limit: float
) -> BatchingPolicy[Any]:
    return full | kind(limit) | Natural()


def _interval(limit: BatchingPolicy[Any], time: float) -> BatchingPolicy[Any]:
    return limit | Interval(time)


def _rounded(number: float) -> float:
    """Return the number with three digits, because more digits would only make a policy harder to read."""
    return float(f"{number:.3g}")


def search(
    trial: Callable[[BatchingPolicy[Any]], Candidate], those: Sequence[Family], target: float
) -> Iterator[Candidate]:
    """Try all policies of the grid, and then some close to the best ones. Yield each as soon as it was tried.

    All families are compared by the number of calls that they would make with exactly the target as p99. Between the
    largest number that meets the target and the smallest one that does not, the p99 is nearly a line. So the next
    policy to try is where the line of the best family crosses the target.
    """
    tried = dict[str, Candidate]()
    points: list[dict[float, Candidate]] = [{} for _ in those]

    def try_once(family: int, value: float) -> Iterator[Candidate]:
        policy = those[family].make(value)
        if repr(policy) not in tried:
            tried[repr(policy)] = trial(policy)
            yield tried[repr(policy)]
        points[family][value] = tried[repr(policy)]

    for family, (_, values) in enumerate(those):
        for value in values:
            yield from try_once(family, _rounded(value))
    for _ in range(ROUNDS):
        chances = [chance for number, known in enumerate(points) if (chance := _chance(known, target, number))]
        if not chances or min(chances).calls >= (1 - _CLOSE) * _fewest(tried.values(), target):
            return
        yield from try_once(min(chances).family, min(chances).value)


class _Chance(NamedTuple):
    """What the next policy of a family may reach."""

    calls: float
    family: int
    value: float


def _chance(known: dict[float, Candidate], target: float, family: int) -> _Chance | None:
    """Return what is expected of a family where its p99 is the target. None if there is no such place."""
    for (above, bad), (below, good) in pairwise(sorted(known.items(), reverse=True)):
        if good.p99 <= target < bad.p99 and above - below > _CLOSE * above:
            share = (target - good.p99) / (bad.p99 - good.p99) if bad.p99 < math.inf else 0.5
            value = below + min(max(share, 0.1), 0.9) * (above - below)
            if _rounded(value) not in known:
                # The mean batch, not the number of calls, is nearly a line.
                calls = good.calls * bad.calls / ((1 - share) * bad.calls + share * good.calls)
                return _Chance(calls, family, _rounded(value))
    return None


def choose(candidates: Sequence[Candidate], default: Candidate, target: float) -> Candidate:
    """Return the candidate to advise: the one with the fewest calls of those that meet the target, or nearly so.

    Of those that make at most 1 % more calls, it is the one with the lowest p99. That one is most likely to meet the
    target under another load too. It is the default policy if no other one makes clearly fewer calls. If none meets
    the target, it is the one with the lowest p99.
    """
    if default.p99 <= target and default.calls <= ALIKE * _fewest(candidates, target):
        return default
    most = _NEARLY * _fewest(candidates, target)
    good = [each for each in candidates if each.p99 <= target and each.calls <= most]
    return min(good or candidates, key=lambda each: (each.p99, each.calls))


def _fewest(candidates: Iterable[Candidate], target: float) -> float:
    return min((each.calls for each in candidates if each.p99 <= target), default=math.inf)


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one beats in both calls and p99, the lowest p99 first (the Pareto front)."""
    found, fewest = list[Candidate](), math.inf
    for each in sorted(candidates, key=lambda each: (each.p99, each.calls)):
        if each.calls < fewest and each.p99 < math.inf:
            found.append(each)
            fewest = each.calls
    return found
