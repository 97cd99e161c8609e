"""The collector alone: no thread, no lock, no clock. Moments are plain numbers."""

import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from microbatch import (
    NEVER,
    NOW,
    Adaptive,
    AllWaiting,
    BatchInfo,
    BatchingPolicy,
    BatchReport,
    CallerActivity,
    Hints,
    Interval,
    JobTooLarge,
    Natural,
    Rate,
    Session,
    Size,
    Window,
)
from microbatch._forming.collector import Batch, Collector


@dataclass(eq=False)
class Job:
    job: Any
    key: Hashable = None
    weight: float = 1.0
    submitted: float = 0.0
    _expires: float = NEVER
    _epoch: int = 0
    _is_waiting: bool = True


class Light(BatchingPolicy[Any]):
    """At most 10 in weight, and never due: only what is full goes."""

    def due(self, window: Window[Any]) -> float:
        return float("inf")  # which is not the object NEVER

    def fits(self, window: Window[Any], weight: float) -> bool:
        return window.weight + weight <= 10


class Wavering(BatchingPolicy[Any]):
    """Due soon, then never, then now."""

    def due(self, window: Window[Any]) -> float:
        return {1: window.opened + 5, 2: float("inf"), 3: NOW}[window.count]


class Idle(BatchingPolicy[Any]):
    """Due while nothing else runs."""

    def due(self, window: Window[Any]) -> float:
        return NOW if window.in_flight == 0 else NEVER


class Broken(BatchingPolicy[Any]):
    def due(self, window: Window[Any]) -> float:
        if "bad" in window.jobs:
            raise KeyError("bad")
        return window.opened + 1


def collector(policy: BatchingPolicy[Any], workers: int = 1) -> Collector[Job]:
    return Collector(policy, workers, started=0.0)


def jobs(text: str, submitted: float = 0.0, **options: Any) -> list[Job]:
    return [Job(letter, submitted=submitted, **options) for letter in text]


def withdraw(collector: Collector[Job], job: Job) -> None:
    job._is_waiting = False
    collector.drop([job])


def take_all(collector: Collector[Job], now: float, pressed: bool = False) -> list[str]:
    """Take every batch that may go, all at once running, as ``jobs:trigger``."""
    taken = []
    while (batch := collector.take(now, pressed)) is not None:
        assert batch.error is None
        collector.started(now)
        taken.append("".join(entry.job for entry in batch.entries) + ":" + batch.trigger)
    return taken


def test_a_batch_goes_when_it_is_full_and_the_rest_waits() -> None:
    c = collector(Size(3), workers=9)
    c.add(jobs("abcdefgh"))
    assert ["abc:size", "def:size"] == take_all(c, 0)
    assert NEVER == c.next_moment()
    c.add(jobs("i"))
    assert ["ghi:size"] == take_all(c, 0)
    assert not c


def test_an_interval_counts_from_the_first_job_and_later_ones_do_not_push_it_back() -> None:
    c = collector(Interval(5))
    c.add(jobs("a", submitted=10))
    assert ([], 15) == (take_all(c, 10), c.next_moment())
    c.add(jobs("b", submitted=14))
    assert ([], 15) == (take_all(c, 14.9), c.next_moment())
    assert ["ab:interval"] == take_all(c, 15)


def test_a_moment_in_the_past_is_now() -> None:
    c = collector(Interval(5))
    c.add(jobs("a", submitted=10))
    assert ["a:interval"] == take_all(c, 99)


def test_the_timer_of_a_batch_that_went_does_not_send_the_next_one() -> None:
    c = collector(Size(2) | Interval(5), workers=9)
    c.add(jobs("a"))
    assert ([], 5) == (take_all(c, 0), c.next_moment())
    c.add(jobs("b", submitted=3))
    assert ["ab:size"] == take_all(c, 3)
    c.add(jobs("c", submitted=4))
    assert ([], 9) == (take_all(c, 5), c.next_moment())
    assert ["c:interval"] == take_all(c, 9)


def test_each_open_batch_has_a_timer_of_its_own() -> None:
    c = collector(Interval(5), workers=9)
    for moment, key in enumerate("abc"):
        c.add([Job(key, key=key, submitted=moment)])
    assert [([], 5), (["a:interval"], 6), (["b:interval"], 7), (["c:interval"], NEVER)] == [
        (take_all(c, moment), c.next_moment()) for moment in (4, 5, 6, 7)
    ]


@pytest.mark.parametrize("how", ["size", "interval", "flush", "pressed", "error"])
def test_counting_begins_anew_after_whatever_made_a_batch_go(how: str) -> None:
    class Grumbling(Size):
        def due(self, window: Window[Any]) -> float:
            if "error" in window.jobs:
                raise KeyError
            return super().due(window)

    c = collector(Grumbling(3) | Interval(5) if how != "pressed" else Size(3), workers=1)
    c.add([Job(each) for each in {"size": "abc", "error": ["a", "error"]}.get(how, "ab")])
    if how == "flush":
        c.flush(0)
    assert c.take(5 if how == "interval" else 0, pressed=how == "pressed") is not None
    c.add([Job("d", submitted=6, _epoch=1), Job("e", submitted=6, _epoch=1)])
    assert [] == take_all(c, 6)
    c.add([Job("f", submitted=6, _epoch=1)])
    assert ["def:grumbling" if how != "pressed" else "def:size"] == take_all(c, 6)


def test_a_due_batch_without_a_free_worker_takes_more_jobs_up_to_its_limit() -> None:
    c = collector(Size(3) | Interval(0))
    c.add(jobs("a"))
    assert ["a:interval"] == take_all(c, 0)
    for job in jobs("bcde", submitted=1):
        c.add([job])
        assert [] == take_all(c, 1)
    assert NEVER == c.next_moment()  # a due batch is no reason to wake up before a worker is free
    c.finished()
    assert ["bcd:size"] == take_all(c, 2)
    c.finished()
    assert ["e:interval"] == take_all(c, 3)


def test_a_full_batch_that_its_policy_would_never_send_goes() -> None:
    c = collector(Light(), workers=9)
    c.add([Job("a", weight=6), Job("b", weight=4)])
    assert [] == take_all(c, 0)
    c.add([Job("c", weight=1)])
    assert ["ab:light"] == take_all(c, 0)


