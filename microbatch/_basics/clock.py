"""What time is. Nothing else in this package reads a clock or waits.

Moments are float seconds of a monotonic clock that starts anywhere. ``NOW`` is before and ``NEVER`` after all of them,
so that both can be compared with any moment and a policy may answer with either.
"""

import functools
import importlib.util
import math
import threading
from typing import Protocol

NOW = -math.inf
NEVER = math.inf


class Clock(Protocol):
    """Tells the time, and waits. ``microbatch.testing.ManualClock`` is the other implementation."""

    def now(self) -> float:
        """Return the present moment."""

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """Wait, with *condition* held, until it is notified or *moment* has come; may return sooner."""


def _true_time_module() -> object:
    # A tool that freezes time (freezegun) replaces time.monotonic wherever a module refers to it, and so it would for
    # an import inside the freeze. The worker thread would then wait in real time for a moment of frozen time, which
    # never comes. The built-in module made once more holds the function that nobody has replaced.
    spec = importlib.util.find_spec("time")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SystemClock:
    """The machine's monotonic clock."""

    # An attribute of the class, not a global of the module: the tools that freeze time replace only the latter.
    now = staticmethod(getattr(_true_time_module(), "monotonic"))

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """See `Clock.wait_until`."""
        if moment == NEVER:
            condition.wait()
        else:
            remaining = moment - self.now()
            if remaining > 0:
                condition.wait(min(remaining, threading.TIMEOUT_MAX))


let_others_run = functools.partial(getattr(_true_time_module(), "sleep"), 0)
"""Let other threads have the interpreter, and return when it is this one's turn again."""
