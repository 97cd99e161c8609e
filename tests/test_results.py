"""The outcome of each job for every kind of return value and exception of the processor."""

import array
import asyncio
import collections
import concurrent.futures
import copy
import copyreg
import dataclasses
import itertools
import json
import logging
import operator
import pickle
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest

from microbatch import (
    Batcher,
    BatchInfo,
    BatchReport,
    JobFuture,
    JobResult,
    JobState,
    ResultAt,
    ResultCountError,
    Size,
)
from microbatch.futures import job_future
from microbatch.results import make_result
from microbatch.testing import ManualClock

Futures = list[JobFuture[Any]]
NAN = float("nan")


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


def run(processor: Callable[[list[Any]], Any], jobs: Iterable[Any] = "abc") -> Futures:
    """Process *jobs* as one batch, and return their futures, all settled."""
    jobs = list(jobs)
    with Batcher(processor, Size(len(jobs))) as batcher:
        return [batcher.submit(job) for job in jobs]


def values(futures: Futures) -> list[Any]:
    return [future.result(timeout=0).value for future in futures]


def errors(futures: Futures) -> list[BaseException | None]:
    return [future.exception(timeout=0) for future in futures]


class OldStyle:
    """Iterable through `__getitem__` only."""

    def __getitem__(self, index: int) -> int:
        return [1, 2, 3][index]


