"""Measures policies, mostly in virtual time: ``python -m benchmarks.policies``.

It writes two pages: how good the policies are that need no tuning, and what the policies do that look at lengths,
deadlines or keys. To measure only some parts again, name them with ``--parts``. The parts ``real`` and ``order`` run
threads, so they need a machine that does nothing else.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import real, scheduling
from benchmarks.cells import COSTS, DRIFTING, LARGER_PAYS, OTHERS, SIZES, Cell, best_size
from benchmarks.pages import Part, spread, update
from benchmarks.plots import loads
from benchmarks.tables import Table
from microbatch import DEFAULT_POLICY, Adaptive, BatchingPolicy, Interval, Natural, Size
from microbatch.simulation import SimulationReport

SIZE = 100
INTERVALS = (0, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
WORKERS = (1, 4, 16)
LOADS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
ONE = "one at a time"
ALL = "as large as it gets"
DEFAULT = "the default policy"
EXTREMES: dict[str, BatchingPolicy[Any]] = {ONE: Size(1), ALL: Size(SIZE) | Natural(), DEFAULT: DEFAULT_POLICY}
PADS = "4 ms + 0.2 ms·padded"
"""The cost of the part ``padding``."""


def old_cells() -> list[Cell]:
    """Return the cells in which larger batches pay.

    A load that is not steady has a mean of at most 50 %, which leaves capacity for its peaks.
    """
    steady = [Cell("steady", *each) for each in product(LARGER_PAYS, WORKERS, LOADS)]
    return steady + [Cell(*each) for each in product(("bursty", "shifting"), LARGER_PAYS, WORKERS, (0.1, 0.3, 0.5))]


def new_cells() -> list[Cell]:
    """Return the cells in which larger batches do not always pay."""
    others = [Cell("steady", *each) for each in product(OTHERS, (1, 4), (0.3, 0.6, 0.8, 0.9, 0.95))]
    return others + [Cell("steady", *each) for each in product(DRIFTING, (1, 4), (0.3, 0.6, 0.8))]


# -- compared with the best interval --


def contenders(cell: Cell) -> dict[str, BatchingPolicy[Any]]:
    """Return the policies to compare, by their names in the table."""
    _, target = best_size(cell.cost)
    return {
        DEFAULT: DEFAULT_POLICY,
        "Natural()": Natural(),
        "Adaptive(...) | Natural()": Adaptive(target) | Natural(),
        "Size(100) | Interval(0)": Size(SIZE) | Interval(0),
        "Size(100) | Interval(0.005)": Size(SIZE) | Interval(0.005),
    }


class Ratios(NamedTuple):
    """The figures of a policy, as ratios to those of the best hand-tuned policy."""

    mean: float
    p99: float
    calls: float


def compare(cell: Cell, jobs: int) -> dict[str, Ratios]:
    """Return the ratios of each policy in one cell."""
    tuned = [cell.run(Size(SIZE) | Interval(interval), jobs) for interval in INTERVALS]
    best = min(tuned, key=lambda report: report.mean)
    least = min(report.p99 for report in tuned)
    reports = {name: cell.run(policy, jobs) for name, policy in contenders(cell).items()}
    return {
        name: Ratios(report.mean / best.mean, report.p99 / least, report.batches / best.batches)
        for name, report in reports.items()
    }


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of *values*."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def groups() -> dict[str, Callable[[Cell], bool]]:
    """Return the groups of cells that share a table: for each title, whether a cell belongs to the group."""
    return {
        **{f"steady, {n} worker{'s' * (n > 1)}": _has("steady", n) for n in WORKERS},
        "steady, any number of workers": lambda cell: cell.kind == "steady",
        "bursty": lambda cell: cell.kind == "bursty",
        "shifting": lambda cell: cell.kind == "shifting",
    }


def _has(kind: str, workers: int) -> Callable[[Cell], bool]:
    return lambda cell: (cell.kind, cell.workers) == (kind, workers)


def against_the_best(jobs: int, processes: int | None) -> Iterator[Table]:
    """Yield the tables that compare each policy with the best hand-tuned policy."""
    results = dict(zip(old_cells(), spread(partial(compare, jobs=jobs), old_cells(), processes)))
    headings = ["", "mean", "worst", "p99", "worst", "calls"]
    for title, belongs in groups().items():
        those = [result for cell, result in results.items() if belongs(cell)]
        rows = [[name, *_summary([result[name] for result in those])] for name in those[0]]
        yield Table(f"{title}: {len(those)} cells", headings, rows, [])


def _summary(ratios: Sequence[Ratios]) -> list[str]:
    means, p99s, calls = zip(*ratios)
    return [*_mean_and_worst(means), *_mean_and_worst(p99s), f"{geometric_mean(calls):,.2f}"]


def _mean_and_worst(ratios: Sequence[float]) -> list[str]:
    return [f"{geometric_mean(ratios):,.3f}", f"{max(ratios):,.3f}"]


# -- compared with one at a time, and with as large as it gets --


class Extremes(NamedTuple):
    """The latencies of the policies `EXTREMES` in a cell, by their names."""

    mean: dict[str, float]
    p99: dict[str, float]

    @classmethod
    def of(cls, reports: dict[str, SimulationReport]) -> "Extremes":
        """Return the latencies of all three policies."""
        return cls({name: each.mean for name, each in reports.items()}, {n: each.p99 for n, each in reports.items()})

    def ratio(self, name: str, p99: bool = False) -> float:
        """Return the latency of a policy, divided by the lower one of the two that do not learn."""
        latency = self.p99 if p99 else self.mean
        return latency[name] / min(latency[ONE], latency[ALL])


def extremes(cell: Cell, jobs: int, seed: int = 1, noise: float = 0.0) -> Extremes:
    """Simulate the three policies in a cell."""
    return Extremes.of({name: cell.run(policy, jobs, seed, noise) for name, policy in EXTREMES.items()})


GOAL = 1.15
"""In no cell should the mean latency of the default policy be further above that of the better of the other two."""


def against_the_extremes(jobs: int, processes: int | None) -> Iterator[Table]:
    """Yield the table that compares the default policy with the better one of two policies that do not learn."""
    cells = [cell for cell in old_cells() if cell.kind == "steady"] + new_cells()
    results = dict(zip(cells, spread(partial(extremes, jobs=jobs), cells, processes)))
    rows = []
    for cost in dict.fromkeys(cell.cost for cell in cells):
        those = [result for cell, result in results.items() if cell.cost == cost]
        rows.append([cost, *_against_the_extremes(those)])
    rows.append(["all", *_against_the_extremes(list(results.values()))])
    headings = ["a batch takes", "cells", "mean", "worst", "p99", "worst", f"worst, {ONE}", f"worst, {ALL}"]
    over = [(cell, result.ratio(DEFAULT)) for cell, result in results.items() if result.ratio(DEFAULT) > GOAL]
    notes = [f"{_described(cell)}: the mean is {ratio:.3f} times as high" for cell, ratio in over]
    all_met = f"no mean is more than {GOAL} times that of the better policy"
    yield Table("the default policy", headings, rows, notes or [all_met])


def _against_the_extremes(results: Sequence[Extremes]) -> list[str]:
    mean = _mean_and_worst([result.ratio(DEFAULT) for result in results])
    p99 = _mean_and_worst([result.ratio(DEFAULT, p99=True) for result in results])
    others = [f"{max(result.ratio(name) for result in results):,.1f}" for name in (ONE, ALL)]
    return [f"{len(results)}", *mean, *p99, *others]


def _described(cell: Cell) -> str:
    return f"{cell.cost}, {cell.workers} worker{'s' * (cell.workers > 1)}, {cell.load:.0%} load".replace("%", " %")


# -- a flood --


def throughput(cell: Cell, policy: BatchingPolicy[Any], jobs: int, skipped: int = 0) -> float:
    """Return the jobs per second if all jobs come at once, apart from the first *skipped* jobs for each worker."""
    left = jobs * cell.workers
    runs = cell.run(policy, jobs).runs
    start = 0
    while left > (jobs - skipped) * cell.workers:
        left -= runs[start].size
        start += 1
    return left / (max(run.ended for run in runs) - runs[start].started)


def flooded(cell: Cell, jobs: int) -> list[str]:
    """Return the throughputs of the default policy, divided by those of the best fixed size."""
    few, many, more = 2 * jobs // 5, 2 * jobs, 8 * jobs
    sizes = {size: throughput(cell, Size(size) | Natural(), many) for size in SIZES}
    best = Size(max(sizes, key=sizes.__getitem__)) | Natural()
    return [
        f"{throughput(cell, DEFAULT_POLICY, *run) / throughput(cell, best, *run):.3f}"
        for run in ((few, 0), (many, 0), (more, many))
    ]


def floods(jobs: int, processes: int | None) -> Iterator[Table]:
    """Yield the tables of throughputs at saturation."""
    costs, workers = [*LARGER_PAYS, *OTHERS, *DRIFTING], (1, 4)
    cells = [Cell("flood", cost, n) for n, cost in product(workers, costs)]
    found = dict(zip(cells, spread(partial(flooded, jobs=jobs), cells, processes)))
    heads = [f"{2 * jobs // 5:,} jobs", f"{2 * jobs:,} jobs", f"{8 * jobs:,} jobs, without the first {2 * jobs:,}"]
    for n in workers:
        rows = [[cost, *found[Cell("flood", cost, n)]] for cost in costs]
        title = f"{n} worker{'s' * (n > 1)}: throughput, relative to the best fixed size; jobs are per worker"
        yield Table(title, ["a batch takes", *heads], rows, [])


# -- noise --

NOISES = (0.3, 0.5, 1.0)
NOISY = ("2 ms + 0.5 ms·n", "5 ms + 20 µs·n", "2 ms + 0.5 ms·n + 0.05 ms·n²", PADS)
NOISE_LOADS = (0.6, 0.8)
SEEDS = range(2)


def noisy(jobs: int, processes: int | None) -> Iterator[Table]:
    """Yield the table of runs in which the service time is random."""
    lengths = (jobs, 4 * jobs)
    todo = list(product(NOISY, NOISES, lengths, NOISE_LOADS, SEEDS))
    results = dict(zip(todo, spread(_noisy, todo, processes)))
    rows = []
    for cost, noise in product(NOISY, NOISES):
        row = [cost, f"{noise}"]
        for length in lengths:
            those = [results[cost, noise, length, load, seed] for load, seed in product(NOISE_LOADS, SEEDS)]
            row += _mean_and_worst(those)
        rows.append(row)
    headings = [heading for length in lengths for heading in (f"{length:,} jobs", "worst")]
    yield Table("the mean latency with the default policy", ["a batch takes", "noise", *headings], rows, [])


def _noisy(which: tuple[str, float, int, float, int]) -> float:
    cost, noise, jobs, load, seed = which
    return extremes(Cell("steady", cost, 1, load), jobs, seed, noise).ratio(DEFAULT)


# -- a model that pads --


def padding(jobs: int) -> Iterator[Table]:
    """Yield a table for each number of workers that call a model that pads."""
    for workers in (1, 4):
        cell, rows = Cell("steady", PADS, workers, 0.6), []
        for name, policy in EXTREMES.items():
            report = cell.run(policy, jobs)
            times = (f"{time * 1e3:,.0f}" for time in (report.mean, report.p50, report.p99))
            rows.append([name, *times, f"{report.jobs / report.batches:.1f}", f"{report.utilisation:.0%}"])
        title = f"{cell.rate:,.0f} texts/s, {workers} worker{'s' * (workers > 1)}"
        yield Table(title, ["", "mean, ms", "p50, ms", "p99, ms", "mean batch", "busy"], rows, [])


def draw_padding(jobs: int, path: Path) -> None:
    """Draw the latency over the load of a model that pads."""
    cells = [Cell("steady", PADS, 1, load / 100) for load in range(10, 101, 10)]
    curves = {
        name: [cell.run(policy, jobs).p50 * 1e3 for cell in cells]
        for name, policy in ((ONE, EXTREMES[ONE]), (ALL, EXTREMES[ALL]), (DEFAULT, DEFAULT_POLICY))
    }
    title = "latency in ms: half of the texts took at most this"
    loads(path, title, [cell.rate for cell in cells], curves, "texts per second", logarithmic=True)


# -- the command --


def pages(options: argparse.Namespace) -> dict[str, tuple[str, dict[str, Part]]]:
    """Return the title and the parts of each page, by the name of its file."""
    jobs, processes = options.jobs, options.processes
    policies = {
        "best": Part("Compared with the best hand-tuned policy", BEST, partial(against_the_best, jobs, processes)),
        "extremes": Part("No collapse", AGAINST_THE_EXTREMES, partial(against_the_extremes, jobs, processes)),
        "flood": Part("At saturation", FLOOD, partial(floods, jobs, processes)),
        "noise": Part("Random service times", NOISE, partial(noisy, jobs, processes)),
        "padding": Part("A model that pads", PADDING, partial(padding, jobs)),
        "real": Part(
            "The batcher compared with the simulator", real.INTRODUCTION, partial(real.compared, options.seconds)
        ),
    }
    return {
        "policies.rst": ("Policies that need no tuning", policies),
        "scheduling.rst": ("Policies for lengths, deadlines and keys", scheduling.parts(options)),
    }


BEST = """\
Each cell is a combination of load, cost and number of workers, simulated in virtual time. In each cell, the policy
``Size(100) | Interval(...)`` is tuned by hand: it runs with 13 intervals. The tables compare other policies with the best
of these 13 runs. The mean latency is compared with the lowest mean, and the p99 with the lowest p99. Usually, these come
from two different intervals, and nobody knows them in advance.

