"""Compares policies that need no tuning with the best hand-tuned policy: ``python -m benchmarks.policies``."""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measurements.downstream import Downstream
from benchmarks.tables import Table, render, rst
from microbatch import DEFAULT_POLICY, Adaptive, Batcher, BatchingPolicy, Interval, Natural, Size
from microbatch.simulation import SimulationReport, poisson, simulate

SIZE = 100
INTERVALS = (0, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
COSTS = {"5 ms + 20 µs": (5e-3, 20e-6), "20 ms + 1 ms": (20e-3, 1e-3), "1 ms + 100 µs": (1e-3, 100e-6)}
WORKERS = (1, 4, 16)
LOADS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95)

INTRODUCTION = """\
Each cell is a combination of load, cost and number of workers, simulated in virtual time. In each cell, the policy
``Size(100) | Interval(...)`` is tuned by hand: it runs with 13 intervals. The tables compare other policies with the best
of these 13 runs. The mean latency is compared with the lowest mean, and the p99 with the lowest p99. Usually, these come
from two different intervals, and nobody knows them in advance.

A ratio of 1.03 means 3 % slower. *Mean* and *p99* are geometric means over the cells, and *worst* is the worst cell.
*Calls* is the number of calls, relative to the run with the lowest mean latency.
"""

REAL_LOADS = """\
The real batcher runs three loads, with threads and a downstream that sleeps. *Simulated* is the result of the simulator
for the same arrivals.
"""

Arrivals = Callable[[random.Random], Iterable[float]]


class Cell(NamedTuple):
    """A combination of a load, a cost and a number of workers.

    Attributes:
        kind: How jobs arrive: a key of `KINDS`.
        fixed: The seconds that a call takes.
        each: The seconds that each job adds to its call.
        workers: The number of workers.
        load: The rate of jobs, as a share of what the workers can do.
    """

    kind: str
    fixed: float
    each: float
    workers: int
    load: float

    def service_time(self, size: int) -> float:
        """Return how many seconds a batch takes."""
        return self.fixed + self.each * size

    @property
    def rate(self) -> float:
        """The rate of jobs per second."""
        return self.load * self.workers * SIZE / self.service_time(SIZE)


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


KINDS: dict[str, Callable[[float, int], Arrivals]] = {"steady": poisson, "bursty": bursty, "shifting": shifting}


def cells() -> list[Cell]:
    """Return all cells. A load that is not steady has a mean of at most 50 %, which leaves capacity for its peaks."""
    steady = [Cell("steady", *cost, workers, load) for cost in COSTS.values() for workers in WORKERS for load in LOADS]
    others = [
        Cell(kind, *cost, workers, load)
        for kind in ("bursty", "shifting")
        for cost in COSTS.values()
        for workers in WORKERS
        for load in (0.1, 0.3, 0.5)
    ]
    return steady + others


def contenders(cell: Cell) -> dict[str, BatchingPolicy[Any]]:
    """Return the policies to compare, by their names in the table."""
    target = cell.service_time(SIZE)
    return {
        "the default policy": DEFAULT_POLICY,
        "Natural()": Natural(),
        "Adaptive(...) | Natural()": Adaptive(target) | Natural(),
        "Size(100) | Interval(0)": Size(SIZE) | Interval(0),
        "Size(100) | Interval(0.005)": Size(SIZE) | Interval(0.005),
    }


class Ratios(NamedTuple):
    """The figures of a policy, as ratios to those of the best hand-tuned policy."""

    mean: float
    p99: float
    calls: float


def compare(cell: Cell, jobs: int) -> dict[str, Ratios]:
    """Return the ratios of each policy in one cell."""
    # The number of jobs grows with the workers, because a policy learns nothing until their first batches have ended.
    arrivals = KINDS[cell.kind](cell.rate, jobs * cell.workers)

    def run(policy: BatchingPolicy[Any]) -> SimulationReport:
        return simulate(policy, arrivals, cell.service_time, max_workers=cell.workers, seed=1)

    tuned = [run(Size(SIZE) | Interval(interval)) for interval in INTERVALS]
    best = min(tuned, key=lambda report: report.mean)
    least = min(report.p99 for report in tuned)
    reports = {name: run(policy) for name, policy in contenders(cell).items()}
    return {
        name: Ratios(report.mean / best.mean, report.p99 / least, report.batches / best.batches)
        for name, report in reports.items()
    }


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of *values*."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def groups() -> dict[str, Callable[[Cell], bool]]:
    """Return the groups of cells that share a table: for each title, whether a cell belongs to the group."""
    return {
        **{f"steady, {n} worker{'s' * (n > 1)}": _has("steady", n) for n in WORKERS},
        "steady, all 63 cells": lambda cell: cell.kind == "steady",
        "bursty": lambda cell: cell.kind == "bursty",
        "shifting": lambda cell: cell.kind == "shifting",
    }


