"""A signal arrives at each point of the code where Python can be interrupted: no job is lost, no thread is blocked."""

import dis
import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, TimeoutError, as_completed, wait
from concurrent.futures import _base
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
    coalescing,
)
from microbatch._basics.waiting import Waiter
from microbatch._engine.queue import Drained, JobQueue
from microbatch.batcher import left_open, next_number
from microbatch.testing import ManualClock, RecordingProcessor
from tests.threads import in_thread

pytestmark = [
    pytest.mark.signals,
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="from Python 3.12 on, some instructions are not traced"),
]

# Python checks for signals after these instructions, depending on its version.
ENTRANCES = ("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "POP_JUMP_BACKWARD")

# Until 3.11, Python also collects garbage where it creates a container.
ENTRANCES_OF_FINALIZERS = (*ENTRANCES, "BUILD")


@pytest.fixture(autouse=True)
def disable_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector: an exception that a handler raises in a finalizer would be lost."""
    gc.disable()
    yield
    gc.enable()


@lru_cache(maxsize=None)
def _names_in(code: CodeType) -> dict[int, str]:
    return {step.offset: step.opname for step in dis.get_instructions(code)}


class Signal:
    """Calls *handler* at the *place*-th entrance that the calling thread reaches in *modules*."""

    def __init__(
        self,
        handler: Callable[[], Any],
        place: int,
        modules: tuple[str, ...] = ("microbatch.",),
        entrances: tuple[str, ...] = ENTRANCES,
    ) -> None:
        self.handler = handler
        self.places_left = place
        self.arrived = False
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
            self._before[frame] = "RESUME"  # this instruction itself is not traced
        if event == "exception":
            self._before[frame] = ""  # Python does not check for signals on the way to the handler of an exception
        if event == "opcode":
            entered = self._before.get(frame, "").startswith(self._entrances)
            self._before[frame] = self._names[frame].get(frame.f_lasti, "")
            self.places_left -= entered
            if self.places_left < 0:
                sys.settrace(None)
                frame.f_trace = None
                self.arrived = True
                self.handler()
        return self.trace

    def during(self, action: Callable[[], Any]) -> BaseException | None:
        """Call *action*, and return the exception that it raises."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            action()
        except (Exception, KeyboardInterrupt) as error:  # but not the exception that ends a test that takes too long
            return error
        finally:
            sys.settrace(before)
        return None


class Scenario:
    """A batcher, with one job if *used*, and the actions that a signal may interrupt."""

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
        in_thread(self.batcher.stats).result(timeout=10)  # blocks if this thread still holds a lock
        assert self.batcher.shutdown(timeout=10)
        assert all(future.done() for future in self.futures)
        stats = self.batcher.stats()
        assert stats.accepted == stats.succeeded + stats.failed + stats.cancelled
        # One more job may have been accepted by a submit that was interrupted.
        assert len(self.futures) <= stats.accepted <= len(self.futures) + 1


ACTIONS: dict[str, tuple[Callable[[], Scenario], Callable[[Scenario], None]]] = {
    "first submit": (lambda: Scenario(used=False), Scenario.submit),
    "submit": (lambda: Scenario(used=True), Scenario.submit),
    "cancel": (lambda: Scenario(used=True, policy=Size(9)), Scenario.cancel),
    "flush": (lambda: Scenario(used=True, policy=Size(9)), Scenario.flush),
    "shutdown": (lambda: Scenario(used=True, policy=Size(9)), Scenario.shutdown),
    "shutdown of an unused batcher": (lambda: Scenario(used=False), Scenario.shutdown),
    "result": (lambda: Scenario(used=True), Scenario.result),
    "stats": (lambda: Scenario(used=True), Scenario.stats),
    "stats of a job that waits": (lambda: Scenario(used=True, policy=Size(9)), Scenario.stats),
}


class OutOfTime(RuntimeError):
    """What the handler of a user's time limit raises. It is an error that the package handles elsewhere."""


def interrupt(error: type[BaseException] = KeyboardInterrupt) -> None:
    raise error


def interrupt_everywhere(
    action: str, handle: Callable[[Scenario], Any], then: Callable[[Scenario], None] = Scenario.check
) -> list[tuple[Scenario, BaseException | None]]:
    """Do *action* once for each point where a signal can arrive, with *handle* called there. Call *then* after each."""
    make, do = ACTIONS[action]
    outcomes: list[tuple[Scenario, BaseException | None]] = []
    while True:
        scenario = make()
        signal = Signal(lambda: handle(scenario), len(outcomes))
        outcomes.append((scenario, signal.during(lambda: do(scenario))))
        then(scenario)
        if not signal.arrived:
            return outcomes


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutOfTime])
@pytest.mark.parametrize("action", ACTIONS)
def test_an_error_in_a_signal_handler_at_any_point_is_raised_and_leaves_no_job_unsettled_and_no_lock_held(
    action: str, error: type[BaseException]
) -> None:
    *outcomes, (_, undisturbed) = interrupt_everywhere(action, lambda scenario: interrupt(error))
    assert undisturbed is None
    assert {error} == {type(raised) for _, raised in outcomes}


