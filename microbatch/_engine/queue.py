"""The queue between the callers' threads and the leader."""

import queue
import sys
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from microbatch._basics.clock import NEVER, NOW
from microbatch._basics.host import Host, host_of
from microbatch._basics.waiting import Inbox, Waiter, Waiters
from microbatch._engine.bounds import Bound, Bounds, KeyBound
from microbatch._engine.settings import Settings
from microbatch._forming.callers import Caller, Callers
from microbatch.errors import BatcherClosed, JobDropped
from microbatch.futures.job_future import JobFuture
from microbatch.policies.base import CallerActivity, Hints
from microbatch.results import JobState

__all__ = ["JobQueue", "Drained"]

# Globals, because looking up a member of an enum takes longer.
_CANCELLED, _DROPPED, _FAILED = JobState.CANCELLED, JobState.DROPPED, JobState.FAILED


class Drained(NamedTuple):
    """What the leader takes out of the queue: everything that came in since a thread last led."""

    jobs: list[JobFuture[Any]]
    # The leader takes these two out itself, when it has removed their jobs from the open batches.
    cancelled: list[JobFuture[Any]]
    dropped: list[JobFuture[Any]]
    calls: list[Callable[[], None]]  # see `JobQueue.post`
    flushed: int
    closed: bool
    callers: CallerActivity


class _Local(threading.local):
    is_own = False  # whether the thread is one of the batcher's own
    holds = False  # a `put` of this thread has entered a bound and waits to enter another one

    def __init__(self, host: Host | None) -> None:
        self._host = host

    def must_not_wait(self) -> bool:
        """Return whether the batcher may need this thread, so that it must not wait for the batcher."""
        return self.is_own or self._host is not None and self._host.needs_this_thread()


