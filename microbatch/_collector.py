"""The state machine that forms batches: jobs and moments in, batches out.

It knows no thread, no lock and no clock, and is driven by one thread. Per key there is a `_Lane`: the open batch, and
behind it the jobs that wait because they do not fit any more. Keys without jobs cost nothing.

The policy is asked about a lane only after something changed for it, and its answer is kept: as a timer while it lies
ahead, and then in a line of lanes that wait for a free worker, first come first served, so that a busy key can't starve
the others.
"""

import heapq
import sys
from collections import deque
from dataclasses import dataclass
from itertools import chain, count, repeat
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Generic,
    Hashable,
    Iterable,
    List,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    TypeVar,
    overload,
)

from microbatch._arguments import check_answer, check_count
from microbatch._clock import NEVER, NOW
from microbatch.errors import JobTooLarge
from microbatch.policies import BatchingPolicy, Window

__all__ = ["Batch", "Collector", "Entry"]


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
    def expires(self) -> float:
        """When it is to be dropped; `NEVER` if not."""

    @property
    def epoch(self) -> int:
        """Grows with `submitted`: see `Collector.flush`."""

    @property
    def waiting(self) -> bool:
        """Whether the job is still wanted. May turn false at any time, never true again."""


_SHORT = 0.01
"""How long jobs may wait, in seconds, before they are told that they are in a batch, if that saves work."""

AnyEntry = TypeVar("AnyEntry", bound=Entry)
Thing = TypeVar("Thing")