@pytest.mark.parametrize("action", [action for action in ACTIONS if "submit" in action])
def test_after_ctrl_c_at_any_point_of_a_submit_the_next_job_is_processed(action: str) -> None:
    def submit_another(scenario: Scenario) -> None:
        scenario.submit()
        assert "job" == scenario.futures[-1].result(timeout=10).value
        scenario.check()

    assert len(interrupt_everywhere(action, lambda scenario: interrupt(), submit_another)) > 1


def test_a_shutdown_interrupted_by_ctrl_c_at_any_point_can_be_completed_by_another_thread() -> None:
    def shut_down_elsewhere(scenario: Scenario) -> None:
        assert in_thread(lambda: scenario.batcher.shutdown(timeout=10)).result(timeout=20)

    action = "shutdown of an unused batcher"
    assert len(interrupt_everywhere(action, lambda scenario: interrupt(), shut_down_elsewhere)) > 1


@pytest.mark.parametrize("action", [action for action in ACTIONS if "unused" not in action])
def test_a_shutdown_in_a_signal_handler_at_any_point_loses_no_job_and_does_not_deadlock(action: str) -> None:
    closed = []
    for scenario, error in interrupt_everywhere(
        action, lambda scenario: closed.append(scenario.batcher.shutdown(timeout=10))
    ):
        assert error is None or isinstance(error, BatcherClosed) and "submit" in action
        if action == "cancel":
            assert scenario.answer is scenario.futures[0].cancelled()
        elif action in ("flush", "shutdown"):
            assert scenario.answer is True
    assert closed and all(closed)


def test_listeners_get_one_shutdown_event_if_a_signal_handler_shuts_down_at_any_point_of_a_shutdown() -> None:
    class Counting(BatchListener):
        def shutdown(self, event: BatcherShutDown) -> None:
            events.append(event)

    for place in count():
        events: list[BatcherShutDown] = []
        batcher = Batcher[str, str](list, listeners=[Counting()])
        signal = Signal(lambda: batcher.shutdown(wait=False), place)
        assert signal.during(batcher.shutdown) is None
        assert 1 == len(events)
        if not signal.arrived:
            break
    assert place > 1


@pytest.mark.parametrize("action", [action for action in ACTIONS if "submit" not in action])
def test_a_submit_in_a_signal_handler_at_any_point_is_accepted_or_refused(action: str) -> None:
    def handle(scenario: Scenario) -> None:
        try:
            scenario.futures.append(scenario.batcher.submit("from a handler", timeout=0))
        except BatcherClosed:
            refused.append(scenario)

    refused: list[Scenario] = []
    for scenario, error in interrupt_everywhere(action, handle):
        assert error is None
        assert "shutdown" in action or scenario not in refused


def test_batchers_that_are_left_open_are_found_if_a_signal_handler_starts_another_at_any_point() -> None:
    def start() -> Batcher[int, int]:
        batcher = Batcher[int, int](list)
        batcher.submit(1)
        return batcher

    gc.collect()
    gc.freeze()  # with the objects of all earlier tests, each collection below would take long
    for place in count():
        gc.collect()  # the engines of earlier batchers
        since, batchers, found = next_number(), [start()], list[str]()
        signal = Signal(lambda: batchers.append(start()), place, ("microbatch.", "weakref", "_weakrefset"))
        assert signal.during(lambda: found.extend(left_open(since))) is None
        assert 1 <= len(found) <= len(batchers)
        for batcher in batchers:
            batcher.shutdown()
        if not signal.arrived:
            break
    assert place > 1


