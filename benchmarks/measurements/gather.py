"""Submit then gather: what a job costs in the library itself.

Each thread submits its share of the jobs as fast as it can, and then reads all its results. The processor returns the
list of jobs, so nearly all of the time is the library's. The figures are wall time and CPU time, divided by the number
of jobs. The clock starts when all threads are ready, and stops when the last result is read. The jobs exist before, and
each caller keeps its handles until after. The garbage collector is on.

``one-thread`` always runs in one thread, also in the tables for several threads.
"""

import functools
import gc
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.measurements.base import (
    BATCHERS,
    INTERVAL,
    PEERS,
    POOL,
    SIZE,
    Case,
    Figure,
    Measurement,
    together,
)


def no_op(jobs: list[bytes]) -> list[bytes]:
    """Return the jobs as their results: the cheapest processor possible."""
    return jobs


def run(contender: type[Contender], *, jobs: int, threads: int) -> dict[str, float]:
    """See the module."""
    return cost(contender(no_op, size=SIZE, interval=INTERVAL, workers=1), jobs, min(threads, contender.most_callers))


def cost(batcher: Contender, jobs: int, threads: int) -> dict[str, float]:
    """Return the wall time and the CPU time per job in microseconds, and close *batcher*."""
    shares = [[b"%d" % number for number in range(thread, jobs, threads)] for thread in range(threads)]

    def work(share: list[bytes]) -> tuple[list[Any], list[bytes]]:
        submit, result = batcher.submit, batcher.result
        handles = [submit(job) for job in share]
        return handles, [result(handle) for handle in handles]  # so no handle is freed before the clock stops

    gc.collect()
    spent, outcomes = together([functools.partial(work, share) for share in shares])
    if [results for _, results in outcomes] != shares:
        raise AssertionError("a caller got the result of another job")
    batcher.close()
    return {"wall": spent.wall / jobs * 1e6, "cpu": spent.cpu / jobs * 1e6}


FIGURES = {"wall": Figure("wall, µs per job"), "cpu": Figure("CPU, µs per job")}


def _case(jobs: int, threads: int) -> Case:
    return Case(f"{jobs:,} jobs from {threads} thread{'s' if threads > 1 else ''}", {"jobs": jobs, "threads": threads})


GATHER = Measurement(
    name="gather",
    title="Submit then gather",
    about="Submit all jobs, then read all results, through a processor that does nothing.",
    run=run,
    figures=FIGURES,
    contenders=(*BATCHERS, POOL, *PEERS, "one-thread"),
    cases=[_case(100_000, threads) for threads in (1, 4, 16)],
    quick=[_case(10_000, threads) for threads in (1, 16)],
    ratios=[("wall", POOL), ("wall", "one-thread"), ("cpu", POOL)],
    plot="wall",
)
