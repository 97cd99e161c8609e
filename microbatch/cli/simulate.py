"""``python -m microbatch simulate``: compares several policies under the same load."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from microbatch.cli.progress import show_progress
from microbatch.policies.base import BatchingPolicy
from microbatch.simulation import Arrival, SimulationReport, callers, poisson
from microbatch.simulation.plots import Point, draw_loads
from microbatch.simulation.simulator import Arrivals

__all__ = ["TURN", "Load", "Simulated", "load_of", "plot", "table"]

Load = Callable[[float], Arrivals]
"""Returns the arrivals for a share of a load. For example, 0.5 means half as many jobs per second."""

Simulated = Callable[[BatchingPolicy[Any], Arrivals], SimulationReport]
"""Simulates a policy under a load."""

_LOADS = 13
"""The number of loads in a plot, from a hundredth of the load up to all of it."""

TURN = 30e-6
"""About how many seconds a Python thread takes from a result to its next job, while other threads wait for it."""


def load_of(rate: float | None, count: int | None, trace: Sequence[Arrival], jobs: int) -> Load:
    """Return a load of *jobs* jobs at *rate* or from *count* callers. If both are None, return that of *trace*."""
    if rate:
        return lambda share: poisson(rate * share, jobs)
    if count:
        return lambda share: callers(max(1, round(count * share)), jobs, turn=TURN)
    return lambda share: [arrival._replace(moment=arrival.moment / share) for arrival in trace]


_COLUMNS: dict[str, Callable[[SimulationReport], str]] = {
    "mean ms": lambda report: f"{report.mean * 1e3:,.2f}",
    "p50 ms": lambda report: f"{report.p50 * 1e3:,.2f}",
    "p95 ms": lambda report: f"{report.p95 * 1e3:,.2f}",
    "p99 ms": lambda report: f"{report.p99 * 1e3:,.2f}",
    "batch": lambda report: f"{report.jobs / max(1, report.batches):,.1f}",
    "calls": lambda report: f"{report.batches:,}",
    "busy": lambda report: f"{report.utilisation:.0%}",
    "in time": lambda report: f"{report.in_time / (report.jobs + report.expired):.1%}",
}


def plot(path: str, policies: Sequence[BatchingPolicy[Any]], load: Load, simulated: Simulated) -> None:
    """Draw the results of the policies under several loads, from a hundredth of *load* up to all of it."""
    lines: dict[str, list[Point]] = {repr(policy): [] for policy in policies}
    with show_progress("simulations", _LOADS * len(policies), title="plot") as progress:
        for step in range(_LOADS):
            arrivals = load(10 ** (step / 6 - 2))
            for policy in policies:
                with suppress(ValueError):  # the policy would never dispatch the jobs of so few callers
                    lines[repr(policy)].append(_point(simulated(policy, arrivals)))
                progress.update()
    draw_loads(path, lines)


def _point(report: SimulationReport) -> Point:
    first = min(run.started for run in report.runs)
    time = max(run.ended for run in report.runs) - first
    load = report.jobs / time if time else math.inf
    return Point(load, report.p50, report.p99, 1_000 * report.batches / report.jobs)


def table(reports: Mapping[str, SimulationReport], notes: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the lines of a table with a row for each report.

    Args:
        reports: The report of each policy, by its name in the table.
        notes: Texts for the last column, by the name of the policy. None for the triggers of the policies.
    """
    some_late = any(report.expired or report.in_time < report.jobs for report in reports.values())
    columns = {name: show for name, show in _COLUMNS.items() if some_late or name != "in time"}
    rows = [["policy", *columns, "triggers" if notes is None else ""]]
    for name, report in reports.items():
        note = _triggers(report) if notes is None else notes.get(name, "")
        rows.append([name, *(show(report) for show in columns.values()), note])
    first, *numbers, _ = (max(map(len, column)) for column in zip(*rows))
    for name, *cells, note in rows:
        yield "  ".join([name.ljust(first), *map(str.rjust, cells, numbers), note]).rstrip()


def _triggers(report: SimulationReport) -> str:
    return ", ".join(f"{trigger} {count:,}" for trigger, count in sorted(report.triggers.items()))
