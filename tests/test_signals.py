"""A signal comes in at each place in our code where Python lets one in, one after another: nothing is lost, nobody waits."""

import dis
import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, TimeoutError, as_completed, wait
from contextlib import suppress
from functools import lru_cache, partial
from itertools import count
from types import CodeType, FrameType
from typing import Any

import pytest

from microbatch import (
    NEVER,
    AllWaiting,
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatcherShutDown,
    BatcherStats,
    BatchingPolicy,
    BatchListener,
    Interval,
    JobExpired,
    JobFuture,
    Natural,
    Size,
)
from microbatch._basics.waiting import StartLatch, Waiter
from microbatch._engine import ledger
from microbatch._engine.ledger import Ledger
from microbatch._engine.queue import Drained, JobQueue
from microbatch.testing import ManualClock, RecordingProcessor
from tests.threads import in_thread

pytestmark = [
    pytest.mark.signals,
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="there, some instructions are not traced"),
]

# Python looks for signals after these instructions, on one version or another.
ENTRANCES = ("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "POP_JUMP_BACKWARD")

# Until 3.11, it also collects garbage where it makes a container.
ENTRANCES_OF_FINALIZERS = (*ENTRANCES, "BUILD")


@pytest.fixture(autouse=True)
def no_finalizer_is_interrupted() -> Iterator[None]:
    """Hold off the garbage collector, whose calls of finalizers would swallow what a handler raises there."""
    gc.disable()
    yield
    gc.enable()


@lru_cache(maxsize=None)
def _names_in(code: CodeType) -> dict[int, str]:
    return {step.offset: step.opname for step in dis.get_instructions(code)}


class Signal:
    """Calls *handler* at the *place*-th entrance that the calling thread comes to in *modules*."""

    def __init__(
        self,
        handler: Callable[[], Any],
        place: int,
        modules: tuple[str, ...] = ("microbatch.",),
        entrances: tuple[str, ...] = ENTRANCES,
    ) -> None:
        self.handler = handler
        self.places_left = place
        self.came = False
        self._modules = modules
        self._entrances = entrances
        self._names: dict[FrameType, dict[int, str]] = {}
        self._before: dict[FrameType, str] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith(self._modules):
            return None
        frame.f_trace_opcodes = True
        if frame not in self._names:
            self._names[frame] = _names_in(frame.f_code)
        if event == "call":
            self._before[frame] = "RESUME"  # which is not traced itself
        if event == "opcode":
            entered = self._before.get(frame, "").startswith(self._entrances)
            self._before[frame] = self._names[frame].get(frame.f_lasti, "")
            self.places_left -= entered
            if self.places_left < 0:
                sys.settrace(None)
                frame.f_trace = None
                self.came = True
                self.handler()
        return self.trace

    def during(self, act: Callable[[], Any]) -> BaseException | None:
        """Call *act*, and return what it raised."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            act()
        except (Exception, KeyboardInterrupt) as error:  # but not what ends a test that takes too long
            return error
        finally:
            sys.settrace(before)
        return None


class Use:
    """A batcher with one job, if it has been used, and what can be done with it."""

    def __init__(self, used: bool, policy: Any = Size(1)) -> None:
        self.batcher: Batcher[str, str] = Batcher(list, policy)
        self.futures: list[JobFuture[str]] = [self.batcher.submit("before")] if used else []
        self.answer: Any = None

    def submit(self) -> None:
        self.futures.append(self.batcher.submit("job"))

    def cancel(self) -> None:
        self.answer = self.futures[0].cancel()

    def flush(self) -> None:
        self.answer = self.batcher.flush(timeout=10)

    def shutdown(self) -> None:
        self.answer = self.batcher.shutdown(timeout=10)

    def result(self) -> None:
        self.answer = self.futures[0].result(timeout=10)

    def stats(self) -> None:
        self.answer = self.batcher.stats()

    def check(self) -> None:
        in_thread(self.batcher.stats).result(timeout=10)  # for which this thread may hold no lock any more
        assert self.batcher.shutdown(timeout=10)
        assert all(future.done() for future in self.futures)
        stats = self.batcher.stats()
        assert stats.accepted == stats.succeeded + stats.failed + stats.cancelled
        assert len(self.futures) <= stats.accepted <= len(self.futures) + 1  # one whose submit was broken off, maybe


ACTS: dict[str, tuple[Callable[[], Use], Callable[[Use], None]]] = {
    "first submit": (lambda: Use(used=False), Use.submit),
    "submit": (lambda: Use(used=True), Use.submit),
    "cancel": (lambda: Use(used=True, policy=Size(9)), Use.cancel),
    "flush": (lambda: Use(used=True, policy=Size(9)), Use.flush),
    "shutdown": (lambda: Use(used=True, policy=Size(9)), Use.shutdown),
    "shutdown of one that was never used": (lambda: Use(used=False), Use.shutdown),
    "result": (lambda: Use(used=True), Use.result),
    "stats": (lambda: Use(used=True), Use.stats),
}


def interrupt() -> None:
    raise KeyboardInterrupt


def everywhere(
    act: str, handle: Callable[[Use], Any], then: Callable[[Use], None] = Use.check
) -> list[tuple[Use, BaseException | None]]:
    """Do *act* anew for each place where a signal can come in, with the signal coming in there, and *then* that."""
    make, do = ACTS[act]
    outcomes: list[tuple[Use, BaseException | None]] = []
    while True:
        use = make()
        signal = Signal(lambda: handle(use), len(outcomes))
        outcomes.append((use, signal.during(lambda: do(use))))
        then(use)
        if not signal.came:
            return outcomes


@pytest.mark.parametrize("act", ACTS)
def test_ctrl_c_anywhere_leaves_no_job_unsettled_and_nobody_waiting(act: str) -> None:
    *outcomes, (_, undisturbed) = everywhere(act, lambda use: interrupt())
    assert undisturbed is None
    assert {KeyboardInterrupt} == {type(error) for _, error in outcomes}


@pytest.mark.parametrize("act", [act for act in ACTS if "submit" in act])
def test_after_ctrl_c_anywhere_in_a_submit_the_next_one_is_served(act: str) -> None:
    def submit_another(use: Use) -> None:
        use.submit()
        assert "job" == use.futures[-1].result(timeout=10).value
        use.check()

    assert len(everywhere(act, lambda use: interrupt(), submit_another)) > 1


def test_what_ctrl_c_anywhere_in_a_shutdown_broke_off_is_finished_by_another_thread() -> None:
    def shut_down_elsewhere(use: Use) -> None:
        assert in_thread(lambda: use.batcher.shutdown(timeout=10)).result(timeout=20)

    act = "shutdown of one that was never used"
    assert len(everywhere(act, lambda use: interrupt(), shut_down_elsewhere)) > 1


@pytest.mark.parametrize("act", [act for act in ACTS if "never used" not in act])
def test_a_handler_that_shuts_down_anywhere_loses_nothing_and_waits_for_nobody(act: str) -> None:
    closed = []
    for use, error in everywhere(act, lambda use: closed.append(use.batcher.shutdown(timeout=10))):
        assert error is None or isinstance(error, BatcherClosed) and "submit" in act
        if act == "cancel":
            assert use.answer is use.futures[0].cancelled()
        elif act in ("flush", "shutdown"):
            assert use.answer is True
    assert closed and all(closed)


def test_the_shutdown_is_told_once_wherever_a_handler_shuts_down_too() -> None:
    class Counting(BatchListener):
        def shutdown(self, fact: BatcherShutDown) -> None:
            told.append(fact)

    for place in count():
        told: list[BatcherShutDown] = []
        batcher = Batcher[str, str](list, listeners=[Counting()])
        signal = Signal(lambda: batcher.shutdown(wait=False), place)
        assert signal.during(batcher.shutdown) is None
        assert 1 == len(told)
        if not signal.came:
            break
    assert place > 1


@pytest.mark.parametrize("act", [act for act in ACTS if "submit" not in act])
def test_a_handler_that_submits_anywhere_is_served_or_refused(act: str) -> None:
    def handle(use: Use) -> None:
        try:
            use.futures.append(use.batcher.submit("from a handler", timeout=0))
        except BatcherClosed:
            refused.append(use)

    refused: list[Use] = []
    for use, error in everywhere(act, handle):
        assert error is None
        assert "shutdown" in act or use not in refused


@pytest.mark.parametrize("act", ["submit", "cancel", "flush", "shutdown"])
def test_a_handler_that_waits_for_a_job_of_its_own_anywhere_leaves_nobody_waiting(act: str) -> None:
    def handle(use: Use) -> None:
        with suppress(BatcherClosed):
            use.batcher.submit("from a handler", timeout=0)
        assert use.batcher.flush(timeout=10)

    def nothing_else_happens(use: Use) -> None:
        if act != "cancel":
            use.futures[-1].result(timeout=10)
        use.check()

    for use, error in everywhere(act, handle, nothing_else_happens):
        assert error is None
        assert use.answer is (None if act == "submit" else use.futures[0].cancelled() if act == "cancel" else True)


def test_a_handler_that_waits_anywhere_in_a_flush_leaves_it_heard() -> None:
    def wait_a_moment() -> None:
        with suppress(TimeoutError):
            future.result(timeout=0.02)

    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future = batcher.submit("job")
            signal = Signal(wait_a_moment, place)
            signal.during(lambda: batcher.flush(wait=False))
            assert "flush" == future.result(timeout=10).batch.trigger
        if not signal.came:
            break
    assert place > 1


@pytest.mark.parametrize("policy", [Size(1), Size(1) | AllWaiting()], ids=repr)
def test_a_handler_that_waits_anywhere_in_a_submit_keeps_no_later_job_waiting(policy: BatchingPolicy[Any]) -> None:
    def wait_in_vain() -> None:
        with suppress(TimeoutError):
            held.result(timeout=0.02)

    for place in count():
        clock, processor = ManualClock(), RecordingProcessor[str]()
        processor.hold()
        with Batcher[str, str](processor, policy, max_workers=3, clock=clock) as batcher:
            held = batcher.submit("held")
            processor.wait_for_batches(1)
            clock.wait_for_sleeper(NEVER)
            signal = Signal(wait_in_vain, place)
            assert signal.during(lambda: batcher.submit("job")) is None
            batcher.submit("later")
            try:
                processor.wait_for_batches(3)
            finally:
                processor.release()
        if not signal.came:
            break
    assert place > 1


@pytest.mark.parametrize("goes", [False, True])
def test_a_handler_that_waits_anywhere_in_a_cancel_leaves_the_books_right(goes: bool) -> None:
    def wait_a_moment() -> None:
        with suppress(TimeoutError):
            batcher.flush(timeout=10) if goes else other.result(timeout=0.02)

    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            other, future = batcher.submit("other"), batcher.submit("job")
            signal = Signal(wait_a_moment, place)
            assert signal.during(future.cancel) is None
            assert batcher.flush(timeout=10)
            stats = batcher.stats()
            assert (int(future.cancelled()), 2) == (stats.cancelled, stats.cancelled + stats.succeeded)
        if not signal.came:
            break
    assert future.cancelled()


def test_ctrl_c_anywhere_in_the_cancel_of_a_watched_future_leaves_its_lock_to_others() -> None:
    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future = batcher.submit("job")
            wait([future], timeout=0)
            signal = Signal(interrupt, place, ("microbatch.", "threading"))
            signal.during(future.cancel)
            done = in_thread(lambda: wait([future], timeout=5 if future.cancelled() else 0).done).result(timeout=10)
            assert (future in done) is future.cancelled()
        if not signal.came:
            break
    assert future.cancelled()


def test_ctrl_c_anywhere_in_a_cancel_leaves_nobody_waiting_for_the_end_of_the_future() -> None:
    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future = batcher.submit("job")
            waiter = in_thread(lambda: wait([future], timeout=10).not_done)
            while not future._waiters:
                pass
            signal = Signal(interrupt, place)
            signal.during(future.cancel)
            if future.cancelled():
                assert set() == waiter.result(timeout=20)
        if not signal.came:
            break
    assert future.cancelled()


def test_a_handler_that_cancels_anywhere_in_a_wait_is_noticed_by_it() -> None:
    def cancel() -> None:
        waiting.append(bool(future._waiters))
        future.cancel()

    waiting: list[bool] = []
    while not any(waiting):
        with Batcher[str, str](list, Size(9)) as batcher:
            future, undone = batcher.submit("job"), list[Any]()
            signal = Signal(cancel, len(waiting), ("microbatch.", "concurrent."))
            assert signal.during(lambda: undone.append(wait([future], timeout=5).not_done)) is None
            assert set() == undone[-1]
    assert len(waiting) > 1


def test_ctrl_c_anywhere_in_a_cancel_leaves_nobody_waiting_for_the_result() -> None:
    def wait_for_result() -> None:
        waiting.append(threading.get_ident())
        future.exception(timeout=20)

    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future, waiting = batcher.submit("job"), list[int]()
            waiter = in_thread(wait_for_result)
            while not (waiting and Waiter.hear.__code__ in codes_of(waiting[0])):
                pass
            signal = Signal(interrupt, place, ("microbatch.", "threading"))
            signal.during(future.cancel)
            if future.cancelled():
                assert isinstance(waiter.exception(timeout=10), CancelledError)
        if not signal.came:
            break
    assert future.cancelled()


@pytest.mark.parametrize("before", [0, 1], ids=["the first", "the second"])
def test_a_callback_that_a_finalizer_leaves_anywhere_while_another_is_left_is_called(before: int) -> None:
    for place in count():
        called: list[JobFuture[str]] = []
        with Batcher[str, str](lambda jobs: jobs, Size(9), clock=ManualClock()) as batcher:
            future = batcher.submit("job")
            for _ in range(before):
                future.add_done_callback(called.append)
            leave = partial(future.add_done_callback, called.append)
            signal = Signal(leave, place, entrances=ENTRANCES_OF_FINALIZERS)
            signal.during(leave)
        if not signal.came:
            break
        assert [future] * (before + 2) == called
    assert place > 1


def test_a_callback_is_called_wherever_in_its_registration_a_finalizer_waits_for_the_job() -> None:
    for place in count():
        called, release = list[JobFuture[str]](), threading.Event()

        def let_it_end() -> None:
            release.set()
            future.result(timeout=10)

        with Batcher[str, str](lambda jobs: jobs if release.wait() else [], Size(1)) as batcher:
            future = batcher.submit("job")
            signal = Signal(let_it_end, place, entrances=ENTRANCES_OF_FINALIZERS)
            signal.during(lambda: future.add_done_callback(called.append))
            release.set()
        if not signal.came:
            break
        assert [future] == called
    assert place > 1


def test_a_callback_that_a_finalizer_leaves_anywhere_in_a_settlement_is_called() -> None:
    def processor(jobs: list[str]) -> list[str]:
        submitted.wait()
        sys.settrace(signal.trace)  # of this thread
        return jobs

    for place in count():
        submitted, called = threading.Event(), list[JobFuture[str]]()
        with Batcher[str, str](processor, Size(1)) as batcher:
            future = batcher.submit("job")
            signal = Signal(lambda: future.add_done_callback(called.append), place)
            submitted.set()
        if not signal.came:
            break
        assert [future] == called
    assert place > 1


@pytest.mark.parametrize("policy", [Size(1), Size(1) | AllWaiting()], ids=repr)
def test_a_finalizer_that_waits_anywhere_in_a_settlement_leaves_the_books_right(policy: BatchingPolicy[Any]) -> None:
    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["held"]:
            release.wait()
        if jobs == ["job"]:
            submitted.wait()
            sys.settrace(signal.trace)  # of this thread
        return jobs

    def submit_another_and_wait() -> None:
        with suppress(BatcherClosed, TimeoutError):  # what a finalizer raises goes nowhere
            batcher.submit("another")
            held.result(timeout=0.01)

    for place in count():
        submitted, release = threading.Event(), threading.Event()
        with Batcher[str, str](processor, policy, max_workers=3) as batcher:
            held, future = batcher.submit("held"), batcher.submit("job")
            signal = Signal(submit_another_and_wait, place)
            submitted.set()
            try:
                future.result(timeout=5)
            finally:
                release.set()
        stats = batcher.stats()
        assert (0, stats.accepted) == (stats.running, stats.succeeded)
        if not signal.came:
            break
    assert place > 1


def test_ctrl_c_anywhere_in_a_wait_for_room_costs_no_other_its_place() -> None:
    for place in count():
        clock, processor = ManualClock(), RecordingProcessor[str]()
        processor.hold()
        with Batcher[str, str](processor, Size(1), max_pending=1, clock=clock) as batcher:
            batcher.submit("runs")
            processor.wait_for_batches(1)
            batcher.submit("waits")
            before = in_thread(lambda: batcher.submit("before", timeout=50))
            clock.wait_for_sleeper(50)
            signal = Signal(interrupt, place, ("contextlib",))
            error = signal.during(lambda: batcher.submit("job", timeout=0))  # its traceback keeps all frames
            after = in_thread(lambda: batcher.submit("after", timeout=60))
            clock.wait_for_sleeper(60)
            processor.release()
            assert "before" == before.result(timeout=10).result(timeout=10).value
            assert "after" == after.result(timeout=10).result(timeout=10).value
        if not signal.came:
            break
    assert isinstance(error, BacklogFull)


def test_a_handler_that_settles_a_job_anywhere_in_stats_disturbs_nothing() -> None:
    class Held(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            return running

    for place in count():
        running: Future[Any] = Future()
        with Batcher[str, str](list, Size(1), executor=Held()) as batcher:
            future = batcher.submit("job")
            while not future.running():
                pass
            signal = Signal(lambda: running.set_result(["job"]), place)
            assert signal.during(batcher.stats) is None
            if not signal.came:
                running.set_result(["job"])
        assert "job" == future.result().value
        if not signal.came:
            break
    assert place > 0


def test_a_finalizer_that_shuts_down_anywhere_in_a_pool_threads_lead_is_heeded() -> None:
    for place in count():
        batcher = Batcher[str, str](list, Size(2))
        future = batcher.submit("job")
        signal = Signal(lambda: batcher.shutdown(wait=False), place)
        future.add_done_callback(lambda _: sys.settrace(signal.trace))  # of the pool's thread, just before it leads
        batcher.submit("other")
        future.result(timeout=10)
        assert batcher.shutdown(timeout=10)
        if not signal.came:
            break
    assert place > 1


class Traced(Interval):
    """Has the signal come in at its place in the thread that leads, from the first look at a batch on."""

    signal: Signal
    was_asked = False

    def due(self, window: Any) -> float:
        if not self.signal.came:
            sys.settrace(self.signal.trace)  # of the batcher thread
        self.was_asked = True
        return super().due(window)


def in_each_place_of_a_lead(handle: Callable[[Batcher[str, str], list[JobFuture[str]]], None]) -> None:
    """Interrupt the batcher thread at each place, with a full queue."""
    for place in count():
        policy = Traced(60)
        with Batcher[str, str](list, policy, max_pending=3, clock=ManualClock()) as batcher:
            futures: list[JobFuture[str]] = []
            policy.signal = Signal(lambda: handle(batcher, futures), place, ("microbatch._engine",))
            futures.append(batcher.submit("first"))
            while not policy.was_asked:
                pass
            futures += [batcher.submit("job"), batcher.submit("job")]
            while batcher.stats().queued:
                pass
        assert all(future.done() for future in futures)
        stats = batcher.stats()
        assert len(futures) == stats.accepted == stats.succeeded + stats.cancelled
        if not policy.signal.came:
            break
    assert place > 10


def test_a_finalizer_that_cancels_anywhere_in_a_lead_finds_no_negative_number_in_the_stats() -> None:
    def cancel(batcher: Batcher[str, str], futures: list[JobFuture[str]]) -> None:
        for future in futures:
            future.cancel()
        stats = batcher.stats()
        least.append(min(stats.queued, stats.batched, stats.running))

    least: list[int] = []
    in_each_place_of_a_lead(cancel)
    assert 0 == min(least)


def test_a_finalizer_that_submits_anywhere_in_a_lead_keeps_to_the_limit_of_pending_jobs() -> None:
    def fill(batcher: Batcher[str, str], futures: list[JobFuture[str]]) -> None:
        with suppress(BacklogFull, BatcherClosed):
            while True:
                futures.append(batcher.submit("another", timeout=0))
        stats = batcher.stats()
        most.append(stats.queued + stats.batched)

    most: list[int] = []
    in_each_place_of_a_lead(fill)
    assert 3 == max(most)


def test_a_flush_waits_for_jobs_that_are_just_taken_out_while_a_finalizer_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait_first(futures: list[JobFuture[Any]]) -> Mapping[int, int]:
        if futures and not early:
            flush = in_thread(lambda: batcher.flush(timeout=0))
            while not flush.done():
                with suppress(TimeoutError):
                    futures[0].result(timeout=0.001)
            early.append(flush.result())
        return epochs(futures)

    early, epochs = list[bool](), ledger._epochs
    monkeypatch.setattr(ledger, "_epochs", wait_first)
    with Batcher[str, str](list, Size(9)) as batcher:
        batcher.submit("job")
    assert [False] == early


def test_stats_are_of_one_moment_wherever_a_handler_that_waits_interrupts_them() -> None:
    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            futures = [batcher.submit("job") for _ in range(3)]

            def submit_and_wait() -> None:
                futures[0].cancel()
                batcher.submit("another")
                batcher.flush(timeout=10)

            answers: list[BatcherStats] = []
            signal = Signal(submit_and_wait, place, entrances=ENTRANCES_OF_FINALIZERS)
            assert signal.during(lambda: answers.append(batcher.stats())) is None
        assert answers[0].accepted in (3, 4)
        assert min(answers[0].queued, answers[0].batched, answers[0].running) >= 0
        if not signal.came:
            break
    assert place > 10


def test_a_caller_that_waits_for_room_gets_the_room_of_a_job_that_is_cancelled_during_a_lead(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """A finalizer cancels the job just before the leader takes that in, and another one waits just after."""

    def wait_in(books: Ledger, jobs: Any) -> None:
        enter(books, jobs)
        if waits.cancelled() and not looked:
            looked.append(True)
            with suppress(TimeoutError):
                runs.result(timeout=0.3)  # meanwhile, the caller looks whether there is room

    def cancel_in(queue: JobQueue) -> Drained:
        if armed:
            waits.cancel()
        return drain(queue)

    armed, looked, drain, enter = list[bool](), list[bool](), JobQueue.drain, Ledger._enter
    processor = RecordingProcessor[str]()
    processor.hold()
    with Batcher[str, str](processor, Size(1), max_pending=1, clock=clock) as batcher:
        runs = batcher.submit("runs")
        processor.wait_for_batches(1)
        waits = batcher.submit("waits")
        blocked = in_thread(lambda: batcher.submit("blocked", timeout=60))
        clock.wait_for_sleeper(60)
        monkeypatch.setattr(JobQueue, "drain", cancel_in)
        monkeypatch.setattr(Ledger, "_enter", wait_in)
        armed.append(True)
        batcher.flush(wait=False)  # so that the leader drains the queue
        try:
            assert isinstance(blocked.result(timeout=10), JobFuture)
        finally:
            processor.release()
    assert looked


@pytest.mark.parametrize("leader", ["worker thread", "pool thread"])
def test_a_finalizer_that_waits_anywhere_in_a_lead_lets_no_second_thread_lead(leader: str) -> None:
    class Asked(Size):
        def ask(self, lingers: bool) -> None:
            alone.append(turn.acquire(blocking=False))
            if lingers:
                never.wait(0.005)  # for a second one to come
            if alone[-1]:
                turn.release()

        def due(self, window: Any) -> float:
            self.ask("late" in window.jobs)
            if leader == "worker thread":
                sys.settrace(signal.trace if "job" in window.jobs else None)  # until it is asked again
            return super().due(window)

        def observe(self, report: Any) -> None:
            self.ask(leader == "worker thread")

    def processor(jobs: list[str]) -> list[str]:
        if jobs != ["job"]:
            release.wait()
        return jobs

    def have_another_lead_and_wait() -> None:
        with suppress(BatcherClosed, TimeoutError):  # what a finalizer raises goes nowhere
            batcher.submit("late")
            release.set() if leader == "worker thread" else held.result(timeout=0.01)
            other.result(timeout=0.005)

    alone: list[bool] = []
    turn, never = threading.Lock(), threading.Event()
    for place in count():
        release = threading.Event()
        with Batcher[str, str](processor, Asked(1), max_workers=3) as batcher:
            held, other = batcher.submit("held"), batcher.submit("other")
            signal = Signal(have_another_lead_and_wait, place)
            future = batcher.submit("job")
            if leader == "pool thread":
                future.add_done_callback(lambda _: sys.settrace(signal.trace))
            future.result(timeout=10)
            batcher.submit("another")
            release.set()
        assert all(alone)
        if not signal.came:
            break
    assert place > 1


@pytest.mark.parametrize("policy", [Size(1), Size(1) | AllWaiting()], ids=repr)
def test_a_finalizer_that_waits_anywhere_in_a_pool_threads_lead_leaves_the_books_right(
    policy: BatchingPolicy[Any],
) -> None:
    def processor(jobs: list[str]) -> list[str]:
        release.wait() if jobs == ["held"] else go.wait()
        return jobs

    def let_another_finish() -> None:
        release.set()
        with suppress(TimeoutError):
            held.result(timeout=0.1)

    for place in count():
        go, release = threading.Event(), threading.Event()
        with Batcher[str, str](processor, policy, max_workers=2) as batcher:
            held, future = batcher.submit("held"), batcher.submit("job")
            batcher.submit("next")
            signal = Signal(let_another_finish, place)
            future.add_done_callback(lambda _: sys.settrace(signal.trace))
            go.set()
            future.result(timeout=10)
            batcher.flush(timeout=0)
            release.set()
        stats = batcher.stats()
        assert (0, 3) == (stats.running, stats.succeeded)
        if not signal.came:
            break
    assert place > 1


def test_a_finalizer_that_waits_for_those_who_come_back_leaves_the_books_right() -> None:
    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["before"]:
            wait_until_heard(caller)
        if jobs == ["held"]:
            release.wait()
        if jobs == ["job"]:
            wait_until_heard(waiting[-1])
            sys.settrace(signal.trace)
        return jobs

    def wait_for_another() -> None:
        waiting.append(threading.get_ident())
        batcher.submit("job").result(timeout=10)

    def let_the_caller_come_back() -> None:
        came.set()
        while not back.is_set():
            with suppress(TimeoutError):
                held.result(timeout=0.01)

    caller, waiting = threading.get_ident(), list[int]()
    for place in count():
        came, back, release = threading.Event(), threading.Event(), threading.Event()
        clock = ManualClock()
        batcher = Batcher[str, str](processor, Natural(), max_workers=3, clock=clock)
        for _ in range(2):
            batcher.submit("before").result(timeout=10)
        clock.advance(1)  # too long for this caller to be waited for
        held = in_thread(lambda: batcher.submit("held")).result(timeout=10)
        while not held.running():
            pass
        signal = Signal(let_the_caller_come_back, place)
        waiter = in_thread(wait_for_another)
        waiter.add_done_callback(lambda _: came.set())
        came.wait(10)
        batcher.submit("back")
        back.set()
        waiter.result(timeout=20)
        release.set()
        assert in_thread(batcher.shutdown).result(timeout=10)
        assert (0, 5) == (batcher.stats().running, batcher.stats().succeeded)
        if not signal.came:
            break
    assert place > 1


def test_a_job_that_a_handler_that_waits_interrupts_anywhere_in_its_submit_expires() -> None:
    def have_the_worker_look() -> None:
        batcher.flush(wait=False)
        with suppress(TimeoutError):
            held.result(timeout=0.02)

    def processor(jobs: list[str]) -> list[str]:
        wait_until_heard(caller) if jobs == ["before"] else release.wait()
        return jobs

    caller = threading.get_ident()
    for place in count():
        clock, release = ManualClock(), threading.Event()
        with Batcher[str, str](processor, Natural(), clock=clock) as batcher:
            for _ in range(2):  # so that this caller is expected back
                batcher.submit("before").result(timeout=10)
            held = in_thread(lambda: batcher.submit("held")).result(timeout=10)
            while not held.running():
                pass
            futures: list[JobFuture[str]] = []
            signal = Signal(have_the_worker_look, place)
            signal.during(lambda: futures.append(batcher.submit("job", expires_in=5)))
            clock.advance(5)
            try:
                assert isinstance(futures[0].exception(timeout=10), JobExpired)
            finally:
                release.set()
        if not signal.came:
            break
    assert place > 1


def wait_until_heard(thread: int) -> None:
    """Wait until a thread waits for a result."""
    while Waiter.hear.__code__ not in codes_of(thread):
        pass


def codes_of(thread: int) -> list[CodeType]:
    """Return the code of all functions that a thread is in."""
    return [frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames().get(thread))]


class Armed(ManualClock):
    """Raises KeyboardInterrupt, as a signal would, where its thread next reads the clock or sleeps."""

    armed = ""

    def now(self) -> float:
        self._interrupt("now")
        return super().now()

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        self._interrupt("wait_until")
        super().wait_until(condition, moment)

    def _interrupt(self, method: str) -> None:
        if self.armed == method and threading.current_thread() is threading.main_thread():
            self.armed = ""
            raise KeyboardInterrupt


def twice(clock: Armed, method: str, act: Callable[[], Any], place: int) -> bool:
    """Have one Ctrl-C come where *act* calls that *method* of its clock, and one at that *place*; return if it came."""
    clock.armed = method
    signal = Signal(interrupt, place)
    assert isinstance(signal.during(act), KeyboardInterrupt)
    clock.armed = ""
    return signal.came


def test_a_second_ctrl_c_anywhere_after_one_in_a_submit_leaves_no_lock_taken() -> None:
    for place in count():
        clock = Armed()
        with Batcher[str, str](list, Size(1), clock=clock) as batcher:
            batcher.submit("before").result(timeout=10)
            came = twice(clock, "now", lambda: batcher.submit("job"), place)
            in_thread(batcher.stats).result(timeout=10)
        if not came:
            break
    assert place > 5


def test_a_second_ctrl_c_anywhere_after_one_in_a_wait_for_room_leaves_nobody_counted_as_waiting(
    processor: RecordingProcessor[str],
) -> None:
    for place in count():
        clock = Armed()
        with Batcher[str, str](processor, Interval(60), max_pending=3, clock=clock) as batcher:
            processor.hold()
            running = batcher.submit("running")
            batcher.flush(wait=False)
            processor.wait_for_batches(2 * place + 1)
            clock.advance(1)
            waiting = [batcher.submit("waiting") for _ in range(3)]
            came = twice(clock, "wait_until", lambda: batcher.submit("no room"), place)
            in_thread(batcher.stats).result(timeout=10)
            processor.release()
            running.result(timeout=10)
            clock.wait_for_sleeper(61)  # the worker is free, and leaves the batch to its interval
        assert {"shutdown"} == {future.result(timeout=0).batch.trigger for future in waiting}
        if not came:
            break
    assert place > 5


@pytest.mark.parametrize("watch", [wait, lambda futures, timeout: list(as_completed(futures, timeout))])
def test_ctrl_c_anywhere_in_wait_or_as_completed_holds_up_no_job(watch: Any) -> None:
    for place in count():
        processor = RecordingProcessor[int]()
        processor.hold()
        with Batcher[int, int](processor, Size(3)) as batcher:
            futures = [batcher.submit(number) for number in range(3)]
            processor.wait_for_batches(1)
            signal = Signal(interrupt, place, modules=("microbatch.", "concurrent.futures."))
            assert isinstance(
                signal.during(lambda: watch(futures, timeout=0)), (KeyboardInterrupt, TimeoutError, type(None))
            )
            processor.release()
            assert [0, 1, 2] == [in_thread(future.result).result(timeout=10).value for future in futures]
            assert not wait(futures, timeout=10).not_done
        if not signal.came:
            break
    assert place > 20


def test_ctrl_c_anywhere_in_the_wait_for_the_start_leaves_no_other_thread_waiting() -> None:
    for place in count():
        start_latch = StartLatch()
        start_latch.settle()
        ctrl_c = Signal(interrupt, place)
        ctrl_c.during(lambda: start_latch.wait(10))
        in_thread(lambda: start_latch.wait(10)).result(timeout=5)
        if not ctrl_c.came:
            break
    assert place > 3


def test_a_flush_that_a_handler_interrupts_while_another_thread_flushes_undoes_no_other_flush() -> None:
    class Observing(Size):
        def observe(self, report: Any) -> None:
            if armed.is_set():
                go_on.wait(timeout=10)  # so that the next look comes after all flushes

    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["held"]:
            release.wait(timeout=20)
        return jobs

    def have_another_flush() -> None:
        others.append(in_thread(flush_twice))
        with suppress(TimeoutError):
            held.result(timeout=0.3)  # which gives up the mutex

    def flush_twice() -> JobFuture[str]:
        first = batcher.submit("first")
        armed.set()
        batcher.flush(wait=False)
        first.result(timeout=10)
        second = batcher.submit("second")
        batcher.flush(wait=False)
        return second

    for place in count():
        armed, go_on, release, others = threading.Event(), threading.Event(), threading.Event(), list[Any]()
        with Batcher[str, str](processor, Observing(100), max_workers=2) as batcher:
            held = batcher.submit("held")
            batcher.flush(wait=False)
            signal = Signal(have_another_flush, place)
            signal.during(lambda: batcher.flush(wait=False))
            go_on.set()
            if others:
                assert "second" == others[0].result(timeout=10).result(timeout=10).value
            release.set()
        if not signal.came:
            break
    assert place > 1
