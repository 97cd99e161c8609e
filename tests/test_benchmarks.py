"""The benchmarks run, and their tables show what was measured. No test fails because something was slow."""

import inspect
import json
import math
import platform
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from benchmarks import advise, aio, coalescing, policies, real, scheduling
from benchmarks.__main__ import LABELS, main
from benchmarks.cells import COSTS, LARGER_PAYS, Cell, best_size
from benchmarks.contenders import Contender, Pool, Processor
from benchmarks.machine import versions
from benchmarks.measurements import MEASUREMENTS
from benchmarks.measurements.base import PEERS, Case, Figure, Measurement
from benchmarks.one import CONTENDERS, measure
from benchmarks.pages import Part, sections, update
from benchmarks.plots import loads, plot
from benchmarks.runner import Run, alternate, launch, to_json
from benchmarks.tables import Table, render, tables
from microbatch import Size
from microbatch.simulation import Arrival, SimulatedBatch
from tests.extras import needs

pytestmark = pytest.mark.slow

TINY: dict[str, list[dict[str, float]]] = {
    "gather": [{"jobs": 130, "threads": 1}, {"jobs": 130, "threads": 3}],
    "closed": [{"workers": 1, "threads": 4, "seconds": 0.01}, {"workers": 2, "threads": 4, "seconds": 0.01}],
    "contention": [{"threads": 2, "jobs": 2, "spinning": 1, "rounds": 1, "seconds": 0.01}],
    "lone": [{"calls": 2}],
    "open": [{"load": 0.1, "seconds": 0.02}],
    "idle": [{"seconds": 0.01}],
    "import": [{"times": 1}],
    "timer": [{"jobs": 2}],
    "memory": [{"jobs": 130, "traced": 1}],
    "shutdown": [{"times": 2}],
    "scale-jobs": [{"jobs": 70, "threads": 1}],
    "scale-threads": [{"jobs": 70, "threads": 2}],
    "scale-keys": [{"jobs": 70, "keys": 7}],
    "listeners": [{"jobs": 130, "threads": 1}],
}

NO_EXTRA = [
    (measurement.name, contender, settings)
    for measurement in MEASUREMENTS.values()
    for contender in measurement.contenders
    if contender not in PEERS
    for settings in TINY[measurement.name]
]


@pytest.mark.parametrize("name, contender, settings", NO_EXTRA)
def test_a_measurement_returns_every_figure_of_its_table(name: str, contender: str, settings: dict[str, float]) -> None:
    figures = MEASUREMENTS[name].run(CONTENDERS[contender], **settings)
    assert sorted(MEASUREMENTS[name].figures) == sorted(figures)
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("measurement", MEASUREMENTS.values(), ids=MEASUREMENTS.keys())
def test_the_description_of_a_measurement_is_consistent(measurement: Measurement) -> None:
    for cases in (measurement.cases, measurement.quick):
        for case in cases:
            inspect.signature(measurement.run).bind(Pool, **case.settings)
        assert len(cases) == len({case.label for case in cases})
    assert set(measurement.contenders) <= set(CONTENDERS)
    assert {figure for figure, _ in measurement.ratios} | ({measurement.plot} - {None}) <= set(measurement.figures)
    assert {reference for _, reference in measurement.ratios} <= set(measurement.contenders)
    assert set(measurement.growth or ()) <= {case.label for case in measurement.cases}


def test_memory_usage_is_also_read_from_the_operating_system() -> None:
    outcome = measure(MEASUREMENTS["memory"], Pool, {"jobs": 130, "traced": 0})
    assert outcome.keys() <= ({"figures"} if Path("/proc/self/statm").exists() else {"skipped"})


class Reversing(Contender):
    """Gives each caller the result of another caller."""

    name = label = "reversing"

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        self.jobs: list[bytes] = []

    def submit(self, job: bytes) -> None:
        self.jobs.append(job)

    def result(self, handle: None) -> bytes:
        return self.jobs.pop()

    def close(self) -> None:
        pass


class Absent(Reversing):
    """Needs a package that is not installed."""

    name = label = distribution = "absent"

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        import a_module_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401


