"""The books of one batcher: which accepted job is where, and which future is still to be settled."""

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from microbatch._clock import NEVER
from microbatch._futures import JobFuture, JobResult, JobState
from microbatch._queue import Bell, JobQueue, News

__all__ = ["BatcherStats", "Ledger", "Outcome"]

Outcome = Tuple[Optional[JobResult[Any]], Optional[BaseException]]
"""A result or an error."""


@dataclass(frozen=True)
class BatcherStats:
    """What a batcher has done, all counted at one moment: ``accepted`` is the sum of the seven states.

    Attributes:
        accepted: jobs that `Batcher.submit` took.
        queued: jobs that wait and are in no batch yet.
        batched: jobs in an open batch.
        running: jobs that a worker has.
        succeeded: jobs with a result.
        failed: jobs that failed, alone or with their batch.
        cancelled: jobs that were cancelled in time.
        expired: jobs that no worker took in time.
        batches: batches handed to a worker.
        triggers: those batches, counted by what made them go.
        oldest: seconds that the oldest waiting job has waited; 0 if none waits.
    """

    accepted: int = 0
    queued: int = 0
    batched: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    batches: int = 0
    triggers: Mapping[str, int] = field(default_factory=dict)
    oldest: float = 0.0


class Ledger:
    """Has every accepted job in exactly one state, and every future that is still to be settled.

    Written by the worker thread and by the threads that run batches, never by a caller's, with the queue's mutex held.
    """

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self._counts = dict.fromkeys(JobState, 0)
        self._batches = 0
        self._triggers: Counter[str] = Counter()
        # By epoch, in order of acceptance. Dicts and not sets, so that the oldest is found at the head.
        self._unsettled: Dict[int, Dict[JobFuture[Any], None]] = {}

    def take_in(self, moment: float) -> News:
        """Wait until there is news or *moment* has come, enter it, and return it. For the worker thread."""
        with self.queue.mutex:
            self.queue.wait_for_news(moment)
            news = self.queue.take_news()
            self._counts[JobState.QUEUED] += len(news.jobs)
            for future in news.jobs:
                self._unsettled.setdefault(future.epoch, {})[future] = None
            self.queue.taken = deque()
            for future, stage in news.withdrawn.items():
                if future.stage is JobState.CANCELLED:
                    self._counts[stage] -= 1
                    self._counts[JobState.CANCELLED] += 1
            self._count_held()
            return news

    def mark_batched(self, futures: Iterable[JobFuture[Any]]) -> None:
        """Note that these jobs, as far as they still wait, have joined an open batch."""
        with self.queue.mutex:
            self.queue.moving = True
            for future in futures:
                if future.stage is JobState.QUEUED:
                    self._move(future, JobState.BATCHED)
            self.queue.moving = False

    def claim(self, futures: Iterable[JobFuture[Any]]) -> List[JobFuture[Any]]:
        """Return those of the jobs that still wait, as running: from here on they can't be withdrawn."""
        return self._take_out(futures, JobState.RUNNING)

    def expire(self, futures: Iterable[JobFuture[Any]]) -> List[JobFuture[Any]]:
        """Return those of the jobs that still wait, as expired. Call `finish` for them."""
        return self._take_out(futures, JobState.EXPIRED)

    def _take_out(self, futures: Iterable[JobFuture[Any]], stage: JobState) -> List[JobFuture[Any]]:
        with self.queue.mutex:
            self.queue.moving = True
            live = [future for future in futures if future.waiting]
            for future in live:
                self._move(future, stage)
            self._count_held()
            self.queue.moving = False
            self.queue.not_full.notify(len(live))
            return live

    def count_batch(self, trigger: str) -> int:
        """Count a batch that goes to a worker, and return its number."""
        with self.queue.mutex:
            self._batches += 1
            self._triggers[trigger] += 1
            return self._batches

    def settle(self, outcomes: Iterable[Tuple[JobFuture[Any], Outcome]]) -> int:
        """Give running jobs their outcomes, passing over those that have one; return how many of them failed.

        The books are right first, then all futures are readable, then those in `flush` are woken, and only then are
        the callbacks run: a callback may use the batcher, and may wait for another job of its own batch.
        """
        with self.queue.mutex:
            won = [(future, outcome) for future, outcome in outcomes if future.stage is JobState.RUNNING]
            for future, (_, error) in won:
                self._move(future, JobState.SUCCEEDED if error is None else JobState.FAILED)
        self.finish(won)
        return sum(error is not None for _, (_, error) in won)

    def finish(self, outcomes: List[Tuple[JobFuture[Any], Outcome]]) -> None:
        """Make these outcomes, which the books have already, readable; then wake who waits, then call back."""
        for future, (result, error) in outcomes:
            future.publish(result, error)
        self.release([future for future, _ in outcomes])
        for future, _ in outcomes:
            future.call_back()

    def release(self, futures: List[JobFuture[Any]]) -> None:
        """Strike out futures whose outcome can be read, and wake who waits for the last of an epoch."""
        with self.queue.mutex:
            for future in futures:
                self._unsettled.get(future.epoch, {}).pop(future, None)
            for epoch in {future.epoch for future in futures}:
                if self._unsettled.get(epoch) == {}:
                    del self._unsettled[epoch]
                    self.queue.settled.notify_all()

    def wait_settled(self, epoch: float, moment: float = NEVER) -> bool:
        """Wait until every job of *epoch* and those before it is settled; False if *moment* comes first."""
        bell = Bell(self.queue.mutex)
        with self.queue.mutex, self.queue.settled.hung(bell):
            while self._oldest_epoch() <= epoch:
                if self.queue.clock.now() >= moment:
                    return False
                self.queue.clock.wait_until(bell, moment)
            return True

    def unsettled(self) -> List[JobFuture[Any]]:
        """Return the futures that have no outcome yet, in order of acceptance."""
        with self.queue.mutex:
            futures = self.inherited()
        return futures

    def inherited(self) -> List[JobFuture[Any]]:
        """Return the futures that have no outcome yet, without the lock, in order of acceptance.

        For a forked child, where nobody may ever release it: at whatever statement the parent's threads were, each
        future is in one of these three places.
        """
        booked = chain.from_iterable(self._unsettled.values())
        return list(dict.fromkeys([*booked, *self.queue.taken, *self.queue.queue]))

    def stats(self) -> BatcherStats:
        """Return all counts of one moment."""
        with self.queue.mutex:
            counts = Counter({state: count for state, count in self._counts.items()})
            counts[JobState.QUEUED] += len(self.queue.queue)
            for stage in self.queue.cancelled():
                counts[stage] -= 1
                counts[JobState.CANCELLED] += 1
            stats = BatcherStats(
                accepted=sum(counts.values()),
                **{state.value: counts[state] for state in JobState},
                batches=self._batches,
                triggers=dict(self._triggers),
                oldest=max(0.0, self.queue.clock.now() - self._oldest()),
            )
        return stats

    def _oldest(self) -> float:
        parts = [*self._unsettled.values(), [*self.queue.queue]]
        heads = (next((future.submitted for future in part if future.waiting), NEVER) for part in parts)
        return min(heads, default=NEVER)

    def _oldest_epoch(self) -> float:
        # The queue's jobs are younger than the others, and its first is the oldest of them.
        return min(self._unsettled, default=self.queue.queue[0].epoch if self.queue.queue else NEVER)

    def _move(self, future: JobFuture[Any], stage: JobState) -> None:
        self._counts[future.stage] -= 1
        self._counts[stage] += 1
        future.stage = stage

    def _count_held(self) -> None:
        self.queue.held = self._counts[JobState.QUEUED] + self._counts[JobState.BATCHED]
