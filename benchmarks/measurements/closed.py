"""Closed loop: 64 threads each submit a job and wait for its result, again and again, as request handlers do.

A call to the downstream takes 5 ms plus 20 µs per job, so each worker can complete at most 64 jobs every 6.28 ms. The
figures have the share of this limit that a contender reaches. It loses the rest while the downstream waits: until 64
threads have their results and have submitted new jobs. ``locks`` does only that, with raw locks. The mean batch shows
whether all callers share one batch, or have split into groups that wait for each other.
"""

import itertools
import time

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
    check_workers,
    p50_and_p99,
    together,
)
from benchmarks.measurements.downstream import Downstream


def run(contender: type[Contender], *, workers: int, threads: int, seconds: float) -> dict[str, float]:
    """See the module."""
    check_workers(contender, workers)
    downstream = Downstream(workers, SIZE)
    batcher = contender(downstream, size=SIZE, interval=INTERVAL, workers=workers)

    def work() -> list[float]:
        submit, result, clock = batcher.submit, batcher.result, time.perf_counter
        latencies = []
        start = now = clock()
        while now < start + seconds:
            result(submit(b"job"))
            before, now = now, clock()
            latencies.append(now - before)
        return latencies

    spent, per_thread = together([work] * threads)
    latencies = list(itertools.chain.from_iterable(per_thread))
    batcher.close()
    p50, p99 = p50_and_p99(latencies)
    rate = len(latencies) / spent.wall
    return {
        "share": rate / downstream.limit,
        "rate": rate,
        "p50": p50 * 1e3,
        "p99": p99 * 1e3,
        "batch": downstream.mean_batch,
        "cpu": spent.cpu / len(latencies) * 1e6,
    }


def _case(workers: int, seconds: float) -> Case:
    return Case(
        f"{workers} worker{'s' if workers > 1 else ''}", {"workers": workers, "threads": 64, "seconds": seconds}
    )


CLOSED = Measurement(
    name="closed",
    title="Closed loop",
    about="64 threads each submit a job and wait for its result, again and again. A call takes 5 ms plus 20 µs per job.",
    run=run,
    figures={
        "share": Figure("share of the limit", 3),
        "rate": Figure("jobs/s", 0),
        "p50": Figure("p50, ms"),
        "p99": Figure("p99, ms"),
        "batch": Figure("mean batch", 1),
        "cpu": Figure("CPU, µs per job", 1),
    },
    contenders=(*BATCHERS, "microbatch-allwaiting", POOL, *PEERS, "locks", "locks-now"),
    cases=[_case(workers, 3) for workers in (1, 4)],
    quick=[_case(workers, 0.4) for workers in (1, 4)],
    ratios=[("rate", "locks")],
    growth=("1 worker", "4 workers"),
    plot="rate",
)
