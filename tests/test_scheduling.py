"""Policies that look at the weights, the deadlines or the keys of the jobs, alone in a collector and in a batcher."""

import math
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch import (
    NEVER,
    NOW,
    Batcher,
    BatchingPolicy,
    BatchInfo,
    BatchReport,
    Hints,
    InTime,
    Interval,
    JobState,
    JobTooLarge,
    Natural,
    OldestFirst,
    Padded,
    PerKey,
    Rate,
    Size,
    Weight,
    Window,
    length_buckets,
)
from microbatch.simulation import Arrival, callers, lognormal, poisson, simulate
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from microbatch._forming.collector import Batch
from tests.collectors import Job, collector, drop, take_all


class Seen(BatchingPolicy[Any]):
    """Records what it sees of the heaviest job, of the first expiry and of the running batches of the key."""

    hints = Hints(watches_keys=True)

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float, int]] = []

    def due(self, window: Window[Any]) -> float:
        self.seen.append((window.count, window.heaviest, window.expires, window.key_in_flight))
        return NOW if window.count >= 3 else NEVER

    def last(self) -> tuple[int, float, float, int]:
        return self.seen[-1]


# -- what a window shows --


def test_a_window_shows_the_heaviest_job_and_the_first_expiry_of_the_open_batch() -> None:
    policy = Seen()
    c = collector(policy)
    first, second = Job("a", weight=2.0, _expires=9.0), Job("b", weight=5.0, _expires=7.0)
    c.add([first])
    take_all(c, 0)
    assert (1, 2.0, 9.0, 0) == policy.last()
    c.add([second])
    take_all(c, 0)
    assert (2, 5.0, 7.0, 0) == policy.last()
    drop(c, second)
    take_all(c, 0)
    assert (1, 2.0, 9.0, 0) == policy.last()


def test_a_window_of_jobs_without_weight_or_deadline_shows_a_heaviest_job_of_1_and_no_expiry() -> None:
    policy = Seen()
    c = collector(policy)
    c.add([Job("a"), Job("b")], uniform=True)
    take_all(c, 0)
    assert (2, 1.0, NEVER, 0) == policy.last()


def test_a_new_batch_knows_nothing_of_the_heaviest_job_of_the_one_before_it() -> None:
    policy = Seen()
    c = collector(policy, workers=2)
    c.add([Job("a", weight=9.0, _expires=5.0), Job("b"), Job("c")])
    assert ["abc:seen"] == take_all(c, 0)
    c.add([Job("d", weight=2.0)])
    take_all(c, 0)
    assert (1, 2.0, NEVER) == policy.last()[:3]


def test_a_window_shows_how_many_batches_of_its_key_run() -> None:
    policy = Seen()
    c = collector(policy, workers=9)
    c.add([Job(letter, key="x") for letter in "abc"])
    batch = c.take(0)
    assert batch is not None
    c.started(0, batch.runs)
    c.add([Job("d", key="x"), Job("e", key="z")])
    take_all(c, 0)
    assert {(1, 1), (1, 0)} == {(count, running) for count, _, _, running in policy.seen[-2:]}
    c.finished(1.0, batch.runs)
    take_all(c, 0)
    assert 0 == policy.last()[3]


# -- Padded --


@pytest.mark.parametrize(
    "policy", [Padded(100), Padded(100) | Interval(1), Natural() | Padded(100), Padded(100) & Size(9)]
)
def test_no_batch_is_larger_than_the_limit_of_padded_whatever_happens(policy: BatchingPolicy[Any]) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        c = collector(policy, workers=3)
        now, waiting = 0.0, list[Job]()
        for step in range(60):
            what = chance.choice(["add", "add", "drop", "flush", "wait", "finish", "close" if step == 50 else "add"])
            if what == "add":
                new = [Job("a", chance.randrange(2), chance.uniform(0, 60), now, _epoch=step) for _ in range(3)]
                waiting += new
                c.add(new)
            elif what == "drop" and waiting:
                drop(c, waiting.pop(chance.randrange(len(waiting))))
            elif what == "flush":
                c.flush(step)
            elif what == "close":
                c.flush(-1, closing=True)
            elif what == "wait":
                now += 1
            elif c.in_flight:
                c.finished(1.0)
            while (batch := c.take(now)) is not None:
                assert batch.error is None
                for job in batch.entries:
                    waiting.remove(job)
                    job._is_waiting = False
                assert len(batch.entries) * max(job.weight for job in batch.entries) <= 100
                c.started(now, batch.runs)


