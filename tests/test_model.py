"""A `Batcher` and a simple model of it: after each random step, both have every job in the same state."""

import queue
import threading
from collections import Counter
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from microbatch import BacklogFull, Batcher, BatcherClosed, BatcherStats, Interval, JobFuture, JobState, Size
from microbatch.testing import InlineExecutor, ManualClock

SIZE, SECONDS, MAX_PENDING = 3, 5.0, 6


@dataclass(eq=False)
class Job:
    """A job, with the state that it has in the model."""

    key: int
    kind: str
    submitted: float
    expires: float
    state: JobState = JobState.BATCHED
    trigger: str | None = None


@dataclass
class Model:
    """Predicts what a batcher with ``Size(3) | Interval(5)`` and ``max_pending=6`` does."""

    now: float = 0.0
    closed: bool = False
    jobs: list[Job] = field(default_factory=list)
    triggers: Counter[str] = field(default_factory=Counter)

    def waiting(self, key: int | None = None) -> list[Job]:
        return [job for job in self.jobs if job.state is JobState.BATCHED and key in (None, job.key)]

    def catch_up(self, trigger: str | None = None) -> None:
        """Expire the jobs whose time is up, then dispatch the due batches, or with *trigger* all batches."""
        for job in self.waiting():
            if job.expires <= self.now:
                job.state = JobState.EXPIRED
        for key in {job.key for job in self.waiting()}:
            batch = self.waiting(key)
            if len(batch) == SIZE:
                self.dispatch(batch, "size")
            elif batch[0].submitted + SECONDS <= self.now:
                self.dispatch(batch, "interval")
            elif trigger is not None:
                self.dispatch(batch, trigger)

    def dispatch(self, batch: list[Job], trigger: str) -> None:
        self.triggers[trigger] += 1
        broken = any(job.kind == "breaking" for job in batch)
        for job in batch:
            job.state = JobState.FAILED if broken or job.kind == "bad" else JobState.SUCCEEDED
            job.trigger = trigger

    def stats(self) -> BatcherStats:
        states = Counter(job.state for job in self.jobs)
        return BatcherStats(
            accepted=len(self.jobs),
            **{state.value: states[state] for state in JobState},
            batches=sum(self.triggers.values()),
            triggers=dict(self.triggers),
            oldest=max([self.now - job.submitted for job in self.waiting()], default=0.0),
        )


def processor(jobs: list[Job]) -> list[Any]:
    if any(job.kind == "breaking" for job in jobs):
        raise SystemExit
    return [LookupError() if job.kind == "bad" else id(job) for job in jobs]


class Observed(ManualClock):
    """Reports the statistics of the batcher each time the batcher thread has nothing left to do and goes to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.reported: queue.SimpleQueue[BatcherStats] = queue.SimpleQueue()
        self.batcher: Batcher[Any, Any]

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        if threading.current_thread().name == "observed":
            self.reported.put(self.batcher.stats())
        super().wait_until(condition, moment)


class BatcherAndModel(RuleBasedStateMachine):
    submitted = Bundle("submitted")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.futures: dict[Job, JobFuture[int]] = {}
        self.clock = Observed()
        self.batcher = self.clock.batcher = Batcher[Job, Any](
            processor,
            Size(SIZE) | Interval(SECONDS),
            key=lambda job: job.key,
            max_pending=MAX_PENDING,
            executor=InlineExecutor(),
            name="observed",
            clock=self.clock,
        )
        self.reported = BatcherStats()

    def settle(self, trigger: str | None = None) -> None:
        """Wait until the batcher has reached the state of the model."""
        self.model.catch_up(trigger)
        expected = replace(self.model.stats(), oldest=0.0)
        try:
            while replace(self.reported, oldest=0.0) != expected and not self.model.closed:
                self.reported = self.clock.reported.get(timeout=10)
        except queue.Empty:
            raise AssertionError(f"expected {expected}, got {self.reported}") from None

    @rule(
        target=submitted,
        key=st.integers(0, 2),
        kind=st.sampled_from(["good", "good", "bad", "breaking"]),
        expires_in=st.sampled_from([None, None, 0.0, 1.0, 4.0, 7.0]),
    )
    def submit(self, key: int, kind: str, expires_in: float | None) -> Any:
        expires = float("inf") if expires_in is None else self.model.now + expires_in
        job = Job(key, kind, self.model.now, expires)
        try:
            future = self.batcher.submit(job, timeout=0, expires_in=expires_in)
        except BatcherClosed:
            assert self.model.closed
            return multiple()
        except BacklogFull:
            assert len(self.model.waiting()) == MAX_PENDING
            return multiple()
        assert not self.model.closed and len(self.model.waiting()) < MAX_PENDING
        self.model.jobs.append(job)
        self.futures[job] = future
        self.settle()
        return job

    @rule(job=submitted)
    def cancel(self, job: Job) -> None:
        can = job.state in (JobState.BATCHED, JobState.CANCELLED)
        assert self.futures[job].cancel() is can
        if can:
            job.state = JobState.CANCELLED
        self.settle()

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now += seconds
        self.settle()

    @rule(wait=st.booleans())
    def flush(self, wait: bool) -> None:
        assert self.batcher.flush(wait)
        self.settle("flush")

    @precondition(lambda self: len(self.model.jobs) > 15)
    @rule(cancel_futures=st.booleans())
    def shutdown(self, cancel_futures: bool) -> None:
        assert self.batcher.shutdown(cancel_futures=cancel_futures)
        self.model.closed = True
        if cancel_futures:
            for job in self.model.waiting():
                job.state = JobState.CANCELLED
        self.settle("shutdown")

    @invariant()
    def the_statistics_equal_those_of_the_model(self) -> None:
        assert self.model.stats() == self.batcher.stats()

    @invariant()
    def every_future_has_the_state_of_its_job(self) -> None:
        for job, future in self.futures.items():
            assert job.state is future.state
            assert future.done() is (job.state is not JobState.BATCHED)
            if job.state is JobState.SUCCEEDED:
                result = future.result(timeout=0)
                assert (id(job), job.trigger) == (result.value, result.batch.trigger)

    def teardown(self) -> None:
        assert self.batcher.shutdown(timeout=10)
        wait(self.futures.values())  # a failure that nobody asks about is logged, maybe within another test


TestBatcherAndModel = pytest.mark.slow(BatcherAndModel.TestCase)
TestBatcherAndModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
