"""Races, each made to happen: something comes at the very moment at which it would hurt."""

import concurrent.futures
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from microbatch import (
    NEVER,
    NOW,
    BacklogFull,
    Batcher,
    BatchingPolicy,
    BatchReport,
    Interval,
    JobExpired,
    JobState,
    Size,
    Window,
)
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from tests.conftest import FullBatcher
from tests.threads import in_thread


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


# -- the batcher thread and its sleep --


class Interrupting(ManualClock):
    """Has the batcher thread make a call when it has seen that there is nothing to do before 9, and before it sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Callable[[], Any] | None = None
        self.called = threading.Event()
        self.sleeps = 0

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        self.sleeps += 1
        if moment == 9 and self.call is not None:
            call, self.call = self.call, None
            self.called.set()
            call()
        super().wait_until(condition, moment)


@pytest.mark.parametrize("what, moment", [("submit", 3.0), ("cancel", NEVER), ("flush", NEVER)])
def test_what_comes_between_the_last_look_of_the_worker_thread_and_its_sleep_wakes_it(what: str, moment: float) -> None:
    clock, known = Interrupting(), threading.Event()
    with Batcher(echo, Interval(9), clock=clock) as batcher:
        futures = [batcher.submit("to have it started", expires_in=0)]
        acts = {
            "submit": lambda: batcher.submit("late", expires_in=3),
            "cancel": lambda: known.wait(10) and futures[1].cancel(),
            "flush": lambda: batcher.flush(wait=False),
        }
        futures[0].exception(timeout=10)
        clock.wait_for_sleeper(NEVER)
        clock.call = acts[what]
        futures.append(batcher.submit("job"))
        known.set()
        assert clock.called.wait(10)  # or it may be found asleep as it was before the job came
        clock.wait_for_sleeper(moment)


def test_a_shutdown_that_comes_between_the_last_look_of_the_worker_thread_and_its_sleep_wakes_it() -> None:
    clock = Interrupting()
    batcher = Batcher(echo, Interval(9), clock=clock)
    clock.call = lambda: batcher.shutdown(wait=False)
    future = batcher.submit("job")
    assert "shutdown" == future.result(timeout=10).batch.trigger
    assert batcher.shutdown(timeout=10)


def test_an_idle_batcher_sleeps_once_however_long_it_takes() -> None:
    clock = Interrupting()
    with Batcher(echo, executor=InlineExecutor(), clock=clock) as batcher:
        batcher.submit(1).result(timeout=10)
        clock.wait_for_sleeper(NEVER)
        asleep = clock.sleeps
        for _ in range(1000):
            clock.advance(3600)
        batcher.stats()
        assert asleep == clock.sleeps


def test_what_comes_while_all_workers_are_busy_wakes_nobody_unless_it_may_expire(
    processor: RecordingProcessor[Any],
) -> None:
    clock = Interrupting()
    with Batcher(processor, clock=clock) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        clock.wait_for_sleeper(NEVER)
        asleep = clock.sleeps
        # Each from a thread of its own, so that others get their turn in between.
        futures = [in_thread(lambda: batcher.submit(number)).result(timeout=10) for number in range(100)]
        futures.append(batcher.submit("late", expires_in=5))
        clock.wait_for_sleeper(5.0)
        assert asleep + 1 == clock.sleeps
        processor.release()
        assert [*range(100), "late"] == [future.result(timeout=10).value for future in futures]


def test_a_batch_that_is_overdue_is_no_reason_to_stay_awake(processor: RecordingProcessor[Any]) -> None:
    clock = Interrupting()
    with Batcher(processor, Interval(1), clock=clock) as batcher:
        batcher.submit("running")
        clock.advance(1)
        processor.wait_for_batches(1)
        late = batcher.submit("late", expires_in=5000)
        clock.wait_for_sleeper(5001.0)
        asleep = clock.sleeps
        for _ in range(1000):
            clock.advance(1)
        assert (asleep, False) == (clock.sleeps, late.done())
        processor.release()


# -- cancellation and expiry against dispatch --


class Telling(BatchingPolicy[Any]):
    """Due at once; makes a call when its batch has been taken out to go, and no worker has it yet."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def due(self, window: Window[Any]) -> float:
        return NOW if window.count == 2 else NEVER

    def reason(self, window: Window[Any]) -> str:
        self.call()
        return "told"


