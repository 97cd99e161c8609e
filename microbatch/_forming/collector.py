"""The state machine that forms batches: jobs and moments in, batches out.

It knows no thread, no lock and no clock, and is driven by one thread. Per key there is a `Lane`: the open batch, and
behind it the jobs that wait because they do not fit any more. Keys without jobs cost nothing.

The policy is asked about a lane only after something changed for it, and its answer is kept: as a timer while it lies
ahead, and then in a line of lanes that wait for a free worker, first come first served, so that a busy key can't starve
the others.
"""

import sys
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice, repeat
from typing import Any, Generic

from microbatch._basics.arguments import check_answer, check_count, shown
from microbatch._basics.clock import NEVER, NOW
from microbatch._forming.lanes import Alarms, AnyEntry, Jobs, Lane, safe
from microbatch.errors import JobTooLarge
from microbatch.policies.base import BatchingPolicy, CallerActivity, Window, count_gates, learns, limit_for

__all__ = ["Batch", "Collector"]

_SHORT = 0.01
"""How long jobs may wait, in seconds, before they are told that they are in a batch, if that saves work."""

_EARNED, _SAVED = 2, 64
"""How many questions about lanes each start and each end of a batch pays for, and how many are saved up at most."""

_PAUSE = 0.001
"""After this many seconds without a start or an end of a batch, `_SAVED` more questions may be asked."""


