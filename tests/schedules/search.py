"""Runs a small model of a batcher again and again, each time with another schedule.

A *schedule* says which thread runs next, at each point where a thread can be preempted. The threads of a model are
real, but only one runs at a time: ``interleave-test`` replaces the locks and threads of the standard library with its
own, and asks a strategy which thread runs next. It tracks which threads are runnable, so it detects deadlocks and lost
wake-ups.

A thread can be preempted before each instruction of this package that may read or change what other threads see.
Without the GIL, Python may switch threads at all of these points, and with the GIL at some of them. Where the package
has other code for a build without the GIL, the models run that code.
"""

import contextlib
import dis
import gc
import linecache
import math
import queue
import random
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import interleave_test
from interleave_test import _primitives, _scheduler

import microbatch
import microbatch._engine.engine
import microbatch._engine.runner
import microbatch.futures.job_future

Model = Callable[[], None]

FOCUS: dict[Model, frozenset[str]] = {}
"""The functions that a model is about."""


def focus(functions: str) -> Callable[[Model], Model]:
    """Return a decorator for a model that is about these functions, separated by spaces.

    Half of the schedules preempt threads only in these functions, so that many of these schedules can be tried.
    """

    def decorate(model: Model) -> Model:
        FOCUS[model] = frozenset(functions.split())
        return model

    return decorate


_PACKAGE = Path(microbatch.__file__).parent
_SHARED = [
    _PACKAGE / name
    for name in ("_engine", "futures", "_basics/waiting.py", "_forming/callers.py", "batcher.py", "coalescer.py")
]
"""The code in which threads can be preempted. In the rest of the package, one thread at a time uses an object."""

_MAX_CHOICES = 20_000
"""A run with more choices counts as spinning."""

_CHANGES = ("STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_OTHER = ("CALL", "BINARY_SUBSCR", "BINARY_SLICE", "BINARY_OP", "CONTAINS_OP", "GET_ITER", "FOR_ITER", "LIST_EXTEND")


def _attributes_that_change() -> set[str]:
    """Return the attributes that are assigned after an object is created."""
    names = set()
    for path in _SHARED:
        for file in [path] if path.suffix else path.glob("*.py"):
            for code in _codes(compile(file.read_text(), file.name, "exec")):
                if code.co_name not in ("__init__", "_init"):
                    names |= {step.argval for step in dis.get_instructions(code) if step.opname in _CHANGES[:2]}
    return names


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


_changing = _attributes_that_change()
_lines: dict[int, dict[int, str]] = {}  # for each code object by its identity, because its hash takes long


def _lines_of(code: types.CodeType) -> dict[int, str]:
    """Return the place of each instruction before which a thread can be preempted: the function and the source line."""
    numbers = {offset: line for start, end, line in code.co_lines() for offset in range(start, end, 2)}
    found = _lines[id(code)] = {
        step.offset: f"{code.co_name}: "
        + linecache.getline(code.co_filename, numbers[step.offset] or code.co_firstlineno).strip()
        for step in dis.get_instructions(code)
        if step.opname.startswith((*_CHANGES, *_OTHER)) or step.opname == "LOAD_ATTR" and step.argval in _changing
    }
    return found


_monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
_EVENT = _monitoring.events.INSTRUCTION
_READY = _scheduler.Status.READY


def _watch(tool: int, event: Any) -> None:
    """Set an event of `sys.monitoring` for all of the shared code. 0 removes it."""
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and _is_shared(function.__code__.co_filename):
            for code in _codes(function.__code__):
                _monitoring.set_local_events(tool, code, event)


def _is_shared(filename: str) -> bool:
    return filename.startswith(tuple(map(str, _SHARED)))


class _Turn:
    """The condition variable of a scheduler. ``notify_all`` wakes only the thread whose turn it is, which saves time."""

    def __init__(self, scheduler: "_Scheduler") -> None:
        self._scheduler = scheduler
        self._lock = _scheduler._allocate_lock()
        self._sleeping: dict[int, Any] = {}  # a lock for each thread

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> None:
        me = threading.get_ident()
        sleep = self._sleeping[me] = _scheduler._allocate_lock()
        sleep.acquire()
        self._lock.release()
        try:
            sleep.acquire(True, -1 if timeout is None else timeout)
        finally:
            self._lock.acquire()
            self._sleeping.pop(me, None)

    def notify_all(self) -> None:
        over = self._scheduler._done or self._scheduler._abort
        for thread in list(self._sleeping):
            record = self._scheduler._byid.get(thread)
            if over or record is not None and record.granted:
                self._sleeping.pop(thread).release()


class _Scheduler(_scheduler.Scheduler):
    """Asks the strategy only where it matters."""

    watches = False  # whether Python calls `_before_instruction`

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "record_steps": False})
        self._cv: Any = _Turn(self)
        self._next: Any = None  # the thread that runs next
        self._turns = Counter[Any]()  # how often each thread ran because another one slept

    def _events_on(self) -> None:
        if not _Scheduler.watches:
            _Scheduler.watches = True
            _monitoring.register_callback(self._tool_id, _EVENT, _before_instruction)
            _watch(self._tool_id, _EVENT)

    def _events_off(self) -> None:
        """Do nothing, because the next schedule needs the events too."""

    def _choose(self, me: Any, line: str) -> None:
        runnable = [each for each in self._recs if each is me or each.status is _READY]
        if len(runnable) > 1:
            try:
                chosen = self._strategy.choose(runnable, me, line)
            except BaseException as error:
                with self._cv:
                    self._fail("exception", error)
                raise _scheduler._Abort from None
            if chosen is not me:
                with self._cv:
                    self._next = chosen
                    self._handoff(me, None, None, "step")

    def yield_point(self, kind: str = "step") -> None:
        """Do nothing, because there is a choice before the next instruction anyway. A `sleep` lets another thread run."""
        me = self.me()
        if self._abort and me is not None:
            raise _scheduler._Abort
        if kind == "sleep" and me is not None:
            others = [each for each in self._recs if each is not me and each.status is _READY]
            if others:
                chosen = min(others, key=self._turns.__getitem__)  # each in turn, because some of them may sleep too
                self._turns[chosen] += 1
                with self._cv:
                    self._next = chosen
                    self._handoff(me, None, None, "step")

    def _pick_next(self, current: Any, kind: str) -> Any:
        # All threads whose timeouts run out at the same moment can go on.
        for thread in self._recs:
            if (
                thread.status is _scheduler.Status.BLOCKED
                and thread.deadline is not None
                and thread.deadline <= self._vnow
            ):
                thread.blocked_on.waiters.remove(thread)
                thread.blocked_on = thread.deadline = None
                thread.woke_by_timeout = True
                thread.status = _scheduler.Status.READY
        chosen, self._next = self._next, None
        return chosen if chosen is not None else super()._pick_next(current, kind)


