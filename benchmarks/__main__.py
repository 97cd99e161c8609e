"""Runs the benchmarks, prints the tables, and writes the tables, the plots and the raw figures."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.machine import machine, python, versions
from benchmarks.measurements import MEASUREMENTS
from benchmarks.measurements.base import Case, Measurement
from benchmarks.one import CONTENDERS
from benchmarks.plots import plot
from benchmarks.runner import Launch, Run, alternate, launch, to_json
from benchmarks.tables import render, rst, tables

LABELS = {name: contender.label for name, contender in CONTENDERS.items()}


def _cases(measurement: Measurement, quick: bool) -> Sequence[Case]:
    return measurement.quick if quick else measurement.cases


def report(runs: Sequence[Run], facts: Mapping[str, str], repeats: int, quick: bool) -> str:
    """Return all tables, below a list of the machine and the versions."""
    parts = [
        rst(f"Benchmarks on Python {python()}", "="),
        *(f":{name}: {value}" for name, value in facts.items()),
        f":repeats: {repeats}, alternating; each figure is a median, each ratio the median of ratios within a repeat",
        "",
    ]
    for measurement in MEASUREMENTS.values():
        made = tables(measurement, _cases(measurement, quick), runs, LABELS)
        if made:
            parts += ["", rst(measurement.title), f"{measurement.about}\n", *map(render, made)]
    return "\n".join(parts)


def write(runs: Sequence[Run], facts: Mapping[str, str], repeats: int, quick: bool, folder: Path) -> None:
    """Write the tables, the plots and the raw figures into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.rst").write_text(report(runs, facts, repeats, quick), encoding="utf-8")
    raw = {"facts": dict(facts), "repeats": repeats, "quick": quick, "runs": to_json(runs)}
    (folder / "results.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    draw(runs, folder)


def draw(runs: Sequence[Run], folder: Path) -> None:
    """Write the plots into *folder*."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    for measurement in MEASUREMENTS.values():
        labels = dict.fromkeys(run.case for run in runs if run.measurement == measurement.name)
        cases = [Case(label, {}) for label in labels]
        plot(measurement, cases, runs, LABELS, folder / f"{measurement.name}.svg")


def rewrite(folder: Path) -> None:
    """Write the tables and the plots in *folder* again, from the raw figures there."""
    raw = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    write([Run(**run) for run in raw["runs"]], raw["facts"], raw["repeats"], raw["quick"], folder)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, a minute or two: shows that everything runs, not how fast"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="number of repeats (default: 5, or 1 with --quick)")
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument(
        "--timeout",
        type=float,
        default=180.0,
        metavar="S",
        help="kill a process after S seconds (%(default)g)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="the folder to write to, if not in benchmarks/results"
    )
    parser.add_argument(
        "--rewrite", action="store_true", help="measure nothing: write the tables and plots again from results.json"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, launch: Launch = launch) -> None:
    """Run the command."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    repeats: int = options.repeats or (1 if options.quick else 5)
    default = Path(__file__).parent / "results" / (python() + ("-quick" if options.quick else ""))
    if options.rewrite:
        rewrite(options.output or default)
        return
    facts: dict[str, str] = {**machine(), **versions(CONTENDERS.values())}
    runs: list[Run] = []
    try:
        for name in options.measurements or MEASUREMENTS:
            measurement = MEASUREMENTS[name]
            chosen = [one for one in measurement.contenders if one in (options.contenders or CONTENDERS)]
            for run in alternate(
                measurement, _cases(measurement, options.quick), chosen, repeats, options.timeout, launch
            ):
                runs.append(run)
                said = run.problem or " ".join(f"{key} {value:.4g}" for key, value in run.figures.items())
                print(f"{run.repeat + 1}/{repeats} {name}, {run.case}, {run.contender}: {said}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the tables have only the figures measured so far", file=sys.stderr)
    write(runs, facts, repeats, options.quick, options.output or default)
    print(report(runs, facts, repeats, options.quick))


if __name__ == "__main__":
    main()
