"""Shows what three listeners report for the same ten jobs: log lines, a tree of spans, and the metrics of Prometheus.

    $ python -m pip install '.[opentelemetry,prometheus]' opentelemetry-sdk
    $ python examples/observing.py

Two requests submit five orders each, in turns. A batch has at most four orders. The database refuses one order.
"""

import logging
import sqlite3
import sys
from collections.abc import Sequence
from typing import Any
from urllib.request import urlopen

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, start_http_server

from microbatch import Batcher, JobFuture, Size
from microbatch.integrations.logging import LoggingListener
from microbatch.integrations.opentelemetry import OpenTelemetryListener
from microbatch.integrations.prometheus import PrometheusListener

tracer = trace.get_tracer("shop")
database = sqlite3.connect(":memory:", check_same_thread=False)
database.execute("CREATE TABLE orders (what TEXT, amount INTEGER CHECK (amount > 0))")


def insert_many(orders: Sequence["tuple[str, int]"]) -> list[Exception | None]:
    """Insert the orders in one transaction, and return one outcome per order: None, or the exception that refused it."""
    outcomes: list[Exception | None] = []
    with tracer.start_as_current_span("INSERT orders"), database:
        for order in orders:
            try:
                database.execute("INSERT INTO orders VALUES (?, ?)", order)
                outcomes.append(None)
            except sqlite3.IntegrityError as error:
                outcomes.append(error)
    return outcomes


def serve(inserts: "Batcher[tuple[str, int], Any]") -> list[JobFuture[Any]]:
    """Submit the orders of two requests that arrive at the same time."""
    requests = [tracer.start_span(f"POST /orders/{number}") for number in (1, 2)]
    futures: list[JobFuture[Any]] = []
    for amount in range(10):
        with trace.use_span(requests[amount % 2]):
            futures.append(inserts.submit(("tea", amount)))
    for request in requests:
        request.end()
    return futures


def show_tree(spans: Sequence[ReadableSpan], parent: int | None = None, depth: int = 0) -> None:
    """Print the spans inside *parent*, with the names of the spans that they are linked to."""
    names = {span.context.span_id: span.name for span in spans if span.context}
    for span in sorted(spans, key=lambda span: span.start_time or 0):
        if span.context and (span.parent.span_id if span.parent else None) == parent:
            links = ", ".join(names[link.context.span_id] for link in span.links)
            print(
                "    " * depth + span.name + (f" (linked to {links})" if links else ""), span.status.description or ""
            )
            show_tree(spans, span.context.span_id, depth + 1)


def main() -> None:
    """Set up logs, traces and metrics as an application does when it starts, and print what they contain."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
    exporter, traces, meters = InMemorySpanExporter(), TracerProvider(), MeterProvider()
    traces.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(traces)
    registry = CollectorRegistry()
    server, thread = start_http_server(0, "127.0.0.1", registry)

    metrics = PrometheusListener(registry)
    listeners = [LoggingListener(), OpenTelemetryListener(traces, meters), metrics]
    with metrics.watch(Batcher(insert_many, Size(4), name="orders", listeners=listeners)) as inserts:
        futures = serve(inserts)
    print(f"{sum(future.exception() is not None for future in futures)} of {len(futures)} orders refused\n")
    show_tree(exporter.get_finished_spans())
    print()
    with urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as reply:
        for line in reply.read().decode().splitlines():
            if not line.startswith("#") and "_bucket" not in line and "_created" not in line:
                print(line)

    server.shutdown()
    server.server_close()
    thread.join()


if __name__ == "__main__":
    main()
