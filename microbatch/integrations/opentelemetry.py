"""What batchers do, as spans and metrics of OpenTelemetry: the extra ``opentelemetry``.

>>> from microbatch import Batcher
>>> with Batcher(list, name="inserts", listeners=[OpenTelemetryListener()]) as batcher:
...     batcher.submit("row").result().value
'row'

The names are those of the semantic conventions for messaging, with a batcher as the destination. They take an SDK that is
set up to go anywhere.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from opentelemetry import context, metrics, trace
from opentelemetry.context import Context

from microbatch import BatchFinished, BatchListener, BatchStarted, JobFuture, __version__

__all__ = ["OpenTelemetryListener"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)  # as the conventions advise


class OpenTelemetryListener(BatchListener):
    """Makes a span for each batch, linked to the spans in which its jobs were submitted, and measures it.

    The span ``process NAME`` is a trace of its own, since a batch has as many parents as jobs. It is the current span of
    the processor, so that the spans of what that does are inside; with an executor of the caller's, it is current where
    the batch is handed over, from where instrumented executors take it along. It is an error if a job failed, with the
    first exception as its event. An SDK keeps 128 links of a span if it is not told otherwise.

    The metrics are ``messaging.process.duration``, a histogram in seconds, and ``messaging.client.consumed.messages``.

    Args:
        tracer_provider: makes the spans; None for the global one.
        meter_provider: makes the metrics; None for the global one.
    """

    wants_context = True

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer("microbatch", __version__, tracer_provider)
        meter = metrics.get_meter("microbatch", __version__, meter_provider)
        self._duration = meter.create_histogram(
            "messaging.process.duration",
            unit="s",
            description="Duration of processing operation.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages",
            unit="{message}",
            description="Number of messages that were delivered to the application.",
        )
        self._open: dict[int, trace.Span] = {}  # by the id of what is known of the batch

    def batch_started(self, fact: BatchStarted) -> None:
        """Begin a span, and make it the current one."""
        span = self._tracer.start_span(
            f"process {fact.batcher}",
            Context(),
            trace.SpanKind.CONSUMER,
            {
                **_attributes(fact.batcher),
                "messaging.operation.type": "process",
                "messaging.batch.message_count": fact.batch.size,
                "microbatch.batch.id": fact.batch.id,
                "microbatch.batch.trigger": fact.batch.trigger,
            },
            _links(fact.futures),
        )
        self._open[id(fact.batch)] = span
        context.attach(trace.set_span_in_context(span, Context()))  # without what else the first to submit had there

    def batch_finished(self, fact: BatchFinished) -> None:
        """Measure a batch, and end its span."""
        errors = [future.exception() for future in fact.futures]
        first = next((error for error in errors if error is not None), None)
        for kind, count in Counter(map(_kind, errors)).items():
            self._consumed.add(count, _attributes(fact.batcher, kind))
        self._duration.record(fact.service_time, _attributes(fact.batcher, _kind(first)))
        span = self._open.pop(id(fact.batch), None)
        if span is None:
            return  # it could not be begun
        if trace.get_current_span() is span:  # this may be another thread
            context.attach(Context())
        try:
            if first is not None:
                span.set_attribute("error.type", _kind(first))
                span.set_status(trace.StatusCode.ERROR, f"{fact.failed} of {fact.batch.size} jobs failed")
                span.record_exception(first)
        finally:  # an exception may refuse to say what it is
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
    """Return links to the spans that were current where the jobs were submitted, one to each."""
    contexts = [future.context for future in futures]
    spans = [kept.run(trace.get_current_span).get_span_context() for kept in contexts if kept is not None]
    return [
        trace.Link(span) for span in {(span.trace_id, span.span_id): span for span in spans}.values() if span.is_valid
    ]
