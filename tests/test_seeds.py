"""Whole batchers in virtual time, where everything that users inject may fail.

A seed determines everything: the batcher, its policy, what the users do, and what goes wrong. After the first job, all
of it happens in the batcher thread. Where that thread would sleep, the clock lets the users act.

``SEEDS`` is the number of seeds of each run (2,000), and ``FIRST_SEED`` the first one (0). A failure prints its seed,
and a scenario that is reduced to few actions and faults.
"""

import contextlib
import logging
import math
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, TimeoutError
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import pytest

from microbatch import (
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatchingPolicy,
    BatchListener,
    BatchReport,
    Hints,
    JobFuture,
    JobState,
    JobTooLarge,
    Window,
)
from microbatch.policies.text import parse_policy

SEEDS = int(os.environ.get("SEEDS", "2000"))
FIRST_SEED = int(os.environ.get("FIRST_SEED", "0"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SEEDS_AT_ONCE = 2_000
"""The number of seeds of one test, because the time of a test is limited."""

LIMIT = 4
POLICIES = [
    "Size(4)",
    "Size(4) | Interval(3)",
    "Size(4) | Interval(3) | Natural()",
    "Size(4) & Rate(2, per=5)",
    "Size(4) | Session(2)",
    "Size(4) | FixedWindow(5)",
    "Size(4) | AllWaiting()",
    "Size(4) | Adaptive(2)",
    "Size(4) | Natural() & PerKey()",
    "(Size(4) | Interval(3)) & PerKey(2) & OldestFirst()",
    "Size(4) | InTime(0.5) | Interval(5)",
    "BestSize(4) | Natural()",
    "Weight(4) | Interval(2)",
    "Padded(4) | Interval(2)",
]
KINDS = ["good"] * 12 + ["error", "raise", "exit", "interrupt", "short", "nonsense", "stream", "broken stream", "late"]
ACTIONS = ["submit"] * 12 + ["cancel", "cancel", "callback", "flush", "stats", "explain", "ask", "close", "policy"]


@dataclass(frozen=True)
class Action:
    """What a user does at a moment."""

    moment: float
    what: str
    number: int  # the index of the job that it acts on
    kind: str = "good"
    key: Any = None
    weight: float = 1.0
    expires_in: float | None = None


@dataclass(frozen=True)
class Scenario:
    """A batcher, its users, and what goes wrong."""

    seed: int
    policy: str
    keyed: bool
    weighed: bool
    max_pending: int
    delayed: bool  # the executor returns results later
    workers: int
    faults: dict[str, float]  # the probability that each of these fails; "key" stands for weigh too
    actions: tuple[Action, ...] = ()
    max_weight: float = 0.0
    max_per_key: int = 0
    drop_oldest: bool = False


def scenario(seed: int) -> Scenario:
    """Return the scenario of a seed."""
    dice = random.Random(seed)
    faults = {name: dice.choice([0.0, 0.0, 0.1, 0.5]) for name in ("policy", "listener", "executor", "callback", "key")}
    faults["clock"] = dice.choice([0.0] * 20 + [0.02])
    delayed = dice.random() < 0.5
    moment, actions = 0.0, []
    for number in range(dice.randrange(1, 40)):
        moment += dice.choice([0.0, 0.0, 0.5, dice.random() * 4])
        actions.append(
            Action(
                moment,
                dice.choice(ACTIONS),
                dice.randrange(number + 1) if number else 0,
                dice.choice(KINDS),
                dice.choice(["a", "b", None, 3]),
                dice.choice([0, 1, 1, 2.5, 5]),
                dice.choice([None, None, None, 0.0, 1.0, 4.0]),
            )
        )
    keyed, weighed = dice.random() < 0.3, dice.random() < 0.3
    return Scenario(
        seed,
        dice.choice(POLICIES),
        keyed=keyed,
        weighed=weighed,
        max_pending=dice.choice([0, 4, 5, 100]),
        delayed=delayed,
        workers=dice.choice([1, 2, 3]) if delayed else 1,
        faults=faults,
        actions=tuple(actions),
        max_weight=dice.choice([0, 6]) if weighed else 0,
        max_per_key=dice.choice([0, 4]) if keyed else 0,
        drop_oldest=dice.random() < 0.3,
    )


class Fault(Exception):
    """Raised by something that a user has injected."""


class Unreliable(BatchingPolicy[Any]):
    """A policy that raises now and then, or returns nonsense."""

    def __init__(self, world: "World", policy: BatchingPolicy[Any]) -> None:
        self._world = world
        self._policy = policy

    @property
    def hints(self) -> Hints:
        return self._policy.hints

    def fits(self, window: Window[Any], weight: float) -> bool:
        self._raise()
        return self._policy.fits(window, weight)

    def due(self, window: Window[Any]) -> float:
        self._raise()
        wrong: list[Any] = [math.nan, "soon", None]
        return self._world.dice.choice(wrong) if self._world.fails("policy") else self._policy.due(window)

    def reason(self, window: Window[Any]) -> str:
        self._raise()
        return self._policy.reason(window)

    def observe(self, report: BatchReport) -> None:
        self._raise()
        self._policy.observe(report)

    def _raise(self) -> None:
        if self._world.fails("policy"):
            raise self._world.dice.choice([Fault("the policy"), KeyboardInterrupt()])


class Listener(BatchListener):
    """A listener that raises now and then."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def job_accepted(self, event: Any) -> None:
        if self._world.fails("listener"):
            raise self._world.dice.choice([Fault("the listener"), SystemExit()])

    batch_started = batch_finished = shutdown = job_accepted


class UnreliableExecutor(Executor):
    """Runs batches at once or later. It refuses, cancels or breaks some of them."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def submit(self, call: Any, /, *arguments: Any, **options: Any) -> Any:
        world, future = self._world, Future[Any]()
        fault = world.dice.choice(["refuse", "broken", "cancelled"]) if world.fails("executor") else None
        if fault == "refuse":
            raise BrokenExecutor
        if fault == "broken":
            future.set_exception(BrokenExecutor())
        elif fault == "cancelled":
            future.cancel()
            future.set_running_or_notify_cancel()
        elif world.scenario.delayed:
            late = 10 if any(action.kind == "late" for action in arguments[0]) else 1
            moment = world.moment + world.dice.choice([0.0, 0.5, 2.0]) * late
            world.add(moment, lambda: self._finish(future, call, arguments))
        else:
            self._finish(future, call, arguments)
        return future

    def _finish(self, future: "Future[Any]", call: Any, arguments: Any) -> None:
        try:
            result = call(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


class World:
    """Runs one scenario. It is also the clock of its batcher."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.dice = random.Random(scenario.seed + 1)
        self.moment = 0.0
        self.later: list[tuple[float, int, Callable[[], object]]] = []  # what else happens, and when
        self.batches: list[list[Action]] = []
        self.futures: list[JobFuture[Any]] = []
        self.called: Counter[int] = Counter()
        self.numbers = count()
        self.errors: list[BaseException] = []
        self.main = threading.current_thread()
        self.callbacks = 0
        self.ready = threading.Event()
        self.closed = self.stuck = False
        self.acting = True  # the users act, or the batcher has not started
        self.batcher: Batcher[Any, Any] = Batcher(
            self.process,
            self.policy(scenario.policy),
            key=self.key if scenario.keyed else None,
            weigh=self.weigh if scenario.weighed else None,
            max_pending=scenario.max_pending,
            max_pending_weight=scenario.max_weight,
            max_pending_per_key=scenario.max_per_key,
            drop_oldest=scenario.drop_oldest,
            max_workers=scenario.workers,
            executor=UnreliableExecutor(self),
            listeners=[Listener(self)] if scenario.faults["listener"] else [],
            clock=self,
        )
        for action in scenario.actions:
            self.add(action.moment, partial(self.act, action))

    def policy(self, text: str) -> BatchingPolicy[Any]:
        policy = parse_policy(text)
        return Unreliable(self, policy) if self.scenario.faults["policy"] else policy

    def add(self, moment: float, call: Callable[[], object]) -> None:
        """Make *call* happen at a moment."""
        self.later.append((moment, next(self.numbers), call))

    def fails(self, what: str) -> bool:
        """Return whether something fails now."""
        return self.dice.random() < self.scenario.faults[what]

    # -- the clock --

    def now(self) -> float:
        if not self.acting and self.fails("clock"):
            raise Fault("the clock")
        return self.moment

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """Let the next thing happen, if this is the batcher thread."""
        if threading.current_thread() is self.main:
            condition.wait()
            return
        self.ready.wait()
        self.acting = True
        if self.later and min(self.later)[0] <= moment:
            first = min(self.later)
            self.later.remove(first)
            self.moment, _, act = max(self.moment, first[0]), first[1], first[2]
            try:
                act()
            except BaseException as error:
                self.errors.append(error)
        elif moment < math.inf:
            self.moment = max(self.moment, moment)
        elif not self.closed:
            self.closed = True
            self.batcher.shutdown(wait=False)
        else:
            self.stuck = True
            raise Fault("the batcher thread waits forever")  # again and again, until it gives up
        self.acting = False

    # -- the users --

    def act(self, action: Action) -> None:
        """Do what a user does, and check that all counts add up."""
        future = self.futures[action.number % len(self.futures)] if self.futures else None
        if action.what == "submit":
            self.submit(action)
        elif action.what == "flush":
            self.batcher.flush(wait=False)
        elif action.what == "policy" and "Size" in self.scenario.policy:
            limited = [text for text in POLICIES if "Size" in text]
            self.batcher.policy = self.policy(limited[action.number % len(limited)])
        elif action.what == "explain":
            with contextlib.suppress(KeyboardInterrupt):  # from the policy
                self.batcher.explain()
        elif action.what == "close":
            self.batcher.shutdown(wait=False, cancel_futures=action.number % 2 == 0)
        elif future is not None and action.what == "cancel":
            assert future.cancel() == future.cancelled()
        elif future is not None and action.what == "callback":
            self.watch(future)
        elif future is not None and action.what == "ask":
            with contextlib.suppress(CancelledError, TimeoutError, KeyboardInterrupt):
                future.exception(timeout=0)
        self.check_counts()

    def submit(self, action: Action) -> None:
        try:
            future = self.batcher.submit(action, timeout=0, expires_in=action.expires_in)
        except (BacklogFull, BatcherClosed, JobTooLarge, Fault, KeyboardInterrupt):
            return
        self.futures.append(future)
        self.watch(future)

    def watch(self, future: JobFuture[Any]) -> None:
        self.callbacks += 1
        number = self.callbacks

        def call(done: Any) -> None:
            if done is not future or not done.done():
                self.errors.append(AssertionError("a callback got a future that it is not for, or that is not done"))
            self.called[number] += 1
            if self.fails("callback"):
                raise self.dice.choice([Fault, SystemExit])("a callback")

        future.add_done_callback(call)

    def key(self, action: Action) -> Any:
        if self.fails("key"):
            raise Fault("the key function")
        return action.key

    def weigh(self, action: Action) -> float:
        if self.fails("key"):
            raise Fault("the weigh function")
        return action.weight

    # -- the downstream --

    def process(self, actions: list[Action]) -> Any:
        self.batches.append(actions[:])
        kinds = {action.kind for action in actions}
        values = [Fault("this job") if action.kind == "error" else ("value", action) for action in actions]
        if "raise" in kinds:
            raise Fault("the processor")
        if "exit" in kinds:
            raise SystemExit
        if "interrupt" in kinds:
            raise KeyboardInterrupt
        if "short" in kinds:
            return values[1:]
        if "nonsense" in kinds:
            return self.dice.choice(
                [3, "text", {"a": 1}, {1, 2}, b"", object(), iter(()), values + values, StopIteration]
            )
        if "stream" in kinds:
            return iter(values)
        if "broken stream" in kinds:
            return self.broken(values)
        return values

    def broken(self, values: list[Any]) -> Iterator[Any]:
        yield values[0]
        raise Fault("the stream")

    # -- what must hold --

    def check_counts(self) -> None:
        stats = self.batcher.stats()
        counts = {state: getattr(stats, state.value) for state in JobState}
        assert min(counts.values()) >= 0 and sum(counts.values()) == stats.accepted == len(self.futures), stats
        waiting = [future for future in self.futures if future.state in (JobState.QUEUED, JobState.BATCHED)]
        limits, keys = self.scenario, Counter(future.key for future in waiting)
        assert len(waiting) <= (limits.max_pending or math.inf)
        assert sum(future.weight for future in waiting) <= (limits.max_weight or math.inf)
        assert max(keys.values(), default=0) <= (limits.max_per_key or math.inf)

    def run(self) -> None:
        """Run the scenario to its end, and check what must hold then."""
        first = Action(0.0, "submit", 0)
        while not self.futures:  # the first job starts the batcher thread
            self.submit(first)
        self.ready.set()
        assert self.batcher._engine.wait_ended()
        self.acting = True
        assert not self.stuck, "the batcher thread waits forever"
        if self.errors:
            raise self.errors[0]
        for future in self.futures:
            assert future.done(), f"{future.job} has no outcome"
            state = future.state
            if state is JobState.SUCCEEDED and not {"nonsense"} & {each.kind for each in self.batch_of(future.job)}:
                assert future.result().value == ("value", future.job)
        self.check_counts()
        assert self.called == Counter({number: 1 for number in range(1, self.callbacks + 1)})
        processed = Counter(id(action) for batch in self.batches for action in batch)
        assert not processed or max(processed.values()) == 1, "a job was processed twice"
        if "Size" in self.scenario.policy:
            assert all(0 < len(batch) <= LIMIT for batch in self.batches)
        if self.scenario.keyed:
            assert all(len({(action.key, type(action.key)) for action in batch}) == 1 for batch in self.batches)

    def batch_of(self, job: Action) -> list[Action]:
        return next((batch for batch in self.batches if any(each is job for each in batch)), [])


def failure(scenario: Scenario) -> BaseException | None:
    """Run a scenario, and return what went wrong."""
    try:
        World(scenario).run()
    except BaseException as error:
        return error
    return None


def shrunk(scenario: Scenario) -> Scenario:
    """Leave out all actions and faults that are not needed for the failure."""
    for action in reversed(scenario.actions):
        fewer = replace(scenario, actions=tuple(each for each in scenario.actions if each is not action))
        scenario = fewer if failure(fewer) else scenario
    for name in scenario.faults:
        fewer = replace(scenario, faults={**scenario.faults, name: 0.0})
        scenario = fewer if failure(fewer) else scenario
    return scenario


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep the log of all the faults out of the output."""
    caplog.set_level(logging.CRITICAL + 1)


@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + SEEDS, SEEDS_AT_ONCE))
def test_no_seed_makes_a_batcher_break_a_promise(first: int) -> None:
    for seed in range(first, min(first + SEEDS_AT_ONCE, FIRST_SEED + SEEDS)):
        if failure(scenario(seed)) is not None:
            smallest = shrunk(scenario(seed))
            raise AssertionError(f"seed {seed}: {smallest}") from failure(smallest)