def test_padded_dispatches_when_a_waiting_job_would_pad_the_batch_beyond_the_limit() -> None:
    c = collector(Padded(100), workers=9)
    c.add([Job("a", weight=10.0), Job("b", weight=10.0), Job("c", weight=40.0)])
    assert ["ab:padded"] == take_all(c, 0)
    c.add([Job("d", weight=30.0)])
    assert ["cd:padded"] == take_all(c, 0)  # a third one of 40 would not fit


def test_a_job_that_alone_is_larger_than_the_limit_of_padded_is_rejected() -> None:
    with Batcher[str, Any](list, Padded(10) | Natural(), weigh=len) as batcher:
        with pytest.raises(JobTooLarge) as caught:
            batcher.submit("x" * 11)
        assert (11, 10) == (caught.value.weight, caught.value.limit)
        assert "x" * 10 == batcher.submit("x" * 10).result(timeout=10).value


# -- which key is next --


def test_by_default_keys_take_turns() -> None:
    c = collector(Size(1))
    c.add([Job(letter, key=letter) for letter in "aaab"])
    assert ["a:size", "b:size", "a:size", "a:size"] == one_at_a_time(c)


def test_with_oldest_first_the_batch_with_the_oldest_job_is_next() -> None:
    c = collector(Size(1) & OldestFirst())
    c.add([Job(letter, key=letter, submitted=moment) for moment, letter in enumerate("aaab")])
    assert ["a:size & oldestfirst"] * 3 + ["b:size & oldestfirst"] == one_at_a_time(c)


def one_at_a_time(c: Any) -> list[str]:
    taken = []
    while c:
        taken += take_all(c, 10)
        c.finished()
    return taken


# -- length_buckets --


@given(st.lists(st.floats(1e-9, 1e9), min_size=1), st.floats(1.001, 100))
def test_no_job_is_padded_to_more_than_the_ratio_times_its_length(lengths: list[float], ratio: float) -> None:
    key, longest, shortest = length_buckets(float, ratio), dict[float, float](), dict[float, float]()
    for length in lengths:
        bound = key(length)
        assert length <= bound
        longest[bound] = max(longest.get(bound, 0.0), length)
        shortest[bound] = min(shortest.get(bound, NEVER), length)
    assert all(longest[bound] <= ratio * shortest[bound] * (1 + 1e-9) for bound in longest)


@given(st.floats(1e-9, 1e9), st.floats(1.001, 100))
def test_a_bucket_is_as_wide_as_the_ratio_allows(length: float, ratio: float) -> None:
    key = length_buckets(float, ratio)
    bound = key(length)
    assert bound == key(bound) == key(bound / ratio * (1 + 1e-9)) != key(bound * (1 + 1e-9))


def test_a_bucket_includes_its_upper_bound_and_a_length_of_0_has_its_own() -> None:
    key = length_buckets(float)
    assert [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 8.0] == [*map(key, [0, 0.25, 0.3, 1, 2, 3, 4, 5])]
    assert [10.0**power for power in range(1, 9)] == [
        length_buckets(float, 10)(10.0**power) for power in range(1, 9)  # a logarithm alone would be off by one
    ]


@pytest.mark.parametrize("length", [-1.0, NEVER, math.nan, 1e200])
def test_a_job_whose_length_is_no_length_is_rejected_when_it_is_submitted(length: float) -> None:
    with Batcher[float, float](list, key=length_buckets(float)) as batcher:
        with pytest.raises(ValueError, match="^the length of a job must be "):
            batcher.submit(length)
    with Batcher[Any, Any](list, key=length_buckets()) as batcher:
        with pytest.raises(TypeError, match="has no len"):
            batcher.submit(3)


def test_only_texts_of_one_bucket_share_a_batch() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Size(2) | Interval(60), key=length_buckets(), executor=InlineExecutor()) as batcher:
        for length in (3, 100, 4, 65):
            batcher.submit("a" * length)
    assert [[3, 4], [100, 65]] == [[len(text) for text in batch] for batch in processor.batches]


# -- PerKey --


PER_KEY: list[BatchingPolicy[Any]] = [
    (Size(2) | Natural()) & PerKey(),
    Size(2) & PerKey(),
    PerKey() & (Size(2) | Interval(1)),
    Size(2) & PerKey() & OldestFirst(),
    (Size(2) | Interval(1)) & Rate(50, per=1) & PerKey(),
    Weight(2) & PerKey() | Size(2) & PerKey(),
]


