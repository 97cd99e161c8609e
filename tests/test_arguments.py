"""Every public argument is checked: the error says what is expected and what came, and nothing has started."""

import inspect
import io
import operator
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from decimal import Decimal
from fnmatch import fnmatch
from fractions import Fraction
from functools import partial
from types import GenericAlias, SimpleNamespace
from typing import Any

import pytest
from tenacity import retry_if_exception_type, stop_after_attempt, stop_never, wait_none

import microbatch
import microbatch.policies.text
import microbatch.processors
import microbatch.simulation
import microbatch.testing
import microbatch.traces
from microbatch import (
    DEFAULT_POLICY,
    NEVER,
    Batcher,
    BatcherStats,
    BatchingPolicy,
    BatchListener,
    Hints,
    Interval,
    Size,
    Window,
    batched,
    coalescing,
)
from microbatch.simulation import lognormal
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor

NAN, INF = float("nan"), float("inf")
HUGE = 10**5000  # beyond all floats, and more digits than Python prints


class Unprintable:
    def __repr__(self) -> str:
        raise LookupError("no repr")


class Answering(BatchingPolicy[Any]):
    """Returns the answers that it is given."""

    def __init__(self, needs: Any = 0, watches_flow: Any = True, due: Any = NEVER, room: Any = NEVER) -> None:
        self._hints = Hints(watches_flow=watches_flow, needs=needs)
        self._moment, self._jobs = due, room

    def due(self, window: Window[Any]) -> Any:
        return self._moment

    def _room(self, window: Window[Any]) -> Any:
        return self._jobs

    @property
    def hints(self) -> Hints:
        return self._hints


class Asynchronous:
    async def __call__(self, jobs: list[Any]) -> list[Any]:
        return jobs


async def coroutine(jobs: list[Any]) -> list[Any]:
    return jobs


async def generator(jobs: list[Any]) -> Any:
    yield jobs


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


Wrong = tuple[Any, str, Any]


def wrong(error: Any, must_be: str, *values: Any) -> list[Wrong]:
    return [(error, must_be, value) for value in values]


# -- wrong values of each kind --

NO_FLAG = wrong(TypeError, "True or False", 5, 0, 0.5, NAN, "yes", Unprintable())
NO_INTEGER = wrong(TypeError, "an integer", "3", True, 1.0, 1.5, NAN, INF, 1j, Fraction(3, 2), [3], Unprintable())
NO_NUMBER = wrong(
    TypeError, "a number", "1", b"1", True, False, 1j, Decimal(1), [], [1] * 9999, "x" * 9999, Unprintable()
)
NO_CALLABLE = wrong(TypeError, "callable", 3, True, NAN, "x", [], Unprintable())
NOT_PLAIN = wrong(TypeError, "a plain function", coroutine, generator, Asynchronous(), partial(coroutine))
NO_POLICY = wrong(TypeError, "a BatchingPolicy", 3, True, "size", echo, Size, Unprintable())
NO_ITERABLE = wrong(TypeError, "iterable", 3, True, NAN, generator([]), Unprintable())
NO_EXECUTOR = wrong(TypeError, r"a concurrent.futures.Executor", 3, True, "x", ThreadPoolExecutor, Unprintable())
NO_CLOCK = wrong(
    TypeError,
    r"clock must have now\(\) and wait_until\(\)",
    3,
    True,
    ManualClock,
    SimpleNamespace(now=float),
    Unprintable(),
)
NO_CLOCK += wrong(TypeError, r"clock must have now\(\) and wait_until\(\)", SimpleNamespace(now=1.5, wait_until=2))
NO_LISTENERS = wrong(TypeError, "an iterable of BatchListeners", 3, True, NAN, BatchListener(), Unprintable())
NO_LISTENERS += wrong(TypeError, "BatchListeners", [3], [None], "x", [BatchListener], (echo, echo), [Unprintable()])
NO_TEXT = wrong(TypeError, "a non-empty string", 3, True, b"x", Unprintable())
NO_TEXT += wrong(ValueError, "a non-empty string", "")
NEGATIVE = wrong(ValueError, "at least 0", -1, -0.001, NAN, -INF, -HUGE, Fraction(-1, 2))
INFINITE = wrong(ValueError, "below inf", INF, HUGE)
ZERO = wrong(ValueError, "above 0", 0, 0.0, Fraction(0))
BEYOND_WAITING = wrong(ValueError, r"below [\d.e+]+", INF, 1e308, HUGE)
NO_KINDS = wrong(
    TypeError, "a class of exceptions, or a tuple of them", 3, "x", ValueError(), [ValueError], Unprintable()
)
NO_KINDS += wrong(TypeError, "a class of exceptions, or a tuple of them", int, KeyboardInterrupt, (OSError, 3))
NO_END = wrong(TypeError, "'first' or 'last'", 3, True, [], Unprintable())
NO_END += wrong(ValueError, "'first' or 'last'", "newest", "")
BELOW_0 = wrong(ValueError, "at least 0", -1, -HUGE)
BELOW_1 = wrong(ValueError, "at least 1", 0, -1, -HUGE)
TOO_MANY = wrong(ValueError, "at most 10000", 10_001, 10**9, HUGE)
NO_NEEDS = wrong(TypeError, r"the needs of a policy must be an integer", *(Answering(x) for x in ("3", 1.0, NAN)))
NO_NEEDS += wrong(ValueError, r"the needs of a policy must be at least 0", Answering(needs=-1))
NO_NEEDS += wrong(TypeError, "the watches_flow of a policy must be True or False", Answering(watches_flow=1))

