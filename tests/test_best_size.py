"""`BestSize`, and with it the default policy, finds out whether larger batches pay, and if not, keeps them small."""

import logging
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch import (
    DEFAULT_POLICY,
    NEVER,
    Adaptive,
    Batcher,
    BatchingPolicy,
    BatchInfo,
    BatchReport,
    BestSize,
    InTime,
    Natural,
    Size,
    Window,
)
from microbatch.simulation import Arrival, SimulatedBatch, SimulationReport, callers, lognormal, poisson, simulate
from microbatch.testing import InlineExecutor

Cost = Callable[[SimulatedBatch], float]


def padded(batch: SimulatedBatch) -> float:
    return 0.004 + 0.0002 * batch.padded


def convex(batch: SimulatedBatch) -> float:
    return 0.002 + 0.0005 * batch.count + 0.00005 * batch.count**2


def cliff(batch: SimulatedBatch) -> float:
    return 0.005 + 0.0001 * batch.count + (0.05 if batch.count > 32 else 0.0)


def database(batch: SimulatedBatch) -> float:
    return 0.005 + 0.00002 * batch.count


def report(size: int, time: float, weight: float | None = None, failed: int = 0) -> BatchReport:
    return BatchReport(BatchInfo(1, size, size if weight is None else weight, None, ""), time, failed)


def room(policy: BatchingPolicy[object]) -> float:
    """Return how many jobs a batch may hold."""
    return next(count for count in range(1, 10**6) if not policy.fits(Window(count=count), 1.0))


# -- what it learns --


def test_a_batch_may_hold_the_maximum_as_long_as_larger_batches_pay() -> None:
    policy = BestSize(100)
    for size in (1, 3, 9, 30, 100, 60, 1, 100):
        policy.observe(report(size, 0.005 + 0.00002 * size))
    assert 100 == room(policy)


def test_a_batch_holds_no_more_jobs_than_pay() -> None:
    policy = BestSize(100)
    for size in (1, 2, 3, 4, 6, 8, 12):
        policy.observe(report(size, 0.01 + 0.001 * size**2))
    assert 3 == room(policy)


def test_a_full_batch_is_due_and_its_trigger_is_bestsize() -> None:
    policy = BestSize(3)
    assert [NEVER, -NEVER] == [policy.due(Window(count=count)) for count in (2, 3)]
    assert "bestsize" == policy.reason(Window(count=3))


def test_a_batch_whose_jobs_all_failed_teaches_nothing() -> None:
    policy = BestSize(100)
    policy.observe(report(1, 0.01))
    policy.observe(report(50, 9.0, failed=50))
    assert 100 == room(policy)


def test_a_trial_ends_even_if_its_batch_fails() -> None:
    policy = BestSize(100)
    policy.observe(report(100, 0.01))
    tried = int(room(policy))
    assert tried < 100
    policy.observe(report(tried, 0.01, failed=tried))
    assert 100 == room(policy)


def test_it_learns_from_batches_in_which_some_jobs_failed() -> None:
    policy = BestSize(100)
    for size in (1, 2, 3, 4, 6, 8, 12):
        policy.observe(report(size, 0.01 + 0.001 * size**2, failed=size // 2))
    assert 3 == room(policy)


@pytest.mark.parametrize("time", [NEVER, math.nan, -1.0])
def test_a_time_from_a_broken_clock_teaches_nothing(time: float) -> None:
    policy = BestSize(100)
    policy.observe(report(1, 0.01))
    policy.observe(report(50, time))
    assert 100 == room(policy)


def test_one_slow_batch_among_many_changes_little() -> None:
    policy = BestSize(100)
    for _ in range(20):
        for size in (1, 10, 50, 100):
            policy.observe(report(size, 0.005 + 0.00002 * size))
    policy.observe(report(100, 5.0))
    rooms = []
    for _ in range(100):
        rooms.append(int(room(policy)))
        policy.observe(report(rooms[-1], 0.005 + 0.00002 * rooms[-1]))
    assert sum(each >= 64 for each in rooms) > 90 and rooms[-1] >= 96


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1e6), st.floats(0, 1e9)), max_size=80), st.integers(1, 150))
def test_whatever_it_learns_a_batch_may_hold_at_least_one_job_and_at_most_the_maximum(
    reports: list[tuple[int, float, float]], most: int
) -> None:
    policy = BestSize(most)
    for size, time, weight in reports:
        policy.observe(report(size, time, weight))
        assert 1 <= room(policy) <= most
        assert policy._room(Window()) == room(policy)


