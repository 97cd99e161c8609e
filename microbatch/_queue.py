"""The queue between the callers' threads and the worker thread."""

import queue
import threading
from collections import deque
from typing import Any, Callable, Deque, List, NamedTuple, Optional, Tuple

from microbatch._clock import NEVER, Clock
from microbatch._futures import JobFuture, JobState
from microbatch.errors import BacklogFull, BatcherClosed

__all__ = ["JobQueue", "News"]


class News(NamedTuple):
    """What has come for the worker thread since it last looked."""

    jobs: Deque[JobFuture[Any]]
    withdrawn: List[Tuple[JobFuture[Any], JobState]]
    notes: List[Callable[[], None]]


class JobQueue(queue.Queue[JobFuture[Any]]):
    """A `queue.Queue` that is emptied at one go, can be closed, and bounds all jobs that no worker has taken yet.

    `mutex` guards every attribute here, those of the `Ledger`, and the `JobFuture.stage` of every job. It is held for a
    few plain statements at a time, and nothing that a user injects is called under it.
    Its conditions:

    - `not_empty` wakes the worker thread: a job or a note came, or a job was withdrawn.
    - `not_full` wakes callers in `put`: a job stopped waiting, or the queue was closed.
    - `settled` wakes callers in `flush` and `shutdown`: no future of some epoch is left, or the threads have ended.

    A signal handler can raise between any two statements of the main thread (Ctrl-C does). So whatever a caller's
    thread writes here takes effect in one step, after which the worker thread alone finishes the work.
    """

    def __init__(self, clock: Clock, max_pending: int) -> None:
        super().__init__(max_pending)
        self.clock = clock
        self.settled = threading.Condition(self.mutex)
        self.held = 0  # jobs that the worker thread took out, and that no worker has: written by the ledger
        self.epoch = 0  # each flush ends one, and waits for the jobs of it and those before
        self.closed = False
        self.inside = threading.local()  # has ``mine``, true, in the batcher's own threads, which must not wait for it
        self._withdrawn: List[Tuple[JobFuture[Any], JobState]] = []
        self._notes: List[Callable[[], None]] = []

    def _qsize(self) -> int:
        return len(self.queue) + self.held - len(self._withdrawn)

    def _full(self) -> bool:
        return 0 < self.maxsize <= self._qsize()

    def drained(self) -> bool:
        """Return whether the queue is closed, and nothing will ever come out of it again."""
        with self.mutex:
            return self.closed and not self.queue

    def is_own_thread(self) -> bool:
        """Return whether the calling thread is one of the batcher's, which must not wait for it."""
        return getattr(self.inside, "mine", False)

    def put(self, item: JobFuture[Any], block: bool = True, timeout: Optional[float] = None) -> None:
        """Accept a job, waiting for room up to *timeout* seconds (None: as long as it takes) if *block* is true.

        Raises:
            BacklogFull: there was no room in that time; in the batcher's own threads, there is none now.
            BatcherClosed: the queue is closed, or was while waiting.
        """
        with self.mutex:
            if self._full() and not self.closed:
                self._wait_for_room(block, timeout)
            if self.closed:
                raise BatcherClosed("the batcher is shut down")
            item.submitted = self.clock.now()
            item.expires = item.submitted + item.expires_in
            item.epoch = self.epoch
            self.not_empty.notify()
            self.queue.append(item)  # last: from here on the job is accepted

    def _wait_for_room(self, block: bool, timeout: Optional[float]) -> None:
        deadline = NEVER if timeout is None else self.clock.now() + timeout
        try:
            while self._full() and not self.closed:
                if not block or self.is_own_thread() or self.clock.now() >= deadline:
                    raise BacklogFull(self.maxsize)
                self.clock.wait_until(self.not_full, deadline)
        except BaseException:
            # Leaving without the place that this thread may just have been woken for: pass the word on.
            self.not_full.notify()
            raise

    def withdraw(self, future: JobFuture[Any]) -> bool:
        """See `Keeper.withdraw`."""
        with self.mutex:
            if not future.waiting:
                return False
            self.not_full.notify()
            self.not_empty.notify()
            self._withdrawn.append((future, future.stage))
            future.stage = JobState.CANCELLED
            future.publish()  # in here, so that the worker thread can tell a cancellation that a signal broke off
            return True

    def post(self, note: Callable[[], None]) -> None:
        """Have the worker thread make this call, after it has taken in all jobs accepted until now."""
        with self.mutex:
            self.not_empty.notify()
            self._notes.append(note)

    def flush(self, note: Callable[[int], None]) -> int:
        """End an epoch, have the worker thread call *note* with its number, and return it."""
        with self.mutex:
            epoch = self.epoch
            if not self.closed:  # otherwise all is due already
                self.not_empty.notify()
                self._notes.append(lambda: note(epoch))
            self.epoch += 1
            return epoch

    def close(self, note: Callable[[], None]) -> None:
        """Accept nothing more, and have the worker thread call *note*; only the first call does anything."""
        with self.mutex:
            if not self.closed:
                self.not_empty.notify()
                self.not_full.notify_all()
                self._notes.append(note)
                self.closed = True

    def wait_for_news(self, moment: float) -> None:
        """Wait until there is news or *moment* has come; with `mutex` held."""
        while not (self.queue or self._withdrawn or self._notes):
            if self.clock.now() >= moment:
                break
            self.clock.wait_until(self.not_empty, moment)

    def take_news(self) -> News:
        """Take all the news out; with `mutex` held."""
        news = News(self.queue, self._withdrawn, self._notes)
        self.queue, self._withdrawn, self._notes = deque(), [], []
        return news

    def cancelled(self) -> List[JobState]:
        """Return the stages that jobs were in when they were cancelled, where the ledger has yet to note it."""
        return [stage for future, stage in self._withdrawn if future.stage is JobState.CANCELLED]
