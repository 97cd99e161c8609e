"""A `JobFuture` is a `concurrent.futures.Future`: whatever the standard library does with futures works with it."""

import asyncio
import concurrent.futures
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Future,
    InvalidStateError,
)
from typing import Any

import pytest

from microbatch import Batcher, JobFuture, JobResult, JobState, Size
from microbatch.testing import ManualClock, RecordingProcessor
from tests.threads import in_thread

AnyBatcher = Batcher[Any, Any]


def double(job: Any) -> Any:
    return ValueError(job) if job == "bad" else job * 2


@pytest.fixture
def processor() -> Iterator[RecordingProcessor[Any]]:
    """Holds every batch until the test releases it or ends."""
    processor = RecordingProcessor[Any](double)
    processor.hold()
    yield processor
    processor.release()


@pytest.fixture
def batcher(processor: RecordingProcessor[Any]) -> Iterator[AnyBatcher]:
    batcher = Batcher[Any, Any](processor, Size(1))
    yield batcher
    processor.release()
    batcher.shutdown()


def test_a_standard_future_has_exactly_the_attributes_that_a_job_future_replaces() -> None:
    known = {"_condition", "_state", "_result", "_exception", "_waiters", "_done_callbacks"}
    assert known == vars(Future()).keys()


def test_a_job_future_is_a_standard_future(batcher: AnyBatcher) -> None:
    assert isinstance(batcher.submit(1), Future)


