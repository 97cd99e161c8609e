"""Policies that go by the clock."""

import sys

from microbatch._basics.arguments import check_count, check_number, check_positive
from microbatch._basics.clock import NOW
from microbatch.policies.base import GATES, BatchingPolicy, Window, exact, policy_repr

__all__ = ["FixedWindow", "Interval", "Rate", "Session"]


class Interval(BatchingPolicy[object]):
    """A batch goes *seconds* after its first job was submitted; later jobs do not push that back.

    ``Interval(0)`` sends as soon as a worker is free, with all that has come by then.

    >>> Interval(0.5).due(Window(count=2, opened=10.0, newest=10.4))
    10.5
    """

    watches_flow = False

    def __init__(self, seconds: float) -> None:
        self.seconds = check_number("seconds", seconds)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + self.seconds

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return policy_repr(self, Interval, exact(self.seconds))


class FixedWindow(BatchingPolicy[object]):
    """A batch goes at the next multiple of *seconds* since the batcher started: so many times a minute, like a clock.

    >>> [FixedWindow(5).due(Window(started=100.0, opened=opened)) for opened in (101.0, 104.5, 105.0, 105.1)]
    [105.0, 105.0, 105.0, 110.0]
    """

    watches_flow = False

    def __init__(self, seconds: float) -> None:
        self.seconds = check_positive("seconds", seconds)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + (window.started - window.opened) % self.seconds

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return policy_repr(self, FixedWindow, exact(self.seconds))


class Session(BatchingPolicy[object]):
    """A batch goes *gap* seconds after its newest job: when a burst is over. Each job pushes that back, so bound it.

    >>> (Session(0.5) | Interval(3)).due(Window(count=7, opened=10.0, newest=12.0))
    12.5
    >>> (Session(0.5) | Interval(3)).due(Window(count=8, opened=10.0, newest=12.75))
    13.0
    """

    watches_flow = False

    def __init__(self, gap: float) -> None:
        self.gap = check_number("gap", gap)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.newest + self.gap

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return policy_repr(self, Session, exact(self.gap))


class Rate(BatchingPolicy[object]):
    """A batch goes not before fewer than *n* went in the last *per* seconds, under all keys together. Compose it with ``&``.

    >>> [Rate(2, per=60).due(Window(count=1, sent=sent)) for sent in ([], [30.0], [10.0, 30.0], [10.0, 30.0, 80.0])]
    [-inf, -inf, 70.0, 90.0]

    A flush keeps to it, a shutdown does not.
    """

    def __init__(self, n: int, per: float) -> None:
        self.n = check_count("n", n)
        self.per = check_positive("per", per)
        self.history = max(self.n, BatchingPolicy.history)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return self.earliest(window)

    def earliest(self, window: Window[object]) -> float:
        """See `BatchingPolicy.earliest`."""
        return NOW if len(window.sent) < self.n else window.sent[-self.n] + self.per

    def wants(self, window: Window[object]) -> int:
        """See `BatchingPolicy.wants`."""
        return sys.maxsize

    def __repr__(self) -> str:
        return policy_repr(self, Rate, f"{self.n}, per={exact(self.per)}")


GATES.update({Interval: 0, FixedWindow: 0, Session: 0, Rate: 1})
