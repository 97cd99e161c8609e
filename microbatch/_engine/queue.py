"""The queue between the callers' threads and the one that leads."""

import contextlib
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from microbatch._basics.clock import NEVER, NOW, let_others_run
from microbatch._basics.waiting import Waiter, Waiters
from microbatch._engine.settings import Settings
from microbatch._forming.callers import Caller, Callers
from microbatch.errors import BacklogFull, BatcherClosed
from microbatch.futures.job_future import JobFuture
from microbatch.policies.base import CallerActivity
from microbatch.results import WAITING, JobState

__all__ = ["JobQueue", "NOTHING", "Drained"]

_QUEUED, _CANCELLED = (
    JobState.QUEUED,
    JobState.CANCELLED,
)  # as globals: up to Python 3.10, the class is asked by a call (R5)


class Drained(NamedTuple):
    """What the leader takes out of the queue: everything that came in since a thread last led."""

    jobs: deque[JobFuture[Any]]
    cancelled: dict[JobFuture[Any], JobState]
    calls: list[Callable[[], None]]  # see `JobQueue.post`
    flushed: int
    closed: bool
    expiring: bool  # there may be jobs that expire
    callers: CallerActivity


NOTHING = Drained(deque(), {}, [], -1, False, False, CallerActivity())
"""What the leader gets from an empty queue. Draining the queue would take longer."""


class _Local(threading.local):
    is_own_thread = False  # whether this is one of the batcher's own threads, which must not wait for the batcher


