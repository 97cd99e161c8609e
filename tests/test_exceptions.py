"""The exceptions that callers get, and the log of the failures that no caller asks about."""

import asyncio
import dataclasses
import gc
import logging
import pickle
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed, wait
from itertools import count
from types import FrameType, TracebackType
from typing import Any, TypeVar

import pytest

from microbatch import Batcher, JobFuture, ResultCountError, Size, batched
from microbatch.testing import ManualClock, RecordingProcessor
from tests.extras import needs
from tests.threads import in_thread

Error = TypeVar("Error", bound=BaseException)
LARGE = list(range(1_000))


def caught(function: Callable[[], Any], kind: type[Error]) -> Error:
    """Return what *function* raises."""
    with pytest.raises(kind) as info:
        function()
    return info.value


def futures_of(raised: Any, count: int = 2) -> list[JobFuture[Any]]:
    """Return the futures of a batch that fails with *raised*, or with the exception that calling it raises."""

    def processor(jobs: list[Any]) -> None:
        raised() if callable(raised) else None
        raise raised

    with Batcher[Any, None](processor, Size(count)) as batcher:
        return [batcher.submit(number) for number in range(count)]


def errors_of(raised: Any, count: int = 2) -> list[Any]:
    return [future.exception(timeout=0) for future in futures_of(raised, count)]


def depth(trace: TracebackType | None) -> int:
    return len(list(traceback.walk_tb(trace)))


# -- the exceptions that callers get --


def test_the_only_job_of_a_batch_gets_the_original_exception() -> None:
    raised = ValueError("x")
    assert [raised] == errors_of(raised, count=1)


@pytest.mark.parametrize("returned", [list, iter], ids=["in a list", "in an iterator"])
def test_the_only_failed_job_of_a_batch_gets_the_original_exception(returned: Callable[[Any], Any]) -> None:
    bad = KeyError("b")
    with Batcher[Any, Any](lambda jobs: returned([1, bad, 3]), Size(3)) as batcher:
        futures = [batcher.submit(job) for job in "abc"]
    assert bad is futures[1].exception()


def test_the_last_job_that_a_generator_leaves_without_a_result_gets_the_original_exception() -> None:
    raised = KeyError("b")

    def processor(jobs: list[Any]) -> Iterator[Any]:
        yield 1
        raise raised

    with Batcher[Any, Any](processor, Size(2)) as batcher:
        futures = [batcher.submit(job) for job in "ab"]
    assert raised is futures[1].exception()


class ApiError(Exception):
    __slots__ = ("status", "never_set")

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


class Odd(Exception):
    """Has slots named like the attributes of an exception group, and one that holds a list."""

    __slots__ = ("message", "exceptions", "nothing", "tags")

    def __init__(self, message: str) -> None:
        self.message, self.exceptions, self.nothing, self.tags = message, 3, None, ["a"]


