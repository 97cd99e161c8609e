"""Parsing costs, times and rates from the arguments of a command."""

from typing import Any

import pytest

from microbatch.cli.parsing import parse_cost, parse_rate, parse_seconds


@pytest.mark.parametrize(
    "text, size, seconds",
    [
        ("5ms", 100, 0.005),
        ("5 ms", 100, 0.005),
        ("5ms+20us", 100, 0.007),
        ("5 ms + 20 us", 100, 0.007),
        ("5ms+20\N{MICRO SIGN}s", 100, 0.007),
        (" 1.5 s + .5s ", 2, 2.5),
        ("0s+1us", 3, 3e-6),
    ],
)
def test_a_cost_is_a_time_per_batch_and_a_time_per_job(text: str, size: int, seconds: float) -> None:
    assert pytest.approx(seconds) == parse_cost(text)(size)


@pytest.mark.parametrize("text", ["", "5", "5 m s", "5ms+", "5m", "-5ms", "5ms+2", "1e3s", "5ms+20us+1s"])
def test_an_invalid_cost_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="must be a time for each batch and one for each job, as in 5ms.20us, got"):
        parse_cost(text)


@pytest.mark.parametrize("text, seconds", [("0.25", 0.25), ("0", 0), ("5ms", 0.005), (" 20 us ", 2e-5), ("3 s", 3)])
def test_a_time_may_have_a_unit(text: str, seconds: float) -> None:
    assert seconds == parse_seconds(text)


@pytest.mark.parametrize("text", ["", "x", "nan", "-1", "-1ms", "5m"])
def test_an_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number of seconds of at least 0, or a time such as 5ms, got"):
        parse_seconds(text)


@pytest.mark.parametrize(
    "text, rate", [("100", 100), ("1e3", 1000), ("100/s", 100), ("90 / min", 1.5), ("9/h", 0.0025)]
)
def test_a_rate_may_have_a_unit_of_time(text: str, rate: float) -> None:
    assert rate == parse_rate(text)


@pytest.mark.parametrize(
    "text, complaint",
    [("", "must be a number"), ("x/s", "must be a number"), ("9/", "must be a number"), ("9/ms", "must be a number")]
    + [("0", "must be above 0"), ("nan", "must be above 0"), ("-1/s", "must be above 0")],
)
def test_an_invalid_rate_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_rate(text)
