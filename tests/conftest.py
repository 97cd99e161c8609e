"""Fixtures for all tests, an option for CI, and a check that each test ends all its threads."""

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

collect_ignore = ["django_on_postgresql.py"]  # a program, which would configure Django if it was imported

# A shell that starts the tests in the background makes them, and the processes that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempt all objects that exist now from garbage collection: many tests collect garbage, which would be slow."""
    gc.collect()
    gc.freeze()


_PASSED = "microbatch/passed"  # the key in pytest's cache for the tests that passed in the last run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option that runs only the tests that did not pass in the previous run."""
    parser.addoption("--left-out", action="store_true", help="run no test that passed in the previous run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that passed in the previous run, with ``--left-out``."""
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
    """Save which tests passed. Disable the logger, or jobs that failed in the tests would be logged at exit."""
    logging.getLogger("microbatch").disabled = True
    cache = _cache(session.config)
    if cache is not None:
        cache.set(_PASSED, _passed)


def _cache(config: pytest.Config) -> Any:
    return getattr(config, "cache", None)  # `-p no:cacheprovider` disables it


@pytest.fixture(autouse=True)
def check_that_no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    new = [thread for thread in threading.enumerate() if thread not in before]
    # Dask keeps some threads for all clients of a process. A dummy can't be joined: it stands for a thread that starts a
    # batcher, in which a finalizer has run.
    left = [each for each in new if not each.name.startswith("Dask-") and type(each) is not threading._DummyThread]
    if left:
        gc.collect()  # a batcher that the test dropped shuts down when it is collected
    for thread in left:
        thread._started.wait(timeout=10)  # type: ignore[attr-defined]  # the batcher may just be starting it
        thread.join(timeout=10)
    assert [] == [thread.name for thread in left if thread.is_alive()]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def processor() -> Iterator[RecordingProcessor[Any]]:
    """A processor that holds every batch until the test calls its `release` or ends."""
    processor = RecordingProcessor[Any]()
    processor.hold()
    yield processor
    processor.release()


class FullBatcher(NamedTuple):
    """A batcher with a full queue: its `max_pending` is 1, one job is running and one is waiting.

    Attributes:
        batcher: the batcher.
        waiting: the future of the job `waiting`, which fills the queue.
        blocked: the outcome of `submit("blocked", timeout=5)`, which is blocked in another thread.
    """

    batcher: Batcher[Any, Any]
    waiting: JobFuture[Any]
    blocked: "Future[JobFuture[Any]]"


@pytest.fixture
def full(processor: RecordingProcessor[Any], clock: ManualClock) -> Iterator[FullBatcher]:
    """A batcher that runs one job, whose queue is full with another, and that blocks a caller in `submit`."""
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
    """The address of a server with an empty database."""
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        pytest.skip("PostgreSQL is not installed")
    command = [sys.executable, str(Path(__file__).parent.parent / "examples" / "serve_postgresql.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()
    assert 0 == process.returncode
