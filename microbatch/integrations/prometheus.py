"""Reports batches as metrics of `prometheus_client`. Needs the extra ``prometheus``.

>>> import prometheus_client
>>> from microbatch import Batcher
>>> registry = prometheus_client.CollectorRegistry()
>>> metrics = PrometheusListener(registry)
>>> with metrics.watch(Batcher(list, name="inserts", listeners=[metrics])) as batcher:
...     _ = batcher.submit("row").result()
>>> registry.get_sample_value("microbatch_jobs_total", {"batcher": "inserts", "outcome": "succeeded"})
1
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from microbatch import Batcher, BatcherShutDown, BatcherStats, BatchFinished, BatchListener, BatchStarted

__all__ = ["PrometheusListener"]

AnyBatcher = TypeVar("AnyBatcher", bound="Batcher[Any, Any]")

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


class PrometheusListener(BatchListener, Collector):
    """A listener that measures each batch. At each scrape, it also reads the counts of the batchers that it watches.

    Use one listener for all batchers. Each metric has the label ``batcher``, the name of the batcher. The counts of
    batchers with the same name are added up.

    ======================================  =========  =================================================================
    ``microbatch_jobs_accepted_total``      counter    jobs accepted
    ``microbatch_jobs_total``               counter    by ``outcome``: succeeded, failed, cancelled, expired,
                                                       dropped
    ``microbatch_jobs_waiting``             gauge      jobs that have not been dispatched
    ``microbatch_jobs_running``             gauge      jobs that a worker is processing
    ``microbatch_oldest_job_seconds``       gauge      how long the oldest waiting job has waited, for readiness probes
    ``microbatch_batches_total``            counter    by ``trigger``
    ``microbatch_batches_running``          gauge      batches that a worker is processing
    ``microbatch_batch_size_jobs``          histogram  jobs in a batch
    ``microbatch_queue_seconds``            histogram  time from the submission of a job to the call of the processor
    ``microbatch_service_seconds``          histogram  time from that call to the last outcome of the batch
    ======================================  =========  =================================================================

    In the multiprocess mode of `prometheus_client`, only the histograms and ``microbatch_batches_running`` are
    available. The other metrics are read at the scrape, which is not possible in that mode.

    Args:
        registry: The registry for the metrics.
        buckets: The buckets of the two histograms of time, in seconds.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, buckets: Sequence[float] = _SECONDS) -> None:
        # Guards the next two. Re-entrant, because a finalizer may shut down a batcher in the same thread.
        self._mutex = threading.RLock()
        self._watched: weakref.WeakSet[Batcher[Any, Any]] = weakref.WeakSet()
        self._past: dict[str, BatcherStats] = {}  # of batchers that were shut down, so that no counter decreases
        gauge = partial(Gauge, labelnames=["batcher"], registry=None, multiprocess_mode="livesum")
        histogram = partial(Histogram, labelnames=["batcher"], registry=None)
        queued = "Seconds from the submission of a job to the call of the processor."
        served = "Seconds from the call of the processor to the last outcome of a batch."
        self._running = gauge("microbatch_batches_running", "Batches that a worker is processing.")
        self._size = histogram("microbatch_batch_size_jobs", "Jobs in a batch.", buckets=_SIZES)
        self._queue = histogram("microbatch_queue_seconds", queued, buckets=buckets)
        self._service = histogram("microbatch_service_seconds", served, buckets=buckets)
        self._measured = (self._running, self._size, self._queue, self._service)
        registry.register(self)

    def watch(self, batcher: AnyBatcher) -> AnyBatcher:
        """Read the counts of *batcher* at each scrape, and return *batcher*. Does not keep it alive.

        This listener must also be in the *listeners* of the batcher.
        """
        if not isinstance(batcher, Batcher):
            raise TypeError(f"batcher must be a Batcher, got {batcher!r}: for a decorated function, pass its .batcher")
        with self._mutex:
            self._watched.add(batcher)
        return batcher

    def batch_started(self, event: BatchStarted) -> None:
        """Count the batch as running."""
        self._running.labels(event.batcher).inc()

    def batch_finished(self, event: BatchFinished) -> None:
        """Measure the batch and its jobs."""
        self._running.labels(event.batcher).dec()
        self._size.labels(event.batcher).observe(event.batch.size)
        self._service.labels(event.batcher).observe(event.service_time)
        queue = self._queue.labels(event.batcher)
        for future in event.futures:
            queue.observe(event.started - future.submitted)

    def shutdown(self, event: BatcherShutDown) -> None:
        """Keep the final counts of the batcher."""
        with self._mutex:
            watched = list(self._watched)
        same = [batcher for batcher in watched if batcher.name == event.batcher and batcher.stats() == event.stats]
        with self._mutex:
            if same:
                self._watched.discard(same[0])  # this batcher, or one with the same name and the same counts
            self._past[event.batcher] = _sum(event.stats, self._past.get(event.batcher))

    def collect(self) -> Iterator[Any]:
        """Return all metrics, for a scrape."""
        with self._mutex:
            watched, stats = list(self._watched), dict(self._past)
        for batcher in watched:
            stats[batcher.name] = _sum(batcher.stats(), stats.get(batcher.name))
        return chain(*(metric.collect() for metric in self._measured), _read(stats))

    def describe(self) -> Iterable[Any]:
        """Return all metrics without values, so that the registry finds duplicate names."""
        return chain(*(metric.describe() for metric in self._measured), _read({}))


def _read(stats: dict[str, BatcherStats]) -> Iterable[Any]:
    name, by_outcome, by_trigger = ["batcher"], ["batcher", "outcome"], ["batcher", "trigger"]
    accepted = CounterMetricFamily("microbatch_jobs_accepted", "Jobs that were accepted.", labels=name)
    outcomes = CounterMetricFamily("microbatch_jobs", "Jobs that are settled, by outcome.", labels=by_outcome)
    waiting = GaugeMetricFamily("microbatch_jobs_waiting", "Jobs that have not been dispatched.", labels=name)
    running = GaugeMetricFamily("microbatch_jobs_running", "Jobs that a worker is processing.", labels=name)
    waited = "Seconds that the oldest waiting job has waited."
    oldest = GaugeMetricFamily("microbatch_oldest_job_seconds", waited, labels=name)
    batches = CounterMetricFamily("microbatch_batches", "Batches that were dispatched, by trigger.", labels=by_trigger)
    for batcher, found in stats.items():
        accepted.add_metric([batcher], found.accepted)
        for outcome in ("succeeded", "failed", "cancelled", "expired", "dropped"):
            outcomes.add_metric([batcher, outcome], getattr(found, outcome))
        waiting.add_metric([batcher], found.queued + found.batched)
        running.add_metric([batcher], found.running)
        oldest.add_metric([batcher], found.oldest)
        for trigger, count in found.triggers.items():
            batches.add_metric([batcher, trigger], count)
    return accepted, outcomes, waiting, running, oldest, batches


def _sum(first: BatcherStats, second: BatcherStats | None) -> BatcherStats:
    if second is None:
        return first
    counts = [each.name for each in fields(first) if each.name not in ("triggers", "oldest")]
    sums = {name: getattr(first, name) + getattr(second, name) for name in counts}
    triggers = Counter(first.triggers) + Counter(second.triggers)
    return BatcherStats(**sums, triggers=triggers, oldest=max(first.oldest, second.oldest))
