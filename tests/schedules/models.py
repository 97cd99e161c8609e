"""Small models of a batcher: two to five threads, and a few jobs.

In each model, every job that was accepted must have one outcome, the counts of ``stats()`` must add up, and no thread
may wait forever. The docstring of a model says what else must hold in every schedule.
"""

import concurrent.futures
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import interleave_test

from microbatch import (
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatchInfo,
    BatchingPolicy,
    BatchReport,
    BestSize,
    Congestion,
    InTime,
    Interval,
    JobFuture,
    JobState,
    Size,
    Window,
    coalescing,
)
from microbatch.listeners import BatchListener
from microbatch.testing import InlineExecutor
from tests.schedules.search import FOCUS, ScheduleClock, focus

spawn: Any = interleave_test.spawn

_FINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED, JobState.DROPPED)


class _Log(logging.Handler):
    """Keeps what the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self.texts.append(record.getMessage())


_log = _Log()  # created here, because a run would replace its lock
logging.getLogger("microbatch").addHandler(_log)


class _Refused(Exception):
    """What an HTTP client raises if an API refuses a call."""

    status_code = 429


class Setting:
    """A batcher, and everything that happens to its jobs.

    Args:
        policy: The policy.
        workers: The number of worker threads. With 0, batches run in the batcher thread.
        started: Whether the threads run before the model begins.
        options: Other options of the batcher.
    """

    def __init__(
        self, policy: BatchingPolicy[Any] = Size(1), workers: int = 0, started: bool = True, **options: Any
    ) -> None:
        self.batches: list[list[Any]] = []
        self.refused: list[Any] = []  # the processor raises at once if a batch begins with one of these jobs
        self.callbacks: list[Any] = []
        self.accepted: list[JobFuture[Any]] = []
        _log.texts = []
        self._permits: Any = None  # how many batches may be processed, if `block` was called
        options.update({"max_workers": workers} if workers else {"executor": InlineExecutor()})
        self.batcher: Batcher[Any, Any] = Batcher(self._process, policy, clock=ScheduleClock(), **options)
        if started:
            with interleave_test.no_interleave():
                self.submit("first")
                self.batcher.flush()

    def _process(self, jobs: list[Any]) -> list[Any]:
        self.batches.append(jobs[:])
        if jobs[0] in self.refused:
            raise _Refused
        if self._permits is not None:
            self._permits.acquire()
        return [[job] for job in jobs]

    def block(self) -> None:
        """Let the processor wait for `unblock`."""
        self._permits = threading.Semaphore(0)

    def unblock(self, batches: int = 10) -> None:
        """Let the processor return once for each of these batches."""
        self._permits.release(batches)

    def sleep(self, seconds: float) -> None:
        """Wait until no thread can run, and the clock jumps."""
        threading.Event().wait(seconds)

    def wait_for_batches(self, count: int) -> None:
        """Wait until the processor has been called *count* times."""
        while len(self.batches) < count:
            self.sleep(0.001)

    def submit(self, *jobs: Any, **options: Any) -> None:
        """Submit jobs one after another. One that is refused has no future."""
        for job in jobs:
            try:
                future = self.batcher.submit(job, **options)
            except (BacklogFull, BatcherClosed):
                continue
            self.accepted.append(future)
            future.add_done_callback(self.callbacks.append)

    def end(self) -> None:
        """Shut the batcher down in a single step, and check what must hold in the end."""
        with interleave_test.no_interleave():
            self.batcher.shutdown()
            self.check()

    def check(self, abandoned: bool = False) -> None:
        """Check what must hold when the batcher has ended. A job that was abandoned may have been processed."""
        processed = [job for jobs in self.batches for job in jobs]
        assert [] not in self.batches, "a batch is empty"
        assert len(processed) == len(set(processed)), "a job was processed twice"
        assert _log.texts == []
        for future in self.accepted:
            assert future.state in _FINAL, f"job {future.job} is {future.state}"
            succeeded = future.state is JobState.SUCCEEDED
            failed = future.state is JobState.FAILED
            assert abandoned or failed == (future.job in self.refused), f"job {future.job} is {future.state}"
            assert abandoned or (future.job in processed) == (
                succeeded or failed
            ), f"job {future.job} is {future.state}"
            if future.state is JobState.SUCCEEDED:
                assert future.result().value == [future.job], "the result of another job"
        assert set(processed) <= {future.job for future in self.accepted}, "a job was refused and processed"
        assert Counter(map(id, self.callbacks)) == Counter(map(id, self.accepted)), "each callback is called once"
        stats = self.batcher.stats()
        counts = Counter(future.state.value for future in self.accepted)
        shown = {state.value: getattr(stats, state.value) for state in JobState}
        assert Counter(shown) == counts and stats.accepted == len(self.accepted), f"{stats} of {counts}"
        assert abandoned or stats.batches == len(self.batches)


@focus("put close drain drained take drop")
def close_and_submit() -> None:
    """A job that is submitted during the shutdown is refused, or accepted and processed."""
    setting = Setting()
    task = spawn(setting.batcher.shutdown)
    setting.submit(1)
    task.join()
    setting.end()


@focus("cancel claim _drop_cancelled")
def cancel_and_dispatch() -> None:
    """If ``cancel`` returns true, the job is cancelled. Otherwise, it is processed."""
    setting = Setting()
    setting.submit(1)
    future = setting.accepted[-1]
    assert future.cancel() == future.cancelled()
    setting.end()


@focus("cancel claim close_group _drop_cancelled drain peek drop")
def cancel_and_take() -> None:
    """A cancelled job is never processed, even if the leader puts it into a batch at the same time."""
    setting = Setting()
    setting.submit(1)
    task = spawn(setting.accepted[-1].cancel)
    setting.submit(2)
    concurrent.futures.wait(setting.accepted)
    task.join()
    setting.end()


@focus("put keep claim")
def room_for_one() -> None:
    """Two callers submit a job while there is space for one. Exactly one is accepted."""
    setting = Setting(max_pending=2, workers=1)
    setting.block()
    setting.submit(1)
    setting.wait_for_batches(2)
    setting.submit(2)
    task = spawn(setting.submit, 3, timeout=0)
    setting.submit(4, timeout=0)
    task.join()
    assert len(setting.accepted) == 4
    setting.unblock()
    setting.end()


def _full_queue(size: int = 1) -> Setting:
    """Return a batcher whose worker is blocked, and whose queue is full with *size* jobs."""
    setting = Setting(max_pending=size, workers=1)
    setting.block()
    setting.submit(1)
    setting.wait_for_batches(2)
    setting.submit(*range(2, 2 + size))
    return setting


@focus("put _wait_for_room _wait_in_line enter keep claim notify note_news blocks_callers resign wait_for_lead")
def wait_for_room() -> None:
    """A caller begins to wait just as the queue gets space. It sees the space, or is woken."""
    setting = _full_queue()
    task = spawn(setting.unblock, 1)
    setting.submit(3)
    setting.unblock()
    task.join()
    setting.end()


@focus("put _wait_for_room _wait_in_line enter keep cancel _drop_cancelled notify note_news drain")
def wait_for_room_of_a_cancelled_job() -> None:
    """A caller begins to wait just as a job is cancelled. It sees the space, or is woken."""
    setting = _full_queue()
    task = spawn(setting.accepted[-1].cancel)
    setting.submit(3)
    setting.unblock()
    task.join()
    setting.end()


@focus("put _wait_for_room _wait_in_line enter keep close notify_all")
def wait_for_room_and_close() -> None:
    """Two callers wait for space when the batcher is shut down. Both stop waiting, and their jobs are refused."""
    setting = _full_queue()
    tasks = [spawn(setting.submit, 3), spawn(setting.batcher.shutdown, wait=False)]
    setting.submit(4)
    for task in tasks:
        task.join()
    setting.unblock()
    setting.end()


@focus("put _wait_for_room _wait_in_line enter keep claim notify wake")
def enter_and_pass_room_on() -> None:
    """The queue gets space for a second caller just as the first one enters. The second one is woken."""
    setting = _full_queue(size=2)
    tasks = [spawn(setting.submit, 4), spawn(setting.submit, 5)]
    setting.unblock(2)
    for task in tasks:
        task.join()
    setting.unblock()
    setting.end()


@focus("put _wait_for_room _wait_in_line enter keep claim notify wake")
def leave_and_pass_room_on() -> None:
    """The timeout of a caller runs out just as the queue gets space. Another caller gets the space then."""
    setting = _full_queue()
    tasks = [spawn(setting.submit, 3, timeout=1), spawn(setting.submit, 4)]
    setting.sleep(1)
    setting.unblock(1)
    tasks[0].join()
    if 3 not in [future.job for future in setting.accepted]:
        tasks[1].join()
    setting.unblock()
    tasks[1].join()
    setting.end()


def _blocked(workers: int = 1, jobs: Sequence[int] = (1,), **options: Any) -> Setting:
    """Return a batcher that has one worker blocked by a batch of these jobs, and an empty queue."""
    setting = Setting(workers=workers, **options)
    setting.block()
    setting.submit(*jobs)
    setting.wait_for_batches(2)
    return setting


def _full_key(**limits: Any) -> Setting:
    """Return a batcher whose worker is blocked, and that has room for one more job of each key. Odd numbers are a key."""
    return _blocked(key=lambda job: job != "first" and job % 2, **limits)


@focus("put _enter_bounds enter keep is_full claim leave")
def room_of_a_key() -> None:
    """Two callers submit a job of a key while there is space for one. Exactly one is accepted. Another key has space."""
    setting = _full_key(max_pending_per_key=1)
    task = spawn(setting.submit, 3, timeout=0)
    setting.submit(5, timeout=0)
    setting.submit(4, timeout=0)
    task.join()
    assert len(setting.accepted) == 4
    setting.unblock()
    setting.end()


@focus(
    "put _enter_bounds _wait_for_room _wait_in_line enter _try_to_enter claim leave _try_to_leave notify crowded_keys"
)
def wait_for_room_of_a_key() -> None:
    """Two callers wait for space of a key, which gets space for one after the other. Both jobs are processed."""
    setting = _full_key(max_pending_per_key=1)
    setting.submit(3)
    tasks = [spawn(setting.submit, 5), spawn(setting.submit, 7)]
    setting.unblock()
    for task in tasks:
        task.join()
    setting.end()


@focus("put _enter_bounds _enter enter _try_to_enter claim leave _try_to_leave")
def room_of_a_weight() -> None:
    """Two callers submit a job while there is space for one of the weights. Exactly one is accepted, and later another."""
    setting = _blocked(weigh=lambda job: 1 if job == "first" else job, max_pending_weight=6)
    setting.submit(2)
    task = spawn(setting.submit, 3, timeout=0)
    setting.submit(4, timeout=0)
    task.join()
    assert len(setting.accepted) == 4
    setting.unblock()
    setting.submit(6)
    setting.end()


@focus("put _enter_bounds _wait_for_room _wait_in_line enter _try_to_enter claim leave _try_to_leave notify pass_on")
def wait_for_room_of_a_weight() -> None:
    """The timeout of a caller with a heavy job runs out while a caller with a light one waits behind it."""
    setting = _blocked(weigh=lambda job: 1 if job == "first" else job, max_pending_weight=4)
    setting.submit(3)
    tasks = [spawn(setting.submit, 4, timeout=1), spawn(setting.submit, 2)]
    setting.sleep(1)
    setting.unblock()
    for task in tasks:
        task.join()
    setting.end()


@focus(
    "put _drop_oldest _drop_beyond _drop oldest _try_to_find_oldest is_exceeded is_full announce_dropped drain claim"
)
def drop_oldest() -> None:
    """Three callers submit a job to a queue with space for one. The jobs but one are dropped."""
    setting = _blocked(max_pending=1, drop_oldest=True)
    tasks = [spawn(setting.submit, 2), spawn(setting.submit, 3)]
    setting.submit(4)
    for task in tasks:
        task.join()
    assert setting.batcher.stats().dropped == 2
    setting.unblock()
    setting.end()


@focus(
    "put _drop_oldest _drop_beyond _drop oldest _try_to_find_oldest is_exceeded is_full announce_dropped drain claim"
)
def drop_and_dispatch() -> None:
    """A job is dropped just as its batch is dispatched. It is processed, or it is dropped."""
    setting = _blocked(max_pending=1, drop_oldest=True)
    setting.submit(2)
    task = spawn(setting.unblock)
    setting.submit(3)
    task.join()
    setting.end()


@focus(
    "put _drop_oldest _drop_beyond _drop add oldest is_exceeded _try_to_enter _try_to_leave leave claim leave_bounds"
)
def drop_by_weight_and_dispatch() -> None:
    """A job is dispatched just as it enters the limit on the weight. It leaves the limit again."""
    setting = Setting(weigh=lambda job: 1, max_pending_weight=2, drop_oldest=True, workers=1)
    task = spawn(setting.submit, 1, 2)
    setting.submit(3)
    task.join()
    with interleave_test.no_interleave():
        setting.batcher.flush()
    setting.block()
    setting.submit(4)
    setting.sleep(1)
    setting.submit(5, 6)
    assert setting.batcher.stats().dropped <= 1
    setting.unblock()
    setting.end()


@focus("policy _adopt_policy _replace_collector drain put claim _take_in _dispatch resign watch_callers")
def change_policy() -> None:
    """The policy changes just as jobs are submitted and dispatched. No job is lost or processed twice."""
    setting = Setting(Size(3), workers=1)
    task = spawn(setattr, setting.batcher, "policy", Size(2))
    setting.submit(1, 2)
    setting.wait_for_batches(2)
    task.join()
    setting.end()


def _trained(policy: BatchingPolicy[Any], *reports: tuple[int, float]) -> BatchingPolicy[Any]:
    """Return *policy*, which has learned from batches. Each report has a size and a service time in seconds."""
    for size, seconds in reports:
        policy.observe(BatchReport(BatchInfo(1, size, size, None, ""), seconds, failed=0))
    return policy


@focus("put note_news wait_for_lead resign is_wanted drain cancel _drop_cancelled claim _take_in _dispatch")
def in_time() -> None:
    """Each job that expires is dispatched in time, even while the one that expires first is cancelled."""
    time = 2  # that a batch takes
    setting = Setting(Size(5) | Interval(0.009) | _trained(InTime(), (5, time)))
    setting.submit(1)  # due so soon that other jobs may stay in the queue until then
    setting.submit(2, expires_in=time)
    concurrent.futures.wait(setting.accepted)
    task = spawn(setting.submit, 3, expires_in=time + 0.001)
    setting.submit(4, expires_in=time)
    next(future for future in setting.accepted if future.job == 4).cancel()
    task.join()
    concurrent.futures.wait(setting.accepted)
    for future in setting.accepted:
        if not future.cancelled():
            assert future.result().queue_time + time <= future.expires_in + 1e-9, f"job {future.job} is late"
    setting.end()


class _WatchedSize(BestSize):
    """Checks that no batch grows beyond the size in force. One that was larger before the size fell may stay so."""

    _gates = 0  # as in the base class, so that the batcher treats it like a built-in policy
    _held = 0  # how many jobs the open batch had when the batcher asked the last time

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        assert window.count <= max(self._size, self._held), f"a batch of {window.count} jobs, beyond {self._size}"
        self._held = window.count
        return super().due(window)

    def reason(self, window: Window[object]) -> str:
        """See `BatchingPolicy.reason`. The batcher asks for it when it dispatches the batch."""
        self._held = 0
        return super().reason(window)


@focus("put lead finish _take_in _dispatch resign drain")
def size_falls() -> None:
    """The best size falls from 3 to 1 just as jobs arrive. No batch grows beyond it, and no job waits for others."""
    setting = _blocked(policy=_WatchedSize(3), jobs=[1, 2, 3], workers=2)
    setting.sleep(1)  # so the batch of 3 takes long
    setting.unblock()
    setting.submit(4, 5)
    concurrent.futures.wait(setting.accepted)
    setting.end()


@focus("put lead finish _take_in _dispatch resign")
def limit_rises_and_falls() -> None:
    """The limit rises to 2 just as two jobs arrive, and both run. It falls to 1 just as another comes, which waits."""
    setting = _blocked(policy=Size(1) & _trained(Congestion(2), (1, 1), (1, 1)), workers=2)
    setting.refused = [3]
    setting.unblock(1)  # the fourth batch with the limit 1 ends
    setting.submit(2, 3)
    setting.accepted[-1].exception()
    setting.submit(4, expires_in=60)  # so that the batcher thread looks at it even if no more batches may run
    setting.sleep(1)
    assert setting.batches[1:] in ([[1], [2], [3]], [[1], [3], [2]]), setting.batches
    setting.unblock()
    concurrent.futures.wait(setting.accepted)
    setting.end()


@focus("put claim _expire settle_all close_group")
def expire_and_dispatch() -> None:
    """A job either expires or is processed."""
    setting = Setting(Size(2))
    setting.submit(1, expires_in=1)
    setting.sleep(1)
    setting.submit(2)
    setting.batcher.flush()
    setting.end()


@focus("put flush drain unsettled _accepted running wait_settled")
def flush_and_submit() -> None:
    """A flush waits for every job that was submitted before it, and needs no other job for that."""
    setting = Setting(Size(5))
    task = spawn(setting.submit, 1)
    setting.submit(2)
    before = setting.accepted[:]
    setting.batcher.flush()
    assert all(future.done() for future in before)
    task.join()
    setting.batcher.flush()
    assert all(future.done() for future in setting.accepted)
    setting.end()


@focus("flush unsettled _accepted running claimed claim settle_all close_group")
def flush_and_dispatch() -> None:
    """A flush waits for a job that the leader is dispatching."""
    setting = Setting()
    setting.submit(1)

    def flush() -> None:
        setting.batcher.flush()
        assert setting.accepted[-1].done()

    task = spawn(flush)
    setting.accepted[-1].result()
    task.join()
    setting.end()


@focus("put lead take_lead resign wait_for_lead is_wanted drain take drop")
def resign_and_submit() -> None:
    """A worker stops leading just as a job comes. The batcher thread, or the worker, sees the job."""
    setting = Setting(workers=1)
    setting.submit(1)
    setting.submit(2)
    concurrent.futures.wait(setting.accepted)
    setting.end()


@focus("lead take_lead resign wait_for_lead _is_due is_wanted")
def resign_until_later() -> None:
    """A worker stops leading while a batch is due later. The batcher thread wakes up at that moment."""
    setting = Setting(Size(2) | Interval(1), workers=1)
    setting.block()
    setting.submit(1, 2)
    setting.wait_for_batches(2)
    setting.submit(3)
    setting.unblock()
    concurrent.futures.wait(setting.accepted)
    setting.end()


@focus("lead take_lead resign is_wanted post note_news drain finish")
def two_workers() -> None:
    """Two workers finish their batches at the same time. Each leads, or passes its finished batch to the other."""
    setting = Setting(workers=2)
    task = spawn(setting.submit, 1)
    setting.submit(2)
    task.join()
    for future in setting.accepted:
        future.result()
    setting.end()


@focus("_wait _attach settle_all settle _announce _get_result")
def result_and_settle() -> None:
    """A caller begins to wait just as its future is settled. So does another one, and both get the same object."""
    setting = Setting()
    setting.submit(1)
    future = setting.accepted[-1]
    results: list[Any] = []
    task = spawn(lambda: results.append(future.result()))
    results.append(future.result())
    task.join()
    assert results[0] is results[1]
    setting.end()


@focus("_notify_watchers _try_to_notify_watchers release _notify_each _notify_once _get_condition settle_all")
def watch_and_settle() -> None:
    """``wait`` and ``as_completed`` find each future once, also if it is settled in the meantime."""
    setting = Setting()
    setting.submit(1)
    futures = setting.accepted[-1:]
    found: list[Any] = []
    task = spawn(lambda: found.extend(concurrent.futures.as_completed(futures)))
    done, not_done = concurrent.futures.wait(futures)
    assert done == set(futures) and not not_done
    task.join()
    assert found == futures
    setting.end()


@focus("cancel _notify_watchers _try_to_notify_watchers release _notify_each _notify_once _get_condition settle_all")
def watch_and_cancel() -> None:
    """``wait`` returns if the job is cancelled in the meantime."""
    setting = Setting(Size(5))
    setting.submit(1)
    futures = setting.accepted[-1:]
    task = spawn(futures[0].cancel)
    concurrent.futures.wait(futures)
    task.join()
    setting.end()


@focus("submit start put close _end_unstarted _wait_ended _launch _run")
def start_and_shutdown() -> None:
    """A batcher is shut down just as its first job starts the threads."""
    setting = Setting(started=False)
    task = spawn(setting.batcher.shutdown)
    setting.submit(1)
    task.join()
    setting.end()


@focus("submit start put _launch _run")
def two_starts() -> None:
    """Two callers submit the first job. The threads are started once."""
    setting = Setting(started=False)
    task = spawn(setting.submit, 1)
    setting.submit(2)
    concurrent.futures.wait(setting.accepted)
    task.join()
    setting.end()


@focus("close _end_unstarted wait_ended _wait_ended _end")
def two_shutdowns() -> None:
    """When ``shutdown`` returns in either thread, all jobs are settled and all shutdown callbacks have been called."""
    setting = Setting()
    setting.submit(1)
    _shut_down_twice(setting)


@focus("close _end_unstarted wait_ended _wait_ended _end _run_callbacks _run_next_callback")
def two_shutdowns_before_the_start() -> None:
    """When ``shutdown`` returns in either thread, the callbacks of a batcher without threads have been called."""
    _shut_down_twice(Setting(started=False))


def _shut_down_twice(setting: Setting) -> None:
    called: list[int] = []

    def call() -> None:
        setting.sleep(1)
        called.append(1)

    def shut_down() -> None:
        setting.batcher.shutdown()
        assert called[:1] == [1]
        assert all(future.done() for future in setting.accepted)

    setting.batcher.add_shutdown_callback(call)
    task = spawn(shut_down)
    shut_down()
    task.join()
    setting.end()


@focus("add_shutdown_callback _run_callbacks _run_next_callback _end _end_unstarted")
def shutdown_callback() -> None:
    """A shutdown callback that is added just as the batcher ends is called."""
    setting = Setting()
    called: list[int] = []
    task = spawn(setting.batcher.shutdown)
    setting.batcher.add_shutdown_callback(lambda: called.append(1))
    task.join()
    assert called == [1]
    setting.end()


class _Events(BatchListener):
    def __init__(self) -> None:
        self.events: list[str] = []

    def job_accepted(self, event: Any) -> None:
        self.events.append("accepted")

    def batch_started(self, event: Any) -> None:
        self.events.append("started")

    def batch_finished(self, event: Any) -> None:
        self.events.append("finished")

    def shutdown(self, event: Any) -> None:
        self.events.append("shut down")


@focus("put close lead resign turn drained _end _run_callbacks")
def listener_and_shutdown() -> None:
    """A listener gets one event for each job, two for each batch, and then one for the shutdown."""
    log = _Events()
    setting = Setting(workers=1, listeners=[log])
    task = spawn(setting.batcher.shutdown)
    setting.submit(1)
    task.join()
    setting.end()
    assert log.events.count("shut down") == 1
    assert {"started", "finished"}.isdisjoint(log.events[log.events.index("shut down") :])
    assert log.events.count("accepted") == len(setting.accepted)
    assert log.events.count("started") == log.events.count("finished") == len(setting.batches)


@focus("stats _consistent_counts claim settle_all close_group")
def stats_and_dispatch() -> None:
    """The counts of ``stats()`` always add up to the number of accepted jobs."""
    setting = Setting()

    def look() -> None:
        stats = setting.batcher.stats()
        counts = {state.value: getattr(stats, state.value) for state in JobState}
        assert stats.accepted == sum(counts.values()) == 2, stats

    setting.submit(1)
    task = spawn(look)
    setting.accepted[-1].result()
    task.join()
    setting.end()


@focus("stats _consistent_counts put claim settle_all close_group")
def stats_at_one_moment() -> None:
    """If ``stats()`` counts a job that was submitted after another one succeeded, it also counts that success."""
    setting = Setting()

    def submit() -> None:
        setting.submit(1)
        setting.accepted[-1].result()
        setting.submit(2)

    task = spawn(submit)
    stats = setting.batcher.stats()
    assert stats.accepted < 3 or stats.succeeded >= 2, stats
    task.join()
    setting.end()


@focus("stats _consistent_counts cancel _drop_cancelled drop claim close_group")
def stats_and_cancel() -> None:
    """The counts of ``stats()`` add up to the number of accepted jobs while a job is cancelled and dropped."""
    setting = Setting(Size(5))

    def look() -> None:
        stats = setting.batcher.stats()
        counts = {state.value: getattr(stats, state.value) for state in JobState}
        assert stats.accepted == sum(counts.values()) == 3 and min(counts.values()) >= 0, stats

    setting.submit(1, 2)
    task = spawn(look)
    setting.accepted[-1].cancel()
    setting.batcher.flush()
    task.join()
    setting.end()


@focus("_abandon claim claimed running settle_all")
def abandon_and_settle() -> None:
    """All jobs are abandoned, as when the interpreter stops waiting for them at exit. Each still has one outcome."""
    setting = Setting(workers=1)
    setting.submit(1)
    setting.batcher._engine.abandon(RuntimeError("abandoned"))
    outcomes = [(future.exception(), future.state) for future in setting.accepted]
    setting.batcher.shutdown()
    assert outcomes == [(future.exception(), future.state) for future in setting.accepted]
    setting.check(abandoned=True)


@focus("add_done_callback _attach _run_each _run_callback _run_callbacks settle_all _announce _notify")
def done_callback() -> None:
    """A callback that is added just as its future is settled is called once."""
    setting = Setting()
    setting.submit(1)
    called: list[Any] = []
    setting.accepted[-1].add_done_callback(called.append)
    setting.end()
    assert called == setting.accepted[-1:]


class _Sharing:
    """Callers that share equal jobs.

    Args:
        setting: The setting.

    Attributes:
        callers: The futures of the callers that were not refused.
        called: The futures whose callbacks have run.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._coalescer = coalescing(setting.batcher)
        self.callers: list[JobFuture[Any]] = []
        self.called: list[Any] = []

    def submit(self, job: Any, **options: Any) -> None:
        """Submit a job, or join an equal one."""
        try:
            caller = self._coalescer.submit(job, **options)
        except BatcherClosed:
            return
        self.callers.append(caller)
        caller.add_done_callback(self.called.append)

    def end(self) -> None:
        """Shut the batcher down, and check what must hold in the end."""
        with interleave_test.no_interleave():
            self.setting.batcher.shutdown()
        processed = Counter(job for jobs in self.setting.batches for job in jobs)
        for caller in self.callers:
            if caller.state is JobState.SUCCEEDED:
                assert caller.result().value == [caller.job] and processed[caller.job]
            else:
                assert caller.state in (JobState.CANCELLED, JobState.EXPIRED)
        assert Counter(map(id, self.called)) == Counter(map(id, self.callers)), "each callback is called once"
        assert {} == self._coalescer._in_flight, "a job is still in flight"
        stats = self.setting.batcher.stats()
        assert stats.accepted == stats.succeeded + stats.cancelled + stats.expired
        assert stats.succeeded == sum(processed.values())


