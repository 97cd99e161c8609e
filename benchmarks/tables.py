"""Creates tables in reStructuredText from runs, with medians and medians of ratios."""

import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.measurements.base import Case, Measurement
from benchmarks.runner import Run

NOTHING = "–"

Labels = Mapping[str, str]
"""The labels of the contenders, by their names."""


class Table(NamedTuple):
    """A table of text. The first cell of each row is its label."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


class Runs:
    """The runs of one measurement, and their medians."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.all = list(runs)
        self._figures: dict[object, dict[int, float]] = {}
        for run in self.all:
            for figure, value in run.figures.items():
                self._figures.setdefault((run.case, run.contender, figure), {})[run.repeat] = value

    def by_repeat(self, case: str, contender: str, figure: str) -> Mapping[int, float]:
        """Return the figure of *contender* in each repeat."""
        return self._figures.get((case, contender, figure), {})

    def median(self, case: str, contender: str, figure: str) -> float | None:
        """Return the median over the repeats, or None if there is no figure."""
        return _median(self.by_repeat(case, contender, figure).values())

    def extremes(self, case: str, contender: str, figure: str) -> tuple[float, float] | None:
        """Return the lowest and the highest figure of all repeats, or None if there is no figure."""
        found = self.by_repeat(case, contender, figure).values()
        return (min(found), max(found)) if found else None

    def ratios_by_repeat(self, case: str, contender: str, figure: str, reference: str) -> Mapping[int, float]:
        """Return the ratio to the figure of *reference* in each repeat."""
        return _ratios(self.by_repeat(case, contender, figure), self.by_repeat(case, reference, figure))

    def ratio(self, case: str, contender: str, figure: str, reference: str) -> float | None:
        """Return the median of the ratios that `ratios_by_repeat` returns."""
        return _median(self.ratios_by_repeat(case, contender, figure, reference).values())

    def growth(self, contender: str, figure: str, small: str, large: str) -> Mapping[int, float]:
        """Return the ratio of case *large* to case *small* of a contender in each repeat."""
        return _ratios(self.by_repeat(large, contender, figure), self.by_repeat(small, contender, figure))


def _ratios(above: Mapping[int, float], below: Mapping[int, float]) -> dict[int, float]:
    return {repeat: above[repeat] / below[repeat] for repeat in above if below.get(repeat)}


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def tables(measurement: Measurement, cases: Sequence[Case], runs: Iterable[Run], labels: Labels) -> list[Table]:
    """Return the tables of one measurement: one per case, or one per figure if the measurement is wide."""
    those = Runs(run for run in runs if run.measurement == measurement.name)
    cases = [case for case in cases if any(run.case == case.label for run in those.all)]
    if not cases:
        return []
    return (_wide if measurement.wide else _narrow)(measurement, cases, those, labels)


def _narrow(measurement: Measurement, cases: Sequence[Case], runs: Runs, labels: Labels) -> list[Table]:
    made = []
    for case in cases:
        rows = []
        for contender in _contenders(measurement, runs):
            row = [
                _shown(runs.median(case.label, contender, name), figure.digits)
                for name, figure in measurement.figures.items()
            ]
            row += [
                _range(runs.extremes(case.label, contender, name), measurement.figures[name].digits)
                for name in _with_range(measurement)
            ]
            row += [_shown(runs.ratio(case.label, contender, *ratio)) for ratio in measurement.ratios]
            row += [_shown(_median(runs.growth(contender, *growth).values())) for growth in _growths(measurement, case)]
            rows.append([labels[contender], *row])
        headings = [figure.heading for figure in measurement.figures.values()]
        headings += [f"{measurement.figures[name].heading}, all runs" for name in _with_range(measurement)]
        headings += [
            _ratio_heading(measurement.figures[name].heading, reference) for name, reference in measurement.ratios
        ]
        headings += [
            f"{measurement.figures[name].heading}, × {small}" for name, small, _ in _growths(measurement, case)
        ]
        made.append(Table(case.label, ["", *headings], rows, _notes(runs, labels, case.label)))
    return made


def _with_range(measurement: Measurement) -> list[str]:
    return [measurement.plot] if measurement.plot is not None else []


def _growths(measurement: Measurement, case: Case) -> list[tuple[str, str, str]]:
    if measurement.growth is None or measurement.plot is None or case.label != measurement.growth[1]:
        return []
    return [(measurement.plot, *measurement.growth)]


def _wide(measurement: Measurement, cases: Sequence[Case], runs: Runs, labels: Labels) -> list[Table]:
    def table(title: str, digits: int, values: Callable[[str, str], Mapping[int, float]]) -> Table:
        growth = [label for label in measurement.growth or () if label in {case.label for case in cases}]
        grown = len(growth) == 2
        rows = []
        for contender in _contenders(measurement, runs):
            row = [_shown(_median(values(case.label, contender).values()), digits) for case in cases]
            if grown:
                small, large = (values(label, contender) for label in growth)
                row.append(_shown(_median(_ratios(large, small).values())))
            rows.append([labels[contender], *row])
        headings = ["", *(case.label for case in cases), *([f"{growth[1]} / {growth[0]}"] if grown else [])]
        return Table(title, headings, rows, _notes(runs, labels))

    made = [
        table(figure.heading, figure.digits, partial(runs.by_repeat, figure=name))
        for name, figure in measurement.figures.items()
    ]
    for name, reference in measurement.ratios:
        title = _ratio_heading(measurement.figures[name].heading, reference)
        made.append(table(title, 2, partial(runs.ratios_by_repeat, figure=name, reference=reference)))
    return made


def _contenders(measurement: Measurement, runs: Runs) -> list[str]:
    asked = {run.contender for run in runs.all}
    return [contender for contender in measurement.contenders if contender in asked]


def _ratio_heading(heading: str, reference: str) -> str:
    return f"{heading.partition(',')[0]}, × {reference}"


def _shown(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _range(values: tuple[float, float] | None, digits: int) -> str:
    return NOTHING if values is None else f"{_shown(values[0], digits)} to {_shown(values[1], digits)}"


def _notes(runs: Runs, labels: Labels, case: str | None = None) -> list[str]:
    """Return a line for each contender that has runs without figures, with the reason and the number of these runs."""
    repeats = max((run.repeat for run in runs.all), default=0) + 1
    said: dict[str, int] = {}
    for run in runs.all:
        if run.problem and case in (None, run.case):
            where = f" ({run.case})" if case is None else ""
            note = f"{labels[run.contender]}{where}: {run.problem}"
            said[note] = said.get(note, 0) + 1
    return [note if ": skipped: " in note else f"{note}; {count} of {repeats} runs" for note, count in said.items()]


def rst(title: str, underline: str = "-") -> str:
    """Return *title* as a heading."""
    return f"{title}\n{underline * _width(title)}\n"


def render(table: Table) -> str:
    """Return *table* as a simple table of reStructuredText, with its notes."""
    # An empty first cell would make the row a continuation of the one above it.
    rows = [[cell or "\\" for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(map(_width, column)) for column in zip(*rows)]
    rule = "  ".join("=" * width for width in widths)
    head, *body = (
        "  ".join(_pad(cell, width, at == 0) for at, (cell, width) in enumerate(zip(row, widths))) for row in rows
    )
    lines = [f"**{table.title}**", "", rule, head.rstrip(), rule, *map(str.rstrip, body), rule, ""]
    if table.notes:
        lines += [*(f"* {note}" for note in table.notes), ""]
    return "\n".join(lines)


def _pad(cell: str, width: int, left: bool) -> str:
    space = " " * (width - _width(cell))
    return cell + space if left else space + cell


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
