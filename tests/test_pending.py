"""The limits on waiting jobs by weight and by key, and what is dropped when a limit is exceeded."""

import gc
import itertools
import logging
import os
import random
import signal
import threading
import tracemalloc
import weakref
from concurrent.futures import Future
from typing import Any

import pytest

from microbatch import (
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatchingPolicy,
    BatchListener,
    Interval,
    JobDropped,
    JobFuture,
    JobsDropped,
    JobState,
    JobTooLarge,
    Natural,
    PerKey,
    Size,
)
from microbatch.testing import ManualClock, RecordingProcessor
from tests.threads import FailingStart, in_thread


def tenant(job: str) -> str:
    return job[0]


def blocked(
    processor: RecordingProcessor[Any], policy: BatchingPolicy[Any] = Size(1), first: Any = "running", **options: Any
) -> Batcher[Any, Any]:
    """Return a batcher with one worker, which runs the job *first* until the processor is released."""
    batcher: Batcher[Any, Any] = Batcher(processor, policy, **options)
    batcher.submit(first)
    batcher.flush(wait=False)
    processor.wait_for_batches(1)
    return batcher


def accepted(batcher: Batcher[Any, Any], jobs: Any, **options: Any) -> list[JobFuture[Any]]:
    futures = []
    for job in jobs:
        try:
            futures.append(batcher.submit(job, timeout=0, **options))
        except BacklogFull:
            pass
    return futures


def test_a_refused_job_and_the_counts_do_not_cost_more_if_many_jobs_wait(processor: RecordingProcessor[Any]) -> None:
    waiting = 10_000
    with blocked(processor, max_pending=waiting) as batcher:
        assert len(accepted(batcher, range(waiting))) == waiting
        assert [] == accepted(batcher, ["one too many"])  # the first one has to look at all jobs
        batcher.stats()  # the first call compiles something
        tracemalloc.start()
        try:
            assert [] == accepted(batcher, ["one too many"])
            assert batcher.stats().accepted == 1 + waiting
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        processor.release()
    assert peak < 4 * waiting  # bytes: a list of all jobs would take twice as many


# -- a limit for each key --


def test_a_key_that_floods_the_queue_leaves_space_for_the_others(processor: RecordingProcessor[Any]) -> None:
    with blocked(processor, key=tenant, max_pending=200, max_pending_per_key=100) as batcher:
        assert 100 == len(accepted(batcher, [f"flood {n}" for n in range(1_000)]))
        assert 50 == len(accepted(batcher, [f"urgent {n}" for n in range(50)]))
        processor.release()


def test_the_exception_says_which_limit_is_reached_and_for_which_key(processor: RecordingProcessor[Any]) -> None:
    with blocked(processor, key=tenant, max_pending_per_key=1) as batcher:
        batcher.submit("a1")
        with pytest.raises(BacklogFull) as info:
            batcher.submit("a2", timeout=0)
        processor.release()
    assert "the queue is full for key 'a': max_pending_per_key is 1" == str(info.value)
    assert ("max_pending_per_key", 1, "a") == (info.value.bound, info.value.limit, info.value.key)