def _before_instruction(code: types.CodeType, offset: int) -> Any:
    lines = _lines.get(id(code))
    line = (_lines_of(code) if lines is None else lines).get(offset)
    if line is None:
        return _monitoring.DISABLE
    scheduler: Any = _scheduler._active
    me = None if scheduler is None else scheduler._byid.get(threading.get_ident())
    if me is not None:
        if scheduler._abort:
            raise _scheduler._Abort
        names = scheduler._strategy.focus
        if not me.no_yield and (names is None or code.co_name in names):
            scheduler._choose(me, line)
    return None


class _RLock(_primitives.RLock):
    """Has the private method of the real lock that the package calls."""

    def _is_owned(self) -> bool:
        scheduler = _scheduler.current_scheduler()
        return scheduler is not None and self._is_owned_by(scheduler.me())


class ScheduleClock:
    """The clock of a model. It stands still, and jumps to the next moment when no thread can go on."""

    def now(self) -> float:
        """See `Clock.now`."""
        return time.monotonic()

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """See `Clock.wait_until`."""
        remaining = moment - self.now()
        if remaining > 0:
            condition.wait(None if moment == math.inf else remaining)


def _start_new_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    interleave_test.spawn(function, *arguments)
    return 0


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    """Replace what ``interleave-test`` does not, inside the ``with`` block."""
    inbox = type("_Inbox", (queue._PySimpleQueue,), {"closed": False})  # type: ignore[attr-defined]
    names: list[tuple[Any, str, Any]] = [
        (_scheduler, "Scheduler", _Scheduler),
        (_primitives, "RLock", _RLock),
        (microbatch.futures.job_future, "_HAS_GIL", False),
        (microbatch._engine.engine, "_thread", types.SimpleNamespace(start_new_thread=_start_new_thread)),
        (microbatch._engine.runner, "_Inbox", inbox),
    ]
    before = [getattr(where, name) for where, name, _ in names]
    try:
        for where, name, value in names:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(names, before):
            setattr(where, name, value)


# -- schedules --


class Switch(NamedTuple):
    """A point where a schedule departs from the default rule.

    By that rule, the running thread continues as long as it can. Then the oldest runnable thread runs. Threads that a
    switch has preempted come last.

    Attributes:
        stopped: The number of the thread that is preempted, in order of their start. -1 if it could not continue.
        line: The function and the source line at which it is preempted.
        visit: How often that thread had a choice at that line, counting this one.
        thread: The number of the thread that runs next.
    """

    stopped: int
    line: str
    visit: int
    thread: int


