"""The life of a batcher's threads: when they start, and how they end.

Nothing here refers to the `Batcher`, so that a batcher which nobody holds any more can be collected while its threads
still run.
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
from microbatch._engine.process import current_mark, enlist
from microbatch._engine.queue import JobQueue
from microbatch._engine.runner import ExecutorRunner, PoolRunner, Runner
from microbatch._engine.settings import Settings
from microbatch.errors import BatcherClosed, ForkedError, Rejected
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import BatcherShutDown, notify

__all__ = ["Stage", "Engine"]


class Stage(Enum):
    """How far the life of the threads has come.

    .. code-block:: text

        NEW <--> STARTING --> OPENING --> RUNNING --> ENDED
         ^                       |                      ^
         +-----------------------+                      |
         +----------------------------------------------+

    A start that fails leads back to `NEW`. A batcher that is shut down before its start goes from `NEW` to `ENDED`, and
    so does every batcher that is still at work when the interpreter can't wait for it any longer. `JobQueue.closed` says
    whether the batcher is being shut down. That can happen at each stage, and the queue refuses jobs from then on.
    """

    NEW = "new"
    """No thread has been created, or none that counts."""
    STARTING = "starting"
    """The batcher thread has been created. It may not run yet, and can be called off."""
    OPENING = "opening"
    """The batcher thread runs, and starts the threads that run batches."""
    RUNNING = "running"
    """All threads run."""
    ENDED = "ended"
    """All jobs are settled, and all shutdown callbacks have been called."""


# As globals, so that no look into the class of an enum comes between a look and a write (R5).
_NEW, _STARTING, _OPENING, _RUNNING, _ENDED = Stage


class Engine:
    """Everything behind a `Batcher`: owns the queue, the ledger and the threads, and starts and ends the threads.

    The queue's mutex guards the decision to start the threads, or to end a batcher that was never started. With a lock
    of its own for that decision, a signal handler that shuts down could wait for a thread that waits for the mutex.
    """

    def __init__(self, settings: Settings, forked: bool = False) -> None:
        self.mark = current_mark()
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
        self._is_parents = forked and settings.executor is not None  # the executor, so that it can't be used here
        self.finalizer: Any = None  # of the batcher, from the start of the threads on
        self.stage: Stage = _NEW
        self._start_latch: StartLatch | None = None  # of the start that counts
        self._thread: threading.Thread | None = None  # from `OPENING` on
        self._ending = threading.RLock()  # held by the thread that ends a batcher without threads
        self._callbacks: list[Callable[[], object]] = []
        if settings.listeners.shutdown:
            # As the first callback, so that the listeners are notified once, whichever thread ends this.
            self._callbacks.append(partial(_notify_of_shutdown, settings, self.ledger))

    # -- called by any thread --

    def start(self) -> None:
        """Start all threads, once, and return when they run.

        They are daemons if the interpreter allows any, so that the interpreter does not join them if they take longer
        than `exit_timeout`. All are started now, since no thread can be started once the interpreter is going down
        (CPython 3.12).

        Raises:
            BatcherClosed: it was shut down, or the interpreter is going down.
            ForkedError: the executor belongs to the parent process.
            Rejected: a signal interrupted the start in another thread.
            RuntimeError: the system gives no more threads; nothing is left running.
        """
        self._check_startable()
        enlist(self)
        mine = StartLatch()
        try:
            latch = self._agree_on(mine)
            if latch is mine:
                _make_thread(partial(self._run, mine), self._name).start()
        except BaseException:  # if it is from a signal, the thread may exist
            error = Rejected("the start of the batcher was broken off")
            with self.queue.mutex:
                left = self._claim_all() if self._call_off(mine, error) else []
            self.ledger.fail(left, error)
            raise
        # Only the caller that starts the threads has to wait. Other callers must not wait long, because a finalizer may
        # call this in the very thread that is being started. A call that interrupts the holder of the mutex must not
        # wait at all, because that thread needs the mutex.
        latch.wait(0 if self.queue.is_held() else None if latch is mine else 1)

    def _agree_on(self, latch: StartLatch) -> StartLatch:
        """Return the latch that counts, which is this one if the caller is to start the threads."""
        with self.queue.mutex:
            self._check_startable()
            agreed = self._start_latch  # R5
            if agreed is None:
                self.stage, self._start_latch, agreed = _STARTING, latch, latch
            return agreed

    def _check_startable(self) -> None:
        if self.queue.closed:
            raise BatcherClosed("the batcher is shut down")
        if self._is_parents:
            raise ForkedError("the executor belongs to the parent process")

    def _call_off(self, latch: StartLatch | None, error: BaseException) -> bool:
        """Call off the start, and raise *error* where it is awaited. Return False if the thread is at work already."""
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
            future._fail_after_fork(ForkedError("the job was submitted in the parent process, and is done there"))
        self.queue.clear()  # a future that is kept here keeps the queue

    def close(self) -> None:
        """Accept no more jobs, and make all accepted ones due. Does not wait."""
        self.queue.close()
        self._end_unstarted()

    def _end_unstarted(self) -> None:
        """End a closed batcher that has no thread of its own to do so, unless another thread is ending it."""
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
        """Wait until every job is settled and the threads are gone; False if *moment* comes first."""
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
        """Fail every job that is not settled, running ones too, and return how many those were."""
        return self.ledger.fail(self._claim_all(), error)

    def _claim_all(self) -> list[JobFuture[Any]]:
        """Claim every job that is not settled. This is one step if the mutex is held."""
        self.ledger.take_in()
        futures = self.ledger.unsettled()
        self.ledger.claim(futures)
        return futures

    def exit_deadline(self) -> float:
        """Return the moment until which the interpreter's end may wait, if that wait begins now. Never raises."""
        try:
            return self._clock.now() + self._exit_timeout
        except Exception:  # of a user's clock: the batcher thread fails too, and soon ends
            return NEVER

    def disown_threads(self) -> None:
        """See `Runner.disown_threads`."""
        self._runner.disown_threads()

    def give_up(self) -> None:
        """Fail all jobs that are left because the interpreter ends, let no thread wait for them, and log their number."""
        lost = self.abandon(BatcherClosed("the interpreter went down before the job was done"))
        with self.queue.mutex:
            self.stage, self._thread = _ENDED, None
            self.queue.settled.notify_all()
        self.queue.post(lambda: None)  # so that threads that are not daemons notice, and end
        self.disown_threads()
        report("%r lost %d jobs: the interpreter did not wait for them any longer", self, lost)

    def add_shutdown_callback(self, callback: Callable[[], object]) -> None:
        """Have *callback* called after the last job is settled, or at once if the batcher has ended."""
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
                return  # it was called off
            self.stage, self._thread = _OPENING, threading.current_thread()
        try:
            self._runner.open()
        except BaseException as error:
            self._give_up_start(latch, error)
            return
        self.queue.adopt_thread()
        with self.queue.mutex:
            if self.stage is _OPENING:  # the interpreter has not ended meanwhile
                self.stage = _RUNNING
        latch.settle()
        try:
            self._work()
        except BaseException as error:
            report("the batcher thread of %s failed, and its jobs with it", self._name, level=logging.CRITICAL)
            self.queue.close()
            self.ledger.recover()  # otherwise jobs that were just taken out of the queue could be lost
            self.abandon(error)
        try:
            self._end_for_certain()
        except BaseException:  # from outside, between two tries
            self._end_for_certain()

    def _end_for_certain(self) -> None:
        while not self._runner.survive(self._end):
            pass

    def _work(self) -> None:
        """Lead, where no other thread does, until the batcher is closed and nothing is left to do."""
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
            self.queue.resign(NOW, 1)  # to look at once: an interrupted leader may have drained the queue already
        while not self._dispatcher.turn(self._runner.run):
            pass

    def _give_up_start(self, latch: StartLatch, error: BaseException) -> None:
        """Fail the jobs that were accepted meanwhile, and leave the batcher as if it had never been started."""
        # Under the mutex, so that a caller that submits a job or waits for the end finds no thread at work.
        with self.queue.mutex:
            left = self._claim_all()  # from callers that did not wait for the start
            if self.stage is not _ENDED:  # the interpreter may have ended meanwhile
                self.stage, self._start_latch, self._thread = _NEW, None, None
            self.queue.settled.notify_all()
        latch.settle(error)
        with self.queue.own_thread():
            self.ledger.fail(left, error)
        self._end_unstarted()  # a thread that closed it may have left that to this one

    def _end(self) -> None:
        """End the threads that run batches, and call the shutdown callbacks. Can be called again after an exception."""
        self._runner.close()
        while (callback := self._next_shutdown_callback()) is not None:
            _run_shutdown_callback(callback)

    def _next_shutdown_callback(self) -> Callable[[], object] | None:
        with self.queue.mutex:
            if self._callbacks:
                return self._callbacks.pop(0)
            self.stage = _ENDED  # under the same mutex: from now on, a callback that is added is called at once
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
