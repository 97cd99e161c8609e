"""Listeners: which events they receive, when, and in which thread, and that they affect no job."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar, copy_context
from types import FrameType
from typing import Any

import pytest

from microbatch import (
    Batcher,
    BatcherShutDown,
    BatchFinished,
    BatchListener,
    BatchStarted,
    Interval,
    JobAccepted,
    JobFuture,
    JobState,
    Size,
)
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from tests.threads import in_thread


class RecordingListener(BatchListener):
    """Records the events that it receives."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.threads: list[str] = []

    def record(self, event: Any) -> None:
        self.events.append(event)
        self.threads.append(threading.current_thread().name)

    job_accepted = batch_started = batch_finished = shutdown = record

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


def failing(jobs: list[Any]) -> list[Any]:
    return [ValueError(job) if job == "bad" else job for job in jobs]


@pytest.mark.parametrize("executor", [None, InlineExecutor()], ids=["own threads", "an executor"])
def test_a_listener_receives_an_event_for_each_job_each_batch_and_the_shutdown(
    executor: Any, clock: ManualClock
) -> None:
    def processor(jobs: list[Any]) -> list[Any]:
        clock.advance(0.5)
        return failing(jobs)

    listener = RecordingListener()
    with Batcher[Any, Any](
        processor, Size(2), executor=executor, listeners=[listener], clock=clock, name="rows"
    ) as batcher:
        held = [batcher.submit("good"), batcher.submit("bad")]
    accepted, others = listener.events[:1], listener.events[1:]
    accepted += [others.pop([type(event) for event in others].index(JobAccepted))]
    info = held[0].result().batch
    assert [JobAccepted("rows", future) for future in held] == accepted
    assert [
        BatchStarted("rows", info, tuple(held)),
        BatchFinished("rows", info, tuple(held), started=0.0, service_time=0.5, failed=1),
        BatcherShutDown("rows", batcher.stats()),
    ] == others


def test_the_events_of_a_batch_are_sent_in_the_thread_that_runs_the_batch() -> None:
    def processor(jobs: list[str]) -> list[str]:
        ran_in.append(threading.current_thread().name)
        return jobs

    ran_in: list[str] = []
    listener = RecordingListener()
    with Batcher(processor, Size(1), listeners=[listener], name="rows") as batcher:
        batcher.submit("job").result(timeout=10)
    threads = dict(zip(listener.kinds(), listener.threads))
    assert threading.current_thread().name == threads["JobAccepted"]
    assert ran_in == [threads["BatchStarted"]] == [threads["BatchFinished"]] != [threads["BatcherShutDown"]]


def test_with_a_supplied_executor_batch_started_is_sent_before_the_batch_is_passed_to_it() -> None:
    listener = RecordingListener()
    with ThreadPoolExecutor(1, "pool") as executor:
        with Batcher[str, str](list, Size(1), executor=executor, listeners=[listener], name="rows") as batcher:
            batcher.submit("job").result(timeout=10)
    assert "rows" == dict(zip(listener.kinds(), listener.threads))["BatchStarted"]


@pytest.mark.parametrize("executor", [None, InlineExecutor()], ids=["own threads", "an executor"])
def test_a_slow_listener_does_not_add_to_the_service_time(executor: Any, clock: ManualClock) -> None:
    class Slow(RecordingListener):
        def batch_started(self, event: BatchStarted) -> None:
            clock.advance(1.0)

    listener = Slow()
    with Batcher[str, str](list, Size(1), executor=executor, listeners=[listener], clock=clock) as batcher:
        result = batcher.submit("job").result(timeout=10)
    assert (1.0, 0.0) == (result.queue_time, result.service_time)
    assert [(1.0, 0.0)] == [(f.started, f.service_time) for f in listener.events if isinstance(f, BatchFinished)]


def test_batch_finished_is_sent_after_all_futures_are_settled_and_before_the_next_batch_starts() -> None:
    running: list[str] = []

    class Reading(BatchListener):
        def batch_finished(self, event: BatchFinished) -> None:
            assert all(future.done() for future in event.futures)
            running.append(f"finished {event.batch.id}")

    def processor(jobs: list[int]) -> list[int]:
        running.append(f"started {jobs[0]}")
        return jobs

    with Batcher(processor, Size(1), listeners=[Reading()]) as batcher:
        for job in (1, 2, 3):
            batcher.submit(job)
    assert [f"{what} {number}" for number in (1, 2, 3) for what in ("started", "finished")] == running


