"""The queue between the callers' threads and the worker thread."""

import contextlib
import queue
import threading
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional

from microbatch._clock import NEVER, NOW, Clock
from microbatch._futures import JobFuture, JobState
from microbatch.errors import BacklogFull, BatcherClosed

__all__ = ["Bell", "JobQueue", "News"]

_WAITING = (JobState.QUEUED, JobState.BATCHED)


class News(NamedTuple):
    """What has come for the worker thread since it last looked."""

    jobs: Deque[JobFuture[Any]]
    withdrawn: Dict[JobFuture[Any], JobState]
    notes: List[Callable[[], None]]
    flushed: int
    closed: bool


class Bell(threading.Condition):
    """A condition for one waiting thread, that remembers: a `notify` before the `wait` is not lost.

    With an ordinary condition, what interrupts the waiting thread between its last look and its sleep (a finalizer that
    submits a job, a signal handler that shuts down) would notify nobody.
    """

    def __init__(self, lock: Any) -> None:
        super().__init__(lock)
        self._rung = threading.Lock()
        self._rung.acquire()

    def silence(self) -> None:
        """Forget that it was rung. Look for what it may have been rung for afterwards."""
        self._rung.acquire(blocking=False)

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Release the lock, wait until it is rung or *timeout* seconds are over, and take the lock again."""
        saved = 1, threading.get_ident()  # where a signal breaks this off before it is known
        try:
            saved = self._release_save()  # type: ignore[attr-defined]
            rung = self._rung.acquire(timeout=-1 if timeout is None else timeout)
        finally:
            try:
                self._take_back(saved)
            except BaseException:  # a signal: whoever called holds the lock, and will release it
                self._take_back(saved)
                raise
        return rung

    def _take_back(self, saved: Any) -> None:
        if not self._is_owned():  # type: ignore[attr-defined]
            self._acquire_restore(saved)  # type: ignore[attr-defined]

    def ring(self) -> bool:
        """Ring it, and return whether it was silent."""
        try:
            self._rung.release()
        except RuntimeError:
            return False
        return True

    def notify(self, n: int = 1) -> None:
        """Ring it."""
        self.ring()

    def notify_all(self) -> None:
        """Ring it: one thread waits."""
        self.ring()


class Bells:
    """For threads that wait for one thing: each hangs up a bell of its own before it looks whether it has to wait."""

    def __init__(self) -> None:
        self._hung: Dict[Bell, None] = {}  # in the order in which they came

    @contextlib.contextmanager
    def hung(self, bell: Bell) -> Iterator[None]:
        """Have a new bell rung when its turn comes. To be entered with the lock held."""
        try:
            self._hung[bell] = None
            yield
        finally:
            self._hung.pop(bell, None)

    def notify(self, n: int = 1) -> None:
        """Ring the first *n* of those that have not been rung."""
        for bell in list(self._hung):
            if n < 1:
                return
            n -= bell.ring()

    def notify_all(self) -> None:
        """Ring all."""
        self.notify(len(self._hung))


class JobQueue(queue.Queue[JobFuture[Any]]):
    """A `queue.Queue` that is emptied at one go, can be closed, and bounds all jobs that no worker has taken yet.

    `mutex` guards every attribute here, those of the `Ledger`, and the `JobFuture.stage` of every job. It is held for a
    few plain statements at a time, and nothing that a user injects is called under it.
    What wakes whom:

    - `not_empty` wakes the worker thread, for all that `News` has.
    - `not_full` wakes callers in `put`: a job stopped waiting, or the queue was closed.
    - `settled` wakes callers in `flush` and `shutdown`: no future of some epoch is left, or the threads have ended.

    Between any two statements of the main thread a signal handler can run, and raise (for Ctrl-C it does); between any
    two of any thread, a finalizer. Either may use the batcher in its turn. So the mutex is re-entrant, and whatever a
    caller's thread writes here takes effect in one step, after which the worker thread alone finishes the work. Bells are
    rung before that step, for a handler may raise after it; and by `put` and `close` once more after it, for a handler
    that came in before it may have waited: that gives up the whole of a re-entrant lock, and who was woken has looked.
    """

    def __init__(self, clock: Clock, max_pending: int) -> None:
        super().__init__(max_pending)
        self.mutex = threading.RLock()  # type: ignore[assignment]
        self.not_empty: Bell = Bell(self.mutex)
        self.not_full: Bells = Bells()  # type: ignore[assignment]
        self.all_tasks_done = threading.Condition(self.mutex)
        self.settled = Bells()
        self.clock = clock
        self.epoch = 0  # each flush ends one, and waits for the jobs of it and those before
        self.closed = False
        self.blocked = 0  # callers who wait for room without a limit
        self.inside = threading.local()  # has ``mine``, true, in the batcher's own threads, which must not wait for it
        self.held = 0  # jobs that the worker thread took out, and that no worker has: written by the ledger
        self.taken: Deque[JobFuture[Any]] = deque()  # out of the queue, and not in the ledger's books yet
        self.moving = False  # the ledger is changing stages, which a cancellation that interrupts it must not
        self._withdrawn: Dict[JobFuture[Any], JobState] = {}
        self._notes: List[Callable[[], None]] = []
        self._seen = (0, False, 0)  # of epoch, closed and blocked, by the worker thread

    def _qsize(self) -> int:
        return len(self.queue) + self.held - len(self._withdrawn)

    def _full(self) -> bool:
        return 0 < self.maxsize <= self._qsize()

    def drained(self) -> bool:
        """Return whether the queue is closed, and nothing will ever come out of it again."""
        with self.mutex:
            return self.closed and not self.queue and not self._withdrawn

    def is_stuck(self) -> bool:
        """Return whether a caller waits without a limit for room, so that some batch must go to make it."""
        with self.mutex:
            return self.blocked > 0 and self._full()

    def is_own_thread(self) -> bool:
        """Return whether the calling thread is one of the batcher's, which must not wait for it."""
        return getattr(self.inside, "mine", False)

    def is_held(self) -> bool:
        """Return whether the calling thread holds the mutex: then this call interrupts another one, by a signal or so."""
        return self.not_empty._is_owned()  # type: ignore[attr-defined, no-any-return]

    @contextlib.contextmanager
    def own_thread(self) -> Iterator[None]:
        """Have the calling thread be one of the batcher's for a while."""
        before, self.inside.mine = self.is_own_thread(), True
        try:
            yield
        finally:
            self.inside.mine = before

    def put(self, item: JobFuture[Any], block: bool = True, timeout: Optional[float] = None) -> None:
        """Accept a job, waiting for room up to *timeout* seconds (None: as long as it takes) if *block* is true.

        Raises:
            BacklogFull: there was no room in that time; in the batcher's own threads, there is none now.
            BatcherClosed: the queue is closed, or was while waiting.
        """
        with self.mutex:
            if self._full() and not self.closed:
                self._wait_for_room(block and not self.is_own_thread(), timeout)
            item.submitted = self.clock.now()
            item.expires = item.submitted + item.expires_in
            item.epoch = self.epoch
            self.not_empty.notify()
            # Looked at last, for a signal handler that interrupts this may shut down, and have waited for the end of the
            # worker thread. Between the look and the append there is no call and no jump, so that no handler comes in (on
            # CPython 3.10 a jump lets one in).
            if not self.closed:
                self.queue.append(item)  # from here on the job is accepted
                self.not_empty.notify()
                return
        raise BatcherClosed("the batcher is shut down")

    def _wait_for_room(self, block: bool, timeout: Optional[float]) -> None:
        deadline = NEVER if timeout is None else self.clock.now() + timeout
        unlimited = block and deadline == NEVER
        bell = Bell(self.mutex)
        self.blocked += unlimited
        try:
            self.not_empty.notify()
            with self.not_full.hung(bell):
                while self._full() and not self.closed:
                    if not block or self.clock.now() >= deadline:
                        raise BacklogFull(self.maxsize)
                    self.clock.wait_until(bell, deadline)
        except BaseException:
            # Leaving without the place that this thread may just have been woken for: pass the word on. Not to its own
            # bell, which still hangs if a signal came in just after it was hung up, until the traceback is dropped.
            bell.ring()
            self.not_full.notify()
            raise
        finally:
            self.blocked -= unlimited

    def withdraw(self, future: JobFuture[Any]) -> None:
        """See `Keeper.withdraw`."""
        with self.mutex:
            self.not_full.notify()
            self.not_empty.notify()
            if not self.moving and future.waiting:
                self._withdrawn.setdefault(future, future.stage)
                if future.stage in _WAITING:  # once more, and without a call before the step that counts: see `put`
                    future.stage = JobState.CANCELLED

    def post(self, note: Callable[[], None]) -> None:
        """Have the worker thread make this call, after it has taken in all jobs accepted until now."""
        with self.mutex:
            self.not_empty.notify()
            self._notes.append(note)

    def flush(self) -> int:
        """Have all jobs accepted until now go, and return the number of their epoch."""
        with self.mutex:
            epoch = self.epoch
            self.not_empty.notify()
            self.epoch = epoch + 1
            return epoch

    def close(self) -> bool:
        """Accept nothing more, have all that was accepted go, and return whether it was open."""
        with self.mutex:
            was_open = not self.closed
            self.not_empty.notify()
            self.not_full.notify_all()
            self.closed = True
            self.not_empty.notify()
            self.not_full.notify_all()
            return was_open

    def wait_for_news(self, moment: float) -> None:
        """Wait until there is news or *moment* has come; with `mutex` held."""
        self.not_empty.silence()
        # NOW asks no clock: jobs are failed with it where the clock raises.
        while not self._has_news() and moment != NOW and self.clock.now() < moment:
            self.clock.wait_until(self.not_empty, moment)

    def _has_news(self) -> bool:
        seen = self.epoch, self.closed, self.blocked
        return bool(self.queue or self._withdrawn or self._notes) or seen != self._seen

    def take_news(self) -> News:
        """Take all the news out; with `mutex` held. The jobs stay in `taken` as well: see `Ledger.inherited`.

        The jobs last: should a finalizer interrupt this, then a job that it submits and cancels is never found among the
        withdrawn before it is found in the queue, nor a flush before the jobs that it is for.
        """
        self._seen = self.epoch, self.closed, self.blocked
        withdrawn, self._withdrawn = self._withdrawn, {}
        notes, self._notes = self._notes, []
        self.taken = self.queue
        self.queue = deque()
        return News(self.taken, withdrawn, notes, self._seen[0] - 1, self._seen[1])

    def cancelled(self) -> List[JobState]:
        """Return the stages that jobs were in when they were cancelled, where the ledger has yet to note it."""
        return [stage for future, stage in list(self._withdrawn.items()) if future.stage is JobState.CANCELLED]
