"""Flush, shutdown, cancellation, expiry, and which objects are kept alive."""

import concurrent.futures
import gc
import sys
import threading
import tracemalloc
import weakref
from typing import Any

import pytest

from microbatch import Batcher, BatcherClosed, Interval, JobExpired, JobFuture, JobState, Size
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from tests.threads import in_thread


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


# -- flush --


def test_flush_dispatches_the_jobs_that_the_policy_holds_back_and_waits_for_them() -> None:
    with Batcher(echo, Size(100)) as batcher:
        futures = [batcher.submit(number) for number in range(3)]
        assert batcher.flush()
        assert all(future.done() for future in futures)
        assert (3, "flush") == (futures[0].result().batch.size, futures[0].result().batch.trigger)


def test_flush_without_waiting_returns_at_once(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(100)) as batcher:
        future = batcher.submit(1)
        assert batcher.flush(wait=False)
        assert not future.done()
        processor.release()
        assert 1 == future.result(timeout=10).value


def test_flush_returns_false_if_its_timeout_runs_out(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
    with Batcher(processor, Size(100), clock=clock) as batcher:
        batcher.submit(1)
        assert not batcher.flush(timeout=0)
        waiting = in_thread(lambda: batcher.flush(timeout=5))
        clock.wait_for_sleeper(5.0)
        clock.advance(5)
        assert waiting.result(timeout=10) is False
        processor.release()


def test_flush_does_not_wait_for_later_jobs(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
    with Batcher(processor, Size(100), max_workers=2, clock=clock) as batcher:
        batcher.submit("before")
        waiting = in_thread(lambda: batcher.flush(timeout=5))
        clock.wait_for_sleeper(5.0)
        processor.wait_for_batches(1)
        after = batcher.submit("after")
        processor.release()
        assert waiting.result(timeout=10) is True
        assert not after.done()


def test_a_flush_keeps_to_the_limits_of_the_policy() -> None:
    processor = RecordingProcessor[int]()
    with Batcher(processor, Size(3) & Interval(60)) as batcher:
        for number in range(7):
            batcher.submit(number)
        batcher.flush()
    assert [[0, 1, 2], [3, 4, 5], [6]] == processor.batches


def test_a_flush_without_jobs_returns_true() -> None:
    batcher = Batcher(echo)
    assert batcher.flush()
    batcher.submit(1).result()
    assert batcher.flush() and batcher.flush()
    batcher.shutdown()
    assert batcher.flush()


def test_a_flush_counts_a_cancelled_job_as_settled(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(1)) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        batcher.submit("unwanted").cancel()
        waiting = in_thread(batcher.flush)
        processor.release()
        assert waiting.result(timeout=10)
    assert [["running"]] == processor.batches


# -- shutdown --


def test_shutdown_dispatches_all_waiting_jobs() -> None:
    batcher = Batcher(echo, Size(100))
    future = batcher.submit(1)
    assert batcher.shutdown()
    assert (1, "shutdown") == (future.result(timeout=0).value, future.result().batch.trigger)


def test_shutdown_is_idempotent_and_ends_the_threads() -> None:
    before = threading.active_count()
    batcher = Batcher(echo, max_workers=3)
    batcher.submit(1)
    assert batcher.shutdown() and batcher.shutdown() and batcher.shutdown(wait=False)
    assert before == threading.active_count()


def test_a_submit_after_shutdown_is_refused() -> None:
    used, unused = Batcher(echo), Batcher(echo)
    used.submit(1)
    for batcher in (used, unused):
        batcher.shutdown()
        with pytest.raises(BatcherClosed):
            batcher.submit(2)
        with pytest.raises(BatcherClosed):
            list(batcher.map([3]))


def test_shutdown_without_waiting_leaves_the_accepted_jobs_to_the_worker_threads(
    processor: RecordingProcessor[Any],
) -> None:
    batcher = Batcher(processor, Size(1))
    futures = [batcher.submit(number) for number in range(3)]
    assert batcher.shutdown(wait=False)
    processor.release()
    assert [0, 1, 2] == [future.result(timeout=10).value for future in futures]
    assert batcher.shutdown()


def test_shutdown_returns_false_if_its_timeout_runs_out(processor: RecordingProcessor[Any]) -> None:
    batcher = Batcher(processor)
    future = batcher.submit(1)
    assert not batcher.shutdown(timeout=0)
    processor.release()
    assert batcher.shutdown(timeout=10)
    assert future.done()


def test_shutdown_can_cancel_the_jobs_that_no_worker_has_taken(processor: RecordingProcessor[Any]) -> None:
    batcher = Batcher(processor, Size(1))
    running, *waiting = [batcher.submit(number) for number in range(4)]
    processor.wait_for_batches(1)
    batcher.shutdown(wait=False, cancel_futures=True)
    assert [True, True, True] == [future.cancelled() for future in waiting]
    processor.release()
    assert 0 == running.result(timeout=10).value
    assert batcher.shutdown()
    assert [[0]] == processor.batches


def test_a_with_block_shuts_the_batcher_down_even_after_an_exception() -> None:
    with pytest.raises(KeyError):
        with Batcher(echo, Size(100)) as batcher:
            future = batcher.submit(1)
            raise KeyError
    assert future.done()


def test_many_threads_may_shut_down_and_flush_at_once(processor: RecordingProcessor[Any]) -> None:
    batcher = Batcher(processor, Size(2))
    futures = [batcher.submit(number) for number in range(5)]
    calls = [in_thread(call) for call in [batcher.shutdown, batcher.flush] * 8]
    processor.release()
    assert {True} == {call.result(timeout=10) for call in calls}
    assert all(future.done() for future in futures)


def test_shutdown_returns_even_if_other_threads_keep_submitting() -> None:
    batcher = Batcher(echo, Size(5))
    accepted: list[JobFuture[Any]] = []

    def submit_until_refused() -> int:
        while True:
            try:
                accepted.append(batcher.submit(1))
            except BatcherClosed:
                return 1

    threads = [in_thread(submit_until_refused) for _ in range(4)]
    while len(accepted) < 100:
        batcher.flush()
    assert batcher.shutdown(timeout=20)
    assert 4 == sum(thread.result(timeout=10) for thread in threads)
    assert all(future.done() and not future.cancelled() for future in accepted)
    assert len(accepted) == batcher.stats().succeeded


@pytest.mark.parametrize("call", ["flush", "shutdown"])
@pytest.mark.parametrize("place", ["processor", "callback"])
def test_a_thread_of_the_batcher_that_waits_for_the_batcher_gets_an_error(place: str, call: str) -> None:
    refused: list[BaseException] = []

    def wait(_: Any = None) -> None:
        try:
            getattr(batcher, call)()
        except RuntimeError as error:
            refused.append(error)
        getattr(batcher, call)(wait=False)

    with Batcher[int, None](lambda jobs: wait() if place == "processor" else None, Size(2)) as batcher:
        future = batcher.submit(1)
        if place == "callback":
            future.add_done_callback(wait)
        batcher.submit(2)
        future.result(timeout=10)
    assert ["a thread of the batcher can't wait for the batcher: use wait=False"] == [str(error) for error in refused]


@pytest.mark.parametrize("call", ["result", "exception"])
@pytest.mark.parametrize("place", ["processor", "callback", "expiry"])
def test_a_thread_of_the_batcher_that_waits_for_a_job_without_a_timeout_gets_an_error(
    place: str, call: str, clock: ManualClock
) -> None:
    caught: list[BaseException] = []

    def wait(_: Any = None) -> None:
        inner = batcher.submit("inner")
        for timeout in (None, 0):
            try:
                getattr(inner, call)(timeout)
            except (RuntimeError, TimeoutError, concurrent.futures.TimeoutError) as error:
                caught.append(error)

    def processor(jobs: list[Any]) -> None:
        if place == "processor" and "outer" in jobs:
            wait()

    with Batcher[Any, None](processor, Interval(7), clock=clock) as batcher:
        outer = batcher.submit("outer", expires_in=5 if place == "expiry" else None)
        if place != "processor":
            outer.add_done_callback(wait)
        clock.advance(7)
        outer.exception(timeout=10)
        while len(caught) < 2:
            batcher.flush(timeout=10)
    assert "a thread of the batcher can't wait for one of its jobs without a timeout: that could deadlock" == str(
        caught[0]
    )
    assert isinstance(caught[1], (TimeoutError, concurrent.futures.TimeoutError))


def test_a_callback_may_read_the_other_results_of_its_batch() -> None:
    seen: list[Any] = []
    with Batcher(echo, Size(2)) as batcher:
        first = batcher.submit(1)
        first.add_done_callback(lambda future: seen.append(second.result().value))
        second = batcher.submit(2)
        assert 1 == first.result(timeout=10).value
    assert [2] == seen


def test_a_callback_may_submit_another_job(clock: ManualClock) -> None:
    more: list[JobFuture[Any]] = []
    with Batcher(echo, Size(1)) as batcher:
        batcher.submit(1).add_done_callback(lambda future: more.append(batcher.submit(2)))
        while not more:
            batcher.flush()
    assert 2 == more[0].result(timeout=0).value


def test_shutdown_callbacks_run_once_in_order_after_the_last_job(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    def fail() -> None:
        raise SystemExit("from a callback")

    batcher = Batcher(echo, Size(100))
    future = batcher.submit(1)
    batcher.add_shutdown_callback(lambda: seen.append(future.done()))
    batcher.add_shutdown_callback(fail)
    batcher.add_shutdown_callback(lambda: seen.append("last"))
    batcher.shutdown()
    batcher.shutdown()
    assert [True, "last"] == seen
    assert "from a callback" in caplog.text
    batcher.add_shutdown_callback(lambda: seen.append("late"))
    assert [True, "last", "late"] == seen


def test_a_shutdown_callback_that_waits_for_the_shutdown_that_calls_it_gets_an_error() -> None:
    outcomes: list[Any] = []

    def callback() -> None:
        with pytest.raises(RuntimeError, match="wait=False"):
            batcher.shutdown()
        outcomes.append(batcher.shutdown(wait=False))

    batcher = Batcher(echo)
    batcher.add_shutdown_callback(callback)
    assert batcher.shutdown(timeout=10)
    assert [True] == outcomes


def test_shutdown_callbacks_run_even_if_there_was_no_job() -> None:
    seen: list[Any] = []
    with Batcher(echo) as batcher:
        batcher.add_shutdown_callback(lambda: seen.append(batcher.shutdown(wait=False)))
    assert [True] == seen


# -- cancellation --


def test_a_cancelled_job_leaves_its_batch_and_never_reaches_the_processor() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Size(2)) as batcher:
        unwanted = batcher.submit("unwanted")
        assert unwanted.cancel()
        wanted = [batcher.submit("a"), batcher.submit("b")]
        assert 2 == wanted[0].result(timeout=10).batch.size
    assert [["a", "b"]] == processor.batches


def test_a_batch_of_only_cancelled_jobs_is_not_dispatched() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Size(3)) as batcher:
        assert batcher.submit("a").cancel() and batcher.submit("b").cancel()
    assert ([], 0) == (processor.batches, batcher.stats().batches)


def test_a_job_is_either_cancelled_or_dispatched_if_both_happen_at_once() -> None:
    processor = RecordingProcessor[int]()
    with Batcher(processor, Size(3) | Interval(0), max_workers=2) as batcher:
        futures = [batcher.submit(number) for number in range(3000)]
        cancelled = {number for number, future in enumerate(futures) if future.cancel()}
    processed = [number for batch in processor.batches for number in batch]
    assert len(processed) == len(set(processed))
    assert set(range(3000)) - cancelled == set(processed)
    assert (len(cancelled), len(processed)) == (batcher.stats().cancelled, batcher.stats().succeeded)


def test_a_callback_of_a_cancelled_job_may_wait_for_the_batcher(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(2)) as batcher:
        unwanted = batcher.submit(1)
        seen: list[bool] = []
        unwanted.add_done_callback(lambda future: seen.append(batcher.flush(timeout=10)))
        assert unwanted.cancel()
    assert [True] == seen


# -- expiry --


def test_a_job_expires_on_time_and_not_only_when_its_batch_is_dispatched(clock: ManualClock) -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Size(2), clock=clock) as batcher:
        doomed = batcher.submit("doomed", expires_in=5)
        clock.wait_for_sleeper(5.0)
        clock.advance(5)
        error = doomed.exception(timeout=10)
        assert isinstance(error, JobExpired) and isinstance(error, TimeoutError)
        assert (5.0, "the job was not dispatched within 5 s") == (error.expires_in, str(error))
        assert (JobState.EXPIRED, False, False) == (doomed.state, doomed.cancelled(), doomed.cancel())
        assert 2 == [batcher.submit(job) for job in "ab"][0].result(timeout=10).batch.size
    assert [["a", "b"]] == processor.batches
    assert 1 == batcher.stats().expired


