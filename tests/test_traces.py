"""Traces: recording a batcher, and replaying its load in a simulation."""

import hashlib
import io
import json
from typing import Any

import pytest

from microbatch import Batcher, Interval, Size, Weight
from microbatch.simulation import Arrival, simulate
from microbatch.testing import ManualClock
from microbatch.traces import TraceRecorder, read_trace


def test_a_trace_has_times_weights_and_hashed_keys_but_no_jobs(clock: ManualClock) -> None:
    def processor(jobs: list[str]) -> list[str]:
        clock.advance(0.25)
        return jobs

    file = io.StringIO()
    with Batcher(
        processor, Size(2) | Weight(999), key=len, weigh=ord, listeners=[TraceRecorder(file)], clock=clock
    ) as batcher:
        batcher.submit("a")
        clock.advance(1.0)
        batcher.submit("b")
    assert [
        {
            "service_time": 0.25,
            "trigger": "size",
            "submitted": [0.0, 1.0],
            "weights": [97.0, 98.0],
            "key": hashlib.blake2b(b"1", digest_size=8).hexdigest(),
        }
    ] == [json.loads(line) for line in file.getvalue().splitlines()]


def test_weights_are_recorded_even_if_they_add_up_to_the_number_of_jobs() -> None:
    file = io.StringIO()
    with Batcher[float, float](list, Size(2), weigh=float, listeners=[TraceRecorder(file)]) as batcher:
        for weight in (0.5, 1.5):
            batcher.submit(weight)
    assert [0.5, 1.5] == [arrival.weight for arrival in read_trace(file.getvalue().splitlines()).arrivals]


def line(*moments: float, **fields: Any) -> str:
    return json.dumps({"submitted": moments, "service_time": 1.0, "trigger": "size", **fields})


def test_arrivals_are_sorted_and_start_at_zero_whatever_the_order_of_the_batches() -> None:
    trace = read_trace([line(7.0, 8.5, key="a", weights=[2, 3]), line(6.0)])
    assert (Arrival(0.0), Arrival(1.0, "a", 2.0), Arrival(2.5, "a", 3.0)) == trace.arrivals


@pytest.mark.parametrize(
    "batches, expected",
    [
        ([(1, 0.5)], [0.5, 0.5]),
        ([(1, 0.3), (1, 0.1), (1, 0.2)], [0.2, 0.2]),
        ([(1, 0.125), (3, 0.375), (5, 0.625)], [0.25, 1.25]),
        ([(2, 0.5), (4, 0.75)], [0.5, 1.5]),
        ([(2, 0.75), (4, 0.5)], [0.625, 0.625]),
        ([(2, 0.25), (4, 1.25)], [0.5, 2.5]),
    ],
    ids=[
        "one",
        "all the same size",
        "a line through zero",
        "a line",
        "the larger was faster",
        "a line that starts below zero",
    ],
)
def test_the_service_time_of_a_trace_is_a_line_fitted_to_its_batches(batches: Any, expected: list[float]) -> None:
    trace = read_trace([line(*[0.0] * size, service_time=time) for size, time in batches])
    assert pytest.approx(expected) == [trace.service_time(size) for size in (2, 10)]


def test_a_few_very_slow_batches_do_not_change_the_service_time() -> None:
    batches = [(1 + number % 9, 0.5 + 0.25 * (1 + number % 9)) for number in range(95)]
    trace = read_trace([line(*[0.0] * size, service_time=time) for size, time in [*batches, *[(9, 600.0)] * 5]])
    fit = trace.service_time
    assert pytest.approx((0.5, 0.25)) == (fit.fixed, fit.each)


def test_the_service_time_of_a_trace_says_how_much_the_batches_deviate_from_it() -> None:
    times = [(1, 1.0), (3, 2.0), (2, 1.5), (2, 3.0), (2, 1.5), (2, 1.5), (1, 1.0), (3, 2.0), (1, 1.0), (3, 1.0)]
    fit = read_trace([line(*[0.0] * size, service_time=time) for size, time in [*times, *times[:3] * 10]]).service_time
    assert (0.5, 0.5) == pytest.approx((fit.fixed, fit.each))
    assert (1, 3, 40) == (fit.sizes[0], fit.sizes[-1], len(fit.sizes))
    assert pytest.approx([0.5] + [1.0] * 38 + [2.0]) == list(fit.ratios)


def test_batches_that_took_no_time_do_not_deviate() -> None:
    assert (1.0, 1.0) == read_trace([line(1.0, service_time=0.0)] * 2).service_time.ratios


def test_simulating_a_trace_with_the_same_policy_gives_the_same_batches(clock: ManualClock) -> None:
    file = io.StringIO()
    policy = Size(4) | Interval(0.5)
    with Batcher[str, str](list, policy, listeners=[TraceRecorder(file)], clock=clock) as batcher:
        futures = []
        for _ in range(11):
            futures.append(batcher.submit("job"))
            while batcher.stats().queued or batcher.stats().running:
                pass
            clock.advance(0.125)
    trace = read_trace(file.getvalue().splitlines())
    sizes = tuple(future.result(timeout=0).batch.size for future in futures)
    assert (4, 4, 3) == (sizes[0], sizes[4], sizes[8])
    assert (4, 4, 3) == simulate(policy, trace.arrivals, lambda size: 0.0).batch_sizes


@pytest.mark.parametrize(
    "lines, complaint",
    [
        ([], "a trace must have at least one job"),
        ([line()], "a trace must have at least one job"),
        ([line(1.0), "{", line(1.0)], "line 2 must be a line of a trace, got '{'"),
        ([line(1.0), "[]"], "line 2 must be a line of a trace"),
        (["{"], "line 1 must be a line of a trace"),
        (["[]"], "line 1 must be a line of a trace"),
        (['{"submitted": [1]}'], "line 1 must be a line of a trace"),
        ([line(1.0, 2.0, weights=[1.0])], "line 1 must be a line of a trace"),
        ([line(1.0, service_time=-1)], "line 1 must be a line of a trace"),
        ([line(1.0, service_time="1")], "line 1 must be a line of a trace"),
        ([line(1.0, service_time=1e308), line(1.0, service_time=1e308)], "line 1 must be a line of a trace"),
        ([line(float("nan"))], "line 1 must be a line of a trace"),
        ([line(float("-inf"))], "line 1 must be a line of a trace"),
        ([line(1.0, weights=[-1])], "line 1 must be a line of a trace"),
        ([line(1.0, weights=[float("inf")])], "line 1 must be a line of a trace"),
        ([line(1.0, weights=[1.0, 2.0])], "line 1 must be a line of a trace"),
        (["[" * 100_000], "line 1 must be a line of a trace"),
    ],
)
def test_the_error_for_an_invalid_trace_names_the_line(lines: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_trace(lines)


def test_an_incomplete_last_line_is_ignored_because_the_file_may_still_be_written() -> None:
    whole = line(1.0, 2.0)
    assert read_trace([whole]).arrivals == read_trace([whole, whole[:10]]).arrivals
