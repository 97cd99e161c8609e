"""``python -m microbatch simulate``: several policies on the same load, side by side."""

from typing import Any, Callable, Dict, List, Mapping, Sequence

from microbatch._policy import BatchingPolicy
from microbatch.simulation import Arrivals, SimulationReport, simulate

__all__ = ["compare", "table"]

_COLUMNS: Dict[str, Callable[[SimulationReport], str]] = {
    "mean ms": lambda report: f"{report.mean * 1e3:,.2f}",
    "p50 ms": lambda report: f"{report.p50 * 1e3:,.2f}",
    "p95 ms": lambda report: f"{report.p95 * 1e3:,.2f}",
    "p99 ms": lambda report: f"{report.p99 * 1e3:,.2f}",
    "batch": lambda report: f"{report.jobs / report.batches:,.1f}",
    "calls": lambda report: f"{report.batches:,}",
    "busy": lambda report: f"{report.utilisation:.0%}",
    "went by": lambda report: ", ".join(f"{trigger} {count:,}" for trigger, count in sorted(report.triggers.items())),
}


def compare(
    policies: Sequence[BatchingPolicy[Any]],
    arrivals: Arrivals,
    service_time: Callable[[int], float],
    *,
    max_workers: int,
    seed: int,
) -> Mapping[str, SimulationReport]:
    """Return the report of each policy, by its repr."""
    return {
        repr(policy): simulate(policy, arrivals, service_time, max_workers=max_workers, seed=seed)
        for policy in policies
    }


def table(reports: Mapping[str, SimulationReport]) -> List[str]:
    """Return the lines of a table with a row for each report."""
    rows = [["policy", *_COLUMNS]]
    rows += [[name, *(show(report) for show in _COLUMNS.values())] for name, report in reports.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            _aligned(cell, width, place, len(row)) for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _aligned(cell: str, width: int, place: int, places: int) -> str:
    return cell.ljust(width) if place in (0, places - 1) else cell.rjust(width)
