"""Starts and ends the threads of a batcher.

Nothing here refers to the `Batcher`, so that it can be garbage-collected while its threads still run.
"""

import logging
import threading
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.log import report
from microbatch._basics.waiting import StartLatch, Waiter
from microbatch._engine.dispatcher import Dispatcher
from microbatch._engine.ledger import Ledger
from microbatch._engine.process import enlist, process_flag
from microbatch._engine.queue import JobQueue
from microbatch._engine.runner import ExecutorRunner, PoolRunner, Runner
from microbatch._engine.settings import Settings
from microbatch.errors import BatcherClosed, ForkedError, Rejected
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import BatcherShutDown, notify

__all__ = ["Stage", "Engine"]


class Stage(Enum):
    """The stages in the life of a batcher's threads.

    .. code-block:: text

        NEW <--> STARTING --> OPENING --> RUNNING --> ENDED
         ^                       |                      ^
         +-----------------------+                      |
         +----------------------------------------------+

    A start that fails leads back to `NEW`. A batcher that is shut down before its start goes from `NEW` to `ENDED`.
    When the interpreter exits and can't wait any longer, every batcher goes to `ENDED`. `JobQueue.closed` says whether
    the batcher is being shut down. That can happen at each stage, and the queue refuses jobs from then on.
    """

    NEW = "new"
    """No thread has been created, or its start has failed or was called off."""
    STARTING = "starting"
    """The batcher thread has been created. It may not run yet, and its start can be called off."""
    OPENING = "opening"
    """The batcher thread runs, and starts the threads that run batches."""
    RUNNING = "running"
    """All threads run."""
    ENDED = "ended"
    """All jobs are settled, and all shutdown callbacks have been called."""


# Globals, because an access to a member of an enum may be a call, and none may come between a check and a write (R5).
_NEW, _STARTING, _OPENING, _RUNNING, _ENDED = Stage


