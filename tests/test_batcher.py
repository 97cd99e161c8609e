"""A batcher as a whole: submitting, back-pressure, keys, weights, statistics and executors."""

import threading
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from microbatch import (
    NEVER,
    NOW,
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatcherStats,
    BatchingPolicy,
    BatchReport,
    Interval,
    JobState,
    JobTooLarge,
    Rate,
    Rejected,
    Size,
    Window,
)
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from tests.conftest import FullBatcher
from tests.threads import in_thread


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


class Weighing(BatchingPolicy[Any]):
    def due(self, window: Window[Any]) -> float:
        return NEVER

    def fits(self, window: Window[Any], weight: float) -> bool:
        return window.weight + weight <= 10


def test_jobs_from_many_threads_each_get_their_own_result() -> None:
    with Batcher(RecordingProcessor[int](lambda job: job * 2), Size(7) | Interval(0.001), max_workers=3) as batcher:

        def call(start: int) -> list[int]:
            return [batcher.submit(number).result().value for number in range(start, start + 50)]

        callers = [in_thread(partial(call, start)) for start in range(0, 800, 50)]
        for start, caller in zip(range(0, 800, 50), callers):
            assert [n * 2 for n in range(start, start + 50)] == caller.result(timeout=20)
    assert 800 == batcher.stats().succeeded


def test_by_default_a_lone_job_does_not_wait() -> None:
    with Batcher(echo) as batcher:
        result = batcher.submit("a").result(timeout=10)
    assert (1, "natural") == (result.batch.size, result.batch.trigger)


def test_by_default_batches_grow_while_the_worker_is_busy() -> None:
    processor = RecordingProcessor[int]()
    processor.hold()
    with Batcher(processor) as batcher:
        batcher.submit(0)
        processor.wait_for_batches(1)
        for number in range(1, 151):
            batcher.submit(number)
        processor.release()
    assert [1, 100, 50] == [len(batch) for batch in processor.batches]


def test_no_thread_is_started_before_the_first_job() -> None:
    before = threading.active_count()
    with Batcher(echo, max_workers=3) as batcher:
        assert before == threading.active_count()
        assert batcher.flush()
        batcher.stats()
        assert before == threading.active_count()
        batcher.submit(1).result()
        assert before + 4 == threading.active_count()


def test_threads_are_named_after_the_batcher() -> None:
    names: list[str] = []
    with Batcher[int, None](lambda jobs: names.append(threading.current_thread().name), name="inserts") as batcher:
        batcher.submit(1).result()
        assert "inserts" in [thread.name for thread in threading.enumerate()]
    assert ["inserts_0"] == names


def test_batches_run_one_after_another_in_order_by_default() -> None:
    running: list[int] = []
    most: list[int] = []
    seen: list[int] = []

    def processor(jobs: list[int]) -> None:
        running.append(1)
        most.append(len(running))
        seen.extend(jobs)
        running.pop()

    with Batcher(processor, Size(2) | Interval(0)) as batcher:
        for number in range(100):
            batcher.submit(number)
    assert (1, list(range(100))) == (max(most), seen)


def test_as_many_batches_run_at_once_as_there_are_workers() -> None:
    together = threading.Barrier(3)
    with Batcher[int, int](lambda jobs: [together.wait(10)], Size(1), max_workers=3) as batcher:
        for future in [batcher.submit(number) for number in range(3)]:
            future.result(timeout=10)


def test_batches_beyond_max_workers_wait_in_the_batcher_where_their_jobs_can_be_cancelled() -> None:
    processor = RecordingProcessor[str]()
    processor.hold()
    with Batcher(processor, Size(1), max_workers=2) as batcher:
        futures = [batcher.submit(job) for job in "abcd"]
        processor.wait_for_batches(2)
        assert futures[2].cancel() and futures[3].cancel()
        processor.release()


# -- back-pressure --


