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

import weakref
from collections import Counter
from typing import Any, Dict, Iterator, List, Sequence, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from microbatch import Batcher, BatcherStats, BatchFinished, BatchListener, BatchStarted

__all__ = ["PrometheusListener"]

AnyBatcher = TypeVar("AnyBatcher", bound="Batcher[Any, Any]")

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


class PrometheusListener(BatchListener, Collector):
    """Measures each batch, and reads at each scrape the counts of those batchers that it watches.

    One is enough for all batchers: each metric has the label ``batcher``, its name. Those of one name are added up, and
    what is gone counts no more.

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
        self._watched: "weakref.WeakSet[Batcher[Any, Any]]" = weakref.WeakSet()
        label = ["batcher"]
        self._running = Gauge(
            "microbatch_batches_running",
            "Batches in the hands of a worker.",
            label,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._size = Histogram(
            "microbatch_batch_size_jobs", "Jobs in a batch.", label, registry=registry, buckets=_SIZES
        )
        self._queue = Histogram(
            "microbatch_queue_seconds",
            "From the acceptance of a job to the call of the processor.",
            label,
            registry=registry,
            buckets=buckets,
        )
        self._service = Histogram(
            "microbatch_service_seconds",
            "From the call of the processor to the last outcome of a batch.",
            label,
            registry=registry,
            buckets=buckets,
        )
        registry.register(self)

    def watch(self, batcher: AnyBatcher) -> AnyBatcher:
        """Have the counts of *batcher* read at each scrape, for as long as it lives, and return it."""
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

    def collect(self) -> Iterator[Any]:
        """Read the counts of the watched batchers, for a scrape."""
        accepted = CounterMetricFamily("microbatch_jobs_accepted", "Jobs accepted.", labels=["batcher"])
        outcomes = CounterMetricFamily("microbatch_jobs", "Jobs done.", labels=["batcher", "outcome"])
        waiting = GaugeMetricFamily("microbatch_jobs_waiting", "Jobs that no worker has taken.", labels=["batcher"])
        running = GaugeMetricFamily("microbatch_jobs_running", "Jobs in the hands of a worker.", labels=["batcher"])
        oldest = GaugeMetricFamily(
            "microbatch_oldest_job_seconds", "For how long the oldest waiting job has waited.", labels=["batcher"]
        )
        batches = CounterMetricFamily("microbatch_batches", "Batches sent.", labels=["batcher", "trigger"])
        for name, stats in self._stats().items():
            accepted.add_metric([name], sum(each.accepted for each in stats))
            for outcome in ("succeeded", "failed", "cancelled", "expired"):
                outcomes.add_metric([name, outcome], sum(getattr(each, outcome) for each in stats))
            waiting.add_metric([name], sum(each.queued + each.batched for each in stats))
            running.add_metric([name], sum(each.running for each in stats))
            oldest.add_metric([name], max(each.oldest for each in stats))
            for trigger, count in sum((Counter(each.triggers) for each in stats), Counter[str]()).items():
                batches.add_metric([name, trigger], count)
        yield from (accepted, outcomes, waiting, running, oldest, batches)

    def _stats(self) -> Dict[str, List[BatcherStats]]:
        stats: Dict[str, List[BatcherStats]] = {}
        for batcher in list(self._watched):
            stats.setdefault(batcher.name, []).append(batcher.stats())
        return stats
