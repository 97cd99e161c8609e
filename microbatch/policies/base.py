"""What every policy is: a pure decider, which sees a `Window` of the open batch. And how policies combine."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from microbatch._basics.arguments import check_count, check_flag, check_number, shown
from microbatch._basics.clock import NEVER, NOW
from microbatch.results import BatchInfo

__all__ = [
    "GATES",
    "BatchReport",
    "BatchingPolicy",
    "Both",
    "Either",
    "Window",
    "check_policy",
    "count_gates",
    "learns",
    "exact",
    "limit_for",
    "policy_repr",
]

Job = TypeVar("Job")
Job_contra = TypeVar("Job_contra", contravariant=True)
Job_co = TypeVar("Job_co", covariant=True)


@dataclass(frozen=True)
class Window(Generic[Job_co]):
    """What a policy sees of one open batch and of the batcher around it.

    It holds for the one question it is asked with. All moments are of the batcher's monotonic clock, in seconds.

    Attributes:
        count: the jobs in the batch.
        weight: their weights, added up.
        opened: when the first of them was submitted.
        newest: when the last of them was submitted.
        jobs: the jobs themselves, read-only.
        key: what their ``key`` is, None without a key function.
        in_flight: how many batches the workers are running now.
        workers: how many batches may run at once.
        started: when the batcher started.
        service_time: how many seconds the processor took for each of the last batches, the median; 0 before the first.
        sent: the moments of the batcher's latest dispatches under all keys, oldest first.
        full: a waiting job did not fit, so that nothing can join any more.
        returning: how many callers have just got a result that they waited for, and are likely to submit the next job
            soon; only for a policy that `BatchingPolicy.watches_callers`, and where jobs have no keys.
        return_by: the moment until which that is likely of the last of them.
        heard: when a caller who is not waiting for a result was last heard of, by submitting a job or by getting a result;
            `NOW` if there is none; only for a policy that `BatchingPolicy.recalls` callers.
    """

    count: int = 0
    weight: float = 0.0
    opened: float = 0.0
    newest: float = 0.0
    jobs: Sequence[Job_co] = ()
    key: Hashable = None
    in_flight: int = 0
    workers: int = 1
    started: float = 0.0
    service_time: float = 0.0
    sent: Sequence[float] = ()
    full: bool = False
    returning: int = 0
    return_by: float = NOW
    heard: float = NOW


@dataclass(frozen=True, slots=True)
class BatchReport:
    """How one batch went, for a policy that learns.

    Attributes:
        batch: the batch.
        service_time: seconds from the call of the processor to its last result.
        failed: how many of its jobs failed.
    """

    batch: BatchInfo
    service_time: float
    failed: int


class BatchingPolicy(ABC, Generic[Job_contra]):
    """Decides when a batch goes. Subclass it, define `due`, and combine with ``|`` (either) and ``&`` (both).

    >>> from microbatch import Size
    >>> class Urgent(BatchingPolicy[dict[str, bool]]):
    ...     def due(self, window: Window[dict[str, bool]]) -> float:
    ...         return NOW if any(job["urgent"] for job in window.jobs) else NEVER
    >>> (Urgent() | Size(2)).due(Window(count=1, jobs=[{"urgent": True}]))
    -inf

    All methods are called from the batcher's own threads, one at a time; `fits` also from a thread in
    `Batcher.submit`, with an empty window, where the batcher weighs its jobs, and `due` and `reason` from one in
    `Batcher.explain`.
    An exception from `due`, `fits`, `room`, `wants` or `reason` fails the jobs of that batch; so does a `due` or `room`
    that is no number, and a `wants` that is no count.
    """

    watches_flow: bool = True
    """Whether the answers of the policy may change when a batch starts or ends.

    They may if `due` or `earliest` looks at `Window.in_flight`, `Window.sent` or `Window.service_time`, or if `observe`
    learns. True is the safe answer.

    After each start and each end of a batch, the policy is asked again when a worker is free: about the batch whose
    turn it is, about the one with the oldest answer, and if neither is due, about others until one is. It can be asked
    about up to 64 open batches at once. If there are more, it is asked about some of them later, a few every
    millisecond, so a batch that has become due may wait a little. If the answers can't change, set this to False: the
    policy is then not asked again.
    """

    watches_callers: bool = False
    """Whether `due` looks at `Window.returning`, which costs something for each job that is waited for."""

    recalls: float = 0.0
    """For how many seconds callers are remembered, for the sake of `Window.heard`, which costs something for each job."""

    _learned: int = 0  # how often a built-in policy has learned what may change its answers

    history: int = 1_000
    """How many moments `Window.sent` holds at most, the latest ones."""

    @abstractmethod
    def due(self, window: Window[Job_contra]) -> float:
        """Return the moment from which the batch may go: `NOW`, `NEVER`, or any moment between.

        It is asked again when a job has joined or left the batch, and then holds until the next such change.
        A batch that is due goes as soon as a worker is free, and takes what still fits until then.
        """

    def fits(self, window: Window[Job_contra], weight: float) -> bool:
        """Return whether one more job of this weight may join: the hard limit, held on every path.

        A job that does not fit an empty window fits nowhere, and is `JobTooLarge`: raised by `Batcher.submit` where the
        batcher weighs its jobs, and otherwise what its future fails with. The error states the attribute ``limit``
        of the policy, if there is one and it is a number below the weight of the job.
        """
        return True

    def room(self, window: Window[Job_contra]) -> float:
        """Return how many more jobs surely fit whatever they weigh; `fits` is then not asked for them.

        This only saves questions. By default all of them; none in a class that has a `fits` of its own.
        """
        return NEVER

    def earliest(self, window: Window[Job_contra]) -> float:
        """Return the moment before which not even a flush makes the batch go. By default `NOW`."""
        return NOW

    def wants(self, window: Window[Job_contra]) -> int:
        """Return how many more jobs must join before `due` can be sooner than it is now: asked again then, or when it is due.

        This only saves questions, and is only asked when `due` is near. By default 1: `due` is asked for each job.
        """
        return 1

    def needs(self) -> int:
        """Return how many jobs must be together before a batch can be due at all: 0 unless the policy counts jobs."""
        return 0

    def observe(self, report: BatchReport) -> None:
        """Take note of how a batch went. An exception is logged and changes nothing."""

    def reason(self, window: Window[Job_contra]) -> str:
        """Return the word for why the batch goes, which becomes `BatchInfo.trigger`: the class's name in lower case."""
        return type(self).__name__.lower()

    def __init_subclass__(cls, **options: Any) -> None:
        """Let no subclass inherit an answer that was given for what it overrides."""
        super().__init_subclass__(**options)
        if _depth(cls, "fits") < _depth(cls, "room"):
            cls.room = _no_room  # type: ignore[method-assign]
        if _depth(cls, "due") < _depth(cls, "needs"):
            cls.needs = BatchingPolicy.needs  # type: ignore[method-assign]
        if _depth(cls, "due") < _depth(cls, "wants"):
            cls.wants = BatchingPolicy.wants  # type: ignore[method-assign]
        if min(_depth(cls, name) for name in ("due", "earliest", "observe")) < _depth(cls, "watches_flow"):
            cls.watches_flow = True

    def __or__(self: "BatchingPolicy[Job]", other: "BatchingPolicy[Job]") -> "BatchingPolicy[Job]":
        return Either(self, other)

    def __and__(self: "BatchingPolicy[Job]", other: "BatchingPolicy[Job]") -> "BatchingPolicy[Job]":
        return Both(self, other)

    def __bool__(self) -> NoReturn:
        """Raise TypeError: ``Size(10) or Interval(1)`` would silently be ``Size(10)``."""
        raise TypeError("a policy has no truth value: combine policies with | and &, not with 'or' and 'and'")


