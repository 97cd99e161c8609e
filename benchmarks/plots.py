"""Draws what the tables say, with matplotlib. The same runs give the same file: no date and no path is in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measurements.base import Case, Measurement
from benchmarks.runner import Run
from benchmarks.tables import Labels, Runs


def plot(measurement: Measurement, cases: Sequence[Case], runs: Sequence[Run], labels: Labels, path: Path) -> bool:
    """Write the plot of one measurement as SVG, and return whether there was anything to draw."""
    name = measurement.plot
    those = Runs(run for run in runs if run.measurement == measurement.name)
    contenders = [
        contender
        for contender in measurement.contenders
        if any(those.median(case.label, contender, name or "") is not None for case in cases)
    ]
    if name is None or not contenders:
        return False
    with figure(path) as drawn:
        axes = drawn.add_subplot()
        if measurement.wide:
            drawn.set_size_inches(8, 4)
            _lines(axes, measurement, name, cases, contenders, those, labels)
        else:
            drawn.set_size_inches(8, 1 + 0.16 * len(contenders) * (len(cases) + 0.7))
            _bars(axes, measurement, name, cases, contenders, those, labels)
        axes.set_title(measurement.title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    return True


@contextmanager
def figure(path: Path) -> Iterator[Any]:
    """Give a figure, and write it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "microbatch", "svg.fonttype": "none", "font.size": 9}):
        drawn = Figure(layout="constrained")
        FigureCanvasSVG(drawn)
        yield drawn
        drawn.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _bars(
    axes: Any,
    measurement: Measurement,
    name: str,
    cases: Sequence[Case],
    contenders: Sequence[str],
    runs: Runs,
    labels: Labels,
) -> None:
    height = 0.8 / len(cases)
    digits = measurement.figures[name].digits
    for at, case in enumerate(cases):
        values = [runs.median(case.label, contender, name) for contender in contenders]
        places = [number + (at - (len(cases) - 1) / 2) * height for number in range(len(contenders))]
        bars = axes.barh(places, [value or 0.0 for value in values], height, label=case.label)
        shown = ["" if value is None else f"{value:,.{digits}f}" for value in values]
        axes.bar_label(bars, labels=shown, padding=2, fontsize=7)
    axes.set_yticks(range(len(contenders)), [labels[contender] for contender in contenders])
    axes.invert_yaxis()
    axes.set_xlabel(measurement.figures[name].heading)
    if len(cases) > 1:
        axes.legend(frameon=False)


def _lines(
    axes: Any,
    measurement: Measurement,
    name: str,
    cases: Sequence[Case],
    contenders: Sequence[str],
    runs: Runs,
    labels: Labels,
) -> None:
    for contender in contenders:
        values = [runs.median(case.label, contender, name) for case in cases]
        drawn = [(at, value) for at, value in enumerate(values) if value is not None]
        axes.plot(*zip(*drawn), marker="o", label=labels[contender])
    axes.set_xticks(range(len(cases)), [case.label for case in cases])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(measurement.figures[name].heading)
    axes.legend(frameon=False)
