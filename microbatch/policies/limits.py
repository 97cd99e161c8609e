"""Policies that limit how many jobs, or how much weight, a batch may hold."""

from microbatch._basics.arguments import check_count, check_positive
from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.base import BuiltInPolicy, Hints, Window

__all__ = ["Padded", "Size", "Weight"]


class Size(BuiltInPolicy):
    """Dispatches a batch when it holds *n* jobs, the most that it can hold (the max batch size).

    Alone, it waits for *n* jobs, however long that takes. A single caller that waits for each result before it submits
    the next job would then wait forever. Add ``| Interval(seconds)`` to limit the wait, or ``| Natural()`` to dispatch
    as soon as a worker is free.

    >>> [Size(3).due(Window(count=count)) for count in (2, 3)]
    [inf, -inf]
    >>> [Size(3).fits(Window(count=count), weight=1.0) for count in (2, 3)]
    [True, False]
    """

    _gates = 0

    def __init__(self, n: int) -> None:
        self.n: int = check_count("n", n)

    @property
    def hints(self) -> Hints:
        """See `BatchingPolicy.hints`."""
        return Hints(watches_flow=False, needs=self.n)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.count >= self.n else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return window.count < self.n

    def _room(self, window: Window[object]) -> float:
        """See `BatchingPolicy._room`."""
        return self.n - window.count


class Weight(BuiltInPolicy):
    """Dispatches a batch when its weight reaches *limit*, or when a waiting job no longer fits into it.

    A batch never weighs more than *limit*. The weight of a job comes from the *weigh* function of the batcher; without
    one, every job weighs 1. A job that alone weighs more than *limit* is rejected with `JobTooLarge`.

    Alone, it has no time limit: add ``| Interval(seconds)`` or ``| Natural()``, as for `Size`.

    >>> [Weight(10).due(Window(count=3, weight=weight, full=full)) for weight, full in ((9, False), (10, False), (9, True))]
    [inf, -inf, -inf]
    >>> [Weight(10).fits(Window(count=3, weight=9.0), weight=weight) for weight in (1.0, 1.5)]
    [True, False]
    """

    _gates = 0
    hints: Hints = Hints(watches_flow=False)

    def __init__(self, limit: float) -> None:
        self.limit: float = check_positive("limit", limit)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.full or window.weight >= self.limit else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return window.weight + weight <= self.limit


class Padded(BuiltInPolicy):
    """Limits the padded size of a batch: the number of its jobs times the weight of its heaviest job.

    It is for models that pad each input to the length of the longest one in its batch. Pass a *weigh* function that
    returns the length of an input. The policy dispatches a batch when no job as heavy as its heaviest one fits any
    more, or when a waiting job does not fit. A job that alone weighs more than *limit* is rejected with `JobTooLarge`.

    Alone, it has no time limit: add ``| Interval(seconds)`` or ``| Natural()``, as for `Size`.

    >>> [Padded(512).fits(Window(count=3, heaviest=128.0), weight=weight) for weight in (16.0, 128.0, 129.0)]
    [True, True, False]
    >>> [Padded(512).due(Window(count=count, heaviest=128.0)) for count in (3, 4)]
    [inf, -inf]
    """

    _gates = 0
    hints: Hints = Hints(watches_flow=False)

    def __init__(self, limit: float) -> None:
        self.limit: float = check_positive("limit", limit)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW if window.full or (window.count + 1) * window.heaviest > self.limit else NEVER

    def fits(self, window: Window[object], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return (window.count + 1) * max(window.heaviest, weight) <= self.limit
