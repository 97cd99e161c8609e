"""The contenders that need no other library: microbatch, `ThreadPoolExecutor`, and references for comparison.

All contenders have the same small interface, so the measured code is the same for each of them.
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
"""Processes a batch. Jobs are bytes, because one of the peers accepts nothing else."""


class Contender(ABC):
    """A way to process single jobs, usually in batches.

    `submit` takes a job and returns a handle. `result` takes the handle, and waits for the result of that job. If a
    library has such functions, they are attributes of its contender, so the benchmark adds no call of its own.

    Attributes:
        name: Its name on the command line.
        label: Its name in the tables.
        distribution: The package that it measures, or None if that is the standard library or this folder.
        most_callers: The number of threads that may submit at the same time.
        most_workers: The number of batches that may run at the same time.
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
        """Open it. A batch has at most *size* jobs, and is dispatched within *interval* seconds of its first job."""

    @abstractmethod
    def close(self) -> None:
        """Shut it down as its documentation says."""


def _value(future: "Future[Any]") -> bytes:
    value: bytes = future.result().value
    return value


class Microbatch(Contender):
    """The default policy, which ignores *size* and *interval*. The queue is unlimited, so `submit` never blocks."""

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
        """Return its policy."""
        return DEFAULT_POLICY

    def listeners(self) -> list[BatchListener]:
        """Return its listeners."""
        return []

    def close(self) -> None:
        """See `Contender.close`."""
        self._batcher.shutdown()


class MicrobatchInterval(Microbatch):
    """The policy of the peers: a batch is dispatched when it is full, or *interval* seconds after its first job."""

    name = "microbatch-interval"
    label = "microbatch, Size(64) | Interval(0.005)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | Interval(interval)


class MicrobatchNow(Microbatch):
    """Dispatches as soon as a worker is free, as the default policy does, with the batch size of the peers."""

    name = "microbatch-now"
    label = "microbatch, Size(64) | Interval(0)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | Interval(0)


class MicrobatchLong(Microbatch):
    """An interval four times as long, which saves calls and costs latency."""

    name = "microbatch-long"
    label = "microbatch, Size(64) | Interval(0.02)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | Interval(4 * interval)


class MicrobatchAllWaiting(Microbatch):
    """Dispatches when all callers wait. Its interval is longer than a call, so callers don't stay in two groups."""

    name = "microbatch-allwaiting"
    label = "microbatch, Size(64) | AllWaiting() | Interval(0.02)"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Size(size) | AllWaiting() | Interval(4 * interval)


class MicrobatchAdaptive(Microbatch):
    """Learns how many jobs a batch may hold."""

    name = "microbatch-adaptive"
    label = "microbatch, Adaptive(0.1) | Natural()"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Adaptive(0.1) | Natural()


class Plain(BatchingPolicy[object]):
    """A policy that a user might write, without `Hints`: due *interval* seconds after the first job."""

    def __init__(self, interval: float) -> None:
        self.interval = interval

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.opened + self.interval


class MicrobatchPlain(Microbatch):
    """A policy without `Hints`, which the batcher asks again whenever a batch starts or ends."""

    name = "microbatch-plain"
    label = "microbatch, a user's policy"

    def policy(self, size: int, interval: float) -> "BatchingPolicy[object]":
        """See `Microbatch.policy`."""
        return Plain(interval)


class Pool(Contender):
    """`ThreadPoolExecutor.submit` for each job, without batches."""

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


class OneThread(Contender):
    """The standard library's `Future` and `queue.Queue` in one thread, so no job moves to another thread.

    `submit` creates a future and queues it with its job. The first `result` processes all queued jobs: for each batch,
    it gets the jobs, marks their futures as running, calls the processor, and sets the results.
    """

    name = "one-thread"
    label = "one thread: Future, Queue and results"
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
            self._process_all()
        return future.result().value

    def _process_all(self) -> None:
        while self._queue.queue:
            batch = [self._queue.get() for _ in range(min(self._size, len(self._queue.queue)))]
            running = [(future, job) for future, job in batch if future.set_running_or_notify_cancel()]
            for (future, _), value in zip(running, self._processor([job for _, job in running])):
                future.set_result(_Result(value, batch))

    def close(self) -> None:
        """Do nothing, because there is no thread to end."""


class _Waiter:
    __slots__ = ("job", "lock", "value")

    def __init__(self, job: bytes) -> None:
        self.job = job
        self.lock = threading.Lock()
        self.lock.acquire()
        self.value = b""


class Locks(Contender):
    """Each caller waits for a lock of its own. The worker waits for all callers, and then releases all locks together.

    Callers in threads can hardly be served faster, because this does nothing else: it has no futures and no policy, and
    it handles no errors. With several workers, each waits for an equal share of the callers.
    """

    name = "locks"
    label = "raw locks, full batches"

    def __init__(self, processor: Processor, *, size: int, interval: float, workers: int) -> None:
        self._processor = processor
        self._size = size
        self._enough = self.enough(size, workers)
        self._longest_wait = 4 * interval  # at the end of a run, some callers no longer submit
        self._waiting: deque[_Waiter] = deque()
        self._signal = threading.Lock()  # released when a worker should look at the waiting callers
        self._signal.acquire()
        self._open = True
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def enough(self, size: int, workers: int) -> int:
        """Return how many callers a worker waits for."""
        return size // workers

    def submit(self, job: bytes) -> _Waiter:
        """See `Contender.submit`."""
        waiter = _Waiter(job)
        self._waiting.append(waiter)
        if len(self._waiting) >= self._enough:
            self._wake_a_worker()
        return waiter

    @staticmethod
    def result(waiter: _Waiter) -> bytes:
        """See `Contender.result`."""
        waiter.lock.acquire()
        return waiter.value

    def _wake_a_worker(self) -> None:
        if self._signal.locked():
            try:
                self._signal.release()
            except RuntimeError:
                pass  # another thread released it first

    def _work(self) -> None:
        while self._open:
            self._signal.acquire(timeout=self._longest_wait)
            batch: list[_Waiter] = []
            try:
                while len(batch) < self._size:
                    batch.append(self._waiting.popleft())
            except IndexError:
                pass
            if len(self._waiting) >= self._enough:
                self._wake_a_worker()
            if batch:
                for waiter, value in zip(batch, self._processor([waiter.job for waiter in batch])):
                    waiter.value = value
                    waiter.lock.release()

    def close(self) -> None:
        """See `Contender.close`."""
        self._open = False
        for worker in self._workers:
            worker.join()


class LocksNow(Locks):
    """The same, but a free worker takes the callers that are waiting at the moment, so they split into groups."""

    name = "locks-now"
    label = "raw locks, partial batches"

    def enough(self, size: int, workers: int) -> int:
        """See `Locks.enough`."""
        return 1