def test_no_job_overtakes_one_that_did_not_fit() -> None:
    c = collector(Light(), workers=9)
    c.add([Job("a", weight=6), Job("b", weight=6), Job("c", weight=1)])
    assert ["a:light"] == take_all(c, 0)
    c.flush(0)
    assert ["bc:flush"] == take_all(c, 0)


def test_full_is_lifted_when_the_job_that_did_not_fit_is_withdrawn() -> None:
    c = collector(Light() | Interval(5))
    heavy, light = Job("b", weight=6), Job("c", weight=1)
    c.add([Job("a", weight=6), heavy, light])
    withdraw(c, heavy)
    assert ["ac:interval"] == take_all(c, 5)


def test_jobs_of_unequal_keys_never_share_a_batch() -> None:
    c = collector(Size(2), workers=9)
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=1), Job("d", key=2), Job("e", key=3)])
    assert ["ac:size", "bd:size"] == take_all(c, 0)


def test_a_key_without_jobs_costs_nothing() -> None:
    c = collector(Size(1), workers=1000)
    c.add([Job("a", key=key) for key in range(500)])
    assert 500 == len(take_all(c, 0))
    assert not c
    assert {} == c._lanes


def test_a_busy_key_does_not_starve_the_others() -> None:
    c = collector(Size(2) | Interval(1))
    c.add([Job("q", key="quiet")])
    taken = []
    for now in range(1, 5):
        c.add([Job("b", key="busy", submitted=now) for _ in range(4)])
        taken += take_all(c, now)
        c.finished()
    assert "q:interval" in taken[:2]


def test_no_moment_is_given_before_a_worker_is_free_but_for_expiry() -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    take_all(c, 0)
    c.add(jobs("b", _expires=7))
    assert ([], 7) == (take_all(c, 0), c.next_moment())


def test_expired_jobs_are_given_at_their_moment_and_leave_their_batch() -> None:
    c = collector(Interval(10))
    early, late = Job("a", _expires=3), Job("b", submitted=1)
    c.add([early, late])
    assert ([], 3) == (take_all(c, 0), c.next_moment())
    assert [] == c.expire(2.9)
    assert [early] == c.expire(3)
    withdraw(c, early)
    assert ([], 11) == (take_all(c, 3), c.next_moment())
    assert ["b:interval"] == take_all(c, 11)


def test_a_withdrawn_job_makes_room_in_its_batch() -> None:
    c = collector(Size(2))
    first, *others = jobs("abc")
    c.add([first])
    assert [] == take_all(c, 0)
    withdraw(c, first)
    c.add([others[0]])
    assert [] == take_all(c, 0)
    c.add([others[1]])
    assert ["bc:size"] == take_all(c, 0)


def test_a_job_that_is_withdrawn_behind_a_full_batch_leaves_its_place_to_the_next() -> None:
    c = collector(Size(2))
    c.add(letters := jobs("abcdefg"))
    assert ["ab:size"] == take_all(c, 0)
    withdraw(c, letters[5])
    for batch in ("cd:size", "eg:size"):
        c.finished()
        assert [batch] == take_all(c, 0)


def test_jobs_may_have_stopped_to_wait_before_that_is_said() -> None:
    c = collector(Size(1))
    c.started(0)
    c.add(letters := jobs("abcde"))
    for job in letters[1:]:
        job._is_waiting = False
    for said in (letters[1:2], letters[2:]):
        c.drop(said)
        assert [] == take_all(c, 0)
    c.finished()
    assert ["a:size"] == take_all(c, 0)
    assert not c


def test_a_lane_of_withdrawn_jobs_only_is_no_batch() -> None:
    c = collector(Interval(0))
    (job,) = jobs("a")
    c.add([job])
    job._is_waiting = False
    c.drop([job])
    assert [] == take_all(c, 0)
    assert not c


def test_a_batch_whose_jobs_are_all_withdrawn_while_it_is_due_is_no_batch() -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    take_all(c, 0)
    (job,) = jobs("b")
    c.add([job])
    assert [] == take_all(c, 0)
    withdraw(c, job)
    c.finished()
    assert [] == take_all(c, 0)
    assert (False, NEVER) == (bool(c), c.next_moment())


def test_a_flush_sends_what_came_before_it_within_the_limits() -> None:
    c = collector(Size(3), workers=9)
    c.add(jobs("abcd", _epoch=0))
    c.flush(0)
    assert ["abc:size", "d:flush"] == take_all(c, 0)
    c.add(jobs("e", _epoch=1))
    assert [] == take_all(c, 0)


def test_a_flush_brings_forward_a_batch_that_is_due_later_with_all_that_has_joined_it() -> None:
    c = collector(Interval(10))
    c.add([*jobs("a", _epoch=1), *jobs("b", _epoch=3)])
    assert [] == take_all(c, 0)
    c.flush(2)
    assert ["ab:flush"] == take_all(c, 0)


@pytest.mark.parametrize("closing", [False, True], ids=["a flush", "a shutdown"])
def test_a_batch_that_was_due_anyway_keeps_its_reason_through(closing: bool) -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    c.flush(0, closing)
    assert ["a:interval"] == take_all(c, 0)


@pytest.mark.parametrize("earliest", [5.0, 9.0])
def test_a_flush_changes_nothing_for_a_batch_that_is_due_no_later_by_itself(earliest: float) -> None:
    class Slow(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return 5.0

        def _earliest(self, window: Window[Any]) -> float:
            return earliest

    c = collector(Slow())
    c.add(jobs("a"))
    c.flush(0)
    assert [[], ["a:slow"]] == [take_all(c, 4), take_all(c, 5)]


def test_after_close_everything_is_due() -> None:
    c = collector(Size(3), workers=9)
    c.add(jobs("a"))
    c.flush(-1, closing=True)
    assert ["a:shutdown"] == take_all(c, 0)
    c.add(jobs("bcde"))
    assert ["bcd:size", "e:shutdown"] == take_all(c, 0)


def test_neither_flush_nor_close_makes_an_empty_batch() -> None:
    c = collector(Size(3))
    c.flush(0)
    c.flush(-1, closing=True)
    assert [] == take_all(c, 0, pressed=True)


def test_when_nothing_more_can_come_the_oldest_lane_goes_first() -> None:
    c = collector(Size(3), workers=1)
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=1)])
    assert [] == take_all(c, 0)
    assert ["ac:flush"] == take_all(c, 0, pressed=True)


