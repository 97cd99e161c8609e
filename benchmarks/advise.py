"""Checks the advice of ``microbatch advise`` against an exhaustive search: ``python -m benchmarks.advise``."""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cells import COSTS, KINDS, LARGER_PAYS, Cell
from benchmarks.policies import geometric_mean
from benchmarks.tables import Table, render, rst
from microbatch import DEFAULT_POLICY, BatchingPolicy, BestSize, FixedWindow, Interval, Natural, Rate, Session, Size
from microbatch.cli.candidates import Candidate, Needs, choose, families, measured, search
from microbatch.simulation import SimulatedBatch, simulate

SIZE = 100
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 100)
ARRIVALS = ("steady", "bursty", "shifting")
CASES = ((0.3, 4), (0.1, 10))
"""Loads, and targets for the p99 as multiples of the time that a call with one job takes."""

INTRODUCTION = """\
``microbatch advise`` chooses a policy by the first half of a trace. Here, its choice is judged by the second half, as
in production. Of the policies that meet the target for the p99 on the second half, the *best* in hindsight is the one
with the fewest calls. It is found by an exhaustive search, which simulates several hundred policies on that half
itself.

Each row is a load, as in `the comparison of policies <policies.rst>`__: how jobs arrive, what a call costs, the number
of workers, the load as a share of what they can do in batches of 100, and the target. *Calls* are those of the advised
policy, as a multiple of those of the best one. *p99* is that of the advised policy, as a multiple of the target: above
1, it misses the target, which the best policy never does. *Calls of the default* are those of the default policy, as a
multiple of those of the advised one. Loads for which no policy meets the target are left out.
"""


class Load(NamedTuple):
    """A load, and the p99 to reach, in seconds."""

    cell: Cell
    target: float

    def service_time(self, size: int) -> float:
        """Return how many seconds a batch takes."""
        return COSTS[self.cell.cost].phases[0](SimulatedBatch(size, size, 1.0))


class Result(NamedTuple):
    """What became of an advice on the second half of the trace.

    Attributes:
        advised: The advised policy.
        best: The best policy in hindsight.
        default: The default policy.
        tried: The number of policies that were simulated for the advice.
        searched: The number of policies that were simulated to find the best one.
    """

    advised: Candidate
    best: Candidate
    default: Candidate
    tried: int
    searched: int


def loads() -> list[Load]:
    """Return all loads."""
    cells = [
        (Cell(kind, cost, workers, load), multiple)
        for load, multiple in CASES
        for kind in ARRIVALS
        for cost in LARGER_PAYS
        for workers in (1, 4)
    ]
    return [Load(cell, multiple * Load(cell, 0.0).service_time(1)) for cell, multiple in cells]


def compare(load: Load, jobs: int) -> Result | None:
    """Return what became of the advice for a load, or None if no policy meets the target on the second half."""
    cell, target = load
    moments = list(KINDS[cell.kind](cell.rate, 2 * jobs)(random.Random(1)))
    first, second = moments[:jobs], [moment - moments[jobs] for moment in moments[jobs:]]

    def attempt(policy: BatchingPolicy[Any], half: Sequence[float]) -> Candidate:
        return measured(policy, simulate(policy, half, load.service_time, max_workers=cell.workers))

    on_first, on_second = partial(attempt, half=first), partial(attempt, half=second)
    searched = list(exhaustive(on_second, target))
    best = min((each for each in searched if each.p99 <= target), key=lambda each: each.calls, default=None)
    if best is None:
        return None
    default = on_first(DEFAULT_POLICY)
    tried = [default, *search(on_first, list(families(Needs(target, SIZE, load.service_time))), target)]
    advised = choose(tried, default, target)
    return Result(on_second(advised.policy), best, on_second(DEFAULT_POLICY), len(tried), len(searched))


def exhaustive(attempt: Callable[[BatchingPolicy[Any]], Candidate], target: float) -> Iterator[Candidate]:
    """Try every size, and every time in steps of 10 % of the target. Then use steps of 1 % for the five best kinds.

    The times are tried from the longest one down. When three of them have met the target, shorter ones are left out,
    because they only make more calls.
    """
    yield attempt(DEFAULT_POLICY)
    yield from (attempt(Size(size) | Natural()) for size in SIZES)
    ranking = list[tuple[int, int, float]]()
    for number, make in enumerate(KINDS_OF_POLICIES):
        good = list[tuple[int, float]]()
        for step in range(15, 0, -1):
            candidate = attempt(make(_rounded(target * step / 10)))
            yield candidate
            if candidate.p99 <= target:
                good.append((candidate.calls, step / 10))
                if len(good) == 3:
                    break
        if good:
            calls, share = min(good)
            ranking.append((calls, number, share))
    for _, number, share in sorted(ranking)[:5]:
        for step in range(-9, 10):
            if step and share + step / 100 > 0:
                yield attempt(KINDS_OF_POLICIES[number](_rounded(target * (share + step / 100))))


