"""What a batcher says of itself."""

import threading
from typing import Any

from microbatch import NOW, Batcher, BatchingPolicy, Interval, JobState, Size, Window
from microbatch.testing import ManualClock, RecordingProcessor


def test_an_unused_batcher_says_so() -> None:
    with Batcher[str, str](list, Size(3), name="rows") as batcher:
        expected = [
            "<Batcher 'rows' with Size(3)>",
            "jobs: 0 queued, 0 batched, 0 running of 0; the oldest has waited for 0.000 s",
        ]
        assert [*expected, "batches: 0"] == batcher.explain().splitlines()


def test_it_says_when_each_open_batch_is_due_and_by_which_policy() -> None:
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


def test_it_says_what_a_batch_waits_for() -> None:
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


def test_it_says_that_only_more_jobs_can_help() -> None:
    with Batcher[str, str](list, Size(2)) as batcher:
        future = batcher.submit("job")
        while future.state is not JobState.BATCHED:
            pass
        assert "open batch: 1 job, not due until more comes" in batcher.explain()


def test_it_answers_while_a_policy_is_being_asked() -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            asked.set()
            go_on.wait()
            return NOW

    with Batcher[str, str](list, Slow()) as batcher:
        batcher.submit("job")
        asked.wait()
        assert "open batch: 1 job, not due until more comes" in batcher.explain()
        go_on.set()


def test_it_does_without_a_reason_that_raises() -> None:
    clock = ManualClock()

    class Mute(Interval):
        def reason(self, window: Window[Any]) -> str:
            raise OSError("no")

    with Batcher[str, str](list, Mute(7), clock=clock) as batcher:
        future = batcher.submit("job")
        clock.wait_for_sleeper(7)
        assert "open batch: 1 job, due in 7.000 s by its policy" in batcher.explain()
        future.cancel()
