"""The simulator: it runs the collector of a batcher in virtual time."""

import copy
import heapq
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from microbatch._basics.arguments import check_answer, check_callable, check_count, check_number, check_positive, shown
from microbatch._basics.clock import NEVER, NOW
from microbatch._forming.callers import Caller, Callers
from microbatch._forming.collector import Batch, Collector
from microbatch.policies.base import BatchingPolicy, BatchReport, CallerActivity, check_policy
from microbatch.results import BatchInfo
from microbatch.simulation.plots import draw_run, percentile

__all__ = [
    "Arrival",
    "Run",
    "SimulatedBatch",
    "SimulatedFailure",
    "SimulationReport",
    "callers",
    "lognormal",
    "poisson",
    "simulate",
]

_NORMAL_99 = 2.3263
"""The 99th percentile of the normal distribution with the mean 0 and the standard deviation 1."""


class Arrival(NamedTuple):
    """The submission of a job."""

    moment: float
    """When the job is submitted, in seconds. It must not be before the moment of the previous arrival."""
    key: Hashable = None
    weight: float = 1.0
    expires_in: float = NEVER
    """How many seconds after its submission the job expires if it still waits for a worker."""


@dataclass(frozen=True)
class SimulatedBatch:
    """What the cost of a batch may depend on.

    Attributes:
        count: The number of jobs.
        weight: The sum of the weights of the jobs.
        heaviest: The weight of the heaviest job.
        in_flight: The number of batches that run when this one starts, itself included.
    """

    count: int
    weight: float
    heaviest: float
    in_flight: int = 1

    @property
    def padded(self) -> float:
        """The weight of the batch if each job is padded to the weight of the heaviest one."""
        return self.count * self.heaviest


class SimulatedFailure(NamedTuple):
    """What a cost function returns for a batch that fails, for example because the downstream refuses it."""

    seconds: float
    """How many seconds it takes until the batch fails."""
    error: BaseException
    """The exception that all jobs of the batch fail with. A policy that learns sees it in `BatchReport.error`."""


Cost = Callable[[SimulatedBatch], float | SimulatedFailure]


class Run(NamedTuple):
    """The run of one batch by a worker. Moments are seconds."""

    started: float
    ended: float
    size: int
    trigger: str


@dataclass(frozen=True)
class callers:
    """A load by callers that each submit a job, wait for its result, think, and submit the next job (a closed loop).

    At the moment 0, all of them start as if they had just got a result.

    Attributes:
        count: The number of callers.
        jobs: The number of jobs that all callers submit together.
        think: The mean time from a result to the next job, in seconds. The times are distributed exponentially.
        turn: Callers that get their results at the same moment continue one after another, *turn* seconds apart. Python
            threads do this, because only one of them runs at a time.
    """

    count: int
    jobs: int
    think: float = 0.0
    turn: float = 0.0

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_count("jobs", self.jobs)
        check_number("think", self.think, below=NEVER)
        check_number("turn", self.turn, below=NEVER)


Arrivals = Iterable[float | Arrival] | Callable[[random.Random], Iterable[float | Arrival]] | callers


def poisson(rate: float, jobs: int) -> Callable[[random.Random], Iterator[float]]:
    """Return *jobs* independent arrivals for `simulate`, at a mean *rate* per second (a Poisson process)."""
    rate, jobs = check_positive("rate", rate), check_count("jobs", jobs)

    def arrivals(chance: random.Random) -> Iterator[float]:
        moment = 0.0
        for _ in range(jobs):
            moment += chance.expovariate(rate)
            yield moment

    return arrivals


def lognormal(least: float, median: float, most: float) -> Callable[[random.Random], float]:
    """Return random weights for `simulate`, such as the lengths of texts: many short ones, and a few very long ones.

    The weights have a log-normal distribution. Those below *least* are raised to it, and those above *most*, which are
    1 %, are cut to it, as a model cuts texts that are too long.

    Raises:
        ValueError: The arguments are not in order, or one is not above 0 and finite.
    """
    least, median, most = check_positive("least", least), check_positive("median", median), check_positive("most", most)
    if not least <= median <= most:
        raise ValueError(f"least, median and most must be in order, got {least:g}, {median:g} and {most:g}")
    mean, spread = math.log(median), math.log(most / median) / _NORMAL_99

    def weight(chance: random.Random) -> float:
        return min(max(chance.lognormvariate(mean, spread), least), most)

    return weight


