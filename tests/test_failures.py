"""Each row of the table in docs/failures.rst: what happened, what each caller sees, and what ran twice."""

import concurrent.futures
import multiprocessing
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pybreaker import CircuitBreaker, CircuitBreakerError
from tenacity import retry, stop_after_attempt, wait_none

from microbatch import (
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatchListener,
    JobDropped,
    JobExpired,
    JobTooLarge,
    ResultCountError,
    Size,
    Weight,
)
from microbatch.processors import bisecting, deduplicating, retrying, within
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor
from tests import test_exit, test_fork

PAGE = (Path(__file__).parent.parent / "docs" / "failures.rst").read_text(encoding="utf-8")


def test_each_row_of_the_table_has_a_test_in_the_same_order() -> None:
    border = re.search(r"^(=+)  =+  =+$", PAGE, re.MULTILINE)
    assert border is not None
    rows = [line[: len(border[1])].strip() for line in PAGE.split(border[0])[2].splitlines()]
    tests = [name for name in globals() if name.startswith("test_") and callable(globals()[name])]
    assert tests[1:] == ["test_" + row.lower().replace("`", "").replace(" ", "_") for row in rows if row]


def seen(futures: "Iterable[Future[Any]]") -> list[Any]:
    """Return what each caller sees: the value, or the type of the exception."""
    outcomes: list[Any] = []
    for future in futures:
        try:
            outcomes.append(future.result(timeout=10).value)
        except BaseException as error:
            outcomes.append(type(error))
    return outcomes


def run(processor: Callable[[list[str]], Any], jobs: str = "abc", **options: Any) -> list[Any]:
    """Process *jobs* as one batch, and return what each caller sees."""
    with Batcher[str, Any](processor, Size(len(jobs)), **options) as batcher:
        return seen([batcher.submit(job) for job in jobs])


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


def fail(job: Any) -> Any:
    raise LookupError(job)


# -- a job is refused --


def test_the_queue_is_full(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(1), max_pending=1) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        batcher.submit("waiting")
        with pytest.raises(BacklogFull):
            batcher.submit("refused", timeout=0)
        processor.release()
    assert [["running"], ["waiting"]] == processor.batches


def test_a_job_is_too_large() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Weight(3), weigh=len) as batcher:
        batcher.submit("abc")
        with pytest.raises(JobTooLarge):
            batcher.submit("abcd")
    assert [["abc"]] == processor.batches


@pytest.mark.parametrize("function", ["key", "weigh"])
def test_key_or_weigh_raises(function: str) -> None:
    processor = RecordingProcessor[Any]()
    options: Any = {function: fail}
    with Batcher(processor, **options) as batcher:
        with pytest.raises(LookupError):
            batcher.submit(1)
    assert [] == processor.batches


def test_the_batcher_is_shut_down() -> None:
    batcher = Batcher(echo)
    batcher.shutdown()
    with pytest.raises(BatcherClosed):
        batcher.submit(1)


# -- a job waits --


def test_a_job_expires(clock: ManualClock) -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Size(9), clock=clock) as batcher:
        futures = [batcher.submit("doomed", expires_in=5), batcher.submit("other")]
        clock.wait_for_sleeper(5.0)
        clock.advance(5)
        assert [JobExpired] == seen(futures[:1])
    assert ([JobExpired, "other"], [["other"]]) == (seen(futures), processor.batches)


def test_a_job_is_dropped() -> None:
    processor = RecordingProcessor[str]()
    processor.hold()
    with Batcher(processor, Size(1), max_pending=1, drop_oldest=True) as batcher:
        futures = [batcher.submit("running")]
        processor.wait_for_batches(1)
        futures += [batcher.submit("old"), batcher.submit("new")]
        assert [JobDropped] == seen(futures[1:2])
        processor.release()
    assert (["running", JobDropped, "new"], [["running"], ["new"]]) == (seen(futures), processor.batches)


def test_a_job_is_cancelled_in_time() -> None:
    processor = RecordingProcessor[str]()
    with Batcher(processor, Size(9)) as batcher:
        futures = [batcher.submit("unwanted"), batcher.submit("other")]
        assert futures[0].cancel()
    assert ([CancelledError, "other"], [["other"]]) == (seen(futures), processor.batches)


def test_a_job_is_cancelled_too_late(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(1)) as batcher:
        future = batcher.submit("running")
        processor.wait_for_batches(1)
        assert not future.cancel()
        processor.release()
    assert ["running"] == seen([future])


