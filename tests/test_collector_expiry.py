"""Jobs that expire or are dropped leave their batch, and leave nothing behind."""

import weakref
from typing import Any

from microbatch import NEVER, BatchingPolicy, Interval, Size, Window
from tests.collectors import Job, Light, Wavering, collector, drop, jobs, take_all


def test_jobs_expire_at_their_moment_and_leave_their_batch() -> None:
    c = collector(Interval(10))
    early, late = Job("a", _expires=3), Job("b", submitted=1)
    c.add([early, late])
    assert ([], 3) == (take_all(c, 0), c.next_moment())
    assert [] == c.expire(2.9)
    assert [early] == c.expire(3)
    drop(c, early)
    assert ([], 11) == (take_all(c, 3), c.next_moment())
    assert ["b:interval"] == take_all(c, 11)


def test_a_dropped_job_frees_its_place_in_its_batch() -> None:
    c = collector(Size(2))
    first, *others = jobs("abc")
    c.add([first])
    assert [] == take_all(c, 0)
    drop(c, first)
    c.add([others[0]])
    assert [] == take_all(c, 0)
    c.add([others[1]])
    assert ["bc:size"] == take_all(c, 0)


def test_the_next_job_takes_the_place_of_one_dropped_behind_a_full_batch() -> None:
    c = collector(Size(2))
    c.add(letters := jobs("abcdefg"))
    assert ["ab:size"] == take_all(c, 0)
    drop(c, letters[5])
    for batch in ("cd:size", "eg:size"):
        c.finished()
        assert [batch] == take_all(c, 0)


def test_a_batch_is_no_longer_full_once_the_job_that_did_not_fit_is_dropped() -> None:
    c = collector(Light() | Interval(5))
    heavy, light = Job("b", weight=6), Job("c", weight=1)
    c.add([Job("a", weight=6), heavy, light])
    drop(c, heavy)
    assert ["ac:interval"] == take_all(c, 5)


def test_jobs_may_stop_waiting_before_the_collector_knows() -> None:
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


def test_a_lane_with_only_dropped_jobs_gives_no_batch() -> None:
    c = collector(Interval(0))
    (job,) = jobs("a")
    c.add([job])
    job._is_waiting = False
    c.drop([job])
    assert [] == take_all(c, 0)
    assert not c


def test_a_due_batch_whose_jobs_are_all_dropped_is_not_dispatched() -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    take_all(c, 0)
    (job,) = jobs("b")
    c.add([job])
    assert [] == take_all(c, 0)
    drop(c, job)
    c.finished()
    assert [] == take_all(c, 0)
    assert (False, NEVER) == (bool(c), c.next_moment())


def test_the_weight_of_a_batch_does_not_drift_when_jobs_leave() -> None:
    seen: list[float] = []

    class Watching(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            seen.append(window.weight)
            return NEVER

    c = collector(Watching())
    heavy = Job("a", weight=1e16)
    c.add([heavy, Job("b", weight=1.0), Job("c", weight=0.1)])
    take_all(c, 0)
    drop(c, heavy)
    take_all(c, 0)
    assert 1.1 == seen[-1]


def test_the_expiry_times_of_dispatched_jobs_are_forgotten() -> None:
    c = collector(Size(1), workers=10**6)
    for _ in range(1000):
        entry = Job("a", _expires=10.0**9)
        c.add([entry])
        take_all(c, 0)
        entry._is_waiting = False
    c.add(jobs("a", _expires=5))  # a waiting job, so that the collector is not idle
    assert len(c._expiries.heap) < 200
    take_all(c, 0)
    assert NEVER == c.next_moment()


def test_a_backlog_of_dropped_jobs_is_forgotten_while_the_workers_are_busy() -> None:
    c = collector(Size(1))
    c.add(jobs("abc"))
    take_all(c, 0)
    for _ in range(2000):
        unwanted = Job("x")
        c.add([unwanted])
        assert [] == take_all(c, 0)
        drop(c, unwanted)
    assert [] == take_all(c, 0)
    assert len(c._lanes[None].backlog) < 300


def test_the_queue_for_a_worker_does_not_grow_with_lanes_that_come_and_go() -> None:
    c = collector(Interval(0))
    c.add(jobs("a"))
    take_all(c, 0)
    for key in range(1000):
        unwanted = Job("x", key=key)
        c.add([unwanted])
        assert [] == take_all(c, 0)
        drop(c, unwanted)
    assert [] == take_all(c, 0)
    assert not c
    assert len(c._ready.heap) < 300


def test_dispatched_and_dropped_jobs_are_freed_while_other_jobs_wait() -> None:
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
        drop(c, job)
        take_all(c, 0)
    del job
    assert len(known) < 800


def test_a_backlog_that_is_dropped_all_at_once_is_freed() -> None:
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