def test_submit_with_timeout_zero_raises_at_once_if_the_queue_is_full() -> None:
    processor = RecordingProcessor[str]()
    processor.hold()
    with Batcher(processor, Size(1), max_pending=2) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        batcher.submit("a")
        batcher.submit("b")
        with pytest.raises(BacklogFull, match="^the queue is full: max_pending is 2$") as caught:
            batcher.submit("c", timeout=0)
        assert 2 == caught.value.max_pending
        assert 3 == batcher.stats().accepted
        processor.release()
    assert [["running"], ["a"], ["b"]] == processor.batches


def test_submit_raises_after_its_timeout_if_the_queue_is_full(full: FullBatcher, clock: ManualClock) -> None:
    clock.advance(4.9)
    assert not full.blocked.done()
    clock.advance(0.1)
    assert isinstance(full.blocked.exception(timeout=10), BacklogFull)


def test_a_blocked_submit_continues_when_the_queue_has_space(
    full: FullBatcher, processor: RecordingProcessor[Any]
) -> None:
    processor.release()
    assert "blocked" == full.blocked.result(timeout=10).result(timeout=10).value


def test_cancelling_a_job_unblocks_a_blocked_submit(full: FullBatcher) -> None:
    assert full.waiting.cancel()
    assert "blocked" == full.blocked.result(timeout=10).job


def test_a_shutdown_raises_in_a_blocked_submit(full: FullBatcher, processor: RecordingProcessor[Any]) -> None:
    full.batcher.shutdown(wait=False)
    assert isinstance(full.blocked.exception(timeout=10), BatcherClosed)
    processor.release()
    full.batcher.shutdown()
    assert [["running"], ["waiting"]] == processor.batches


def test_a_submit_from_the_processor_never_blocks() -> None:
    refused: list[BaseException] = []
    accepted: list[Any] = []

    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["first"]:
            accepted.append(batcher.submit("second"))
            try:
                batcher.submit("third")
            except BacklogFull as error:
                refused.append(error)
        return jobs

    with Batcher(processor, Size(1), max_pending=1) as batcher:
        assert "first" == batcher.submit("first").result(timeout=10).value
        assert "second" == accepted[0].result(timeout=10).value
    assert 1 == len(refused)


def test_a_full_queue_is_dispatched_even_if_the_policy_waits_for_more_jobs() -> None:
    with Batcher(echo, Size(2), key=str, max_pending=3) as batcher:
        futures = [batcher.submit(number) for number in range(9)]
    assert list(range(9)) == [future.result().value for future in futures]


def test_a_full_queue_waits_for_its_interval_while_no_submit_is_blocked(clock: ManualClock) -> None:
    with Batcher(echo, Size(100) | Interval(60), max_pending=2, clock=clock) as batcher:
        futures = [batcher.submit(1), batcher.submit(2)]
        with pytest.raises(BacklogFull):
            batcher.submit(3, timeout=0)
        assert not futures[0].done()
        clock.wait_for_sleeper(60.0)
        clock.advance(60)
        assert "interval" == futures[0].result(timeout=10).batch.trigger


@pytest.mark.parametrize("timeout", [None, 5])
def test_a_blocked_submit_does_not_wait_for_a_timer_while_a_worker_is_idle(
    clock: ManualClock, timeout: float | None
) -> None:
    with Batcher(echo, Size(100) | Interval(4), max_pending=2, clock=clock) as batcher:
        futures = [batcher.submit(1), batcher.submit(2)]
        blocked = in_thread(lambda: batcher.submit(3, timeout=timeout))
        assert ["flush", "flush"] == [future.result(timeout=10).batch.trigger for future in futures]
        assert 3 == blocked.result(timeout=10).job


def test_a_full_queue_waits_until_the_rate_limit_allows_a_batch_and_no_longer(clock: ManualClock) -> None:
    with Batcher(echo, Interval(3600) & Rate(1, per=60), max_pending=1, clock=clock) as batcher:
        first = batcher.submit(1)
        second = in_thread(lambda: batcher.submit(2))
        assert "flush" == first.result(timeout=10).batch.trigger
        future = second.result(timeout=10)
        third = in_thread(lambda: batcher.submit(3))
        clock.wait_for_sleeper(60.0)
        assert not future.done()
        clock.advance(60)
        assert "flush" == future.result(timeout=10).batch.trigger
        assert 3 == third.result(timeout=10).job