def _depth(cls: type, name: str) -> int:
    # Not only the class itself: it may have the method from a mixin, which stands before the policy.
    return next(depth for depth, base in enumerate(cls.__mro__) if name in vars(base))


def _no_room(self: BatchingPolicy[Any], window: Window[Any]) -> float:
    """Return 0: a `fits` of its own has to be asked for each job."""
    return 0.0


def check_policy(name: str, value: Any, hint: str = "") -> None:
    """Raise TypeError or ValueError unless *value* is a policy, and what it says of itself makes sense."""
    if not isinstance(value, BatchingPolicy):
        raise TypeError(f"{name} must be a BatchingPolicy, got {shown(value)}{hint}")
    check_count("the needs() of a policy", value.needs(), 0)
    for name in ("watches_flow", "watches_callers"):
        check_flag(f"the {name} of a policy", getattr(value, name))
    check_number("the recalls of a policy", value.recalls)
    check_count("the history of a policy", value.history)


def limit_for(policy: BatchingPolicy[Any], window: Window[Any], weight: float) -> float | None:
    """Return the lowest limit that a part of *policy* states for refusing a job of this weight; None if none states one."""
    if isinstance(policy, _Pair):
        limits = [limit_for(part, window, weight) for part in (policy.first, policy.second)]
        return min((limit for limit in limits if limit is not None), default=None)
    limit = getattr(policy, "limit", None)
    # If the weight is within the limit, the policy refuses the job for another reason.
    stated = isinstance(limit, (int, float)) and limit < weight and not policy.fits(window, weight)
    return limit if stated else None


# Not `min` and `max`, which pass over a NaN or not, as it comes: here it comes out, and the batcher refuses it.


def _least(first: float, second: float) -> float:
    return first if first < second or first != first else second


def _most(first: float, second: float) -> float:
    return first if first > second or first != first else second


