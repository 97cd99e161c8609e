"""The base class of policies, the `Window` that a policy sees, and the combination of policies with ``|`` and ``&``."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from copy import deepcopy
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from microbatch._basics.arguments import check_count, check_flag, check_number, shown
from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.dataclass import dataclass
from microbatch.results import BatchInfo

__all__ = [
    "BatchReport",
    "BatchingPolicy",
    "BuiltInPolicy",
    "Both",
    "CallerActivity",
    "Either",
    "Hints",
    "Window",
    "bypassed",
    "check_policy",
    "count_gates",
    "learners",
    "limit_for",
]

Job = TypeVar("Job")
Job_contra = TypeVar("Job_contra", contravariant=True)
Job_co = TypeVar("Job_co", covariant=True)


class CallerActivity(NamedTuple):
    """What is known about the callers of a batcher."""

    returning: int = 0
    """The number of callers that waited for a result, have just got it, and are likely to submit their next job soon.

    It is 0 if jobs have keys, or if the policy does not set `Hints.watches_callers`.
    """

    return_by: float = NOW
    """The moment by which the last of these callers is expected."""

    heard: float = NOW
    """The latest moment at which a caller submitted a job or got a result. Callers that are waiting do not count.

    It is `NOW` if there are no other callers, or if the policy does not set `Hints.recalls`.
    """


@dataclass(frozen=True)
class Hints:
    """What a policy promises about its answers, and what it needs to know, to save work. The defaults are safe.

    Attributes:
        watches_flow: Whether the answers of the policy may change when a batch starts or ends. They may if `due` looks
            at `Window.in_flight`, `Window.sent` or `Window.service_time`, or if `observe` learns.

            If they may, the batcher asks the policy again after each start and each end of a batch, when a worker is
            free. It asks about the batch that it would dispatch next, then about the one with the oldest answer. If
            neither is due, it asks about others until one is. It asks about at most 64 open batches at once, and about
            the rest later, some every millisecond. So a batch that has become due may wait a little. If the answers
            can't change, set this to False: the batcher then does not ask again.
        watches_callers: Whether `due` looks at `CallerActivity.returning`. This costs a little time for each job that a
            caller waits for.
        recalls: How many seconds the batcher remembers the activity of a caller, for `CallerActivity.heard`. If it is
            not 0, this costs a little time for each job.
        history: The maximum number of moments in `Window.sent`.
        needs: How many jobs a batch must hold before it can be due at all.
        watches_keys: Whether the policy looks at `Window.key_in_flight`. If it does, the batcher asks it again about the
            open batch of a key after each start and each end of a batch of that key.
        oldest_first: Whether, of several batches that are due, the one with the oldest job is dispatched first. If not,
            the keys take turns.
    """

    watches_flow: bool = True
    watches_callers: bool = False
    recalls: float = 0.0
    history: int = 1_000
    needs: int = 0
    watches_keys: bool = False
    oldest_first: bool = False


@dataclass(frozen=True)
class Window(Generic[Job_co]):
    """What a policy sees of one open batch, and of the batcher.

    A window is valid only during the call that it is passed to. All moments are seconds on the monotonic clock of the
    batcher.

    Attributes:
        count: The number of jobs in the batch.
        weight: The sum of their weights.
        opened: The moment at which the first of them was submitted.
        newest: The moment at which the last of them was submitted.
        jobs: The jobs themselves. Don't change this sequence.
        key: The common key of the jobs, or None without a *key* function.
        in_flight: The number of batches that are running now.
        workers: The number of batches that may run at the same time. A policy may keep it below the number of workers.
        started: The moment at which the batcher started.
        service_time: How many seconds the processor takes for a batch: the median of the last batches, or 0 before the
            first one.
        sent: The moments of the latest dispatches for all keys, the oldest first.
        full: Whether a waiting job did not fit, so no more jobs can join.
        callers: What is known about the callers. Only for a policy whose `hints` ask for it.
        heaviest: The weight of the heaviest job in the batch, or 0 if the batch is empty.
        expires: The moment at which the first of the jobs expires, or `NEVER` if none of them ever does.
        key_in_flight: The number of batches with this key that are running now. Only for a policy whose `hints` ask for
            it.
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
    callers: CallerActivity = CallerActivity()
    heaviest: float = 0.0
    expires: float = NEVER
    key_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What a policy learns about a batch that has finished.

    Attributes:
        batch: The batch.
        service_time: Seconds from the call of the processor to its last result.
        failed: The number of jobs that failed.
        error: The exception of the first job that failed, or None if none did. Often all of them have the same one.
        started: The moment at which the processor was called.
        in_flight: The number of batches that ran when this one was dispatched, itself included.
    """

    batch: BatchInfo
    service_time: float
    failed: int
    error: BaseException | None = None
    started: float = 0.0
    in_flight: int = 1


class BatchingPolicy(ABC, Generic[Job_contra]):
    """Base class of policies. Subclass it and define `due`. Combine policies with ``|`` (either) and ``&`` (both).

    >>> from microbatch import Size
    >>> class Urgent(BatchingPolicy[dict[str, bool]]):
    ...     def due(self, window: Window[dict[str, bool]]) -> float:
    ...         return NOW if any(job["urgent"] for job in window.jobs) else NEVER
    >>> (Urgent() | Size(2)).due(Window(count=1, jobs=[{"urgent": True}]))
    -inf

    The batcher calls all methods in its own threads, one at a time. There are two exceptions. If the batcher has a
    *weigh* function, `Batcher.submit` calls `fits` with an empty window, in the thread of the caller. `Batcher.explain`
    calls `due` and `reason`, in the thread of the caller too.

    If `due`, `fits` or `reason` raises an exception, the jobs of that batch fail with it. They also fail if `due`
    returns something other than a number.
    """

    _learned: int = 0  # how often a built-in policy has learned something that may change its answers
    _limits: frozenset[str] = frozenset()  # the names of the parts that may hold back any batch, even a full one

    @property
    def hints(self) -> Hints:
        """What the policy promises and needs. Define it in a subclass, as a property or as an attribute of the class.

        If your class overrides the `due` or `observe` of another policy and does not define `hints`, it inherits what
        that policy needs to know, but none of its promises.
        """
        return _SAFE

    @abstractmethod
    def due(self, window: Window[Job_contra]) -> float:
        """Return the moment from which the batch may be dispatched: `NOW`, `NEVER`, or any moment between.

        The batcher asks again when a job has joined or left the batch, and keeps the answer until the next such change.
        See also `Hints.watches_flow`. A due batch is dispatched as soon as a worker is free. Until then it takes more
        jobs, as long as they fit.
        """

    def fits(self, window: Window[Job_contra], weight: float) -> bool:
        """Return whether one more job of this weight may join the batch.

        This is a hard limit: no batch ever holds a job for which the answer was False.

        A job that does not fit into an empty window fits into no batch, and is rejected with `JobTooLarge`. If the
        batcher has a *weigh* function, `Batcher.submit` raises it. Otherwise, the future of the job fails with it. The
        message names the attribute ``limit`` of the policy, if there is one and it is a number below the weight of the
        job.
        """
        return True

    def observe(self, report: BatchReport) -> None:
        """Learn from a batch that has finished. An exception is logged and changes nothing else."""

    def reason(self, window: Window[Job_contra]) -> str:
        """Return why the batch is dispatched, for `BatchInfo.trigger`. The default is the class name in lower case."""
        return type(self).__name__.lower()

    # -- for the built-in policies --

    def _room(self, window: Window[Job_contra]) -> float:
        """Return how many more jobs certainly fit, whatever their weights. `fits` is not called for that many jobs."""
        return NEVER

    def _earliest(self, window: Window[Job_contra]) -> float:
        """Return the moment before which not even `Batcher.flush` dispatches the batch."""
        return NOW

    def _own(self) -> "BatchingPolicy[Job_contra]":
        """Return the policy itself, or a copy for one batcher if it learns, because each batcher learns for itself."""
        return self

    def _note(self) -> str:
        """Return what the policy has learned, for `Batcher.explain`, or an empty string."""
        return ""

    def _holds(self, window: Window[Job_contra]) -> bool:
        """Return whether the batch must not be dispatched now, not even by `Batcher.shutdown` or because it is full.

        The batcher calls this only if `Hints.watches_keys` is set, and only the start or the end of a batch of the same
        key may change the answer.
        """
        return False

    def _most_running(self) -> float:
        """Return how many batches may run at once, on every path. Only `observe` may change the answer."""
        return NEVER

    def __init_subclass__(cls, **options: Any) -> None:
        """Drop promises and shortcuts that hold only for a method that *cls* overrides."""
        super().__init_subclass__(**options)
        depth = {
            name: _depth(cls, name) for name in ("due", "fits", "observe", "hints", "_earliest", "_room", "_holds")
        }
        if depth["due"] < depth["_holds"]:
            cls._holds = BatchingPolicy._holds  # type: ignore[method-assign]
        if depth["fits"] < depth["_room"]:
            cls._room = _no_room  # type: ignore[method-assign]
        if min(depth["due"], depth["observe"], depth["_earliest"]) < depth["hints"]:
            # A subclass may break the promises of its base class, but it still needs to know the same.
            promises = {"watches_flow": True} | ({"needs": 0} if depth["due"] < depth["hints"] else {})
            cls.hints = _changed(cls.hints, promises)  # type: ignore[method-assign]

    def __or__(self: "BatchingPolicy[Job]", other: "BatchingPolicy[Job]") -> "BatchingPolicy[Job]":
        return Either(self, other)

    def __and__(self: "BatchingPolicy[Job]", other: "BatchingPolicy[Job]") -> "BatchingPolicy[Job]":
        return Both(self, other)

    def __bool__(self) -> NoReturn:
        """Raise TypeError, because ``Size(10) or Interval(1)`` would silently be ``Size(10)``."""
        raise TypeError("a policy has no truth value: combine policies with | and &, not with 'or' and 'and'")


def _depth(cls: type, name: str) -> int:
    # Looks at all classes of the MRO, because a mixin that stands before the policy may define the method.
    return next(depth for depth, base in enumerate(cls.__mro__) if name in vars(base))


_SAFE = Hints()


def _changed(inherited: Any, changes: dict[str, Any]) -> Any:
    def hints(self: BatchingPolicy[Any]) -> Hints:
        known: Hints = inherited.__get__(self) if isinstance(inherited, property) else inherited
        return Hints(**{**vars(known), **changes})

    return property(hints)


def _no_room(self: BatchingPolicy[Any], window: Window[Any]) -> float:
    """Return 0, because the class defines `fits`, which must be called for each job."""
    return 0.0


def check_policy(name: str, value: Any, hint: str = "") -> None:
    """Raise TypeError or ValueError unless *value* is a policy with valid `hints`."""
    if not isinstance(value, BatchingPolicy):
        raise TypeError(f"{name} must be a BatchingPolicy, got {shown(value)}{hint}")
    hints: Any = value.hints
    if not isinstance(hints, Hints):
        raise TypeError(f"the hints of a policy must be Hints, got {shown(hints)}")
    check_count("the needs of a policy", hints.needs, 0)
    for name in ("watches_flow", "watches_callers", "watches_keys", "oldest_first"):
        check_flag(f"the {name} of a policy", getattr(hints, name))
    check_number("the recalls of a policy", hints.recalls)
    check_count("the history of a policy", hints.history)


def limit_for(policy: BatchingPolicy[Any], window: Window[Any], weight: float) -> float | None:
    """Return the lowest ``limit`` attribute of the parts of *policy* that refuse a job of this weight, or None."""
    if isinstance(policy, _Pair):
        limits = [limit_for(part, window, weight) for part in (policy.first, policy.second)]
        return min((limit for limit in limits if limit is not None), default=None)
    limit = getattr(policy, "limit", None)
    # If the weight does not exceed the limit, the policy refuses the job for another reason.
    stated = isinstance(limit, (int, float)) and limit < weight and not policy.fits(window, weight)
    return limit if stated else None


# Not `min` and `max`, which may drop a NaN, depending on the order. These return it, so that the batcher refuses it.


def _least(first: float, second: float) -> float:
    return first if first < second or first != first else second


def _most(first: float, second: float) -> float:
    return first if first > second or first != first else second


class _Pair(BatchingPolicy[Job]):
    """A combination of two policies. A job must fit both."""

    def __init__(self, first: BatchingPolicy[Job], second: BatchingPolicy[Job]) -> None:
        for part in (first, second):
            check_policy("a part of a policy", part)
        self.first = first
        self.second = second

    @staticmethod
    @abstractmethod
    def _choose(first: float, second: float) -> float:
        """Return the moment that counts, given the moment of each policy."""

    @property
    def hints(self) -> Hints:
        """See `BatchingPolicy.hints`."""
        first, second = self.first.hints, self.second.hints
        return Hints(
            watches_flow=first.watches_flow or second.watches_flow,
            watches_callers=first.watches_callers or second.watches_callers,
            recalls=max(first.recalls, second.recalls),
            history=max(first.history, second.history),
            needs=int(self._choose(first.needs, second.needs)),
            watches_keys=first.watches_keys or second.watches_keys,
            oldest_first=first.oldest_first or second.oldest_first,
        )

    def due(self, window: Window[Job]) -> float:
        """See `BatchingPolicy.due`."""
        return self._choose(self.first.due(window), self.second.due(window))

    def _earliest(self, window: Window[Job]) -> float:
        """See `BatchingPolicy._earliest`."""
        return self._choose(self.first._earliest(window), self.second._earliest(window))

    def _own(self) -> BatchingPolicy[Job]:
        """See `BatchingPolicy._own`."""
        first, second = self.first._own(), self.second._own()
        return self if first is self.first and second is self.second else type(self)(first, second)

    def _note(self) -> str:
        """See `BatchingPolicy._note`."""
        return "; ".join(filter(None, [self.first._note(), self.second._note()]))

    @property
    def _learned(self) -> int:  # type: ignore[override]
        return self.first._learned + self.second._learned

    def fits(self, window: Window[Job], weight: float) -> bool:
        """See `BatchingPolicy.fits`."""
        return self.first.fits(window, weight) and self.second.fits(window, weight)

    def _room(self, window: Window[Job]) -> float:
        """See `BatchingPolicy._room`."""
        return _least(self.first._room(window), self.second._room(window))

    def _most_running(self) -> float:
        """See `BatchingPolicy._most_running`."""
        return min(self.first._most_running(), self.second._most_running())

    def observe(self, report: BatchReport) -> None:
        """Pass the report to both policies: to the second one even if the first one raises."""
        try:
            self.first.observe(report)
        finally:
            self.second.observe(report)


class Either(_Pair[Job]):
    """The combination ``a | b``. Dispatches a batch when either policy would.

    >>> from microbatch import Interval, Size
    >>> Size(3) | Interval(0.5)
    Size(3) | Interval(0.5)
    """

    _choose = staticmethod(_least)

    @property
    def _limits(self) -> frozenset[str]:  # type: ignore[override]
        return self.first._limits & self.second._limits

    def _holds(self, window: Window[Job]) -> bool:
        """See `BatchingPolicy._holds`."""
        return self.first._holds(window) and self.second._holds(window)

    def reason(self, window: Window[Job]) -> str:
        """Return the reason of the policy that is due first, or of the left one if both are due at the same moment."""
        left = self.first.due(window) <= self.second.due(window)
        return (self.first if left else self.second).reason(window)

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"


class Both(_Pair[Job]):
    """The combination ``a & b``. Dispatches a batch when both policies would.

    >>> from microbatch import Interval, Size
    >>> (Size(3) | Interval(9)) & Interval(0.5)
    (Size(3) | Interval(9)) & Interval(0.5)
    """

    _choose = staticmethod(_most)

    @property
    def _limits(self) -> frozenset[str]:  # type: ignore[override]
        return self.first._limits | self.second._limits

    def _holds(self, window: Window[Job]) -> bool:
        """See `BatchingPolicy._holds`."""
        return self.first._holds(window) or self.second._holds(window)

    def reason(self, window: Window[Job]) -> str:
        """Return both reasons, joined with ``&``."""
        return f"{self.first.reason(window)} & {self.second.reason(window)}"

    def __repr__(self) -> str:
        # Parentheses only around `Either`, because both operators are associative, and & binds tighter than |.
        return " & ".join(
            f"({part!r})" if isinstance(part, Either) else repr(part) for part in (self.first, self.second)
        )


def learners(policy: BatchingPolicy[Any]) -> list[BatchingPolicy[Any]]:
    """Return the parts of *policy* that learn from batches that have finished, that is, that define `observe`."""
    if isinstance(policy, (Either, Both)) and type(policy) in (Either, Both):
        return learners(policy.first) + learners(policy.second)
    return [policy] if getattr(policy.observe, "__func__", None) is not BatchingPolicy.observe else []


def bypassed(policy: BatchingPolicy[Any]) -> frozenset[str]:
    """Return the names of the parts of *policy* that should limit all batches, but don't, because of a ``|``."""
    return _all_limits(policy) - policy._limits