def test_a_contender_that_mixes_up_results_gets_no_figures() -> None:
    expected = {"failed": "AssertionError: a caller got the result of another job"}
    assert expected == measure(MEASUREMENTS["gather"], Reversing, {"jobs": 10, "threads": 1})
    assert expected == measure(MEASUREMENTS["open"], Reversing, {"load": 0.1, "seconds": 0.02})
    contention = {"threads": 1, "jobs": 10, "spinning": 1, "rounds": 1, "seconds": 0.01}
    assert expected == measure(MEASUREMENTS["contention"], Reversing, contention)
    assert expected == measure(MEASUREMENTS["memory"], Reversing, {"jobs": 10, "traced": 1})


def test_a_contender_that_is_not_installed_is_skipped_with_the_reason() -> None:
    expected = {"skipped": "can't be imported: No module named 'a_module_that_is_not_there'"}
    assert expected == measure(MEASUREMENTS["gather"], Absent, {"jobs": 10, "threads": 1})
    assert {"absent": "not installed"} == versions([Absent, Pool])


def test_a_contender_that_does_not_support_a_case_is_skipped_with_the_reason() -> None:
    expected = {"skipped": "runs 1 batch at a time"}
    settings = {"workers": 2, "threads": 1, "seconds": 0}
    assert expected == measure(MEASUREMENTS["closed"], CONTENDERS["batched"], settings)


@pytest.mark.parametrize("peer", PEERS)
def test_an_installed_peer_gives_each_caller_its_own_result(peer: str) -> None:
    if versions([CONTENDERS[peer]]) == {peer: "not installed"}:
        pytest.skip("not installed")
    outcome = launch(["gather", peer, "jobs=100", "threads=2"], 20)
    if "skipped" in outcome:
        pytest.skip(outcome["skipped"])
    assert ["figures"] == list(outcome)


def test_a_run_that_hangs_or_crashes_is_recorded_as_its_outcome() -> None:
    assert {"hung": "killed after 0.3 s"} == launch(["idle", "ThreadPoolExecutor", "seconds=60"], 0.3)
    assert {"failed": "exit status 2"} == {
        key: value.partition(":")[0] for key, value in launch(["gather", "nobody"], 20).items()
    }


def run_nothing(contender: type[Contender]) -> dict[str, float]:
    raise NotImplementedError


SMALL = Measurement(
    name="small",
    title="Small",
    about="Nothing.",
    run=run_nothing,
    figures={"time": Figure("time, ms", 1)},
    contenders=("microbatch", "ThreadPoolExecutor", "batched"),
    cases=[Case("few", {"jobs": 1}), Case("many", {"jobs": 2})],
    quick=[],
    ratios=[("time", "ThreadPoolExecutor")],
    plot="time",
)
GROWING = replace(SMALL, growth=("few", "many"))
WIDE = replace(GROWING, wide=True)


def test_contenders_take_turns_and_one_that_is_skipped_or_hangs_is_not_run_again() -> None:
    asked: list[Sequence[str]] = []

    def launch(arguments: Sequence[str], timeout: float) -> Mapping[str, Any]:
        asked.append(arguments)
        outcomes: dict[str, Mapping[str, Any]] = {
            "microbatch": {"figures": {"time": 1.0}},
            "ThreadPoolExecutor": {"failed": "RuntimeError: /home/me/secret/lock.py is broken"},
            "batched": {"skipped": "no"} if arguments[-1] == "jobs=1" else {"hung": "killed after 9 s"},
        }
        return outcomes[arguments[1]]

    runs = list(alternate(SMALL, SMALL.cases, SMALL.contenders, 2, 9, launch))
    first = [["small", contender, f"jobs={jobs}"] for jobs in (1, 2) for contender in SMALL.contenders]
    assert first + [arguments for arguments in first if arguments[1] != "batched"] == asked
    assert [0] * 6 + [1] * 4 == [run.repeat for run in runs]
    assert ["", "failed: RuntimeError: lock.py is broken", "skipped: no"] == [run.problem for run in runs[:3]]
    assert "hung: killed after 9 s" == runs[5].problem


