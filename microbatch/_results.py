"""What becomes of a job: its states, its result, and its batch. Plain facts."""

from dataclasses import dataclass
from enum import Enum
from typing import Hashable, NamedTuple, Tuple, TypeVar

__all__ = ["BatchInfo", "JobResult", "JobState", "OVER", "Service", "WAITING"]

Value = TypeVar("Value")


class JobState(Enum):
    """Where a job is. Jobs wait in the first two states, and end in one of the last four."""

    QUEUED = "queued"
    """Accepted."""
    BATCHED = "batched"
    """In an open batch, which has not gone yet."""
    RUNNING = "running"
    """A worker has it; it can no longer be cancelled."""
    SUCCEEDED = "succeeded"
    """The processor gave a result for it."""
    FAILED = "failed"
    """The processor gave an exception for it, or for its whole batch."""
    CANCELLED = "cancelled"
    """Cancelled before a worker took it."""
    EXPIRED = "expired"
    """Its ``expires_in`` ran out before a worker took it."""

    __hash__ = object.__hash__  # Enum's own is Python code


WAITING = (JobState.BATCHED, JobState.QUEUED)  # in the order in which most are found
OVER = frozenset([JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """What is known of the batch that a job went in.

    Attributes:
        id: counts the batches of a batcher, from 1.
        size: how many jobs it held.
        weight: their weights, added up; the size where nothing weighs.
        key: what their ``key`` is; None without a key function.
        trigger: why it went: the policy's word, or ``"flush"`` or ``"shutdown"``.
    """

    id: int
    size: int
    weight: float
    key: Hashable
    trigger: str


class JobResult(Tuple[Value, BatchInfo, float, float]):
    """What became of one job."""

    # A tuple, for many are made: a frozen dataclass takes three times as long.
    __slots__ = ()

    def __new__(cls, value: Value, batch: BatchInfo, queue_time: float, service_time: float) -> "JobResult[Value]":
        return tuple.__new__(cls, (value, batch, queue_time, service_time))

    @property
    def value(self) -> Value:
        """What the processor returned for the job."""
        return self[0]

    @property
    def batch(self) -> BatchInfo:
        """The batch that it went in."""
        return self[1]

    @property
    def queue_time(self) -> float:
        """Seconds from its acceptance to the call of the processor."""
        return self[2]

    @property
    def service_time(self) -> float:
        """Seconds from the call of the processor until its value was there."""
        return self[3]

    def __getnewargs__(self) -> Tuple[Value, BatchInfo, float, float]:
        return self.value, self.batch, self.queue_time, self.service_time

    def __repr__(self) -> str:
        fields = f"value={self.value!r}, batch={self.batch!r}, queue_time={self.queue_time!r}"
        return f"JobResult({fields}, service_time={self.service_time!r})"


class Service(NamedTuple):
    """What the results that a processor gave together have in common."""

    batch: BatchInfo
    started: float
    """When the processor was called."""
    time: float
    """How many seconds later the results were there."""