def test_a_job_that_is_cancelled_while_its_batch_leaves_is_not_sent() -> None:
    recording = RecordingProcessor[str]()
    with Batcher(recording, Telling(lambda: first.cancel())) as batcher:
        first, second = batcher.submit("a"), batcher.submit("b")
        assert 1 == second.result(timeout=10).batch.size
        assert first.cancelled()
    assert [["b"]] == recording.batches


def test_a_batch_whose_jobs_are_all_cancelled_while_it_leaves_is_not_sent() -> None:
    recording = RecordingProcessor[str]()
    with Batcher(recording, Telling(lambda: [future.cancel() for future in futures])) as batcher:
        futures: list[Any] = []
        futures.extend(batcher.submit(job) for job in "ab")
        assert batcher.flush(timeout=10)
        assert [True, True] == [future.cancelled() for future in futures]
    assert ([], 0) == (recording.batches, batcher.stats().batches)


def test_a_job_that_expires_at_the_moment_its_batch_is_due_is_not_sent(clock: ManualClock) -> None:
    recording = RecordingProcessor[str]()
    with Batcher(recording, Interval(5), clock=clock) as batcher:
        doomed, other = batcher.submit("doomed", expires_in=5), batcher.submit("other")
        clock.advance(5)
        assert isinstance(doomed.exception(timeout=10), JobExpired)
        assert 1 == other.result(timeout=10).batch.size
    assert [["other"]] == recording.batches


@pytest.mark.parametrize("first", ["cancel", "expire"])
def test_of_cancellation_and_expiry_the_first_wins(first: str, clock: ManualClock) -> None:
    with Batcher(echo, Interval(9), clock=clock) as batcher:
        future = batcher.submit(1, expires_in=5)
        calls: list[Any] = []
        future.add_done_callback(calls.append)
        clock.wait_for_sleeper(5.0)
        if first == "cancel":
            assert future.cancel()
        clock.advance(5)
        clock.wait_for_sleeper(NEVER)
        assert (first == "cancel") is future.cancel() is future.cancelled()
    assert [future] == calls
    assert {"cancel": JobState.CANCELLED, "expire": JobState.EXPIRED}[first] is future.state
    assert 1 == batcher.stats().accepted == batcher.stats().cancelled + batcher.stats().expired


