"""What batchers do, as spans and metrics of OpenTelemetry: the extra ``opentelemetry``.

>>> from microbatch import Batcher
>>> with Batcher(list, name="inserts", listeners=[OpenTelemetryListener()]) as batcher:
...     batcher.submit("row").result().value
'row'

The names are those of the semantic conventions for messaging, with a batcher as the destination. They take an SDK that is
set up to go anywhere.
"""

import threading
from contextvars import Token
from typing import Any, Dict, Iterable, List, Optional, Tuple

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
        tracer_provider: Optional[trace.TracerProvider] = None,
        meter_provider: Optional[metrics.MeterProvider] = None,
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
        self._open: Dict[int, Tuple[trace.Span, Token[Context], int]] = {}  # by the id of what is known of the batch

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
        token = context.attach(trace.set_span_in_context(span))
        self._open[id(fact.batch)] = span, token, threading.get_ident()

    def batch_finished(self, fact: BatchFinished) -> None:
        """End the span of a batch, and measure it."""
        span, token, thread = self._open.pop(id(fact.batch))
        if thread == threading.get_ident():  # elsewhere it can't be undone; there the next span takes its place
            context.detach(token)
        attributes = _attributes(fact.batcher)
        errors = [error for future in fact.futures if (error := future.exception()) is not None]
        if errors:
            attributes["error.type"] = _name(errors[0])
            span.record_exception(errors[0])
            span.set_attribute("error.type", attributes["error.type"])
            span.set_status(trace.StatusCode.ERROR, f"{len(errors)} of {fact.batch.size} jobs failed")
        span.end()
        self._duration.record(fact.service_time, attributes)
        self._consumed.add(fact.batch.size, attributes)


def _attributes(name: str) -> Dict[str, Any]:
    return {
        "messaging.system": "microbatch",
        "messaging.operation.name": "process",
        "messaging.destination.name": name,
    }


def _links(futures: Iterable[JobFuture[Any]]) -> List[trace.Link]:
    """Return links to the spans that were current where the jobs were submitted, one to each."""
    contexts = [future.context for future in futures]
    spans = [kept.run(trace.get_current_span).get_span_context() for kept in contexts if kept is not None]
    return [
        trace.Link(span) for span in {(span.trace_id, span.span_id): span for span in spans}.values() if span.is_valid
    ]


def _name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
