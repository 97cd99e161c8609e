"""Threads that fail to start, and interrupted shutdowns: no call waits for a thread that does not exist."""

import _thread
import concurrent.futures
import itertools
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from microbatch import Batcher, BatcherClosed, Size
from microbatch._engine import engine, process
from microbatch._engine.engine import Stage
from microbatch._engine.ledger import Ledger
from microbatch.policies import base
from microbatch.testing import ManualClock
from tests.threads import FailingStart, in_thread


@pytest.mark.parametrize("name", ["slow_0", "slow_1", "slow_2"])
def test_a_shutdown_returns_even_if_a_thread_fails_to_start(
    name: str, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    called: list[str] = []
    batcher = Batcher[str, str](list, max_workers=3, name="slow", clock=clock)
    batcher.add_shutdown_callback(lambda: called.append("callback"))
    with monkeypatch.context() as patch:
        submit = threading.Thread(target=lambda: errors.append(refusal(batcher)))
        shutdown = threading.Thread(target=lambda: ended.append(batcher.shutdown(timeout=50)))
        failing, errors, ended = FailingStart(name, patch), list[str](), list[bool]()
        submit.start()
        assert failing.reached.wait(10)
        shutdown.start()
        clock.wait_for_sleeper(50.0)
        failing.go_on.set()
        submit.join(10)
        shutdown.join(10)
    assert (["can't start new thread"], [True], ["callback"]) == (errors, ended, called)


def refusal(batcher: Batcher[str, Any]) -> str:
    """Return the message of the error with which a job fails."""
    error = batcher.submit("job").exception(timeout=10)
    assert type(error) is RuntimeError
    return str(error)


def threads_of(batcher: Batcher[str, Any]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(batcher.name)]


def test_a_shutdown_without_waiting_is_completed_by_the_thread_that_failed_to_start_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = threading.Event()
    batcher = Batcher[str, str](list, name="slow")
    batcher.add_shutdown_callback(called.set)
    with monkeypatch.context() as patch:
        failing = FailingStart("slow_0", patch)
        submit = threading.Thread(target=lambda: refusal(batcher))
        submit.start()
        assert failing.reached.wait(10)
        batcher.shutdown(wait=False)
        failing.go_on.set()
        submit.join(10)
    assert called.wait(10)
    assert batcher.shutdown(timeout=10)


class NoMemory(MemoryError):
    """The error of a wait. A finalizer says when it is gone."""


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="a thread starts in another way")
def test_a_start_whose_wait_fails_is_no_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    may_run = threading.Event()
    set_ident, wait = threading.Thread._set_ident, threading.Event.wait  # type: ignore[attr-defined]

    def no_memory() -> NoMemory:
        error = NoMemory()
        weakref.finalize(error, may_run.set)
        return error

    def fail_to_wait(event: threading.Event, timeout: float | None = None) -> bool:
        starting = list(threading._limbo)  # type: ignore[attr-defined]
        if any(event is thread._started and thread.name == "slow" for thread in starting):
            raise no_memory()
        return wait(event, timeout)

    def run_later(thread: threading.Thread) -> None:
        if thread.name == "slow":
            wait(may_run, 10)
        set_ident(thread)

    batcher = Batcher[str, str](list, name="slow")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", fail_to_wait)
        patch.setattr(threading.Thread, "_set_ident", run_later)
        future = batcher.submit("job")
        assert wait(may_run, 10)
    assert future.result(timeout=10).value == "job"
    assert batcher.shutdown(timeout=10)


@pytest.mark.parametrize("name", ["slow", "slow_0", "slow_1"])
def test_after_a_thread_failed_to_start_the_next_job_starts_all_threads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Batcher[str, str](list, max_workers=2, name="slow") as batcher:
        with monkeypatch.context() as patch:
            failing = FailingStart(name, patch)
            future = batcher.submit("job")
            failing.go_on.set()  # not before, because `submit` would start the threads again if it saw the failure
            assert "can't start new thread" == str(future.exception(timeout=10))
        for thread in threads_of(batcher):
            thread.join(timeout=10)
        assert "job" == batcher.submit("job").result(timeout=10).value
        assert ["slow", "slow_0", "slow_1"] == sorted(thread.name for thread in threads_of(batcher))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["slow", "slow_0"])
