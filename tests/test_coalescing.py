"""`coalescing`: equal jobs that are in flight share one job."""

import asyncio
import gc
import logging
import os
import random
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import pytest

from microbatch import (
    AllWaiting,
    BacklogFull,
    Batcher,
    BatcherClosed,
    Coalescer,
    ForkedError,
    Interval,
    JobDropped,
    JobExpired,
    JobState,
    JobTooLarge,
    Size,
    Weight,
    coalescing,
)
from microbatch import aio
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from tests.conftest import FullBatcher
from tests.threads import FailingStart, in_thread

Processor = RecordingProcessor[Any]


# -- sharing --


def test_equal_jobs_that_wait_share_one_job(processor: Processor) -> None:
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit(job) for job in ["a", "b", "a", "a"]]
        processor.release()
        batcher.flush()
        assert ["a", "b", "a", "a"] == [future.result().value for future in futures]
    assert [["a", "b"]] == processor.batches
    assert 2 == batcher.stats().accepted


def test_a_job_that_runs_is_shared_too(processor: Processor) -> None:
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        first = shared.submit("a")
        processor.wait_for_batches(1)
        second = shared.submit("a")
        assert JobState.RUNNING is second.state
        processor.release()
        assert "a" == first.result(10).value == second.result(10).value
    assert [["a"]] == processor.batches


def test_a_duplicate_does_not_count_for_the_size_of_the_batch(processor: Processor) -> None:
    processor.release()
    with Batcher(processor, Size(2)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit(job) for job in ["a", "a", "a", "b"]]
        for future in futures:
            future.result(10)
    assert [["a", "b"]] == processor.batches


def test_a_job_that_is_done_is_not_shared(processor: Processor) -> None:
    processor.release()
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        assert "a" == shared.submit("a").result(10).value
        assert "a" == shared.submit("a").result(10).value
    assert [["a"], ["a"]] == processor.batches


@pytest.mark.parametrize("executor", [None, InlineExecutor()])
def test_after_a_flush_all_callers_are_done_and_an_equal_job_is_a_new_one(executor: Any) -> None:
    processor = Processor()
    with Batcher(processor, Size(100), executor=executor) as batcher:
        shared = coalescing(batcher)
        for number in range(1, 200):
            futures = [shared.submit("a"), shared.submit("a")]
            batcher.flush()
            assert all(future.done() for future in futures)
            assert number == len(processor.batches)


def test_a_key_function_says_which_jobs_are_equal(processor: Processor) -> None:
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher, key=lambda job: job["id"])
        one, other = shared.submit({"id": 1, "name": "one"}), shared.submit({"id": 1, "name": "other"})
        processor.release()
        batcher.flush()
        assert {"id": 1, "name": "one"} == one.result().value == other.result().value
        assert {"id": 1, "name": "other"} == other.job


def test_the_key_and_the_weight_of_the_batcher_are_those_of_the_job(processor: Processor) -> None:
    with Batcher(processor, Weight(100), key=lambda job: job[0], weigh=len) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("abc"), shared.submit("abc")]
        assert [("a", 3), ("a", 3)] == [(future.key, future.weight) for future in futures]
        processor.release()


def test_two_coalescers_of_a_batcher_share_nothing(processor: Processor) -> None:
    processor.release()
    with Batcher(processor, Size(2)) as batcher:
        futures = [coalescing(batcher).submit("a"), coalescing(batcher).submit("a")]
        for future in futures:
            future.result(10)
    assert [["a", "a"]] == processor.batches


def test_many_threads_that_begin_at_once_share_one_job(processor: Processor) -> None:
    start = threading.Barrier(16)
    with Batcher(processor, Size(1), max_workers=8) as batcher:
        shared = coalescing(batcher)

        def look_up() -> Any:
            start.wait()
            return shared.submit("a").result(10).value

        outcomes = [in_thread(look_up) for _ in range(15)]
        start.wait()
        processor.wait_for_batches(1)
        same = shared.submit("a")
        processor.release()
        same.result(10)
        assert ["a"] * 15 == [outcome.result(10) for outcome in outcomes]
    # A thread may have come when the job was done. Then it started another one.
    assert set(map(tuple, processor.batches)) == {("a",)}


