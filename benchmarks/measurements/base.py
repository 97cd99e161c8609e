"""Describes measurements, and has the functions that several of them use."""

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
    """The contender does not support this case. The table shows the message as the reason."""


class Figure(NamedTuple):
    """A figure of a measurement: its heading in the table, and the number of decimal places."""

    heading: str
    digits: int = 2


class Case(NamedTuple):
    """A case of a measurement: its name in the tables, and the arguments for `Measurement.run`."""

    label: str
    settings: Mapping[str, float]


@dataclass(frozen=True)
class Measurement:
    """A measurement, with everything that the runner, the tables and the plots need.

    Attributes:
        name: Its name on the command line.
        title: Its title in the tables.
        about: A sentence or two that explain it, for the tables.
        run: A function that measures one contender once, in this process, and returns the figures.
        figures: The figures that `run` returns, in the order of the table.
        contenders: The names of the contenders that are measured.
        cases: The cases of a full run.
        quick: The cases of a quick run.
        ratios: Pairs of a figure and a contender. The table has the ratio to its figure in the same repeat.
        wide: Whether all cases are columns of one table. Otherwise, each case has a table.
        growth: The labels of two cases, for a column with their ratio: of each figure in a wide table, else of *plot*.
        plot: The figure that is drawn, or None for no plot.
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
    """Seconds on the clock, and seconds of CPU time of all threads of the process."""

    wall: float
    cpu: float


def together(works: Sequence[Callable[[], Outcome]]) -> tuple[Spent, list[Outcome]]:
    """Call each of *works* in its own thread, all at the same moment. Return the time that took, and their outcomes."""
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
        pool.shutdown(wait=False)  # without waiting, because if one thread failed, the others may hang


def p50_and_p99(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile of *values*."""
    percentiles = statistics.quantiles(values, n=100, method="inclusive")
    return statistics.median(values), percentiles[98]


def check_workers(contender: type[Contender], workers: int) -> None:
    """Raise `Unsuited` unless the contender can run *workers* batches at the same time."""
    if workers > contender.most_workers:
        raise Unsuited(f"runs {contender.most_workers} batch at a time")