def test_a_job_expires_while_all_workers_are_busy(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
    with Batcher(processor, Size(1), clock=clock) as batcher:
        batcher.submit("running", expires_in=5)
        processor.wait_for_batches(1)
        doomed = batcher.submit("doomed", expires_in=5)
        clock.wait_for_sleeper(5.0)
        clock.advance(5)
        assert isinstance(doomed.exception(timeout=10), JobExpired)
        processor.release()
    assert [["running"]] == processor.batches
    assert 1 == batcher.stats().succeeded


def test_a_job_that_expires_in_zero_seconds_is_never_processed() -> None:
    with Batcher(echo) as batcher:
        assert isinstance(batcher.submit(1, expires_in=0).exception(timeout=10), JobExpired)


def test_a_job_that_is_dispatched_in_time_does_not_expire(clock: ManualClock) -> None:
    with Batcher(echo, Interval(4), clock=clock) as batcher:
        future = batcher.submit(1, expires_in=5)
        clock.wait_for_sleeper(4.0)
        clock.advance(4)
        assert 1 == future.result(timeout=10).value
        clock.advance(1)
    assert JobState.SUCCEEDED is future.state


@pytest.mark.parametrize("expires_in", [float("inf"), 10**400, 1e300])
def test_huge_times_are_accepted(expires_in: float) -> None:
    with Batcher(echo, Interval(expires_in)) as batcher:
        future = batcher.submit(1, expires_in=expires_in, timeout=expires_in)
        assert batcher.flush(timeout=expires_in)
        assert future.done()
        assert batcher.shutdown(timeout=expires_in)


# -- intervals on the clock --


def test_an_interval_is_counted_from_the_first_job(clock: ManualClock) -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Interval(10), clock=clock, executor=InlineExecutor()) as batcher:
        batcher.submit("a")
        clock.wait_for_sleeper(10.0)
        clock.advance(9)
        second = batcher.submit("b")
        clock.wait_for_sleeper(10.0)
        assert [] == processor.batches
        clock.advance(1)
        assert "interval" == second.result(timeout=10).batch.trigger
    assert [["a", "b"]] == processor.batches


