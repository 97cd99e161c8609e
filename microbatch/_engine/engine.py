"""Starts and ends the threads of a batcher.

Nothing here refers to the `Batcher`, so that it can be garbage-collected while its threads still run.
"""

import _thread
import logging
import threading
import weakref
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.log import report
from microbatch._basics.waiting import Waiter
from microbatch._engine.dispatcher import Dispatcher
from microbatch._engine.ledger import Group, Ledger
from microbatch._engine.process import enlist, is_exiting, process_flag
from microbatch._engine.queue import JobQueue
from microbatch._engine.runner import ExecutorRunner, PoolRunner, Runner
from microbatch._engine.settings import Settings
from microbatch.errors import BatcherClosed, ForkedError
from microbatch.listeners import BatcherShutDown, notify
from microbatch.policies.base import BatchingPolicy

__all__ = ["Stage", "Engine"]


class Stage(Enum):
    """The stages in the life of a batcher's threads.

    .. code-block:: text

        NEW <--> RUNNING --> ENDED
         |                     ^
         +---------------------+

    A start that fails leads back to `NEW`. A batcher that is shut down before its start goes from `NEW` to `ENDED`. So
    does a batcher for which the exiting interpreter stops waiting. `JobQueue.closed` says whether the batcher is being
    shut down. That can happen at each stage, and the queue refuses jobs from then on.
    """

    NEW = "new"
    """There is no thread, or the threads have not started yet."""
    RUNNING = "running"
    """All threads run."""
    ENDED = "ended"
    """All jobs are settled. The shutdown callbacks have been called, except after `Engine.give_up`."""


_is_main_interpreter = getattr(threading, "_is_main_interpreter", lambda: True)
_NEW, _RUNNING, _ENDED = Stage  # globals, because looking up a member of an enum takes longer


