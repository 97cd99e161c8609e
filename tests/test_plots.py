"""Plots of simulations."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microbatch import Natural, Size
from microbatch.cli import main
from microbatch.simulation import simulate
from microbatch.simulation.plots import line_style
from tests.extras import needs

needs("matplotlib")


def shifting(chance: random.Random) -> Iterator[float]:
    moment = 0.0
    for job in range(2_000):
        moment += chance.expovariate(500 if job % 400 < 200 else 5_000)
        yield moment


def test_the_plot_of_a_report_is_reproducible(tmp_path: Path) -> None:
    report = simulate(Size(16) | Natural(), shifting, lambda size: 0.004 + 0.0001 * size, max_workers=2)
    for name in ("one.svg", "other.svg", "another.png"):
        report.plot(tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert drawn == (tmp_path / "other.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in ("jobs per second", "99 %", "natural", "worker"))
    assert b"PNG" == (tmp_path / "another.png").read_bytes()[1:4]


@pytest.mark.parametrize("jobs", [1, 60, 999])
def test_a_report_of_few_jobs_can_be_plotted(jobs: int, tmp_path: Path) -> None:
    simulate(Natural(), [0.0] * jobs, lambda size: 0.0).plot(tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("load", [["--rate", "900"], ["--callers", "7"]])
def test_simulate_plots_each_policy_over_the_load(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    command = ["simulate", "Size(4)", "Natural()", "--cost", "5ms", "--jobs", "400", "--plot", str(path)]
    assert 0 == main([*command, *load])
    drawn = path.read_text(encoding="utf-8")
    assert all(word in drawn for word in ("Size(4)", "Natural()", "calls of the processor per 1,000 jobs"))


def test_a_load_that_takes_no_time_can_be_plotted(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    command = ["simulate", "Size(4)", "--cost", "0s", "--callers", "2", "--jobs", "2", "--plot", str(path)]
    assert 0 == main(command)
    assert "Size(4)" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("lines", [1, 2, 4, 10])
def test_lines_that_coincide_can_be_told_apart(lines: int) -> None:
    styles = [line_style(number, lines) for number in range(lines)]
    for name in ("marker", "color", "linewidth"):
        assert lines == len({style[name] for style in styles})
    assert all(before["linewidth"] > after["linewidth"] for before, after in zip(styles, styles[1:]))
    starts = [style["markevery"][0] for style in styles]
    assert all(before != after for before, after in zip(starts, starts[1:]))


@pytest.mark.parametrize("path", ["nowhere/plot.svg", "plot.nothing"])
def test_a_plot_that_cannot_be_written_gives_a_one_line_error(path: str, tmp_path: Path, capsys: Any) -> None:
    command = ["simulate", "Size(4)", "--cost", "5ms", "--rate", "9", "--jobs", "40", "--plot", str(tmp_path / path)]
    assert 2 == main(command)
    out, err = capsys.readouterr()
    assert ("", 1) == (out, len(err.splitlines()))  # refused before the simulation starts
    assert [] == list(tmp_path.iterdir())


def test_without_matplotlib_the_plot_option_says_what_to_install_before_the_simulation_starts(
    monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["simulate", "Size(4)", "--cost", "5ms", "--rate", "9", "--jobs", "40", "--plot", "plot.svg"]
    assert 2 == main(command)
    out, err = capsys.readouterr()
    assert "" == out
    assert "pip install '.[plot]' in a clone" in err and "pip install 'microbatch[plot]'" in err
