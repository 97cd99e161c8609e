"""A late exception, raised from outside in a thread of the batcher, loses no job and ends no thread.

Libraries that limit the time of a call make Python raise an exception in the calling thread. If it comes too late, it
arrives between two batches, at any statement of the batcher.
"""

import ctypes
import dis
import gc
import inspect
import linecache
import logging
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import CodeType, FrameType
from typing import Any

import pytest

from microbatch import NEVER, Batcher, BatcherStats, BatchingPolicy, Interval, JobExpired, JobFuture, Size
from microbatch._engine import runner
from microbatch._engine.ledger import Ledger
from microbatch._engine.engine import Engine
from microbatch.testing import InlineExecutor, ManualClock
from tests.test_signals import Signal
from tests.threads import in_thread

pytestmark = pytest.mark.signals

INSTRUCTIONS_ARE_NOT_TRACED = sys.version_info >= (3, 12)


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def log_failures_now() -> Iterator[None]:
    """Log the last failures now: their tracebacks parse code, which would break `ast.parse` in a later test."""
    yield
    gc.collect()


# Python calls a tracer at the start of these lines, but never interrupts there: no call and no jump precedes them.
CLOSED = (
    *("with ", "waiter.finished_futures += ", "if counts:", "waiter.num_pending_calls -= "),
    *(
        "if broken:",
        "future._error = ",
        "future._failures = ",
        "future._value = ",
        "future._service = ",
        "future._stage = ",
        "self.owner = ",
    ),
)


class TimeLimit(Exception):
    pass


