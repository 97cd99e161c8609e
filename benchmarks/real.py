"""Runs batchers with threads: compares them with the simulator, and checks the order of the jobs of a key."""

import itertools
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.cells import TEXTS, Time
from benchmarks.machine import machine
from benchmarks.measurements.downstream import Downstream
from benchmarks.tables import Table
from microbatch import (
    Batcher,
    BatchingPolicy,
    InTime,
    Interval,
    JobExpired,
    Natural,
    NEVER,
    OldestFirst,
    Padded,
    PerKey,
    Size,
    length_buckets,
)
from microbatch.simulation import Arrival, SimulatedBatch, poisson, simulate

INTRODUCTION = """\
The real batcher runs with threads and a downstream that sleeps. *Simulated* is the result of the simulator for the same
arrivals. The first loads have a database, whose calls take 5 ms plus 20 µs per job. Those with ``Padded`` have a model,
whose calls take 1 ms plus 20 µs for each token, padding included. With ``InTime``, jobs expire after 20 to 200 ms. With
``PerKey``, jobs have 16 keys.
"""


def database(batch: SimulatedBatch) -> float:
    """Return the seconds that a call of the downstream of the benchmarks takes."""
    return 5e-3 + 20e-6 * batch.count


def model(batch: SimulatedBatch) -> float:
    """Return the seconds that a model takes that pads each text to the longest one."""
    return 1e-3 + 20e-6 * batch.padded


class Load(NamedTuple):
    """A load for the real batcher and for the simulator.

    Attributes:
        policy: The policy.
        workers: The number of workers.
        rate: The rate of jobs per second.
        time: How long a batch takes.
        key: Returns the key of a job with this weight, or None if jobs have no keys.
        weight: Returns a random weight.
        expires_in: Returns a random number of seconds after which a job expires.
    """

    policy: BatchingPolicy[Any]
    workers: int
    rate: float
    time: Time = database
    key: Callable[[random.Random, float], Any] | None = None
    weight: Callable[[random.Random], float] = lambda chance: 1.0
    expires_in: Callable[[random.Random], float] = lambda chance: NEVER

    def arrivals(self, seconds: float) -> list[Arrival]:
        """Return the jobs of so many seconds."""
        chance, found = random.Random(1), []
        for moment in poisson(self.rate, math.ceil(self.rate * seconds))(random.Random(1)):
            weight = self.weight(chance)
            key = self.key and self.key(chance, weight)
            found.append(Arrival(moment, key, weight, self.expires_in(chance)))
        return found


_bucket = length_buckets(float)
LOADS = [
    Load(Size(64) | Natural(), 1, 1_019),
    Load(Size(64) | Interval(0.005), 1, 5_096),
    Load(Size(64) | Natural(), 4, 12_229),
    Load(Padded(512) | Natural(), 1, 400, model, weight=TEXTS),
    Load((Padded(512) | Natural()) & OldestFirst(), 1, 400, model, lambda chance, weight: _bucket(weight), TEXTS),
    Load(InTime() | Size(64) | Interval(0.05), 1, 1_019, expires_in=lambda chance: chance.uniform(0.02, 0.2)),
    Load((Size(64) | Natural()) & PerKey(), 4, 2_000, key=lambda chance, weight: chance.randrange(16)),
]
"""The first three are at 10, 50 and 30 % of what the workers can do with batches of 64."""


class Sleeper(Downstream):
    """A downstream that takes as long as a function says. Its jobs are arrivals."""

    def __init__(self, time_of: Time, at_once: int) -> None:
        super().__init__(at_once, 64)
        self._time_of = time_of

    def __call__(self, jobs: list[Any]) -> list[Any]:
        """Sleep, and return the jobs."""
        weights = [job.weight for job in jobs]
        time.sleep(max(0.0, self._time_of(SimulatedBatch(len(jobs), sum(weights), max(weights))) - self._late))
        return jobs


class Measured(NamedTuple):
    """The mean number of jobs in a batch, the median latency in seconds, and the share of the jobs done in time."""

    batch: float
    p50: float
    in_time: float


def compared(seconds: float) -> Iterator[Table]:
    """Yield the table that compares the real batcher with the simulator."""
    rows, notes, facts = [], [], _facts()
    for load in LOADS:
        found, arrivals = measure(load, load.arrivals(seconds))
        report = simulate(load.policy, arrivals, cost=load.time, max_workers=load.workers)
        simulated = report.jobs / report.batches
        figures = found.batch, simulated, found.batch / simulated
        times = found.p50 * 1e3, report.p50 * 1e3, found.p50 / report.p50
        rows.append([repr(load.policy), f"{load.workers}", f"{load.rate:,}", *(f"{x:.2f}" for x in figures + times)])
        if arrivals[0].expires_in < NEVER:
            share = report.in_time / len(arrivals)
            notes.append(f"{load.policy!r}: {found.in_time:.2%} in time, simulated {share:.2%}".replace("%", " %"))
    headings = ["", "workers", "jobs/s", "mean batch", "simulated", "ratio", "p50, ms", "simulated", "ratio"]
    yield Table("real and simulated", headings, rows, [*notes, facts])


def _facts() -> str:
    return "; ".join(f"{name}: {value}" for name, value in machine().items())