class Engine:
    """Everything behind a `Batcher`: owns the queue, the ledger and the threads, and starts and ends the threads.

    The queue's mutex guards the decision to start the threads, or to end a batcher that was never started. If that
    decision had a lock of its own, a signal handler that shuts down could wait for a thread that waits for the mutex.
    """

    def __init__(self, settings: Settings, forked: bool = False) -> None:
        self.same_process = process_flag()
        self.queue = JobQueue(settings)
        self.ledger = Ledger(self.queue)
        self._dispatcher = Dispatcher(self.ledger, settings)
        self._runner: Runner = (
            PoolRunner(self._dispatcher, settings)
            if settings.executor is None
            else ExecutorRunner(self._dispatcher, settings, settings.executor)
        )
        self._exit_timeout = settings.exit_timeout
        self._clock = settings.clock
        self._name = settings.name
        self._is_executor_inherited = forked and settings.executor is not None  # if so, it works only in the parent
        self.finalizer: Any = None  # shuts down if the batcher is deleted; set when the threads start
        self.stage: Stage = _NEW
        self._start_latch: StartLatch | None = None  # the latch of the start that is not called off
        self._thread: threading.Thread | None = None  # from `OPENING` on
        self._ending = threading.RLock()  # held by the thread that ends a batcher without threads
        self._callbacks: list[Callable[[], object]] = []
        # The first callback notifies the listeners, so that they are notified once, whichever thread ends this.
        if settings.listeners.shutdown:
            self._callbacks.append(partial(_notify_of_shutdown, settings, self.ledger))

    # -- called by any thread --

    def start(self) -> None:
        """Start all threads, once, and return when they run.

        They are daemons if the interpreter allows daemons, so that the interpreter does not join them if they take
        longer than *exit_timeout*. All of them are started now, because no thread can be started while the interpreter
        exits (CPython 3.12).

        Raises:
            BatcherClosed: The batcher was shut down, or the interpreter is exiting.
            ForkedError: The executor belongs to the parent process.
            Rejected: A signal interrupted the start in another thread.
            RuntimeError: The system can't start another thread. No thread is left running.
        """
        self._check_startable()
        enlist(self)
        mine = StartLatch()
        try:
            latch = self._agree_on(mine)
            if latch is mine:
                _make_thread(partial(self._run, mine), self._name).start()
        except BaseException:  # after a signal, the thread may exist
            error = Rejected("the start of the batcher was interrupted")
            with self.queue.mutex:
                left = self._claim_all() if self._call_off(mine, error) else []
            self.ledger.fail(left, error)
            raise
        # Only the caller that starts the threads has to wait. Other callers must not wait long, because a finalizer may
        # call this in the thread that is being started. A call that has interrupted the holder of the mutex must not
        # wait at all, because the new thread needs the mutex.
        latch.wait(0 if self.queue.is_held() else None if latch is mine else 1)

    def _agree_on(self, latch: StartLatch) -> StartLatch:
        """Return the latch of the start that is under way. It is *latch* if the caller has to start the threads."""
        with self.queue.mutex:
            self._check_startable()
            agreed = self._start_latch  # R5
            if agreed is None:
                self.stage, self._start_latch, agreed = _STARTING, latch, latch
            return agreed

    def _check_startable(self) -> None:
        if self.queue.closed:
            raise BatcherClosed("the batcher is shut down")
        if self._is_executor_inherited:
            raise ForkedError("the executor belongs to the parent process")

    def _call_off(self, latch: StartLatch | None, error: BaseException) -> bool:
        """Call off the start, and raise *error* in the threads that wait for it. Return False if it is too late."""
        with self.queue.mutex:
            if self._start_latch is not latch or self.stage not in (_NEW, _STARTING):
                return False
            self.stage, self._start_latch = _NEW, None
        if latch is not None:
            latch.settle(error)
            self.queue.settled.notify_all()  # there is no thread to wait for
        return True

    def leave_to_parent(self) -> None:
        """Fail all jobs that the parent process still has to do, in a forked child.

        Takes no lock, because a thread that does not exist here may have held it.
        """
        for future in self.ledger.inherited():
            future._fail_after_fork(ForkedError("the job was submitted in the parent process, which processes it"))
        self.queue.clear()  # otherwise each future would keep all jobs alive, because it refers to the queue

    def close(self) -> None:
        """Accept no more jobs, and make all accepted jobs due. Does not wait."""
        self.queue.close()
        self._end_unstarted()

    def _end_unstarted(self) -> None:
        """End a closed batcher that has no batcher thread to do so, unless another thread is ending it."""
        if self.stage is _ENDED or not self.queue.closed or self.queue.is_own_thread():
            return
        error = BatcherClosed("the batcher was shut down before its threads were started")
        if not self._call_off(self._start_latch, error):
            return
        try:
            if self._ending.acquire(blocking=False):
                with self.queue.own_thread():
                    self.abandon(error)
                    self._end()
        finally:  # R8
            if self._ending._is_owned():  # type: ignore[attr-defined]
                self._ending.release()
                self.queue.settled.notify_all()  # so that another thread takes over if this one was interrupted

    def wait_ended(self, moment: float = NEVER) -> bool:
        """Wait until all jobs are settled and the threads have ended. Return False if *moment* comes first."""
        waiter = Waiter(self.queue.mutex)
        try:
            self.queue.settled[waiter] = None
            while True:
                self._end_unstarted()  # there may be no thread to wait for
                with self.queue.mutex:
                    ended, thread = self.stage is _ENDED, self._thread
                    if ended or (moment != NEVER and self._clock.now() >= moment):
                        break
                    self._clock.wait_until(waiter, moment)
        finally:
            self.queue.settled.pop(waiter, None)
        if ended and thread is not None and thread is not threading.current_thread():
            thread.join()  # it is about to end
        return ended

    def abandon(self, error: BaseException) -> int:
        """Fail all jobs that are not settled, even running ones, and return their number."""
        return self.ledger.fail(self._claim_all(), error)

    def _claim_all(self) -> list[JobFuture[Any]]:
        """Claim and return all jobs that are not settled. This is one step if the mutex is held."""
        self.ledger.take_in()
        futures = self.ledger.unsettled()
        self.ledger.claim(futures)
        return futures

    def exit_deadline(self) -> float:
        """Return the moment at which an exit of the interpreter that begins now stops waiting. Never raises."""
        try:
            return self._clock.now() + self._exit_timeout
        except Exception:  # from a user's clock; the batcher thread fails too, so it ends soon
            return NEVER

    def disown_threads(self) -> None:
        """See `Runner.disown_threads`."""
        self._runner.disown_threads()

    def give_up(self) -> None:
        """Fail all jobs that are left when the interpreter exits, let no thread wait for them, and log their number."""
        lost = self.abandon(BatcherClosed("the interpreter exited before the job was done"))
        with self.queue.mutex:
            self.stage, self._thread = _ENDED, None
            self.queue.settled.notify_all()
        self.queue.post(lambda: None)  # so that threads that are not daemons notice, and end
        self.disown_threads()
        report("%r lost %d jobs: the interpreter stopped waiting for them at exit", self, lost)

    def add_shutdown_callback(self, callback: Callable[[], object]) -> None:
        """Have *callback* called after the last job is settled, or immediately if the batcher has ended."""
        with self.queue.mutex:
            if self.stage is not _ENDED:
                self._callbacks.append(callback)
                return
        _run_shutdown_callback(callback)

    def explain(self) -> list[str]:
        """See `Collector.describe`."""
        return self._dispatcher.explain()

    def __repr__(self) -> str:
        return f"<Batcher {self._name!r}>"

    # -- called by the batcher thread --

    def _run(self, latch: StartLatch) -> None:
        with self.queue.mutex:
            if self._start_latch is not latch:
                return  # the start was called off
            self.stage, self._thread = _OPENING, threading.current_thread()
        try:
            self._runner.open()
        except BaseException as error:
            self._give_up_start(latch, error)
            return
        self.queue.adopt_thread()
        with self.queue.mutex:
            if self.stage is _OPENING:  # otherwise `give_up` has ended the batcher in the meantime
                self.stage = _RUNNING
        latch.settle()
        try:
            self._work()
        except BaseException as error:
            report("the batcher thread of %s failed, so all its jobs fail", self._name, level=logging.CRITICAL)
            self.queue.close()
            self.ledger.recover()  # otherwise jobs that were just taken out of the queue could be lost
            self.abandon(error)
        try:
            self._end_for_certain()
        except BaseException:  # an exception from outside, between two attempts
            self._end_for_certain()

    def _end_for_certain(self) -> None:
        while not self._runner.survive(self._end):
            pass

    def _work(self) -> None:
        """Lead whenever no other thread does, until the batcher is closed and nothing is left to do."""
        while True:
            try:
                return self._take_all_turns()
            except BaseException as error:
                self._runner.recover(error)

    def _take_all_turns(self) -> None:
        while not self._runner.survive(self._take_turns):
            pass

    def _take_turns(self) -> None:
        if self.queue.is_leader():
            self.queue.resign(NOW, 1)  # take the lead again immediately: this thread was interrupted while it led
        while not self._dispatcher.turn(self._runner.run):
            pass

    def _give_up_start(self, latch: StartLatch, error: BaseException) -> None:
        """Fail the jobs that were accepted in the meantime, and leave the batcher as if it had never been started."""
        # With the mutex held, so that a caller that submits a job or waits for the end sees that no thread runs.
        with self.queue.mutex:
            left = self._claim_all()  # jobs from callers that did not wait for the start
            if self.stage is not _ENDED:  # otherwise `give_up` has ended the batcher in the meantime
                self.stage, self._start_latch, self._thread = _NEW, None, None
            self.queue.settled.notify_all()
        latch.settle(error)
        with self.queue.own_thread():
            self.ledger.fail(left, error)
        self._end_unstarted()  # if another thread has closed the batcher, it has left this to the batcher thread

    def _end(self) -> None:
        """End the threads that run batches, and call the shutdown callbacks. Can be called again after an exception."""
        self._runner.close()
        while (callback := self._next_shutdown_callback()) is not None:
            _run_shutdown_callback(callback)

    def _next_shutdown_callback(self) -> Callable[[], object] | None:
        with self.queue.mutex:
            if self._callbacks:
                return self._callbacks.pop(0)
            self.stage = _ENDED  # under the same mutex, so that a callback added later is called immediately
            self.queue.settled.notify_all()
            return None


def _make_thread(target: Callable[[], None], name: str) -> threading.Thread:
    try:
        return threading.Thread(target=target, name=name, daemon=True)
    except RuntimeError:  # an isolated subinterpreter has no daemons
        return threading.Thread(target=target, name=name, daemon=False)


def _notify_of_shutdown(settings: Settings, ledger: Ledger) -> None:
    notify(settings.listeners.shutdown, BatcherShutDown(settings.name, ledger.stats()))


def _run_shutdown_callback(callback: Callable[[], object]) -> None:
    try:
        callback()
    except BaseException:
        report("a shutdown callback raised")
