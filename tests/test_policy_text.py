"""Policies as text, which the command line, the environment and the settings of Django accept."""

from typing import Any

import pytest

from microbatch import BatchingPolicy, policies
from microbatch.policies.text import parse_policy

NAMES = (
    "Adaptive, AllWaiting, BestSize, Congestion, FixedWindow, InTime, Interval, Natural, OldestFirst, Padded, PerKey, Rate, Session, Size, "
    "Weight"
)


@pytest.mark.parametrize(
    "text",
    [
        "Size(64)",
        "Weight(1.5) | FixedWindow(0.1)",
        "(Size(64) | Interval(0.005)) & Rate(5, per=60)",
        "Session(2) & Size(3) | Natural()",
    ],
)
def test_a_policy_is_parsed_from_its_repr(text: str) -> None:
    assert text == repr(parse_policy(f" {text} "))


@pytest.mark.parametrize(
    "text, policy",
    [("Natural", "Natural()"), (" Size(3) | Natural & AllWaiting", "Size(3) | Natural() & AllWaiting(0.1)")],
)
def test_a_name_without_parentheses_is_the_policy_with_its_defaults(text: str, policy: str) -> None:
    assert policy == repr(parse_policy(text))


def test_every_policy_of_the_package_can_be_named() -> None:
    offered = [getattr(policies, name) for name in policies.__all__]
    names = [each.__name__ for each in offered if isinstance(each, type) and issubclass(each, BatchingPolicy)]
    assert NAMES == ", ".join(sorted({*names} - {"BatchingPolicy"}))
    with pytest.raises(ValueError, match=f"^a policy must be made of {NAMES} with . and &, got 'Sise'$"):
        parse_policy("Sise")


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "''"),
        ("Size(3) +", "'Size(3) +'"),
        ("Size(3) + Size(4)", "'Size(3) + Size(4)'"),
        ("Size(3) or Size(4)", "'Size(3) or Size(4)'"),
        ("Size(3) | 4", "'4'"),
        ("Size(3) | Intervall(0.005) | Natural", "'Intervall(0.005)'"),
        ("BatchingPolicy", "'BatchingPolicy'"),
        ("BatchingPolicy()", "'BatchingPolicy()'"),
        ("Size.mro()", "'Size.mro()'"),
        ("__import__('os').system('true')", "\"__import__('os').system('true')\""),
        ("Size(3)\0", r"'Size(3)\x00'"),
        ("Size(3) \udcff", r"'Size(3) \udcff'"),
        ("Natural()" + " | Natural()" * 1500, "'Natural() | Natural()"),
        ("(" * 9999, "'(((("),
    ],
)
def test_text_that_is_not_a_policy_is_refused_and_never_executed(text: str, part: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_policy(text)
    assert str(refused.value).startswith(f"a policy must be made of {NAMES} with | and &, got {part}")


@pytest.mark.parametrize(
    "text, part, complaint",
    [
        ("Size(0)", "Size(0)", "n must be at least 1, got 0"),
        ("Interval(1) | Size(0) & Natural()", "Size(0)", "n must be at least 1, got 0"),
        ("Size('3')", "Size('3')", "n must be an integer, got '3'"),
        ("Size", "Size", "missing a required argument: 'n'"),
        ("Size()", "Size()", "missing a required argument: 'n'"),
        ("Size(3, m=3)", "Size(3, m=3)", "got an unexpected keyword argument 'm'"),
        ("Size(3, **{'n': 4})", "Size(3, **{'n': 4})", "got an unexpected keyword argument '**'"),
        ("Size(3, 4)", "Size(3, 4)", "too many positional arguments"),
        ("Size(n=3, n=4)", "Size(n=3, n=4)", "an argument is given twice"),
        ("Size(open('x'))", "Size(open('x'))", "an argument must be a number, got \"open('x')\""),
        ("Size({[]: 3})", "Size({[]: 3})", "an argument must be a number, got '{[]: 3}'"),
        ("Size(*[3])", "Size(*[3])", "an argument must be a number, got '*[3]'"),
    ],
)
def test_an_invalid_argument_is_refused_with_the_part_of_the_text_that_has_it(
    text: str, part: str, complaint: str
) -> None:
    with pytest.raises(ValueError) as refused:
        parse_policy(text)
    assert f"can't create the policy {part!r}: {complaint}" == str(refused.value)


@pytest.mark.parametrize("text", [None, b"Size(3)", policies.Size(3)])
def test_a_policy_must_be_a_string_to_be_parsed(text: Any) -> None:
    with pytest.raises(TypeError, match="text must be a string, got "):
        parse_policy(text)