def test_max_pending_zero_means_no_limit() -> None:
    processor = RecordingProcessor[int]()
    processor.hold()
    with Batcher(processor, max_pending=0) as batcher:
        futures = [batcher.submit(number, timeout=0) for number in range(20_000)]
        processor.release()
    assert 20_000 == sum(future.done() for future in futures)


# -- keys and weights --


def test_jobs_with_different_keys_never_share_a_batch() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Size(2), key=str.lower) as batcher:
        futures = [batcher.submit(job) for job in "aBAbc"]
    assert [["B", "b"], ["a", "A"], ["c"]] == sorted(processor.batches, key=lambda batch: (-len(batch), batch))
    assert ["a", "b", "a", "b", "c"] == [future.result().batch.key for future in futures]
    assert "shutdown" == futures[4].result().batch.trigger


def test_weights_count_towards_the_limit_of_the_policy() -> None:
    processor = RecordingProcessor[int]()
    with Batcher(processor, Weighing(), weigh=float) as batcher:
        futures = [batcher.submit(weight) for weight in (6, 4, 9, 3, 7)]
    assert [[6, 4], [9], [3, 7]] == processor.batches
    assert [10.0, 10.0, 9.0, 10.0, 10.0] == [future.result().batch.weight for future in futures]


@pytest.mark.parametrize("key", [None, str.lower], ids=["without keys", "with keys"])
def test_without_weigh_each_job_weighs_one(key: Any) -> None:
    with Batcher[str, str](list, Size(2), key=key) as batcher:
        futures = [batcher.submit("job") for _ in range(2)]
    assert [(1.0, 2.0)] * 2 == [(future.weight, future.result().batch.weight) for future in futures]


def test_a_job_is_weighed_once_in_the_thread_that_submits_it() -> None:
    weighed: list[Any] = []

    def weigh(job: Any) -> float:
        weighed.append((job, threading.current_thread()))
        return 1

    with Batcher(echo, weigh=weigh) as batcher:
        batcher.submit("a").result()
    assert [("a", threading.current_thread())] == weighed


def test_a_job_heavier_than_the_limit_is_refused() -> None:
    with Batcher(echo, Weighing(), weigh=float) as batcher:
        with pytest.raises(JobTooLarge, match="a job of weight 10.5 does not fit into any batch") as caught:
            batcher.submit(10.5)
        assert 10.5 == caught.value.weight
        assert 0 == batcher.stats().accepted


def test_submit_raises_an_exception_from_key_or_weigh_and_does_not_accept_the_job() -> None:
    def refuse(job: Any) -> Any:
        raise LookupError(job)

    for batcher in (Batcher(echo, key=refuse), Batcher(echo, weigh=refuse)):
        with batcher:
            with pytest.raises(LookupError):
                batcher.submit(1)
            assert 0 == batcher.stats().accepted


def test_an_unhashable_key_is_refused() -> None:
    def listed(job: Any) -> Hashable:
        return [job]  # type: ignore[return-value]

    with Batcher(echo, key=listed) as batcher:
        with pytest.raises(TypeError, match="the key of a job must be hashable: unhashable type: 'list'"):
            batcher.submit(1)


@pytest.mark.parametrize("name", ["key", "weigh"])
def test_stop_iteration_from_key_or_weigh_does_not_end_an_iteration_of_the_caller(name: str) -> None:
    def raise_stop_iteration(job: Any) -> Any:
        return next(iter(()))

    options: dict[str, Any] = {name: raise_stop_iteration}
    with Batcher[Any, Any](echo, **options) as batcher:
        with pytest.raises(RuntimeError, match="key or weigh raised StopIteration"):
            list(map(batcher.submit, [1, 2]))


# -- policies in the batcher --


