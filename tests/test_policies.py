"""Policies: when a batch is due, which jobs fit into it, and how policies are combined and written."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from microbatch import (
    NEVER,
    NOW,
    Adaptive,
    AllWaiting,
    Batcher,
    BatchInfo,
    BatchingPolicy,
    BatchReport,
    CallerActivity,
    Congestion,
    FixedWindow,
    Hints,
    InTime,
    Interval,
    JobTooLarge,
    Natural,
    OldestFirst,
    Padded,
    PerKey,
    Rate,
    Session,
    Size,
    Weight,
    Window,
)
from microbatch.policies.text import parse_policy
from microbatch.policies.base import count_gates


class Urgent(BatchingPolicy[str]):
    def due(self, window: Window[str]) -> float:
        return NOW if "now" in window.jobs else NEVER


class Light(BatchingPolicy[Any]):
    def due(self, window: Window[Any]) -> float:
        return NEVER

    def fits(self, window: Window[Any], weight: float) -> bool:
        return window.weight + weight <= 10


class Learning(BatchingPolicy[Any]):
    def __init__(self) -> None:
        self.reports: list[BatchReport] = []

    def due(self, window: Window[Any]) -> float:
        return NOW

    def observe(self, report: BatchReport) -> None:
        self.reports.append(report)
        raise OSError("no")


def taught(policy: BatchingPolicy[Any], *service_times: float) -> BatchingPolicy[Any]:
    """Return *policy* after it has seen batches that took these times."""
    for time in service_times:
        policy.observe(BatchReport(BatchInfo(1, 1, 1.0, None, ""), time, failed=0))
    return policy


@pytest.mark.parametrize(
    "policy, window, due",
    [
        (Size(3), Window(count=2), NEVER),
        (Size(3), Window(count=3), NOW),
        (Size(3), Window(count=4), NOW),
        (Interval(0.5), Window(count=1, opened=10.0), 10.5),
        (Interval(0.5), Window(count=9, opened=10.0, newest=99.0), 10.5),
        (Interval(0), Window(opened=10.0), 10.0),
        (Interval(float("inf")), Window(opened=10.0), NEVER),
        (Size(3) | Interval(0.5), Window(count=2, opened=10.0), 10.5),
        (Size(3) | Interval(0.5), Window(count=3, opened=10.0), NOW),
        (Size(3) & Interval(0.5), Window(count=2, opened=10.0), NEVER),
        (Size(3) & Interval(0.5), Window(count=3, opened=10.0), 10.5),
        (Weight(10), Window(count=9, weight=9.99), NEVER),
        (Weight(10), Window(count=1, weight=10.0), NOW),
        (Weight(10), Window(count=9, weight=10.01), NOW),
        (Weight(10), Window(count=1, weight=0.0), NEVER),
        (Weight(10), Window(count=2, weight=9.0, full=True), NOW),
        (Weight(10) & Interval(1), Window(weight=9.0, opened=10.0, full=True), 11.0),
        (Padded(12), Window(count=2, heaviest=4.0), NEVER),
        (Padded(12), Window(count=3, heaviest=4.0), NOW),
        (Padded(12), Window(count=2, heaviest=4.001), NOW),
        (Padded(12), Window(count=9, heaviest=0.0), NEVER),
        (Padded(12), Window(count=1, heaviest=4.0, full=True), NOW),
        (Padded(12) & Interval(1), Window(count=3, heaviest=4.0, opened=10.0), 11.0),
        (PerKey(), Window(count=1), NOW),
        (PerKey(), Window(count=1, key_in_flight=1), NEVER),
        (PerKey(2), Window(count=1, key_in_flight=1), NOW),
        (PerKey(2), Window(count=1, key_in_flight=2), NEVER),
        (PerKey() & Interval(1), Window(count=1, opened=10.0), 11.0),
        (PerKey() | Interval(1), Window(count=1, opened=10.0, key_in_flight=1), 11.0),
        (OldestFirst() & Interval(1), Window(count=1, opened=10.0), 11.0),
        (InTime(), Window(count=1, opened=10.0), NEVER),
        (InTime(), Window(count=1, opened=10.0, expires=20.0), NOW),
        (taught(InTime(), 4.0), Window(opened=10.0, expires=20.0), 16.0),
        (taught(InTime(1), 4.0), Window(opened=10.0, expires=20.0), 15.0),
        (taught(InTime(), 4.0, 0.5), Window(opened=10.0, expires=20.0), 16.0),
        (taught(InTime(), 4.0, *[0.5] * 10), Window(opened=10.0, expires=20.0), 19.5),
        (taught(InTime(), 4.0), Window(count=2, opened=10.0, expires=20.0), 12.0),
        (taught(InTime(), 0.0), Window(opened=10.0, expires=20.0), 19.995),
        (taught(InTime(), NEVER), Window(opened=10.0, expires=20.0), NOW),
        (taught(InTime(), float("nan"), 0.5), Window(opened=10.0, expires=20.0), 19.5),
        (taught(InTime() | Interval(1), 0.5), Window(opened=10.0, expires=10.75), 10.25),
        (taught(InTime() | Interval(1), 0.5), Window(opened=10.0, expires=20.0), 11.0),
        (FixedWindow(5), Window(started=100.0, opened=100.0), 100.0),
        (FixedWindow(5), Window(started=100.0, opened=100.001), 105.0),
        (FixedWindow(5), Window(started=100.0, opened=105.0), 105.0),
        (FixedWindow(5), Window(started=-3.0, opened=4.0), 7.0),
        (Session(0.5), Window(count=1, opened=10.0, newest=10.0), 10.5),
        (Session(0.5), Window(count=9, opened=10.0, newest=99.0), 99.5),
        (Session(0), Window(newest=10.0), 10.0),
        (Rate(1, 60), Window(count=1), NOW),
        (Rate(1, 60), Window(count=1, sent=[10.0]), 70.0),
        (Rate(2, 60), Window(count=1, sent=[10.0]), NOW),
        (Rate(2, 60), Window(count=1, sent=[1.0, 10.0, 20.0]), 70.0),
        (Size(3) & Rate(1, 60), Window(count=2, sent=[10.0]), NEVER),
        (Size(3) & Rate(1, 60), Window(count=3, sent=[10.0]), 70.0),
        (AllWaiting(0.5), Window(count=1, opened=10.0, callers=CallerActivity(heard=10.25)), 10.75),
        (AllWaiting(0.5), Window(count=1, opened=10.0), NOW),
        (AllWaiting(), Window(count=1, opened=10.0, callers=CallerActivity(heard=10.0)), 10.1),
        (AllWaiting(0.5) | Interval(0.125), Window(count=1, opened=10.0, callers=CallerActivity(heard=10.0)), 10.125),
        (Natural(), Window(count=1, opened=10.0), 10.0),
        (Natural(), Window(count=1, opened=10.0, sent=[9.9], service_time=2.0), 10.0),
        (Natural(), Window(count=1, opened=10.0, sent=[9.0, 9.75], service_time=2.0, workers=4, in_flight=1), 10.25),
        (Natural(), Window(count=1, opened=10.0, sent=[9.0, 9.75], service_time=2.0, workers=4), 10.0),
        (Natural(), Window(opened=10.0, sent=[9.75], service_time=2.0, workers=4, in_flight=1, full=True), 10.0),
        (Natural(), Window(count=1, opened=10.0, sent=[9.0], service_time=2.0, workers=4), 10.0),
        (Natural(), Window(count=1, newest=10.0, service_time=2.0, callers=CallerActivity(2, 11.0)), 11.0),
        (Natural(), Window(count=4, newest=10.0, service_time=2.0, callers=CallerActivity(3, 12.0)), 11.5),
        (Natural(), Window(count=4, newest=10.0, service_time=2.0, callers=CallerActivity(2, 9.5)), 9.5),
        (
            Natural(),
            Window(newest=10.0, count=4, service_time=4.0, callers=CallerActivity(1, 19.0), workers=2, in_flight=1),
            10.5,
        ),
        (Natural(), Window(newest=10.0, count=4, service_time=4.0, callers=CallerActivity(1, 19.0), workers=2), 0.0),
        (Natural(), Window(newest=10.0, count=4, service_time=4.0, callers=CallerActivity(1, 19.0), in_flight=1), 0.0),
        (Urgent() | Size(3), Window(count=1, jobs=["later"]), NEVER),
        (Urgent() | Size(3), Window(count=2, jobs=["later", "now"]), NOW),
    ],
)
def test_due_returns_the_moment_at_which_a_batch_is_due(
    policy: BatchingPolicy[Any], window: Window[Any], due: float
) -> None:
    assert due == policy.due(window)


@pytest.mark.parametrize(
    "policy, window, weight, fits",
    [
        (Size(3), Window(count=2), 1.0, True),
        (Size(3), Window(count=3), 1.0, False),
        (Size(3), Window(count=4), 1.0, False),
        (Interval(1), Window(count=10**6), 1e9, True),
        (Weight(10), Window(weight=8.0), 1.0, True),
        (Weight(10), Window(weight=9.0), 1.0, True),
        (Weight(10), Window(weight=9.0), 1.001, False),
        (Weight(10), Window(), 11.0, False),
        (Padded(12), Window(), 12.0, True),
        (Padded(12), Window(), 12.001, False),
        (Padded(12), Window(count=2, heaviest=4.0), 4.0, True),
        (Padded(12), Window(count=2, heaviest=4.0), 1.0, True),
        (Padded(12), Window(count=2, heaviest=4.0), 4.001, False),
        (Padded(12), Window(count=3, heaviest=4.0), 0.0, False),
        (Weight(10) | Size(3), Window(weight=9.0, count=3), 1.0, False),
        (Light(), Window(weight=9.0), 1.0, True),
        (Light(), Window(weight=9.0), 1.1, False),
        (Light() | Size(3), Window(weight=9.0, count=3), 1.0, False),
        (Light() & Size(3), Window(weight=9.5, count=2), 1.0, False),
        (Light() & Size(3), Window(weight=9.0, count=2), 1.0, True),
    ],
)
def test_a_job_fits_if_it_fits_every_part_of_the_policy(
    policy: BatchingPolicy[Any], window: Window[Any], weight: float, fits: bool
) -> None:
    assert fits == policy.fits(window, weight)


@pytest.mark.parametrize(
    "policy, window, room",
    [
        (Size(3), Window(count=1), 2),
        (Size(5), Window(count=3), 2),
        (Size(4) | Size(3), Window(count=1), 2),
        (Interval(1), Window(count=1), NEVER),
        (Size(3) | Interval(1), Window(count=1), 2),
        (Padded(12), Window(count=1), 0),
        (PerKey(), Window(count=1), NEVER),
        (Size(3) | Light(), Window(count=1), 0),
        (Urgent(), Window(count=1), NEVER),
    ],
)
def test_room_returns_how_many_jobs_are_sure_to_fit(
    policy: BatchingPolicy[Any], window: Window[Any], room: float
) -> None:
    assert room == policy._room(window)


@pytest.mark.parametrize(
    "policy, window, reason",
    [
        (Size(3), Window(count=3), "size"),
        (Interval(1), Window(), "interval"),
        (Urgent(), Window(jobs=["now"]), "urgent"),
        (Size(3) | Interval(1), Window(count=3), "size"),
        (Size(3) | Interval(1), Window(count=2), "interval"),
        (Weight(3), Window(), "weight"),
        (Padded(3), Window(), "padded"),
        (Size(3) & PerKey(), Window(count=3), "size & perkey"),
        (FixedWindow(3), Window(), "fixedwindow"),
        (Session(3), Window(), "session"),
        (Size(3) & Rate(1, 1), Window(count=3), "size & rate"),
        (Size(3) | Natural(), Window(count=2), "natural"),
        (Size(3) & Interval(1), Window(count=3), "size & interval"),
    ],
)
def test_the_reason_names_the_policy_that_is_due(policy: BatchingPolicy[Any], window: Window[Any], reason: str) -> None:
    assert reason == policy.reason(window)


@pytest.mark.parametrize(
    "text",
    [
        "Size(3)",
        "Size(3) | Natural()",
        "Size(3) | AllWaiting(0.1) | Interval(0.005)",
        "Weight(1000000) | Session(0.25)",
        "Padded(2048) | Natural()",
        "(Size(100) | Natural()) & PerKey(1) & OldestFirst()",
        "Interval(1) | InTime(0.05)",
        "FixedWindow(0.1) & Rate(5, per=60)",
        "Interval(0.05)",
        "Interval(0)",
        "Interval(0.123456789)",
        "Size(3) | Interval(1)",
        "Size(3) & Interval(1) | Size(9)",
        "(Size(3) | Interval(1)) & Size(9)",
        "Size(9) & (Size(3) | Interval(1))",
    ],
)
def test_the_repr_of_a_policy_is_the_code_that_creates_it(text: str) -> None:
    assert text == repr(eval(text))


lengths = st.floats(min_value=0)  # infinity included
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(1, 10**6)
parts: st.SearchStrategy[BatchingPolicy[Any]] = st.one_of(
    st.builds(Size, counts),
    st.builds(Interval, lengths),
    st.builds(Weight, positive),
    st.builds(Padded, positive),
    st.builds(PerKey, counts),
    st.builds(OldestFirst),
    st.builds(Congestion, counts),
    st.builds(InTime, lengths),
    st.builds(FixedWindow, positive),
    st.builds(Session, lengths),
    st.builds(Rate, counts, positive),
    st.builds(Natural),
    st.builds(AllWaiting, positive),
    st.builds(Adaptive, positive, least=st.integers(1, 9), most=st.integers(9, 99), warm_up=st.integers(0, 9)),
)
compositions = st.recursive(
    parts, lambda inner: st.builds(lambda a, b, both: a & b if both else a | b, inner, inner, st.booleans())
)
moments = st.floats(-1e9, 1e9)
windows = st.builds(
    Window[Any],
    count=st.integers(1, 10**6),
    weight=st.floats(0, 1e9),
    opened=moments,
    newest=moments,
    started=moments,
    callers=st.builds(CallerActivity, heard=moments),
    sent=st.lists(moments, max_size=3).map(sorted),
    full=st.booleans(),
    heaviest=st.floats(0, 1e9),
    expires=moments | st.just(NEVER),
    key_in_flight=st.integers(0, 9),
)


def decisions(policy: BatchingPolicy[Any], window: Window[Any]) -> "tuple[Any, ...]":
    joins = (policy.fits(window, 1.0), policy._room(window), policy.hints.needs)
    return policy.due(window), policy._earliest(window), policy.reason(window), joins


@pytest.mark.slow
@given(policy=compositions, window=windows)
@example(Interval(1.3152474112316492), Window(opened=0.0))
@example(Interval(1e-320) | Session(math.inf), Window(opened=0.0))
@example(Interval(-0.0), Window(opened=0.0))
@example(Size(2) & (Size(3) & (Size(4) | (Size(5) | Size(6)))), Window(count=4))
def test_the_repr_of_any_policy_is_code_for_one_that_makes_the_same_decisions(
    policy: BatchingPolicy[Any], window: Window[Any]
) -> None:
    for twin in (eval(repr(policy)), parse_policy(repr(policy))):
        assert repr(policy) == repr(twin)
        assert decisions(policy, window) == decisions(twin, window)


class Rows(Size):
    """Has the constructor of `Size`."""


class Seven(Size):
    def __init__(self) -> None:
        super().__init__(7)


def test_the_repr_of_a_subclass_has_its_own_name_and_no_arguments_that_it_does_not_take() -> None:
    assert "Rows(3) & Size(3)" == repr(Rows(3) & Size(3))
    assert re.fullmatch("<.*Seven object at 0x[0-9a-f]+>", repr(Seven()))


@pytest.mark.parametrize("policy", [Size(10), Size(10) | Interval(1), Size(10) & Interval(1), Urgent()], ids=repr)
@pytest.mark.parametrize(
    "ask",
    [bool, lambda policy: policy or Interval(1), lambda policy: policy and Interval(1), lambda policy: not policy],
)
def test_using_a_policy_as_a_boolean_raises(ask: Callable[[Any], object], policy: BatchingPolicy[Any]) -> None:
    with pytest.raises(TypeError, match=r"combine policies with \| and &"):
        ask(policy)


class Stated(Light):
    """States the limit that `Light` has."""

    limit = 10


class Misstated(Light):
    """States a limit that is not a number."""

    limit = "ten"


def echo(jobs: "list[float]") -> "list[float]":
    return jobs


TOO_LARGE = [
    (Weight(10), 10.5, 10.0),
    (Weight(20) | Weight(10), 15, 10.0),
    (Weight(10) & Weight(20), 15, 10.0),
    (Weight(20) | Weight(10), 25, 10.0),
    (Size(3) | (Interval(1) | Weight(20)) & Natural(), 25, 20.0),
    (Padded(10), 11, 10.0),
    (Padded(20) | Weight(10), 25, 10.0),
    (Light(), 11, None),
    (Weight(20) | Light(), 15, None),
    (Weight(20) | Light(), 25, 20.0),
    (Stated(), 11, 10),
    (Stated() | Weight(20), 25, 10),
    (Misstated(), 11, None),
]


@pytest.mark.parametrize("policy, weight, limit", TOO_LARGE)
def test_the_error_for_a_job_that_is_too_large_has_the_lowest_limit_that_it_exceeds(
    policy: BatchingPolicy[Any], weight: float, limit: float | None
) -> None:
    with Batcher[float, float](echo, policy, weigh=float) as batcher, pytest.raises(JobTooLarge) as caught:
        batcher.submit(weight)
    assert (weight, limit) == (caught.value.weight, caught.value.limit)


@pytest.mark.parametrize(
    "policy, limit", [(Weight(0.75) | Weight(0.5), 0.5), (Weight(2) | Weight(0.5) | Weight(0.75), 0.5)]
)
def test_a_job_of_the_default_weight_that_is_too_large_fails_with_the_lowest_limit(
    policy: BatchingPolicy[Any], limit: float
) -> None:
    with Batcher[float, float](echo, policy) as batcher:
        error = batcher.submit(9.0).exception(timeout=10)
    assert isinstance(error, JobTooLarge) and (1.0, limit) == (error.weight, error.limit)


@pytest.mark.parametrize("limit", [0.3, 1_000_000])
def test_the_error_for_a_job_just_above_the_limit_shows_two_different_numbers(limit: float) -> None:
    above = math.nextafter(limit, math.inf)
    assert f"weight {above} does not fit into any batch: the limit is {limit}" in str(JobTooLarge(above, limit))


@pytest.mark.parametrize(
    "policy, needs",
    [
        (Size(3), 3),
        (Interval(1), 0),
        (Size(3) | Interval(1), 0),
        (Size(3) | Size(5), 3),
        (Size(3) & Interval(1), 3),
        (Urgent(), 0),
    ],
)
def test_the_hints_of_a_policy_say_how_many_jobs_it_needs(policy: BatchingPolicy[Any], needs: int) -> None:
    assert needs == policy.hints.needs


@pytest.mark.parametrize(
    "policy, watches",
    [(Size(3) | Interval(1), False), (Size(3) | Learning(), True), (Learning() & Size(3), True), (Urgent(), True)],
)
def test_a_policy_watches_the_flow_unless_the_hints_of_every_part_say_that_it_does_not(
    policy: BatchingPolicy[Any], watches: bool
) -> None:
    assert watches is policy.hints.watches_flow


def test_earliest_is_the_later_moment_of_two_parts_for_both_and_the_earlier_one_for_either() -> None:
    window, rate, slow = Window[Any](count=9, sent=[10.0]), Rate(1, 60), Rate(1, 90)
    assert (NOW, 70.0) == (Size(3)._earliest(window), rate._earliest(window))
    assert (70.0, 100.0) == ((Size(3) & rate)._earliest(window), (rate & slow)._earliest(window))
    assert (NOW, 70.0) == ((Size(3) | rate)._earliest(window), (slow | rate)._earliest(window))


def test_both_parts_observe_a_batch_even_if_the_first_one_raises() -> None:
    first, second = Learning(), Learning()
    report = BatchReport(BatchInfo(1, 1, 1.0, None, "size"), 0.5, 0)
    with pytest.raises(OSError):
        (first | second).observe(report)
    assert ([report], [report]) == (first.reports, second.reports)


def test_a_subclass_does_not_inherit_hints_about_methods_that_it_overrides() -> None:
    class Bytes(Size):
        def fits(self, window: Window[Any], weight: float) -> bool:
            return super().fits(window, weight) and window.weight + weight <= 10

    class WhenIdle(Size):
        def due(self, window: Window[Any]) -> float:
            return NOW if window.in_flight == 0 else NEVER

    class Smaller(Size):
        """Overrides no method."""

    assert (0, False) == (Bytes(9)._room(Window()), Bytes(9).hints.watches_flow)
    assert (9, True, 0) == (WhenIdle(9)._room(Window()), WhenIdle(9).hints.watches_flow, WhenIdle(9).hints.needs)
    assert (9, False, 9) == (Smaller(9)._room(Window()), Smaller(9).hints.watches_flow, Smaller(9).hints.needs)


def test_the_default_window_is_empty() -> None:
    assert Window(0, 0.0, 0.0, 0.0, (), None, 0, 1, 0.0, 0.0, (), False, CallerActivity(0, NOW, NOW)) == Window()


@pytest.mark.parametrize(
    "record, name", [(Window(), "count"), (BatchReport(BatchInfo(1, 1, 1.0, None, "size"), 0.5, 0), "failed")]
)
def test_a_policy_cannot_change_what_it_sees(record: object, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(record, name, 9)


def test_a_policy_without_due_is_refused() -> None:
    class Undecided(BatchingPolicy[Any]):
        """Does not define `due`."""

    with pytest.raises(TypeError, match="due"):
        Undecided()  # type: ignore[abstract]


def test_a_method_inherited_from_a_mixin_counts_as_overridden() -> None:
    class Bytes:
        def fits(self, window: Window[Any], weight: float) -> bool:
            return window.weight + weight <= 10

    class Answer:
        def due(self, window: Window[Any]) -> float:
            return NOW

    class Learn:
        def observe(self, report: BatchReport) -> None:
            """Does nothing, but the base class can't know that."""

    class Limited(Bytes, Size):
        """Inherits `fits` from the mixin."""

    class Answering(Answer, Size):
        """Inherits `due` from the mixin."""

    class Watching(Learn, Size):
        """Inherits `observe` from the mixin."""

    assert (0, False, 9) == (Limited(9)._room(Window()), Limited(9).hints.watches_flow, Limited(9).hints.needs)
    assert (9, True, 0) == (Answering(9)._room(Window()), Answering(9).hints.watches_flow, Answering(9).hints.needs)
    assert (9, True, 9) == (Watching(9)._room(Window()), Watching(9).hints.watches_flow, Watching(9).hints.needs)


