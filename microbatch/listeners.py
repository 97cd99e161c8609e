"""Listeners, and the events that they receive from a batcher.

>>> from microbatch import Batcher
>>> class Sizes(BatchListener):
...     def batch_finished(self, event: BatchFinished) -> None:
...         print(event.batch.size, "jobs,", event.failed, "failed")
>>> with Batcher(list, listeners=[Sizes()]) as batcher:
...     future = batcher.submit("job")
1 jobs, 0 failed
"""

from collections.abc import Callable, Iterable
from typing import Any

from microbatch._basics.arguments import check_callable, shown
from microbatch._basics.dataclass import dataclass
from microbatch._basics.log import report
from microbatch.futures.job_future import JobFuture
from microbatch.results import BatcherStats, BatchInfo

__all__ = [
    "ListenerSet",
    "BatchFinished",
    "BatchListener",
    "BatchStarted",
    "BatcherShutDown",
    "JobAccepted",
    "JobsDropped",
    "notify",
]


@dataclass(frozen=True, slots=True)
class JobAccepted:
    """The event of an accepted job.

    Attributes:
        batcher: The name of the batcher.
        future: The future of the job. It has the job, its key, its weight and the moment of its submission.
    """

    batcher: str
    future: JobFuture[Any]


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """The event of a batch that is about to be processed.

    Attributes:
        batcher: The name of the batcher.
        batch: The batch.
        futures: The futures of its jobs, in the order of the jobs.
    """

    batcher: str
    batch: BatchInfo
    futures: tuple[JobFuture[Any], ...]


@dataclass(frozen=True, slots=True)
class BatchFinished:
    """The event of a batch whose jobs are all settled.

    Attributes:
        batcher: The name of the batcher.
        batch: The batch.
        futures: The futures of its jobs, in the order of the jobs.
        started: The moment at which the processor was called, on the clock of the batcher.
        service_time: Seconds from that call until the last job had its outcome.
        failed: The number of jobs that failed.
    """

    batcher: str
    batch: BatchInfo
    futures: tuple[JobFuture[Any], ...]
    started: float
    service_time: float
    failed: int


@dataclass(frozen=True, slots=True)
class JobsDropped:
    """The event of jobs that had to make room for newer ones.

    Attributes:
        batcher: The name of the batcher.
        futures: The futures of the jobs, the oldest first.
    """

    batcher: str
    futures: tuple[JobFuture[Any], ...]


@dataclass(frozen=True, slots=True)
class BatcherShutDown:
    """The event of a batcher that was shut down and has settled its last job.

    Attributes:
        batcher: The name of the batcher.
        stats: The final counts of the batcher.
    """

    batcher: str
    stats: BatcherStats


class BatchListener:
    """Base class of listeners. Subclass it, and define the methods for the events that you want to receive.

    The batcher calls a method in the thread in which the event happens. No lock is held, so the method may submit jobs
    and call `Batcher.stats`. But the thread waits until the method returns, so keep it fast. Several threads may call
    the same listener at the same time.

    An exception in a method is logged and changes nothing else. A listener that refers to its batcher keeps it alive.

    Jobs that are cancelled, that expire, or that fail because the policy raises are in no batch event. Only
    `Batcher.stats` counts them.

    Attributes:
        wants_context: Whether each future keeps the `contextvars` context of its submission, as `JobFuture.context`.
    """

    wants_context = False

    def job_accepted(self, event: JobAccepted) -> None:
        """Receive the event of an accepted job, in the thread that submits it.

        This may happen after the batch of the job has started or finished, and even after the shutdown.
        """

    def batch_started(self, event: BatchStarted) -> None:
        """Receive the event of a batch that is about to be processed, in the thread that will run it.

        With your own *executor*, this happens in the thread that submits the batch to the executor.
        """

    def batch_finished(self, event: BatchFinished) -> None:
        """Receive the event of a batch whose jobs are all settled, in the thread that ran it, before it runs another.

        With your own *executor*, this happens in the thread in which the executor reports the result.
        """

    def jobs_dropped(self, event: JobsDropped) -> None:
        """Receive the event of jobs that were dropped, in a thread of the batcher, after their callbacks have run."""

    def shutdown(self, event: BatcherShutDown) -> None:
        """Receive the event of the shutdown, after the last job is settled and before the shutdown callbacks run."""


_Methods = list[Callable[[Any], object]]
_METHODS = ("job_accepted", "batch_started", "batch_finished", "jobs_dropped", "shutdown")


class ListenerSet:
    """The listeners of one batcher. For each event, the attribute of that name lists the methods to call.

    Attributes:
        wants_context: Whether any listener wants futures to keep the context of their submission.

    Raises:
        TypeError: A listener has none of the methods, or has an asynchronous one, which would never run.
    """

    def __init__(self, listeners: Iterable[BatchListener]) -> None:
        listeners = _all(listeners)
        for listener in listeners:
            if isinstance(listener, type) or not any(callable(getattr(listener, name, None)) for name in _METHODS):
                raise TypeError(f"listeners must be BatchListeners, got {shown(listener)}")
        self.wants_context: bool = any(getattr(listener, "wants_context", False) for listener in listeners)
        self.job_accepted: _Methods = _methods_for("job_accepted", listeners)
        self.batch_started: _Methods = _methods_for("batch_started", listeners)
        self.batch_finished: _Methods = _methods_for("batch_finished", listeners)
        self.jobs_dropped: _Methods = _methods_for("jobs_dropped", listeners)
        self.shutdown: _Methods = _methods_for("shutdown", listeners)


def notify(methods: _Methods, event: object) -> None:
    """Call each of *methods* with *event*. Never raises: the exception of a method is logged."""
    for method in methods:
        try:
            method(event)
        except BaseException:
            report("the %s() of a listener raised", getattr(method, "__name__", "method"))


def _all(listeners: Iterable[BatchListener]) -> list[BatchListener]:
    try:
        return list(listeners)
    except TypeError:
        raise TypeError(f"listeners must be an iterable of BatchListeners, got {shown(listeners)}") from None


def _methods_for(name: str, listeners: list[BatchListener]) -> _Methods:
    ignored = getattr(BatchListener, name)  # the method of the base class, which does nothing
    methods = [getattr(listener, name, None) for listener in listeners]
    defined = [method for method in methods if callable(method) and getattr(method, "__func__", None) is not ignored]
    for method in defined:
        check_callable(f"the {name}() of a listener", method)
    return defined
