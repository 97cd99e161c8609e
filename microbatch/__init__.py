"""Groups single jobs from many threads into batches, and gives each caller its own result. Start with `Batcher`.

PYTEST_DONT_REWRITE: without this word, pytest would warn in a program that imports this package before it runs pytest.
"""

from typing import TYPE_CHECKING

from microbatch._basics.lazy import lazy
from microbatch.batcher import Batcher, BatchProcessor
from microbatch.errors import (
    BacklogFull,
    BatcherClosed,
    ForkedError,
    JobDropped,
    JobExpired,
    JobTooLarge,
    MicrobatchError,
    Rejected,
    ResultCountError,
)
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import BatcherShutDown, BatchFinished, BatchListener, BatchStarted, JobAccepted, JobsDropped
from microbatch.policies import (
    DEFAULT_POLICY,
    NEVER,
    NOW,
    AllWaiting,
    BatchingPolicy,
    BatchReport,
    BestSize,
    CallerActivity,
    FixedWindow,
    Hints,
    InTime,
    Interval,
    Natural,
    Padded,
    Rate,
    Session,
    Size,
    Weight,
    Window,
)
from microbatch.results import BatcherStats, BatchInfo, JobResult, JobState, ResultAt

if TYPE_CHECKING:
    from microbatch.coalescer import Coalescer, coalescing
    from microbatch.config import policy_from_env
    from microbatch.decorator import BatchedFunction, batched
    from microbatch.policies import Adaptive, Congestion, OldestFirst, PerKey, length_buckets
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            **dict.fromkeys(["Coalescer", "coalescing"], "microbatch.coalescer"),
            "policy_from_env": "microbatch.config",
            **dict.fromkeys(["BatchedFunction", "batched"], "microbatch.decorator"),
            **dict.fromkeys(
                ["Adaptive", "Congestion", "OldestFirst", "PerKey", "length_buckets"], "microbatch.policies"
            ),
        },
    )

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "AllWaiting",
    "BacklogFull",
    "BatchFinished",
    "BatchInfo",
    "BatchListener",
    "BatchProcessor",
    "BatchReport",
    "BatchStarted",
    "BatchedFunction",
    "Batcher",
    "BatcherClosed",
    "BatcherShutDown",
    "BatcherStats",
    "BatchingPolicy",
    "BestSize",
    "CallerActivity",
    "Coalescer",
    "Congestion",
    "DEFAULT_POLICY",
    "FixedWindow",
    "ForkedError",
    "Hints",
    "InTime",
    "Interval",
    "JobAccepted",
    "JobDropped",
    "JobExpired",
    "JobFuture",
    "JobResult",
    "JobState",
    "JobTooLarge",
    "JobsDropped",
    "MicrobatchError",
    "NEVER",
    "NOW",
    "Natural",
    "OldestFirst",
    "Padded",
    "PerKey",
    "Rate",
    "Rejected",
    "ResultAt",
    "ResultCountError",
    "Session",
    "Size",
    "Weight",
    "Window",
    "batched",
    "coalescing",
    "length_buckets",
    "policy_from_env",
]