@pytest.mark.parametrize("action", ["submit", "cancel", "flush", "shutdown"])
def test_a_signal_handler_that_waits_for_its_own_job_at_any_point_does_not_deadlock(action: str) -> None:
    def handle(scenario: Scenario) -> None:
        with suppress(BatcherClosed):
            scenario.batcher.submit("from a handler", timeout=0)
        assert scenario.batcher.flush(timeout=10)

    def check_the_jobs(scenario: Scenario) -> None:
        if action != "cancel":
            scenario.futures[-1].result(timeout=10)
        scenario.check()

    for scenario, error in interrupt_everywhere(action, handle, check_the_jobs):
        assert error is None
        assert scenario.answer is (
            None if action == "submit" else scenario.futures[0].cancelled() if action == "cancel" else True
        )


def test_a_flush_takes_effect_if_a_signal_handler_waits_at_any_point_of_it() -> None:
    def wait_a_moment() -> None:
        with suppress(TimeoutError):
            future.result(timeout=0.02)

    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future = batcher.submit("job")
            signal = Signal(wait_a_moment, place)
            signal.during(lambda: batcher.flush(wait=False))
            assert "flush" == future.result(timeout=10).batch.trigger
        if not signal.arrived:
            break
    assert place > 1


@pytest.mark.parametrize("policy", [Size(1), Size(1) | AllWaiting()], ids=repr)
def test_a_signal_handler_that_waits_at_any_point_of_a_submit_delays_no_later_job(policy: BatchingPolicy[Any]) -> None:
    def wait_for_the_held_job() -> None:
        with suppress(TimeoutError):
            held.result(timeout=0.02)

    for place in count():
        clock, processor = ManualClock(), RecordingProcessor[str]()
        processor.hold()
        with Batcher[str, str](processor, policy, max_workers=3, clock=clock) as batcher:
            held = batcher.submit("held")
            processor.wait_for_batches(1)
            clock.wait_for_sleeper(NEVER)
            signal = Signal(wait_for_the_held_job, place)
            assert signal.during(lambda: batcher.submit("job")) is None
            batcher.submit("later")
            try:
                processor.wait_for_batches(3)
            finally:
                processor.release()
        if not signal.arrived:
            break
    assert place > 1


@pytest.mark.parametrize("flushes", [False, True])
def test_the_statistics_are_correct_if_a_signal_handler_waits_at_any_point_of_a_cancel(flushes: bool) -> None:
    def wait_a_moment() -> None:
        with suppress(TimeoutError):
            batcher.flush(timeout=10) if flushes else other.result(timeout=0.02)

    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            other, future = batcher.submit("other"), batcher.submit("job")
            signal = Signal(wait_a_moment, place)
            assert signal.during(future.cancel) is None
            assert batcher.flush(timeout=10)
            stats = batcher.stats()
            assert (int(future.cancelled()), 2) == (stats.cancelled, stats.cancelled + stats.succeeded)
        if not signal.arrived:
            break
    assert future.cancelled()


def test_ctrl_c_at_any_point_of_a_cancel_leaves_the_lock_of_the_future_free() -> None:
    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future = batcher.submit("job")
            wait([future], timeout=0)
            signal = Signal(interrupt, place, ("microbatch.", "threading"))
            signal.during(future.cancel)
            done = in_thread(lambda: wait([future], timeout=5 if future.cancelled() else 0).done).result(timeout=10)
            assert (future in done) is future.cancelled()
        if not signal.arrived:
            break
    assert future.cancelled()


def test_ctrl_c_at_any_point_of_a_cancel_leaves_no_thread_blocked_in_wait() -> None:
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
        if not signal.arrived:
            break
    assert future.cancelled()


def test_wait_returns_if_a_signal_handler_cancels_the_future_at_any_point_of_it() -> None:
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


def test_ctrl_c_at_any_point_of_a_cancel_leaves_no_thread_blocked_in_result() -> None:
    def wait_for_result() -> None:
        waiting.append(threading.get_ident())
        future.exception(timeout=20)

    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future, waiting = batcher.submit("job"), list[int]()
            waiter = in_thread(wait_for_result)
            while not (waiting and Waiter.wait.__code__ in codes_of(waiting[0])):
                pass
            signal = Signal(interrupt, place, ("microbatch.", "threading"))
            signal.during(future.cancel)
            if future.cancelled():
                assert isinstance(waiter.exception(timeout=10), CancelledError)
        if not signal.arrived:
            break
    assert future.cancelled()


