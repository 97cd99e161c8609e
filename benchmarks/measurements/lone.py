"""The lone caller: what a batcher costs if there is only one caller.

One thread submits a job and waits for its result, again and again, as in the closed loop. Its median latency is
compared with that of a direct call to the downstream, which is measured just before in the same process. A policy that
waits for more jobs adds its interval to each call.
"""

import time
from collections.abc import Callable

from benchmarks.contenders import Contender
from benchmarks.measurements.base import BATCHERS, INTERVAL, PEERS, POOL, SIZE, Case, Figure, Measurement, p50_and_p99
from benchmarks.measurements.downstream import Downstream


def run(contender: type[Contender], *, calls: int) -> dict[str, float]:
    """See the module."""
    downstream = Downstream(1, SIZE)
    bare, _ = p50_and_p99(_durations(lambda: downstream([b"job"]), calls))
    batcher = contender(downstream, size=SIZE, interval=INTERVAL, workers=1)
    batcher.result(batcher.submit(b"job"))  # starts the threads
    p50, p99 = p50_and_p99(_durations(lambda: batcher.result(batcher.submit(b"job")), calls))
    batcher.close()
    return {"over_bare": p50 / bare, "p50": p50 * 1e3, "p99": p99 * 1e3, "bare": bare * 1e3}


def _durations(call: Callable[[], object], calls: int) -> list[float]:
    durations = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return durations


LONE = Measurement(
    name="lone",
    title="Lone caller",
    about="One thread submits a job and waits for its result, again and again. The call itself takes 5.02 ms.",
    run=run,
    figures={
        "over_bare": Figure("p50, × the bare call"),
        "p50": Figure("p50, ms"),
        "p99": Figure("p99, ms"),
        "bare": Figure("bare call, ms"),
    },
    contenders=(*BATCHERS, "microbatch-allwaiting", POOL, *PEERS, "locks-now"),
    cases=[Case("1 thread", {"calls": 200})],
    quick=[Case("1 thread", {"calls": 30})],
    plot="over_bare",
)
