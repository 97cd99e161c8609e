"""Sending a batch to an executor of the user, and finding out which object could not be pickled."""

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

from microbatch.futures.exceptions import chain_of

__all__ = ["name_unsendable", "send"]


def send(executor: Executor, processor: Any, jobs: list[Any]) -> "Future[Any]":
    """Submit the processor and the jobs to *executor*, and return the executor's future. Nothing else is sent."""
    if any(base.__module__.partition(".")[0] == "distributed" for base in type(executor).__mro__):
        # By default, Dask would process equal batches only once.
        return executor.submit(processor, jobs, pure=False)
    return executor.submit(processor, jobs)


def name_unsendable(error: BaseException, processor: Any, jobs: list[Any]) -> BaseException:
    """Return an error that names the processor or job that can't be pickled, or *error* if that is not the cause.

    Executors pickle a batch as a whole. Their errors do not say which job can't be pickled. For objects written in C,
    they name only the type. So this pickles the processor and each job separately, until one of them raises the same
    exception as *error* or one of its causes. Never raises.
    """
    import pickle  # here, because the import takes long and few programs need it

    try:
        known = [(type(each), str(each)) for each in chain_of(error)]
        for what, thing in _parts(processor, jobs):
            try:
                pickle.dumps(thing)
            except Exception as reason:
                if (type(reason), str(reason)) in known:
                    named = pickle.PicklingError(f"{what} can't be sent to another process: {reason}")
                    named.__cause__ = error
                    return named
    except BaseException:  # users' classes may raise any exception when they are pickled or converted to text
        pass
    return error


def _parts(processor: Any, jobs: list[Any]) -> Iterator[tuple[str, Any]]:
    yield f"the processor {processor!r}", processor
    for number, job in enumerate(jobs, 1):
        # Only its type, because all callers of the batch get this message.
        yield f"job {number} of {len(jobs)} in the batch, of type {type(job).__qualname__},", job
