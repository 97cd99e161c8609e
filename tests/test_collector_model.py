"""A collector keeps its invariants under random sequences of operations."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

import microbatch
from microbatch import (
    NEVER,
    NOW,
    BatchInfo,
    BatchingPolicy,
    BatchReport,
    CallerActivity,
    Interval,
    Size,
    Window,
)
from tests.collectors import Job, collector, drop, take_all


class CollectorMachine(RuleBasedStateMachine):
    """In any order of operations, the limits and the order hold, no job is lost, and no batch is empty."""

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
    def drop(self, job: Job) -> None:
        if job._is_waiting:
            drop(self.collector, job)

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
                assert [] == earlier, "a job overtook another one of the same key"
                job._is_waiting = False
                self.gone.append(job)
            self.running += 1
            self.collector.started(self.now)
        if self.running < 2:  # with a free worker, no due job is left
            left = [job for job in self.added if job._is_waiting]
            assert all(job._epoch > self.flushed and job.submitted + 2 > self.now for job in left)
            assert self.collector.next_moment() > self.now

    @invariant()
    def no_more_batches_run_than_there_are_workers(self) -> None:
        assert self.running <= 2

    @invariant()
    def no_job_is_lost(self) -> None:
        held = {entry for lane in self.collector._lanes.values() for entry in [*lane.open, *lane.backlog]}
        assert {job for job in self.added if job._is_waiting} <= held


class LightEnough(BatchingPolicy[Any]):
    def due(self, window: Window[Any]) -> float:
        return NOW if window.weight >= 6 or window.full else NEVER

    def fits(self, window: Window[Any], weight: float) -> bool:
        return window.weight + weight <= 6


TestCollectorMachine = pytest.mark.slow(CollectorMachine.TestCase)
TestCollectorMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


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
def test_no_due_batch_is_left_while_a_worker_is_free(text: str, workers: int) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        c = collector(eval(text, vars(microbatch)), workers)
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
            if c.has_worker and c.next_moment() > now + 0.002 and c._lanes:  # no lane is still to be asked
                due = [c._answer(lane, c._new_window(lane), now)[0] for lane in c._lanes.values()]
                assert min(due) > now