class Keyword(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    tags: list[str]


class Registered(Exception):
    """Has a class that records its subclasses."""

    subclasses: list[type] = []

    def __init_subclass__(cls) -> None:
        Registered.subclasses.append(cls)


def nameless() -> Any:
    return None.name  # type: ignore[attr-defined]


def undefined() -> Any:
    return undefined_name  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "raised, fields",
    [
        (ApiError("too many requests", 429), ["status"]),
        (Odd("x"), ["message", "exceptions", "nothing", "tags"]),
        (Keyword(code=3), ["code"]),
        (Frozen(["a"]), ["tags"]),
        (OSError(2, "no such file", "name", None, "other"), ["errno", "strerror", "filename", "filename2"]),
        (BlockingIOError(11, "full", 7), ["characters_written"]),
        (
            UnicodeDecodeError("utf-8", b"\xff" * 1_000, 500, 501, "bad"),
            ["encoding", "object", "start", "end", "reason"],
        ),
        (caught(lambda: compile("a b", "file", "exec"), SyntaxError), ["filename", "lineno", "offset", "text", "msg"]),
        (ImportError("no", name="module", path="path"), ["name", "path", "msg"]),
        (caught(nameless, AttributeError), ["name", "obj"]),
        (caught(undefined, NameError), ["name"]),
        (SystemExit(4), ["code"]),
        (KeyError("x"), []),
        (Registered("x"), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_of_several_callers_gets_all_data_of_the_exception(raised: BaseException, fields: list[str]) -> None:
    one, other = errors_of(raised)
    assert 3 == len({id(raised), id(one), id(other)})
    for error in (one, other):
        assert (type(raised), str(raised), repr(raised)) == (type(error), str(error), repr(error))
        assert raised.args == error.args
        assert [getattr(raised, field) for field in fields] == [getattr(error, field) for field in fields]
        assert vars(raised) == vars(error)
    assert [] == Registered.subclasses


def test_the_traceback_of_each_caller_leads_to_the_line_that_raised() -> None:
    for error in errors_of(nameless):
        assert "nameless" == traceback.extract_tb(error.__traceback__)[-1].name


def test_each_caller_can_walk_the_chain_of_causes() -> None:
    def processor() -> None:
        try:
            raise ApiError("refused", 403)
        except ApiError as error:
            raise ValueError("wrapped") from error

    def with_context() -> None:
        try:
            raise ApiError("refused", 403)
        except ApiError:
            raise ValueError("while handling")

    for error in errors_of(processor):
        assert (403, True) == (error.__cause__.status, error.__suppress_context__)
    for error in errors_of(with_context):
        assert (None, 403, False) == (error.__cause__, error.__context__.status, error.__suppress_context__)


def test_a_circular_chain_of_causes_is_copied_as_a_circle() -> None:
    raised, cause = ValueError("a"), ValueError("b")
    raised.__cause__, cause.__context__ = cause, raised
    one, other = errors_of(raised)
    assert one.__cause__.__context__ is one and other.__cause__.__context__ is other


@pytest.mark.parametrize("raised", [ValueError("x"), ValueError("x", LARGE)], ids=["a copy", "a view"])
def test_callers_share_no_mutable_state_of_an_exception(raised: Any) -> None:
    raised.rows, raised.by_name, raised.kinds, raised.causes = [1, [2]], {"a": {"b": []}}, {1}, Counter("a")
    raised.inner = KeyError("inner")
    raised.__cause__ = raised.inner
    one, other = errors_of(raised)
    one.rows[1].append(3)
    one.by_name["a"]["b"].append(3)
    one.kinds.add(3)
    one.causes["a"] += 1
    one.inner.added = one.__cause__.also = one.own = 3
    assert one.inner is one.__cause__
    for error in (other, raised):
        assert ([1, [2]], {"a": {"b": []}}, {1}) == (error.rows, error.by_name, error.kinds)
        assert Counter("a") == error.causes
        assert ({}, False) == (vars(error.__cause__), hasattr(error, "own"))


def test_callers_share_neither_a_list_in_a_slot_nor_the_code_of_a_system_exit() -> None:
    for raised, name in ((Odd("x"), "tags"), (SystemExit(["a"]), "code")):
        one, other = errors_of(raised)
        getattr(one, name).append("of its caller")
        assert ["a"] == getattr(other, name)


def test_jobs_that_fail_with_different_exceptions_do_not_share_a_common_cause() -> None:
    def processor(jobs: list[Any]) -> list[Any]:
        common, errors = ConnectionError("down"), [ValueError(job) for job in jobs]
        for error in errors:
            error.__cause__ = common
        return errors

    with Batcher[Any, Any](processor, Size(2)) as batcher:
        futures = [batcher.submit(job) for job in "ab"]
    one, other = (future.exception() for future in futures)
    assert one is not None and other is not None
    assert ("a", "b", "down") == (*one.args, *other.args, str(other.__cause__))
    assert one.__cause__ is not other.__cause__


def test_an_exception_among_its_own_arguments_is_copied() -> None:
    raised = ValueError()
    raised.args = (raised,)
    one, other = errors_of(raised)
    assert one.args == (one,) and other.args == (other,)


def test_a_value_nested_too_deeply_to_be_copied_is_shared() -> None:
    nested: list[Any] = []
    for _ in range(5_000):
        nested = [nested]
    one, other = errors_of(ValueError(nested))
    assert one.args[0] is nested is other.args[0]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no notes")
def test_a_note_that_one_caller_adds_is_not_seen_by_another() -> None:
    raised: Any = ValueError("x")
    raised.add_note("of the processor")
    one, other = errors_of(raised)
    one.add_note("of tenant 1")
    assert (["of the processor", "of tenant 1"], ["of the processor"]) == (one.__notes__, other.__notes__)
    assert ["of the processor"] == raised.__notes__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups")
def test_each_caller_finds_the_members_of_an_exception_group() -> None:
    member = ApiError("refused", 403)
    raised = ExceptionGroup("several", [member, KeyError("x")])  # type: ignore[name-defined] # noqa: F821
    for error in errors_of(raised):
        found = error.subgroup(ApiError).exceptions[0]
        assert (403, "several") == (found.status, error.message)
        assert found is not member


@pytest.mark.parametrize("place", ["args", "attribute"])
def test_a_large_container_is_copied_when_a_caller_reads_it(place: str) -> None:
    raised: Any = ValueError("refused", LARGE)
    if place == "attribute":
        raised.args = ("refused",)
        raised.rows = LARGE
    one, other = errors_of(raised)
    for error in (one, other):
        rows = error.args[1] if place == "args" else error.rows
        assert rows == LARGE and rows is not LARGE
        assert rows is (error.args[1] if place == "args" else error.rows)
        rows.append("changed by its caller")
        assert (True, "ValueError", str(raised), repr(raised)) == (
            isinstance(error, ValueError),
            type(error).__name__,
            str(error),
            repr(error),
        )
        assert ValueError is type(pickle.loads(pickle.dumps(error)))
    one.args = one.rows = ("mine",)
    assert ("mine",) == one.args == one.rows != other.args
    assert 1_000 == len(LARGE)


class Counting(Exception):
    """Counts how often it is converted to text or compared."""

    calls = 0

    def _count(self, *_: object) -> Any:
        Counting.calls += 1
        return "text"

    __str__ = __repr__ = _count
    __eq__ = _count
    __hash__ = Exception.__hash__


def test_copying_an_exception_for_each_job_neither_formats_nor_compares_it() -> None:
    Counting.calls = 0
    errors = errors_of(Counting(Counting("argument"), [Counting("item")]), count=100)
    assert (100, 0) == (len(set(map(id, errors))), Counting.calls)


@pytest.mark.slow
def test_ten_thousand_jobs_can_fail_with_an_exception_that_holds_them_all() -> None:
    raised: Any = ValueError("refused", list(range(10_000)))
    raised.rows = {number: [number] for number in range(10_000)}
    before = time.process_time()
    errors = errors_of(raised, count=10_000)
    # With a full copy for each job, this took minutes and gigabytes. A slow machine alone does not fail it.
    assert time.process_time() - before < 20
    assert 10_000 == len(set(map(id, errors)))


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups")
def test_ten_thousand_jobs_can_fail_with_an_exception_group_that_has_a_member_for_each() -> None:
    members = [KeyError(number) for number in range(10_000)]
    before = time.process_time()
    errors = errors_of(ExceptionGroup("refused", members), count=10_000)  # type: ignore[name-defined] # noqa: F821
    assert time.process_time() - before < 20  # as above
    assert 10_000 == len(set(map(id, errors)))
    assert all(len(error.exceptions) == 10_000 for error in errors)


def test_a_traceback_does_not_grow_each_time_it_is_raised_from_a_future() -> None:
    for future in (futures_of(nameless, count=1) + futures_of(nameless))[:2]:
        depths = {depth(caught(lambda: future.result(timeout=0), AttributeError).__traceback__) for _ in range(5)}
        assert 1 == len(depths)


def test_a_future_gives_the_same_exception_each_time() -> None:
    for future in futures_of(ValueError("x")):
        assert future.exception() is future.exception() is caught(future.result, ValueError)


@pytest.mark.slow
@pytest.mark.parametrize("ask", [JobFuture.exception, lambda future: wait([future])], ids=["exception()", "wait()"])
def test_two_threads_may_ask_for_the_exception_of_one_future_at_once(ask: Callable[[JobFuture[Any]], Any]) -> None:
    """The second thread asks while the first is at its first line, then at its second line, and so on."""
    for place in count():
        (future, other), lines = futures_of(ValueError("x")), count()

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if frame.f_globals["__name__"].startswith("microbatch.") and event == "line" and next(lines) == place:
                asked.append(in_thread(future.exception).result(timeout=10))
            return trace

        asked: list[Any] = []
        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            ask(future)
        finally:
            sys.settrace(previous)
        if not asked:
            break
        assert asked == [future.exception()] != [other.exception()]
    assert place > 5


def test_an_exception_that_can_neither_be_copied_nor_subclassed_is_shared() -> None:
    needs("pydantic")
    import pydantic_core as core

    raised = core.PydanticKnownError("greater_than", {"gt": 5})
    assert [raised, raised] == errors_of(raised)


def test_an_exception_of_a_type_without_a_usable_constructor_is_copied() -> None:
    needs("pydantic")
    import pydantic

    model = pydantic.create_model("Row", number=(int, ...))
    for error in errors_of(lambda: model(number="x")):
        assert ("int_parsing", "x") == (error.errors()[0]["type"], error.errors()[0]["input"])


# -- StopIteration --


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
@pytest.mark.parametrize("way", ["raised", "returned"])
def test_a_stop_iteration_reaches_the_caller_as_the_cause_of_a_runtime_error(kind: type[Exception], way: str) -> None:
    stop = kind("x")

    def processor(jobs: list[Any]) -> list[Any]:
        if way == "returned":
            return [stop]
        raise stop

    async def caller() -> BaseException:
        with Batcher(processor) as batcher:
            with pytest.raises(RuntimeError, match=kind.__name__) as info:
                await asyncio.wait_for(asyncio.wrap_future(batcher.submit(1)), timeout=10)
        return info.value

    assert stop is asyncio.run(caller()).__cause__


def test_each_of_several_callers_gets_its_own_runtime_error() -> None:
    one, other = errors_of(StopIteration(3))
    assert [RuntimeError, RuntimeError] == [type(one), type(other)]
    assert [(3,), (3,)] == [one.__cause__.args, other.__cause__.args]
    assert one.__cause__ is not other.__cause__


# -- failures that no caller asks about --


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    gc.collect()  # logs the failures that earlier tests left behind
    caplog.set_level(logging.ERROR, "microbatch")
    return caplog


def test_a_failed_batch_that_no_caller_asks_about_is_logged_once(log: pytest.LogCaptureFixture) -> None:
    def processor(jobs: list[Any]) -> None:
        raise ConnectionError("the database is down")

    with Batcher[Any, None](processor, Size(3), name="orders") as batcher:
        for job in range(3):
            batcher.submit(job)
    (record,) = log.records
    assert "3 jobs of batch 1 of 'orders' failed, and nobody asked for the outcome" in record.getMessage()
    assert record.exc_info is not None and isinstance(record.exc_info[1], ConnectionError)
    assert "in processor\n" in log.text


def test_the_log_counts_only_the_jobs_that_no_caller_asked_about(log: pytest.LogCaptureFixture) -> None:
    with Batcher[Any, Any](lambda jobs: [KeyError(1), "good", KeyError(3)], Size(3)) as batcher:
        asked, *_ = [batcher.submit(job) for job in "abc"]
        asked.exception(timeout=10)
        del _
    assert "1 job of batch 1 of 'microbatch' failed" in log.text
    assert [(3,)] == [record.exc_info[1].args for record in log.records if record.exc_info and record.exc_info[1]]


def test_an_expired_job_that_no_caller_asks_about_is_logged(log: pytest.LogCaptureFixture, clock: ManualClock) -> None:
    with Batcher(RecordingProcessor[Any](), Size(2), clock=clock) as batcher:
        batcher.submit("job", expires_in=5)
        clock.wait_for_sleeper(5)
        clock.advance(5)
        batcher.flush()
    assert "1 job of 'microbatch' failed" in log.text and "the job was not dispatched within 5 s" in log.text


async def awaited(future: JobFuture[Any]) -> None:
    await asyncio.wait([asyncio.wrap_future(future)])


def callback_before(future: JobFuture[Any]) -> None:
    future.add_done_callback(lambda _: None)


ASKING: list[Callable[[JobFuture[Any]], Any]] = [
    lambda future: future.exception(timeout=10),
    lambda future: caught(lambda: future.result(timeout=10), ResultCountError),
    lambda future: wait([future], timeout=10),
    lambda future: list(as_completed([future], timeout=10)),
    callback_before,
    lambda future: asyncio.run(awaited(future)),
]
NAMES = ["exception", "result", "wait", "as_completed", "callback", "asyncio"]


@pytest.mark.parametrize("ask", ASKING, ids=NAMES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_that_a_caller_asks_about_is_not_logged(
    ask: Callable[[JobFuture[Any]], Any], when: str, log: pytest.LogCaptureFixture, processor: RecordingProcessor[Any]
) -> None:
    with Batcher[Any, Any](lambda jobs: processor(jobs)[1:], Size(1)) as batcher:
        future = batcher.submit("job")
        if when == "after":
            processor.release()
            batcher.flush()
        asked = in_thread(lambda: ask(future))
        if ask is callback_before:
            asked.result(timeout=10)
        processor.release()
        asked.result(timeout=10)
        batcher.flush()
        del future, asked
        gc.collect()
    assert [] == [record for record in log.records if record.name == "microbatch"]


def test_reading_only_the_state_of_a_failed_future_does_not_keep_it_from_being_logged(
    log: pytest.LogCaptureFixture,
) -> None:
    future = futures_of(ValueError("x"), count=1)[0]
    assert future.done() and not future.cancelled() and "failed" in repr(future)
    assert [] == [record for record in log.records if record.name == "microbatch"]
    del future
    assert 1 == len(log.records)


def test_a_failed_job_of_a_batched_method_that_no_caller_asks_about_is_logged(log: pytest.LogCaptureFixture) -> None:
    class Service:
        @batched()
        def process(self, jobs: list[Any]) -> None:
            raise ValueError("x")

    service = Service()
    service.process.submit("job")
    service.process.shutdown()
    assert 1 == len(log.records)


def test_a_failure_whose_future_is_kept_until_the_interpreter_exits_is_logged_then() -> None:
    script = """
    from microbatch import Batcher
    def processor(jobs):
        raise ConnectionError("the database is down")
    batcher = Batcher(processor)
    for job in range(3):
        future = batcher.submit(job)
    asked = batcher.submit(3)
    assert isinstance(asked.exception(timeout=10), ConnectionError)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True, timeout=20, check=True
    )
    lines = [line for line in done.stderr.splitlines() if "nobody asked" in line]
    assert 3 == sum(int(line.split()[0]) for line in lines), done.stderr
    assert done.stderr.rstrip().endswith("ConnectionError: the database is down")


def test_a_batch_may_fail_while_failures_are_logged_at_interpreter_exit() -> None:
    script = """
    import atexit, sys, threading
    from microbatch import Batcher, BatchListener, Size
    started, go, failed = threading.Event(), threading.Event(), threading.Event()
    class Failed(BatchListener):
        def batch_finished(self, event):
            failed.set()
    def stuck(jobs):
        started.set()
        go.wait()
        raise ConnectionError("too late")
    def processor(jobs):
        raise ConnectionError("the database is down")
    def trace(frame, event, argument):
        inside = frame.f_code.co_name == "valuerefs" or "itemref" in frame.f_locals
        if inside and "weakref" in frame.f_code.co_filename and not failed.is_set():
            go.set()
            failed.wait(10)
        return trace
    Batcher(stuck, Size(1), exit_timeout=0, listeners=[Failed()]).submit("stuck")
    started.wait()
    futures = [Batcher(processor, Size(1)).submit(number) for number in range(3)]
    atexit.register(sys.settrace, trace)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], stderr=subprocess.PIPE, text=True, timeout=20
    )
    assert "RuntimeError" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "nobody asked" in line and "batch" in line]
    assert 3 <= len(lines), done.stderr


def test_jobs_that_a_failed_map_leaves_behind_are_not_logged(log: pytest.LogCaptureFixture) -> None:
    def processor(jobs: list[Any]) -> None:
        raise ConnectionError("the database is down")

    with Batcher[Any, None](processor, Size(2)) as batcher:
        with pytest.raises(ConnectionError):
            list(batcher.map(range(10), buffersize=10))
    gc.collect()
    assert [] == log.records
