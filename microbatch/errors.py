"""The exceptions that microbatch defines.

::

    MicrobatchError
      Rejected                           the job was not accepted
        BacklogFull    (queue.Full)        the queue is full
        JobTooLarge    (ValueError)        the job does not fit into any batch
        BatcherClosed  (RuntimeError)      the batcher is shut down
      JobExpired       (TimeoutError)      the job was not dispatched in time
      JobDropped                         the job had to make room for newer ones
      ForkedError      (RuntimeError)      the job or executor belongs to the parent process
      ResultCountError (ValueError)        the processor returned too many or too few results

The standard exception in parentheses is a base class too, so an ``except`` clause can name either.
"""

# Each class has the values of its message as attributes, and the same values in `args`. So exceptions can be copied and
# pickled.

import queue
import reprlib
from collections.abc import Hashable

__all__ = [
    "BacklogFull",
    "BatcherClosed",
    "ForkedError",
    "JobDropped",
    "JobExpired",
    "JobTooLarge",
    "MicrobatchError",
    "Rejected",
    "ResultCountError",
]


class MicrobatchError(Exception):
    """Base class of all exceptions that microbatch defines."""


class Rejected(MicrobatchError):
    """Base class of the exceptions for jobs that the batcher does not accept.

    `Batcher.submit` raises them. There is then no future, and the job is never processed. In a few cases, a future
    fails with one of them instead: see `JobTooLarge` and `BatcherClosed`.
    """


class BacklogFull(Rejected, queue.Full):
    """The queue was full, and was still full when the *timeout* of `Batcher.submit` ran out.

    Attributes:
        limit: The limit that was reached.
        bound: The name of that limit: ``"max_pending"``, ``"max_pending_weight"`` or ``"max_pending_per_key"``.
        key: The key of the job, if *bound* is ``"max_pending_per_key"``, otherwise None.
    """

    def __init__(self, limit: float, bound: str = "max_pending", key: Hashable = None) -> None:
        super().__init__(limit, bound, key)
        self.limit = limit
        self.bound = bound
        self.key = key

    @property
    def max_pending(self) -> float:
        """The same as *limit*."""
        return self.limit

    def __str__(self) -> str:
        return f"the queue is full{_bound(self)}"


def _bound(error: "BacklogFull | JobDropped") -> str:
    key = f" for key {reprlib.repr(error.key)}" if error.bound == "max_pending_per_key" else ""
    return f"{key}: {error.bound} is {_plain(error.limit)}"


def _plain(number: float | None) -> str:
    """Return a number as text. It is not rounded: otherwise, a weight just above a limit would look equal to it."""
    return str(number).removesuffix(".0")


class JobTooLarge(Rejected, ValueError):
    """The job does not fit into any batch of the policy, or is heavier than *max_pending_weight*.

    If the batcher has a *weigh* function, `Batcher.submit` raises it. Otherwise, the future of the job fails with it.

    Attributes:
        weight: The weight of the job.
        limit: The lowest of the limits that the job exceeds, or None if the policy states no limit.
        place: What the job does not fit into: ``"any batch"`` or ``"the queue"``.
    """

    def __init__(self, weight: float, limit: float | None = None, place: str = "any batch") -> None:
        super().__init__(weight, limit, place)
        self.weight = weight
        self.limit = limit
        self.place = place

    def __str__(self) -> str:
        limit = "" if self.limit is None else f": the limit is {_plain(self.limit)}"
        return f"a job of weight {_plain(self.weight)} does not fit into {self.place}{limit}"


class BatcherClosed(Rejected, RuntimeError):
    """The batcher was shut down before it could accept the job, or before the job was done.

    `Batcher.submit` raises it after a shutdown. A future fails with it if its job was not done when the threads of the
    batcher ended, for example because the interpreter exited and *exit_timeout* ran out.
    """


class JobExpired(MicrobatchError, TimeoutError):
    """The job was not dispatched within its *expires_in* seconds, so it is never processed.

    Attributes:
        expires_in: The time that the job was allowed to wait for a worker, in seconds.
    """

    def __init__(self, expires_in: float) -> None:
        super().__init__(expires_in)
        self.expires_in = expires_in

    def __str__(self) -> str:
        return f"the job was not dispatched within {self.expires_in:g} s"


class JobDropped(MicrobatchError):
    """The job had to make room for newer ones, because the batcher has *drop_oldest*. It is never processed.

    Attributes:
        limit: The limit that was exceeded.
        bound: The name of that limit: see `BacklogFull`.
        key: See `BacklogFull`.
    """

    def __init__(self, limit: float, bound: str = "max_pending", key: Hashable = None) -> None:
        super().__init__(limit, bound, key)
        self.limit = limit
        self.bound = bound
        self.key = key

    def __str__(self) -> str:
        return f"the job was dropped to make room for newer ones{_bound(self)}"


class ForkedError(MicrobatchError, RuntimeError):
    """The process was forked, and the job or the executor belongs to the parent process.

    In a forked child, the futures of jobs that were pending at the fork fail with this exception, because these jobs
    are processed in the parent. The child also gets it from `Batcher.submit` if the batcher has an *executor*, because
    that works only in the parent.
    """


class ResultCountError(MicrobatchError, ValueError):
    """The processor did not return one result per job.

    Attributes:
        expected: The number of jobs in the batch.
        got: The number of results that the processor returned.
    """

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(expected, got)
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"the processor must return one result per job: expected {self.expected}, got {self.got}"