def some_runs() -> list[Run]:
    times: dict[tuple[str, str], list[float]] = {
        ("microbatch", "few"): [1.0, 3.0, 8.0],
        ("ThreadPoolExecutor", "few"): [10.0, 10.0, 10.0],
        ("microbatch", "many"): [4.0, 3.0, 8.0],
        ("ThreadPoolExecutor", "many"): [2.0, 30.0, 32.0],
    }
    return [
        Run("small", case, contender, repeat, {"time": time})
        for (contender, case), values in times.items()
        for repeat, time in enumerate(values)
    ] + [Run("small", "few", "batched", 0, problem="skipped: why")]


def cells(table: Table) -> list[list[str]]:
    return [list(row[1:]) for row in table.rows]


def test_a_table_shows_medians_with_all_runs_and_the_medians_of_the_ratios_within_each_repeat() -> None:
    few, many = tables(SMALL, SMALL.cases, some_runs(), LABELS)
    assert ["", "time, ms", "time, ms, all runs", "time, × ThreadPoolExecutor"] == list(few.headings)
    assert [["3.0", "1.0 to 8.0", "0.30"], ["10.0", "10.0 to 10.0", "1.00"], ["–", "–", "–"]] == cells(few)
    assert [["4.0", "3.0 to 8.0", "0.25"], ["30.0", "2.0 to 32.0", "1.00"], ["–", "–", "–"]] == cells(many)
    assert (["batched: skipped: why"], []) == (few.notes, many.notes)


def test_a_table_compares_one_case_with_another_within_each_repeat() -> None:
    few, many = tables(GROWING, GROWING.cases, some_runs(), LABELS)
    assert "time, ms, × few" == many.headings[-1] not in few.headings
    assert ["1.00", "3.00", "–"] == [row[-1] for row in many.rows]


def test_a_wide_table_has_a_column_for_each_case_and_one_for_growth() -> None:
    plain, ratio = tables(WIDE, WIDE.cases, some_runs(), LABELS)
    assert ["", "few", "many", "many / few"] == list(plain.headings)
    assert [["3.0", "4.0", "1.00"], ["10.0", "30.0", "3.00"], ["–", "–", "–"]] == cells(plain)
    assert [["0.30", "0.25", "0.33"], ["1.00", "1.00", "1.00"], ["–", "–", "–"]] == cells(ratio)
    assert ["batched (few): skipped: why"] == plain.notes


def test_a_table_says_how_many_runs_failed() -> None:
    runs = [*some_runs(), *(Run("small", "many", "microbatch", repeat, problem="failed: E") for repeat in (3, 4))]
    assert [f"{LABELS['microbatch']}: failed: E; 2 of 5 runs"] == tables(SMALL, SMALL.cases, runs, LABELS)[1].notes


def test_a_table_is_rendered_as_restructured_text() -> None:
    table = Table("few", ["", "ms"], [["a µ", "1.0"], ["b", "20.0"]], ["b: late"])
    assert render(table).splitlines() == [
        "**few**",
        "",
        "===  ====",
        "\\      ms",
        "===  ====",
        "a µ   1.0",
        "b    20.0",
        "===  ====",
        "",
        "* b: late",
    ]


def test_tables_and_plots_are_written_again_from_the_raw_figures(tmp_path: Path) -> None:
    needs("matplotlib")
    times = {"microbatch": 1.0, "ThreadPoolExecutor": 5.0, "batched": 5.0, "ubatch": 900.0}
    runs = [Run("gather", "few", contender, 0, {"wall": time}) for contender, time in times.items()]
    raw = json.dumps({"facts": {"CPU": "fast"}, "repeats": 1, "quick": False, "runs": to_json(runs)}, indent=1) + "\n"
    (tmp_path / "results.json").write_text(raw, encoding="utf-8")
    main(["--rewrite", "--output", str(tmp_path)])
    assert {"gather.svg", "results.json", "tables.rst"} == {path.name for path in tmp_path.iterdir()}
    assert raw == (tmp_path / "results.json").read_text(encoding="utf-8")
    assert ":CPU: fast" in (tmp_path / "tables.rst").read_text(encoding="utf-8")
    drawn = (tmp_path / "gather.svg").read_text(encoding="utf-8")
    assert "900.00 \N{RIGHTWARDS ARROW}" in drawn  # a bar that long is cut, or the others would be too short to compare