class _Alarms(Generic[Thing]):
    """Things to come back to at their moments, the earliest first. Those that *holds* denies are forgotten."""

    def __init__(self, holds: Callable[[Thing, float], bool]) -> None:
        self._holds = holds
        self._heap: List[Tuple[float, int, Thing]] = []
        self._ticks = count()  # so that things are never compared
        self._limit = 64

    def push(self, moment: float, thing: Thing) -> None:
        """Add one. Now and then this looks through all of them, so that the forgotten ones don't pile up."""
        if len(self._heap) >= self._limit:
            self._heap = [alarm for alarm in self._heap if self._holds(alarm[2], alarm[0])]
            heapq.heapify(self._heap)
            self._limit = 64 + 2 * len(self._heap)
        heapq.heappush(self._heap, (moment, next(self._ticks), thing))

    def pop(self, now: float) -> Optional[Thing]:
        """Take out and return the earliest whose moment has come, if any has."""
        return heapq.heappop(self._heap)[2] if self.next_moment() <= now else None

    def next_moment(self) -> float:
        """Return the earliest moment, or `NEVER`."""
        while self._heap and not self._holds(self._heap[0][2], self._heap[0][0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else NEVER

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()


@dataclass(frozen=True)
class Batch(Generic[AnyEntry]):
    """A batch that is to go now, or, with *error*, to fail because the policy raised."""

    key: Hashable
    trigger: str
    entries: List[AnyEntry]
    weight: float = 0.0
    error: Optional[BaseException] = None


class _Jobs(Sequence[Any]):
    """The jobs of some entries, unwrapped when looked at: most policies never look."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = entries
        self._jobs: Optional[Tuple[Any, ...]] = None

    def _unwrapped(self) -> Tuple[Any, ...]:
        if self._jobs is None:
            self._jobs = tuple(entry.job for entry in self._entries)
        return self._jobs

    def __len__(self) -> int:
        return len(self._unwrapped())

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Tuple[Any, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._unwrapped()[index]

    def __repr__(self) -> str:
        return repr(self._unwrapped())


class _Key:
    """Stands for a key of a user's class: its hash is taken once, and its comparison never raises."""

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
        try:
            return isinstance(other, _Key) and (self._key is other._key or bool(self._key == other._key))
        except BaseException:
            return False


def _safe(key: Hashable) -> Hashable:
    return key if key is None or type(key) in (str, int, bytes) else _Key(key)


class _Lane(Generic[AnyEntry]):
    """The jobs of one key."""

    __slots__ = (
        "key",
        "place",
        "open",
        "weight",
        "backlog",
        "thinned",
        "dead",
        "alike",
        "full",
        "changed",
        "due",
        "forced",
        "wanted",
        "asked",
    )

    def __init__(self, key: Hashable, place: Hashable) -> None:
        self.key = key
        self.place = place  # in the dict of lanes
        self.open: List[AnyEntry] = []  # the open batch, in order
        self.weight = 0.0
        self.backlog: Deque[AnyEntry] = deque()
        self.thinned = False  # some of the open batch may not be waiting any more
        self.dead = 0  # at most how many of the backlog are not, either
        self.alike = True  # all of its jobs weigh 1
        self.full = False  # the first of the backlog did not fit
        self.changed = False  # the policy is to be asked again
        self.due = NEVER  # what it answered last
        self.forced: Optional[str] = None  # the trigger, where it is not the policy's
        self.asked = 0  # at which count of starts and ends the policy answered last
        self.wanted = 1  # how many more jobs must come for the policy to be asked again before the batch is due


class Collector(Generic[AnyEntry]):
    """Forms batches as the policy says. Not thread-safe, and free of side effects but for what the policy does.

    Call `add`, `drop`, `flush`, `started` and `finished` as things happen; then `expire` and `take` with the
    present moment until they give nothing; then there is nothing to do before `next_moment`.
    """

    def __init__(self, policy: BatchingPolicy[Any], workers: int, started: float) -> None:
        self.policy = policy
        self.workers = workers
        self.in_flight = 0
        self.returning: Sequence[float] = ()  # see `Window.returning`; for the caller to write
        self.joined: List[AnyEntry] = []  # entries that joined an open batch; for the caller to read and to clear
        self._started_at = started
        self._watches_flow = bool(policy.watches_flow)
        self._holds_back = bool(policy.holds_back)
        self._flow = 0  # counts starts and ends of batches
        self._service_time = 0.0  # the median of the next, so that one that was slow by far does not count
        self._service_times: Deque[float] = deque(maxlen=9)
        self._sent: Deque[float] = deque(maxlen=min(policy.history, sys.maxsize))
        self._flushed = -1
        self._closing = False
        self._lanes: Dict[Hashable, _Lane[AnyEntry]] = {}
        self._changed: Deque[_Lane[AnyEntry]] = deque()
        self._ready: Dict[_Lane[AnyEntry], None] = {}  # the line for a worker; a dict so that any one can leave it
        self._broken: Deque[Batch[AnyEntry]] = deque()
        self._timers: _Alarms[_Lane[AnyEntry]] = _Alarms(lambda lane, due: lane.due == due and lane not in self._ready)
        self._expiries: _Alarms[AnyEntry] = _Alarms(lambda entry, _: entry.waiting)

    def __bool__(self) -> bool:
        """Return whether any job waits here."""
        return bool(self._lanes or self._broken)

    @property
    def has_worker(self) -> bool:
        """Whether a worker is free."""
        return self.in_flight < self.workers

    def add(self, entries: Sequence[AnyEntry], alike: bool = False) -> None:
        """Take in jobs, the oldest first, none older than those that came before.

        With *alike*, all have no key, the weight 1 and no moment at which they expire, and are not looked at.
        """
        if alike and entries:
            self._lane(None, alike).backlog.extend(entries)
            return
        lane: Optional[_Lane[AnyEntry]] = None
        for entry in entries:
            if lane is None or entry.key is not lane.key:
                lane = self._lane(entry.key, alike)
            lane.backlog.append(entry)
            if entry.expires != NEVER:
                self._expiries.push(entry.expires, entry)

    def _lane(self, key: Hashable, alike: bool) -> _Lane[AnyEntry]:
        """Return the lane that jobs are added to."""
        place = _safe(key)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = _Lane(key, place)
        lane.alike = lane.alike and alike
        self._change(lane)
        return lane

    def drop(self, entries: Iterable[AnyEntry]) -> None:
        """Forget jobs that are not `Entry.waiting` any more. Those that went already are passed over."""
        for entry in entries:
            lane = self._lanes.get(_safe(entry.key))
            if lane is not None:
                lane.thinned = True
                lane.dead += 1
                lane.full = False  # there may be room again, or the one that did not fit may be gone
                self._change(lane)

    def expire(self, now: float) -> List[AnyEntry]:
        """Return jobs whose time to wait has run out. The caller decides, and calls `drop` for them."""
        expired = []
        while (entry := self._expiries.pop(now)) is not None:
            expired.append(entry)
        return expired

    def flush(self, epoch: int, closing: bool = False) -> None:
        """Make all jobs of *epoch* and of those before it due now; with *closing*, every job, those to come included."""
        if epoch > self._flushed or closing > self._closing:
            self._flushed = max(self._flushed, epoch)
            self._closing = self._closing or closing
            self._change_all()

    def started(self, now: float) -> None:
        """Note that a batch went to a worker."""
        self.in_flight += 1
        self._flow += 1
        self._sent.append(now)
        if self._watches_flow:
            self._change_all()

    def finished(self, service_time: Optional[float] = None) -> None:
        """Note that a worker is free again, and how long the batch took, if that is known."""
        self.in_flight -= 1
        self._flow += 1
        if service_time is not None:
            self._service_times.append(service_time)
            self._service_time = sorted(self._service_times)[len(self._service_times) // 2]
        if self._watches_flow:
            self._change_all()

    def take(self, now: float, pressed: bool = False) -> Optional[Batch[AnyEntry]]:
        """Return the next batch that is due, if a worker is free for it. The caller then calls `started`.

        With *pressed* (somebody waits for room without a limit), the oldest lane goes if nothing else ever will: a policy
        that waits for more jobs would wait for ever, since none can be accepted.
        """
        self._review(now)
        while (lane := self._timers.pop(now)) is not None:
            self._ready[lane] = None
        while (stale := self._stale()) is not None and not self._broken:
            self._change(stale)
            self._review(now)
        if self._broken:
            return self._broken.popleft()
        if not self.has_worker:
            return None
        for first in self._ready:
            return self._send(first, first.forced)
        if pressed and self._lanes and not self.in_flight and self._timers.next_moment() == NEVER:
            return self._send(next(iter(self._lanes.values())), "flush")
        return None

    def _stale(self) -> Optional[_Lane[AnyEntry]]:
        """Return the lane whose turn it would be, if what it was held back for may have changed."""
        if self._holds_back and self.has_worker:
            for lane in chain(self._ready, () if self.in_flight else self._lanes.values()):
                return None if lane.asked == self._flow else lane
        return None

    def next_moment(self) -> float:
        """Return when to call `expire` and `take` again if nothing else happens; `NEVER` if that is for ever."""
        if not self._lanes:  # idle: keep no job alive for the sake of an alarm that is void
            self._expiries.clear()
            self._timers.clear()
        moment = self._expiries.next_moment()
        return min(moment, self._timers.next_moment()) if self.has_worker else moment

    def wanted(self) -> int:
        """Return how many jobs must come before it makes sense to call `take` again, if nothing else happens."""
        if not self.has_worker:
            return sys.maxsize
        if len(self._lanes) == 1:
            for lane in self._lanes.values():
                return lane.wanted
        return 1

    def _change(self, lane: _Lane[AnyEntry]) -> None:
        if not lane.changed:
            lane.changed = True
            self._changed.append(lane)

    def _change_all(self) -> None:
        for lane in self._lanes.values():
            self._change(lane)

    def _review(self, now: float) -> None:
        """Bring every lane that changed up to date."""
        while self._changed:
            lane = self._changed.popleft()
            lane.changed = False
            try:
                self._fill(lane)
                if lane.open:
                    self._ask(lane, now)
                else:
                    self._retire(lane)
            except BaseException as error:
                self._broken.append(Batch(lane.key, "", self._empty(lane), error=error))

    def _fill(self, lane: _Lane[AnyEntry]) -> None:
        """Let jobs of the backlog join the open batch, in order, until one does not fit."""
        self._forget_dead(lane)
        while lane.backlog and not lane.full:
            first = lane.backlog[0]
            window = self._window(lane, first)
            room = check_answer("the room() of a policy", self.policy.room(window))
            if room >= 1 or self.policy.fits(window, first.weight):
                self._join(lane, max(room, 1))
            elif lane.open:
                lane.full = True
            else:
                raise JobTooLarge(first.weight)
            self._forget_dead(lane)

    def _join(self, lane: _Lane[AnyEntry], room: float) -> None:
        backlog = lane.backlog
        if room < len(backlog):
            entries = list(map(deque.popleft, repeat(backlog, int(room))))
        else:
            entries = list(backlog)
            backlog.clear()
        if lane.dead:
            entries = [entry for entry in entries if entry.waiting]
        lane.open += entries
        lane.weight += len(entries) if lane.alike else sum([entry.weight for entry in entries])
        self.joined += entries

    def _forget_dead(self, lane: _Lane[AnyEntry]) -> None:
        if lane.thinned:
            lane.thinned = False
            lane.open = [entry for entry in lane.open if entry.waiting]
            lane.weight = sum([entry.weight for entry in lane.open], 0.0)  # anew, since subtraction would drift
        if lane.dead > len(lane.backlog) // 2:
            lane.backlog = deque(entry for entry in lane.backlog if entry.waiting)
            lane.dead = 0
        while lane.dead and not lane.backlog[0].waiting:
            lane.backlog.popleft()
            lane.dead -= 1

    def _ask(self, lane: _Lane[AnyEntry], now: float) -> None:
        """Find out when the open batch is due, and set a timer or join the line for a worker."""
        due = check_answer("the due() of a policy", self.policy.due(self._window(lane)))
        lane.asked = self._flow
        lane.forced = None
        lane.wanted = 1
        if now < due < now + _SHORT and lane.alike:
            lane.wanted = check_count("the wants() of a policy", self.policy.wants(self._window(lane)))
        if due == NEVER and lane.full:
            due = NOW  # nothing else could ever make it go
        if due > now and self._closing:
            lane.forced, due = "shutdown", NOW
        elif due > now and lane.open[0].epoch <= self._flushed:
            earliest = check_answer("the earliest() of a policy", self.policy.earliest(self._window(lane)))
            if earliest < due:
                lane.forced, due = "flush", earliest
        if due <= now:
            lane.due = due
            self._ready.setdefault(lane)
        elif due != lane.due or lane in self._ready:
            lane.due = due
            self._ready.pop(lane, None)
            if due != NEVER:
                self._timers.push(due, lane)

    def _send(self, lane: _Lane[AnyEntry], trigger: Optional[str]) -> Batch[AnyEntry]:
        try:
            # Twice, for the first may give an instance of a subclass of str, which hashes as it likes.
            trigger = trigger or str.__str__(str(self.policy.reason(self._window(lane))))
        except BaseException as error:
            return Batch(lane.key, "", self._empty(lane), error=error)
        return Batch(lane.key, trigger, self._empty(lane), lane.weight)

    def _empty(self, lane: _Lane[AnyEntry]) -> List[AnyEntry]:
        """Take the open batch out, and let the next one of the lane begin."""
        entries = lane.open or [lane.backlog.popleft()]
        self._retire(lane)
        if lane.backlog:
            successor: _Lane[AnyEntry] = _Lane(lane.key, lane.place)
            successor.backlog, successor.dead, successor.alike = lane.backlog, lane.dead, lane.alike
            self._lanes[lane.place] = successor  # at the end: the lanes are in the order of their oldest jobs
            self._change(successor)
        return entries

    def _retire(self, lane: _Lane[AnyEntry]) -> None:
        del self._lanes[lane.place]
        self._ready.pop(lane, None)
        lane.due = NEVER  # which voids its timer

    def _window(self, lane: _Lane[AnyEntry], joining: Optional[AnyEntry] = None) -> Window[Any]:
        first, last = (lane.open[0], lane.open[-1]) if lane.open else (joining, joining)
        assert first is not None and last is not None
        window: Window[Any] = object.__new__(Window)
        vars(window).update(  # in a third of the time: a frozen dataclass sets its fields one by one
            count=len(lane.open),
            weight=lane.weight,
            opened=first.submitted,
            newest=last.submitted,
            jobs=_Jobs(lane.open),
            key=lane.key,
            in_flight=self.in_flight,
            workers=self.workers,
            started=self._started_at,
            service_time=self._service_time,
            sent=self._sent,
            full=lane.full,
            returning=self.returning,
        )
        return window
