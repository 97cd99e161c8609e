"""Race conditions, each forced: a call happens at the very moment at which it could do harm."""

import _thread
import concurrent.futures
import linecache
import sys
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
    JobFuture,
    JobState,
    Size,
    Weight,
    Window,
)
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from tests.conftest import FullBatcher
from tests.threads import in_thread


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


# -- the batcher thread and its sleep --


class InterruptingClock(ManualClock):
    """Makes a call in the batcher thread after it has decided to sleep until 9 and before it sleeps."""

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


@pytest.mark.parametrize("action, moment", [("submit", 3.0), ("cancel", NEVER), ("flush", NEVER)])
def test_a_call_just_before_the_batcher_thread_sleeps_wakes_it(action: str, moment: float) -> None:
    clock, known = InterruptingClock(), threading.Event()
    with Batcher(echo, Interval(9), clock=clock) as batcher:
        futures = [batcher.submit("starts the threads", expires_in=0)]
        actions = {
            "submit": lambda: batcher.submit("late", expires_in=3),
            "cancel": lambda: known.wait(10) and futures[1].cancel(),
            "flush": lambda: batcher.flush(wait=False),
        }
        futures[0].exception(timeout=10)
        clock.wait_for_sleeper(NEVER)
        clock.call = actions[action]
        futures.append(batcher.submit("job"))
        known.set()
        assert clock.called.wait(10)  # otherwise it may be found in the sleep before the job
        clock.wait_for_sleeper(moment)


def test_a_shutdown_just_before_the_batcher_thread_sleeps_wakes_it() -> None:
    clock = InterruptingClock()
    batcher = Batcher(echo, Interval(9), clock=clock)
    clock.call = lambda: batcher.shutdown(wait=False)
    future = batcher.submit("job")
    assert "shutdown" == future.result(timeout=10).batch.trigger
    assert batcher.shutdown(timeout=10)


def test_an_idle_batcher_does_not_wake_up_as_time_passes() -> None:
    clock = InterruptingClock()
    with Batcher(echo, executor=InlineExecutor(), clock=clock) as batcher:
        batcher.submit(1).result(timeout=10)
        clock.wait_for_sleeper(NEVER)
        asleep = clock.sleeps
        for _ in range(1000):
            clock.advance(3600)
        batcher.stats()
        assert asleep == clock.sleeps


def test_a_job_submitted_while_all_workers_are_busy_wakes_the_batcher_thread_only_if_it_may_expire(
    processor: RecordingProcessor[Any],
) -> None:
    clock = InterruptingClock()
    with Batcher(processor, clock=clock) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        clock.wait_for_sleeper(NEVER)
        asleep = clock.sleeps
        # Each is submitted in its own thread, so that other threads run in between.
        futures = [in_thread(lambda: batcher.submit(number)).result(timeout=10) for number in range(100)]
        futures.append(batcher.submit("late", expires_in=5))
        clock.wait_for_sleeper(5.0)
        assert asleep + 1 == clock.sleeps
        processor.release()
        assert [*range(100), "late"] == [future.result(timeout=10).value for future in futures]


def test_an_overdue_batch_does_not_keep_the_batcher_thread_awake(processor: RecordingProcessor[Any]) -> None:
    clock = InterruptingClock()
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


