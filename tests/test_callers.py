"""Which callers a batch waits for, and for how long."""

import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from microbatch import NOW, AllWaiting, Batcher, CallerActivity, Interval, JobFuture, Natural, Size, Window
from microbatch._basics.waiting import Waiter
from microbatch.testing import ManualClock
from tests.threads import in_thread


class Recording(Natural):
    """Records which callers are expected, and waits for none of them."""

    def __init__(self) -> None:
        self.expected: list[float] = []

    def due(self, window: Window[Any]) -> float:
        self.expected += [window.callers.return_by] * window.callers.returning
        return NOW


def slow(clock: ManualClock, caller: int, seconds: float = 8.0) -> Callable[[list[Any]], list[Any]]:
    """Return a processor that takes *seconds*, but first waits until *caller* waits, except for the job "other"."""

    def processor(jobs: list[Any]) -> list[Any]:
        while jobs != ["other"] and sys._current_frames()[caller].f_code is not Waiter.wait.__code__:
            pass
        clock.advance(seconds)
        return jobs

    return processor


@pytest.mark.parametrize("seconds, held", [(8, 2), (1 / 32, 0.02), (1 / 128, 1 / 128)])
def test_a_batch_waits_briefly_for_a_caller_that_is_about_to_return(
    seconds: float, held: float, clock: ManualClock
) -> None:
    caller = threading.get_ident()
    with Batcher(slow(clock, caller, seconds), clock=clock) as batcher:
        for job in range(2):
            batcher.submit(job).result(timeout=10)
        other = in_thread(lambda: batcher.submit("other").result(timeout=10))
        clock.wait_for_sleeper(2 * seconds + held)
        assert 2 == batcher.submit("back").result(timeout=10).batch.size
        assert 2 == other.result(timeout=10).batch.size


@pytest.mark.parametrize("key", [None, lambda job: None], ids=["without keys", "with a constant key"])
def test_a_caller_that_returns_at_once_is_expected_again_if_jobs_have_no_keys(
    key: Callable[[Any], Hashable] | None, clock: ManualClock
) -> None:
    recording = Recording()
    with Batcher(slow(clock, threading.get_ident()), recording, key=key, clock=clock) as batcher:
        for job in range(2):
            batcher.submit(job).result(timeout=10)
        assert [] == recording.expected
        in_thread(lambda: batcher.submit("other").result(timeout=10)).result(timeout=10)
    assert ([18.0] if key is None else []) == recording.expected


@pytest.mark.parametrize("whose", ["its own", "of another thread"])
def test_a_thread_that_waits_for_several_jobs_but_submits_no_more_is_not_expected(
    whose: str, clock: ManualClock
) -> None:
    recording, go_on = Recording(), threading.Semaphore(0)
    with ThreadPoolExecutor(1) as waiting:
        waiter = waiting.submit(threading.get_ident).result(timeout=10)
        serve = slow(clock, waiter)
        with Batcher(
            lambda jobs: serve(jobs) if go_on.acquire() else jobs, Size(1) | recording, clock=clock
        ) as batcher:

            def submit() -> list[JobFuture[Any]]:
                return [batcher.submit(job) for job in range(4)]

            futures = waiting.submit(submit).result(timeout=10) if whose == "its own" else submit()
            for future in futures:
                done = waiting.submit(future.result)
                go_on.release()
                done.result(timeout=10)
    assert [] == recording.expected


def test_after_a_batch_that_took_an_hour_no_job_waits_while_all_workers_are_idle(clock: ManualClock) -> None:
    seconds = [1.0, 3600.0]

    def processor(jobs: list[int]) -> list[int]:
        clock.advance(seconds.pop() if seconds else 0)
        return jobs

    with Batcher(processor, max_workers=4, clock=clock) as batcher:
        assert [0, 1, 2] == [batcher.submit(job).result(timeout=10).value for job in range(3)]


def test_natural_does_not_hold_a_batch_that_no_job_can_join() -> None:
    window = Window[Any](count=1, opened=10.0, newest=10.0, sent=[9.75], in_flight=3, workers=4, service_time=2.0)
    held = Window[Any](**{**vars(window), "callers": CallerActivity(1, 11.0)})
    assert [10.25, 10.5] == [Natural().due(each) for each in (window, held)]
    assert 10.0 == Natural().due(Window(**{**vars(held), "full": True}))


# -- AllWaiting: a batch is due when all of its callers wait --


def lingering(clock: ManualClock | None = None, **options: Any) -> Batcher[Any, Any]:
    return Batcher(list, Size(9) | AllWaiting(recent=0.5) | Interval(60), clock=clock, **options)


def has_waiter(future: JobFuture[Any]) -> bool:
    """Return whether a thread waits for the future."""
    return bool(future._attachments)


def test_the_batch_of_a_single_waiting_caller_does_not_linger() -> None:
    with lingering() as batcher:
        for job in range(3):
            result = batcher.submit(job).result(timeout=10)
            assert (1, "allwaiting") == (result.batch.size, result.batch.trigger)


def test_a_batch_is_dispatched_when_the_last_of_its_callers_begins_to_wait(clock: ManualClock) -> None:
    with lingering(clock) as batcher:
        mine = batcher.submit("mine")
        others = [in_thread(lambda: batcher.submit("another's").result(timeout=10)) for _ in range(2)]
        while batcher.stats().batched < 3 or not all(map(has_waiter, list(batcher._engine.ledger.unsettled())[1:])):
            pass
        clock.wait_for_sleeper(0.5)
        assert 0 == batcher.stats().batches
        assert 3 == mine.result(timeout=10).batch.size
        assert ["allwaiting"] * 2 == [other.result(timeout=10).batch.trigger for other in others]


@pytest.mark.parametrize("how", ["nobody waits", "wait()", "a callback"])
def test_a_batch_lingers_if_its_caller_does_not_block_in_result(how: str, clock: ManualClock) -> None:
    with lingering(clock) as batcher:
        future = batcher.submit("job")
        if how == "wait()":
            waiter = in_thread(lambda: wait([future], timeout=10))
            while future._waiters == []:
                pass
        if how == "a callback":
            future.add_done_callback(lambda future: None)
        clock.wait_for_sleeper(0.5)
        clock.advance(0.25)
        batcher.submit("another")
        clock.wait_for_sleeper(0.75)
        clock.advance(0.5)
        assert (2, "allwaiting") == (future.result(timeout=10).batch.size, future.result().batch.trigger)
        if how == "wait()":
            assert {future} == waiter.result(timeout=10).done


def test_a_caller_that_got_its_result_and_left_is_waited_for_no_longer_than_recent(clock: ManualClock) -> None:
    with lingering(clock) as batcher:
        batcher.submit("mine").result(timeout=10)
        late = in_thread(lambda: batcher.submit("late").result(timeout=10))
        clock.wait_for_sleeper(0.5)
        clock.advance(0.5)
        assert "allwaiting" == late.result(timeout=10).batch.trigger


def test_callers_are_remembered_for_jobs_with_keys_too() -> None:
    with lingering(key=str) as batcher:
        assert "allwaiting" == batcher.submit("job").result(timeout=10).batch.trigger
