"""The simulation of policies, in virtual time."""

import random
from dataclasses import replace
from typing import Any

import pytest

from microbatch import NEVER, NOW, AllWaiting, BatchingPolicy, BatchReport, Hints, Interval, Natural, Size, Window
from microbatch.simulation import Arrival, Run, SimulationReport, callers, poisson, simulate


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
    with pytest.raises(ValueError, match=r"^Size\(9\) would never dispatch the jobs that all callers wait for$"):
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