def test_a_policy_that_watches_the_flow_is_asked_again_when_a_batch_ends() -> None:
    c = collector(Idle(), workers=4)
    c.add(jobs("a"))
    assert ["a:idle"] == take_all(c, 0)
    c.add(jobs("b"))
    assert [] == take_all(c, 0)
    c.finished()
    assert ["b:idle"] == take_all(c, 0)


def test_a_rate_is_kept_by_all_keys_together() -> None:
    c = collector(Size(1) & Rate(2, per=60), workers=9)
    c.add([Job(letter, key=letter) for letter in "abcde"])
    assert ["a:size & rate", "b:size & rate"] == take_all(c, 10.0)
    assert (60 + 10.0, []) == (c.next_moment(), take_all(c, 69.9))
    assert ["c:size & rate", "d:size & rate"] == take_all(c, 70.0)


def test_a_rate_above_the_usual_memory_is_kept() -> None:
    c = collector(Size(1) & Rate(2_000, per=60), workers=9_999)
    c.add(jobs("a" * 3_000))
    assert 2_000 == len(take_all(c, 10.0))
    assert 1_000 == len(take_all(c, 70.0))


def test_a_flush_keeps_to_a_rate_and_a_shutdown_does_not() -> None:
    c = collector(Size(9) & Rate(1, per=60), workers=9)
    c.add(jobs("ab"))
    c.flush(0)
    assert ["ab:flush"] == take_all(c, 10.0)
    c.add(jobs("c", _epoch=1))
    c.flush(1)
    assert ([], 70.0) == (take_all(c, 69.9), c.next_moment())
    assert ["c:flush"] == take_all(c, 70.0)
    c.add(jobs("d", _epoch=2))
    c.flush(1, closing=True)
    assert ["d:shutdown"] == take_all(c, 70.1)


def test_who_is_held_back_by_another_start_is_asked_again_when_its_turn_comes() -> None:
    c = collector(Natural(), workers=2)
    c.finished(4.0)  # of one of old
    c.started(0.0)
    c.add([Job("a", key="a"), Job("b", key="b"), Job("c", key="c")])
    assert ["a:natural"] == take_all(c, 10.0)
    assert ([], 12.0) == (take_all(c, 11.9), c.next_moment())
    assert ["b:natural"] == take_all(c, 12.0)
    c.finished(4.0)
    assert ([], 14.0) == (take_all(c, 13.9), c.next_moment())
    assert ["c:natural"] == take_all(c, 14.0)


def test_who_is_held_back_for_others_goes_when_all_workers_are_idle() -> None:
    c = collector(Natural(), workers=2)
    c.finished(4000.0)  # of one of old
    c.started(0.0)
    c.add(jobs("a"))
    assert ["a:natural"] == take_all(c, 10.0)
    c.add(jobs("b"))
    assert ([], 2010.0) == (take_all(c, 10.5), c.next_moment())
    c.finished(1.0)
    assert ["b:natural"] == take_all(c, 11.0)