@pytest.mark.parametrize("kind", ["job_accepted", "batch_started", "batch_finished", "shutdown"])
def test_a_listener_is_called_while_no_lock_is_held(kind: str) -> None:
    class Asking(BatchListener):
        def ask(self, event: Any) -> None:
            answers.append(in_thread(lambda: batcher.stats().accepted).result(timeout=10))

    answers: list[int] = []
    setattr(Asking, kind, Asking.ask)
    with Batcher[str, str](list, Size(1), listeners=[Asking()]) as batcher:
        batcher.submit("job").result(timeout=10)
    assert [1] == answers


def test_a_listener_is_called_while_no_lock_is_held_if_one_submit_interrupts_another() -> None:
    class Interrupted(ManualClock):
        def now(self) -> float:
            if jobs:
                batcher.submit(jobs.pop())
            return super().now()

    class Asking(BatchListener):
        def job_accepted(self, event: JobAccepted) -> None:
            answers[event.future.job] = in_thread(lambda: batcher.stats().accepted).result(timeout=10)

    jobs: list[str] = []
    answers: dict[str, int] = {}
    with Batcher[str, str](list, Size(1), listeners=[Asking()], clock=Interrupted()) as batcher:
        batcher.submit("first").result(timeout=10)
        jobs.append("inner")
        batcher.submit("outer").result(timeout=10)
    assert {"first", "inner", "outer"} == answers.keys()


user: "ContextVar[str]" = ContextVar("user")


def test_a_future_keeps_the_context_of_its_submit_if_a_listener_wants_it() -> None:
    class Users(BatchListener):
        wants_context = True

        def batch_finished(self, event: BatchFinished) -> None:
            users.extend(future.context.run(user.get) for future in event.futures if future.context)

    def submit(name: str) -> None:
        user.set(name)
        batcher.submit("job").result(timeout=10)

    users: list[str] = []
    with Batcher[str, str](list, Size(2), listeners=[Users()]) as batcher:
        for submitted in [in_thread(lambda name=name: submit(name)) for name in ("Ada", "Grace")]:  # type: ignore[misc]
            submitted.result(timeout=10)
    assert ["Ada", "Grace"] == sorted(users)


def test_each_future_has_a_context_of_its_own() -> None:
    class Wanting(RecordingListener):
        wants_context = True

    def one(job: str) -> JobFuture[str]:
        return batcher.submit(job)

    with Batcher[str, str](list, listeners=[Wanting()]) as batcher:
        here = copy_context()
        futures = [here.run(one, "job") for _ in range(2)]
        contexts = [future.context for future in futures * 2]
        assert "inside" == enter_all([here, *contexts], lambda: "inside")


def enter_all(contexts: Sequence[Context | None], function: Callable[[], str]) -> str:
    if not contexts:
        return function()
    assert contexts[0] is not None
    return contexts[0].run(enter_all, contexts[1:], function)


def test_a_future_keeps_no_context_if_no_listener_wants_it() -> None:
    with Batcher[str, str](list, listeners=[RecordingListener()]) as batcher:
        assert batcher.submit("job").context is None