@pytest.mark.parametrize("before", [0, 1], ids=["the first", "the second"])
def test_a_callback_that_a_finalizer_adds_at_any_point_while_another_is_added_is_called(before: int) -> None:
    for place in count():
        called: list[JobFuture[str]] = []
        with Batcher[str, str](lambda jobs: jobs, Size(9), clock=ManualClock()) as batcher:
            future = batcher.submit("job")
            for _ in range(before):
                future.add_done_callback(called.append)
            add = partial(future.add_done_callback, called.append)
            signal = Signal(add, place, entrances=ENTRANCES_OF_FINALIZERS)
            signal.during(add)
        if not signal.arrived:
            break
        assert [future] * (before + 2) == called
    assert place > 1


def test_a_callback_is_called_if_a_finalizer_waits_for_the_job_at_any_point_while_it_is_added() -> None:
    for place in count():
        called, release = list[JobFuture[str]](), threading.Event()

        def release_and_wait() -> None:
            release.set()
            future.result(timeout=10)

        with Batcher[str, str](lambda jobs: jobs if release.wait() else [], Size(1)) as batcher:
            future = batcher.submit("job")
            signal = Signal(release_and_wait, place, entrances=ENTRANCES_OF_FINALIZERS)
            signal.during(lambda: future.add_done_callback(called.append))
            release.set()
        if not signal.arrived:
            break
        assert [future] == called
    assert place > 1


def test_a_callback_that_a_finalizer_adds_at_any_point_while_the_future_is_settled_is_called() -> None:
    def processor(jobs: list[str]) -> list[str]:
        submitted.wait()
        sys.settrace(signal.trace)  # traces this thread
        return jobs

    for place in count():
        submitted, called = threading.Event(), list[JobFuture[str]]()
        with Batcher[str, str](processor, Size(1)) as batcher:
            future = batcher.submit("job")
            signal = Signal(lambda: future.add_done_callback(called.append), place)
            submitted.set()
        if not signal.arrived:
            break
        assert [future] == called
    assert place > 1


@pytest.mark.parametrize("policy", [Size(1), Size(1) | AllWaiting()], ids=repr)
def test_the_statistics_are_correct_if_a_finalizer_waits_at_any_point_while_a_future_is_settled(
    policy: BatchingPolicy[Any],
) -> None:
    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["held"]:
            release.wait()
        if jobs == ["job"]:
            submitted.wait()
            sys.settrace(signal.trace)  # traces this thread
        return jobs

    def submit_another_and_wait() -> None:
        with suppress(BatcherClosed, TimeoutError):  # an exception in a finalizer is lost
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
        if not signal.arrived:
            break
    assert place > 1


def test_ctrl_c_at_any_point_of_a_submit_to_a_full_queue_does_not_affect_blocked_submits() -> None:
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
            error = signal.during(lambda: batcher.submit("job", timeout=0))  # the traceback keeps all frames
            after = in_thread(lambda: batcher.submit("after", timeout=60))
            clock.wait_for_sleeper(60)
            processor.release()
            assert "before" == before.result(timeout=10).result(timeout=10).value
            assert "after" == after.result(timeout=10).result(timeout=10).value
        if not signal.arrived:
            break
    assert isinstance(error, BacklogFull)


def test_stats_works_if_a_signal_handler_settles_a_job_at_any_point_of_it() -> None:
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
            if not signal.arrived:
                running.set_result(["job"])
        assert "job" == future.result().value
        if not signal.arrived:
            break
    assert place > 0


def test_a_shutdown_in_a_finalizer_at_any_point_while_a_worker_thread_leads_takes_effect() -> None:
    for place in count():
        batcher = Batcher[str, str](list, Size(2))
        future = batcher.submit("job")
        signal = Signal(lambda: batcher.shutdown(wait=False), place)
        future.add_done_callback(lambda _: sys.settrace(signal.trace))  # traces the worker thread, just before it leads
        batcher.submit("other")
        future.result(timeout=10)
        assert batcher.shutdown(timeout=10)
        if not signal.arrived:
            break
    assert place > 1


class Traced(Interval):
    """Lets the signal arrive at its place in the thread that leads, after the first call of `due`."""

    signal: Signal
    was_asked = False

    def due(self, window: Any) -> float:
        if not self.signal.arrived:
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
        if not policy.signal.arrived:
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