def test_one_slow_batch_does_not_count() -> None:
    seen: list[float] = []

    class Watching(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            seen.append(window.service_time)
            return NOW

    c = collector(Watching())
    for time in [4.0, 4.0, 900.0, 5.0, 3.0, 3.0]:
        c.add(jobs("a"))
        take_all(c, 0)
        c.finished(time)
    assert [0.0, 4.0, 4.0, 4.0, 5.0, 4.0] == seen


def test_a_policy_that_is_not_to_be_asked_for_each_job_is_not_woken_for_it() -> None:
    c = collector(Size(9) | Interval(0.005))
    assert 1 == c.wanted()
    c.add(jobs("a"), uniform=True)
    assert ([], 8) == (take_all(c, 0.0), c.wanted())
    c.add(jobs("bcd", submitted=0.001), uniform=True)
    assert ([], 5) == (take_all(c, 0.001), c.wanted())
    assert (["abcd:interval"], sys.maxsize) == (take_all(c, 0.005), c.wanted())


@pytest.mark.parametrize("case", ["far off", "of a key", "one of two"])
def test_who_waits_long_or_is_one_of_many_joins_at_once(case: str) -> None:
    c = collector(Size(9) | Interval(1 if case == "far off" else 0.005))
    c.add(jobs("a", key=1 if case == "of a key" else None), uniform=case != "of a key")
    if case == "one of two":
        c.add(jobs("b", key=2))
    assert ([], 1) == (take_all(c, 0.0), c.wanted())


def test_the_window_shows_the_batch_and_the_flow() -> None:
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


def test_a_policy_that_raises_breaks_that_batch_at_once_and_no_other() -> None:
    c = collector(Broken(), workers=1)
    c.add([Job("a", key=1)])
    assert ["a:interval"] != take_all(c, 1)
    c.add([Job("bad", key=2), Job("c", key=3, submitted=1.0)])
    batch = c.take(1)
    assert batch is not None and isinstance(batch.error, KeyError)
    assert ["bad"] == [entry.job for entry in batch.entries]
    c.finished()
    assert ["c:broken"] == take_all(c, 2)


def test_a_reason_that_raises_breaks_the_batch() -> None:
    class Speechless(Size):
        def reason(self, window: Window[Any]) -> str:
            raise LookupError

    c = collector(Speechless(1))
    c.add(jobs("a"))
    batch = c.take(0)
    assert batch is not None and isinstance(batch.error, LookupError)


def test_a_limit_that_raises_breaks_batch_after_batch_until_none_is_left() -> None:
    class Raising(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return NEVER

        def fits(self, window: Window[Any], weight: float) -> bool:
            raise SystemExit

    c = collector(Raising())
    c.add(jobs("ab"))
    batch = c.take(0)
    assert batch is not None and isinstance(batch.error, SystemExit)
    assert ["a"] == [entry.job for entry in batch.entries]
    batch = c.take(0)
    assert batch is not None and ["b"] == [entry.job for entry in batch.entries]
    assert not c


def test_fits_is_not_asked_where_there_is_room_for_all() -> None:
    class Roomy(Size):
        def fits(self, window: Window[Any], weight: float) -> bool:
            raise AssertionError

        def _room(self, window: Window[Any]) -> float:
            return super()._room(window)

    c = collector(Roomy(5), workers=9)
    c.add(jobs("abcde"))
    assert ["abcde:roomy"] == take_all(c, 0)


def test_alarms_of_jobs_that_went_are_forgotten() -> None:
    c = collector(Size(1), workers=10**6)
    for _ in range(1000):
        entry = Job("a", _expires=10.0**9)
        c.add([entry])
        take_all(c, 0)
        entry._is_waiting = False
    c.add(jobs("a", _expires=5))  # one that waits, so that the collector is not idle
    assert len(c._expiries._heap) < 200
    take_all(c, 0)
    assert NEVER == c.next_moment()


def test_a_job_that_fits_nowhere_breaks_alone() -> None:
    c = collector(Light(), workers=9)
    c.add([Job("a", weight=11), Job("b", weight=10)])
    batch = c.take(0)
    assert batch is not None and isinstance(batch.error, JobTooLarge)
    assert ["a"] == [entry.job for entry in batch.entries]
    assert [] == take_all(c, 0)
    c.flush(0)
    assert ["b:flush"] == take_all(c, 0)


def test_a_key_that_raises_when_compared_harms_nobody() -> None:
    class Odd:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    c = collector(Size(2) | Interval(1), workers=9)
    same = Odd()
    c.add([Job("a", key=same), Job("b", key=Odd()), Job("c", key=same)])
    assert ["ac:size"] == take_all(c, 0)
    assert ["b:interval"] == take_all(c, 1)
    assert not c


def test_a_key_whose_hash_changes_harms_nobody() -> None:
    class Changing:
        value = 1

        def __hash__(self) -> int:
            return self.value

    key = Changing()
    c = collector(Size(2) | Interval(1), workers=9)
    c.add([Job("a", key=key)])
    key.value = 2
    c.add([Job("b", key=key)])
    assert ["a:interval", "b:interval"] == take_all(c, 1)
    assert not c


def test_a_backlog_of_withdrawn_jobs_is_forgotten_while_the_workers_are_busy() -> None:
    c = collector(Size(1))
    c.add(jobs("abc"))
    take_all(c, 0)
    for _ in range(2000):
        unwanted = Job("x")
        c.add([unwanted])
        assert [] == take_all(c, 0)
        withdraw(c, unwanted)
    assert [] == take_all(c, 0)
    assert len(c._lanes[None].backlog) < 300


def test_the_line_for_a_worker_does_not_grow_with_lanes_that_come_and_go() -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    take_all(c, 0)
    for key in range(1000):
        unwanted = Job("x", key=key)
        c.add([unwanted])
        assert [] == take_all(c, 0)
        withdraw(c, unwanted)
    assert [] == take_all(c, 0)
    assert not c
    assert len(c._ready._heap) < 300


def test_weights_do_not_drift_when_jobs_leave() -> None:
    seen: list[float] = []

    class Watching(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            seen.append(window.weight)
            return NEVER

    c = collector(Watching())
    heavy = Job("a", weight=1e16)
    c.add([heavy, Job("b", weight=1.0), Job("c", weight=0.1)])
    take_all(c, 0)
    withdraw(c, heavy)
    take_all(c, 0)
    assert 1.1 == seen[-1]


def test_a_caller_that_waits_for_room_makes_the_oldest_batch_due_whatever_timers_are_set() -> None:
    c = collector(Size(3) | Interval(5), workers=9)
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=1)])
    assert ([], 5) == (take_all(c, 0), c.next_moment())
    assert ["a", "c"] == [entry.job for entry in first_of(c, pressed=True).entries]
    c.started(0)
    assert ([], 5) == (take_all(c, 0), c.next_moment())


def test_a_caller_that_waits_for_room_makes_no_batch_due_before_a_rate_allows_it() -> None:
    c = collector(Size(9) & Rate(1, per=60), workers=9)
    c.add(jobs("a"))
    assert ["a:flush"] == take_all(c, 10.0, pressed=True)
    c.add(jobs("b"))
    assert ([], 70.0) == (take_all(c, 10.0, pressed=True), c.next_moment())
    assert ["b:flush"] == take_all(c, 70.0)


def test_a_caller_that_waits_for_room_changes_nothing_while_a_batch_is_due_or_no_worker_is_free() -> None:
    c = collector(Size(2) | Interval(5))
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=2)])
    assert ["bc:size"] == take_all(c, 0, pressed=True)
    assert [] == take_all(c, 0, pressed=True)
    c.finished()
    assert ["a:interval"] == take_all(c, 5)


def first_of(collector: Collector[Job], pressed: bool) -> Batch[Job]:
    batch = collector.take(0, pressed)
    assert batch is not None
    return batch


class Colliding(int):
    """Unequal to others of its kind, with an equal hash."""

    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize("kind", [int, Colliding, lambda number: ("table", int(number))], ids=["int", "hash", "tuple"])
def test_keys_share_a_batch_if_they_are_equal_and_only_then(kind: Callable[[str], Hashable]) -> None:
    c = collector(Size(2), workers=9)
    c.add([Job(letter, key=kind(number)) for letter, number in zip("abcdef", "213213")])
    assert ["ad:size", "be:size", "cf:size"] == take_all(c, 0)
    assert not c


class Tenant(str, Enum):
    ACME = "acme"


EQUAL_KEYS: list[list[Hashable]] = [
    [1, 1.0, True, numpy.int64(1), numpy.bool_(True)],
    ["acme", Tenant.ACME, numpy.str_("acme")],
    [(1, "acme"), (True, Tenant.ACME)],
]


@pytest.mark.parametrize("keys", EQUAL_KEYS + [keys[::-1] for keys in EQUAL_KEYS], ids=repr)
def test_equal_keys_share_a_batch_whatever_their_types(keys: list[Hashable]) -> None:
    c = collector(Size(len(keys)), workers=9)
    c.add([Job(str(number), key=key) for number, key in enumerate(keys)])
    assert ["".join(map(str, range(len(keys)))) + ":size"] == take_all(c, 0)
    assert not c


