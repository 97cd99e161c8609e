"""Logs one line for each batch with the standard library's `logging`.

>>> import logging, sys
>>> from microbatch import Batcher
>>> logger = logging.getLogger("example")
>>> logger.addHandler(logging.StreamHandler(sys.stdout))
>>> logger.setLevel(logging.WARNING)
>>> def insert(rows):
...     raise ValueError("no such table")
>>> with Batcher(insert, name="inserts", listeners=[LoggingListener(logger)]) as batcher:
...     error = batcher.submit("row").exception()  # doctest: +ELLIPSIS
batch 1 of inserts: 1 of 1 jobs failed, by natural, waited ... s, took ... s: ValueError('no such table')
"""

import logging
from dataclasses import asdict
from typing import Any

from microbatch import BatcherShutDown, BatchFinished, BatchListener

__all__ = ["LoggingListener"]


class LoggingListener(BatchListener):
    """A listener that logs each batch when it is finished.

    The level is ``INFO`` if all jobs succeeded, ``WARNING`` if some failed, and ``ERROR`` if all failed.

    The log record also has the values of the line as attributes, for formatters that write JSON: ``batcher``,
    ``batch_id``, ``batch_size``, ``batch_weight``, ``trigger``, ``failed`` (a number of jobs), ``queue_time`` (seconds,
    of the job that waited longest), ``service_time`` (seconds) and ``error`` (the `repr` of the first exception of a
    job, or None).

    Jobs and keys are not logged, because they may be secret. But the text of an exception may contain them.

    The shutdown is logged as one more line, whose record has the attribute ``stats``, a dict.

    Args:
        logger: The logger to use. The default is the logger ``microbatch.batches``.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        if not isinstance(logger, (logging.Logger, type(None))):
            raise TypeError(f"logger must be a logging.Logger, got {logger!r}")
        self._logger = logging.getLogger("microbatch.batches") if logger is None else logger

    def batch_finished(self, event: BatchFinished) -> None:
        """Log the batch."""
        batch = event.batch
        level = logging.INFO if not event.failed else logging.WARNING if event.failed < batch.size else logging.ERROR
        if not self._logger.isEnabledFor(level):
            return
        errors = (future.exception() for future in event.futures)
        facts: dict[str, Any] = {
            "batcher": event.batcher,
            "batch_id": batch.id,
            "batch_size": batch.size,
            "batch_weight": batch.weight,
            "trigger": batch.trigger,
            "failed": event.failed,
            "queue_time": event.started - min(future.submitted for future in event.futures),
            "service_time": event.service_time,
            "error": next((_shown(error) for error in errors if error is not None), None),
        }
        line = (
            "batch %(batch_id)d of %(batcher)s: "
            + ("%(failed)d of %(batch_size)d jobs failed" if event.failed else "%(batch_size)d jobs")
            + ", by %(trigger)s, waited %(queue_time).4f s, took %(service_time).4f s"
            + (": %(error)s" if event.failed else "")
        )
        self._logger.log(level, line, facts, extra=facts)

    def shutdown(self, event: BatcherShutDown) -> None:
        """Log the final counts of the batcher."""
        stats = asdict(event.stats)
        outcomes = "%(succeeded)d succeeded, %(failed)d failed, %(cancelled)d cancelled, %(expired)d expired"
        outcomes += ", %(dropped)d dropped" if event.stats.dropped else ""
        line = f"%(batcher)s is shut down: %(accepted)d jobs accepted, {outcomes}, in %(batches)d batches"
        extra = {"batcher": event.batcher, "stats": stats}
        self._logger.info(line, {"batcher": event.batcher, **stats}, extra=extra)


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:
        return type(error).__name__
