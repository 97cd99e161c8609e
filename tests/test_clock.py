"""The system clock waits for a moment without polling."""

import threading
from typing import Any

import pytest

from microbatch import NEVER, NOW
from microbatch._basics.clock import SystemClock


class Recorder:
    """Stands in for a condition, and records the timeouts of its waits."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []

    def wait(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)


def waited(moment: float) -> list[Any]:
    recorder: Any = Recorder()
    SystemClock().wait_until(recorder, moment)
    return recorder.timeouts  # type: ignore[no-any-return]


def test_the_clock_waits_for_never_without_a_timeout() -> None:
    assert [None] == waited(NEVER)


@pytest.mark.parametrize("moment", [NOW, 0.0])
def test_the_clock_does_not_wait_for_a_moment_in_the_past(moment: float) -> None:
    assert [] == waited(moment)


def test_the_clock_waits_for_a_future_moment_in_a_single_wait() -> None:
    (timeout,) = waited(SystemClock().now() + 3600)
    assert 3500 < timeout <= 3600


def test_a_wait_is_limited_to_the_longest_timeout_that_a_lock_accepts() -> None:
    assert [threading.TIMEOUT_MAX] == waited(1e300)
