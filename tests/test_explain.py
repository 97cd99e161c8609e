"""`explain()` and timeout errors say why a job still waits."""

import threading
from concurrent.futures import TimeoutError
from typing import Any

import pytest

from microbatch import NOW, Batcher, BatchingPolicy, Interval, JobFuture, JobState, Size, Window
from microbatch.testing import ManualClock, RecordingProcessor


def test_an_unused_batcher_has_no_jobs_and_no_batches_to_explain() -> None:
    with Batcher[str, str](list, Size(3), name="rows") as batcher:
        expected = [
            "<Batcher 'rows' with Size(3)>",
            "jobs: 0 queued, 0 batched, 0 running of 0; the oldest has waited for 0.000 s",
        ]
        assert [*expected, "batches: 0"] == batcher.explain().splitlines()


def test_explain_says_when_each_open_batch_is_due_and_by_which_policy() -> None:
    clock = ManualClock()
    with Batcher[str, str](list, Size(3) | Interval(0.5), key=str.lower, clock=clock) as batcher:
        batcher.submit("a")
        clock.wait_for_sleeper(0.5)
        clock.advance(0.125)
        batcher.submit("B")
        batcher.submit("A")
        while batcher.stats().batched < 3:
            pass
        assert [
            "jobs: 0 queued, 3 batched, 0 running of 3; the oldest has waited for 0.125 s",
            "open batch of key 'a': 2 jobs, due in 0.375 s by interval",
            "open batch of key 'b': 1 job, due in 0.500 s by interval",
            "batches: 0",
        ] == batcher.explain().splitlines()[1:]


def test_explain_says_what_a_batch_waits_for() -> None:
    processor = RecordingProcessor[str]()
    processor.hold()
    with Batcher(processor, Size(1) | Interval(9), max_pending=0) as batcher:
        futures = [batcher.submit("job") for _ in range(3)]
        processor.wait_for_batches(1)
        batcher.flush(wait=False)
        while futures[1].state is not JobState.BATCHED:
            pass
        assert (
            "open batch: 1 job, due by size, and waits for a free worker; 1 job behind it that did not fit"
            in batcher.explain()
        )
        processor.release()
    last = batcher.explain().splitlines()
    assert last[0].endswith("with Size(1) | Interval(9)>, shut down") and "batches: 3 (size 3)" == last[-1]


def test_explain_says_that_a_batch_is_not_due_until_more_jobs_come() -> None:
    with Batcher[str, str](list, Size(2)) as batcher:
        future = batcher.submit("job")
        while future.state is not JobState.BATCHED:
            pass
        way_out = "flush() dispatches it, and Size(2) | Interval(seconds) would bound the wait"
        expected = f"open batch: 1 job, not due until more jobs come, however long that takes: {way_out}"
        assert expected in batcher.explain()
        with pytest.raises(TimeoutError) as caught:
            future.result(timeout=0)
        assert f"the job is still batched; {expected}" == str(caught.value)


def test_a_timeout_error_says_why_the_job_still_waits(processor: RecordingProcessor[str]) -> None:
    clock = ManualClock()
    with Batcher[str, str](processor, Size(2) | Interval(9), clock=clock) as batcher:

        def why(future: JobFuture[str]) -> str:
            with pytest.raises(TimeoutError) as caught:
                future.exception(timeout=0)
            return str(caught.value)

        running, _, waiting = [batcher.submit(job) for job in ("a", "b", "c")]
        processor.wait_for_batches(1)
        while waiting.state is not JobState.BATCHED:
            pass
        assert "the job is still running" == why(running)
        assert "the job is still batched; open batch: 1 job, due in 9.000 s by interval" == why(waiting)
        batcher.flush(wait=False)
        while "free worker" not in why(waiting):
            pass
        assert "the job is still batched; open batch: 1 job, due by flush, and waits for a free worker" == why(waiting)
        processor.release()


def test_explain_answers_while_a_policy_is_being_asked() -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            asked.set()
            go_on.wait()
            return NOW

    with Batcher[str, str](list, Slow()) as batcher:
        batcher.submit("job")
        asked.wait()
        assert "open batch: 1 job, not due until more jobs come" in batcher.explain()
        go_on.set()


def test_explain_leaves_out_a_reason_that_raises() -> None:
    clock = ManualClock()

    class Mute(Interval):
        def reason(self, window: Window[Any]) -> str:
            raise OSError("no")

    with Batcher[str, str](list, Mute(7), clock=clock) as batcher:
        future = batcher.submit("job")
        clock.wait_for_sleeper(7)
        assert "open batch: 1 job, due in 7.000 s by its policy" in batcher.explain()
        future.cancel()