NEITHER = (3, True, NAN, Unprintable())
TRACE = '{"service_time": 1, "submitted": [1]}'

# -- each argument, with its wrong and its valid values --

ANYTHING: list[Any] = [None, NAN, Unprintable(), [], echo]
SECONDS = [0, 0.5, Fraction(1, 2), 1e308, INF, HUGE]
ARGUMENTS: list[tuple[str, list[Wrong], list[Any]]] = [
    ("Batcher.processor", NO_CALLABLE + NOT_PLAIN, [echo, list, Unprintable]),
    ("Batcher.policy", NO_POLICY + NO_NEEDS, [Size(1), Size(10_000), Size(HUGE) | Interval(1), Answering(needs=9)]),
    ("Batcher.key", NO_CALLABLE + NOT_PLAIN, [None, str]),
    ("Batcher.weigh", NO_CALLABLE + NOT_PLAIN, [None, len]),
    ("Batcher.max_pending", NO_INTEGER + BELOW_0, [0, 1, HUGE]),
    ("Batcher.max_pending_weight", NO_NUMBER + NEGATIVE, [0]),
    ("Batcher.max_pending_per_key", NO_INTEGER + BELOW_0, [0]),
    ("Batcher.drop_oldest", NO_FLAG, [True, False]),
    ("Batcher.max_workers", NO_INTEGER + BELOW_1 + TOO_MANY, [1, 10_000]),
    ("Batcher.executor", NO_EXECUTOR, [None, InlineExecutor()]),
    ("Batcher.listeners", NO_LISTENERS, [(), [BatchListener()], iter([BatchListener()]), {}]),
    ("Batcher.name", NO_TEXT, ["x", "\0"]),
    ("Batcher.exit_timeout", NO_NUMBER + NEGATIVE, [None, *SECONDS]),
    ("Batcher.clock", NO_CLOCK, [None, ManualClock()]),
    ("Batcher.submit.job", [], ANYTHING),
    ("Batcher.submit.timeout", NO_NUMBER + NEGATIVE, [None, *SECONDS]),
    ("Batcher.submit.expires_in", NO_NUMBER + NEGATIVE, [None, *SECONDS]),
    ("Batcher.map.jobs", NO_ITERABLE, ["ab", b"ab", {}, iter([])]),
    ("Batcher.map.timeout", NO_NUMBER + NEGATIVE, [None, *SECONDS]),
    ("Batcher.map.buffersize", NO_INTEGER + BELOW_1, [None, 1, HUGE]),
    ("Batcher.flush.wait", NO_FLAG, [True, False]),
    ("Batcher.flush.timeout", NO_NUMBER + NEGATIVE, [None, *SECONDS]),
    ("Batcher.shutdown.wait", NO_FLAG, [True, False]),
    ("Batcher.shutdown.cancel_futures", NO_FLAG, [True, False]),
    ("Batcher.shutdown.timeout", NO_NUMBER + NEGATIVE, [None, *SECONDS]),
    ("Batcher.add_shutdown_callback.callback", NO_CALLABLE + NOT_PLAIN, [list]),
    ("BatchedFunction.__call__.job", [], ANYTHING),
    ("batched.policy", NO_POLICY + NO_NEEDS, [Size(1)]),
    ("Size.n", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("Interval.seconds", NO_NUMBER + NEGATIVE, SECONDS),
    ("Weight.limit", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 1e308]),
    ("Padded.limit", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 1e308]),
    ("length_buckets.length", NO_CALLABLE + NOT_PLAIN, [len, float]),
    (
        "length_buckets.ratio",
        NO_NUMBER + NEGATIVE + INFINITE + wrong(ValueError, "above 1", 0, 0.5, 1, 1.0),
        [1.5, Fraction(3, 2), 1e308],
    ),
    ("PerKey.n", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("InTime.slack", NO_NUMBER + NEGATIVE, SECONDS),
    ("FixedWindow.seconds", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 1e308]),
    ("Session.gap", NO_NUMBER + NEGATIVE, SECONDS),
    ("Rate.n", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("Rate.per", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 1e308]),
    ("AllWaiting.recent", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 1e308]),
    ("Adaptive.target", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 1e308]),
    ("Adaptive.least", NO_INTEGER + BELOW_1, [1, 1000]),
    ("Adaptive.most", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("Adaptive.warm_up", NO_INTEGER + BELOW_0, [0, HUGE]),
    ("BestSize.most", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("Congestion.most", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("Congestion.push_back", NO_CALLABLE + NOT_PLAIN, [None, bool]),
    ("Congestion.retry_after", NO_CALLABLE + NOT_PLAIN, [None, float]),
    ("coalescing.batcher", wrong(TypeError, "a Batcher", 3, "x", echo, Batcher), []),
    ("coalescing.key", NO_CALLABLE + NOT_PLAIN, [None, str]),
    ("policy_from_env.environ", wrong(TypeError, "a mapping", 3, "x", None, [], Unprintable()), [{}, os.environ]),
    ("parse_policy.text", wrong(TypeError, "a string", 3, None, b"x", Unprintable()), ["Size(3)"]),
    ("policy_from_env.prefix", wrong(TypeError, "a string", 3, None, b"x", Unprintable()), ["", "x"]),
    ("BatchingPolicy.__or__.other", NO_POLICY + NO_NEEDS, [Size(1)]),
    ("BatchingPolicy.__and__.other", NO_POLICY + NO_NEEDS, [Size(1)]),
    ("simulate.policy", NO_POLICY, [Size(1), Size(HUGE)]),
    (
        "simulate.arrivals",
        wrong(TypeError, "moments, a function that returns moments, or callers", *NEITHER),
        [[1], (0,)],
    ),
    ("simulate.service_time", NO_CALLABLE + NOT_PLAIN, [float]),
    ("simulate.cost", NO_CALLABLE + NOT_PLAIN, [None]),
    ("simulate.weights", NO_CALLABLE + NOT_PLAIN, [None, lognormal(1, 2, 3)]),
    ("simulate.key", NO_CALLABLE + NOT_PLAIN, [None, str]),
    ("simulate.expires_in", NO_NUMBER + NEGATIVE, [None, *SECONDS]),
    ("simulate.weigh", NO_CALLABLE + NOT_PLAIN, [None, float]),
    ("simulate.max_workers", NO_INTEGER + BELOW_1, [1, 10_000]),
    ("lognormal.least", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 2]),
    ("lognormal.median", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [2, Fraction(5, 2), 3]),
    ("lognormal.most", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [2, Fraction(5, 2), 1e308]),
    ("poisson.rate", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, Fraction(1, 2), 1e308]),
    ("poisson.jobs", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("callers.count", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("callers.jobs", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("callers.think", NO_NUMBER + NEGATIVE + INFINITE, [0, 0.5, Fraction(1, 2), 1e308]),
    ("callers.turn", NO_NUMBER + NEGATIVE + INFINITE, [0, 0.5, Fraction(1, 2), 1e308]),
    (
        "TraceRecorder.file",
        wrong(TypeError, "a file open for writing", 3, True, "x", b"x", [], Unprintable()),
        [io.StringIO()],
    ),
    (
        "read_trace.lines",
        wrong(TypeError, "the lines of a trace", 3, True, NAN, "a path", b"x", Unprintable()),
        [[TRACE], {TRACE}],
    ),
    ("retrying.processor", NO_CALLABLE + NOT_PLAIN, [echo, list]),
    ("retrying.stop", NO_CALLABLE + NOT_PLAIN, [stop_never, stop_after_attempt(2)]),
    ("retrying.wait", NO_CALLABLE + NOT_PLAIN, [wait_none()]),
    ("retrying.retry", NO_CALLABLE + NOT_PLAIN, [None, retry_if_exception_type(OSError)]),
    ("bisecting.processor", NO_CALLABLE + NOT_PLAIN, [echo, list]),
    ("bisecting.on", NO_KINDS, [None, ValueError, (), (ValueError, OSError)]),
    ("bisecting.unless", NO_KINDS, [ValueError, (), (ValueError, OSError)]),
    ("bisecting.max_calls", NO_INTEGER + BELOW_1, [1, HUGE]),
    ("deduplicating.processor", NO_CALLABLE + NOT_PLAIN, [echo, list]),
    ("deduplicating.key", NO_CALLABLE + NOT_PLAIN, [None, str]),
    ("within.processor", NO_CALLABLE + NOT_PLAIN, [echo, list]),
    ("deduplicating.keep", NO_END, ["first", "last"]),
    ("deduplicating.merge", NO_CALLABLE + NOT_PLAIN, [None, max]),
    ("by_key.fetch", NO_CALLABLE + NOT_PLAIN, [echo, dict.fromkeys]),
    ("by_key.key", NO_CALLABLE + NOT_PLAIN, [None, str]),
    ("by_key.row_key", NO_CALLABLE + NOT_PLAIN, [None, str]),
    ("by_key.many", NO_FLAG, [True, False]),
    ("by_length.processor", NO_CALLABLE + NOT_PLAIN, [echo, list]),
    ("by_length.budget", NO_NUMBER + NEGATIVE + INFINITE + ZERO, [0.5, 1e308]),
    ("by_length.length", NO_CALLABLE + NOT_PLAIN, [len]),
    ("within.context", NO_CALLABLE + NOT_PLAIN, [nullcontext, threading.Lock]),
    ("within.pass_value", NO_FLAG, [True, False]),
    ("ManualClock.start", NO_NUMBER + NEGATIVE + INFINITE, [0, Fraction(1, 2)]),
    ("ManualClock.advance.seconds", NO_NUMBER + NEGATIVE + INFINITE, [0, 1e308]),
    ("ManualClock.wait_for_sleeper.moment", NO_NUMBER + NEGATIVE, SECONDS),
    ("ManualClock.wait_for_sleeper.timeout", NO_NUMBER + NEGATIVE + BEYOND_WAITING, [0]),
    ("RecordingProcessor.function", NO_CALLABLE + NOT_PLAIN, [None, str]),
    ("RecordingProcessor.wait_for_batches.count", NO_INTEGER + BELOW_0, [0]),
    ("RecordingProcessor.wait_for_batches.timeout", NO_NUMBER + NEGATIVE + BEYOND_WAITING, [0, 1e9]),
]
ARGUMENTS += [
    (argument.replace("Batcher", "BatchedFunction"), refused, accepted)
    for argument, refused, accepted in ARGUMENTS
    if re.match(r"Batcher\.(submit|map|shutdown)\.", argument)
]
ARGUMENTS += [
    (argument.replace("Batcher", "Coalescer"), refused, accepted)
    for argument, refused, accepted in ARGUMENTS
    if re.match(r"Batcher\.submit\.[^j]", argument)
]
EXEMPT = {
    "BatchInfo.*": "a record",
    "JobResult.*": "a record",
    "ResultAt.*": "a record, whose index is checked with the results of its batch",
    "by_key.default": "may be anything",
    "BatchFinished.*": "a record",
    "BatchReport.*": "a record",
    "Hints.*": "checked by the batcher that gets the policy",
    "BatchStarted.*": "a record",
    "BatcherShutDown.*": "a record",
    "JobAccepted.*": "a record",
    "JobsDropped.*": "a record",
    "ServiceTime.*": "a record",
    "SimulatedBatch.*": "a record",
    "SimulationReport.*": "a record, and a path for matplotlib, which checks it",
    "Trace.*": "a record",
    "simulate.seed": "passed to random.Random, which checks it",
    "BatcherStats.*": "a record",
    "Window.*": "a record",
    "BacklogFull.*": "an exception",
    "JobExpired.*": "an exception",
    "JobDropped.*": "an exception",
    "JobTooLarge.*": "an exception",
    "ResultCountError.*": "an exception",
    "JobFuture.*": "created by the batcher, and otherwise a future of the standard library",
    "InlineExecutor.submit.*": "an executor like those of the standard library, which call anything",
    "BatchedFunction.function": "made by batched()",
    "Coalescer.batcher": "made by coalescing()",
    "Coalescer.key": "made by coalescing()",
    "Coalescer.submit.job": "anything that is hashable",
    "BatchedFunction.make": "made by batched()",
    "BatchedFunction.__call__.others": "always refused",
    "batched.options": "passed to Batcher, which checks them",
    "*.window": "called by the batcher",
    "*.fits.weight": "called by the batcher",
    "*.event": "called by the batcher",
    "*.observe.report": "called by the batcher",
    "ManualClock.wait_until.*": "called by the batcher",
    "RecordingProcessor.__call__.jobs": "called by the batcher",
}
NEEDED: dict[str, dict[str, Any]] = {
    "Batcher": {"processor": echo},
    "simulate": {"policy": Size(1), "arrivals": [1], "service_time": float},
    "lognormal": {"least": 2, "median": 2, "most": 3},
    "poisson": {"rate": 1, "jobs": 1},
    "callers": {"count": 1, "jobs": 1},
    "retrying": {"processor": echo, "stop": stop_never, "wait": wait_none()},
    "bisecting": {"processor": echo},
    "deduplicating": {"processor": echo},
    "by_key": {"fetch": echo, "row_key": str},
    "by_length": {"processor": echo, "budget": 1},
    "within": {"processor": echo, "context": nullcontext},
    "Rate": {"n": 1, "per": 1},
    "Adaptive": {"target": 1},
    "Congestion": {"most": 1},
    "submit": {"job": 1},
    "map": {"jobs": [1]},
    "wait_for_sleeper": {"moment": 1, "timeout": 0},
    "wait_for_batches": {"count": 0},
}


MODULES: Any = (
    microbatch,
    microbatch.policies.text,
    microbatch.testing,
    microbatch.simulation,
    microbatch.traces,
    microbatch.processors,
)


def parameters() -> Iterator[str]:
    """Yield all public parameters, as ``class.method.parameter``, ``class.parameter`` and the like."""
    for module in MODULES:
        for name in module.__all__:
            offered = getattr(module, name)
            if isinstance(offered, GenericAlias):
                continue  # on Python 3.10 it passes for a class
            for method in vars(offered) if inspect.isclass(offered) else [""]:
                function = getattr(offered, method, None) if method else offered
                public = not method.startswith("_") or method in ("__init__", "__call__", "__or__", "__and__")
                if public and inspect.isfunction(function):
                    names = list(inspect.signature(function).parameters)[bool(method) :]
                    yield from (f"{name}.{method}.{each}".replace(".__init__", "").replace("..", ".") for each in names)


def exempt(argument: str) -> set[str]:
    return {pattern for pattern in EXEMPT if fnmatch(argument, pattern)}


def test_every_public_parameter_is_in_the_table_or_exempt() -> None:
    assert sorted(argument for argument, _, _ in ARGUMENTS) == sorted(
        argument for argument in parameters() if not exempt(argument)
    )
    assert set(EXEMPT) == {pattern for argument in parameters() for pattern in exempt(argument)}


def call_with(function: Any, argument: str, value: Any) -> None:
    """Call the owner of the argument with *value* for it, and with valid values for all other arguments."""
    owners = {
        "Batcher": function.batcher,
        "Coalescer": coalescing(function.batcher),
        "BatchedFunction": function,
        "BatchingPolicy": Size(3),
        "ManualClock": ManualClock(),
        "RecordingProcessor": RecordingProcessor[Any](),
    }
    *path, name = argument.split(".")
    offered = next(getattr(module, path[0]) for module in MODULES if path[0] in module.__all__)
    called = getattr(owners[path[0]], path[1]) if path[1:] else offered
    needed = {"batcher": function.batcher} if path[-1] == "coalescing" else NEEDED.get(path[-1], {})
    called(**{**needed, name: value})


def none_if_refused(refused: list[Wrong], accepted: list[Any]) -> list[Wrong]:
    """Return None as one more wrong value, unless it is accepted."""
    return [] if None in accepted else wrong(TypeError, refused[0][1], None)


def message(name: str, must_be: str) -> str:
    subject = "" if " must " in must_be else f"{'a part of a policy' if name == 'other' else name} must be "
    return rf"^{subject}{must_be}, got \S.{{0,200}}$"


@pytest.mark.parametrize(
    "argument, error, must_be, value",
    [
        pytest.param(argument, error, must_be, value, id=f"{argument} {number} {type(value).__name__}")
        for argument, refused, accepted in ARGUMENTS
        for number, (error, must_be, value) in enumerate(refused + none_if_refused(refused, accepted))
    ],
)
def test_a_wrong_argument_is_refused_before_anything_starts(
    argument: str, error: Any, must_be: str, value: Any
) -> None:
    function, before = batched()(echo), threading.active_count()
    with pytest.raises(error, match=message(argument.split(".")[-1], must_be)):
        call_with(function, argument, value)
    assert (before, BatcherStats()) == (threading.active_count(), function.batcher.stats())
    assert "still open" == function("still open")
    function.shutdown()


@pytest.mark.parametrize(
    "argument, value",
    [
        pytest.param(argument, value, id=f"{argument} {number} {type(value).__name__}")
        for argument, _, accepted in ARGUMENTS
        for number, value in enumerate(accepted)
    ],
)
def test_a_valid_argument_is_accepted(argument: str, value: Any) -> None:
    function = batched()(echo)
    with suppress(TimeoutError):  # no thread sleeps, and no batch is dispatched
        call_with(function, argument, value)
    function.shutdown()


# -- combinations of arguments --


@pytest.mark.parametrize("policy", [Size(9), Size(9) & Interval(1), Answering(needs=9)])
def test_a_policy_that_needs_more_jobs_than_max_pending_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="policy must be able to dispatch a batch of at most max_pending=8 jobs, got"):
        Batcher(echo, policy, max_pending=8)


@pytest.mark.parametrize(
    "policy, max_pending", [(Size(9) | Interval(1), 8), (Size(8), 8), (Size(9), 0), (DEFAULT_POLICY, 1)]
)
def test_a_policy_that_can_dispatch_within_max_pending_is_accepted(policy: Any, max_pending: int) -> None:
    with Batcher(echo, policy, max_pending=max_pending) as batcher:
        batcher.submit(1)


def test_max_workers_is_unlimited_with_a_supplied_executor() -> None:
    with Batcher(echo, executor=InlineExecutor(), max_workers=HUGE) as batcher:
        assert 1 == batcher.submit(1).result(timeout=10).value


def test_each_part_of_a_combined_policy_is_checked() -> None:
    with pytest.raises(TypeError, match=r"the needs of a policy must be an integer, got 'x'"):
        Answering(needs="x") | Size(3)


# -- return values of the caller's functions --


@pytest.mark.parametrize(
    "error, must_be, weight",
    NO_NUMBER + NEGATIVE + INFINITE + wrong(TypeError, "a number", None),
    ids=lambda value: type(value).__name__,
)
def test_an_invalid_weight_is_refused(error: Any, must_be: str, weight: Any) -> None:
    with Batcher(echo, weigh=lambda job: weight) as batcher:
        with pytest.raises(error, match=message("the weight of a job", must_be)):
            batcher.submit(1)
        assert BatcherStats() == batcher.stats()


@pytest.mark.parametrize("weight", [0, 1e308, Fraction(1, 2)])
def test_any_finite_number_is_a_valid_weight(weight: Any) -> None:
    with Batcher(echo, weigh=lambda job: weight) as batcher:
        assert weight == batcher.submit(1).result(timeout=10).batch.weight


def test_the_arguments_are_checked_before_the_job_is_read() -> None:
    looked_at: list[Any] = []

    class Jobs:
        def __iter__(self) -> Iterator[Any]:
            looked_at.append(self)
            return iter("ab")

    def look(job: Any) -> int:
        looked_at.append(job)
        return 1

    with Batcher(echo, key=look, weigh=look) as batcher:
        for call in (
            lambda: batcher.submit("job", timeout=-1),
            lambda: batcher.submit("job", expires_in=-1),
            lambda: batcher.map(Jobs(), timeout=-1),
            lambda: batcher.map(Jobs(), buffersize=0),
        ):
            with pytest.raises(ValueError):
                call()
    assert [] == looked_at


@pytest.mark.parametrize("answer", [NAN, "x", None, True])
@pytest.mark.parametrize("question", ["due", "_room"])
def test_a_policy_that_returns_no_number_fails_the_batch(question: str, answer: Any) -> None:
    with Batcher(echo, Answering(**{question.strip("_"): answer})) as batcher:
        error = batcher.submit(1).exception(timeout=10)
    assert isinstance(error, TypeError)
    assert re.match(message(rf"the {question}\(\) of a policy", "a number"), str(error))


@pytest.mark.parametrize("question", ["due", "_room"])
@pytest.mark.parametrize("combine", [operator.or_, operator.and_])
def test_a_part_of_a_combined_policy_that_returns_no_number_fails_the_batch(combine: Any, question: str) -> None:
    odd = Answering(**{question.strip("_"): NAN})
    for policy in (combine(odd, Size(2)), combine(Size(2), odd)):
        with Batcher(echo, policy) as batcher:
            assert isinstance(batcher.submit(1).exception(timeout=10), TypeError)


def test_a_policy_may_return_a_number_larger_than_any_float() -> None:
    with Batcher(echo, Answering(due=HUGE, room=HUGE)) as batcher:
        first = batcher.submit(1)
        assert batcher.flush()
        second = batcher.submit(2)
    assert ("flush", "shutdown") == (first.result().batch.trigger, second.result().batch.trigger)


@pytest.mark.parametrize("now", [lambda: "noon", lambda: NAN, lambda: None])
def test_a_clock_that_returns_no_number_is_refused(now: Any) -> None:
    with pytest.raises(TypeError, match=r"the now\(\) of a clock must be a number, got "):
        Batcher(echo, clock=SimpleNamespace(now=now, wait_until=echo))


def test_a_clock_that_is_falsy_is_still_used() -> None:
    class Empty(ManualClock):
        def __len__(self) -> int:
            return 0

    clock = Empty()
    with Batcher(echo, Interval(60), clock=clock) as batcher:
        future = batcher.submit(1)
        clock.advance(60)
        assert "interval" == future.result(timeout=10).batch.trigger


# -- the decorator --


@pytest.mark.parametrize(
    "decorate, must_be",
    [
        (lambda: batched(Size(2), max_workers="3")(echo), "max_workers must be an integer"),  # type: ignore[arg-type]
        (lambda: batched(Size(2))(3), "processor must be callable"),  # type: ignore[call-overload]
        (lambda: batched(Size(2))(coroutine), "processor must be a plain function"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_argument_is_refused_when_decorating(decorate: Any, must_be: str) -> None:
    with pytest.raises(TypeError, match=message("", must_be)):
        decorate()


def test_an_unknown_option_is_refused_when_decorating() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        batched(Size(2), nonsense=1)(echo)  # type: ignore[call-arg]


@pytest.mark.parametrize("policy", [echo, Size, "x"])
def test_batched_without_parentheses_says_how_to_write_it(policy: Any) -> None:
    with pytest.raises(
        TypeError, match=r"got .*: write @batched\(Size\(100\)\), or @batched\(\) for the default policy"
    ):
        batched(policy)