def test_no_two_equal_jobs_are_ever_in_flight() -> None:
    running: Counter[str] = Counter()
    lock, faults = threading.Lock(), list[str]()

    def process(jobs: list[str]) -> list[str]:
        with lock:
            running.update(jobs)
            faults.extend(job for job in jobs if running[job] > 1)
        time.sleep(0)
        with lock:
            running.subtract(jobs)
        return jobs

    def call(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            job = chance.choice("abcde")
            future = shared.submit(job)
            if not (chance.random() < 0.2 and future.cancel()):
                assert job == future.result(10).value

    with Batcher(process, max_workers=4, max_pending=2) as batcher:
        shared = coalescing(batcher)
        outcomes = [in_thread(lambda seed=seed: call(seed)) for seed in range(16)]  # type: ignore[misc]
        assert [None] * 16 == [outcome.result(60) for outcome in outcomes]
    assert [] == faults
    assert {} == shared._in_flight


# -- outcomes --


def test_each_caller_gets_an_exception_of_its_own(processor: Processor) -> None:
    def refuse(jobs: list[str]) -> list[str]:
        raise ValueError("refused", ["a list"])

    with Batcher(refuse, Size(100)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("a"), shared.submit("a")]
        batcher.flush()
        one, other = [future.exception() for future in futures]
    assert one is not None and other is not None
    assert one is not other and repr(one) == repr(other) == "ValueError('refused', ['a list'])"
    assert one.args[1] is not other.args[1]
    assert one is futures[0].exception()


def test_a_single_caller_gets_the_exception_itself() -> None:
    error = ValueError("refused")
    with Batcher(lambda jobs: [error], Size(1)) as batcher:
        assert error is coalescing(batcher).submit("a").exception(10)


def test_callers_of_different_jobs_of_a_batch_do_not_share_its_exception() -> None:
    def refuse(jobs: list[str]) -> list[str]:
        raise ValueError("refused")

    with Batcher(refuse, Size(100)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit(job) for job in ["a", "b", "b"]]
        batcher.flush()
        assert 3 == len({id(future.exception()) for future in futures})


def test_a_stop_iteration_arrives_as_the_cause_of_a_runtime_error() -> None:
    with Batcher(lambda jobs: [StopIteration("end")], Size(1)) as batcher:
        shared = coalescing(batcher)
        for future in [shared.submit("a"), shared.submit("a")]:
            error = future.exception(10)
            assert type(error) is RuntimeError and type(error.__cause__) is StopIteration


@pytest.mark.parametrize("asks", [False, True])
def test_a_failure_is_logged_once_unless_a_caller_asks_for_it(asks: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "microbatch"):
        with Batcher(lambda jobs: [ValueError("refused")], Size(100)) as batcher:
            shared = coalescing(batcher)
            futures = [shared.submit("a"), shared.submit("a")]
            batcher.flush()
            assert [] == caplog.messages
            if asks:
                futures[1].exception()
            del futures
        gc.collect()
    expected = [] if asks else ["1 job of batch 1 of 'microbatch' failed"]
    assert expected == [each.partition(",")[0] for each in caplog.messages]


def test_callers_are_collected_without_a_garbage_collection(processor: Processor) -> None:
    processor.release()
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        future = shared.submit("a")
        future.result(10)
        batcher.flush()
        batcher.submit("after the callbacks of the first batch").result(10)
        gc.collect()
        gc.disable()
        try:
            reference = weakref.ref(future)
            del future
            assert reference() is None
        finally:
            gc.enable()


def test_callbacks_run_once_with_the_future_of_their_caller(processor: Processor) -> None:
    seen: list[Any] = []
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("a"), shared.submit("a")]
        for future in futures:
            future.add_done_callback(seen.append)
        processor.release()
    assert futures == seen
    futures[0].add_done_callback(seen.append)
    assert [*futures, futures[0]] == seen