@pytest.mark.parametrize("weight", [0.0, 1e300, 5e-324])
def test_extreme_weights_do_no_harm(weight: float) -> None:
    policy = BestSize(100)
    for size in (1, 2, 3, 4, 6, 8, 12) * 3:
        policy.observe(report(size, 0.01 + 0.001 * size**2, weight * size))
    assert 1 <= room(policy) <= 100


# -- under load --


@pytest.mark.simulation
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_default_does_not_collapse_where_larger_batches_do_not_pay(load: float, workers: int) -> None:
    rate = load * workers / 0.0102  # what a worker does if it takes the texts one by one

    def p50(policy: BatchingPolicy[object]) -> float:
        arrivals = poisson(rate, jobs=5_000 * workers)
        return simulate(policy, arrivals, cost=padded, weights=lognormal(5, 17, 256), max_workers=workers).p50

    assert p50(DEFAULT_POLICY) < 1.3 * p50(Size(1) | Natural())


@pytest.mark.slow
@pytest.mark.parametrize("rate", [100, 2_000, 10_000, 13_000])
def test_the_default_is_as_good_as_a_fixed_size_where_larger_batches_pay(rate: float) -> None:
    fixed = simulate(Size(100) | Natural(), poisson(rate, jobs=5_000), cost=database)
    learned = simulate(DEFAULT_POLICY, poisson(rate, jobs=5_000), cost=database)
    assert learned.mean < 1.02 * fixed.mean
    assert learned.p99 < 1.05 * fixed.p99


@pytest.mark.simulation
@pytest.mark.parametrize("cost, best", [(padded, 1), (convex, 6), (cliff, 32), (database, 100)])
def test_a_flood_is_processed_nearly_as_fast_as_with_the_best_size(cost: Cost, best: int) -> None:
    def time(policy: BatchingPolicy[object], jobs: int) -> float:
        run = simulate(policy, [0.0] * jobs, cost=cost, weights=lognormal(5, 17, 256))
        return max(each.ended for each in run.runs)

    learning = time(DEFAULT_POLICY, 10_000)
    learned = time(DEFAULT_POLICY, 40_000) - learning
    assert time(Size(best) | Natural(), 30_000) > 0.9 * learned