def test_a_job_that_expires_makes_room_for_a_blocked_one(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    with Batcher(processor, Size(1), max_pending=1, clock=clock) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        batcher.submit("doomed", expires_in=5)
        blocked = in_thread(lambda: batcher.submit("blocked", timeout=60))
        clock.wait_for_sleeper(60.0)
        clock.advance(5)
        future = blocked.result(timeout=10)
        processor.release()
        assert "blocked" == future.result(timeout=10).value


def test_a_flush_that_waits_counts_a_job_that_expires_as_settled(
    processor: RecordingProcessor[Any], clock: ManualClock
) -> None:
    with Batcher(processor, Size(1), clock=clock) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        batcher.submit("doomed", expires_in=5)
        waiting = in_thread(partial(batcher.flush, timeout=60))
        clock.wait_for_sleeper(60.0)
        clock.advance(5)
        processor.release()
        assert waiting.result(timeout=10) is True
    assert [["running"]] == processor.batches


def test_a_blocked_submit_is_refused_at_its_moment_and_not_later(full: FullBatcher, clock: ManualClock) -> None:
    clock.advance(4)
    clock.wait_for_sleeper(5.0)
    assert not full.blocked.done()
    clock.advance(1)
    assert isinstance(full.blocked.exception(timeout=10), BacklogFull)
    assert 2 == full.batcher.stats().accepted


# -- callbacks --


@pytest.mark.parametrize("how", ["succeed", "fail", "cancel", "expire"])
def test_when_a_callback_runs_the_books_are_right_and_no_lock_is_held(how: str, clock: ManualClock) -> None:
    seen: list[Any] = []

    def processor(jobs: list[Any]) -> list[Any]:
        return [KeyError()] if how == "fail" else jobs

    def use(future: Any) -> None:
        """Use the batcher from another thread, as that would wait for a lock that this one holds."""
        seen.append(in_thread(batcher.stats).result(timeout=10))
        another = in_thread(partial(batcher.submit, "another", timeout=0)).result(timeout=10)
        seen.append(in_thread(another.cancel).result(timeout=10))
        in_thread(partial(batcher.flush, wait=False)).result(timeout=10)
        seen.append(in_thread(future.done).result(timeout=10))
        over.set()

    over = threading.Event()
    with Batcher(processor, Interval(5), clock=clock) as batcher:
        future = batcher.submit("job", expires_in=3 if how == "expire" else None)
        future.add_done_callback(use)
        if how == "cancel":
            future.cancel()
        clock.advance(5)
        assert over.wait(10)
    stats = seen[0]
    assert [True, True] == seen[1:]
    assert (1, 0) == (stats.accepted, stats.queued + stats.batched + stats.running)
    assert 1 == {"succeed": stats.succeeded, "fail": stats.failed, "cancel": stats.cancelled}.get(how, stats.expired)


@pytest.mark.parametrize("cancel_futures", [False, True])
def test_a_shutdown_from_a_callback_lets_the_other_jobs_of_the_batch_have_their_results(cancel_futures: bool) -> None:
    def close(future: Any) -> None:
        batcher.shutdown(wait=False, cancel_futures=cancel_futures)

    batcher = Batcher(echo, Size(2))
    futures = [batcher.submit(1)]
    futures[0].add_done_callback(close)
    futures.append(batcher.submit(2))
    assert [1, 2] == [future.result(timeout=10).value for future in futures]
    assert batcher.shutdown(timeout=10)


def test_the_worker_thread_may_be_the_last_to_hold_the_batcher() -> None:
    recording = RecordingProcessor[int]()
    holder = [Batcher(recording, Size(9))]
    futures = [holder[0].submit(1)]
    with pytest.warns(ResourceWarning):
        futures[0].add_done_callback(lambda future: holder.clear())
        holder[0].flush(wait=False)
        futures[0].result(timeout=10)
        while holder:
            concurrent.futures.wait(futures)
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("microbatch")]
        for thread in threads:
            thread.join(timeout=10)
    assert [[1]] == recording.batches


class Staged(BatchingPolicy[str]):
    """Lets a test do something just after the leader has taken the news, and just before it leaves the lead."""

    def __init__(self, after_the_news: Callable[[], object], before_the_end: Callable[[], object]) -> None:
        self._acts = [after_the_news, before_the_end]

    def due(self, window: Window[str]) -> float:
        if len(self._acts) == 1:
            self._acts.pop()()
        return NOW if window.key == "first" else window.opened + 60

    def observe(self, report: BatchReport) -> None:
        if len(self._acts) == 2:
            self._acts.pop(0)()


def test_a_caller_that_waits_for_room_is_noticed_though_another_gave_up_meanwhile(
    clock: ManualClock, processor: RecordingProcessor[str]
) -> None:
    def one_gives_up() -> None:
        clock.advance(1)
        assert isinstance(early.exception(timeout=10), BacklogFull)

    def another_comes() -> None:
        late.append(in_thread(lambda: batcher.submit("late", timeout=30)))
        clock.wait_for_sleeper(1 + 30)
        came.set()

    late: list[Any] = []
    came = threading.Event()
    policy = Staged(one_gives_up, another_comes)
    with Batcher(processor, policy, key=lambda job: job, max_pending=2, clock=clock) as batcher:
        batcher.submit("first")
        processor.wait_for_batches(1)
        batcher.submit("a")
        batcher.submit("b")
        early = in_thread(lambda: batcher.submit("early", timeout=1))
        clock.wait_for_sleeper(1)
        processor.release()
        assert came.wait(timeout=10)
        assert "late" == late[0].result(timeout=10).job
