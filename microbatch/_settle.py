"""From what a processor gives back to one outcome per job."""

import copy
from typing import Any, Dict, Iterator, List

from microbatch._futures import JobFuture, are_errors
from microbatch._ledger import Ledger
from microbatch._results import BatchInfo, Service
from microbatch._returned import as_iterator, exhaust, is_whole
from microbatch.errors import ResultCountError

__all__ = ["Delivery", "fail"]


class Delivery:
    """One batch in a worker's hands. Settles each of its futures once, whatever comes back.

    Attributes:
        info: what is known of the batch.
        futures: those of its jobs, in order.
        jobs: the jobs, in order, in a list that the processor may do with as it likes.
        started: when the processor was called.
        failed: how many of the jobs have failed until now.
    """

    def __init__(self, ledger: Ledger, futures: List[JobFuture[Any]], info: BatchInfo) -> None:
        self.info = info
        self.jobs = [future.job for future in futures]
        self.failed = 0
        self._ledger = ledger
        self._clock = ledger.queue.clock
        self.futures = futures
        self._errors: Dict[int, BaseException] = {}
        self.started = self._clock.now()

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
            elif is_whole(returned):
                self._settle_together(returned)
            else:
                self._settle_one_by_one(as_iterator(returned))
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Fail every job that is not settled yet. Never raises."""
        self.failed += fail(self._ledger, self.futures, error)

    def forget(self) -> List[JobFuture[Any]]:
        """Drop all references, and return the futures, if it had any.

        An exception's traceback may lead here, and from here to the future that holds it.
        """
        futures, self.futures, self.jobs = self.futures, [], []
        self._errors.clear()
        return futures

    def _settle_together(self, returned: Any) -> None:
        # Not len(returned), which may lie.
        values = list(returned if type(returned) is list else as_iterator(returned))
        if len(values) != len(self.futures):
            raise ResultCountError(len(self.futures), len(values))
        self._settle(self.futures, values)

    def _settle_one_by_one(self, values: Iterator[Any]) -> None:
        for position, future in enumerate(self.futures):
            try:
                value = next(values)
            except StopIteration:
                raise ResultCountError(len(self.futures), position) from None
            self._settle([future], [value])
        exhaust(values, len(self.futures), f"batch {self.info.id}")

    def _settle(self, futures: List[JobFuture[Any]], values: List[Any]) -> None:
        if True in are_errors(values):
            values = [self._unshared(value) if error else value for value, error in zip(values, are_errors(values))]
        service = Service(self.info, self.started, self.service_time)
        self.failed += self._ledger.settle(futures, values, service)

    def _unshared(self, error: BaseException) -> BaseException:
        """Return *error*, or for all but the first job that it is the value of, one like it."""
        if id(error) in self._errors:
            return _own(error)
        self._errors[id(error)] = error
        return error


def fail(ledger: Ledger, futures: List[JobFuture[Any]], error: BaseException) -> int:
    """Fail those of the jobs that are running, each with an exception of its own, and return how many those are."""
    return ledger.settle(futures, [_own(error) for _ in futures])


def _own(error: BaseException) -> BaseException:
    """Return an exception like *error* and caused by it, or *error* itself if it can't be copied.

    Callers who share one exception object lengthen each other's traceback.
    """
    for make in (_copy, _bare_copy):
        try:
            twin = make(error)
            faithful = type(twin) is type(error) and twin is not error and str(twin) == str(error)
            if faithful and len(twin.args) == len(error.args) and all(map(_same, twin.args, error.args)):
                twin.__cause__ = error
                return twin
        except BaseException:  # whatever a user's exception class does in its constructor
            continue
    return error


def _copy(error: Any) -> BaseException:
    # As `copy.copy`, but past what a library may have registered for all exceptions: tblib has, which Dask uses.
    if hasattr(type(error), "__copy__"):
        return copy.copy(error)  # type: ignore[no-any-return]
    make, arguments, *state = error.__reduce_ex__(4)
    twin: BaseException = make(*arguments)
    if state:
        twin.__setstate__(state[0])
    return twin


def _bare_copy(error: BaseException) -> BaseException:
    # For a class whose constructor does not take what is in args.
    twin = type(error).__new__(type(error))
    twin.args = error.args
    twin.__dict__.update(error.__dict__)
    return twin


def _same(one: Any, other: Any) -> bool:
    return one is other