def test_a_flush_waits_for_all_jobs_wherever_the_leader_has_put_them() -> None:
    def flush(batcher: Batcher[str, str], futures: list[JobFuture[str]]) -> None:
        known = futures.copy()
        settled = in_thread(lambda: batcher.flush(timeout=0)).result(timeout=10)
        correct.append(not settled or all(future.done() for future in known))

    correct: list[bool] = []
    in_each_place_of_a_lead(flush)
    assert all(correct)


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
        if not signal.arrived:
            break
    assert place > 10


def test_a_caller_that_waits_for_space_gets_the_place_of_a_job_that_is_cancelled_during_a_lead(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    def cancel_in(queue: JobQueue) -> Drained:
        waits.cancel()
        return drain(queue)

    drain, processor = JobQueue.drain, RecordingProcessor[str]()
    processor.hold()
    with Batcher[str, str](processor, Size(1), max_pending=1, clock=clock) as batcher:
        batcher.submit("runs")
        processor.wait_for_batches(1)
        waits = batcher.submit("waits")
        blocked = in_thread(lambda: batcher.submit("blocked", timeout=60))
        clock.wait_for_sleeper(60)
        monkeypatch.setattr(JobQueue, "drain", cancel_in)
        batcher.flush(wait=False)  # so that the leader drains the queue
        try:
            assert isinstance(blocked.result(timeout=10), JobFuture)
        finally:
            processor.release()


@pytest.mark.parametrize("leader", ["batcher thread", "worker thread"])
def test_there_is_only_one_leader_even_if_a_finalizer_waits_at_any_point_while_it_leads(leader: str) -> None:
    class Exclusive(Size):
        def ask(self, lingers: bool) -> None:
            alone.append(turn.acquire(blocking=False))
            if lingers:
                never.wait(0.005)  # gives a second leader time to arrive
            if alone[-1]:
                turn.release()

        def due(self, window: Any) -> float:
            self.ask("late" in window.jobs)
            if leader == "batcher thread":
                sys.settrace(signal.trace if "job" in window.jobs else None)  # until the policy is asked again
            return super().due(window)

        def observe(self, report: Any) -> None:
            self.ask(leader == "batcher thread")

    def processor(jobs: list[str]) -> list[str]:
        if jobs != ["job"]:
            release.wait()
        return jobs

    def wait_while_another_thread_leads() -> None:
        with suppress(BatcherClosed, TimeoutError):  # an exception in a finalizer is lost
            batcher.submit("late")
            release.set() if leader == "batcher thread" else held.result(timeout=0.01)
            other.result(timeout=0.005)

    alone: list[bool] = []
    turn, never = threading.Lock(), threading.Event()
    for place in count():
        release = threading.Event()
        with Batcher[str, str](processor, Exclusive(1), max_workers=3) as batcher:
            held, other = batcher.submit("held"), batcher.submit("other")
            signal = Signal(wait_while_another_thread_leads, place)
            future = batcher.submit("job")
            if leader == "worker thread":
                future.add_done_callback(lambda _: sys.settrace(signal.trace))
            future.result(timeout=10)
            batcher.submit("another")
            release.set()
        assert all(alone)
        if not signal.arrived:
            break
    assert place > 1


@pytest.mark.parametrize("policy", [Size(1), Size(1) | AllWaiting()], ids=repr)
def test_the_statistics_are_correct_if_a_finalizer_waits_at_any_point_while_a_worker_thread_leads(
    policy: BatchingPolicy[Any],
) -> None:
    def processor(jobs: list[str]) -> list[str]:
        release.wait() if jobs == ["held"] else go.wait()
        return jobs

    def release_the_held_job() -> None:
        release.set()
        with suppress(TimeoutError):
            held.result(timeout=0.1)

    for place in count():
        go, release = threading.Event(), threading.Event()
        with Batcher[str, str](processor, policy, max_workers=2) as batcher:
            held, future = batcher.submit("held"), batcher.submit("job")
            batcher.submit("next")
            signal = Signal(release_the_held_job, place)
            future.add_done_callback(lambda _: sys.settrace(signal.trace))
            go.set()
            future.result(timeout=10)
            batcher.flush(timeout=0)
            release.set()
        stats = batcher.stats()
        assert (0, 3) == (stats.running, stats.succeeded)
        if not signal.arrived:
            break
    assert place > 1


def test_the_statistics_are_correct_if_a_finalizer_waits_at_any_point_for_a_caller_to_return() -> None:
    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["before"]:
            wait_until_blocked(caller)
        if jobs == ["held"]:
            release.wait()
        if jobs == ["job"]:
            wait_until_blocked(waiting[-1])
            sys.settrace(signal.trace)
        return jobs

    def wait_for_another() -> None:
        waiting.append(threading.get_ident())
        batcher.submit("job").result(timeout=10)

    def wait_for_the_caller_to_return() -> None:
        arrived.set()
        while not returned.is_set():
            with suppress(TimeoutError):
                held.result(timeout=0.01)

    caller, waiting = threading.get_ident(), list[int]()
    for place in count():
        arrived, returned, release = threading.Event(), threading.Event(), threading.Event()
        clock = ManualClock()
        batcher = Batcher[str, str](processor, Natural(), max_workers=3, clock=clock)
        for _ in range(3):  # so that the median is 0 even if the last one is timed after the clock has advanced
            batcher.submit("before").result(timeout=10)
        clock.advance(1)  # too long for the batcher to expect this caller back
        held = in_thread(lambda: batcher.submit("held")).result(timeout=10)
        while not held.running():
            pass
        signal = Signal(wait_for_the_caller_to_return, place)
        waiter = in_thread(wait_for_another)
        waiter.add_done_callback(lambda _: arrived.set())
        try:
            arrived.wait(10)
            batcher.submit("back")
            returned.set()
            waiter.result(timeout=20)
        finally:
            release.set()
            shut_down = in_thread(batcher.shutdown)
        assert shut_down.result(timeout=10)
        assert (0, 6) == (batcher.stats().running, batcher.stats().succeeded)
        if not signal.arrived:
            break
    assert place > 1


def test_a_job_expires_even_if_a_signal_handler_waits_at_any_point_of_its_submit() -> None:
    def wake_the_batcher_thread() -> None:
        batcher.flush(wait=False)
        with suppress(TimeoutError):
            held.result(timeout=0.02)

    def processor(jobs: list[str]) -> list[str]:
        wait_until_blocked(caller) if jobs == ["before"] else release.wait()
        return jobs

    caller = threading.get_ident()
    for place in count():
        clock, release = ManualClock(), threading.Event()
        with Batcher[str, str](processor, Natural(), clock=clock) as batcher:
            for _ in range(2):  # makes the batcher expect this caller back
                batcher.submit("before").result(timeout=10)
            held = in_thread(lambda: batcher.submit("held")).result(timeout=10)
            while not held.running():
                pass
            futures: list[JobFuture[str]] = []
            signal = Signal(wake_the_batcher_thread, place)
            signal.during(lambda: futures.append(batcher.submit("job", expires_in=5)))
            clock.advance(5)
            try:
                assert isinstance(futures[0].exception(timeout=10), JobExpired)
            finally:
                release.set()
        if not signal.arrived:
            break
    assert place > 1


def wait_until_blocked(thread: int) -> None:
    """Wait until a thread is blocked in `result`."""
    while Waiter.wait.__code__ not in codes_of(thread):
        pass


def codes_of(thread: int) -> list[CodeType]:
    """Return the code of all functions on the stack of a thread."""
    return [frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames().get(thread))]


