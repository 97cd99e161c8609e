"""Those who want to know what a batcher does: facts, told after they happened, to listeners who change nothing.

>>> from microbatch import Batcher
>>> class Sizes(BatchListener):
...     def batch_finished(self, fact: BatchFinished) -> None:
...         print(fact.batch.size, "jobs,", fact.failed, "failed")
>>> with Batcher(list, listeners=[Sizes()]) as batcher:
...     future = batcher.submit("job")
1 jobs, 0 failed
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from microbatch._basics.arguments import check_callable, shown
from microbatch._basics.log import report
from microbatch.futures.job_future import JobFuture
from microbatch.results import BatcherStats, BatchInfo

__all__ = ["ListenerSet", "BatchFinished", "BatchListener", "BatchStarted", "BatcherShutDown", "JobAccepted", "notify"]


@dataclass(frozen=True, slots=True)
class JobAccepted:
    """A job was accepted.

    Attributes:
        batcher: the name of the batcher.
        future: the future of the job, which knows the job, its key, its weight and when it was submitted.
    """

    batcher: str
    future: JobFuture[Any]


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """A batch goes to a worker.

    Attributes:
        batcher: the name of the batcher.
        batch: what is known of the batch.
        futures: those of its jobs, in order.
    """

    batcher: str
    batch: BatchInfo
    futures: tuple[JobFuture[Any], ...]


@dataclass(frozen=True, slots=True)
class BatchFinished:
    """Every job of a batch has its outcome.

    Attributes:
        batcher: the name of the batcher.
        batch: what is known of the batch.
        futures: those of its jobs, in order.
        started: when the processor was called, on the batcher's clock.
        service_time: seconds from then to the last outcome.
        failed: how many of its jobs failed.
    """

    batcher: str
    batch: BatchInfo
    futures: tuple[JobFuture[Any], ...]
    started: float
    service_time: float
    failed: int


@dataclass(frozen=True, slots=True)
class BatcherShutDown:
    """A batcher has settled its last job.

    Attributes:
        batcher: the name of the batcher.
        stats: all that it has done.
    """

    batcher: str
    stats: BatcherStats


class BatchListener:
    """Is told what a batcher does. Subclass it, and define those methods that you want to be called.

    They are called without any lock, in the thread where the thing happens, which waits for them; so several may be called
    at once. What they raise is logged, and changes nothing. One that refers to its batcher keeps it alive.

    Jobs that are cancelled or expire, and those that a policy fails, are in no fact of a batch: `Batcher.stats` counts them.

    Attributes:
        wants_context: whether each future shall keep the context that its job was submitted in, as `JobFuture.context`.
    """

    wants_context = False

    def job_accepted(self, fact: JobAccepted) -> None:
        """A job was accepted. In the thread that submits it, maybe after its batch has started or finished, or the shutdown."""

    def batch_started(self, fact: BatchStarted) -> None:
        """A batch is about to be processed. In the thread that will run it; with an executor of the caller's, before it is
        handed over, in the thread that does that.
        """

    def batch_finished(self, fact: BatchFinished) -> None:
        """All jobs of a batch have their outcomes, and the next batch has yet to start there.

        In the thread that ran it; with an executor of the caller's, in the one that calls back.
        """

    def shutdown(self, fact: BatcherShutDown) -> None:
        """The last job is settled, and the shutdown callbacks are about to be called."""


_METHODS = ("job_accepted", "batch_started", "batch_finished", "shutdown")


class ListenerSet:
    """The listeners of one batcher. Each attribute but the first has those who want to hear of one kind of fact.

    Attributes:
        wants_context: whether one of them wants futures to keep the context of the submission.

    Raises:
        TypeError: one of them has none of the methods, or an asynchronous one, which would never run.
    """

    def __init__(self, listeners: Iterable[BatchListener]) -> None:
        listeners = _all(listeners)
        for listener in listeners:
            if isinstance(listener, type) or not any(callable(getattr(listener, name, None)) for name in _METHODS):
                raise TypeError(f"listeners must be BatchListeners, got {shown(listener)}")
        self.wants_context = any(getattr(listener, "wants_context", False) for listener in listeners)
        self.job_accepted, self.batch_started, self.batch_finished, self.shutdown = (
            _those_who_hear(listeners, name) for name in _METHODS
        )


def notify(methods: list[Callable[[Any], object]], fact: object) -> None:
    """Call all of *methods* with *fact*. Never raises."""
    for method in methods:
        try:
            method(fact)
        except BaseException:
            report("the %s() of a listener raised", getattr(method, "__name__", "method"))


def _all(listeners: Iterable[BatchListener]) -> list[BatchListener]:
    try:
        return list(listeners)
    except TypeError:
        raise TypeError(f"listeners must be an iterable of BatchListeners, got {shown(listeners)}") from None


def _those_who_hear(listeners: list[BatchListener], name: str) -> list[Callable[[Any], object]]:
    nobody = getattr(BatchListener, name)
    methods = [getattr(listener, name, None) for listener in listeners]
    heard = [method for method in methods if callable(method) and getattr(method, "__func__", None) is not nobody]
    for method in heard:
        check_callable(f"the {name}() of a listener", method)
    return heard