def test_a_policy_that_raises_fails_the_jobs_of_its_batch_and_the_next_batch_runs() -> None:
    class RaisingForBad(BatchingPolicy[str]):
        def due(self, window: Window[str]) -> float:
            if "bad" in window.jobs:
                raise SystemExit("bad")
            return NOW

    with Batcher(echo, RaisingForBad()) as batcher:
        assert isinstance(batcher.submit("bad").exception(timeout=10), SystemExit)
        assert "good" == batcher.submit("good").result(timeout=10).value
    assert (1, 1, 1) == (batcher.stats().failed, batcher.stats().succeeded, batcher.stats().batches)


def test_an_unhashable_reason_does_no_harm() -> None:
    class UnhashableStr(str):
        __hash__ = None  # type: ignore[assignment]

        def __str__(self) -> str:
            return self

    class UnhashableReason(Size):
        def reason(self, window: Window[Any]) -> str:
            return UnhashableStr("unhashable")

    with Batcher(echo, UnhashableReason(1)) as batcher:
        assert ["unhashable", "unhashable"] == [
            batcher.submit("job").result(timeout=10).batch.trigger for _ in range(2)
        ]


def test_a_job_that_fits_into_no_batch_fails_even_without_weigh() -> None:
    class FittingNothing(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return NOW

        def fits(self, window: Window[Any], weight: float) -> bool:
            return False

    with Batcher(echo, FittingNothing()) as batcher:
        assert isinstance(batcher.submit(1).exception(timeout=10), JobTooLarge)


def test_a_job_whose_repr_raises_does_no_harm() -> None:
    class Unprintable:
        def __repr__(self) -> str:
            return repr(self)

    def fail(future: Any) -> None:
        raise ValueError(Unprintable())

    with Batcher(echo, Size(1)) as batcher:
        for _ in range(2):
            future = batcher.submit(Unprintable(), expires_in=0)
            future.add_done_callback(fail)
            assert "JobExpired" == type(future.exception(timeout=10)).__name__
        batcher.add_shutdown_callback(lambda: fail(None))


def test_an_executor_that_runs_a_callback_twice_frees_only_one_worker() -> None:
    class CallingBackTwice(InlineExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            done = super().submit(fn, *args, **kwargs)

            class DoubledFuture(Future[Any]):
                def add_done_callback(self, callback: Any) -> None:
                    callback(done)
                    callback(done)
                    raise OSError

            return DoubledFuture()

    with Batcher(echo, Size(1), executor=CallingBackTwice()) as batcher:
        assert [0, 1, 2] == [batcher.submit(number).result(timeout=10).value for number in range(3)]
        batcher.flush()
    assert 0 == batcher._engine._dispatcher._collector.in_flight


def test_a_policy_observes_each_batch_and_its_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    reports: list[BatchReport] = []

    class Learning(Size):
        def observe(self, report: BatchReport) -> None:
            reports.append(report)
            raise OSError("can't learn")

    with Batcher[int, Any](lambda jobs: [KeyError(), 2], Learning(2)) as batcher:
        batcher.submit(1)
        batcher.submit(2)
    (report,) = reports
    assert (2, "learning", 1) == (report.batch.size, report.batch.trigger, report.failed)
    assert report.service_time >= 0
    assert "can't learn" in caplog.text


# -- statistics --


def test_stats_count_every_job_in_exactly_one_state() -> None:
    processor = RecordingProcessor[str](lambda job: KeyError(job) if job == "bad" else job)
    processor.hold()
    with Batcher(processor, Size(2)) as batcher:
        assert BatcherStats() == batcher.stats()
        first = [batcher.submit("good"), batcher.submit("bad")]
        processor.wait_for_batches(1)
        unwanted = batcher.submit("unwanted")
        unwanted.cancel()
        stats = batcher.stats()
        assert (3, 2, 1, 0) == (stats.accepted, stats.running, stats.cancelled, stats.queued + stats.batched)
        processor.release()
        for future in first:
            future.exception(timeout=10)
        stats = batcher.stats()
    assert (3, 0, 1, 1, 1) == (stats.accepted, stats.running, stats.succeeded, stats.failed, stats.cancelled)
    assert (1, {"size": 1}) == (stats.batches, stats.triggers)


def test_a_job_in_an_open_batch_is_batched_and_stats_give_the_age_of_the_oldest_job(clock: ManualClock) -> None:
    with Batcher(echo, Interval(60), clock=clock) as batcher:
        future = batcher.submit("a")
        clock.wait_for_sleeper(60.0)
        clock.advance(7)
        batcher.submit("b")
        assert JobState.BATCHED is future.state
        assert 7.0 == batcher.stats().oldest
        future.cancel()
        assert 0.0 == batcher.stats().oldest
    assert 0.0 == batcher.stats().oldest


def test_the_states_in_stats_always_add_up_to_the_number_of_accepted_jobs() -> None:
    over = threading.Event()
    wrong: list[BatcherStats] = []

    def watch() -> None:
        while not over.is_set():
            stats = batcher.stats()
            states = [getattr(stats, state.value) for state in JobState]
            if sum(states) != stats.accepted or min(states) < 0:
                wrong.append(stats)

    with Batcher(echo, Size(5) | Interval(0), max_workers=2) as batcher:
        watcher = in_thread(watch)
        for number in range(3000):
            future = batcher.submit(number)
            if number % 3 == 0:
                future.cancel()
        over.set()
        watcher.result(timeout=10)
    assert [] == wrong


# -- executors --


def test_a_supplied_executor_runs_the_batches_and_is_not_shut_down() -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:
        processor = RecordingProcessor[int](lambda job: threading.current_thread().name)
        with Batcher(processor, executor=executor) as batcher:
            assert "mine_0" == batcher.submit(1).result(timeout=10).value
        assert 3 == executor.submit(int, "3").result()


def test_an_executor_receives_only_the_processor_and_the_list_of_jobs() -> None:
    calls: list[Any] = []

    class RecordingExecutor(InlineExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            calls.append((fn, args, kwargs))
            return super().submit(fn, *args, **kwargs)

    processor = RecordingProcessor[int]()
    with Batcher(processor, Size(2), executor=RecordingExecutor()) as batcher:
        batcher.submit(1)
        batcher.submit(2)
    assert [(processor, ([1, 2],), {})] == calls


def test_an_executor_never_has_more_than_max_workers_batches() -> None:
    processor = RecordingProcessor[int]()
    processor.hold()
    with ThreadPoolExecutor(8) as executor:
        with Batcher(processor, Size(1), executor=executor, max_workers=2) as batcher:
            futures = [batcher.submit(number) for number in range(5)]
            processor.wait_for_batches(2)
            assert [False, False, True, True, True] == [future.cancel() for future in futures]
            processor.release()


def test_an_executor_that_refuses_a_batch_fails_its_jobs() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with Batcher(echo, executor=executor) as batcher:
        assert isinstance(batcher.submit(1).exception(timeout=10), RuntimeError)
        assert isinstance(batcher.submit(2).exception(timeout=10), RuntimeError)
    assert 2 == batcher.stats().failed


def test_a_batch_that_an_executor_cancels_fails_its_jobs() -> None:
    class Dropping(InlineExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            future: Future[Any] = Future()
            future.cancel()
            return future

    with Batcher(echo, executor=Dropping()) as batcher:
        error = batcher.submit(1).exception(timeout=10)
    assert "CancelledError" == type(error).__name__


def test_every_error_that_refuses_a_job_is_a_subclass_of_rejected() -> None:
    assert all(issubclass(error, Rejected) for error in (BacklogFull, BatcherClosed, JobTooLarge))


def test_the_repr_of_a_batcher_shows_its_name_and_its_policy() -> None:
    assert "<Batcher 'inserts' with Size(3) | Interval(1)>" == repr(
        Batcher(echo, Size(3) | Interval(1), name="inserts")
    )
