"""The state machine that forms batches: jobs and moments in, batches out.

It knows no thread, no lock and no clock, and is driven by one thread. Per key there is a `Lane`: the open batch, and
behind it the jobs that wait because they do not fit any more. Keys without jobs cost nothing.

The policy is asked about a lane only after something changed for it, and its answer is kept: as a timer while it lies
ahead, and then in a line of lanes that wait for a free worker, first come first served, so that a busy key can't starve
the others.
"""

import sys
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import count, islice, repeat
from typing import Any, Deque, Dict, Generic, Hashable, Iterable, List, Optional, Sequence, Tuple

from microbatch._arguments import check_answer, check_count, shown
from microbatch._clock import NEVER, NOW
from microbatch._lanes import Alarms, AnyEntry, Jobs, Lane, safe
from microbatch.errors import JobTooLarge
from microbatch._policy import BatchingPolicy, Window, count_gates, limit_for

__all__ = ["Batch", "Collector"]

_SHORT = 0.01
"""How long jobs may wait, in seconds, before they are told that they are in a batch, if that saves work."""

_EARNED, _SAVED = 2, 64
"""How many lanes may be asked again for each start and each end of a batch, and how many of those may be saved up."""

_PORTION, _PAUSE = 256, 0.001
"""How many lanes are asked again at a time when nothing starts or ends, and after how many seconds the next ones are."""