def test_a_subclass_that_overrides_methods_keeps_the_hints_that_it_defines_itself() -> None:
    class Own(Size):
        hints = Hints(watches_flow=False, needs=2)

        def due(self, window: Window[Any]) -> float:
            return NOW

        def fits(self, window: Window[Any], weight: float) -> bool:
            return True

        def _room(self, window: Window[Any]) -> float:
            return 7

        def observe(self, report: BatchReport) -> None:
            """Does nothing."""

    class Observing(Size):
        def observe(self, report: BatchReport) -> None:
            """Does nothing, but the base class can't know that."""

    assert (7, False, 2) == (Own(9)._room(Window()), Own(9).hints.watches_flow, Own(9).hints.needs)
    assert (9, True, 9) == (Observing(9)._room(Window()), Observing(9).hints.watches_flow, Observing(9).hints.needs)


def test_a_subclass_may_define_hints_without_overriding_other_methods() -> None:
    class Other(Size):
        hints = Hints(watches_flow=False, needs=2)

        def _room(self, window: Window[Any]) -> float:
            return 7

    class Unwatching(Urgent):
        hints = Hints(watches_flow=False)

    assert (7, False, 2) == (Other(9)._room(Window()), Other(9).hints.watches_flow, Other(9).hints.needs)
    assert not Unwatching().hints.watches_flow


