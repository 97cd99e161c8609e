"""The public class `Batcher`. It checks arguments, and leaves the work to `Engine`."""

import itertools
import logging
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
from microbatch._basics.log import report
from microbatch._engine.engine import Engine, Stage
from microbatch._engine.process import started_engines
from microbatch._engine.settings import Settings
from microbatch.errors import JobTooLarge, MicrobatchError
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import BatchListener, JobAccepted, ListenerSet, notify
from microbatch.policies import DEFAULT_POLICY
from microbatch.policies.base import BatchingPolicy, Window, bypassed, check_policy, limit_for
from microbatch.results import BatcherStats, JobResult, ResultAt

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["BatchProcessor", "Batcher", "BatcherOptions", "UnnamedOptions"]

_NEW, _RUNNING = Stage.NEW, Stage.RUNNING  # globals, because looking up a member of an enum takes much longer

_numbers = itertools.count()  # for the batchers of this process, in the order of their creation
_collected: deque[tuple[int, str]] = deque(maxlen=100)  # the last batchers that were collected without a shutdown

Job = TypeVar("Job")
Value = TypeVar("Value")

BatchProcessor = Callable[[list[Job]], Iterable[Value] | None]
"""A function that takes the jobs of a batch and returns one value per job, in order, or None if there are no values."""


class UnnamedOptions(TypedDict, total=False):
    """The keyword arguments of `Batcher`, except *name*."""

    key: Callable[[Any], Hashable] | None
    weigh: Callable[[Any], float] | None
    max_pending: int
    max_pending_weight: float
    max_pending_per_key: int
    drop_oldest: bool
    max_workers: int
    executor: Executor | None
    listeners: Iterable[BatchListener]
    exit_timeout: float | None
    clock: Clock | None


class BatcherOptions(UnnamedOptions, total=False):
    """The keyword arguments of `Batcher`. Use it to annotate a function that passes them on."""

    name: str


