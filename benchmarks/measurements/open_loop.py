"""Open loop: jobs arrive at random, whether earlier jobs are done or not.

The arrivals are Poisson, and the same in every run. Their rate is 10, 50 or 90 % of what the downstream can do with one
worker and 64 jobs per call. The latency of a job starts when it should arrive, so a slow `submit` counts, and ends when
the downstream call ends. (The closed loop includes the way back to the caller.) The calls per 1,000 jobs show the price
of the latency. Both depend mostly on the policy, so several policies are compared.

The default policy of microbatch allows 100 jobs per call, so the same arrivals are a slightly lower load for it.
"""

import itertools
import random
import time

from benchmarks.contenders import Contender
from benchmarks.measurements.base import INTERVAL, PEERS, SIZE, Case, Figure, Measurement, p50_and_p99
from benchmarks.measurements.downstream import Downstream


def run(contender: type[Contender], *, load: float, seconds: float) -> dict[str, float]:
    """See the module."""
    downstream = Downstream(1, SIZE)
    rate = load * downstream.limit
    draw = random.Random(0)
    moments = list(itertools.accumulate(draw.expovariate(rate) for _ in range(int(rate * seconds))))
    jobs = [b"%d" % number for number in range(len(moments))]
    batcher = contender(downstream, size=SIZE, interval=INTERVAL, workers=1)

    handles = []
    submit, clock, sleep = batcher.submit, time.perf_counter, time.sleep
    start = clock()
    for moment, job in zip(moments, jobs):
        delay = start + moment - clock()
        if delay > 0:
            sleep(delay)
        handles.append(submit(job))
    if [batcher.result(handle) for handle in handles] != jobs:
        raise AssertionError("a caller got the result of another job")

    batcher.close()
    latencies = [end - start - moments[int(job)] for end, batch in downstream.calls for job in batch]
    p50, p99 = p50_and_p99(latencies)
    return {"p50": p50 * 1e3, "p99": p99 * 1e3, "calls": len(downstream.calls) / len(jobs) * 1e3}


def _case(percent: int, seconds: float) -> Case:
    return Case(f"{percent} % of capacity", {"load": percent / 100, "seconds": seconds})


OPEN = Measurement(
    name="open",
    title="Open loop",
    about="Jobs arrive at random (Poisson). One call at a time takes 5 ms plus 20 µs per job.",
    run=run,
    figures={"p50": Figure("p50, ms"), "p99": Figure("p99, ms"), "calls": Figure("calls per 1,000 jobs", 1)},
    contenders=("microbatch", "microbatch-now", "microbatch-interval", "microbatch-long", *PEERS),
    cases=[_case(percent, 4) for percent in (10, 50, 90)],
    quick=[_case(percent, 0.5) for percent in (10, 90)],
    plot="p50",
)
