"""The cost of jobs, keys and batches, in calls and in memory."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from microbatch import (
    NEVER,
    NOW,
    Adaptive,
    AllWaiting,
    BatchingPolicy,
    Hints,
    Interval,
    Natural,
    Rate,
    Session,
    Size,
    Window,
)
from microbatch._forming.collector import Collector
from tests.collectors import Counted, Job, collector, drain, drop, jobs, take_all


@dataclass(eq=False)
class CountingJob(Job):
    """Counts how often its weight, or whether it is waiting, is read."""

    reads: ClassVar[int]

    def __getattribute__(self, name: str) -> Any:
        if name in ("_is_waiting", "weight"):
            CountingJob.reads += 1
        return super().__getattribute__(name)


def test_each_job_is_read_a_few_times_however_many_jobs_wait_to_expire() -> None:
    CountingJob.reads = 0
    c = collector(Interval(1))
    for _ in range(3000):
        c.add([CountingJob("a", _expires=9)])
        assert c.take(0) is None
    assert CountingJob.reads < 10 * 3000


def test_each_drop_reads_a_few_jobs_however_long_the_backlog_is() -> None:
    CountingJob.reads = 0
    c = collector(Size(1))
    backlog = [CountingJob("a") for _ in range(3000)]
    c.add(backlog)
    take_all(c, 0)
    for job in backlog[-1000:]:
        drop(c, job)
        assert c.take(0) is None
    assert CountingJob.reads < 10 * 3000


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
def test_a_policy_is_asked_again_only_after_a_change(
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


class CountedIdle(Counted):
    def moment(self, window: Window[Any]) -> float:
        return NOW if window.in_flight == 0 else NEVER


@pytest.mark.parametrize("policy", [Counted, CountedIdle])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_start_or_end_of_a_batch_checks_a_few_lanes_however_many_there_are(
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
def test_built_in_policies_are_asked_a_few_times_per_lane_and_lanes_are_dispatched_in_order(
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


def test_each_lane_is_flushed_once_however_often_flush_is_called() -> None:
    policy = Counted()
    policy.moment = lambda window: NEVER  # type: ignore[method-assign]
    c = collector(policy & Rate(1, per=60))
    c.started(0)
    for epoch in range(400):
        c.add([Job(epoch, key=epoch, _epoch=epoch)])
        c.flush(epoch)
        assert [] == take_all(c, 0)
    assert policy.asked < 400 * 4


def test_a_key_without_jobs_uses_no_memory() -> None:
    c = collector(Size(1), workers=1000)
    c.add([Job("a", key=key) for key in range(500)])
    assert 500 == len(take_all(c, 0))
    assert not c
    assert {} == c._lanes


def test_an_idle_collector_keeps_no_memory_for_past_keys() -> None:
    c = collector(Size(1))
    c.add([Job(key, key=key) for key in range(10_000)])
    assert 10_000 == len(drain(c))
    assert NEVER == c.next_moment()
    assert sys.getsizeof(c._lanes) < 1_000


def add_and_drop_repeatedly(c: Collector[Job], now: float) -> None:
    for _ in range(1_000):
        now += 0.01
        job = Job("b", key="b", submitted=now)
        c.add([job])
        assert [] == take_all(c, now)
        drop(c, job)
        assert [] == take_all(c, now)
        c.next_moment()


@pytest.mark.parametrize(
    "policy, busy",
    [(Session(3600), 0), (Session(0.1) & Rate(1, 3600), 0), (Session(0.1), 1), (Size(2) | Interval(3600), 1)],
    ids=str,
)
def test_timers_do_not_pile_up_for_a_batch_that_changes_repeatedly(policy: BatchingPolicy[Any], busy: int) -> None:
    c = collector(policy)
    c.started(0)
    c.in_flight = busy
    c.add([Job("a", key="a"), Job("b", key="b")])
    assert [] == take_all(c, 0)
    add_and_drop_repeatedly(c, 1.0)
    assert len(c._timers.heap) + len(c._gated.heap) + len(c._ready.heap) < 300