def drifting(*costs: Cost) -> Cost:
    """Return a cost that changes to the next of *costs* after every 4,000 jobs."""
    done = 0

    def cost(batch: SimulatedBatch) -> float:
        nonlocal done
        done += batch.count
        return costs[min(done // 4_000, len(costs) - 1)](batch)

    return cost


@pytest.mark.simulation
def test_it_recovers_when_larger_batches_begin_to_pay() -> None:
    run = simulate(BestSize(100) | Natural(), [0.0] * 60_000, cost=drifting(convex, database))
    assert 100 in run.batch_sizes[-50:]


def test_it_shrinks_when_larger_batches_stop_paying() -> None:
    run = simulate(BestSize(100) | Natural(), [0.0] * 12_000, cost=drifting(database, convex))
    assert max(run.batch_sizes[-8:]) <= 12


@pytest.mark.slow
def test_callers_that_wait_for_their_results_get_batches_of_the_size_that_pays() -> None:
    def mean(policy: BatchingPolicy[object]) -> SimulationReport:
        return simulate(policy, callers(32, jobs=6_000), cost=padded, weights=lognormal(5, 17, 256))

    single, default = mean(Size(1) | Natural()), mean(DEFAULT_POLICY)
    assert default.mean < 1.15 * single.mean


# -- in a batcher --


def test_each_batcher_learns_for_itself() -> None:
    def slow_in_bulk(jobs: list[int]) -> list[int]:
        return jobs

    policy = BestSize(10) | Natural()
    with Batcher(slow_in_bulk, policy, executor=InlineExecutor()) as one, Batcher(slow_in_bulk, policy) as two:
        for number in range(5):
            one.submit(number).result(timeout=10)
            two.submit(number).result(timeout=10)
    assert repr(policy) == repr(BestSize(10) | Natural())
    # The policy that was passed has learned nothing, so it allows what a new one allows after the same report.
    policy.observe(report(4, 0.1))
    fresh = BestSize(10) | Natural()
    fresh.observe(report(4, 0.1))
    assert room(policy) == room(fresh)


class Mine(Adaptive):
    """A policy of a user, who may want to look at it."""


@pytest.mark.parametrize("policy", [Size(3), Natural(), Mine(0.1), Size(3) | Natural() & Mine(0.1)], ids=repr)
def test_a_policy_that_does_not_learn_or_is_a_users_own_is_not_copied(policy: BatchingPolicy[object]) -> None:
    assert policy._own() is policy


@pytest.mark.parametrize(
    "policy", [BestSize(), Adaptive(1), InTime(), Size(3) | BestSize(), Adaptive(1) & Natural()], ids=repr
)
def test_a_policy_that_learns_is_copied_with_what_it_knows(policy: BatchingPolicy[object]) -> None:
    policy.observe(report(3, 1.0))
    own = policy._own()
    assert own is not policy and repr(own) == repr(policy)
    assert own.due(Window(count=1, expires=9.0)) == policy.due(Window(count=1, expires=9.0))
    before = policy._learned
    for size in range(1, 9):
        own.observe(report(size, 0.1 * size**2))
    assert before == policy._learned


def test_the_log_and_explain_say_that_larger_batches_do_not_pay(caplog: pytest.LogCaptureFixture) -> None:
    policy = BestSize(100)
    with caplog.at_level(logging.INFO, "microbatch"):
        for size in (1, 2, 4, 8, 2, 4, 8):
            policy.observe(report(size, 0.001 * size**2))
    note = "batches hold at most 1 jobs now, because larger ones took no less time per job"
    assert [f"BestSize(100): {note}"] == [record.getMessage() for record in caplog.records]
    assert logging.INFO == caplog.records[0].levelno
    with Batcher[str, str](list, policy | Natural()) as batcher:
        assert note in batcher.explain()


def test_explain_says_nothing_while_larger_batches_pay() -> None:
    with Batcher[str, str](list) as batcher:
        batcher.submit("job").result(timeout=10)
        assert "at most" not in batcher.explain()


def test_weights_make_up_for_batches_of_uneven_jobs() -> None:
    jobs = [Arrival(number * 0.02, weight=1.0 if number % 2 else 50.0) for number in range(2_000)]
    run = simulate(BestSize(100) | Natural(), jobs, cost=lambda batch: 0.004 + 0.0003 * batch.weight)
    assert run.p50 < 1.3 * simulate(Size(1) | Natural(), jobs, cost=lambda batch: 0.004 + 0.0003 * batch.weight).p50


def test_a_batch_that_is_fast_by_chance_does_not_make_batches_smaller() -> None:
    policy = BestSize(100)
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 100, 100, 100, 100):
        policy.observe(report(size, database(SimulatedBatch(size, size, 1.0))))
    policy.observe(report(64, 0.003))  # 5 ms for a call, and yet 64 jobs in 3 ms
    assert policy.fits(Window(count=99), weight=1.0)