def _rounded(time: float) -> float:
    """Return the time with four digits, which are more than enough."""
    return float(f"{time:.4g}")


def _sized(size: int) -> Callable[[float], BatchingPolicy[Any]]:
    return lambda time: Size(size) | Interval(time)


def _after_bursts(part: float) -> Callable[[float], BatchingPolicy[Any]]:
    return lambda time: Size(SIZE) | Session(_rounded(time / part)) | Interval(time)


KINDS_OF_POLICIES: Sequence[Callable[[float], BatchingPolicy[Any]]] = [
    *(_sized(size) for size in SIZES if size > 3),
    *(_after_bursts(part) for part in (1.5, 2, 3, 5, 8, 16)),
    lambda time: (Size(SIZE) | Natural()) & Rate(1, per=time),
    lambda time: Size(SIZE) | FixedWindow(time),
    lambda time: BestSize(SIZE) | Interval(time),
    lambda time: Size(SIZE) | Interval(time) & Natural(),
]
"""Policies that differ only in a time."""


def table(results: Sequence[tuple[Load, Result]]) -> Table:
    """Return the table with a row for each load."""
    rows = []
    for (cell, target), (advised, best, default, *_) in results:
        rows.append(
            [
                f"{cell.kind}, {cell.cost}",
                f"{cell.workers}",
                f"{cell.load:.0%}",
                f"{target * 1e3:,.1f}",
                f"{advised.calls / best.calls:.3f}",
                f"{advised.p99 / target:.3f}",
                f"{default.calls / advised.calls:.2f}",
                repr(advised.policy),
                repr(best.policy),
            ]
        )
    headings = ["", "workers", "load", "target, ms", "calls", "p99", "calls of the default", "advised", "best"]
    return Table(f"{len(rows)} loads", headings, rows, [])


def summary(results: Sequence[Result], targets: Sequence[float]) -> Table:
    """Return the table that summarizes all loads."""
    calls = [result.advised.calls / result.best.calls for result in results]
    misses = [result.advised.p99 / target for result, target in zip(results, targets)]
    tried, searched = ([result[place] for result in results] for place in (3, 4))
    saved = [result.default.calls / result.advised.calls for result in results]
    rows = [
        ["calls, compared with the best policy: geometric mean", f"{geometric_mean(calls):.3f}"],
        ["calls, compared with the best policy: worst", f"{max(calls):.3f}"],
        ["calls of the default policy, compared with the advised one: geometric mean", f"{geometric_mean(saved):.2f}"],
        *(
            [f"loads that miss the target by more than {share:.0%}", f"{sum(miss > 1 + share for miss in misses)}"]
            for share in (0, 0.01, 0.05)
        ),
        ["the worst p99, as a multiple of the target", f"{max(misses):.3f}"],
        ["policies simulated for an advice", f"{min(tried)} to {max(tried)}"],
        ["policies simulated by the exhaustive search", f"{min(searched)} to {max(searched)}"],
    ]
    return Table(f"all {len(results)} loads", ["", ""], rows, [])


def main(arguments: Sequence[str]) -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.advise", description=__doc__)
    add = parser.add_argument
    add("--jobs", type=int, default=2_000, metavar="N", help="jobs in each half of a trace (default: %(default)s)")
    add("--loads", type=int, metavar="N", help="only the first N loads (default: all)")
    add("--processes", type=int, metavar="N", help="simulations at the same time (default: as many as there are CPUs)")
    path = Path(__file__).parent / "results" / "advise.rst"
    add("--output", type=Path, default=path, metavar="FILE")
    options = parser.parse_args(arguments)
    those = loads()[: options.loads]
    with ProcessPoolExecutor(options.processes) as pool:
        compared = list(zip(those, pool.map(partial(compare, jobs=options.jobs), those)))
    results = [(load, result) for load, result in compared if result is not None]
    lines = [
        rst("The advice compared with the best policy in hindsight", "="),
        INTRODUCTION,
        render(summary([result for _, result in results], [load.target for load, _ in results])),
        render(table(results)),
    ]
    print(*lines, sep="\n")
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
