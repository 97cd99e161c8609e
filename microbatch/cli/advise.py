"""``python -m microbatch advise``: finds the policy with the fewest calls that is fast enough."""

import random
from collections.abc import Callable, Iterator, Sequence
from math import inf
from statistics import fmean
from typing import Any, NamedTuple

from microbatch.cli.candidates import ALIKE, ROUNDS, Candidate, Needs, choose, families, front, measured, search
from microbatch.cli.progress import show_progress
from microbatch.cli.simulate import load_of, table
from microbatch.policies import DEFAULT_POLICY, BatchingPolicy, BestSize, Natural
from microbatch.simulation import Arrival, SimulatedBatch, SimulationReport
from microbatch.simulation.plots import draw_front
from microbatch.simulation.simulator import Arrivals
from microbatch.traces import ServiceTime, Trace

__all__ = ["Question", "advise"]

_MOST = 100
"""How many jobs a batch may hold, if neither the user nor the trace says more: as many as with the default policy."""

_STRETCHES = 10
"""The number of stretches of a long trace that are simulated. They are spread evenly over the trace."""

_FEW = 1_000
"""With fewer jobs, the p99 is determined by fewer than ten of them."""

_GOLDEN = (5**0.5 - 1) / 2
"""The golden ratio. Its multiples, without their integer parts, are spread evenly between 0 and 1."""

_ROWS = 12
"""About the maximum number of rows in the table."""


class Question(NamedTuple):
    """The options of the command.

    Attributes:
        target: The p99 to reach, in seconds. None for that of the default policy.
        most: How many jobs a batch may hold, or None.
        rate: How many independent jobs arrive per second, or None.
        callers: How many callers wait for their results, or None.
        trace: A recorded load, or None.
        cost: Returns how many seconds a batch takes. None for the time in the trace.
        weights: Returns a random weight, or None.
        bucket: Returns the weight of a job for the policy, given its real weight, or None.
        expires: Whether jobs expire.
        workers: The number of batches that run at the same time.
        jobs: The maximum number of jobs to simulate.
        seed: The seed of the random numbers.
        plot: The path of the plot, or None.
    """

    target: float | None
    most: int | None
    rate: float | None
    callers: int | None
    trace: Trace | None
    cost: Callable[[SimulatedBatch], float] | None
    weights: Callable[[random.Random], float] | None
    bucket: Callable[[float], float] | None
    expires: bool
    workers: int
    jobs: int
    seed: int
    plot: str | None

    @property
    def fit(self) -> ServiceTime | None:
        """How long a batch takes by the trace. None if there is no trace, or if its times don't count."""
        return self.trace.service_time if self.trace is not None and self.cost is None else None


class _Half(NamedTuple):
    """One half of the load: the first is for the search, and the second is for the verdict."""

    name: str
    arrivals: Arrivals
    jobs: int
    seed: int


Try = Callable[[BatchingPolicy[Any]], Candidate]


def advise(question: Question, simulated: Callable[..., SimulationReport]) -> Iterator[str]:
    """Search for a policy, and yield the lines of the answer.

    Args:
        question: The options of the command.
        simulated: The function `simulate` with all of its arguments except the policy, the arrivals, the service time
            and the seed.
    """
    if question.target == 0:
        raise ValueError("the p99 must be above 0, got 0")
    first, second = _halves(question)
    try_first, try_second = (_trial(question, half, simulated) for half in (first, second))
    fit, weights = question.fit, _weights(question)
    if fit is not None:
        yield from (*_described(fit, weights is not None), "")
    most = question.most or max(_MOST, max(question.trace.service_time.sizes) if question.trace else 0)
    default = try_first(BestSize(min(most, _MOST)) | Natural())
    target = default.p99 if question.target is None else question.target
    if not 0 < target < inf:
        raise ValueError(f"give a --p99, because that of the default policy is {target:g}")
    needs = Needs(target, most, _time_of(question, weights), bool(question.callers), question.expires, weights)
    tried = [default, *_tried(try_first, needs)]
    chosen = choose(tried, default, target)
    if chosen.p99 == inf:
        raise ValueError("with every policy that was tried, more than 1 % of the jobs expire: raise --expires-in")
    workers = _number(question.workers, "worker")
    yield f"Tried {len(tried)} policies with {workers} on {first.name}."
    yield "These are the best ones, and the default:"
    yield from ("", *_table(tried, default, chosen), "")
    asked = f"a p99 of at most {_ms(target)}"
    if question.target is None:
        asked += ", which is that of the default policy"
    met = chosen.p99 <= target
    yield (
        f"The fewest calls with {asked}:" if met else f"No policy reaches {asked}. The lowest p99 is {_ms(chosen.p99)}:"
    )
    yield from ("", f"    policy = {chosen.policy!r}", "")
    verdict = try_second(chosen.policy)
    yield from _compared(verdict, try_second(default.policy), second)
    yield from _warnings(verdict, target if met else inf, second, fit)
    if question.plot is not None:
        _plot(question.plot, tried, default, chosen, target)