def _all_limits(policy: BatchingPolicy[Any]) -> frozenset[str]:
    if isinstance(policy, (Either, Both)):
        return _all_limits(policy.first) | _all_limits(policy.second)
    return policy._limits


def count_gates(policy: BatchingPolicy[Any]) -> int | None:
    """Return how many gates *policy* has, or None if that is unknown, as for a policy that a user wrote."""
    if isinstance(policy, (Either, Both)) and type(policy) in (Either, Both):
        first, second = count_gates(policy.first), count_gates(policy.second)
        return None if first is None or second is None else first + second
    gates: int | None = vars(type(policy)).get("_gates")  # of exactly this type: see `BuiltInPolicy`
    return gates


class BuiltInPolicy(BatchingPolicy[object]):
    """Base class of the policies of this package. The parameters of their constructors are their attributes too.

    Attributes:
        _gates: The number of gates of the policy. A gate is a moment before which the policy lets no batch be
            dispatched, whatever jobs it holds. The moment is the same for all keys, and depends only on which batches
            have started and ended, and on `CallerActivity.heard`. Apart from its gates, a policy with this attribute
            decides only by what is in the batch and by what it has learned. A subclass does not inherit the promise,
            because it may decide differently.
    """

    _gates: int

    def _own(self) -> "BatchingPolicy[object]":
        """See `BatchingPolicy._own`."""
        if "_gates" not in vars(type(self)) or not learners(self):
            return self
        while (copied := self._try_to_copy()) is None:
            pass
        return copied

    def _try_to_copy(self) -> "BatchingPolicy[object] | None":
        """Return None if a batcher that has this policy is learning just now."""
        try:
            return deepcopy(self)
        except RuntimeError as error:
            if "during iteration" not in str(error):  # it comes from a signal handler
                raise
            return None

    def __repr__(self) -> str:
        """Return code that creates a policy like this one, without anything that it has learned.

        A subclass that defines a constructor may take other arguments. For such a class, return the standard repr.
        """
        from inspect import signature  # here, because few programs need it and it takes long to import

        cls: type = type(self)
        kind = next(base for base in cls.__mro__ if "_gates" in vars(base))  # the class of this package
        if any(getattr(cls, maker) is not getattr(kind, maker) for maker in ("__init__", "__new__")):
            return object.__repr__(self)
        given = {name: getattr(self, name) for name in signature(kind).parameters}
        values = {name: _exact(value) for name, value in given.items() if value is not None}
        arguments = [f"{name}={value}" if place else value for place, (name, value) in enumerate(values.items())]
        return f"{cls.__name__}({', '.join(arguments)})"


def _exact(number: Any) -> str:
    """Return the shortest literal that Python reads as *number*: ``60``, ``0.005``, or ``1e999`` for infinity.

    For a function, return its name.
    """
    if callable(number):
        return str(getattr(number, "__name__", shown(number)))
    return "1e999" if number == math.inf else repr(abs(number)).removesuffix(".0")  # abs() for minus zero
