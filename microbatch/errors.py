"""Everything that microbatch raises of its own accord.

::

    MicrobatchError
      Rejected                           nothing was accepted
        BacklogFull    (queue.Full)        no room now
        JobTooLarge    (ValueError)        could never fit
        BatcherClosed  (RuntimeError)      after shutdown
      JobExpired       (TimeoutError)      not sent in time
      ForkedError      (RuntimeError)      belongs to the parent process
      ResultCountError (ValueError)        a batch with too many or too few results

Each class keeps its evidence in attributes, and nothing else in ``args``, so that it can be copied and pickled.
"""

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
    """Base of every error of this library."""


class Rejected(MicrobatchError):
    """The job was not accepted: there is no future, and nothing will run."""


class BacklogFull(Rejected, queue.Full):
    """There was no room for the job in the time that the caller would wait.

    Attributes:
        max_pending: the bound that was reached, in jobs.
    """

    def __init__(self, max_pending: int) -> None:
        super().__init__(max_pending)
        self.max_pending = max_pending

    def __str__(self) -> str:
        return f"no room: max_pending is {self.max_pending}, and as many jobs are waiting"


class JobTooLarge(Rejected, ValueError):
    """The job alone is above a hard limit of the policy, so no batch could ever hold it.

    Attributes:
        weight: what the job weighs.
        limit: the most that a batch may weigh, by the strictest policy that refuses the job; None if no limit is stated.
    """

    def __init__(self, weight: float, limit: float | None = None) -> None:
        super().__init__(weight, limit)
        self.weight = weight
        self.limit = limit

    def __str__(self) -> str:
        # Exact, or a weight just above the limit would look equal to it.
        weight, limit = (str(number).removesuffix(".0") for number in (self.weight, self.limit))
        return f"a job of weight {weight} does not fit into any batch" + (
            "" if self.limit is None else f": the limit is {limit}"
        )


class BatcherClosed(Rejected, RuntimeError):
    """The batcher was shut down before it could take, or finish, the job."""


class JobExpired(MicrobatchError, TimeoutError):
    """The job's ``expires_in`` ran out before a worker took it: it was never processed.

    Attributes:
        expires_in: the seconds that the job was given.
    """

    def __init__(self, expires_in: float) -> None:
        super().__init__(expires_in)
        self.expires_in = expires_in

    def __str__(self) -> str:
        return f"not sent within {self.expires_in:g} s"


class ForkedError(MicrobatchError, RuntimeError):
    """The job or the executor belongs to the parent process of a fork."""


class ResultCountError(MicrobatchError, ValueError):
    """The processor did not return one result per job.

    Attributes:
        expected: the number of jobs in the batch.
        got: the number of results that came.
    """

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(expected, got)
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"the processor must return one result per job: expected {self.expected}, got {self.got}"