@pytest.mark.parametrize("restarts", [True, False], ids=["another job", "a shutdown"])
def test_a_job_of_a_failed_start_has_an_outcome_in_the_end_even_if_there_was_no_memory_to_fail_it(
    restarts: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, failed = [MemoryError(), MemoryError()], threading.Event()
    fail = Ledger.fail

    def fail_later(*arguments: Any) -> int:
        if not errors:
            return fail(*arguments)
        if len(errors) == 1:
            failed.set()
        raise errors.pop()

    batcher = Batcher[str, str](list, name="slow")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "fail", fail_later)
        failing = FailingStart(name, patch)
        future = batcher.submit("job")
        failing.go_on.set()
        assert failed.wait(10)
    if restarts:
        assert "next" == batcher.submit("next").result(timeout=10).value
    assert batcher.shutdown(timeout=10)
    assert (RuntimeError if restarts else BatcherClosed) is type(future.exception(timeout=0))
    assert 1 == batcher.stats().failed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["slow", "slow_0"])
def test_a_job_that_an_interrupted_failed_start_has_left_waiting_is_processed_and_counted_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, failed = [MemoryError()], threading.Event()

    def fail_once(*arguments: Any) -> Any:
        if errors:
            failed.set()
            raise errors.pop()
        return itertools.repeat(*arguments)

    batcher = Batcher[str, str](list, name="slow")
    with monkeypatch.context() as patch:
        patch.setattr("microbatch._engine.ledger.repeat", fail_once)  # called in the middle of `Ledger.claim`
        failing = FailingStart(name, patch)
        first = batcher.submit("first")
        failing.go_on.set()
        assert failed.wait(10)
        assert "second" == batcher.submit("second").result(timeout=10).value
    assert "first" == first.result(timeout=10).value
    assert batcher.shutdown(timeout=10)
    assert (2, 2) == (batcher.stats().accepted, batcher.stats().succeeded)


def test_a_caller_gets_the_room_of_a_job_that_was_cancelled_before_a_start_failed(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    with Batcher[str, str](list, Size(1), max_pending=1, name="slow", clock=clock) as batcher:
        failing = FailingStart("slow", monkeypatch)
        first = batcher.submit("first")
        assert failing.reached.wait(10)
        second = in_thread(lambda: batcher.submit("second", timeout=50).result(timeout=10).value)
        clock.wait_for_sleeper(50.0)
        assert first.cancel()
        failing.go_on.set()
        assert "second" == second.result(timeout=10)


def test_a_job_fails_if_no_thread_can_be_created_and_the_next_job_starts_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    with Batcher[str, str](list) as batcher:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "__init__", fail)
            assert MemoryError is type(batcher.submit("job").exception(timeout=10))
        assert "next" == batcher.submit("next").result(timeout=10).value