# -- objects that are kept alive --


class Referable:
    pass


class Failure(Exception):
    """An exception that, unlike a built-in one, can be weakly referenced."""


def test_a_waiting_job_needs_little_memory(processor: RecordingProcessor[Any]) -> None:
    count = 20_000
    with Batcher(processor, max_pending=0) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        futures: list[Any] = [None] * count
        tracemalloc.start()
        try:
            for number in range(count):
                futures[number] = batcher.submit("job")
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        processor.release()
    # In bytes. A Future of the standard library alone takes 1,500. Python 3.10 gives some objects a dict each. Without
    # the GIL, each object is 16 bytes larger.
    assert taken / count < (350 if sys.version_info >= (3, 11) else 600)


@pytest.mark.slow
def test_an_idle_batcher_keeps_no_job_value_or_exception_alive() -> None:
    def fail_or_answer(jobs: list[Any]) -> list[Any]:
        if len(jobs) > 1:
            raise Failure
        return [Referable()]

    def use(batcher: Batcher[Any, Any], size: int) -> list[Any]:
        job = Referable()
        futures = [batcher.submit(job, expires_in=3600) for _ in range(size)]
        batcher.flush()
        outcomes = [future.exception() if size > 1 else future.result().value for future in futures]
        return [weakref.ref(each) for each in (job, *outcomes, *futures)]

    with Batcher(fail_or_answer, Size(2), key=id) as batcher:
        for size in (1, 2):
            kept = use(batcher, size)
            batcher.submit(0).cancel()  # the batcher thread runs its loop once more
            batcher.flush()
            gc.collect()
            assert [None] * len(kept) == [reference() for reference in kept]


