"""`OpenTelemetryListener`: the spans and metrics that the OpenTelemetry SDK receives."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from microbatch import Batcher, BatchFinished, BatchListener, BatchStarted, Size
from microbatch.integrations.opentelemetry import OpenTelemetryListener
from microbatch.testing import ManualClock
from tests.test_listeners import failing


class Telemetry:
    """An SDK that keeps spans and metrics in memory."""

    def __init__(self) -> None:
        self.spans = TracerProvider(shutdown_on_exit=False)
        self.exporter = InMemorySpanExporter()
        self.spans.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.spans.get_tracer("tests")

    def listener(self) -> OpenTelemetryListener:
        return OpenTelemetryListener(self.spans, self.meters)

    def submit(self, batcher: "Batcher[Any, Any]", name: str, *jobs: str) -> trace.SpanContext:
        """Submit *jobs* in a span *name*."""
        with self.tracer.start_as_current_span(name) as span:
            for job in jobs:
                batcher.submit(job)
            return span.get_span_context()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def metrics(self) -> "dict[str, Any]":
        data = self.reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.spans.shutdown()
    telemetry.meters.shutdown()


def links(span: ReadableSpan) -> Sequence[trace.SpanContext]:
    return [link.context for link in span.links]


def test_each_batch_has_a_span_linked_to_the_spans_in_which_its_jobs_were_submitted(telemetry: Telemetry) -> None:
    with Batcher[str, str](list, Size(3), name="rows", listeners=[telemetry.listener()]) as batcher:
        one = telemetry.submit(batcher, "one request", "a", "b")
        other = telemetry.submit(batcher, "another request", "c")
        batcher.submit("in no span")
    first, second = telemetry.named("process rows")
    assert ([one, other], []) == (links(first), links(second))
    assert first.kind is trace.SpanKind.CONSUMER
    assert first.parent is second.parent is None
    assert 4 == len({span.context.trace_id for span in telemetry.exporter.get_finished_spans() if span.context})
    assert {
        "messaging.system": "microbatch",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "rows",
        "messaging.batch.message_count": 3,
        "microbatch.batch.id": 1,
        "microbatch.batch.trigger": "size",
    } == first.attributes


def test_the_span_of_a_batch_has_no_parent_even_if_its_jobs_are_submitted_within_one_span(
    telemetry: Telemetry,
) -> None:
    with telemetry.tracer.start_as_current_span("script"):
        with Batcher[str, str](list, Size(1), name="rows", listeners=[telemetry.listener()]) as batcher:
            batcher.submit("job")
    (batch,) = telemetry.named("process rows")
    assert batch.parent is None and 1 == len(batch.links)


def test_spans_that_the_processor_starts_are_inside_the_span_of_the_batch(telemetry: Telemetry) -> None:
    def processor(jobs: list[str]) -> list[str]:
        with telemetry.tracer.start_as_current_span("INSERT"):
            return jobs

    with Batcher[str, str](processor, Size(1), name="rows", listeners=[telemetry.listener()]) as batcher:
        telemetry.submit(batcher, "request", "a", "b")
    batches, inserts = telemetry.named("process rows"), telemetry.named("INSERT")
    assert [batch.context for batch in batches] == [insert.parent for insert in inserts]


def test_after_a_batch_no_span_is_left_in_its_thread(telemetry: Telemetry) -> None:
    class CurrentSpans(BatchListener):
        def batch_finished(self, event: BatchFinished) -> None:
            current.append(trace.get_current_span())

    current: list[trace.Span] = []
    with Batcher[str, str](list, Size(1), listeners=[telemetry.listener(), CurrentSpans()]) as batcher:
        batcher.submit("job")
    assert [trace.INVALID_SPAN] == current


def test_after_a_batch_with_two_listeners_no_span_is_left_in_its_thread(telemetry: Telemetry) -> None:
    class CurrentSpans(BatchListener):
        def batch_finished(self, event: BatchFinished) -> None:
            current.append(trace.get_current_span())

    current: list[trace.Span] = []
    listeners = [telemetry.listener(), telemetry.listener(), CurrentSpans()]
    with Batcher[str, str](list, Size(1), listeners=listeners) as batcher:
        batcher.submit("job")
    assert [trace.INVALID_SPAN] == current
    assert 2 == len(telemetry.named("process microbatch"))


def test_a_batch_has_no_baggage_from_the_thread_that_started_its_worker(telemetry: Telemetry) -> None:
    class Inheriting(BatchListener):
        """Runs first, and gives the thread the baggage of another thread, as instrumented threads do."""

        def batch_started(self, event: BatchStarted) -> None:
            context.attach(baggage.set_baggage("user", "Ada"))

    def processor(jobs: list[str]) -> list[Any]:
        return [baggage.get_all() for _ in jobs]

    with Batcher[str, Any](processor, Size(1), listeners=[Inheriting(), telemetry.listener()]) as batcher:
        assert {} == batcher.submit("job").result(timeout=10).value


@pytest.mark.parametrize(
    "processor, complaint, event",
    [
        (failing, "1 of 2 jobs failed", "bad"),
        (lambda jobs: 1 / 0, "2 of 2 jobs failed", "division by zero"),
    ],
    ids=["one job", "all of them"],
)
def test_the_span_of_a_batch_with_a_failed_job_has_the_status_error(
    processor: Callable[[Any], Any], complaint: str, event: str, telemetry: Telemetry
) -> None:
    with Batcher[str, Any](processor, Size(2), name="rows", listeners=[telemetry.listener()]) as batcher:
        telemetry.submit(batcher, "request", "good", "bad")
    (span,) = telemetry.named("process rows")
    assert (trace.StatusCode.ERROR, complaint) == (span.status.status_code, span.status.description)
    assert [event] == [(each.attributes or {})["exception.message"] for each in span.events]
    kind = {"bad": "ValueError"}.get(event, "ZeroDivisionError")
    assert kind == (span.attributes or {})["error.type"]
    (point,) = telemetry.metrics()["messaging.process.duration"].data.data_points
    assert kind == point.attributes["error.type"]


def test_each_job_is_counted_by_its_own_outcome(telemetry: Telemetry) -> None:
    with Batcher[str, Any](failing, Size(3), listeners=[telemetry.listener()]) as batcher:
        for job in ("good", "bad", "good"):
            batcher.submit(job)
    points = telemetry.metrics()["messaging.client.consumed.messages"].data.data_points
    assert {None: 2, "ValueError": 1} == {point.attributes.get("error.type"): point.value for point in points}


def test_an_exception_whose_str_raises_prevents_neither_the_span_nor_the_metrics(
    telemetry: Telemetry,
) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise LookupError

    with Batcher[str, Any](lambda jobs: [Mute() for _ in jobs], Size(1), listeners=[telemetry.listener()]) as batcher:
        batcher.submit("job")
    (span,) = telemetry.named("process microbatch")
    assert trace.StatusCode.ERROR is span.status.status_code
    assert {"messaging.process.duration", "messaging.client.consumed.messages"} == set(telemetry.metrics())


def test_metrics_have_the_names_of_the_semantic_conventions(telemetry: Telemetry, clock: ManualClock) -> None:
    def processor(jobs: list[str]) -> list[str]:
        clock.advance(0.5)
        return jobs

    listeners = [telemetry.listener()]
    with Batcher[str, str](processor, Size(2), name="rows", listeners=listeners, clock=clock) as batcher:
        for job in "abc":
            batcher.submit(job)
    metrics = telemetry.metrics()
    duration, consumed = metrics["messaging.process.duration"], metrics["messaging.client.consumed.messages"]
    (times,), (messages,) = duration.data.data_points, consumed.data.data_points
    assert ("s", 2, 1.0) == (duration.unit, times.count, times.sum)
    assert ("{message}", 3) == (consumed.unit, messages.value)
    names = {"messaging.system": "microbatch", "messaging.destination.name": "rows"}
    assert {**names, "messaging.operation.name": "process"} == dict(times.attributes) == dict(messages.attributes)


class Instrumented(ThreadPoolExecutor):
    """Passes the context of the caller on, as instrumented executors do."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(copy_context().run, fn, *args, **kwargs)


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, Instrumented])
def test_with_a_supplied_executor_each_batch_has_a_span(kind: Callable[[int], Executor], telemetry: Telemetry) -> None:
    def processor(jobs: list[str]) -> list[str]:
        with telemetry.tracer.start_as_current_span("INSERT"):
            return jobs

    with kind(2) as executor:
        with Batcher[str, str](
            processor, Size(1), name="rows", max_workers=2, executor=executor, listeners=[telemetry.listener()]
        ) as batcher:
            requests = [telemetry.submit(batcher, "request", job) for job in "abcd"]
    batches = telemetry.named("process rows")
    assert sorted(requests) == sorted(link for batch in batches for link in links(batch))
    assert {None} == {batch.parent for batch in batches}
    assert {trace.StatusCode.UNSET} == {batch.status.status_code for batch in batches}
    if kind is Instrumented:
        parents = [insert.parent for insert in telemetry.named("INSERT") if insert.parent]
        assert sorted(parents) == sorted(batch.context for batch in batches if batch.context)


def test_without_an_sdk_the_listener_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with Batcher[str, Any](failing, Size(1), listeners=[OpenTelemetryListener()]) as batcher:
        assert "good" == batcher.submit("good").result(timeout=10).value
        assert isinstance(batcher.submit("bad").exception(timeout=10), ValueError)
    assert [] == caplog.records