def test_wait_and_as_completed_see_every_caller(processor: Processor) -> None:
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit(job) for job in "aabb"]
        outcome = in_thread(lambda: (wait(futures, timeout=10), set(as_completed(futures, timeout=10))))
        processor.release()
        (done, not_done), completed = outcome.result(10)
    assert set(futures) == done == completed and not not_done


def test_a_coroutine_can_await_a_caller(processor: Processor) -> None:
    processor.release()

    async def main() -> list[Any]:
        futures = [shared.submit("a"), shared.submit("a")]
        results = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return [result.value for result in results]

    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        assert ["a", "a"] == asyncio.run(main())


def test_a_wait_that_ends_says_why_the_job_still_waits(processor: Processor) -> None:
    with Batcher(processor, Size(7)) as batcher:
        shared = coalescing(batcher)
        future = shared.submit("a")
        with pytest.raises(FutureTimeoutError, match="the job is still (queued|batched; open batch: 1 job)"):
            future.result(timeout=0.001)
        processor.release()


def test_a_question_about_a_caller_that_has_cancelled_does_not_hide_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "microbatch"):
        with Batcher(lambda jobs: [ValueError("refused")], Size(100)) as batcher:
            shared = coalescing(batcher)
            futures = [shared.submit("a"), shared.submit("a")]
            futures[0].cancel()
            batcher.flush()
            futures[0].add_done_callback(print)
            wait(futures[:1], timeout=10)
            del futures
        gc.collect()
    assert 1 == len(caplog.messages)


def test_an_abandoned_coalescer_lets_its_batcher_drain() -> None:
    with pytest.warns(ResourceWarning):
        future = coalescing(Batcher(Processor(), Size(100))).submit("a")
        gc.collect()
        assert "a" == future.result(10).value


def test_a_job_is_freed_when_a_caller_deletes_it() -> None:
    class Job:
        pass

    with Batcher[Job, None](lambda jobs: None, Size(1)) as batcher:
        shared = coalescing(batcher, key=lambda job: 0)
        future = shared.submit(Job())
        future.result(10)
        reference = weakref.ref(future.job)
        batcher.submit(Job()).result(10)  # the batch that held it is over
        del future.job
        gc.collect()
        assert reference() is None
        with pytest.raises(AttributeError):
            future.job


def test_a_key_whose_comparison_changes_does_not_keep_later_jobs_from_being_shared() -> None:
    class Key:
        different = False

        def __init__(self, job: str) -> None:
            self.job = job

        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: Any) -> bool:
            return not Key.different and bool(self.job == other.job)

    processor = Processor()
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher, key=Key)
        futures = [shared.submit("a")]
        Key.different = True
        futures.append(shared.submit("a"))
        Key.different = False
        futures[1].cancel()
        batcher.flush()
        futures = [shared.submit("a"), shared.submit("a")]
        batcher.flush()
        assert ["a", "a"] == [future.result().value for future in futures]
    assert [["a"], ["a"]] == processor.batches


# -- cancelling --


def test_the_last_cancel_of_a_watched_caller_leaves_no_cycle(processor: Processor) -> None:
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("a")]
        watching = in_thread(lambda: len(wait(futures, timeout=10).done))
        while futures[0]._attachments is None:
            time.sleep(0)
        futures[0].cancel()
        watching.result(10)
        processor.release()
        batcher.submit("b")
        batcher.flush()
        del watching
        gc.collect()
        gc.disable()
        try:
            reference = weakref.ref(futures.pop())
            assert reference() is None
        finally:
            gc.enable()


def test_a_caller_that_cancels_does_not_disturb_the_others(processor: Processor) -> None:
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher)
        one, other = shared.submit("a"), shared.submit("a")
        assert one.cancel() and one.cancelled() and one.cancel()
        assert JobState.CANCELLED is one.state
        assert not other.cancelled()
        processor.release()
        batcher.flush()
        assert "a" == other.result().value
        with pytest.raises(CancelledError):
            one.result()


def test_the_job_is_cancelled_when_all_its_callers_have_cancelled(processor: Processor) -> None:
    processor.release()
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("a"), shared.submit("a"), shared.submit("a")]
        assert all(future.cancel() for future in futures)
        assert 1 == batcher.stats().cancelled
        again = shared.submit("a")
        batcher.flush()
        assert "a" == again.result().value
    assert [["a"]] == processor.batches