def test_the_records_of_a_batch_have_no_dict() -> None:
    info = BatchInfo(1, 1, 1.0, None, "size")
    assert [False, False] == [hasattr(record, "__dict__") for record in (info, BatchReport(info, 0.5, 0))]


def test_each_part_of_a_policy_gets_the_window_to_give_its_reason() -> None:
    class Counting(Size):
        def reason(self, window: Window[Any]) -> str:
            return f"{window.count} of {self.n}"

    window = Window[Any](count=3)
    assert "3 of 3 & 3 of 2" == (Counting(3) & Counting(2)).reason(window)
    assert ("3 of 3", "3 of 2") == ((Counting(3) | Counting(2)).reason(window), (Size(4) | Counting(2)).reason(window))


# -- policies that learn --


def learned(policy: Adaptive, *batches: "tuple[int, float]", failed: int = 0) -> Adaptive:
    for number, (size, time) in enumerate(batches, 1):
        policy.observe(BatchReport(BatchInfo(number, size, float(size), None, ""), time, failed))
    return policy


def limit(policy: Adaptive) -> float:
    return policy._room(Window())


def service_time(size: int) -> float:
    return 0.02 + 0.002 * size


def test_adaptive_starts_with_a_limit_of_least_jobs() -> None:
    policy = Adaptive(0.1, least=4)
    assert (NEVER, NOW) == (policy.due(Window(count=3)), policy.due(Window(count=4)))
    assert (True, False) == (policy.fits(Window(count=3), 1.0), policy.fits(Window(count=4), 1.0))
    assert (4, 1) == (limit(policy), policy._room(Window(count=3)))