@pytest.mark.parametrize("policy", PER_KEY, ids=repr)
def test_no_two_batches_of_a_key_run_at_once_whatever_happens(policy: BatchingPolicy[Any]) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        c = collector(policy, workers=4)
        now, running, waiting = 0.0, list[Batch](), list[Job]()
        for step in range(80):
            what = chance.choice(
                ["add", "add", "drop", "flush", "wait", "finish", "finish", "close" if step > 60 else "add"]
            )
            if what == "add":
                new = [Job(step, chance.randrange(3), 1.0, now, _epoch=step) for _ in range(chance.randint(1, 5))]
                waiting += new
                c.add(new)
            elif what == "drop" and waiting:
                drop(c, waiting.pop(chance.randrange(len(waiting))))
            elif what == "flush":
                c.flush(step)
            elif what == "close":
                c.flush(-1, closing=True)
            elif what == "wait":
                now += 0.5
            elif running:
                c.finished(0.5, running.pop(chance.randrange(len(running))).runs)
            while (batch := c.take(now, pressed=chance.random() < 0.2)) is not None:
                assert batch.error is None
                assert batch.key not in [each.key for each in running]
                for job in batch.entries:
                    assert job is next(each for each in waiting if each.key == batch.key)
                    waiting.remove(job)
                    job._is_waiting = False
                running.append(batch)
                c.started(now, batch.runs)
        c.flush(-1, closing=True)
        while waiting:  # at the end, all jobs get out
            assert running or take_all(c, now)
            for each in running:
                c.finished(0.5, each.runs)
            running.clear()
            while (batch := c.take(now)) is not None:
                for job in batch.entries:
                    waiting.remove(job)
                    job._is_waiting = False
                running.append(batch)
                c.started(now, batch.runs)


def test_an_interrupted_leader_remembers_which_keys_have_a_running_batch() -> None:
    c = collector(Size(1) & PerKey(), workers=4)
    c.add([Job("a", key="x"), Job("b", key="x")])
    batch = c.take(0.0)
    assert batch is not None
    c.started(0.0, batch.runs)
    successor = c.successor(c.policy, [batch.runs])
    successor.add([Job("b", key="x"), Job("c", key="y")])
    assert ["c:size & perkey"] == take_all(successor, 0)
    successor.finished(1.0, batch.runs)
    assert ["b:size & perkey"] == take_all(successor, 0)


class Row:
    """Like a model of Django: its key is lost when the row is deleted, and a key that is lost has no hash."""

    def __init__(self, pk: int | None) -> None:
        self.pk = pk

    def __hash__(self) -> int:
        if self.pk is None:
            raise TypeError("no key")
        return hash(self.pk)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and self.pk == other.pk


def test_a_key_that_loses_its_hash_in_the_processor_holds_no_batch_back() -> None:
    def delete(rows: list[Row]) -> list[int]:
        for row in rows:
            row.pk = None
        return [1] * len(rows)

    with Batcher(delete, Size(1) & PerKey(), key=lambda row: row, max_workers=2) as batcher:
        futures = [batcher.submit(Row(1)) for _ in range(4)]
        assert [1] * 4 == [future.result(timeout=10).value for future in futures]


class Once(BatchingPolicy[Any]):
    """Dispatches a batch of a key when no other one runs, but, unlike `PerKey`, does not insist."""

    hints = Hints(watches_flow=False, watches_keys=True)

    def due(self, window: Window[Any]) -> float:
        return NEVER if window.key_in_flight else NOW


def test_a_full_batch_waits_for_a_policy_that_waits_for_the_key() -> None:
    c = collector(Size(2) & Once(), workers=4)
    c.add([Job(letter, key="x") for letter in "abcd"])
    batch = c.take(0.0)
    assert batch is not None
    c.started(0.0, batch.runs)
    assert [] == take_all(c, 0)
    c.finished(1.0, batch.runs)
    assert ["cd:size & once"] == take_all(c, 0)


class Vip(PerKey):
    def due(self, window: Window[Any]) -> float:
        return NOW if window.key == "vip" else super().due(window)


def test_a_subclass_of_per_key_may_be_less_strict() -> None:
    c = collector(Vip(), workers=4)
    c.add([Job("a", key="vip")])
    taken = take_all(c, 0)
    c.add([Job("b", key="vip")])
    assert ["a:vip", "b:vip"] == taken + take_all(c, 0)


def test_a_held_batch_explains_that_it_waits_for_a_batch_of_its_key() -> None:
    c = collector(Size(1) & PerKey(), workers=4)
    c.add([Job("a", key="x"), Job("b", key="x")])
    take_all(c, 0)
    assert ["open batch of key 'x': 1 job, held back until a running batch of its key is over"] == c.describe(0.0)


