"""The simulation of policies, in virtual time."""

import random
from dataclasses import replace
from typing import Any

import pytest

from microbatch import (
    DEFAULT_POLICY,
    NEVER,
    NOW,
    AllWaiting,
    BatchingPolicy,
    BatchReport,
    Hints,
    Interval,
    JobTooLarge,
    Natural,
    Size,
    Weight,
    Window,
)
from microbatch.simulation import (
    Arrival,
    Run,
    SimulatedBatch,
    SimulationReport,
    callers,
    lognormal,
    poisson,
    simulate,
)


def one_second(size: int) -> float:
    return 1.0


def test_a_lone_job_takes_as_long_as_the_processor() -> None:
    report = simulate(Natural(), [5.0], lambda size: 0.25)
    assert (1, 1, (1,), 0.25, 0.25, 0.0) == (
        report.jobs,
        report.batches,
        report.batch_sizes,
        report.mean,
        report.p99,
        report.queue_time,
    )
    assert (0.25, 1.0, {"natural": 1}) == (report.service_time, report.utilisation, report.triggers)
    assert (Run(5.0, 5.25, 1, "natural"),) == report.runs


def test_jobs_that_arrive_while_the_worker_is_busy_share_a_batch() -> None:
    report = simulate(Size(3) | Natural(), [0.0, 0.1, 0.2, 0.3, 0.4], one_second)
    assert (1, 3, 1) == report.batch_sizes
    assert (0.0, 1.0, 2.0) == tuple(run.started for run in report.runs)
    assert {"natural": 2, "size": 1} == report.triggers
    assert pytest.approx([1.0, 1.9, 1.8, 1.7, 2.6]) == list(report.latencies)


def test_a_batch_is_dispatched_exactly_when_its_interval_is_over() -> None:
    report = simulate(Interval(0.5), [1.0, 1.25, 1.5, 1.75], one_second, max_workers=2)
    assert [(1.5, 3), (2.25, 1)] == [(run.started, run.size) for run in report.runs]


def test_as_many_batches_run_at_once_as_there_are_workers() -> None:
    report = simulate(Size(1), [0.0] * 5, one_second, max_workers=2)
    assert [0.0, 0.0, 1.0, 1.0, 2.0] == [run.started for run in report.runs]
    assert pytest.approx(5 / 6) == report.utilisation


def test_the_percentiles_are_those_of_the_latencies_of_the_jobs() -> None:
    report = simulate(Size(1), [float(number) for number in range(100)], lambda size: 0.5, max_workers=1)
    assert (0.5, 0.5, 0.5) == (report.p50, report.p95, report.p99)
    slow = iter([0.1, 0.2, 0.3, 0.4])
    report = simulate(Size(1), [0.0, 1.0, 2.0, 3.0], lambda size: next(slow))
    assert pytest.approx([0.25, 0.2, 0.4, 0.4]) == [report.mean, report.p50, report.p95, report.p99]


def test_jobs_that_the_policy_never_dispatches_are_dispatched_at_the_end() -> None:
    report = simulate(Size(3), [0.0, 0.1, 0.2, 7.0], one_second)
    assert [(0.2, 3, "size"), (7.0, 1, "shutdown")] == [(run.started, run.size, run.trigger) for run in report.runs]