def test_adaptive_dispatches_a_batch_that_exceeds_a_lowered_limit() -> None:
    policy = learned(Adaptive(0.1, least=2, warm_up=0), *[(each, service_time(each)) for each in (20, 30, 20, 30)])
    larger = Window[object](count=int(limit(policy)) - 1)
    assert NEVER == policy.due(larger)
    learned(policy, (30, 9.0))
    assert (NOW, False) == (policy.due(larger), policy.fits(larger, 1.0))


def test_adaptive_ignores_its_first_batches() -> None:
    cold = [(1, 0.01)] * 3
    assert [1, 1, 1, 2] == [limit(learned(Adaptive(0.1), *(cold * 2)[:count])) for count in (1, 2, 3, 4)]


def test_adaptive_finds_the_batch_size_whose_service_time_is_its_target() -> None:
    policy = Adaptive(0.1, warm_up=0)
    seen = []
    for _ in range(200):
        size = int(limit(policy))
        seen.append(size)
        learned(policy, (size, service_time(size)))
    assert 40 == max(set(seen[100:]), key=seen[100:].count)  # 0.02 + 0.002 * 40 == 0.1
    assert {32, 40, 50} == set(seen[100:])  # it keeps trying a little more and a little less
    assert seen[100:].count(40) == 80