@pytest.mark.parametrize("listeners", [[], [RecordingListener()]], ids=["no listener", "a listener"])
def test_without_listeners_no_code_of_the_listeners_module_runs(listeners: list[BatchListener]) -> None:
    def note_call(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.add(frame.f_globals["__name__"])

    called: set[str] = set()
    threading.setprofile(note_call)
    try:
        with Batcher[str, str](list, Size(1), listeners=listeners) as batcher:  # its own threads inherit the profiler
            sys.setprofile(note_call)
            batcher.submit("job").result(timeout=10)
            sys.setprofile(None)
    finally:
        threading.setprofile(None)
    assert {"microbatch.batcher", "microbatch._engine.engine"} <= called
    assert bool(listeners) == ("microbatch.listeners" in called)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_listener_that_raises_is_logged_and_stops_nothing(error: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Raising(BatchListener):
        def fail(self, event: Any) -> None:
            raise error

        job_accepted = batch_started = batch_finished = shutdown = fail

    listener, called = RecordingListener(), list[str]()
    with Batcher[str, str](list, Size(1), listeners=[Raising(), listener]) as batcher:
        batcher.add_shutdown_callback(lambda: called.append("called"))
        assert ["a", "b"] == [batcher.submit(job).result(timeout=10).value for job in "ab"]
    assert ["called"] == called
    assert 7 == len(listener.events) == len(caplog.records)
    assert {"the fail() of a listener raised"} == {record.getMessage() for record in caplog.records}


def test_a_batch_that_the_executor_refuses_has_both_events() -> None:
    listener, executor = RecordingListener(), ThreadPoolExecutor(1)
    executor.shutdown()
    with Batcher[str, str](list, Size(1), executor=executor, listeners=[listener]) as batcher:
        assert isinstance(batcher.submit("job").exception(timeout=10), RuntimeError)
    kinds = [kind for kind in listener.kinds() if kind != "JobAccepted"]
    assert ["BatchStarted", "BatchFinished", "BatcherShutDown"] == kinds
    assert [1] == [event.failed for event in listener.events if isinstance(event, BatchFinished)]


def test_jobs_that_fail_with_the_batcher_thread_are_counted_as_failed_in_batch_finished(
    clock: ManualClock, processor: RecordingProcessor[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = RecordingListener()
    with Batcher[str, str](processor, Size(1), listeners=[listener], clock=clock) as batcher:
        running, waiting = batcher.submit("running"), batcher.submit("waiting")
        processor.wait_for_batches(1)
        with monkeypatch.context() as broken:
            broken.setattr(clock, "now", lambda: 1 / 0)
            waiting.cancel()  # makes the batcher thread read the clock
            assert isinstance(running.exception(timeout=10), ZeroDivisionError)
        processor.release()
    assert [1] == [event.failed for event in listener.events if isinstance(event, BatchFinished)]


def test_jobs_that_no_worker_has_taken_are_in_no_event_of_a_batch(clock: ManualClock) -> None:
    listener = RecordingListener()
    with Batcher[str, str](list, Interval(60), listeners=[listener], clock=clock) as batcher:
        cancelled, expired = batcher.submit("cancelled"), batcher.submit("expired", expires_in=1.0)
        cancelled.cancel()
        clock.advance(1.0)
        expired.exception(timeout=10)
    assert JobState.EXPIRED is expired.state
    assert ["JobAccepted", "JobAccepted", "BatcherShutDown"] == listener.kinds()
    assert (2, 1, 1) == tuple(getattr(listener.events[2].stats, name) for name in ("accepted", "cancelled", "expired"))


def test_a_shutdown_callback_runs_even_if_the_clock_raises_for_the_shutdown_event(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(BatchListener):
        def batch_finished(self, event: BatchFinished) -> None:
            clock.now = explode  # type: ignore[method-assign]

        def shutdown(self, event: BatcherShutDown) -> None:
            """Does nothing, but has the batcher read the clock for the event."""

    def explode() -> float:
        raise OSError("no clock")

    ended = threading.Event()
    batcher = Batcher[str, str](list, Size(1), listeners=[Broken()], clock=clock)
    batcher.add_shutdown_callback(ended.set)
    batcher.submit("job").result(timeout=10)
    assert ended.wait(10)


def test_an_unused_batcher_sends_one_shutdown_event() -> None:
    listener = RecordingListener()
    with Batcher[str, str](list, listeners=[listener]) as batcher:
        pass
    batcher.shutdown()
    assert ["BatcherShutDown"] == listener.kinds()


def test_an_object_with_any_of_the_methods_is_a_listener() -> None:
    class Counting:
        count = 0

        def batch_finished(self, event: BatchFinished) -> None:
            self.count += event.batch.size

    counting: Any = Counting()
    with Batcher[str, str](list, listeners=(counting for _ in range(2))) as batcher:
        batcher.submit("job")
    assert 2 == counting.count


class Asynchronous(BatchListener):
    async def shutdown(self, event: BatcherShutDown) -> None:  # type: ignore[override]
        """Never runs."""


@pytest.mark.parametrize(
    "listeners, complaint",
    [
        (RecordingListener(), "listeners must be an iterable of BatchListeners, got <"),
        ([RecordingListener], "listeners must be BatchListeners, got <class"),
        ([None], "listeners must be BatchListeners, got None"),
        ([print], "listeners must be BatchListeners, got <built-in"),
        ([Asynchronous()], r"the shutdown\(\) of a listener must be a plain function, got the asynchronous <bound"),
    ],
)
def test_an_object_that_is_not_a_listener_is_refused(listeners: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        Batcher(list, listeners=listeners)
