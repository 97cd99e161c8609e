"""What a measurement is, and what several of them use."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from benchmarks.contenders import Contender

SIZE = 64
INTERVAL = 0.005

BATCHERS = ("microbatch", "microbatch-interval")
POOL = "ThreadPoolExecutor"
PEERS = ("batched", "ubatch", "pybatcher", "service-streamer", "google-cloud-pubsub")

Outcome = TypeVar("Outcome")


class Unsuited(Exception):
    """Raised by a measurement for a contender that can't do this, with the reason for the table."""


class Figure(NamedTuple):
    """One figure of a measurement: its heading in the table, and how many digits make sense."""

    heading: str
    digits: int = 2


class Case(NamedTuple):
    """One setting of a measurement: what it is called in the tables, and the arguments for `Measurement.run`."""

    label: str
    settings: Mapping[str, float]


@dataclass(frozen=True)
class Measurement:
    """One question, and all that the runner and the tables must know about it.

    Attributes:
        name: what it is called on the command line.
        title: what it is called in the tables.
        about: one sentence for the tables.
        run: measures one contender once, in this process, and returns its figures.
        figures: what `run` returns, in the order of the table.
        contenders: the names of those who can be asked.
        cases: the settings it is run with.
        quick: the settings of a small run.
        ratios: figures to be set in relation to a contender's, run by run.
        wide: whether the cases are columns of one table, instead of a table each.
        growth: the labels of two cases whose ratio is shown too: in a wide table for each figure, else for *plot*.
        plot: the figure that is drawn; None for no plot.
    """

    name: str
    title: str
    about: str
    run: Callable[..., dict[str, float]]
    figures: Mapping[str, Figure]
    contenders: Sequence[str]
    cases: Sequence[Case]
    quick: Sequence[Case]
    ratios: Sequence[tuple[str, str]] = ()
    wide: bool = False
    growth: tuple[str, str] | None = None
    plot: str | None = None


class Spent(NamedTuple):
    """Seconds of the wall clock, and of CPU in all threads of the process."""

    wall: float
    cpu: float


def together(works: Sequence[Callable[[], Outcome]]) -> tuple[Spent, list[Outcome]]:
    """Call each of *works* in a thread of its own, all released at the same moment, and return what that took."""
    started = Spent(0.0, 0.0)

    def start() -> None:
        nonlocal started
        started = Spent(time.perf_counter(), time.process_time())

    barrier = threading.Barrier(len(works), action=start)

    def call(work: Callable[[], Outcome]) -> Outcome:
        barrier.wait()
        return work()

    pool = ThreadPoolExecutor(len(works))
    try:
        futures = [pool.submit(call, work) for work in works]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        spent = Spent(time.perf_counter() - started.wall, time.process_time() - started.cpu)
        for future in done:
            future.result()
        return spent, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False)  # where one failed, the others may hang


def p50_and_p99(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile of *values*."""
    percentiles = statistics.quantiles(values, n=100, method="inclusive")
    return statistics.median(values), percentiles[98]


def check_workers(contender: type[Contender], workers: int) -> None:
    """Raise `Unsuited` for a contender that can't run so many batches at once."""
    if workers > contender.most_workers:
        raise Unsuited(f"runs {contender.most_workers} batch at a time")
