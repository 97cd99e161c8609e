"""`PrometheusListener`: the metrics that a scrape of a real endpoint returns."""

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from microbatch import Batcher, Interval, Size, batched
from microbatch.integrations.prometheus import PrometheusListener
from microbatch.testing import ManualClock, RecordingProcessor
from tests.test_listeners import failing
from tests.threads import in_thread


class Registry(prometheus_client.CollectorRegistry):
    """A registry that can be emptied."""

    def __init__(self) -> None:
        super().__init__()
        self._registered: list[Any] = []

    def register(self, collector: Any) -> None:
        super().register(collector)
        self._registered.append(collector)

    def clear(self) -> None:
        while self._registered:
            with suppress(KeyError):  # the test has unregistered it
                self.unregister(self._registered.pop())


class Endpoint:
    """Serves a registry, and scrapes it."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.server, self.thread = prometheus_client.start_http_server(0, "127.0.0.1", self.registry)

    def text(self, accept: str = "text/plain") -> str:
        url = f"http://127.0.0.1:{self.server.server_port}/metrics"
        with urlopen(Request(url, headers={"Accept": accept})) as response:
            return str(response.read(), "utf-8")

    def scrape(self) -> dict[str, float]:
        return samples(self.text())


def samples(text: str) -> dict[str, float]:
    return {
        f"{sample.name}{{{','.join(map('='.join, sample.labels.items()))}}}": sample.value
        for family in parse(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    endpoint.thread.join()


@pytest.fixture
def endpoint(server: Endpoint) -> Iterator[Endpoint]:
    yield server
    server.registry.clear()


def test_a_scrape_counts_jobs_by_outcome_and_batches_by_trigger(endpoint: Endpoint, clock: ManualClock) -> None:
    metrics = PrometheusListener(endpoint.registry)
    with metrics.watch(
        Batcher[str, Any](failing, Size(3) | Interval(60), name="rows", listeners=[metrics], clock=clock)
    ) as batcher:
        full = [batcher.submit(job) for job in ("good", "bad", "good")]
        batcher.submit("cancelled").cancel()
        batcher.submit("expired", expires_in=1.0)
        clock.advance(1.0)
        last = batcher.submit("good")
        assert batcher.flush()
    assert all(future.done() for future in [*full, last])
    found = endpoint.scrape()
    assert {
        "microbatch_jobs_accepted_total{batcher=rows}": 6.0,
        "microbatch_jobs_total{batcher=rows,outcome=succeeded}": 3.0,
        "microbatch_jobs_total{batcher=rows,outcome=failed}": 1.0,
        "microbatch_jobs_total{batcher=rows,outcome=cancelled}": 1.0,
        "microbatch_jobs_total{batcher=rows,outcome=expired}": 1.0,
        "microbatch_jobs_total{batcher=rows,outcome=dropped}": 0.0,
        "microbatch_batches_total{batcher=rows,trigger=size}": 1.0,
        "microbatch_batches_total{batcher=rows,trigger=flush}": 1.0,
    } == {name: value for name, value in found.items() if "_total{" in name}


def test_a_scrape_shows_how_many_jobs_wait_and_run(
    endpoint: Endpoint, clock: ManualClock, processor: RecordingProcessor[str]
) -> None:
    metrics = PrometheusListener(endpoint.registry)
    names = ["jobs_waiting", "jobs_running", "oldest_job_seconds", "batches_running"]

    def gauges() -> "list[float]":
        found = endpoint.scrape()
        return [found[f"microbatch_{name}{{batcher=rows}}"] for name in names]

    with metrics.watch(Batcher[str, str](processor, Size(2), name="rows", listeners=[metrics], clock=clock)) as batcher:
        for job in "abcde":
            batcher.submit(job)
        processor.wait_for_batches(1)
        clock.advance(7.0)
        assert [3.0, 2.0, 7.0, 1.0] == gauges()
        processor.release()
    assert [0.0, 0.0, 0.0, 0.0] == gauges()


def test_a_scrape_shows_histograms_of_sizes_and_times(endpoint: Endpoint, clock: ManualClock) -> None:
    def processor(jobs: "list[str]") -> "list[str]":
        clock.advance(0.5)
        return jobs

    metrics = PrometheusListener(endpoint.registry, buckets=(1.0, 10.0))
    with Batcher[str, str](processor, Size(2), name="rows", listeners=[metrics], clock=clock) as batcher:
        batcher.submit("first")
        clock.advance(3.0)
        batcher.submit("second")
    found = endpoint.scrape()
    assert {
        "microbatch_queue_seconds_bucket{batcher=rows,le=1.0}": 1.0,
        "microbatch_queue_seconds_bucket{batcher=rows,le=10.0}": 2.0,
        "microbatch_queue_seconds_bucket{batcher=rows,le=+Inf}": 2.0,
        "microbatch_queue_seconds_count{batcher=rows}": 2.0,
        "microbatch_queue_seconds_sum{batcher=rows}": 3.0,
        "microbatch_service_seconds_bucket{batcher=rows,le=1.0}": 1.0,
        "microbatch_service_seconds_bucket{batcher=rows,le=10.0}": 1.0,
        "microbatch_service_seconds_bucket{batcher=rows,le=+Inf}": 1.0,
        "microbatch_service_seconds_count{batcher=rows}": 1.0,
        "microbatch_service_seconds_sum{batcher=rows}": 0.5,
    } == {name: value for name, value in found.items() if "_seconds_" in name}
    sizes = [found[f"microbatch_batch_size_jobs_bucket{{batcher=rows,le={bound}}}"] for bound in ("1.0", "2.0")]
    assert ([0.0, 1.0], 2.0) == (sizes, found["microbatch_batch_size_jobs_sum{batcher=rows}"])


def test_one_listener_separates_batchers_by_name_and_adds_up_those_with_the_same_name(endpoint: Endpoint) -> None:
    metrics = PrometheusListener(endpoint.registry)
    batchers = [
        metrics.watch(Batcher[str, str](list, Size(1), name=name, listeners=[metrics])) for name in ("a", "b", "a")
    ]
    for batcher in batchers:
        with batcher:
            batcher.submit("job")
    found = endpoint.scrape()
    for name, count in (("a", 2.0), ("b", 1.0)):
        assert count == found[f"microbatch_jobs_total{{batcher={name},outcome=succeeded}}"]
        assert count == found[f"microbatch_batches_total{{batcher={name},trigger=size}}"]
        assert count == found[f"microbatch_queue_seconds_count{{batcher={name}}}"]


@pytest.mark.slow
def test_a_watched_batcher_can_be_garbage_collected_and_its_jobs_are_still_counted(endpoint: Endpoint) -> None:
    metrics = PrometheusListener(endpoint.registry)
    for count in (1.0, 2.0, 3.0):
        with metrics.watch(Batcher[str, str](list, Size(1), name="rows", listeners=[metrics])) as batcher:
            batcher.submit("job")
        assert count == endpoint.scrape()["microbatch_jobs_accepted_total{batcher=rows}"]
        alive = weakref.ref(batcher)
        del batcher
        gc.collect()
        assert alive() is None
        found = endpoint.scrape()
        assert count == found["microbatch_jobs_total{batcher=rows,outcome=succeeded}"]
        assert count == found["microbatch_batches_total{batcher=rows,trigger=size}"]


@pytest.mark.slow
def test_watch_may_be_called_during_a_scrape(endpoint: Endpoint) -> None:
    metrics = PrometheusListener(endpoint.registry)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        watching = in_thread(lambda: [metrics.watch(Batcher[str, str](list, name="rows")) for _ in range(2_000)])
        while not watching.done():
            prometheus_client.generate_latest(endpoint.registry)
    finally:
        sys.setswitchinterval(interval)
    assert 2_000 == len(watching.result(timeout=10))


@pytest.mark.parametrize("other", [batched(Size(2))(lambda jobs: jobs), "rows"])
def test_watch_refuses_an_object_that_is_not_a_batcher(other: Any, endpoint: Endpoint) -> None:
    with pytest.raises(
        TypeError, match="batcher must be a Batcher, got .*: for a decorated function, pass its .batcher"
    ):
        PrometheusListener(endpoint.registry).watch(other)


def test_a_registry_accepts_one_listener_at_a_time_and_can_unregister_it(endpoint: Endpoint) -> None:
    with pytest.raises(ValueError, match="at least two"):
        PrometheusListener(endpoint.registry, buckets=())
    metrics = PrometheusListener(endpoint.registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusListener(endpoint.registry)
    endpoint.registry.unregister(metrics)
    PrometheusListener(endpoint.registry)


def test_the_metrics_are_valid_openmetrics_even_with_special_characters_in_the_name(endpoint: Endpoint) -> None:
    metrics = PrometheusListener(endpoint.registry)
    with metrics.watch(Batcher[str, str](list, Size(1), name='a "name"\n', listeners=[metrics])) as batcher:
        batcher.submit("job")
    families = parse_openmetrics(endpoint.text("application/openmetrics-text"))  # type: ignore[no-untyped-call]
    labels = {sample.labels["batcher"] for family in families for sample in family.samples}
    assert {'a "name"\n'} == labels


def test_in_multiprocess_mode_there_are_only_the_histograms_and_the_running_batches(tmp_path: Path) -> None:
    program = """
        from prometheus_client import CollectorRegistry, generate_latest, multiprocess
        from microbatch import Batcher, Size
        from microbatch.integrations.prometheus import PrometheusListener

        metrics = PrometheusListener()
        with metrics.watch(Batcher(list, Size(2), name="rows", listeners=[metrics])) as batcher:
            for job in "ab":
                batcher.submit(job)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        print(generate_latest(registry).decode())
    """
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = samples(out)
    assert 2.0 == found["microbatch_queue_seconds_count{batcher=rows}"]
    assert 1.0 == found["microbatch_service_seconds_count{batcher=rows}"]
    assert 2.0 == found["microbatch_batch_size_jobs_sum{batcher=rows}"]
    assert 0.0 == found["microbatch_batches_running{batcher=rows}"]
    assert [] == [name for name in found if name.startswith("microbatch_jobs")]