class JobQueue(queue.Queue[JobFuture[Any]]):
    """A `queue.Queue` that is emptied all at once, can be closed, and bounds the jobs that no worker has taken yet.

    What wakes which threads:

    - `not_empty` wakes the batcher thread, for everything that `Drained` holds.
    - `not_full` wakes callers in `put`: a job stopped waiting, or the queue was closed.
    - `settled` wakes callers in `flush` and `shutdown`: no job of some epoch is left, or the threads have ended.

    The rules for its lock are in ``__init__.py``.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.max_pending)
        self.name = settings.name  # of the batcher
        self.mutex = threading.RLock()  # type: ignore[assignment]
        # Whether the calling thread holds the mutex. If so, a handler or finalizer has interrupted the thread.
        self.is_held: Callable[[], bool] = self.mutex._is_owned  # type: ignore[attr-defined]
        self.not_empty: Waiter = Waiter(self.mutex)
        self.not_full: Waiters = Waiters()  # type: ignore[assignment]
        self.all_tasks_done = threading.Condition(self.mutex)
        self.settled = Waiters()
        hints = settings.policy.hints
        # If jobs have keys, nobody knows which batch the next job of a caller will join, so no batch can wait for it.
        self.callers = Callers(hints.watches_callers and not settings.keyed, hints.recalls)
        self.clock = settings.clock
        self._now = self.clock.now
        self._away, self._recalls = self.callers.away, hints.recalls > 0
        self._limit = self.maxsize or sys.maxsize
        self.epoch = 0  # each job has the epoch in which it was accepted; a flush ends the epoch
        self.closed = False
        self.explainer: Callable[[], Callable[[JobFuture[Any]], str] | None] = lambda: None
        self._local = _Local()
        self._taken_waiting = 0  # the number of jobs that were taken out and that no worker has
        self.taken: deque[JobFuture[Any]] = deque()  # taken out, and not in the ledger yet
        self.counted = 0  # the number of jobs that were ever entered in the ledger
        # Jobs whose cancellation the ledger has not recorded yet, and the stages that they were in.
        self.cancelled: dict[JobFuture[Any], JobState] = {}
        self._calls: list[Callable[[], None]] = []
        self._has_other_news = False  # there is news other than jobs
        self.leader = 0  # the thread that leads, or 0
        self._wanted: float = 1  # how many jobs wake the batcher thread; none do while a thread leads
        self._moment = NEVER  # when it wakes up in any case
        self._alarm = NOW  # when it will wake up, if it sleeps; otherwise `NOW`
        self._expiring = False  # a new job expires; separate from `_has_other_news`, because `_accept` sets it (R5)

    def _qsize(self) -> int:
        return len(self.queue) + self._taken_waiting - len(self.cancelled)

    def _full(self) -> bool:
        return 0 < self.maxsize <= self._qsize()

    def drained(self) -> bool:
        """Return whether the queue is closed, and nothing will ever come out of it again."""
        with self.mutex:
            return self.closed and not self.queue and not self.cancelled and not self._calls

    def blocks_callers(self) -> bool:
        """Return whether a caller waits because the queue is full, so that a batch must be dispatched early."""
        if not self.not_full:
            return False
        with self.mutex:
            return bool(self.not_full) and self._full()

    def is_own_thread(self) -> bool:
        """Return whether the calling thread is one of the batcher's own, which must not wait for the batcher."""
        return self._local.is_own_thread

    @contextlib.contextmanager
    def own_thread(self) -> Iterator[None]:
        """Treat the calling thread as one of the batcher's own threads, inside the ``with`` block."""
        before = self.is_own_thread()
        try:
            self.adopt_thread()
            yield
        finally:
            self._local.is_own_thread = before

    def adopt_thread(self) -> None:
        """Treat the calling thread as one of the batcher's own threads from now on."""
        self._local.is_own_thread = True

    def put(
        self, item: JobFuture[Any], block: bool = True, timeout: float | None = None, expires_in: float | None = None
    ) -> None:
        """Accept a job.

        Args:
            item: The future of the job.
            block: Whether to wait while the queue is full. The batcher's own threads never wait.
            timeout: How many seconds to wait. None means no limit.
            expires_in: How many seconds after now the job expires. None if it never does.

        Raises:
            BacklogFull: The queue is full, or was still full after *timeout* seconds.
            BatcherClosed: The queue is closed, or was closed during the wait.
        """
        if self.is_held():  # R2
            with self.mutex:
                self._accept(item, block, timeout, expires_in)
            return
        try:
            try:
                if not self.mutex.acquire(False):
                    self._acquire()
                self._accept(item, block, timeout, expires_in)
            except BaseException:
                if self.is_held():  # R8
                    self.mutex.release()
                raise
        except BaseException:
            if self.is_held():  # a second signal came in before the release
                self.mutex.release()
            raise
        self.mutex.release()

    def _acquire(self) -> None:
        # A thread that blocks on the mutex gets it before it gets the GIL, so all other threads have to wait for both.
        # Once some threads wait, that never ends, and each job costs a switch of threads.
        while not self.mutex.acquire(False):
            let_others_run()

    def _accept(self, item: JobFuture[Any], block: bool, timeout: float | None, expires_in: float | None) -> None:
        if len(self.queue) + self._taken_waiting >= self._limit and self._full() and not self.closed:
            self._wait_while_full(block and not self.is_own_thread(), timeout)
        item.submitted = now = self._now()
        if self._away or self._recalls:
            self.callers.record_submission(threading.get_ident(), now)
        if expires_in is not None:
            item.expires_in = expires_in
            item._expires = item.submitted + expires_in
            self._expiring = True  # R5, until the job is appended: the leader has to find both or neither
        item._epoch = self.epoch
        # R5: a handler may shut the batcher down, and wait until the batcher thread has ended. (The ``return`` is
        # inside the ``if``, because on CPython 3.10, a handler may run at a jump.)
        try:
            if not self.closed:
                self.queue.append(item)  # from here on the job is accepted
                return
        finally:
            if len(self.queue) >= self._wanted or self._expiring:
                self.not_empty.wake()
        raise BatcherClosed("the batcher is shut down")

    def _wait_while_full(self, block: bool, timeout: float | None) -> None:
        deadline = NEVER if timeout is None else self.clock.now() + timeout
        if not block or timeout == 0:
            raise BacklogFull(self.maxsize)
        waiter = Waiter(self.mutex)
        try:
            self.not_full[waiter] = None
            self._note_news()
            self._wait_until_not_full(waiter, deadline)
        except BaseException:
            # This thread may just have been woken, but adds no job. So it wakes another one in its place.
            self.not_full.pop(waiter, None)
            self.not_full.notify()
            raise
        finally:
            self.not_full.pop(waiter, None)

    def _wait_until_not_full(self, waiter: Waiter, deadline: float) -> None:
        while self._full() and not self.closed:
            if self.clock.now() >= deadline:
                raise BacklogFull(self.maxsize)
            self.clock.wait_until(waiter, deadline)

    def current_caller(self) -> Caller | None:
        """See `FutureOwner.current_caller`."""
        callers = self.callers
        if not callers.watched:
            return None
        before = callers.all_waited
        caller = callers.record_wait()
        if callers.all_waited != before:
            self._note_news()
        return caller

    def explain(self, future: JobFuture[Any]) -> str:
        """See `FutureOwner.explain`."""
        explain = self.explainer()
        return explain(future) if explain is not None else ""

    def try_cancel(self, future: JobFuture[Any]) -> None:
        """See `FutureOwner.try_cancel`."""
        with self.mutex:
            if future._is_waiting:
                self._wake_for_cancellation()
                if future._stage in WAITING:  # once more: R5
                    self.cancelled[future] = future._stage
                    future._stage = _CANCELLED
                    future._wake_waiters()
                self._wake_for_cancellation()

    def _wake_for_cancellation(self) -> None:
        self.not_full.notify()
        self._note_news()

    def _note_news(self) -> None:
        """Wake the batcher thread to drain something. Call this before that is written and again after it (R6)."""
        self._has_other_news = True
        self.not_empty.wake()

    def post(self, call: Callable[[], None]) -> None:
        """Make the next leader run *call*, after it has taken in all jobs that are accepted now."""
        with self.mutex:
            self._note_news()
            self._calls.append(call)
            self._note_news()

    def flush(self) -> int:
        """Make all jobs due that are accepted now, and return the number of their epoch."""
        with self.mutex:
            self._note_news()
            epoch = self.epoch
            self.epoch = epoch + 1  # R5
            self._note_news()
            return epoch

    def close(self) -> bool:
        """Accept no more jobs, make all accepted jobs due, and return whether the queue was open before."""
        with self.mutex:
            was_open = not self.closed
            self._note_news()
            self.not_full.notify_all()
            self.closed = True
            self._note_news()
            self.not_full.notify_all()
            return was_open

    def count_as_waiting(self, count: int) -> None:
        """Count this many of the jobs that were taken out as jobs that still wait for a worker."""
        self._taken_waiting = count

    def count_taken(self) -> None:
        """Count the jobs in `taken`, which are in the ledger now. This is one step (R4)."""
        taken, none = self.taken, deque[JobFuture[Any]]()
        total = len(taken)
        if self.taken is taken:  # R5: another thread may have counted them
            self.counted, self.taken = self.counted + total, none

    def lead(self) -> bool:
        """Become the leader if there is none, and return whether the calling thread is the leader now.

        Call this and the next methods with `mutex` held. Once the queue is closed, only the batcher thread leads.
        """
        me = threading.get_ident()
        free = not self.leader and not self.closed
        if free:
            self.leader, self._moment, self._wanted = me, NEVER, NEVER  # R5, as in `wait_for_lead`
        return free

    def is_leader(self) -> bool:
        """Return whether the calling thread leads."""
        return self.leader == threading.get_ident()

    def resign(self, moment: float, wanted: float) -> None:
        """Leave the lead. The batcher thread takes it at *moment*, or when there are *wanted* jobs or other news."""
        with self.mutex:
            # Written before the check, because a finalizer may submit a job after it.
            self.leader, self._moment, self._wanted = 0, moment, wanted
            if self.has_news(wanted) or moment < self._alarm:
                self.not_empty.wake()

    def wait_for_lead(self) -> None:
        """Wait until there is something for the batcher thread to do, and take the lead."""
        me = threading.get_ident()
        self.not_empty.reset()
        while not (self.has_news(self._wanted) or self._now() >= self._moment) or self.leader:
            self._alarm = self._moment
            self.clock.wait_until(self.not_empty, self._alarm)
        self.leader, self._moment, self._wanted, self._alarm = me, NEVER, NEVER, NOW

    def has_news(self, wanted: float = 1) -> bool:
        """Return whether there are at least *wanted* jobs, or other news, for a leader. Call this with `mutex` held."""
        return self._has_other_news or self._expiring or len(self.queue) >= wanted

    def drain(self) -> Drained:
        """Take everything out, with `mutex` held. The jobs stay in `taken` too: see `Ledger.inherited`.

        The jobs are taken last. So if a finalizer interrupts this, a job that it submits and cancels is never found
        among the cancelled ones before it is found in the queue, nor is a flush found before the jobs that it is for.
        """
        self._has_other_news = False  # first, so that whatever comes in from here on is found the next time
        epoch, closed = self.epoch, self.closed
        cancelled, self.cancelled = self.cancelled, {}
        calls, self._calls = self._calls, []
        empty: deque[JobFuture[Any]] = deque()
        # R5: the leader finds a job together with the fact that it expires, or neither.
        expiring, self._expiring = self._expiring, False
        # In the same step, they are counted in `_taken_waiting`. Otherwise, a finalizer could submit too many jobs.
        self.taken, self.queue, self._taken_waiting = self.queue, empty, self._taken_waiting + len(self.queue)
        return Drained(self.taken, cancelled, calls, epoch - 1, closed, expiring, self.callers.activity())

    def clear(self) -> None:
        """Forget all jobs that were not taken out. Takes no lock, so it can be called in a forked child."""
        self.queue = deque()

    def wake_all(self) -> None:
        """Wake all waiters, in case the thread that should have woken them was interrupted."""
        with self.mutex:
            for waiting in (self.not_empty, self.not_full, self.settled):
                waiting.notify_all()

    def find_cancelled(self) -> None:
        """Record again which jobs in the queue are cancelled, in case a leader was interrupted and lost the record."""
        for future in list(self.queue):
            if future._stage is _CANCELLED:
                self.cancelled.setdefault(future, _QUEUED)
                self._note_news()

    def recorded_stage(self, future: JobFuture[Any]) -> JobState:
        """Return the stage of a job in the ledger, which may not know of a cancellation yet."""
        return self.cancelled.get(future, future._stage)
