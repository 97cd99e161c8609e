"""The collector forms batches within their limits and in order. It is tested alone: no thread, no lock, no clock."""

from typing import Any

import pytest

from microbatch import (
    NEVER,
    NOW,
    Adaptive,
    BatchInfo,
    BatchingPolicy,
    BatchReport,
    Interval,
    Natural,
    Rate,
    Size,
    Window,
)
from microbatch._forming.collector import Batch, Collector
from tests.collectors import Broken, Job, Light, Wavering, collector, drop, jobs, take_all


def test_a_full_batch_is_dispatched_and_the_other_jobs_wait() -> None:
    c = collector(Size(3), workers=9)
    c.add(jobs("abcdefgh"))
    assert ["abc:size", "def:size"] == take_all(c, 0)
    assert NEVER == c.next_moment()
    c.add(jobs("i"))
    assert ["ghi:size"] == take_all(c, 0)
    assert not c


def test_a_due_batch_without_a_free_worker_takes_more_jobs_up_to_its_limit() -> None:
    c = collector(Size(3) | Interval(0))
    c.add(jobs("a"))
    assert ["a:interval"] == take_all(c, 0)
    for job in jobs("bcde", submitted=1):
        c.add([job])
        assert [] == take_all(c, 1)
    assert NEVER == c.next_moment()  # no need to wake up for a due batch before a worker is free
    c.finished()
    assert ["bcd:size"] == take_all(c, 2)
    c.finished()
    assert ["e:interval"] == take_all(c, 3)


def test_a_full_batch_is_dispatched_even_if_its_policy_is_never_due() -> None:
    c = collector(Light(), workers=9)
    c.add([Job("a", weight=6), Job("b", weight=4)])
    assert [] == take_all(c, 0)
    c.add([Job("c", weight=1)])
    assert ["ab:light"] == take_all(c, 0)


def test_a_full_batch_is_not_dispatched_before_its_policy_is_due() -> None:
    c = collector(Light() | Interval(5))
    c.add([Job("a", weight=6), Job("b", weight=6)])
    assert ([], 5) == (take_all(c, 4.9), c.next_moment())
    assert ["a:interval"] == take_all(c, 5)


def test_a_policy_sees_that_no_more_jobs_can_join() -> None:
    class WhenFull(Light):
        def due(self, window: Window[Any]) -> float:
            return window.opened + (1 if window.full else 2)

    c = collector(WhenFull())
    c.add([Job("a", weight=6), Job("b", weight=6)])
    assert ([], 1) == (take_all(c, 0), c.next_moment())


def test_no_job_overtakes_one_that_did_not_fit() -> None:
    c = collector(Light(), workers=9)
    c.add([Job("a", weight=6), Job("b", weight=6), Job("c", weight=1)])
    assert ["a:light"] == take_all(c, 0)
    c.flush(0)
    assert ["bc:flush"] == take_all(c, 0)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_room_is_called_once_for_all_jobs_that_fit_and_then_fits_once(size: int) -> None:
    asked: list[Any] = []

    class Roomy(Size):
        def _room(self, window: Window[Any]) -> float:
            asked.append(window.count)
            return super()._room(window)

        def fits(self, window: Window[Any], weight: float) -> bool:
            asked.append("fits")
            return super().fits(window, weight)

    c = collector(Roomy(size), workers=1)
    c.add(jobs("a" * (size + 1)))
    assert ["a" * size + ":roomy"] == take_all(c, 0)
    assert [0, size, "fits", 0] == asked


def test_fits_is_not_called_if_room_covers_all_jobs() -> None:
    class Roomy(Size):
        def fits(self, window: Window[Any], weight: float) -> bool:
            raise AssertionError

        def _room(self, window: Window[Any]) -> float:
            return super()._room(window)

    c = collector(Roomy(5), workers=9)
    c.add(jobs("abcde"))
    assert ["abcde:roomy"] == take_all(c, 0)


def test_the_collector_counts_the_jobs_in_open_batches_and_knows_which_they_are() -> None:
    c, (a, b, d) = collector(Size(2)), jobs("abd")
    c.add([a, b, d])
    assert c.take(0) is not None
    assert (0, False, False) == (c.batched, c.is_open(a), c.is_open(d))
    assert c.take(0) is None
    assert (1, False, True) == (c.batched, c.is_open(a), c.is_open(d))
    drop(c, d)
    assert c.take(0) is None
    assert (0, False) == (c.batched, c.is_open(d))