def test_the_command_prints_and_writes_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def launch(arguments: Sequence[str], timeout: float) -> Mapping[str, Any]:
        if arguments[1] == "batched":
            return {"skipped": "can't be imported: No module named 'batched'"}
        return {"figures": {name: 1.5 for name in MEASUREMENTS[arguments[0]].figures}}

    main(["--quick", "--measurements", "gather", "idle", "--repeats", "2", "--output", str(tmp_path)], launch)
    text = (tmp_path / "tables.rst").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text + "\n"
    assert "batched: skipped: can't be imported: No module named 'batched'" in text
    titles = [measurement.title for measurement in MEASUREMENTS.values()]
    assert ["Submit then gather", "Idle"] == [title for title in titles if title in text.splitlines()]
    assert platform.python_version() in text
    raw = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert {0, 1} == {run["repeat"] for run in json.loads(raw)["runs"]}
    assert str(tmp_path) not in text + raw and sys.executable not in text + raw


def test_a_plot_is_reproducible_and_contains_no_date_and_no_path(tmp_path: Path) -> None:
    needs("matplotlib")
    drawn = []
    for measurement in (SMALL, WIDE):
        for name in ("one", "two"):
            assert plot(measurement, measurement.cases, some_runs(), LABELS, tmp_path / name)
        first, second = ((tmp_path / name).read_text(encoding="utf-8") for name in ("one", "two"))
        assert first == second
        assert "ThreadPoolExecutor.submit" in first
        assert str(tmp_path) not in first and "dc:date" not in first
        drawn.append(first)
    assert drawn[0] != drawn[1]
    assert not plot(SMALL, SMALL.cases, [], LABELS, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_advice_is_compared_with_the_best_policy_in_hindsight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "advise.rst"
    advise.main(["--jobs=60", "--loads=2", "--processes=1", f"--output={path}"])
    text = path.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    rows = [re.split(r"  +", row) for row in text.splitlines() if row.startswith("steady")]
    assert ["1", "4"] == [row[1] for row in rows]
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in rows)


