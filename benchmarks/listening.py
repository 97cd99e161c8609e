"""microbatch with listeners: some that do nothing, and the integrations."""

import io
import logging

from benchmarks.contenders import Microbatch
from microbatch import BatchFinished, BatchListener, BatchStarted, JobAccepted

__all__ = ["Batches", "Context", "Jobs", "Logging", "OpenTelemetry", "Prometheus", "Tqdm"]


class _ToBatches(BatchListener):
    def batch_started(self, event: BatchStarted) -> None:
        """Do nothing."""

    def batch_finished(self, event: BatchFinished) -> None:
        """Do nothing."""


class _ToJobs(_ToBatches):
    def job_accepted(self, event: JobAccepted) -> None:
        """Do nothing."""


class _WithContext(_ToBatches):
    wants_context = True


class Batches(Microbatch):
    """Gets the events of batches, and does nothing."""

    name = "listener-batches"
    label = "a listener to batches"

    def listeners(self) -> list[BatchListener]:
        """See `Microbatch.listeners`."""
        return [_ToBatches()]


class Jobs(Microbatch):
    """Gets the events of jobs too, and does nothing."""

    name = "listener-jobs"
    label = "a listener to jobs and batches"

    def listeners(self) -> list[BatchListener]:
        """See `Microbatch.listeners`."""
        return [_ToJobs()]


class Context(Microbatch):
    """Asks for the context of each `submit` call."""

    name = "listener-context"
    label = "a listener to batches that wants the context"

    def listeners(self) -> list[BatchListener]:
        """See `Microbatch.listeners`."""
        return [_WithContext()]


class Logging(Microbatch):
    """Logs a line for each batch, into memory."""

    name = "listener-logging"
    label = "LoggingListener"

    def listeners(self) -> list[BatchListener]:
        """See `Microbatch.listeners`."""
        from microbatch.integrations.logging import LoggingListener

        logger = logging.Logger("benchmarks", logging.INFO)
        logger.addHandler(logging.StreamHandler(io.StringIO()))
        return [LoggingListener(logger)]


class Prometheus(Microbatch):
    """Counts in a registry that no server scrapes."""

    name = "listener-prometheus"
    label = "PrometheusListener"

    def listeners(self) -> list[BatchListener]:
        """See `Microbatch.listeners`."""
        from prometheus_client import CollectorRegistry

        from microbatch.integrations.prometheus import PrometheusListener

        return [PrometheusListener(CollectorRegistry())]


class OpenTelemetry(Microbatch):
    """Creates spans and metrics with the SDK, and exports none of them."""

    name = "listener-opentelemetry"
    label = "OpenTelemetryListener"

    def listeners(self) -> list[BatchListener]:
        """See `Microbatch.listeners`."""
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider

        from microbatch.integrations.opentelemetry import OpenTelemetryListener

        return [OpenTelemetryListener(TracerProvider(), MeterProvider([InMemoryMetricReader()]))]


class Tqdm(Microbatch):
    """Draws a bar, into memory."""

    name = "listener-tqdm"
    label = "TqdmListener"

    def listeners(self) -> list[BatchListener]:
        """See `Microbatch.listeners`."""
        from microbatch.integrations.tqdm import Bar, TqdmListener

        return [TqdmListener(Bar(file=io.StringIO()))]
