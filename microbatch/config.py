"""Creates a policy from environment variables, so that you can tune a program where it is deployed.

>>> policy_from_env({"MICROBATCH_BATCH_CAPACITY": "64", "MICROBATCH_BATCH_TIME_WINDOW": "5"})
Size(64) | Interval(0.005)
>>> policy_from_env({"DB_STRATEGY": "session", "DB_BATCH_TIME_WINDOW": "250"}, prefix="DB_")
Session(0.25)
>>> policy_from_env({"MICROBATCH_STRATEGY": "Weight(1000) | Interval(0.5)"})
Weight(1000) | Interval(0.5)
>>> policy_from_env({})
BestSize(100) | Natural()
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from microbatch._basics.arguments import check_callable, shown
from microbatch.policies import DEFAULT_POLICY, Adaptive, FixedWindow, Interval, Natural, Rate, Session, Size, Weight
from microbatch.policies.base import BatchingPolicy

__all__ = ["policy_from_env"]


def policy_from_env(environ: Mapping[str, str] = os.environ, prefix: str = "MICROBATCH_") -> BatchingPolicy[Any]:
    """Return the policy that environment variables describe, or `DEFAULT_POLICY` if none of them is set.

    A variable with an empty value counts as not set. Except in a policy as text, all numbers are integers, and all
    times are in milliseconds:

    ======================  ==========================================================================================
    ``STRATEGY``            one of the names ``size``, ``interval``, ``size-or-interval``, ``natural``,
                            ``fixed-window``, ``session``, ``weight`` and ``adaptive``, in lower or upper case; or a
                            policy as text, such as ``Size(64) | Natural()``; or ``package.module:factory``, a function
                            that returns your own policy. The default depends on which of the next two variables are
                            set: ``size``, ``interval`` or ``size-or-interval``.
    ``BATCH_CAPACITY``      the maximum number of jobs in a batch, for all names except ``interval``. ``natural`` has a
                            default of 100, as `BestSize`, and ``adaptive`` one of 1,000.
    ``BATCH_TIME_WINDOW``   for ``fixed-window``, the time from one batch to the next; for ``session``, the time after
                            the newest job; for ``interval``, ``size-or-interval``, ``weight`` and ``adaptive``, the
                            longest time that a batch waits for more jobs
    ``BATCH_WEIGHT``        the maximum weight of a batch, for ``weight``
    ``BATCH_TARGET_TIME``   the time that a batch may take, for ``adaptive``
    ``RATE_BATCHES``        the maximum number of batches in any ``RATE_TIME_WINDOW``, for all strategies
    ``RATE_TIME_WINDOW``    the time for ``RATE_BATCHES``
    ======================  ==========================================================================================

    For policies as text, see `microbatch.policies.text.parse_policy`. Their times are in seconds. A name has
    precedence: ``Natural`` is the name ``natural``, which is limited to 100 jobs, and ``Natural()`` is the policy. With
    a policy as text or a factory, only the two variables of the rate are read.

    Args:
        environ: The variables.
        prefix: The prefix of their names. It may be empty.

    Raises:
        ValueError: A variable has an invalid value, or the strategy needs a variable that is not set. The message names
            the variable, what it must be and its value.
        Exception: Whatever exception the factory raises.
    """
    if not isinstance(environ, Mapping):
        raise TypeError(f"environ must be a mapping, got {shown(environ)}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {shown(prefix)}")
    settings = _Settings(environ, prefix)
    strategy = settings.text("STRATEGY")
    policy = _policy(strategy, settings)
    if settings.text("RATE_BATCHES") or settings.text("RATE_TIME_WINDOW"):
        policy = policy & Rate(settings.number("RATE_BATCHES"), per=settings.seconds("RATE_TIME_WINDOW", least=1))
    return policy


class _Settings:
    def __init__(self, environ: Mapping[str, str], prefix: str) -> None:
        self._environ = environ
        self._prefix = prefix

    def text(self, name: str) -> str:
        """Return the value of a variable without surrounding spaces, or an empty string if it is not set."""
        return self._environ.get(self._prefix + name, "").strip()

    def bad(self, name: str, must_be: str) -> ValueError:
        """Return an error that names the variable, what it must be, and its value."""
        text = self._environ.get(self._prefix + name)
        return ValueError(f"{self._prefix}{name} must be {must_be}, got {'nothing' if text is None else repr(text)}")

    def number(self, name: str, kind: str = "an integer of", least: int = 1) -> int:
        text = self.text(name)
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise self.bad(name, f"{kind} at least {least}")
        return int(text)

    def seconds(self, name: str, least: int = 0) -> float:
        return self.number(name, "a time in whole milliseconds,", least) / 1000

    def parsed(self, text: str) -> BatchingPolicy[Any]:
        """Return the policy that *text* describes. The caller has checked that it is not the name of a strategy."""
        from microbatch.policies.text import parse_policy  # few programs need it

        try:
            return parse_policy(text)
        except ValueError as error:
            if text.replace("-", "_").isidentifier():  # more likely a misspelled name than a policy
                others = "package.module:factory, or a policy such as Size(64) | Natural()"
                raise self.bad("STRATEGY", f"one of {', '.join(_STRATEGIES)}, {others}") from None
            raise ValueError(f"{self._prefix}STRATEGY: {error}") from None

    def own(self, target: str) -> BatchingPolicy[Any]:
        import pkgutil  # few programs need it

        try:
            factory: Any = pkgutil.resolve_name(target)
            check_callable("factory", factory)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise self.bad("STRATEGY", "a strategy, or package.module:factory that can be imported") from error
        policy = factory()
        if not isinstance(policy, BatchingPolicy):
            raise self.bad("STRATEGY", f"a factory that returns a BatchingPolicy (it returned {shown(policy)})")
        return policy


def _policy(strategy: str, settings: _Settings) -> BatchingPolicy[Any]:
    if not strategy:
        numbers = [name for name in ("BATCH_CAPACITY", "BATCH_TIME_WINDOW") if settings.text(name)]
        if not numbers:
            return DEFAULT_POLICY
        strategy = "size-or-interval" if len(numbers) == 2 else "size" if "BATCH_CAPACITY" in numbers else "interval"
    if strategy.lower() in _STRATEGIES:
        return _STRATEGIES[strategy.lower()](settings)
    return settings.own(strategy) if ":" in strategy and "(" not in strategy else settings.parsed(strategy)


def _size(settings: _Settings) -> BatchingPolicy[Any]:
    return Size(settings.number("BATCH_CAPACITY"))


def _interval(settings: _Settings) -> BatchingPolicy[Any]:
    return Interval(settings.seconds("BATCH_TIME_WINDOW"))


def _bounded(policy: BatchingPolicy[Any], settings: _Settings) -> BatchingPolicy[Any]:
    """Return *policy*, with a maximum number of jobs if one is set."""
    return _size(settings) | policy if settings.text("BATCH_CAPACITY") else policy


def _weight(settings: _Settings) -> BatchingPolicy[Any]:
    policy: BatchingPolicy[Any] = Weight(settings.number("BATCH_WEIGHT"))
    return _bounded(policy | _interval(settings) if settings.text("BATCH_TIME_WINDOW") else policy, settings)


def _adaptive(settings: _Settings) -> BatchingPolicy[Any]:
    most = settings.number("BATCH_CAPACITY") if settings.text("BATCH_CAPACITY") else 1_000
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