Plan = tuple[Switch, ...]
"""A schedule: all switches, in order."""


class _Choice(NamedTuple):
    place: tuple[int, str, int]  # see `Switch`
    threads: list[int]  # those that can go on
    default: int
    chosen: int


class Strategy(interleave_test.Strategy):
    """Chooses by the default rule.

    Attributes:
        focus: The functions in which a thread can be preempted. None if it can be preempted anywhere.
        choices: All choices of the last run.
    """

    def __init__(self, focus: frozenset[str] | None = None) -> None:
        self.focus = focus
        self.begin(0, 0)

    def begin(self, iteration: int, seed: int) -> None:
        """Forget the last run."""
        self.choices: list[_Choice] = []
        self._visits = Counter[tuple[int, str]]()
        self._stopped: list[int] = []  # the threads that a switch has stopped

    def pick(self, runnable: Any, current: Any, index: int) -> Any:
        """Return the thread that runs next when the one that ran can't continue."""
        return self.choose(runnable, None, "")

    def choose(self, runnable: Any, current: Any, line: str) -> Any:
        """Return the thread that runs next. *current* is about to run *line*."""
        if len(self.choices) > _MAX_CHOICES:
            raise AssertionError("a thread spins")
        threads = [thread.tid for thread in runnable]
        running = -1 if current is None else current.tid
        self._visits[running, line] += 1
        place = running, line, self._visits[running, line]
        default = min(threads, key=self._rank) if current is None else running
        chosen = self._choose(place, threads, default)
        self.choices.append(_Choice(place, threads, default, chosen))
        if chosen in self._stopped:
            self._stopped.remove(chosen)
        if current is not None and chosen != running:
            self._stopped.append(running)
        return runnable[threads.index(chosen)]

    def _choose(self, place: tuple[int, str, int], threads: list[int], default: int) -> int:
        return default

    def _rank(self, thread: int) -> tuple[int, int]:
        return self._stopped.index(thread) + 1 if thread in self._stopped else 0, thread

    @property
    def plan(self) -> Plan:
        """The switches of the last run."""
        return tuple(Switch(*choice.place, choice.chosen) for choice in self.choices if choice.chosen != choice.default)


