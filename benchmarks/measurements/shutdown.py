"""Shutdown: how long it takes to shut down a batcher that has nothing to do.

In each repetition, a new batcher processes one job, is idle for a moment, and is shut down. Only the shutdown is timed.
A contender that polls may take as long as the pause between two polls. One that does not wait for its threads returns
immediately, so its figure can't be compared.
"""

import time

from benchmarks.contenders import Contender
from benchmarks.measurements.base import BATCHERS, INTERVAL, PEERS, POOL, SIZE, Case, Figure, Measurement, p50_and_p99
from benchmarks.measurements.gather import no_op


def run(contender: type[Contender], *, times: int) -> dict[str, float]:
    """See the module."""
    durations = []
    for _ in range(times):
        batcher = contender(no_op, size=SIZE, interval=INTERVAL, workers=1)
        batcher.result(batcher.submit(b"job"))
        time.sleep(4 * INTERVAL)
        start = time.perf_counter()
        batcher.close()
        durations.append(time.perf_counter() - start)
    p50, p99 = p50_and_p99(durations)
    return {"p50": p50 * 1e3, "p99": p99 * 1e3}


SHUTDOWN = Measurement(
    name="shutdown",
    title="Shutdown",
    about="How long the shutdown of an idle batcher takes.",
    run=run,
    figures={"p50": Figure("p50, ms", 3), "p99": Figure("p99, ms", 3)},
    contenders=(*BATCHERS, POOL, *PEERS),
    cases=[Case("idle", {"times": 50})],
    quick=[Case("idle", {"times": 10})],
)
