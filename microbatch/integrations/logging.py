"""A line of the standard library's `logging` for each batch.

>>> import logging, sys
>>> from microbatch import Batcher
>>> logger = logging.getLogger("example")
>>> logger.addHandler(logging.StreamHandler(sys.stdout))
>>> logger.setLevel(logging.WARNING)
>>> def insert(rows):
...     raise ValueError("no such table")
>>> with Batcher(insert, name="inserts", listeners=[LoggingListener(logger)]) as batcher:
...     error = batcher.submit("row").exception()  # doctest: +ELLIPSIS
batch 1 of inserts: 1 of 1 jobs failed, by natural, waited 0.00... s, took 0.00... s: ValueError('no such table')
"""

import logging
from dataclasses import asdict
from typing import Any

from microbatch import BatcherShutDown, BatchFinished, BatchListener

__all__ = ["LoggingListener"]


class LoggingListener(BatchListener):
    """Logs each batch when it is finished: as an error if all of its jobs failed, as a warning if some did, or else as info.

    What the line says in words, the record has in attributes too, for formatters that write JSON: ``batcher``,
    ``batch_id``, ``batch_size``, ``batch_weight``, ``trigger``, ``failed`` (jobs), ``queue_time`` (seconds, of the job that
    waited longest), ``service_time`` and ``error``, the `repr` of what the first of those jobs failed with, or None. Of
    jobs and keys, which may be secret, nothing is logged but what that says. The shutdown is one more line, with the
    attribute ``stats``, a dict.

    Args:
        logger: where to.
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        if not isinstance(logger, (logging.Logger, type(None))):
            raise TypeError(f"logger must be a logging.Logger, got {logger!r}")
        self._logger = logging.getLogger("microbatch.batches") if logger is None else logger

    def batch_finished(self, fact: BatchFinished) -> None:
        """Log a batch."""
        batch = fact.batch
        level = logging.INFO if not fact.failed else logging.WARNING if fact.failed < batch.size else logging.ERROR
        if not self._logger.isEnabledFor(level):
            return
        facts: dict[str, Any] = {
            "batcher": fact.batcher,
            "batch_id": batch.id,
            "batch_size": batch.size,
            "batch_weight": batch.weight,
            "trigger": batch.trigger,
            "failed": fact.failed,
            "queue_time": fact.started - min(future.submitted for future in fact.futures),
            "service_time": fact.service_time,
            "error": next(
                (_shown(error) for future in fact.futures if (error := future.exception()) is not None), None
            ),
        }
        line = (
            "batch %(batch_id)d of %(batcher)s: "
            + ("%(failed)d of %(batch_size)d jobs failed" if fact.failed else "%(batch_size)d jobs")
            + ", by %(trigger)s, waited %(queue_time).4f s, took %(service_time).4f s"
            + (": %(error)s" if fact.failed else "")
        )
        self._logger.log(level, line, facts, extra=facts)

    def shutdown(self, fact: BatcherShutDown) -> None:
        """Log what has become of all jobs."""
        stats = fact.stats
        self._logger.info(
            "%s is shut down: %d jobs accepted, %d succeeded, %d failed, %d cancelled, %d expired, in %d batches",
            *(
                fact.batcher,
                stats.accepted,
                stats.succeeded,
                stats.failed,
                stats.cancelled,
                stats.expired,
                stats.batches,
            ),
            extra={"batcher": fact.batcher, "stats": asdict(stats)},
        )


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:
        return type(error).__name__
