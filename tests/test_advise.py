"""``microbatch advise``: which policy has the fewest calls and is fast enough."""

import io
import json
import random
import re
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from microbatch import DEFAULT_POLICY, BatchingPolicy, Interval, Natural, Size
from microbatch.cli import main
from microbatch.cli.candidates import Candidate, Family, Needs, choose, families, front, measured, search
from microbatch.policies.text import parse_policy
from microbatch.simulation import SimulatedBatch, SimulationReport, lognormal, poisson, simulate
from tests.extras import needs

STEADY = "--rate", "400/s", "--cost", "5ms+20us", "--jobs", "200"


@lru_cache(maxsize=None)
def run(*options: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["advise", *options])
    return status, out.getvalue(), err.getvalue()


def advise(*options: object) -> str:
    """Run the command, and return what it prints."""
    status, out, err = run(*map(str, options))
    assert (0, "") == (status, err)
    return out


def advised(out: str) -> BatchingPolicy[Any]:
    (policy,) = re.findall(r"^    policy = (.*)$", out, re.MULTILINE)
    return parse_policy(policy)


def figures(out: str) -> dict[str, list[float]]:
    """Return the numbers in each row of the table, by the policy."""
    rows = [re.split(r"  +", line) for line in out.split("\n\n")[-4].splitlines()]
    return {row[0]: [float(cell.rstrip("%").replace(",", "")) for cell in row[1:8]] for row in rows[1:]}


