"""The threads that form batches and run them, and their life. The only file that knows what a thread is.

Whoever leads pulls from the queue, drives the collector, and hands batches to the executor: the worker thread, which
waits for jobs and moments, or a thread of our own pool that has just run a batch. Nothing here refers to the `Batcher`,
so that a batcher which nobody holds any more can be collected while its threads still run.
"""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import thread as _pool_internals
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import Any

from microbatch._basics.arguments import check_answer
from microbatch._basics.clock import NEVER, NOW, Clock
from microbatch._basics.log import report
from microbatch._basics.waiting import Bell, Opening
from microbatch._engine.batch_run import Delivery, fail
from microbatch._engine.ledger import Ledger
from microbatch._engine.process import current_mark, enlist
from microbatch._engine.queue import NO_NEWS, JobQueue, News
from microbatch._engine.sending import name_unsendable, send
from microbatch._forming.collector import Batch, Collector
from microbatch.errors import BatcherClosed, ForkedError, JobExpired, Rejected
from microbatch.futures.exceptions import Failures
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import Audience, BatcherShutDown, BatchFinished, BatchStarted, tell
from microbatch.policies.base import BatchingPolicy, BatchReport, learns
from microbatch.results import BatchInfo, JobState

__all__ = ["Worker"]

_MOST_MISHAPS = 3
"""How many exceptions may come in from outside in a row, with nothing done between them."""


