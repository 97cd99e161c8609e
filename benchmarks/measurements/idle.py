"""Idle: the CPU time of an open batcher that has nothing to do.

One job is processed first, so all threads run. Then the main thread sleeps. The CPU time of the process is what the
threads of the contender use meanwhile, which is almost nothing unless they poll.
"""

import time

from benchmarks.contenders import Contender
from benchmarks.measurements.base import BATCHERS, INTERVAL, PEERS, POOL, SIZE, Case, Figure, Measurement
from benchmarks.measurements.gather import no_op


def run(contender: type[Contender], *, seconds: float) -> dict[str, float]:
    """See the module."""
    batcher = contender(no_op, size=SIZE, interval=INTERVAL, workers=1)
    batcher.result(batcher.submit(b"job"))
    time.sleep(min(seconds, 0.1))  # what a contender does just after its first job does not count
    before = time.process_time()
    time.sleep(seconds)
    cpu = time.process_time() - before
    batcher.close()
    return {"cpu": cpu * 1e3}


IDLE = Measurement(
    name="idle",
    title="Idle",
    about="The CPU time of an open batcher that has nothing to do.",
    run=run,
    figures={"cpu": Figure("CPU, ms", 3)},
    contenders=(*BATCHERS, POOL, *PEERS),
    cases=[Case("5 s", {"seconds": 5})],
    quick=[Case("0.5 s", {"seconds": 0.5})],
)
