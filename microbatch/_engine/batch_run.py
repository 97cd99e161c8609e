"""One run of the processor, from the jobs of a batch to one outcome per job."""

import threading
from collections.abc import Iterator
from itertools import compress
from typing import Any

from microbatch._basics.returned import exhaust, in_order, numbered, results_of
from microbatch._engine.ledger import Ledger
from microbatch._forming.lanes import Runs
from microbatch.errors import ResultCountError
from microbatch.futures.exceptions import Failures
from microbatch.futures.job_future import JobFuture, are_errors
from microbatch.results import BatchInfo, Service

__all__ = ["BatchRun"]


class BatchRun:
    """A batch that was dispatched. It settles each future once, whatever the processor returns or raises.

    Attributes:
        info: The number, size, weight, key and trigger of the batch.
        futures: The futures of its jobs, in order. Empty after `forget`.
        jobs: The jobs, in order. The processor gets this list, and may change it.
        owner: The ident of the thread that has claimed this batch, or 0.
        sent: Whether the batch was passed to a worker thread or to the user's executor.
        started: The moment at which the processor was called. Before that, *now*, the moment of the dispatch.
        failed: The number of jobs that have failed so far.
        error: The exception of the first job that failed, or None. `forget` drops it.
        in_flight: The number of batches that ran when this one was dispatched, itself included.
        runs: See `Collector.started`.
    """

    runs: Runs | None = None
    error: BaseException | None = None
    in_flight = 1
    owner = 0
    sent = False
    failed = 0
    _failures: Failures | None = None  # created when the first job fails

    def __init__(self, ledger: Ledger, futures: list[JobFuture[Any]], info: BatchInfo, now: float) -> None:
        self.info = info
        self.futures = futures
        self.jobs = [future._job for future in futures]
        self.started = now
        self._ledger = ledger
        self._now = ledger.queue.clock.now
        self._unclaimed = True  # deleted by the thread that becomes the owner (L2)

    def claim(self) -> bool:
        """Make the calling thread the owner of this batch. Return False if it has an owner already."""
        this_thread = threading.get_ident()
        try:
            del self._unclaimed
        except AttributeError:
            return False
        self.owner = this_thread  # no interruption is possible before this (L3)
        return True

    def start(self) -> None:
        """Record that the processor is called now."""
        self.started = self._now()

    @property
    def service_time(self) -> float:
        """Seconds since `start`."""
        return self._now() - self.started

    def complete(self, returned: Any) -> None:
        """Settle all futures with the values that the processor returned. Never raises.

        If *returned* is an iterator, this runs it, and settles each future when its value arrives. A `ResultAt` says
        which future that is.
        """
        try:
            if returned is None:
                self._settle(self.futures, [None] * len(self.futures))
            elif isinstance(results := results_of(returned), list):
                if len(results) != len(self.futures):
                    raise ResultCountError(len(self.futures), len(results))
                self._settle(self.futures, in_order(results))
            else:
                self._settle_one_by_one(results)
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Fail every job that is not settled yet. Never raises."""
        self._note_error(error)
        self.failed += self._ledger.settle(self.futures, [error] * len(self.futures), self._all_failures())

    def forget(self) -> list[JobFuture[Any]]:
        """Drop the references to the futures, jobs and exceptions. Return the futures, or none on a second call.

        Otherwise there could be a reference cycle: a future refers to its exception, the traceback of the exception to
        a frame that refers to this object, and this object to the future.
        """
        futures, self.futures, self.jobs = self.futures, [], []
        self._failures = self.error = None
        return futures

    def _settle_one_by_one(self, values: Iterator[Any]) -> None:
        # No variable refers to a future, because the traceback of an exception that comes from here refers to this
        # frame.
        number = 0
        for index, value in numbered(values, len(self.futures)):
            self._settle(self.futures[index : index + 1], [value])
            number += 1
        if number < len(self.futures):
            raise ResultCountError(len(self.futures), number)
        exhaust(values, len(self.futures), f"batch {self.info.id}")

    def _settle(self, futures: list[JobFuture[Any]], values: list[Any]) -> None:
        failures = None
        if True in are_errors(values):
            failures = self._all_failures()
            self._note_error(next(compress(values, are_errors(values))))
        service = Service(self.info, self.started, self.service_time)
        self.failed += self._ledger.settle(futures, values, failures, service)

    def _note_error(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error

    def _all_failures(self) -> Failures:
        if self._failures is None:
            self._failures = Failures(f"batch {self.info.id} of {self._ledger.queue.name!r}", self._ledger.queue)
        return self._failures