@pytest.fixture(autouse=True)
def the_tracer_keeps_the_gil() -> Iterator[None]:
    """Let other threads run only where a thread waits, because a tracer would let them run inside atomic steps (L3)."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    yield
    sys.setswitchinterval(before)


class Late(Signal):
    """Raises `TimeLimit` at the *place*-th point where Python can be interrupted, in the threads of this name."""

    def __init__(self, place: int, thread: str, modules: tuple[str, ...] = ("microbatch.",)) -> None:
        super().__init__(self._raise, place, modules)
        self._thread = thread
        self._here = threading.local()
        self.armed = False

    def _raise(self) -> None:
        self.armed = False
        raise TimeLimit

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not hasattr(self._here, "is_in_thread"):
            self._here.is_in_thread = threading.current_thread().name == self._thread
        if not self._here.is_in_thread:
            return None
        if not self.armed:
            return self.trace
        if not INSTRUCTIONS_ARE_NOT_TRACED:
            return super().trace(frame, event, argument)
        # Some instructions are not traced here. At the end of a `with`, Python calls the tracer once more,
        # although the lock is released in one step with the statement before it.
        if frame.f_globals.get("__name__", "").startswith(self._modules) and event == "line":
            if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(CLOSED):
                self.places_left -= 1
                if self.places_left < 0:
                    self.arrived = True
                    self._raise()
        return self.trace


class Second(logging.Handler):
    """Arms *late* in a thread when the log says that a first exception arrived in it."""

    def __init__(self, late: Late) -> None:
        super().__init__()
        self.late = late

    def emit(self, record: logging.LogRecord) -> None:
        if "an exception from outside" in record.msg and not (self.late.armed or self.late.arrived):
            self.late.armed = True
            frame: FrameType | None = sys._getframe()
            while frame is not None:
                frame.f_trace = self.late.trace
                frame = frame.f_back
            sys.settrace(self.late.trace)


@pytest.fixture(autouse=True)
def remove_the_tracer() -> Iterator[None]:
    yield
    threading.settrace(None)


def use(batcher: Batcher[Any, Any], clock: ManualClock, called: list[Any]) -> list[JobFuture[Any]]:
    """Submit jobs with every possible outcome, and wait for them in every possible way."""
    futures = [batcher.submit(job) for job in ("a", "b", ValueError("c"))]
    futures.append(batcher.submit("expires", expires_in=5))
    cancelled = batcher.submit("cancelled")
    for future in futures:
        future.add_done_callback(called.append)
    cancelled.cancel()
    watching = in_thread(lambda: wait(futures, timeout=20))
    iterating = in_thread(lambda: sorted(map(id, as_completed(futures, timeout=20))))
    waiting = in_thread(lambda: [future.exception(timeout=20) for future in futures])
    flushing = in_thread(batcher.flush)
    clock.advance(5)
    clock.advance(60)
    assert flushing.result(timeout=30)
    for waiter in (watching, iterating, waiting):
        waiter.result(timeout=30)
    assert (set(futures), sorted(map(id, futures))) == (watching.result().done, iterating.result())
    return [*futures, cancelled]


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # for an exception in a finalizer
@pytest.mark.parametrize("thread", ["late", "late_0"])
@pytest.mark.parametrize("policy", [Size(2) | Interval(60)], ids=str)
def test_a_late_exception_at_any_point_loses_no_job_and_blocks_no_waiter(
    thread: str, policy: BatchingPolicy[Any], caplog: pytest.LogCaptureFixture
) -> None:
    for place in count():
        caplog.clear()
        late, clock, called = Late(place, thread), ManualClock(), list[Any]()
        threading.settrace(late.trace)
        with Batcher[Any, Any](list, policy, clock=clock, name="late") as batcher:
            first = batcher.submit("first")
            batcher.flush(timeout=10)
            late.armed = True
            futures = use(batcher, clock, called)
            late.armed = False
            last = [batcher.submit("last"), batcher.submit("last")]
            assert in_thread(batcher.flush).result(timeout=20)
            assert ["last", "last"] == [future.result(timeout=20).value for future in last]
        threading.settrace(None)
        for future in futures[:-1]:
            error = future.exception(timeout=0)
            assert error is None or isinstance(error, (TimeLimit, ValueError, JobExpired))
        assert futures[-1].cancelled() and "first" == first.result(timeout=0).value
        # An exception just before or after a callback is logged as if the callback had raised it.
        missing = len(futures) - 1 - len(called)
        assert missing == 0 or missing == 1 and "exception calling callback" in caplog.text
        check(batcher.stats(), [first, *futures, *last])
        if not late.arrived:
            break
    assert place > 100


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # for an exception in a finalizer
@pytest.mark.parametrize("thread, at", [("late", 0), ("late", 8), ("late", 40), ("late_0", 0), ("late_0", 3)])
def test_a_second_exception_while_the_first_is_handled_ends_no_thread(thread: str, at: int) -> None:
    tried = 0
    for place in range(100):
        first, second = Late(at, thread), Second(Late(place, thread, ("microbatch.", "concurrent.futures.thread")))
        logging.getLogger("microbatch").addHandler(second)
        threading.settrace(first.trace)
        with Batcher[Any, Any](list, Size(1), name="late") as batcher:
            futures = [batcher.submit("before")]
            futures[0].result(timeout=10)
            first.armed = True
            futures.append(batcher.submit("meanwhile"))
            assert isinstance(futures[-1].exception(timeout=20), (TimeLimit, type(None)))
            first.armed = False
            futures.append(batcher.submit("after"))
            assert isinstance(futures[-1].exception(timeout=20), (TimeLimit, type(None)))
            second.late.armed = False
            futures.append(batcher.submit("at last"))
            assert "at last" == futures[-1].result(timeout=20).value
        threading.settrace(None)
        logging.getLogger("microbatch").removeHandler(second)
        check(batcher.stats(), futures)
        tried += first.arrived and second.late.arrived
    assert tried > 50  # not in all rounds: another thread may be faster


def raise_in_turn(
    monkeypatch: pytest.MonkeyPatch, thread: str, *places: tuple[Any, str]
) -> tuple[threading.Event, list[tuple[Any, str]]]:
    """Once the returned event is set, raise `TimeLimit` at the start of each of these functions, in this order.

    The returned list has the functions in which it was not raised yet.
    """
    armed, left = threading.Event(), list(places)

    def wrap(place: tuple[Any, str]) -> None:
        function = getattr(*place)

        def raising(*arguments: Any, **options: Any) -> Any:
            if armed.is_set() and threading.current_thread().name == thread and left[:1] == [place]:
                left.pop(0)
                raise TimeLimit
            return function(*arguments, **options)

        monkeypatch.setattr(*place, raising)

    for each in places:
        wrap(each)
    return armed, left


def test_a_second_exception_while_the_ledger_is_corrected_leaves_no_job_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed, left = raise_in_turn(monkeypatch, "late_0", (Ledger, "close_group"), (Ledger, "recover"))
    with Batcher[str, str](list, Size(1), name="late") as batcher:
        batcher.submit("before").result(timeout=10)
        batcher.flush(timeout=10)
        armed.set()
        future = batcher.submit("job")
        future.exception(timeout=10)
        assert batcher.flush(timeout=10)
        assert (2, 0) == (batcher.stats().accepted, batcher.stats().running)
    assert [] == left


def test_a_second_exception_at_the_end_of_the_batcher_thread_does_not_block_a_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed, left = raise_in_turn(monkeypatch, "late", (Engine, "_end"), (runner, "report"))
    called = list[str]()
    batcher = Batcher[str, str](list, Size(1), name="late")
    batcher.add_shutdown_callback(lambda: called.append("called"))
    batcher.submit("job").result(timeout=10)
    armed.set()
    assert batcher.shutdown(timeout=10)
    assert (["called"], []) == (called, left)


def test_a_second_exception_while_a_batch_is_passed_to_an_executor_leaves_no_job_unsettled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = (Future, "add_done_callback"), (runner.ExecutorRunner, "_named")
    armed, left = raise_in_turn(monkeypatch, "late", *places)
    with ThreadPoolExecutor(1) as executor, Batcher[str, str](list, Size(1), name="late", executor=executor) as batcher:
        batcher.submit("before").result(timeout=10)
        armed.set()
        assert isinstance(batcher.submit("job").exception(timeout=10), (TimeLimit, type(None)))
        assert "after" == batcher.submit("after").result(timeout=10).value
    assert [] == left


def raise_in(thread: threading.Thread) -> None:
    """Make Python raise `TimeLimit` in a thread, at the next point where it can be interrupted."""
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeLimit))
    assert 1 == raised


def check(stats: BatcherStats, futures: list[JobFuture[Any]]) -> None:
    """Check that the statistics agree with the states of the jobs."""
    states = [future.state.value for future in futures]
    expected = {state: states.count(state) for state in ("succeeded", "failed", "cancelled", "expired")}
    assert expected == {state: getattr(stats, state) for state in expected}
    assert (len(futures), 0, 0, 0) == (stats.accepted, stats.queued, stats.batched, stats.running)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _bypasses_handlers(jump: dis.Instruction, code: CodeType) -> bool:
    """Return whether the target of this jump is inside a ``with`` or ``try``, but the jump itself is outside."""
    instructions = {each.offset: each.opname for each in dis.get_instructions(code)}
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def handler(offset: int) -> int | None:
        return next((entry.target for entry in entries if entry.start <= offset < entry.end), None)

    if handler(jump.offset) is not None:
        return False
    around = handler(jump.argval)
    # The handler of a comprehension only cleans up.
    while around is not None and instructions[around] != "PUSH_EXC_INFO":
        around = handler(around)
    return around is not None


@pytest.mark.skipif(sys.version_info < (3, 12), reason="before Python 3.12, the handlers cover every instruction")
@pytest.mark.parametrize("path", sorted((ROOT / "microbatch").rglob("*.py")), ids=lambda path: path.stem)
def test_no_loop_jumps_back_from_outside_a_try_or_with_into_one(
    path: Path,
) -> None:
    asynchronous = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    for code in _codes(compile(path.read_text(), str(path), "exec")):
        if not code.co_flags & asynchronous:  # coroutines run in the thread of an event loop
            jumps = [each for each in dis.get_instructions(code) if each.opname == "JUMP_BACKWARD"]
            assert [] == [code.co_name for jump in jumps if _bypasses_handlers(jump, code)]


def test_an_idle_thread_survives_a_late_exception_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    threads: list[threading.Thread] = []

    def processor(jobs: list[Any]) -> list[Any]:
        threads.append(threading.current_thread())
        return jobs

    with Batcher(processor) as batcher:
        assert 1 == batcher.submit(1).result(timeout=10).value
        for number in range(3):
            raise_in(threads[0])
            error = batcher.submit(number).exception(timeout=10)
            assert error is None or isinstance(error, TimeLimit)
            assert number == batcher.submit(number).result(timeout=10).value
    assert {threads[0]} == set(threads)
    assert "an exception from outside interrupted a thread of microbatch" in caplog.text


@pytest.mark.parametrize("line", [0, 2], ids=["before", "halfway"])
def test_a_job_between_the_queue_and_the_collector_fails_if_the_batcher_thread_gives_up(line: int) -> None:
    """The fourth exception in a row arrives just when the leader has taken a job out of the queue."""

    class Clock(ManualClock):
        def now(self) -> float:
            if armed and threading.current_thread().name == "late":
                armed.pop()
                if armed:
                    raise TimeLimit
                taken.put(batcher.submit("taken"))
            return super().now()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "_take_in" and "taken" in [future.job for future in frame.f_locals["news"].jobs]:
            lines.append(event)
            if len(lines) > line:
                raise TimeLimit
        return trace

    clock = Clock()
    armed, lines, taken = list[bool](), list[str](), SimpleQueue[JobFuture[Any]]()
    threading.settrace(trace)
    batcher = Batcher[Any, Any](list, Size(1), name="late", clock=clock, executor=InlineExecutor())
    first = batcher.submit("first")
    assert "first" == first.result(timeout=10).value
    clock.wait_for_sleeper(NEVER)  # from now on, only the flush wakes the batcher thread
    armed += [True] * 4
    batcher.flush(wait=False)
    last = taken.get(timeout=10)
    assert isinstance(last.exception(timeout=10), TimeLimit)
    assert batcher.shutdown(timeout=10)
    check(batcher.stats(), [first, last])