def test_the_window_describes_the_open_batch_and_the_recent_batches() -> None:
    seen: list[Window[Any]] = []

    class Watching(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            seen.append(window)
            return NOW

    c = Collector[Job](Watching(), 3, started=4.0)
    c.add([Job("a", key="k", weight=2.0, submitted=5.0), Job("b", key="k", weight=0.5, submitted=6.0)])
    take_all(c, 7.0)
    window = seen[0]
    assert (2, 2.5, 5.0, 6.0) == (window.count, window.weight, window.opened, window.newest)
    assert ("k", 0, 3, 4.0, False) == (window.key, window.in_flight, window.workers, window.started, window.full)
    assert ["a", "b"] == list(window.jobs)
    assert ("b", ("a",), 2, "('a', 'b')") == (window.jobs[-1], window.jobs[:1], len(window.jobs), repr(window.jobs))
    c.add([Job("c", submitted=8.0)])
    take_all(c, 8.0)
    assert (1, [7.0]) == (seen[-1].in_flight, list(seen[-1].sent)[:1])


def test_a_batch_takes_as_many_jobs_at_once_as_adaptive_currently_allows() -> None:
    policy = Adaptive(1.0, warm_up=0)
    c = collector(policy | Natural())
    c.add([Job(number) for number in range(100)])
    sizes = []
    while (batch := c.take(0)) is not None:
        size = len(batch.entries)
        sizes.append(size)
        c.started(0)
        assert c.take(0) is None
        c.finished(0.001)
        policy.observe(BatchReport(BatchInfo(1, size, size, None, ""), 0.001 * size, 0))
    assert [1, 2, 4, 8, 16] == sizes[:5]


def test_a_collector_is_empty_once_all_jobs_have_left_even_if_their_batches_failed() -> None:
    c = collector(Broken(), workers=9)
    assert not c
    c.add([Job("a", key=1), Job("bad", key=2), Job("bad", key=3)])
    for key in (2, 3):
        batch = c.take(0)
        assert c and batch is not None
        assert (key, ["bad"]) == (batch.key, [entry.job for entry in batch.entries])
    assert ["a:broken"] == take_all(c, 1)
    assert not c
    c.add([Job("bad", key=4), Job("bad", key=5)])
    assert c.take(1) is not None
    assert c  # the other job is still there


@pytest.mark.parametrize(
    "policy, now, words",
    [
        (Interval(5), 4, "due in 1.000 s by interval"),
        (Interval(5), 5, "due by interval, and waits for a free worker"),
        (Wavering(), 4, "not due until more jobs come, however long that takes"),
    ],
)
def test_describe_says_what_an_open_batch_waits_for(policy: BatchingPolicy[Any], now: float, words: str) -> None:
    c = collector(policy)
    c.started(0)
    for job in jobs("ab"):
        c.add([job])
        assert [] == take_all(c, now)
    (described,) = c.describe(now)
    assert f"open batch: 2 jobs, {words}" == described.partition(": flush()")[0]
    assert described == c.describe_batch(None, now)
    assert "" == c.describe_batch("another key", now)


def test_a_blocked_submit_makes_the_oldest_lane_due() -> None:
    c = collector(Size(3), workers=1)
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=1)])
    assert [] == take_all(c, 0)
    assert ["ac:flush"] == take_all(c, 0, pressed=True)


def test_no_batch_is_due_early_without_a_blocked_submit() -> None:
    c = collector(Size(3))
    c.add(jobs("a"))
    assert c.take(0) is None


def first_of(collector: Collector[Job], pressed: bool) -> Batch:
    batch = collector.take(0, pressed)
    assert batch is not None
    return batch


def test_a_blocked_submit_makes_the_oldest_batch_due_before_its_timer() -> None:
    c = collector(Size(3) | Interval(5), workers=9)
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=1)])
    assert ([], 5) == (take_all(c, 0), c.next_moment())
    assert ["a", "c"] == [entry.job for entry in first_of(c, pressed=True).entries]
    c.started(0)
    assert ([], 5) == (take_all(c, 0), c.next_moment())


def test_a_blocked_submit_makes_no_batch_due_before_the_rate_limit_allows_it() -> None:
    c = collector(Size(9) & Rate(1, per=60), workers=9)
    c.add(jobs("a"))
    assert ["a:flush"] == take_all(c, 10.0, pressed=True)
    c.add(jobs("b"))
    assert ([], 70.0) == (take_all(c, 10.0, pressed=True), c.next_moment())
    assert ["b:flush"] == take_all(c, 70.0)


def test_a_blocked_submit_changes_nothing_if_a_batch_is_due_or_all_workers_are_busy() -> None:
    c = collector(Size(2) | Interval(5))
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=2)])
    assert ["bc:size"] == take_all(c, 0, pressed=True)
    assert [] == take_all(c, 0, pressed=True)
    c.finished()
    assert ["a:interval"] == take_all(c, 5)
