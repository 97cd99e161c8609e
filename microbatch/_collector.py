"""The state machine that forms batches: jobs and moments in, batches out.

It knows no thread, no lock and no clock, and is driven by one thread. Per key there is a `Lane`: the open batch, and
behind it the jobs that wait because they do not fit any more. Keys without jobs cost nothing.

The policy is asked about a lane only after something changed for it, and its answer is kept: as a timer while it lies
ahead, and then in a line of lanes that wait for a free worker, first come first served, so that a busy key can't starve
the others.
"""

import sys
from collections import deque
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any, Deque, Dict, Generic, Hashable, Iterable, List, Optional, Sequence

from microbatch._arguments import check_answer, check_count, shown
from microbatch._clock import NEVER, NOW
from microbatch._lanes import Alarms, AnyEntry, Jobs, Lane, safe
from microbatch.errors import JobTooLarge
from microbatch._policy import BatchingPolicy, Window, limit_for

__all__ = ["Batch", "Collector"]

_SHORT = 0.01
"""How long jobs may wait, in seconds, before they are told that they are in a batch, if that saves work."""


@dataclass(frozen=True)
class Batch(Generic[AnyEntry]):
    """A batch that is to go now, or, with *error*, to fail because the policy raised."""

    key: Hashable
    trigger: str
    entries: List[AnyEntry]
    weight: float = 0.0
    error: Optional[BaseException] = None


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


