"""The parts of ``python -m benchmarks.policies`` about policies that look at lengths, deadlines or keys."""

import argparse
import heapq
import random
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import real
from benchmarks.cells import LARGER_PAYS, TEXTS, Cell
from benchmarks.pages import Part, spread
from benchmarks.plots import loads
from benchmarks.tables import Table
from microbatch import (
    DEFAULT_POLICY,
    BatchingPolicy,
    InTime,
    Interval,
    Natural,
    OldestFirst,
    Padded,
    Size,
    length_buckets,
)
from microbatch.processors import by_length
from microbatch.simulation import Arrival, SimulatedBatch, SimulationReport, callers, poisson, simulate

# -- models that pad --


class Model:
    """The cost of a model that pads each text to the longest one of its call. It counts calls and tokens.

    Attributes:
        calls: The number of calls.
        tokens: The number of tokens so far, without padding.
        padded: The number with padding.
        longest: The length of the longest text in each batch.
    """

    def __init__(self, call: float, token: float) -> None:
        self._call, self._token = call, token
        self.calls = 0
        self.tokens = self.padded = 0.0
        self.longest: list[float] = []

    def text(self, chance: random.Random) -> float:
        """Return the length of the next text."""
        return TEXTS(chance)

    def __call__(self, batch: SimulatedBatch) -> float:
        """Return the seconds that a batch takes."""
        self.calls += 1
        self.tokens += batch.weight
        self.padded += batch.padded
        self.longest.append(batch.heaviest)
        return self._call + self._token * batch.padded


class SortedModel(Model):
    """The cost of a model behind `by_length`. It remembers the texts, because jobs without keys are processed in order."""

    def __init__(self, call: float, token: float, budget: float) -> None:
        super().__init__(call, token)
        self._coming = deque[float]()
        self._process = by_length(self._part, budget, length=float)
        self._time = 0.0

    def text(self, chance: random.Random) -> float:
        """Return the length of the next text, and remember it."""
        self._coming.append(super().text(chance))
        return self._coming[-1]

    def _part(self, texts: list[float]) -> list[float]:
        self._time += super().__call__(SimulatedBatch(len(texts), sum(texts), max(texts)))
        return texts

    def __call__(self, batch: SimulatedBatch) -> float:
        """Return the seconds that all parts of a batch take."""
        self._time = 0.0
        list(self._process([self._coming.popleft() for _ in range(batch.count)]))
        return self._time


class Processor(NamedTuple):
    """A model, and the limits that suit it.

    Attributes:
        cost: Its cost in `cells.COSTS`.
        call: How many seconds a call takes.
        token: How many seconds a token takes, padding included.
        limit: The most tokens of a batch, padding included.
        budget: The same for a part of `by_length`.
    """

    cost: str
    call: float
    token: float
    limit: int
    budget: int


MODELS = {
    "a model on a CPU": Processor("10 ms + 0.4 ms·padded", 10e-3, 0.4e-3, 256, 128),
    "a model on a GPU": Processor("20 ms + 0.01 ms·padded", 20e-3, 0.01e-3, 16_384, 8_192),
}


class Way(NamedTuple):
    """How batches are formed before a model."""

    policy: BatchingPolicy[Any]
    key: Callable[[float], Hashable] | None = None
    budget: int = 0


