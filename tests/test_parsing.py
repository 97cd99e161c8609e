"""Parsing costs, weights, buckets, times and rates from the arguments of a command."""

import random
from typing import Any

import pytest

from microbatch.cli.parsing import parse_buckets, parse_cost, parse_rate, parse_seconds, parse_weights
from microbatch.simulation import SimulatedBatch, lognormal


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
    assert pytest.approx(seconds) == parse_cost(text)(SimulatedBatch(size, weight=7.0, heaviest=5.0))


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("4ms + 0.2ms*padded", 0.004 + 0.0002 * 30),
        ("0.2ms * padded+4ms", 0.004 + 0.0002 * 30),
        ("1s*weight", 17),
        ("1s*count", 3),
        ("1ms + 2ms + 3ms*weight + 4ms*padded", 0.001 + 0.002 * 3 + 0.003 * 17 + 0.004 * 30),
    ],
)
def test_a_cost_may_depend_on_the_weights_of_the_jobs(text: str, seconds: float) -> None:
    assert pytest.approx(seconds) == parse_cost(text)(SimulatedBatch(count=3, weight=17.0, heaviest=10.0))


@pytest.mark.parametrize(
    "text",
    ["", "5", "5 m s", "5ms+", "5ms-2us", "5m", "-5ms", "5ms+2", "1e3s", "5ms+20us+1s"]
    + ["5ms*size", "5ms*", "padded", "padded*5ms", "5ms*padded*count", "1ms+2ms+3ms*count", "1ms*weight+2ms*weight"],
)
def test_an_invalid_cost_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="must be a sum of times, as in 5ms.20us, .* or 4ms.0.2ms.padded, .*, got"):
        parse_cost(text)


def test_weights_are_given_by_the_least_the_median_and_the_greatest() -> None:
    weights, expected = parse_weights("5, 17,256"), lognormal(5, 17, 256)
    assert [expected(random.Random(seed)) for seed in range(9)] == [weights(random.Random(seed)) for seed in range(9)]


@pytest.mark.parametrize("text", ["", "5", "5,17", "5,17,256,512", "17,5,256", "0,1,2", "1,2,inf", "1,nan,2", "a,b,c"])
def test_invalid_weights_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be the least, the median and the greatest weight, as in 5,17,256, got"):
        parse_weights(text)


def test_a_weight_belongs_to_the_first_bucket_that_is_not_below_it() -> None:
    assert [0.5, 0.5, 64, 64, 256] == [*map(parse_buckets("0.5,64,256"), (0, 0.5, 0.6, 64, 65))]


@pytest.mark.parametrize("text", ["", "16,", "64,16", "0,16", "-1", "16,inf", "x"])
def test_invalid_buckets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be the upper bounds of the buckets in order, as in 16,64,256, got"):
        parse_buckets(text)


def test_a_weight_above_the_last_bucket_is_refused() -> None:
    with pytest.raises(
        ValueError, match="the last bucket must be at least the greatest weight, got '16,64' and a weight of 65"
    ):
        parse_buckets("16,64")(65)


@pytest.mark.parametrize("text, seconds", [("0.25", 0.25), ("0", 0), ("5ms", 0.005), (" 20 us ", 2e-5), ("3 s", 3)])
def test_a_time_may_have_a_unit(text: str, seconds: float) -> None:
    assert seconds == parse_seconds(text)


@pytest.mark.parametrize("text", ["", "x", "nan", "-1", "-1ms", "5m"])
def test_an_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number of seconds or a time such as 5ms, at least 0, got"):
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