class Intervening(BatchingPolicy[Any]):
    """Dispatches two jobs at once, and makes a call before a worker has the batch."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def due(self, window: Window[Any]) -> float:
        return NOW if window.count == 2 else NEVER

    def reason(self, window: Window[Any]) -> str:
        self.call()
        return "intervening"


def test_a_job_cancelled_while_its_batch_is_dispatched_is_not_processed() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Intervening(lambda: first.cancel())) as batcher:
        first, second = batcher.submit("a"), batcher.submit("b")
        assert 1 == second.result(timeout=10).batch.size
        assert first.cancelled()
    assert [["b"]] == processor.batches


def test_a_batch_whose_jobs_are_all_cancelled_while_it_is_dispatched_does_not_run() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Intervening(lambda: [future.cancel() for future in futures])) as batcher:
        futures: list[Any] = []
        futures.extend(batcher.submit(job) for job in "ab")
        assert batcher.flush(timeout=10)
        assert [True, True] == [future.cancelled() for future in futures]
    assert ([], 0) == (processor.batches, batcher.stats().batches)


def test_a_job_that_expires_at_the_moment_its_batch_is_due_is_not_processed(clock: ManualClock) -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Interval(5), clock=clock) as batcher:
        doomed, other = batcher.submit("doomed", expires_in=5), batcher.submit("other")
        clock.advance(5)
        assert isinstance(doomed.exception(timeout=10), JobExpired)
        assert 1 == other.result(timeout=10).batch.size
    assert [["other"]] == processor.batches


@pytest.mark.parametrize("first", ["cancel", "expire"])
def test_a_job_cannot_both_be_cancelled_and_expire(first: str, clock: ManualClock) -> None:
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


def test_a_job_that_expires_unblocks_a_blocked_submit(processor: RecordingProcessor[Any], clock: ManualClock) -> None:
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


def test_a_waiting_flush_counts_an_expired_job_as_settled(
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


def test_a_blocked_submit_raises_as_soon_as_its_timeout_runs_out(full: FullBatcher, clock: ManualClock) -> None:
    clock.advance(4)
    clock.wait_for_sleeper(5.0)
    assert not full.blocked.done()
    clock.advance(1)
    assert isinstance(full.blocked.exception(timeout=10), BacklogFull)
    assert 2 == full.batcher.stats().accepted


# -- callbacks --


@pytest.mark.parametrize("how", ["succeed", "fail", "cancel", "expire"])
def test_the_statistics_are_correct_and_no_lock_is_held_while_a_callback_runs(how: str, clock: ManualClock) -> None:
    seen: list[Any] = []

    def processor(jobs: list[Any]) -> list[Any]:
        return [KeyError()] if how == "fail" else jobs

    def use(future: Any) -> None:
        """Use the batcher from another thread, which would block if this thread held a lock."""
        seen.append(in_thread(batcher.stats).result(timeout=10))
        another = in_thread(partial(batcher.submit, "another", timeout=0)).result(timeout=10)
        seen.append(in_thread(another.cancel).result(timeout=10))
        in_thread(partial(batcher.flush, wait=False)).result(timeout=10)
        seen.append(in_thread(future.done).result(timeout=10))
        used.set()

    used = threading.Event()
    with Batcher(processor, Interval(5), clock=clock) as batcher:
        future = batcher.submit("job", expires_in=3 if how == "expire" else None)
        future.add_done_callback(use)
        if how == "cancel":
            future.cancel()
        clock.advance(5)
        assert used.wait(10)
    stats = seen[0]
    assert [True, True] == seen[1:]
    assert (1, 0) == (stats.accepted, stats.queued + stats.batched + stats.running)
    assert 1 == {"succeed": stats.succeeded, "fail": stats.failed, "cancel": stats.cancelled}.get(how, stats.expired)


@pytest.mark.parametrize("cancel_futures", [False, True])
def test_a_shutdown_from_a_callback_does_not_affect_the_other_jobs_of_its_batch(cancel_futures: bool) -> None:
    def close(future: Any) -> None:
        batcher.shutdown(wait=False, cancel_futures=cancel_futures)

    batcher = Batcher(echo, Size(2))
    futures = [batcher.submit(1)]
    futures[0].add_done_callback(close)
    futures.append(batcher.submit(2))
    assert [1, 2] == [future.result(timeout=10).value for future in futures]
    assert batcher.shutdown(timeout=10)


def test_the_last_reference_to_a_batcher_may_be_dropped_in_the_batcher_thread() -> None:
    processor = RecordingProcessor[int]()
    holder = [Batcher(processor, Size(9))]
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
    assert [[1]] == processor.batches


class Staged(BatchingPolicy[str]):
    """Makes a call just after the leader has drained the queue, and another just before it resigns."""

    def __init__(self, after_drain: Callable[[], object], before_resigning: Callable[[], object]) -> None:
        self._calls = [after_drain, before_resigning]

    def due(self, window: Window[str]) -> float:
        if len(self._calls) == 1:
            self._calls.pop()()
        return NOW if window.key == "first" else window.opened + 60

    def observe(self, report: BatchReport) -> None:
        if len(self._calls) == 2:
            self._calls.pop(0)()


def test_a_blocked_submit_is_noticed_even_if_another_one_has_just_given_up(
    clock: ManualClock, processor: RecordingProcessor[str]
) -> None:
    def one_caller_gives_up() -> None:
        clock.advance(1)
        assert isinstance(early.exception(timeout=10), BacklogFull)

    def another_caller_arrives() -> None:
        late.append(in_thread(lambda: batcher.submit("late", timeout=30)))
        clock.wait_for_sleeper(1 + 30)
        arrived.set()

    late: list[Any] = []
    arrived = threading.Event()
    policy = Staged(one_caller_gives_up, another_caller_arrives)
    with Batcher(processor, policy, key=lambda job: job, max_pending=2, clock=clock) as batcher:
        batcher.submit("first")
        processor.wait_for_batches(1)
        batcher.submit("a")
        batcher.submit("b")
        early = in_thread(lambda: batcher.submit("early", timeout=1))
        clock.wait_for_sleeper(1)
        processor.release()
        assert arrived.wait(timeout=10)
        assert "late" == late[0].result(timeout=10).job


# -- no notification is lost --


def pause_after(function: str, paused: threading.Event, go_on: threading.Event) -> Callable[..., Any]:
    """Return a tracer that pauses the thread when a function of this name returns something true."""

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == function and event == "return" and argument and not paused.is_set():
            paused.set()
            go_on.wait(10)
        return trace

    return trace


def test_a_caller_that_is_notified_twice_before_it_leaves_the_line_wakes_the_next_one(clock: ManualClock) -> None:
    entered, go_on = threading.Event(), threading.Event()
    gates = {job: threading.Event() for job in ("a", "b", "c", "d")}

    def processor(jobs: list[str]) -> list[str]:
        if jobs[0] in gates:
            gates[jobs[0]].wait(10)
        return jobs

    def submit_slowly() -> JobFuture[str]:
        sys.settrace(pause_after("enter", entered, go_on))
        try:
            return batcher.submit("first", timeout=60)
        finally:
            sys.settrace(None)

    policy = Weight(2)  # both of the blocked jobs are needed for a batch
    weigh = {"first": 1, "second": 1}
    with Batcher[str, str](
        processor, policy, weigh=lambda job: weigh.get(job, 2), max_pending=2, max_workers=2, clock=clock
    ) as batcher:
        futures = [batcher.submit(job) for job in ("a", "b")]
        while not all(future.running() for future in futures):
            pass
        futures += [batcher.submit(job) for job in ("c", "d")]
        first = in_thread(submit_slowly)
        clock.wait_for_sleeper(60)
        clock.advance(1)
        second = in_thread(lambda: batcher.submit("second", timeout=60))
        clock.wait_for_sleeper(61)
        gates["a"].set()
        assert entered.wait(10)
        gates["b"].set()
        while not futures[3].running():  # now there is room for two
            pass
        go_on.set()
        for gate in gates.values():
            gate.set()
        assert ["first", "second"] == [each.result(timeout=10).result(timeout=10).value for each in (first, second)]


def watch_at(moment: Callable[[], object], *futures: JobFuture[Any]) -> "concurrent.futures.Future[Any]":
    """Call `wait` in a new thread. Just when it begins to watch the first future, call *moment*."""

    def trace(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "_attach":
            sys.settrace(None)
            moment()

    def wait() -> Any:
        sys.settrace(trace)
        return concurrent.futures.wait(futures, timeout=10)

    return in_thread(wait)


def test_wait_returns_if_the_job_is_settled_just_as_wait_begins_to_watch_it(
    processor: RecordingProcessor[str],
) -> None:
    def settle() -> None:
        processor.release()
        future.result(timeout=10)

    with Batcher[str, str](processor, Size(1)) as batcher:
        future = batcher.submit("job")
        assert {future} == watch_at(settle, future).result(timeout=20).done


def test_a_watcher_of_two_jobs_is_notified_once_of_the_first_if_another_thread_begins_to_watch_that_one() -> None:
    gates = {job: threading.Event() for job in ("first", "second")}

    def processor(jobs: list[str]) -> list[str]:
        gates[jobs[0]].wait(10)
        return jobs

    def settle() -> None:
        gates["first"].set()
        while not first.done() or first._state == "RUNNING":  # the watcher has not been notified yet
            pass

    with Batcher[str, str](processor, Size(1)) as batcher:
        first, second = (batcher.submit(job) for job in gates)
        both = in_thread(lambda: concurrent.futures.wait([first, second], timeout=10))
        while not second._waiters:
            pass
        assert {first} == watch_at(settle, first).result(timeout=20).done
        gates["second"].set()
        assert {first, second} == both.result(timeout=20).done


def test_a_caller_that_leaves_just_as_the_job_is_settled_keeps_no_other_caller_from_being_woken() -> None:
    settled, go_on = threading.Event(), threading.Event()

    def processor(jobs: list[str]) -> list[str]:
        sys.settrace(pause_before_waking)  # in the worker thread
        while not has_waiters(2):
            pass
        return jobs

    def has_waiters(count: int) -> bool:
        return len(future._attachments or ()) == count

    def pause_before_waking(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "_announce":
            sys.settrace(None)
            settled.set()
            go_on.wait(10)

    with Batcher[str, str](processor, Size(1)) as batcher:
        future = batcher.submit("job")
        patient = in_thread(lambda: future.result(timeout=10))
        hasty = in_thread(lambda: future.result(timeout=0.5))
        assert settled.wait(10)
        assert "job" == hasty.result(timeout=10).value
        go_on.set()
        assert "job" == patient.result(timeout=5).value


def test_a_flush_is_not_undone_by_a_job_that_is_accepted_at_the_same_time_and_joins_its_batch_late() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def pause_before_the_append(frame: Any, event: str, argument: Any) -> Any:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and "self.accepted.append(item)" in line:
            reached.set()
            go_on.wait(10)
        return pause_before_the_append

    def submit_slowly() -> JobFuture[str]:
        sys.settrace(pause_before_the_append)
        return batcher.submit("slow")

    with Batcher[str, str](list, Size(9)) as batcher:
        batcher.submit("first")
        batcher.flush()
        slow = in_thread(submit_slowly)
        assert reached.wait(10)
        flush = in_thread(lambda: batcher.flush(timeout=10))
        while batcher._newest_engine.queue.epoch < 2:
            pass
        batcher.submit("later")
        while not batcher.stats().batched:
            pass
        go_on.set()
        assert flush.result(timeout=20)
        assert "slow" == slow.result(timeout=10).result(timeout=10).value


def test_if_a_signal_arrives_just_as_a_start_fails_the_next_job_starts_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    def interrupt(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "_give_up_start":
            sys.settrace(None)
            raise KeyboardInterrupt

    with Batcher(echo) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", fail)
            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                with pytest.raises(KeyboardInterrupt):
                    batcher.submit("job")
            finally:
                sys.settrace(before)
        assert "job" == batcher.submit("job").result(timeout=10).value


def test_if_a_signal_arrives_just_after_a_cancellation_the_callback_is_called_all_the_same() -> None:
    def interrupt(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "_wake_waiters":
            sys.settrace(before)
            raise KeyboardInterrupt

    called: list[JobFuture[str]] = []
    with Batcher[str, str](echo, Size(9)) as batcher:
        future = batcher.submit("job")
        future.add_done_callback(called.append)
        before = sys.gettrace()
        sys.settrace(interrupt)
        with pytest.raises(KeyboardInterrupt):
            future.cancel()
        assert [future] == called and future.cancelled()