class ArmedClock(ManualClock):
    """Raises KeyboardInterrupt, like Ctrl-C, when the main thread next calls the armed method."""

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


def interrupt_twice(clock: ArmedClock, method: str, action: Callable[[], Any], place: int) -> bool:
    """Interrupt *action* when it calls *method* of the clock, and again at *place*. Return whether it got there."""
    clock.armed = method
    signal = Signal(interrupt, place)
    assert isinstance(signal.during(action), KeyboardInterrupt)
    clock.armed = ""
    return signal.arrived


def test_a_second_ctrl_c_at_any_point_after_one_in_a_submit_leaves_no_lock_held() -> None:
    for place in count():
        clock = ArmedClock()
        with Batcher[str, str](list, Size(1), clock=clock) as batcher:
            batcher.submit("before").result(timeout=10)
            arrived = interrupt_twice(clock, "now", lambda: batcher.submit("job"), place)
            in_thread(batcher.stats).result(timeout=10)
        if not arrived:
            break
    assert place > 2


def test_a_second_ctrl_c_at_any_point_after_one_in_a_blocked_submit_leaves_no_caller_counted_as_blocked(
    processor: RecordingProcessor[str],
) -> None:
    for place in count():
        clock = ArmedClock()
        with Batcher[str, str](processor, Interval(60), max_pending=3, clock=clock) as batcher:
            processor.hold()
            running = batcher.submit("running")
            batcher.flush(wait=False)
            processor.wait_for_batches(2 * place + 1)
            clock.advance(1)
            waiting = [batcher.submit("waiting") for _ in range(3)]
            arrived = interrupt_twice(clock, "wait_until", lambda: batcher.submit("blocked"), place)
            in_thread(batcher.stats).result(timeout=10)
            processor.release()
            running.result(timeout=10)
            clock.wait_for_sleeper(61)  # the worker is free, and the batch waits for its interval
        assert {"shutdown"} == {future.result(timeout=0).batch.trigger for future in waiting}
        if not arrived:
            break
    assert place > 5


