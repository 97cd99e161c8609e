"""What a `Batcher` was created with, after its arguments were checked."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

from microbatch._basics.clock import Clock
from microbatch.listeners import ListenerSet
from microbatch.policies.base import BatchingPolicy

__all__ = ["Settings"]


class Settings(NamedTuple):
    """The arguments of a `Batcher` that its threads need. Each forked child gets the same."""

    processor: Callable[[list[Any]], Any]
    policy: BatchingPolicy[Any]
    max_pending: int
    max_pending_weight: float
    max_pending_per_key: int
    drop_oldest: bool
    max_workers: int
    executor: Executor | None
    listeners: ListenerSet
    name: str
    exit_timeout: float
    clock: Clock
    keyed: bool  # the batcher has a *key* function
    uniform: bool  # the batcher has neither a *key* nor a *weigh* function
