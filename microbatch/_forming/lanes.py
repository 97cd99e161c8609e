"""The data structures of the collector: the jobs of each key (lanes), and reminders for later moments (alarms)."""

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from microbatch._basics.clock import NEVER

__all__ = ["NO_JOBS", "Alarms", "AnyEntry", "Entry", "Jobs", "Lane", "Runs", "safe"]


class Entry(Protocol):
    """A job as the collector sees it. `JobFuture` has these attributes."""

    @property
    def job(self) -> Any:
        """The job itself."""

    key: Hashable
    """The key of the job. Jobs whose keys differ never share a batch."""

    weight: float
    """The weight of the job."""

    submitted: float
    """The moment at which the job was accepted. Jobs are added to the collector in this order."""

    _expires: float
    """The moment at which the job expires, or `NEVER`."""

    _epoch: int
    """The epoch of the job. A later job never has a smaller epoch. See `Collector.flush`."""

    @property
    def _is_waiting(self) -> bool:
        """Whether the job still waits for a worker. May become false at any time, and then stays false."""


AnyEntry = TypeVar("AnyEntry", bound=Entry)
Thing = TypeVar("Thing")


class Alarms(Generic[Thing]):
    """A heap of moments, the earliest first, each with the object that has to be looked at then.

    Args:
        holds: A function that returns whether the alarm of an object at a moment is valid. Invalid alarms are dropped.

    Attributes:
        heap: The alarms, each with a number that no other alarm has. Some may be invalid.
    """

    def __init__(self, holds: Callable[[Thing, float], bool]) -> None:
        self._holds = holds
        self.heap: list[tuple[float, int, Thing]] = []
        self._ticks = count()  # distinct numbers, so that the heap never compares objects
        self._limit = 64

    def push(self, moment: float, thing: Thing) -> None:
        """Add an alarm. Sometimes this checks all alarms, so that invalid ones and duplicates do not pile up."""
        if len(self.heap) >= self._limit:
            self._tidy()
        heapq.heappush(self.heap, (moment, next(self._ticks), thing))

    def _tidy(self) -> None:
        held = (alarm for alarm in self.heap if self._holds(alarm[2], alarm[0]))
        self.heap = list({(moment, id(thing)): (moment, tick, thing) for moment, tick, thing in held}.values())
        heapq.heapify(self.heap)
        self._limit = 64 + 4 * len(self.heap)

    def pop(self, now: float) -> Thing | None:
        """Remove the earliest alarm whose moment has come, and return its object, or None if there is no such alarm."""
        heap = self.heap
        while heap and heap[0][0] <= now:
            moment, _, thing = heapq.heappop(heap)
            if self._holds(thing, moment):
                return thing
        return None

    def first(self) -> Thing | None:
        """Return the object of the earliest alarm, even if its moment has not come, or None if there is no alarm."""
        heap = self.heap
        while heap:
            moment, _, thing = heap[0]
            if self._holds(thing, moment):
                return thing
            heapq.heappop(heap)
        return None

    def next_moment(self) -> float:
        """Return the moment of the earliest alarm, or `NEVER`."""
        return self.heap[0][0] if self.heap and self.first() is not None else NEVER

    def clear(self) -> None:
        """Drop all alarms."""
        self.heap.clear()