class _Endless(Sequence[float]):
    """So many starts of batches, and so late, that a policy which looks at them never lets another batch go."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return NEVER


_SHUT = {"in_flight": 1, "sent": _Endless(), "heard": NEVER}
_OPEN: Dict[str, Any] = {"in_flight": 0, "sent": (), "heard": NOW}
"""What a window shows of the flow for a gate to be shut, or open."""


@dataclass(slots=True)
class Batch(Generic[AnyEntry]):
    """A batch that is to go now, or, with *error*, to fail because the policy raised."""

    key: Hashable
    trigger: str
    entries: List[AnyEntry]
    weight: float = 0.0
    error: Optional[BaseException] = None


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


def _is_awaited(lane: Lane[Any], moment: float) -> bool:
    """Return whether a lane still has to join a line at this moment."""
    return not lane.ready and (moment == lane.due or moment == lane.free and not lane.gated)


class Collector(Generic[AnyEntry]):
    """Forms batches as the policy says. Not thread-safe, and free of side effects but for what the policy does.

    Call `add`, `drop`, `flush`, `started` and `finished` as things happen; then `expire` and `take` with the
    present moment until they give nothing; then there is nothing to do before `next_moment`.

    The start or the end of a batch can change what the policy would answer for any lane, and there may be a million lanes.
    Two rules keep the cost of a batch the same however many there are:

    1. One gate. Where the built-in policies hold batches back because of others that run, they hold back those of all keys
       until the same moment. So each lane is asked twice when it changes: when its batch is due with this gate open, and
       when with the gate shut. Between these moments it waits in the line at the gate, and after a start or an end only the
       first of that line is asked, for all of them.
    2. Doubt. A user's policy may answer anything after a start or an end, so that older answers are in doubt, but for a
       policy that says otherwise (`BatchingPolicy.watches_flow`). When a worker is free, the first lane of those that are
       due is asked again; if its batch is due no longer, the next one, and then all others, the one with the oldest answer
       first, until one is due. Each start and each end pays for `_EARNED` questions, and up to `_SAVED` are saved up. When
       they are spent, `_PORTION` lanes are asked each time that nothing has started or ended for `_PAUSE` seconds, until no
       answer is in doubt.
    """

    def __init__(self, policy: BatchingPolicy[Any], workers: int, started: float) -> None:
        self.policy = policy
        self.workers = workers
        self.in_flight = 0
        self.joined: List[AnyEntry] = []  # entries that joined an open batch; for the caller to read and to clear
        self._gates = count_gates(policy)
        self._has_gate = False  # there is one gate, and has been more than one lane
        self._shut_until = NOW  # the gate, as far as is known
        self._watches = bool(policy.watches_flow) or policy.recalls > 0
        self._holds_back = bool(policy.holds_back)
        self._flow = 0  # counts what puts answers in doubt
        self._questions = _SAVED  # how many lanes may be asked again
        self._resume = NEVER  # when more may be
        self._service_times: Deque[float] = deque(maxlen=9)
        self._sent: Deque[float] = deque(maxlen=min(policy.history, sys.maxsize))
        real, shut, open = (
            Window[Any](workers=workers, started=started, **flow) for flow in ({"sent": self._sent}, _SHUT, _OPEN)
        )
        self._windows = (real, shut, open) if self._gates is not None else None  # to be used again and again
        self._common = vars(real)  # what all windows show
        self._flushed = -1
        self._closing = False
        self._lanes: Dict[Hashable, Lane[AnyEntry]] = {}  # in the order in which their batches were opened
        self._aged: Deque[Lane[AnyEntry]] = deque()  # the first of these, but for some that are gone
        self._unflushed: List[Lane[AnyEntry]] = []  # those of them that no flush was for, but for some that are gone
        self._asked: OrderedDict[Lane[AnyEntry], None] = OrderedDict()  # the one with the oldest answer first
        self._most: Optional[float] = None  # how many jobs an empty batch has room for
        self._changed: Deque[Lane[AnyEntry]] = deque()
        self._turns = count(1)
        self._ready: Alarms[Lane[AnyEntry]] = Alarms(lambda lane, _: lane.ready)  # the line for a worker, by turn
        self._gated: Alarms[Lane[AnyEntry]] = Alarms(lambda lane, _: lane.gated)  # the line at the gate, by turn
        self._timers: Alarms[Lane[AnyEntry]] = Alarms(_is_awaited)
        self._broken: Deque[Batch[AnyEntry]] = deque()
        self._expiries: Alarms[AnyEntry] = Alarms(lambda entry, _: entry.waiting)

    def successor(self, in_flight: int) -> "Collector[AnyEntry]":
        """Return a collector without jobs that knows what this one has seen, for one that an exception broke off."""
        collector: Collector[AnyEntry] = Collector(self.policy, self.workers, self._common["started"])
        collector.in_flight = in_flight
        collector._sent.extend(self._sent)
        collector._service_times.extend(self._service_times)
        collector._common["service_time"] = self._common["service_time"]
        return collector

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
        lane: Optional[Lane[AnyEntry]] = None
        for entry in entries:
            if lane is None or entry.key is not lane.key:
                lane = self._lane(entry.key, alike)
            lane.backlog.append(entry)
            if entry.expires != NEVER:
                self._expiries.push(entry.expires, entry)

    def _lane(self, key: Hashable, alike: bool) -> Lane[AnyEntry]:
        """Return the lane that jobs are added to."""
        place = safe(key)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = Lane(key, place)
            if self._gates == 1 and not self._has_gate and len(self._lanes) > 1:
                self._has_gate = True
                self._change_all()
        lane.alike = lane.alike and alike
        self._change(lane)
        return lane

    def drop(self, entries: Iterable[AnyEntry]) -> None:
        """Forget jobs that are not `Entry.waiting` any more. Those that went already are passed over."""
        for entry in entries:
            lane = self._lanes.get(safe(entry.key))
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
        if closing and not self._closing:
            self._closing = True
            self._change_all()
        if epoch > self._flushed:
            self._flushed = epoch
            lanes, self._unflushed = self._unflushed, []
            for lane in lanes:
                lane.unflushed = False
                if not lane.gone:
                    self._change(lane)

    def hear_of(self, returning: int, return_by: float, heard: float) -> None:
        """Note who is likely to submit soon: see `Window.returning` and `Window.heard`."""
        common = self._common
        common["returning"], common["return_by"] = returning, return_by
        if heard != common["heard"]:
            common["heard"] = heard
            self._doubt()

    def started(self, now: float) -> None:
        """Note that a batch went to a worker."""
        self.in_flight += 1
        self._sent.append(now)
        self._doubt()

    def finished(self, service_time: Optional[float] = None) -> None:
        """Note that a worker is free again, and how long the batch took, if that is known."""
        self.in_flight -= 1
        if service_time is not None:
            self._service_times.append(service_time)
            # The median, so that one that was slow by far does not count.
            self._common["service_time"] = sorted(self._service_times)[len(self._service_times) // 2]
        self._doubt()

    def _doubt(self) -> None:
        """Put the answers that the policy has given in doubt."""
        self._common["in_flight"] = self.in_flight
        self._shut_until = NOW
        if self._watches or self._holds_back:
            self._flow += 1
            self._questions = min(self._questions + _EARNED, _SAVED)
            self._resume = NEVER  # until `take` finds that more have to be asked than may be

    def take(self, now: float, pressed: bool = False) -> Optional[Batch[AnyEntry]]:
        """Return the next batch that is due, if a worker is free for it. The caller then calls `started`.

        With *pressed* (somebody waits for room), and where nothing is due, the oldest lane goes as by a flush: a policy that
        waits for more jobs waits in vain, since none can be accepted.
        """
        while (
            lane := self._timers.pop(now)
        ) is not None:  # first, for their moments have come before those of who has just come
            self._line_up(lane, now)
        self._review(now)
        first = self._next(now) if self.in_flight < self.workers else None
        if self._broken:
            return self._broken.popleft()
        if first is not None:
            return self._send(first, now)
        if pressed and self.in_flight < self.workers and (oldest := self._oldest()) is not None and not oldest.pressed:
            oldest.pressed = True
            self._change(oldest)
            return self.take(now)
        return None

    def _next(self, now: float) -> Optional[Lane[AnyEntry]]:
        """Return the lane whose turn it is, of those that are due now for certain."""
        if now >= self._resume:
            self._questions, self._resume = _PORTION, NEVER
        while not self._broken and (lane := self._candidate(now)) is not None:
            if lane.ready and not self._is_in_doubt(lane):
                return lane
            try:
                if lane.gated and self._shut_until <= now:
                    due, lane.forced = self._answer(lane, self._window(lane), now)
                    if due <= now:
                        return lane
                    self._shut_until = due
                elif self._questions:
                    self._questions -= 1
                    self._ask(lane, now)
                else:
                    self._resume = now + _PAUSE
                    break
            except BaseException as error:
                self._break(lane, error)
        return None

    def _candidate(self, now: float) -> Optional[Lane[AnyEntry]]:
        """Return the lane whose turn it is if it is due, be it that it has to be asked."""
        ready = self._ready.first()
        gated = self._gated.first() if self._shut_until <= now else None
        if gated is not None and (ready is None or gated.turn < ready.turn):
            return gated
        if ready is not None:
            return ready
        oldest = None
        if self._watches:
            for oldest in self._asked:
                break
        elif self._holds_back and not self._has_gate and not self.in_flight:
            oldest = self._oldest()
        return oldest if oldest is not None and self._is_in_doubt(oldest) else None

    def _is_in_doubt(self, lane: Lane[AnyEntry]) -> bool:
        return lane.asked != self._flow and (self._watches or self._holds_back and not self._has_gate)

    def _oldest(self) -> Optional[Lane[AnyEntry]]:
        """Return the lane whose batch was opened first."""
        while self._lanes:
            while self._aged:
                if not self._aged[0].gone:
                    return self._aged[0]
                self._aged.popleft()
            self._aged.extend(
                self._lanes.values()
            )  # so each is taken over once, and no dict is searched from its beginning
        return None

    def next_moment(self) -> float:
        """Return when to call `expire` and `take` again if nothing else happens; `NEVER` if that is for ever."""
        if not self._lanes:  # idle: keep no job alive for the sake of what is void
            for alarms in (self._timers, self._ready, self._gated):
                alarms.clear()
            self._expiries.clear()
            self._aged.clear()
            self._unflushed.clear()
        moment = self._expiries.next_moment()
        if not self.has_worker:
            return moment
        gate = self._shut_until if self._gated.first() is not None else NEVER
        return min(moment, self._timers.next_moment(), self._resume, gate)

    def wanted(self) -> int:
        """Return how many jobs must come before it makes sense to call `take` again, if nothing else happens."""
        if not self.has_worker:
            return sys.maxsize
        if len(self._lanes) == 1:
            for lane in self._lanes.values():
                return lane.wanted
        return 1

    def describe(self, now: float) -> List[str]:
        """Say what each open batch holds, when it is due and what it waits for. Any thread may ask, at any moment.

        So what moves meanwhile may be seen where it was or where it goes. Nothing is changed, but the policy is asked.
        """
        lanes = list(self._lanes.values())
        return [self._described(lane, now) for lane in lanes if lane.open]

    def describe_batch(self, key: Hashable, now: float) -> str:
        """Say the same of the open batch of one key; nothing if there is none."""
        lane = self._lanes.get(safe(key))
        return self._described(lane, now) if lane is not None and lane.open else ""

    def _described(self, lane: Lane[AnyEntry], now: float) -> str:
        count, key = len(lane.open), "" if lane.key is None else f" of key {shown(lane.key)}"
        text = f"open batch{key}: {_jobs(count)}, {self._due(lane, now)}"
        return f"{text}; {_jobs(len(lane.backlog))} behind it that did not fit" if lane.backlog else text

    def _due(self, lane: Lane[AnyEntry], now: float) -> str:
        due, forced = lane.due, lane.forced
        try:
            window = self._new_window(lane)  # since the others are the leader's
            if self._has_gate:
                due, forced = self._answer(lane, window, now)
            by = forced or str(self.policy.reason(window))
        except Exception:  # of a user's policy, or of a batch that has just gone
            by = "its policy"
        if due == NEVER:
            way_out = f"flush() dispatches it, and {shown(self.policy)} | Interval(seconds) would bound the wait"
            return f"not due until more jobs come, however long that takes: {way_out}"
        if due > now:
            return f"due in {due - now:.3f} s by {by}"
        return f"due by {by}, and waits for {'its turn' if self.has_worker else 'a free worker'}"

    def _change(self, lane: Lane[AnyEntry]) -> None:
        if not lane.changed:
            lane.changed = True
            self._changed.append(lane)

    def _change_all(self) -> None:
        for lane in self._lanes.values():
            self._change(lane)

    def _review(self, now: float) -> None:
        """Bring every lane that changed up to date."""
        self._most = None  # for it may have learned
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
                self._break(lane, error)

    def _break(self, lane: Lane[AnyEntry], error: BaseException) -> None:
        self._broken.append(Batch(lane.key, "", self._empty(lane), error=error))

    def _fill(self, lane: Lane[AnyEntry]) -> None:
        """Let jobs of the backlog join the open batch, in order, until one does not fit."""
        self._forget_dead(lane)
        while lane.backlog and not lane.full:
            first = lane.backlog[0]
            room = self._room(lane, first)
            if room >= 1 or self.policy.fits(self._window(lane, first), first.weight):
                self._join(lane, max(room, 1))
            elif lane.open:
                lane.full = True
            else:
                raise JobTooLarge(first.weight, limit_for(self.policy, self._window(lane, first), first.weight))
            self._forget_dead(lane)

    def _room(self, lane: Lane[AnyEntry], joining: AnyEntry) -> float:
        if lane.open or self._windows is None:
            return check_answer("the room() of a policy", self.policy.room(self._window(lane, joining)))
        if self._most is None:  # the built-in policies answer alike for all empty batches
            self._most = self.policy.room(self._window(lane, joining))
        return self._most

    def _join(self, lane: Lane[AnyEntry], room: float) -> None:
        entries = list(islice(lane.backlog, int(room)) if room < len(lane.backlog) else lane.backlog)
        joining = [entry for entry in entries if entry.waiting] if lane.dead else entries
        lane.open += joining  # before they are taken out: an exception from outside must not find them in neither place
        if len(entries) < len(lane.backlog):
            deque(map(deque.popleft, repeat(lane.long_backlog(), len(entries))), maxlen=0)
        else:
            lane.backlog = []
        lane.weight += len(joining) if lane.alike else sum([entry.weight for entry in joining])
        self.joined += joining

    def _forget_dead(self, lane: Lane[AnyEntry]) -> None:
        if lane.thinned:
            lane.thinned = False
            lane.open = [entry for entry in lane.open if entry.waiting]
            lane.weight = sum([entry.weight for entry in lane.open], 0.0)  # anew, since subtraction would drift
        if lane.dead:
            if lane.dead > len(lane.backlog) // 2:
                lane.backlog = [entry for entry in lane.backlog if entry.waiting]
                lane.dead = 0
            while lane.dead and not lane.backlog[0].waiting:
                lane.long_backlog().popleft()
                lane.dead -= 1

    def _ask(self, lane: Lane[AnyEntry], now: float) -> None:
        """Find out when the open batch is due, and set a timer or join a line."""
        if self._watches:
            self._asked[lane] = None
            self._asked.move_to_end(lane)
        lane.asked = self._flow
        if not lane.unflushed and lane.open[0].epoch > self._flushed:
            self._note_unflushed(lane)
        due, free = lane.due, lane.free
        if self._has_gate:
            lane.due, lane.free = self._bounds(lane, now)
        else:
            window = self._window(lane)
            lane.due, lane.forced = self._answer(lane, window, now)
            lane.free = lane.due
            lane.wanted = 1
            if now < lane.due < now + _SHORT and lane.alike:
                lane.wanted = check_count("the wants() of a policy", self.policy.wants(window))
        self._line_up(lane, now)
        if not lane.ready:
            if due != lane.due < NEVER:
                self._timers.push(lane.due, lane)
            if free != lane.free != lane.due and not lane.gated:
                self._timers.push(lane.free, lane)

    def _line_up(self, lane: Lane[AnyEntry], now: float) -> None:
        """Have the lane wait in the line in which it belongs now, and in its old place if it has been in one."""
        was_ready, was_gated = lane.ready, lane.gated
        lane.ready = lane.due <= now
        lane.gated = lane.free <= now < lane.due
        if not lane.turn and lane.free <= now:
            lane.turn = next(self._turns)
        if lane.ready and not was_ready:
            self._ready.push(lane.turn, lane)
        elif lane.gated and not was_gated:
            self._gated.push(lane.turn, lane)

    def _note_unflushed(self, lane: Lane[AnyEntry]) -> None:
        if len(self._unflushed) > 64 + 2 * len(self._lanes):
            self._unflushed = [lane for lane in self._unflushed if not lane.gone]
        lane.unflushed = True
        self._unflushed.append(lane)

    def _answer(self, lane: Lane[AnyEntry], window: Window[Any], now: float) -> Tuple[float, Optional[str]]:
        """Return when the open batch is due, and by what if not by the policy."""
        due = check_answer("the due() of a policy", self.policy.due(window))
        if due == NEVER and lane.full:
            due = NOW  # nothing else could ever make it go
        if due > now and self._closing:
            return NOW, "shutdown"
        if due > now and self._is_flushed(lane):
            earliest = check_answer("the earliest() of a policy", self.policy.earliest(window))
            if earliest < due:
                return earliest, "flush"
        return due, None

    def _is_flushed(self, lane: Lane[AnyEntry]) -> bool:
        return lane.pressed or lane.open[0].epoch <= self._flushed

    def _bounds(self, lane: Lane[AnyEntry], now: float) -> Tuple[float, float]:
        """Return when the open batch is due with the gate shut, and when with the gate open."""
        if self._closing:
            return NOW, NOW
        shut = self._bound(lane, 1)
        if shut <= now:
            return shut, shut
        open = self._bound(lane, 2)
        return (NOW, NOW) if open == NEVER and lane.full else (shut, open)

    def _bound(self, lane: Lane[AnyEntry], which: int) -> float:
        window = self._window(lane, which=which)
        due = self.policy.due(window)
        return min(due, self.policy.earliest(window)) if self._is_flushed(lane) else due

    def _send(self, lane: Lane[AnyEntry], now: float) -> Batch[AnyEntry]:
        try:
            window = self._window(lane)
            if self._has_gate and (self._closing or self._is_flushed(lane)):
                _, lane.forced = self._answer(lane, window, now)
            # Twice, for the first may give an instance of a subclass of str, which hashes as it likes.
            trigger = lane.forced or str.__str__(str(self.policy.reason(window)))
        except BaseException as error:
            return Batch(lane.key, "", self._empty(lane), error=error)
        return Batch(lane.key, trigger, self._empty(lane), lane.weight)

    def _empty(self, lane: Lane[AnyEntry]) -> List[AnyEntry]:
        """Take the open batch out, and let the next one of the lane begin."""
        entries = lane.open or [lane.long_backlog().popleft()]
        self._retire(lane)
        if lane.backlog:
            successor: Lane[AnyEntry] = Lane(lane.key, lane.place)
            successor.backlog, successor.dead, successor.alike = lane.backlog, lane.dead, lane.alike
            self._lanes[lane.place] = successor  # at the end: see there
            self._change(successor)
        lane.open, lane.backlog = [], []  # for it may be looked at once more
        return entries

    def _retire(self, lane: Lane[AnyEntry]) -> None:
        del self._lanes[lane.place]
        if self._watches:
            self._asked.pop(lane, None)
        lane.ready = lane.gated = False
        lane.due = lane.free = NEVER  # which voids its timers
        lane.gone = True

    def _window(self, lane: Lane[AnyEntry], joining: Optional[AnyEntry] = None, which: int = 0) -> Window[Any]:
        """Return what the policy is to see; with *joining*, for a job that may join it; with *which*, with the gate shut or open."""
        if self._windows is None:
            return self._new_window(lane, joining)
        window = self._windows[which]
        first, last = (lane.open[0], lane.open[-1]) if lane.open else (joining, joining)
        assert first is not None and last is not None
        fields = vars(window)
        fields["count"] = len(lane.open)
        fields["weight"] = lane.weight
        fields["opened"] = first.submitted
        fields["newest"] = last.submitted
        fields["full"] = lane.full
        return window

    def _new_window(self, lane: Lane[AnyEntry], joining: Optional[AnyEntry] = None) -> Window[Any]:
        first, last = (lane.open[0], lane.open[-1]) if lane.open else (joining, joining)
        assert first is not None and last is not None
        window: Window[Any] = object.__new__(Window)
        vars(window).update(  # in a third of the time: a frozen dataclass sets its fields one by one
            self._common,
            count=len(lane.open),
            weight=lane.weight,
            opened=first.submitted,
            newest=last.submitted,
            jobs=Jobs(lane.open),
            key=lane.key,
            full=lane.full,
        )
        return window