def test_the_policy_raises() -> None:
    class Raising(Size):
        def due(self, window: Any) -> float:
            return super().due(window) if "bad" not in window.jobs else fail("bad")

    processor = RecordingProcessor[str]()
    with Batcher(processor, Raising(2)) as batcher:
        bad = batcher.submit("bad")
        assert [LookupError] == seen([bad])
        assert ["a", "b"] == seen([batcher.submit("a"), batcher.submit("b")])
    assert [["a", "b"]] == processor.batches


# -- a job is processed --


def test_one_result_is_an_exception() -> None:
    assert ["a", LookupError, "c"] == run(lambda jobs: ["a", LookupError("b"), "c"])


def test_the_processor_raises() -> None:
    processor = RecordingProcessor(fail)
    assert [LookupError] * 3 == run(processor)
    assert [["a", "b", "c"]] == processor.batches


def test_a_generator_raises_midway() -> None:
    def processor(jobs: list[str]) -> Iterator[str]:
        yield "a"
        fail("b")

    assert ["a", LookupError, LookupError] == run(processor)


def test_a_generator_ends_early() -> None:
    assert ["a", ResultCountError, ResultCountError] == run(lambda jobs: iter("a"))


def test_a_list_has_the_wrong_length() -> None:
    assert [ResultCountError] * 3 == run(lambda jobs: jobs[:2])


def test_a_generator_yields_too_much(caplog: pytest.LogCaptureFixture) -> None:
    assert ["a", "b", "c"] == run(lambda jobs: iter("abcd"))
    assert "more than 3 results" in caplog.text


@pytest.mark.parametrize(
    "returned", ["abc", b"abc", dict.fromkeys("abc"), {*"abc"}, 3], ids=lambda each: type(each).__name__
)
def test_something_else_is_returned(returned: Any) -> None:
    assert [TypeError] * 3 == run(lambda jobs: returned)


def test_a_listener_or_a_callback_raises(caplog: pytest.LogCaptureFixture) -> None:
    class Raising(BatchListener):
        def batch_finished(self, event: Any) -> None:
            fail("from the listener")

    with Batcher(echo, Size(2), listeners=[Raising()]) as batcher:
        futures = [batcher.submit("a")]
        futures[0].add_done_callback(lambda future: fail("from the callback"))
        futures.append(batcher.submit("b"))
    assert ["a", "b"] == seen(futures)
    assert "from the listener" in caplog.text and "from the callback" in caplog.text


def test_a_caller_stops_waiting(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(1)) as batcher:
        future = batcher.submit("a")
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout=0)
        again = batcher.submit("a")
        processor.release()
    assert ["a", "a"] == seen([future, again])
    assert [["a"], ["a"]] == processor.batches


# -- the batcher, the interpreter or the process ends --


def test_a_shutdown_cancels(processor: RecordingProcessor[Any]) -> None:
    batcher = Batcher(processor, Size(1))
    futures = [batcher.submit("running")]
    processor.wait_for_batches(1)
    futures.append(batcher.submit("waiting"))
    batcher.shutdown(wait=False, cancel_futures=True)
    processor.release()
    batcher.shutdown()
    assert ["running", CancelledError] == seen(futures)
    assert [["running"]] == processor.batches


def test_a_shutdown_runs_out_of_time(processor: RecordingProcessor[Any]) -> None:
    batcher = Batcher(processor, Size(1))
    futures = [batcher.submit("running"), batcher.submit("waiting")]
    assert not batcher.shutdown(timeout=0)
    processor.release()
    assert batcher.shutdown()
    assert ["running", "waiting"] == seen(futures)
    assert [["running"], ["waiting"]] == processor.batches


def test_the_interpreter_exits() -> None:
    assert (0, "a b\n", "") == test_exit.run("b = Batcher(processor, Size(9)); b.submit('a'); b.submit('b')")


def test_the_exit_timeout_runs_out() -> None:
    script = """
    import logging
    logging.disable()
    b = Batcher(lambda jobs: threading.Event().wait(), Size(1), exit_timeout=0.1)
    for job in "ab":
        b.submit(job).add_done_callback(lambda future: print(type(future.exception()).__name__))
    """
    assert (0, "BatcherClosed\nBatcherClosed\n", "") == test_exit.run(script)


def test_the_process_is_killed() -> None:
    assert (9, "", "") == test_exit.run("b = Batcher(processor, Size(9)); b.submit('a'); os._exit(9)")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_process_forks() -> None:
    script = """
    batcher = Batcher(echo, Size(9))
    future = batcher.submit("a")
    in_child(lambda: print("child", type(future.exception(timeout=10)).__name__))
    batcher.shutdown()
    print("parent", future.result().value)
    """
    assert "child ForkedError\nparent a\n" == test_fork.run(script)


