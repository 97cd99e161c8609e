"""What the collector keeps: the jobs of each key, and what it has to come back to."""

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import count
from typing import (
    Any,
    Generic,
    Protocol,
    TypeVar,
    overload,
)

from microbatch._basics.clock import NEVER

__all__ = ["Alarms", "AnyEntry", "Entry", "Jobs", "Lane", "safe"]


class Entry(Protocol):
    """What the collector needs of a job. `JobFuture` is one."""

    @property
    def job(self) -> Any:
        """The job itself."""

    @property
    def key(self) -> Hashable:
        """Jobs of unequal keys share no batch."""

    @property
    def weight(self) -> float:
        """What the job adds to the weight of its batch."""

    @property
    def submitted(self) -> float:
        """When it was accepted. Jobs are added in this order."""

    @property
    def _expires(self) -> float:
        """When it is to be dropped; `NEVER` if not."""

    @property
    def _epoch(self) -> int:
        """Grows with `submitted`: see `Collector.flush`."""

    @property
    def _is_waiting(self) -> bool:
        """Whether the job is still wanted. May turn false at any time, never true again."""


AnyEntry = TypeVar("AnyEntry", bound=Entry)
Thing = TypeVar("Thing")


class Alarms(Generic[Thing]):
    """Things to come back to at their moments, the earliest first. Those that *holds* denies are forgotten."""

    def __init__(self, holds: Callable[[Thing, float], bool]) -> None:
        self._holds = holds
        self._heap: list[tuple[float, int, Thing]] = []
        self._ticks = count()  # so that things are never compared
        self._limit = 64

    def push(self, moment: float, thing: Thing) -> None:
        """Add one. Now and then this goes through all of them, so that void ones and duplicates don't pile up."""
        if len(self._heap) >= self._limit:
            held = (alarm for alarm in self._heap if self._holds(alarm[2], alarm[0]))
            self._heap = list({(moment, id(thing)): (moment, tick, thing) for moment, tick, thing in held}.values())
            heapq.heapify(self._heap)
            self._limit = 64 + 4 * len(self._heap)
        heapq.heappush(self._heap, (moment, next(self._ticks), thing))

    def pop(self, now: float) -> Thing | None:
        """Take out and return the earliest whose moment has come, if any has."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            moment, _, thing = heapq.heappop(heap)
            if self._holds(thing, moment):
                return thing
        return None

    def first(self) -> Thing | None:
        """Return the earliest, whether or not its moment has come."""
        heap = self._heap
        while heap:
            moment, _, thing = heap[0]
            if self._holds(thing, moment):
                return thing
            heapq.heappop(heap)
        return None

    def next_moment(self) -> float:
        """Return the earliest moment, or `NEVER`."""
        return self._heap[0][0] if self._heap and self.first() is not None else NEVER

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()


class Jobs(Sequence[Any]):
    """The jobs of some entries, unwrapped when looked at: most policies never look."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = entries
        self._jobs: tuple[Any, ...] | None = None

    def _unwrapped(self) -> tuple[Any, ...]:
        if self._jobs is None:
            self._jobs = tuple(entry.job for entry in self._entries)
        return self._jobs

    def __len__(self) -> int:
        return len(self._unwrapped())

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._unwrapped()[index]

    def __repr__(self) -> str:
        return repr(self._unwrapped())


class _Key:
    """Stands for a key of a user's class: its hash is taken once, and its comparison never raises.

    A dict compares keys by hash and ``==``, so one of these finds an equal plain key in it, and the other way round.
    """

    __slots__ = ("_key", "_hash")

    def __init__(self, key: Hashable) -> None:
        self._key = key
        try:
            self._hash = hash(key)
        except BaseException:  # it had one in submit
            self._hash = id(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        key = other._key if type(other) is _Key else other
        try:
            return self._key is key or bool(self._key == key)
        except BaseException:
            return False


# Not bytes: under ``python -bb``, comparing them with a str raises.
_PLAIN = frozenset([type(None), bool, int, float, str])


def safe(key: Hashable) -> Hashable:
    """Return what stands for a key in a dict, where nothing that its class does can raise."""
    return key if type(key) in _PLAIN else _Key(key)


class Lane(Generic[AnyEntry]):
    """The jobs of one key: an open batch, and those that wait behind it. Small, since there may be a million lanes."""

    __slots__ = (
        "key",
        "place",
        "open",
        "weight",
        "backlog",
        "thinned",
        "dead",
        "uniform",
        "full",
        "pressed",
        "unflushed",
        "changed",
        "due",
        "free",
        "forced",
        "wanted",
        "asked",
        "turn",
        "ready",
        "gated",
        "gone",
    )

    def __init__(self, key: Hashable, place: Hashable) -> None:
        self.key = key
        self.place = place  # in the dict of lanes
        self.open: list[AnyEntry] = []  # the open batch, in order
        self.weight = 0.0
        self.backlog: list[AnyEntry] | deque[AnyEntry] = []  # a deque after `long_backlog`
        self.thinned = False  # some of the open batch may not be waiting any more
        self.dead = 0  # at most how many of the backlog are not, either
        self.uniform = True  # all of its jobs weigh 1
        self.full = False  # the first of the backlog did not fit
        self.pressed = False  # a caller waits for its room, so its batch is dispatched as by a flush
        self.unflushed = False  # it is noted as younger than the last flush
        self.changed = False  # the policy is to be asked again
        self.due = NEVER  # what it answered last
        self.free = NEVER  # what it would answer if the flow held nothing back
        self.forced: str | None = None  # the trigger, where it is not the policy's
        self.wanted = 1  # how many more jobs must come for the policy to be asked again before the batch is due
        self.asked = 0  # at which count of starts and ends the policy answered last
        self.turn = 0  # its place in the lines, from when its batch was first due
        self.ready = False  # it is in the line of those that are due
        self.gated = False  # it is in the line of those that are due as soon as the flow holds nothing back
        self.gone = False  # its batch has been taken

    def long_backlog(self) -> deque[AnyEntry]:
        """Return the backlog as a deque, quick at its front. Most lanes need none, and it takes 8 times the memory."""
        if isinstance(self.backlog, list):
            self.backlog = deque(self.backlog)
        return self.backlog