class _Endless(Sequence[float]):
    """Starts of batches without end, all at `NEVER`: a policy that looks at them lets no other batch be dispatched."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return NEVER


@dataclass(slots=True)
class Batch(Generic[AnyEntry]):
    """A batch that is to go now, or, with *error*, to fail because the policy raised."""

    key: Hashable
    trigger: str
    entries: list[AnyEntry]
    weight: float = 0.0
    error: BaseException | None = None


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
    Two rules keep the cost of a batch independent of their number:

    1. One gate. If the built-in policies hold batches back because others run, they hold back the batches of all keys
       until the same moment. So when a lane changes, the policy is asked twice: when is its batch due with this gate
       open, and when with the gate shut? Between these two moments, the lane waits in the line at the gate. After a
       start or an end, the policy is asked only about the first lane in that line, and the answer holds for all of
       them.
    2. Doubt. A user's policy may answer anything after a start or an end, so older answers are in doubt, unless the
       policy says otherwise (`Hints.watches_flow`). When a worker is free, the policy is asked again about the
       lane with the oldest answer, so that busy keys can't starve it, and about the first of the lanes that are due. If
       that batch is no longer due, the policy is asked about the next one, and then about all others, the oldest answer
       first, until one is due. Each start and each end pays for `_EARNED` questions, and up to `_SAVED` are saved up.
       When these are spent, `_SAVED` more are asked each time that nothing has started or ended for `_PAUSE` seconds,
       until no answer is in doubt. So an answer that has changed is always found, but not always at once.
    """

    def __init__(self, policy: BatchingPolicy[Any], workers: int, started: float) -> None:
        self.policy = policy
        self.workers = workers
        self.in_flight = 0
        self.joined: list[AnyEntry] = []  # entries that joined an open batch; for the caller to read and to clear
        self._gates = count_gates(policy)
        self._has_gate = False  # there is one gate, and has been more than one lane
        self._shut_until = NOW  # the gate, as far as is known
        self._doubts = 0  # how often answers were put in doubt
        self._learned = 0  # how often a built-in policy has
        self._learns = learns(policy) and self._gates is not None
        self._doubts_flow = policy.hints.watches_flow and self._gates != 0
        self._doubts_heard = policy.hints.recalls > 0
        self._doubts_any = self._learns or self._doubts_flow or self._doubts_heard
        self._steady = self._gates == 0 and not self._learns  # whatever starts or ends
        self._questions = _SAVED  # how many lanes may be asked again
        self._resume = NEVER  # when more may be
        self._service_times: deque[float] = deque(maxlen=9)
        self._sent: deque[float] = deque(maxlen=min(policy.hints.history, sys.maxsize))
        # The built-in policies look at no jobs and keep no windows, so they can be shown the same ones again.
        self._shared = self._gates is not None
        self._real = Window[Any](workers=workers, started=started, sent=self._sent)
        self._shut = Window[Any](
            workers=workers, started=started, sent=_Endless(), in_flight=1, callers=CallerActivity(heard=NEVER)
        )
        self._open = Window[Any](workers=workers, started=started)
        self._flow = vars(self._real)  # what windows show besides the batch
        self._flushed = -1
        self._closing = False
        self._lanes: dict[Hashable, Lane[AnyEntry]] = {}  # in the order in which their batches were opened
        self._aged: deque[Lane[AnyEntry]] = deque()  # the first of these, but for some that are gone
        self._unflushed: list[Lane[AnyEntry]] = []  # those of them that no flush was for, but for some that are gone
        self._asked: OrderedDict[Lane[AnyEntry], None] = OrderedDict()  # the one with the oldest answer first
        self._roomy = getattr(policy._room, "__func__", None) is BatchingPolicy._room
        self._most: float | None = None  # how many jobs an empty batch has room for
        self._changed: deque[Lane[AnyEntry]] = deque()
        self._turns = count(1)
        self._ready: Alarms[Lane[AnyEntry]] = Alarms(lambda lane, _: lane.ready)  # the line for a worker, by turn
        self._gated: Alarms[Lane[AnyEntry]] = Alarms(lambda lane, _: lane.gated)  # the line at the gate, by turn
        self._timers: Alarms[Lane[AnyEntry]] = Alarms(_is_awaited)
        self._broken: deque[Batch[AnyEntry]] = deque()
        self._expiries: Alarms[AnyEntry] = Alarms(lambda entry, _: entry._is_waiting)

    def successor(self, in_flight: int) -> "Collector[AnyEntry]":
        """Return a collector without jobs that has the history of this one, which an exception has interrupted."""
        collector: Collector[AnyEntry] = Collector(self.policy, self.workers, self._flow["started"])
        collector.in_flight = collector._flow["in_flight"] = in_flight
        collector._sent.extend(self._sent)
        collector._service_times.extend(self._service_times)
        collector._flow["service_time"] = self._flow["service_time"]
        return collector

    def __bool__(self) -> bool:
        """Return whether any job waits here."""
        return bool(self._lanes or self._broken)

    @property
    def has_worker(self) -> bool:
        """Whether a worker is free."""
        return self.in_flight < self.workers

    def add(self, entries: Sequence[AnyEntry], uniform: bool = False) -> None:
        """Take in jobs, the oldest first, none older than those that came before.

        With *uniform*, all have no key, the weight 1 and no moment at which they expire, and are not looked at.
        """
        if uniform and entries:
            self._lane(None, uniform).backlog.extend(entries)
            return
        lane: Lane[AnyEntry] | None = None
        for entry in entries:
            if lane is None or entry.key is not lane.key:
                lane = self._lane(entry.key, uniform)
            lane.backlog.append(entry)
            if entry._expires != NEVER:
                self._expiries.push(entry._expires, entry)

    def _lane(self, key: Hashable, uniform: bool) -> Lane[AnyEntry]:
        """Return the lane that jobs are added to."""
        place = safe(key)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = Lane(key, place)
            if self._gates == 1 and not self._has_gate and len(self._lanes) > 1:
                self._put_up_gate()
        lane.uniform = lane.uniform and uniform
        self._change(lane)
        return lane

    def _put_up_gate(self) -> None:
        """Use the gate from now on: see rule 1. A single lane needs none."""
        self._has_gate = True
        self._doubts_flow = self._doubts_heard = False
        self._doubts_any = self._learns
        self._asked.clear()
        self._change_all()

    def drop(self, entries: Iterable[AnyEntry]) -> None:
        """Forget jobs that are not `Entry._is_waiting` any more. Those that went already are passed over."""
        for entry in entries:
            lane = self._lanes.get(safe(entry.key))
            if lane is not None:
                lane.thinned = True
                lane.dead += 1
                lane.full = False  # there may be room again, or the one that did not fit may be gone
                self._change(lane)

    def expire(self, now: float) -> list[AnyEntry]:
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
                if not (lane.ready or lane.gone):  # a lane that is due already is due by its policy
                    self._change(lane)

    def note_callers(self, activity: CallerActivity) -> None:
        """Note what is known of the callers."""
        before, self._flow["callers"] = self._flow["callers"], activity
        if activity.heard != before.heard:
            self._note_change(self._doubts_heard)

    def started(self, now: float) -> None:
        """Note that a batch went to a worker."""
        self._flow["in_flight"] = self.in_flight = self.in_flight + 1
        self._sent.append(now)
        if not self._steady:
            self._note_change(self._doubts_flow)

    def finished(self, service_time: float | None = None) -> None:
        """Note that a worker is free again, and how long the batch took, if that is known."""
        self._flow["in_flight"] = self.in_flight = self.in_flight - 1
        if self._steady:
            return
        if service_time is not None:
            self._service_times.append(service_time)
            # The median, so that one very slow batch does not count.
            self._flow["service_time"] = sorted(self._service_times)[len(self._service_times) // 2]
        self._note_change(self._doubts_flow)

    def _note_change(self, doubtful: bool) -> None:
        """Note that the gate may be open or shut now, and, if *doubtful*, that the policy may answer differently."""
        self._shut_until = NOW
        if self._doubts_any:
            if self._questions < _SAVED:
                self._questions += _EARNED
            self._resume = NEVER
            self._doubts += doubtful

    def take(self, now: float, pressed: bool = False) -> Batch[AnyEntry] | None:
        """Return the next batch that is due, if a worker is free for it. The caller then calls `started`.

        With *pressed* (a caller waits for room), if nothing is due, the batch of the oldest lane is dispatched as by a
        flush: a policy that waits for more jobs waits in vain, since none can be accepted.
        """
        if self._changed:
            self._look_at_timers(now)  # first, since their moments came before the jobs did
            self._review(now)
        if self._broken:
            return self._broken.popleft()
        if self.in_flight >= self.workers:
            return None
        self._look_at_timers(now)
        first = self._next(now)
        if self._broken:
            return self._broken.popleft()
        if first is not None:
            return self._send(first, now)
        if pressed and (oldest := self._oldest()) is not None and not oldest.pressed:
            oldest.pressed = True
            self._change(oldest)
            return self.take(now)
        return None

    def _look_at_timers(self, now: float) -> None:
        while (lane := self._timers.pop(now)) is not None:
            self._line_up(lane, now)

    def _next(self, now: float) -> Lane[AnyEntry] | None:
        """Return the lane whose turn it is, of those that are due now for certain."""
        if self._learns and self._learned != self.policy._learned:
            self._learned = self.policy._learned
            self._doubts += 1
            self._most = None
        if now >= self._resume:
            self._questions, self._resume = _SAVED, NEVER
        if self._asked and self._questions > 1 and (lane := self._longest_in_doubt()) is not None:  # so no key starves
            self._ask_again(lane, now)
        while not self._broken and (lane := self._candidate(now)) is not None:
            if lane.ready and lane.asked == self._doubts:
                return lane
            if lane.gated and lane.asked == self._doubts and self._shut_until <= now:
                if self._is_let_through(lane, now):
                    return lane
            elif self._questions:
                self._ask_again(lane, now)
            else:
                self._resume = min(self._resume, now + _PAUSE)
                break
        return None

    def _candidate(self, now: float) -> Lane[AnyEntry] | None:
        """Return the lane whose turn it is if it is due, be it that it has to be asked."""
        ready = self._ready.first()
        if self._has_gate and self._shut_until <= now:
            gated = self._gated.first()
            if gated is not None and (ready is None or gated.turn < ready.turn):
                return gated
        return self._longest_in_doubt() if ready is None else ready

    def _longest_in_doubt(self) -> Lane[AnyEntry] | None:
        """Return the lane with the oldest answer, if that is in doubt."""
        for lane in self._asked:
            return lane if lane.asked != self._doubts else None
        return None

    def _is_let_through(self, lane: Lane[AnyEntry], now: float) -> bool:
        """Return whether the gate is open, which this lane at its head is asked for all of them."""
        try:
            due, lane.forced = self._answer(lane, self._window(lane), now)
        except BaseException as error:
            self._break(lane, error)
            return False
        if due > now:
            self._shut_until = due
        return due <= now

    def _ask_again(self, lane: Lane[AnyEntry], now: float) -> None:
        self._questions -= 1
        try:
            if lane.full and (self._learns or not self._shared):
                lane.full = False  # there may be room by now
                self._fill(lane)
            self._ask(lane, now)
        except BaseException as error:
            self._break(lane, error)

    def _oldest(self) -> Lane[AnyEntry] | None:
        """Return the lane whose batch was opened first."""
        while self._lanes:
            while self._aged:
                if not self._aged[0].gone:
                    return self._aged[0]
                self._aged.popleft()
            # So each is copied once, into a dict without holes too, which are looked through each time.
            self._lanes = self._lanes.copy()
            self._aged.extend(self._lanes.values())
        return None

    def next_moment(self) -> float:
        """Return when to call `expire` and `take` again if nothing else happens; `NEVER` if that is for ever."""
        if not self._lanes:  # idle: void alarms must not keep jobs alive
            for alarms in (self._timers, self._ready, self._gated):
                alarms.clear()
            self._expiries.clear()
            self._aged.clear()
            self._unflushed.clear()
            self._lanes.clear()  # which frees the memory of the lanes that it had
        moment = self._expiries.next_moment()
        if self.in_flight >= self.workers:
            return moment
        gate = self._shut_until if self._has_gate and self._gated.first() is not None else NEVER
        return min(moment, self._timers.next_moment(), self._resume, gate if gate > NOW else NEVER)

    def wanted(self) -> int:
        """Return how many jobs must come before it makes sense to call `take` again, if nothing else happens."""
        if self.in_flight >= self.workers:
            return sys.maxsize
        lane = self._lanes.get(None) if len(self._lanes) == 1 else None
        return 1 if lane is None else lane.wanted

    def describe(self, now: float) -> list[str]:
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
        self._most = NEVER if self._roomy else None  # since it may have learned
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
        if lane.thinned or lane.dead:
            self._forget_dead(lane)
        while lane.backlog and not lane.full:
            first = lane.backlog[0]
            room = self._room(lane, first)
            if room >= 1 or self.policy.fits(self._window(lane, first), first.weight):
                self._join(lane, room)
            elif lane.open:
                lane.full = True
            else:
                raise JobTooLarge(first.weight, limit_for(self.policy, self._window(lane, first), first.weight))
            if lane.dead:
                self._forget_dead(lane)

    def _room(self, lane: Lane[AnyEntry], joining: AnyEntry) -> float:
        if not lane.open and self._most is not None:
            return self._most
        room = check_answer("the _room() of a policy", self.policy._room(self._window(lane, joining)))
        if not lane.open and self._shared:  # the built-in policies answer uniform for all empty batches
            self._most = room
        return room

    def _join(self, lane: Lane[AnyEntry], room: float) -> None:
        backlog = lane.backlog
        entries = list(islice(backlog, int(max(room, 1))) if room < len(backlog) else backlog)
        joining = [entry for entry in entries if entry._is_waiting] if lane.dead else entries
        lane.open += joining  # before they leave the backlog: an exception from outside must find them somewhere
        if len(entries) < len(backlog):
            deque(map(deque.popleft, repeat(lane.long_backlog(), len(entries))), maxlen=0)
        else:
            lane.backlog = []
        lane.weight += len(joining) if lane.uniform else sum([entry.weight for entry in joining])
        self.joined += joining

    def _forget_dead(self, lane: Lane[AnyEntry]) -> None:
        if lane.thinned:
            lane.thinned = False
            lane.open = [entry for entry in lane.open if entry._is_waiting]
            lane.weight = sum([entry.weight for entry in lane.open], 0.0)  # anew, since subtraction would drift
        if lane.dead:
            if lane.dead > len(lane.backlog) // 2:
                lane.backlog = [entry for entry in lane.backlog if entry._is_waiting]
                lane.dead = 0
            while lane.dead and not lane.backlog[0]._is_waiting:
                lane.long_backlog().popleft()
                lane.dead -= 1

    def _ask(self, lane: Lane[AnyEntry], now: float) -> None:
        """Find out when the open batch is due, and set a timer or join a line."""
        lane.asked = self._doubts
        if self._doubts_any:
            self._asked[lane] = None
            self._asked.move_to_end(lane)
        if not lane.unflushed and lane.open[0]._epoch > self._flushed:
            self._note_unflushed(lane)
        due, free = lane.due, lane.free
        if self._has_gate:
            lane.due, lane.free = self._bounds(lane, now)
            lane.forced = None
        else:
            window = self._window(lane)
            lane.due, lane.forced = self._answer(lane, window, now)
            lane.free = lane.due
            near = lane.uniform and now < lane.due < now + _SHORT
            lane.wanted = check_count("the _wants() of a policy", self.policy._wants(window)) if near else 1
        self._line_up(lane, now)
        if not lane.ready:
            if due != lane.due < NEVER:
                self._timers.push(lane.due, lane)
            if free != lane.free != lane.due and not lane.gated:
                self._timers.push(lane.free, lane)

    def _line_up(self, lane: Lane[AnyEntry], now: float) -> None:
        """Put the lane into the line where it belongs now, at its old place if it has been in one."""
        if lane.free > now:
            lane.ready = lane.gated = False
            return
        if not lane.turn:
            lane.turn = next(self._turns)
        if lane.due > now:
            lane.ready = False
            if not lane.gated:
                lane.gated = True
                self._gated.push(lane.turn, lane)
        elif not lane.ready:
            lane.ready, lane.gated = True, False
            self._ready.push(lane.turn, lane)

    def _note_unflushed(self, lane: Lane[AnyEntry]) -> None:
        if len(self._unflushed) > 64 + 2 * len(self._lanes):
            self._unflushed = [lane for lane in self._unflushed if not lane.gone]
        lane.unflushed = True
        self._unflushed.append(lane)

    def _answer(self, lane: Lane[AnyEntry], window: Window[Any], now: float) -> tuple[float, str | None]:
        """Return when the open batch is due, and the trigger, if that is not the policy's."""
        due = check_answer("the due() of a policy", self.policy.due(window))
        if due == NEVER and lane.full:
            due = NOW  # nothing else could ever make it go
        if due > now and self._closing:
            return NOW, "shutdown"
        if due > now and self._is_flushed(lane):
            earliest = check_answer("the _earliest() of a policy", self.policy._earliest(window))
            if earliest < due:
                return earliest, "flush"
        return due, None

    def _is_flushed(self, lane: Lane[AnyEntry]) -> bool:
        return lane.pressed or lane.open[0]._epoch <= self._flushed

    def _bounds(self, lane: Lane[AnyEntry], now: float) -> tuple[float, float]:
        """Return when the open batch is due with the gate shut, and when with the gate open."""
        if self._closing:
            return NOW, NOW
        policy, shut, open = self.policy, self._shut, self._open
        due = policy.due(_show(shut, lane))
        if due <= now:
            return due, due
        free = policy.due(_show(open, lane))
        if free == NEVER and lane.full:
            return NOW, NOW
        if self._is_flushed(lane):
            due, free = min(due, policy._earliest(shut)), min(free, policy._earliest(open))
        return due, free

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

    def _empty(self, lane: Lane[AnyEntry]) -> list[AnyEntry]:
        """Take the open batch out, and let the next one of the lane begin."""
        entries = lane.open or [lane.long_backlog().popleft()]
        self._retire(lane)
        if lane.backlog:
            successor: Lane[AnyEntry] = Lane(lane.key, lane.place)
            successor.backlog, successor.dead, successor.uniform = lane.backlog, lane.dead, lane.uniform
            self._lanes[lane.place] = successor  # at the end: see there
            self._change(successor)
        lane.open, lane.backlog = [], []  # since it may be looked at once more
        return entries

    def _retire(self, lane: Lane[AnyEntry]) -> None:
        del self._lanes[lane.place]
        if self._doubts_any:
            self._asked.pop(lane, None)
        lane.ready = lane.gated = False
        lane.due = lane.free = NEVER  # which voids its timers
        lane.gone = True

    def _window(self, lane: Lane[AnyEntry], joining: AnyEntry | None = None) -> Window[Any]:
        if self._shared:
            return _show(self._real, lane, joining)
        return self._new_window(lane, joining)

    def _new_window(self, lane: Lane[AnyEntry], joining: AnyEntry | None = None) -> Window[Any]:
        window: Window[Any] = object.__new__(Window)
        # This takes a third of the time: a frozen dataclass sets its fields one by one.
        vars(window).update(self._flow, jobs=Jobs(lane.open), key=lane.key)
        return _show(window, lane, joining)


def _show(window: Window[Any], lane: Lane[Any], joining: Any = None) -> Window[Any]:
    """Make a window show the open batch of a lane; if that is empty, the job that is about to join it."""
    shown, entries = vars(window), lane.open or [joining]
    shown["count"] = len(lane.open)
    shown["weight"] = lane.weight
    shown["opened"] = entries[0].submitted
    shown["newest"] = entries[-1].submitted
    shown["full"] = lane.full
    return window