def test_adaptive_adjusts_to_a_downstream_that_has_become_slower() -> None:
    policy = Adaptive(0.1, warm_up=0)
    for _ in range(100):
        learned(policy, (int(limit(policy)), service_time(int(limit(policy)))))
    seen = []
    for _ in range(100):
        seen.append(int(limit(policy)))
        learned(policy, (seen[-1], 2 * service_time(seen[-1])))
    assert {12, 15, 18} == set(seen[60:])


@pytest.mark.parametrize("least, most, size", [(1, 1000, 40), (1, 30, 30), (60, 1000, 60), (7, 7, 7)])
def test_adaptive_keeps_its_limit_between_least_and_most(least: int, most: int, size: int) -> None:
    policy = Adaptive(0.1, least=least, most=most, warm_up=0)
    learned(policy, *[(each, service_time(each)) for each in (20, 30, 20, 30)])
    assert size == limit(policy)


def test_adaptive_never_more_than_doubles_the_largest_size_it_has_tried() -> None:
    assert 8 == limit(learned(Adaptive(9.0, warm_up=0), (2, 0.1), (4, 0.2), (2, 0.1), (4, 0.2)))


@pytest.mark.parametrize(
    "batches, size",
    [([(8, 0.05), (8, 0.05)], 9), ([(8, 0.1), (8, 0.1)], 9), ([(8, 0.5), (8, 0.5)], 6), ([(8, 0.5), (9, 0.05)], 10)],
    ids=["in time", "just in time", "late", "a falling line"],
)
def test_adaptive_changes_its_limit_in_steps_if_a_line_through_the_batches_is_no_use(
    batches: "list[tuple[int, float]]", size: int
) -> None:
    assert size == limit(learned(Adaptive(0.1, warm_up=0), *batches))