def test_a_key_that_raises_when_compared_harms_no_plain_key_with_its_hash() -> None:
    class Odd:
        def __hash__(self) -> int:
            return hash(1)

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    c = collector(Size(2) | Interval(1), workers=9)
    c.add([Job("a", key=Odd()), Job("b", key=1), Job("c", key=Odd()), Job("d", key=1.0)])
    assert ["bd:size"] == take_all(c, 0)
    assert ["a:interval", "c:interval"] == take_all(c, 1)
    assert not c


def test_bytes_and_text_are_different_keys_even_where_python_refuses_to_compare_them() -> None:
    script = """if True:
        from microbatch import Batcher, Size
        with Batcher(list, Size(2), key=lambda job: job) as batcher:
            futures = [batcher.submit(job) for job in [b"a", "a", b"a", "a"]]
            print(*(future.result().batch.id for future in futures))
    """
    command = [sys.executable, "-bb", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ("1 2 1 2\n", "") == (done.stdout, done.stderr)


def test_a_key_that_loses_its_hash_is_only_itself() -> None:
    class Hashless:
        def __hash__(self) -> int:
            raise RuntimeError

    c = collector(Size(2) | Interval(1), workers=9)
    same = Hashless()
    gone, stays = Job("a", key=same), Job("b", key=Hashless())
    c.add([gone, stays, Job("c", key=same), Job("d", key=same)])
    assert ["ac:size"] == take_all(c, 0)
    assert ["b:interval", "d:interval"] == take_all(c, 1)
    assert not c


def test_nothing_is_pressed_unless_that_is_said() -> None:
    c = collector(Size(3))
    c.add(jobs("a"))
    assert c.take(0) is None


@dataclass(eq=False)
class CountingJob(Job):
    """Counts how often one looks whether a job waits, or weighs it."""

    looks: ClassVar[int]

    def __getattribute__(self, name: str) -> Any:
        if name in ("_is_waiting", "weight"):
            CountingJob.looks += 1
        return super().__getattribute__(name)


def test_each_job_costs_a_few_looks_however_many_wait_for_their_alarm() -> None:
    CountingJob.looks = 0
    c = collector(Interval(1))
    for _ in range(3000):
        c.add([CountingJob("a", _expires=9)])
        assert c.take(0) is None
    assert CountingJob.looks < 10 * 3000


def test_each_withdrawal_costs_a_few_looks_however_long_the_backlog_is() -> None:
    CountingJob.looks = 0
    c = collector(Size(1))
    backlog = [CountingJob("a") for _ in range(3000)]
    c.add(backlog)
    take_all(c, 0)
    for job in backlog[-1000:]:
        withdraw(c, job)
        assert c.take(0) is None
    assert CountingJob.looks < 10 * 3000


def test_what_went_or_was_withdrawn_is_freed_while_other_jobs_wait() -> None:
    c = collector(Wavering(), workers=10**6)
    c.add([Job("x", key=key, _expires=8) for key in range(100)])
    assert [] == take_all(c, 0)
    known: weakref.WeakSet[Job] = weakref.WeakSet()
    for _ in range(400):
        for job in jobs("abcd", _expires=9):
            known.add(job)
            c.add([job])
            take_all(c, 0)
            job._is_waiting = job.job == "d"
        withdraw(c, job)
        take_all(c, 0)
        c.joined.clear()
    del job
    assert len(known) < 800


def test_a_backlog_that_is_withdrawn_at_one_go_is_freed() -> None:
    c = collector(Size(1))
    c.add(jobs("abcdefgh"))
    assert ["a:size"] == take_all(c, 0)
    unwanted = jobs("x" * 100)
    known = weakref.WeakSet(unwanted)
    c.add(unwanted)
    assert [] == take_all(c, 0)
    for job in unwanted:
        job._is_waiting = False
    c.drop(unwanted)
    assert [] == take_all(c, 0)
    del job, unwanted[:]
    assert 0 == len(known)


@pytest.mark.parametrize(
    "change, watching, asked_again",
    [
        (lambda c: None, True, []),
        (lambda c: c.add(jobs("b")), False, ["ab", "abb"]),
        (lambda c: c.flush(4), False, ["a"]),
        (lambda c: c.flush(3), False, []),
        (lambda c: c.flush(2), False, []),
        (lambda c: c.flush(-1, closing=True), False, ["a"]),
        (lambda c: c.flush(-1, closing=True) or c.flush(-1), False, ["a"]),
        (lambda c: c.started(0), False, []),
        (lambda c: c.started(0), True, []),  # no worker is free
        (lambda c: c.finished(), False, []),
        (lambda c: c.finished(), True, ["a", "a"]),
    ],
)
def test_a_policy_is_asked_again_only_after_something_changed(
    change: Callable[[Collector[Job]], None], watching: bool, asked_again: list[str]
) -> None:
    asked: list[str] = []

    class Asked(Size):
        hints = Hints(watches_flow=watching)

        def due(self, window: Window[Any]) -> float:
            asked.append("".join(window.jobs))
            return super().due(window)

    c = collector(Asked(9))
    c.started(0)
    c.flush(3)
    c.add(jobs("a", _epoch=5))
    assert [] == take_all(c, 0)
    asked.clear()
    for _ in range(2):
        change(c)
        assert [] == take_all(c, 0)
    assert asked_again == asked


@pytest.mark.parametrize("size", [1, 2, 5])
def test_room_is_asked_once_for_all_jobs_that_fit_and_then_fits_once(size: int) -> None:
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


def test_a_full_batch_goes_when_its_policy_says_so_and_no_sooner() -> None:
    c = collector(Light() | Interval(5))
    c.add([Job("a", weight=6), Job("b", weight=6)])
    assert ([], 5) == (take_all(c, 4.9), c.next_moment())
    assert ["a:interval"] == take_all(c, 5)


def test_a_policy_sees_that_nothing_can_join_any_more() -> None:
    class WhenFull(Light):
        def due(self, window: Window[Any]) -> float:
            return window.opened + (1 if window.full else 2)

    c = collector(WhenFull())
    c.add([Job("a", weight=6), Job("b", weight=6)])
    assert ([], 1) == (take_all(c, 0), c.next_moment())


def test_a_batch_leaves_the_line_for_a_worker_if_its_policy_changes_its_mind() -> None:
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


@pytest.mark.parametrize("now", [2, 3])
def test_a_batch_that_takes_more_jobs_keeps_its_place_in_the_line_for_a_worker(now: float) -> None:
    c = collector(Interval(1))
    c.started(0)
    c.add([Job("a", key="first", submitted=1), Job("b", key="second", submitted=1)])
    assert [] == take_all(c, now)
    c.add([Job("c", key="first", submitted=now)])
    assert [] == take_all(c, now)
    c.finished()
    assert ["ac:interval"] == take_all(c, now)


def test_each_of_very_many_timers_rings() -> None:
    c = collector(Interval(5), workers=1000)
    c.add([Job("a", key=key, submitted=key) for key in range(500)])
    for now in range(500):
        assert ([], now + 5) == (take_all(c, now + 4.9), c.next_moment())
        assert ["a:interval"] == take_all(c, now + 5)


def test_it_is_empty_when_the_last_job_has_left_it_whatever_became_of_that() -> None:
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
    assert c  # for the other one


def test_the_jobs_of_a_batch_whose_reason_raises_fail_with_it() -> None:
    class Speechless(Size):
        def reason(self, window: Window[Any]) -> str:
            raise LookupError

    c = collector(Speechless(2))
    c.add(jobs("ab", key="k"))
    batch = c.take(0)
    assert batch is not None
    assert ("k", ["a", "b"]) == (batch.key, [entry.job for entry in batch.entries])


def test_the_jobs_that_joined_a_batch_are_noted_in_order() -> None:
    c = collector(Size(2))
    c.add(jobs("abc"))
    assert c.take(0) is not None
    assert "ab" == "".join(entry.job for entry in c.joined)
    assert c.take(0) is None
    assert "abc" == "".join(entry.job for entry in c.joined)


@pytest.mark.parametrize("workers", [1, 1000])
def test_a_batch_that_will_be_due_is_no_reason_to_wake_up_while_all_workers_are_busy(workers: int) -> None:
    c = collector(Interval(5), workers)
    for _ in range(workers):
        c.started(0)
    c.add(jobs("a", submitted=1))
    assert ([], NEVER) == (take_all(c, 1), c.next_moment())
    assert ([], NEVER) == (take_all(c, 6), c.next_moment())
    c.finished()
    assert ["a:interval"] == take_all(c, 7)


@pytest.mark.parametrize(
    "policy, now, words",
    [
        (Interval(5), 4, "due in 1.000 s by interval"),
        (Interval(5), 5, "due by interval, and waits for a free worker"),
        (Wavering(), 4, "not due until more jobs come, however long that takes"),
    ],
)
def test_it_says_what_an_open_batch_waits_for(policy: BatchingPolicy[Any], now: float, words: str) -> None:
    c = collector(policy)
    c.started(0)
    for job in jobs("ab"):
        c.add([job])
        assert [] == take_all(c, now)
    (described,) = c.describe(now)
    assert f"open batch: 2 jobs, {words}" == described.partition(": flush()")[0]
    assert described == c.describe_batch(None, now)
    assert "" == c.describe_batch("another key", now)


def test_an_error_says_what_it_is_about() -> None:
    class Odd(Light):
        def due(self, window: Window[Any]) -> float:
            return "soon"  # type: ignore[return-value]

    c = collector(Odd())
    c.add([Job("a", weight=11), Job("b", weight=10)])
    errors = [batch.error for batch in (c.take(0), c.take(0)) if batch is not None]
    assert [
        "a job of weight 11 does not fit into any batch",
        "the due() of a policy must be a number, got 'soon'",
    ] == list(map(str, errors))


class LedgerOfJobs(RuleBasedStateMachine):
    """Anything may happen in any order: limits hold, order holds, nothing is lost, and no batch is empty."""

    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.collector = collector((Size(3) & LightEnough() | Interval(2)), workers=2)
        self.now = 0.0
        self.epoch = 0
        self.added: list[Job] = []
        self.gone: list[Job] = []
        self.running = 0
        self.flushed = -1

    @rule(target=waiting, key=st.integers(0, 2), weight=st.integers(0, 4), expires=st.none() | st.integers(0, 5))
    def add(self, key: int, weight: int, expires: int | None) -> Job:
        moment = NEVER if expires is None else self.now + expires
        job = Job(len(self.added), key, float(weight), self.now, moment, self.epoch)
        self.added.append(job)
        self.collector.add([job])
        return job

    @rule(job=consumes(waiting))
    def withdraw(self, job: Job) -> None:
        if job._is_waiting:
            withdraw(self.collector, job)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def flush(self) -> None:
        self.collector.flush(self.epoch)
        self.flushed = self.epoch
        self.epoch += 1

    @rule()
    def close(self) -> None:
        self.collector.flush(-1, closing=True)
        self.flushed = 10**9

    @rule()
    def finish(self) -> None:
        if self.running:
            self.running -= 1
            self.collector.finished()

    @rule()
    def work(self) -> None:
        expired = self.collector.expire(self.now)
        for job in expired:
            assert job._is_waiting and job._expires <= self.now
            job._is_waiting = False
        self.collector.drop(expired)
        while (batch := self.collector.take(self.now)) is not None:
            assert batch.error is None
            assert 1 <= len(batch.entries) <= 3
            assert 6 >= sum(job.weight for job in batch.entries) or 1 == len(batch.entries)
            for job in batch.entries:
                assert job._is_waiting and job.key == batch.key and job._expires > self.now
                earlier = [other for other in self.added[: job.job] if other._is_waiting and other.key == job.key]
                assert [] == earlier, "a job overtook one of its key"
                job._is_waiting = False
                self.gone.append(job)
            self.running += 1
            self.collector.started(self.now)
        if self.running < 2:  # with a free worker, nothing that is due is left
            left = [job for job in self.added if job._is_waiting]
            assert all(job._epoch > self.flushed and job.submitted + 2 > self.now for job in left)
            assert self.collector.next_moment() > self.now

    @invariant()
    def no_more_than_the_workers_run(self) -> None:
        assert self.running <= 2

    @invariant()
    def nothing_is_lost(self) -> None:
        held = {entry for lane in self.collector._lanes.values() for entry in [*lane.open, *lane.backlog]}
        assert {job for job in self.added if job._is_waiting} <= held


class LightEnough(BatchingPolicy[Any]):
    def due(self, window: Window[Any]) -> float:
        return NOW if window.weight >= 6 or window.full else NEVER

    def fits(self, window: Window[Any], weight: float) -> bool:
        return window.weight + weight <= 6


TestLedgerOfJobs = LedgerOfJobs.TestCase
TestLedgerOfJobs.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_moment_beyond_all_floats_is_one_that_a_clock_can_calculate_with() -> None:
    class Late(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return 10**400

    c = collector(Late())
    c.add(jobs("a"))
    assert [] == take_all(c, 0)
    assert NEVER == c.next_moment()


# -- many lanes --


class Counted(BatchingPolicy[Any]):
    """A user's policy that says nothing about itself, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def due(self, window: Window[Any]) -> float:
        self.asked += 1
        return self.moment(window)

    def moment(self, window: Window[Any]) -> float:
        return window.opened


class CountedIdle(Counted):
    def moment(self, window: Window[Any]) -> float:
        return NOW if window.in_flight == 0 else NEVER


def drain(c: Collector[Job], now: float = 0.0) -> list[Any]:
    """Take all batches, each ending a moment after it began, and return the jobs in the order in which they went."""
    taken = []
    while c:
        while (batch := c.take(now)) is not None:
            assert batch.error is None
            taken += [entry.job for entry in batch.entries]
            c.started(now)
        if c.in_flight:
            c.finished(0.5)
            c.policy.observe(BatchReport(BatchInfo(1, 1, 1.0, None, ""), 0.5, 0))
        elif (moment := c.next_moment()) < NEVER:
            now = max(now, moment)
        else:
            raise AssertionError("nothing would ever go")
        now += 0.25
    return taken


@pytest.mark.parametrize("policy", [Counted, CountedIdle])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_start_or_an_end_of_a_batch_asks_for_a_few_lanes_however_many_there_are(
    policy: Callable[[], Counted], workers: int
) -> None:
    asked = policy()
    c = collector(asked, workers)
    c.add([Job(key, key=key) for key in range(400)])
    assert 400 == len(drain(c))
    assert asked.asked < 400 * 10


@pytest.mark.parametrize(
    "policy",
    [
        Size(100) | Natural(),
        Adaptive(0.1) | Natural(),
        Size(1) & Rate(1, per=0.5),
        Size(100) | AllWaiting(),
    ],
    ids=repr,
)
def test_the_built_in_policies_are_asked_a_few_times_for_each_lane_and_go_in_order(
    policy: BatchingPolicy[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    for kind in (Natural, Rate):
        due = kind.due

        def counting(self: Any, window: Window[Any], due: Any = due) -> float:
            asked.append(window)
            return float(due(self, window))

        monkeypatch.setattr(kind, "due", counting)
    c = collector(policy, workers=4)
    c.add([Job(key, key=key) for key in range(400)])
    assert list(range(400)) == drain(c)
    assert len(asked) < 400 * 20


def test_every_lane_in_doubt_is_asked_in_the_end_even_if_nothing_more_happens_and_then_no_more() -> None:
    class Picky(Counted):
        def moment(self, window: Window[Any]) -> float:
            return NOW if window.in_flight == 0 and window.key in ("first", 900) else NEVER

    policy = Picky()
    c = collector(policy, workers=4)
    c.add([Job("first", key="first")])
    assert ["first:picky"] == take_all(c, 0)
    c.add([Job("a", key=key) for key in range(1000)])
    assert [] == take_all(c, 0)
    c.finished()
    now, looks = 0.0, 0
    while not (taken := take_all(c, now)):
        now, looks = c.next_moment(), looks + 1
        assert looks < 100
    assert (["a:picky"], now < 0.1) == (taken, True)
    while (moment := c.next_moment()) < NEVER:
        assert [] == take_all(c, moment)
        looks += 1
        assert looks < 200
    before = policy.asked
    assert [] == take_all(c, now + 1)
    assert before == policy.asked


def test_a_full_batch_does_not_wait_where_others_are_held_back() -> None:
    c = collector(Size(2) | Natural(), workers=4)
    c.finished(4.0)  # of one of old
    c.started(0.0)
    c.add([Job("a", key="a"), Job("b", key="b")])
    assert ["a:natural"] == take_all(c, 10.0)
    c.add([Job("c", key="c", submitted=10.0), Job("d", key="c", submitted=10.0)])
    assert (["cd:size"], 11.0) == (take_all(c, 10.0), c.next_moment())
    assert ["b:natural"] == take_all(c, 11.0)


def test_each_lane_is_flushed_once_however_often_one_flushes() -> None:
    policy = Counted()
    policy.moment = lambda window: NEVER  # type: ignore[method-assign]
    c = collector(policy & Rate(1, per=60))
    c.started(0)
    for epoch in range(400):
        c.add([Job(epoch, key=epoch, _epoch=epoch)])
        c.flush(epoch)
        assert [] == take_all(c, 0)
    assert policy.asked < 400 * 4


def test_what_others_say_of_themselves_puts_no_lane_in_doubt() -> None:
    class Steady(Counted):
        hints = Hints(watches_flow=False)

    policy = Steady()
    policy.moment = lambda window: NEVER  # type: ignore[method-assign]
    c = collector(policy, workers=4)
    c.add([Job("a", key=key) for key in range(100)])
    for _ in range(10):
        c.started(0)
        assert [] == take_all(c, 0)
        c.finished()
    assert 100 == policy.asked


BUILT_IN = [
    "Size(3) | Natural()",
    "Size(2) & Rate(2, 5)",
    "Size(3) | AllWaiting(1)",
    "AllWaiting(1) | Interval(2)",
    "Adaptive(3, warm_up=0) | Natural()",
    "Adaptive(3, warm_up=0) & Rate(2, 3)",
    "(Size(3) | Natural()) & Rate(2, 3)",
    "Session(1) & Rate(2, 3)",
    "Size(2) & Natural()",
    "Size(3) & Interval(1) | Natural() & Interval(0.5)",
    "(Size(5) & Natural() | Interval(500)) & Rate(100, 1)",
    "Size(5) | Natural()",
]


@pytest.mark.parametrize("text", BUILT_IN)
@pytest.mark.parametrize("workers", [1, 4])
def test_with_a_free_worker_no_batch_is_left_that_its_policy_calls_due(text: str, workers: int) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        c = collector(eval(text), workers)
        keys = chance.choice([1, 2, 8])
        now, epoch, heard = 0.0, 0, NOW
        for _ in range(60):
            what = chance.choice(["add", "add", "add", "wait", "finish", "finish", "flush", "hear"])
            if what == "add":
                c.add([Job("a", key=chance.randrange(keys), submitted=now, _epoch=epoch) for _ in range(3)])
            elif what == "wait":
                now += chance.choice([0.1, 0.5, 1.0, 2.0])
            elif what == "finish" and c.in_flight:
                time, size = chance.choice([0.5, 1.0, 2.0, 4.0]), chance.randint(1, 4)
                c.finished(time)
                c.policy.observe(BatchReport(BatchInfo(1, size, size, None, ""), time, 0))
            elif what == "flush":
                c.flush(epoch)
                epoch += 1
            elif what == "hear":
                heard = chance.choice([NOW, now])
            c.note_callers(CallerActivity(heard=heard))
            take_all(c, now)
            if c.has_worker and c.next_moment() > now + 0.002 and c._lanes:  # none is still to be asked
                due = [c._answer(lane, c._new_window(lane), now)[0] for lane in c._lanes.values()]
                assert min(due) > now


class Eager(BatchingPolicy[Any]):
    """Goes alone too once five batches have gone."""

    def due(self, window: Window[Any]) -> float:
        return NOW if window.count >= 2 or len(window.sent) >= 5 else NEVER


def test_a_batch_that_has_become_due_goes_though_another_key_is_always_ready() -> None:
    c = collector(Eager())
    c.add([Job("rare", key="rare")])
    for batch in range(10):
        c.add([Job("busy", key="busy"), Job("busy", key="busy")])
        taken = take_all(c, batch)
        c.finished()
        if "rare:eager" in taken:
            break
    assert "rare:eager" in taken


def test_a_batch_takes_at_once_as_many_jobs_as_adaptive_has_learned_that_it_may() -> None:
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


def cancelled_again_and_again(c: Collector[Job], now: float) -> None:
    for _ in range(1_000):
        now += 0.01
        job = Job("b", key="b", submitted=now)
        c.add([job])
        assert [] == take_all(c, now)
        withdraw(c, job)
        assert [] == take_all(c, now)
        c.next_moment()


@pytest.mark.parametrize(
    "policy, busy",
    [(Session(3600), 0), (Session(0.1) & Rate(1, 3600), 0), (Session(0.1), 1), (Size(2) | Interval(3600), 1)],
    ids=str,
)
def test_a_batch_that_changes_for_ever_is_noted_a_few_times_only(policy: BatchingPolicy[Any], busy: int) -> None:
    c = collector(policy)
    c.started(0)
    c.in_flight = busy
    c.add([Job("a", key="a"), Job("b", key="b")])
    assert [] == take_all(c, 0)
    cancelled_again_and_again(c, 1.0)
    assert len(c._timers._heap) + len(c._gated._heap) + len(c._ready._heap) < 300


def test_an_idle_collector_keeps_no_room_for_the_keys_that_it_had() -> None:
    c = collector(Size(1))
    c.add([Job(key, key=key) for key in range(10_000)])
    assert 10_000 == len(drain(c))
    assert NEVER == c.next_moment()
    assert sys.getsizeof(c._lanes) < 1_000


def test_a_job_that_may_expire_has_the_policy_asked_for_each_job_again() -> None:
    c = collector(Size(4) | Interval(60))
    c.add(jobs("a"), uniform=True)
    assert [] == take_all(c, 0)
    c.add(jobs("b", 59.995), uniform=True)
    assert ([], 2) == (take_all(c, 59.995), c.wanted())
    c.add(jobs("c", 59.996, _expires=99.0))
    assert ([], 1) == (take_all(c, 59.996), c.wanted())


def test_a_batch_of_which_no_job_is_left_that_was_flushed_goes_by_its_policy() -> None:
    c = collector(Size(9) & Natural() | Interval(5))
    c.in_flight = 1
    flushed, younger = Job("a", key="a"), Job("b", key="a", submitted=1.5, _epoch=1)
    c.add([flushed])
    assert [] == take_all(c, 0)
    c.flush(0)
    assert [] == take_all(c, 1)
    c.add([younger])
    withdraw(c, flushed)
    c.add([Job("c", key="c", submitted=1.5, _epoch=1)])
    assert [] == take_all(c, 1.5)
    c.finished()
    assert ["b:interval"] == take_all(c, 6.5)[:1]


class Quiet(Size):
    """Not even a flush sends it while another batch runs."""

    def _earliest(self, window: Window[Any]) -> float:
        return NOW if window.in_flight == 0 else NEVER


def test_an_earliest_that_looks_at_the_flow_is_asked_again_though_its_class_inherits_that_it_does_not() -> None:
    c = collector(Quiet(2), workers=4)
    c.add(jobs("ab"))
    assert ["ab:quiet"] == take_all(c, 0)
    c.add(jobs("c", 1))
    c.flush(0)
    assert [] == take_all(c, 1)
    c.finished()
    assert ["c:flush"] == take_all(c, 2)


@pytest.mark.parametrize("text", ["Natural()", "Size(100) | Natural()", "Natural() & Rate(100, 1)"])
@pytest.mark.parametrize("keys", [["a"], ["a", "b"]], ids=len)
def test_a_batch_goes_sooner_when_batches_turn_out_to_take_less_time(text: str, keys: list[str]) -> None:
    c = collector(eval(text), workers=4)
    for service_time in (100.0, 1.0):
        c.started(0)
        c.finished(service_time)
    c.started(0)  # and hangs
    c.started(1)
    c.add([Job(key, key=key, submitted=1) for key in keys])
    assert ([], 26.0) == (take_all(c, 1), c.next_moment())
    c.finished(1.0)
    assert ["a"] == [taken[0] for taken in take_all(c, 2)]