@pytest.mark.server
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the CPU time of other processes is read from /proc")
def test_postgresql_is_measured_row_by_row_and_in_batches_on_loopback_and_over_a_network(
    postgresql: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("psycopg", "psycopg_pool")
    from benchmarks import postgresql as script

    monkeypatch.setattr(script, "RESET", script.RESET[:1])  # without what only makes the turns alike, to save time
    script.main([postgresql, "--callers=2", "--jobs=12", "--repeats=1", "--delay=20"])
    out = capsys.readouterr().out
    titles = [line.strip("*") for line in out.splitlines() if line.startswith("**")]
    places = ("on loopback", "over a network that takes 20 ms more")
    assert [f"{done} {where}" for where in places for done in ("insert", "upsert", "lookup")] == titles
    assert re.fullmatch(r"During the turns, other programs .* used -?\d+% of all CPU time\.", out.splitlines()[-1])
    rows = [line.rsplit(maxsplit=7) for line in out.splitlines() if line.startswith(("one call", "batches"))]
    assert 24 == len(rows)
    rates = [float(cells[2].replace(",", "")) for cells in rows]
    assert all(rate <= 100 for rate in rates[12::4])  # two callers without batches, 50 times a second at most
    assert all(math.isfinite(float(cell.replace(",", ""))) for cells in rows for cell in cells[1:])


@pytest.mark.server
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the CPU time of other processes is read from /proc")
def test_postgresql_gets_no_figures_if_callers_get_the_rows_of_others(
    postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("psycopg", "psycopg_pool")
    from benchmarks import postgresql as script

    def reversed_rows(ids: list[int], connection: Any) -> list[Any]:
        return script.look_up_many(sorted(ids), connection)[::-1]

    lookup = script.OPERATIONS[-1]._replace(many=reversed_rows)
    monkeypatch.setattr(script, "OPERATIONS", [lookup])
    with pytest.raises(SystemExit, match="lookup, batches, 4 workers, 4 connections: wrong results"):
        script.main([postgresql, "--callers=8", "--jobs=400", "--repeats=1"])


def test_the_best_size_of_a_cost_is_the_one_with_the_highest_throughput() -> None:
    best = {cost: best_size(cost)[0] for cost in COSTS}
    assert all(100 == best[cost] for cost in LARGER_PAYS)
    assert (6, 32, 1, 4) == (
        best["2 ms + 0.5 ms·n + 0.05 ms·n²"],
        best["5 ms + 0.1 ms·n, 50 ms more above 32"],
        best["10 ms + 0.4 ms·padded"],
        best["5 ms + 20 µs·n, then 4 ms + 1 ms·n^1.5"],
    )


def test_a_cost_that_drifts_changes_after_each_quarter_of_the_jobs() -> None:
    time = COSTS["5 ms + 20 µs·n, then 4 ms + 1 ms·n^1.5"].start(jobs=400)
    batches = [SimulatedBatch(100, 100.0, 1.0)] * 4
    assert [0.007, 1.004, 0.007, 1.004] == pytest.approx([time(batch) for batch in batches])


def test_noise_changes_single_batches_and_not_their_mean() -> None:
    cell = Cell("flood", "5 ms + 20 µs·n", 1)
    quiet, noisy = (cell.run(Size(1), 4_000, noise=noise) for noise in (0.0, 0.5))
    assert max(run.ended - run.started for run in noisy.runs) > 0.01
    assert max(run.ended for run in noisy.runs) == pytest.approx(max(run.ended for run in quiet.runs), rel=0.05)


def brute_force(jobs: Sequence[Arrival], service_time: Callable[[int], float]) -> int:
    """Return how many jobs one worker can do in time, by trying all batches in all orders. Some jobs may be left out."""
    deadlines = [job.moment + job.expires_in for job in jobs]

    def most(now: float, left: frozenset[int]) -> int:
        best = 0
        for size in range(1, len(left) + 1):
            for batch in combinations(sorted(left), size):
                end = max([now, *(jobs[job].moment for job in batch)]) + service_time(size)
                if all(end <= deadlines[job] for job in batch):
                    best = max(best, size + most(end, left - set(batch)))
        return best

    return most(0.0, frozenset(range(len(jobs))))


@pytest.mark.parametrize("seed", range(20))
def test_no_schedule_exceeds_the_bound_of_the_jobs_done_in_time(seed: int) -> None:
    chance = random.Random(seed)
    moments = sorted(chance.uniform(0, 5) for _ in range(5))
    jobs = [Arrival(moment, expires_in=chance.uniform(0.5, 4)) for moment in moments]
    best = brute_force(jobs, lambda size: 0.6 + 0.4 * size)
    assert best <= scheduling.most_in_time(jobs, lambda size: 0.6 + 0.4 * size, 5) <= 5


def test_the_bound_of_the_jobs_done_in_time_counts_only_as_many_jobs_as_there_is_time_for() -> None:
    jobs = [Arrival(0.0, expires_in=9.5)] * 50
    assert 10 == scheduling.most_in_time(jobs, lambda size: 1.0 * size, 5)
    assert 50 == scheduling.most_in_time(jobs, lambda size: 0.1 * size, 5)


def test_jobs_out_of_order_are_counted() -> None:
    recorder = real.Recorder()
    keys = [0, 0, 0, 0, 1]
    recorder.calls = [(0, 1, [0]), (2, 3, [4]), (4, 5, [1, 2]), (6, 7, [3])]
    assert (0, 0, 0) == recorder.out_of_order(keys)
    recorder.calls = [(0, 3, [0]), (1, 2, [1, 2]), (4, 5, [3])]
    assert (0, 1, 1) == recorder.out_of_order(keys)
    recorder.calls = [(0, 1, [2, 3]), (2, 3, [0, 1])]
    assert (2, 2, 0) == recorder.out_of_order(keys)


def test_a_part_of_a_page_is_measured_again_without_the_others(tmp_path: Path) -> None:
    table = Table("few", ["", "ms"], [["a", "1.0"]], ["a note"])
    parts = {name: Part(f"Part {name}", f"About {name}.", lambda: [table]) for name in "abc"}
    page = update(tmp_path / "page.rst", "Page", parts, ["a", "c"])
    assert ["Part a", "Part c"] == list(sections(page))
    parts["b"] = parts["b"]._replace(introduction="News.")
    parts["c"] = parts["c"]._replace(introduction="Not read.")
    changed = update(tmp_path / "page.rst", "Page", parts, ["b"])
    assert ["Part a", "Part b", "Part c"] == list(sections(changed))
    assert sections(page)["Part c"] == sections(changed)["Part c"]
    assert "News." in changed and "Not read." not in changed
    assert changed == (tmp_path / "page.rst").read_text(encoding="utf-8")
    assert changed == update(tmp_path / "page.rst", "Page", parts, [])


@pytest.mark.timeout(120)
def test_the_benchmarks_of_policies_write_two_pages_with_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Fewer cells and shorter runs, with one of each kind.
    old, new = policies.old_cells(), policies.new_cells()
    monkeypatch.setattr(policies, "old_cells", lambda: [cell for cell in old if cell.load == 0.3 and cell.workers < 16])
    monkeypatch.setattr(policies, "groups", lambda: {"all": lambda cell: True})
    monkeypatch.setattr(policies, "new_cells", lambda: [cell for cell in new if (cell.workers, cell.load) == (1, 0.3)])
    monkeypatch.setattr(policies, "SEEDS", range(1))
    monkeypatch.setattr(scheduling, "SECONDS", 0.02)
    monkeypatch.setattr(scheduling, "DEADLINE_LOADS", (0.1, 1.1))
    small = ["--jobs=20", "--ordered=2000", "--repeats=1", "--seconds=0.05", "--processes=1"]
    policies.main([*small, f"--output={tmp_path}"])
    out = capsys.readouterr().out
    for name, count in {"policies.rst": 6, "scheduling.rst": 4}.items():
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert page in out
        assert count == len(sections(page))
        assert all("**" in text for text in sections(page).values())
    with pytest.raises(SystemExit):
        policies.main(["--parts", "nothing"])
    assert "the parts are best, extremes" in capsys.readouterr().err


def test_the_plots_of_the_policies_are_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("matplotlib")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        curves = {"first": [1.0, 2.0, 9.0], "second": [1.0, 1.5, 2.0]}
        loads(tmp_path / folder / "plot.svg", "latency", [1.0, 2.0, 3.0], curves, "jobs per second", logarithmic=True)
    one, two = ((tmp_path / folder / "plot.svg").read_text(encoding="utf-8") for folder in ("one", "two"))
    assert one == two and "jobs per second" in one


def test_the_profile_counts_the_instructions_of_each_function_and_compares_the_closed_loop_with_raw_locks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("resource", reason="not on Windows")
    from benchmarks import profile

    profile.main(jobs=128, repeats=1)
    gather, keys, closed, compared, accepted = capsys.readouterr().out.rstrip().split("\n\n**")
    for table in (gather, keys, closed):
        rows = [line.rsplit(maxsplit=2) for line in table.splitlines() if line[-1:].isdigit()]
        counted = [(name, float(calls), int(instructions)) for name, calls, instructions in rows]
        submit = "Batcher.submit" if sys.version_info >= (3, 11) else "submit"  # before, code does not know its class
        assert 1 == min(calls for name, calls, _ in counted if name == submit)
        *each, (last, _, total) = counted
        assert "all together" == last
        assert total == pytest.approx(sum(instructions for *_, instructions in each), abs=len(rows))
    assert "_wait " in closed
    assert re.search("_send +1.00", keys)  # a batch for each job
    assert re.search(r"\n\S.*Natural\(\) +[1-9][\d,]* \([\d,]+ to [\d,]+\)\n", accepted)
    compared_rows = zip(compared.splitlines()[5:7], [LABELS["microbatch"], LABELS["locks"]])
    assert [True, True] == [line.startswith(f"{label} ") for line, label in compared_rows]


def test_the_benchmark_of_callers_in_asyncio_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "aio.rst"
    aio.main(["--repeats=1", "--seconds=0.05", "--jobs=640", "--requests=64", f"--output={page}"])
    rows = [line.split("  ")[0] for line in page.read_text().splitlines()]
    ways = ("waiting for space", "polling", "nothing", "``microbatch.aio.submit``", "``asyncio.wrap_future``")
    for name in (*ways, "microbatch, in a thread", "microbatch, ``on_loop``"):
        assert 1 == rows.count(name)


def test_the_benchmark_of_equal_jobs_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "coalescing.rst"
    coalescing.main(["--repeats=1", "--lookups=256", f"--output={page}"])
    rows = [line.split("  ")[0] for line in page.read_text().splitlines()]
    for name, _ in coalescing.ways():
        assert 3 == rows.count(name)