Ending = Callable[[Batcher[Any, Any]], object]
ENDINGS: dict[str, Ending] = {
    "a flush": lambda batcher: batcher.flush(wait=False),
    "a shutdown": lambda batcher: batcher.shutdown(wait=False),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("pool", [False, True], ids=["own threads", "executor"])
def test_not_even_a_flush_or_a_shutdown_runs_two_batches_of_a_key_at_once(ending: str, pool: bool) -> None:
    processor = RecordingProcessor[tuple[str, int]]()
    processor.hold()
    with ThreadPoolExecutor(4) as executor:
        options: dict[str, Any] = {"executor": executor} if pool else {}
        with Batcher(processor, Size(2) & PerKey(), key=lambda job: job[0], max_workers=4, **options) as batcher:
            futures = [batcher.submit(("a", number)) for number in range(4)]
            processor.wait_for_batches(1)
            futures += [batcher.submit(("b", 0)), batcher.submit(("a", 4))]
            ENDINGS[ending](batcher)
            assert [("b", 0)] == processor.wait_for_batches(2)[1]
            assert 2 == len(processor.batches)
            processor.release()
            wait(futures, timeout=10)
        assert [0, 1, 2, 3, 4] == [number for batch in processor.batches for key, number in batch if key == "a"]


def test_per_key_keeps_the_order_of_each_key_with_many_workers_and_callers() -> None:
    finished: dict[int, list[int]] = defaultdict(list)

    def process(jobs: list[tuple[int, int]]) -> list[int]:
        for key, number in jobs:
            finished[key].append(number)
        return [number for _, number in jobs]

    with Batcher(process, (Size(7) | Natural()) & PerKey(), key=lambda job: job[0], max_workers=8) as batcher:

        def submit_all(key: int) -> None:
            for number in range(300):
                batcher.submit((key, number))

        threads = [threading.Thread(target=submit_all, args=[key]) for key in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert {key: [*range(300)] for key in range(6)} == dict(finished)


def test_a_batch_that_fails_lets_the_next_batch_of_its_key_go() -> None:
    def fail_once(jobs: list[int]) -> list[int]:
        if 0 in jobs:
            raise ValueError("first")
        return jobs

    with Batcher(fail_once, Size(1) & PerKey(), key=lambda job: "same", max_workers=3) as batcher:
        futures = [batcher.submit(number) for number in range(3)]
        assert isinstance(futures[0].exception(timeout=10), ValueError)
        assert [1, 2] == [future.result(timeout=10).value for future in futures[1:]]


def test_a_caller_that_waits_for_room_gets_it_though_the_oldest_batch_is_held() -> None:
    processor = RecordingProcessor[str]()
    processor.hold()
    policy = Interval(60) & PerKey()
    with Batcher(processor, policy, key=lambda job: job[0], max_workers=2, max_pending=2) as batcher:
        futures = [batcher.submit("a0")]
        batcher.flush(wait=False)
        processor.wait_for_batches(1)
        futures += [batcher.submit("a1"), batcher.submit("a2")]
        blocked = threading.Thread(target=lambda: futures.append(batcher.submit("a3", timeout=10)))
        blocked.start()
        processor.release()
        blocked.join(10)
        batcher.flush(timeout=10)
        assert ["a0", "a1", "a2", "a3"] == [future.result(timeout=10).value for future in futures]


def test_if_the_oldest_batch_is_held_a_full_queue_dispatches_the_next_one(processor: RecordingProcessor[str]) -> None:
    policy = Interval(60) & PerKey()
    with Batcher(processor, policy, key=lambda job: job[0], max_workers=2, max_pending=2) as batcher:
        batcher.submit("a0")
        batcher.flush(wait=False)
        processor.wait_for_batches(1)
        batcher.submit("a1")
        batcher.submit("b1")
        assert "c1" == batcher.submit("c1", timeout=10).job
        assert [["a0"], ["b1"]] == processor.wait_for_batches(2)[:2]
        processor.release()


# -- InTime --


def taught(policy: BatchingPolicy[Any], seconds: float) -> BatchingPolicy[Any]:
    policy.observe(BatchReport(BatchInfo(1, 2, 2.0, None, ""), seconds, 0))
    return policy


def test_a_job_with_a_deadline_is_dispatched_in_time_for_it() -> None:
    clock, processor = ManualClock(), RecordingProcessor[str]()
    policy = taught(Interval(60) | InTime(), 0.5)
    with Batcher(processor, policy, clock=clock) as batcher:
        patient = batcher.submit("patient")
        urgent = batcher.submit("urgent", expires_in=10.0)
        clock.wait_for_sleeper(9.5)
        assert "due in 9.500 s by intime" in batcher.explain()
        clock.advance(9.5)
        assert ["urgent", "patient"] == [each.result(timeout=10).value for each in (urgent, patient)]


def test_without_in_time_a_job_expires_beside_an_idle_worker() -> None:
    clock = ManualClock()
    with Batcher[str, str](list, Interval(60), clock=clock) as batcher:
        future = batcher.submit("urgent", expires_in=10.0)
        clock.wait_for_sleeper(10.0)
        clock.advance(10)
        assert future.exception(timeout=10) is not None
        assert JobState.EXPIRED is future.state


def test_the_first_batch_with_a_deadline_is_dispatched_immediately() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Interval(60) | InTime(), clock=ManualClock(), executor=InlineExecutor()) as batcher:
        assert "urgent" == batcher.submit("urgent", expires_in=1.0).result(timeout=10).value


def test_an_open_batch_is_dispatched_earlier_if_batches_turn_out_to_take_longer() -> None:
    c = collector(taught(Interval(60) | InTime(), 0.5), workers=2)
    c.add([Job("a", _expires=10.0)])
    assert [] == take_all(c, 0.0)
    assert 9.5 == c.next_moment()
    c.started(0.0)
    c.finished(4.0)
    taught(c.policy, 4.0)
    assert [] == take_all(c, 4.0)
    assert 6.0 == c.next_moment()


# -- in the simulator --


class Relabelled(InTime):
    """Overrides nothing that matters."""

    def reason(self, window: Window[Any]) -> str:
        return "deadline"


def test_a_subclass_of_in_time_is_asked_again_when_it_has_learned() -> None:
    c = collector(taught(Interval(60) | Relabelled(), 0.5), workers=2)
    c.add([Job("a", _expires=10.0)])
    assert [] == take_all(c, 0.0)
    c.started(0.0)
    c.finished(4.0)
    taught(c.policy, 4.0)
    assert [] == take_all(c, 4.0)
    assert 6.0 == c.next_moment()


def test_the_simulator_expires_jobs_and_counts_those_that_are_done_in_time() -> None:
    jobs = [Arrival(0.0, expires_in=5.0), Arrival(1.0, expires_in=0.5), Arrival(2.0), Arrival(2.0, expires_in=1.5)]
    report = simulate(Interval(3), jobs, lambda size: 1.0)
    # At moment 3, the first and the last two are dispatched. They end at moment 4, after the deadline of the last one.
    assert (3, 1, 2) == (report.jobs, report.expired, report.in_time)


def test_a_simulation_in_which_all_jobs_expire_has_no_latency() -> None:
    report = simulate(Interval(3), [0.0, 2.0], lambda size: 1.0, expires_in=1.0)
    assert (0, 0, 2, 0) == (report.jobs, report.batches, report.expired, report.in_time)
    assert math.isnan(report.mean) and math.isnan(report.p99)


def test_a_caller_whose_job_expires_submits_its_next_one() -> None:
    report = simulate(Size(1) | Natural(), callers(2, jobs=100), lambda size: 1.0, expires_in=0.3)
    # While one caller waits for its result for a second, the jobs of the other one expire, three in a row.
    assert (25, 75) == (report.jobs, report.expired)


def test_in_time_saves_the_jobs_that_an_interval_lets_expire() -> None:
    chance = random.Random(1)
    jobs = [Arrival(number / 100, expires_in=0.1 if chance.random() < 0.1 else 5.0) for number in range(2_000)]
    without = simulate(Size(100) | Interval(1), jobs, lambda size: 0.01 + 0.0005 * size)
    with_it = simulate(Size(100) | Interval(1) | InTime(), jobs, lambda size: 0.01 + 0.0005 * size)
    assert without.expired > 150 and with_it.expired == 0
    assert with_it.in_time > 1_980


def test_padded_keeps_a_model_that_pads_from_collapsing() -> None:
    def p50(policy: BatchingPolicy[Any]) -> float:
        return simulate(
            policy,
            poisson(36, jobs=1_000),
            cost=lambda batch: 0.010 + 0.0004 * batch.padded,
            weights=lognormal(5, 17, 256),
        ).p50

    assert p50(Padded(256) | Natural()) < 0.2 * p50(Size(100) | Natural())