class Jobs(Sequence[Any]):
    """The jobs of some entries. They are extracted on first access, because most policies never look at them."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = entries
        self._jobs: tuple[Any, ...] | None = None

    def _unwrapped(self) -> tuple[Any, ...]:
        if self._jobs is None:
            self._jobs = tuple(entry.job for entry in self._entries)
        return self._jobs

    def __len__(self) -> int:
        return len(self._unwrapped())

    def __getitem__(self, index: Any) -> Any:
        return self._unwrapped()[index]

    def __repr__(self) -> str:
        return repr(self._unwrapped())


class _Key:
    """A wrapper for a key of a user's class. It computes the hash once, and its comparison never raises.

    It has the hash of the key, and is equal to the key. So a dict takes it and an equal plain key for the same key.
    """

    __slots__ = ("_key", "_hash")

    def __init__(self, key: Hashable) -> None:
        self._key = key
        try:
            self._hash = hash(key)
        except BaseException:  # from a user's class, even though the same call succeeded in `submit`
            self._hash = id(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        key = other._key if type(other) is _Key else other
        try:
            return self._key is key or bool(self._key == key)
        except BaseException:
            return False


# Without bytes: under ``python -bb``, comparing them with a str raises an exception.
_PLAIN = frozenset([type(None), bool, int, float, str])


def safe(key: Hashable) -> Hashable:
    """Return *key*, wrapped unless its type is a plain built-in one, so that a lookup in a dict can't raise."""
    return key if type(key) in _PLAIN else _Key(key)


class Runs:
    """The batches of one key that run now.

    The collector finds it by the key only when it creates a lane. Later, the lane and the batches refer to it, because
    the key is an object of the user, which may change, or raise when it is compared.
    """

    __slots__ = ("place", "count", "lane")

    def __init__(self, place: Hashable) -> None:
        self.place = place
        self.count = 0
        self.lane: Lane[Any] | None = None  # the lane of the key, if there is one


NO_JOBS: Any = ()
"""The value of `Lane.open` and of `Lane.backlog` if there are none, so that a lane with one job needs only one list."""


class Lane(Generic[AnyEntry]):
    """The jobs of one key: its open batch, and the backlog of jobs that do not fit into that.

    A lane ends when its batch is taken. It uses little memory, because there may be a million lanes.
    """

    __slots__ = tuple(
        "key place open weight heaviest expires backlog thinned dead uniform full pressed unflushed"
        " runs due free forced wanted asked turn ready gated gone".split()
    )

    def __init__(self, key: Hashable, place: Hashable) -> None:
        self.key = key
        self.place = place  # the key in the dict of lanes: see `safe`
        self.open: list[AnyEntry] = NO_JOBS  # the jobs of the open batch, in order
        self.weight = 0.0  # of the open batch
        self.heaviest = 0.0  # the weight of its heaviest job
        self.expires = NEVER  # when the first of its jobs expires
        self.backlog: list[AnyEntry] | deque[AnyEntry] = NO_JOBS  # the other jobs; a deque after `long_backlog`
        self.thinned = False  # some jobs of the open batch may not be waiting any more
        self.dead = 0  # at most this many jobs of the backlog are not waiting any more
        self.uniform = True  # each job weighs 1
        self.full = False  # the first job of the backlog did not fit into the open batch
        self.pressed = False  # flushed to make the queue shorter, because a caller waits while it is full
        self.unflushed = False  # the lane is in `Collector._unflushed`
        self.runs: Runs | None = None  # if the policy watches the keys
        self.due = NEVER  # when the batch is due by the policy's last answer; if there is a gate, with the gate shut
        self.free = NEVER  # when it would be due with the gate open: see rule 1 of `Collector`
        self.forced: str | None = None  # the trigger, if it is not the policy's reason
        # The number of jobs that must join before the policy is asked again, as long as the batch is not due.
        self.wanted: float = 1
        self.asked = 0  # the value of `Collector._doubts` when the policy answered last
        self.turn: float = 0  # the place in both lines, assigned when the lane first joins one of them
        self.ready = False  # the lane is in the line for a worker
        self.gated = False  # the lane is in the line at the gate
        self.gone = False  # the batch was taken, or has lost all its jobs

    def long_backlog(self) -> deque[AnyEntry]:
        """Return the backlog, converted to a deque, which is fast at its front.

        It is not a deque from the beginning, because most lanes don't need one, and it takes 8 times the memory.
        """
        if not isinstance(self.backlog, deque):
            self.backlog = deque(self.backlog)
        return self.backlog