def test_a_job_future_goes_through_its_states(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    running, waiting = batcher.submit(1), batcher.submit(2)
    processor.wait_for_batches(1)
    assert (JobState.RUNNING, True, False) == (running.state, running.running(), running.done())
    assert waiting.state in (JobState.QUEUED, JobState.BATCHED)
    assert (False, False) == (waiting.running(), waiting.done())
    processor.release()
    assert 4 == waiting.result(timeout=10).value
    assert (JobState.SUCCEEDED, False, True) == (running.state, running.running(), running.done())
    assert f"<JobFuture at {id(running):#x} succeeded>" == repr(running)


def test_the_private_state_of_a_future_tells_a_running_job_from_a_waiting_one(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    running, waiting = batcher.submit(1), batcher.submit(2)
    processor.wait_for_batches(1)
    assert ("RUNNING", "PENDING") == (running._state, waiting._state)


def test_a_timeout_does_not_affect_the_job(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    future = batcher.submit(1)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.exception(timeout=0)
    processor.release()
    assert (2, None) == (future.result(timeout=10).value, future.exception())


def test_a_running_job_cannot_be_cancelled(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    future = batcher.submit(1)
    processor.wait_for_batches(1)
    assert not future.cancel()
    processor.release()
    assert 2 == future.result(timeout=10).value
    assert not future.cancel()


def test_a_waiting_job_can_be_cancelled_more_than_once(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    batcher.submit(1)
    processor.wait_for_batches(1)
    future = batcher.submit(2)
    seen: list[Any] = []
    future.add_done_callback(seen.append)
    assert [True, True] == [future.cancel(), future.cancel()]
    assert (True, True, JobState.CANCELLED) == (future.cancelled(), future.done(), future.state)
    with pytest.raises(CancelledError):
        future.result(timeout=0)
    assert [future] == seen


@pytest.mark.parametrize("when", [FIRST_COMPLETED, FIRST_EXCEPTION, ALL_COMPLETED])
def test_wait_returns_futures_that_were_settled_before(when: str) -> None:
    with Batcher(RecordingProcessor[Any](double), Size(9)) as batcher:
        futures = [batcher.submit(job) for job in (1, "bad", "unwanted")]
        assert futures[2].cancel()
    done, not_done = concurrent.futures.wait(futures, timeout=0, return_when=when)
    assert (set(futures), set()) == (done, not_done)


def test_wait_returns_at_the_first_completed_future(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    first, second = batcher.submit(1), batcher.submit(2)
    waiting = in_thread(lambda: concurrent.futures.wait([first, second], 10, FIRST_COMPLETED))
    processor.release()
    assert waiting.result(timeout=10).done >= {first}


def test_wait_returns_at_the_first_exception(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    bad, good = batcher.submit("bad"), batcher.submit(2)
    waiting = in_thread(lambda: concurrent.futures.wait([bad, good], 10, FIRST_EXCEPTION))
    processor.release()
    assert bad in waiting.result(timeout=10).done


def test_wait_for_all_futures_counts_results_exceptions_and_cancellations(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    futures = [batcher.submit(job) for job in (1, "bad", 3)]
    processor.wait_for_batches(1)
    waiting = in_thread(lambda: concurrent.futures.wait(futures, 10))
    assert futures[2].cancel()
    processor.release()
    assert (set(futures), set()) == waiting.result(timeout=10)


def test_as_completed_yields_every_future_once(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    futures = [batcher.submit(job) for job in (1, "bad", 3, 4)]
    processor.wait_for_batches(1)
    completed = in_thread(lambda: list(concurrent.futures.as_completed(futures, timeout=10)))
    assert futures[3].cancel()
    processor.release()
    assert set(futures) == set(completed.result(timeout=10))
    assert 4 == len(completed.result())


def test_many_threads_may_wait_for_one_job(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    future = batcher.submit(1)
    waiting = [in_thread(lambda: future.result(timeout=10).value) for _ in range(16)]
    processor.release()
    assert [2] * 16 == [each.result(timeout=10) for each in waiting]


def test_callbacks_run_once_and_in_order_whether_added_before_or_after_the_result(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    seen: list[str] = []
    future = batcher.submit(1)
    future.add_done_callback(lambda _: seen.append("first"))
    future.add_done_callback(lambda _: seen.append("second"))
    processor.release()
    batcher.shutdown()
    future.add_done_callback(lambda _: seen.append("late"))
    assert ["first", "second", "late"] == seen


def test_asyncio_can_await_a_job_future() -> None:
    async def main(batcher: AnyBatcher) -> list[Any]:
        futures = [asyncio.wrap_future(batcher.submit(number, timeout=0)) for number in range(3)]
        return [result.value for result in await asyncio.gather(*futures)]

    with Batcher(RecordingProcessor[Any](double)) as batcher:
        assert [0, 2, 4] == asyncio.run(main(batcher))


def test_asyncio_raises_the_exception_of_a_job_future() -> None:
    async def main(batcher: AnyBatcher) -> Any:
        return await asyncio.wrap_future(batcher.submit("bad"))

    with Batcher(RecordingProcessor[Any](double)) as batcher, pytest.raises(ValueError):
        asyncio.run(main(batcher))


def test_cancelling_the_awaiting_task_cancels_the_job(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    batcher.submit("blocks")
    processor.wait_for_batches(1)

    async def main() -> JobFuture[Any]:
        future = batcher.submit("unwanted")
        task = asyncio.ensure_future(asyncio.wait_for(asyncio.wrap_future(future), timeout=0.01))
        with pytest.raises(asyncio.TimeoutError):
            await task
        return future

    assert asyncio.run(main()).cancelled()
    processor.release()
    batcher.shutdown()
    assert [["blocks"]] == processor.batches


def test_cancelling_the_job_cancels_the_awaited_asyncio_future(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    batcher.submit("blocks")
    processor.wait_for_batches(1)

    async def main() -> None:
        future = batcher.submit("unwanted")
        awaited = asyncio.wrap_future(future)
        assert future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaited

    asyncio.run(main())


def test_a_job_result_can_be_pickled() -> None:
    with Batcher(RecordingProcessor[Any](double)) as batcher:
        result = batcher.submit(1).result()
    assert isinstance(result, JobResult)
    assert result == pickle.loads(pickle.dumps(result))


def test_a_cancel_while_another_thread_holds_the_lock_of_the_future_does_not_block_the_batcher() -> None:
    counted: list[Any] = []
    with Batcher(RecordingProcessor(double), Size(9)) as batcher:
        future = batcher.submit("job")
        canceller = threading.Thread(target=future.cancel)
        counter = threading.Thread(target=lambda: counted.append(batcher.stats()), daemon=True)
        with future._condition:  # `wait` holds it when a signal handler that uses the batcher runs
            canceller.start()
            canceller.join(0.1)  # it may have to wait for the lock that this thread holds
            counter.start()
            counter.join(10)
        canceller.join(10)
        assert [1] == [stats.accepted for stats in counted]
        assert future.cancelled()


class Waiter:
    """Stands in for the waiter that `wait` adds to a future: a test can't tell when `wait` has added its own."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def add_result(self, future: Future[Any]) -> None:
        self.received.append((future, "result"))

    def add_exception(self, future: Future[Any]) -> None:
        self.received.append((future, "exception"))

    def add_cancelled(self, future: Future[Any]) -> None:
        self.received.append((future, "cancelled"))


def test_a_cancel_does_not_wait_for_a_thread_that_holds_the_lock_of_the_future(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    batcher.submit("runs")
    processor.wait_for_batches(1)
    future = batcher.submit("waits")
    with future._condition:  # `wait` holds it too, while it may wait for the batcher's mutex
        assert in_thread(future.cancel).result(timeout=10)
    assert {future} == concurrent.futures.wait([future], timeout=10).done


def test_wait_learns_of_a_cancellation_even_if_the_cancelling_thread_held_the_lock_of_the_future() -> None:
    with Batcher[Any, Any](list, Size(2)) as batcher:
        future = batcher.submit("unwanted")
        watching = in_thread(lambda: concurrent.futures.wait([future], timeout=10).done)
        while not future._waiters:
            pass
        with future._condition:  # `wait` holds it when a signal handler that uses the batcher runs
            assert future.cancel()
            assert "job" == [batcher.submit("job") for _ in range(2)][0].result(timeout=10).value
        assert {future} == watching.result(timeout=20) == concurrent.futures.wait([future], timeout=10).done


def test_waiters_are_notified_of_the_outcome(batcher: AnyBatcher, processor: RecordingProcessor[Any]) -> None:
    good, bad, unwanted = futures = [batcher.submit(job) for job in (1, "bad", 3)]
    processor.wait_for_batches(1)
    waiter = Waiter()
    for future in futures:
        with future._condition:
            future._waiters.append(waiter)
    unwanted.cancel()
    processor.release()
    batcher.shutdown()
    assert 3 == len(waiter.received)
    assert {(unwanted, "cancelled"), (good, "result"), (bad, "exception")} == set(waiter.received)


def test_waiters_for_a_job_that_fails_with_the_batcher_thread_are_notified_once() -> None:
    class Clock(ManualClock):
        broken = False

        def now(self) -> float:
            if self.broken:
                raise OSError("no clock")
            return super().now()

    clock, waiter = Clock(), Waiter()
    with Batcher[Any, Any](list, Size(9), clock=clock) as batcher:
        future, unwanted = batcher.submit("job"), batcher.submit("unwanted")
        with future._condition:
            future._waiters.append(waiter)
        clock.broken = True
        unwanted.cancel()  # wakes the batcher thread
        assert isinstance(future.exception(timeout=10), OSError)
        clock.broken = False
    assert [(future, "exception")] == waiter.received


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_neither_a_job_future_nor_a_batcher_can_be_copied(duplicate: Any, batcher: AnyBatcher) -> None:
    with pytest.raises(TypeError, match="a Batcher can't be copied or pickled, because it has threads"):
        duplicate(batcher)
    with pytest.raises(TypeError, match="a JobFuture can't be copied or pickled, because it belongs to its batcher"):
        duplicate(batcher.submit(1))


def test_a_lock_of_a_future_that_is_never_released_delays_no_job() -> None:
    with Batcher[Any, Any](RecordingProcessor(double), Size(3)) as batcher:
        stuck, other = batcher.submit(1), batcher.submit(2)
        stuck._condition.acquire()  # Ctrl-C in `wait` leaves it acquired
        third = batcher.submit(3)
        results = [in_thread(future.result).result(timeout=10).value for future in (stuck, other, third)]
        assert in_thread(batcher.flush).result(timeout=10)
    assert [2, 4, 6] == results
    # This thread holds the lock, so it can call `wait`.
    assert not concurrent.futures.wait([stuck, other, third], timeout=10).not_done
    assert 3 == len(list(concurrent.futures.as_completed([stuck, other, third], timeout=10)))


def test_a_waiter_added_while_the_future_is_settled_is_notified_once_the_lock_is_released(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    future, waiter = batcher.submit(1), Waiter()
    with future._condition:
        processor.release()
        assert 2 == future.result(timeout=10).value
        batcher.flush()
        assert "RUNNING" == future._state  # for waiters it is not done until they are notified
        future._waiters.append(waiter)
        assert [] == waiter.received
    assert [(future, "result")] == waiter.received
    assert "FINISHED" == future._state


def wait_for(futures: Any) -> Any:
    return concurrent.futures.wait(futures)


def wait_as_completed(futures: Any) -> Any:
    return list(concurrent.futures.as_completed(futures))


@pytest.mark.parametrize("wait", [wait_for, wait_as_completed])
def test_waiting_in_a_processor_for_a_job_of_its_batcher_raises(wait: Any) -> None:
    theirs: Future[int] = Future()

    def processor(jobs: list[Any]) -> list[Any]:
        return [wait([theirs, own.submit("inner")]) if job == "outer" else job for job in jobs]

    with Batcher[Any, Any](processor) as own:
        error = own.submit("outer").exception(timeout=10)
        assert isinstance(error, RuntimeError) and "can't wait for one of its jobs" in str(error)
        in_thread(lambda: theirs.set_result(1)).result(timeout=10)  # its lock was released
        assert "job" == own.submit("job").result(timeout=10).value


def test_a_processor_may_wait_for_settled_jobs() -> None:
    def processor(jobs: list[Any]) -> list[Any]:
        return [len(wait_for(job).done) for job in jobs]

    with Batcher[Any, Any](processor) as batcher:
        done = batcher.submit([])
        done.result(timeout=10)
        assert 1 == batcher.submit([done]).result(timeout=10).value


def test_the_job_of_a_settled_future_can_be_deleted_to_free_it(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    class Large:
        def __mul__(self, factor: int) -> int:
            return factor

    job = Large()
    reference = weakref.ref(job)
    future = batcher.submit(job)
    processor.wait_for_batches(1)
    with pytest.raises(InvalidStateError, match="the job can't be deleted until its future is done"):
        del future.job
    processor.release()
    assert (job, 2) == (future.job, future.result(timeout=10).value)
    batcher.flush()
    del future.job, job
    processor.batches.clear()
    gc.collect()
    assert reference() is None
    del future.job  # a second time does no harm
    with pytest.raises(AttributeError, match="deleted from its future"):
        future.job
    assert 2 == future.result().value


def test_waiters_are_notified_even_if_the_future_is_settled_while_a_thread_releases_its_lock(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    future, waiter = batcher.submit(1), Waiter()
    processor.wait_for_batches(1)
    condition: Any = future._condition
    future._waiters.append(waiter)

    class Lock:
        """Settles the future just before this thread releases the lock for the second time."""

        def __init__(self) -> None:
            self._lock = condition.lock
            self._releases = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._lock, name)

        def release(self) -> None:
            if threading.current_thread() is threading.main_thread():
                self._releases += 1
                if self._releases == 2:
                    processor.release()
                    future.result(timeout=10)
                    batcher.flush(timeout=10)
            self._lock.release()

    condition.lock.acquire()
    condition.lock = Lock()
    condition.release()
    processor.release()
    batcher.shutdown(timeout=10)  # the thread that settles the future notifies the waiter after it wakes `result`
    assert [(future, "result")] == waiter.received


def test_a_waiter_whose_event_has_a_lock_that_is_never_released_blocks_no_other_thread(
    batcher: AnyBatcher, processor: RecordingProcessor[Any]
) -> None:
    future = batcher.submit("job")
    watching = in_thread(lambda: concurrent.futures.wait([future], timeout=10))
    while not future._waiters:  # until `wait` has added its waiter and released the lock
        pass
    (waiter,) = future._waiters
    lock = getattr(getattr(waiter.event, "_cond", None), "_lock", None)  # an attribute of `threading.Event`
    if lock is not None:
        lock.acquire()
    processor.release()
    assert "nextnext" == batcher.submit("next").result(timeout=5).value
    assert {future} == watching.result(timeout=5).done
