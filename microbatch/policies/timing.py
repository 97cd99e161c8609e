"""Policies that decide by the time: when jobs came, or when batches were dispatched."""

from microbatch._basics.arguments import check_count, check_number, check_positive
from microbatch._basics.clock import NOW
from microbatch.policies.base import BuiltInPolicy, Hints, Window

__all__ = ["FixedWindow", "Interval", "Rate", "Session"]


class Interval(BuiltInPolicy):
    """Dispatches a batch *seconds* after its first job was submitted (the linger time). Later jobs do not delay it.

    ``Interval(0)`` dispatches a batch as soon as a worker is free.

    >>> Interval(0.5).due(Window(count=2, opened=10.0, newest=10.4))
    10.5
    """

    _gates = 0
    hints: Hints = Hints(watches_flow=False)

    def __init__(self, seconds: float) -> None:
        self.seconds: float = check_number("seconds", seconds)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + self.seconds


class FixedWindow(BuiltInPolicy):
    """Dispatches a batch at the next multiple of *seconds* since the batcher started.

    With ``FixedWindow(5)``, the batches are due 5, 10, 15 seconds after the start, and so on. If a job is submitted
    exactly at such a moment, its batch is due immediately.

    >>> [FixedWindow(5).due(Window(started=100.0, opened=opened)) for opened in (101.0, 104.5, 105.0, 105.1)]
    [105.0, 105.0, 105.0, 110.0]
    """

    _gates = 0
    hints: Hints = Hints(watches_flow=False)

    def __init__(self, seconds: float) -> None:
        self.seconds: float = check_positive("seconds", seconds)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + (window.started - window.opened) % self.seconds


class Session(BuiltInPolicy):
    """Dispatches a batch *gap* seconds after its newest job was submitted, that is, when a burst is over (debounce).

    Each new job restarts the wait, so a steady stream of jobs can keep the batch open forever. Add
    ``| Interval(seconds)`` or ``| Size(n)`` to bound it.

    >>> (Session(0.5) | Interval(3)).due(Window(count=7, opened=10.0, newest=12.0))
    12.5
    >>> (Session(0.5) | Interval(3)).due(Window(count=8, opened=10.0, newest=12.75))
    13.0
    """

    _gates = 0
    hints: Hints = Hints(watches_flow=False)

    def __init__(self, gap: float) -> None:
        self.gap: float = check_number("gap", gap)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.newest + self.gap


class Rate(BuiltInPolicy):
    """Dispatches a batch as soon as fewer than *n* batches were dispatched in the last *per* seconds (a rate limit).

    It counts the batches of all keys of the batcher together. Combine it with ``&``, because ``|`` would let the other
    policy dispatch batches above the limit.

    >>> [Rate(2, per=60).due(Window(count=1, sent=sent)) for sent in ([], [30.0], [10.0, 30.0], [10.0, 30.0, 80.0])]
    [-inf, -inf, 70.0, 90.0]

    `Batcher.flush` respects the limit. `Batcher.shutdown` does not.
    """

    _gates = 1

    def __init__(self, n: int, per: float) -> None:
        self.n: int = check_count("n", n)
        self.per: float = check_positive("per", per)

    @property
    def hints(self) -> Hints:
        """See `BatchingPolicy.hints`."""
        return Hints(history=max(self.n, Hints.history))

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return self._earliest(window)

    def _earliest(self, window: Window[object]) -> float:
        """See `BatchingPolicy._earliest`."""
        return NOW if len(window.sent) < self.n else window.sent[-self.n] + self.per
