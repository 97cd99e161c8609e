"""`LoggingListener`: the log records about batches and the shutdown."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from logging.handlers import SocketHandler
from typing import Any

import pytest

from microbatch import Batcher, Size
from microbatch.integrations.logging import LoggingListener
from microbatch.testing import ManualClock
from tests.test_listeners import failing


class Records(logging.Handler):
    """Keeps the records that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.batches")
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers.clear()


@pytest.fixture
def records(logger: logging.Logger) -> list[Any]:
    handler = Records()
    logger.addHandler(handler)
    return handler.kept


@pytest.mark.parametrize(
    "jobs, level, line",
    [
        (["good", "good"], "INFO", "batch 1 of rows: 2 jobs, by size, waited 3.0000 s, took 0.5000 s"),
        (
            ["good", "bad"],
            "WARNING",
            "batch 1 of rows: 1 of 2 jobs failed, by size, waited 3.0000 s, took 0.5000 s: ValueError('bad')",
        ),
        (
            ["bad", "bad"],
            "ERROR",
            "batch 1 of rows: 2 of 2 jobs failed, by size, waited 3.0000 s, took 0.5000 s: ValueError('bad')",
        ),
    ],
)
def test_each_batch_is_logged_in_one_line_at_a_level_that_depends_on_its_failures(
    jobs: list[str], level: str, line: str, logger: logging.Logger, records: list[Any], clock: ManualClock
) -> None:
    def processor(jobs: list[str]) -> list[Any]:
        clock.advance(0.5)
        return failing(jobs)

    listeners = [LoggingListener(logger)]
    with Batcher[str, Any](processor, Size(2), name="rows", listeners=listeners, clock=clock) as batcher:
        batcher.submit(jobs[0])
        clock.advance(3.0)
        batcher.submit(jobs[1])
    assert (level, line) == (records[0].levelname, records[0].getMessage())


def test_a_record_has_the_figures_of_the_line_as_attributes(
    logger: logging.Logger, records: list[Any], clock: ManualClock
) -> None:
    def processor(jobs: list[str]) -> list[Any]:
        clock.advance(0.5)
        return [1, error, error]

    listeners, error = [LoggingListener(logger)], ValueError()
    with Batcher[str, Any](processor, Size(3), name="rows", listeners=listeners, clock=clock) as batcher:
        for job in "abc":
            batcher.submit(job)
    names = "batcher batch_id batch_size batch_weight trigger failed queue_time service_time error".split()
    assert ["rows", 1, 3, 3.0, "size", 2, 0.0, 0.5, "ValueError()"] == [getattr(records[0], name) for name in names]


def test_the_shutdown_is_logged_in_one_line_with_the_totals(logger: logging.Logger, records: list[Any]) -> None:
    with Batcher[str, Any](failing, Size(1), name="rows", listeners=[LoggingListener(logger)]) as batcher:
        for job in ("good", "bad", "good"):
            batcher.submit(job)
    line = "rows is shut down: 3 jobs accepted, 2 succeeded, 1 failed, 0 cancelled, 0 expired, in 3 batches"
    assert ("INFO", line) == (records[-1].levelname, records[-1].getMessage())
    assert ("rows", asdict(batcher.stats())) == (records[-1].batcher, records[-1].stats)


def test_records_can_be_pickled_and_converted_to_json_whatever_the_error_is(
    logger: logging.Logger, records: list[Any]
) -> None:
    class Local(Exception):
        """Can't be pickled."""

        def __repr__(self) -> str:
            raise LookupError("don't ask")

    with Batcher[str, Any](lambda jobs: [Local()], Size(1), listeners=[LoggingListener(logger)]) as batcher:
        batcher.submit("job")
    assert 2 == len([SocketHandler("localhost", 0).makePickle(record) for record in records])
    assert 2 == len([json.dumps(vars(record)) for record in records])
    assert "Local" == records[0].error


def test_the_name_of_a_logger_is_refused() -> None:
    with pytest.raises(TypeError, match="logger must be a logging.Logger, got 'shop'"):
        LoggingListener("shop")  # type: ignore[arg-type]


def test_neither_jobs_nor_keys_are_logged(logger: logging.Logger, records: list[Any]) -> None:
    listeners = [LoggingListener(logger)]
    with Batcher[str, str](list, Size(1), key=lambda job: "password", listeners=listeners) as batcher:
        batcher.submit("secret")
    assert 2 == len(records)
    assert [] == [word for word in ("secret", "password") for record in records if word in str(vars(record))]


def test_records_below_the_level_of_the_logger_are_not_logged(logger: logging.Logger, records: list[Any]) -> None:
    logger.setLevel(logging.ERROR)
    with Batcher[str, Any](failing, Size(1), listeners=[LoggingListener(logger)]) as batcher:
        for job in ("good", "bad", "good"):
            batcher.submit(job)
    assert ["ERROR"] == [record.levelname for record in records]


def test_the_default_logger_is_a_child_of_the_logger_of_the_library(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Batcher[str, str](list, Size(1), listeners=[LoggingListener()]) as batcher:
        batcher.submit("job")
    assert {"microbatch.batches"} == {record.name for record in caplog.records}