def test_jobs_with_different_keys_never_share_a_batch_and_weights_count() -> None:
    class Light(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return window.opened + 1

        def fits(self, window: Window[Any], weight: float) -> bool:
            return window.weight + weight <= 5

    arrivals = [Arrival(0.0, "a"), Arrival(0.0, "b"), Arrival(0.0, "a"), Arrival(0.5, "b", 4.5), Arrival(0.5, "b", 1.0)]
    report = simulate(Light(), arrivals, one_second, max_workers=9)
    assert [(1.0, 2), (1.0, 1), (1.5, 1), (1.5, 1)] == [(run.started, run.size) for run in report.runs]


def test_the_order_of_keys_is_the_same_as_in_a_batcher() -> None:
    class Keyed(BatchingPolicy[Any]):
        hints = Hints(recalls=0.1)

        def due(self, window: Window[Any]) -> float:
            return NOW if window.key == "first" else window.opened + 0.25

        def reason(self, window: Window[Any]) -> str:
            return str(window.key)

    arrivals = [Arrival(0.0, "first"), Arrival(0.0, "older"), Arrival(0.5, "younger")]
    assert ["first", "older", "younger"] == [run.trigger for run in simulate(Keyed(), arrivals, one_second).runs]


def test_natural_keeps_callers_in_a_loop_in_one_batch() -> None:
    group = callers(8, jobs=800, turn=0.001)
    now, natural = simulate(Interval(0), group, one_second), simulate(Natural(), group, one_second)
    assert (800, 800) == (now.jobs, natural.jobs)
    assert natural.mean < 1.03 < 1.5 < now.mean  # the first caller arrives first, and the others wait for its batch


@pytest.mark.parametrize("watches", [False, True])
def test_only_a_policy_that_watches_callers_sees_them_return(watches: bool) -> None:
    class Observing(BatchingPolicy[Any]):
        hints = Hints(watches_callers=watches)

        def due(self, window: Window[Any]) -> float:
            seen.append(window.callers.returning)
            return NOW

    seen: list[int] = []
    simulate(Observing(), callers(4, jobs=80, turn=0.01), one_second)
    assert watches is any(seen)


@pytest.mark.parametrize(("interval", "sizes"), [(0.5, {1, 7}), (2, {8})], ids=["shorter", "longer"])
def test_with_an_interval_shorter_than_a_call_the_callers_split_into_two_groups(
    interval: float, sizes: set[int]
) -> None:
    policy = AllWaiting() | Interval(interval)
    assert sizes == set(simulate(policy, callers(8, jobs=800, turn=0.001), one_second).batch_sizes[2:-1])


def test_a_policy_that_would_never_dispatch_the_jobs_of_all_callers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^with Size\(9\), all callers would wait forever: add \| Interval\(seconds\)$"
    ):
        simulate(Size(9), callers(8, jobs=80), one_second)
    assert {"size": 9, "shutdown": 1} == simulate(Size(8), callers(8, jobs=76), one_second).triggers


def test_the_utilisation_depends_on_how_long_callers_think() -> None:
    report = simulate(Interval(0), callers(1, jobs=1000, think=9.0), one_second)
    assert 0.09 < report.utilisation < 0.11
    assert pytest.approx(1.0) == report.mean


def test_poisson_arrivals_have_the_given_rate() -> None:
    moments = list(poisson(50, jobs=10_000)(random.Random(1)))
    assert 195 < moments[-1] < 205
    report = simulate(Size(1), poisson(50, jobs=100), lambda size: 0.0)
    assert (100, 0.0) == (report.jobs, report.mean)


@pytest.mark.parametrize("arrivals", [poisson(3, jobs=100), callers(5, jobs=100, think=0.5)], ids=["open", "closed"])
def test_the_same_seed_gives_the_same_report(arrivals: Any) -> None:
    def report(seed: int) -> SimulationReport:
        return simulate(Size(4) | Interval(0.5), arrivals, one_second, seed=seed)

    assert report(1) == report(1)
    assert report(1) != report(2)


def test_a_policy_that_learns_starts_from_scratch_in_each_simulation() -> None:
    class Learning(BatchingPolicy[Any]):
        reports: list[BatchReport] = []

        def due(self, window: Window[Any]) -> float:
            return NOW

        def observe(self, report: BatchReport) -> None:
            self.reports = [*self.reports, report]
            assert (len(self.reports), 1.0, 0) == (report.batch.id, report.service_time, report.failed)

    policy = Learning()
    assert simulate(policy, [0.0, 9.0], one_second) == simulate(policy, [0.0, 9.0], one_second)
    assert [] == policy.reports


