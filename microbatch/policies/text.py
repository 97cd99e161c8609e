"""Creates a policy from text, such as a setting or an argument of a command, without evaluating it as Python code.

This module is imported only when a program needs it, because it takes long to import.
"""

import ast
import inspect
from typing import Any

from microbatch._basics.arguments import shown
from microbatch.policies.adaptive import Adaptive
from microbatch.policies.base import BatchingPolicy
from microbatch.policies.best_size import BestSize
from microbatch.policies.congestion import Congestion
from microbatch.policies.keys import OldestFirst, PerKey
from microbatch.policies.limits import Padded, Size, Weight
from microbatch.policies.load import AllWaiting, Natural
from microbatch.policies.timing import FixedWindow, InTime, Interval, Rate, Session

__all__ = ["parse_policy"]

_POLICIES: dict[str, type[BatchingPolicy[Any]]] = {
    policy.__name__: policy
    for policy in (
        Adaptive,
        AllWaiting,
        BestSize,
        Congestion,
        FixedWindow,
        InTime,
        Interval,
        Natural,
        OldestFirst,
        Padded,
        PerKey,
        Rate,
        Session,
        Size,
        Weight,
    )
}


def parse_policy(text: str) -> BatchingPolicy[Any]:
    """Return the policy that *text* describes.

    The text is what you would write in Python, and also what the ``repr`` of a policy looks like. All times are in
    seconds. A policy without arguments needs no parentheses.

    >>> parse_policy("Size(64) | Interval(0.005) & Rate(5, per=60)")
    Size(64) | Interval(0.005) & Rate(5, per=60)
    >>> parse_policy("Natural")
    Natural()
    >>> parse_policy("Size(64) | Size(0)")
    Traceback (most recent call last):
    ValueError: can't create the policy 'Size(0)': n must be at least 1, got 0

    Args:
        text: One policy, or several that are combined with ``|``, ``&`` and parentheses. Only the policies of
            microbatch can be named, and each argument must be a number.

    Raises:
        ValueError: The text does not describe a policy, or an argument of a policy is invalid. The message shows the
            part that is wrong.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {shown(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _no_policy(text) from None
    try:
        return _read(tree.body)
    except RecursionError:
        raise _no_policy(text) from None


def _read(node: ast.expr) -> BatchingPolicy[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _read(node.left) | _read(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _read(node.left) & _read(node.right)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.func.id not in _POLICIES:
        raise _no_policy(ast.unparse(node))
    try:
        return _call(_POLICIES[call.func.id], call)
    except (TypeError, ValueError) as error:
        raise ValueError(f"can't create the policy {shown(ast.unparse(node))}: {error}") from None


def _call(policy: type[BatchingPolicy[Any]], call: ast.Call) -> BatchingPolicy[Any]:
    named = {keyword.arg or "**": _number(keyword.value) for keyword in call.keywords}
    if len(named) < len(call.keywords):
        raise TypeError("an argument is given twice")
    # The errors of `bind` are shorter than those of a call, and don't count `self` as an argument.
    arguments = inspect.signature(policy).bind(*map(_number, call.args), **named)
    return policy(*arguments.args, **arguments.kwargs)


def _number(node: ast.expr) -> Any:
    """Return the value of a literal. The policy checks that it is a number."""
    try:
        return ast.literal_eval(node)
    except (TypeError, ValueError):
        raise ValueError(f"an argument must be a number, got {shown(ast.unparse(node))}") from None


def _no_policy(text: str) -> ValueError:
    return ValueError(f"a policy must be made of {', '.join(_POLICIES)} with | and &, got {shown(text)}")