class Engine:
    """Everything behind a `Batcher`: owns the queue, the ledger and the threads, and starts and ends the threads.

    A thread that starts the threads, or that ends a batcher without threads, first deletes `_unclaimed`, which only one
    thread can do. If the work fails, that thread restores the attribute.
    """

    finalizer: Any = None  # shuts down if the batcher is deleted; set when the threads start

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
        self.stage: Stage = _NEW
        self._unclaimed = True
        self._thread: threading.Thread | None = None
        self._callbacks: list[Callable[[], object]] = []
        # The first callback notifies the listeners, so that they are notified once, whichever thread ends this.
        if settings.listeners.shutdown:
            self._callbacks.append(partial(_notify_of_shutdown, settings, self.ledger))

    # -- called by any thread --

    @property
    def is_claimed(self) -> bool:
        """Whether a thread starts or has started the threads, or ends a batcher without threads."""
        return not hasattr(self, "_unclaimed")

    def start(self) -> None:
        """Start all threads, once. Does not wait until they run, because they may run a finalizer first.

        They are daemons if the interpreter allows daemons, so that the interpreter does not join them if they take
        longer than *exit_timeout*. All of them are started now, because no thread can be started while the interpreter
        exits (CPython 3.12). If one of them can't be started, the jobs that were accepted fail.

        Raises:
            BatcherClosed: The batcher was shut down, or the interpreter is exiting.
            ForkedError: The executor belongs to the parent process.
            RuntimeError: The system can't start another thread.
        """
        if self.queue.closed:
            raise BatcherClosed("the batcher is shut down")
        if self._is_executor_inherited:
            raise ForkedError("the executor belongs to the parent process")
        if self.is_claimed:
            return
        enlist(self)
        started: list[int | BaseException | None] = []
        # Not a `Thread`, because its `start` waits until the new thread runs. A subinterpreter needs a `Thread`,
        # because it can't end while any other thread runs.
        start = partial(_thread.start_new_thread, _launch) if _is_main_interpreter() else self._start_now
        starting = map(start, [([self],)])
        try:
            del self._unclaimed
        except AttributeError:  # another thread starts them
            return
        try:
            started.extend(starting)  # the first call, so no interruption is possible before it (L3)
        except BaseException as error:
            if not started and self._thread is None:
                self._unclaimed = True  # before the next step (L4), so that later jobs start the threads again
                try:
                    self._give_up_start(error)
                except BaseException:  # from a signal handler
                    self._give_up_start(error)
                    raise
            raise

    def leave_to_parent(self) -> None:
        """Fail all jobs that the parent process still has to do, in a forked child."""
        for future in self.ledger.unsettled():
            future._fail_after_fork(ForkedError("the job was submitted in the parent process, which processes it"))
        self.queue.clear()  # otherwise each future would keep all jobs alive, because it refers to the queue

    def close(self) -> None:
        """Accept no more jobs, and make all accepted jobs due. Does not wait."""
        self.queue.close()
        self._end_unstarted()

    def _end_unstarted(self) -> None:
        """End a closed batcher that has no batcher thread to do so, unless another thread is ending it."""
        if self.stage is _ENDED:
            self._run_callbacks()  # those that were left when a signal interrupted the end
        if self.stage is _ENDED or not self.queue.closed or self.is_claimed:
            return
        this_thread = self.queue.this_thread
        was_own = this_thread.is_own
        try:
            del self._unclaimed
        except AttributeError:  # another thread ends it, or starts the threads, which then end it
            return
        this_thread.is_own = True  # before the first call (L3): a handler that interrupts this must not wait for it
        try:
            self.abandon(BatcherClosed("the batcher was shut down before its threads were started"))
            self._end()
        except BaseException:  # from a signal handler
            self._unclaimed = True
            self.queue.ended.notify_all()  # so that another thread takes over
            raise
        finally:
            this_thread.is_own = was_own

    def wait_ended(self, moment: float = NEVER) -> bool:
        """Wait until all jobs are settled and the threads have ended. Return False if *moment* comes first."""
        waiter = Waiter()
        try:
            self.queue.ended[waiter] = None
            ended = self._wait_ended(waiter, moment)
        finally:
            self.queue.ended.pop(waiter, None)
        thread = self._thread
        if ended and thread is not None and thread.ident not in (None, threading.get_ident()):
            thread.join()  # it is about to end
        return ended

    def _wait_ended(self, waiter: Waiter, moment: float) -> bool:
        while True:
            self._end_unstarted()  # there may be no thread to wait for
            if self.stage is _ENDED:
                return True
            if moment != NEVER and self._clock.now() >= moment:
                return False
            self._clock.wait_until(waiter, moment)

    def abandon(self, error: BaseException) -> int:
        """Fail all jobs that are not settled, even running ones, and return their number."""
        return self._abandon(list(self.queue.waiting), error, and_running=True)

    def _abandon(self, group: Group, error: BaseException, and_running: bool = False) -> int:
        try:
            self.queue.may_expire = True  # because `claim` may meet jobs of this group again
            self.ledger.claim(group)
            failed = self.ledger.fail(self.ledger.running() if and_running else group, error)
            self.queue.post(partial(self._dispatcher.forget, group))
            for future in self.queue.cancelled.peek():  # there may be no leader to do this
                future._announce()
            self.ledger.announce_again(self.queue.dropped.peek())
            return failed
        except BaseException:  # from a signal handler
            self.ledger.fail(self.ledger.running() if and_running else self.ledger.not_waiting(group), error)
            raise

    def exit_deadline(self) -> float:
        """Return until when the interpreter waits for this engine if it begins to exit now. Never raises."""
        try:
            return self._clock.now() + self._exit_timeout
        except Exception:  # from a user's clock; the batcher thread fails too, so it ends soon
            return NEVER

    def note_exit(self) -> None:
        """See `Host.note_exit`."""
        if self.queue.host is not None:
            self.queue.host.note_exit()

    def disown_threads(self) -> None:
        """See `Runner.disown_threads`."""
        self._runner.disown_threads()

    def give_up(self) -> None:
        """Fail all jobs that are left when the interpreter exits, let no thread wait for them, and log their number."""
        lost = self.abandon(BatcherClosed("the interpreter exited before the job was done"))
        self.stage, self._thread = _ENDED, None
        self.queue.ended.notify_all()
        self.queue.post(lambda: None)  # so that threads that are not daemons notice, and end
        self.disown_threads()
        report("%r lost %d jobs: the interpreter stopped waiting for them at exit", self, lost)

    def add_shutdown_callback(self, callback: Callable[[], object]) -> None:
        """Have *callback* called after the last job is settled, or immediately if the batcher has ended."""
        call = partial(callback)  # equal only to itself
        self._callbacks.append(call)
        if self.stage is _ENDED and call in self._callbacks:
            self._run_callbacks()

    @property
    def policy(self) -> BatchingPolicy[Any]:
        """The policy. If it is replaced, the next leader adopts the new one."""
        return self._dispatcher.policy

    @policy.setter
    def policy(self, policy: BatchingPolicy[Any]) -> None:
        # Before the assignment, because the hints may raise, and because the next caller may come before the leader.
        self.queue.watch_callers(policy.hints)
        self._dispatcher.policy = policy
        self.queue.note_news()

    def explain(self) -> list[str]:
        """See `Collector.describe`."""
        return self._dispatcher.explain()

    def __repr__(self) -> str:
        return f"<Batcher {self._name!r}>"

    # -- called by the batcher's own threads --

    def _new_thread(self) -> threading.Thread:
        self._thread = _make_thread(self._run, self._name)
        return self._thread

    def _start_now(self, arguments: object) -> None:
        if (error := _try_to_start(self._new_thread())) is not None:
            self._thread = None
            raise error

    def _note_failed_start(self, error: BaseException) -> None:
        self._thread = None
        if is_exiting(error):
            self._run()
        else:
            self._unclaimed = True
            self._give_up_start(error)

    def _run(self) -> None:
        self.queue.this_thread.is_own = True
        try:
            self._runner.open()
        except BaseException as error:
            self._thread, self._unclaimed = None, True
            self._give_up_start(error)
            return
        if self.stage is _ENDED:  # by `give_up`, in the meantime
            self._runner.close()
            return
        self.stage = _RUNNING
        try:
            self._work()
        except BaseException as error:
            report("the batcher thread of %s failed, so all its jobs fail", self._name, level=logging.CRITICAL)
            self.queue.close()
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
        self._runner.survive(self._open_host)
        self._runner.survive(self._fail_forgotten)
        while True:
            try:
                return self._take_all_turns()
            except BaseException as error:
                self._runner.recover(error)

    def _open_host(self) -> None:
        """Open the host of the processor. Not earlier, because a batcher that never starts may never be shut down."""
        if self.queue.host is not None:
            self._callbacks.append(partial(self.queue.host.open()))

    def _fail_forgotten(self) -> None:
        """Fail the jobs of an earlier start that failed, if even failing them was interrupted. No batch runs now."""
        self.ledger.fail(self.ledger.running(), RuntimeError("the threads of the batcher could not be started"))

    def _take_all_turns(self) -> None:
        while not self._runner.survive(self._take_turns):
            pass

    def _take_turns(self) -> None:
        if self.queue.is_leader():
            self.queue.resign(NOW, 1)  # take the lead again immediately: this thread was interrupted while it led
        while not self._dispatcher.turn(self._runner.run):
            pass

    def _give_up_start(self, error: BaseException) -> None:
        """Fail the jobs that were accepted before a failed start, unless another thread has started the threads."""
        waiting = list(self.queue.waiting)  # before the check, so that it has no job of another thread's start
        if not self.is_claimed:
            self._abandon(waiting, error)
        self.queue.wake_all()
        self._end_unstarted()  # if another thread has closed the batcher, it has left this to the batcher thread

    def _end(self) -> None:
        """End the threads that run batches, and call the shutdown callbacks. Can be called again after an exception."""
        self._runner.close()
        self._run_callbacks()
        self.stage = _ENDED
        self._run_callbacks()  # those that were added since
        if self.queue.is_leader() or self.queue.take_lead():
            if dropped := self.queue.dropped.peek():
                self._dispatcher.announce_dropped(dropped)
            for call in self.queue.forget():
                call()
        self.queue.ended.notify_all()

    def _run_callbacks(self) -> None:
        while self._callbacks:
            self._run_next_callback()

    def _run_next_callback(self) -> None:
        try:
            callback = self._callbacks.pop(0)
        except IndexError:  # another thread has called it
            return
        _run_shutdown_callback(callback)


