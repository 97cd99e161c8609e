"""Policies that decide by the time: when jobs came, when they expire, or when batches were dispatched."""

from collections import deque

from microbatch._basics.arguments import check_count, check_number, check_positive
from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.base import BatchReport, BuiltInPolicy, Hints, Window

__all__ = ["FixedWindow", "InTime", "Interval", "Rate", "Session"]

_WAKE_UP = 0.005
"""How many seconds late the batcher thread may wake up if other threads keep the CPU busy."""


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
    ``| Interval(seconds)`` or ``| Size(n)`` to limit that.

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
    _limits = frozenset(["Rate"])

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


class InTime(BuiltInPolicy):
    """Dispatches a batch early enough to be done before any of its jobs expires (its deadline).

    The batch is due when the time until its first job expires is as long as a batch takes, plus *slack*. How long a
    batch takes is learned: it is the longest service time of the last ten batches, but at least 5 ms, because a thread
    may wake up late. A batch that is larger than all of them is expected to take longer in proportion. Before the first
    batch is done, a batch with a job that expires is due immediately.

    A job expires if it was submitted with *expires_in*. The policy looks only at the open batch, so a job that does not
    fit into it has to wait until that batch is dispatched. Combine the policy with ``|``, because it never dispatches a
    batch in which no job expires:

    >>> from microbatch import BatchInfo
    >>> policy = Interval(60) | InTime(slack=0.1)
    >>> policy.observe(BatchReport(BatchInfo(1, 1, 1.0, None, ""), service_time=0.4, failed=0))
    >>> [policy.due(Window(count=1, opened=10.0, expires=expires)) for expires in (12.0, 80.0, NEVER)]
    [11.5, 70.0, 70.0]

    Args:
        slack: How many seconds earlier a batch is dispatched, in case it takes longer than those before it, or no
            worker is free.
    """

    _gates = 0

    def __init__(self, slack: float = 0.0) -> None:
        self.slack: float = check_number("slack", slack)
        self._time = NEVER  # how long a batch of at most `_size` jobs takes
        self._size = 1
        self._last: deque[tuple[int, float]] = deque(maxlen=10)  # the size and the service time of each batch

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        if window.expires == NEVER:
            return NEVER
        return window.expires - self._time * max(1.0, window.count / self._size) - self.slack

    def observe(self, report: BatchReport) -> None:
        """Learn from the size and the service time of a batch."""
        before = self._time, self._size
        if 0 <= report.service_time < NEVER:
            self._last.append((report.batch.size, report.service_time))
            sizes, times = zip(*self._last)
            self._size, self._time = max(sizes), max(_WAKE_UP, *times)
        self._learned += (self._time, self._size) != before