def _tried(attempt: Try, needs: Needs) -> list[Candidate]:
    grid = list(families(needs))
    found = list[Candidate]()
    with show_progress("policies", sum(len(family.values) for family in grid) + ROUNDS, title="advise") as progress:
        for candidate in search(attempt, grid, needs.target):
            found.append(candidate)
            progress.update()
    return found


def _halves(question: Question) -> tuple[_Half, _Half]:
    jobs, seeds = question.jobs // 2, (question.seed, question.seed + 1)
    if question.trace is None:
        if not jobs:
            raise ValueError("at least 2 jobs are needed: half of them are for the search, and the others check it")
        arrivals = load_of(question.rate, question.callers, (), jobs)(1)
        names = f"{jobs:,} simulated jobs", f"{jobs:,} other simulated jobs"
        first, second = (_Half(name, arrivals, jobs, seed) for name, seed in zip(names, seeds))
        return first, second
    recorded = question.trace.arrivals
    middle = len(recorded) // 2
    if not (middle and jobs):
        raise ValueError("a trace must have at least 2 jobs: half of them are for the search, and the others check it")
    parts = [_stretches(part, jobs) for part in (recorded[:middle], recorded[middle:])]
    names = "the first half of the trace", "the second half"
    first, second = (
        _Half(f"{name} ({len(part):,} jobs{_rate(part)})", part, len(part), seed)
        for name, part, seed in zip(names, parts, seeds)
    )
    return first, second


def _stretches(arrivals: Sequence[Arrival], jobs: int) -> list[Arrival]:
    """Return at most *jobs* arrivals, the first one at 0. If there are more, return stretches, one after the other."""
    count = min(_STRETCHES, jobs) if len(arrivals) > jobs else 1
    size = min(len(arrivals), jobs) // count
    step = (len(arrivals) - size) / max(1, count - 1)
    kept, moment = list[Arrival](), 0.0
    for start in (round(number * step) for number in range(count)):
        for place in range(start, start + size):
            # The gap before the first job of a stretch stays, so that stretches don't make the load higher.
            moment += arrivals[place].moment - arrivals[place - 1].moment if kept else 0.0
            kept.append(arrivals[place]._replace(moment=moment))
    return kept


def _rate(arrivals: Sequence[Arrival]) -> str:
    duration = arrivals[-1].moment
    return f", {_short((len(arrivals) - 1) / duration)} per second" if duration else ""


def _trial(question: Question, half: _Half, simulated: Callable[..., SimulationReport]) -> Try:
    """Return a function that simulates a policy under one half of the load."""

    def attempt(policy: BatchingPolicy[Any]) -> Candidate:
        time_of = _varied(question.fit, half.seed) if question.fit else None
        return measured(policy, simulated(policy, half.arrivals, service_time=time_of, seed=half.seed))

    return attempt


def _varied(fit: ServiceTime, seed: int) -> Callable[[int], float]:
    """Return the service time with deviations from the line, as often and as large as in the trace.

    Slow batches are spread evenly, by the golden ratio. With random ones, a policy that makes few calls might be lucky,
    and would be advised for its luck.
    """
    place = random.Random(f"the service times of {seed}").random()

    def time_of(size: int) -> float:
        nonlocal place
        place = (place + _GOLDEN) % 1.0
        return fit(size) * fit.ratios[int(place * len(fit.ratios))]

    return time_of


def _weights(question: Question) -> tuple[float, float] | None:
    """Return the mean weight and the greatest weight, as the policy sees them. None if all weigh the same."""
    if question.weights is not None:
        chance = random.Random(question.seed)
        weights = [question.weights(chance) for _ in range(10_000)]
    else:
        weights = [arrival.weight for arrival in question.trace.arrivals] if question.trace else [1.0]
    if question.bucket is not None:
        weights = [question.bucket(weight) for weight in weights]
    return (fmean(weights), max(weights)) if len(set(weights)) > 1 else None


