"""The only reader of time: it waits for a moment, and never polls."""

import threading
from typing import Any

import pytest

from microbatch import NEVER, NOW
from microbatch._basics.clock import SystemClock


class Recorder:
    """Stands for a condition, and writes down how long it is waited for."""

    def __init__(self) -> None:
        self.timeouts: list[float | None] = []

    def wait(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)


def waited(moment: float) -> list[Any]:
    recorder: Any = Recorder()
    SystemClock().wait_until(recorder, moment)
    return recorder.timeouts  # type: ignore[no-any-return]


def test_a_moment_that_never_comes_is_waited_for_without_a_timeout() -> None:
    assert [None] == waited(NEVER)


@pytest.mark.parametrize("moment", [NOW, 0.0])
def test_a_moment_that_has_been_is_not_waited_for(moment: float) -> None:
    assert [] == waited(moment)


def test_a_moment_ahead_is_waited_for_in_one_go() -> None:
    (timeout,) = waited(SystemClock().now() + 3600)
    assert 3500 < timeout <= 3600


def test_a_moment_beyond_what_a_lock_can_wait_for_is_waited_for_as_long_as_it_can() -> None:
    assert [threading.TIMEOUT_MAX] == waited(1e300)