def test_a_caller_waits_until_a_job_of_its_key_is_dispatched(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    with blocked(processor, key=tenant, max_pending_per_key=1, clock=clock) as batcher:
        batcher.submit("a1")
        waiting = in_thread(lambda: batcher.submit("a2", timeout=5))
        clock.wait_for_sleeper(5)
        assert "b1" == batcher.submit("b1", timeout=0).job
        assert not waiting.done()
        processor.release()
        assert "a2" == waiting.result(10).result(10).value


@pytest.mark.parametrize("leaves", ["cancelled", "expired"])
def test_a_job_that_stops_waiting_makes_space_for_another_one_of_its_key(
    leaves: str, processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    with blocked(processor, key=tenant, max_pending_per_key=1, clock=clock) as batcher:
        first = batcher.submit("a1", expires_in=3)
        waiting = in_thread(lambda: batcher.submit("a2", timeout=5))
        clock.wait_for_sleeper(5)
        if leaves == "cancelled":
            assert first.cancel()
        else:
            clock.wait_for_sleeper(3)
            clock.advance(3)
        assert waiting.result(10).state in (JobState.QUEUED, JobState.BATCHED)
        processor.release()


def test_a_caller_whose_timeout_runs_out_lets_the_next_one_in_the_line_enter(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    with blocked(processor, weigh=len, first="x", max_pending_weight=4, clock=clock) as batcher:
        batcher.submit("aaa")
        heavy = in_thread(lambda: batcher.submit("bbbb", timeout=5))
        clock.wait_for_sleeper(5)
        light = in_thread(lambda: batcher.submit("c", timeout=7))
        clock.wait_for_sleeper(7)
        assert not light.done()  # it may not overtake
        clock.advance(5)
        assert isinstance(heavy.exception(10), BacklogFull)
        assert "c" == light.result(10).job
        processor.release()


def test_a_caller_that_waits_for_space_makes_the_batch_of_its_key_due_and_no_other(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    processor.release()
    with Batcher(processor, Interval(100), key=tenant, max_pending_per_key=2, clock=clock) as batcher:
        other, *futures = [batcher.submit(job) for job in ("b1", "a1", "a2", "a3")]
        assert ["a1", "a2"] == [future.result(10).value for future in futures[:2]]
        assert [False, False] == [other.done(), futures[2].done()]


def test_a_policy_that_waits_for_more_jobs_than_the_limit_of_a_key_allows_is_refused(
    processor: RecordingProcessor[Any],
) -> None:
    with pytest.raises(ValueError, match="at most max_pending_per_key=8 jobs"):
        Batcher(processor, Size(9), key=tenant, max_pending_per_key=8)


def test_a_shutdown_wakes_the_callers_that_wait_for_space_of_a_key(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    batcher = blocked(processor, key=tenant, max_pending_per_key=1, clock=clock)
    batcher.submit("a1")
    waiting = in_thread(lambda: batcher.submit("a2", timeout=5))
    clock.wait_for_sleeper(5)
    batcher.shutdown(wait=False)
    assert isinstance(waiting.exception(10), BatcherClosed)
    processor.release()
    batcher.shutdown()


def test_a_processor_that_submits_to_a_full_key_is_refused_at_once() -> None:
    refused: list[BacklogFull] = []

    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["a"]:
            batcher.submit("b1")
            with pytest.raises(BacklogFull) as info:
                batcher.submit("b2")
            refused.append(info.value)
        return jobs

    with Batcher[str, str](processor, Size(1), key=tenant, max_pending_per_key=1) as batcher:
        batcher.submit("a").result(10)
    assert ["b"] == [error.key for error in refused]


def test_keys_need_not_be_of_built_in_types(processor: RecordingProcessor[Any]) -> None:
    class Tenant:
        def __eq__(self, other: object) -> bool:
            return type(other) is Tenant

        def __hash__(self) -> int:
            return 7

    with blocked(processor, key=lambda job: Tenant(), max_pending_per_key=2) as batcher:
        assert 2 == len(accepted(batcher, range(5)))
        processor.release()


def test_the_jobs_of_keys_that_come_once_are_not_kept() -> None:
    class Job:
        pass

    jobs = [Job() for _ in range(500)]
    references = [weakref.ref(job) for job in jobs]
    numbers = itertools.count()
    with Batcher[Any, None](lambda jobs: None, key=lambda job: next(numbers), max_pending_per_key=1) as batcher:
        for job in jobs:
            batcher.submit(job).result()
        del job, jobs
        gc.collect()
        assert 2 > sum(reference() is not None for reference in references)


# -- a limit on the weight --


def test_the_weight_of_the_waiting_jobs_stays_within_its_limit(processor: RecordingProcessor[Any]) -> None:
    chance = random.Random(1)
    jobs = [b"." * chance.randint(20, 900) for _ in range(500)]
    with blocked(processor, Size(5) | Natural(), b"first", weigh=len, max_pending_weight=10_000) as batcher:
        for _ in range(3):
            futures = accepted(batcher, jobs)
            assert 9_100 < sum(future.weight for future in futures) <= 10_000
            processor.release()
            batcher.flush()
            processor.hold()
            running = batcher.submit(b"first")
            while not running.running():
                pass
        processor.release()


def test_a_job_heavier_than_the_limit_is_refused_at_once(processor: RecordingProcessor[Any]) -> None:
    processor.release()
    with Batcher(processor, weigh=len, max_pending_weight=3) as batcher:
        with pytest.raises(JobTooLarge) as info:
            batcher.submit("four")
        assert "a job of weight 4 does not fit into the queue: the limit is 3" == str(info.value)
        assert "one" == batcher.submit("one").result(10).value


def test_a_limit_without_the_function_that_it_needs_is_refused(processor: RecordingProcessor[Any]) -> None:
    with pytest.raises(ValueError, match="max_pending_weight needs a weigh function"):
        Batcher(processor, max_pending_weight=5)
    with pytest.raises(ValueError, match="max_pending_per_key needs a key function"):
        Batcher(processor, max_pending_per_key=5)


def test_the_limits_hold_while_many_threads_submit_cancel_and_wait() -> None:
    """After all of it, the queue has as much space as before."""
    go_on, most = threading.Event(), 50

    def processor(jobs: list[int]) -> list[int]:
        go_on.wait(10)
        return jobs

    with Batcher[int, int](
        processor,
        Size(7) | Natural(),
        key=lambda job: job % 5,
        weigh=lambda job: job % 9 + 1,
        max_pending=20,
        max_pending_weight=most,
        max_pending_per_key=6,
        max_workers=2,
    ) as batcher:

        def submit(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(300):
                try:
                    future = batcher.submit(chance.randrange(1_000), timeout=chance.choice([0, 0.001, None]))
                except BacklogFull:
                    continue
                if chance.random() < 0.2:
                    future.cancel()

        go_on.set()
        for task in [in_thread(lambda seed=seed: submit(seed)) for seed in range(8)]:  # type: ignore[misc]
            task.result(30)
        batcher.flush()
        go_on.clear()
        futures = accepted(batcher, range(1_000))
        go_on.set()
        weights = [future.weight for future in futures if future.state in (JobState.QUEUED, JobState.BATCHED)]
        assert sum(weights) <= most
        batcher.flush()
        assert {JobState.SUCCEEDED} == {future.state for future in futures}


def test_a_job_without_weight_enters_a_queue_that_is_full_to_the_limit(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    with blocked(processor, Size(9), "x", weigh=len, max_pending_weight=4, clock=clock) as batcher:
        batcher.submit("aaaa")
        first = in_thread(lambda: batcher.submit("bbbb", timeout=5))
        clock.wait_for_sleeper(5)
        second = in_thread(lambda: batcher.submit("", timeout=6))
        clock.wait_for_sleeper(6)
        processor.release()
        assert ["bbbb", ""] == [outcome.result(10).job for outcome in (first, second)]


def test_a_heavy_job_behind_a_light_one_makes_a_batch_due_when_the_light_one_has_entered(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    processor.release()
    with Batcher(processor, Size(9), key=tenant, weigh=lambda job: int(job[1]), max_pending_weight=5, clock=clock) as b:
        futures = [b.submit(job) for job in ("a4", "b1")]
        light = in_thread(lambda: b.submit("c3", timeout=5))
        heavy = in_thread(lambda: b.submit("d5", timeout=6))
        outcomes = [outcome.result(10) for outcome in (light, heavy)]
        b.flush()
        assert ["a4", "b1", "c3", "d5"] == [future.result(10).value for future in futures + outcomes]


def test_a_job_that_is_too_heavy_is_refused_at_once_even_if_its_key_is_full(processor: RecordingProcessor[Any]) -> None:
    options: dict[str, Any] = {"key": tenant, "weigh": len, "max_pending_per_key": 1, "max_pending_weight": 3}
    with blocked(processor, first="x", **options) as batcher:
        batcher.submit("a")
        with pytest.raises(JobTooLarge):
            batcher.submit("abcd")
        processor.release()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals")
@pytest.mark.parametrize(
    "limits",
    [
        {"max_pending": 1},
        {"max_pending_per_key": 1, "key": type},
        {"max_pending_weight": 1, "weigh": len},
    ],
    ids=lambda limits: str(next(iter(limits))),
)
def test_a_signal_handler_that_submits_while_its_thread_waits_for_space_enters_too(
    limits: dict[str, Any], processor: RecordingProcessor[Any]
) -> None:
    futures: list[JobFuture[Any]] = []

    def handler(*arguments: object) -> None:
        threading.Timer(0.05, processor.release).start()
        futures.append(batcher.submit("b", timeout=10))

    with blocked(processor, first="x", **limits) as batcher:
        batcher.submit("a")
        before = signal.signal(signal.SIGUSR1, handler)
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        try:
            futures.append(batcher.submit("c", timeout=10))
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert ["b", "c"] == [future.result(10).value for future in futures]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals")
def test_a_signal_handler_does_not_wait_for_space_that_its_own_thread_holds(
    processor: RecordingProcessor[Any],
) -> None:
    errors: list[BaseException] = []

    def handler(*arguments: object) -> None:
        threading.Timer(0.05, processor.release).start()
        with pytest.raises(BacklogFull) as info:
            batcher.submit("heavy2")
        errors.append(info.value)

    with blocked(processor, first="x", weigh=len, max_pending=1, max_pending_weight=10) as batcher:
        batcher.submit("a")
        before = signal.signal(signal.SIGUSR1, handler)
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        try:
            future = batcher.submit("heavy1", timeout=10)  # there is space for its weight, but not for one more job
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert "heavy1" == future.result(10).value
    assert ["the queue is full: max_pending_weight is 10"] == [str(error) for error in errors]


# -- what is dropped --


class Dropped(BatchListener):
    """Records the jobs that were dropped."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def jobs_dropped(self, event: JobsDropped) -> None:
        self.jobs += [future.job for future in event.futures]


@pytest.fixture
def dropped() -> Dropped:
    return Dropped()


def test_the_oldest_waiting_jobs_are_dropped_and_the_newest_survive(
    processor: RecordingProcessor[Any], dropped: Dropped, caplog: pytest.LogCaptureFixture
) -> None:
    with blocked(processor, max_pending=3, drop_oldest=True, listeners=[dropped]) as batcher:
        futures = [batcher.submit(number) for number in range(10)]
        assert [JobState.DROPPED] * 7 == [future.state for future in futures[:7]]
        with pytest.raises(JobDropped, match="the job was dropped to make room for newer ones: max_pending is 3"):
            futures[0].result(10)
        stats = batcher.stats()
        assert (7, 3, 11) == (stats.dropped, stats.queued + stats.batched, stats.accepted)
        processor.release()
    assert [7, 8, 9] == [job for batch in processor.batches[1:] for job in batch]
    assert list(range(7)) == dropped.jobs
    del futures
    gc.collect()
    assert [] == [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_dropped_job_wakes_its_waiters_and_runs_its_callbacks(processor: RecordingProcessor[Any]) -> None:
    called: Future[Any] = Future()
    with blocked(processor, max_pending=1, drop_oldest=True) as batcher:
        future = batcher.submit("old")
        future.add_done_callback(called.set_result)
        waiting = in_thread(lambda: future.exception(10))
        batcher.submit("new")
        assert isinstance(waiting.result(10), JobDropped)
        assert future is called.result(10)
        assert not future.cancel() and not future.cancelled() and future.done()
        processor.release()


def test_a_key_with_too_many_jobs_loses_its_own_oldest_ones(
    processor: RecordingProcessor[Any], dropped: Dropped
) -> None:
    options: dict[str, Any] = {"max_pending_per_key": 2, "drop_oldest": True, "listeners": [dropped]}
    with blocked(processor, key=tenant, **options) as batcher:
        for job in ("a1", "b1", "b2", "b3", "b4"):
            batcher.submit(job)
        processor.release()
    assert ["b1", "b2"] == dropped.jobs


def test_as_many_jobs_are_dropped_as_a_heavy_one_needs(processor: RecordingProcessor[Any], dropped: Dropped) -> None:
    options: dict[str, Any] = {"max_pending_weight": 5, "drop_oldest": True, "listeners": [dropped]}
    with blocked(processor, first="x", weigh=len, **options) as batcher:
        for job in ("a", "bb", "cc", "dddd"):
            batcher.submit(job)
        processor.release()
    assert ["a", "bb", "cc"] == dropped.jobs


def test_submitting_never_blocks_even_in_the_processor() -> None:
    futures: list[JobFuture[int]] = []

    def processor(jobs: list[int]) -> list[int]:
        if jobs == [0]:
            futures.extend(batcher.submit(number) for number in range(1, 100))
        return jobs

    with Batcher[int, int](processor, Size(1), max_pending=2, drop_oldest=True) as batcher:
        batcher.submit(0).result(10)
    assert [JobState.DROPPED] * 97 + [JobState.SUCCEEDED] * 2 == [future.state for future in futures]


def test_a_job_that_was_dropped_leaves_its_batch(processor: RecordingProcessor[Any]) -> None:
    policy = Size(3) | Interval(9)
    with blocked(processor, policy, first="x", max_pending=3, drop_oldest=True, key=tenant) as batcher:
        futures = [batcher.submit(job) for job in ("a1", "b1", "a2", "b2")]
        assert isinstance(futures[0].exception(10), JobDropped)
        assert (1, 3) == (batcher.stats().dropped, batcher.stats().queued + batcher.stats().batched)
        processor.release()
    assert [["a2"], ["b1", "b2"]] == sorted(processor.batches[1:])


def test_a_batch_is_dispatched_early_before_its_jobs_would_be_dropped(
    processor: RecordingProcessor[Any], dropped: Dropped
) -> None:
    processor.release()
    options: dict[str, Any] = {"max_pending": 8, "drop_oldest": True, "listeners": [dropped]}
    with Batcher(processor, Size(8), key=tenant, **options) as batcher:
        for job in ("a1", "b1", "b2", "b3", "b4", "b5", "b6", "a2"):  # the queue is full, and no batch is
            batcher.submit(job)
        assert [["a1", "a2"]] == processor.wait_for_batches(1)
    assert [] == dropped.jobs


def test_a_full_queue_makes_a_batch_due_when_a_worker_becomes_free(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    options: dict[str, Any] = {"max_pending": 2, "drop_oldest": True, "key": tenant, "clock": clock}
    with blocked(processor, Interval(60), **options) as batcher:
        futures = [batcher.submit(job) for job in ("a1", "b1")]
        while batcher.stats().batched < 2:  # the queue is known to be full, and no worker is free
            pass
        processor.release()
        assert "a1" == futures[0].result(10).value
        clock.wait_for_sleeper(60)
        assert not futures[1].done()


def test_the_newest_job_is_never_dropped_alone(processor: RecordingProcessor[Any]) -> None:
    options: dict[str, Any] = {"max_pending_weight": 0.7, "drop_oldest": True}
    with blocked(processor, first=0.1, weigh=float, **options) as batcher:
        old, new = batcher.submit(0.4), batcher.submit(0.7)  # 0.4 + 0.7 - 0.4 is more than 0.7
        assert [True, False] == [old.done(), new.done()]
        processor.release()


def test_jobs_that_were_dropped_before_a_start_that_fails_run_their_callbacks(
    monkeypatch: pytest.MonkeyPatch, dropped: Dropped
) -> None:
    called: list[Any] = []
    failing = FailingStart("drops", monkeypatch)
    batcher = Batcher[int, int](list, max_pending=1, drop_oldest=True, listeners=[dropped], name="drops")
    futures = [batcher.submit(number) for number in range(3)]
    for future in futures:
        future.add_done_callback(lambda done: called.append(done.job))
    failing.go_on.set()
    assert isinstance(futures[2].exception(10), RuntimeError)
    batcher.shutdown()
    assert [0, 1, 2] == sorted(called)
    assert [0, 1] == dropped.jobs


def test_a_held_key_does_not_keep_its_jobs_from_being_dropped(processor: RecordingProcessor[Any]) -> None:
    policy = Natural() & PerKey()
    with blocked(processor, policy, "a0", key=tenant, max_workers=2, max_pending=2, drop_oldest=True) as batcher:
        futures = [batcher.submit(job) for job in ("a1", "a2", "a3")]
        assert JobState.DROPPED is futures[0].state
        processor.release()
    assert [["a0"], ["a2", "a3"]] == processor.batches
