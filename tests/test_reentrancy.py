"""The batcher is used where it may interrupt itself: in signal handlers, finalizers and logging handlers."""

import _thread
import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from microbatch import Batcher, BatcherClosed, Interval, JobFuture, JobState, Size
from microbatch._engine.engine import Engine
from microbatch.testing import ManualClock
from tests.threads import FailingStart, in_thread


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


@pytest.fixture
def collect_and_switch_often() -> Iterator[None]:
    """Collect garbage at nearly every allocation, and switch threads at nearly every step."""
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.freeze()  # exempts older objects, or each collection would be slow
    gc.set_threshold(1)
    sys.setswitchinterval(1e-6)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    sys.setswitchinterval(interval)


class Cycle:
    """A reference cycle that uses the batcher when it is garbage-collected."""

    def __init__(self, use: Any) -> None:
        self.itself = self
        self.use = use

    def __del__(self) -> None:
        self.use()


def test_a_finalizer_that_interrupts_the_batcher_may_use_it(collect_and_switch_often: None) -> None:
    accepted: list[JobFuture[Any]] = []

    def use() -> None:
        try:
            accepted.append(batcher.submit("from a finalizer", timeout=0))
        except BatcherClosed:  # the last of the garbage is collected later
            return
        accepted[-1].cancel() if len(accepted) % 3 == 0 else batcher.flush(wait=False)
        batcher.stats()

    def garbage(jobs: list[Any]) -> list[Any]:
        for job in jobs:
            if isinstance(job, int):
                Cycle(use)
        return jobs

    with Batcher(garbage, Size(5) | Interval(0), max_pending=0) as batcher:
        for number in range(300):
            accepted.append(batcher.submit(number))
            Cycle(use)
            if number % 5 == 0:
                accepted[-1].cancel()
        gc.collect()
        assert batcher.flush(timeout=20)
        gc.set_threshold(0)
    stats = batcher.stats()
    assert all(future.done() for future in accepted)
    assert len(accepted) == stats.accepted == stats.succeeded + stats.cancelled
    assert stats.cancelled == sum(future.state is JobState.CANCELLED for future in accepted)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_a_signal_handler_that_interrupts_the_batcher_may_use_it() -> None:
    accepted: list[JobFuture[Any]] = []

    def handle(number: int, frame: Any) -> None:
        accepted.append(batcher.submit("from a handler"))
        accepted[-1].cancel() if len(accepted) % 3 == 0 else batcher.flush(wait=False)
        batcher.stats()
        signal.setitimer(signal.ITIMER_REAL, 0.0001)  # the next signal arrives when this handler has returned

    before = signal.signal(signal.SIGALRM, handle)
    try:
        with Batcher(echo, Size(5) | Interval(0), max_pending=0) as batcher:
            accepted.append(batcher.submit("first"))
            signal.setitimer(signal.ITIMER_REAL, 0.0001)
            jobs = [batcher.submit(number) for number in range(5000)]
            for future in jobs[::5]:
                future.cancel()
            signal.signal(signal.SIGALRM, lambda number, frame: None)  # for a signal that is still pending
            assert batcher.flush(timeout=20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(accepted) > 1 and all(future.done() for future in [*accepted, *jobs])
    stats = batcher.stats()
    assert len(accepted) + len(jobs) == stats.accepted == stats.succeeded + stats.cancelled


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_the_statistics_are_correct_after_an_exception_from_a_signal_handler() -> None:
    class Interrupted(BaseException):
        pass

    def handle(number: int, frame: Any) -> None:
        raise Interrupted

    interrupted = 0
    accepted: list[JobFuture[Any]] = []
    before = signal.signal(signal.SIGALRM, handle)
    gc.disable()  # an exception that the handler raises inside a callback of the collector would be lost
    try:
        with Batcher(echo, Size(5) | Interval(0), max_pending=0) as batcher:
            batcher.submit(0).result()
            for _ in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0001)
                    for _ in range(100):
                        future = batcher.submit(1)
                        accepted.append(future)
                        batcher.submit(2).cancel()
                        batcher.flush(wait=False)
                        batcher.stats()
                except Interrupted:
                    interrupted += 1
            signal.signal(signal.SIGALRM, lambda number, frame: None)  # for a signal that is still pending
            assert batcher.flush(timeout=20)
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    stats = batcher.stats()
    assert interrupted > 100 and all(future.done() for future in accepted)
    assert stats.accepted == stats.succeeded + stats.cancelled >= len(accepted)


def test_a_logging_handler_may_submit_from_inside_the_processor() -> None:
    lines: list[str] = []
    logger = logging.getLogger("tests.shipping")

    class Shipping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            batcher.submit(record.getMessage())

    def ship(messages: list[str]) -> None:
        lines.extend(messages)
        if "first" in messages:
            logger.warning("second")

    handler = Shipping()
    logger.addHandler(handler)
    try:
        with Batcher(ship) as batcher:
            logger.warning("first")
            while len(lines) < 2:
                batcher.flush()
    finally:
        logger.removeHandler(handler)
    assert ["first", "second"] == lines


