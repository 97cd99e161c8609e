"""What every test gets: no thread may be left when it ends."""

import gc
import logging
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from microbatch import Batcher, JobFuture, Size
from microbatch.testing import ManualClock, RecordingProcessor
from tests.threads import in_thread

# A shell that starts the tests in the background has Ctrl-C ignored, in all processes that they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have the garbage collector pass over what the tests themselves are made of, for many of them call it."""
    gc.collect()
    gc.freeze()


_PASSED = "microbatch/passed"  # the key of the tests that passed last, in the cache of pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option that runs what the light run leaves out or skips."""
    parser.addoption("--left-out", action="store_true", help="run no test that passed in the run before")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that passed in the run before, if that is asked for."""
    if config.getoption("--left-out"):
        passed = set(_cache(config).get(_PASSED, []))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


_passed: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember the tests that pass."""
    if report.when == "call" and report.passed:
        _passed.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep failures that the tests have asked nobody about from being logged at the end of the interpreter."""
    logging.getLogger("microbatch").disabled = True
    cache = _cache(session.config)
    if cache is not None:
        cache.set(_PASSED, _passed)


def _cache(config: pytest.Config) -> Any:
    return getattr(config, "cache", None)  # there is none with `-p no:cacheprovider`


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    new = [thread for thread in threading.enumerate() if thread not in before]
    left = [thread for thread in new if not thread.name.startswith("Dask-")]  # which one process keeps for all clients
    if left:
        gc.collect()  # a batcher that the test dropped ends when it is collected
    for thread in left:
        thread.join(timeout=10)
    assert [] == [thread.name for thread in left if thread.is_alive()]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def processor() -> Iterator[RecordingProcessor[Any]]:
    """Holds every batch until the test, or its end, releases it."""
    processor = RecordingProcessor[Any]()
    processor.hold()
    yield processor
    processor.release()


class FullBatcher(NamedTuple):
    """A batcher whose processor holds the job `running`, with `max_pending=1`.

    Attributes:
        batcher: the batcher.
        waiting: the future of the job `waiting`, which takes up the room.
        blocked: the outcome of a call of `submit("blocked", timeout=5)`, which waits for room in another thread.
    """

    batcher: Batcher[Any, Any]
    waiting: JobFuture[Any]
    blocked: "Future[JobFuture[Any]]"


@pytest.fixture
def full(processor: RecordingProcessor[Any], clock: ManualClock) -> Iterator[FullBatcher]:
    """One job is running, one is waiting, and one caller is blocked until there is room."""
    with Batcher(processor, Size(1), max_pending=1, clock=clock) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        waiting = batcher.submit("waiting")
        blocked = in_thread(lambda: batcher.submit("blocked", timeout=5))
        clock.wait_for_sleeper(5.0)
        yield FullBatcher(batcher, waiting, blocked)
        processor.release()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a server on an empty database."""
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        pytest.skip("PostgreSQL is not installed")
    command = [sys.executable, str(Path(__file__).parent.parent / "examples" / "serve_postgresql.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()
    assert 0 == process.returncode