@dataclass(frozen=True)
class SimulationReport:
    """The results of a simulation. All times are in seconds. If all jobs expired, the mean and the percentiles are NaN.

    The latency of a job is the time from its submission to its result. It is the sum of its queue time and its service
    time.

    Attributes:
        jobs: The number of jobs that were processed.
        batches: The number of batches, that is, of calls of the processor.
        batch_sizes: The number of jobs in each batch, in the order of dispatch.
        mean: The mean latency.
        p50: The median latency.
        p95: The 95th percentile of the latency.
        p99: The 99th percentile of the latency.
        queue_time: The mean time from the submission of a job to the call of the processor.
        service_time: The mean time from the call of the processor to the result of a job. The mean is over jobs, not
            batches.
        utilisation: The share of the time in which a worker was busy, as the mean over all workers, from the submission
            of the first job to the last result.
        triggers: The number of batches for each ``BatchInfo.trigger``.
        runs: The run of each batch, in the order of dispatch.
        latencies: The latency of each job, in the order in which the jobs finished.
        expired: The number of jobs that expired.
        in_time: The number of jobs that were done before the moment at which they would have expired.
        failed: The number of jobs that were processed but failed, with a `SimulatedFailure`.
    """

    jobs: int
    batches: int
    batch_sizes: tuple[int, ...] = field(repr=False)
    mean: float
    p50: float
    p95: float
    p99: float
    queue_time: float
    service_time: float
    utilisation: float
    triggers: Mapping[str, int]
    runs: tuple[Run, ...] = field(repr=False)
    latencies: tuple[float, ...] = field(repr=False)
    expired: int
    in_time: int
    failed: int = 0

    def plot(self, path: "str | os.PathLike[str]") -> None:
        """Draw the latency over the load, and a timeline of the batches in the middle of the simulation.

        Args:
            path: The file to write. Its extension determines the format, such as ``.svg`` or ``.png``.

        Raises:
            ImportError: matplotlib is not installed. The extra ``plot`` installs it.
            ValueError: All jobs expired.
        """
        if not self.runs:
            raise ValueError("all jobs expired, so there is nothing to draw")
        ends = [run.ended for run in sorted(self.runs, key=lambda run: run.ended) for _ in range(run.size)]
        draw_run(path, [(end - latency, latency) for end, latency in zip(ends, self.latencies)], self.runs)


def simulate(
    policy: BatchingPolicy[Any],
    arrivals: Arrivals,
    service_time: Callable[[int], float] | None = None,
    *,
    cost: Cost | None = None,
    weights: Callable[[random.Random], float] | None = None,
    key: Callable[[float], Hashable] | None = None,
    weigh: Callable[[float], float] | None = None,
    expires_in: float | None = None,
    max_workers: int = 1,
    seed: int = 0,
) -> SimulationReport:
    """Simulate *policy* under a load, and return a report.

    At the end, jobs that the policy would never dispatch are dispatched as by `Batcher.shutdown`. The policy is copied
    first, so a policy that learns starts from scratch each time.

    A simulated job is a number: its weight, such as the length of a text. *key* and *weigh* take that number, and do
    the same as in a `Batcher`. *weigh* changes only what the policy sees: *cost* gets the weights without it.

    Args:
        policy: The policy to simulate.
        arrivals: When jobs are submitted: moments in seconds or `Arrival` objects, in order; a function that takes a
            `random.Random` and returns these, such as the result of `poisson`; or `callers`.
        service_time: A function that takes the size of a batch and returns how many seconds the processor takes for it.
        cost: Instead of *service_time*: a function that takes a `SimulatedBatch` and returns how many seconds the
            processor takes for it, or a `SimulatedFailure`.
        weights: A function that takes a `random.Random` and returns the weight of the next job, such as the result of
            `lognormal`. None for the weights of the arrivals, which are 1 if they are not given.
        key: A function that returns the key of a job. None for the keys of the arrivals.
        weigh: A function that returns how much a job weighs for the policy. None for the weight itself.
        expires_in: How many seconds after its submission a job expires if it still waits for a worker. None for the
            value of the arrivals, which is never if it is not given.
        max_workers: The number of batches that may run at the same time.
        seed: The seed of the `random.Random`. Weights have another one, so they don't change when jobs are submitted.

    Raises:
        TypeError: Neither *service_time* nor *cost* is given, or both are.
        ValueError: There is no job, the arrivals are not in order, or a time or weight is negative or infinite. Or all
            `callers` wait for jobs that the policy would never dispatch.
        JobTooLarge: The policy would never accept a job.
        Exception: Whatever exception the policy or a function raises.
    """
    check_policy("policy", policy)
    outcome_of = _timer(service_time, cost)
    for name, function in (("weights", weights), ("key", key), ("weigh", weigh)):
        if function is not None:
            check_callable(name, function)
    given = weights is not None or key is not None or weigh is not None or expires_in is not None
    describe = _Describer(weights, key, weigh, expires_in, seed) if given else None
    simulation = _Simulation(copy.deepcopy(policy), check_count("max_workers", max_workers), outcome_of, describe)
    simulation.run(_source(arrivals, random.Random(seed), policy))
    return simulation.report()


