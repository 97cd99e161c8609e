"""Batches processed by other processes: only the processor and a list of jobs travel."""

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
        pool.submit(os.getpid).result()  # so that its threads run before a test begins
        yield pool


def where(jobs: list[Any]) -> list[Any]:
    return [(job, os.getpid(), len(jobs)) for job in jobs]


class InFlight(BatchListener):
    """Knows how many batches were in flight at most."""

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


def test_each_caller_has_the_result_of_its_own_job_from_another_process(pool: Executor) -> None:
    with Batcher[int, Any](where, Size(10), executor=pool, max_workers=3) as batcher:
        results = [result.value for result in batcher.map(range(100))]
    assert list(range(100)) == [job for job, _, _ in results]
    assert {10} == {size for _, _, size in results}
    assert os.getpid() not in {process for _, process, _ in results}


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_batches_are_on_the_way_than_there_are_workers(pool: Executor, workers: int) -> None:
    in_flight = InFlight()
    with Batcher[int, Any](where, Size(1), executor=pool, max_workers=workers, listeners=[in_flight]) as batcher:
        assert 50 == len([batcher.submit(number) for number in range(50)])
    assert workers == in_flight.most


class Stubborn:
    def __reduce__(self) -> Any:
        raise ValueError("not me")


@pytest.mark.parametrize(
    "job, text",
    [
        (threading.Lock(), "of type lock, can't be sent to another process: cannot pickle '_thread.lock' object"),
        (lambda: 0, "of type function, can't be sent to another process: Can't"),
        (Stubborn(), "of type Stubborn, can't be sent to another process: not me"),
    ],
)
def test_a_job_that_can_not_be_sent_is_named_to_all_of_its_batch_and_later_ones_run(
    pool: Executor, job: Any, text: str
) -> None:
    with Batcher[Any, Any](where, Size(3), executor=pool) as batcher:
        failed = [batcher.submit(each) for each in ("a", job, "b")]
        later = [batcher.submit(each) for each in "cde"]
    for future in failed:
        with pytest.raises(pickle.PicklingError, match=f"^job 2 of 3 in the batch, {text}"):
            future.result()
    assert ["c", "d", "e"] == [future.result().value[0] for future in later]


def test_a_processor_that_can_not_be_sent_is_named(pool: Executor) -> None:
    with Batcher[str, Any](lambda jobs: jobs, executor=pool) as batcher:
        with pytest.raises(pickle.PicklingError, match="^the processor <function .*<lambda> at .* can't be sent"):
            batcher.submit("a").result()


def complain(jobs: list[Any]) -> Any:
    raise TypeError("cannot pickle '_thread.RLock' object")


def test_what_the_processor_itself_raises_is_not_mistaken_for_that(pool: Executor) -> None:
    with Batcher[Any, Any](complain, Size(1), executor=pool) as batcher:
        assert isinstance(batcher.submit("a").exception(), TypeError)
    with ThreadPoolExecutor(1) as threads, Batcher[Any, Any](complain, Size(1), executor=threads) as batcher:
        assert isinstance(batcher.submit(threading.RLock()).exception(), TypeError)


class Refusing(ProcessPoolExecutor):
    """Pickles at once, as Dask does, and tells of that in its own words, to no end."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        try:
            pickle.dumps((fn, args))
        except Exception as error:
            error.__cause__ = RuntimeError()
            error.__cause__.__cause__ = error
            raise RuntimeError("not like that") from error
        return super().submit(fn, *args, **kwargs)


def test_an_executor_may_refuse_it_at_once_and_in_its_own_words() -> None:
    batcher = Batcher[Any, Any](where, Size(1), executor=Refusing(1))
    with pytest.raises(pickle.PicklingError, match="^job 1 of 1 in the batch, of type lock,"):
        batcher.submit(threading.Lock()).result()
    batcher.shutdown()


class Silent(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Leaving:
    def __reduce__(self) -> Any:
        sys.exit("pickled")


@pytest.mark.parametrize("error, job", [(Silent(), "a"), (RuntimeError("full"), Leaving())])
def test_an_error_of_which_can_not_be_told_whether_it_is_that_is_left_as_it_is(error: Exception, job: Any) -> None:
    class Failing(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            raise error

    with Batcher[Any, Any](where, executor=Failing()) as batcher:
        assert isinstance(batcher.submit(job).exception(), type(error))


def die(jobs: list[str]) -> list[str]:
    if "bad" in jobs:
        os.kill(os.getpid(), signal.SIGKILL)
    return jobs


def test_with_a_pool_that_is_made_anew_later_batches_run_after_a_process_was_killed() -> None:
    def elsewhere(jobs: list[str]) -> Any:
        return get_reusable_executor(max_workers=2).submit(die, jobs).result()

    with Batcher(elsewhere, Size(2), max_workers=2) as batcher:
        for future in [batcher.submit(job) for job in ("a", "bad")]:
            assert isinstance(future.exception(), BrokenExecutor)
        assert ["c", "d"] == [result.value for result in batcher.map(["c", "d"])]
    get_reusable_executor().shutdown()