def _has(kind: str, workers: int) -> Callable[[Cell], bool]:
    return lambda cell: (cell.kind, cell.workers) == (kind, workers)


def against_the_best(jobs: int) -> list[Table]:
    """Return the tables that compare each policy with the best hand-tuned policy."""
    with ProcessPoolExecutor() as pool:
        results = dict(zip(cells(), pool.map(partial(compare, jobs=jobs), cells())))
    headings = ["", "mean", "worst", "p99", "worst", "calls"]
    tables = []
    for title, belongs in groups().items():
        those = [result for cell, result in results.items() if belongs(cell)]
        rows = [[name, *_summary([result[name] for result in those])] for name in those[0]]
        tables.append(Table(f"{title}: {len(those)} cells", headings, rows, []))
    return tables


def _summary(ratios: Sequence[Ratios]) -> list[str]:
    means, p99s, calls = zip(*ratios)
    times = geometric_mean(means), max(means), geometric_mean(p99s), max(p99s)
    return [*(f"{figure:,.3f}" for figure in times), f"{geometric_mean(calls):,.2f}"]


REAL = [
    (Size(64) | Natural(), 1, 0.1),
    (Size(64) | Interval(0.005), 1, 0.5),
    (Size(64) | Natural(), 4, 0.3),
]


def real_and_simulated(seconds: float) -> Table:
    """Return the table that compares the real batcher with the simulator."""
    rows = []
    for policy, workers, load in REAL:
        rate = load * Downstream(workers, 64).limit
        batch, p50, submitted = measure(policy, workers, list(poisson(rate, int(rate * seconds))(random.Random(1))))
        report = simulate(policy, submitted, service_time, max_workers=workers)
        simulated = report.jobs / report.batches
        figures = batch, simulated, batch / simulated, p50 * 1e3, report.p50 * 1e3, p50 / report.p50
        rows.append([repr(policy), f"{workers}", f"{rate:,.0f}", *(f"{figure:.2f}" for figure in figures)])
    headings = ["", "workers", "jobs/s", "mean batch", "simulated", "ratio", "p50, ms", "simulated", "ratio"]
    return Table("a call takes 5 ms and 20 µs per job", headings, rows, [])


def service_time(size: int) -> float:
    """Return the seconds that a call to the downstream of the benchmarks takes."""
    return 5e-3 + 20e-6 * size


def measure(policy: BatchingPolicy[Any], workers: int, moments: Sequence[float]) -> tuple[float, float, list[float]]:
    """Submit a job at each moment. Return the mean batch, the p50, and when each job was really submitted."""
    downstream = Downstream(workers, 64)
    with Batcher[bytes, bytes](downstream, policy, max_pending=0, max_workers=workers) as batcher:
        batcher.submit(b"job").result()  # starts the threads
        start, futures = time.monotonic(), []
        for moment in moments:
            left = start + moment - time.monotonic()
            if left > 0:
                time.sleep(left)
            futures.append(batcher.submit(b"job"))
        results = [future.result() for future in futures]
    latencies = sorted(result.queue_time + result.service_time for result in results)
    mean = len(results) / len({result.batch.id for result in results})
    first = futures[0].submitted
    return mean, latencies[math.ceil(len(latencies) / 2) - 1], [future.submitted - first for future in futures]


def main(arguments: Sequence[str]) -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument(
        "--jobs",
        type=int,
        default=5_000,
        metavar="N",
        help="simulated jobs per worker in each cell (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="the time of each real load (default: %(default)s)"
    )
    path = Path(__file__).parent / "results" / "policies.rst"
    parser.add_argument("--output", type=Path, default=path, metavar="FILE")
    options = parser.parse_args(arguments)
    lines = [
        rst("Policies compared with the best hand-tuned policy", "="),
        INTRODUCTION,
        *map(render, against_the_best(options.jobs)),
        rst("The batcher compared with the simulator"),
        REAL_LOADS,
        render(real_and_simulated(options.seconds)),
    ]
    print(*lines, sep="\n")
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
