"""Memory: bytes per waiting job, apart from the job itself.

The processor blocks, so all further jobs wait. The jobs, and a list for their handles, are created before the first
reading. A full garbage collection precedes each reading. One process reads its resident memory from ``/proc`` of Linux,
which includes all that a job costs. Another process reads `tracemalloc`, which is exact to the byte, but does not see
memory that C code allocates on its own. If a contender starts a thread per batch, these threads count too.
"""

import gc
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.measurements.base import BATCHERS, INTERVAL, PEERS, POOL, SIZE, Case, Figure, Measurement, Unsuited

STATM = Path("/proc/self/statm")


def run(contender: type[Contender], *, jobs: int, traced: int) -> dict[str, float]:
    """See the module."""
    read = _traced if traced else _resident
    go_on = threading.Event()

    def processor(batch: list[bytes]) -> list[bytes]:
        go_on.wait()
        return batch

    batcher = contender(processor, size=SIZE, interval=INTERVAL, workers=1)
    waiting = [b"%d" % number for number in range(jobs)]
    handles: list[Any] = [None] * jobs
    if traced:
        tracemalloc.start()
    before = _after_collection(read)
    for number, job in enumerate(waiting):
        handles[number] = batcher.submit(job)
    after = _after_collection(read)
    tracemalloc.stop()
    go_on.set()
    if [batcher.result(handle) for handle in handles] != waiting:
        raise AssertionError("a caller got the result of another job")
    batcher.close()
    return {"bytes": (after - before) / jobs}


def _after_collection(read: Callable[[], int]) -> int:
    gc.collect()
    return read()


def _resident() -> int:
    if not STATM.exists():
        raise Unsuited("resident memory is read from /proc, which this system does not have")
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _traced() -> int:
    return tracemalloc.get_traced_memory()[0]


def _cases(jobs: int) -> list[Case]:
    return [
        Case(f"{jobs:,} jobs, resident", {"jobs": jobs, "traced": 0}),
        Case(f"{jobs:,} jobs, tracemalloc", {"jobs": jobs, "traced": 1}),
    ]


MEMORY = Measurement(
    name="memory",
    title="Memory",
    about="Bytes per waiting job, apart from the job itself.",
    run=run,
    figures={"bytes": Figure("bytes per job", 0)},
    contenders=(*BATCHERS, POOL, *PEERS, "one-thread"),
    cases=_cases(200_000),
    quick=_cases(20_000),
    wide=True,
)
