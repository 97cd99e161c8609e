"""The ledger of a batcher records the state of each accepted job, and which futures are not settled yet."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter
from typing import Any

from microbatch._basics.clock import NEVER
from microbatch._basics.waiting import Waiter
from microbatch._engine.queue import NOTHING, Drained, JobQueue
from microbatch.futures.exceptions import Failures
from microbatch.futures.job_future import JobFuture, Settled, settle_all
from microbatch.results import OVER, WAITING, BatcherStats, JobState, Service

__all__ = ["Ledger"]

# Globals, because an access to a member of an enum may be a call (R5).
_QUEUED, _BATCHED, _RUNNING = JobState.QUEUED, JobState.BATCHED, JobState.RUNNING
_SUCCEEDED, _CANCELLED = JobState.SUCCEEDED, JobState.CANCELLED

_COUNTED = [state for state in JobState if state is not _QUEUED]


class Ledger:
    """Counts the accepted jobs in each state, and has all futures that are not settled yet. Each job is in one state.

    Only the batcher's own threads write to it, with the queue's mutex held. Callers' threads never do.
    """

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        # The number of jobs in each state except QUEUED. All other jobs are queued, so no job is ever counted twice.
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._batches = 0
        self._triggers: Counter[str] = Counter()
        self._unsettled: dict[JobFuture[Any], None] = {}  # in order of acceptance
        # The number of these per epoch. Not a `Counter`, which deletes an entry in Python code: R5.
        self._epochs: dict[int, int] = {}
        # Futures whose watchers are being notified, or whose callbacks are being run.
        self._unannounced: dict[JobFuture[Any], None] = {}

    def wait_for_news(self) -> Drained:
        """Wait until there is something for the batcher thread to do, take the lead, and take in all news."""
        with self.queue.mutex:
            self.queue.wait_for_lead()
            news = self.take_in()
        return news

    def lead(self) -> Drained | None:
        """Take the lead and take in all news. Return None if there is a leader already."""
        with self.queue.mutex:
            if not self.queue.lead():
                return None
            return self.take_in() if self.queue.callers.watched or self.queue.has_news() else NOTHING

    def take_in(self) -> Drained:
        """Drain the queue into the ledger, and return what came in."""
        with self.queue.mutex:
            news = self.queue.drain()
            self._enter(self.queue.taken)
            counts = self._counts
            for stage in news.cancelled.values():
                batched = stage is _BATCHED
                counts[_BATCHED], counts[_CANCELLED] = counts[_BATCHED] - batched, counts[_CANCELLED] + 1  # R4
            self._count_taken_waiting()
            self.queue.not_full.notify(len(news.cancelled))  # R6: until here, `max_pending` counted them as waiting
        return news

    def _enter(self, jobs: Collection[JobFuture[Any]]) -> None:
        """Enter jobs that are `JobQueue.taken`. The last step counts them."""
        for epoch, number in _epochs(jobs).items():
            self._epochs.setdefault(epoch, 0)
            self._epochs[epoch] += number
        self._unsettled.update(dict.fromkeys(jobs))
        self.queue.count_taken()

    def recover(self) -> list[JobFuture[Any]]:
        """Correct the ledger after an exception between any two statements, and return the jobs that still wait.

        Any thread may call this.
        """
        with self.queue.mutex:
            self.queue.find_cancelled()
            self._enter(self.queue.taken)
            self._epochs = dict(_epochs(self._unsettled))
            self._count_anew()
            self._count_taken_waiting()
            waiting = list(filter(attrgetter("_is_waiting"), self._unsettled))
        return waiting

    def _count_anew(self) -> None:
        counts, stages = self._counts, Counter(map(self.queue.recorded_stage, self._unsettled))
        counts.update({stage: stages[stage] for stage in (_BATCHED, _RUNNING)})
        uncounted = self._queued() - stages[_QUEUED]
        for stage in map(self.queue.recorded_stage, self._unsettled):
            if stage in OVER and uncounted:
                counts[stage], uncounted = counts[stage] + 1, uncounted - 1

    def _recover_and_announce(self) -> None:
        self.recover()
        self.announce_again()

    def announce_again(self) -> None:
        """Wake all waiters and notify all watchers of outcomes that exist, in case an exception prevented that."""
        with self.queue.mutex:
            over = self._over()
        self.announce(over)
        for future in over:
            self._unannounced.pop(future, None)
        self.queue.wake_all()

    def _over(self) -> list[JobFuture[Any]]:  # R9
        futures = [*self._unsettled, *self._unannounced]
        return [future for future in futures if self.queue.recorded_stage(future) in OVER]

    def announce(self, futures: list[JobFuture[Any]]) -> None:
        """Wake or notify all threads that wait for these settled futures, and run the callbacks. May be repeated."""
        for future in futures:
            future._announce()
        self.remove_settled(futures)
        for future in futures:
            future._run_callbacks()

    def mark_batched(self, futures: Iterable[JobFuture[Any]]) -> None:
        """Record that these jobs have joined an open batch. Jobs that don't wait any more are skipped."""
        with self.queue.mutex:
            self._move(futures, (_QUEUED,), _BATCHED)

    def claim(self, futures: Iterable[JobFuture[Any]]) -> list[JobFuture[Any]]:
        """Mark the jobs that still wait as running, and return them. They can't be cancelled any more."""
        with self.queue.mutex:
            live = self._move(futures, WAITING, _RUNNING)
            self._count_taken_waiting()
            if self.queue.not_full:
                self.queue.not_full.notify(len(live))
            return live

    def claim_batch(self, futures: Iterable[JobFuture[Any]], trigger: str) -> tuple[list[JobFuture[Any]], int]:
        """Do the same as `claim` for a batch that is dispatched, and also return the number of the batch."""
        with self.queue.mutex:
            live, number = self.claim(futures), 0
            if live:
                number = self._batches = self._batches + 1
                self._triggers[trigger] += 1
            return live, number

    def settle(
        self,
        futures: Iterable[JobFuture[Any]],
        outcomes: list[Any],
        failures: Failures | None,
        service: Service | None = None,
        failed: JobState = JobState.FAILED,
    ) -> int:
        """Settle the jobs that are running, skip the others, and return how many failed. See `settle_all`.

        The ledger is correct and all outcomes can be read from the same moment on. Then callers in `flush` are woken
        and watchers are notified. The callbacks run last, because a callback may use the batcher, and may read the
        outcome of another job of its batch.
        """
        try:
            with self.queue.mutex:
                settled = settle_all(futures, outcomes, service, failures, failed)
                self._count_settled(settled, service, failed)
                if settled.unannounced:
                    self._unannounced.update(dict.fromkeys(settled.unannounced))
                self._remove_settled(settled.done)
            for future in settled.unannounced:
                future._notify_watchers()
            for future in settled.unannounced:
                future._run_callbacks()
                self._unannounced.pop(future, None)
            return settled.failures
        except BaseException:  # an exception from outside: see `Runner.recover`
            try:
                self._recover_and_announce()
            except BaseException:  # a second one
                self._recover_and_announce()
            raise

    def _count_settled(self, settled: Settled, service: Service | None, failed: JobState) -> None:
        if service is not None and settled.waiters:
            callers = [waiter.caller for waiter in settled.waiters]
            self.queue.callers.record_results(callers, service.started + service.time, service.time)
        counts, bad = self._counts, settled.failures
        good = len(settled.done) - bad
        counts[_RUNNING] -= good + bad
        counts[_SUCCEEDED] += good
        counts[failed] += bad

    def fail(self, futures: list[JobFuture[Any]], error: BaseException) -> int:
        """Fail the jobs that are running, and return their number. Each caller gets its own copy of *error*.

        Then announce the outcomes of all of the jobs, in case an exception prevented that before.
        """
        failures = Failures(repr(self.queue.name), self.queue)
        failed = self.settle(futures, [error] * len(futures), failures)
        self.announce([future for future in futures if future.done()])
        return failed

    def remove_settled(self, futures: Iterable[JobFuture[Any]]) -> None:
        """Remove settled futures. If an epoch has no job left, wake the callers that wait for it."""
        with self.queue.mutex:
            self._remove_settled(futures)

    def _remove_settled(self, futures: Iterable[JobFuture[Any]]) -> None:
        remove = self._unsettled.pop
        known = [future for future in futures if remove(future, self) is None]
        for epoch, count in _epochs(known).items():
            self._epochs[epoch] -= count
            if not self._epochs[epoch]:
                del self._epochs[epoch]
                self.queue.settled.notify_all()

    def wait_settled(self, epoch: float, moment: float = NEVER) -> bool:
        """Wait until all jobs of *epoch* and of earlier ones are settled. Return False if *moment* comes first."""
        waiter = Waiter(self.queue.mutex)
        with self.queue.mutex:
            try:
                self.queue.settled[waiter] = None
                self._wait_settled(epoch, moment, waiter)
            finally:
                self.queue.settled.pop(waiter, None)
            return self._oldest_epoch() > epoch

    def _wait_settled(self, epoch: float, moment: float, waiter: Waiter) -> None:
        while self._oldest_epoch() <= epoch and self.queue.clock.now() < moment:
            self.queue.clock.wait_until(waiter, moment)

    def unsettled(self) -> list[JobFuture[Any]]:
        """Return the futures that have no outcome yet, in order of acceptance."""
        with self.queue.mutex:
            futures = self.inherited()
        return futures

    def inherited(self) -> list[JobFuture[Any]]:
        """Do the same as `unsettled` without the lock, for a forked child, where no thread may ever release it.

        At whatever statement the threads of the parent were, each future is in one of these three places.
        """
        return list(dict.fromkeys([*self._unsettled, *self.queue.taken, *self.queue.queue]))

    def stats(self) -> BatcherStats:
        """Return all counts of one moment."""
        with self.queue.mutex:
            # R5: all are from the same moment. Later, these containers may get more items, but do not lose any.
            queue = self.queue
            counted, taken, fresh, cancelled, counts = (
                queue.counted,
                queue.taken,
                queue.queue,
                queue.cancelled,
                self._counts.copy(),
            )
            stages = list(cancelled.values())  # before the jobs are counted, because each of these is one of them
            counts[_QUEUED] = counted - sum(counts.values()) + len(taken) + len(fresh)
            for stage in stages:
                # If none is counted as batched, this job was still counted as queued when it joined the open batch.
                counts[stage if counts[stage] else _QUEUED] -= 1
                counts[_CANCELLED] += 1
            stats = BatcherStats(
                accepted=sum(counts.values()),
                **{state.value: count for state, count in counts.items()},
                batches=self._batches,
                triggers=dict(self._triggers),
                oldest=max(0.0, self.queue.clock.now() - self._oldest()),
            )
        return stats

    def _oldest(self) -> float:
        futures = [*self._unsettled, *self.queue.taken, *self.queue.queue]  # R10
        return next((future.submitted for future in futures if future._is_waiting), NEVER)

    def _oldest_epoch(self) -> float:
        # Jobs in the ledger are older than those in `taken`, and these are older than those in the queue.
        fresh = self.queue.taken or self.queue.queue
        return min(self._epochs, default=fresh[0]._epoch if fresh else NEVER)

    def _move(
        self, futures: Iterable[JobFuture[Any]], before: tuple[JobState, ...], stage: JobState
    ) -> list[JobFuture[Any]]:
        """Move the futures that are in one of the stages *before* to *stage*, and return them."""
        live, batched = [], 0
        for future in futures:
            was = future._stage
            if was in before:  # R5: a finalizer may cancel any of them
                future._stage = stage
                batched += was is _BATCHED
                live.append(future)
        counts, total = self._counts, len(live)
        counts[_BATCHED] -= batched
        counts[stage] += total
        return live

    def _queued(self) -> int:
        return self.queue.counted - sum(self._counts.values())

    def _count_taken_waiting(self) -> None:
        self.queue.count_as_waiting(self._queued() + self._counts[_BATCHED])


def _epochs(futures: Collection[JobFuture[Any]]) -> Mapping[int, int]:
    """Return the number of the futures per epoch."""
    epochs = [future._epoch for future in futures]
    distinct = set(epochs)
    return Counter(epochs) if len(distinct) > 1 else dict.fromkeys(distinct, len(epochs))
