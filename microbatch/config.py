"""A policy from the environment, for programs whose settings belong to where they run.

>>> policy_from_env({"MICROBATCH_BATCH_CAPACITY": "64", "MICROBATCH_BATCH_TIME_WINDOW": "5"})
Size(64) | Interval(0.005)
>>> policy_from_env({"DB_STRATEGY": "session", "DB_BATCH_TIME_WINDOW": "250"}, prefix="DB_")
Session(0.25)
>>> policy_from_env({})
Size(100) | Natural()
"""

import importlib
import os
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from microbatch._basics.arguments import shown
from microbatch.policies import DEFAULT_POLICY, Adaptive, FixedWindow, Interval, Natural, Rate, Session, Size, Weight
from microbatch.policies.base import BatchingPolicy

__all__ = ["policy_from_env"]


def policy_from_env(environ: Mapping[str, str] = os.environ, prefix: str = "MICROBATCH_") -> BatchingPolicy[Any]:
    """Return the policy that the variables say; `DEFAULT_POLICY` if there are none. One that is empty counts as none.

    ======================  ==========================================================================================
    ``STRATEGY``            ``size``, ``interval``, ``size-or-interval``, ``natural``, ``fixed-window``, ``session``,
                            ``weight``, ``adaptive``, or ``package.module:factory`` for a policy of your own. Without
                            it, what the two next numbers say: both of them, or the one that is there.
    ``BATCH_CAPACITY``      the most jobs in a batch, with any strategy but ``interval``
    ``BATCH_TIME_WINDOW``   milliseconds: how long a batch waits for more jobs, at most; from one batch to the next, for
                            ``fixed-window``; from the last job on, for ``session``
    ``BATCH_WEIGHT``        the most weight in a batch, for ``weight``
    ``BATCH_TARGET_TIME``   milliseconds in which a batch is to be done, for ``adaptive``
    ``RATE_BATCHES``        at most so many batches, with any strategy,
    ``RATE_TIME_WINDOW``    in any so many milliseconds
    ======================  ==========================================================================================

    Args:
        environ: where they are looked up.
        prefix: what their names begin with; may be empty.

    Raises:
        ValueError: one has a bad value, or a strategy lacks one; with its name, what it must be, and what came.
        Exception: whatever the factory raises.
    """
    if not isinstance(environ, Mapping):
        raise TypeError(f"environ must be a mapping, got {shown(environ)}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {shown(prefix)}")
    settings = _Settings(environ, prefix)
    strategy = settings.text("STRATEGY")
    policy = settings.own(strategy) if ":" in strategy else _policy(strategy.lower(), settings)
    if settings.text("RATE_BATCHES") or settings.text("RATE_TIME_WINDOW"):
        policy = policy & Rate(settings.count("RATE_BATCHES"), per=settings.seconds("RATE_TIME_WINDOW", least=1))
    return policy


class _Settings:
    def __init__(self, environ: Mapping[str, str], prefix: str) -> None:
        self._environ = environ
        self._prefix = prefix

    def text(self, name: str) -> str:
        """Return the value of a variable, empty where there is none."""
        return self._environ.get(self._prefix + name, "").strip()

    def bad(self, name: str, must_be: str) -> ValueError:
        """Return the error that names the variable, what it must be, and what came."""
        text = self._environ.get(self._prefix + name)
        return ValueError(f"{self._prefix}{name} must be {must_be}, got {'nothing' if text is None else repr(text)}")

    def number(self, name: str, of: str, least: int) -> int:
        text = self.text(name)
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise self.bad(name, f"{of} of at least {least}")
        return int(text)

    def count(self, name: str) -> int:
        return self.number(name, "an integer", 1)

    def seconds(self, name: str, least: int = 0) -> float:
        return self.number(name, "an integer of milliseconds", least) / 1000

    def own(self, target: str) -> BatchingPolicy[Any]:
        module, _, path = target.partition(":")
        try:
            factory: Any = reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise self.bad("STRATEGY", "a strategy, or package.module:factory that can be imported") from error
        policy = factory()
        if not isinstance(policy, BatchingPolicy):
            raise self.bad("STRATEGY", f"a function that returns a BatchingPolicy, not a {type(policy).__name__}")
        return policy


def _policy(strategy: str, settings: _Settings) -> BatchingPolicy[Any]:
    if not strategy:
        numbers = [name for name in ("BATCH_CAPACITY", "BATCH_TIME_WINDOW") if settings.text(name)]
        if not numbers:
            return DEFAULT_POLICY
        strategy = "size-or-interval" if len(numbers) == 2 else "size" if "BATCH_CAPACITY" in numbers else "interval"
    if strategy not in _STRATEGIES:
        raise settings.bad("STRATEGY", f"one of {', '.join(_STRATEGIES)}, or package.module:factory")
    return _STRATEGIES[strategy](settings)


def _size(settings: _Settings) -> BatchingPolicy[Any]:
    return Size(settings.count("BATCH_CAPACITY"))


def _interval(settings: _Settings) -> BatchingPolicy[Any]:
    return Interval(settings.seconds("BATCH_TIME_WINDOW"))


def _bounded(policy: BatchingPolicy[Any], settings: _Settings) -> BatchingPolicy[Any]:
    """Return the policy with a limit to the jobs, if one is set."""
    return _size(settings) | policy if settings.text("BATCH_CAPACITY") else policy


def _weight(settings: _Settings) -> BatchingPolicy[Any]:
    policy: BatchingPolicy[Any] = Weight(settings.count("BATCH_WEIGHT"))
    return _bounded(policy | _interval(settings) if settings.text("BATCH_TIME_WINDOW") else policy, settings)


def _adaptive(settings: _Settings) -> BatchingPolicy[Any]:
    most = settings.count("BATCH_CAPACITY") if settings.text("BATCH_CAPACITY") else 1_000
    policy = Adaptive(settings.seconds("BATCH_TARGET_TIME", least=1), most=most)
    return policy | (_interval(settings) if settings.text("BATCH_TIME_WINDOW") else Natural())


_STRATEGIES: dict[str, Callable[[_Settings], BatchingPolicy[Any]]] = {
    "size": _size,
    "interval": _interval,
    "size-or-interval": lambda settings: _size(settings) | _interval(settings),
    "natural": lambda settings: _bounded(Natural(), settings) if settings.text("BATCH_CAPACITY") else DEFAULT_POLICY,
    "fixed-window": lambda settings: _bounded(FixedWindow(settings.seconds("BATCH_TIME_WINDOW", least=1)), settings),
    "session": lambda settings: _bounded(Session(settings.seconds("BATCH_TIME_WINDOW")), settings),
    "weight": _weight,
    "adaptive": _adaptive,
}