@focus("put _add _try_to_add _joins_another retire try_to_remove")
def share_a_job() -> None:
    """Two callers submit equal jobs at the same time. They share one job, and each gets its result."""
    sharing = _Sharing(_blocked())
    task = spawn(sharing.submit, 2)
    sharing.submit(2)
    task.join()
    sharing.setting.unblock()
    assert [caller.result().value for caller in sharing.callers] == [[2], [2]]
    assert sharing.setting.batches == [["first"], [1], [2]]
    sharing.end()


@focus("put close _add _try_to_add _joins_another drain")
def share_and_close() -> None:
    """Two callers submit equal jobs during the shutdown. Each gets a result or an error."""
    sharing = _Sharing(Setting())
    tasks = [spawn(sharing.submit, 1) for _ in range(2)]
    sharing.setting.batcher.shutdown()
    for task in tasks:
        task.join()
    for caller in sharing.callers[:]:
        if isinstance(caller.exception(), BatcherClosed):  # it joined a job that was then refused
            sharing.callers.remove(caller)
            sharing.called.remove(caller)
    sharing.end()


@focus("cancel leave _leave _try_to_leave _add _try_to_add _end_if_left _joins_another claim _drop_cancelled")
def share_and_cancel() -> None:
    """A caller cancels just as another one joins its job. The other one gets a result."""
    sharing = _Sharing(_blocked())
    sharing.submit(2)
    first = sharing.callers[0]
    task = spawn(sharing.submit, 2)
    cancelled = first.cancel()
    sharing.setting.unblock()
    task.join()
    assert sharing.callers[1].result().value == [2]
    assert cancelled == first.cancelled()
    sharing.end()


@focus("_expires_by _try_to_expire add _add _try_to_add _put_off _joins_another _expire put_off")
def share_and_expire() -> None:
    """A caller that never expires joins a job just as the job expires, or too late. In both cases, it gets a result."""
    sharing = _Sharing(_blocked(workers=0))  # the thread that lets jobs expire is blocked too
    sharing.submit(2, expires_in=1)
    sharing.setting.sleep(2)
    task = spawn(sharing.setting.unblock)
    sharing.submit(2)
    task.join()
    assert sharing.callers[1].result().value == [2]
    sharing.end()


@focus("_add _try_to_add _joins_another retire try_to_remove settle_all settle _announce _run_callbacks _wait _attach")
def share_and_settle() -> None:
    """A caller joins a job just as it is settled. It gets a result."""
    sharing = _Sharing(Setting())
    sharing.submit(1)
    sharing.submit(1)
    assert [caller.result().value for caller in sharing.callers] == [[1], [1]]
    sharing.end()


MODELS: dict[str, Callable[[], None]] = {model.__name__: model for model in FOCUS}