def test_an_exception_from_a_policy_ends_the_simulation() -> None:
    class Broken(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            raise OSError("no")

    with pytest.raises(OSError):
        simulate(Broken(), [0.0], one_second)


@pytest.mark.parametrize(
    "arrivals, message",
    [
        ([], "arrivals must have at least one job"),
        ([1.0, 0.5], r"arrivals must be in order and at least 0, got 0\.5 after 1\.0"),
        ([-1.0], r"arrivals must be in order and at least 0, got -1\.0 after 0\.0"),
        ([0.5, NEVER], r"arrivals must be in order and at least 0, got inf after 0\.5"),
        ([Arrival(0.0, weight=-1.0)], r"the weight of a job must be at least 0, got -1\.0"),
        ([Arrival(0.0, weight=NEVER)], "the weight of a job must be below inf, got inf"),
    ],
)
def test_invalid_arrivals_are_refused(arrivals: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(Size(1), arrivals, one_second)


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        poisson(0, jobs=1)


# -- weights and padding --


def test_the_cost_may_depend_on_the_number_the_weight_and_the_heaviest_of_the_jobs() -> None:
    def cost(batch: SimulatedBatch) -> float:
        seen.append(batch)
        return batch.padded

    seen: list[SimulatedBatch] = []
    report = simulate(
        Size(2), [Arrival(0.0, None, 2.0), Arrival(0.0, None, 5.0), Arrival(0.0), Arrival(0.0)], cost=cost
    )
    assert [SimulatedBatch(2, 7.0, 5.0), SimulatedBatch(2, 2.0, 1.0)] == seen
    assert [10.0, 2.0] == [run.ended - run.started for run in report.runs]


def test_the_cost_sees_the_weights_of_the_jobs_and_the_policy_what_weigh_makes_of_them() -> None:
    arrivals = [Arrival(0.0, None, weight) for weight in (2.0, 3.0, 4.0)]
    report = simulate(Weight(20), arrivals, cost=lambda batch: batch.weight, weigh=lambda weight: 10.0)
    assert [(2, 5.0), (1, 4.0)] == [(run.size, run.ended - run.started) for run in report.runs]


def test_a_key_may_depend_on_the_weight() -> None:
    arrivals = [Arrival(0.0, "ignored", weight) for weight in (2.0, 30.0, 4.0)]
    report = simulate(Interval(1), arrivals, cost=lambda batch: batch.heaviest, key=lambda weight: weight > 9)
    assert [(2, 4.0), (1, 30.0)] == [(run.size, run.ended - run.started) for run in report.runs]


def test_a_policy_sees_the_weights_as_the_jobs() -> None:
    class Observing(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            seen.append([*window.jobs])
            return NEVER

    seen: list[list[float]] = []
    simulate(Observing(), [Arrival(0.0, None, 2.5), Arrival(1.0)], one_second, weigh=lambda weight: 3.0)
    assert [[2.5], [2.5, 1.0]] == [jobs for number, jobs in enumerate(seen) if jobs not in seen[:number]]


@pytest.mark.parametrize("arrivals", [[0.0] * 4, callers(4, jobs=4)], ids=["open", "closed"])
def test_weights_are_given_to_jobs_in_the_order_of_their_submission(arrivals: Any) -> None:
    weights = iter([1.0, 2.0, 4.0, 8.0])
    report = simulate(Size(2), arrivals, cost=lambda batch: batch.weight, weights=lambda chance: next(weights))
    assert [3.0, 12.0] == [run.ended - run.started for run in report.runs]


def test_the_jobs_of_callers_may_have_weights_and_keys() -> None:
    report = simulate(Weight(10), callers(4, jobs=4), one_second, weights=lambda chance: 5.0)
    assert (2, 2) == report.batch_sizes
    keys = iter("abab")
    report = simulate(Interval(1), callers(4, jobs=4), one_second, key=lambda weight: next(keys))
    assert (2, 2) == report.batch_sizes


def test_random_weights_depend_on_the_seed_and_do_not_change_the_arrivals() -> None:
    def report(seed: int, weighted: bool) -> SimulationReport:
        weights = lognormal(5, 17, 256) if weighted else None
        cost: Any = (lambda batch: batch.weight) if weighted else (lambda batch: 0.0)
        return simulate(Size(1), poisson(1e-6, jobs=50), cost=cost, weights=weights, seed=seed)

    assert report(1, True) == report(1, True)
    assert report(1, True).latencies != report(2, True).latencies
    assert [run.started for run in report(1, True).runs] == [run.started for run in report(1, False).runs]


def test_lognormal_weights_have_the_given_bounds_and_median() -> None:
    weight, chance = lognormal(5, 17, 256), random.Random(1)
    weights = sorted(weight(chance) for _ in range(10_000))
    assert (5, 256) == (weights[0], weights[-1])
    assert 16.5 < weights[5_000] < 17.5
    assert 50 < weights.count(256) < 150
    assert {17} == {lognormal(5, 17, 17)(chance) for _ in range(9)}


@pytest.mark.parametrize("bounds", [(5, 4, 256), (5, 17, 16)])
def test_weights_whose_bounds_are_not_in_order_are_refused(bounds: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"^least, median and most must be in order, got 5, (4 and 256|17 and 16)$"):
        lognormal(*bounds)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cost": lambda batch: -1.0}, "the cost of a batch must be at least 0, got -1.0"),
        ({"cost": lambda batch: NEVER}, "the cost of a batch must be below inf, got inf"),
        ({"service_time": one_second, "weights": lambda chance: -1.0}, "a weight must be at least 0, got -1.0"),
        ({"service_time": one_second, "weigh": lambda weight: NEVER}, "the result of weigh must be below inf, got inf"),
    ],
)
def test_an_invalid_cost_or_weight_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(Size(1), [0.0], **options)


def test_a_job_that_is_too_heavy_for_the_policy_is_refused() -> None:
    with pytest.raises(JobTooLarge):
        simulate(Weight(10), [0.0], one_second, weights=lambda chance: 11.0)


def test_a_cost_and_a_service_time_can_not_be_given_together() -> None:
    with pytest.raises(TypeError, match="^either service_time or cost must be given, got both$"):
        simulate(Size(1), [0.0], one_second, cost=lambda batch: 1.0)


def before_a_model(policy: BatchingPolicy[Any], **options: Any) -> SimulationReport:
    """Return the report for a model that pads each text to the longest one of its batch, and is nearly at its limit."""
    texts, cost = lognormal(5, 17, 256), lambda batch: 0.010 + 0.0004 * batch.padded
    return simulate(policy, poisson(40, jobs=2_000), cost=cost, weights=texts, **options)


def busy(report: SimulationReport) -> float:
    return sum(run.ended - run.started for run in report.runs)


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_pads_to_the_longest_text_collapses_with_a_fixed_size_but_not_with_the_default(seed: int) -> None:
    single, fixed = before_a_model(Size(1) | Natural(), seed=seed), before_a_model(Size(100) | Natural(), seed=seed)
    assert single.utilisation < 0.95 and fixed.utilisation > 0.99
    assert busy(fixed) > 3 * busy(single)  # a backlog makes larger batches, which pad more, so the backlog grows
    assert fixed.p50 > 100 * single.p50
    assert before_a_model(DEFAULT_POLICY, seed=seed).p50 < 1.5 * single.p50


@pytest.mark.parametrize("seed", range(3))
def test_length_buckets_with_a_budget_cure_the_collapse(seed: int) -> None:
    def bucket(length: float) -> float:
        return next(bound for bound in (8, 16, 32, 64, 128, 256) if length <= bound)

    single = before_a_model(Size(1) | Natural(), seed=seed)
    cured = before_a_model(Weight(2048) | Natural(), seed=seed, key=bucket, weigh=bucket)
    assert busy(cured) < 0.95 * busy(single)
    assert cured.p50 < 0.7 * single.p50 and cured.p99 < single.p99


@pytest.mark.parametrize("time", [-1.0, NEVER, float("nan")])
def test_an_invalid_service_time_is_refused(time: float) -> None:
    with pytest.raises(ValueError, match="the service_time of a batch"):
        simulate(Size(1), [0.0], lambda size: time)


def test_a_report_is_immutable_and_has_a_short_repr() -> None:
    report = simulate(Size(1), poisson(1, jobs=1000), one_second)
    with pytest.raises(AttributeError):
        report.jobs = 9  # type: ignore[misc]
    assert len(repr(report)) < 400
    assert report == replace(report)