A ratio of 1.03 means 3 % slower. *Mean* and *p99* are geometric means over the cells, and *worst* is the worst cell.
*Calls* is the number of calls, relative to the run with the lowest mean latency.
"""

AGAINST_THE_EXTREMES = f"""\
The default policy should never be much worse than the better one of two simple policies: *{ONE}* (``Size(1)``) and
*{ALL}* (``Size(100) | Natural()``). The cells in the first three rows are those above with a steady load, in which
larger batches always pay. In the other cells, they pay only up to some size, or not at all. *n* is the number of jobs,
and *padded* is *n* times the length of the longest text: texts have 5 to 256 tokens, with a median of 17. The last two
costs drift: they change after each quarter of the jobs. 100 % load is what the best fixed size can do, in the slower
phase if the cost drifts.

*Mean* and *worst* compare the mean latency with that of the better one of the two, and *p99* and *worst* do the same for
the p99. A figure below 1 means that the latency is lower than with both. The last two columns compare the two simple
policies themselves with the better one, in the worst cell. Where one of them can't keep up, the figure depends on the
length of the run.
"""

FLOOD = """\
All jobs come at once, so all batches are full. The tables have the throughput of the default policy, relative to the
best of 13 fixed sizes. The first two columns include the time in which the policy learns. If the cost drifts, it learns
again after each quarter of the jobs.
"""

NOISE = f"""\
Each batch takes a random time: the cost times a factor with a log-normal distribution and a mean of 1. *Noise* is the
standard deviation of the logarithm of the factor. The mean latency is compared as in the table of `No collapse`_, for
runs with fewer and with more jobs. A figure is the geometric mean over runs with one worker, loads of 60 % and 80 %,
and {len(SEEDS)} seeds for each. If the first batch of a size happens to be slow, the policy needs a while to find out.
"""

PADDING = f"""\
A batch takes {PADS.replace("·", " * ")}, and texts come at 60 % of the rate at which they can be processed one at a time.
"""


def main(arguments: Sequence[str]) -> None:
    """Print the pages, and write them to files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = partial(parser.add_argument, type=int, metavar="N")
    whole("--jobs", default=5_000, help="simulated jobs per worker in each cell (default: %(default)s)")
    whole("--ordered", default=1_000_000, help="jobs in the part `order` (default: %(default)s)")
    whole("--repeats", default=5, help="repeats of the part `order` (default: %(default)s)")
    whole("--processes", default=None, help="how many processes simulate (default: one for each CPU)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="the time of each real load (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", help="measure only these parts again")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="only draw the plots of the pages, to this folder")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results, metavar="DIR", help="write the pages to this folder")
    options = parser.parse_args(arguments)
    if options.plot is not None:
        draw_padding(options.jobs, options.plot / "collapse.svg")
        scheduling.draw(options.plot / "deadlines.svg")
        return
    made = pages(options)
    known = [name for _, parts in made.values() for name in parts]
    if unknown := set(options.parts or ()) - set(known):
        parser.error(f"the parts are {', '.join(known)}, got {', '.join(sorted(unknown))}")
    for file, (title, parts) in made.items():
        chosen = [name for name in parts if options.parts is None or name in options.parts]
        if chosen:
            print(update(options.output / file, title, parts, chosen))


if __name__ == "__main__":
    main(sys.argv[1:])
