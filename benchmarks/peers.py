"""The peers: libraries from PyPI, which the extra `bench` installs, each used as its author intends.

A peer is imported when it is opened. If its public call blocks until the result is there, the benchmark calls its two
parts separately: the one that sends the job, and the one that waits.
"""

from types import SimpleNamespace
from typing import Any

from benchmarks.contenders import Contender, Processor


class Batched(Contender):
    """`batched`: one thread, a priority queue and futures of its own. Its call blocks. Its `acall` sends like this."""

    name = "batched"
    label = "batched"
    distribution = "batched"
    most_workers = 1

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        from batched import dynamically
        from batched.batch_generator import BatchItem

        self._processor = dynamically(processor, batch_size=size, timeout_ms=interval * 1_000)
        self._schedule = self._processor._schedule
        self.result = BatchItem.result

    def submit(self, job: bytes) -> Any:
        """See `Contender.submit`."""
        return self._schedule([job])[0]

    def close(self) -> None:
        """See `Contender.close`."""
        self._processor.shutdown()


class UBatch(Contender):
    """`ubatch`: one thread polls the queue, and each caller polls for its result. Its call blocks."""

    name = "ubatch"
    label = "ubatch"
    distribution = "ubatch"
    most_workers = 1

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        from ubatch import UBatch
        from ubatch.data_request import _DataRequest

        self._batcher = UBatch(max_size=size, timeout=interval)
        self._batcher.set_handler(processor)
        self._batcher.start()
        self._request = _DataRequest
        self._put = self._batcher._requests_queue.put
        self._timeout = interval
        self.result = _DataRequest.get_wait_output

    def submit(self, job: bytes) -> Any:
        """See `Contender.submit`."""
        request = self._request(timeout=self._timeout, args=(job,), kwargs={})
        self._put(request)
        return request

    def close(self) -> None:
        """See `Contender.close`."""
        self._batcher.stop()


class PyBatcher(Contender):
    """`pybatcher`: an event loop in a thread, a task per batch, and futures of the standard library."""

    name = "pybatcher"
    label = "pybatcher"
    distribution = "pybatcher"
    most_workers = 1

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        from pybatcher import Batcher, Future

        self._batcher = Batcher(processor, batch_delay=interval, max_batch_size=size)
        self.submit = self._batcher.submit_request
        self.result = Future.result

    def close(self) -> None:
        """See `Contender.close`."""
        self._batcher.close()


class ServiceStreamer(Contender):
    """The `ThreadedStreamer` of `service-streamer`: a thread for batches, a thread for results, and futures of its own.

    It takes lists of jobs; here, each list has one job. It can lose a job, so a caller waits only for a limited time,
    as in its own `predict`.
    """

    name = "service-streamer"
    label = "service-streamer"
    distribution = "service-streamer"
    most_workers = 1

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        from service_streamer import ThreadedStreamer
        from service_streamer.service_streamer import WORKER_TIMEOUT

        self._streamer = ThreadedStreamer(processor, batch_size=size, max_latency=interval)
        self._send = self._streamer.submit
        self._timeout = WORKER_TIMEOUT

    def submit(self, job: bytes) -> Any:
        """See `Contender.submit`."""
        return self._send([job])

    def result(self, handle: Any) -> bytes:
        """See `Contender.result`."""
        value: bytes = handle.result(self._timeout)[0]
        return value

    def close(self) -> None:
        """See `Contender.close`."""
        self._streamer.destroy_workers()


class PubSub(Contender):
    """The publisher of `google-cloud-pubsub`: a thread per batch, and any number of batches at the same time.

    A stub replaces the network call. The messages, batches, timer, threads and futures are those of the library.
    """

    name = "google-cloud-pubsub"
    label = "google-cloud-pubsub (call stubbed)"
    distribution = "google-cloud-pubsub"

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.pubsub_v1 import PublisherClient
        from google.cloud.pubsub_v1.publisher.futures import Future
        from google.cloud.pubsub_v1.types import BatchSettings

        def publish(*, messages: list[Any], **options: Any) -> Any:
            return SimpleNamespace(message_ids=processor([message.data for message in messages]))

        self._client: Any = PublisherClient(
            BatchSettings(max_messages=size, max_latency=interval), credentials=AnonymousCredentials()
        )
        self._client._gapic_publish = publish
        self._publish = self._client.publish
        self.result = Future.result

    def submit(self, job: bytes) -> Any:
        """See `Contender.submit`."""
        return self._publish("projects/none/topics/none", job)

    def close(self) -> None:
        """See `Contender.close`."""
        self._client.stop()