class Batcher(Generic[Job, Value]):
    """A queue that collects single jobs into batches, and gives each caller the result of its own job.

    >>> with Batcher(lambda words: [word.upper() for word in words]) as batcher:
    ...     batcher.submit("ada").result().value
    'ADA'

    You may call all methods from any thread. The first `submit` starts the threads of the batcher. If the system can't
    start them, the accepted jobs fail with `RuntimeError`. All times are in seconds.

    Args:
        processor: A function that takes a list of jobs and returns one value per job, in order. A worker thread calls
            it for each batch. It may return any iterable, and each job is settled when its value is yielded. If it
            returns None, the value of each job is None. If a value is an exception, that job fails with it. If the
            processor raises an exception, all jobs of the batch that have no outcome yet fail with it.
        policy: Decides when a batch is dispatched, and which jobs fit into it.
        key: A function that returns the key of a job, which must be hashable. Jobs whose keys differ never share a
            batch. Keys are compared by `hash` and ``==``, as in a dict, so ``1`` and ``True`` are the same key.
        weigh: A function that returns the weight of a job: a number of at least 0. Use it with a policy that limits
            weights. Without it, each job weighs 1.
        max_pending: The maximum number of jobs that wait for a worker. While that many jobs wait, `submit` blocks. This
            puts back-pressure on the callers. 0 means no limit.
        max_pending_weight: The maximum total weight of the jobs that wait for a worker, which limits the memory that
            they take up. It needs a *weigh* function. While a job does not fit, `submit` blocks. 0 means no limit.
        max_pending_per_key: The maximum number of jobs of the same key that wait for a worker. It needs a *key*
            function. While that many wait, `submit` blocks only for jobs of that key. 0 means no limit.
        drop_oldest: If True, `submit` never blocks. While a limit on the waiting jobs is exceeded, the oldest of these
            jobs fail with `JobDropped`. Use it for data that loses its value quickly, such as telemetry.
        max_workers: The maximum number of batches that run at the same time. With 1, batches run one after another, in
            the order in which they are dispatched. Without an *executor*, each worker is a thread, and *max_workers*
            can be at most 10,000.
        executor: Runs the processor instead of the batcher's own thread pool. The batcher never shuts it down.
        listeners: Objects that receive events from the batcher: see `microbatch.listeners`.
        name: The name of the batcher in events, logs and the names of its threads.
        exit_timeout: The maximum number of seconds that the interpreter waits at exit for pending jobs. None means no
            limit. Jobs that are not settled by then fail with `BatcherClosed`.
        clock: Replaces the system clock in tests: see `microbatch.testing.ManualClock`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, a limit needs a function that is missing, or the policy waits for more
            jobs than *max_pending* or *max_pending_per_key* allows.
    """

    # For a processor whose results come out of order.
    @overload
    def __init__(
        self,
        processor: Callable[[list[Job]], Iterable[ResultAt[Value]]],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        **options: "Unpack[BatcherOptions]",
    ) -> None: ...

    @overload
    def __init__(
        self,
        processor: Callable[[list[Job]], Iterable[Value | BaseException]],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        *,
        key: Callable[[Job], Hashable] | None = None,
        weigh: Callable[[Job], float] | None = None,
        max_pending: int = 10_000,
        max_pending_weight: float = 0,
        max_pending_per_key: int = 0,
        drop_oldest: bool = False,
        max_workers: int = 1,
        executor: Executor | None = None,
        listeners: Iterable[BatchListener] = (),
        name: str = "microbatch",
        exit_timeout: float | None = None,
        clock: Clock | None = None,
    ) -> None: ...

    # For a processor that returns None.
    @overload
    def __init__(
        self: "Batcher[Job, None]",
        processor: Callable[[list[Job]], None],
        policy: BatchingPolicy[Any] = DEFAULT_POLICY,
        **options: "Unpack[BatcherOptions]",
    ) -> None: ...

    # For a processor that is annotated as a `BatchProcessor`, so it may return values or None.
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
        max_pending_weight: float = 0,
        max_pending_per_key: int = 0,
        drop_oldest: bool = False,
        max_workers: int = 1,
        executor: Executor | None = None,
        listeners: Iterable[BatchListener] = (),
        name: str = "microbatch",
        exit_timeout: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_callable("processor", processor)
        max_pending = check_count("max_pending", max_pending, 0)
        max_pending_per_key = check_count("max_pending_per_key", max_pending_per_key, 0)
        _check_policy(policy, max_pending=max_pending, max_pending_per_key=max_pending_per_key)
        for argument, value, check in (
            ("key", key, check_callable),
            ("weigh", weigh, check_callable),
            ("executor", executor, check_executor),
            ("clock", clock, check_clock),
        ):
            if value is not None:
                check(argument, value)
        check_name("name", name)
        check_flag("drop_oldest", drop_oldest)
        max_pending_weight = check_number("max_pending_weight", max_pending_weight)
        if max_pending_per_key and key is None:
            raise ValueError("max_pending_per_key needs a key function")
        if max_pending_weight and weigh is None:
            raise ValueError("max_pending_weight needs a weigh function")
        self._settings = settings = Settings(
            processor,
            policy._own(),
            max_pending=max_pending,
            max_pending_weight=max_pending_weight,
            max_pending_per_key=max_pending_per_key,
            drop_oldest=drop_oldest,
            max_workers=check_count("max_workers", max_workers, most=MOST_THREADS if executor is None else NEVER),
            executor=executor,
            listeners=ListenerSet(listeners),
            name=name,
            exit_timeout=check_timeout("exit_timeout", exit_timeout),
            clock=SystemClock() if clock is None else clock,
            keyed=key is not None,
            uniform=key is None and weigh is None,
        )
        self._key = key
        self._weigh = weigh
        self._empty = Window[Any](workers=settings.max_workers)
        self._clock = settings.clock
        self._acceptance_listeners = settings.listeners.job_accepted
        self._needs_attributes = not settings.uniform or settings.listeners.wants_context
        self._newest_engine = Engine(settings)
        self._number = next_number()
        self._description = f"batcher {name!r}, created at {_origin()}"

    @classmethod
    def from_env(
        cls,
        processor: BatchProcessor[Job, Value],
        *,
        environ: Mapping[str, str] = os.environ,
        prefix: str = "MICROBATCH_",
        **options: "Unpack[BatcherOptions]",
    ) -> "Batcher[Job, Value]":
        """Return a batcher with the policy that environment variables describe: see `microbatch.policy_from_env`.

        Args:
            processor: See `Batcher`.
            environ: The mapping that holds the variables.
            prefix: The common beginning of their names.
            options: The keyword arguments of `Batcher`.
        """
        from microbatch.config import policy_from_env  # few programs need it

        make: Any = cls  # untyped, because the overloads of `__init__` depend on what the processor returns
        batcher: Batcher[Job, Value] = make(processor, policy_from_env(environ, prefix), **options)
        return batcher

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> JobFuture[Value]:
        """Queue a job, and return the future of its `JobResult`.

        Blocks while the queue is full, that is, while *max_pending* jobs wait for a worker or another limit on the
        waiting jobs is reached. With *drop_oldest*, it never blocks. In the batcher's own threads, for example in the
        processor or in a done-callback, blocking could cause a deadlock. There, it raises `BacklogFull` immediately if
        the queue is full.

        If this method raises one of the exceptions below, there is no future, and the job is never processed.

        Args:
            job: Any object.
            timeout: How many seconds to block while the queue is full. None means no limit, and 0 means not to block.
            expires_in: How many seconds the job may wait for a worker after it was accepted. If no worker has taken it
                by then, it fails with `JobExpired` and is never processed. None means no limit.

        Raises:
            BacklogFull: The queue was still full after *timeout* seconds.
            BatcherClosed: The batcher is shut down.
            JobTooLarge: The batcher has a *weigh* function, and the job is too heavy for any batch of the policy, or
                for *max_pending_weight*.
            ForkedError: This process is a forked child, and the *executor* belongs to its parent.
            Exception: Whatever *key* or *weigh* raises.
        """
        if timeout is not None:
            timeout = check_number("timeout", timeout)
        if expires_in is not None:
            expires_in = check_timeout("expires_in", expires_in)
        engine = self._newest_engine
        if not engine.same_process[0]:
            engine = self._engine
        future: JobFuture[Value] = JobFuture(job, engine.queue)
        if self._needs_attributes:
            self._set_attributes(future)
        self._accept(engine, future, timeout, expires_in)
        return future

    def _accept(self, engine: Engine, future: JobFuture[Any], timeout: float | None, expires_in: float | None) -> None:
        if engine.stage is _RUNNING:
            engine.queue.put(future, True, timeout, expires_in)
        else:
            self._start(engine)
            engine.queue.put(future, True, timeout, expires_in)
            if engine.stage is _NEW:  # another thread's start may have failed before it saw this job
                try:
                    self._start(engine)
                except RuntimeError as error:  # the future gets the error, unless yet another start succeeds
                    if not (isinstance(error, MicrobatchError) or "new thread" in str(error)):
                        raise  # it comes from a signal handler
        if self._acceptance_listeners:
            event = JobAccepted(self.name, future)
            notify(self._acceptance_listeners, event)

    # These three are for `microbatch.aio`. A `Coalescer` has them too.

    def _accepted_now(self, job: Job, expires_in: float | None) -> JobFuture[Value] | None:
        return None

    def _waiting_job(self, job: Job) -> JobFuture[Value]:
        future: JobFuture[Value] = JobFuture(job, self._engine.queue)
        self._set_attributes(future)
        return future

    def _accept_waiting(self, future: JobFuture[Value], expires_in: float | None) -> JobFuture[Value]:
        self._accept(self._engine, future, 0, expires_in)
        return future

    def map(
        self, jobs: Iterable[Job], *, timeout: float | None = None, buffersize: int | None = None
    ) -> Iterator[JobResult[Value]]:
        """Submit *jobs* one after another, and yield their results in the same order.

        At most *buffersize* jobs are submitted ahead of the results, so *jobs* may be endless. Before the iterator
        blocks on a result, it flushes the batcher, so the last batch never waits for jobs that will not come. If a job
        fails, the iterator raises its exception and ends. When the iterator ends early, it cancels the jobs that no
        worker has taken.

        The first result arrives when *buffersize* jobs have been submitted or *jobs* has ended. If *jobs* is slow, such
        as a stream of messages, choose a small *buffersize*, or submit the jobs yourself and use ``as_completed``.

        Args:
            jobs: The jobs. They are submitted while you iterate over the results.
            timeout: The maximum number of seconds from this call to the last result. None means no limit.
            buffersize: The maximum number of jobs that are submitted and whose results are not yielded yet. None means
                1,000.

        Raises:
            TimeoutError: A result was not available in time (`concurrent.futures.TimeoutError` on Python 3.10).
            BacklogFull: The queue was full until the *timeout* ran out.
            RuntimeError: One of the batcher's own threads calls this, and waiting there could cause a deadlock.
        """
        size = 1_000 if buffersize is None else check_count("buffersize", buffersize)
        deadline = self._deadline(True, timeout)
        return self._map(_iterator(jobs), deadline, size)

    def flush(self, wait: bool = True, *, timeout: float | None = None) -> bool:
        """Make all jobs that were accepted before this call due now.

        A due batch is still dispatched only when a worker is free. The policies `Rate`, `PerKey` and `Congestion`
        can delay it too.

        Args:
            wait: Whether to block until these jobs are settled. Later jobs are not waited for.
            timeout: The maximum number of seconds to block. None means no limit.

        Returns:
            False if *timeout* ran out, otherwise True.

        Raises:
            RuntimeError: *wait* is true in one of the batcher's own threads, where waiting could cause a deadlock.
        """
        deadline = self._deadline(wait, timeout)
        engine = self._engine
        futures = engine.ledger.unsettled() if wait else []  # now, because later jobs are not waited for
        engine.queue.flush()
        return not wait or engine.ledger.wait_settled(futures, deadline)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> bool:
        """Accept no more jobs, run the pending ones, and stop the threads: a graceful shutdown.

        All pending jobs become due now, even if the policy limits the rate of batches. You may call this several times.

        Args:
            wait: Whether to block until all jobs are settled, the shutdown callbacks have returned and the threads have
                ended.
            cancel_futures: Whether to cancel the jobs that no worker has taken yet.
            timeout: The maximum number of seconds to block. None means no limit. After that time, the shutdown
                continues in the background.

        Returns:
            False if *timeout* ran out, otherwise True.

        Raises:
            RuntimeError: *wait* is true in one of the batcher's own threads, where waiting could cause a deadlock.
        """
        deadline = self._deadline(wait, timeout)
        check_flag("cancel_futures", cancel_futures)
        engine = self._engine
        engine.close()
        # The finalizer refers to the engine, and so to the processor, which may refer to this batcher. It is not needed
        # any more, and would keep all of them alive.
        if engine.finalizer is not None:
            engine.finalizer.detach()
        if cancel_futures:
            for future in engine.ledger.unsettled():
                future.cancel()
        return not wait or engine.wait_ended(deadline)

    def stats(self) -> BatcherStats:
        """Return the number of jobs in each state and the number of batches, all from the same moment.

        Does not wait for any job or batch.
        """
        return self._engine.ledger.stats()

    def explain(self) -> str:
        """Describe in a few lines what the batcher is doing: its open batches, when they are due, and why they wait.

        The text is meant for people. Print it when a program seems to hang: this method does not wait for jobs or
        batches. If a job moves in the meantime, the text may show it in its old place or in its new one. The method
        calls `BatchingPolicy.due` and `BatchingPolicy.reason` in the calling thread.
        """
        engine, stats = self._engine, self.stats()
        triggers = ", ".join(f"{trigger} {count:,}" for trigger, count in sorted(stats.triggers.items()))
        return "\n".join(
            [
                repr(self) + (", shut down" if engine.queue.closed else ""),
                f"jobs: {stats.queued:,} queued, {stats.batched:,} batched, {stats.running:,} running of {stats.accepted:,}"
                f"; the oldest has waited for {stats.oldest:.3f} s",
                *engine.explain(),
                f"batches: {stats.batches:,}" + (f" ({triggers})" if triggers else ""),
            ]
        )

    def add_shutdown_callback(self, callback: Callable[[], object]) -> None:
        """Call *callback* once, without arguments, when the batcher has been shut down and its last job is settled.

        If that has happened already, the callback is called immediately. Callbacks run in the order in which they were
        added, in the batcher thread. If no job was ever submitted, they run in the thread that calls `shutdown`. An
        exception in a callback is logged.
        """
        check_callable("callback", callback)
        self._engine.add_shutdown_callback(callback)

    @property
    def name(self) -> str:
        """The name of the batcher. The names of its threads begin with it."""
        return self._settings.name

    @property
    def policy(self) -> BatchingPolicy[Any]:
        """The policy. You may assign another one at any time, in any thread.

        The batcher switches to the new policy soon after the assignment, between two decisions. From then on, the new
        policy decides about all waiting jobs, including those in open batches. Batches that were dispatched before
        don't change. A waiting job that fits into no batch of the new policy fails with `JobTooLarge`. An assignment
        never blocks, and raises the same exceptions as the constructor.

        A policy that learns is copied when you assign it, and the copy starts with what the original has learned.
        """
        return self._engine.policy

    @policy.setter
    def policy(self, policy: BatchingPolicy[Any]) -> None:
        settings = self._settings
        _check_policy(policy, max_pending=settings.max_pending, max_pending_per_key=settings.max_pending_per_key)
        self._engine.policy = policy._own()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down and wait, even if the block raised an exception."""
        self.shutdown(wait=False)  # even if this thread must not wait
        self.shutdown()

    def __repr__(self) -> str:
        return f"<Batcher {self.name!r} with {self.policy!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Batcher can't be copied or pickled, because it has threads")

    @property
    def _engine(self) -> Engine:
        engine = self._newest_engine
        if not engine.same_process[0]:
            engine = self._newest_engine = self._successor_in_child(engine)
        return engine

    def _start(self, engine: Engine) -> None:
        try:
            engine.start()
        finally:  # after a signal too, because the threads may run nevertheless
            if engine.finalizer is None and engine.is_claimed and not engine.queue.closed:
                made = weakref.finalize(self, _drain_unclosed, engine, self._number, self._description)
                made.atexit = False  # the engine has an exit hook of its own
                if vars(engine).setdefault("finalizer", made) is not made:
                    made.detach()  # another thread has made one since the check
                if engine.queue.closed:  # by a thread that found no finalizer to detach
                    engine.finalizer.detach()  # type: ignore[unreachable]

    def _successor_in_child(self, parents: Engine) -> Engine:
        """Return the engine of a forked child, which replaces the engine of the parent process.

        The child creates it when it first uses the batcher. This takes no lock of the parent's engine, because a thread
        that does not exist in the child may have held it at the fork.
        """
        if parents.finalizer is not None:
            parents.finalizer.detach()
        settings = self._settings._replace(policy=parents.policy)
        if parents.queue.closed:  # listeners receive the event of its shutdown in the parent, and not here again
            engine = Engine(settings._replace(listeners=ListenerSet(())), forked=True)
            engine.close()
        else:
            engine = Engine(settings, forked=True)
        # In one step, because another thread may do the same.
        successor: Engine = vars(parents).setdefault("successor", engine)
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
                # No caller will ever ask for this outcome. Without a callback, a failure would be logged.
                future.add_done_callback(_ignore)

    def _next_of(self, ahead: deque[JobFuture[Value]], deadline: float) -> JobResult[Value]:
        if not ahead[0].done():
            self._refuse_own_thread()
            self._flush_for(ahead[0])
        result = ahead[0].result(self._remaining(deadline))
        ahead.popleft()
        return result

    def _flush_for(self, future: JobFuture[Any]) -> None:
        """Flush if a job waits that no flush has made due yet. One flush is enough for all jobs submitted so far."""
        if future._is_waiting and future._epoch == self._engine.queue.epoch:
            self.flush(wait=False)

    def _remaining(self, deadline: float) -> float | None:
        remaining = max(0.0, deadline - self._clock.now())
        return remaining if remaining < threading.TIMEOUT_MAX else None

    def _set_attributes(self, future: JobFuture[Any]) -> None:
        try:
            if self._key is not None:
                future.key = self._hashable(self._key(future.job))
            if self._weigh is not None:
                future.weight = self._weight(self._weigh(future.job))
        except StopIteration as error:  # it could silently end a loop of the caller, such as one over `map(...)`
            raise RuntimeError("key or weigh raised StopIteration") from error
        if self._settings.listeners.wants_context:
            future._keep_context()

    def _hashable(self, key: Hashable) -> Hashable:
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"the key of a job must be hashable: {error}") from error
        return key

    def _weight(self, weight: float) -> float:
        weight = check_number("the weight of a job", weight, below=NEVER)
        policy = self.policy
        if not policy.fits(self._empty, weight):
            raise JobTooLarge(weight, limit_for(policy, self._empty, weight))
        return weight

    def _deadline(self, wait: bool, timeout: float | None) -> float:
        check_flag("wait", wait)
        deadline = self._clock.now() + check_timeout("timeout", timeout)
        if wait:
            self._refuse_own_thread()
        return deadline

    def _refuse_own_thread(self) -> None:
        here = self._engine.queue.this_thread
        if here.must_not_wait() and not here.is_own:
            raise RuntimeError("the batcher needs the event loop of this thread: call this with asyncio.to_thread")
        if here.is_own:
            raise RuntimeError("a thread of the batcher can't wait for the batcher: use wait=False")


def next_number() -> int:
    """Return a number that is higher than those of all batchers so far, and lower than those of all later ones."""
    return next(_numbers)


def left_open(since: int) -> list[str]:
    """Describe the batchers whose threads were started and that were never shut down, in the order of their creation.

    A batcher that was garbage-collected without a shutdown counts too, although its collection shut it down. It is
    forgotten when 100 others have been collected like that.

    Args:
        since: The lowest number of a batcher, as from `next_number`. Older batchers do not count.
    """
    found: dict[int, str] = {}
    for engine in started_engines():
        call = engine.finalizer and engine.finalizer.peek()
        if call and not engine.queue.closed:
            _, _, (_, number, description), _ = call
            found[number] = description
    found.update(_collected.copy())  # L6; and last, because one of the others may have been collected since
    return [description for number, description in sorted(found.items()) if number >= since]


def _drain_unclosed(engine: Engine, number: int, description: str) -> None:
    if engine.queue.closed or not engine.same_process[0]:
        return  # it was shut down, or the parent process drains it
    _collected.append((number, description))
    engine.close()  # before the warning, because a filter may turn the warning into an exception
    warnings.warn(
        f"{description}, was never shut down: call shutdown(), or use a with statement",
        ResourceWarning,
    )


def _ignore(future: JobFuture[Any]) -> None:
    """Do nothing. A done-callback counts as asking for the outcome."""


def _origin() -> str:
    """Return the file and line of the nearest caller outside this package.

    Skips `typing` too, which makes the call for ``Batcher[str, int](...)``.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and f'{frame.f_globals.get("__name__")}.'.startswith(("microbatch.", "typing.")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown place"


def _iterator(jobs: Any) -> Iterator[Any]:
    try:
        return iter(jobs)
    except TypeError:
        raise TypeError(f"jobs must be iterable, got {shown(jobs)}") from None


def _check_policy(policy: Any, **limits: int) -> None:
    check_policy("policy", policy)
    for name, limit in limits.items():
        if 0 < limit < policy.hints.needs:
            raise ValueError(
                f"policy must be able to dispatch a batch of at most {name}={limit} jobs, got {shown(policy)}"
            )
    for part in sorted(bypassed(policy)):
        report(
            "%s does not limit all batches of %r: combine it with &, and put what contains | in parentheses, as in "
            "(a | b) & %s(...)",
            *(part, policy, part),
            level=logging.WARNING,
        )
