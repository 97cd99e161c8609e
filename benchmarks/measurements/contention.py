"""GIL contention: how many batches a batcher still dispatches while other threads are busy in Python.

A thread that computes in pure Python gives up the GIL only when another thread has waited for it for the switch
interval, which is 5 ms. So each thread that has to wake up between two downstream calls may delay the next call by 5
ms. In microbatch, no thread has to wake up: the thread that ran a batch takes the lead and finds the next batch itself
(see `Dispatcher.lead`). This measurement shows what that saves.

To see it, let `PoolRunner._call_in_leader` post its call as `ExecutorRunner._call_in_leader` does. Then a worker thread
has to wake up after each batch. With the default policy, the batches/s fell from 106 to 48 with one spinning thread,
and from 53 to 27 with two (CPython 3.11, two cores, 32 jobs at a time, medians of four alternating runs).

Eight threads each submit a few jobs and wait for their results, again and again. With 32 jobs each, jobs are waiting
whenever a call ends. A call takes only 1 ms plus 20 µs per job, so threads spend most of the time waiting for the
GIL. In each round, the spinning threads first pause and then run. The share compares the jobs/s of these
two parts: the table has the median over the rounds, and the worst round. A worker of ``locks-now`` also finds its next
batch itself.

With one job each, all callers wait for the same batch. No job waits for the next batch until a caller has got the GIL,
so it matters less how many threads of the batcher have to wake up.
"""

import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from benchmarks.contenders import Contender
from benchmarks.measurements.base import BATCHERS, INTERVAL, PEERS, POOL, SIZE, Case, Figure, Measurement, together
from benchmarks.measurements.downstream import Downstream

CALL = 0.001


class _Round(NamedTuple):
    """The jobs per second without the spinning threads, and the jobs and batches per second beside them."""

    alone: float
    beside: float
    batches: float

    @property
    def share(self) -> float:
        """Return the share of the jobs per second that remains beside the spinning threads."""
        return self.beside / self.alone


def run(
    contender: type[Contender], *, threads: int, jobs: int, spinning: int, rounds: int, seconds: float
) -> dict[str, float]:
    """See the module."""
    downstream = Downstream(1, SIZE, CALL)
    batcher = contender(downstream, size=SIZE, interval=INTERVAL, workers=1)
    over = threading.Event()
    found: list[_Round] = []

    def call(caller: int) -> None:
        submit, result = batcher.submit, batcher.result
        mine = [b"%d of %d" % (number, caller) for number in range(jobs)]
        try:
            while not over.is_set():
                handles = [submit(job) for job in mine]
                if [result(handle) for handle in handles] != mine:
                    raise AssertionError("a caller got the result of another job")
        finally:
            over.set()  # otherwise the other threads would never end if this caller fails

    def count() -> tuple[float, float]:
        """Return jobs and batches per second, over *seconds*, or longer if no batch ends in that time."""
        start, before = time.perf_counter(), len(downstream.calls)
        while not over.wait(seconds) and len(downstream.calls) == before:
            pass
        spent = time.perf_counter() - start
        batches = [batch for _, batch in downstream.calls[before:]]
        return sum(map(len, batches)) / spent, len(batches) / spent

    def observe() -> None:
        try:
            while len(found) < rounds and not over.is_set():
                alone, _ = count()
                with _spinning(spinning):
                    found.append(_Round(alone, *count()))
        finally:
            over.set()

    works: list[Callable[[], None]] = [functools.partial(call, caller) for caller in range(threads)]
    together([observe, *works])
    batcher.close()
    shares = [each.share for each in found]
    return {
        "batches": statistics.median(each.batches for each in found),
        "rate": statistics.median(each.beside for each in found),
        "alone": statistics.median(each.alone for each in found),
        "share": statistics.median(shares),
        "worst": min(shares),
    }


@contextmanager
def _spinning(threads: int) -> Iterator[None]:
    """Run *threads* threads that hold the GIL whenever they can."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    spinners = [threading.Thread(target=spin, daemon=True) for _ in range(threads)]
    for spinner in spinners:
        spinner.start()
    try:
        yield
    finally:
        stop.set()
        for spinner in spinners:
            spinner.join()


def _case(spinning: int, jobs: int, rounds: int, seconds: float) -> Case:
    return Case(
        f"{spinning} spinning thread{'s' if spinning > 1 else ''}, {jobs} job{'s' if jobs > 1 else ''} at a time",
        {"threads": 8, "jobs": jobs, "spinning": spinning, "rounds": rounds, "seconds": seconds},
    )


CONTENTION = Measurement(
    name="contention",
    title="GIL contention",
    about="8 threads submit jobs and wait for them, again and again, while other threads compute in pure Python.",
    run=run,
    figures={
        "batches": Figure("batches/s", 0),
        "rate": Figure("jobs/s", 0),
        "alone": Figure("jobs/s without", 0),
        "share": Figure("share left"),
        "worst": Figure("worst share"),
    },
    contenders=(*BATCHERS, POOL, *PEERS, "locks-now"),
    cases=[_case(spinning, jobs, 5, 0.4) for spinning, jobs in ((1, 32), (2, 32), (1, 1))],
    quick=[_case(spinning, jobs, 1, 0.2) for spinning, jobs in ((1, 32), (1, 1))],
    ratios=[("batches", "locks-now")],
    plot="batches",
)
