"""Whom a batch waits for, and for how long."""

from typing import Any, List

from microbatch import Batcher, Natural, Window
from microbatch.testing import ManualClock


def test_after_a_batch_of_an_hour_no_job_waits_while_all_workers_are_idle(clock: ManualClock) -> None:
    seconds = [1.0, 3600.0]

    def processor(jobs: List[int]) -> List[int]:
        clock.advance(seconds.pop() if seconds else 0)
        return jobs

    with Batcher(processor, max_workers=4, clock=clock) as batcher:
        assert [0, 1, 2] == [batcher.submit(job).result(timeout=10).value for job in range(3)]


def test_a_batch_that_nobody_can_join_is_not_held_by_natural() -> None:
    window = Window[Any](count=1, opened=10.0, newest=10.0, sent=[9.75], in_flight=3, workers=4, service_time=2.0)
    held = Window[Any](**{**vars(window), "returning": [11.0]})
    assert [10.25, 10.5] == [Natural().due(each) for each in (window, held)]
    assert 10.0 == Natural().due(Window(**{**vars(held), "full": True}))
