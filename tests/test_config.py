"""Policies that environment variables choose."""

from typing import Any

import pytest

from microbatch import DEFAULT_POLICY, Batcher, BatchingPolicy, Size, policy_from_env


def make() -> BatchingPolicy[object]:
    return Size(7)


def make_a_number() -> int:
    return 7


def make_and_raise() -> BatchingPolicy[object]:
    raise OSError("no")


@pytest.mark.parametrize(
    "variables, policy",
    [
        ({}, repr(DEFAULT_POLICY)),
        ({"BATCH_CAPACITY": "64"}, "Size(64)"),
        ({"BATCH_TIME_WINDOW": "5"}, "Interval(0.005)"),
        ({"BATCH_TIME_WINDOW": "0"}, "Interval(0)"),
        ({"BATCH_CAPACITY": "64", "BATCH_TIME_WINDOW": "5"}, "Size(64) | Interval(0.005)"),
        ({"BATCH_CAPACITY": " 64 ", "BATCH_TIME_WINDOW": ""}, "Size(64)"),
        ({"STRATEGY": "", "BATCH_CAPACITY": "64"}, "Size(64)"),
        ({"STRATEGY": "size", "BATCH_CAPACITY": "64", "BATCH_TIME_WINDOW": "5"}, "Size(64)"),
        ({"STRATEGY": "interval", "BATCH_CAPACITY": "64", "BATCH_TIME_WINDOW": "5"}, "Interval(0.005)"),
        (
            {"STRATEGY": "Size-Or-Interval ", "BATCH_CAPACITY": "1", "BATCH_TIME_WINDOW": "1"},
            "Size(1) | Interval(0.001)",
        ),
        ({"STRATEGY": "natural"}, "BestSize(100) | Natural()"),
        ({"STRATEGY": "natural", "BATCH_CAPACITY": "9"}, "Size(9) | Natural()"),
        ({"STRATEGY": "fixed-window", "BATCH_TIME_WINDOW": "1500"}, "FixedWindow(1.5)"),
        (
            {"STRATEGY": "fixed-window", "BATCH_TIME_WINDOW": "1500", "BATCH_CAPACITY": "9"},
            "Size(9) | FixedWindow(1.5)",
        ),
        ({"STRATEGY": "session", "BATCH_TIME_WINDOW": "250"}, "Session(0.25)"),
        ({"STRATEGY": "session", "BATCH_TIME_WINDOW": "250", "BATCH_CAPACITY": "9"}, "Size(9) | Session(0.25)"),
        ({"STRATEGY": "weight", "BATCH_WEIGHT": "1000"}, "Weight(1000)"),
        (
            {"STRATEGY": "weight", "BATCH_WEIGHT": "9", "BATCH_TIME_WINDOW": "5", "BATCH_CAPACITY": "4"},
            "Size(4) | Weight(9) | Interval(0.005)",
        ),
        (
            {"STRATEGY": "adaptive", "BATCH_TARGET_TIME": "50"},
            "Adaptive(0.05, least=1, most=1000, warm_up=3) | Natural()",
        ),
        (
            {"STRATEGY": "adaptive", "BATCH_TARGET_TIME": "50", "BATCH_CAPACITY": "9", "BATCH_TIME_WINDOW": "5"},
            "Adaptive(0.05, least=1, most=9, warm_up=3) | Interval(0.005)",
        ),
        (
            {"BATCH_CAPACITY": "64", "BATCH_TIME_WINDOW": "5", "RATE_BATCHES": "10", "RATE_TIME_WINDOW": "1000"},
            "(Size(64) | Interval(0.005)) & Rate(10, per=1)",
        ),
        ({"STRATEGY": " Size(64) | Natural() "}, "Size(64) | Natural()"),
        ({"STRATEGY": "Weight(9)|Interval(0.5)", "BATCH_CAPACITY": "3"}, "Weight(9) | Interval(0.5)"),
        (
            {"STRATEGY": "Size(64) | Natural", "RATE_BATCHES": "10", "RATE_TIME_WINDOW": "1000"},
            "(Size(64) | Natural()) & Rate(10, per=1)",
        ),
        ({"STRATEGY": "AllWaiting"}, "AllWaiting(0.1)"),
        ({"STRATEGY": "Natural()", "BATCH_CAPACITY": "9"}, "Natural()"),
        ({"STRATEGY": "Natural", "BATCH_CAPACITY": "9"}, "Size(9) | Natural()"),
        ({"STRATEGY": "tests.test_config:make"}, "Size(7)"),
        (
            {"STRATEGY": "tests.test_config:make", "RATE_BATCHES": "1", "RATE_TIME_WINDOW": "1"},
            "Size(7) & Rate(1, per=0.001)",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["MICROBATCH_", "X_", ""])
def test_environment_variables_choose_the_policy(variables: dict[str, str], policy: str, prefix: str) -> None:
    environ = {prefix + name: value for name, value in variables.items()}
    assert policy == repr(policy_from_env({"BATCH_CAPACITY_": "no", **environ}, prefix))


@pytest.mark.parametrize(
    "variables, complaint",
    [
        ({"BATCH_CAPACITY": "0"}, "X_BATCH_CAPACITY must be an integer of at least 1, got '0'"),
        ({"BATCH_CAPACITY": "ten"}, "X_BATCH_CAPACITY must be an integer of at least 1, got 'ten'"),
        ({"BATCH_CAPACITY": "1_000"}, "X_BATCH_CAPACITY must be an integer of at least 1, got '1_000'"),
        ({"BATCH_CAPACITY": "²"}, "X_BATCH_CAPACITY must be an integer of at least 1, got '²'"),
        (
            {"BATCH_TIME_WINDOW": "1.5"},
            "X_BATCH_TIME_WINDOW must be a time in whole milliseconds, at least 0, got '1.5'",
        ),
        ({"BATCH_TIME_WINDOW": "-1"}, "X_BATCH_TIME_WINDOW must be a time in whole milliseconds, at least 0, got '-1'"),
        ({"STRATEGY": "size"}, "X_BATCH_CAPACITY must be an integer of at least 1, got nothing"),
        (
            {"STRATEGY": "interval", "BATCH_TIME_WINDOW": ""},
            "X_BATCH_TIME_WINDOW must be a time in whole milliseconds, at least 0, got ''",
        ),
        (
            {"STRATEGY": "fixed-window", "BATCH_TIME_WINDOW": "0"},
            "X_BATCH_TIME_WINDOW must be a time in whole milliseconds, at least 1, got '0'",
        ),
        ({"RATE_BATCHES": "5"}, "X_RATE_TIME_WINDOW must be a time in whole milliseconds, at least 1, got nothing"),
        ({"RATE_TIME_WINDOW": "5"}, "X_RATE_BATCHES must be an integer of at least 1, got nothing"),
        ({"STRATEGY": "weight"}, "X_BATCH_WEIGHT must be an integer of at least 1, got nothing"),
        ({"STRATEGY": "adaptive"}, "X_BATCH_TARGET_TIME must be a time in whole milliseconds, at least 1, got nothing"),
        (
            {"STRATEGY": "sise"},
            "X_STRATEGY must be one of size, interval, size-or-interval, natural, fixed-window, session, weight, adaptive, "
            "package.module:factory, or a policy such as Size(64) | Natural(), got 'sise'",
        ),
        ({"STRATEGY": "fixed-windows"}, "X_STRATEGY must be one of size, interval, "),
        ({"STRATEGY": "Rate"}, "X_STRATEGY must be one of size, interval, "),
        (
            {"STRATEGY": "Size(0) | Natural()"},
            "X_STRATEGY: can't create the policy 'Size(0)': n must be at least 1, got 0",
        ),
        ({"STRATEGY": "Size(64) | Intervall(1)"}, "X_STRATEGY: a policy must be made of Adaptive, AllWaiting, "),
        ({"STRATEGY": "size | natural"}, "X_STRATEGY: a policy must be made of Adaptive, AllWaiting, "),
        (
            {"STRATEGY": "Size({3: 4})"},
            "X_STRATEGY: can't create the policy 'Size({3: 4})': n must be an integer, got {3",
        ),
        ({"STRATEGY": "no_such_module:f"}, "X_STRATEGY must be a strategy, or package.module:factory that can be"),
        (
            {"STRATEGY": "tests.test_config:nothing"},
            "X_STRATEGY must be a strategy, or package.module:factory that can be",
        ),
        ({"STRATEGY": ":make"}, "X_STRATEGY must be a strategy, or package.module:factory that can be imported, got"),
        (
            {"STRATEGY": "tests.test_config:"},
            "X_STRATEGY must be a strategy, or package.module:factory that can be imported",
        ),
        (
            {"STRATEGY": "tests.test_config:make_a_number"},
            "X_STRATEGY must be a factory that returns a BatchingPolicy (it returned 7), got",
        ),
    ],
    ids=str,
)
def test_the_error_for_a_bad_variable_names_it_and_says_what_is_expected(
    variables: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ValueError) as refused:
        policy_from_env({f"X_{name}": value for name, value in variables.items()}, "X_")
    assert str(refused.value).startswith(complaint)


def test_an_exception_from_a_factory_is_raised() -> None:
    with pytest.raises(OSError):
        policy_from_env({"STRATEGY": "tests.test_config:make_and_raise"}, "")


def test_from_env_reads_the_policy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROBATCH_BATCH_CAPACITY", "3")
    monkeypatch.setenv("Y_BATCH_CAPACITY", "2")
    with (
        Batcher[int, int].from_env(list, name="own") as batcher,
        Batcher[int, int].from_env(list, prefix="Y_") as other,
    ):
        assert ("<Batcher 'own' with Size(3)>", "<Batcher 'microbatch' with Size(2)>") == (repr(batcher), repr(other))
        assert [3] == [future.result().batch.size for future in [batcher.submit(n) for n in range(3)][:1]]


def test_from_env_of_a_subclass_returns_an_instance_of_the_subclass() -> None:
    class Mine(Batcher[Any, Any]):
        """A subclass of Batcher."""

    with Mine.from_env(list, environ={}) as batcher:
        assert isinstance(batcher, Mine)
