"""Batches that run in other processes: only the processor and the list of jobs are sent."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from loky import get_reusable_executor

from microbatch import Batcher, BatchFinished, BatchListener, BatchStarted, Size

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # starts its threads before the first test
        yield pool


def where(jobs: list[Any]) -> list[Any]:
    return [(job, os.getpid(), len(jobs)) for job in jobs]


class InFlight(BatchListener):
    """Counts the batches in flight, and keeps the maximum."""

    def __init__(self) -> None:
        self.most = self._now = 0
        self._mutex = threading.Lock()

    def batch_started(self, event: BatchStarted) -> None:
        with self._mutex:
            self._now += 1
            self.most = max(self.most, self._now)

    def batch_finished(self, event: BatchFinished) -> None:
        with self._mutex:
            self._now -= 1


def test_each_caller_gets_the_result_of_its_own_job_from_another_process(pool: Executor) -> None:
    with Batcher[int, Any](where, Size(10), executor=pool, max_workers=3) as batcher:
        results = [result.value for result in batcher.map(range(100))]
    assert list(range(100)) == [job for job, _, _ in results]
    assert {10} == {size for _, _, size in results}
    assert os.getpid() not in {process for _, process, _ in results}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_pool_never_has_more_than_max_workers_batches(pool: Executor, workers: int) -> None:
    in_flight = InFlight()
    with Batcher[int, Any](where, Size(1), executor=pool, max_workers=workers, listeners=[in_flight]) as batcher:
        assert 50 == len([batcher.submit(number) for number in range(50)])
    assert workers == in_flight.most


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("not me")


@pytest.mark.parametrize(
    "job, text",
    [
        (threading.Lock(), "of type lock, can't be sent to another process: cannot pickle '_thread.lock' object"),
        (lambda: 0, "of type function, can't be sent to another process: Can't"),
        (Unpicklable(), "of type Unpicklable, can't be sent to another process: not me"),
    ],
)
def test_an_unpicklable_job_is_named_in_the_error_of_its_batch_and_later_batches_run(
    pool: Executor, job: Any, text: str
) -> None:
    with Batcher[Any, Any](where, Size(3), executor=pool) as batcher:
        failed = [batcher.submit(each) for each in ("a", job, "b")]
        later = [batcher.submit(each) for each in "cde"]
    for future in failed:
        with pytest.raises(pickle.PicklingError, match=f"^job 2 of 3 in the batch, {text}"):
            future.result()
    assert ["c", "d", "e"] == [future.result().value[0] for future in later]


def test_an_unpicklable_processor_is_named_in_the_error(pool: Executor) -> None:
    with Batcher[str, Any](lambda jobs: jobs, executor=pool) as batcher:
        with pytest.raises(pickle.PicklingError, match="^the processor <function .*<lambda> at .* can't be sent"):
            batcher.submit("a").result()


def complain(jobs: list[Any]) -> Any:
    raise TypeError("cannot pickle '_thread.RLock' object")


def test_a_similar_error_from_the_processor_is_not_mistaken_for_a_pickling_error(pool: Executor) -> None:
    with Batcher[Any, Any](complain, Size(1), executor=pool) as batcher:
        assert isinstance(batcher.submit("a").exception(), TypeError)
    with ThreadPoolExecutor(1) as threads, Batcher[Any, Any](complain, Size(1), executor=threads) as batcher:
        assert isinstance(batcher.submit(threading.RLock()).exception(), TypeError)


class Refusing(ProcessPoolExecutor):
    """Pickles in `submit`, as Dask does, and raises its own error, whose chain of causes is circular."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        try:
            pickle.dumps((fn, args))
        except Exception as error:
            error.__cause__ = RuntimeError()
            error.__cause__.__cause__ = error
            raise RuntimeError("not like that") from error
        return super().submit(fn, *args, **kwargs)


def test_an_unpicklable_job_is_named_even_if_the_executor_raises_its_own_error_in_submit() -> None:
    batcher = Batcher[Any, Any](where, Size(1), executor=Refusing(1))
    with pytest.raises(pickle.PicklingError, match="^job 1 of 1 in the batch, of type lock,"):
        batcher.submit(threading.Lock()).result()
    batcher.shutdown()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class ExitingWhenPickled:
    def __reduce__(self) -> Any:
        sys.exit("pickled")


@pytest.mark.parametrize("error, job", [(Unprintable(), "a"), (RuntimeError("full"), ExitingWhenPickled())])
def test_an_error_is_left_unchanged_if_it_may_not_be_a_pickling_error(error: Exception, job: Any) -> None:
    class Failing(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            raise error

    with Batcher[Any, Any](where, executor=Failing()) as batcher:
        assert isinstance(batcher.submit(job).exception(), type(error))


def die(jobs: list[str]) -> list[str]:
    if "bad" in jobs:
        os.kill(os.getpid(), signal.SIGKILL)
    return jobs


def test_with_a_reusable_pool_later_batches_run_after_a_process_was_killed() -> None:
    def run_elsewhere(jobs: list[str]) -> Any:
        return get_reusable_executor(max_workers=2).submit(die, jobs).result()

    with Batcher(run_elsewhere, Size(2), max_workers=2) as batcher:
        for future in [batcher.submit(job) for job in ("a", "bad")]:
            assert isinstance(future.exception(), BrokenExecutor)
        assert ["c", "d"] == [result.value for result in batcher.map(["c", "d"])]
    get_reusable_executor().shutdown()