class Collector(Generic[AnyEntry]):
    """Forms batches as the policy says. Not thread-safe, and free of side effects but for what the policy does.

    Call `add`, `drop`, `flush`, `started` and `finished` as things happen; then `expire` and `take` with the
    present moment until they give nothing; then there is nothing to do before `next_moment`.
    """

    def __init__(self, policy: BatchingPolicy[Any], workers: int, started: float) -> None:
        self.policy = policy
        self.workers = workers
        self.in_flight = 0
        self.joined: List[AnyEntry] = []  # entries that joined an open batch; for the caller to read and to clear
        self._started_at = started
        self._watches_flow = bool(policy.watches_flow)
        self._holds_back = bool(policy.holds_back)
        self._flow = 0  # counts starts and ends of batches
        self._returning, self._return_by = 0, NOW
        self._heard = NOW
        self._service_time = 0.0  # the median of the next, so that one that was slow by far does not count
        self._service_times: Deque[float] = deque(maxlen=9)
        self._sent: Deque[float] = deque(maxlen=min(policy.history, sys.maxsize))
        self._flushed = -1
        self._closing = False
        self._lanes: Dict[Hashable, Lane[AnyEntry]] = {}
        self._changed: Deque[Lane[AnyEntry]] = deque()
        self._ready: Dict[Lane[AnyEntry], None] = {}  # the line for a worker; a dict so that any one can leave it
        self._broken: Deque[Batch[AnyEntry]] = deque()
        self._timers: Alarms[Lane[AnyEntry]] = Alarms(lambda lane, due: lane.due == due and lane not in self._ready)
        self._expiries: Alarms[AnyEntry] = Alarms(lambda entry, _: entry.waiting)

    def successor(self, in_flight: int) -> "Collector[AnyEntry]":
        """Return a collector without jobs that knows what this one has seen, for one that an exception broke off."""
        collector: Collector[AnyEntry] = Collector(self.policy, self.workers, self._started_at)
        collector.in_flight = in_flight
        collector._sent.extend(self._sent)
        collector._service_times.extend(self._service_times)
        collector._service_time = self._service_time
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
        if epoch > self._flushed or closing > self._closing:
            self._flushed = max(self._flushed, epoch)
            self._closing = self._closing or closing
            self._change_all()

    def hear_of(self, returning: int, return_by: float, heard: float) -> None:
        """Note who is likely to submit soon: see `Window.returning` and `Window.heard`."""
        self._returning, self._return_by = returning, return_by
        if heard != self._heard:
            self._heard = heard
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

        With *pressed* (somebody waits for room), and where nothing is due, the oldest lane goes as by a flush: a policy that
        waits for more jobs waits in vain, since none can be accepted.
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
        if pressed:
            for oldest in self._lanes.values():
                if not oldest.pressed:
                    oldest.pressed = True
                    self._change(oldest)
                    return self.take(now)
                break
        return None

    def _stale(self) -> Optional[Lane[AnyEntry]]:
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
        due = lane.due
        if due == NEVER:
            way_out = f"flush() dispatches it, and {shown(self.policy)} | Interval(seconds) would bound the wait"
            return f"not due until more jobs come, however long that takes: {way_out}"
        try:
            by = lane.forced or str(self.policy.reason(self._window(lane)))
        except Exception:  # of a user's policy, or of a batch that has just gone
            by = "its policy"
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

    def _fill(self, lane: Lane[AnyEntry]) -> None:
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
                raise JobTooLarge(first.weight, limit_for(self.policy, window, first.weight))
            self._forget_dead(lane)

    def _join(self, lane: Lane[AnyEntry], room: float) -> None:
        backlog = lane.backlog
        count = min(int(room), len(backlog)) if room < len(backlog) else len(backlog)
        entries = list(islice(backlog, count))
        joining = [entry for entry in entries if entry.waiting] if lane.dead else entries
        lane.open += joining  # before they are taken out: an exception from outside must not find them in neither place
        deque(map(deque.popleft, repeat(backlog, count)), maxlen=0)
        lane.weight += count if lane.alike and not lane.dead else sum([entry.weight for entry in joining])
        self.joined += joining

    def _forget_dead(self, lane: Lane[AnyEntry]) -> None:
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

    def _ask(self, lane: Lane[AnyEntry], now: float) -> None:
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
        elif due > now and (lane.pressed or lane.open[0].epoch <= self._flushed):
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

    def _send(self, lane: Lane[AnyEntry], trigger: Optional[str]) -> Batch[AnyEntry]:
        try:
            # Twice, for the first may give an instance of a subclass of str, which hashes as it likes.
            trigger = trigger or str.__str__(str(self.policy.reason(self._window(lane))))
        except BaseException as error:
            return Batch(lane.key, "", self._empty(lane), error=error)
        return Batch(lane.key, trigger, self._empty(lane), lane.weight)

    def _empty(self, lane: Lane[AnyEntry]) -> List[AnyEntry]:
        """Take the open batch out, and let the next one of the lane begin."""
        entries = lane.open or [lane.backlog.popleft()]
        self._retire(lane)
        if lane.backlog:
            successor: Lane[AnyEntry] = Lane(lane.key, lane.place)
            successor.backlog, successor.dead, successor.alike = lane.backlog, lane.dead, lane.alike
            self._lanes[lane.place] = successor  # at the end: the lanes are in the order of their oldest jobs
            self._change(successor)
        return entries

    def _retire(self, lane: Lane[AnyEntry]) -> None:
        del self._lanes[lane.place]
        self._ready.pop(lane, None)
        lane.due = NEVER  # which voids its timer

    def _window(self, lane: Lane[AnyEntry], joining: Optional[AnyEntry] = None) -> Window[Any]:
        first, last = (lane.open[0], lane.open[-1]) if lane.open else (joining, joining)
        assert first is not None and last is not None
        window: Window[Any] = object.__new__(Window)
        vars(window).update(  # in a third of the time: a frozen dataclass sets its fields one by one
            count=len(lane.open),
            weight=lane.weight,
            opened=first.submitted,
            newest=last.submitted,
            jobs=Jobs(lane.open),
            key=lane.key,
            in_flight=self.in_flight,
            workers=self.workers,
            started=self._started_at,
            service_time=self._service_time,
            sent=self._sent,
            full=lane.full,
            returning=self._returning,
            return_by=self._return_by,
            heard=self._heard,
        )
        return window
