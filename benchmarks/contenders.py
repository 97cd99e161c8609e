"""Who is measured, without an extra: microbatch, the standard library's pool, and two floors.

Every contender has the same tiny interface, so that the code between two readings of the clock is the same for all.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Queue
from typing import Any, ClassVar

from microbatch import (
    DEFAULT_POLICY,
    Adaptive,
    AllWaiting,
    Batcher,
    BatchingPolicy,
    BatchListener,
    Interval,
    Natural,
    Size,
    Window,
)

Processor = Callable[[list[bytes]], list[bytes]]
"""What runs downstream. Jobs are bytes, since one of the peers takes nothing else."""


class Contender(ABC):
    """Something that takes single jobs and hands them on, in batches if it can.

    `submit` takes a job and returns a handle; `result` waits for that job's result. They are attributes where the
    contender's own functions do, so that no call of ours comes on top.

    Attributes:
        name: what it is called on the command line.
        label: what it is called in the tables.
        distribution: what installs it; None for the standard library and for what is here.
        most_callers: how many threads may submit at once.
        most_workers: how many batches it can run at once.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    distribution: ClassVar[str | None] = None
    most_callers: ClassVar[int] = 1_000_000
    most_workers: ClassVar[int] = 1_000_000

    submit: Callable[[bytes], Any]
    result: Callable[[Any], bytes]

    @abstractmethod
    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        """Open it: batches of at most *size* jobs, which go *interval* seconds after their first at the latest."""

    @abstractmethod
    def close(self) -> None:
        """Shut it down as its author says."""


def _value(future: "Future[Any]") -> bytes:
    value: bytes = future.result().value
    return value


class Microbatch(Contender):
    """With its default policy, whatever the size and the interval. No bound: a full queue would be measured instead."""

    name = "microbatch"
    label = f"microbatch, {DEFAULT_POLICY!r}"
    distribution = "microbatch"
    result = staticmethod(_value)

    def __init__(
        self,
        processor: Processor,
        *,
        size: int,
        interval: float,
        workers: int,
        key: Callable[[bytes], Hashable] | None = None,
    ) -> None:
        policy = self.policy(size, interval)
        self._batcher = Batcher(
            processor, policy, key=key, max_pending=0, max_workers=workers, listeners=self.listeners()
        )
        self.submit = self._batcher.submit

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """Return what it runs with."""
        return DEFAULT_POLICY

    def listeners(self) -> list[BatchListener]:
        """Return who listens: nobody."""
        return []

    def close(self) -> None:
        """See `Contender.close`."""
        self._batcher.shutdown()


class MicrobatchInterval(Microbatch):
    """As the peers do it: full, or that long after the first job."""

    name = "microbatch-interval"
    label = "microbatch, Size(64) | Interval(0.005)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | Interval(interval)


class MicrobatchNow(Microbatch):
    """The default's idea with the size of the others."""

    name = "microbatch-now"
    label = "microbatch, Size(64) | Interval(0)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | Interval(0)


class MicrobatchLong(Microbatch):
    """An interval four times as long: fewer calls for more latency."""

    name = "microbatch-long"
    label = "microbatch, Size(64) | Interval(0.02)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | Interval(4 * interval)


class MicrobatchAllWaiting(Microbatch):
    """Lingers longer than a call takes, or callers who travel in two groups would go on to; but not when all wait."""

    name = "microbatch-allwaiting"
    label = "microbatch, Size(64) | AllWaiting() | Interval(0.02)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | AllWaiting() | Interval(4 * interval)


class MicrobatchAdaptive(Microbatch):
    """Learns how large a batch may be."""

    name = "microbatch-adaptive"
    label = "microbatch, Adaptive(0.1) | Natural()"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Adaptive(0.1) | Natural()


class Plain(BatchingPolicy[object]):
    """A policy that a user might write, with no word about what it looks at: due some time after the first job."""

    def __init__(self, interval: float) -> None:
        self.interval = interval

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + self.interval


class MicrobatchPlain(Microbatch):
    """With the policy of a user, which may have to be asked again whenever a batch starts or ends."""

    name = "microbatch-plain"
    label = "microbatch, a user's policy"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Plain(interval)