def test_a_job_that_runs_can_not_be_cancelled(processor: Processor) -> None:
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        one, other = shared.submit("a"), shared.submit("a")
        processor.wait_for_batches(1)
        assert not one.cancel() and not other.cancel()
        assert one.running()
        processor.release()
        assert "a" == one.result(10).value == other.result(10).value


def test_whoever_waits_for_a_caller_learns_that_it_has_cancelled(processor: Processor) -> None:
    seen: list[Any] = []
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher)
        one, other = shared.submit("a"), shared.submit("a")
        one.add_done_callback(seen.append)
        waiting = [in_thread(lambda: wait([one], timeout=10)), in_thread(lambda: one.exception(10))]
        one.cancel()
        assert {one} == waiting[0].result(10).done
        with pytest.raises(CancelledError):
            waiting[1].result(10)
        assert [one] == seen and not other.done()
        processor.release()


def test_a_shutdown_that_cancels_jobs_cancels_all_their_callers(processor: Processor) -> None:
    seen: list[Any] = []
    batcher = Batcher[Any, Any](processor, Size(100))
    shared = coalescing(batcher)
    futures = [shared.submit("a"), shared.submit("a")]
    for future in futures:
        future.add_done_callback(seen.append)
    outcome = in_thread(lambda: wait(futures, timeout=10))
    batcher.shutdown(cancel_futures=True)
    assert set(futures) == outcome.result(10).done
    assert all(future.cancelled() for future in futures) and futures == seen
    assert [] == processor.batches


def test_callers_that_join_while_others_cancel_get_their_results() -> None:
    processor = Processor()

    def call(seed: int) -> int:
        chance, cancelled = random.Random(seed), 0
        for _ in range(400):
            future = shared.submit("a")
            if chance.random() < 0.7:
                cancelled += future.cancel()
            else:
                assert "a" == future.result(10).value
        return cancelled

    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        outcomes = [in_thread(lambda seed=seed: call(seed)) for seed in range(8)]  # type: ignore[misc]
        assert 0 < sum(outcome.result(60) for outcome in outcomes)
    stats = batcher.stats()
    assert stats.cancelled + stats.succeeded == stats.accepted


# -- a full queue --


def test_joining_a_job_needs_no_space_in_the_queue(full: FullBatcher, processor: Processor) -> None:
    shared = coalescing(full.batcher)
    with pytest.raises(BacklogFull):
        shared.submit("a", timeout=0)
    full.waiting.cancel()
    full.blocked.result(10)
    shared = coalescing(full.batcher)
    full.blocked.result().cancel()
    first = shared.submit("a", timeout=5)
    second = shared.submit("a", timeout=0)
    processor.release()
    assert "a" == first.result(10).value == second.result(10).value


def test_a_caller_that_waits_for_space_joins_an_equal_job_that_got_it(full: FullBatcher, processor: Processor) -> None:
    shared, clock = coalescing(full.batcher), full.batcher._clock
    outcomes = [in_thread(lambda: shared.submit("a", timeout=50)) for _ in range(3)]
    while len(full.batcher._engine.queue.not_full) < 4:
        time.sleep(0)
    processor.release()
    assert ["a"] * 3 == [outcome.result(10).result(10).value for outcome in outcomes]
    assert full.batcher.stats().accepted in (4, 5, 6)  # a later caller may come when the job is done
    assert clock.now() == 0


def test_a_caller_that_waits_too_long_raises_and_leaves_no_job(full: FullBatcher, clock: ManualClock) -> None:
    shared = coalescing(full.batcher)
    outcome = in_thread(lambda: shared.submit("a", timeout=1))
    clock.wait_for_sleeper(1.0)
    clock.advance(1)
    with pytest.raises(BacklogFull):
        outcome.result(10)
    assert {} == shared._in_flight


