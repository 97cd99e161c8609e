"""The ledger of a batcher: which jobs were dispatched and what became of them."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, repeat
from operator import add, attrgetter, is_
from typing import Any

from microbatch._basics.clock import NEVER
from microbatch._basics.waiting import first_of
from microbatch._engine.queue import JobQueue
from microbatch.futures.exceptions import Failures
from microbatch.futures.job_future import NOT_ACCEPTED, Attachments, JobFuture, settle_all
from microbatch.results import BatcherStats, JobState, Service

__all__ = ["Ledger"]

# Globals, because looking up a member of an enum takes longer.
_SUCCEEDED, _FAILED, _EXPIRED = JobState.SUCCEEDED, JobState.FAILED, JobState.EXPIRED

_stage_of = attrgetter("_stage")
_attachments_of = attrgetter("_attachments")

Group = list[JobFuture[Any]]
"""Jobs that were removed from `JobQueue.waiting` together: those of a batch, or jobs that expired or failed."""


class Ledger:
    """Knows all jobs that do not wait any more. Settles them, and counts them.

    Attributes:
        batched: The number of jobs in open batches.
    """

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self.batched = 0
        # First the totals: how many jobs succeeded, failed and expired, of those that are in no group any more. Then the
        # groups that have jobs without an outcome. Each job that is in a group, and neither cancelled nor dropped,
        # counts by its own stage. So a job moves from one count to another in one step: when its group is added, when
        # its stage is written, and when the totals replace its group.
        self._books: list[Any] = [(0, 0, 0)]
        self._batches = 0
        self._triggers: dict[str, int] = {}

    def claim(self, group: Group) -> None:
        """Make the calling thread the one that decides what happens to these jobs. They count as running from now on.

        Jobs that don't wait any more are removed from *group*. The others can't be cancelled any more.
        """
        if self.queue.may_expire:
            group[:] = [future for future in group if future._stage is None]  # the others are counted already
        try:
            self._books.append(group)  # before the next step, so that each job is always in one of the two places
            lost = list(map(self.queue.waiting.pop, group, repeat(self)))
        except BaseException:  # from a signal handler: the jobs that still wait do not belong to this group
            group[:] = self.not_waiting(group)
            raise
        if lost.count(None) < len(group):
            group[:] = [future for future, was in zip(group, lost) if was is None]
        self.queue.leave_bounds(group)
        if self.queue.not_full:
            self.queue.not_full.notify(len(group))

    def number_batch(self, trigger: str) -> int:
        """Count a batch that is dispatched, and return its number."""
        self._batches += 1
        self._triggers[trigger] = self._triggers.get(trigger, 0) + 1
        return self._batches

    def close_group(self, group: Group) -> None:
        """Add the jobs of a group to the totals, if all of them are settled. Only the leader calls this."""
        books, stages = self._books[:], list(map(_stage_of, group))
        found = list(map(is_, books, repeat(group)))  # not ``index``, which would look for an equal group
        if None in stages or True not in found:
            return
        place, count = found.index(True), stages.count(_SUCCEEDED)
        succeeded, failed, expired = books[0]
        totals = succeeded + count, failed, expired
        if count < len(stages):
            totals = succeeded + count, failed + stages.count(_FAILED), expired + stages.count(_EXPIRED)
        self._books[: place + 1] = [totals, *books[1:place]]

    def settle(
        self,
        futures: Iterable[JobFuture[Any]],
        outcomes: list[Any],
        failures: Failures | None,
        service: Service | None = None,
        failed: JobState = _FAILED,
    ) -> int:
        """Settle the jobs that have no outcome yet, and return how many of them failed. See `settle_all`.

        All outcomes can be read before the first callback runs, because a callback may read the outcome of another job
        of its batch.
        """
        try:
            done, failed_jobs = settle_all(futures, outcomes, service, failures, failed)
            attachments = list(map(_attachments_of, done))
            if attachments.count(None) < len(attachments):
                self._announce(done, attachments, service)
            return failed_jobs
        except BaseException:  # an exception from outside: see `Runner.recover`
            try:
                self.announce_again(list(futures))
            except BaseException:  # a second one
                self.announce_again(list(futures))
            raise

    def _announce(self, futures: Group, all_attachments: list[Attachments | None], service: Service | None) -> None:
        attachments = [each for each in all_attachments if each is not None]
        waiters = list(chain.from_iterable(map(dict.copy, attachments)))
        if service is not None and waiters:
            callers = [waiter.caller for waiter in waiters]
            self.queue.callers.record_results(callers, service.started + service.time, service.time)
        for waiter in waiters:
            waiter.wake()
        for each in attachments:
            if each.watched or each.callbacks:
                self._notify(futures)
                return

    def _notify(self, futures: Group) -> None:
        for future in futures:
            future._notify_watchers()
        for future in futures:
            future._run_callbacks()

    def announce_again(self, futures: Group) -> None:
        """Wake all waiters and notify all watchers of outcomes that exist, in case an exception prevented that."""
        for future in futures:
            if future.done():
                future._announce()
                future._run_callbacks()
        self.queue.wake_all()

    def fail(self, futures: Group, error: BaseException) -> int:
        """Fail the jobs that have no outcome yet, and return their number. If there are several, each gets a copy."""
        return self.settle(futures, [error] * len(futures), Failures(repr(self.queue.name), self.queue))

    def recover(self) -> Group:
        """Correct the ledger after an exception between any two statements of the leader. Return the jobs that wait."""
        self.queue.accepted.take()  # all of them are in `waiting` too
        for group in self._books[1:]:
            group[:] = self.not_waiting(group)
            self.close_group(group)
        self.queue.forget_gone()
        return self._accepted()

    def _accepted(self) -> Group:
        """Return the jobs that wait, without those that `JobQueue.put` has not accepted yet."""
        return [future for future in list(self.queue.waiting) if future._epoch != NOT_ACCEPTED]

    def not_waiting(self, group: Group) -> Group:
        """Return those of these jobs that do not wait for a worker any more."""
        return [future for future in group if not future._is_waiting]

    def claimed(self) -> Group:
        """Return the futures in all groups."""
        return list(chain.from_iterable(map(list.copy, self._books[1:])))  # L6

    def running(self) -> Group:
        """Return the futures of the jobs that do not wait and have no outcome yet."""
        return [future for future in self.not_waiting(self.claimed()) if future._stage is None]

    def unsettled(self) -> Group:
        """Return the futures that have no outcome yet, in order of acceptance.

        Each future is in one of these two places, whatever other threads do.
        """
        accepted = self._accepted()  # first, because jobs only move from here to there
        return list(dict.fromkeys([*self.running(), *accepted]))

    def wait_settled(self, futures: Group, moment: float = NEVER) -> bool:
        """Wait until all of these jobs are settled. Return False if *moment* comes first."""
        for future in futures:
            if not self._wait_settled(future, moment):
                return False
        return True

    def _wait_settled(self, future: JobFuture[Any], moment: float) -> bool:
        clock = self.queue.clock
        while not future.done():
            if clock.now() >= moment:
                return False
            future._wait_until(moment, clock)
        return True

    def stats(self) -> BatcherStats:
        """Return all counts at one moment."""
        queue = self.queue
        books, accepted, cancelled, dropped = self._consistent_counts()
        stages = Counter(map(_stage_of, chain.from_iterable(map(list.copy, books[1:]))))
        running = stages[None]
        succeeded, failed, expired = map(add, books[0], map(stages.__getitem__, (_SUCCEEDED, _FAILED, _EXPIRED)))
        waiting = max(0, accepted - cancelled - dropped - running - succeeded - failed - expired)
        gone = [queue.is_batched(future) for future in queue.cancelled.peek() + queue.dropped.peek()].count(True)
        batched = min(waiting, max(0, self.batched - gone))
        oldest = first_of(queue.waiting) if waiting else None
        return BatcherStats(
            accepted=waiting + running + succeeded + failed + expired + cancelled + dropped,
            queued=waiting - batched,
            batched=batched,
            running=running,
            succeeded=succeeded,
            failed=failed,
            cancelled=cancelled,
            expired=expired,
            dropped=dropped,
            batches=self._batches,
            triggers=self._triggers.copy(),
            oldest=0.0 if oldest is None else max(0.0, queue.clock.now() - oldest.submitted),
        )

    def _consistent_counts(self) -> tuple[list[Any], int, int, int]:
        """Return the books, and the numbers of accepted, of cancelled and of dropped jobs, all from one moment."""
        queue = self.queue
        inboxes = (queue.withdrawn, queue.cancelled, queue.dropped)
        while True:
            books, counts = self._books[:], [inbox.total() for inbox in inboxes]
            accepted = queue.accepted.total()
            if counts == [inbox.total() for inbox in inboxes] and list(map(id, books)) == list(map(id, self._books)):
                withdrawn, cancelled, dropped = counts
                return books, accepted - withdrawn, cancelled, dropped
