"""Policies that decide by the keys of the jobs, and keys for jobs of similar lengths."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from microbatch._basics.arguments import check_callable, check_count, check_number, shown
from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.base import BuiltInPolicy, Hints, Window

__all__ = ["OldestFirst", "PerKey", "length_buckets"]

Job = TypeVar("Job")

_LONGEST = 1e100
"""Lengths must be below this, because the bound of their bucket could be too large for a float."""


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
    _limits = frozenset(["PerKey"])
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


def length_buckets(length: Callable[[Job], float] = len, ratio: float = 2.0) -> Callable[[Job], float]:  # type: ignore[assignment]
    """Return a *key* function for a `Batcher`, so that only jobs of similar lengths share a batch.

    It is for models that pad each input to the longest one in its batch: no input is padded to more than *ratio* times
    its length. The key of a job is the upper bound of its bucket. With the default *ratio*, the buckets are the lengths
    up to 1, up to 2, up to 4, up to 8, and so on. Below 1, they are those up to 1/2, up to 1/4, and so on. Jobs of
    length 0 have a bucket of their own.

    >>> key = length_buckets()
    >>> [key("a" * length) for length in (0, 1, 2, 3, 4, 5, 64, 65)]
    [0.0, 1.0, 2.0, 4.0, 4.0, 8.0, 64.0, 128.0]

    Add ``& OldestFirst()`` to the policy, so that long jobs don't wait for many turns of the short ones. A batch may
    still hold too many jobs: limit it, for example with `Padded`.

    >>> from microbatch import Batcher, Natural, Padded
    >>> policy = (Padded(256) | Natural()) & OldestFirst()
    >>> with Batcher[str, int](lambda texts: [len(texts)] * len(texts), policy, key=key, weigh=len) as batcher:
    ...     sorted(result.value for result in batcher.map(["a text", "a word", "a much longer text"]))
    [1, 2, 2]

    The more buckets there are, the fewer jobs meet in one. So at low load, a large *ratio* fills batches better.

    Args:
        length: Returns the length of a job, a number from 0 to 1e100. If it is another number, `Batcher.submit` raises
            ValueError.
        ratio: The upper bound of a bucket divided by that of the next smaller one. It must be above 1.
    """
    check_callable("length", length)
    if check_number("ratio", ratio, below=NEVER) <= 1:
        raise ValueError(f"ratio must be above 1, got {shown(ratio)}")
    return partial(_bucket, length, float(ratio))


def _bucket(length: Callable[[Any], float], ratio: float, job: Any) -> float:
    """Return the lowest power of *ratio* that is not below the length of *job*, or 0 if that is 0."""
    number = check_number("the length of a job", length(job), below=_LONGEST)
    if not number:
        return 0.0
    power = math.ceil(math.log(number) / math.log(ratio))
    while ratio**power < number:  # the quotient is rounded
        power += 1
    while ratio ** (power - 1) >= number:
        power -= 1
    return ratio**power
