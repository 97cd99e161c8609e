"""`Batcher.map`: order, buffer, timeouts and errors."""

import concurrent.futures
import itertools
import threading
from typing import Any

import pytest

from microbatch import Batcher, Interval, JobResult, Size
from microbatch.testing import RecordingProcessor


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


def values(results: Any) -> list[Any]:
    return [result.value for result in results]


def test_map_yields_results_in_the_order_of_the_jobs() -> None:
    with Batcher(echo, Size(7), max_workers=3) as batcher:
        assert list(range(100)) == values(batcher.map(range(100)))


def test_map_yields_job_results() -> None:
    with Batcher(echo) as batcher:
        assert isinstance(next(batcher.map("a")), JobResult)


@pytest.mark.parametrize("policy", [Size(10), Size(10) & Interval(3600), Interval(3600)])
@pytest.mark.parametrize("buffersize", [1, 3, None])
def test_map_never_waits_for_more_jobs_than_it_has_submitted(policy: Any, buffersize: Any) -> None:
    with Batcher(echo, policy) as batcher:
        assert list(range(25)) == values(batcher.map(range(25), buffersize=buffersize, timeout=20))


def test_map_reads_ahead_by_at_most_the_buffersize() -> None:
    taken: list[int] = []

    def endless() -> Any:
        for number in itertools.count():
            taken.append(number)
            yield number

    with Batcher(echo, Size(2)) as batcher:
        results: Any = batcher.map(endless(), buffersize=5)
        assert [] == taken
        assert [0, 1, 2] == [next(results).value for _ in range(3)]
        assert len(taken) <= 8
        results.close()


def test_map_works_with_a_max_pending_below_its_buffersize() -> None:
    with Batcher(echo, Size(3), max_pending=4) as batcher:
        assert list(range(50)) == values(batcher.map(range(50), timeout=20))


def test_map_raises_the_exception_of_a_failed_job_in_its_place() -> None:
    with Batcher(RecordingProcessor[int](lambda job: KeyError(job) if job == 2 else job), Size(2)) as batcher:
        results = batcher.map(range(5))
        assert [0, 1] == [next(results).value, next(results).value]
        with pytest.raises(KeyError):
            next(results)


def test_the_timeout_of_map_is_counted_from_the_call() -> None:
    processor = RecordingProcessor[int]()
    processor.hold()
    with Batcher(processor) as batcher:
        with pytest.raises(concurrent.futures.TimeoutError):
            list(batcher.map([1], timeout=0))
        processor.release()


def test_closing_map_early_cancels_the_jobs_that_no_worker_has_taken() -> None:
    go_on = threading.Event()

    def block_at_five(job: int) -> int:
        assert job < 5 or go_on.wait(10)
        return job

    with Batcher(RecordingProcessor[int](block_at_five), Size(1)) as batcher:
        results: Any = batcher.map(range(100), buffersize=10)
        assert [0, 1, 2, 3, 4] == values(itertools.islice(results, 5))
        results.close()
        go_on.set()
    stats = batcher.stats()
    assert stats.cancelled >= 8 and stats.accepted == stats.cancelled + stats.succeeded


def test_map_raises_the_exception_of_its_iterable() -> None:
    def broken() -> Any:
        yield 1
        raise LookupError

    with Batcher(echo) as batcher, pytest.raises(LookupError):
        list(batcher.map(broken()))


@pytest.mark.parametrize("timeout", [1e18, 1e308, float("inf")])
def test_map_accepts_huge_timeouts(timeout: float) -> None:
    with Batcher(echo) as batcher:
        assert [1] == values(batcher.map([1], timeout=timeout))


def test_map_raises_in_the_threads_of_the_batcher() -> None:
    refused: list[str] = []

    def processor(jobs: list[Any]) -> list[Any]:
        try:
            list(batcher.map(jobs))
        except RuntimeError as error:
            refused.append(str(error))
        try:
            list(prepared)
        except RuntimeError as error:
            refused.append(str(error))
        return jobs

    with Batcher(processor) as batcher:
        prepared = batcher.map([1])
        batcher.submit(1).result(timeout=10)
    assert 2 == len(refused) and all("a thread of the batcher can't wait" in text for text in refused)


def test_map_flushes_once_for_all_jobs_in_its_buffer() -> None:
    wanted = threading.Semaphore(0)
    flushes: list[bool] = []

    class Counting(Batcher[int, int]):
        def flush(self, wait: bool = True, *, timeout: Any = None) -> bool:
            flushes.append(wait)
            return super().flush(wait, timeout=timeout)

    def when_wanted(jobs: list[int]) -> list[int]:
        assert wanted.acquire(timeout=10)
        return jobs

    with Counting(when_wanted, Size(10), key=lambda job: job) as batcher:
        results = batcher.map(range(100), buffersize=10)
        for number in range(100):
            wanted.release(1 if number % 10 else 2)  # the newest job may be dispatched first
            assert number == next(results).value
    assert 1 <= len(flushes) <= 11
