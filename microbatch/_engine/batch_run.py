"""From what a processor gives back to one outcome per job."""

import threading
from collections.abc import Iterator
from typing import Any

from microbatch._basics.returned import exhaust, results_of
from microbatch._engine.ledger import Ledger
from microbatch.errors import ResultCountError
from microbatch.futures.exceptions import Failures
from microbatch.futures.job_future import JobFuture, are_errors
from microbatch.results import BatchInfo, Service

__all__ = ["BatchRun", "fail", "fail_all"]


class BatchRun:
    """One batch in a worker's hands. Settles each of its futures once, whatever comes back.

    Attributes:
        info: what is known of the batch.
        futures: those of its jobs, in order.
        jobs: the jobs, in order, in a list that the processor may do with as it likes.
        started: when the processor was called.
        failed: how many of the jobs have failed until now.
    """

    def __init__(self, ledger: Ledger, futures: list[JobFuture[Any]], info: BatchInfo) -> None:
        self.info = info
        self.jobs = [future._job for future in futures]
        self.failed = 0
        self._ledger = ledger
        self._clock = ledger.queue.clock
        self.futures = futures
        self._failures: Failures | None = None  # from the first on
        self._owner: dict[str, tuple[int]] = {}  # the thread that has it, as the only item of a tuple
        self.sent = False  # whether the caller's executor has it
        self.started = self._clock.now()

    def claim(self) -> bool:
        """Make this the calling thread's, and return whether it was nobody's."""
        mine = (threading.get_ident(),)
        return self._owner.setdefault("thread", mine) is mine  # in one step

    @property
    def owner(self) -> int:
        """The thread that has claimed it, or 0."""
        return self._owner.get("thread", (0,))[0]

    def start(self) -> None:
        """Note that the processor is called now."""
        self.started = self._clock.now()

    @property
    def service_time(self) -> float:
        """Seconds since `start`."""
        return self._clock.now() - self.started

    def complete(self, returned: Any) -> None:
        """Settle all futures from what the processor returned. Runs the iterator that it may be. Never raises."""
        try:
            if returned is None:
                self._settle(self.futures, [None] * len(self.futures))
            elif isinstance(results := results_of(returned), list):
                self._settle_together(results)
            else:
                self._settle_one_by_one(results)
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Fail every job that is not settled yet. Never raises."""
        self.failed += self._ledger.settle(self.futures, [error] * len(self.futures), self._all_failures())

    def forget(self) -> list[JobFuture[Any]]:
        """Drop all references, and return the futures, if it had any.

        An exception's traceback may lead here, and from here to the future that holds it.
        """
        futures, self.futures, self.jobs = self.futures, [], []
        self._failures = None
        return futures

    def _settle_together(self, values: list[Any]) -> None:
        if len(values) != len(self.futures):
            raise ResultCountError(len(self.futures), len(values))
        self._settle(self.futures, values)

    def _settle_one_by_one(self, values: Iterator[Any]) -> None:
        # No variable holds a future, since the traceback of an exception that is raised here refers to this frame.
        for position in range(len(self.futures)):
            try:
                value = next(values)
            except StopIteration:
                raise ResultCountError(len(self.futures), position) from None
            self._settle(self.futures[position : position + 1], [value])
        exhaust(values, len(self.futures), f"batch {self.info.id}")

    def _settle(self, futures: list[JobFuture[Any]], values: list[Any]) -> None:
        failures = self._all_failures() if True in are_errors(values) else None
        service = Service(self.info, self.started, self.service_time)
        self.failed += self._ledger.settle(futures, values, failures, service)

    def _all_failures(self) -> Failures:
        if self._failures is None:
            self._failures = Failures(f"batch {self.info.id} of {self._ledger.name!r}", self._ledger.queue)
        return self._failures


def fail(ledger: Ledger, futures: list[JobFuture[Any]], error: BaseException) -> int:
    """Fail those of the jobs that are running, each with an exception of its own, and return how many those are."""
    return ledger.settle(futures, [error] * len(futures), Failures(repr(ledger.name), ledger.queue))


def fail_all(ledger: Ledger, futures: list[JobFuture[Any]], error: BaseException) -> int:
    """Do the same, and have all waiters of all of them told of the outcomes, in case an exception prevented that."""
    failed = fail(ledger, futures, error)
    over = [future for future in futures if future.done()]
    for future in over:
        future._announce()
    ledger.release(over)
    for future in over:
        future._call_back()
    return failed
