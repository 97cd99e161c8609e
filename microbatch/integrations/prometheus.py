"""What batchers do, as metrics of `prometheus_client`: the extra ``prometheus``.

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
    """Measures each batch, and reads at each scrape the counts of those batchers that it watches.

    One is enough for all batchers: each metric has the label ``batcher``, its name, and those of one name are added up.

    ======================================  =========  =================================================================
    ``microbatch_jobs_accepted_total``      counter    jobs accepted
    ``microbatch_jobs_total``               counter    by ``outcome``: succeeded, failed, cancelled, expired
    ``microbatch_jobs_waiting``             gauge      jobs that no worker has taken
    ``microbatch_jobs_running``             gauge      jobs in the hands of a worker
    ``microbatch_oldest_job_seconds``       gauge      for how long the oldest waiting job has waited: for readiness
    ``microbatch_batches_total``            counter    by ``trigger``
    ``microbatch_batches_running``          gauge      batches in the hands of a worker
    ``microbatch_batch_size_jobs``          histogram  jobs in a batch
    ``microbatch_queue_seconds``            histogram  of each job, from its acceptance to the call of the processor
    ``microbatch_service_seconds``          histogram  of each batch, from there to the last outcome
    ======================================  =========  =================================================================

    In the multiprocess mode of `prometheus_client`, what is read at a scrape is not to be had: there are the histograms,
    and the batches running.

    Args:
        registry: where the metrics go.
        buckets: of the histograms of seconds.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, buckets: Sequence[float] = _SECONDS) -> None:
        self._mutex = threading.RLock()  # guards both; re-entrant for the sake of a finalizer that shuts a batcher down
        self._watched: weakref.WeakSet[Batcher[Any, Any]] = weakref.WeakSet()
        self._past: dict[str, BatcherStats] = {}  # of those that were shut down, so that no counter ever falls
        label = ["batcher"]
        self._running = Gauge(
            "microbatch_batches_running",
            "Batches in the hands of a worker.",
            label,
            registry=None,
            multiprocess_mode="livesum",
        )
        self._size = Histogram("microbatch_batch_size_jobs", "Jobs in a batch.", label, registry=None, buckets=_SIZES)
        self._queue = Histogram(
            "microbatch_queue_seconds",
            "From the acceptance of a job to the call of the processor.",
            label,
            registry=None,
            buckets=buckets,
        )
        self._service = Histogram(
            "microbatch_service_seconds",
            "From the call of the processor to the last outcome of a batch.",
            label,
            registry=None,
            buckets=buckets,
        )
        self._measured = (self._running, self._size, self._queue, self._service)
        registry.register(self)

    def watch(self, batcher: AnyBatcher) -> AnyBatcher:
        """Have the counts of *batcher*, to which it listens, read at each scrape, and return it. Keeps it not alive."""
        if not isinstance(batcher, Batcher):
            raise TypeError(f"batcher must be a Batcher, got {batcher!r}; of a decorated function watch its batcher")
        with self._mutex:
            self._watched.add(batcher)
        return batcher

    def batch_started(self, fact: BatchStarted) -> None:
        """Count a batch as running."""
        self._running.labels(fact.batcher).inc()

    def batch_finished(self, fact: BatchFinished) -> None:
        """Measure a batch and its jobs."""
        self._running.labels(fact.batcher).dec()
        self._size.labels(fact.batcher).observe(fact.batch.size)
        self._service.labels(fact.batcher).observe(fact.service_time)
        queue = self._queue.labels(fact.batcher)
        for future in fact.futures:
            queue.observe(fact.started - future.submitted)

    def shutdown(self, fact: BatcherShutDown) -> None:
        """Keep the counts of a batcher that is about to go."""
        with self._mutex:
            watched = list(self._watched)
        same = [batcher for batcher in watched if batcher.name == fact.batcher and batcher.stats() == fact.stats]
        with self._mutex:
            if same:
                self._watched.discard(same[0])  # it, or one that counts as much
            self._past[fact.batcher] = _sum(fact.stats, self._past.get(fact.batcher))

    def collect(self) -> Iterator[Any]:
        """Give all metrics, for a scrape."""
        with self._mutex:
            watched, stats = list(self._watched), dict(self._past)
        for batcher in watched:
            stats[batcher.name] = _sum(batcher.stats(), stats.get(batcher.name))
        return chain(*(metric.collect() for metric in self._measured), _read(stats))

    def describe(self) -> Iterable[Any]:
        """Give all metrics by name, for the registry to notice those of another."""
        return chain(*(metric.describe() for metric in self._measured), _read({}))


def _read(stats: dict[str, BatcherStats]) -> Iterable[Any]:
    accepted = CounterMetricFamily("microbatch_jobs_accepted", "Jobs accepted.", labels=["batcher"])
    outcomes = CounterMetricFamily("microbatch_jobs", "Jobs done.", labels=["batcher", "outcome"])
    waiting = GaugeMetricFamily("microbatch_jobs_waiting", "Jobs that no worker has taken.", labels=["batcher"])
    running = GaugeMetricFamily("microbatch_jobs_running", "Jobs in the hands of a worker.", labels=["batcher"])
    oldest = GaugeMetricFamily(
        "microbatch_oldest_job_seconds", "For how long the oldest waiting job has waited.", labels=["batcher"]
    )
    batches = CounterMetricFamily("microbatch_batches", "Batches sent.", labels=["batcher", "trigger"])
    for name, found in stats.items():
        accepted.add_metric([name], found.accepted)
        for outcome in ("succeeded", "failed", "cancelled", "expired"):
            outcomes.add_metric([name, outcome], getattr(found, outcome))
        waiting.add_metric([name], found.queued + found.batched)
        running.add_metric([name], found.running)
        oldest.add_metric([name], found.oldest)
        for trigger, count in found.triggers.items():
            batches.add_metric([name, trigger], count)
    return accepted, outcomes, waiting, running, oldest, batches


def _sum(first: BatcherStats, second: BatcherStats | None) -> BatcherStats:
    if second is None:
        return first
    counts = [each.name for each in fields(first) if each.name not in ("triggers", "oldest")]
    sums = {name: getattr(first, name) + getattr(second, name) for name in counts}
    triggers = Counter(first.triggers) + Counter(second.triggers)
    return BatcherStats(**sums, triggers=triggers, oldest=max(first.oldest, second.oldest))
