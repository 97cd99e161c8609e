"""The test doubles for users' own tests."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor


def sleeper(clock: ManualClock, moment: float) -> "Future[float]":
    condition, woken = threading.Condition(), Future[float]()

    def sleep() -> None:
        with condition:
            clock.wait_until(condition, moment)
        woken.set_result(clock.now())

    threading.Thread(target=sleep).start()
    return woken


def test_a_manual_clock_stands_still_until_it_is_advanced() -> None:
    clock = ManualClock(start=3)
    assert 3.0 == clock.now()
    clock.advance(1.5)
    assert 4.5 == clock.now()


def test_a_manual_clock_wakes_only_the_threads_whose_moment_has_come(clock: ManualClock) -> None:
    early, late = sleeper(clock, 5.0), sleeper(clock, 9.0)
    clock.wait_for_sleeper(5.0)
    clock.wait_for_sleeper(9.0)
    clock.advance(5)
    assert 5.0 == early.result(timeout=10)
    assert not late.done()
    clock.advance(100)
    assert 105.0 == late.result(timeout=10)


def test_no_thread_sleeps_until_a_moment_in_the_past(clock: ManualClock) -> None:
    clock.advance(5)
    assert 5.0 == sleeper(clock, 5.0).result(timeout=10)


def test_the_error_for_a_missing_sleeper_lists_the_moments_that_threads_wait_for(clock: ManualClock) -> None:
    woken = sleeper(clock, 9.0)
    clock.wait_for_sleeper(9.0)
    with pytest.raises(TimeoutError, match=r"^no thread waits for moment 8.0, only for 9.0$"):
        clock.wait_for_sleeper(8.0, timeout=0)
    clock.advance(9)
    woken.result(timeout=10)


def test_an_inline_executor_runs_the_call_in_the_thread_that_submits_it() -> None:
    future = InlineExecutor().submit(threading.current_thread)
    assert threading.current_thread() is future.result(timeout=0)


def test_an_inline_executor_passes_arguments_and_stores_exceptions() -> None:
    executor = InlineExecutor()
    assert 255 == executor.submit(int, "ff", base=16).result(timeout=0)
    assert isinstance(executor.submit(int, "x").exception(timeout=0), ValueError)


def test_a_recording_processor_records_batches_and_by_default_returns_the_jobs() -> None:
    processor = RecordingProcessor[str]()
    jobs = ["a", "b"]
    assert ["a", "b"] == processor(jobs)
    jobs.clear()
    assert [["a", "b"]] == processor.batches == processor.wait_for_batches(1)


def test_a_recording_processor_returns_the_results_of_its_function() -> None:
    assert [2, 4] == RecordingProcessor[int](lambda job: job * 2)([1, 2])


def test_a_recording_processor_holds_until_it_is_released() -> None:
    processor, done = RecordingProcessor[str](), Future[Any]()
    processor.hold()
    threading.Thread(target=lambda: done.set_result(processor(["a"]))).start()
    processor.wait_for_batches(1)
    assert not done.done()
    processor.release()
    assert ["a"] == done.result(timeout=10)


def test_wait_for_batches_raises_after_its_timeout() -> None:
    with pytest.raises(TimeoutError, match="expected 1 batches within 0 s, got 0"):
        RecordingProcessor[str]().wait_for_batches(1, timeout=0)
