"""Checks of arguments. Each error has the form ``name must be ..., got ...``."""

import math
import reprlib
import sys
from concurrent.futures import Executor
from functools import partial
from types import CodeType
from typing import Any

MOST_THREADS = 10_000
"""The maximum number of worker threads. A larger number is a mistake, and could bring the machine down."""

_CO_COROUTINE, _CO_ASYNC_GENERATOR = 0x80, 0x200  # as in `inspect`, whose import takes long

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = 100


def shown(value: Any) -> str:
    """Return the repr of *value* for a message, shortened if it is long. Never raises, even if the repr does."""
    try:
        return _brief.repr(value)
    except Exception:  # for example, for an integer with too many digits
        return object.__repr__(value)


def check_callable(name: str, value: Any) -> None:
    """Raise TypeError unless *value* is callable and not asynchronous."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {shown(value)}")
    if _is_asynchronous(value) or _is_asynchronous(getattr(value, "__call__", None)):
        hint = ": wrap it in microbatch.aio.on_loop" if name == "processor" else ""
        raise TypeError(f"{name} must be a plain function, got the asynchronous {shown(value)}{hint}")


def _is_asynchronous(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and code.co_flags & (_CO_COROUTINE | _CO_ASYNC_GENERATOR):
        return True
    return hasattr(function, "_is_coroutine_marker") and sys.modules["inspect"].iscoroutinefunction(function)


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
    """Raise TypeError or ValueError unless *value* is a non-empty string."""
    if not isinstance(value, str) or not value:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be a non-empty string, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless *value* is True or False. A number is refused, because it may be a misplaced timeout."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_count(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """Return *value* if it is an integer from *least* to *most*. A bool is not an integer here."""
    if type(value) is not int and not _is_a(value, "Integral"):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return number


def check_number(name: str, value: Any, below: float | None = None) -> float:
    """Return *value* as a float if it is a real number of at least 0, not NaN, and below *below* if that is given."""
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
    """Return *value* as a float of seconds, or infinity for None."""
    return math.inf if value is None else check_number(name, value)


def check_answer(name: str, value: Any) -> float:
    """Return *value*, which code of the user returned, as a float if it is a real number and not NaN."""
    number = value if type(value) is float else _float(name, value)  # a shortcut, because this runs for each batch
    if number != number:
        raise TypeError(f"{name} must be a number, got nan")
    return number


def _float(name: str, value: Any) -> float:
    if type(value) not in (int, float) and not _is_a(value, "Real"):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # an integer that is too large for a float
        return math.inf if value > 0 else -math.inf


def _is_a(value: Any, kind: str) -> bool:
    import numbers  # few values need it

    return isinstance(value, getattr(numbers, kind)) and not isinstance(value, bool)