def test_a_settled_future_is_freed_without_the_garbage_collector() -> None:
    def fail(jobs: list[Any]) -> None:
        raise ValueError

    gc.collect()
    gc.disable()
    try:
        with Batcher[Any, None](fail) as batcher:
            future = batcher.submit(1)
            future.exception(timeout=10)
            with pytest.raises(ValueError):
                future.result()
            batcher.flush()
            reference = weakref.ref(future)
            del future
            batcher.submit(0).exception(timeout=10)
            batcher.flush()
            assert reference() is None
    finally:
        gc.enable()


def test_a_future_that_is_kept_does_not_keep_its_batcher_alive(recwarn: pytest.WarningsRecorder) -> None:
    batcher = Batcher(echo)
    future = batcher.submit(1)
    future.result()
    reference = weakref.ref(batcher)
    del batcher
    gc.collect()
    assert reference() is None
    assert 1 == future.result().value
    assert [ResourceWarning] == [warning.category for warning in recwarn]


def test_after_a_shutdown_a_batcher_and_the_owner_of_its_processor_can_be_garbage_collected() -> None:
    class Service:
        def __init__(self) -> None:
            self.batcher = Batcher[int, int](self.process, Size(1))

        def process(self, jobs: list[int]) -> list[int]:
            return jobs

    service = Service()
    service.batcher.submit(1).result(timeout=10)
    service.batcher.shutdown()
    alive = weakref.ref(service)
    del service
    gc.collect()
    assert alive() is None


