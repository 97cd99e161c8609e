"""What an argument must be, said when it is not: ``name must be ..., got ...``."""

import math
import numbers
from typing import Any, Optional


def check_callable(name: str, value: Any) -> None:
    """Raise TypeError unless *value* can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return *value* if it is an integer of at least *least*; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """Return *value* as a float if it is a real number of at least 0, and not NaN."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        number = math.inf if value > 0 else -math.inf
    if not number >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return number


def check_timeout(name: str, value: Optional[float]) -> float:
    """Return *value* in seconds, infinite for None."""
    return math.inf if value is None else check_number(name, value)
