"""The states of a job, its result, and what is known of its batch and its batcher. These classes only hold data."""

from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from operator import attrgetter
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from microbatch._basics.dataclass import dataclass, field
from microbatch._basics.returned import ResultAt

__all__ = [
    "BatchInfo",
    "BatcherStats",
    "JobResult",
    "JobState",
    "OVER",
    "ResultAt",
    "Service",
    "WAITING",
    "make_result",
]

Value = TypeVar("Value")


class JobState(Enum):
    """The state of a job.

    A job waits for a worker in the first two states. It ends in one of the last five.
    """

    QUEUED = "queued"
    """The batcher has accepted the job, and the job is in no batch yet."""
    BATCHED = "batched"
    """The job is in an open batch, which has not been dispatched yet."""
    RUNNING = "running"
    """The batch was dispatched. The job can no longer be cancelled."""
    SUCCEEDED = "succeeded"
    """The processor returned a result for the job."""
    FAILED = "failed"
    """The processor returned an exception for the job, or raised one for the batch; or the policy raised one."""
    CANCELLED = "cancelled"
    """The job was cancelled before its batch was dispatched."""
    EXPIRED = "expired"
    """The job was not dispatched within its *expires_in* seconds."""
    DROPPED = "dropped"
    """The job had to make room for newer ones before its batch was dispatched."""

    __hash__: Callable[[object], int] = object.__hash__  # type: ignore[assignment]  # faster than Enum's own, which is written in Python


WAITING = (JobState.BATCHED, JobState.QUEUED)  # the more frequent state first, because ``in`` stops at a match
OVER = frozenset([JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED, JobState.DROPPED])


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """The batch in which a job was processed.

    Attributes:
        id: The number of the batch. Each batcher counts its batches from 1.
        size: The number of jobs in the batch.
        weight: The sum of the weights of the jobs. Without a *weigh* function, each job weighs 1.
        key: The common key of the jobs, or None without a *key* function.
        trigger: Why the batch was dispatched: the `BatchingPolicy.reason` of the policy, ``"flush"`` or ``"shutdown"``.
    """

    id: int
    size: int
    weight: float
    key: Hashable
    trigger: str


@dataclass(frozen=True)
class BatcherStats:
    """The counts of a batcher, all taken at the same moment.

    So *accepted* is always the sum of the counts of the eight states, *queued* to *dropped*.

    Attributes:
        accepted: The number of jobs that `Batcher.submit` accepted.
        queued: The number of jobs that are in no batch yet.
        batched: The number of jobs in open batches.
        running: The number of jobs that were dispatched and are not settled yet.
        succeeded: The number of jobs with a result.
        failed: The number of jobs that failed, alone or with their batch.
        cancelled: The number of jobs that were cancelled before they were dispatched.
        expired: The number of jobs that were not dispatched within their *expires_in* seconds.
        dropped: The number of jobs that had to make room for newer ones.
        batches: The number of batches that were dispatched.
        triggers: The number of batches for each `BatchInfo.trigger`.
        oldest: How many seconds the oldest waiting job has waited, or 0 if no job waits.
    """

    accepted: int = 0
    queued: int = 0
    batched: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    dropped: int = 0
    batches: int = 0
    triggers: Mapping[str, int] = field(default_factory=dict)
    oldest: float = 0.0


class Service(NamedTuple):
    """The data that results share if they arrived together: their batch, and when the processor ran."""

    batch: BatchInfo
    started: float
    """The moment at which the processor was called, on the clock of the batcher."""
    time: float
    """Seconds from that call until the results arrived."""


def _refuse(self: object, *operands: object) -> NoReturn:
    raise TypeError("a JobResult is not the value itself: use its .value")


_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
_OTHER = "neg pos abs invert lt le gt ge len iter reversed contains getitem setitem delitem".split()


class JobResult(Generic[Value]):
    """The result of one job. The value that the processor returned is in `value`.

    A result is not the value itself, so arithmetic, ordering, indexing and iteration raise `TypeError`.
    """

    # Three references only, to save memory: there is one object per job. It is not a dataclass, because web frameworks
    # would serialize one to JSON without an error if `.value` is forgotten.
    __slots__ = ("_value", "_service", "_submitted")
    _value: Value
    _service: Service
    _submitted: float
    # Added to the namespace, not defined one by one, because type checkers then don't see them and reject their use.
    locals().update({f"__{name}__": _refuse for name in [*_BINARY, *map("r{}".format, _BINARY), *_OTHER]})

    def __new__(cls, value: Value, batch: BatchInfo, queue_time: float, service_time: float) -> "JobResult[Value]":
        return make_result(value, Service(batch, queue_time, service_time), 0.0, cls)

    @property
    def value(self) -> Value:
        """The value that the processor returned for the job."""
        return self._value

    @property
    def batch(self) -> BatchInfo:
        """The batch in which the job was processed."""
        return self._service.batch

    @property
    def queue_time(self) -> float:
        """Seconds from the submission of the job to the call of the processor."""
        return self._service.started - self._submitted

    @property
    def service_time(self) -> float:
        """Seconds from the call of the processor until the value of the job arrived."""
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


def make_result(
    value: Value, service: Service, submitted: float, cls: type[JobResult[Any]] = JobResult
) -> JobResult[Value]:
    """Return the result of a job. *submitted* is a moment on the same clock as ``service.started``."""
    result: JobResult[Value] = object.__new__(cls)  # faster than `JobResult()`, which calls a method written in Python
    result._value = value
    result._service = service
    result._submitted = submitted
    return result