class Rows:
    """Iterates over rows although it has columns, like the result of a query."""

    columns = property(lambda self: ["id"])

    def __init__(self, *rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def keys(self) -> list[str]:
        return ["id"]


class Sized(Rows):
    def __len__(self) -> int:
        return len(self.rows)


class Unfinished(Rows):
    """Does not know its length yet, like a progress bar around a generator."""

    def __len__(self) -> int:
        raise TypeError("object of type 'generator' has no len()")


class ListWithColumns(list[int]):
    columns = ("id",)


class AnyAttribute(Rows):
    """Has every attribute."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any) -> Any:
        return self


@dataclasses.dataclass
class Page:
    number: int
    results: list[int]

    def __iter__(self) -> Iterator[int]:
        return iter(self.results)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        collections.deque([1, 2, 3]),
        collections.UserList([1, 2, 3]),
        array.array("i", [1, 2, 3]),
        {"x": 1, "y": 2, "z": 3}.values(),
        dict.fromkeys([1, 2, 3]).keys(),
        iter([1, 2, 3]),
        map(int, "123"),
        (number for number in range(1, 4)),
        OldStyle(),
        Rows(1, 2, 3),
        Sized(1, 2, 3),
        Unfinished(1, 2, 3),
        ListWithColumns([1, 2, 3]),
        AnyAttribute(1, 2, 3),
        Page(1, [1, 2, 3]),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_each_job_gets_the_value_in_its_place(returned: Any) -> None:
    assert [1, 2, 3] == values(run(lambda jobs: returned))


def test_each_row_of_a_query_is_the_result_of_one_job() -> None:
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.row_factory = sqlite3.Row
    rows = values(run(lambda jobs: database.execute("SELECT 1 AS id UNION SELECT 2 UNION SELECT 3")))
    assert [1, 2, 3] == [row["id"] for row in rows]
    database.close()


def test_a_custom_iterable_settles_each_job_as_soon_as_it_yields_its_value() -> None:
    class Slow:
        def __init__(self) -> None:
            self.go_on = threading.Event()

        def __iter__(self) -> Iterator[str]:
            yield "first"
            assert self.go_on.wait(10)
            yield "second"

    slow = Slow()
    with Batcher[str, str](lambda jobs: slow, Size(2)) as batcher:
        futures = [batcher.submit("a"), batcher.submit("b")]
        assert "first" == futures[0].result(timeout=10).value
        slow.go_on.set()
        assert "second" == futures[1].result(timeout=10).value


def test_each_job_of_a_large_batch_gets_the_value_in_its_place() -> None:
    assert list(range(300)) == values(run(echo, range(300)))


def test_a_generator_function_can_be_the_processor() -> None:
    def processor(jobs: list[str]) -> Iterator[str]:
        for job in jobs:
            yield job.upper()

    assert ["A", "B", "C"] == values(run(processor))


def test_none_means_that_every_job_succeeded() -> None:
    assert [None, None, None] == values(run(lambda jobs: None))


def test_falsy_values_are_results_like_any_other() -> None:
    assert [None, 0, ""] == values(run(lambda jobs: [None, 0, ""]))


def test_a_result_has_its_batch_and_its_times() -> None:
    future = run(echo)[1]
    result = future.result()
    assert BatchInfo(id=1, size=3, weight=3.0, key=None, trigger="size") == result.batch
    assert result.queue_time >= 0 and result.service_time >= 0
    assert ("b", JobState.SUCCEEDED) == (future.job, future.state)


def test_a_result_and_its_batch_cannot_be_changed() -> None:
    result = run(echo)[0].result()
    with pytest.raises(AttributeError):
        result.value = "x"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del result.value
    with pytest.raises(AttributeError):
        result.note = "x"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        result.batch.size = 9  # type: ignore[misc]


def a_result(value: Any = 1, queue_time: float = 0.5) -> JobResult[Any]:
    return JobResult(value, BatchInfo(1, 3, 3.0, None, "size"), queue_time, 0.25)


UNLIKE_A_TUPLE: dict[str, Callable[[Any], object]] = {
    "result + 1": lambda result: result + 1,
    "1 + result": lambda result: 1 + result,
    "result + result": lambda result: result + result,
    "result + ()": lambda result: result + (),
    "() + result": lambda result: () + result,
    "[] + result": lambda result: [] + result,
    "'' + result": lambda result: "" + result,
    "result * 2": lambda result: result * 2,
    "2 * result": lambda result: 2 * result,
    "[1] * result": lambda result: [1] * result,
    "sum": lambda result: sum([result, result]),
    "result - 1": lambda result: result - 1,
    "1 - result": lambda result: 1 - result,
    "result / 2": lambda result: result / 2,
    "result // 2": lambda result: result // 2,
    "result % 2": lambda result: result % 2,
    "divmod": lambda result: divmod(result, 2),
    "result ** 2": lambda result: result**2,
    "pow": lambda result: pow(result, 2, 3),
    "result << 1": lambda result: result << 1,
    "result >> 1": lambda result: result >> 1,
    "result & 1": lambda result: result & 1,
    "result | 1": lambda result: result | 1,
    "result ^ 1": lambda result: result ^ 1,
    "-result": lambda result: -result,
    "+result": lambda result: +result,
    "~result": lambda result: ~result,
    "abs": abs,
    "result[0]": lambda result: result[0],
    "result[:1]": lambda result: result[:1],
    "result[0] = 1": lambda result: operator.setitem(result, 0, 1),
    "del result[0]": lambda result: operator.delitem(result, 0),
    "iter": iter,
    "list": list,
    "tuple": tuple,
    "unpacking": lambda result: [*result],
    "arguments": lambda result: print(*result),
    "extend": lambda result: [].extend(result),
    "reversed": reversed,
    "len": len,
    "in": lambda result: 1 in result,
    "<": lambda result: result < result,
    "<=": lambda result: result <= 1,
    ">": lambda result: 1 > result,
    ">=": lambda result: result >= result,
    "sorted": lambda result: sorted([result, result]),
    "max": lambda result: max(result, result),
}


@pytest.mark.parametrize("use", UNLIKE_A_TUPLE.values(), ids=UNLIKE_A_TUPLE)
@pytest.mark.parametrize("value", [2, "two", [2]], ids=repr)
def test_a_result_used_as_its_value_raises_and_names_the_attribute(use: Callable[[Any], object], value: Any) -> None:
    with pytest.raises(TypeError, match=r"\.value"):
        use(a_result(value))


def test_a_result_cannot_be_serialized_as_json_by_mistake() -> None:
    with pytest.raises(TypeError):
        json.dumps(a_result())
    assert not isinstance(a_result(), tuple) and not dataclasses.is_dataclass(a_result())


def test_results_are_equal_if_all_their_attributes_are_equal() -> None:
    assert a_result() == a_result() and hash(a_result()) == hash(a_result())
    assert len({a_result(), a_result(), a_result(2)}) == 2
    assert a_result() != a_result(2) and a_result() != a_result(queue_time=0.75)
    assert a_result() != 1 and a_result() != (1, a_result().batch, 0.5, 0.25)
    assert a_result(NAN) == a_result(NAN)
    with pytest.raises(TypeError):
        hash(a_result([]))


def test_the_repr_of_a_result_shows_all_its_attributes() -> None:
    text = "JobResult(value=1, batch=BatchInfo(id=1, size=3, weight=3.0, key=None, trigger='size'), queue_time=0.5, "
    assert f"{text}service_time=0.25)" == repr(a_result()) == str(a_result()) == "%s" % a_result()
    assert eval(repr(a_result())) == a_result()


def test_a_result_can_be_copied_and_pickled() -> None:
    for result in (a_result(["x"]), run(echo)[1].result()):
        for twin in (
            copy.copy(result),
            copy.deepcopy(result),
            *(pickle.loads(pickle.dumps(result, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
        ):
            assert (type(result), result) == (type(twin), twin)
    assert copy.deepcopy(value := a_result(["x"])).value is not value.value


def test_a_match_statement_matches_a_result_by_keywords_and_not_as_a_sequence() -> None:
    match a_result():
        case [*_]:
            raise AssertionError("it is not a sequence")
        case JobResult(value=value, batch=BatchInfo(size=size), queue_time=queue_time):
            assert (1, 3, 0.5) == (value, size, queue_time)
        case _:
            raise AssertionError("it is a result")


def test_a_future_returns_the_same_result_object_each_time() -> None:
    future = run(echo)[0]
    result = future.result()
    assert result is future.result() is next(concurrent.futures.as_completed([future])).result()
    assert result is concurrent.futures.wait([future]).done.pop().result()

    async def main() -> object:
        return await asyncio.wrap_future(future)

    assert result is asyncio.run(main())
    assert result is not run(echo)[0].result()


@pytest.mark.parametrize("has_gil", [True, False])
def test_several_threads_that_read_a_future_at_once_get_the_same_result_object(
    has_gil: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*arguments: Any) -> Any:
        monkeypatch.setattr(job_future, "make_result", make_result)
        others.append(future.result())  # like another thread or a signal handler
        return make_result(*arguments)

    others: list[Any] = []
    future = run(echo)[0]
    monkeypatch.setattr(job_future, "_HAS_GIL", has_gil)
    monkeypatch.setattr(job_future, "make_result", make)
    result = future.result()
    assert [result] == others and result is others[0] is future.result()


def test_a_processor_that_returns_a_job_result_is_refused() -> None:
    assert "use its .value" in str(errors(run(lambda jobs: a_result([1, 2, 3])))[0])


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_sized_return_of_the_wrong_length_fails_every_job_before_any_is_settled(count: int) -> None:
    futures = run(lambda jobs: [1, 2, 3, 4][:count])
    for error in errors(futures):
        assert isinstance(error, ResultCountError)
        assert (3, count) == (error.expected, error.got)
    assert 3 == len(set(map(id, errors(futures))))


class WrongLength(Sized):
    """Has a length that is not the number of its results."""

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    "returned, given",
    [(WrongLength(1, 2), "2"), (WrongLength(1, 2, 3, 4), "more"), (WrongLength(), "0")],
    ids=["too few", "too many", "none"],
)
def test_a_return_value_whose_length_is_not_the_number_of_its_results_is_refused(
    returned: WrongLength, given: str
) -> None:
    for error in errors(run(lambda jobs: returned)):
        assert isinstance(error, TypeError)
        assert f"got WrongLength, which has length 3 but yields {given} items: return a list" in str(error)


def test_an_endless_return_value_with_a_length_is_refused() -> None:
    class Endless(WrongLength):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    for error in errors(run(lambda jobs: Endless())):
        assert "which has length 3 but yields more items" in str(error)


def test_an_iterator_that_ends_early_fails_the_remaining_jobs() -> None:
    futures = run(lambda jobs: iter([1, 2]))
    assert [1, 2] == values(futures[:2])
    assert "the processor must return one result per job: expected 3, got 2" == str(futures[2].exception())


@pytest.mark.parametrize(
    "second, problem",
    [
        (ResultAt(0, "x"), "the processor must return one result per job, got two for index 0"),
        (ResultAt(3, "x"), "the index of a ResultAt must be at most 2, got 3"),
        (ResultAt(-1, "x"), "the index of a ResultAt must be at least 0, got -1"),
        (ResultAt(True, "x"), "the index of a ResultAt must be an integer, got True"),
        ("x", "the processor must return a ResultAt for each job or for none, got both"),
    ],
    ids=["twice the same", "too large", "negative", "not an integer", "without an index"],
)
@pytest.mark.parametrize("kind", [list, iter], ids=["in a list", "one by one"])
def test_no_job_gets_a_result_whose_place_is_wrong(kind: Any, second: Any, problem: str) -> None:
    futures = run(lambda jobs: kind([ResultAt(0, "right"), second, ResultAt(1, "x")]))
    assert {problem} == {str(error) for error in errors(futures[1:])}


def test_a_generator_that_yields_a_wrong_place_is_closed_at_once() -> None:
    """Otherwise the traceback of the exception would keep it, and the connection that it may hold."""
    ended: list[bool] = []

    def processor(jobs: list[int]) -> Iterator[ResultAt[int]]:
        try:
            yield ResultAt(3, 0)
        finally:
            ended.append(True)

    futures = run(processor)
    assert [True] == ended
    assert {"the index of a ResultAt must be at most 2, got 3"} == {str(error) for error in errors(futures)}


def test_a_subclass_of_result_at_is_refused_because_it_would_be_a_value() -> None:
    with pytest.raises(TypeError, match="ResultAt can't be subclassed"):
        type("Row", (ResultAt,), {})


def test_surplus_results_are_logged_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert [0, 1, 2] == values(run(lambda jobs: (number for number in range(99))))
    assert ["the processor returned more than 3 results for batch 1"] == [record.message for record in caplog.records]


def test_an_endless_generator_yields_one_result_more_and_is_closed() -> None:
    given = []

    def processor(jobs: list[str]) -> Iterator[int]:
        try:
            while True:
                given.append(1)
                yield 1
        finally:
            given.append(0)

    run(processor)
    assert [1, 1, 1, 1, 0] == given


def test_a_generator_that_raises_after_its_last_result_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def processor(jobs: list[str]) -> Iterator[str]:
        yield from jobs
        raise OSError("commit failed")

    assert ["a", "b", "c"] == values(run(processor))
    assert "commit failed" in caplog.text


def test_a_job_is_settled_when_its_value_is_yielded() -> None:
    go_on = threading.Event()

    def processor(jobs: list[str]) -> Iterator[str]:
        yield "first"
        assert go_on.wait(10)
        yield "second"

    with Batcher(processor, Size(2)) as batcher:
        first, second = batcher.submit("a"), batcher.submit("b")
        assert "first" == first.result(timeout=10).value
        assert not second.done()
        go_on.set()
        assert "second" == second.result(timeout=10).value


def test_a_generator_that_raises_fails_only_the_remaining_jobs() -> None:
    def processor(jobs: list[str]) -> Iterator[str]:
        yield "first"
        raise LookupError("b")

    futures = run(processor)
    assert ["first"] == values(futures[:1])
    assert [LookupError, LookupError] == [type(error) for error in errors(futures)[1:]]


def test_an_exception_as_a_result_fails_that_job_alone() -> None:
    bad = KeyError("b")
    first, second, third = run(lambda jobs: [1, bad, 3])
    assert [1, 3] == values([first, third])
    assert bad is second.exception()
    assert JobState.FAILED is second.state


class Proxy:
    """A proxy that computes its class each time that it is asked for it."""

    def __init__(self, find: Callable[[], type]) -> None:
        self._find = find

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._find()


@pytest.mark.parametrize("answers", [[], [object], [ValueError]], ids=["raises", "raises the second time", "pretends"])
def test_a_result_that_is_a_proxy_is_not_resolved(answers: list[type]) -> None:
    proxy = Proxy(answers.pop)
    futures = run(lambda jobs: [1, proxy], "ab")
    assert 1 == futures[0].result(timeout=0).value
    assert proxy is futures[1].result(timeout=0).value


def test_one_exception_object_as_several_results_is_copied_for_each_job() -> None:
    bad = KeyError("x")
    first, second, third = errors(run(lambda jobs: [bad] * 3))
    assert 4 == len({id(error) for error in (bad, first, second, third)})
    assert {"'x'"} == {str(first), str(second), str(third)}


class Counted:
    """Has a length, but can't be iterated over."""

    def __len__(self) -> int:
        return 3


class Frame:
    """A table of an unknown library."""

    shape = (3, 2)
    columns = property(lambda self: ["label", "score"])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.columns)


