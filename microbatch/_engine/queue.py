"""The queue between the callers' threads and the leader."""

import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.waiting import Inbox, Waiter, Waiters
from microbatch._engine.settings import Settings
from microbatch._forming.callers import Caller, Callers
from microbatch.errors import BacklogFull, BatcherClosed
from microbatch.futures.job_future import JobFuture
from microbatch.policies.base import CallerActivity
from microbatch.results import JobState

__all__ = ["JobQueue", "NOTHING", "Drained"]

_CANCELLED = JobState.CANCELLED  # a global, because looking up a member of an enum takes longer


class Drained(NamedTuple):
    """What the leader takes out of the queue: everything that came in since a thread last led."""

    jobs: list[JobFuture[Any]]
    cancelled: list[JobFuture[Any]]  # the leader takes them out itself, when it has dropped them
    calls: list[Callable[[], None]]  # see `JobQueue.post`
    flushed: int
    closed: bool
    callers: CallerActivity


NOTHING = Drained([], [], [], -1, False, CallerActivity())
"""What the leader gets from an empty queue. Draining the queue would take longer."""


class _Local(threading.local):
    is_own = False


class JobQueue(queue.Queue[JobFuture[Any]]):
    """A `queue.Queue` that is emptied all at once, can be closed, and bounds the jobs that no worker has taken yet.

    Its methods wait for no lock. The rules that make this possible are in ``__init__.py``. It wakes these threads:

    - `not_empty` wakes the batcher thread, for everything that `Drained` holds.
    - `not_full` wakes callers in `put`: a job stopped waiting, or the queue was closed.
    - `ended` wakes callers in `shutdown`: the threads have ended.

    Attributes:
        waiting: The jobs that wait for a worker, the oldest first. The thread that removes a job decides what happens
            to it.
        accepted: The jobs that were accepted and that the leader has not taken out yet.
        withdrawn: The jobs that are in `accepted`, but were refused after all.
        cancelled: The jobs that were cancelled.
        has_news: Whether there is something for the leader other than jobs.
        this_thread: Says whether the calling thread is one of the batcher's own, which must not wait for the batcher.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.max_pending)
        self.name = settings.name  # of the batcher
        self.waiting: dict[JobFuture[Any], None] = {}
        self.withdrawn = Inbox[JobFuture[Any]]()
        self.cancelled = Inbox[JobFuture[Any]]()
        self._calls = Inbox[Callable[[], None]]()
        self.not_empty: Waiter = Waiter()
        self.not_full: Waiters = Waiters()  # type: ignore[assignment]
        self.ended = Waiters()
        hints = settings.policy.hints
        # If jobs have keys, nobody knows which batch the next job of a caller will join, so no batch can wait for it.
        self.callers = Callers(hints.watches_callers and not settings.keyed, hints.recalls)
        self.clock = settings.clock
        self._now = self.clock.now
        self._away, self._recalls = self.callers.away, hints.recalls > 0
        self._limit = self.maxsize or sys.maxsize
        self.epoch = 0  # each job has the epoch in which it was accepted; a flush ends the epoch
        self.closed = False
        self.may_expire = False  # whether jobs may be settled before they are dispatched, other than by `cancel`
        self.explainer: Callable[[], Callable[[JobFuture[Any]], str] | None] = lambda: None
        self.batch_finder: Callable[[], Callable[[JobFuture[Any]], bool] | None] = lambda: None
        self.this_thread = _Local()
        self.has_news = False
        self.call_leader = self.not_empty.ring
        self._lead = threading.RLock()  # held by the thread that leads; nobody waits for it
        self._is_led = False  # whether a thread leads; if so, it looks for news when it resigns
        self._wanted: float = 1  # how many jobs wake the batcher thread; none do while a thread leads
        self._moment = NEVER  # when it wakes up in any case
        self._alarm = NOW  # when it will wake up, if it sleeps; otherwise `NOW`

    def _init(self, maxsize: int) -> None:
        self.accepted = Inbox[JobFuture[Any]]()
        self.queue = self._items = self.accepted.items

    def _qsize(self) -> int:
        return len(self.waiting)

    # -- called by any thread --

    def put(
        self, item: JobFuture[Any], block: bool = True, timeout: float | None = None, expires_in: float | None = None
    ) -> None:
        """Accept a job.

        Args:
            item: The future of the job.
            block: Whether to wait while the queue is full. The batcher's own threads never wait.
            timeout: How many seconds to wait. None means no limit.
            expires_in: How many seconds after its acceptance the job expires. None if it never does.

        Raises:
            BacklogFull: The queue is full, or was still full after *timeout* seconds.
            BatcherClosed: The queue is closed, or was closed during the wait.
        """
        if self.closed:
            raise BatcherClosed("the batcher is shut down")
        waiting = self.waiting
        item.submitted = now = self._now()
        try:
            waiting[item] = None  # takes up room
            if len(waiting) > self._limit and not self._has_room(item):
                self._wait_for_room(item, block and not self.this_thread.is_own, timeout)
                item.submitted = now = self._now()
            if expires_in is not None:
                item.expires_in, item._expires = expires_in, now + expires_in
                self.may_expire = True
            if self._recalls or self._away and threading.get_ident() in self._away:
                self.callers.record_submission(threading.get_ident(), now)
        except BaseException:
            waiting.pop(item, None)  # L4
            self._make_room_for_another(item)
            raise
        try:
            item._epoch = self.epoch
            self.accepted.append(item)  # from here on the job is accepted
        finally:
            if item._epoch != self.epoch:  # a flush came between the two statements, which is possible without the GIL
                self.flush()  # because the collector may have a job of a later epoch already
            if self.closed:  # by another thread, in the meantime
                try:  # type: ignore[unreachable]
                    del waiting[item]
                except KeyError:  # another thread has taken it, so it is accepted
                    pass
                else:
                    self.withdrawn.append(item)  # L3
                    self._make_room_for_another(item)
                    raise BatcherClosed("the batcher is shut down")
            elif len(self._items) > self._wanted:
                self.not_empty.wake()
            elif expires_in is not None:
                self.note_news()

    def _has_room(self, item: JobFuture[Any]) -> bool:
        """Return whether a job that is in `waiting` may stay there. If it may not, remove it.

        Of the jobs that several threads have added, the first ones stay.
        """
        waiting = self.waiting
        if len(waiting) <= self._limit or item in list(waiting)[: self._limit]:
            return True
        return waiting.pop(item, self) is self  # it is gone, so another thread has decided about it

    def _wait_for_room(self, item: JobFuture[Any], block: bool, timeout: float | None) -> None:
        if not block or timeout == 0:
            raise BacklogFull(self.maxsize)
        deadline = NEVER if timeout is None else self.clock.now() + timeout
        waiter = Waiter()
        try:
            self.not_full[waiter] = None
            self.note_news()
            self._wait_in_line(item, waiter, deadline)
        finally:
            self.not_full.pop(waiter, None)
            if len(self.waiting) < self._limit:  # this thread may have been woken again, in place of another one
                self.not_full.notify()

    def _wait_in_line(self, item: JobFuture[Any], waiter: Waiter, deadline: float) -> None:
        while not self._enters(item):
            if self.closed:
                raise BatcherClosed("the batcher is shut down")
            if self.clock.now() >= deadline:
                raise BacklogFull(self.maxsize)
            self.clock.wait_until(waiter, deadline)

    def _enters(self, item: JobFuture[Any]) -> bool:
        """Add a job to `waiting` if there is room, and return whether there is."""
        while len(self.waiting) < self._limit and not self.closed:
            self.waiting[item] = None
            if self._has_room(item):
                return True
        return False

    def _make_room_for_another(self, item: JobFuture[Any]) -> None:
        """Wake the threads that a refused job kept out of the queue, or that wait for it in a flush."""
        item._stage = item._stage or _CANCELLED
        item._announce()
        self.not_full.notify()

    def current_caller(self) -> Caller | None:
        """See `FutureOwner.current_caller`."""
        if not self.callers.watched:
            return None
        caller = self.callers.record_wait()
        if self._recalls and self.callers.begin_to_wait(caller.ident):
            self.note_news()
        return caller

    def explain(self, future: JobFuture[Any]) -> str:
        """See `FutureOwner.explain`."""
        explain = self.explainer()
        return explain(future) if explain is not None else ""

    def is_batched(self, future: JobFuture[Any]) -> bool:
        """See `FutureOwner.is_batched`."""
        find = self.batch_finder()
        return find is not None and find(future)

    def note_news(self) -> None:
        """Make sure that a leader sees everything that was written before this call."""
        self.has_news = True
        if not self._is_led:
            self.not_empty.wake()

    def post(self, call: Callable[[], None]) -> None:
        """Make the next leader run *call*, after it has taken in all jobs that are accepted now."""
        try:
            self._calls.append(call)
        finally:
            self.note_news()

    def flush(self) -> None:
        """Make all jobs due that have been accepted so far."""
        try:
            self.epoch += 1
        finally:
            self.note_news()

    def close(self) -> None:
        """Accept no more jobs, and make all accepted jobs due."""
        try:
            self.closed = True
        finally:
            self.not_full.notify_all()
            self.note_news()

    def drained(self) -> bool:
        """Return whether the queue is closed, and nothing will ever come out of it again."""
        return self.closed and not (len(self.accepted) or len(self.cancelled) or len(self._calls))

    def blocks_callers(self) -> bool:
        """Return whether a caller waits because the queue is full, so that a batch must be dispatched early."""
        return bool(self.not_full) and len(self.waiting) >= self._limit

    def wake_all(self) -> None:
        """Wake all waiters, in case the thread that should have woken them was interrupted."""
        for waiting in (self.not_empty, self.not_full, self.ended):
            waiting.notify_all()

    def clear(self) -> None:
        """Forget all jobs, in a forked child."""
        self.waiting.clear()
        self.forget()

    def forget(self) -> list[Callable[[], None]]:
        """Drop all accepted jobs, once there will be no leader any more. Return the calls that no leader has run."""
        self.cancelled.take()
        return self.drain().calls

    # -- called by a thread that leads, or wants to --

    def lead(self) -> bool:
        """Become the leader if there is none, and return whether the calling thread has become it.

        Once the queue is closed, only the batcher thread leads.
        """
        return not self.closed and self.take_lead()

    def take_lead(self) -> bool:
        """Do the same as `lead`, even if the queue is closed."""
        taken = not self.is_leader() and self._lead.acquire(False)
        if taken:
            self._is_led = True
            self._moment, self._wanted = NEVER, NEVER
        return taken

    def is_leader(self) -> bool:
        """Return whether the calling thread leads."""
        return bool(self._lead._is_owned())  # type: ignore[attr-defined]

    def resign(self, moment: float, wanted: float) -> None:
        """Resign. The batcher thread takes the lead at *moment*, or when there are *wanted* jobs or other news."""
        self._moment, self._wanted = moment, wanted
        self._is_led = False
        self._lead.release()
        # After the release, because whatever came in before was left to this thread.
        if self.is_wanted(wanted) or moment < self._alarm:
            self.not_empty.wake()

    def wait_for_lead(self) -> None:
        """Wait until there is something for the batcher thread to do, and take the lead."""
        self.not_empty.reset()
        self._alarm = NEVER  # so that a thread that resigns from now on wakes this one
        while not ((due := self._is_due()) and self.take_lead()):
            self._alarm = moment = NEVER if due else self._moment  # if it is due, the leader will wake this thread
            self.clock.wait_until(self.not_empty, moment)
            self._alarm = NEVER
        self._alarm = NOW

    def _is_due(self) -> bool:
        return self.is_wanted(self._wanted) or self._now() >= self._moment

    def is_wanted(self, wanted: float = 1) -> bool:
        """Return whether there are at least *wanted* jobs, or other news, for a leader."""
        return self.has_news or len(self._items) > wanted

    def drain(self) -> Drained:
        """Take everything out.

        The jobs are taken last, so that the leader knows all jobs that a flush or a cancellation is for.
        """
        self.has_news = False  # first, so that whatever comes in from here on is found the next time
        epoch, closed = self.epoch, self.closed
        self.withdrawn.take()
        cancelled, calls, callers = self.cancelled.peek(), self._calls.take(), self.callers.activity()
        return Drained(self.accepted.take(), cancelled, calls, epoch - 1, closed, callers)
