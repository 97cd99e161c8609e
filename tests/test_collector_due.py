"""When an open batch becomes due: by its timer, by a flush or by a shutdown."""

from typing import Any

import pytest

from microbatch import NEVER, NOW, BatchingPolicy, CallerActivity, Interval, Natural, Size, Weight, Window
from tests.collectors import Job, collector, drop, jobs, take_all


def test_an_interval_runs_from_the_first_job_and_later_jobs_do_not_extend_it() -> None:
    c = collector(Interval(5))
    c.add(jobs("a", submitted=10))
    assert ([], 15) == (take_all(c, 10), c.next_moment())
    c.add(jobs("b", submitted=14))
    assert ([], 15) == (take_all(c, 14.9), c.next_moment())
    assert ["ab:interval"] == take_all(c, 15)


def test_a_batch_whose_due_time_has_passed_is_dispatched_at_once() -> None:
    c = collector(Interval(5))
    c.add(jobs("a", submitted=10))
    assert ["a:interval"] == take_all(c, 99)


def test_the_timer_of_a_dispatched_batch_does_not_dispatch_the_next_one() -> None:
    c = collector(Size(2) | Interval(5), workers=9)
    c.add(jobs("a"))
    assert ([], 5) == (take_all(c, 0), c.next_moment())
    c.add(jobs("b", submitted=3))
    assert ["ab:size"] == take_all(c, 3)
    c.add(jobs("c", submitted=4))
    assert ([], 9) == (take_all(c, 5), c.next_moment())
    assert ["c:interval"] == take_all(c, 9)


def test_each_open_batch_has_its_own_timer() -> None:
    c = collector(Interval(5), workers=9)
    for moment, key in enumerate("abc"):
        c.add([Job(key, key=key, submitted=moment)])
    assert [([], 5), (["a:interval"], 6), (["b:interval"], 7), (["c:interval"], NEVER)] == [
        (take_all(c, moment), c.next_moment()) for moment in (4, 5, 6, 7)
    ]


def test_every_one_of_many_timers_fires() -> None:
    c = collector(Interval(5), workers=1000)
    c.add([Job("a", key=key, submitted=key) for key in range(500)])
    for now in range(500):
        assert ([], now + 5) == (take_all(c, now + 4.9), c.next_moment())
        assert ["a:interval"] == take_all(c, now + 5)


