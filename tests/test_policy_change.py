"""Another policy for a batcher that runs."""

import os
import random
import threading
import warnings
from typing import Any

import pytest

from microbatch import (
    Adaptive,
    AllWaiting,
    Batcher,
    BatchingPolicy,
    BatchInfo,
    BatchListener,
    BatchStarted,
    Hints,
    Interval,
    JobState,
    JobTooLarge,
    Natural,
    PerKey,
    Rate,
    Size,
    Weight,
    Window,
)
from microbatch.testing import ManualClock, RecordingProcessor
from tests.threads import in_thread


class Limited(BatchingPolicy[Any]):
    """A limit that a batch shows in its trigger."""

    hints = Hints(watches_flow=False)

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def due(self, window: Window[Any]) -> float:
        return window.opened

    def fits(self, window: Window[Any], weight: float) -> bool:
        return window.count < self.limit

    def reason(self, window: Window[Any]) -> str:
        return f"limit {self.limit}"


def test_open_batches_follow_the_new_policy(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
    processor.release()
    with Batcher(processor, Interval(60), clock=clock) as batcher:
        futures = [batcher.submit(number) for number in range(5)]
        batcher.policy = Size(2) | Interval(70)
        assert [[0, 1], [2, 3]] == processor.wait_for_batches(2)
        clock.wait_for_sleeper(70)
        assert [False, True] == [future.done() for future in (futures[4], futures[3])]
        clock.advance(70)
        assert 4 == futures[4].result(10).value
    assert "Size(2) | Interval(70)" in repr(batcher)


def test_the_batcher_names_its_policy(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(2)) as batcher:
        assert "Size(2)" == repr(batcher.policy)
        batcher.policy = Size(3)
        assert "Size(3)" == repr(batcher.policy)


def test_a_policy_is_checked_as_in_the_constructor(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(2), max_pending=5) as batcher:
        with pytest.raises(TypeError, match="policy must be a BatchingPolicy, got 3"):
            batcher.policy = 3  # type: ignore[assignment]
        with pytest.raises(ValueError, match="at most max_pending=5 jobs"):
            batcher.policy = Size(6)
        assert "Size(2)" == repr(batcher.policy)


def test_a_policy_of_a_batcher_that_has_not_started_or_has_ended_can_be_replaced() -> None:
    batcher = Batcher[int, int](list, Interval(60))
    batcher.policy = Size(1)
    assert 7 == batcher.submit(7).result(10).value
    batcher.shutdown()
    batcher.policy = Size(2)
    assert "Size(2)" == repr(batcher.policy)


def test_a_waiting_job_that_is_too_heavy_for_the_new_policy_fails(clock: ManualClock) -> None:
    with Batcher[int, int](list, Weight(9), weigh=int, clock=clock) as batcher:
        heavy, light = batcher.submit(7), batcher.submit(1)
        batcher.policy = Weight(5) | Interval(60)
        assert isinstance(heavy.exception(10), JobTooLarge)
        with pytest.raises(JobTooLarge):
            batcher.submit(7)
        batcher.flush()
        assert 1 == light.result(10).value


def test_a_flush_holds_for_the_new_policy_too(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
    with Batcher(processor, Size(1), key=lambda job: job, clock=clock) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        flushed = batcher.submit("flushed")
        batcher.flush(wait=False)
        batcher.policy = Interval(90)
        later = batcher.submit("later")
        processor.release()
        assert "flushed" == flushed.result(10).value
        clock.wait_for_sleeper(90)
        assert not later.done()


def test_jobs_keep_their_order_and_their_deadlines(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
    processor.release()
    with Batcher(processor, Interval(60), clock=clock) as batcher:
        futures = [batcher.submit(number, expires_in=5 if number == 1 else None) for number in range(4)]
        batcher.policy = Interval(50)
        clock.wait_for_sleeper(5)
        clock.advance(5)
        while futures[1].state is not JobState.EXPIRED:
            pass
        clock.wait_for_sleeper(50)
        clock.advance(45)
        assert [[0, 2, 3]] == processor.wait_for_batches(1)


def test_batches_of_a_key_that_run_already_count_for_the_new_policy(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Natural(), key=lambda job: job[0], max_workers=3) as batcher:
        batcher.submit("a1")
        processor.wait_for_batches(1)
        batcher.policy = Natural() & PerKey()
        batcher.submit("a2")
        batcher.submit("b1")
        assert [["a1"], ["b1"]] == processor.wait_for_batches(2)
        processor.release()


def test_a_key_stays_in_order_while_the_policy_changes_back_and_forth(processor: RecordingProcessor[Any]) -> None:
    ordered = Size(1) & PerKey()
    with Batcher(processor, ordered, key=lambda job: job[0], max_workers=3) as batcher:
        batcher.submit("a1")
        processor.wait_for_batches(1)
        batcher.policy = Size(1)
        batcher.submit("a2")
        processor.wait_for_batches(2)
        batcher.policy = ordered
        batcher.submit("a3")
        batcher.submit("b1")
        assert [["a1"], ["a2"], ["b1"]] == processor.wait_for_batches(3)
        processor.release()


def test_cancelled_jobs_do_not_come_back(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(10)) as batcher:
        futures = [batcher.submit(number) for number in range(30)]  # 10 run, 10 are in a batch, and 10 wait behind it
        processor.wait_for_batches(1)
        for future in futures[20:29]:
            future.cancel()
        batcher.policy = Size(12)
        futures += [batcher.submit("last")]
        processor.release()
        assert [*range(10, 20), 29, "last"] == processor.wait_for_batches(2)[1]


def test_a_policy_whose_hints_raise_later_is_not_adopted(
    processor: RecordingProcessor[Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Limited):
        asked = 0

        @property
        def hints(self) -> Hints:  # type: ignore[override]
            self.asked += 1
            if self.asked > 5:
                raise LookupError("hints")
            return Hints()

    with Batcher(processor, Size(1) & PerKey(), name="rows", key=lambda job: job[0], max_workers=2) as batcher:
        first = batcher.submit("a1")
        processor.wait_for_batches(1)
        batcher.policy = Failing(3)
        second = batcher.submit("a2")
        processor.release()
        assert ["a1", "a2"] == [future.result(10).value for future in (first, second)]
        assert "Size(1) & PerKey(1)" == repr(batcher.policy)
    assert "rows keeps its policy, because the new one raised" in caplog.text


def test_a_policy_that_needs_to_know_the_callers_learns_of_them(clock: ManualClock) -> None:
    with Batcher[int, int](list, Size(1), clock=clock) as batcher:
        batcher.submit(1).result(10)
        batcher.policy = AllWaiting(5)
        future = batcher.submit(2)
        clock.wait_for_sleeper(5)  # because this caller does not wait yet
        assert 2 == future.result(10).value


def test_the_rate_counts_the_batches_of_the_time_before(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
    processor.release()
    with Batcher(processor, Size(1), clock=clock) as batcher:
        batcher.submit(1).result(10)
        batcher.policy = Size(1) & Rate(1, per=10)
        second = batcher.submit(2)
        clock.wait_for_sleeper(10)
        assert not second.done()
        clock.advance(10)
        assert 2 == second.result(10).value


def test_each_batcher_has_a_copy_of_a_policy_that_learns() -> None:
    policy = Adaptive(0.1)
    with Batcher[int, int](list) as batcher:
        batcher.policy = policy
        assert repr(policy) == repr(batcher.policy) and policy is not batcher.policy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_the_new_policy() -> None:
    batcher = Batcher[int, int](list, Interval(60))
    batcher.policy = Size(1)
    batcher.submit(1).result(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        child = os.fork()
    if not child:
        os._exit(0 if batcher.submit(2).result(10).value == 2 else 1)
    assert 0 == os.waitpid(child, 0)[1]
    batcher.shutdown()


def test_no_batch_exceeds_the_limit_in_force_while_the_policy_changes_all_the_time() -> None:
    started: list[BatchInfo] = []

    class Sizes(BatchListener):
        def batch_started(self, event: BatchStarted) -> None:
            started.append(event.batch)

    ended = threading.Event()

    def change() -> None:
        chance = random.Random(1)
        for _ in range(1_000):
            batcher.policy = Limited(chance.randint(1, 20)) | Natural() if chance.random() < 0.3 else Limited(7)
        ended.set()

    def submit(key: int) -> list[Any]:
        futures = []
        while not ended.is_set():
            futures += [batcher.submit((key, number)) for number in range(10)]
        return [(future.job, future.result(10).value) for future in futures]

    with Batcher[Any, Any](list, Limited(3), listeners=[Sizes()], key=lambda job: job[0] % 2, max_workers=2) as batcher:
        tasks = [in_thread(lambda key=key: submit(key)) for key in range(3)]  # type: ignore[misc]
        change()
        assert all(job == value for task in tasks for job, value in task.result(60))
    limits = [(batch.size, int(batch.trigger.split()[1])) for batch in started if batch.trigger.startswith("limit")]
    assert 100 < len(limits)
    assert [] == [(size, limit) for size, limit in limits if size > limit]
