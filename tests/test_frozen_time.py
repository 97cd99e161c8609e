"""Batches are still dispatched while freezegun freezes the time."""

import subprocess
import sys
import time
from typing import Any

from freezegun import freeze_time

from microbatch import Batcher, Interval


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


def deeply(function: Any, depth: int = 8) -> Any:
    """Call *function* deep in the stack: freezegun spares ``threading`` only if it is near the top."""
    return function() if depth == 0 else deeply(function, depth - 1)


def use() -> Any:
    assert time.time() == time.time(), "time is not frozen here"
    with Batcher(echo, Interval(0.01)) as batcher:
        return batcher.submit("job").result(timeout=10).value


def test_a_batcher_created_while_time_is_frozen_dispatches() -> None:
    with freeze_time("2020-01-01"):
        assert "job" == deeply(use)


def test_a_batcher_created_before_time_is_frozen_dispatches() -> None:
    with Batcher(echo, Interval(0.01)) as batcher, freeze_time("2020-01-01"):
        assert "job" == deeply(lambda: batcher.submit("job").result(timeout=10).value)


def test_a_library_imported_while_time_is_frozen_dispatches() -> None:
    script = """
from freezegun import freeze_time
def use():
    import time
    from microbatch import Batcher, Interval
    assert time.monotonic() == time.monotonic()
    with Batcher(list, Interval(0.01)) as batcher:
        print(batcher.submit("job").result(timeout=10).value)
def deeply(depth=8):
    return use() if depth == 0 else deeply(depth - 1)
with freeze_time("2020-01-01"):
    deeply()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert ("job\n", "") == (done.stdout, done.stderr)