# -- an executor runs the batch --


def test_a_job_cannot_be_pickled() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        with Batcher[Any, Any](list, Size(2), executor=executor) as batcher:
            for future in [batcher.submit(job) for job in ("a", threading.Lock())]:
                with pytest.raises(pickle.PicklingError, match="^job 2 of 2 in the batch, of type lock,"):
                    future.result()


def test_the_executor_refuses_a_batch() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    assert [RuntimeError] * 3 == run(echo, executor=executor)


def die(jobs: list[str]) -> list[str]:
    if "bad" in jobs:
        os._exit(1)
    return jobs


@pytest.mark.slow
def test_a_process_of_the_executor_dies() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        with Batcher(die, Size(2), executor=executor) as batcher:
            for jobs in (["a", "bad"], ["b", "c"]):
                for future in [batcher.submit(job) for job in jobs]:
                    assert isinstance(future.exception(), BrokenExecutor)


def test_the_executor_runs_a_batch_again() -> None:
    class Forgetful(InlineExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
            fn(*args, **kwargs)  # the result is lost with its worker
            return super().submit(fn, *args, **kwargs)

    processor = RecordingProcessor[str]()
    assert ["a", "b", "c"] == run(processor, executor=Forgetful())
    assert [["a", "b", "c"], ["a", "b", "c"]] == processor.batches


# -- the processor is wrapped --


def retrying_once(processor: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
    return retrying(processor, stop=stop_after_attempt(2), wait=wait_none())


def test_some_jobs_fail_under_retrying() -> None:
    outcomes = iter(["a", LookupError("b"), LookupError("c"), "b", KeyError("c")])
    processor = RecordingProcessor[str](lambda job: next(outcomes))
    assert ["a", "b", KeyError] == run(retrying_once(processor))
    assert [["a", "b", "c"], ["b", "c"]] == processor.batches


def test_a_batch_fails_under_retrying() -> None:
    calls: list[list[str]] = []

    def processor(jobs: list[str]) -> Iterator[str]:
        calls.append(jobs)
        for job in jobs:
            yield job if job == "a" or len(calls) > 1 else fail(job)

    assert ["a", "b", "c"] == run(retrying_once(processor))
    assert [["a", "b", "c"], ["b", "c"]] == calls


def test_a_batch_fails_under_bisecting() -> None:
    done: list[str] = []

    def processor(jobs: list[str]) -> None:
        for job in jobs:
            done.append(job if job != "d" else fail(job))

    assert [None, None, None, LookupError] == run(bisecting(processor), "abcd")
    assert {"a": 2, "b": 2, "c": 3} == {job: done.count(job) for job in done}


def test_jobs_are_equal_under_deduplicating() -> None:
    processor = RecordingProcessor[str](str.upper)
    assert ["A", "B", "A"] == run(deduplicating(processor), "aba")
    assert [["a", "b"]] == processor.batches


def test_a_wrapped_generator_ends_early() -> None:
    wrappers: list[Any] = [retrying_once, bisecting, deduplicating, partial(within, context=nullcontext)]
    for wrap in wrappers:
        processor = RecordingProcessor[str]()
        assert [ResultCountError] * 3 == run(wrap(lambda jobs: iter(processor(jobs)[:2])))
        assert [["a", "b", "c"]] == processor.batches


def test_a_generator_raises_under_within() -> None:
    @contextmanager
    def transaction() -> Iterator[None]:
        before = list(done)
        try:
            yield
        except LookupError:
            done[:] = before
            raise

    def processor(jobs: list[str]) -> Iterator[None]:
        for job in jobs:
            done.append(job)
            yield fail(job) if job == "c" else None

    done: list[str] = []
    assert [LookupError] * 3 == run(within(processor, transaction))
    assert [] == done


def test_a_batch_is_retried_as_a_whole() -> None:
    outcomes = iter(["a", "b"])
    processor = RecordingProcessor[str](lambda job: next(outcomes, None) or fail(job))
    assert [LookupError] * 3 == run(retry(stop=stop_after_attempt(2), wait=wait_none(), reraise=True)(processor))
    assert [["a", "b", "c"], ["a", "b", "c"]] == processor.batches


def test_the_circuit_is_open() -> None:
    breaker, processor = CircuitBreaker(), RecordingProcessor[str]()
    breaker.open()
    assert [CircuitBreakerError] * 3 == run(breaker(processor))
    assert [] == processor.batches
