"""The exceptions that microbatch defines.

::

    MicrobatchError
      Rejected                           the job was not accepted
        BacklogFull    (queue.Full)        the queue is full
        JobTooLarge    (ValueError)        the job does not fit into any batch
        BatcherClosed  (RuntimeError)      the batcher is shut down
      JobExpired       (TimeoutError)      the job was not dispatched in time
      ForkedError      (RuntimeError)      the job or executor belongs to the parent process
      ResultCountError (ValueError)        the processor returned too many or too few results

The standard exception in parentheses is a base class too, so an ``except`` clause can name either.
"""

# Each class has the values of its message as attributes, and the same values in `args`. So exceptions can be copied and
# pickled.

import queue

__all__ = [
    "BacklogFull",
    "BatcherClosed",
    "ForkedError",
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
        max_pending: The maximum number of waiting jobs, which was reached.
    """

    def __init__(self, max_pending: int) -> None:
        super().__init__(max_pending)
        self.max_pending = max_pending

    def __str__(self) -> str:
        return f"the queue is full: max_pending is {self.max_pending}"


class JobTooLarge(Rejected, ValueError):
    """The job alone exceeds a hard limit of the policy, so it does not fit into any batch.

    If the batcher has a *weigh* function, `Batcher.submit` raises it. Otherwise, the future of the job fails with it.

    Attributes:
        weight: The weight of the job.
        limit: The lowest of the limits that the job exceeds, or None if the policy states no limit.
    """

    def __init__(self, weight: float, limit: float | None = None) -> None:
        super().__init__(weight, limit)
        self.weight = weight
        self.limit = limit

    def __str__(self) -> str:
        # Not rounded, because a weight just above the limit would then look equal to it.
        weight, limit = (str(number).removesuffix(".0") for number in (self.weight, self.limit))
        return f"a job of weight {weight} does not fit into any batch" + (
            "" if self.limit is None else f": the limit is {limit}"
        )


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
