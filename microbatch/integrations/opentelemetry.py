"""Reports batches as OpenTelemetry spans and metrics. Needs the extra ``opentelemetry``.

>>> from microbatch import Batcher
>>> with Batcher(list, name="inserts", listeners=[OpenTelemetryListener()]) as batcher:
...     batcher.submit("row").result().value
'row'

The names follow the semantic conventions for messaging, with the batcher as the destination. To export the spans and
metrics, configure an OpenTelemetry SDK.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from opentelemetry import context, metrics, trace
from opentelemetry.context import Context

from microbatch import BatchFinished, BatchListener, BatchStarted, JobFuture, __version__

__all__ = ["OpenTelemetryListener"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)  # from the semantic conventions


class OpenTelemetryListener(BatchListener):
    """A listener that creates a span for each batch, and measures it.

    The span ``process NAME`` starts a trace of its own, and is linked to the spans in which the jobs were submitted. It
    has no parent, because the jobs of one batch come from many spans. An SDK keeps only 128 links per span by default.

    The span is the current span while the processor runs, so the spans of its calls become children. With your own
    *executor*, it is the current span where the batch is submitted to the executor, and an instrumented executor
    propagates it. If a job failed, the status of the span is an error, and the first exception is recorded as an event.

    The metrics are ``messaging.process.duration``, a histogram in seconds, and ``messaging.client.consumed.messages``,
    a counter of jobs.

    Args:
        tracer_provider: Creates the spans. None for the global provider.
        meter_provider: Creates the metrics. None for the global provider.
    """

    wants_context = True

    def __init__(
        self, tracer_provider: trace.TracerProvider | None = None, meter_provider: metrics.MeterProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer("microbatch", __version__, tracer_provider)
        meter = metrics.get_meter("microbatch", __version__, meter_provider)
        duration, consumed = "messaging.process.duration", "messaging.client.consumed.messages"
        self._duration = meter.create_histogram(
            duration, "s", "Duration of processing operation.", explicit_bucket_boundaries_advisory=_SECONDS
        )
        self._consumed = meter.create_counter(
            consumed, "{message}", "Number of messages that were delivered to the application."
        )
        self._open: dict[int, trace.Span] = {}  # by the id() of the `BatchInfo`

    def batch_started(self, event: BatchStarted) -> None:
        """Start a span, and make it the current one."""
        attributes = {
            **_attributes(event.batcher),
            "messaging.operation.type": "process",
            "messaging.batch.message_count": event.batch.size,
            "microbatch.batch.id": event.batch.id,
            "microbatch.batch.trigger": event.batch.trigger,
        }
        name, links = f"process {event.batcher}", _links(event.futures)
        span = self._tracer.start_span(name, Context(), trace.SpanKind.CONSUMER, attributes, links)
        self._open[id(event.batch)] = span
        # In an empty context, because a worker thread may have inherited the context of the caller that started it.
        context.attach(trace.set_span_in_context(span, Context()))

    def batch_finished(self, event: BatchFinished) -> None:
        """Measure the batch, and end its span."""
        errors = [future.exception() for future in event.futures]
        first = next((error for error in errors if error is not None), None)
        for kind, count in Counter(map(_kind, errors)).items():
            self._consumed.add(count, _attributes(event.batcher, kind))
        self._duration.record(event.service_time, _attributes(event.batcher, _kind(first)))
        span = self._open.pop(id(event.batch), None)
        if span is None:
            return  # the span could not be started
        if trace.get_current_span() is span:  # false if this is not the thread that started it
            context.attach(Context())
        try:
            if first is not None:
                span.set_attribute("error.type", _kind(first))
                span.set_status(trace.StatusCode.ERROR, f"{event.failed} of {event.batch.size} jobs failed")
                span.record_exception(first)
        finally:  # recording an exception may raise another one
            span.end()


def _attributes(name: str, kind: str = "") -> dict[str, Any]:
    attributes = {
        "messaging.system": "microbatch",
        "messaging.operation.name": "process",
        "messaging.destination.name": name,
    }
    return {**attributes, "error.type": kind} if kind else attributes


def _kind(error: BaseException | None) -> str:
    if error is None:
        return ""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _links(futures: Iterable[JobFuture[Any]]) -> list[trace.Link]:
    """Return one link to each span in which a job was submitted."""
    contexts = [future.context for future in futures]
    spans = [kept.run(trace.get_current_span).get_span_context() for kept in contexts if kept is not None]
    unique = {(span.trace_id, span.span_id): span for span in spans if span.is_valid}
    return [trace.Link(span) for span in unique.values()]