def test_a_job_that_is_refused_raises_as_it_does_without_coalescing(processor: Processor) -> None:
    processor.release()
    with Batcher(processor, Weight(2), weigh=len) as batcher:
        shared = coalescing(batcher)
        with pytest.raises(JobTooLarge):
            shared.submit("abc")
        with pytest.raises(TypeError, match="hashable"):
            shared.submit(["a"])
        with pytest.raises(TypeError, match="timeout"):
            shared.submit("a", timeout="1")  # type: ignore[arg-type]
    with pytest.raises(BatcherClosed):
        shared.submit("a")
    assert {} == shared._in_flight


def test_after_a_shutdown_even_a_job_in_flight_can_not_be_joined(processor: Processor) -> None:
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        shared.submit("a")
        processor.wait_for_batches(1)
        batcher.shutdown(wait=False)
        with pytest.raises(BatcherClosed):
            shared.submit("a")
        processor.release()


def test_a_start_that_fails_leaves_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = FailingStart("inserts", monkeypatch)
    failing.go_on.set()
    with Batcher(Processor(), Size(1), name="inserts") as batcher:
        shared = coalescing(batcher)
        with pytest.raises(RuntimeError):
            shared.submit("a").result(10)
        assert {} == shared._in_flight
        assert "a" == shared.submit("a").result(10).value


def test_a_dropped_job_fails_for_all_its_callers(processor: Processor) -> None:
    with Batcher(processor, Size(1), max_pending=1, drop_oldest=True) as batcher:
        shared = coalescing(batcher)
        shared.submit("running")
        processor.wait_for_batches(1)
        futures = [shared.submit("a"), shared.submit("a")]
        newest = shared.submit("b")
        errors = [future.exception(10) for future in futures]
        assert [JobDropped, JobDropped] == list(map(type, errors)) and errors[0] is not errors[1]
        processor.release()
        assert "b" == newest.result(10).value


# -- expiry --


def test_a_job_expires_at_the_latest_of_the_times_of_its_callers(processor: Processor, clock: ManualClock) -> None:
    with Batcher(processor, Interval(100), clock=clock) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("a", expires_in=3)]
        clock.wait_for_sleeper(3.0)
        futures += [shared.submit("a", expires_in=seconds) for seconds in (5, 1)]
        clock.advance(3)
        clock.wait_for_sleeper(5.0)
        assert not any(future.done() for future in futures)
        clock.advance(2)
        assert [JobExpired] * 3 == [type(future.exception(10)) for future in futures]
        assert "within 5" in str(futures[0].exception()) and 3 == futures[0].expires_in
        processor.release()
    assert [] == processor.batches


def test_a_job_does_not_expire_for_a_caller_that_sets_no_time(processor: Processor, clock: ManualClock) -> None:
    with Batcher(processor, Interval(100), clock=clock) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("a", expires_in=1)]
        processor.release()
        clock.wait_for_sleeper(1.0)
        futures.append(shared.submit("a"))
        clock.advance(1)
        clock.wait_for_sleeper(100.0)
        clock.advance(99)
        assert ["a", "a"] == [future.result(10).value for future in futures]


# -- what policies learn of the callers --


def test_a_policy_expects_the_callers_of_equal_jobs_to_return(processor: Processor, clock: ManualClock) -> None:
    processor.release()
    with Batcher(processor, Size(100) | AllWaiting(recent=50), clock=clock) as batcher:
        shared = coalescing(batcher)
        shared.submit("first").result(10)
        other = in_thread(lambda: shared.submit("other").result(10).value)
        clock.wait_for_sleeper(50.0)  # for this thread, which has a result and does not wait for another one
        assert "mine" == shared.submit("mine").result(10).value
        assert "other" == other.result(10)
    assert [["first"], ["other", "mine"]] == processor.batches


