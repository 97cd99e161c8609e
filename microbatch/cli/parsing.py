"""Parses costs, times and rates from the command line."""

import math
import re
from collections.abc import Callable

__all__ = ["parse_cost", "parse_rate", "parse_seconds"]

_IN_A_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "\N{MICRO SIGN}s": 1e6, "\N{GREEK SMALL LETTER MU}s": 1e6}
_TIME = rf"(\d+(?:\.\d*)?|\.\d+)\s*({'|'.join(_IN_A_SECOND)})"
_SECONDS_OF = {"s": 1.0, "min": 60.0, "h": 3600.0}


def parse_cost(text: str) -> Callable[[int], float]:
    """Return a function that takes the size of a batch and returns how many seconds it takes.

    >>> parse_cost("5ms+20us")(100)
    0.007

    Raises:
        ValueError: The text is neither a time for each batch, nor a time for each batch plus a time for each job.
    """
    found = re.fullmatch(rf"\s*{_TIME}\s*(?:\+\s*{_TIME}\s*)?", text)
    if found is None:
        raise ValueError(f"must be a time for each batch and one for each job, as in 5ms+20us, got {text!r}")
    batch, unit, job, unit_of_job = found.groups()
    fixed = float(batch) / _IN_A_SECOND[unit]
    each = float(job) / _IN_A_SECOND[unit_of_job] if job else 0.0
    return lambda size: fixed + each * size


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
        raise ValueError(f"must be a number of seconds of at least 0, or a time such as 5ms, got {text!r}")
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
