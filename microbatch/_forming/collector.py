"""The state machine that forms batches. It takes jobs and moments, and returns batches.

It uses no thread, lock or clock, and only one thread at a time may call it. Each key has a `Lane`: an open batch, and a
backlog of jobs that do not fit into that. A key without jobs costs nothing.

The collector asks the policy about a lane only when something has changed for that lane, and keeps the answer. If the
batch is due later, the lane gets a timer. If the batch is due now, the lane joins a line of lanes that wait for a free
worker. The line is first come, first served, so a busy key can't starve the others.
"""

import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain, count, islice, repeat
from operator import attrgetter
from typing import Any, Generic, NamedTuple

from microbatch._basics.arguments import check_answer, shown
from microbatch._basics.clock import NEVER, NOW
from microbatch._forming.lanes import NO_JOBS, Alarms, AnyEntry, Jobs, Lane, Runs, safe
from microbatch.errors import JobTooLarge
from microbatch.policies.base import BatchingPolicy, CallerActivity, Window, count_gates, learners, limit_for

__all__ = ["Batch", "Collector"]

_NEAR = 0.01
"""If a batch is due within this many seconds, new jobs may stay in the queue until then, which saves work.

In that time, the state of these jobs is `JobState.QUEUED`.
"""

_QUESTIONS_PER_EVENT, _MOST_QUESTIONS = 2, 64
"""How many more questions about lanes in doubt each start or end of a batch allows, and the most that are saved up."""

_PAUSE = 0.001
"""After this many seconds without a start or an end of a batch, `_MOST_QUESTIONS` more questions are allowed."""