class _Pair(BatchingPolicy[Job]):
    """Two policies as one: a job joins only where both let it."""

    def __init__(self, first: BatchingPolicy[Job], second: BatchingPolicy[Job]) -> None:
        for part in (first, second):
            check_policy("a part of a policy", part)
        self.first = first
        self.second = second
        self.watches_flow = first.watches_flow or second.watches_flow
        self.watches_callers = first.watches_callers or second.watches_callers
        self.recalls = max(first.recalls, second.recalls)
        self.history = max(first.history, second.history)

    @property
    def _learned(self) -> int:  # type: ignore[override]
        return self.first._learned + self.second._learned

    def fits(self, window: Window[Job], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return self.first.fits(window, weight) and self.second.fits(window, weight)

    def room(self, window: Window[Job]) -> float:
        """See `BatchingPolicy.room`."""
        return _least(self.first.room(window), self.second.room(window))

    def wants(self, window: Window[Job]) -> int:
        """See `BatchingPolicy.wants`."""
        return min(self.first.wants(window), self.second.wants(window))

    def observe(self, report: BatchReport) -> None:
        """Hand the report to both, to the second even if the first raises."""
        try:
            self.first.observe(report)
        finally:
            self.second.observe(report)


class Either(_Pair[Job]):
    """What ``a | b`` makes: a batch goes when one of the two says so.

    >>> from microbatch import Interval, Size
    >>> Size(3) | Interval(0.5)
    Size(3) | Interval(0.5)
    """

    def due(self, window: Window[Job]) -> float:
        """See `BatchingPolicy.due`."""
        return _least(self.first.due(window), self.second.due(window))

    wants = _Pair.wants  # which holds for this `due` too

    def earliest(self, window: Window[Job]) -> float:
        """See `BatchingPolicy.earliest`."""
        return _least(self.first.earliest(window), self.second.earliest(window))

    def needs(self) -> int:
        """See `BatchingPolicy.needs`."""
        return min(self.first.needs(), self.second.needs())

    def reason(self, window: Window[Job]) -> str:
        """Answer with the one that is due first; with the left one of two that are due together."""
        left = self.first.due(window) <= self.second.due(window)
        return (self.first if left else self.second).reason(window)

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"


class Both(_Pair[Job]):
    """What ``a & b`` makes: a batch goes when both of the two say so.

    >>> from microbatch import Interval, Size
    >>> (Size(3) | Interval(9)) & Interval(0.5)
    (Size(3) | Interval(9)) & Interval(0.5)
    """

    def due(self, window: Window[Job]) -> float:
        """See `BatchingPolicy.due`."""
        return _most(self.first.due(window), self.second.due(window))

    wants = _Pair.wants  # which holds for this `due` too

    def earliest(self, window: Window[Job]) -> float:
        """See `BatchingPolicy.earliest`."""
        return _most(self.first.earliest(window), self.second.earliest(window))

    def needs(self) -> int:
        """See `BatchingPolicy.needs`."""
        return max(self.first.needs(), self.second.needs())

    def reason(self, window: Window[Job]) -> str:
        """Answer with both words, since both were needed."""
        return f"{self.first.reason(window)} & {self.second.reason(window)}"

    def __repr__(self) -> str:
        # Parentheses only where they matter: both operators are associative.
        return " & ".join(
            f"({part!r})" if isinstance(part, Either) else repr(part) for part in (self.first, self.second)
        )


def learns(policy: BatchingPolicy[Any]) -> bool:
    """Return whether *policy* takes note of how batches went."""
    if isinstance(policy, (Either, Both)) and type(policy) in (Either, Both):
        return learns(policy.first) or learns(policy.second)
    return getattr(policy.observe, "__func__", None) is not BatchingPolicy.observe


GATES: dict[type, int] = {}
"""How many gates each of the built-in policies has.

A gate is a moment before which a policy lets no batch be dispatched, whatever is in it. It is the same for all keys,
and depends only on the flow: which batches have started and ended, and when callers were last heard of. Apart from its
gates, a built-in policy decides by what is in the batch and by what it has learned.
"""


def count_gates(policy: BatchingPolicy[Any]) -> int | None:
    """Return how many gates *policy* has, or None if that is unknown, as for a user's own policy."""
    if isinstance(policy, (Either, Both)) and type(policy) in (Either, Both):
        first, second = count_gates(policy.first), count_gates(policy.second)
        return None if first is None or second is None else first + second
    return GATES.get(type(policy))  # of exactly this type, since a subclass may decide otherwise


def policy_repr(policy: BatchingPolicy[object], kind: type, arguments: str) -> str:
    """Return code that creates a policy that decides as *policy* did when it was new.

    A subclass of *kind* that has a constructor of its own may take other arguments, so nothing is claimed for it.
    """
    own = type(policy)
    same = all(getattr(own, maker) is getattr(kind, maker) for maker in ("__init__", "__new__"))
    return f"{own.__name__}({arguments})" if same else object.__repr__(policy)


def exact(number: float) -> str:
    """Return the shortest literal that is read as *number*: ``60``, ``0.005``, ``1e999`` for infinity."""
    return "1e999" if number == math.inf else repr(abs(number)).removesuffix(".0")  # abs() for minus zero
