"""An exception comes into a thread of the batcher from outside, too late for the call whose time it was to limit.

Libraries that limit the time of a call have Python raise an exception in the thread that makes it. One that comes late
arrives between two batches, at any statement of ours.
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
def no_failure_is_left() -> Iterator[None]:
    """Have the last failures logged now: their tracebacks parse code, which breaks an `ast.parse` of a later test."""
    yield
    gc.collect()


# Lines at whose beginning Python lets nothing in, though it calls a tracer: there is no call and no jump before them.
CLOSED = ("with ", "waiter.finished_futures += ", "if counts:", "waiter.num_pending_calls -= ")


class TimeLimit(Exception):
    pass


class Late(Signal):
    """Raises `TimeLimit` at the *place*-th point where Python lets one in, in the threads of a batcher of that name."""

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
        # There, some instructions are not traced. At the end of a `with` the lock is released in one step with what is
        # before it, though Python calls the tracer once more.
        if frame.f_globals.get("__name__", "").startswith(self._modules) and event == "line":
            if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(CLOSED):
                self.places_left -= 1
                if self.places_left < 0:
                    self.came = True
                    self._raise()
        return self.trace


class Second(logging.Handler):
    """When the log says that a first one came in, has *late* raise another in that thread."""

    def __init__(self, late: Late) -> None:
        super().__init__()
        self.late = late

    def emit(self, record: logging.LogRecord) -> None:
        if "an exception from outside" in record.msg and not (self.late.armed or self.late.came):
            self.late.armed = True
            frame: FrameType | None = sys._getframe()
            while frame is not None:
                frame.f_trace = self.late.trace
                frame = frame.f_back
            sys.settrace(self.late.trace)


@pytest.fixture(autouse=True)
def no_tracer_is_left() -> Iterator[None]:
    yield
    threading.settrace(None)


def use(batcher: Batcher[Any, Any], clock: ManualClock, told: list[Any]) -> list[JobFuture[Any]]:
    """Submit jobs that end in every way, with all kinds of waiters."""
    futures = [batcher.submit(job) for job in ("a", "b", ValueError("c"))]
    futures.append(batcher.submit("expires", expires_in=5))
    cancelled = batcher.submit("cancelled")
    for future in futures:
        future.add_done_callback(told.append)
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
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of one that comes into a finalizer
@pytest.mark.parametrize("thread", ["late", "late_0"])
@pytest.mark.parametrize("policy", [Size(2) | Interval(60)], ids=str)
def test_wherever_it_comes_in_nothing_is_lost_and_nobody_waits_for_ever(
    thread: str, policy: BatchingPolicy[Any], caplog: pytest.LogCaptureFixture
) -> None:
    for place in count():
        caplog.clear()
        late, clock, told = Late(place, thread), ManualClock(), list[Any]()
        threading.settrace(late.trace)
        with Batcher[Any, Any](list, policy, clock=clock, name="late") as batcher:
            first = batcher.submit("first")
            batcher.flush(timeout=10)
            late.armed = True
            futures = use(batcher, clock, told)
            late.armed = False
            last = [batcher.submit("last"), batcher.submit("last")]
            assert in_thread(batcher.flush).result(timeout=20)
            assert ["last", "last"] == [future.result(timeout=20).value for future in last]
        threading.settrace(None)
        for future in futures[:-1]:
            error = future.exception(timeout=0)
            assert error is None or isinstance(error, (TimeLimit, ValueError, JobExpired))
        assert futures[-1].cancelled() and "first" == first.result(timeout=0).value
        # One that comes in just before or after a callback is taken for one of the callback, and logged.
        missing = len(futures) - 1 - len(told)
        assert missing == 0 or missing == 1 and "exception calling callback" in caplog.text
        check(batcher.stats(), [first, *futures, *last])
        if not late.came:
            break
    assert place > 100


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.parametrize("thread, at", [("late", 0), ("late", 8), ("late", 40), ("late_0", 0), ("late_0", 3)])
def test_a_second_one_that_comes_in_while_the_first_is_handled_ends_no_thread_either(thread: str, at: int) -> None:
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
        tried += first.came and second.late.came
    assert tried > 50  # not all: another thread may have been quicker


def raise_in_turn(monkeypatch: pytest.MonkeyPatch, thread: str, *places: tuple[Any, str]) -> threading.Event:
    """Raise `TimeLimit` at the start of each of these functions, in this order, once the event is set."""
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
    return armed


def test_a_second_one_that_comes_in_as_the_books_are_put_right_leaves_no_job_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed = raise_in_turn(monkeypatch, "late_0", (Ledger, "_strike_out"), (Ledger, "recover"))
    with Batcher[str, str](list, Size(1), name="late") as batcher:
        batcher.submit("before").result(timeout=10)
        batcher.flush(timeout=10)
        armed.set()
        future = batcher.submit("job")
        future.exception(timeout=10)
        assert batcher.flush(timeout=10)
        assert (2, 0) == (batcher.stats().accepted, batcher.stats().running)


def test_a_second_one_that_comes_in_at_the_end_of_the_worker_thread_keeps_no_shutdown_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed, called = raise_in_turn(monkeypatch, "late", (Engine, "_end"), (runner, "report")), list[str]()
    batcher = Batcher[str, str](list, Size(1), name="late")
    batcher.add_shutdown_callback(lambda: called.append("called"))
    batcher.submit("job").result(timeout=10)
    armed.set()
    assert batcher.shutdown(timeout=10)
    assert ["called"] == called


def test_a_second_one_that_comes_in_as_a_batch_is_handed_to_an_executor_leaves_no_job_unsettled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = (Future, "add_done_callback"), (runner.ExecutorRunner, "_named")
    armed = raise_in_turn(monkeypatch, "late", *places)
    with ThreadPoolExecutor(1) as executor, Batcher[str, str](list, Size(1), name="late", executor=executor) as batcher:
        batcher.submit("before").result(timeout=10)
        armed.set()
        assert isinstance(batcher.submit("job").exception(timeout=10), (TimeLimit, type(None)))
        assert "after" == batcher.submit("after").result(timeout=10).value


def raise_in(thread: threading.Thread) -> None:
    """Have Python raise `TimeLimit` in a thread, at the next point where it can."""
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeLimit))
    assert 1 == raised


def check(stats: BatcherStats, futures: list[JobFuture[Any]]) -> None:
    """Check that each job is in the state that the books have it in."""
    states = [future.state.value for future in futures]
    expected = {state: states.count(state) for state in ("succeeded", "failed", "cancelled", "expired")}
    assert expected == {state: getattr(stats, state) for state in expected}
    assert (len(futures), 0, 0, 0) == (stats.accepted, stats.queued, stats.batched, stats.running)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_left_out(jump: dis.Instruction, code: CodeType) -> bool:
    """Return whether a ``with`` or ``try`` holds where this jump leads, but not at the jump itself."""
    instructions = {each.offset: each.opname for each in dis.get_instructions(code)}
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def handler(offset: int) -> int | None:
        return next((entry.target for entry in entries if entry.start <= offset < entry.end), None)

    if handler(jump.offset) is not None:
        return False
    around = handler(jump.argval)
    while around is not None and instructions[around] != "PUSH_EXC_INFO":  # that of a comprehension only cleans up
        around = handler(around)
    return around is not None


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there, an exception that comes in is always caught")
@pytest.mark.parametrize("path", sorted((ROOT / "microbatch").rglob("*.py")), ids=lambda path: path.stem)
def test_no_loop_goes_on_where_an_exception_that_comes_in_would_pass_by_the_handlers_of_its_function(
    path: Path,
) -> None:
    asynchronous = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    for code in _codes(compile(path.read_text(), str(path), "exec")):
        if not code.co_flags & asynchronous:  # these run in a thread of an event loop
            jumps = [each for each in dis.get_instructions(code) if each.opname == "JUMP_BACKWARD"]
            assert [] == [code.co_name for jump in jumps if _is_left_out(jump, code)]


def test_an_idle_thread_goes_on_after_it_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
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


@pytest.mark.parametrize("line", [0, 2], ids=["before", "half way"])
def test_a_job_between_the_queue_and_the_books_when_the_worker_thread_gives_up_fails_with_it(line: int) -> None:
    """The fourth exception in a row comes in just when the leader has taken a job out of the queue."""

    class Clock(ManualClock):
        def now(self) -> float:
            if armed and threading.current_thread().name == "late":
                armed.pop()
                if armed:
                    raise TimeLimit
                taken.put(batcher.submit("taken"))
            return super().now()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "_enter" and "taken" in [future.job for future in frame.f_locals["jobs"]]:
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
    clock.wait_for_sleeper(NEVER)  # nothing but the flush wakes the batcher thread from now on
    armed += [True] * 4
    batcher.flush(wait=False)
    last = taken.get(timeout=10)
    assert isinstance(last.exception(timeout=10), TimeLimit)
    assert batcher.shutdown(timeout=10)
    check(batcher.stats(), [first, last])
