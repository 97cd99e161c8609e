"""All operations at random, on real threads: the statistics must add up, and each future has exactly one outcome.

Each test runs for ``STRESS_SECONDS`` (30). The order of events depends on the machine, so a seed alone does not
reproduce a failure. It is still reported: it determines the batcher, the processor and the actions of each thread.
"""

import builtins
import concurrent.futures
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from microbatch import (
    NEVER,
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatchingPolicy,
    Interval,
    JobExpired,
    JobFuture,
    JobState,
    Size,
    Window,
)
from microbatch.testing import InlineExecutor

SECONDS = float(os.environ.get("STRESS_SECONDS", "30"))
THREADS = 16
STEPS = 60
LIMIT = 7

pytestmark = [pytest.mark.stress, pytest.mark.timeout(SECONDS + 120)]


class Job(NamedTuple):
    thread: int
    number: int
    kind: str = "good"


class Faulty(BatchingPolicy[Any]):
    """Raises now and then, in each method that a policy may define."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def answer(self, value: Any) -> Any:
        if self.dice.random() < 0.01:
            raise LookupError("from the policy")
        return value

    def due(self, window: Window[Any]) -> float:
        return float(self.answer(NEVER))

    def reason(self, window: Window[Any]) -> str:
        return str(self.answer("faulty"))

    def observe(self, report: Any) -> None:
        self.answer(None)


class Processor:
    """Does everything that a processor may and may not do, and records the batches."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.batches: deque[list[Job]] = deque()
        self.faults = 0

    def __call__(self, jobs: list[Job]) -> Any:
        self.batches.append(list(jobs))
        if self.dice.random() < 0.2:
            time.sleep(0.001)  # a slow downstream
        action = self.dice.choice([self.list, self.list, self.generator, self.nothing, self.fault])
        return action(jobs)

    def list(self, jobs: list[Job]) -> Any:
        return [ValueError(job) if job.kind == "bad" else job for job in jobs]

    def generator(self, jobs: builtins.list[Job]) -> Iterator[Any]:
        yield from self.list(jobs)

    def nothing(self, jobs: builtins.list[Job]) -> None:
        return None

    def fault(self, jobs: builtins.list[Job]) -> Any:
        self.faults += 1
        return self.dice.choice([self.raises, self.exits, self.too_few, self.too_many, self.is_interrupted, self.text])(
            jobs
        )

    def raises(self, jobs: builtins.list[Job]) -> Any:
        raise ValueError("from the processor")

    def exits(self, jobs: builtins.list[Job]) -> Any:
        raise SystemExit("from the processor")

    def too_few(self, jobs: builtins.list[Job]) -> Any:
        return jobs[1:]

    def too_many(self, jobs: builtins.list[Job]) -> Any:
        return iter([*jobs, "surplus"])

    def is_interrupted(self, jobs: builtins.list[Job]) -> Any:
        yield from self.list(jobs[:-1])
        raise KeyboardInterrupt

    def text(self, jobs: builtins.list[Job]) -> Any:
        return "x" * len(jobs)


