"""The work of the leader: forming batches from the jobs in the queue, and dispatching those that are due.

One thread at a time leads. It is the batcher thread, which sleeps until there is something to do, or a thread that has
just run a batch.
"""

import weakref
from collections.abc import Callable
from typing import Any

from microbatch._basics.arguments import check_answer
from microbatch._basics.clock import NOW
from microbatch._basics.log import report
from microbatch._engine.batch_run import BatchRun
from microbatch._engine.ledger import Group, Ledger
from microbatch._engine.queue import Drained
from microbatch._engine.settings import Settings
from microbatch._forming.collector import Batch, Collector
from microbatch._forming.lanes import Runs, safe
from microbatch.errors import JobExpired
from microbatch.futures.exceptions import Failures
from microbatch.futures.job_future import JobFuture
from microbatch.listeners import JobsDropped, notify
from microbatch.policies.base import BatchingPolicy, BatchReport, learners
from microbatch.results import BatchInfo, JobState

__all__ = ["Dispatcher"]

RunBatch = Callable[[BatchRun], None]
"""A function that passes a batch to another thread to run it, and returns immediately."""


class Dispatcher:
    """Drives the collector for the leader.

    Attributes:
        ledger: The ledger of the batcher.
        queue: The queue of the batcher.
        running: The batches that were dispatched and are not finished yet, each with its group in the ledger.
        interruptions: The number of exceptions from outside since a leader last finished all its work.
    """

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self.ledger = ledger
        self.queue = ledger.queue
        # Weak, because a future must not keep the policy alive.
        self.queue.explainer = weakref.WeakMethod(self.explain_job)
        self.queue.batch_finder = weakref.WeakMethod(self.is_batched)
        self.running: dict[BatchRun, Group] = {}
        self.interruptions = 0
        self._clock = settings.clock
        now = check_answer("the now() of a clock", self._clock.now())
        self._collector: Collector[JobFuture[Any]] = Collector(settings.policy, settings.max_workers, now)
        self.policy = settings.policy  # any thread may assign another one; the leader then adopts it
        self._learners = learners(settings.policy)
        self._uniform = settings.uniform
        self._drop_listeners = settings.listeners.jobs_dropped
        self._name = settings.name

    # -- called by any thread --

    def explain(self) -> list[str]:
        """See `Collector.describe`."""
        return self._collector.describe(self._clock.now())

    def explain_job(self, future: JobFuture[Any]) -> str:
        """Return why a job has no outcome yet. Takes no lock, so any thread may call this."""
        batch = self._collector.describe_batch(future.key, self._clock.now()) if future._is_waiting else ""
        return f"the job is still {future.state.value}" + (f"; {batch}" if batch else "")

    def is_batched(self, future: JobFuture[Any]) -> bool:
        """Return whether a waiting job is in an open batch. Takes no lock, so any thread may call this."""
        return self._collector.is_open(future)

    # -- called by the leader, or by a thread that becomes the leader --

    def turn(self, run: RunBatch) -> bool:
        """Wait for work, take the lead, and do the work. Return True if the batcher is closed and all work is done."""
        self.queue.wait_for_lead()
        self._take_in(self.queue.drain())
        self._dispatch(run)
        over = not self._collector and not self._collector.in_flight and self.queue.drained()
        if not over:
            self._resign()
        return over

    def lead(self, run: RunBatch, call: Callable[[], None]) -> None:
        """Become the leader if there is none, run *call*, and do all the work. Otherwise, leave *call* to the leader.

        So a worker thread that has run a batch finds its next batch itself. As long as there is work, no thread has to
        sleep or to be woken. This is the Leader/Followers pattern (Schmidt et al., Pattern-Oriented Software
        Architecture, volume 2).
        """
        queue = self.queue
        if not queue.lead():
            queue.post(call)
            return
        if queue.callers.watched or queue.is_wanted():  # draining an empty queue takes time
            self._take_in(queue.drain())
        call()
        self._dispatch(run)
        if queue.closed:  # after this thread took the lead; the batcher thread has to lead now
            queue.resign(NOW, 1)
        else:
            self._resign()

    def recover(self, error: BaseException) -> None:
        """Replace the collector after *error* interrupted the leader, and resign.

        The interrupted collector may be in any state, so all waiting jobs are added to a new one. Jobs that were
        claimed but not passed to a worker fail with *error*.
        """
        for batch_run in list(self.running):
            if not batch_run.futures or not batch_run.sent:
                self.ledger.fail(batch_run.futures, error)
                batch_run.forget()
                self.running.pop(batch_run, None)
        in_flight = {future for batch_run in list(self.running) for future in list(batch_run.futures)}
        self.ledger.recover()
        self.ledger.fail([future for future in self.ledger.running() if future not in in_flight], error)
        waiting = self.ledger.recover()  # not those of the first call, because other jobs may have been accepted since
        self._replace_collector(self._collector.policy, waiting)
        self.queue.resign(NOW, 1)

    def _adopt_policy(self, policy: BatchingPolicy[Any]) -> None:
        """Use *policy* from now on, for open batches too."""
        before = self._collector.policy
        try:
            self.queue.watch_callers(policy.hints)
            runs = self._runs_by_batch() if policy.hints.watches_keys else {}
            self._replace_collector(policy, self._collector.entries(), runs)
            self._learners = learners(policy)
        except Exception:  # from the hints of the policy
            self.queue.watch_callers(before.hints)
            if self.policy is policy:
                self.policy = before
            report("%s keeps its policy, because the new one raised", self._name)

    def _runs_by_batch(self) -> dict[BatchRun, Runs]:
        """Return which batches of the same key run now, in case the previous policy did not watch the keys."""
        by_place: dict[Any, Runs] = {}
        places = [(batch_run, safe(batch_run.info.key)) for batch_run in list(self.running)]
        return {batch_run: by_place.setdefault(place, Runs(place)) for batch_run, place in places}

    def _replace_collector(
        self, policy: BatchingPolicy[Any], waiting: Group, runs: dict[BatchRun, Runs] | None = None
    ) -> None:
        """Replace the collector. *runs* has the new `BatchRun.runs` of the running batches, if they change."""
        running = {each: each.runs if runs is None else runs.get(each) for each in list(self.running)}
        collector = self._collector.successor(policy, list(running.values()))
        for batch_run, counted in running.items():
            batch_run.runs = counted
        collector.note_callers(self.queue.callers.activity())
        collector.add(waiting)
        collector.flush(self.queue.epoch - 1, closing=self.queue.closed)
        self._collector = collector

    def finish(self, batch_run: BatchRun, time: float | None = None, error: BaseException | None = None) -> None:
        """Record that a batch is over, so a worker is free.

        *time* is the service time in seconds, if it is known. *error* is `BatchRun.error`.
        """
        group = self.running.pop(batch_run, None)
        if group is None:
            return  # recorded already: after an exception from outside, this may be called twice
        self.ledger.close_group(group)
        self._collector.finished(time, batch_run.runs)
        if time is not None and self._learners:
            started, in_flight = batch_run.started, batch_run.in_flight
            observed = BatchReport(batch_run.info, time, batch_run.failed, error, started, in_flight)
            for policy in self._learners:
                try:
                    policy.observe(observed)
                except BaseException:
                    report("the observe() of a policy raised, in batch %d of %s", batch_run.info.id, self._name)

    def forget(self, group: Group) -> None:
        """Drop jobs that another thread has claimed and settled."""
        self._collector.drop(group)
        self.ledger.close_group(group)

    def announce_dropped(self, dropped: list[JobFuture[Any]]) -> None:
        """Notify everybody who has to know that jobs were dropped. Only the leader calls this."""
        self._collector.drop(dropped)
        self.queue.leave_bounds(dropped)  # in case an exception kept the thread that dropped them from doing so
        self.ledger.announce_again(dropped)
        if self._drop_listeners:
            notify(self._drop_listeners, JobsDropped(self._name, tuple(dropped)))
        self.queue.dropped.drop(len(dropped))

    # -- the steps of these methods --

    def _resign(self) -> None:
        """Resign until the collector has something to do."""
        self.queue.resign(self._collector.next_moment(), self._collector.wanted())

    def _take_in(self, news: Drained) -> None:
        collector = self._collector
        collector.note_callers(news.callers)
        # `may_expire` is read after the jobs were taken out.
        collector.add(news.jobs, self._uniform and not self.queue.may_expire)
        if news.cancelled:
            self._drop_cancelled(news.cancelled)
        if news.dropped:
            self.announce_dropped(news.dropped)
        collector.flush(news.flushed, closing=news.closed)
        for call in news.calls:
            call()

    def _dispatch(self, run: RunBatch) -> None:
        """Dispatch all batches that are due."""
        if self.policy is not self._collector.policy:
            self._adopt_policy(self.policy)
        collector, queue, clock = self._collector, self.queue, self._clock
        if queue.crowded:
            for key in queue.crowded_keys():
                collector.press(key)
        while True:
            # Read again for each batch, because more may become due in the meantime. Otherwise, another thread would
            # have to be woken for it.
            now = clock.now()
            if queue.may_expire and (expired := collector.expire(now)):
                self._expire(expired, now)
            batch = collector.take(now, bool(queue.crowded) and queue.blocks_callers())
            if batch is None:
                break
            self._send(batch, now, run)
        self.ledger.batched = collector.batched
        self.interruptions = 0

    def _drop_cancelled(self, cancelled: list[JobFuture[Any]]) -> None:
        self._collector.drop(cancelled)
        self.queue.leave_bounds(cancelled)
        self.queue.not_full.notify(len(cancelled))
        for future in cancelled:
            future._announce()
        self.queue.cancelled.drop(len(cancelled))

    def _expire(self, candidates: list[JobFuture[Any]], now: float) -> None:
        expired = []
        for future in candidates:
            if future._expires_by(now):
                expired.append(future)
            else:
                self._collector.put_off(future)
        self.ledger.claim(expired)
        self._collector.drop(expired)
        errors = [JobExpired(future.expires_in) for future in expired]
        self.ledger.settle(expired, errors, Failures(repr(self._name), self.queue), failed=JobState.EXPIRED)
        self.ledger.close_group(expired)

    def _send(self, batch: Batch, now: float, run: RunBatch) -> None:
        key, trigger, futures, weight, error, runs = batch
        ledger, collector, size = self.ledger, self._collector, len(futures)
        ledger.claim(futures)
        ledger.batched = collector.batched
        if error is not None:
            ledger.fail(futures, error)
        if error is not None or not futures:
            ledger.close_group(futures)
            return
        if len(futures) < size:
            size, weight = len(futures), sum([future.weight for future in futures])
        info = BatchInfo(ledger.number_batch(trigger), size, weight, key, trigger)
        batch_run = BatchRun(ledger, futures, info, now)
        batch_run.runs = runs
        self.running[batch_run] = futures
        collector.started(now, runs)
        batch_run.in_flight = collector.in_flight
        run(batch_run)
