"""Policies that decide by the keys of the jobs: how many batches of a key run, and which key is next."""

from microbatch._basics.arguments import check_count
from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.base import BuiltInPolicy, Hints, Window

__all__ = ["OldestFirst", "PerKey"]


class PerKey(BuiltInPolicy):
    """Lets at most *n* batches of the same key run at once.

    With the default *n*, the jobs of a key are processed in the order in which they were submitted, however many
    workers there are: a batch of a key is dispatched only when the previous one is over. Combine it with ``&``. Alone,
    it dispatches a batch as soon as a worker is free and fewer than *n* batches of the key run.

    >>> [PerKey().due(Window(count=1, key="a", key_in_flight=running)) for running in (0, 1)]
    [-inf, inf]

    `Batcher.flush` and `Batcher.shutdown` respect the limit, and so does a batch that is full.
    """

    _gates = 0
    hints: Hints = Hints(watches_flow=False, watches_keys=True)

    def __init__(self, n: int = 1) -> None:
        self.n: int = check_count("n", n)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NEVER if self._holds(window) else NOW

    def _holds(self, window: Window[object]) -> bool:
        """See `BatchingPolicy._holds`."""
        return window.key_in_flight >= self.n


class OldestFirst(BuiltInPolicy):
    """Dispatches the batch with the oldest job first, if several batches are due and no worker is free.

    Without it, the keys take turns. That is fair if each key is a tenant: a busy tenant can't delay the others. If keys
    are groups of similar jobs instead, such as texts of similar length, jobs of a large group would wait for much
    longer than those of a small one. Combine the policy with ``&``, because alone it is always due.

    >>> OldestFirst().due(Window(count=1)) == NOW
    True
    """

    _gates = 0
    hints: Hints = Hints(watches_flow=False, oldest_first=True)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return NOW