class RecordingBatcher(Batcher[Job, Any]):
    """Records every future that it returns, and every call of their callbacks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.accepted: deque[JobFuture[Any]] = deque()
        self.called_back: deque[Any] = deque()

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> JobFuture[Any]:
        future = super().submit(job, timeout=timeout, expires_in=expires_in)
        self.accepted.append(future)
        future.add_done_callback(self.called_back.append)
        return future


class Caller:
    """One of the threads: takes random steps until all are done or the batcher is shut down."""

    def __init__(self, batcher: RecordingBatcher, number: int, seed: int, closes: bool) -> None:
        self.batcher = batcher
        self.number = number
        self.dice = random.Random(f"{seed} {number}")
        self.closing_step = self.dice.randrange(STEPS) if closes else -1
        self.futures: list[JobFuture[Any]] = []
        self.submitted = 0

    def __call__(self) -> None:
        actions = [self.submit] * 8 + [self.cancel] * 3 + [self.read] * 2 + [self.map, self.flush, self.call_back]
        for step in range(STEPS):
            try:
                self.close() if step == self.closing_step else self.dice.choice(actions)()
            except BacklogFull:
                continue
            except BatcherClosed:
                self.cancel()
                return

    def job(self) -> Job:
        self.submitted += 1
        return Job(self.number, self.submitted, self.dice.choice(["good", "good", "bad"]))

    def submit(self) -> None:
        timeout = self.dice.choice([None, None, 0, 0.001])
        expires_in = self.dice.choice([None, None, None, None, None, 0, 0.001, 0.02])
        for _ in range(self.dice.choice([1, 1, 5, 30])):
            self.futures.append(self.batcher.submit(self.job(), timeout=timeout, expires_in=expires_in))

    def cancel(self) -> None:
        for future in self.dice.sample(self.futures, min(5, len(self.futures))):
            assert future.cancel() == future.cancelled()

    def read(self) -> None:
        if self.futures:
            future = self.dice.choice(self.futures)
            try:
                future.exception(timeout=self.dice.choice([0, 0.001, 0.01]))
            except (CancelledError, TimeoutError, concurrent.futures.TimeoutError):
                pass
        stats = self.batcher.stats()
        assert stats.accepted == sum(getattr(stats, state.value) for state in JobState)

    def map(self) -> None:
        results = self.batcher.map((self.job() for _ in range(5)), buffersize=2, timeout=0.05)
        try:
            for _ in results:
                if self.dice.random() < 0.3:
                    return
        except BatcherClosed:
            raise
        except (Exception, SystemExit, KeyboardInterrupt, CancelledError):
            pass  # the exception of a job, or the timeout

    def flush(self) -> None:
        self.batcher.flush(wait=self.dice.random() < 0.5, timeout=self.dice.choice([0, 0.001, 0.05]))

    def call_back(self) -> None:
        if self.futures:
            action = self.dice.choice([self.submit_from_callback, self.raise_from_callback, self.flush_from_callback])
            self.dice.choice(self.futures).add_done_callback(action)

    def submit_from_callback(self, future: Any) -> None:
        try:
            self.batcher.submit(Job(-1, 0), timeout=0)
        except (BacklogFull, BatcherClosed):
            pass

    def raise_from_callback(self, future: Any) -> None:
        raise SystemExit("from a callback")

    def flush_from_callback(self, future: Any) -> None:
        self.batcher.flush(wait=False)
        future.cancel()

    def close(self) -> None:
        wait, cancel_futures = self.dice.random() < 0.5, self.dice.random() < 0.5
        self.batcher.shutdown(wait, cancel_futures=cancel_futures, timeout=self.dice.choice([0, 0.01]))


def policies(dice: random.Random) -> BatchingPolicy[Any]:
    return dice.choice(
        [
            Size(LIMIT),
            Size(LIMIT) | Interval(0),
            Size(LIMIT) | Interval(0.002),
            Size(LIMIT) & Interval(0.002),
            Size(LIMIT) | Faulty(dice) | Interval(0.001),
        ]
    )


def one_round(seed: int, pool: ThreadPoolExecutor) -> Counter[str]:
    """Use a new batcher from all threads, shut it down, and check it. Return the counts."""
    dice = random.Random(seed)
    processor = Processor(random.Random(seed))
    workers = dice.choice([1, 1, 3])
    key: Callable[[Job], Hashable] | None = dice.choice([None, lambda job: job.number % 3])
    supplied: Executor | None = dice.choice([None, None, ThreadPoolExecutor(2), InlineExecutor()])
    batcher = RecordingBatcher(
        processor, policies(dice), key=key, max_pending=dice.choice([7, 50, 0]), max_workers=workers, executor=supplied
    )
    closes = dice.random() < 0.5
    callers = [Caller(batcher, number, seed, closes and number == 0) for number in range(THREADS)]
    for done in [pool.submit(caller) for caller in callers]:
        done.result(timeout=60)
    assert batcher.shutdown(timeout=60)
    if supplied is not None:
        supplied.shutdown()
    check(batcher, processor, in_order=workers == 1)
    stats = batcher.stats()
    counts = Counter({state.value: getattr(stats, state.value) for state in JobState})
    return counts + Counter(jobs=stats.accepted, batches=stats.batches, faults=processor.faults, rounds=1)


def check(batcher: RecordingBatcher, processor: Processor, in_order: bool) -> None:
    stats, states = batcher.stats(), Counter(future.state for future in batcher.accepted)
    assert states == Counter({state: getattr(stats, state.value) for state in JobState})
    assert len(batcher.accepted) == stats.accepted == sum(states.values())
    assert 0 == stats.queued + stats.batched + stats.running
    assert Counter(batcher.accepted) == Counter(batcher.called_back), "a callback was not called exactly once"
    for future in batcher.accepted:
        assert future.state is outcome_of(future)
    check_processed(batcher, processor, in_order)


def outcome_of(future: JobFuture[Any]) -> JobState:
    if future.cancelled():
        return JobState.CANCELLED
    error = future.exception(timeout=0)
    if error is None:
        assert future.result(timeout=0).value in (None, future.job)
        return JobState.SUCCEEDED
    return JobState.EXPIRED if isinstance(error, JobExpired) else JobState.FAILED


def check_processed(batcher: RecordingBatcher, processor: Processor, in_order: bool) -> None:
    processed = [job for batch in processor.batches for job in batch if job.thread >= 0]
    assert all(1 <= len(batch) <= LIMIT for batch in processor.batches)
    assert len(processed) == len(set(processed)), "a job was processed twice"
    states = {future.job: future.state for future in batcher.accepted}
    assert {states[job] for job in processed} <= {JobState.SUCCEEDED, JobState.FAILED}
    assert {job for job, state in states.items() if state is JobState.SUCCEEDED and job.thread >= 0} <= set(processed)
    if in_order:
        last: dict[Any, int] = {}
        for job in processed:
            lane = job.thread, job.number % 3
            assert last.get(lane, 0) < job.number, "a job overtook an earlier one of the same thread and key"
            last[lane] = job.number


@pytest.fixture(params=[None, 1e-6], ids=["at its own pace", "switching all the time"])
def pace(request: pytest.FixtureRequest) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param or before)
    yield
    sys.setswitchinterval(before)


def test_every_accepted_job_has_exactly_one_outcome(pace: None, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(10**9)
    total: Counter[str] = Counter()
    end = time.monotonic() + SECONDS
    with ThreadPoolExecutor(THREADS) as pool:
        while time.monotonic() < end:
            try:
                total += one_round(seed, pool)
            except BaseException as error:
                raise AssertionError(f"with seed {seed}") from error
            seed += 1
    with capsys.disabled():
        print("", dict(total))
    assert total["rounds"] > 0