def measure(load: Load, arrivals: Sequence[Arrival]) -> tuple[Measured, list[Arrival]]:
    """Submit each job at its moment. Return what became of them, and the arrivals as they really were."""
    options: dict[str, Any] = {"key": lambda job: job.key} if load.key else {}
    sleeper = Sleeper(load.time, load.workers)
    with Batcher[Arrival, Arrival](
        sleeper, load.policy, weigh=lambda job: job.weight, max_pending=0, max_workers=load.workers, **options
    ) as batcher:
        batcher.submit(arrivals[0]).result()  # starts the threads
        start, futures = time.monotonic(), []
        for arrival in arrivals:
            left = start + arrival.moment - time.monotonic()
            if left > 0:
                time.sleep(left)
            futures.append(batcher.submit(arrival, expires_in=arrival.expires_in))
    done = [future.result() for future in futures if not isinstance(future.exception(), JobExpired)]
    latencies = [result.queue_time + result.service_time for result in done]
    in_time = sum(
        latency <= future.job.expires_in
        for future, latency in zip((future for future in futures if not future.exception()), latencies)
    )
    batches = {result.batch.id for result in done}
    first = futures[0].submitted
    found = Measured(len(done) / len(batches), statistics.median_low(latencies), in_time / len(futures))
    return found, [arrival._replace(moment=future.submitted - first) for arrival, future in zip(arrivals, futures)]


# -- the order of the jobs of a key --

KEYS, WORKERS = 64, 8
ORDER = f"""\
A real batcher with {WORKERS} workers processes jobs of {KEYS} keys, as fast as one thread can submit them. A call takes 1
ms plus 10 µs per job. *Started* and *ended* count the jobs that started or ended after a later job of their key, and
*at once* counts the batches that started while another batch of their key was running. These three are sums over all
runs. The runs alternate. *Worst* is the slowest run.

If all keys have equally many jobs, the keys take turns, and a batch of a key is over before its next turn. So the order
is kept even without ``PerKey``, and the first table compares only the speed. In the second table, an eighth of the jobs
have the same key.
"""
UNORDERED, ORDERED = Size(100) | Natural(), (Size(100) | Natural()) & PerKey()


class Recorder:
    """A processor that records in which order its calls start and end. Each job is a number, higher than those before it.

    Attributes:
        calls: For each call, the place of its start and of its end in the order of all of them, and its jobs.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, list[int]]] = []
        self._places = itertools.count()

    def __call__(self, jobs: list[int]) -> None:
        """Take as long as a downstream would."""
        start = next(self._places)
        time.sleep(1e-3 + 10e-6 * len(jobs))
        self.calls.append((start, next(self._places), jobs))

    def out_of_order(self, keys: Sequence[int]) -> tuple[int, int, int]:
        """Return how many jobs started, and ended, in the wrong order, and how many batches of a key ran at once."""
        of_key = defaultdict(list)
        for call in self.calls:
            of_key[keys[call[2][0]]].append(call)
        started = ended = at_once = 0
        for calls in of_key.values():
            ended += _late([jobs for _, _, jobs in sorted(calls, key=lambda call: call[1])])
            calls.sort()
            started += _late([jobs for _, _, jobs in calls])
            latest = -1
            for start, end, _ in calls:
                at_once += start < latest
                latest = max(latest, end)
        return started, ended, at_once


def _late(batches: list[list[int]]) -> int:
    """Return how many numbers stand after a higher one."""
    highest, late = -1, 0
    for job in itertools.chain.from_iterable(batches):
        late += job < highest
        highest = max(highest, job)
    return late


def ordered(jobs: int, repeats: int) -> Iterator[Table]:
    """Yield tables that compare `PerKey` with a policy that does not look at the key."""
    chance = random.Random(1)
    yield _ordered("keys with equally many jobs", [chance.randrange(KEYS) for _ in range(jobs)], repeats)
    yield _ordered(
        "keys with different numbers of jobs", [int(KEYS * chance.random() ** 2) for _ in range(jobs)], repeats
    )


def _ordered(title: str, keys: Sequence[int], repeats: int) -> Table:
    policies, facts = (UNORDERED, ORDERED), _facts()
    rates: dict[str, list[float]] = {repr(policy): [] for policy in policies}
    wrong = {repr(policy): [0, 0, 0] for policy in policies}
    for repeat in range(repeats):
        for policy in policies if repeat % 2 else policies[::-1]:
            recorder = Recorder()
            rates[repr(policy)].append(_rate(recorder, policy, keys))
            wrong[repr(policy)] = [*map(sum, zip(wrong[repr(policy)], recorder.out_of_order(keys)))]
    rows = [
        [name, f"{statistics.median(rates[name]):,.0f}", f"{min(rates[name]):,.0f}", *(f"{x:,}" for x in wrong[name])]
        for name in rates
    ]
    ratios = [after / before for before, after in zip(*rates.values())]
    note = f"the throughput with PerKey divided by that without: median {statistics.median(ratios):.3f}, worst {min(ratios):.3f}"
    headings = ["", "jobs/s", "worst", "started", "ended", "at once"]
    return Table(f"{title}: {repeats} runs of {len(keys):,} jobs each", headings, rows, [note, facts])


def _rate(recorder: Recorder, policy: BatchingPolicy[Any], keys: Sequence[int]) -> float:
    """Process a job for each of *keys*, and return the jobs per second."""
    start = time.perf_counter()
    with Batcher[int, None](recorder, policy, key=keys.__getitem__, max_workers=WORKERS) as batcher:
        for job in range(len(keys)):
            batcher.submit(job)
    taken = time.perf_counter() - start
    done = sorted(itertools.chain.from_iterable(jobs for _, _, jobs in recorder.calls))
    assert done == list(range(len(keys))), "a job was lost or processed twice"
    return len(keys) / taken
