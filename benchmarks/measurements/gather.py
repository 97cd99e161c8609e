"""Submit then gather: what the machinery costs per job when nothing else does.

Each of some threads submits its share of the jobs as fast as it can, then reads all its results. The processor gives back
the list it gets, so that what is left is the way of a job through the contender. Wall and CPU are divided by the number
of jobs. All jobs are made before; all handles are kept until after, as they are by a caller who gathers; the garbage
collector is on. The clock starts when the last thread is ready, and stops when the last one has its last result.

The floor has no hand-over, so it always runs in one thread; the other rows are set in relation to that.
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
    """Give back what comes: the cheapest processor there is."""
    return jobs


def run(contender: type[Contender], *, jobs: int, threads: int) -> dict[str, float]:
    """See the module."""
    return cost(contender(no_op, size=SIZE, interval=INTERVAL, workers=1), jobs, min(threads, contender.most_callers))


def cost(batcher: Contender, jobs: int, threads: int) -> dict[str, float]:
    """Return the microseconds per job of wall and of CPU, and close *batcher*."""
    shares = [[b"%d" % number for number in range(thread, jobs, threads)] for thread in range(threads)]

    def work(share: list[bytes]) -> tuple[list[Any], list[bytes]]:
        submit, result = batcher.submit, batcher.result
        handles = [submit(job) for job in share]
        return handles, [result(handle) for handle in handles]  # so the handles are freed when the clock has stopped

    gc.collect()
    spent, outcomes = together([functools.partial(work, share) for share in shares])
    if [results for _, results in outcomes] != shares:
        raise AssertionError("somebody got the result of another job")
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
    contenders=(*BATCHERS, POOL, *PEERS, "floor"),
    cases=[_case(100_000, threads) for threads in (1, 4, 16)],
    quick=[_case(10_000, threads) for threads in (1, 16)],
    ratios=[("wall", POOL), ("wall", "floor"), ("cpu", POOL)],
    plot="wall",
)
