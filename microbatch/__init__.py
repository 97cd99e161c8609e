"""Turns many single jobs into few batches. Start with `Batcher`."""

from microbatch._futures import BatchInfo, JobFuture, JobResult, JobState
from microbatch._ledger import BatcherStats
from microbatch.batcher import DEFAULT_POLICY, Batcher, BatchProcessor
from microbatch.errors import (
    BacklogFull,
    BatcherClosed,
    ForkedError,
    JobExpired,
    JobTooLarge,
    MicrobatchError,
    Rejected,
    ResultCountError,
)
from microbatch.policies import NEVER, NOW, BatchingPolicy, BatchReport, Interval, Size, Window