@dataclass(slots=True, eq=False)
class _Job:
    """The data of a job that the collector needs, and the caller that submitted it."""

    submitted: float
    key: Hashable = None
    weight: float = 1.0
    expires_in: float = NEVER
    caller: Caller | None = None
    job: float = field(default=1.0, init=False)  # its weight without `weigh`
    _expires: float = field(default=NEVER, init=False)
    _epoch: int = field(default=0, init=False)
    _is_waiting: bool = field(default=True, init=False)


class _OpenLoop:
    """Jobs whose submission does not depend on other jobs, from callers that don't wait for results."""

    uniform = False
    left = 0  # the number of jobs that are submitted only after other jobs are done

    def __init__(self, arrivals: Iterable[float | Arrival], recalls: float) -> None:
        self._recalls = recalls
        self._heard = NOW
        self._coming = iter(arrivals)
        self._next: _Job | None = None
        self._advance(0.0)

    def _advance(self, last: float) -> None:
        arrival = next(self._coming, None)
        self._next = None
        if arrival is not None:
            job = _Job(*arrival) if isinstance(arrival, tuple) else _Job(arrival)
            job.job = check_number("the weight of a job", job.weight, below=NEVER)
            if not last <= check_answer("an arrival", job.submitted) < NEVER:
                raise ValueError(f"arrivals must be in order and at least 0, got {job.submitted!r} after {last!r}")
            if check_number("the expires_in of a job", job.expires_in) < NEVER:
                job._expires = job.submitted + job.expires_in
            self._next = job

    def next_moment(self) -> float:
        """Return when the next job is submitted, or `NEVER` if no job is submitted until another one is done."""
        return NEVER if self._next is None else self._next.submitted

    def take_until(self, now: float) -> list[_Job]:
        """Remove and return the jobs that have been submitted by *now*, in order."""
        jobs = []
        while (job := self._next) is not None and job.submitted <= now:
            jobs.append(job)
            self._advance(job.submitted)
        if jobs and self._recalls:
            self._heard = jobs[-1].submitted
        return jobs

    def done(self, jobs: list[_Job], now: float, service_time: float) -> None:
        """Record that the callers of *jobs* have their results. Does nothing here, because no caller waits."""

    def expired(self, jobs: list[_Job], now: float) -> None:
        """Record that the callers of *jobs* have got an error."""

    def activity(self) -> CallerActivity:
        """Return what is known of the callers."""
        return CallerActivity(heard=self._heard)


