"""What becomes of a job: its states, its result, and its batch. Plain facts."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

__all__ = ["BatchInfo", "BatcherStats", "JobResult", "JobState", "OVER", "Service", "WAITING", "make_result"]

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


@dataclass(frozen=True)
class BatcherStats:
    """What a batcher has done, all counted at one moment: ``accepted`` is the sum of the seven states.

    Attributes:
        accepted: jobs that `Batcher.submit` took.
        queued: jobs that wait and are in no batch yet.
        batched: jobs in an open batch.
        running: jobs that a worker has.
        succeeded: jobs with a result.
        failed: jobs that failed, alone or with their batch.
        cancelled: jobs that were cancelled in time.
        expired: jobs that no worker took in time.
        batches: batches handed to a worker.
        triggers: those batches, counted by what made them go.
        oldest: seconds that the oldest waiting job has waited; 0 if none waits.
    """

    accepted: int = 0
    queued: int = 0
    batched: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    batches: int = 0
    triggers: Mapping[str, int] = field(default_factory=dict)
    oldest: float = 0.0


class Service(NamedTuple):
    """What the results that a processor gave together have in common."""

    batch: BatchInfo
    started: float
    """When the processor was called."""
    time: float
    """How many seconds later the results were there."""


class JobResult(Generic[Value]):
    """The result of one job. It only holds the value: arithmetic, indexing and iteration raise `TypeError`."""

    # Only three references, since many are made. Not a dataclass: web frameworks would serialize that to JSON.
    __slots__ = ("_value", "_service", "_submitted")
    _value: Value
    _service: Service
    _submitted: float

    def __new__(cls, value: Value, batch: BatchInfo, queue_time: float, service_time: float) -> "JobResult[Value]":
        result = object.__new__(cls)
        result._value = value
        result._service = Service(batch, queue_time, service_time)
        result._submitted = 0
        return result

    @property
    def value(self) -> Value:
        """What the processor returned for the job."""
        return self._value

    @property
    def batch(self) -> BatchInfo:
        """The batch that it went in."""
        return self._service.batch

    @property
    def queue_time(self) -> float:
        """Seconds from its acceptance to the call of the processor."""
        return self._service.started - self._submitted

    @property
    def service_time(self) -> float:
        """Seconds from the call of the processor until its value was there."""
        return self._service.time

    def __eq__(self, other: object) -> bool:
        return _fields(self) == _fields(other) if isinstance(other, JobResult) else NotImplemented

    def __hash__(self) -> int:
        return hash(_fields(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), _fields(self)

    def __repr__(self) -> str:
        fields = f"value={self.value!r}, batch={self.batch!r}, queue_time={self.queue_time!r}"
        return f"JobResult({fields}, service_time={self.service_time!r})"


_fields: Callable[["JobResult[Any]"], tuple[Any, ...]] = attrgetter("value", "batch", "queue_time", "service_time")


def make_result(value: Value, service: Service, submitted: float) -> JobResult[Value]:
    """Return the result of a job that was submitted at a moment on the clock of *service*."""
    result = object.__new__(JobResult)  # saves the call of a method written in Python
    result._value = value
    result._service = service
    result._submitted = submitted
    return result


def _refuse(self: object, *operands: object) -> NoReturn:
    raise TypeError("a JobResult only holds the value: use its .value")


_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
# Set here, so that a type checker refuses them too.
for _name in [*_BINARY, *map("r{}".format, _BINARY), *"neg pos abs invert lt le gt ge".split()]:
    setattr(JobResult, f"__{_name}__", _refuse)
for _name in "len iter reversed contains getitem setitem delitem".split():
    setattr(JobResult, f"__{_name}__", _refuse)