def test_a_processor_is_freed_even_if_the_thread_that_started_the_batcher_thread_has_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, start = threading.Event(), threading.Thread.start

    def start_and_stay(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "slow":
            go_on.wait(10)

    monkeypatch.setattr(threading.Thread, "start", start_and_stay)
    processor = RecordingProcessor[str]()
    alive = weakref.ref(processor)
    with Batcher[str, str](processor, name="slow") as batcher:
        batcher.submit("job").result(timeout=10)
    del batcher, processor
    gc.collect()
    assert alive() is None
    go_on.set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Batcher, Batcher[int, int]], ids=["plain", "with types"])
def test_a_dropped_batcher_processes_its_jobs_and_warns_where_it_was_created(kind: Any) -> None:
    batcher = kind(echo, Size(100), name="dropped")
    future = batcher.submit(1)
    with pytest.warns(ResourceWarning, match=r"batcher 'dropped', created at .*test_lifecycle\.py:\d+, was never shut"):
        del batcher
        gc.collect()
    assert "shutdown" == future.result(timeout=10).batch.trigger


def test_a_dropped_batcher_that_was_never_used_or_was_shut_down_gives_no_warning() -> None:
    Batcher(echo)
    batcher = Batcher(echo)
    batcher.submit(1)
    batcher.shutdown(wait=False)
    del batcher
    gc.collect()


def test_a_dropped_object_whose_method_is_the_processor_of_an_unused_batcher_is_freed() -> None:
    class Service:
        def __init__(self) -> None:
            self.batcher = Batcher(self.insert)

        def insert(self, jobs: list[Any]) -> list[Any]:
            return jobs

    reference = weakref.ref(Service())
    gc.collect()
    assert reference() is None


def test_a_flush_returns_even_if_a_job_was_cancelled_during_the_shutdown() -> None:
    for _ in range(100):
        batcher = Batcher(echo, Size(100))
        future = batcher.submit(1)
        batcher.shutdown(wait=False)
        future.cancel()
        assert batcher.shutdown(timeout=10)
        assert batcher.flush(timeout=10)


def test_a_job_cancelled_while_its_batch_is_formed_at_shutdown_is_neither_dispatched_nor_waited_for() -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(Size):
        asked = 0

        def due(self, window: Any) -> float:
            self.asked += 1
            if self.asked == 2:  # first at the submit, then at the shutdown
                asked.set()
                assert go_on.wait(10)
            return super().due(window)

    processor, clock = RecordingProcessor[int](), ManualClock()
    batcher = Batcher(processor, Slow(9), clock=clock)
    future = batcher.submit(1, expires_in=7)
    clock.wait_for_sleeper(7.0)
    batcher.shutdown(wait=False)
    assert asked.wait(10)
    assert future.cancel()
    go_on.set()
    assert batcher.shutdown(timeout=10)
    assert batcher.flush(timeout=0)
    assert ([], 1, 0) == (processor.batches, batcher.stats().cancelled, batcher.stats().batches)


def test_flushing_an_unused_batcher_leaves_no_calls_in_the_queue() -> None:
    batcher = Batcher(echo)
    for _ in range(1000):
        assert batcher.flush()
    assert 0 == len(batcher._engine.queue._calls)


def test_several_shutdowns_at_once_run_the_callbacks_only_once() -> None:
    first, go_on, seen = threading.Event(), threading.Event(), []
    batcher = Batcher(echo)

    def hold() -> None:
        first.set()
        assert go_on.wait(10)
        seen.append("first")

    batcher.add_shutdown_callback(hold)
    batcher.add_shutdown_callback(lambda: seen.append("second"))
    one = in_thread(batcher.shutdown)
    assert first.wait(10)
    assert not batcher.shutdown(timeout=0)
    go_on.set()
    assert batcher.shutdown(timeout=10) and one.result(timeout=10)
    assert ["first", "second"] == seen