def test_a_start_that_fails_late_fails_no_job_of_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def pause(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "_give_up_start":
            reached.set()
            go_on.wait(10)

    with Batcher[str, str](list, Size(2), name="slow") as batcher:
        failing = FailingStart("slow_0", monkeypatch)
        threading.settrace(pause)
        futures = [batcher.submit("first")]
        assert failing.reached.wait(10)
        threading.settrace(None)
        failing.go_on.set()
        assert reached.wait(10)
        futures.append(batcher.submit("second"))
        assert ["first", "second"] == [future.result(timeout=10).value for future in futures]
        third = batcher.submit("third")
        go_on.set()
        batcher.flush()
        assert "third" == third.result(timeout=10).value


def test_the_jobs_of_a_failed_start_do_not_count_for_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher[str, str](list, Size(3), name="slow") as batcher:
        with monkeypatch.context() as patch:
            failing = FailingStart("slow_0", patch)
            failed = [batcher.submit(job) for job in ("a", "b")]
            assert failing.reached.wait(10)
            failing.go_on.set()
            assert [RuntimeError] * 2 == [type(future.exception(timeout=10)) for future in failed]
        results = [batcher.submit(job) for job in ("c", "d", "e")]
        assert [3] * 3 == [future.result(timeout=10).batch.size for future in results]
    stats = batcher.stats()
    assert (5, 2, 3) == (stats.accepted, stats.failed, stats.succeeded)


def test_wait_returns_for_a_job_that_was_cancelled_during_a_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher[str, str](list, name="slow") as batcher:
        failing = FailingStart("slow", monkeypatch)
        future = batcher.submit("job")
        assert failing.reached.wait(10)
        waiting = in_thread(lambda: concurrent.futures.wait([future], timeout=10))
        while not future._waiters:
            pass
        assert future.cancel()
        failing.go_on.set()
        assert {future} == waiting.result(timeout=20).done


def test_a_submit_returns_the_future_of_an_accepted_job_even_if_its_own_start_of_the_threads_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start that the submit relied on has failed, and so does its own, but a third one succeeds."""

    def interleave(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "put":
            failing.go_on.set()
            assert type(first.exception(timeout=10)) is RuntimeError
            while batcher._newest_engine.is_claimed:
                pass
            monkeypatch.setattr(_thread, "start_new_thread", fail)
        if frame.f_code.co_name == "_give_up_start":
            sys.settrace(before)
            others.append(in_thread(lambda: batcher.submit("other")).result(timeout=10))
            assert "other" == others[0].result(timeout=10).value

    def fail(*arguments: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    others: list[Any] = []
    with Batcher[str, str](list, name="slow") as batcher:
        failing = FailingStart("slow", monkeypatch)
        first = batcher.submit("first")
        assert failing.reached.wait(10)
        before = sys.gettrace()
        sys.settrace(interleave)
        try:
            second = batcher.submit("second")
        finally:
            sys.settrace(before)
        assert "second" == second.result(timeout=10).value


def test_a_callback_that_is_added_during_a_shutdown_that_is_interrupted_is_called_by_the_next_shutdown() -> None:
    def interrupt(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "_run_callbacks":
            if event == "return":  # just before the batcher has ended
                batcher.add_shutdown_callback(lambda: called.append("added"))
            elif batcher._newest_engine.stage is Stage.ENDED:
                sys.settrace(before)
                raise KeyboardInterrupt
        return interrupt

    called: list[str] = []
    batcher = Batcher[str, str](list)
    before = sys.gettrace()
    sys.settrace(interrupt)
    with pytest.raises(KeyboardInterrupt):
        batcher.shutdown()
    assert [] == called
    assert batcher.shutdown(timeout=10)
    assert ["added"] == called


@pytest.mark.parametrize("place", ["_abandon", "_run_shutdown_callback"])
def test_if_a_shutdown_is_interrupted_another_waiting_shutdown_completes_it(place: str, clock: ManualClock) -> None:
    def interrupt(frame: Any, event: str, argument: Any) -> Any:
        if event == "return" and frame.f_code.co_name == place:
            sys.settrace(None)
            clock.wait_for_sleeper(50.0)
            raise KeyboardInterrupt
        return interrupt

    def interrupted() -> None:
        sys.settrace(interrupt)
        with pytest.raises(KeyboardInterrupt):
            batcher.shutdown()
        sys.settrace(None)

    called: list[int] = []
    batcher = Batcher[str, str](list, clock=clock)
    for number in range(3):
        batcher.add_shutdown_callback(lambda number=number: called.append(number))  # type: ignore[misc]
    one = in_thread(interrupted)
    other = in_thread(lambda: batcher.shutdown(timeout=50))
    one.result(timeout=10)
    assert other.result(timeout=10) is True
    assert [0, 1, 2] == called


def test_a_job_is_processed_even_if_a_thread_fails_to_start_because_the_interpreter_exits() -> None:
    script = """
    import threading
    from microbatch import NEVER, Batcher
    from microbatch.testing import ManualClock

    def start(thread):
        if thread.name == "late_1":
            starting.set()
            clock.wait_for_sleeper(NEVER)  # until the interpreter exits
            raise RuntimeError("can't create new thread at interpreter shutdown")
        original(thread)

    def submit():
        print(batcher.submit("job").exception())

    original, threading.Thread.start = threading.Thread.start, start
    starting, clock = threading.Event(), ManualClock()
    batcher = Batcher(list, max_workers=2, name="late", clock=clock)
    thread = threading.Thread(target=submit)
    thread.start()
    starting.wait()
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (0, "None\n", "") == (done.returncode, done.stdout, done.stderr)


# -- an error that a signal handler raises as a built-in function returns --


class OutOfTime(RuntimeError):
    """What the signal handler of a user's time limit raises."""


def time_out_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function*, but its first call raises an error."""
    calls = itertools.count()

    def call(*arguments: Any, **options: Any) -> Any:
        if not next(calls):
            raise OutOfTime
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    "module, name",
    [(threading, "_register_atexit"), (threading, "Thread"), (base, "deepcopy")],
    ids=["end of the interpreter", "interpreter without daemons", "policy that is learning"],
)
def test_an_error_of_a_signal_handler_is_not_taken_for_that_of_a_built_in_function(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_exit_hook", None)
    monkeypatch.setattr(engine, "_is_main_interpreter", lambda: name != "Thread")
    monkeypatch.setattr(module, name, time_out_once(getattr(module, name)))
    with pytest.raises(OutOfTime):
        with Batcher[int, int](list) as batcher:
            batcher.submit(1)
            monkeypatch.undo()


def test_an_error_of_a_signal_handler_in_a_cancel_is_raised_and_the_job_is_cancelled() -> None:
    with Batcher[int, int](list, Size(2)) as batcher:
        future, queue = batcher.submit(1), batcher._engine.queue
        queue.call_leader = time_out_once(queue.call_leader)
        with pytest.raises(OutOfTime):
            future.cancel()
        assert future.cancelled()