class _Endless(Sequence[float]):
    """An endless list of dispatches, all at `NEVER`. If it is in the window, a rate limit holds every batch back."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return NEVER


class Batch(NamedTuple):
    """A batch to dispatch now. If *error* is set, the policy raised it, and the jobs have to fail with it instead."""

    key: Hashable
    trigger: str
    entries: list[Any]
    weight: float = 0.0
    error: BaseException | None = None
    runs: Runs | None = None  # see `Collector.started`


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


def _is_awaited(lane: Lane[Any], moment: float) -> bool:
    """Return whether the timer of a lane is valid, that is, whether the lane still has to join a line at *moment*."""
    return not lane.ready and (moment == lane.due or moment == lane.free and not lane.gated)


class Collector(Generic[AnyEntry]):
    """Forms batches by the rules of a policy. Not thread-safe. Has no side effects except those of the policy.

    Call `add`, `drop`, `flush`, `note_callers`, `started` and `finished` when these things happen. Then call `expire`,
    and call `take` with the current moment until it returns None. After that, there is nothing to do before
    `next_moment`.

    The start or the end of a batch can change the answer of the policy for any lane, and there may be a million lanes.
    Two rules keep the cost of a batch independent of their number:

    1. One gate. If a built-in policy holds batches back because of other batches, it holds back the batches of all keys
       until the same moment. This is called the gate: it is shut until that moment, and then open. When a lane changes,
       the policy is asked twice: when is its batch due with the gate open, and when with the gate shut? Between these
       two moments, the lane waits in the line at the gate. After a start or an end, the policy is asked only about the
       first lane in that line, and the answer holds for all of them.
    2. Doubt. A user's policy may give any answer after a start or an end, so older answers are then in doubt, unless
       the policy promises otherwise (`Hints.watches_flow`). When a worker is free, the policy is asked again: first
       about the lane with the oldest answer, so that busy keys can't starve it, and then about the first lane in the
       line for a worker. If that batch is no longer due, the policy is asked about the next lanes in the line, and then
       about all others, the oldest answer first, until a batch is due.

       The number of these questions is limited. Each start and each end allows `_QUESTIONS_PER_EVENT` more, and at most
       `_MOST_QUESTIONS` are saved up. When none are left, `_MOST_QUESTIONS` more are allowed each time that nothing has
       started or ended for `_PAUSE` seconds, until no answer is in doubt. So a changed answer is always found, but not
       always immediately.

    Attributes:
        policy: The policy.
        workers: The number of workers.
        limit: How many batches may run at the same time now: *workers*, or fewer if the policy says so.
        in_flight: The number of batches that run now.
        batched: The number of jobs in open batches.
    """

    def __init__(self, policy: BatchingPolicy[Any], workers: int, started: float) -> None:
        self.policy = policy
        self.workers = self.limit = workers
        self.in_flight = 0
        self.batched = 0
        self._gates = count_gates(policy)
        self._has_gate = False  # rule 1 applies: there is one gate, and there was more than one lane at some time
        self._shut_until = NOW  # the moment until which the gate is known to be shut
        self._doubts = 0  # how often all answers were put in doubt: a lane with a lower `asked` is in doubt
        self._certain = 0  # the value of `_doubts` when no lane was in doubt any more
        self._learned = 0  # the last known `BatchingPolicy._learned`
        self._learns = bool(learners(policy)) and self._gates is not None
        self._oldest_first = policy.hints.oldest_first
        self._watches_keys = policy.hints.watches_keys
        self._runs: dict[Hashable, Runs] = {}  # by key, if the policy watches the keys
        self._doubts_flow = policy.hints.watches_flow and self._gates != 0
        self._doubts_callers = policy.hints.recalls > 0
        self._doubts_any = self._learns or self._doubts_flow or self._doubts_callers
        self._steady = self._gates == 0 and not self._learns  # a start or an end can't change any answer
        self._questions = _MOST_QUESTIONS  # how many questions about lanes in doubt are allowed now
        self._resume = NEVER  # the moment at which `_questions` is set to `_MOST_QUESTIONS` again
        self._service_times: deque[float] = deque(maxlen=9)
        self._sent: deque[float] = deque(maxlen=min(policy.hints.history, sys.maxsize))
        # The built-in policies don't look at jobs and don't keep windows, so the same `Window` objects can be reused.
        self._shared = self._gates is not None
        # Windows for the real state, and for two imaginary ones: with the gate shut, and with the gate open.
        self._real = Window[Any](workers=workers, started=started, sent=self._sent)
        self._shut = Window[Any](
            workers=workers, started=started, sent=_Endless(), in_flight=1, callers=CallerActivity(heard=NEVER)
        )
        self._open = Window[Any](workers=workers, started=started)
        self._flow = vars(self._real)  # the attributes of windows that do not depend on the batch
        self._is_limited = policy._most_running() < NEVER
        if self._is_limited:
            self._update_limit()
        self._flushed = -1
        self._closing = False
        self._lanes: dict[Hashable, Lane[AnyEntry]] = {}  # in the order in which their batches were opened
        self._aged: deque[Lane[AnyEntry]] = deque()  # the oldest lanes, in that order, and some that are gone
        self._unflushed: list[Lane[AnyEntry]] = []  # lanes that the next flush makes due, and some that are gone
        self._asked: OrderedDict[Lane[AnyEntry], None] = OrderedDict()  # the lane with the oldest answer is first
        self._unlimited = getattr(policy._room, "__func__", None) is BatchingPolicy._room  # any number of jobs fits
        self._most: float | None = None  # how many jobs fit into an empty batch, if that is known
        self._changed: dict[Lane[AnyEntry], None] = {}  # the lanes that must be brought up to date, in order
        self._turns = count(1)
        self._ready: Alarms[Lane[AnyEntry]] = Alarms(lambda lane, _: lane.ready)  # the line for a worker, by turn
        self._gated: Alarms[Lane[AnyEntry]] = Alarms(lambda lane, _: lane.gated)  # the line at the gate, by turn
        self._timers: Alarms[Lane[AnyEntry]] = Alarms(_is_awaited)
        self._broken: deque[Batch] = deque()
        self._expiries: Alarms[AnyEntry] = Alarms(lambda entry, _: entry._is_waiting)

    def successor(self, policy: BatchingPolicy[Any], running: Sequence[Runs | None]) -> "Collector[AnyEntry]":
        """Return an empty collector with the history of this one, for a new policy or after an exception.

        *running* has the `Batch.runs` of each batch that runs now.
        """
        collector: Collector[AnyEntry] = Collector(policy, self.workers, self._flow["started"])
        collector.in_flight = collector._flow["in_flight"] = len(running)
        for runs, number in Counter(filter(None, running)).items():
            runs.count, runs.lane = number, None
            collector._runs[runs.place] = runs
        collector._sent.extend(self._sent)
        collector._service_times.extend(self._service_times)
        collector._flow["service_time"] = self._flow["service_time"]
        return collector

    def entries(self) -> list[AnyEntry]:
        """Return all jobs that wait, in the order of their acceptance."""
        entries = chain(*(chain(lane.open, lane.backlog) for lane in self._lanes.values()))
        return sorted([entry for entry in entries if entry._is_waiting], key=attrgetter("_epoch", "submitted"))

    def __bool__(self) -> bool:
        """Return whether the collector holds any job."""
        return bool(self._lanes or self._broken)

    @property
    def has_worker(self) -> bool:
        """Whether one more batch may run."""
        return self.in_flight < self.limit

    def add(self, entries: Sequence[AnyEntry], uniform: bool = False) -> None:
        """Add jobs to their lanes.

        Args:
            entries: The jobs, the oldest first. None of them may be older than a job of an earlier call.
            uniform: Whether all of them have no key, weigh 1 and never expire. This saves a look at each of them.
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
        """Return the lane of a key, which is about to get more jobs. Create it if there is none."""
        place = safe(key)
        lane = self._lanes.get(place)
        if lane is None:
            lane = self._lanes[place] = Lane(key, place)
            if self._watches_keys:
                self._let_run(lane, self._runs.setdefault(place, Runs(place)))
            if self._gates == 1 and not self._has_gate and len(self._lanes) > 1:
                self._put_up_gate()
        if not lane.backlog:
            lane.backlog = []
        lane.uniform = lane.uniform and uniform
        self._changed[lane] = None
        return lane

    def _put_up_gate(self) -> None:
        """Apply rule 1 from now on. It is not needed as long as there is only one lane."""
        self._has_gate = True
        self._doubts_flow = self._doubts_callers = False
        self._doubts_any = self._learns
        self._asked.clear()
        self._change_all()

    def drop(self, entries: Iterable[AnyEntry]) -> None:
        """Remove jobs that are not `Entry._is_waiting` any more. Jobs whose batch was taken already are ignored."""
        for entry in entries:
            lane = self._lanes.get(safe(entry.key))
            if lane is not None:
                lane.thinned = True
                lane.dead += 1
                lane.full = False  # more jobs may fit now, or the job that did not fit was removed
                self._changed[lane] = None

    def expire(self, now: float) -> list[AnyEntry]:
        """Return the jobs that expire now. The caller may let them expire, and then calls `drop` for them."""
        expired = []
        while (entry := self._expiries.pop(now)) is not None:
            expired.append(entry)
        return expired

    def put_off(self, entry: AnyEntry) -> None:
        """Let a job from `expire` expire later: at the moment that it says now."""
        if entry._expires != NEVER:
            self._expiries.push(entry._expires, entry)

    def flush(self, epoch: int, closing: bool = False) -> None:
        """Make all jobs of *epoch* and of earlier epochs due, as soon as `BatchingPolicy._earliest` allows it.

        With *closing*, make all jobs due now, including all that are added later.
        """
        if closing and not self._closing:
            self._closing = True
            self._change_all()
        if epoch > self._flushed:
            self._flushed = epoch
            lanes, self._unflushed = self._unflushed, []
            for lane in lanes:
                lane.unflushed = False
                if not (lane.ready or lane.gone):  # if the batch is due already, its trigger is that of the policy
                    self._changed[lane] = None

    def note_callers(self, activity: CallerActivity) -> None:
        """Record the activity of the callers, for `Window.callers`."""
        before, self._flow["callers"] = self._flow["callers"], activity
        if activity.heard != before.heard:
            self._note_change(self._doubts_callers)

    def started(self, now: float, runs: Runs | None = None) -> None:
        """Record that a batch was dispatched. *runs* is its `Batch.runs`."""
        self._flow["in_flight"] = self.in_flight = self.in_flight + 1
        self._sent.append(now)
        if runs is not None:
            self._runs[runs.place] = runs
            self._count(runs, 1)
        if not self._steady:
            self._note_change(self._doubts_flow)

    def finished(self, service_time: float | None = None, runs: Runs | None = None) -> None:
        """Record that a batch is over, so a worker is free.

        *service_time* is in seconds, or None if unknown. *runs* is the `Batch.runs` of the batch.
        """
        self._flow["in_flight"] = self.in_flight = self.in_flight - 1
        if runs is not None:
            self._count(runs, -1)
        if self._steady:
            return
        if service_time is not None:
            self._service_times.append(service_time)
            # The median, so that a single very slow batch has no effect.
            self._flow["service_time"] = sorted(self._service_times)[len(self._service_times) // 2]
        self._note_change(self._doubts_flow)

    def _let_run(self, lane: Lane[AnyEntry], runs: Runs) -> None:
        lane.runs, runs.lane = runs, lane

    def _count(self, runs: Runs, change: int) -> None:
        """Count a batch that starts or ends, and ask the policy about the open batch of its key again."""
        runs.count += change
        if runs.lane is not None:
            self._changed[runs.lane] = None
        elif not runs.count:
            self._runs.pop(runs.place, None)

    def _note_change(self, doubtful: bool) -> None:
        """Record that the gate may have opened or shut, and, if *doubtful*, that all answers are in doubt (rule 2)."""
        self._shut_until = NOW
        if self._doubts_any:
            if self._questions < _MOST_QUESTIONS:
                self._questions += _QUESTIONS_PER_EVENT
            self._resume = NEVER
            self._doubts += doubtful

    def take(self, now: float, pressed: bool = False) -> Batch | None:
        """Return the next batch that is due, or None if there is none or no more batches may run.

        Call `started` when the batch has been dispatched.

        *pressed* says that a caller waits because the queue is full. If no batch is due then, the oldest batch is
        flushed, because its policy would wait in vain: no more jobs can be accepted.
        """
        if self._is_limited:
            self._update_limit()
        if self._timers.heap:
            self._run_timers(now)  # first, because their moments were before the changes
        if self._changed:
            self._review(now)
        if self._broken:
            return self._broken.popleft()
        if self.in_flight >= self.limit:
            return None
        first = self._next(now)
        if self._broken:
            return self._broken.popleft()
        if first is not None:
            return self._send(first, now)
        if pressed and (oldest := self._oldest()) is not None and not oldest.pressed:
            self._press(oldest)
            return self.take(now)
        return None

    def _update_limit(self) -> None:
        """Ask the policy how many batches may run. Its answer changes only when a batch has ended."""
        limit = int(max(1, min(self.workers, self.policy._most_running())))
        if limit != self.limit:
            self.limit = limit
            for window in (self._real, self._shut, self._open):
                vars(window)["workers"] = limit
            self._doubts += self._doubts_any  # an answer may depend on `Window.workers`

    def press(self, key: Hashable) -> None:
        """Flush the open batch of one key, because a caller waits until there is room for another job of that key."""
        lane = self._lanes.get(safe(key))
        if lane is not None and not lane.pressed:
            self._press(lane)

    def _press(self, lane: Lane[AnyEntry]) -> None:
        lane.pressed = True
        self._changed[lane] = None

    def _run_timers(self, now: float) -> None:
        """Put the lanes whose timers have run out into the lines."""
        while (lane := self._timers.pop(now)) is not None:
            self._line_up(lane, now)

    def _next(self, now: float) -> Lane[AnyEntry] | None:
        """Return the next lane whose batch is certainly due now. This asks the policy about lanes in doubt."""
        if self._learns and self._learned != self.policy._learned:
            self._learned = self.policy._learned
            self._doubts += 1
            self._most = None
        if now >= self._resume:
            self._questions, self._resume = _MOST_QUESTIONS, NEVER
        # First, one question about the lane with the oldest answer, so that busy keys can't starve it.
        if self._doubts != self._certain and self._questions > 1 and (lane := self._longest_in_doubt()) is not None:
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
        """Return the lane that is next in turn, or None. Its answer may be in doubt."""
        ready = self._ready.first()
        if self._gated.heap and self._shut_until <= now:
            gated = self._gated.first()
            if gated is not None and (ready is None or gated.turn < ready.turn):
                return gated
        return self._longest_in_doubt() if ready is None and self._doubts != self._certain else ready

    def _longest_in_doubt(self) -> Lane[AnyEntry] | None:
        """Return the lane with the oldest answer if that answer is in doubt, or None."""
        for lane in self._asked:
            if lane.asked != self._doubts:
                return lane
            break
        self._certain = self._doubts
        return None

    def _is_let_through(self, lane: Lane[AnyEntry], now: float) -> bool:
        """Ask about the first lane in the line at the gate, and return whether the gate is open."""
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
                lane.full = False  # the policy may allow more jobs now
                self._fill(lane)
            self._ask(lane, now)
        except BaseException as error:
            self._break(lane, error)

    def _oldest(self) -> Lane[AnyEntry] | None:
        """Return the lane whose batch was opened first, of those that may be dispatched now."""
        while self._lanes:
            while self._aged:
                if not self._aged[0].gone:
                    oldest = self._aged[0]
                    if not (self._watches_keys and self._is_held(oldest)):
                        return oldest
                    return next((lane for lane in self._lanes.values() if not self._is_held(lane)), None)
                self._aged.popleft()
            # Each lane is copied to `_aged` only once, so this takes constant time per lane. The dict is copied too,
            # because an iteration over a dict that has lost many entries passes over all of their empty slots.
            self._lanes = self._lanes.copy()
            self._aged.extend(self._lanes.values())
        return None

    def next_moment(self) -> float:
        """Return the moment at which to call `expire` and `take` again if nothing else happens, or `NEVER`."""
        if not self._lanes:  # the batcher is idle, and invalid alarms must not keep jobs alive
            for alarms in (self._timers, self._ready, self._gated):
                alarms.clear()
            self._expiries.clear()
            self._aged.clear()
            self._unflushed.clear()
            self._lanes.clear()  # an empty dict may still have the memory of its former entries; this frees it
        moment = self._expiries.next_moment() if self._expiries.heap else NEVER
        if self.in_flight >= self.limit:
            return moment
        gate = self._shut_until if self._gated.heap and self._gated.first() is not None else NEVER
        return min(moment, self._timers.next_moment(), self._resume, gate if gate > NOW else NEVER)

    def wanted(self) -> float:
        """Return how many jobs must arrive to make it worth calling `take` again, if nothing else happens."""
        if self.in_flight >= self.limit:
            return NEVER
        lane = self._lanes.get(None) if len(self._lanes) == 1 else None
        return 1 if lane is None else lane.wanted

    def is_open(self, entry: AnyEntry) -> bool:
        """Return whether an entry is in an open batch. Any thread may call this at any time, like `describe`."""
        lane = self._lanes.get(safe(entry.key))
        return lane is not None and entry in lane.open

    def describe(self, now: float) -> list[str]:
        """Describe each open batch: its jobs, when it is due, and what it waits for.

        Any thread may call this at any time, without a lock. If a job moves in the meantime, the text may show it in
        its old or its new place. This changes nothing in the collector, but calls methods of the policy.
        """
        lanes, note = list(self._lanes.values()), self.policy._note()
        return [self._described(lane, now) for lane in lanes if lane.open] + [note] * bool(note)

    def describe_batch(self, key: Hashable, now: float) -> str:
        """Describe the open batch of one key like `describe`. Return an empty string if there is none."""
        lane = self._lanes.get(safe(key))
        return self._described(lane, now) if lane is not None and lane.open else ""

    def _described(self, lane: Lane[AnyEntry], now: float) -> str:
        count, key = len(lane.open), "" if lane.key is None else f" of key {shown(lane.key)}"
        text = f"open batch{key}: {_jobs(count)}, {self._due(lane, now)}"
        return f"{text}; {_jobs(len(lane.backlog))} behind it that did not fit" if lane.backlog else text

    def _due(self, lane: Lane[AnyEntry], now: float) -> str:
        due, forced = lane.due, lane.forced
        try:
            window = self._new_window(lane)  # the other windows belong to the leader, which may be using them
            if self._watches_keys and self.policy._holds(window):
                return "held back until a running batch of its key is over"
            if self._has_gate:
                due, forced = self._answer(lane, window, now)
            by = forced or str(self.policy.reason(window))
        except Exception:  # from a user's policy, or because the batch was taken in the meantime
            by = "its policy"
        if due == NEVER:
            way_out = f"flush() dispatches it, and {shown(self.policy)} | Interval(seconds) would bound the wait"
            return f"not due until more jobs come, however long that takes: {way_out}"
        if due > now:
            return f"due in {due - now:.3f} s by {by}"
        return f"due by {by}, and waits {self._obstacle()}"

    def _obstacle(self) -> str:
        if self.has_worker:
            return "for its turn"
        if self.in_flight >= self.workers:
            return "for a free worker"
        return f"until fewer than {self.limit:,} batches run" if self.limit > 1 else "until no other batch runs"

    def _change_all(self) -> None:
        self._changed.update(dict.fromkeys(self._lanes.values()))

    def _review(self, now: float) -> None:
        """Bring all changed lanes up to date."""
        self._most = NEVER if self._unlimited else None  # the policy may have learned
        if len(self._unflushed) > 64 + 2 * len(self._lanes):
            self._unflushed = [lane for lane in self._unflushed if not lane.gone]
        while self._changed:
            changed, self._changed = self._changed, {}
            for lane in changed:
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
        """Move jobs from the backlog to the open batch, in order, until one does not fit.

        Raises:
            JobTooLarge: A job does not even fit into an empty batch.
            Exception: Whatever the policy raises.
        """
        if lane.thinned or lane.dead:
            self._forget_dead(lane)
        while lane.backlog and not lane.full:
            room = self._room(lane) if lane.open or self._most is None else self._most
            if room >= 1 or self._fits(lane, lane.backlog[0]):
                self._join(lane, room)
            else:
                lane.full = True
            if lane.dead:
                self._forget_dead(lane)

    def _fits(self, lane: Lane[AnyEntry], joining: AnyEntry) -> bool:
        """Return whether a job fits into the open batch. Raise JobTooLarge if it does not fit into an empty one."""
        window = self._window(lane, joining)
        if self.policy.fits(window, joining.weight):
            return True
        if lane.open:
            return False
        raise JobTooLarge(joining.weight, limit_for(self.policy, window, joining.weight))

    def _room(self, lane: Lane[AnyEntry]) -> float:
        window = self._window(lane, lane.backlog[0])
        room = check_answer("the _room() of a policy", self.policy._room(window))
        if not lane.open and self._shared:  # a built-in policy gives the same answer for all empty batches
            self._most = room
        return room

    def _join(self, lane: Lane[AnyEntry], room: float) -> None:
        backlog = lane.backlog
        entries = backlog if room >= len(backlog) else list(islice(backlog, int(max(room, 1))))
        joining = [entry for entry in entries if entry._is_waiting] if lane.dead else entries
        # Before they leave the backlog, because an exception from outside may come in between.
        if lane.open:
            lane.open += joining
        else:
            lane.open = joining if isinstance(joining, list) else list(joining)
        if len(entries) < len(backlog):
            deque(map(deque.popleft, repeat(lane.long_backlog(), len(entries))), maxlen=0)
        else:
            lane.backlog = NO_JOBS
        if lane.uniform:
            lane.weight += len(joining)
            lane.heaviest = 1.0
        else:
            self._add_up(lane, joining)
        self.batched += len(joining)

    def _add_up(self, lane: Lane[AnyEntry], joining: Iterable[AnyEntry]) -> None:
        """Update what is known of all jobs of the open batch together."""
        for entry in joining:
            lane.weight += entry.weight
            if entry.weight > lane.heaviest:
                lane.heaviest = entry.weight
            if entry._expires < lane.expires:
                lane.expires = entry._expires

    def _forget_dead(self, lane: Lane[AnyEntry]) -> None:
        """Remove jobs that are not waiting any more from the open batch, and from the backlog once it is cheap."""
        if lane.thinned:
            lane.thinned = False
            self.batched -= len(lane.open)
            lane.open = [entry for entry in lane.open if entry._is_waiting]
            self.batched += len(lane.open)
            # Added up again, because subtracting would accumulate rounding errors.
            lane.weight, lane.heaviest, lane.expires = 0.0, 0.0, NEVER
            self._add_up(lane, lane.open)
        if lane.dead:
            if lane.dead > len(lane.backlog) // 2:
                lane.backlog = [entry for entry in lane.backlog if entry._is_waiting]
                lane.dead = 0
            while lane.dead and not lane.backlog[0]._is_waiting:
                lane.long_backlog().popleft()
                lane.dead -= 1

    def _ask(self, lane: Lane[AnyEntry], now: float) -> None:
        """Ask the policy when the open batch is due, and set a timer for the lane or put it into a line."""
        lane.asked = self._doubts
        if self._doubts_any:
            self._asked[lane] = None
            self._asked.move_to_end(lane)
        if not lane.unflushed and lane.open[0]._epoch > self._flushed:
            lane.unflushed = True
            self._unflushed.append(lane)
        due, free = lane.due, lane.free
        if self._watches_keys and self._is_held(lane):
            lane.due = lane.free = NEVER
            lane.forced, lane.wanted = None, 1
        elif self._has_gate:
            lane.due, lane.free = self._bounds(lane, now)
            lane.forced = None
        else:
            window = self._window(lane)
            lane.due, lane.forced = self._answer(lane, window, now)
            lane.free = lane.due
            near = lane.uniform and now < lane.due < now + _NEAR
            lane.wanted = self._enough(window) if near and self._shared else 1
        self._line_up(lane, now)
        if not lane.ready:
            if due != lane.due < NEVER:
                self._timers.push(lane.due, lane)
            if free != lane.free != lane.due and not lane.gated:
                self._timers.push(lane.free, lane)

    def _is_held(self, lane: Lane[AnyEntry]) -> bool:
        """Return whether the batch must wait for the end of a running batch of its key, whatever else happens."""
        return self.policy._holds(self._window(lane))

    def _enough(self, window: Window[Any]) -> float:
        """Return how many jobs must join before a built-in policy can find the batch due earlier than it does now.

        That is when the batch is full, or when most of the callers that the policy waits for have come back.
        """
        returning = window.callers.returning
        return max(1, min(self.policy._room(window), returning - returning // 8 if returning else NEVER))

    def _line_up(self, lane: Lane[AnyEntry], now: float) -> None:
        """Put the lane into the line where it belongs now. If it was in a line before, it keeps its place."""
        if lane.free > now:
            lane.ready = lane.gated = False
            return
        if not lane.turn:
            lane.turn = lane.open[0].submitted if self._oldest_first else next(self._turns)
        if lane.due > now:
            lane.ready = False
            if not lane.gated:
                lane.gated = True
                self._gated.push(lane.turn, lane)
        elif not lane.ready:
            lane.ready, lane.gated = True, False
            self._ready.push(lane.turn, lane)

    def _answer(self, lane: Lane[AnyEntry], window: Window[Any], now: float) -> tuple[float, str | None]:
        """Return when the open batch is due, and the trigger if it is not the policy's reason."""
        due = check_answer("the due() of a policy", self.policy.due(window))
        if due == NEVER and lane.full and not window.key_in_flight:
            due = NOW  # no job can join any more, so nothing else would ever make the batch due
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
        """Return when the open batch is due with the gate shut, and when it is due with the gate open."""
        if self._closing:
            return NOW, NOW
        policy, shut, open = self.policy, self._shut, self._open
        due = policy.due(_show(shut, lane))
        if due <= now:
            return due, due
        free = policy.due(_show(open, lane))
        if free == NEVER and lane.full and not open.key_in_flight:
            return NOW, NOW
        if self._is_flushed(lane):
            due, free = min(due, policy._earliest(shut)), min(free, policy._earliest(open))
        return due, free

    def _send(self, lane: Lane[AnyEntry], now: float) -> Batch:
        try:
            window = self._window(lane)
            if self._has_gate and (self._closing or self._is_flushed(lane)):
                _, lane.forced = self._answer(lane, window, now)
            # Converted twice, because `str` may return an instance of a subclass, which may define its own hash.
            trigger = lane.forced or str.__str__(str(self.policy.reason(window)))
        except BaseException as error:
            return Batch(lane.key, "", self._empty(lane), error=error)
        return Batch(lane.key, trigger, self._empty(lane), lane.weight, None, lane.runs)

    def _empty(self, lane: Lane[AnyEntry]) -> list[AnyEntry]:
        """Take out and return the jobs of the open batch. If there is a backlog, it gets a new lane."""
        self.batched -= len(lane.open)
        entries = lane.open or [lane.long_backlog().popleft()]
        self._retire(lane)
        if lane.backlog:
            successor: Lane[AnyEntry] = Lane(lane.key, lane.place)
            successor.backlog, successor.dead, successor.uniform = lane.backlog, lane.dead, lane.uniform
            if lane.runs is not None:
                self._let_run(successor, lane.runs)
            self._lanes[lane.place] = successor  # at the end, because the dict is ordered by age
            self._changed[successor] = None
        lane.open = lane.backlog = NO_JOBS  # the old lane may still be in `_changed`, and is then reviewed once more
        return entries

    def _retire(self, lane: Lane[AnyEntry]) -> None:
        del self._lanes[lane.place]
        if lane.runs is not None:
            lane.runs.lane = None
            if not lane.runs.count:
                self._runs.pop(lane.place, None)
        if self._doubts_any:
            self._asked.pop(lane, None)
        lane.ready = lane.gated = False
        lane.due = lane.free = NEVER  # this makes its timers invalid
        lane.gone = True

    def _window(self, lane: Lane[AnyEntry], joining: AnyEntry | None = None) -> Window[Any]:
        if self._shared:
            return _show(self._real, lane, joining)
        return self._new_window(lane, joining)

    def _new_window(self, lane: Lane[AnyEntry], joining: AnyEntry | None = None) -> Window[Any]:
        window: Window[Any] = object.__new__(Window)
        # This takes a third of the time of `Window(...)`, because a frozen dataclass sets its fields one by one.
        vars(window).update(self._flow, jobs=Jobs(lane.open), key=lane.key)
        return _show(window, lane, joining)


def _show(window: Window[Any], lane: Lane[Any], joining: Any = None) -> Window[Any]:
    """Make a window show the open batch of a lane. If that is empty, show the times of the job that is joining."""
    shown, entries = vars(window), lane.open or [joining]
    shown["count"] = len(lane.open)
    shown["weight"] = lane.weight
    shown["heaviest"] = lane.heaviest
    shown["expires"] = lane.expires
    shown["opened"] = entries[0].submitted
    shown["newest"] = entries[-1].submitted
    shown["full"] = lane.full
    shown["key_in_flight"] = 0 if lane.runs is None else lane.runs.count
    return window
