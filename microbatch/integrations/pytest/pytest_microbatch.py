"""Fixtures for `pytest`: a clock and a processor for tests, a check for open batchers, and shared connections in Django.

pytest loads this module at each start, in every project where microbatch is installed. So it is installed at the top
level too, as ``pytest_microbatch``, and imports microbatch only in the fixtures. It does nothing unless a test or a
``conftest.py`` asks for a fixture.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from microbatch.testing import ManualClock, RecordingProcessor

__all__ = ["manual_clock", "no_open_batchers", "recording_processor", "shared_connections"]


@pytest.fixture
def manual_clock() -> "ManualClock":
    """A new `ManualClock`, which shows 0 and stands still until the test advances it."""
    from microbatch.testing import ManualClock

    return ManualClock()


@pytest.fixture
def recording_processor() -> "Iterator[RecordingProcessor[Any]]":
    """A new `RecordingProcessor`, which returns the jobs. It is released at the end of the test."""
    from microbatch.testing import RecordingProcessor

    processor = RecordingProcessor[Any]()
    yield processor
    processor.release()


@pytest.fixture
def no_open_batchers() -> Iterator[None]:
    """Fail the test if a batcher that was created during it has threads and was not shut down.

    The message says where each of these batchers was created. Reported as an error in the teardown of the test.
    """
    from microbatch.batcher import left_open, next_number

    since = next_number()
    yield
    left = left_open(since)
    if left:
        lines = ["the test left these batchers open (call shutdown(), or use a with statement):", *left]
        pytest.fail("\n  ".join(lines), pytrace=False)


@pytest.fixture(scope="session")
def _shutting_down(django_db_setup: None) -> Iterator[None]:
    """Shut down the batchers before their test database is dropped, and while pytest still captures what they log."""
    from microbatch.integrations.django import batchers

    yield
    batchers.shutdown()


@pytest.fixture
def shared_connections(_shutting_down: None, db: None) -> Iterator[None]:
    """Run batches on the database connections of the test, in a project of Django. Needs ``pytest-django``."""
    from microbatch.integrations.django import sharing_connections

    with sharing_connections():
        yield