@pytest.mark.parametrize("watch", [wait, lambda futures, timeout: list(as_completed(futures, timeout))])
def test_ctrl_c_at_any_point_of_wait_or_as_completed_delays_no_job(watch: Any) -> None:
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
        if not signal.arrived:
            break
    assert place > 20


def test_a_flush_interrupted_by_a_signal_handler_does_not_undo_the_flush_of_another_thread() -> None:
    class Observing(Size):
        def observe(self, report: Any) -> None:
            if armed.is_set():
                go_on.wait(timeout=10)  # so that the leader drains the queue after all flushes

    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["held"]:
            release.wait(timeout=20)
        return jobs

    def flush_in_another_thread() -> None:
        others.append(in_thread(flush_twice))
        with suppress(TimeoutError):
            held.result(timeout=0.3)  # meanwhile, the other thread flushes

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
            signal = Signal(flush_in_another_thread, place)
            signal.during(lambda: batcher.flush(wait=False))
            go_on.set()
            if others:
                assert "second" == others[0].result(timeout=10).result(timeout=10).value
            release.set()
        if not signal.arrived:
            break
    assert place > 1


def test_a_wait_in_a_signal_handler_at_any_point_of_a_notification_notifies_no_watcher_twice() -> None:
    for place in count():
        processor = RecordingProcessor[str]()
        processor.hold()
        with Batcher[str, str](processor, Size(1)) as batcher:
            future = batcher.submit("job")
            watcher = _base._AllCompletedWaiter(
                2, stop_on_exception=False
            )  # of `wait`, for this future and another one
            condition = future._condition
            condition.acquire()  # so that the release notifies the watcher
            future._waiters.append(watcher)
            processor.release()
            while not future.done():
                pass
            signal = Signal(lambda: wait([future], timeout=0), place)
            assert signal.during(condition.release) is None
        assert (1, [future]) == (watcher.num_pending_calls, watcher.finished_futures)
        if not signal.arrived:
            break
    assert place > 1


def test_a_signal_handler_at_any_point_of_as_completed_may_wait_for_another_job() -> None:
    def read_all() -> None:
        for _ in as_completed(futures, timeout=10):
            gates["late"].set()

    def wait_for_another() -> None:
        gates["late"].set()
        values.append(batcher.submit("other").result(timeout=10).value)

    for place in count():
        gates = {job: threading.Event() for job in ("early", "late")}
        values: list[str] = []

        def processor(jobs: list[str]) -> list[str]:
            if jobs[0] in gates:
                gates[jobs[0]].wait(10)
            return jobs

        with Batcher[str, str](processor, Size(1)) as batcher:
            futures = [batcher.submit(job) for job in gates]
            gates["early"].set()
            signal = Signal(wait_for_another, place, ("concurrent.futures._base", "microbatch."))
            assert signal.during(read_all) is None
        assert ["other"] * signal.arrived == values
        if not signal.arrived:
            break
    assert place > 1


COALESCED: dict[str, tuple[int, Callable[[Any, list[Any]], Any]]] = {
    "submit": (0, lambda shared, futures: shared.submit("job")),
    "join": (1, lambda shared, futures: shared.submit("job")),
    "cancel one": (2, lambda shared, futures: futures[0].cancel()),
    "cancel the last": (1, lambda shared, futures: futures[0].cancel()),
}
"""What a caller of an equal job does, and how many callers the job has before."""


