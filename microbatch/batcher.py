"""`Batcher`: what users hold. It checks what it is given, and leaves the work to the worker."""

import functools
import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypedDict, TypeVar, overload

from microbatch._basics.arguments import (
    MOST_THREADS,
    check_callable,
    check_clock,
    check_count,
    check_executor,
    check_flag,
    check_name,
    check_number,
    check_timeout,
    shown,
)
from microbatch._basics.clock import NEVER, Clock, SystemClock
from microbatch._engine.worker import Stage, Worker
from microbatch.config import policy_from_env
from microbatch.errors import JobTooLarge
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import BatchListener, JobAccepted, ListenerSet, notify
from microbatch.policies import DEFAULT_POLICY
from microbatch.policies.base import BatchingPolicy, Window, check_policy, limit_for
from microbatch.results import BatcherStats, JobResult

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BatchProcessor", "Batcher", "BatcherOptions"]

_NEW, _RUNNING = Stage.NEW, Stage.RUNNING  # as globals they are found in a fraction of the time

Job = TypeVar("Job")
Value = TypeVar("Value")
Self = TypeVar("Self", bound="Batcher[Any, Any]")

BatchProcessor = Callable[[list[Job]], Iterable[Value] | None]
"""Takes the jobs of a batch and returns one value per job, in order; or None, where there is nothing to return."""


class BatcherOptions(TypedDict, total=False):
    """The keyword arguments of a `Batcher`, for functions that pass them on."""

    key: Callable[[Any], Hashable] | None
    weigh: Callable[[Any], float] | None
    max_pending: int
    max_workers: int
    executor: Executor | None
    listeners: Iterable[BatchListener]
    name: str
    exit_timeout: float | None
    clock: Clock | None


