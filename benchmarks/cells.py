"""The cells in which the benchmarks of policies simulate: combinations of a load, a cost and a number of workers."""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from math import ceil, sqrt
from typing import Any, NamedTuple

from microbatch import BatchingPolicy
from microbatch.simulation import SimulatedBatch, SimulationReport, lognormal, poisson, simulate

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100)
"""The fixed sizes from which the best one is chosen."""

TEXTS = lognormal(5, 17, 256)
"""The lengths of texts, in tokens."""

Time = Callable[[SimulatedBatch], float]
Arrivals = Callable[[random.Random], Iterable[float]]


class Cost(NamedTuple):
    """How long a batch takes.

    Attributes:
        phases: Functions that return the seconds for a batch. If there are several, the cost drifts: they take turns,
            for a quarter of the jobs each.
        texts: Whether jobs are `TEXTS`. Otherwise, each weighs 1.
    """

    phases: tuple[Time, ...]
    texts: bool = False

    def start(self, jobs: int) -> Time:
        """Return the cost of each batch of a run with so many jobs."""
        if len(self.phases) == 1:
            return self.phases[0]
        done = 0

        def time(batch: SimulatedBatch) -> float:
            nonlocal done
            phase = self.phases[done * 4 // jobs % len(self.phases)]
            done += batch.count
            return phase(batch)

        return time


def affine(call: float, job: float) -> Cost:
    """Return the cost of a downstream whose calls take *call* seconds, and *job* seconds more for each job."""
    return Cost((lambda batch: call + job * batch.count,))


def padding(call: float, token: float) -> Cost:
    """Return the cost of a model that pads each text to the longest one in its batch."""
    return Cost((lambda batch: call + token * batch.padded,), texts=True)


def cliff(most: int) -> Cost:
    """Return the cost of a downstream that takes 50 ms more if a batch holds more than *most* jobs."""
    return Cost((lambda batch: 5e-3 + 0.1e-3 * batch.count + (50e-3 if batch.count > most else 0.0),))


def _pays(batch: SimulatedBatch) -> float:
    return 5e-3 + 20e-6 * batch.count


def _does_not_pay(batch: SimulatedBatch) -> float:
    return 4e-3 + 1e-3 * batch.count * sqrt(batch.count)


LARGER_PAYS = {
    "5 ms + 20 µs·n": affine(5e-3, 20e-6),
    "20 ms + 1 ms·n": affine(20e-3, 1e-3),
    "1 ms + 100 µs·n": affine(1e-3, 100e-6),
}
"""Costs with which a larger batch always takes less time per job. *n* is the number of jobs."""

OTHERS = {
    "4 ms + 0.2 ms·padded": padding(4e-3, 0.2e-3),
    "10 ms + 0.4 ms·padded": padding(10e-3, 0.4e-3),
    "20 ms + 0.01 ms·padded": padding(20e-3, 0.01e-3),
    "2 ms + 0.5 ms·n + 0.05 ms·n²": Cost((lambda batch: 2e-3 + 0.5e-3 * batch.count + 0.05e-3 * batch.count**2,)),
    "1 ms·n^1.5": Cost((lambda batch: 1e-3 * batch.count * sqrt(batch.count),)),
    "0.05 ms + 1 ms·n": affine(0.05e-3, 1e-3),
    "5 ms + 0.1 ms·n, 50 ms more above 32": cliff(32),
    "5 ms + 0.1 ms·n, 50 ms more above 40": cliff(40),
    "8 ms for each 32 jobs, rounded up": Cost((lambda batch: 8e-3 * ceil(batch.count / 32),)),
}
"""Costs with which a larger batch does not always pay. *padded* is *n* times the length of the longest text."""

DRIFTING = {
    "5 ms + 20 µs·n, then 4 ms + 1 ms·n^1.5": Cost((_pays, _does_not_pay)),
    "4 ms + 1 ms·n^1.5, then 5 ms + 20 µs·n": Cost((_does_not_pay, _pays)),
}
"""Costs that change after each quarter of the jobs."""

COSTS = {**LARGER_PAYS, **OTHERS, **DRIFTING, "2 ms + 0.5 ms·n": affine(2e-3, 0.5e-3)}


@cache
def best_size(cost: str) -> tuple[int, float]:
    """Return the fixed size with the highest throughput, and how many seconds such a batch takes on average.

    If the cost drifts, they are those of the phase with the lowest throughput.
    """

    def per_job(pair: tuple[int, float]) -> float:
        return pair[1] / pair[0]

    phases, texts = COSTS[cost]
    return max((min(((n, _mean_time(phase, n, texts)) for n in SIZES), key=per_job) for phase in phases), key=per_job)


def _mean_time(time: Time, size: int, texts: bool) -> float:
    if not texts:
        return time(SimulatedBatch(size, size, 1.0))
    sample = _sample()
    batches = [sample[at : at + size] for at in range(0, len(sample) - size + 1, size)]
    return sum(time(SimulatedBatch(size, sum(texts), max(texts))) for texts in batches) / len(batches)


@cache
def _sample() -> list[float]:
    chance = random.Random(5)
    return [TEXTS(chance) for _ in range(40_000)]


def bursty(rate: float, jobs: int) -> Arrivals:
    """Return arrivals in bursts of 1 to 39 jobs. The jobs of a burst arrive at the same moment."""

    def arrivals(chance: random.Random) -> Iterator[float]:
        moment, left = 0.0, jobs
        while left > 0:
            moment += chance.expovariate(rate / 20)
            burst = min(left, chance.randint(1, 39))
            left -= burst
            yield from [moment] * burst

    return arrivals


def shifting(rate: float, jobs: int) -> Arrivals:
    """Return arrivals whose rate alternates between 0.25 and 1.75 times *rate*, for a twentieth of the jobs each."""

    def arrivals(chance: random.Random) -> Iterator[float]:
        moment = 0.0
        for job in range(jobs):
            moment += chance.expovariate(rate * (1.75 if job * 20 // jobs % 2 else 0.25))
            yield moment

    return arrivals


def flood(rate: float, jobs: int) -> Arrivals:
    """Return arrivals that all come at the start, whatever the rate."""
    return lambda chance: [0.0] * jobs


KINDS: dict[str, Callable[[float, int], Arrivals]] = {
    "steady": poisson,
    "bursty": bursty,
    "shifting": shifting,
    "flood": flood,
}


class Cell(NamedTuple):
    """A combination of a load, a cost and a number of workers.

    Attributes:
        kind: How jobs arrive: a key of `KINDS`.
        cost: How long a batch takes: a key of `COSTS`.
        workers: The number of workers.
        load: The rate of jobs, as a share of what the workers can do with the best fixed size.
    """

    kind: str
    cost: str
    workers: int
    load: float = 1.0

    @property
    def rate(self) -> float:
        """The rate of jobs per second."""
        size, time = best_size(self.cost)
        return self.load * self.workers * size / time

    def run(self, policy: BatchingPolicy[Any], jobs: int, seed: int = 1, noise: float = 0.0) -> SimulationReport:
        """Simulate a policy.

        Args:
            policy: The policy.
            jobs: The number of jobs for each worker. A policy learns nothing until their first batches have ended.
            seed: The seed of the arrivals and of the noise.
            noise: The standard deviation of the logarithm of a factor, which is random for each batch and 1 on average.
        """
        jobs *= self.workers
        cost, time = COSTS[self.cost], COSTS[self.cost].start(jobs)
        return simulate(
            policy,
            KINDS[self.kind](self.rate, jobs),
            cost=_noisy(time, noise, seed) if noise else time,
            weights=TEXTS if cost.texts else None,
            max_workers=self.workers,
            seed=seed,
        )


def _noisy(time: Time, noise: float, seed: int) -> Time:
    chance = random.Random(seed)
    return lambda batch: time(batch) * chance.lognormvariate(-noise * noise / 2, noise)
