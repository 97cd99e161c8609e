"""The clock of the library. Batchers read the time and wait only through a `Clock`.

A moment is a float: seconds on a monotonic clock whose zero is arbitrary. `NOW` is before all moments and `NEVER` is
after all of them. So you can compare both with any moment, and a policy may return either.
"""

import math
import threading
import time
from types import ModuleType
from typing import Any, Protocol

NOW = -math.inf
NEVER = math.inf


class Clock(Protocol):
    """Interface of clocks. `SystemClock` is the real one, and ``microbatch.testing.ManualClock`` is for tests."""

    def now(self) -> float:
        """Return the current moment."""

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """Wait until *condition* is notified or *moment* has come. May return early.

        The caller holds *condition*, so call ``condition.wait(timeout)``.
        """


def let_others_run() -> None:
    """Let another thread run, if one is ready."""
    time.sleep(0)


def _true_time_module() -> ModuleType:
    # Tools that freeze time, such as freezegun, replace `time.monotonic` in every module that refers to it. If
    # microbatch is imported while time is frozen, it would get the replacement too. A worker thread would then wait in
    # real time for a moment of frozen time, which never comes. A second instance of the built-in module has the
    # original function.
    spec: Any = time.__spec__
    module: ModuleType = spec.loader.create_module(spec)
    spec.loader.exec_module(module)
    return module


_time: Any = _true_time_module()


class SystemClock:
    """The machine's monotonic clock."""

    # An attribute of the class, because tools that freeze time replace the globals of modules.
    now = staticmethod(_time.monotonic)

    def wait_until(self, condition: threading.Condition, moment: float) -> None:
        """See `Clock.wait_until`."""
        if moment == NEVER:
            condition.wait()
        else:
            remaining = moment - self.now()
            if remaining > 0:
                condition.wait(min(remaining, threading.TIMEOUT_MAX))
