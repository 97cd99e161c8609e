"""Parses costs, weights, buckets, times and rates from the command line."""

import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable

from microbatch.simulation import SimulatedBatch, lognormal

__all__ = ["parse_buckets", "parse_cost", "parse_rate", "parse_seconds", "parse_weights"]

_IN_A_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "\N{MICRO SIGN}s": 1e6, "\N{GREEK SMALL LETTER MU}s": 1e6}
_TIME = rf"(\d+(?:\.\d*)?|\.\d+)\s*({'|'.join(_IN_A_SECOND)})"
_SECONDS_OF = {"s": 1.0, "min": 60.0, "h": 3600.0}


def parse_cost(text: str) -> Callable[[SimulatedBatch], float]:
    """Return a function that returns how many seconds a batch takes.

    The text is a sum of times. A time without a factor is for each batch, and a second one for each job. The factors
    are the attributes of a `SimulatedBatch`.

    >>> parse_cost("5ms+20us")(SimulatedBatch(count=100, weight=400, heaviest=10))
    0.007
    >>> parse_cost("5ms + 2us*padded")(SimulatedBatch(count=100, weight=400, heaviest=10))
    0.007

    Raises:
        ValueError: The text is not such a sum, or it has several times with the same factor.
    """
    times = dict[str, float]()
    for term in text.split("+"):
        found = re.fullmatch(rf"\s*{_TIME}\s*(?:\*\s*(count|weight|padded)\s*)?", term)
        factor = found and (found[3] or ("count" if "batch" in times else "batch"))
        if found is None or factor in times:
            expected = "5ms+20us, for each batch and each job, or 4ms+0.2ms*padded, with count, weight or padded"
            raise ValueError(f"must be a sum of times, as in {expected}, got {text!r}")
        times[str(factor)] = float(found[1]) / _IN_A_SECOND[found[2]]
    batch, count, weight, padded = (times.get(factor, 0.0) for factor in ("batch", "count", "weight", "padded"))
    return lambda those: batch + count * those.count + weight * those.weight + padded * those.padded


def parse_weights(text: str) -> Callable[[random.Random], float]:
    """Return random weights, given the least, the median and the greatest one.

    >>> parse_weights("5,17,256")(random.Random(8))
    5.0

    Raises:
        ValueError: The text does not consist of three numbers above 0, in order.
    """
    return lognormal(*_numbers(text, "the least, the median and the greatest weight, as in 5,17,256", 3))


def parse_buckets(text: str) -> Callable[[float], float]:
    """Return a function that returns the upper bound of the bucket of a weight, given all upper bounds.

    >>> bucket = parse_buckets("16,64,256")
    >>> bucket(5), bucket(16), bucket(17)
    (16.0, 16.0, 64.0)

    Raises:
        ValueError: The text does not consist of numbers above 0, in order. Or, later, a weight is above all of them.
    """
    bounds = _numbers(text, "the upper bounds of the buckets in order, as in 16,64,256")

    def bucket(weight: float) -> float:
        place = bisect_left(bounds, weight)
        if place == len(bounds):
            raise ValueError(
                f"the last bucket must be at least the greatest weight, got {text!r} and a weight of {weight:g}"
            )
        return bounds[place]

    return bucket


def _numbers(text: str, expected: str, count: int | None = None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    in_order = sorted(numbers) == numbers and all(0 < number < math.inf for number in numbers)
    if not (numbers and in_order and count in (None, len(numbers))):
        raise ValueError(f"must be {expected}, got {text!r}")
    return numbers


def parse_seconds(text: str) -> float:
    """Return the number of seconds in *text*, which is a number or a time with a unit.

    >>> parse_seconds("0.25"), parse_seconds("5 ms")
    (0.25, 0.005)

    Raises:
        ValueError: The text is neither of these, or the time is negative.
    """
    found = re.fullmatch(rf"\s*{_TIME}\s*", text)
    try:
        seconds = float(found[1]) / _IN_A_SECOND[found[2]] if found else float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ValueError(f"must be a number of seconds or a time such as 5ms, at least 0, got {text!r}")
    return seconds


def parse_rate(text: str) -> float:
    """Return the rate per second in *text*, which is a number or a number per unit of time.

    >>> parse_rate("100"), parse_rate("100/s"), parse_rate("90 / min")
    (100.0, 100.0, 1.5)

    Raises:
        ValueError: The text is neither of these, or the rate is not above 0.
    """
    number, slash, unit = text.partition("/")
    try:
        rate = float(number) / (_SECONDS_OF[unit.strip()] if slash else 1.0)
    except (ValueError, KeyError):
        expected = "a number of jobs per second, or a rate such as 100/s or 100/min"
        raise ValueError(f"must be {expected}, got {text!r}") from None
    if not rate > 0:
        raise ValueError(f"must be above 0, got {text!r}")
    return rate
