"""Parses policies, costs, times and rates from the command line. Policies are not evaluated as Python code."""

import ast
import math
import re
from collections.abc import Callable
from typing import Any

from microbatch import policies
from microbatch._basics.arguments import shown
from microbatch.policies.base import BatchingPolicy

__all__ = ["parse_cost", "parse_policy", "parse_rate", "parse_seconds"]

_POLICIES: dict[str, type[BatchingPolicy[Any]]] = {
    name: offered
    for name, offered in vars(policies).items()
    if name in policies.__all__ and isinstance(offered, type) and issubclass(offered, BatchingPolicy)
}
del _POLICIES["BatchingPolicy"]

_IN_A_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "\N{MICRO SIGN}s": 1e6, "\N{GREEK SMALL LETTER MU}s": 1e6}
_TIME = rf"(\d+(?:\.\d*)?|\.\d+)\s*({'|'.join(_IN_A_SECOND)})"
_SECONDS_OF = {"s": 1.0, "min": 60.0, "h": 3600.0}


def parse_policy(text: str) -> BatchingPolicy[Any]:
    """Return the policy that *text* describes as a Python expression.

    A policy without arguments needs no parentheses.

    >>> parse_policy("Size(64) | Interval(0.005) & Rate(5, per=60)")
    Size(64) | Interval(0.005) & Rate(5, per=60)
    >>> parse_policy("Natural")
    Natural()

    Raises:
        ValueError: The text does not describe a policy, or an argument of the policy is invalid.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _no_policy(text) from None
    try:
        return _read(tree, text)
    except RecursionError:
        raise _no_policy(text) from None


def _read(node: ast.expr, text: str) -> BatchingPolicy[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        first, second = _read(node.left, text), _read(node.right, text)
        return first | second if isinstance(node.op, ast.BitOr) else first & second
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.func.id not in _POLICIES:
        raise _no_policy(text)
    name = call.func.id
    try:
        return _POLICIES[name](*map(ast.literal_eval, call.args), **_named(call))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {str(error).removeprefix(f'{name}.__init__() ')}") from None


def _named(call: ast.Call) -> dict[str, Any]:
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}


def _no_policy(text: str) -> ValueError:
    return ValueError(f"must be made of {', '.join(sorted(_POLICIES))} with | and &, got {shown(text)}")


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