class Pool(Contender):
    """`ThreadPoolExecutor.submit`, one job a call: what people do who don't batch."""

    name = "ThreadPoolExecutor"
    label = "ThreadPoolExecutor.submit"
    result = staticmethod(Future.result)

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        def process(job: bytes) -> bytes:
            return processor([job])[0]

        self._pool = ThreadPoolExecutor(workers)
        submit: Callable[..., Any] = self._pool.submit
        self.submit = partial(submit, process)

    def close(self) -> None:
        """See `Contender.close`."""
        self._pool.shutdown()


class _Result:
    __slots__ = ("value", "batch")

    def __init__(self, value: bytes, batch: object) -> None:
        self.value = value
        self.batch = batch


class Floor(Contender):
    """Only what the promise needs, of the standard library's parts, in one thread: nothing is handed over at all.

    A `Future` and a place in a `queue.Queue`; then for each batch: take its jobs, mark them running, call the processor,
    give each a result object. The first `result` does all that waits.
    """

    name = "floor"
    label = "floor: Future, Queue and results, one thread"
    most_callers = 1

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        self._processor = processor
        self._size = size
        self._queue: Queue[tuple[Future[_Result], bytes]] = Queue()

    def submit(self, job: bytes) -> "Future[_Result]":
        """See `Contender.submit`."""
        future: Future[_Result] = Future()
        self._queue.put((future, job))
        return future

    def result(self, future: "Future[_Result]") -> bytes:
        """See `Contender.result`."""
        if self._queue.queue:
            self._serve()
        return future.result().value

    def _serve(self) -> None:
        while self._queue.queue:
            batch = [self._queue.get() for _ in range(min(self._size, len(self._queue.queue)))]
            running = [(future, job) for future, job in batch if future.set_running_or_notify_cancel()]
            for (future, _), value in zip(running, self._processor([job for _, job in running])):
                future.set_result(_Result(value, batch))

    def close(self) -> None:
        """Nothing to do."""


class _Seat:
    __slots__ = ("job", "lock", "value")

    def __init__(self, job: bytes) -> None:
        self.job = job
        self.lock = threading.Lock()
        self.lock.acquire()
        self.value = b""


class Locks(Contender):
    """Each caller parks on a raw lock of its own; a server waits for all callers, calls, and releases their locks.

    So fast can as many callers in threads as fit into a batch be served at all: no future, no policy, no error, no end
    that is clean. With several servers, each waits for its even share of the callers.
    """

    name = "locks"
    label = "floor: raw locks, full batches"

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        self._processor = processor
        self._size = size
        self._enough = self.enough(size, workers)
        self._patience = 4 * interval  # ends the last round, which some callers have left
        self._waiting: deque[_Seat] = deque()
        self._bell = threading.Lock()  # locked: silent
        self._bell.acquire()
        self._open = True
        self._servers = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for server in self._servers:
            server.start()

    def enough(self, size: int, workers: int) -> int:
        """Return for how many callers a server waits."""
        return size // workers

    def submit(self, job: bytes) -> _Seat:
        """See `Contender.submit`."""
        seat = _Seat(job)
        self._waiting.append(seat)
        if len(self._waiting) >= self._enough:
            self._ring()
        return seat

    @staticmethod
    def result(seat: _Seat) -> bytes:
        """See `Contender.result`."""
        seat.lock.acquire()
        return seat.value

    def _ring(self) -> None:
        if self._bell.locked():
            try:
                self._bell.release()
            except RuntimeError:
                pass  # another one was faster

    def _serve(self) -> None:
        while self._open:
            self._bell.acquire(timeout=self._patience)
            batch: list[_Seat] = []
            try:
                while len(batch) < self._size:
                    batch.append(self._waiting.popleft())
            except IndexError:
                pass
            if len(self._waiting) >= self._enough:
                self._ring()
            if batch:
                for seat, value in zip(batch, self._processor([seat.job for seat in batch])):
                    seat.value = value
                    seat.lock.release()

    def close(self) -> None:
        """See `Contender.close`."""
        self._open = False
        for server in self._servers:
            server.join()


class LocksNow(Locks):
    """The same, but a server that is free takes all who wait, so that callers travel in groups."""

    name = "locks-now"
    label = "floor: raw locks, all who wait"

    def enough(self, size: int, workers: int) -> int:
        """See `Locks.enough`."""
        return 1