def test_a_due_time_larger_than_any_float_becomes_never() -> None:
    class BeyondFloats(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return 10**400

    c = collector(BeyondFloats())
    c.add(jobs("a"))
    assert [] == take_all(c, 0)
    assert NEVER == c.next_moment()


@pytest.mark.parametrize("how", ["size", "interval", "flush", "pressed", "error"])
def test_counting_starts_again_after_a_batch_whatever_dispatched_it(how: str) -> None:
    class RaisingForError(Size):
        def due(self, window: Window[Any]) -> float:
            if "error" in window.jobs:
                raise KeyError
            return super().due(window)

    c = collector(RaisingForError(3) | Interval(5) if how != "pressed" else Size(3), workers=1)
    c.add([Job(each) for each in {"size": "abc", "error": ["a", "error"]}.get(how, "ab")])
    if how == "flush":
        c.flush(0)
    assert c.take(5 if how == "interval" else 0, pressed=how == "pressed") is not None
    c.add([Job("d", submitted=6, _epoch=1), Job("e", submitted=6, _epoch=1)])
    assert [] == take_all(c, 6)
    c.add([Job("f", submitted=6, _epoch=1)])
    assert ["def:raisingforerror" if how != "pressed" else "def:size"] == take_all(c, 6)


def test_while_no_worker_is_free_only_expiry_causes_a_wake_up() -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    take_all(c, 0)
    c.add(jobs("b", _expires=7))
    assert ([], 7) == (take_all(c, 0), c.next_moment())


@pytest.mark.parametrize("workers", [1, 1000])
def test_a_batch_that_will_be_due_causes_no_wake_up_while_all_workers_are_busy(workers: int) -> None:
    c = collector(Interval(5), workers)
    for _ in range(workers):
        c.started(0)
    c.add(jobs("a", submitted=1))
    assert ([], NEVER) == (take_all(c, 1), c.next_moment())
    assert ([], NEVER) == (take_all(c, 6), c.next_moment())
    c.finished()
    assert ["a:interval"] == take_all(c, 7)


@pytest.mark.parametrize("now", [2, 3])
def test_a_due_batch_that_takes_more_jobs_keeps_its_turn_for_a_worker(now: float) -> None:
    c = collector(Interval(1))
    c.started(0)
    c.add([Job("a", key="first", submitted=1), Job("b", key="second", submitted=1)])
    assert [] == take_all(c, now)
    c.add([Job("c", key="first", submitted=now)])
    assert [] == take_all(c, now)
    c.finished()
    assert ["ac:interval"] == take_all(c, now)


def test_a_batch_loses_its_turn_for_a_worker_if_its_policy_changes_its_mind() -> None:
    class Hesitant(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return NEVER if window.count == 2 else NOW

    c = collector(Hesitant())
    c.started(0)
    c.add(jobs("a"))
    assert [] == take_all(c, 0)
    c.add(jobs("b"))
    assert [] == take_all(c, 0)
    c.finished()
    assert [] == take_all(c, 0)
    c.add(jobs("c"))
    assert ["abc:hesitant"] == take_all(c, 0)


def test_a_flush_dispatches_the_earlier_jobs_within_the_limits() -> None:
    c = collector(Size(3), workers=9)
    c.add(jobs("abcd", _epoch=0))
    c.flush(0)
    assert ["abc:size", "d:flush"] == take_all(c, 0)
    c.add(jobs("e", _epoch=1))
    assert [] == take_all(c, 0)


def test_a_flush_makes_a_batch_due_at_once_with_all_jobs_that_have_joined_it() -> None:
    c = collector(Interval(10))
    c.add([*jobs("a", _epoch=1), *jobs("b", _epoch=3)])
    assert [] == take_all(c, 0)
    c.flush(2)
    assert ["ab:flush"] == take_all(c, 0)


@pytest.mark.parametrize("closing", [False, True], ids=["a flush", "a shutdown"])
def test_a_batch_that_was_due_anyway_keeps_its_reason(closing: bool) -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    c.flush(0, closing)
    assert ["a:interval"] == take_all(c, 0)


@pytest.mark.parametrize("earliest", [5.0, 9.0])
def test_a_flush_changes_nothing_if_it_would_not_make_the_batch_due_earlier(earliest: float) -> None:
    class Slow(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return 5.0

        def _earliest(self, window: Window[Any]) -> float:
            return earliest

    c = collector(Slow())
    c.add(jobs("a"))
    c.flush(0)
    assert [[], ["a:slow"]] == [take_all(c, 4), take_all(c, 5)]


def test_a_batch_follows_its_policy_again_once_its_flushed_jobs_are_dropped() -> None:
    c = collector(Size(9) & Natural() | Interval(5))
    c.in_flight = 1
    flushed, younger = Job("a", key="a"), Job("b", key="a", submitted=1.5, _epoch=1)
    c.add([flushed])
    assert [] == take_all(c, 0)
    c.flush(0)
    assert [] == take_all(c, 1)
    c.add([younger])
    drop(c, flushed)
    c.add([Job("c", key="c", submitted=1.5, _epoch=1)])
    assert [] == take_all(c, 1.5)
    c.finished()
    assert ["b:interval"] == take_all(c, 6.5)[:1]


def test_after_a_shutdown_every_batch_is_due() -> None:
    c = collector(Size(3), workers=9)
    c.add(jobs("a"))
    c.flush(-1, closing=True)
    assert ["a:shutdown"] == take_all(c, 0)
    c.add(jobs("bcde"))
    assert ["bcd:size", "e:shutdown"] == take_all(c, 0)


def test_neither_a_flush_nor_a_shutdown_creates_an_empty_batch() -> None:
    c = collector(Size(3))
    c.flush(0)
    c.flush(-1, closing=True)
    assert [] == take_all(c, 0, pressed=True)


def test_the_collector_wants_all_missing_jobs_together_if_the_policy_need_not_see_each_one() -> None:
    c = collector(Size(9) | Interval(0.005))
    assert 1 == c.wanted()
    c.add(jobs("a"), uniform=True)
    assert ([], 8) == (take_all(c, 0.0), c.wanted())
    c.add(jobs("bcd", submitted=0.001), uniform=True)
    assert ([], 5) == (take_all(c, 0.001), c.wanted())
    assert (["abcd:interval"], NEVER) == (take_all(c, 0.005), c.wanted())


@pytest.mark.parametrize("returning, wanted", [(64, 56), (7, 7)])
def test_the_collector_wants_most_of_the_missing_callers_before_it_asks_the_policy_again(
    returning: int, wanted: int
) -> None:
    c = collector(Natural())
    c.started(0.0)
    c.finished(0.008)
    c.note_callers(CallerActivity(returning=returning, return_by=0.005))
    c.add(jobs("a"), uniform=True)
    assert ([], wanted) == (take_all(c, 0.0), c.wanted())


@pytest.mark.parametrize("policy, wanted", [(Interval(0.005), NEVER), (Weight(9) | Interval(0.005), 1)])
def test_the_collector_wants_more_jobs_only_if_the_policy_may_find_the_batch_full(
    policy: BatchingPolicy[Any], wanted: float
) -> None:
    c = collector(policy)
    c.add(jobs("a"), uniform=True)
    assert ([], wanted) == (take_all(c, 0.0), c.wanted())


def test_the_collector_wants_each_job_at_once_if_the_policy_is_not_a_built_in_one() -> None:
    class Custom(Interval):
        def due(self, window: Window[object]) -> float:
            return super().due(window)

    c = collector(Size(9) | Custom(0.005))
    c.add(jobs("a"), uniform=True)
    assert ([], 1) == (take_all(c, 0.0), c.wanted())


@pytest.mark.parametrize("case", ["far off", "of a key", "one of two"])
def test_the_collector_wants_each_job_at_once_if_its_timer_is_far_off_or_jobs_have_keys(case: str) -> None:
    c = collector(Size(9) | Interval(1 if case == "far off" else 0.005))
    c.add(jobs("a", key=1 if case == "of a key" else None), uniform=case != "of a key")
    if case == "one of two":
        c.add(jobs("b", key=2))
    assert ([], 1) == (take_all(c, 0.0), c.wanted())


def test_the_collector_wants_each_job_at_once_after_a_job_that_may_expire() -> None:
    c = collector(Size(4) | Interval(60))
    c.add(jobs("a"), uniform=True)
    assert [] == take_all(c, 0)
    c.add(jobs("b", 59.995), uniform=True)
    assert ([], 2) == (take_all(c, 59.995), c.wanted())
    c.add(jobs("c", 59.996, _expires=99.0))
    assert ([], 1) == (take_all(c, 59.996), c.wanted())