class JobQueue(queue.Queue[JobFuture[Any]]):
    """A `queue.Queue` that is emptied all at once, can be closed, and limits the jobs that wait for a worker.

    Its methods wait for no lock. The rules that make this possible are in ``__init__.py``. It wakes these threads:

    - `not_empty` wakes the batcher thread, for everything that `Drained` holds.
    - `not_full` wakes callers in `put`: a job stopped waiting, or the queue was closed. Each `Bound` has a line of its
      own for the callers that wait because of it.
    - `ended` wakes callers in `shutdown`: the threads have ended.

    Attributes:
        waiting: The jobs that wait for a worker, the oldest first. The thread that removes a job decides what happens
            to it.
        accepted: The jobs that were accepted and that the leader has not taken out yet.
        withdrawn: The jobs that are in `accepted`, but were refused after all.
        cancelled: The jobs that were cancelled.
        dropped: The jobs that had to make room for newer ones.
        drops: Whether the oldest job has to make room if the queue is full.
        has_news: Whether there is something for the leader other than jobs.
        host: The host of the processor, if it needs one.
        this_thread: Says whether the calling thread must not wait for the batcher.
        is_leader: A function that returns whether the calling thread leads.
        crowded: The bounds that may have a caller in their line, or no space for another job like the one that is noted
            here, which would make jobs drop. The leader looks at them.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.max_pending)
        self.name = settings.name  # of the batcher
        self.waiting: dict[JobFuture[Any], None] = {}
        self.withdrawn = Inbox[JobFuture[Any]]()
        self.cancelled = Inbox[JobFuture[Any]]()
        self.dropped = Inbox[JobFuture[Any]]()
        self._bounds = Bounds(settings.max_pending_weight, settings.max_pending_per_key, settings.clock)
        self._bounded = bool(self._bounds)
        self._calls = Inbox[Callable[[], None]]()
        self.not_empty: Waiter = Waiter()
        self.not_full: Waiters = Waiters()  # type: ignore[assignment]
        self.ended = Waiters()
        self._keyed = settings.keyed
        self.clock = settings.clock
        self._now = self.clock.now
        self.callers = Callers(False)
        self._away, self._recalls = self.callers.away, False
        self.watch_callers(settings.policy.hints)
        self.drops = settings.drop_oldest
        self._limit = self.maxsize or sys.maxsize
        self._waits_at = sys.maxsize if self.drops else self._limit  # with this many waiting jobs, callers wait
        self._was_full = False  # whether a caller found it full, and none has found it half empty since
        self._count_bound = Bound(self._limit, self.waiting, self.not_full)
        self.crowded: dict[Bound, JobFuture[Any]] = {}
        self.epoch = 0  # each job has the epoch in which it was accepted; a flush ends the epoch
        self.closed = False
        self.may_expire = False  # whether jobs may be settled before they are dispatched, other than by `cancel`
        self.explainer: Callable[[], Callable[[JobFuture[Any]], str] | None] = lambda: None
        self.batch_finder: Callable[[], Callable[[JobFuture[Any]], bool] | None] = lambda: None
        self.host = host_of(settings.processor)
        self.this_thread = _Local(self.host)
        self.has_news = False
        self.call_leader = self.not_empty.ring
        self._lead = threading.RLock()  # held by the thread that leads; no thread waits for it
        self.is_leader: Callable[[], bool] = self._lead._is_owned  # type: ignore[attr-defined]
        self._is_led = False  # whether a thread leads; if so, it looks for news when it resigns
        self._wanted: float = 1  # how many jobs wake the batcher thread; none do while a thread leads
        self._moment = NEVER  # when it wakes up in any case
        self._alarm = NOW  # when it will wake up, if it sleeps; otherwise `NOW`

    def _init(self, maxsize: int) -> None:
        self.accepted = Inbox[JobFuture[Any]]()
        self.queue = self._items = self.accepted.items

    def _qsize(self) -> int:
        return len(self.waiting)

    def watch_callers(self, hints: Hints) -> None:
        """Observe the callers as far as a policy with these hints needs it."""
        # If jobs have keys, it is unknown which batch the next job of a caller will join, so no batch can wait for it.
        callers = Callers(hints.watches_callers and not self._keyed, hints.recalls)
        if not self.callers.watches_like(callers):
            self.callers = callers
            self._away, self._recalls = callers.away, hints.recalls > 0

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
            JobTooLarge: The job is too heavy for the queue.
        """
        if self.closed:
            raise BatcherClosed("the batcher is shut down")
        waiting = self.waiting
        item.submitted = now = self._now()
        try:
            waited = self._bounded and self._enter_bounds(item, block, timeout)
            if self._was_full and self._is_full_for(item):
                waited = self._wait_for_space(item, block, timeout)
            else:
                waiting[item] = None  # takes up space
                if len(waiting) > self._waits_at and not self._count_bound.keep(item):
                    waited = self._wait_for_space(item, block, timeout)
            if waited:
                item.submitted = now = self._now()
            if expires_in is not None:
                item.expires_in, item._expires = expires_in, now + expires_in
                self.may_expire = True
            if self._recalls or self._away and threading.get_ident() in self._away:
                self.callers.record_submission(threading.get_ident(), now)
        except BaseException:
            waiting.pop(item, None)  # L4
            if item._stage is _DROPPED:  # by another thread, which has counted it
                self.accepted.append(item)
            try:
                self.make_room_for_another(item)
            except BaseException:  # from a signal handler
                self.make_room_for_another(item)
                raise
            raise
        try:
            item._epoch = self.epoch
            self.accepted.append(item)  # from here on the job is accepted
        finally:
            if item._epoch != self.epoch:  # a flush came between the two statements, which is possible without the GIL
                self.flush()  # because the collector may have a job of a later epoch already
            if self.closed:  # by another thread, in the meantime
                error = BatcherClosed("the batcher is shut down")  # type: ignore[unreachable]
                try:
                    del waiting[item]
                except KeyError:  # another thread has taken it, so it is accepted
                    pass
                else:
                    item._caller_error, item._stage = (error, None), _FAILED  # for callers that have joined it
                    self.withdrawn.append(item)  # L3
                    self.make_room_for_another(item)
                    raise error
            elif len(self._items) > self._wanted:
                self.not_empty.wake()
            elif expires_in is not None:
                self.note_news()
        if self.drops:
            self._drop_oldest(item)

    def reserve(self, item: JobFuture[Any], timeout: float | None) -> None:
        """Wait like `put`, and keep space for a job. Then call `put`, which does not wait any more.

        If you do not call it, or if this raises an exception, remove the job from `waiting`, and then call
        `make_room_for_another`. The queue must not be one that drops jobs.
        """
        item.submitted = self._now()
        if self._bounded:
            self._enter_bounds(item, True, timeout)
        if not self._count_bound.enter(item):
            self._wait_for_space(item, True, timeout)

    def _is_full_for(self, item: JobFuture[Any]) -> bool:
        """Return whether the queue is full again, so that `put` need not call `Bound.keep`, which takes long then."""
        waiting = len(self.waiting)
        self._was_full = waiting > self._waits_at // 2
        return waiting >= self._waits_at and item not in self.waiting  # it is there after `reserve`

    def _wait_for_space(self, item: JobFuture[Any], block: bool, timeout: float | None) -> bool:
        self._was_full = True
        return self._wait_for_room(self._count_bound, item, block, timeout, self._bounded)

    def _enter_bounds(self, item: JobFuture[Any], block: bool, timeout: float | None) -> bool:
        """Make a job enter its bounds, and return whether the caller has waited for that."""
        bounds, waited = self._bounds.of(item), False
        if not self.drops:  # if it does, the job enters later, beyond the limits if need be
            item._bounds = bounds
            for bound in bounds:
                if not bound.enter(item):
                    waited = self._wait_for_room(bound, item, block, timeout, bound is not bounds[0])
        return waited

    def _wait_for_room(
        self, bound: Bound, item: JobFuture[Any], block: bool, timeout: float | None, holds: bool
    ) -> bool:
        """Wait until a job has entered a bound. *holds* says whether it has entered another one already."""
        here = self.this_thread
        # A signal handler or a finalizer can't wait for space that its own thread holds, because that waits for it.
        if not block or timeout == 0 or here.holds or here.must_not_wait():
            raise bound.error()
        deadline = NEVER if timeout is None else item.submitted + timeout
        waiter = Waiter()
        waiter.job, waiter.thread = item, threading.get_ident()
        for outer in list(bound.line.copy()):
            outer.interrupted = outer.interrupted or outer.thread == waiter.thread
        try:
            here.holds = holds
            self.stand_in_line(bound, waiter)
            self._wait_in_line(bound, item, waiter, deadline)
        finally:
            here.holds = False
            bound.line.pop(waiter, None)
            self.pass_on(bound)
        return True

    def _wait_in_line(self, bound: Bound, item: JobFuture[Any], waiter: Waiter, deadline: float) -> None:
        while not self.enter(bound, item):
            if self.clock.now() >= deadline:
                raise bound.error()
            self.clock.wait_until(waiter, min(deadline, bound.look_again()))

    def stand_in_line(self, bound: Bound, waiter: Waiter) -> None:
        """Have *waiter* notified when its job may enter a bound. Then call `enter`, and at the end `pass_on` (L8)."""
        bound.line[waiter] = None
        self.crowded[bound] = waiter.job
        self.note_news()

    def pass_on(self, bound: Bound) -> None:
        """Let the next waiter look, because the one that left the line may have been notified in its place."""
        bound.pass_on()
        if bound.in_order and bound.line:
            self.note_news()  # the job that is first now may need more space

    def enter(self, bound: Bound, item: JobFuture[Any], is_next: bool = True) -> bool:
        """Make a job enter a bound if it is the next one and there is space. Return whether it has entered.

        Raises:
            BatcherClosed: The queue is closed.
        """
        self.refuse_if_closed()
        return is_next and bound.enter(item)

    def refuse_if_closed(self) -> None:
        """Raise `BatcherClosed` if the queue is closed."""
        if self.closed:
            raise BatcherClosed("the batcher is shut down")

    def make_room_for_another(self, item: JobFuture[Any]) -> None:
        """Wake the threads that a refused job kept out of the queue, or that wait for it in a flush."""
        item._stage = item._stage or _CANCELLED
        item._announce()
        self.leave_bounds([item])
        self.not_full.notify()

    def enter_all(self, bounds: list[Bound], item: JobFuture[Any], is_next: Callable[[Bound], bool]) -> Bound | None:
        """Make a job enter all of its bounds, or none (L10). Return the bound that it can't enter, or None."""
        for entered, bound in enumerate(bounds):
            if not self.enter(bound, item, is_next(bound)):
                _leave(bounds[:entered], item)
                return bound
        return None

    def bounds_of(self, item: JobFuture[Any]) -> list[Bound]:
        """Note the bounds of a job in its future. Return them and the limit on all jobs, which it has to enter last."""
        item._bounds = bounds = self._bounds.of(item) if self._bounded else []
        return [*bounds, self._count_bound]

    def leave_bounds(self, items: Iterable[JobFuture[Any]]) -> None:
        """Free the space of jobs that do not wait any more."""
        if self._bounded:
            for item in items:
                _leave(item._bounds, item)
                item._bounds = ()

    def forget_gone(self) -> None:
        """Free the space of jobs that do not wait any more, in case an exception kept a thread from doing so."""
        if self._bounded:
            self._bounds.forget_gone(self.waiting)

    def _drop_oldest(self, item: JobFuture[Any]) -> None:
        """Drop the oldest jobs until the queue is within its limits, after *item* was accepted."""
        try:
            self._enter_and_drop(item)
        finally:
            if len(self.dropped) or self.crowded:
                self.note_news()

    def _enter_and_drop(self, item: JobFuture[Any]) -> None:
        *bounds, _ = all_bounds = self.bounds_of(item)
        for bound in bounds:
            bound.add(item)
        if item not in self.waiting:  # it may have left before it entered
            _leave(bounds, item)
        for bound in all_bounds:
            self._drop_beyond(bound)
            if bound.is_full(item):
                self.crowded[bound] = item

    def _drop_beyond(self, bound: Bound) -> None:
        # Checked again after `oldest`. Otherwise, two threads could find the queue too long by one job, and the second
        # one could drop the job that is the oldest after the first one has dropped another.
        while bound.is_exceeded() and (oldest := bound.oldest()) is not None and bound.is_exceeded():
            if oldest._drop(JobDropped(bound.limit, bound.name, bound.key)):
                oldest._wake_waiters()
            _leave([bound, *oldest._bounds], oldest)

    def note_return(self, now: float) -> None:
        """Record that the calling thread submits a job that needs no place in the queue."""
        ident = threading.get_ident()
        if self._recalls or ident in self._away:
            self.callers.record_submission(ident, now)
            if not self.callers.activity().returning:  # nobody else would tell the leader
                self.note_news()

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
            self._wake_lines()
            self.note_news()

    def drained(self) -> bool:
        """Return whether the queue is closed, and nothing will ever come out of it again."""
        return self.closed and not (len(self.accepted) or len(self.cancelled) or len(self.dropped) or len(self._calls))

    def blocks_callers(self) -> bool:
        """Return whether a caller waits because the queue is full, so that a batch must be dispatched early.

        If jobs are dropped instead, return whether that is about to happen.
        """
        return any([not isinstance(bound, KeyBound) and self._presses(bound) for bound in self.crowded.copy()])

    def crowded_keys(self) -> list[Hashable]:
        """Return the keys for which the same is true because of their own limit."""
        return [bound.key for bound in self.crowded.copy() if isinstance(bound, KeyBound) and self._presses(bound)]

    def _presses(self, bound: Bound) -> bool:
        item = self.crowded.get(bound)
        if item is None or self._is_crowded(bound, item):
            return item is not None and (self.drops or bound.blocks_callers())
        self.crowded.pop(bound, None)
        if self._is_crowded(bound, item):  # since the pop (L8)
            self.crowded[bound] = item
        return False

    def _is_crowded(self, bound: Bound, item: JobFuture[Any]) -> bool:
        return bound.is_full(item) if self.drops else bool(bound.line)

    def _wake_lines(self) -> None:
        for bound in self.crowded.copy():
            bound.line.notify_all()

    def wake_all(self) -> None:
        """Wake all waiters, in case the thread that should have woken them was interrupted."""
        self._wake_lines()
        for waiting in (self.not_empty, self.ended):
            waiting.notify_all()

    def clear(self) -> None:
        """Forget all jobs, in a forked child."""
        self.waiting.clear()
        self._bounds.clear()
        self.forget()

    def forget(self) -> list[Callable[[], None]]:
        """Drop all accepted jobs, once there will be no leader any more. Return the calls that no leader has run."""
        self.cancelled.take()
        self.dropped.take()
        return self.drain().calls

    # -- called by a thread that leads, or wants to --

    def lead(self) -> bool:
        """Become the leader if there is none, and return whether the calling thread has become it.

        Once the queue is closed, only the batcher thread leads.
        """
        return not self.closed and self.take_lead()

    def take_lead(self) -> bool:
        """Do the same as `lead`, even if the queue is closed."""
        taken: bool = not self.is_leader() and self._lead.acquire(False)
        if taken:
            self._is_led = True
            self._moment, self._wanted = NEVER, NEVER
        return taken

    def resign(self, moment: float, wanted: float) -> None:
        """Resign. The batcher thread takes the lead at *moment*, or when there are *wanted* jobs or other news."""
        self._moment, self._wanted = moment, wanted
        self._is_led = False
        self._lead.release()
        # After the release, because whatever came in before was left to this thread.
        if self.has_news or len(self._items) > wanted or moment < self._alarm:
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
        cancelled, dropped = self.cancelled.peek(), self.dropped.peek()
        calls, callers = self._calls.take(), self.callers.activity()
        accepted = self.accepted.take()
        if self.drops:
            accepted = _without_dropped(accepted)
        return Drained(accepted, cancelled, dropped, calls, epoch - 1, closed, callers)


def _leave(bounds: Iterable[Bound], item: JobFuture[Any]) -> None:
    for bound in bounds:
        bound.leave(item)


def _without_dropped(jobs: list[JobFuture[Any]]) -> list[JobFuture[Any]]:
    """Leave out jobs that were dropped before they were accepted. The leader may have removed them from the batches."""
    return [job for job in jobs if job._stage is not _DROPPED]