def _launch(engines: list[Engine]) -> None:
    """Start the batcher thread of the one engine in the list. Called in a thread of its own, which then ends.

    If the interpreter is exiting, that thread does the work of the batcher thread itself. While it starts the batcher
    thread, it does not refer to the engine, because the engine may end before this function does.
    """
    try:
        engine = engines.pop()
        engine.queue.this_thread.is_own = True  # a finalizer may run here, and must not wait for the start
        try:
            thread = engine._new_thread()
        except BaseException as error:
            engine._note_failed_start(error)
            return
        reference = weakref.ref(engine)
        del engine
        failure = _try_to_start(thread)
        if failure is not None and (found := reference()) is not None:  # the thread refers to it until it has run
            found._note_failed_start(failure)
    finally:
        # A finalizer that ran here may have called `threading.current_thread`, which added a dummy. Before Python 3.13,
        # that would stay forever.
        threading._active.pop(threading.get_ident(), None)  # type: ignore[attr-defined]


def _try_to_start(thread: threading.Thread) -> BaseException | None:
    try:
        thread.start()
    except BaseException as error:
        # `start` also fails if there is no memory for the wait until the thread runs. It is in `_limbo` until then.
        if thread not in threading._limbo and thread.ident is None:  # type: ignore[attr-defined]
            return error
    return None


def _make_thread(target: Callable[[], None], name: str) -> threading.Thread:
    try:
        return threading.Thread(target=target, name=name, daemon=True)
    except RuntimeError as error:
        if "daemon" not in str(error):  # it comes from a signal handler
            raise
        return threading.Thread(target=target, name=name, daemon=False)  # an isolated subinterpreter has no daemons


def _notify_of_shutdown(settings: Settings, ledger: Ledger) -> None:
    notify(settings.listeners.shutdown, BatcherShutDown(settings.name, ledger.stats()))


def _run_shutdown_callback(callback: Callable[[], object]) -> None:
    try:
        callback()
    except BaseException:
        report("a shutdown callback raised")