class _ClosedLoop:
    """Jobs of callers that each wait for a result before they submit the next job."""

    uniform = True

    def __init__(self, group: callers, chance: random.Random, watched: Callers) -> None:
        self._group = group
        self._chance = chance
        self._watched = watched
        self._coming: list[tuple[float, int, Caller]] = []
        self.left = group.jobs
        self._schedule([Caller(number) for number in range(group.count)], 0.0)

    def next_moment(self) -> float:
        return self._coming[0][0] if self._coming else NEVER

    def take_until(self, now: float) -> list[_Job]:
        jobs = []
        while self._coming and self._coming[0][0] <= now:
            moment, number, caller = heapq.heappop(self._coming)
            self._watched.record_submission(number, moment)
            if self._watched.recalls:
                self._watched.begin_to_wait(number)
            jobs.append(_Job(moment, caller=caller))
        return jobs

    def done(self, jobs: list[_Job], now: float, service_time: float) -> None:
        done = [job.caller for job in jobs if job.caller is not None]
        self._watched.record_results(done, now, service_time)
        self._schedule(done, now)

    def expired(self, jobs: list[_Job], now: float) -> None:
        self._schedule([job.caller for job in jobs if job.caller is not None], now)

    def _schedule(self, group: list[Caller], now: float) -> None:
        """Let these callers submit their next jobs, as long as there are jobs left."""
        continuing = group[: self.left]
        self.left -= len(continuing)
        for position, caller in enumerate(continuing, 1):
            thought = self._chance.expovariate(1 / self._group.think) if self._group.think else 0.0
            moment = now + thought + position * self._group.turn
            heapq.heappush(self._coming, (moment, caller.ident, caller))

    def activity(self) -> CallerActivity:
        return self._watched.activity()


_Source = _OpenLoop | _ClosedLoop


def _source(arrivals: Arrivals, chance: random.Random, policy: BatchingPolicy[Any]) -> _Source:
    if isinstance(arrivals, callers):
        return _ClosedLoop(arrivals, chance, Callers(policy.hints.watches_callers, policy.hints.recalls))
    moments = arrivals(chance) if callable(arrivals) else arrivals
    if not isinstance(moments, Iterable):
        raise TypeError(f"arrivals must be moments, a function that returns moments, or callers, got {shown(arrivals)}")
    return _OpenLoop(moments, policy.hints.recalls)


class _Describer:
    """Gives jobs their weights, keys and deadlines, in the order of their submission."""

    def __init__(
        self,
        weights: Callable[[random.Random], float] | None,
        key: Callable[[float], Hashable] | None,
        weigh: Callable[[float], float] | None,
        expires_in: float | None,
        seed: int,
    ) -> None:
        self._weights = weights
        self._key = key
        self._weigh = weigh
        self.expires_in = None if expires_in is None else check_number("expires_in", expires_in)
        self._chance = random.Random(f"the weights of {seed}")

    def __call__(self, job: _Job) -> None:
        if self._weights is not None:
            job.job = job.weight = check_number("a weight", self._weights(self._chance), below=NEVER)
        if self._key is not None:
            job.key = self._key(job.job)
        if self._weigh is not None:
            job.weight = check_number("the result of weigh", self._weigh(job.job), below=NEVER)
        if self.expires_in is not None:
            job._expires = job.submitted + self.expires_in


_Outcome = tuple[float, BaseException | None]
"""How many seconds a batch takes, and the exception that its jobs fail with."""


def _timer(service_time: Callable[[int], float] | None, cost: Cost | None) -> Callable[[list[_Job], int], _Outcome]:
    """Return a function that returns the outcome for the jobs of a batch, given how many batches run."""
    if cost is None:
        check_callable("service_time", service_time)
        by_size: Any = service_time
        return lambda jobs, _: (check_number("the service_time of a batch", by_size(len(jobs)), below=NEVER), None)
    check_callable("cost", cost)
    if service_time is not None:
        raise TypeError("either service_time or cost must be given, got both")

    def outcome_of(jobs: list[_Job], in_flight: int) -> _Outcome:
        weights = [job.job for job in jobs]
        answer = cost(SimulatedBatch(len(jobs), math.fsum(weights), max(weights), in_flight))
        time, error = answer if isinstance(answer, SimulatedFailure) else (answer, None)
        return check_number("the cost of a batch", time, below=NEVER), error

    return outcome_of


class _Started(NamedTuple):
    """A batch that runs. *error* is the exception that its jobs will fail with."""

    info: BatchInfo
    batch: Batch
    moment: float
    in_flight: int
    error: BaseException | None


