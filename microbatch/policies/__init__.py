"""When does the open batch go, and may one more job join it?

A policy is a pure decider. It sees a `Window` and answers with a moment; it reads no clock, takes no lock, never sleeps
and knows no thread, so that it can be tested by hand and run in virtual time. One thread at a time asks it.

>>> policy = Size(3) | Interval(0.5)
>>> policy.due(Window(count=2, opened=10.0))
10.5
>>> policy.due(Window(count=3, opened=10.0)) == NOW
True
>>> policy.reason(Window(count=3, opened=10.0))
'size'
"""

from microbatch._basics.clock import NEVER, NOW
from microbatch.policies.adaptive import Adaptive
from microbatch.policies.base import BatchingPolicy, BatchReport, Window
from microbatch.policies.limits import Size, Weight
from microbatch.policies.load import DEFAULT_POLICY, AllWaiting, Natural
from microbatch.policies.timing import FixedWindow, Interval, Rate, Session

__all__ = [
    "Adaptive",
    "AllWaiting",
    "BatchReport",
    "BatchingPolicy",
    "DEFAULT_POLICY",
    "FixedWindow",
    "Interval",
    "NEVER",
    "NOW",
    "Natural",
    "Rate",
    "Session",
    "Size",
    "Weight",
    "Window",
]