def multiples_of_8(length: float) -> float:
    """Return *length*, rounded up to a multiple of 8."""
    return -(-length // 8) * 8


def ways(model: Processor) -> dict[str, Way]:
    """Return the ways to form batches, by their labels."""
    limited: BatchingPolicy[Any] = (Padded(model.limit) | Natural()) & OldestFirst()
    return {
        "the default policy": Way(DEFAULT_POLICY),
        "Size(100)": Way(Size(100) | Natural()),
        "Padded": Way(Padded(model.limit) | Natural()),
        "by_length": Way(Size(100) | Natural(), budget=model.budget),
        **{f"buckets, ratio {ratio:g}": Way(limited, length_buckets(float, ratio)) for ratio in (1.25, 1.5, 2, 4)},
        "buckets, multiples of 8": Way(limited, multiples_of_8),
    }


def formed(which: tuple[str, str, float], jobs: int) -> list[str]:
    """Simulate a way to form batches, and return a row of the table."""
    model, label, load = which
    processor = MODELS[model]
    way = ways(processor)[label]
    cost = processor.call, processor.token
    before = SortedModel(*cost, way.budget) if way.budget else Model(*cost)
    rate = Cell("steady", processor.cost, 1, load).rate
    report = simulate(way.policy, poisson(rate, jobs), cost=before, weights=before.text, key=way.key)
    times = (f"{time * 1e3:,.0f}" for time in (report.mean, report.p50, report.p99))
    fill = report.jobs / before.calls, before.padded / before.tokens
    return [label, *(f"{figure:.2f}" for figure in fill), f"{report.utilisation:.0%}", *times]


def buckets(jobs: int, processes: int | None) -> Iterator[Table]:
    """Yield a table for each model and load that compares ways to form batches."""
    todo = [(name, label, load) for name, load in product(MODELS, (0.1, 0.5, 0.9)) for label in ways(MODELS[name])]
    rows = dict(zip(todo, spread(partial(formed, jobs=jobs), todo, processes)))
    for name, load in product(MODELS, (0.1, 0.5, 0.9)):
        rate = Cell("steady", MODELS[name].cost, 1, load).rate
        title = f"{name}, {MODELS[name].cost}, {rate:,.1f} texts/s, which is {load:.0%} load".replace("%", " %")
        headings = ["", "texts per call", "padding", "busy", "mean, ms", "p50, ms", "p99, ms"]
        yield Table(title, headings, [rows[name, label, load] for label in ways(MODELS[name])], [])


BUCKETS = f"""\
A model pads each text to the longest one of its call. The texts are those of `the benchmarks of policies
<policies.rst>`__, and so is the load: 100 % is what the best fixed size can do without buckets. ``Padded`` limits a
batch to {MODELS["a model on a CPU"].limit} tokens on the CPU, padding included, and to
{MODELS["a model on a GPU"].limit:,} on the GPU. ``by_length`` has a budget of {MODELS["a model on a CPU"].budget} tokens
on the CPU, and of {MODELS["a model on a GPU"].budget:,} on the GPU. *Buckets, ratio 2* has ``key=length_buckets(len)`` and
``(Padded(...) | Natural()) & OldestFirst()``. *Padding* is the number of tokens with padding divided by the number
without.

The simulator gives all texts of a batch their results at its end. With ``by_length``, a real batcher gives the short ones
theirs earlier, so its latencies are lower than here.
"""


# -- OldestFirst --

GROUPS = {"up to 16 tokens": 16.0, "up to 64": 64.0, "longer": 256.0}


def long_and_short(jobs: int) -> Iterator[Table]:
    """Yield a table for each load that compares the latencies of long and short texts."""
    model = MODELS["a model on a CPU"]
    rate = Cell("steady", model.cost, 1, 0.95).rate
    sources: dict[str, Any] = {
        "64 callers that wait for their results": callers(64, jobs=jobs),
        f"{rate:.0f} texts/s at random, 95 % load": poisson(rate, jobs),
    }
    taking_turns = Padded(model.limit) | Natural()
    policies = {"buckets take turns": taking_turns, "with OldestFirst": taking_turns & OldestFirst()}
    for title, arrivals in sources.items():
        rows = []
        for name, policy in policies.items():
            before = Model(model.call, model.token)
            report = simulate(policy, arrivals, cost=before, weights=before.text, key=length_buckets(float))
            medians = map(statistics.median, _latencies(report, before).values())
            rows.append([name, *(f"{median * 1e3:,.0f}" for median in medians), f"{report.p99 * 1e3:,.0f}"])
        yield Table(title, ["", *(f"{group}: p50, ms" for group in GROUPS), "all: p99, ms"], rows, [])


def _latencies(report: SimulationReport, model: Model) -> dict[str, list[float]]:
    """Return the latencies of the texts in each group of buckets."""
    found: dict[str, list[float]] = {group: [] for group in GROUPS}
    # In the order in which batches end, as the latencies. Batches that end together are in the order of their starts.
    runs = sorted(zip(report.runs, model.longest), key=lambda each: each[0].ended)
    at = 0
    for run, longest in runs:
        group = next(group for group, bound in GROUPS.items() if longest <= bound)
        found[group] += report.latencies[at : at + run.size]
        at += run.size
    return found


LONG_AND_SHORT = f"""\
If the buckets of lengths take turns, each has one batch in its turn. Many short texts fit into a batch, but long texts
are alone in theirs. So the long texts of a bucket wait for many turns. With ``OldestFirst``, each text waits about
equally long. The model is the one on a CPU above,
with ``key=length_buckets(len)`` and ``Padded({MODELS["a model on a CPU"].limit}) | Natural()``. The table has the median
latency of the texts in the buckets up to 16 tokens, up to 64, and above.
"""


# -- deadlines --

MIXES: dict[str, Callable[[random.Random], float]] = {
    "all in 20 ms": lambda chance: 0.02,
    "10 % in 20 ms, 90 % in 1 s": lambda chance: 0.02 if chance.random() < 0.1 else 1.0,
    "in 10 to 200 ms": lambda chance: chance.uniform(0.01, 0.2),
}
DEADLINE_LOADS = (0.01, 0.1, 0.5, 0.9, 0.95, 1.1)
DATABASE = next(iter(LARGER_PAYS))
HINDSIGHT = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
SECONDS = 10.0
EXPIRY: BatchingPolicy[Any] = Size(100) | Interval(0.05)
IN_TIME, EARLIER = "InTime() | Size(100) | Interval(0.05)", "InTime(), and jobs expire 7 ms earlier"
POLICIES: dict[str, BatchingPolicy[Any]] = {
    "Size(100) | Interval(0.05)": EXPIRY,
    IN_TIME: InTime() | EXPIRY,
    "the default policy": DEFAULT_POLICY,
}
BEST, BOUND = "the best interval in hindsight", "an upper bound"


class Goodput(NamedTuple):
    """The share of the jobs that were done in time, and the calls per 1,000 jobs."""

    in_time: float
    calls: float


def dated(rate: float, seconds: float, mix: str) -> list[Arrival]:
    """Return arrivals with deadlines."""
    chance = random.Random(1)
    moments = poisson(rate, max(200, round(rate * seconds)))(random.Random(2))
    return [Arrival(moment, expires_in=MIXES[mix](chance)) for moment in moments]


def goodput(which: tuple[str, float], seconds: float) -> dict[str, Goodput]:
    """Return the goodput of each policy under a load with deadlines."""
    mix, load = which
    cell = Cell("steady", DATABASE, 1, load)
    jobs = dated(cell.rate, seconds, mix)

    def run(policy: BatchingPolicy[Any]) -> Goodput:
        report = simulate(policy, jobs, service_time)
        return Goodput(report.in_time / len(jobs), report.batches * 1e3 / len(jobs))

    found = {name: run(policy) for name, policy in POLICIES.items()}
    earlier = [job._replace(expires_in=job.expires_in - service_time(100)) for job in jobs]
    report = simulate(POLICIES[IN_TIME], earlier, service_time)
    found[EARLIER] = Goodput(report.jobs / len(jobs), report.batches * 1e3 / len(jobs))  # those that start are in time
    found[BEST] = max(
        (run(Size(100) | Interval(interval)) for interval in HINDSIGHT), key=lambda each: (each.in_time, -each.calls)
    )
    found[BOUND] = Goodput(most_in_time(jobs, service_time, 100) / len(jobs), 0.0)
    return found


def service_time(size: int) -> float:
    """Return the seconds that a batch takes."""
    return 5e-3 + 20e-6 * size


def most_in_time(jobs: Sequence[Arrival], service_time: Callable[[int], float], most: int) -> int:
    """Return a number of jobs that no schedule of one worker can do in time, even if it knows all of them in advance.

    Time is cut into slots that are as long as the least time per job, in batches of at most *most* jobs. A batch of n
    jobs takes at least n slots. It may be counted as the n slots from the one on in which it starts. They are different
    from those of every other batch, and each of them overlaps the time from the arrival of each of its jobs to the
    deadline, if the job is done in time. So there are at most as many of these jobs as can get a slot of their own that
    overlaps this time. To find that number, each slot is given to the waiting job with the earliest deadline.
    """
    slot = min(service_time(size) / size for size in range(1, most + 1))
    coming = deque((int(job.moment / slot), int((job.moment + job.expires_in) / slot)) for job in jobs)
    waiting: list[int] = []
    now = done = 0
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            heapq.heappush(waiting, coming.popleft()[1])
        while waiting and waiting[0] < now:
            heapq.heappop(waiting)
        if waiting:
            heapq.heappop(waiting)
            done += 1
        now += 1
    return done


def deadlines(processes: int | None) -> Iterator[Table]:
    """Yield tables of goodput and calls for each mix of deadlines."""
    todo = list(product(MIXES, DEADLINE_LOADS))
    found = dict(zip(todo, spread(partial(goodput, seconds=SECONDS), todo, processes)))
    headings = ["", *(f"{load:.0%}".replace("%", " %") for load in DEADLINE_LOADS)]
    for mix in MIXES:
        those = [found[mix, load] for load in DEADLINE_LOADS]
        rows = [[name, *(f"{each[name].in_time:.1%}".replace("%", "") for each in those)] for name in those[0]]
        yield Table(f"{mix}: % done in time, by the load", headings, rows, [])
        rows = [[name, *(f"{each[name].calls:,.1f}" for each in those)] for name in those[0] if name != BOUND]
        yield Table(f"{mix}: calls per 1,000 jobs, by the load", headings, rows, [])


DEADLINES = f"""\
Jobs come at random for {SECONDS:g} seconds. The title of each table says in which time they are to be done, and after
that time they expire. A batch takes {DATABASE}, and there is one worker. 100 % load is what it can do with batches of
100. In the row *{EARLIER}*, they already expire 7 ms before they are to be done, because a batch takes at most 7 ms.
*{BEST.capitalize()}* is ``Size(100) | Interval(...)`` with the one of {len(HINDSIGHT)} intervals (from 0 to
{HINDSIGHT[-1] * 1e3:g} ms) that gets the most jobs done in time under the same load. No schedule exceeds *{BOUND}*: it charges
each job only its share of the time of the largest batch, even if the job is alone, and knows all jobs in advance. So even
the best schedule may not reach it.
"""


def draw(path: Path) -> None:
    """Draw the goodput over the load, also beyond what the worker can do."""
    at = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.05, 1.1, 1.2, 1.4)
    found = [goodput(("all in 20 ms", load), 2.0) for load in at]
    curves = {name: [100 * each[name].in_time for each in found] for name in (*POLICIES, EARLIER, BOUND)}
    rates = [Cell("steady", DATABASE, 1, load).rate for load in at]
    loads(path, "% of the jobs that were done in 20 ms", rates, curves, "jobs per second")


def parts(options: argparse.Namespace) -> dict[str, Part]:
    """Return the parts of the page, by their names."""
    jobs, processes = options.jobs, options.processes
    return {
        "buckets": Part("Length buckets", BUCKETS, partial(buckets, jobs, processes)),
        "oldest": Part("Long and short texts", LONG_AND_SHORT, partial(long_and_short, jobs)),
        "deadlines": Part("Deadlines", DEADLINES, partial(deadlines, processes)),
        "order": Part(
            "The order of the jobs of a key", real.ORDER, partial(real.ordered, options.ordered, options.repeats)
        ),
    }