class Named(NamedTuple):
    label: str
    score: int


class Response:
    """A response that a client of an API might return."""

    def __init__(self) -> None:
        self.label = "x"
        self.score = 1
        self._request = "GET /"


class IteratesOverNames(Response):
    def __iter__(self) -> Iterator[Any]:
        return (name for name in vars(self) if not name.startswith("_"))


class IteratesOverValues(Response):
    def __iter__(self) -> Iterator[Any]:
        yield self.label
        yield self.score


class IteratesOverPairs(Response):
    def __iter__(self) -> Iterator[Any]:
        return ((name, value) for name, value in vars(self).items() if not name.startswith("_"))


class IteratesOverBody(Response):
    """Behaves like its body, as the responses of Elasticsearch do."""

    def __init__(self) -> None:
        self._body = {"label": "x", "score": 1}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._body)

    def __len__(self) -> int:
        return len(self._body)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


@dataclasses.dataclass(slots=True)
class Compact:
    label: str = "x"
    score: int = 1

    def __iter__(self) -> Iterator[Any]:
        return iter(dataclasses.astuple(self))


LOOP = asyncio.new_event_loop()
LOOP.close()


def row() -> sqlite3.Row:
    database = sqlite3.connect(":memory:")
    database.row_factory = sqlite3.Row
    (found,) = database.execute("SELECT 1 AS label, 2 AS score")
    database.close()
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "returned, why",
    [
        ("abc", "is one value"),
        (b"abc", "is one value"),
        (bytearray(3), "is one value"),
        (memoryview(b"abc"), "is one value"),
        (collections.UserString("abc"), "is one value"),
        ({1, 2, 3}, "has no order"),
        (frozenset("abc"), "has no order"),
        (dict.fromkeys("abc"), "holds values by name"),
        (collections.ChainMap(dict.fromkeys("abc")), "holds values by name"),
        (mock.Mock(spec=dict), "holds values by name"),
        (row(), "holds values by name"),
        (Named("x", 1), "holds values by name"),
        (time.localtime(), "holds values by name"),
        (IteratesOverNames(), "holds values by name"),
        (IteratesOverValues(), "holds values by name"),
        (IteratesOverPairs(), "holds values by name"),
        (IteratesOverBody(), "holds values by name"),
        (Compact(), "holds values by name"),
        (Frame(), "iterates over columns"),
        (asyncio.Future(loop=LOOP), "must be waited for"),
        (concurrent.futures.Future(), "must be waited for"),
        (3, "is not iterable"),
        (object(), "is not iterable"),
        (abs, "is not iterable"),
        (mock.Mock(), "is not iterable"),
        (Counted(), "is not iterable"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_return_value_that_is_not_one_result_per_job_in_order_is_refused(returned: Any, why: str, count: int) -> None:
    check_refusal(returned, why, count)


def check_refusal(returned: Any, why: str, count: int) -> None:
    for error in errors(run(lambda jobs: returned, range(count))):
        assert isinstance(error, TypeError)
        assert f"got {type(returned).__name__}, which {why}: return" in str(error)


def test_a_coroutine_is_refused_without_a_warning_that_it_was_never_awaited() -> None:
    async def processor(jobs: list[str]) -> list[str]:
        return jobs

    assert "got coroutine, which must be waited for" in str(errors(run(lambda jobs: processor(jobs)))[0])


def test_a_task_is_refused_and_not_cancelled() -> None:
    async def work() -> str:
        return "done"

    async def main() -> None:
        task = asyncio.ensure_future(work())
        assert "got Task, which must be waited for" in str(errors(run(lambda jobs: task))[0])
        assert "done" == await task

    asyncio.run(main())


class Custom(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Picky(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)
        self.code = code


class Equal(Exception):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = Exception.__hash__


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("x", 3),
        OSError(2, "no such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        SystemExit(4),
        KeyboardInterrupt(),
        GeneratorExit(),
        concurrent.futures.CancelledError(),
        Custom(5),
        Picky(code=6),
        Equal(7),
    ],
    ids=lambda error: type(error).__name__,
)
def test_each_job_of_a_failed_batch_gets_its_own_copy_of_the_exception(raised: BaseException) -> None:
    def processor(jobs: list[str]) -> None:
        raise raised

    futures = run(processor)
    got = errors(futures)
    for error in got:
        assert error is not None and error is not raised
        assert (type(raised), raised.args, str(raised)) == (type(error), error.args, str(error))
        assert vars(raised) == vars(error)
        assert error.__cause__ is None
    assert 3 == len(set(map(id, got)))
    assert {JobState.FAILED} == {future.state for future in futures}


def test_an_exception_is_copied_by_its_class_even_if_a_reducer_is_registered_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")
    monkeypatch.setitem(
        copyreg.dispatch_table, UnicodeDecodeError, lambda error: (UnicodeDecodeError.__new__, (type(error),))
    )

    def processor(jobs: list[str]) -> None:
        raise raised

    for error in errors(run(processor)):
        assert (True, str(raised)) == (error is not raised, str(error))


def test_callers_do_not_lengthen_the_tracebacks_of_other_callers() -> None:
    def processor(jobs: list[str]) -> None:
        raise ValueError

    def depth(future: JobFuture[Any]) -> int:
        with pytest.raises(ValueError) as caught:
            future.result()
        return len(caught.traceback)

    assert 1 == len({depth(future) for future in run(processor)})


def test_an_exception_ends_no_thread_and_the_next_batch_runs() -> None:
    names = []

    def processor(jobs: list[Any]) -> list[Any]:
        names.append(threading.current_thread().name)
        if jobs == ["bad"]:
            raise SystemExit
        return jobs

    with Batcher(processor, Size(1)) as batcher:
        assert isinstance(batcher.submit("bad").exception(timeout=10), SystemExit)
        assert "good" == batcher.submit("good").result(timeout=10).value
    assert 1 == len(set(names))


def test_the_processor_may_modify_its_list_of_jobs() -> None:
    def processor(jobs: list[str]) -> list[str]:
        answer = [job.upper() for job in jobs]
        jobs.clear()
        return answer

    futures = run(processor)
    assert ["A", "B", "C"] == values(futures)
    assert ["a", "b", "c"] == [future.job for future in futures]


def test_all_jobs_of_a_batch_can_be_read_before_the_first_callback_runs() -> None:
    seen: list[Any] = []
    with Batcher(echo, Size(2)) as batcher:
        first = batcher.submit(1)
        first.add_done_callback(lambda future: seen.append(second.result(timeout=0).value))
        second = batcher.submit(2)
        second.result(timeout=10)
    assert [2] == seen


def test_a_callback_that_raises_is_logged_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    def exit_thread(future: Any) -> None:
        raise SystemExit

    with Batcher(echo, Size(2)) as batcher:
        future = batcher.submit(1)
        future.add_done_callback(exit_thread)
        future.add_done_callback(seen.append)
        batcher.submit(2).result(timeout=10)
    assert [future] == seen
    future.add_done_callback(exit_thread)  # a callback that is added later is called immediately
    assert 2 * [("concurrent.futures", logging.ERROR)] == [(record.name, record.levelno) for record in caplog.records]
    assert "exception calling callback" in caplog.text


def return_two_errors(jobs: list[str]) -> list[Any]:
    return [KeyError(1), 2, KeyError(3)]


def yield_an_error_and_raise(jobs: list[str]) -> Iterator[Any]:
    yield KeyError(1)
    yield 2
    raise KeyError(3)


def yield_two_errors(jobs: list[str]) -> Iterator[Any]:
    yield from return_two_errors(jobs)


@pytest.mark.parametrize("processor", [return_two_errors, yield_an_error_and_raise, yield_two_errors])
def test_a_policy_observes_how_many_jobs_failed_and_how_long_the_batch_took(
    processor: Callable[[list[str]], Any], clock: ManualClock
) -> None:
    reports: list[BatchReport] = []
    clock.advance(10)

    class Observing(Size):
        def observe(self, report: BatchReport) -> None:
            reports.append(report)

    def slow(jobs: list[str]) -> Any:
        clock.advance(4)
        return processor(jobs)

    with Batcher(slow, Observing(3), clock=clock) as batcher:
        for job in "abc":
            batcher.submit(job)
    (report,) = reports
    expected = BatchInfo(1, 3, 3.0, None, "observing"), 4.0, 2, 10.0, "KeyError(1)"
    assert expected == (report.batch, report.service_time, report.failed, report.started, repr(report.error))


def test_a_result_has_the_queue_time_and_the_service_time_of_its_job(clock: ManualClock) -> None:
    clock.advance(10)

    def processor(jobs: list[float]) -> Iterator[float]:
        for seconds in jobs:
            clock.advance(seconds)
            yield seconds

    with Batcher(processor, Size(2), clock=clock) as batcher:
        first = batcher.submit(2.0)
        clock.advance(5)
        second = batcher.submit(3.0)
    times = [(result.queue_time, result.service_time) for result in (first.result(), second.result())]
    assert [(5.0, 2.0), (0.0, 5.0)] == times


@pytest.mark.parametrize(
    "last, message, level",
    [
        (str, "the processor returned more than 3 results for batch 1", logging.WARNING),
        (int, "the processor raised after its last result, in batch 1", logging.ERROR),
    ],
    ids=["a surplus", "an exception"],
)
def test_a_surplus_result_or_an_exception_after_the_last_result_is_logged(
    last: Callable[[str], Any], message: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    def processor(jobs: list[str]) -> Iterator[Any]:
        yield from jobs
        yield last("d")

    assert ["a", "b", "c"] == values(run(processor))
    assert [("microbatch", level, message)] == caplog.record_tuples