@pytest.mark.parametrize("action", COALESCED)
def test_ctrl_c_at_any_point_of_what_a_caller_of_an_equal_job_does_affects_no_other_caller(action: str) -> None:
    before, act = COALESCED[action]
    for place in count():
        with Batcher[str, str](list, Interval(9), max_pending=1) as batcher:
            shared, seen = coalescing(batcher), list[Any]()
            futures = [shared.submit("job") for _ in range(before)]
            for future in futures:
                future.add_done_callback(seen.append)
            signal = Signal(interrupt, place)
            signal.during(lambda: act(shared, futures))
            assert batcher.flush(timeout=10)
            assert all(future.done() for future in futures)
            if futures and action != "cancel the last":
                assert "job" == futures[-1].result().value
            later = shared.submit("job", timeout=0)  # no space is lost
            assert batcher.flush(timeout=10)
            assert "job" == later.result(timeout=0).value
        assert {} == shared._in_flight
        # A callback that is interrupted just when it begins is logged as failed.
        assert len(set(futures) - set(seen)) <= 1 and len(seen) == len(set(seen))
        if not signal.arrived:
            break
    assert place > 1


def test_ctrl_c_at_any_point_of_joining_a_job_leaves_no_caller_that_keeps_the_job_from_being_cancelled() -> None:
    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            shared = coalescing(batcher)
            first, joined = shared.submit("job"), list[Any]()
            signal = Signal(interrupt, place)
            signal.during(lambda: joined.append(shared.submit("job")))
            assert [first.cancel()] == [True]
            assert len(joined) == batcher.stats().batched + batcher.stats().queued
        if not signal.arrived:
            break
    assert place > 1


def test_ctrl_c_at_any_point_of_the_last_cancel_leaves_no_job_that_nobody_wants() -> None:
    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            future = coalescing(batcher).submit("job")
            signal = Signal(interrupt, place)
            signal.during(future.cancel)
            assert future.cancelled() == (batcher.stats().cancelled == 1)
        if not signal.arrived:
            break
    assert future.cancelled()


def test_a_caller_that_joins_at_any_point_of_the_last_cancel_gets_its_result() -> None:
    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            shared, joined = coalescing(batcher), list[Any]()
            future = shared.submit("job")
            signal = Signal(lambda: joined.append(shared.submit("job")), place)
            assert signal.during(future.cancel) is None
            assert future.cancelled()
            batcher.flush()
            assert ["job"] * len(joined) == [each.result(timeout=0).value for each in joined]
        if not signal.arrived:
            break
    assert place > 1


@pytest.mark.parametrize("action", COALESCED)
def test_a_signal_handler_at_any_point_of_what_a_caller_of_an_equal_job_does_may_wait_for_such_a_job(
    action: str,
) -> None:
    def handle() -> None:
        assert "job" == shared.submit("job", timeout=0).result(timeout=10).value

    before, act = COALESCED[action]
    for place in count():
        with Batcher[str, str](list, Interval(0.001)) as batcher:
            shared = coalescing(batcher)
            futures: list[Any] = [shared.submit("job") for _ in range(before)]
            signal = Signal(handle, place)
            assert signal.during(lambda: futures.append(act(shared, futures))) is None
            assert batcher.flush(timeout=10)
            outcome = futures.pop()
            assert all(future.done() for future in futures)
            assert outcome in (True, False) if "cancel" in action else outcome.result(timeout=0).value == "job"
        assert {} == shared._in_flight
        if not signal.arrived:
            break
    assert place > 1


def test_ctrl_c_at_any_point_of_a_cancel_of_a_caller_of_an_equal_job_leaves_no_thread_blocked() -> None:
    def wait_for_result() -> None:
        waiting.append(threading.get_ident())
        future.exception(timeout=20)

    for place in count():
        with Batcher[str, str](list, Size(9)) as batcher:
            shared = coalescing(batcher)
            future, other, waiting = shared.submit("job"), shared.submit("job"), list[int]()
            waiter = in_thread(wait_for_result)
            while not (waiting and Waiter.wait.__code__ in codes_of(waiting[0])):
                pass
            signal = Signal(interrupt, place)
            signal.during(future.cancel)
            if future.cancelled():
                assert isinstance(waiter.exception(timeout=10), CancelledError)
            assert not other.cancelled()
        if not signal.arrived:
            break
    assert future.cancelled()
