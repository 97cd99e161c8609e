"""Policies and costs in words, as on a command line: read, never evaluated."""

import ast
import re
from typing import Any, Callable, Dict, Type

from microbatch import policies
from microbatch._policy import BatchingPolicy

__all__ = ["parse_cost", "parse_policy"]

_POLICIES: Dict[str, Type[BatchingPolicy[Any]]] = {
    name: offered
    for name, offered in vars(policies).items()
    if name in policies.__all__ and isinstance(offered, type) and issubclass(offered, BatchingPolicy)
}
del _POLICIES["BatchingPolicy"]

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_TIME = r"(\d+(?:\.\d*)?|\.\d+)(s|ms|us)"


def parse_policy(text: str) -> BatchingPolicy[Any]:
    """Return the policy that *text* says in the words of Python.

    >>> parse_policy("Size(64) | Interval(0.005) & Rate(5, per=60)")
    Size(64) | Interval(0.005) & Rate(5, per=60)

    Raises:
        ValueError: it is none; or of an argument, what is wrong with that.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _no_policy(text) from None
    return _read(tree, text)


def _read(node: ast.AST, text: str) -> BatchingPolicy[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        first, second = _read(node.left, text), _read(node.right, text)
        return first | second if isinstance(node.op, ast.BitOr) else first & second
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _POLICIES:
        raise _no_policy(text)
    try:
        positional = [ast.literal_eval(argument) for argument in node.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
        return _POLICIES[node.func.id](*positional, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{node.func.id}: {error}") from None


def _no_policy(text: str) -> ValueError:
    return ValueError(f"must be made of {', '.join(sorted(_POLICIES))} with | and &, got {text!r}")


def parse_cost(text: str) -> Callable[[int], float]:
    """Return what a batch costs, in seconds, as a function of its size.

    >>> parse_cost("5ms+20us")(100)
    0.007

    Raises:
        ValueError: *text* is not a time for each batch, or that and one for each job.
    """
    found = re.fullmatch(rf"\s*{_TIME}\s*(?:\+\s*{_TIME}\s*)?", text)
    if found is None:
        raise ValueError(f"must be a time for each batch and one for each job, as in 5ms+20us, got {text!r}")
    batch, unit, job, unit_of_job = found.groups()
    fixed = float(batch) * _UNITS[unit]
    each = float(job) * _UNITS[unit_of_job] if job else 0.0
    return lambda size: fixed + each * size
