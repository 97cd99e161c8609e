"""What an argument must be, said when it is not: ``name must be ..., got ...``."""

import math
import numbers
import reprlib
from concurrent.futures import Executor
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Any

MOST_THREADS = 10_000
"""Who asks for more has mistaken something, and would take the machine down."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = 100


def shown(value: Any) -> str:
    """Return the repr of *value* for a message, cut where it is long. One that raises never replaces the message."""
    try:
        return _brief.repr(value)
    except Exception:  # of an integer with too many digits, say
        return object.__repr__(value)


def check_callable(name: str, value: Any) -> None:
    """Raise TypeError unless *value* can be called, and gives its answer when it is: a coroutine function does not."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {shown(value)}")
    for function in (value, getattr(value, "__call__", None)):
        if iscoroutinefunction(function) or isasyncgenfunction(function):
            raise TypeError(f"{name} must be a plain function, got the asynchronous {shown(value)}")


def check_executor(name: str, value: Any) -> None:
    """Raise TypeError unless *value* is an executor."""
    if not isinstance(value, Executor):
        raise TypeError(f"{name} must be a concurrent.futures.Executor, got {shown(value)}")


def check_clock(name: str, value: Any) -> None:
    """Raise TypeError unless *value* has the methods of a clock."""
    methods = (getattr(value, method, None) for method in ("now", "wait_until"))
    if isinstance(value, type) or not all(map(callable, methods)):
        raise TypeError(f"{name} must have now() and wait_until(), got {shown(value)}")


def check_name(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless *value* is a string that is not empty."""
    if not isinstance(value, str) or not value:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be a string that is not empty, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless *value* is True or False: a number may be a timeout in the wrong place."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_count(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """Return *value* if it is an integer of at least *least* and at most *most*; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return number


def check_number(name: str, value: Any, below: float | None = None) -> float:
    """Return *value* as a float if it is a real number of at least 0 and, if that is given, below *below*; not NaN."""
    number = _float(name, value)
    if not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {shown(value)}")
    if below is not None and number >= below:
        raise ValueError(f"{name} must be below {below:g}, got {shown(value)}")
    return number


def check_positive(name: str, value: Any) -> float:
    """Return *value* as a float if it is a finite real number above 0."""
    number = check_number(name, value, below=math.inf)
    if number == 0:
        raise ValueError(f"{name} must be above 0, got {shown(value)}")
    return number


def check_timeout(name: str, value: float | None) -> float:
    """Return *value* in seconds, infinite for None."""
    return math.inf if value is None else check_number(name, value)


def check_answer(name: str, value: Any) -> float:
    """Return *value*, which a user's code gave, as a float if it is a real number; NaN is none."""
    number = value if type(value) is float else _float(name, value)  # the former is quick: this is asked for each batch
    if number != number:
        raise TypeError(f"{name} must be a number, got nan")
    return number


def _float(name: str, value: Any) -> float:
    real = type(value) is int or isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf
