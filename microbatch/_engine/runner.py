"""The threads that run batches: they call the processor, settle the jobs, and report the end of each batch."""

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
from microbatch._engine.batch_run import BatchRun
from microbatch._engine.dispatcher import Dispatcher
from microbatch._engine.process import is_exiting
from microbatch._engine.sending import name_unsendable, send
from microbatch._engine.settings import Settings
from microbatch.listeners import BatchFinished, BatchStarted, notify
from microbatch.results import JobState

__all__ = ["ExecutorRunner", "PoolRunner", "Runner"]

_MOST_INTERRUPTIONS = 3
"""The maximum number of exceptions from outside in a row. With more, the cause must be in this library."""


class Runner(ABC):
    """Runs batches, and notifies the dispatcher when a batch is over."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings) -> None:
        self._dispatcher = dispatcher
        self._ledger = dispatcher.ledger
        self._queue = dispatcher.queue
        self._processor = settings.processor
        self._listeners = settings.listeners
        self._name = settings.name

    def open(self) -> None:
        """Start the threads that run batches, if the runner has threads of its own."""

    def close(self) -> None:
        """Stop these threads, and wait until they have ended. Can be called again after an exception."""

    def disown_threads(self) -> None:
        """Let the interpreter exit without waiting for these threads."""

    @abstractmethod
    def run(self, batch_run: BatchRun) -> None:
        """Pass a batch to another thread to run it. Called by the leader."""

    @abstractmethod
    def _run_again(self, batch_run: BatchRun) -> None:
        """Do what `run` does once more, because an exception may have prevented it the first time."""

    @abstractmethod
    def _call_in_leader(self, call: Callable[[], None]) -> None:
        """Make the leader run *call*."""

    def survive(self, act: Callable[[], None]) -> bool:
        """Call *act*, and recover if an exception interrupts it. Return whether there was no exception.

        A second exception may interrupt the recovery, which then starts again.
        """
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
        """Restore a correct state after an exception from outside interrupted the calling thread.

        Exceptions from users' code do not get here, because they are handled where that code is called. But a library
        that limits the time of a call may raise an exception in this thread too late, between any two statements of
        this package. The jobs that the thread was handling fail. All other jobs are processed as usual.

        The state is restored from data that changes in one step: `Ledger.unsettled` has all jobs that are not settled,
        `Dispatcher.running` has all batches, and `JobQueue.is_leader` says whether this thread leads.

        Raises:
            BaseException: *error*, if there were more than `_MOST_INTERRUPTIONS` exceptions in a row.
        """
        report(
            "an exception from outside interrupted a thread of %s; the jobs it was handling fail",
            self._name,
            error=error,
        )
        self._dispatcher.interruptions += 1
        if self._dispatcher.interruptions > _MOST_INTERRUPTIONS:
            raise error
        for batch_run in list(self._dispatcher.running):
            if batch_run.owner == threading.get_ident():
                self._ledger.fail(batch_run.futures, error)
                batch_run.forget()  # last, because its futures are still needed if another exception comes before
            elif not batch_run.owner:
                self._run_again(batch_run)
        self._ledger.announce_again(self._ledger.claimed())  # before their groups are closed
        if self._queue.is_leader():
            self._dispatcher.recover(error)
        for batch_run in list(self._dispatcher.running):
            if not batch_run.futures:
                self._queue.post(partial(self._dispatcher.finish, batch_run))

    def _begin(self, batch_run: BatchRun) -> None:
        if self._listeners.batch_started:
            notify(self._listeners.batch_started, BatchStarted(self._name, batch_run.info, tuple(batch_run.futures)))
        batch_run.start()

    def _report(self, batch_run: BatchRun) -> None:
        error = batch_run.error
        futures = batch_run.forget()
        if not futures:
            return  # reported already: an executor may call back twice
        time = None
        try:
            time = batch_run.service_time
            if self._listeners.batch_finished:
                # Not `BatchRun.failed`, because not only the processor makes jobs fail.
                failed = [future._stage for future in futures].count(JobState.FAILED)
                event = BatchFinished(self._name, batch_run.info, tuple(futures), batch_run.started, time, failed)
                notify(self._listeners.batch_finished, event)
        except BaseException:  # from a user's clock; the worker is free all the same
            report("batch %d of %s can't be reported to the policy", batch_run.info.id, self._name)
        self._call_in_leader(partial(self._dispatcher.finish, batch_run, time, error))


class PoolRunner(Runner):
    """Runs batches in its own thread pool."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings) -> None:
        super().__init__(dispatcher, settings)
        self._workers = settings.max_workers
        self._pool: ThreadPoolExecutor | None = None
        self._inbox = _Inbox()
        self._runs_inline = False  # the pool has no threads, so batches run in the thread that leads

    def open(self) -> None:
        """Start all threads of the pool. They are daemons if the calling thread is one.

        If the interpreter is exiting, batches run in those that could be started, or in the calling thread.
        """
        self._pool, self._inbox = ThreadPoolExecutor(self._workers, self._name), _Inbox()
        try:
            for _ in range(self._workers):
                self._start_serving(self._pool, self._inbox)
        except BaseException as error:
            if not is_exiting(error):
                self.close()
                raise
            self._runs_inline = not self._pool._threads

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
        if self._runs_inline:
            self._inbox.put(None)
            self._serve_until_none(self._inbox)

    def _run_again(self, batch_run: BatchRun) -> None:
        self.run(batch_run)  # the batch may then be in the inbox twice, but only one thread can claim it

    def _call_in_leader(self, call: Callable[[], None]) -> None:
        self._dispatcher.lead(self.run, call)

    def _start_serving(self, pool: ThreadPoolExecutor, inbox: "_Inbox") -> None:
        pool.submit(self._serve_all, inbox).add_done_callback(partial(self._restart_serving, pool, inbox))

    def _restart_serving(self, pool: ThreadPoolExecutor, inbox: "_Inbox", done: "Future[None]") -> None:
        """Restore a correct state and run `_serve_all` again, if an exception has ended it at any point."""
        error = done.exception()
        del done
        if error is None:
            return
        try:
            self.recover(error)
        except BaseException as fatal:  # too many interruptions; make the batcher thread fail with this exception too
            self._queue.post(partial(_raise, fatal))
            if self._queue.is_leader():
                self._queue.resign(NOW, 1)
        finally:
            if not inbox.closed:
                self._start_serving(pool, inbox)

    def _serve_all(self, inbox: "_Inbox") -> None:
        """Run the batches in the inbox until it is closed. Called in the threads of the pool.

        The pool runs this once per thread. With one call per batch, the pool's future for the call would double the
        cost of the batch.
        """
        self._queue.this_thread.is_own = True
        while not inbox.closed:
            self.survive(partial(self._serve_until_none, inbox))

    def _serve_until_none(self, inbox: "_Inbox") -> None:
        while (batch_run := inbox.get()) is not None:
            if batch_run.claim():
                self._serve(batch_run)
            del batch_run  # an idle thread must not keep the batch alive

    def _serve(self, batch_run: BatchRun) -> None:
        """Run one batch."""
        try:
            self._begin(batch_run)
            batch_run.complete(self._processor(batch_run.jobs))
        except BaseException as error:
            batch_run.fail(error)
        self._report(batch_run)


class ExecutorRunner(Runner):
    """Runs batches in an executor of the user, and never shuts it down."""

    def __init__(self, dispatcher: Dispatcher, settings: Settings, executor: Executor) -> None:
        super().__init__(dispatcher, settings)
        self._executor = executor

    def run(self, batch_run: BatchRun) -> None:
        """See `Runner.run`."""
        try:
            self._begin(batch_run)
            sent = send(self._executor, self._processor, batch_run.jobs)
            sent.add_done_callback(partial(self._receive, batch_run))
            batch_run.sent = True
        except BaseException as error:  # the executor is broken, was shut down, or refuses the jobs
            batch_run.fail(self._named(error, batch_run))
            self._report(batch_run)

    def _run_again(self, batch_run: BatchRun) -> None:
        pass  # the executor may have the batch already, and would then process it twice

    def _call_in_leader(self, call: Callable[[], None]) -> None:
        self._queue.post(call)

    def _receive(self, batch_run: BatchRun, done: "Future[Any]") -> None:
        """Settle the jobs of a batch when the executor has finished it. The executor calls this in any thread."""
        this_thread = self._queue.this_thread
        was_own = this_thread.is_own
        try:
            this_thread.is_own = True
            try:
                batch_run.complete(done.result())
            except BaseException as error:
                batch_run.fail(self._named(error, batch_run))
            self._report(batch_run)
        except BaseException as error:  # from outside: see `recover`
            self._ledger.fail(batch_run.futures, error)
            batch_run.forget()
            self._queue.post(partial(self._dispatcher.finish, batch_run))
        finally:
            this_thread.is_own = was_own
            del done  # it refers to an exception whose traceback refers to this frame

    def _named(self, error: BaseException, batch_run: BatchRun) -> BaseException:
        if isinstance(self._executor, ThreadPoolExecutor):
            return error  # threads do not pickle anything
        return name_unsendable(error, self._processor, batch_run.jobs)


class _Inbox(SimpleQueue[BatchRun | None]):
    """The batches for the threads of a pool. At the end, it gets one None for each thread.

    Attributes:
        closed: Whether the end has come. A thread that was interrupted after it took its None sees it here.
    """

    closed = False


def _raise(error: BaseException) -> None:
    raise error