def write_trace(path: Path, batches: Iterable[tuple[list[float], float]], **fields: Any) -> Path:
    lines = [json.dumps({"submitted": moments, "service_time": time, **fields}) for moments, time in batches]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recorded(path: Path, jobs: int = 2_000, faster: float = 1.0, slow: float = 1.0) -> Path:
    """Write the trace of a batcher.

    Args:
        path: The file.
        jobs: The number of jobs.
        faster: How many times more jobs per second the second half has.
        slow: How many times longer one batch in 20 takes.
    """
    moments = list(poisson(400, jobs)(random.Random(1)))
    middle = moments[jobs // 2]
    moments = [moment if moment < middle else middle + (moment - middle) / faster for moment in moments]
    report = simulate(Size(100) | Natural(), moments, lambda size: 0.005 + 0.00002 * size)
    batches, start = [], 0
    for number, run in enumerate(report.runs):
        time = (run.ended - run.started) * (slow if number % 20 == 19 else 1)
        batches.append((moments[start : start + run.size], time))
        start += run.size
    return write_trace(path, batches)


def test_the_advised_policy_has_the_fewest_calls_of_the_table_that_meet_the_target() -> None:
    out = advise(*STEADY, "--p99", "50ms")
    table = figures(out)
    policy = repr(advised(out))
    calls = {name: row[5] for name, row in table.items() if row[3] <= 50}
    assert calls[policy] <= 1.01 * min(calls.values())
    assert calls[policy] < 0.5 * calls[repr(DEFAULT_POLICY)]
    assert 45 < table[policy][3] <= 50
    assert "The fewest calls with a p99 of at most 50 ms:" in out


def test_the_advised_policy_is_judged_on_jobs_that_were_not_used_to_find_it() -> None:
    out = advise(*STEADY, "--p99", "50ms")
    report = simulate(advised(out), poisson(400, 100), lambda size: 0.005 + 0.00002 * size, seed=1)
    expected = (
        f"On 100 other simulated jobs, it reaches a p99 of {report.p99 * 1e3:.3g} ms with {report.batches} calls."
    )
    assert expected in out


@pytest.mark.simulation
def test_without_a_target_the_p99_of_the_default_policy_is_the_target() -> None:
    out = advise(*STEADY)
    p99 = figures(out)[repr(DEFAULT_POLICY)][3]
    assert f"a p99 of at most {p99:.3g} ms, which is that of the default policy:" in out
    assert figures(out)[repr(advised(out))][3] <= p99


@pytest.mark.simulation
def test_if_no_policy_meets_the_target_the_answer_says_so_and_names_the_fastest() -> None:
    out = advise(*STEADY, "--p99", "4ms")
    fastest = min(row[3] for row in figures(out).values())
    assert "No policy reaches a p99 of at most 4 ms. The lowest p99 is" in out
    assert fastest == figures(out)[repr(advised(out))][3]
    assert "misses the target" not in out  # it says already that no policy meets it


def test_the_default_policy_is_advised_if_no_other_one_saves_calls() -> None:
    out = advise("--rate", "9/s", "--cost", "5ms+20us", "--jobs", "8")
    assert repr(DEFAULT_POLICY) == repr(advised(out))
    assert "  the default, advised\n" in out
    assert "This is the default policy." in out


@pytest.mark.simulation
def test_the_answer_is_the_same_each_time() -> None:
    options = "--rate", "400/s", "--cost", "5ms+20us", "--jobs", "100", "--p99", "20ms"
    first = advise(*options)
    run.cache_clear()
    assert first == advise(*options)


def test_no_batch_is_larger_than_the_downstream_allows() -> None:
    out = advise("--rate", "4000/s", "--cost", "5ms+20us", "--jobs", "200", "--p99", "90ms", "--max-size", "20")
    policy = advised(out)
    assert 20 == max(simulate(policy, [0.0] * 500, lambda size: 0.005).batch_sizes)


def test_a_trace_says_how_long_a_batch_takes_and_what_happened_in_each_half(tmp_path: Path) -> None:
    out = advise("--trace", recorded(tmp_path / "trace.jsonl", jobs=200), "--p99", "50ms")
    assert out.startswith("A batch takes 5 ms plus 0.02 ms per job, according to ")
    assert re.search(r"policies with 1 worker on the first half of the trace \(100 jobs, \d\d\d per second\)", out)
    assert re.search(r"\nOn the second half \(100 jobs, \d\d\d per second\), it reaches a p99 of ", out)
    assert "Half of them were within 0 % of it, and one in 100 took at least 1.00 times as long." in out


@pytest.mark.simulation
def test_batches_that_are_sometimes_slow_in_a_trace_are_as_slow_in_the_simulation(tmp_path: Path) -> None:
    options = "--p99", "100ms"
    even = advise("--trace", recorded(tmp_path / "even.jsonl", jobs=600), *options)
    uneven = advise("--trace", recorded(tmp_path / "uneven.jsonl", jobs=600, slow=10.0), *options)
    assert uneven.startswith("A batch takes 5 ms plus 0.02 ms per job, according to ")
    assert "one in 100 took at least 10.00 times as long" in uneven
    p99s = [figures(out)[repr(DEFAULT_POLICY)][3] for out in (even, uneven)]
    assert p99s[0] < 12 and p99s[1] > 50


def test_weights_in_a_trace_do_not_change_the_recorded_time(tmp_path: Path) -> None:
    batches = [([number / 100] * 2, 0.005) for number in range(40)]
    path = write_trace(tmp_path / "trace.jsonl", batches, weights=[1, 30])
    note = "The weights of the jobs do not change that time. If they do in reality, give a --cost."
    assert note in advise("--trace", path, "--p99", "50ms")
    assert note not in advise("--trace", path, "--p99", "50ms", "--cost", "5ms*weight")


def test_a_cost_on_the_command_line_overrides_that_of_the_trace(tmp_path: Path) -> None:
    out = advise("--trace", recorded(tmp_path / "trace.jsonl", jobs=100, slow=9.0), "--cost", "1ms", "--p99", "20ms")
    assert out.startswith("Tried ")
    assert "1.00" == f"{figures(out)[repr(DEFAULT_POLICY)][1]:.2f}"


@pytest.mark.simulation
def test_a_warning_says_if_the_second_half_misses_the_target(tmp_path: Path) -> None:
    path = recorded(tmp_path / "trace.jsonl", jobs=400, faster=9.0)
    out = advise("--trace", path, "--cost", "5ms+1ms", "--p99", "60ms")
    assert re.search(
        r"\nWarning: this misses the target by \d+\.\d %\. If that matters, try --p99 \d+(\.\d+)?ms\.\n", out
    )


@pytest.mark.simulation
def test_a_warning_says_if_jobs_expire_in_the_second_half(tmp_path: Path) -> None:
    path = recorded(tmp_path / "trace.jsonl", jobs=400, faster=9.0)
    out = advise("--trace", path, "--cost", "5ms+1ms", "--p99", "60ms", "--expires-in", "50ms")
    assert "Warning: more than 1 % of these jobs expire." in out


def test_a_warning_says_if_there_are_too_few_jobs_for_a_p99() -> None:
    warning = "Warning: a p99 of 50 jobs is a matter of chance. Use 2,000 jobs or more."
    assert warning in advise("--rate", "400/s", "--cost", "5ms", "--jobs", "100", "--p99", "50ms")


def test_a_warning_says_if_batches_are_much_larger_than_those_in_the_trace(tmp_path: Path) -> None:
    batches = [([number / 100], 0.005) for number in range(100)]
    out = advise("--trace", write_trace(tmp_path / "trace.jsonl", batches), "--p99", "90ms")
    assert "batches of 1 job each" in out
    assert re.search(r"Warning: the largest simulated batch has \d jobs, and the largest recorded one 1 job\.", out)


@pytest.mark.simulation
def test_of_a_long_trace_stretches_from_all_of_it_are_simulated(tmp_path: Path) -> None:
    batches = [([number / 10 if number < 500 else 50 + (number - 500) / 1000], 0.0001) for number in range(2_000)]
    path = write_trace(tmp_path / "trace.jsonl", batches)
    out = advise("--trace", path, "--jobs", "200", "--p99", "50ms")
    # Half of the jobs of the first half came at 10 per second, the others at 1,000, so 100 of them took about 5 s.
    assert re.search(r"the first half of the trace \(100 jobs, (1[89]|2\d)\.?\d? per second\)", out)
    assert "On the second half (100 jobs, 1,000 per second)" in out


@pytest.mark.simulation
def test_the_largest_recorded_batch_may_be_exceeded_only_on_request(tmp_path: Path) -> None:
    batches = [([float(number)] * 150, 0.005) for number in range(10)]
    path = write_trace(tmp_path / "trace.jsonl", batches)
    assert "Size(150) | " in advise("--trace", path, "--p99", "500ms")
    assert "Size(150)" not in advise("--trace", path, "--p99", "500ms", "--max-size", "140")


@pytest.mark.simulation
def test_callers_that_wait_for_their_results_never_wait_forever() -> None:
    out = advise("--callers", "16", "--cost", "5ms+20us", "--jobs", "400", "--p99", "20ms")
    assert figures(out)[repr(advised(out))][4] >= 15  # all callers share each batch


@pytest.mark.simulation
def test_jobs_that_expire_count_as_late() -> None:
    out = advise("--rate", "200/s", "--cost", "5ms", "--jobs", "300", "--expires-in", "30ms", "--p99", "80ms")
    report = simulate(advised(out), poisson(200, 150), lambda size: 0.005, expires_in=0.03)
    assert report.expired <= 1
    assert "in time" in out and "nan" not in out


@pytest.mark.parametrize(
    "load, expected",
    [
        (
            Needs(0.05, 100, lambda size: 0.005),
            {"Size", "Interval", "Natural", "BestSize", "Session", "Rate", "Adaptive"},
        ),
        (Needs(0.05, 100, lambda size: 0.005, callers=True), {"AllWaiting"}),
        (Needs(0.05, 100, lambda size: 0.005, expires=True), {"InTime"}),
        (Needs(0.05, 100, lambda size: 0.005, weights=(20.0, 256.0)), {"Weight", "Padded"}),
        (Needs(0.05, 1, lambda size: 9.0), {"FixedWindow"}),
    ],
)
def test_each_kind_of_policy_is_among_the_candidates_if_the_load_has_a_use_for_it(
    load: Needs, expected: set[str]
) -> None:
    policies = [family.make(value) for family in families(load) for value in family.values]
    assert expected <= set(re.findall(r"\w+(?=\()", " ".join(map(repr, policies))))
    assert 30 <= len(policies) <= 75
    for policy in policies:  # all of them accept the heaviest job, and dispatch every batch in the end
        jobs = [256.0 if load.weights else 1.0] * 2
        report = simulate(policy, [0.0, 0.1], load.time_of, weights=lambda chance: jobs[0])
        assert 2 == report.jobs
        assert max(report.batch_sizes) <= load.most


def outcome(p99: float, calls: int, policy: BatchingPolicy[Any] = Size(1)) -> Candidate:
    report = simulate(policy, [0.0], lambda size: 1.0)
    return Candidate(policy, SimulationReport(**{**vars(report), "batches": calls}), p99, 1)


def test_the_best_policy_meets_the_target_with_the_fewest_calls() -> None:
    many, few, late = outcome(0.1, 100), outcome(0.5, 50), outcome(0.6, 10)
    assert few is choose([many, few, late], many, 0.5)
    assert many is choose([many, few, late], many, 0.4)


def test_if_no_policy_meets_the_target_the_fastest_is_the_best() -> None:
    slow, fast = outcome(0.5, 50), outcome(0.1, 100)
    assert fast is choose([slow, fast], slow, 0.05)


def test_of_policies_with_nearly_equally_few_calls_the_fastest_is_the_best() -> None:
    few, fast, many = outcome(0.5, 1_000), outcome(0.3, 1_009), outcome(0.1, 1_030)
    assert fast is choose([few, fast, many], many, 0.5)


def test_the_default_policy_is_the_best_if_no_other_one_makes_clearly_fewer_calls() -> None:
    default, fewer, late = outcome(0.4, 1_000), outcome(0.2, 985), outcome(0.9, 10)
    assert default is choose([default, fewer, late], default, 0.5)
    assert fewer is choose([default, fewer, late], default, 0.3)


def test_the_front_has_the_policies_that_no_other_one_beats() -> None:
    fast, beaten, equal, slow = outcome(0.1, 100), outcome(0.3, 100), outcome(0.4, 50), outcome(0.6, 10)
    expired = outcome(float("inf"), 0)
    assert [fast, equal, slow] == front([expired, slow, equal, beaten, fast])


def test_the_search_gets_close_to_the_target_in_a_few_steps() -> None:
    def attempt(policy: BatchingPolicy[Any]) -> Candidate:
        return measured(policy, simulate(policy, poisson(100, 500), lambda size: 0.005))

    family = Family(lambda time: Size(100) | Interval(time), [0.01, 0.02, 0.04, 0.08])
    found = list(search(attempt, [family], 0.0333))
    assert len(found) <= 9
    assert 0.99 * 0.0333 <= choose(found, found[0], 0.0333).p99 <= 0.0333


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--rate", "9"], "--cost is needed unless there is a --trace"),
        (["--cost", "5ms"], "one of the arguments --rate --callers --trace is required"),
        (["--rate", "9", "--cost", "5ms", "--p99", "soon"], "argument --p99: must be a number of seconds or a time"),
        (
            ["--rate", "9", "--cost", "5ms", "--p99", "0"],
            "the p99 must be above 0, got 0",
        ),
        (
            ["--rate", "9", "--cost", "0s", "--jobs", "9"],
            "give a --p99, because that of the default policy is 0",
        ),
        (["--rate", "9", "--cost", "5ms", "--jobs", "1"], "at least 2 jobs are needed"),
        (["--rate", "9", "--cost", "5ms", "--max-size", "0"], "argument --max-size: must be an integer of at least 1"),
        (
            ["--rate", "900", "--cost", "90ms", "--workers", "1", "--jobs", "400", "--expires-in", "1ms"],
            "give a --p99, because that of the default policy is inf",
        ),
        (
            ["--rate", "900", "--cost", "90ms", "--jobs", "40", "--expires-in", "1ms", "--p99", "50ms"],
            "with every policy that was tried, more than 1 % of the jobs expire: raise --expires-in",
        ),
    ],
)
def test_invalid_options_are_refused(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["advise", *options])
    out, err = capsys.readouterr()
    assert complaint in err and "microbatch advise --help)" in err
    assert "" == out