class Worker:
    """Moves jobs from the queue to the processor. All that a `Batcher` has but its face.

    Which thread may write what: callers' threads the `queue`, the one that leads the collector and the `ledger`, threads
    that run batches the `ledger`. The lead changes hands under the queue's mutex, which guards the decision to start, or to
    shut down what never started, too: with a lock of its own for that, a signal handler that shuts down could wait for a
    thread that waits for the mutex.
    """

    def __init__(
        self,
        processor: Callable[[list[Any]], Any],
        policy: BatchingPolicy[Any],
        *,
        max_pending: int,
        max_workers: int,
        executor: Executor | None,
        audience: Audience,
        name: str,
        exit_timeout: float,
        clock: Clock,
        keyed: bool,
        alike: bool,
        forked: bool = False,
    ) -> None:
        self.mark = current_mark()
        # Of a caller that comes back nobody knows for which key.
        self.queue = JobQueue(clock, max_pending, policy.watches_callers and not keyed, policy.recalls)
        self.queue.explainer = weakref.WeakMethod(self.explain_job)  # a future must not keep the processor alive
        self.ledger = Ledger(self.queue, name)
        self._exit_timeout = exit_timeout
        self._processor = processor
        self._collector: Collector[JobFuture[Any]] = Collector(
            policy, max_workers, check_answer("the now() of a clock", clock.now())
        )
        self._learns = learns(policy)
        self._clock = clock
        self._alike = alike  # jobs have neither keys nor weights
        self._name = name
        self._audience = audience
        self._executor = executor
        self._forked = forked  # made in a child, to replace the worker that stayed in the parent
        self.finalizer: Any = None  # of the batcher, from the start of the threads on
        self._pool: ThreadPoolExecutor | None = None
        self._inbox = _Inbox()  # for the threads of that pool
        self._running: dict[Delivery, None] = {}  # batches in flight, with those that a thread is handling
        self._mishaps = 0  # how many exceptions came in from outside since a leader last did all that there was to do
        self._thread: threading.Thread | None = None
        self.opening: Opening | None = None  # not None from the start of the threads on
        self._ending = threading.RLock()  # held by the thread that ends what has no thread of its own
        self._callbacks: list[Callable[[], object]] = []
        if audience.shutdown:  # as the first of those, so that it is told once, whoever ends this and however often
            self._callbacks.append(partial(_tell_of_shutdown, audience, name, self.ledger))
        self.started = False  # whether the threads have been started, and may have ended
        self._ended = False

    # -- called by any thread --

    def start(self) -> None:
        """Start all threads, once, and return when they run.

        They are daemons if the interpreter allows any, so that the interpreter does not join them if they take longer
        than `exit_timeout`. All are started now, since no thread can be started once the interpreter is going down
        (CPython 3.12).

        Raises:
            BatcherClosed: it was shut down, or the interpreter is going down.
            ForkedError: the executor belongs to the parent process.
            Rejected: a signal broke it off, in another thread.
            RuntimeError: the system gives no more threads; nothing is left running.
        """
        self._check_startable()
        enlist(self)
        mine = Opening()
        try:
            opening = self._agree_on(mine)
            if opening is mine:
                _make_thread(partial(self._run, mine), self._name).start()
        except BaseException:  # a signal, maybe, and then the thread may well exist
            error = Rejected("the start of the batcher was broken off")
            with self.queue.mutex:
                left = self._claim_all() if self._call_off(mine, error) else []
            self._fail(left, error)
            raise
        # Others than the launcher need not wait, and must not for long: a finalizer may call from the very thread that is
        # being started. Who interrupts a holder of the mutex, which that thread needs, must not wait at all.
        opening.wait(0 if self.queue.is_held() else None if opening is mine else 1)

    def _agree_on(self, opening: Opening) -> Opening:
        """Return the opening that counts, which is this one if the caller is to start the threads."""
        with self.queue.mutex:
            self._check_startable()
            agreed = self.opening  # no call from here on, so that no handler comes in and starts them too
            if agreed is None:
                agreed = self.opening = opening
            return agreed

    def _check_startable(self) -> None:
        if self.queue.closed:
            raise BatcherClosed("the batcher is shut down")
        if self._forked and self._executor is not None:
            raise ForkedError("the executor belongs to the parent process")

    def _call_off(self, opening: Opening | None, error: BaseException) -> bool:
        """Have the thread find that it is not wanted, and raise *error* where it is awaited; False if it is at work."""
        with self.queue.mutex:
            if self.opening is not opening or self._thread is not None or self.started:
                return False
            self.opening = None
        if opening is not None:
            opening.settle(error)
            self.queue.settled.notify_all()  # there is no thread to wait for
        return True

    def leave_to_parent(self) -> None:
        """Fail, in a forked child, all jobs that the parent still has to do there. No thread of this worker lives here.

        Takes no lock: a thread that does not exist here may have held it.
        """
        for future in self.ledger.inherited():
            future.disinherit(ForkedError("the job was submitted in the parent process, and is done there"))
        self.queue.queue = deque()  # which a future that is kept here keeps

    def close(self) -> None:
        """Accept no more jobs and make all that were accepted due. Does not wait."""
        self.queue.close()
        self._end_unstarted()

    def _end_unstarted(self) -> None:
        """End a closed batcher that has no thread of its own to do so, unless another thread is ending it."""
        if self._ended or not self.queue.closed or self.queue.is_own_thread():
            return
        error = BatcherClosed("the batcher was shut down before its threads were started")
        if not self._call_off(self.opening, error):
            return
        try:
            if self._ending.acquire(blocking=False):
                with self.queue.own_thread():
                    self.abandon(error)
                    self._end()
        finally:  # asked of the lock itself, for a signal may come in just when it is taken
            if self._ending._is_owned():  # type: ignore[attr-defined]
                self._ending.release()
                self.queue.settled.notify_all()  # so that another thread takes over if this was broken off

    def wait_ended(self, moment: float = NEVER) -> bool:
        """Wait until every job is settled and the threads are gone; False if *moment* comes first."""
        bell = Bell(self.queue.mutex)
        try:
            self.queue.settled[bell] = None
            while True:
                self._end_unstarted()  # there may be no thread to wait for, or none any more
                with self.queue.mutex:
                    ended, thread = self._ended, self._thread
                    if ended or (moment != NEVER and self._clock.now() >= moment):
                        break
                    self._clock.wait_until(bell, moment)
        finally:
            self.queue.settled.pop(bell, None)
        if ended and thread is not None and thread is not threading.current_thread():
            thread.join()  # it has nothing left to do but to end
        return ended

    def abandon(self, error: BaseException) -> int:
        """Fail every job that is not settled, running ones too, and return how many those were."""
        return self._fail(self._claim_all(), error)

    def _claim_all(self) -> list[JobFuture[Any]]:
        """Take every job that is not settled out of the worker thread's hands; in one step, if the mutex is held."""
        self.ledger.take_in()
        futures = self.ledger.unsettled()
        self.ledger.claim(futures)
        return futures

    def _fail(self, futures: list[JobFuture[Any]], error: BaseException) -> int:
        failed = fail(self.ledger, futures, error)
        over = [future for future in futures if future.done()]
        for future in over:
            future.announce()
        self.ledger.release(over)
        for future in over:
            future.call_back()
        return failed

    def exit_deadline(self) -> float:
        """Return the moment until which the interpreter's end may wait, if that wait begins now. Never raises."""
        try:
            return self._clock.now() + self._exit_timeout
        except Exception:  # of a clock that a user injected: the worker thread fails by it, and soon ends
            return NEVER

    def disown_threads(self) -> None:
        """Have the interpreter end without waiting for the threads of a pool of our own."""
        if self._pool is not None:
            for thread in self._pool._threads:
                _pool_internals._threads_queues.pop(thread, None)  # type: ignore[attr-defined]

    def give_up(self) -> None:
        """Fail what is left because the interpreter goes down, have nobody wait for it, and log how many jobs it was."""
        lost = self.abandon(BatcherClosed("the interpreter went down before the job was done"))
        with self.queue.mutex:
            self._ended, self._thread = True, None
            self.queue.settled.notify_all()
        self.queue.post(_do_nothing)  # so that threads that are not daemons notice, and end
        self.disown_threads()
        report("%r lost %d jobs: the interpreter did not wait for them any longer", self, lost)

    def add_shutdown_callback(self, callback: Callable[[], object]) -> None:
        """Have *callback* called after the last job is settled; at once if that is over."""
        with self.queue.mutex:
            if not self._ended:
                self._callbacks.append(callback)
                return
        _call_back(callback)

    def explain(self) -> list[str]:
        """See `Collector.describe`."""
        return self._collector.describe(self._clock.now())

    def explain_job(self, future: JobFuture[Any]) -> str:
        """Say why a job has no outcome yet. Any thread may ask, and waits for no other."""
        batch = self._collector.describe_batch(future.key, self._clock.now()) if future.waiting else ""
        return f"the job is still {future.stage.value}" + (f"; {batch}" if batch else "")

    def __repr__(self) -> str:
        return f"<Batcher {self._name!r}>"

    # -- called by the worker thread --

    def _run(self, opening: Opening) -> None:
        with self.queue.mutex:
            if self.opening is not opening:
                return
            self._thread = threading.current_thread()
        try:
            self._open_pool()
        except BaseException as error:
            self._give_up_start(opening, error)
            return
        self.queue.inside.mine = True
        self.started = True
        opening.settle()
        try:
            self._work()
        except BaseException as error:
            report("the worker thread of %s failed, and its jobs with it", self._name, level=logging.CRITICAL)
            self.queue.close()
            self.ledger.recover()  # or what it has just taken out of the queue could be lost
            self.abandon(error)
        for _ in range(_MOST_MISHAPS):
            try:
                return self._end()
            except BaseException:
                report("an exception from outside interrupted the worker thread of %s while it ended", self._name)

    def _work(self) -> None:
        """Lead, where no other thread does, until the batcher is closed and nothing is left to do."""
        self.queue.leader = threading.get_ident()
        while True:
            try:
                return self._take_all_turns()
            except BaseException as error:
                self._recover(error)

    def _take_all_turns(self) -> None:
        while not self._survive(self._take_turns):
            pass

    def _take_turns(self) -> None:
        if self.queue.is_leader():
            self.ledger.resign(NOW, 1)  # to look at once: a shutdown may have taken the news of it
        while not self._turn():
            pass

    def _give_up_start(self, opening: Opening, error: BaseException) -> None:
        """Fail the jobs that were accepted meanwhile, and leave the batcher as if this thread had never been started."""
        # In one step: a caller that submits a job from then on, or waits for the end, finds that no thread is at work.
        with self.queue.mutex:
            left = self._claim_all()  # of callers that did not wait for the threads to run
            self.opening = self._thread = None
            self.queue.settled.notify_all()
        opening.settle(error)
        with self.queue.own_thread():
            self._fail(left, error)
        self._end_unstarted()  # if it was closed by a thread that left the rest to this one

    def _turn(self) -> bool:
        """Wait until there is something to do, do all of it, and return whether there never will be more."""
        self._advance(self.ledger.wait_for_news())
        self._mishaps = 0
        over = not self._collector and not self._collector.in_flight and self.queue.drained()
        if not over:
            self.ledger.resign(*self._terms())
        return over

    # -- called by a thread of ours after an exception --

    def _survive(self, act: Callable[[], None]) -> bool:
        """Call *act*, recover if an exception interrupts it, even if another interrupts that; return whether none did."""
        try:
            try:
                act()
                return True
            except BaseException as error:
                self._recover(error)
        except BaseException as error:
            self._recover(error)
        return False

    def _recover(self, error: BaseException) -> None:
        """Put right what an exception has interrupted in the calling thread.

        Exceptions from users' code don't get here: they are handled where that code is called. But a library that
        enforces a timeout may raise one in this thread from outside, too late, between any two of our statements. The
        jobs that the thread was handling fail, and everything else goes on. Any half-done state is put right from what
        changes in one step: `Ledger.inherited` has each job that is not settled, `_running` each batch, and
        `JobQueue.leader` says who leads.
        """
        report(
            "an exception from outside interrupted a thread of %s; the jobs it was handling fail",
            self._name,
            error=error,
        )
        self._mishaps += 1
        if self._mishaps > _MOST_MISHAPS:  # so it comes from inside
            raise error
        for delivery in list(self._running):
            if delivery.owner == threading.get_ident():
                self._fail(delivery.forget(), error)
            elif not delivery.owner and self._pool is not None:
                self._inbox.put(delivery)  # this thread may have taken it out; that it is there twice does no harm
        if self.queue.is_leader():
            self._recover_lead(error)
        for delivery in list(self._running):
            if not delivery.futures:
                self.queue.post(partial(self._finish, delivery))
        self.ledger.tell_again()

    def _recover_lead(self, error: BaseException) -> None:
        """Form all batches again, since an interrupted leader may have left them half formed, and leave the lead."""
        waiting = self.ledger.recover()
        for delivery in list(self._running):
            if not delivery.futures or not (self._pool is not None or delivery.sent):
                self._fail(delivery.forget(), error)
                self._running.pop(delivery, None)
        in_flight = {future for delivery in list(self._running) for future in list(delivery.futures)}
        self._fail([each for each in self.ledger.unsettled() if each.running() and each not in in_flight], error)
        self._collector = self._collector.successor(len(self._running))
        self._collector.add(waiting)
        self._collector.flush(self.queue.epoch - 1, closing=self.queue.closed)
        self.ledger.resign(NOW, 1)

    # -- called by the thread that leads --

    def _terms(self) -> tuple[float, int]:
        """Return when somebody has to lead again: at which moment, or with how many jobs."""
        return self._collector.next_moment(), self._collector.wanted()

    def _advance(self, news: News, *notes: Callable[[], None]) -> None:
        """Do all that there is to do now; *notes* are called after those in the news."""
        collector = self._collector
        if news is not NO_NEWS:
            collector.hear_of(news.returning, news.return_by, news.heard)
            collector.add(news.jobs, self._alike and not news.expiring)
            if news.withdrawn:
                self._strike_out(list(news.withdrawn))
            collector.flush(news.flushed, closing=news.closed)
        for note in chain(news.notes, notes):
            note()
        # Again if something has become due meanwhile, before another thread has to be woken for it.
        while self._dispatch(self._clock.now()) and collector.has_worker:
            if collector.next_moment() > self._clock.now():
                break
        if collector.joined:
            self.ledger.mark_batched(collector.joined)
            collector.joined.clear()

    def _dispatch(self, now: float) -> bool:
        """Send all batches that are due, and return whether there were any."""
        if expired := self._collector.expire(now):
            self._expire(expired)
        any_taken = False
        while (batch := self._collector.take(now, self.queue.is_stuck())) is not None:
            self._send(batch, now)
            any_taken = True
        return any_taken

    def _strike_out(self, cancelled: list[JobFuture[Any]]) -> None:
        self._collector.drop(cancelled)
        for future in cancelled:
            future.announce()
        self.ledger.release(cancelled)

    def _expire(self, expired: list[JobFuture[Any]]) -> None:
        expired = self.ledger.claim(expired)
        self._collector.drop(expired)
        errors = [JobExpired(future.expires_in) for future in expired]
        self.ledger.settle(expired, errors, Failures(repr(self._name), self.queue), failed=JobState.EXPIRED)

    def _send(self, batch: Batch[JobFuture[Any]], now: float) -> None:
        if batch.error is not None:
            fail(self.ledger, self.ledger.claim(batch.entries), batch.error)
            return
        futures, number = self.ledger.claim_batch(batch.entries, batch.trigger)
        if not futures:
            return
        weight = batch.weight
        if len(futures) < len(batch.entries):
            weight = sum([future.weight for future in futures])
        info = BatchInfo(number, len(futures), weight, batch.key, batch.trigger)
        delivery = Delivery(self.ledger, futures, info)
        self._running[delivery] = None
        self._collector.started(now)
        if self._executor is None:
            self._inbox.put(delivery)
            return
        try:
            self._begin(delivery)
            sent = send(self._executor, self._processor, delivery.jobs)
            delivery.sent = True
            sent.add_done_callback(partial(self._receive, delivery))
        except BaseException as error:  # the caller's executor is broken, or was shut down, or can't send this
            delivery.fail(self._named(error, delivery))
            self._report(delivery)

    def _finish(self, delivery: Delivery, time: float | None = None) -> None:
        if self._running.pop(delivery, self) is self:
            return  # after an exception this may be called twice
        self._collector.finished(time)
        try:
            if time is not None and self._learns:
                self._collector.policy.observe(BatchReport(delivery.info, time, delivery.failed))
        except BaseException:
            report("the observe() of a policy raised, in batch %d of %s", delivery.info.id, self._name)

    def _open_pool(self) -> None:
        """Start all threads of a pool of our own. They are daemons if the thread that starts them is one."""
        if self._executor is not None:
            return
        workers = self._collector.workers
        self._pool, self._inbox = ThreadPoolExecutor(workers, self._name), _Inbox()
        try:
            for _ in range(workers):
                self._employ(self._pool, self._inbox)
        except BaseException:
            self._close_pool()
            raise

    def _employ(self, pool: ThreadPoolExecutor, inbox: "_Inbox") -> None:
        pool.submit(self._serve_all, inbox).add_done_callback(partial(self._go_on, pool, inbox))

    def _go_on(self, pool: ThreadPoolExecutor, inbox: "_Inbox", done: "Future[None]") -> None:
        """Have the calling thread resume its work after an exception ended it, wherever that came in."""
        error = done.exception()
        del done
        if error is None:
            return
        try:
            self._recover(error)
        except BaseException as fatal:  # for the worker thread to fail by
            self.queue.post(partial(_fail_by, fatal))
            if self.queue.is_leader():
                self.ledger.resign(NOW, 1)
        finally:
            if inbox.closed:
                inbox.close()  # for the next thread, in case this one has taken the None
            else:
                self._employ(pool, inbox)

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._inbox.closed = True
            self._inbox.close()
            self._pool.shutdown()

    def _end(self) -> None:
        """Let the threads of the pool end, and call the shutdown callbacks. Can be called again after an exception."""
        self._close_pool()
        while (callback := self._next_shutdown_callback()) is not None:
            _call_back(callback)

    def _next_shutdown_callback(self) -> Callable[[], object] | None:
        with self.queue.mutex:
            if self._callbacks:
                return self._callbacks.pop(0)
            self._ended = True  # in the same step: from now on a callback that is added is called at once
            self.queue.settled.notify_all()
            return None

    # -- called by the threads that run batches --

    def _serve_all(self, inbox: "_Inbox") -> None:
        """Process what comes into the inbox until it is closed; in a thread of our own pool.

        One call per thread and not per batch, since the futures of a pool cost as much as a batch of ours.
        """
        self.queue.inside.mine = True
        while not inbox.closed:
            self._survive(partial(self._serve_until_none, inbox))
        inbox.close()  # for the next thread

    def _serve_until_none(self, inbox: "_Inbox") -> None:
        while (delivery := inbox.get()) is not None:
            if delivery.claim():
                self._serve(delivery)
            del delivery  # keep nothing alive while idle

    def _serve(self, delivery: Delivery) -> None:
        """Process one batch."""
        try:
            self._begin(delivery)
            delivery.complete(self._processor(delivery.jobs))
        except BaseException as error:
            delivery.fail(error)
        self._report(delivery)

    def _begin(self, delivery: Delivery) -> None:
        if self._audience.batch_started:
            tell(self._audience.batch_started, BatchStarted(self._name, delivery.info, tuple(delivery.futures)))
        delivery.start()

    def _receive(self, delivery: Delivery, done: "Future[Any]") -> None:
        """Take what the caller's executor gives back, in whatever thread it calls from."""
        try:
            with self.queue.own_thread():
                try:
                    delivery.complete(done.result())
                except BaseException as error:
                    delivery.fail(self._named(error, delivery))
                self._report(delivery)
        except BaseException as error:  # from outside: see `_recover`
            self._fail(delivery.forget(), error)
            self.queue.post(partial(self._finish, delivery))
        finally:
            del done  # which holds the exception whose traceback leads here

    def _named(self, error: BaseException, delivery: Delivery) -> BaseException:
        if self._executor is None or isinstance(self._executor, ThreadPoolExecutor):
            return error  # as nothing was sent
        return name_unsendable(error, self._processor, delivery.jobs)

    def _report(self, delivery: Delivery) -> None:
        futures = delivery.forget()
        if not futures:
            return  # an executor that calls back twice
        done = partial(self._finish, delivery)
        try:
            time = delivery.service_time
            done = partial(self._finish, delivery, time)
            if self._audience.batch_finished:
                self._tell_of_end(delivery.info, time, delivery.started, futures)
        except BaseException:  # of a clock that a user injected: the worker is free all the same
            report("batch %d of %s can't be reported to the policy", delivery.info.id, self._name)
        self._pass_on(done)

    def _tell_of_end(self, info: BatchInfo, time: float, started: float, futures: list[JobFuture[Any]]) -> None:
        failed = [future.stage for future in futures].count(JobState.FAILED)  # by whomever: not only by the processor
        tell(self._audience.batch_finished, BatchFinished(self._name, info, tuple(futures), started, time, failed))

    def _pass_on(self, note: Callable[[], None]) -> None:
        """Have *note* called by whoever leads; by this very thread if nobody does, and then it finds its own next batch.

        That is the Leader/Followers pattern of Schmidt and others, Pattern-Oriented Software Architecture 2: no word to
        another thread, and no sleep, while there is work.
        """
        news = self.ledger.lead() if self._pool is not None else None
        if news is None:
            self.queue.post(note)
            return
        self._advance(news, note)
        self._mishaps = 0
        # A finalizer may have closed the queue since this thread took the lead: the end is up to the worker thread.
        terms = self._terms() if not news.closed else (NOW, 1)
        self.ledger.resign(*terms)


def _make_thread(target: Callable[[], None], name: str) -> threading.Thread:
    try:
        return threading.Thread(target=target, name=name, daemon=True)
    except RuntimeError:  # an isolated subinterpreter has no daemons
        return threading.Thread(target=target, name=name, daemon=False)


class _Inbox(SimpleQueue[Delivery | None]):
    """Batches for the threads of a pool, one after another until it is closed.

    Attributes:
        closed: whether it is, for a thread that took the None that says so and lost it to an exception.
    """

    closed = False

    def close(self) -> None:
        """Put in a None, which ends one thread. That thread then calls this for the next one."""
        self.put(None)


def _do_nothing() -> None:
    pass


def _fail_by(error: BaseException) -> None:
    raise error


def _tell_of_shutdown(audience: Audience, name: str, ledger: Ledger) -> None:
    tell(audience.shutdown, BatcherShutDown(name, ledger.stats()))


def _call_back(callback: Callable[[], object]) -> None:
    try:
        callback()
    except BaseException:
        report("a shutdown callback raised")