def test_a_policy_knows_the_callers_that_join_a_job(processor: Processor, clock: ManualClock) -> None:
    processor.release()
    submitted, goes_on = threading.Event(), threading.Event()

    def call() -> Any:
        future = shared.submit("job")
        submitted.set()
        goes_on.wait(10)
        return future.result(10).value

    with Batcher(processor, Size(100) | AllWaiting(recent=50), clock=clock) as batcher:
        shared = coalescing(batcher)
        first = in_thread(call)
        submitted.wait(10)
        clock.advance(1)
        mine = shared.submit("job")
        goes_on.set()
        clock.wait_for_sleeper(51.0)  # for this thread, which has joined the job and does not wait
        assert [] == processor.batches
        assert "job" == mine.result(10).value == first.result(10)
    assert [["job"]] == processor.batches


# -- coroutines --


def test_coroutines_share_jobs_with_threads(processor: Processor) -> None:
    async def main() -> list[Any]:
        tasks = [asyncio.create_task(aio.submit(shared, job)) for job in "aab"]
        await asyncio.sleep(0)
        futures = [shared.submit("a")]
        processor.release()
        return [(await task).value for task in tasks] + [future.result(10).value for future in futures]

    with Batcher(processor, Size(2)) as batcher:
        shared = coalescing(batcher)
        assert ["a", "a", "b", "a"] == asyncio.run(main())
    assert [["a", "b"]] == processor.batches


