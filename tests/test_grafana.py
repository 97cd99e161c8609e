"""examples/grafana.json: every query of the dashboard returns what its panel shows."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import prometheus_client
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.samples import Timestamp

from microbatch import Batcher, Interval, Size
from microbatch.integrations.prometheus import PrometheusListener
from microbatch.testing import ManualClock, RecordingProcessor
from tests.pages import ROOT, page
from tests.test_listeners import failing

DASHBOARD = json.loads((ROOT / "examples" / "grafana.json").read_text(encoding="utf-8"))
QUERIES = {
    target["expr"].replace("$batcher", ".*").replace("$__rate_interval", "1m"): target["legendFormat"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
(BATCHERS,) = [variable["query"] for variable in DASHBOARD["templating"]["list"] if variable["name"] == "batcher"]


class Load:
    """Two batchers with jobs of each outcome, with jobs that wait, and with a job that runs."""

    def __init__(self, metrics: PrometheusListener, held: RecordingProcessor[str], clock: ManualClock) -> None:
        def batcher(name: str, processor: Any, policy: Any, **options: Any) -> Batcher[str, Any]:
            return metrics.watch(Batcher(processor, policy, name=name, listeners=[metrics], clock=clock, **options))

        self.clock = clock
        self.rows = batcher("rows", failing, Size(2) | Interval(60))
        self.held = batcher("held", held, Size(1), drop_oldest=True, max_pending=1)
        self.held.submit("running")
        held.wait_for_batches(1)

    def add(self) -> None:
        """Add jobs of each outcome."""
        for _ in range(2):  # the second batch starts when the listener has measured the first
            self.rows.submit("cancelled").cancel()
            expired = self.rows.submit("expired", expires_in=1.0)
            self.clock.advance(1.0)
            expired.exception(timeout=10)
            for future in [self.rows.submit(job) for job in ("good", "bad")]:
                future.exception(timeout=10)
            self.held.submit("dropped by the next one")
            self.held.submit("waiting")
            self.clock.advance(1.0)

    def shutdown(self) -> None:
        for batcher in (self.rows, self.held):
            batcher.shutdown()


@pytest.fixture
def registry() -> prometheus_client.CollectorRegistry:
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def load(
    registry: prometheus_client.CollectorRegistry, processor: RecordingProcessor[str], clock: ManualClock
) -> Iterator[Load]:
    load = Load(PrometheusListener(registry), processor, clock)
    load.add()
    yield load
    processor.release()
    load.shutdown()


def test_each_metric_and_label_in_a_query_is_exported_and_each_exported_metric_is_on_the_dashboard(
    registry: prometheus_client.CollectorRegistry, load: Load
) -> None:
    exported: dict[str, set[str]] = {}
    for sample in (sample for family in registry.collect() for sample in family.samples):
        if not sample.name.endswith("_created"):
            exported.setdefault(sample.name, set()).update(sample.labels)
    shown = set()
    for query in [*QUERIES, BATCHERS]:
        metrics = set(re.findall(r"microbatch_\w+", query))
        grouped = {label for found in re.findall(r"by \((.*?)\)", query) for label in found.split(", ")}
        labels = grouped | set(re.findall(r"(\w+)=", query))
        assert metrics and all(exported.get(metric, set()) >= labels for metric in metrics), query
        shown |= metrics
    histograms = {name.removesuffix("_bucket") for name in exported if name.endswith("_bucket")}
    assert set() == {name for name in exported if name.rpartition("_")[0] not in histograms} - shown
    assert histograms == {name.removesuffix("_bucket") for name in shown if name.endswith("_bucket")}


def test_the_page_on_observing_says_which_question_each_panel_answers() -> None:
    text = " ".join(page("observing").replace("``", "").split())
    assert [] == [panel for panel in DASHBOARD["panels"] if f"{panel['title']} {panel['description']}" not in text]


def write_scrapes(registry: prometheus_client.CollectorRegistry, load: Load, times: Sequence[int], path: Path) -> None:
    """Write what a Prometheus would get from scrapes at these *times*, which are in seconds. Between them, add jobs."""
    families: dict[str, Metric] = {}
    for time in times:
        for family in registry.collect():
            scraped = [sample._replace(timestamp=Timestamp(time, 0)) for sample in family.samples]
            families.setdefault(family.name, Metric(family.name, "", family.type)).samples += scraped
        load.add()
    everything = SimpleNamespace(collect=lambda: families.values())
    path.write_bytes(generate_latest(everything))  # type: ignore[no-untyped-call]


@contextmanager
def prometheus(data: Path) -> Iterator[Callable[..., Any]]:
    """Start a Prometheus that has *data*, and yield a function that gets an answer from its API."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = "127.0.0.1:%d" % free.getsockname()[1]
    config = data.with_suffix(".yml")
    config.touch()
    options = [f"--config.file={config}", f"--storage.tsdb.path={data}", "--storage.tsdb.retention.time=100y"]

    def get(path: str, **parameters: str) -> Any:
        with urlopen(f"http://{address}{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.loads(answer.read())["data"]

    log = data.with_suffix(".log")
    command = ["prometheus", *options, f"--web.listen-address={address}"]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + 20
            while True:
                assert time.monotonic() < deadline and process.poll() is None, log.read_text()
                with suppress(OSError):  # it does not listen yet, or it has not loaded the data
                    get("/api/v1/query", query="1")
                    break
                time.sleep(0.02)
            yield get
        finally:
            process.kill()


@pytest.mark.server
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_each_query_of_the_dashboard_returns_a_value_in_prometheus(
    registry: prometheus_client.CollectorRegistry, load: Load, tmp_path: Path
) -> None:
    data, scrapes = tmp_path / "data", tmp_path / "scrapes.txt"
    first, last = 1_700_000_000, 1_700_000_030
    write_scrapes(registry, load, [first, last], scrapes)
    subprocess.run(["promtool", "tsdb", "create-blocks-from", "openmetrics", scrapes, data], check=True)
    with prometheus(data) as get:
        for query, legend in QUERIES.items():
            found = get("/api/v1/query", query=query, time=last)["result"]
            values = [float(series["value"][1]) for series in found]
            assert any(value > 0 for value in values), query
            labels = set(re.findall(r"\{\{(\w+)\}\}", legend))
            assert [labels] * len(found) == [set(series["metric"]) for series in found], query
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", BATCHERS).groups()  # type: ignore[union-attr]
        assert ["held", "rows"] == get(f"/api/v1/label/{label}/values", **{"match[]": metric})
