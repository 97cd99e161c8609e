"""Running batches: the threads that call the processor, and what becomes of a batch when it is over."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import thread as _pool_internals
from functools import partial
from queue import SimpleQueue
from typing import Any

from microbatch._basics.clock import NOW
from microbatch._basics.log import report
from microbatch._engine.batch_run import BatchRun, fail_all
from microbatch._engine.dispatcher import Dispatcher
from microbatch._engine.sending import name_unsendable, send
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import BatchFinished, BatchStarted, ListenerSet, notify
from microbatch.results import BatchInfo, JobState

__all__ = ["ExecutorRunner", "PoolRunner", "Runner"]

_MOST_INTERRUPTIONS = 3
"""How many exceptions may come in from outside in a row, with nothing done between them."""


class Runner(ABC):
    """Runs batches, and tells the dispatcher when one is over."""

    def __init__(
        self, dispatcher: Dispatcher, processor: Callable[[list[Any]], Any], listeners: ListenerSet, name: str
    ) -> None:
        self._dispatcher = dispatcher
        self._ledger = dispatcher.ledger
        self._queue = dispatcher.queue
        self._processor = processor
        self._listeners = listeners
        self._name = name

    def open(self) -> None:
        """Start all threads that it needs."""

    def close(self) -> None:
        """Let these threads end, and wait for that. Can be called again after an exception."""

    def disown_threads(self) -> None:
        """Have the interpreter end without waiting for these threads."""

    @abstractmethod
    def run(self, batch_run: BatchRun) -> None:
        """Have a batch run in another thread. Called by the thread that leads."""

    @abstractmethod
    def _run_again(self, batch_run: BatchRun) -> None:
        """Do so once more, since an exception may have kept a batch from the thread that was to run it."""

    @abstractmethod
    def _pass_on(self, note: Callable[[], None]) -> None:
        """Have *note* called by the thread that leads."""

    def survive(self, act: Callable[[], None]) -> bool:
        """Call *act*, recover if an exception interrupts it, even if another interrupts that; return whether none did."""
        try:
            try:
                act()
                return True
            except BaseException as error:
                self.recover(error)
        except BaseException as error:
            self.recover(error)
        return False

    def recover(self, error: BaseException) -> None:
        """Put right what an exception has interrupted in the calling thread.

        Exceptions from users' code don't get here: they are handled where that code is called. But a library that
        enforces a timeout may raise one in this thread from outside, too late, between any two of our statements. The
        jobs that the thread was handling fail, and everything else goes on. Any half-done state is put right from what
        changes in one step: `Ledger.inherited` has each job that is not settled, `Dispatcher.running` each batch, and
        `JobQueue.leader` says who leads.
        """
        report(
            "an exception from outside interrupted a thread of %s; the jobs it was handling fail",
            self._name,
            error=error,
        )
        self._dispatcher.interruptions += 1
        if self._dispatcher.interruptions > _MOST_INTERRUPTIONS:  # so it comes from inside
            raise error
        for batch_run in list(self._dispatcher.running):
            if batch_run.owner == threading.get_ident():
                fail_all(self._ledger, batch_run.futures, error)
                batch_run.forget()  # only now, since another exception may interrupt this
            elif not batch_run.owner:
                self._run_again(batch_run)
        if self._queue.is_leader():
            self._dispatcher.recover(error)
        for batch_run in list(self._dispatcher.running):
            if not batch_run.futures:
                self._queue.post(partial(self._dispatcher.finish, batch_run))
        self._ledger.tell_again()

    def _begin(self, batch_run: BatchRun) -> None:
        if self._listeners.batch_started:
            notify(self._listeners.batch_started, BatchStarted(self._name, batch_run.info, tuple(batch_run.futures)))
        batch_run.start()

    def _report(self, batch_run: BatchRun) -> None:
        futures = batch_run.forget()
        if not futures:
            return  # an executor that calls back twice
        time = None
        try:
            time = batch_run.service_time
            if self._listeners.batch_finished:
                self._tell_of_end(batch_run.info, time, batch_run.started, futures)
        except BaseException:  # of a clock that a user injected: the worker is free all the same
            report("batch %d of %s can't be reported to the policy", batch_run.info.id, self._name)
        self._pass_on(partial(self._dispatcher.finish, batch_run, time))

    def _tell_of_end(self, info: BatchInfo, time: float, started: float, futures: list[JobFuture[Any]]) -> None:
        failed = [future._stage for future in futures].count(JobState.FAILED)  # by whomever: not only by the processor
        notify(self._listeners.batch_finished, BatchFinished(self._name, info, tuple(futures), started, time, failed))


class PoolRunner(Runner):
    """Runs batches on a thread pool of its own."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        processor: Callable[[list[Any]], Any],
        listeners: ListenerSet,
        name: str,
        workers: int,
    ) -> None:
        super().__init__(dispatcher, processor, listeners, name)
        self._workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._inbox = _Inbox()

    def open(self) -> None:
        """Start all threads of a pool of our own. They are daemons if the thread that starts them is one."""
        self._pool, self._inbox = ThreadPoolExecutor(self._workers, self._name), _Inbox()
        try:
            for _ in range(self._workers):
                self._employ(self._pool, self._inbox)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `Runner.close`."""
        if self._pool is not None:
            self._inbox.closed = True
            for _ in range(self._workers):
                self._inbox.put(None)
            self._pool.shutdown()

    def disown_threads(self) -> None:
        """See `Runner.disown_threads`."""
        if self._pool is not None:
            for thread in self._pool._threads:
                _pool_internals._threads_queues.pop(thread, None)  # type: ignore[attr-defined]

    def run(self, batch_run: BatchRun) -> None:
        """See `Runner.run`."""
        batch_run.sent = True
        self._inbox.put(batch_run)

    def _run_again(self, batch_run: BatchRun) -> None:
        self.run(batch_run)  # the thread may have taken it out, or not; that it is there twice does no harm

    def _pass_on(self, note: Callable[[], None]) -> None:
        self._dispatcher.lead(self.run, note)

    def _employ(self, pool: ThreadPoolExecutor, inbox: "_Inbox") -> None:
        pool.submit(self._serve_all, inbox).add_done_callback(partial(self._go_on, pool, inbox))

    def _go_on(self, pool: ThreadPoolExecutor, inbox: "_Inbox", done: "Future[None]") -> None:
        """Have the calling thread resume its work after an exception ended it, wherever that came in."""
        error = done.exception()
        del done
        if error is None:
            return
        try:
            self.recover(error)
        except BaseException as fatal:  # for the worker thread to fail by
            self._queue.post(partial(_fail_by, fatal))
            if self._queue.is_leader():
                self._ledger.resign(NOW, 1)
        finally:
            if not inbox.closed:
                self._employ(pool, inbox)

    def _serve_all(self, inbox: "_Inbox") -> None:
        """Process what comes into the inbox until it is closed; in a thread of our own pool.

        One call per thread and not per batch, since the futures of a pool cost as much as a batch of ours.
        """
        self._queue.inside.mine = True
        while not inbox.closed:
            self.survive(partial(self._serve_until_none, inbox))

    def _serve_until_none(self, inbox: "_Inbox") -> None:
        while (batch_run := inbox.get()) is not None:
            if batch_run.claim():
                self._serve(batch_run)
            del batch_run  # keep nothing alive while idle

    def _serve(self, batch_run: BatchRun) -> None:
        """Process one batch."""
        try:
            self._begin(batch_run)
            batch_run.complete(self._processor(batch_run.jobs))
        except BaseException as error:
            batch_run.fail(error)
        self._report(batch_run)


class ExecutorRunner(Runner):
    """Runs batches on an executor of the caller's, and never shuts it down."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        processor: Callable[[list[Any]], Any],
        listeners: ListenerSet,
        name: str,
        executor: Executor,
    ) -> None:
        super().__init__(dispatcher, processor, listeners, name)
        self._executor = executor

    def run(self, batch_run: BatchRun) -> None:
        """See `Runner.run`."""
        try:
            self._begin(batch_run)
            sent = send(self._executor, self._processor, batch_run.jobs)
            sent.add_done_callback(partial(self._receive, batch_run))
            batch_run.sent = True
        except BaseException as error:  # the executor is broken, or was shut down, or can't send this
            batch_run.fail(self._named(error, batch_run))
            self._report(batch_run)

    def _run_again(self, batch_run: BatchRun) -> None:
        pass  # since it can't be known whether the executor has it

    def _pass_on(self, note: Callable[[], None]) -> None:
        self._queue.post(note)

    def _receive(self, batch_run: BatchRun, done: "Future[Any]") -> None:
        """Take what the caller's executor gives back, in whatever thread it calls from."""
        try:
            with self._queue.own_thread():
                try:
                    batch_run.complete(done.result())
                except BaseException as error:
                    batch_run.fail(self._named(error, batch_run))
                self._report(batch_run)
        except BaseException as error:  # from outside: see `recover`
            fail_all(self._ledger, batch_run.futures, error)
            batch_run.forget()
            self._queue.post(partial(self._dispatcher.finish, batch_run))
        finally:
            del done  # which holds the exception whose traceback leads here

    def _named(self, error: BaseException, batch_run: BatchRun) -> BaseException:
        if isinstance(self._executor, ThreadPoolExecutor):
            return error  # as nothing was sent
        return name_unsendable(error, self._processor, batch_run.jobs)


class _Inbox(SimpleQueue[BatchRun | None]):
    """Batches for the threads of a pool, and at the end a None for each thread.

    Attributes:
        closed: whether the end has come, for a thread that lost its None to an exception.
    """

    closed = False


def _fail_by(error: BaseException) -> None:
    raise error