def test_a_coroutine_that_is_cancelled_does_not_disturb_the_other_callers(processor: Processor) -> None:
    async def main() -> Any:
        tasks = [asyncio.create_task(aio.submit(shared, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        processor.release()
        batcher.flush(wait=False)
        return [(await task).value for task in tasks[1:]]

    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher)
        assert ["a", "a"] == asyncio.run(main())
        assert 0 == batcher.stats().cancelled


def test_coroutines_that_wait_for_space_share_a_job_when_there_is_some(processor: Processor) -> None:
    async def main() -> list[Any]:
        tasks = [asyncio.create_task(aio.submit(shared, "a")) for _ in range(5)]
        tasks += [asyncio.create_task(aio.submit(shared, "waiting"))]  # needs no space
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        processor.release()
        return [(await task).value for task in tasks]

    with Batcher(processor, Size(1), max_pending=1) as batcher:
        shared = coalescing(batcher)
        shared.submit("running")
        processor.wait_for_batches(1)
        shared.submit("waiting")
        assert ["a"] * 5 + ["waiting"] == asyncio.run(main())
        batcher.submit("there is space", timeout=0).result(10)
    assert {} == shared._in_flight
    assert ["waiting"] == processor.batches[1]


def test_amap_shares_jobs() -> None:
    async def main() -> list[Any]:
        return [result.value async for result in aio.amap(shared, "aabab")]

    processor = Processor()
    with Batcher(processor, Size(100)) as batcher:
        shared = coalescing(batcher)
        assert [*"aabab"] == asyncio.run(main())
    assert [["a", "b"]] == processor.batches


# -- a job that is not accepted yet --


class HookedClock(ManualClock):
    """A clock that calls a function when the thread that set it reads the clock for the *place*-th time."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks: dict[int, tuple[int, Callable[[], Any]]] = {}

    def hook(self, place: int, function: Callable[[], Any]) -> None:
        self._hooks[threading.get_ident()] = place, function

    def now(self) -> float:
        place, function = self._hooks.pop(threading.get_ident(), (0, int))
        if place > 1:
            self.hook(place - 1, function)
        elif place == 1:
            function()
        return super().now()


ACCEPTANCE = 2
"""How often `submit` reads the clock before the job is accepted. Other callers can find the job then."""


def test_the_hook_of_these_tests_is_called_when_a_job_is_in_flight_and_not_accepted() -> None:
    clock, seen = HookedClock(), list[bool]()
    with Batcher(Processor(), Size(1), clock=clock) as batcher:
        shared = coalescing(batcher)
        clock.hook(ACCEPTANCE, lambda: seen.append(bool(shared._in_flight) and batcher.stats().accepted == 0))
        shared.submit("a").result(10)
    assert [True] == seen


def test_a_signal_handler_that_interrupts_a_submission_may_wait_for_an_equal_job() -> None:
    clock, inner = HookedClock(), list[Any]()
    with Batcher(Processor(), Size(1), clock=clock) as batcher:
        shared = coalescing(batcher)
        clock.hook(ACCEPTANCE, lambda: inner.append(shared.submit("a").result(10).value))
        assert "a" == shared.submit("a").result(10).value
    assert ["a"] == inner


@pytest.mark.parametrize("end", ["flush", "shutdown"])
def test_a_caller_that_comes_while_an_equal_job_is_being_submitted_gets_its_result(end: str) -> None:
    clock, others = HookedClock(), list[Any]()

    def come() -> None:
        future = in_thread(lambda: shared.submit("a")).result(10)
        others.append(future)
        batcher.flush(wait=False) if end == "flush" else batcher.shutdown(wait=False)
        assert "a" == future.result(10).value

    with Batcher(Processor(), Size(100), clock=clock) as batcher:
        shared = coalescing(batcher)
        clock.hook(ACCEPTANCE, come)
        if end == "flush":
            first = shared.submit("a")
            batcher.flush()
            assert "a" == first.result(10).value
        else:
            with pytest.raises(BatcherClosed):
                shared.submit("a")
    assert 1 == len(others) and {} == shared._in_flight


# -- interruptions --


class Interrupted(BaseException):
    """What the signal handlers of these tests raise."""


def test_a_caller_that_a_signal_interrupts_in_the_wait_for_space_leaves_no_job(processor: Processor) -> None:
    handled = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        if not handled.is_set():
            handled.set()
            raise Interrupted

    def send() -> None:
        while not queue.not_full:
            time.sleep(0)
        while not handled.is_set():  # a signal that comes just before the wait does not end it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            time.sleep(0.001)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Batcher(processor, Size(1), max_pending=1) as batcher:
            queue = batcher._engine.queue
            batcher.submit("running")
            processor.wait_for_batches(1)
            batcher.submit("waiting")
            shared = coalescing(batcher)
            sender = in_thread(send)
            try:
                with pytest.raises(Interrupted):
                    shared.submit("a")
                sender.result(10)
                assert {} == shared._in_flight and not queue.not_full
            finally:
                processor.release()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [["running"], ["waiting"]] == processor.batches


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_fails_what_is_in_flight_in_its_parent_and_starts_jobs_of_its_own(processor: Processor) -> None:
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher)
        futures = [shared.submit("a"), shared.submit("a")]
        processor.wait_for_batches(1)
        child = os.fork()
        if child == 0:
            try:
                errors = [future.exception(10) for future in futures]
                assert [ForkedError, ForkedError] == list(map(type, errors))
                processor.release()
                assert "a" == shared.submit("a").result(10).value
                batcher.shutdown()
                os._exit(0)
            finally:
                os._exit(1)
        assert 0 == os.waitpid(child, 0)[1]
        processor.release()
        assert ["a", "a"] == [future.result(10).value for future in futures]


# -- arguments --


def test_what_is_no_batcher_is_refused() -> None:
    with pytest.raises(TypeError, match="batcher must be a Batcher, got 5"):
        coalescing(5)  # type: ignore[arg-type]
    with Batcher(Processor(), Size(1)) as batcher:
        with pytest.raises(TypeError, match="key must be callable"):
            coalescing(batcher, key="id")  # type: ignore[arg-type]
        assert isinstance(coalescing(batcher), Coalescer)
        assert repr(coalescing(batcher)).startswith("coalescing(<Batcher 'microbatch'")


def test_a_key_function_that_raises_stop_iteration_does_not_end_a_generator(processor: Processor) -> None:
    processor.release()
    with Batcher(processor, Size(1)) as batcher:
        shared = coalescing(batcher, key=lambda job: next(iter([])))
        with pytest.raises(RuntimeError, match="key raised StopIteration"):
            shared.submit("a")


def test_keys_of_a_users_class_whose_comparison_raises_are_all_different(processor: Processor) -> None:
    class Key:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            raise ValueError("can't compare")

    processor.release()
    with Batcher(processor, Size(2)) as batcher:
        shared = coalescing(batcher, key=lambda job: Key())
        futures = [shared.submit("a"), shared.submit("a")]
        assert ["a", "a"] == [future.result(10).value for future in futures]
    assert {} == shared._in_flight