def test_a_trace_of_one_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "trace.jsonl", [([0.0], 1.0)])
    assert 2 == main(["advise", "--trace", str(path), "--p99", "1s"])
    assert "a trace must have at least 2 jobs" in capsys.readouterr().err


@pytest.mark.simulation
def test_the_plot_shows_the_target_the_default_and_the_advised_policy(tmp_path: Path) -> None:
    needs("matplotlib")
    paths = [tmp_path / name for name in ("one.svg", "other.svg")]
    options = ["--rate", "400/s", "--cost", "5ms+20us", "--jobs", "100", "--p99", "20ms", "--plot"]
    one, _ = (advise(*options, path) for path in paths)
    drawn, again = (path.read_text(encoding="utf-8") for path in paths)
    assert drawn == again
    for text in (
        "p99 of 20 ms",
        f"the default: {DEFAULT_POLICY}",
        f"advised: {advised(one)}",
        "calls of the processor",
    ):
        assert text in drawn


@pytest.mark.simulation
def test_weights_decide_if_the_cost_depends_on_them() -> None:
    options = ["--rate", "36/s", "--cost", "4ms + 0.2ms*padded", "--weights", "5,17,256", "--jobs", "300"]
    out = advise(*options, "--p99", "400ms")

    def cost(batch: SimulatedBatch) -> float:
        return 0.004 + 0.0002 * batch.padded

    report = simulate(advised(out), poisson(36, 150), cost=cost, weights=lognormal(5, 17, 256))
    assert report.p99 <= 0.4
    assert report.batches < 0.7 * report.jobs
