"""`microbatch.aio`: coroutines that submit jobs, and processors that are coroutine functions."""

import asyncio
import concurrent.futures
import contextvars
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest
from tenacity import stop_after_attempt, wait_none

from microbatch import (
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatchFinished,
    BatchListener,
    ForkedError,
    Interval,
    JobDropped,
    JobExpired,
    JobResult,
    JobState,
    Natural,
    Size,
    aio,
    batched,
)
from microbatch._engine import bounds
from microbatch.aio import amap, on_loop, submit
from microbatch.processors import bisecting, retrying
from microbatch.testing import ManualClock, RecordingProcessor
from tests.threads import in_thread


def run(main: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(main, timeout=20)

    return asyncio.run(limited())


async def settle() -> None:
    """Let all coroutines run until each of them waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True, params=["asyncio", "debug", "uvloop"])
def kind_of_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with the loop of the standard library, with its debug mode, and with another implementation."""
    if request.param == "debug":
        monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    elif request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        for module in (asyncio, asyncio.events):
            monkeypatch.setattr(module, "new_event_loop", uvloop.new_event_loop)
    return str(request.param)


@pytest.fixture
def advance(kind_of_loop: str) -> Callable[[float], None]:
    """Return a function that moves the clock of the running loop forward."""
    if kind_of_loop == "uvloop":
        pytest.skip("the clock of this loop can't be moved")

    def move(seconds: float) -> None:
        loop: Any = asyncio.get_running_loop()
        time = loop.time
        loop.time = lambda: time() + seconds

    return move


@pytest.fixture
def processor() -> Iterator[RecordingProcessor[Any]]:
    """A processor that is held."""
    made = RecordingProcessor[Any]()
    made.hold()
    yield made
    made.release()


class TestSubmit:
    def test_coroutines_share_a_batch_and_each_gets_its_own_result(self) -> None:
        async def main() -> Any:
            return await asyncio.gather(*[submit(batcher, number) for number in range(3)])

        with Batcher[Any, Any](lambda jobs: [-job for job in jobs], Size(3)) as batcher:
            results = run(main())
        assert [0, -1, -2] == [result.value for result in results]
        assert {3} == {result.batch.size for result in results}

    def test_the_exception_of_the_job_is_raised(self) -> None:
        error = LookupError("bad")
        with Batcher[Any, Any](lambda jobs: [error]) as batcher, pytest.raises(LookupError) as raised:
            run(submit(batcher, 1))
        assert error is raised.value

    def test_the_coroutine_gets_an_error_and_is_not_cancelled_if_its_job_is_cancelled(self) -> None:
        async def main() -> None:
            task = asyncio.create_task(submit(batcher, 1))
            await settle()
            batcher.shutdown(wait=False, cancel_futures=True)
            with pytest.raises(concurrent.futures.CancelledError):
                await task
            assert not task.cancelled()

        with Batcher[Any, Any](list, Interval(60)) as batcher:
            run(main())

    @pytest.mark.parametrize("policy, state", [(Interval(60), JobState.CANCELLED), (Natural(), JobState.SUCCEEDED)])
    def test_a_cancelled_coroutine_cancels_its_job_unless_it_runs(
        self, processor: RecordingProcessor[Any], policy: Any, state: JobState
    ) -> None:
        async def main() -> None:
            task = asyncio.create_task(submit(batcher, 1))
            await settle()
            if state is JobState.SUCCEEDED:
                processor.wait_for_batches(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        with Batcher[Any, Any](processor, policy) as batcher:
            run(main())
            processor.release()
        stats = batcher.stats()
        assert (stats.cancelled, stats.succeeded) == ((1, 0) if state is JobState.CANCELLED else (0, 1))

    def test_a_job_expires(self) -> None:
        clock = ManualClock()

        async def main() -> None:
            task = asyncio.create_task(submit(batcher, 1, expires_in=5))
            await settle()
            clock.advance(5)
            with pytest.raises(JobExpired):
                await task

        with Batcher[Any, Any](list, Interval(60), clock=clock) as batcher:
            run(main())

    def test_loops_in_several_threads_may_use_one_batcher(self) -> None:
        with Batcher[Any, Any](list, Size(4)) as batcher:
            loops = [in_thread(lambda: run(submit(batcher, "job"))) for _ in range(4)]
            assert ["job"] * 4 == [loop.result(timeout=10).value for loop in loops]

    def test_a_loop_that_has_ended_can_be_collected(self) -> None:
        async def main() -> Any:
            await submit(batcher, 1)
            return weakref.ref(asyncio.get_running_loop())

        with Batcher[Any, Any](list, Size(1)) as batcher:
            loop = run(main())
        gc.collect()
        assert loop() is None

    def test_each_coroutine_is_woken_if_a_signal_handler_raises_while_one_is(self) -> None:
        async def main() -> None:
            tasks = [asyncio.create_task(submit(batcher, number)) for number in range(2)]
            await settle()
            interrupt_next_wake(asyncio.get_running_loop(), "call_soon_threadsafe")
            with suppress(Interrupted):
                await asyncio.to_thread(batcher.shutdown, wait=False, cancel_futures=True)
            await asyncio.wait(tasks)
            assert isinstance(tasks[0].exception(), concurrent.futures.CancelledError)

        with Batcher[Any, Any](list, Interval(60)) as batcher:
            run(main())

    @pytest.mark.parametrize("timeout", [-1, "1", float("nan")])
    def test_a_wrong_timeout_is_refused(self, timeout: Any) -> None:
        with Batcher[Any, Any](list) as batcher, pytest.raises((TypeError, ValueError)):
            run(submit(batcher, 1, timeout=timeout))

    def test_a_coroutine_outside_of_asyncio_submits_nothing(self) -> None:
        with Batcher[Any, Any](list) as batcher, pytest.raises(RuntimeError, match="no running event loop"):
            submit(batcher, 1).send(None)
        assert 0 == batcher.stats().accepted

    def test_what_is_no_batcher_is_refused(self) -> None:
        @batched()
        def process(jobs: list[int]) -> list[int]:
            return jobs

        async def main() -> None:
            await anext(amap(not_a_batcher, [1]))

        not_a_batcher: Any = process
        for call in (submit(not_a_batcher, 1), main()):
            with pytest.raises(TypeError, match="decorated with @batched, pass its attribute 'batcher'"):
                run(call)
        assert 1 == run(submit(process.batcher, 1)).value
        process.shutdown()

    @pytest.mark.parametrize("waits", [False, True])
    def test_a_listener_gets_the_context_of_the_task(self, processor: RecordingProcessor[Any], waits: bool) -> None:
        class Listener(BatchListener):
            wants_context = True

            def batch_finished(self, event: BatchFinished) -> None:
                for future in event.futures:
                    assert future.context is not None
                    found.append(future.context.get(variable))

        async def main() -> None:
            async def call(number: int) -> None:
                variable.set(number)
                await submit(batcher, number)

            tasks = [asyncio.create_task(call(number)) for number in range(5)]
            await settle()
            processor.release()
            await asyncio.gather(*tasks)

        variable, found = contextvars.ContextVar[int]("variable"), list[Any]()
        with Batcher[Any, Any](processor, Size(1), max_pending=1 if waits else 10, listeners=[Listener()]) as batcher:
            run(main())
        assert [0, 1, 2, 3, 4] == found

    def test_awaiting_a_job_future_says_what_to_write_instead(self) -> None:
        async def main() -> None:
            await batcher.submit(1)

        with (
            Batcher[Any, Any](list) as batcher,
            pytest.raises(TypeError, match=r"write `await microbatch.aio.submit\(batcher, job"),
        ):
            run(main())


LIMITS = [
    pytest.param({"max_pending": 1}, id="max_pending"),
    pytest.param({"max_pending_weight": 1, "weigh": lambda job: 1}, id="max_pending_weight"),
    pytest.param({"max_pending_per_key": 1, "key": lambda job: 0}, id="max_pending_per_key"),
]


@pytest.mark.parametrize("limit", LIMITS)
class TestWaitingForSpace:
    """One job runs, another one fills the queue, and later ones have to wait."""

    def full(self, processor: RecordingProcessor[Any], limit: Any, **options: Any) -> "Batcher[Any, Any]":
        batcher = Batcher[Any, Any](processor, Size(1), **limit, **options)
        for job in ("running", "waiting"):
            batcher.submit(job).add_done_callback(lambda _: None)  # so that a failure is not logged
            processor.wait_for_batches(1)
        return batcher

    def test_the_loop_is_not_blocked_and_each_job_gets_in(self, processor: RecordingProcessor[Any], limit: Any) -> None:
        async def main() -> None:
            tasks = [asyncio.create_task(submit(batcher, number)) for number in range(5)]
            await settle()
            assert not any([task.done() for task in tasks])
            processor.release()
            assert [0, 1, 2, 3, 4] == [result.value for result in await asyncio.gather(*tasks)]

        with self.full(processor, limit) as batcher:
            run(main())
        assert [["running"], ["waiting"], [0], [1], [2], [3], [4]] == processor.batches

    def test_a_later_coroutine_of_the_loop_does_not_overtake_one_that_waits(
        self, processor: RecordingProcessor[Any], limit: Any
    ) -> None:
        async def main() -> None:
            first = asyncio.create_task(submit(batcher, "first"))
            await settle()
            processor.release()  # there is space for the first one, but it cannot run before the second one comes
            while batcher.stats().succeeded < 2:
                pass
            await submit(batcher, "second")
            await first

        with self.full(processor, limit) as batcher:
            run(main())
        assert [["running"], ["waiting"], ["first"], ["second"]] == processor.batches

    def test_coroutines_and_threads_wait_in_the_same_line(self, processor: RecordingProcessor[Any], limit: Any) -> None:
        async def main() -> None:
            callers: list[Any] = []
            for number in range(6):
                if number % 2:
                    thread = in_thread(partial(batcher.submit, number))
                    callers.append(asyncio.wrap_future(thread))
                else:
                    callers.append(asyncio.create_task(submit(batcher, number)))
                while len(in_line(batcher)) <= number:
                    await asyncio.sleep(0)
            processor.release()
            await asyncio.gather(*callers)

        with self.full(processor, limit) as batcher:
            run(main())
        assert sorted(processor.batches[2:]) == [[number] for number in range(6)]
        if "max_pending_weight" in limit:
            assert [[number] for number in range(6)] == processor.batches[2:]

    def test_the_timeout_runs_out(
        self, processor: RecordingProcessor[Any], limit: Any, advance: Callable[[float], None]
    ) -> None:
        async def main() -> None:
            for timeout in (0, 10):
                task = asyncio.create_task(submit(batcher, "late", timeout=timeout))
                await settle()
                advance(timeout)
                with pytest.raises(BacklogFull) as raised:
                    await task
                assert [raised.value.bound] == [name for name in limit if name.startswith("max")]
            assert [] == in_line(batcher)

        with self.full(processor, limit) as batcher:
            run(main())
            processor.release()
        assert [["running"], ["waiting"]] == processor.batches

    def test_the_next_one_gets_in_if_a_coroutine_is_cancelled(
        self, processor: RecordingProcessor[Any], limit: Any
    ) -> None:
        async def main() -> Any:
            first, second = [asyncio.create_task(submit(batcher, name)) for name in ("first", "second")]
            await settle()
            processor.release()  # the first one is notified, but cannot run before it is cancelled
            while batcher.stats().succeeded < 2:
                pass
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            return await second

        with self.full(processor, limit) as batcher:
            assert "second" == run(main()).value
        assert [["running"], ["waiting"], ["second"]] == processor.batches

    def test_a_thread_gets_in_if_the_loop_of_a_coroutine_before_it_was_closed(
        self, processor: RecordingProcessor[Any], limit: Any
    ) -> None:
        with self.full(processor, limit) as batcher:
            loop = asyncio.new_event_loop()
            task = loop.create_task(submit(batcher, "lost"))
            loop.run_until_complete(settle())
            loop.close()
            thread = in_thread(lambda: batcher.submit("job").result(timeout=10))
            while len(in_line(batcher)) < 2:
                pass
            processor.release()
            assert "job" == thread.result(timeout=10).value
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task
        gc.collect()
        assert [["running"], ["waiting"], ["job"]] == processor.batches

    @pytest.mark.parametrize("steps", range(1, 8))
    def test_a_cancellation_that_comes_when_the_wait_is_over_takes_effect(
        self, processor: RecordingProcessor[Any], limit: Any, steps: int
    ) -> None:
        async def main() -> None:
            task = asyncio.create_task(submit(batcher, "job", timeout=20))
            await settle()
            processor.release()
            while batcher.stats().succeeded < 2:
                pass
            for _ in range(steps):
                await asyncio.sleep(0)
            if task.cancel():
                await asyncio.wait({task})
                assert task.cancelled()

        with self.full(processor, limit) as batcher:
            run(main())

    def test_the_coroutine_gets_in_if_a_signal_handler_raises_while_it_is_woken(
        self, processor: RecordingProcessor[Any], limit: Any
    ) -> None:
        async def main() -> Any:
            task = asyncio.create_task(submit(batcher, "job"))
            await settle()
            interrupt_next_wake(asyncio.get_running_loop(), "call_soon_threadsafe")
            processor.release()
            return await task

        with self.full(processor, limit) as batcher:
            assert "job" == run(main()).value

    def test_a_blocking_submit_in_the_thread_of_the_loop_does_not_wait_for_the_coroutine_before_it(
        self, processor: RecordingProcessor[Any], limit: Any
    ) -> None:
        clock = ManualClock()

        def release() -> None:
            clock.wait_for_sleeper(10)
            processor.release()

        async def main() -> None:
            task = asyncio.create_task(submit(batcher, "job"))
            await settle()
            releasing = in_thread(release)
            batcher.submit("blocking", timeout=10)
            assert "job" == (await task).value
            releasing.result(timeout=10)

        with self.full(processor, limit, clock=clock) as batcher:
            run(main())
        assert [["running"], ["waiting"], ["blocking"], ["job"]] == processor.batches

    def test_a_thread_gets_in_if_the_loop_of_a_coroutine_before_it_was_stopped(
        self, processor: RecordingProcessor[Any], limit: Any
    ) -> None:
        clock = ManualClock()
        with self.full(processor, limit, clock=clock) as batcher, stopped(submit(batcher, "first")) as finish:
            thread = in_thread(lambda: batcher.submit("job", timeout=10).result(timeout=10))
            clock.wait_for_sleeper(10)
            processor.release()
            if "max_pending_weight" in limit:
                clock.wait_for_sleeper(1)
                clock.advance(1)
            assert "job" == thread.result(timeout=10).value
            assert "first" == finish().value
        assert [["running"], ["waiting"], ["job"], ["first"]] == processor.batches

    def test_a_coroutine_gets_in_if_the_loop_of_another_one_before_it_was_stopped(
        self, processor: RecordingProcessor[Any], limit: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def main() -> Any:
            task = asyncio.create_task(submit(batcher, "job"))
            await settle()
            processor.release()
            return await task

        monkeypatch.setattr(bounds, "_TURN", 0)
        with self.full(processor, limit) as batcher, stopped(submit(batcher, "first")) as finish:
            assert "job" == run(main()).value
            assert "first" == finish().value
        assert [["running"], ["waiting"], ["job"], ["first"]] == processor.batches

    def test_a_submit_that_does_not_wait_gets_in_after_the_turn_of_a_loop_that_was_stopped(
        self, processor: RecordingProcessor[Any], limit: Any
    ) -> None:
        clock = ManualClock()
        with self.full(processor, limit, clock=clock) as batcher, stopped(submit(batcher, "first")) as finish:
            processor.release()
            assert batcher.flush(timeout=10)
            if "max_pending_weight" in limit:
                with pytest.raises(BacklogFull):
                    in_thread(lambda: batcher.submit("early", timeout=0)).result(timeout=10)
                clock.advance(1)
            future = in_thread(lambda: batcher.submit("job", timeout=0)).result(timeout=10)
            assert "job" == future.result(timeout=10).value
            assert "first" == finish().value

    def test_many_coroutines_take_one_place_in_the_line(self, processor: RecordingProcessor[Any], limit: Any) -> None:
        async def main() -> None:
            tasks = [asyncio.create_task(submit(batcher, number)) for number in range(100)]
            await settle()
            assert 1 == len(in_line(batcher))
            processor.release()
            await asyncio.gather(*tasks)
            assert [] == in_line(batcher)

        with self.full(processor, limit) as batcher:
            run(main())
        assert [[number] for number in range(100)] == processor.batches[2:]

    def test_a_shutdown_ends_the_wait(self, processor: RecordingProcessor[Any], limit: Any) -> None:
        async def main() -> None:
            task = asyncio.create_task(submit(batcher, "late"))
            await settle()
            batcher.shutdown(wait=False)
            with pytest.raises(BatcherClosed):
                await task

        with self.full(processor, limit) as batcher:
            run(main())
            processor.release()
        assert [["running"], ["waiting"]] == processor.batches

    def test_the_space_of_a_coroutine_that_left_is_free_again(
        self, processor: RecordingProcessor[Any], limit: Any, advance: Callable[[float], None]
    ) -> None:
        async def main() -> None:
            for _ in range(3):
                task = asyncio.create_task(asyncio.wait_for(submit(batcher, "left"), timeout=5))
                await settle()
                advance(5)
                with pytest.raises(asyncio.TimeoutError):
                    await task
            processor.release()
            assert "job" == (await submit(batcher, "job")).value

        with self.full(processor, limit) as batcher:
            run(main())
            assert batcher.flush(timeout=10)


class Interrupted(BaseException):
    """What the signal handler raises in these tests, because `asyncio` treats `KeyboardInterrupt` specially."""


def interrupt_next_wake(target: Any, name: str) -> None:
    """Raise an exception in the next thread that wakes a coroutine through a method, just before it does."""
    wake = getattr(target, name)

    def interrupted(*call: Any, **named: Any) -> Any:
        setattr(target, name, wake)
        raise Interrupted

    setattr(target, name, interrupted)


@contextmanager
def stopped(main: Coroutine[Any, Any, Any]) -> Iterator[Callable[[], Any]]:
    """Run a coroutine until it waits, and stop its loop. Return a function that runs the rest of the coroutine."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(main)
    loop.run_until_complete(settle())
    yield lambda: loop.run_until_complete(asyncio.wait_for(task, timeout=10))
    loop.close()


def in_line(batcher: Batcher[Any, Any]) -> list[Any]:
    return [waiter for bound in batcher._engine.queue.crowded.copy() for waiter in list(bound.line)]


def test_a_job_waits_in_one_line_after_the_other(processor: RecordingProcessor[Any]) -> None:
    async def main() -> Any:
        tasks = [asyncio.create_task(submit(batcher, number)) for number in (1, 2, 1, 3, 2, 1)]
        await settle()
        processor.release()
        return sorted([result.value for result in await asyncio.gather(*tasks)])

    with Batcher[Any, Any](
        processor, Size(1), key=bool, weigh=float, max_pending=2, max_pending_weight=3, max_pending_per_key=2
    ) as batcher:
        batcher.submit(1)
        assert [1, 1, 1, 2, 2, 3] == run(main())


def test_a_coroutine_that_waits_for_space_keeps_no_space_of_another_limit(processor: RecordingProcessor[Any]) -> None:
    with Batcher[Any, Any](processor, Size(1), key=str, max_pending=1, max_pending_per_key=1) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        batcher.submit("waiting")
        with stopped(submit(batcher, "job")) as finish:  # there is space for its key, but the queue is full
            processor.release()
            assert "job" == batcher.submit("job", timeout=10).result(timeout=10).value
            assert "job" == finish().value


def test_a_coroutine_in_line_is_woken_only_when_there_is_space(processor: RecordingProcessor[Any]) -> None:
    async def main() -> None:
        task = asyncio.create_task(submit(batcher, "late"))
        await settle()
        loop: Any = asyncio.get_running_loop()
        schedule, calls = loop.call_soon_threadsafe, list[Any]()

        def counted(*call: Any, **named: Any) -> Any:
            calls.append(call)
            return schedule(*call, **named)

        loop.call_soon_threadsafe = counted
        for _ in range(10):
            with pytest.raises(BacklogFull):
                batcher.submit("refused", timeout=0)
        await settle()
        woken = len(calls)
        processor.release()
        await task
        assert woken <= 1  # a refused caller passes its turn on once

    with Batcher[Any, Any](processor, Size(1), max_pending=1) as batcher:
        batcher.submit("running")
        processor.wait_for_batches(1)
        batcher.submit("waiting")
        run(main())


class TestMap:
    def test_the_results_come_in_the_order_of_the_jobs(self) -> None:
        async def main() -> Any:
            return [result.value async for result in amap(batcher, range(10), buffersize=3)]

        with Batcher[Any, Any](lambda jobs: [-job for job in jobs], Interval(60)) as batcher:
            assert [-number for number in range(10)] == run(main())

    def test_jobs_may_come_from_an_asynchronous_iterator_that_never_ends(self) -> None:
        taken: list[int] = []

        async def jobs() -> AsyncIterator[int]:
            while True:
                taken.append(len(taken))
                yield taken[-1]

        async def main() -> Any:
            async with aclosing(amap(batcher, jobs(), buffersize=4)) as results:
                return [(await anext(results)).value for _ in range(3)]

        with Batcher[Any, Any](list, Interval(60)) as batcher:
            assert [0, 1, 2] == run(main())
        assert len(taken) <= 8
        stats = batcher.stats()
        assert len(taken) - 1 <= stats.accepted == stats.succeeded + stats.cancelled

    def test_a_failure_ends_it_and_cancels_what_is_left(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> Any:
            return [result.value async for result in amap(batcher, [1, 2, "bad", 4, 5], buffersize=5)]

        def process(jobs: list[Any]) -> list[int]:
            return [job + 1 for job in jobs]

        with Batcher[Any, Any](process, Size(1)) as batcher, pytest.raises(TypeError):
            run(main())
        del batcher
        gc.collect()
        assert [] == caplog.records

    def test_other_coroutines_run_even_if_nothing_has_to_wait(self) -> None:
        async def main() -> int:
            turns = 0

            async def tick() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            ticking = asyncio.create_task(tick())
            results = amap(batcher, range(1000))
            await anext(results)
            ticking.cancel()
            await results.aclose()
            return turns

        with Batcher[Any, Any](list, Interval(60)) as batcher:
            assert run(main()) > 50

    def test_it_waits_for_space(self) -> None:
        async def main() -> Any:
            return [result.value async for result in amap(batcher, range(50))]

        with Batcher[Any, Any](list, Size(5) | Interval(60), max_pending=5) as batcher:
            assert list(range(50)) == run(main())

    @pytest.mark.parametrize("arguments", [(5,), (None,)])
    def test_what_is_not_iterable_is_refused(self, arguments: Any) -> None:
        async def main() -> None:
            await anext(amap(batcher, *arguments))

        with Batcher[Any, Any](list) as batcher, pytest.raises(TypeError, match="jobs must be an iterable"):
            run(main())


async def doubled(jobs: list[int]) -> list[int]:
    await asyncio.sleep(0)
    return [2 * job for job in jobs]


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


WAITS = [
    pytest.param(lambda batcher: batcher.shutdown(), id="shutdown"),
    pytest.param(lambda batcher: batcher.flush(), id="flush"),
    pytest.param(lambda batcher: batcher.submit(1).result(), id="result"),
    pytest.param(lambda batcher: list(batcher.map([1])), id="map"),
    pytest.param(lambda batcher: concurrent.futures.wait([batcher.submit(1)]), id="wait"),
]


class TestOnLoop:
    def test_a_coroutine_function_can_process_batches(self) -> None:
        with Batcher[Any, Any](on_loop(doubled)) as batcher:
            assert 4 == batcher.submit(2).result(timeout=10).value

    def test_all_calls_share_one_loop_whose_thread_ends_with_the_last_batcher(self) -> None:
        loops = []

        async def process(jobs: list[Any]) -> list[Any]:
            loops.append(asyncio.get_running_loop())
            return jobs

        processor = on_loop(process)
        with Batcher[Any, Any](processor, Size(1), max_workers=2) as outer:
            with Batcher[Any, Any](processor, Size(1)) as inner:
                for batcher in (outer, inner, outer):
                    batcher.submit(1).result(timeout=10)
            assert "microbatch-loop" in thread_names()
            outer.submit(2).result(timeout=10)
        assert "microbatch-loop" not in thread_names()
        assert 1 == len(set(loops)) and loops[0].is_closed()

    def test_calls_run_at_the_same_time_if_there_are_several_workers(self) -> None:
        async def process(jobs: list[int]) -> list[int]:
            arrived.append(1)
            while len(arrived) < 3:
                await asyncio.sleep(0)
            return jobs

        arrived: list[int] = []
        with Batcher[Any, Any](on_loop(process), Size(1), max_workers=3) as batcher:
            futures = [batcher.submit(number) for number in range(3)]
            assert [0, 1, 2] == [future.result(timeout=10).value for future in futures]

    def test_what_a_call_left_running_is_cancelled_at_the_end_of_the_shutdown(self) -> None:
        left = []

        async def endless() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        async def process(jobs: list[Any]) -> list[Any]:
            left.append(asyncio.create_task(endless()))
            await asyncio.sleep(0)
            return jobs

        ended: list[bool] = []
        with Batcher[Any, Any](on_loop(process)) as batcher:
            batcher.submit(1).result(timeout=10)
            assert [] == ended
        assert [True] == ended

    def test_its_exception_fails_the_batch_and_other_wrappers_may_be_around_it(self) -> None:
        calls = []

        async def process(jobs: list[int]) -> list[int]:
            calls.append(jobs)
            if len(calls) == 1:
                raise ConnectionError
            if 13 in jobs:
                raise ValueError
            return jobs

        processor = retrying(bisecting(on_loop(process)), stop=stop_after_attempt(2), wait=wait_none())
        with Batcher[Any, Any](processor, Size(2)) as batcher:
            good, bad = batcher.submit(1), batcher.submit(13)
            assert 1 == good.result(timeout=10).value
            assert isinstance(bad.exception(timeout=10), ValueError)
        assert "microbatch-loop" not in thread_names()

    def test_without_a_batcher_each_call_has_a_loop_of_its_own(self) -> None:
        processor = on_loop(doubled)
        assert [2, 4] == processor([1, 2])
        assert "microbatch-loop" not in thread_names()
        assert [6] == pickle.loads(pickle.dumps(processor))([3])

    def test_pickling_it_with_a_loop_says_what_to_do(self) -> None:
        loop = asyncio.new_event_loop()
        with pytest.raises(TypeError, match="its event loop can't leave the process: call on_loop without a loop"):
            pickle.dumps(on_loop(doubled, loop))
        loop.close()

    def test_a_thread_of_the_loop_can_start_while_another_batcher_is_shut_down(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(thread: threading.Thread) -> None:
            """Start a thread, but let a finalizer run first, which shuts down the other batcher."""
            if thread.name == "microbatch-loop" and not ended:
                ended.append(None)
                ended[:] = [other.shutdown(timeout=10)]
            start(thread)

        start, ended, processor = threading.Thread.start, list[Any](), on_loop(doubled)
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with Batcher[Any, Any](processor, Size(1)) as batcher, Batcher[Any, Any](processor, Interval(60)) as other:
            waiting = other.submit(1)
            assert 4 == batcher.submit(2).result(timeout=30).value
            assert 2 == waiting.result(timeout=0).value
        assert [True] == ended
        assert "microbatch-loop" not in thread_names()

    def test_a_task_that_ignores_its_cancellation_delays_the_shutdown_only_until_the_timeout_and_is_logged(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ends: Any = None

        async def stubborn() -> None:
            while not ends.is_set():
                with suppress(asyncio.CancelledError):
                    await ends.wait()

        async def process(jobs: list[Any]) -> list[Any]:
            nonlocal ends
            ends = asyncio.Event()
            left.append(asyncio.create_task(stubborn(), name="stubborn"))
            loops.append(asyncio.get_running_loop())
            await settle()
            return jobs

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                messages.put(record.getMessage())

        monkeypatch.setattr(aio, "_PATIENCE", 0)
        messages, clock, left, loops = SimpleQueue[str](), ManualClock(), list[Any](), list[Any]()
        logger, handler = logging.getLogger("microbatch"), Handler()
        logger.addHandler(handler)
        try:
            batcher = Batcher[Any, Any](on_loop(process), Size(1), clock=clock)
            batcher.submit(1).result(timeout=10)
            shutdown = in_thread(lambda: batcher.shutdown(timeout=5))
            message = messages.get(timeout=10)
            assert message.startswith("the shutdown waits for tasks that") and "name='stubborn'" in message
            clock.wait_for_sleeper(5)
            clock.advance(5)
            assert not shutdown.result(timeout=10)
            loops[0].call_soon_threadsafe(ends.set)
            assert batcher.shutdown()
        finally:
            logger.removeHandler(handler)
        assert "microbatch-loop" not in thread_names()

    def test_a_function_that_returns_no_awaitable_fails_the_batch(self) -> None:
        with Batcher[Any, Any](on_loop(list)) as batcher:  # type: ignore[arg-type]
            error = batcher.submit(1).exception(timeout=10)
        assert isinstance(error, TypeError) and "must return an awaitable" in str(error)
        with pytest.raises(TypeError, match="must be callable"):
            on_loop(5)  # type: ignore[arg-type]

    @pytest.mark.parametrize("loop", [5, asyncio.new_event_loop])
    def test_what_is_no_loop_is_refused(self, loop: Any) -> None:
        with pytest.raises(TypeError, match="loop must be an event loop"):
            on_loop(doubled, loop)

    def test_system_exit_fails_only_its_own_batch(self) -> None:
        async def process(jobs: list[Any]) -> list[Any]:
            if jobs == ["beside"]:
                await exited.wait()
            if jobs == ["exit"]:
                exited.set()
                raise SystemExit
            return jobs

        exited = asyncio.Event()
        with Batcher[Any, Any](on_loop(process), Size(1), max_workers=2) as batcher:
            beside, bad, later = [batcher.submit(job) for job in ("beside", "exit", "later")]
            assert isinstance(bad.exception(timeout=10), SystemExit)
            assert ["beside", "later"] == [future.result(timeout=10).value for future in (beside, later)]

    def test_there_is_a_new_loop_if_a_call_has_stopped_it(self) -> None:
        async def process(jobs: list[Any]) -> list[Any]:
            if jobs == ["stop"]:
                asyncio.get_running_loop().stop()
                await asyncio.Event().wait()
            return jobs

        with Batcher[Any, Any](on_loop(process), Size(1)) as batcher:
            assert isinstance(batcher.submit("stop").exception(timeout=10), RuntimeError)
            for thread in threading.enumerate():
                if thread.name == "microbatch-loop":
                    thread.join(10)
            assert "job" == batcher.submit("job").result(timeout=10).value

    def test_a_partial_may_be_around_it(self) -> None:
        async def process(jobs: list[Any], *, loops: list[Any]) -> list[Any]:
            loops.append(asyncio.get_running_loop())
            return jobs

        loops: list[Any] = []
        with Batcher[Any, Any](partial(on_loop(process), loops=loops), Size(1)) as batcher:
            for _ in range(2):
                batcher.submit(1).result(timeout=10)
        assert loops[0] is loops[1]

    def test_a_batcher_that_never_started_does_not_keep_the_thread_alive(self) -> None:
        processor = on_loop(doubled)
        Batcher[Any, Any](processor)
        with Batcher[Any, Any](processor) as batcher:
            batcher.submit(1).result(timeout=10)
        assert "microbatch-loop" not in thread_names()

    def test_jobs_that_wait_when_the_interpreter_exits_are_processed(self) -> None:
        script = """if True:
            from microbatch import Batcher, Interval
            from microbatch.aio import on_loop

            async def show(jobs):
                print(jobs)

            batcher = Batcher(on_loop(show), Interval(60))
            batcher.submit(1)
        """
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
        assert ("[1]\n", "") == (done.stdout, done.stderr)

    @pytest.mark.parametrize("executor", ["None", "ThreadPoolExecutor(1)"])
    def test_a_loop_that_does_not_run_does_not_keep_the_interpreter_from_exiting(self, executor: str) -> None:
        script = f"""if True:
            import asyncio
            import threading
            from concurrent.futures import ThreadPoolExecutor
            from microbatch import Batcher, Size
            from microbatch.aio import on_loop

            async def process(jobs):
                return jobs

            loop, called = asyncio.new_event_loop(), threading.Event()
            schedule = loop.call_soon_threadsafe
            loop.call_soon_threadsafe = lambda *call, **named: (schedule(*call, **named), called.set())
            batcher = Batcher(on_loop(process, loop), Size(1), executor={executor})
            for _ in range(2):
                batcher.submit(1).add_done_callback(lambda future: print(f"{{future.exception()}}\\n", end=""))
            called.wait(10)
            print(batcher.shutdown(timeout=0))
        """
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        error = "the interpreter is exiting, and the event loop of on_loop does not run"
        assert ["False", error, error] == done.stdout.splitlines()

    def test_the_error_for_an_async_processor_names_it(self) -> None:
        with pytest.raises(TypeError, match="wrap it in microbatch.aio.on_loop"):
            Batcher(doubled)  # type: ignore[arg-type]

    def test_it_can_run_on_the_loop_of_the_program(self) -> None:
        async def main() -> Any:
            async def process(jobs: list[Any]) -> list[Any]:
                assert loop is asyncio.get_running_loop()
                return jobs

            loop = asyncio.get_running_loop()
            batcher = Batcher[Any, Any](on_loop(process, loop))
            results = await asyncio.gather(*[submit(batcher, number) for number in range(3)])
            await asyncio.to_thread(batcher.shutdown)
            return [result.value for result in results]

        assert [0, 1, 2] == run(main())

    @pytest.mark.parametrize("wait", WAITS)
    def test_a_call_in_the_processor_raises_instead_of_waiting_for_ever(self, wait: Callable[[Any], Any]) -> None:
        async def process(jobs: list[Any]) -> list[Any]:
            if jobs == ["job"]:
                with pytest.raises(RuntimeError, match="can't wait for|call this with asyncio.to_thread"):
                    wait(batcher)
                with pytest.raises(RuntimeError, match="can't wait for"):
                    await submit(batcher, "another")
            return jobs

        with Batcher[Any, Any](on_loop(process), Size(1)) as batcher:
            assert "job" == batcher.submit("job").result(timeout=10).value

    @pytest.mark.parametrize("wait", WAITS)
    def test_a_call_in_the_thread_of_that_loop_raises_instead_of_waiting_for_ever(
        self, wait: Callable[[Any], Any]
    ) -> None:
        async def main() -> None:
            batcher = Batcher[Any, Any](on_loop(doubled, asyncio.get_running_loop()))
            with pytest.raises(RuntimeError, match="can't wait for|call this with asyncio.to_thread"):
                wait(batcher)
            await asyncio.to_thread(batcher.shutdown)

        run(main())

    def test_a_with_statement_in_the_thread_of_that_loop_shuts_down_and_raises(self) -> None:
        async def main() -> Any:
            with pytest.raises(RuntimeError, match="call this with asyncio.to_thread"):
                with Batcher[Any, Any](on_loop(doubled, asyncio.get_running_loop())) as batcher:
                    future = batcher.submit(1)
            with pytest.raises(BatcherClosed):
                batcher.submit(2)
            return await asyncio.wrap_future(future)

        assert 2 == run(main()).value

    def test_the_end_of_one_batcher_does_not_cancel_calls_of_another_that_starts_meanwhile(self) -> None:
        async def process(jobs: list[Any]) -> list[Any]:
            await settle()
            return jobs

        async def main() -> Any:
            def start_another(*call: Any, **named: Any) -> Any:
                if call[0] is aio._cancel_all:
                    started.append(second.submit("job"))
                    assert called.wait(10)
                handle = schedule(*call, **named)
                called.set()
                return handle

            loop: Any = asyncio.get_running_loop()
            schedule, started, called = loop.call_soon_threadsafe, list[Any](), threading.Event()
            processor = on_loop(process, loop)
            first, second = [Batcher[Any, Any](processor, Size(1)) for _ in range(2)]
            await submit(first, 1)
            loop.call_soon_threadsafe = start_another
            await asyncio.to_thread(first.shutdown)
            loop.call_soon_threadsafe = schedule
            result = await asyncio.wrap_future(started[0])
            await asyncio.to_thread(second.shutdown)
            return result

        assert "job" == run(main()).value

    def test_its_batches_fail_when_that_loop_ends(self) -> None:
        async def endless(jobs: list[Any]) -> list[Any]:
            running.set()
            await asyncio.Event().wait()
            return jobs

        async def main() -> Any:
            batcher = Batcher[Any, Any](on_loop(endless, asyncio.get_running_loop()), Size(1))
            first, second = batcher.submit(1), batcher.submit(2)
            await running.wait()
            return batcher, first, second

        running = asyncio.Event()
        batcher, *futures = run(main())
        for future in futures:
            assert isinstance(future.exception(timeout=10), RuntimeError)
        batcher.shutdown()

    @pytest.mark.parametrize("started", [False, True])
    def test_its_batches_fail_if_that_loop_is_closed_while_they_wait(self, started: bool) -> None:
        async def endless(jobs: list[Any]) -> list[Any]:
            running.set()
            await asyncio.Event().wait()
            return jobs

        loop: Any = asyncio.new_event_loop()
        running = asyncio.Event()
        called = threading.Event()
        schedule = loop.call_soon_threadsafe

        def call_soon_threadsafe(*call: Any, **named: Any) -> Any:
            handle = schedule(*call, **named)
            called.set()
            return handle

        loop.call_soon_threadsafe = call_soon_threadsafe
        with Batcher[Any, Any](on_loop(endless, loop)) as batcher:
            future = batcher.submit(1)
            assert called.wait(10)
            if started:
                loop.run_until_complete(running.wait())
                for task in asyncio.all_tasks(loop):
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    del task
            loop.close()
            del running
            loop = None
            gc.collect()
            assert isinstance(future.exception(timeout=10), RuntimeError)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_a_forked_child_cannot_use_a_loop_of_its_parent(self) -> None:
        async def main() -> int:
            batcher = Batcher[Any, Any](on_loop(doubled, asyncio.get_running_loop()), Size(1))
            await submit(batcher, 1)
            child = os.fork()
            if not child:
                future = in_thread(lambda: batcher.submit(2).exception(timeout=10))
                os._exit(0 if isinstance(future.result(timeout=10), ForkedError) else 1)
            await asyncio.to_thread(batcher.shutdown)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        assert 0 == run(main())

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_a_forked_child_starts_a_loop_of_its_own(self) -> None:
        with Batcher[Any, Any](on_loop(doubled), Size(1)) as batcher:
            batcher.submit(1).result(timeout=10)
            child = os.fork()
            if not child:
                right = batcher.submit(4).result(timeout=10).value == 8 and batcher.shutdown(timeout=10)
                os._exit(0 if right and "microbatch-loop" not in thread_names() else 1)
            assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_batcher_that_drops_jobs_makes_no_coroutine_wait_even_if_others_of_its_loop_wait(
    processor: RecordingProcessor[Any],
) -> None:
    async def main() -> None:
        blocked = asyncio.create_task(submit(full, "blocked"))
        await settle()
        tasks = [asyncio.create_task(submit(dropping, number)) for number in range(3)]
        await settle()
        assert 2 == dropping.stats().dropped
        processor.release()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [JobDropped, JobDropped, JobResult] == list(map(type, outcomes))
        await blocked

    with Batcher(processor, Size(1), max_pending=1) as full:
        full.submit("running")
        processor.wait_for_batches(1)
        full.submit("waiting")
        with Batcher(processor, Size(1), max_pending=1, drop_oldest=True) as dropping:
            dropping.submit("running too")
            processor.wait_for_batches(2)
            run(main())
            processor.release()
        processor.release()


def test_an_error_of_a_signal_handler_is_not_taken_for_that_of_a_closed_loop() -> None:
    def time_out(*call: Any) -> Any:
        raise RuntimeError("out of time")

    loop: Any = asyncio.new_event_loop()
    schedule, loop.call_soon_threadsafe = loop.call_soon_threadsafe, time_out
    with pytest.raises(RuntimeError, match="out of time"):
        aio._call_soon(loop, print)
    loop.call_soon_threadsafe = schedule
    loop.close()
    assert not aio._call_soon(loop, print)
