"""Timer: how late a single job is dispatched after its interval of 5 ms.

One job is submitted, and the processor records when it is called. The figure is the time from just before `submit` to
that moment, minus the interval. If it is negative, the job was dispatched too early, because the contender's timer does
not start with the job. A pause of random length before each job keeps the jobs from falling into step with such a
timer.
"""

import random
import time

from benchmarks.contenders import Contender
from benchmarks.measurements.base import INTERVAL, PEERS, SIZE, Case, Figure, Measurement, p50_and_p99


def run(contender: type[Contender], *, jobs: int) -> dict[str, float]:
    """See the module."""
    called: list[float] = []

    def processor(batch: list[bytes]) -> list[bytes]:
        called.append(time.perf_counter())
        return batch

    batcher = contender(processor, size=SIZE, interval=INTERVAL, workers=1)
    draw = random.Random(0)
    submitted = []
    for _ in range(jobs + 1):
        time.sleep(draw.uniform(0, 2 * INTERVAL))
        submitted.append(time.perf_counter())
        batcher.result(batcher.submit(b"job"))
    batcher.close()
    late = [call - submit - INTERVAL for submit, call in zip(submitted, called)]
    p50, p99 = p50_and_p99(late[1:])  # the first job starts the threads
    return {"p50": p50 * 1e3, "p99": p99 * 1e3}


TIMER = Measurement(
    name="timer",
    title="Timer",
    about="How late a single job is dispatched after its interval of 5 ms. A negative figure means too early.",
    run=run,
    figures={"p50": Figure("p50, ms", 3), "p99": Figure("p99, ms", 3)},
    contenders=("microbatch-interval", *PEERS),
    cases=[Case("lone jobs", {"jobs": 300})],
    quick=[Case("lone jobs", {"jobs": 30})],
)