def _time_of(question: Question, weights: tuple[float, float] | None) -> Callable[[int], float]:
    """Return a function that says about how long a batch takes, given its size."""
    cost, mean = question.cost, weights[0] if weights else 1.0
    if cost is None:
        assert question.fit is not None
        return question.fit
    return lambda size: cost(SimulatedBatch(size, size * mean, mean))


def _described(fit: ServiceTime, weighed: bool) -> Iterator[str]:
    sizes, ratios = fit.sizes, fit.ratios
    those = f"{len(sizes):,} recorded batches of "
    those += f"{sizes[0]:,} to {sizes[-1]:,} jobs" if sizes[0] < sizes[-1] else f"{_number(sizes[0], 'job')} each"
    near = sorted(abs(ratio - 1) for ratio in ratios)[len(ratios) // 2]
    slow = ratios[-1 - len(ratios) // 100]
    yield f"A batch takes {_ms(fit.fixed)} plus {_ms(fit.each)} per job, according to {those}."
    yield f"Half of them were within {near * 100:.0f} % of it, and one in 100 took at least {slow:.2f} times as long."
    if weighed:
        yield "The weights of the jobs do not change that time. If they do in reality, give a --cost."


def _number(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'s' * (count != 1)}"


def _table(tried: Sequence[Candidate], default: Candidate, chosen: Candidate) -> Iterator[str]:
    """Yield a table of the Pareto front, with the default policy. Rows that hardly differ are left out."""
    found = front(tried)
    step = (found[0].calls / found[-1].calls) ** (1 / (_ROWS - 2))
    rows, last = list[Candidate](), inf
    for each in found if default in found else sorted([default, *found], key=lambda each: each.p99):
        if each in (default, chosen) or each.calls * step <= last and not _alike(each, default):
            rows.append(each)
            last = each.calls
    notes = {repr(default.policy): "the default", repr(chosen.policy): "advised"}
    if default is chosen:
        notes = {repr(default.policy): "the default, advised"}
    yield from table({repr(each.policy): each.report for each in rows}, notes)


def _alike(one: Candidate, other: Candidate) -> bool:
    return max(one.calls, other.calls) <= ALIKE * min(one.calls, other.calls) and (
        max(one.p99, other.p99) <= ALIKE * min(one.p99, other.p99)
    )


def _ms(seconds: float) -> str:
    return f"{_short(seconds * 1e3)} ms"


def _short(number: float) -> str:
    """Return the number with about three digits, but never in the notation with an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _compared(verdict: Candidate, default: Candidate, half: _Half) -> Iterator[str]:
    yield f"On {half.name}, it reaches a p99 of {_ms(verdict.p99)} with {_number(verdict.calls, 'call')}."
    if repr(verdict.policy) == repr(default.policy):
        yield "This is the default policy."
    else:
        change = verdict.calls / max(1, default.calls) - 1
        than = f"{abs(change) * 100:.0f} % {'fewer' if change <= 0 else 'more'}"
        calls = _number(default.calls, "call")
        yield f"That is {than} than with the default policy: {calls}, and a p99 of {_ms(default.p99)}."


def _warnings(verdict: Candidate, target: float, half: _Half, fit: ServiceTime | None) -> Iterator[str]:
    if verdict.p99 == inf > target:
        yield "Warning: more than 1 % of these jobs expire."
    elif verdict.p99 > target:
        over = verdict.p99 / target
        lower = _short(target / over * 1e3).replace(",", "")
        yield f"Warning: this misses the target by {(over - 1) * 100:.1f} %. If that matters, try --p99 {lower}ms."
    if half.jobs < _FEW:
        yield f"Warning: a p99 of {_number(half.jobs, 'job')} is a matter of chance. Use {2 * _FEW:,} jobs or more."
    if fit is not None and verdict.largest > 2 * fit.sizes[-1]:
        largest, recorded = _number(verdict.largest, "job"), _number(fit.sizes[-1], "job")
        yield f"Warning: the largest simulated batch has {largest}, and the largest recorded one {recorded}."
        yield "How long larger batches take is extrapolated. Record a trace with this policy, and check with that."


def _plot(path: str, tried: Sequence[Candidate], default: Candidate, chosen: Candidate, target: float) -> None:
    def point(each: Candidate) -> tuple[float, float]:
        return each.p99, 1e3 * each.calls / max(1, each.report.jobs)

    named = {f"the default: {default.policy!r}": point(default), f"advised: {chosen.policy!r}": point(chosen)}
    draw_front(path, [point(each) for each in tried], [point(each) for each in front(tried)], named, target)
