"""Draws the medians of the tables with matplotlib. The same runs always give the same file, without a date or a path.

All plots are narrow, so their text stays readable on a phone. Legends stand above the data.
"""

import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measurements.base import Case, Measurement
from benchmarks.runner import Run
from benchmarks.tables import Labels, Runs
from microbatch.simulation.plots import line_style


def plot(measurement: Measurement, cases: Sequence[Case], runs: Sequence[Run], labels: Labels, path: Path) -> bool:
    """Write the plot of one measurement as SVG. Return False if there is nothing to draw."""
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
            drawn.set_size_inches(5.5, 3.2 + 0.2 * len(contenders))
            _lines(axes, measurement, name, cases, contenders, those, labels)
        else:
            shown = max(0.42, 0.17 * (len(cases) + 0.7))  # inches for a contender, because its label may have two lines
            drawn.set_size_inches(5.5, 1 + 0.2 * len(cases) + shown * len(contenders))
            _bars(axes, measurement, name, cases, contenders, those, labels)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            drawn.legend(loc="outside upper left", frameon=False, title=measurement.title, alignment="left")
        else:
            drawn.suptitle(measurement.title, x=0.01, ha="left", size="medium")
        axes.spines[["top", "right"]].set_visible(False)
    return True


@contextmanager
def figure(path: Path) -> Iterator[Any]:
    """Enter with an empty figure, and write it at the end."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "microbatch", "svg.fonttype": "none", "font.size": 10}):
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
    all_values = [runs.median(case.label, contender, name) or 0.0 for case in cases for contender in contenders]
    longest = max(all_values)
    if longest > 10 * statistics.median(all_values):  # otherwise the other bars would be too short to compare
        longest = 2 * max(value for value in all_values if value < longest / 2)
        axes.set_xlim(0, longest)
    for at, case in enumerate(cases):
        values = [runs.median(case.label, contender, name) for contender in contenders]
        places = [number + (at - (len(cases) - 1) / 2) * height for number in range(len(contenders))]
        axes.barh(places, [value or 0.0 for value in values], height, label=case.label)
        for value, place in zip(values, places):
            if value is not None:
                cut = value > longest
                axes.annotate(
                    f"{value:,.{digits}f} \N{RIGHTWARDS ARROW}" if cut else f"{value:,.{digits}f}",
                    (min(value, longest), place),
                    (-3 if cut else 3, 0),
                    textcoords="offset points",
                    ha="right" if cut else "left",
                    va="center",
                    color="white" if cut else "black",
                    fontsize=9,
                )
    axes.set_yticks(range(len(contenders)), [_wrap(labels[contender]) for contender in contenders])
    axes.invert_yaxis()
    axes.set_xlabel(measurement.figures[name].heading)
    axes.xaxis.set_major_formatter("{x:,g}")


def _wrap(label: str) -> str:
    """Break a label into short lines, but not within a policy."""
    return textwrap.fill(label.replace(" | ", "\N{NO-BREAK SPACE}|\N{NO-BREAK SPACE}"), 24, break_long_words=False)


def _lines(
    axes: Any,
    measurement: Measurement,
    name: str,
    cases: Sequence[Case],
    contenders: Sequence[str],
    runs: Runs,
    labels: Labels,
) -> None:
    for number, contender in enumerate(contenders):
        values = [runs.median(case.label, contender, name) for case in cases]
        drawn = [(at, value) for at, value in enumerate(values) if value is not None]
        axes.plot(*zip(*drawn), label=labels[contender], **(line_style(number, len(contenders)) | {"markevery": 1}))
    axes.set_xticks(range(len(cases)), [case.label for case in cases])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(measurement.figures[name].heading)


def loads(
    path: Path,
    title: str,
    rates: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    unit: str,
    logarithmic: bool = False,
) -> None:
    """Write a plot of a figure over the load as SVG, with one curve for each label."""
    with figure(path) as drawn:
        drawn.set_size_inches(5.5, 3.2 + 0.2 * len(curves))
        axes = drawn.add_subplot()
        for number, (label, values) in enumerate(curves.items()):
            axes.plot(rates, values, label=label, **line_style(number, len(curves)))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(unit)
        axes.locator_params(axis="x", nbins=6)
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.spines[["top", "right"]].set_visible(False)
        drawn.legend(loc="outside upper left", frameon=False)