class _Simulation:
    """Calls the collector as a batcher does, but in virtual time."""

    def __init__(
        self,
        policy: BatchingPolicy[Any],
        max_workers: int,
        outcome_of: Callable[[list[_Job], int], _Outcome],
        describe: _Describer | None,
    ) -> None:
        self._policy = policy
        self._collector: Collector[_Job] = Collector(policy, max_workers, 0.0)
        self._outcome_of = outcome_of
        self._describe = describe
        self._may_expire = describe is not None and describe.expires_in is not None
        self._running: list[tuple[float, int, _Started]] = []
        self._runs: list[Run] = []
        self._first = NEVER  # when the first job was submitted
        self._queue_times: list[float] = []
        self._latencies: list[float] = []
        self._expired = self._in_time = self._failed = 0

    def run(self, source: _Source) -> None:
        """Simulate until every job is done."""
        now = 0.0
        while True:
            moment = self._running[0][0] if self._running else NEVER
            # Without deadlines, nothing happens between two ends of batches if no more batches may run.
            if self._collector.has_worker or self._may_expire:
                moment = min(moment, source.next_moment(), self._collector.next_moment())
            if moment == NEVER:
                if not self._collector:
                    return
                if source.left:
                    raise ValueError(f"with {self._policy!r}, all callers would wait forever: add | Interval(seconds)")
                self._collector.flush(0, closing=True)
            else:
                now = max(now, moment)
            self._step(source, now)

    def _step(self, source: _Source, now: float) -> None:
        collector, jobs, reports = self._collector, source.take_until(now), list[tuple[BatchReport, Batch]]()
        while self._running and self._running[0][0] <= now:
            moment, _, started = heapq.heappop(self._running)
            reports.append((self._settle(source, moment, started), started.batch))
        # In the same order as in `Dispatcher.lead`, because the order decides which lane is next.
        collector.note_callers(source.activity())
        if self._describe is not None:
            for job in jobs:
                self._describe(job)
        collector.add(jobs, source.uniform and self._describe is None)
        for report, batch in reports:
            collector.finished(report.service_time, batch.runs)
            self._policy.observe(report)
        self._drop_expired(source, now)
        while (taken := collector.take(now)) is not None:
            if taken.error is not None:
                raise taken.error
            self._start(taken, now)
            collector.started(now, taken.runs)

    def _drop_expired(self, source: _Source, now: float) -> None:
        expired = self._collector.expire(now)
        for job in expired:
            job._is_waiting = False
        self._collector.drop(expired)
        self._expired += len(expired)
        source.expired(expired, now)

    def _start(self, batch: Batch, now: float) -> None:
        size = len(batch.entries)
        in_flight = self._collector.in_flight + 1
        time, error = self._outcome_of(batch.entries, in_flight)
        self._runs.append(Run(now, now + time, size, batch.trigger))
        self._first = min(self._first, batch.entries[0].submitted)
        self._queue_times += [now - job.submitted for job in batch.entries]
        for job in batch.entries:
            job._is_waiting = False
        info = BatchInfo(len(self._runs), size, batch.weight, batch.key, batch.trigger)
        heapq.heappush(self._running, (now + time, info.id, _Started(info, batch, now, in_flight, error)))

    def _settle(self, source: _Source, now: float, started: "_Started") -> BatchReport:
        info, jobs, time = started.info, started.batch.entries, now - started.moment
        failed = 0 if started.error is None else len(jobs)
        self._failed += failed
        self._latencies += [now - job.submitted for job in jobs]
        self._in_time += [now <= job._expires for job in jobs].count(True)
        source.done(jobs, now, time)
        return BatchReport(info, time, failed, started.error, started.moment, started.in_flight)

    def report(self) -> SimulationReport:
        """Return the report on all jobs."""
        runs = self._runs
        if not runs and not self._expired:
            raise ValueError("arrivals must have at least one job")
        ordered, count = sorted(self._latencies), len(self._latencies)

        def mean(times: Iterable[float]) -> float:
            return math.fsum(times) / count if count else math.nan

        busy = math.fsum(run.ended - run.started for run in runs)
        duration = max(run.ended for run in runs) - self._first if runs else 0.0
        return SimulationReport(
            jobs=count,
            batches=len(runs),
            batch_sizes=tuple(run.size for run in runs),
            mean=mean(ordered),
            p50=percentile(ordered, 0.5),
            p95=percentile(ordered, 0.95),
            p99=percentile(ordered, 0.99),
            queue_time=mean(self._queue_times),
            service_time=mean((run.ended - run.started) * run.size for run in runs),
            utilisation=busy / duration / self._collector.workers if duration else 0.0,
            triggers=dict(Counter(run.trigger for run in runs)),
            runs=tuple(runs),
            latencies=tuple(self._latencies),
            expired=self._expired,
            in_time=self._in_time,
            failed=self._failed,
        )
