"""Sending a batch to an executor of the caller's, and saying what could not be sent."""

import pickle
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

__all__ = ["name_unsendable", "send"]


def send(executor: Executor, processor: Any, jobs: list[Any]) -> "Future[Any]":
    """Have *executor* call the processor with the jobs, which are all that goes there."""
    if any(base.__module__.partition(".")[0] == "distributed" for base in type(executor).__mro__):
        # Dask would take equal batches for one, and process that once.
        return executor.submit(processor, jobs, pure=False)
    return executor.submit(processor, jobs)


def name_unsendable(error: BaseException, processor: Any, jobs: list[Any]) -> BaseException:
    """Return an error that names what can't be pickled, if an executor raised *error* for that, or else *error*.

    It did if pickling that once more fails in the same way, whatever the executor has made of it. Executors pickle a batch as
    a whole, and say neither which job it was nor, with objects written in C, more than their type. Never raises.
    """
    try:
        known = [(type(each), str(each)) for each in _chain(error)]
        for what, thing in _parts(processor, jobs):
            try:
                pickle.dumps(thing)
            except Exception as reason:
                if (type(reason), str(reason)) in known:
                    named = pickle.PicklingError(f"{what} can't be sent to another process: {reason}")
                    named.__cause__ = error
                    return named
    except BaseException:  # whatever the classes of users do when they are pickled, or asked for their text
        pass
    return error


def _parts(processor: Any, jobs: list[Any]) -> Iterator[tuple[str, Any]]:
    yield f"the processor {processor!r}", processor
    for number, job in enumerate(jobs, 1):
        # Its type only, for all callers of the batch read this.
        yield f"job {number} of {len(jobs)} in the batch, of type {type(job).__qualname__},", job


def _chain(error: BaseException) -> Iterator[BaseException]:
    each: Any = error
    for _ in range(100):  # as a cycle would have no end
        if each is None:
            return
        yield each
        each = each.__cause__ or each.__context__
