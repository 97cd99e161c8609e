"""Policies decide when the open batch is dispatched, and whether one more job may join it.

A policy is a function of a `Window`, which describes the open batch. It returns the moment at which the batch is due.
The batcher dispatches a due batch as soon as a worker is free. Until then the batch stays open and takes more jobs, up
to the hard limits of the policy.

A policy reads no clock, takes no lock and never sleeps. So you can test it without a batcher, and simulate it in
virtual time.

>>> policy = Size(3) | Interval(0.5)
>>> policy.due(Window(count=2, opened=10.0))
10.5
>>> policy.due(Window(count=3, opened=10.0)) == NOW
True
>>> policy.reason(Window(count=3, opened=10.0))
'size'
"""

from typing import TYPE_CHECKING

from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.lazy import lazy
from microbatch.policies.base import BatchingPolicy, BatchReport, CallerActivity, Hints, Window
from microbatch.policies.best_size import BestSize
from microbatch.policies.limits import Padded, Size, Weight
from microbatch.policies.load import DEFAULT_POLICY, AllWaiting, Natural
from microbatch.policies.timing import FixedWindow, InTime, Interval, Rate, Session

if TYPE_CHECKING:
    from microbatch.policies.adaptive import Adaptive
    from microbatch.policies.congestion import Congestion
    from microbatch.policies.keys import OldestFirst, PerKey, length_buckets
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Adaptive": "microbatch.policies.adaptive",
            "Congestion": "microbatch.policies.congestion",
            **dict.fromkeys(["OldestFirst", "PerKey", "length_buckets"], "microbatch.policies.keys"),
        },
    )

__all__ = [
    "Adaptive",
    "AllWaiting",
    "BatchReport",
    "BatchingPolicy",
    "BestSize",
    "CallerActivity",
    "Congestion",
    "DEFAULT_POLICY",
    "FixedWindow",
    "Hints",
    "InTime",
    "Interval",
    "NEVER",
    "NOW",
    "Natural",
    "OldestFirst",
    "Padded",
    "PerKey",
    "Rate",
    "Session",
    "Size",
    "Weight",
    "Window",
    "length_buckets",
]