def test_another_submit_may_interrupt_the_first_submit(collect_and_switch_often: None) -> None:
    accepted: list[JobFuture[Any]] = []
    errors: list[Exception] = []

    def use() -> None:
        try:
            accepted.append(batcher.submit("from a finalizer"))
        except BatcherClosed:  # another thread was still collecting garbage when the batcher was shut down
            pass
        except Exception as error:  # Python would only print it
            errors.append(error)

    for _ in range(30):
        with Batcher(echo) as batcher:
            for _ in range(3):
                Cycle(use)
            assert "job" == batcher.submit("job", timeout=10).result(timeout=10).value
            gc.collect()
    assert [] == errors
    assert {"from a finalizer"} == {future.result(timeout=10).value for future in accepted}


def submit_interrupted(batcher: Batcher[Any, Any], call: Callable[[], object]) -> None:
    """Submit a job, and make a call when the first thread was started, like the handler of a signal that arrives there."""

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if event == "return" and frame.f_code is Engine.start.__code__:
            sys.settrace(None)
            call()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        batcher.submit("interrupted")
    finally:
        sys.settrace(before)


def raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def test_a_first_submit_interrupted_by_a_signal_can_be_repeated() -> None:
    batcher = Batcher(echo)
    with pytest.raises(KeyboardInterrupt):
        submit_interrupted(batcher, raise_keyboard_interrupt)
    assert "job" == batcher.submit("job").result(timeout=10).value
    assert batcher.shutdown(timeout=10)
    assert 1 == batcher.stats().accepted


def test_a_job_whose_submit_is_interrupted_by_a_shutdown_is_refused() -> None:
    class Interrupted(ManualClock):
        """Calls a handler, like a signal would, when `submit` reads the clock."""

        def now(self) -> float:
            if handlers and threading.current_thread() is threading.main_thread():
                handlers.pop()()
            return super().now()

    handlers: list[Any] = []
    batcher = Batcher(echo, clock=Interrupted())
    batcher.submit("early").result(timeout=10)
    handlers.append(batcher.shutdown)
    with pytest.raises(BatcherClosed):
        batcher.submit("late")
    assert 1 == batcher.stats().accepted == batcher.stats().succeeded


def test_a_shutdown_that_waits_may_interrupt_the_first_submit() -> None:
    batcher, ended = Batcher(echo), list[bool]()
    with pytest.raises(BatcherClosed):
        submit_interrupted(batcher, lambda: ended.append(batcher.shutdown(timeout=10)))
    assert ([True], 0) == (ended, batcher.stats().accepted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slow", "slow_0"])
def test_jobs_accepted_before_a_thread_failed_to_start_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(echo, name="slow")
    stuck = FailingStart(name, monkeypatch)
    futures = [batcher.submit("first")]
    assert stuck.reached.wait(10)
    futures.append(batcher.submit("second"))
    stuck.go_on.set()
    assert ["can't start new thread"] * 2 == [str(future.exception(timeout=10)) for future in futures]
    assert batcher.shutdown(timeout=10)
    assert 2 == batcher.stats().accepted == batcher.stats().failed


def test_if_the_first_thread_can_not_be_started_the_submit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", fail)
    with Batcher(echo) as batcher:
        with pytest.raises(RuntimeError, match="can't start"):
            batcher.submit("refused")
        assert "job" == batcher.submit("job").result(timeout=10).value
    assert 1 == batcher.stats().accepted


@pytest.mark.slow
def test_a_job_accepted_just_after_a_thread_failed_to_start_starts_the_threads_again(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    batcher = Batcher(echo, Size(1), name="slow", max_pending=1, clock=clock)
    stuck = FailingStart("slow_0", monkeypatch)
    first = batcher.submit("first")
    assert stuck.reached.wait(10)
    second = in_thread(lambda: batcher.submit("second", timeout=60))
    clock.wait_for_sleeper(60)  # it waits until the failure empties the queue
    stuck.go_on.set()
    assert "can't start new thread" == str(first.exception(timeout=10))
    assert "second" == second.result(timeout=10).result(timeout=10).value
    assert batcher.shutdown(timeout=10)


def test_a_dropped_batcher_whose_first_submit_was_interrupted_by_a_signal_processes_its_jobs() -> None:
    batcher = Batcher(echo, Size(9))
    with pytest.raises(KeyboardInterrupt):
        submit_interrupted(batcher, raise_keyboard_interrupt)
    future = batcher.submit("job")
    with pytest.warns(ResourceWarning, match="never shut down"):
        del batcher
        gc.collect()
    assert "job" == future.result(timeout=10).value


def test_a_shutdown_interrupted_by_a_signal_between_its_callbacks_does_not_block_the_next_one() -> None:
    def interrupt(frame: Any, event: str, argument: Any) -> Any:
        if event == "return" and frame.f_code.co_name == "_run_shutdown_callback":
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    batcher = Batcher(echo)
    batcher.add_shutdown_callback(lambda: None)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            batcher.shutdown()
    finally:
        sys.settrace(before)
    assert batcher.shutdown(timeout=10)


@pytest.mark.slow
def test_a_finalizer_may_submit_a_job_while_the_first_submit_starts_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    finalized: list[JobFuture[Any]] = []
    start = threading.Thread.start

    def finalizing(thread: threading.Thread) -> None:
        monkeypatch.undo()
        finalized.append(in_thread(lambda: batcher.submit("from a finalizer")).result(timeout=10))
        start(thread)

    with Batcher(echo) as batcher:
        monkeypatch.setattr(threading.Thread, "start", finalizing)
        future = batcher.submit("job")
        assert "job" == future.result(timeout=10).value
        assert ["from a finalizer"] == [each.result(timeout=10).value for each in finalized]