def test_adaptive_ignores_a_batch_with_failed_jobs() -> None:
    assert 1 == limit(learned(Adaptive(0.1, warm_up=0), (1, 0.001), failed=1))


@pytest.mark.parametrize("time", [float("nan"), float("inf")])
def test_adaptive_returns_to_least_and_logs_an_error_if_its_arithmetic_fails(
    time: float, caplog: pytest.LogCaptureFixture
) -> None:
    policy = learned(
        Adaptive(0.1, least=2, warm_up=0), (20, service_time(20)), (30, service_time(30)), (20, service_time(20))
    )
    assert 39 <= limit(policy) <= 41
    learned(policy, (30, time))
    assert (2, "ERROR") == (limit(policy), caplog.records[0].levelname)
    assert "can't learn from a batch of 30 jobs" in caplog.text
    assert 4 == limit(learned(policy, (2, 0.01), (3, 0.01)))


class CustomNatural(Natural):
    """A subclass of a built-in policy, which may override any decision."""


@pytest.mark.parametrize(
    "policy, gates",
    [
        (Size(3) | Interval(1), 0),
        (Size(3) | Natural(), 1),
        (Adaptive(0.1) & Rate(1, 1), 1),
        ((Size(3) | Natural()) & Rate(1, 1), 2),
        ((Size(3) | Natural()) & Congestion(9), 1),
        (CustomNatural(), None),
        (CustomNatural() | Interval(1), None),
    ],
)
def test_gates_are_counted_only_for_built_in_policies(policy: BatchingPolicy[Any], gates: "int | None") -> None:
    assert gates == count_gates(policy)


@pytest.mark.parametrize(
    "policy, names",
    [
        (Size(9) | Natural() & PerKey(), ["PerKey"]),
        (Size(9) | Rate(5, 1), ["Rate"]),
        ((Size(9) | Natural() & Rate(5, 1)) & PerKey(), ["Rate"]),
        (Size(9) & (Natural() & PerKey() | Interval(1) & Rate(5, 1)), ["PerKey", "Rate"]),
        ((Size(9) | Natural()) & PerKey() & Rate(5, 1), []),
        (Size(9) & PerKey() | Interval(1) & PerKey(), []),
        (Size(9) | Natural(), []),
    ],
    ids=repr,
)
def test_a_limit_that_does_not_apply_to_all_batches_because_of_missing_parentheses_is_logged(
    policy: BatchingPolicy[Any], names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Batcher[Any, Any](list, policy, key=str) as batcher:
        first = [(record.levelname, record.getMessage().partition(" ")[0]) for record in caplog.records]
        batcher.policy = policy
    assert [("WARNING", name) for name in names] == first
    assert 2 * len(names) == len(caplog.records) and caplog.text.count(repr(policy)) == 2 * len(names)