class Replay(Strategy):
    """Follows a plan. Where it does not apply, because the code has changed since, the default rule holds."""

    def __init__(self, plan: Plan = (), focus: frozenset[str] | None = None) -> None:
        super().__init__(focus)
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Follow *plan* from now on."""
        self._planned = {switch[:3]: switch.thread for switch in plan}

    def _choose(self, place: tuple[int, str, int], threads: list[int], default: int) -> int:
        wanted = self._planned.get(place, default)
        return wanted if wanted in threads else default


class Bounded(Replay):
    """Searches all schedules with at most *max_switches* switches, those with the fewest first.

    Most faults need two or three of them: M. Emmi, S. Qadeer and Z. Rakamarić, Delay-Bounded Scheduling, POPL 2011.
    Schedules with the same number are tried in random order, because there may be more than there is time for.
    """

    def __init__(self, max_switches: int, focus: frozenset[str] | None = None) -> None:
        super().__init__((), focus)
        self._left: list[list[Plan]] = [[()], *([] for _ in range(max_switches))]
        self._followed: Plan = ()

    def more(self) -> bool:
        """Return whether a schedule is left."""
        return any(self._left)

    def complete(self) -> int:
        """Return the number of switches with which all schedules were tried. -1 if not even the one without any."""
        return next((level - 1 for level, plans in enumerate(self._left) if plans), len(self._left) - 1)

    def begin(self, iteration: int, seed: int) -> None:
        """Choose the next schedule."""
        super().begin(iteration, seed)
        if hasattr(self, "_left"):
            plans = next(filter(None, self._left))
            place = random.Random(seed).randrange(len(plans))
            plans[place], plans[-1] = plans[-1], plans[place]
            self._followed = plans.pop()
            self.follow(self._followed)

    def end(self) -> None:
        """Add the schedules that have one more switch than this one, after its last."""
        level = len(self._followed) + 1
        if level == len(self._left):
            return
        last = self._followed[-1][:3] if self._followed else None
        places = [choice.place for choice in self.choices]
        first = places.index(last) + 1 if last in places else 0
        for choice in self.choices[first:]:
            others = [thread for thread in choice.threads if thread != choice.chosen]
            self._left[level] += [(*self._followed, Switch(*choice.place, other)) for other in others]


class Pct(Strategy):
    """Probabilistic concurrency testing.

    From S. Burckhardt et al., A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs, ASPLOS 2010. Each
    thread gets a random priority, and the one with the highest priority runs. At ``depth - 1`` random choices, the
    thread that runs gets the lowest priority. So a fault that needs *depth* steps in a certain order is found with a
    known probability. Here it is only approximate, because the number of choices in a run is estimated.
    """

    def __init__(self, depth: int = 3) -> None:
        self._depth = depth
        self._longest = 64
        super().__init__()

    def begin(self, iteration: int, seed: int) -> None:
        """Draw the priorities and the choices."""
        super().begin(iteration, seed)
        self._random = random.Random(seed)
        self._drops = {self._random.randrange(self._longest) for _ in range(self._depth - 1)}
        self._priorities: dict[int, float] = {}

    def _choose(self, place: tuple[int, str, int], threads: list[int], default: int) -> int:
        number = len(self.choices)
        if number in self._drops and place[0] >= 0:
            self._priorities[place[0]] = -number
        for thread in threads:
            self._priorities.setdefault(thread, self._random.random())
        return max(threads, key=self._priorities.__getitem__)

    def end(self) -> None:
        """Learn how many choices a run has."""
        self._longest = max(self._longest, len(self.choices))


# -- the search --


class Found(NamedTuple):
    """A schedule in which a model fails."""

    error: str
    plan: Plan
    columns: str


class Searched(NamedTuple):
    """What a search has done.

    Attributes:
        schedules: How many schedules were tried.
        seconds: How long that took.
        complete_anywhere: The largest number of switches up to which all schedules were tried. -1 if none.
        complete_in_focus: The same for schedules that preempt threads only in the focus of the model.
        found: A schedule in which the model fails.
    """

    schedules: int
    seconds: float
    complete_anywhere: int
    complete_in_focus: int
    found: Found | None


def run(model: Model, strategy: Strategy, schedules: int = 1, seed: int = 0) -> Any:
    """Run *model* with one schedule after another, until one fails."""
    gc.collect()
    gc.disable()  # so that finalizers run at the same points each time
    try:
        with _replaced():
            return interleave_test.explore(
                model,
                iterations=schedules,
                seed=seed,
                strategy=strategy,
                raise_on_failure=False,
                timeout=20,
            )
    finally:
        _Scheduler.watches = False
        tool = _scheduler.acquire_tool_id()
        _watch(tool, 0)
        _monitoring.free_tool_id(tool)
        gc.enable()


def search(model: Model, schedules: int, seed: int = 0) -> Searched:
    """Search for a schedule in which *model* fails.

    A quarter is random, then half preempts threads only in the focus of the model, then a quarter does so anywhere.
    """
    in_focus, anywhere = Bounded(3, FOCUS[model]), Bounded(2)
    done, seconds, found = 0, 0.0, None
    for strategy, share in ((Pct(), 1 / 4), (in_focus, 2 / 3), (anywhere, 1)):
        if found is None and (most := math.ceil((schedules - done) * share)):
            result = run(model, strategy, most, seed)
            done, seconds = done + result.schedules_run, seconds + result.elapsed
            found = None if result.failure is None else _shrunk(model, strategy.plan)
    return Searched(done, seconds, anywhere.complete(), in_focus.complete(), found)


def _shrunk(model: Model, plan: Plan) -> Found:
    """Leave out the switches that are not needed for the failure."""
    for _ in range(3):
        for switch in reversed(plan):
            fewer = tuple(each for each in plan if each != switch)
            if run(model, Replay(fewer)).failure is not None:
                plan = fewer
    replay = Replay(plan)
    failure = run(model, replay).failure
    error = "it fails only sometimes" if failure is None else f"{failure.details}\n{failure.traceback or ''}"
    return Found(error, plan, columns(replay.choices))


def columns(choices: Sequence[_Choice], width: int = 44) -> str:
    """Return the last choices of a run as text, with one column for each thread."""
    threads = sorted({choice.chosen for choice in choices})
    lines = ["".join(f"thread {thread}".ljust(width) for thread in threads).rstrip()]
    for choice in choices[-200:]:
        stopped, line, _ = choice.place
        if stopped >= 0:
            row = " " * width * threads.index(stopped) + line[: width - 2] if stopped in threads else line
            if choice.chosen != stopped:
                row += f"  <- thread {choice.chosen} goes on"
            if lines[-1] != row:
                lines.append(row)
    return "\n".join(lines)