class Batcher(Generic[Job, Value]):
    """Turns many single jobs into few batches, and gives each caller the result of its own job.

    >>> with Batcher(lambda words: [word.upper() for word in words]) as batcher:
    ...     batcher.submit("ada").result().value
    'ADA'

    All methods may be called from any thread. Threads are started by the first `submit`. All times are in seconds.

    Args:
        processor: called with a list of jobs, in a worker thread; returns one value per job in order, as any iterable
            (each job is settled as its value is yielded), or None for all. A value that is an exception fails that job
            alone; an exception raised fails all jobs of the batch that have no result yet.
        policy: when a batch goes, and what fits into it.
        key: gives the hashable key of a job; jobs of unequal keys never share a batch. Keys are compared by `hash`
            and ``==``, as in a dict: ``1`` and ``True`` are the same key.
        weigh: gives the weight of a job, a number of at least 0, for policies that look at weights.
        max_pending: how many jobs may be accepted and not yet in a worker's hands; 0 for no bound.
        max_workers: how many batches may run at once. With 1, they run one after another, in order. Each takes a thread,
            so without an *executor* at most 10,000.
        executor: runs the processor instead of a thread pool of the batcher's own; never shut down by the batcher.
        listeners: are told what happens: see `microbatch.listeners`.
        name: what it is called in facts and logs, and what the threads are named after.
        exit_timeout: how many seconds the end of the interpreter may wait for jobs to be done; None for as long as it
            takes. Jobs that are left then fail with `BatcherClosed`.
        clock: tells the time, for tests: see `microbatch.testing.ManualClock`.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or the arguments can't work together.
    """

    @overload
    def __init__(
        self,
        processor: Callable[[list[Job]], Iterable[Value | BaseException]],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        *,
        key: Callable[[Job], Hashable] | None = None,
        weigh: Callable[[Job], float] | None = None,
        max_pending: int = 10_000,
        max_workers: int = 1,
        executor: Executor | None = None,
        listeners: Iterable[BatchListener] = (),
        name: str = "microbatch",
        exit_timeout: float | None = None,
        clock: Clock | None = None,
    ) -> None: ...

    # If the processor returns None.
    @overload
    def __init__(
        self: "Batcher[Job, None]",
        processor: Callable[[list[Job]], None],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        **options: "Unpack[BatcherOptions]",
    ) -> None: ...

    # If only that is known of it.
    @overload
    def __init__(
        self,
        processor: BatchProcessor[Job, Value],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        **options: "Unpack[BatcherOptions]",
    ) -> None: ...

    def __init__(
        self,
        processor: BatchProcessor[Any, Any],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        *,
        key: Callable[[Any], Hashable] | None = None,
        weigh: Callable[[Any], float] | None = None,
        max_pending: int = 10_000,
        max_workers: int = 1,
        executor: Executor | None = None,
        listeners: Iterable[BatchListener] = (),
        name: str = "microbatch",
        exit_timeout: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_callable("processor", processor)
        max_pending = check_count("max_pending", max_pending, 0)
        _check_policy(policy, max_pending)
        for argument, value, check in (
            ("key", key, check_callable),
            ("weigh", weigh, check_callable),
            ("executor", executor, check_executor),
            ("clock", clock, check_clock),
        ):
            if value is not None:
                check(argument, value)
        max_workers = check_count("max_workers", max_workers, most=MOST_THREADS if executor is None else NEVER)
        check_name("name", name)
        self._policy = policy
        self._key = key
        self._weigh = weigh
        self._name = name
        self._empty = Window[Any](workers=max_workers)
        self._clock = SystemClock() if clock is None else clock
        listener_set = ListenerSet(listeners)
        self._told_of_jobs = listener_set.job_accepted
        self._wants_context = listener_set.wants_context
        self._describes = key is not None or weigh is not None or listener_set.wants_context
        self._make_worker = functools.partial(
            Worker,
            processor,
            policy,
            max_pending=max_pending,
            max_workers=max_workers,
            executor=executor,
            listeners=listener_set,
            name=name,
            exit_timeout=check_timeout("exit_timeout", exit_timeout),
            clock=self._clock,
            keyed=key is not None,
            uniform=key is None and weigh is None,
        )
        self._newest_worker = self._make_worker()
        self._origin = _origin()

    @classmethod
    def from_env(
        cls,
        processor: BatchProcessor[Job, Value],
        *,
        environ: Mapping[str, str] = os.environ,
        prefix: str = "MICROBATCH_",
        **options: "Unpack[BatcherOptions]",
    ) -> "Batcher[Job, Value]":
        """Return a batcher whose policy is in the environment: see `microbatch.policy_from_env`.

        Args:
            processor: as for `Batcher`.
            environ: where the variables are looked up.
            prefix: what their names begin with.
            options: the other arguments of `Batcher`.
        """
        make: Any = cls  # whose overloads say what a processor may return
        batcher: Batcher[Job, Value] = make(processor, policy_from_env(environ, prefix), **options)
        return batcher

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> JobFuture[Value]:
        """Accept a job, and return the future of its `JobResult`.

        Blocks while *max_pending* jobs wait; but never in the batcher's own threads (in the processor, in a
        done-callback), where that could not end.

        Args:
            job: anything.
            timeout: how long to wait for room; None for as long as it takes, 0 for not at all.
            expires_in: how long the job may wait for a worker, from its acceptance on. If that runs out, it fails with
                `JobExpired` at that moment, and is never processed.

        Raises:
            BacklogFull: there was no room in time.
            BatcherClosed: the batcher is shut down.
            JobTooLarge: the job weighs more than the policy lets into any batch.
            Exception: whatever ``key`` or ``weigh`` raised. In each of these cases nothing was accepted.
        """
        if timeout is not None:
            timeout = check_number("timeout", timeout)
        if expires_in is not None:
            expires_in = check_timeout("expires_in", expires_in)
        worker = self._newest_worker
        if not worker.mark[0]:
            worker = self._worker
        future: JobFuture[Value] = JobFuture(job, worker.queue)
        if self._describes:
            self._describe(future)
        if worker.stage is not _RUNNING:
            self._start(worker)
        worker.queue.put(future, True, timeout, expires_in)
        if worker.stage is _NEW:  # their start, for which this call did not wait, has failed
            self._start(worker)
        if self._told_of_jobs:
            fact = JobAccepted(self._name, future)
            if worker.queue.is_held():  # by what this call interrupts: listeners are called without a lock
                worker.queue.post(functools.partial(notify, self._told_of_jobs, fact))
            else:
                notify(self._told_of_jobs, fact)
        return future

    def map(
        self, jobs: Iterable[Job], *, timeout: float | None = None, buffersize: int | None = None
    ) -> Iterator[JobResult[Value]]:
        """Submit *jobs* one after another and yield their results in the same order.

        Works ahead by at most *buffersize* jobs, so that *jobs* may be endless. Before it blocks, it makes what waits
        due, so that a last batch never waits for jobs that will not come. If a job fails, its exception is raised in
        its place. When the iterator is closed early, jobs that no worker has taken are cancelled.

        The first result comes when *buffersize* jobs have been submitted or *jobs* has ended. Where *jobs* is slow, such as
        a stream of messages, choose a small *buffersize*, or submit the jobs yourself and use ``as_completed``.

        Args:
            jobs: submitted as the results are asked for.
            timeout: seconds from this call until the last result; None for no limit.
            buffersize: how many jobs may be submitted and not yet yielded; None for 1,000.

        Raises:
            TimeoutError: a result is not there in time (`concurrent.futures.TimeoutError` on Python 3.10).
            RuntimeError: in one of the batcher's own threads, where that could not end.
        """
        size = 1_000 if buffersize is None else check_count("buffersize", buffersize)
        deadline = self._deadline(True, timeout)
        return self._map(_iterator(jobs), deadline, size)

    def flush(self, wait: bool = True, *, timeout: float | None = None) -> bool:
        """Make every job accepted before this call due now.

        Args:
            wait: block until those jobs, and not later ones, are settled.
            timeout: how many seconds to wait at most.

        Returns:
            False if *timeout* ran out, otherwise True.

        Raises:
            RuntimeError: with *wait*, in one of the batcher's own threads, where that could not end.
        """
        deadline = self._deadline(wait, timeout)
        worker = self._worker
        epoch = worker.queue.flush()
        return not wait or worker.ledger.wait_settled(epoch, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> bool:
        """Accept no more jobs, and make all that were accepted due now. May be called again.

        Args:
            wait: block until every job is settled, the shutdown callbacks have run and the threads are gone.
            cancel_futures: cancel the jobs that no worker has taken yet.
            timeout: how many seconds to wait at most; what is left goes on in the background.

        Returns:
            False if *timeout* ran out, otherwise True.

        Raises:
            RuntimeError: with *wait*, in one of the batcher's own threads, where that could not end.
        """
        deadline = self._deadline(wait, timeout)
        check_flag("cancel_futures", cancel_futures)
        worker = self._worker
        worker.close()
        if worker.finalizer is not None:  # which would keep what the processor refers to, and that may be this batcher
            worker.finalizer.detach()
        if cancel_futures:
            for future in worker.ledger.unsettled():
                future.cancel()
        return not wait or worker.wait_ended(deadline)

    def stats(self) -> BatcherStats:
        """Return what the batcher has done until now. Never blocks."""
        return self._worker.ledger.stats()

    def explain(self) -> str:
        """Return in a few lines what the batcher does now: what is open, when it is due, by which policy, what it waits for.

        For people, who may print it where something seems to hang: it waits for no other thread. What moves while it
        looks may be seen where it was or where it goes. It asks the policy, in the calling thread.
        """
        worker, stats = self._worker, self.stats()
        triggers = ", ".join(f"{trigger} {count:,}" for trigger, count in sorted(stats.triggers.items()))
        return "\n".join(
            [
                repr(self) + (", shut down" if worker.queue.closed else ""),
                f"jobs: {stats.queued:,} queued, {stats.batched:,} batched, {stats.running:,} running of {stats.accepted:,}"
                f"; the oldest has waited for {stats.oldest:.3f} s",
                *worker.explain(),
                f"batches: {stats.batches:,}" + (f" ({triggers})" if triggers else ""),
            ]
        )

    def add_shutdown_callback(self, callback: Callable[[], object]) -> None:
        """Have *callback* called once, without arguments, after the last job is settled; at once if that is over.

        The callbacks run in the order in which they were added, in the worker thread (if no job was ever submitted, in
        the thread that shuts down). An exception in one is logged.
        """
        check_callable("callback", callback)
        self._worker.add_shutdown_callback(callback)

    @property
    def name(self) -> str:
        """What the batcher, and its threads, are called."""
        return self._name

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down and wait, after an exception in the block too."""
        self.shutdown()

    def __repr__(self) -> str:
        return f"<Batcher {self._name!r} with {self._policy!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Batcher has threads, and can't be copied or pickled")

    @property
    def _worker(self) -> Worker:
        worker = self._newest_worker
        if not worker.mark[0]:
            worker = self._newest_worker = self._successor_in_child(worker)
        return worker

    def _start(self, worker: Worker) -> None:
        try:
            worker.start()
        finally:  # after a signal too: the threads may run all the same
            with worker.queue.mutex:
                if worker.stage is not _NEW and worker.finalizer is None and not worker.queue.closed:
                    worker.finalizer = weakref.finalize(self, _drain_unclosed, worker, self._name, self._origin)
                    worker.finalizer.atexit = False  # the worker has an exit hook of its own

    def _successor_in_child(self, parents: Worker) -> Worker:
        """Return the worker that replaces, in a forked child, the one that stayed in the parent.

        It is made when the batcher is first used here. This takes no lock of the parent's worker, since a thread that
        does not exist here may have held it.
        """
        if parents.finalizer is not None:
            parents.finalizer.detach()
        if parents.queue.closed:  # listeners hear of its shutdown in the parent, not here too
            worker = self._make_worker(forked=True, listeners=ListenerSet(()))
            worker.close()
        else:
            worker = self._make_worker(forked=True)
        successor: Worker = vars(parents).setdefault(
            "successor", worker
        )  # in one step: another thread may come here too
        return successor

    def _map(self, jobs: Iterator[Job], deadline: float, size: int) -> Iterator[JobResult[Value]]:
        ahead: deque[JobFuture[Value]] = deque()
        try:
            for job in jobs:
                if len(ahead) == size:
                    yield self._next_of(ahead, deadline)
                ahead.append(self.submit(job, timeout=self._remaining(deadline)))
            for _ in tuple(ahead):
                yield self._next_of(ahead, deadline)
        finally:
            for future in ahead:
                future.cancel()
                future.add_done_callback(_ask)  # for it is known that nobody else will

    def _next_of(self, ahead: deque[JobFuture[Value]], deadline: float) -> JobResult[Value]:
        if not ahead[0].done():
            self._refuse_own_thread()
            if (
                ahead[0]._is_waiting and ahead[0]._epoch == self._worker.queue.epoch
            ):  # once for all jobs that are ahead now
                self.flush(wait=False)
        result = ahead[0].result(self._remaining(deadline))
        ahead.popleft()
        return result

    def _remaining(self, deadline: float) -> float | None:
        remaining = max(0.0, deadline - self._clock.now())
        return remaining if remaining < threading.TIMEOUT_MAX else None

    def _describe(self, future: JobFuture[Any]) -> None:
        try:
            if self._key is not None:
                future.key = self._hashable(self._key(future.job))
            if self._weigh is not None:
                future.weight = self._weight(self._weigh(future.job))
        except StopIteration as error:  # which would end an iteration of the caller: see PEP 479
            raise RuntimeError("key or weigh raised StopIteration") from error
        if self._wants_context:
            future._keep_context()

    def _hashable(self, key: Hashable) -> Hashable:
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"the key of a job must be hashable: {error}") from error
        return key

    def _weight(self, weight: float) -> float:
        weight = check_number("the weight of a job", weight, below=NEVER)
        if not self._policy.fits(self._empty, weight):
            raise JobTooLarge(weight, limit_for(self._policy, self._empty, weight))
        return weight

    def _deadline(self, wait: bool, timeout: float | None) -> float:
        check_flag("wait", wait)
        deadline = self._clock.now() + check_timeout("timeout", timeout)
        if wait:
            self._refuse_own_thread()
        return deadline

    def _refuse_own_thread(self) -> None:
        if self._worker.queue.is_own_thread():
            raise RuntimeError("a thread of the batcher can't wait for the batcher: use wait=False")


def _drain_unclosed(worker: Worker, name: str, origin: str) -> None:
    if worker.queue.closed or not worker.mark[0]:
        return  # it was shut down, or is the parent's to drain
    worker.close()  # first, since a warning may be an error
    warnings.warn(f"batcher {name!r}, made at {origin}, was never shut down", ResourceWarning)


def _ask(future: JobFuture[Any]) -> None:
    """Do nothing, as a done-callback: a future that has one counts as asked for its outcome."""


def _origin() -> str:
    """Return the place that the call came from, outside this package and, for ``Batcher[str, int](...)``, `typing`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and f'{frame.f_globals.get("__name__")}.'.startswith(("microbatch.", "typing.")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown place"


def _iterator(jobs: Any) -> Iterator[Any]:
    try:
        return iter(jobs)
    except TypeError:
        raise TypeError(f"jobs must be iterable, got {shown(jobs)}") from None


def _check_policy(policy: Any, max_pending: int) -> None:
    check_policy("policy", policy)
    if 0 < max_pending < policy.hints.needs:
        raise ValueError(f"policy must be able to send within max_pending={max_pending}, got {shown(policy)}")
