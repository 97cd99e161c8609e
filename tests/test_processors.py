"""The wrappers around a processor: called with a list, and in a batcher."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import retry_if_exception, retry_if_exception_type, stop_after_attempt, stop_never, wait_fixed, wait_none

from microbatch import Batcher, ResultAt, ResultCountError, Size
from microbatch.processors import bisecting, by_key, by_length, deduplicating, retrying, within
from microbatch.testing import RecordingProcessor

Processor = Callable[[list[Any]], Any]


def retrying_once(processor: Processor, **options: Any) -> Processor:
    return retrying(processor, **{"stop": stop_after_attempt(2), "wait": wait_none(), **options})


WRAPPERS: dict[str, Callable[[Processor], Processor]] = {
    "retrying": retrying_once,
    "bisecting": bisecting,
    "deduplicating": deduplicating,
    "within": lambda processor: within(processor, nullcontext),
    "by_length": lambda processor: retrying_once(by_length(processor, 9, lambda job: 1), stop=stop_after_attempt(1)),
}


class Recording:
    """Fails for bad jobs in the way that *how* names, and records its calls."""

    def __init__(self, how: str, *bad: Any) -> None:
        self.how = how
        self.bad = bad
        self.calls: list[list[Any]] = []

    def __call__(self, jobs: list[Any]) -> Any:
        self.calls.append(list(jobs))
        return getattr(self, self.how)(jobs)

    def raises(self, jobs: list[Any]) -> list[Any]:
        for job in jobs:
            if job in self.bad:
                raise ValueError(job)
        return [job * 2 for job in jobs]

    def returns(self, jobs: list[Any]) -> list[Any]:
        return [ValueError(job) if job in self.bad else job * 2 for job in jobs]

    def yields(self, jobs: list[Any]) -> Any:
        for job in jobs:
            if job in self.bad:
                raise ValueError(job)
            yield job * 2


def outcomes_of(processor: Processor, jobs: list[Any]) -> list[Any]:
    """Return one outcome per job, even if the processor raises one exception for all of them."""
    try:
        outcomes: list[Any] = processor(jobs)
    except Exception as error:
        return [error] * len(jobs)
    assert len(jobs) == len(outcomes)
    return outcomes


def plain(outcomes: list[Any]) -> list[Any]:
    """Return *outcomes* with exceptions replaced by strings, which can be compared."""
    return [f"{type(each).__name__} {each}" if isinstance(each, BaseException) else each for each in outcomes]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    "returned, expected",
    [
        (lambda jobs: (ResultAt(index, jobs[index]) for index in (2, 0, 1)), [1, 2, 3]),
        (lambda jobs: None, [None] * 3),
        (lambda jobs: tuple(jobs), [1, 2, 3]),
        (lambda jobs: (job for job in jobs), [1, 2, 3]),
        (lambda jobs: [job if job < 3 else KeyError(job) for job in jobs], [1, 2, "KeyError 3"]),
        (lambda jobs: [], "expected 3, got 0"),
        (lambda jobs: "abc", "one result per job in order, or None, got str"),
    ],
    ids=["out of order", "none", "a tuple", "a generator", "an exception as a result", "too few", "a string"],
)
def test_a_wrapped_processor_may_return_the_same_as_any_processor(wrap: Any, returned: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert all(expected in each for each in plain(list(outcomes_of(wrap(returned), [1, 2, 3]))))
    else:
        assert expected == plain(wrap(returned)([1, 2, 3]))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_exception_that_is_not_a_subclass_of_exception_passes_through_each_wrapper(wrap: Any) -> None:
    def processor(jobs: list[Any]) -> list[Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrap(processor)([1, 2])


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_without_jobs_no_wrapper_calls_the_processor(wrap: Any) -> None:
    processor = Recording("raises")
    assert ([], []) == (wrap(processor)([]), processor.calls)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_surplus_results_of_a_wrapped_processor_are_logged(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert [1, 2] == wrap(lambda jobs: iter([1, 2, 3]))([1, 2])
    assert ["the processor returned more than 2 results for a batch"] == [
        record.getMessage() for record in caplog.records
    ]


def skipping(jobs: list[str]) -> Any:
    """Yield no result for an empty job, like a careless generator."""
    return (job.upper() for job in jobs if job)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_iterable_that_ends_early_fails_all_jobs_of_the_call(wrap: Any) -> None:
    def processor(jobs: list[str]) -> Any:
        calls.append(jobs)
        return skipping(jobs)

    calls: list[list[str]] = []
    with pytest.raises(ResultCountError, match="expected 4, got 3"):
        wrap(processor)(["a", "", "c", "d"])
    assert [["a", "", "c", "d"]] == calls


# -- retrying --


@pytest.mark.parametrize("indices", [(0, 1), (2, 0)], ids=["in order", "out of order"])
def test_results_with_an_index_that_end_early_fail_all_jobs_of_the_call_too(indices: tuple[int, int]) -> None:
    with pytest.raises(ResultCountError, match="expected 3, got 2"):
        bisecting(lambda jobs: (ResultAt(index, index) for index in indices))(["a", "b", "c"])


def test_retrying_repeats_a_call_with_too_few_results_only_on_request() -> None:
    def processor(jobs: list[str]) -> Any:
        calls.append(jobs)
        return skipping(jobs) if len(calls) == 1 else [job.upper() for job in jobs]

    calls: list[list[str]] = []
    retried = retrying_once(processor, retry=retry_if_exception_type(ResultCountError))
    assert ["A", "", "C", "D"] == retried(["a", "", "c", "d"])
    assert [["a", "", "c", "d"]] * 2 == calls


def test_too_few_results_in_a_later_attempt_fail_the_jobs_of_that_attempt() -> None:
    def processor(jobs: list[str]) -> Any:
        calls.append(jobs)
        return [ConnectionError(job) if job in "bd" else job for job in jobs] if len(calls) == 1 else iter(["B"])

    calls: list[list[str]] = []
    outcomes = retrying_once(processor)(["a", "b", "c", "d"])
    miscount = "ResultCountError the processor must return one result per job: expected 2, got 1"
    assert ["a", miscount, "c", miscount] == plain(outcomes)
    assert [["a", "b", "c", "d"], ["b", "d"]] == calls


@pytest.mark.parametrize(
    "how, calls",
    [
        ("raises", [["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"]]),
        ("returns", [["a", "b", "c"], ["b"], ["b"]]),
        ("yields", [["a", "b", "c"], ["b", "c"], ["b", "c"]]),
    ],
)
def test_only_the_failed_jobs_are_processed_again(how: str, calls: list[list[str]]) -> None:
    processor = Recording(how, "b")

    def succeed_at_the_third_call(jobs: list[str]) -> Any:
        if len(processor.calls) == 2:
            processor.bad = ()
        return processor(jobs)

    assert ["aa", "bb", "cc"] == retrying_once(succeed_at_the_third_call, stop=stop_after_attempt(3))(["a", "b", "c"])
    assert calls == processor.calls


def test_a_job_that_fails_in_every_attempt_gets_its_last_error() -> None:
    processor = Recording("returns", "b", "c")
    assert ["aa", "ValueError b", "ValueError c"] == plain(retrying_once(processor)(["a", "b", "c"]))
    assert [["a", "b", "c"], ["b", "c"]] == processor.calls


def test_the_retry_strategy_decides_for_each_failed_job() -> None:
    def processor(jobs: list[str]) -> list[Any]:
        calls.append(jobs)
        return [KeyError(job) if job == "b" else ConnectionError(job) for job in jobs]

    calls: list[list[str]] = []
    outcomes = retrying_once(processor, retry=retry_if_exception_type(ConnectionError))(["a", "b", "c"])
    assert [["a", "b", "c"], ["a", "c"]] == calls
    assert ["ConnectionError a", "KeyError 'b'", "ConnectionError c"] == plain(outcomes)


def test_the_wait_strategy_sets_the_pauses_between_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    retrying_once(Recording("returns", "b"), stop=stop_after_attempt(3), wait=wait_fixed(7))(["a", "b"])
    assert [7, 7] == slept


def test_a_wait_strategy_that_raises_fails_the_jobs_without_a_result() -> None:
    def wait(state: Any) -> float:
        raise LookupError("no wait")

    outcomes = retrying_once(Recording("returns", "b"), stop=stop_never, wait=wait)(["a", "b"])
    assert ["aa", "LookupError no wait"] == plain(outcomes)


def test_a_retry_predicate_that_raises_fails_the_failed_jobs_without_another_attempt() -> None:
    def predicate(error: BaseException) -> bool:
        return bool(error.response)  # type: ignore[attr-defined]

    processor = Recording("returns", "b")
    outcomes = retrying_once(processor, stop=stop_never, retry=retry_if_exception(predicate))(["a", "b", "c"])
    assert ["aa", "AttributeError 'ValueError' object has no attribute 'response'", "cc"] == plain(outcomes)
    assert 1 == len(processor.calls)


@pytest.mark.parametrize("strategy", ["stop", "wait", "retry"])
def test_a_class_instead_of_a_strategy_is_refused(strategy: str) -> None:
    with pytest.raises(TypeError, match=f"{strategy} must be a strategy of tenacity, got <class .*>: pass an instance"):
        retrying_once(len, **{strategy: ConnectionError})


class Hollow(Exception):
    """Raises if it is used as a boolean."""

    def __bool__(self) -> bool:
        raise LookupError("don't ask")


class Proxy:
    """Raises if it is asked for its class."""

    __class__ = property(lambda self: 1 / 0)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("kind", [Hollow, Proxy])
def test_no_wrapper_asks_a_result_for_its_class_or_truth_value(wrap: Any, kind: Any) -> None:
    outcome = kind()
    first, second = wrap(lambda jobs: [outcome for _ in jobs[:1]] + [2 for _ in jobs[1:]])([1, 2])
    assert (True, 2) == (first is outcome, second)


# -- bisecting --


@pytest.mark.parametrize("how", ["raises", "yields"])
@pytest.mark.parametrize("bad", [(), (0,), (7,), (3, 4), tuple(range(8))])
def test_bisecting_fails_only_the_bad_jobs(how: str, bad: tuple[int, ...]) -> None:
    processor = Recording(how, *bad)
    expected = [f"ValueError {job}" if job in bad else job * 2 for job in range(8)]
    assert expected == plain(bisecting(processor)(list(range(8))))
    assert len(processor.calls) <= 15


def test_bisecting_finds_one_bad_job_among_many_in_few_calls() -> None:
    processor = Recording("raises", 700)
    outcomes = bisecting(processor)(list(range(1024)))
    assert [700] == [place for place, outcome in enumerate(outcomes) if isinstance(outcome, ValueError)]
    assert 21 == len(processor.calls)


def test_bisecting_makes_at_most_max_calls() -> None:
    processor = Recording("raises", *range(1024))
    outcomes = bisecting(processor, max_calls=7)(list(range(1024)))
    assert (7, 1024) == (len(processor.calls), sum(isinstance(outcome, ValueError) for outcome in outcomes))


@pytest.mark.parametrize(
    "options, calls",
    [
        ({}, 1),
        ({"unless": ()}, 3),
        ({"on": ValueError, "unless": ()}, 1),
        ({"on": (ValueError, OSError), "unless": ()}, 3),
    ],
)
def test_bisecting_does_not_split_a_batch_after_an_exception_of_an_excluded_type(options: Any, calls: int) -> None:
    def processor(jobs: list[str]) -> None:
        called.append(jobs)
        raise ConnectionError("no server")

    called: list[list[str]] = []
    assert ["ConnectionError no server"] * 2 == plain(outcomes_of(bisecting(processor, **options), ["a", "b"]))
    assert calls == len(called)


class Down(Exception):
    """The downstream can't be reached."""


def test_bisecting_gives_up_after_seven_calls_if_all_parts_fail_with_the_same_class() -> None:
    def processor(jobs: list[int]) -> None:
        called.append(len(jobs))
        raise Down(f"call {len(called)}")

    called: list[int] = []
    outcomes = bisecting(processor)(list(range(100)))
    assert [100, 50, 50, 25, 25, 25, 25] == called
    assert {"Down call 4", "Down call 5", "Down call 6", "Down call 7"} == set(plain(outcomes))


@pytest.mark.parametrize(
    "options, size, bad",
    [({"on": ValueError}, 32, range(0, 32, 8)), ({}, 16, range(0, 16, 4)), ({}, 32, range(8, 32, 8))],
    ids=["if the class is named", "in a small batch", "if a quarter succeeds"],
)
def test_bisecting_separates_bad_jobs_in_several_parts(options: Any, size: int, bad: range) -> None:
    process: Any = bisecting(Recording("raises", *bad), **options)
    outcomes = process(list(range(size)))
    assert list(bad) == [job for job, outcome in enumerate(outcomes) if isinstance(outcome, ValueError)]


def test_bisecting_does_not_give_up_if_the_parts_fail_with_different_classes() -> None:
    def processor(jobs: list[int]) -> None:
        if bad := {0, 8, 16, 24}.intersection(jobs):
            raise KeyError if min(bad) == 24 else ValueError

    process: Any = bisecting(processor)
    outcomes = process(list(range(32)))
    assert [0, 8, 16, 24] == [job for job, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]


# -- by_key --


def test_by_key_asks_once_for_each_key_and_gives_each_job_the_value_of_its_own() -> None:
    asked: list[list[int]] = []

    def fetch(ids: list[int]) -> dict[int, str]:
        asked.append(ids)
        return {id: f"user {id}" for id in sorted(ids)}

    assert ["user 3", "user 1", "user 3", "user 2"] == by_key(fetch)([3, 1, 3, 2])
    assert [[3, 1, 2]] == asked


def test_by_key_gives_rows_in_any_order_to_the_jobs_with_their_keys() -> None:
    def fetch(ids: list[int]) -> list[tuple[int, str]]:
        return [(id, f"row {id}") for id in sorted(ids)]

    def row_key(row: tuple[int, str]) -> int:
        return row[0]

    process = by_key(fetch, key=int, row_key=row_key)
    assert [(9, "row 9"), (4, "row 4"), (9, "row 9")] == process(["9", "4", "9"])


def test_by_key_fails_only_the_jobs_whose_keys_are_missing() -> None:
    def fetch(ids: list[int]) -> dict[int, str]:
        return {id: str(id) for id in ids if id != 7}

    with Batcher(by_key(fetch), Size(3)) as batcher:
        first, missing, last = [batcher.submit(job) for job in (6, 7, 8)]
        assert ("6", "8") == (first.result(timeout=10).value, last.result(timeout=10).value)
        error = missing.exception(timeout=10)
    assert isinstance(error, KeyError) and (7,) == error.args


def test_by_key_gives_a_missing_key_the_default() -> None:
    def fetch(ids: list[int]) -> dict[int, str | None]:
        return {1: "one"}

    assert ["one", None] == by_key(fetch, default=None)([1, 2])


def test_by_key_gives_each_job_a_list_of_its_own_with_all_rows_of_its_key() -> None:
    rows = by_key(lambda keys: ["ab", "ac"], row_key=lambda row: row[0], many=True)(["a", "x", "a"])
    assert [["ab", "ac"], [], ["ab", "ac"]] == rows
    assert rows[0] is not rows[2]


def test_by_key_fails_only_the_jobs_with_a_key_that_two_rows_have() -> None:
    outcomes = by_key(lambda keys: ["ab", "b", "ac"], row_key=lambda row: row[0])(["a", "b"])
    assert ["ValueError 2 rows have the key 'a': pass many=True", "b"] == plain(outcomes)


NO_ROWS = "fetch must return an iterable of rows, because of row_key"


@pytest.mark.parametrize(
    "fetch, options, problem",
    [
        (lambda keys: {"7": "row"}, {}, "fetch must return only keys that it was called with, got '7'"),
        (lambda keys: ["7"], {"row_key": str}, "fetch must return only keys that it was called with, got '7'"),
        (lambda keys: [1], {}, "fetch must return a mapping from keys to values, or rows with row_key, got [1]"),
        (lambda keys: {7: "row"}, {"row_key": int}, f"{NO_ROWS}, got {{7: 'row'}}"),
        (lambda keys: "7", {"row_key": int}, f"{NO_ROWS}, got '7'"),
        (lambda keys: None, {"row_key": int}, f"{NO_ROWS}, got None"),
    ],
    ids=["a mapping", "rows", "no mapping", "a mapping and no rows", "a string", "nothing"],
)
def test_by_key_refuses_what_can_belong_to_no_job(fetch: Any, options: Any, problem: str) -> None:
    process: Any = by_key(fetch, **options)
    with pytest.raises((TypeError, ValueError)) as refusal:
        process([7])
    assert problem == str(refusal.value)


def test_by_key_closes_a_generator_of_rows_whose_row_has_no_key() -> None:
    transaction = Transaction()

    def fetch(keys: list[int]) -> Iterator[int]:
        with transaction:
            yield from keys

    def row_key(row: Any) -> int:
        raise AttributeError("id")

    process = by_key(fetch, row_key=row_key)
    with pytest.raises(AttributeError) as caught:  # which keeps the generator alive
        process([1])
    assert [GeneratorExit] == transaction.ends and caught.traceback


def test_by_key_hashes_each_key_a_few_times_only() -> None:
    class Key:
        hashed = 0

        def __hash__(self) -> int:
            Key.hashed += 1
            return id(self)

    keys = [Key() for _ in range(100)]
    assert keys == by_key(lambda keys: {key: key for key in keys})(keys)
    assert Key.hashed < 10 * len(keys)


def test_by_key_does_not_fetch_without_jobs() -> None:
    fetch = RecordingProcessor[int]()
    assert [] == by_key(fetch, row_key=int)([])
    assert [] == fetch.batches


@pytest.mark.parametrize("options", [{"many": True}, {"many": True, "row_key": len, "default": None}])
def test_many_rows_need_their_keys_and_no_default(options: Any) -> None:
    with pytest.raises(ValueError, match="many=True needs a row_key, and takes no default"):
        by_key(dict, **options)


# -- by_length --


def test_by_length_keeps_the_number_times_the_longest_within_the_budget_and_the_order() -> None:
    processor = RecordingProcessor[str](str.upper)
    with Batcher(by_length(processor, 12), Size(6)) as batcher:
        futures = [batcher.submit(text) for text in ("dddd", "a", "bb", "a long text", "much longer than that", "ccc")]
        assert ["DDDD", "A", "BB", "A LONG TEXT"] == [future.result(timeout=10).value for future in futures[:4]]
    assert [["a", "bb", "ccc"], ["dddd"], ["a long text"], ["much longer than that"]] == processor.batches


def test_by_length_settles_a_part_before_it_processes_the_next() -> None:
    def processor(texts: list[str]) -> list[str]:
        if "a long text" in texts:
            assert "a" == futures[1].result(timeout=10).value
        return texts

    with Batcher(by_length(processor, 11), Size(2)) as batcher:
        futures = [batcher.submit("a long text"), batcher.submit("a")]
    assert ["a long text", "a"] == [future.result().value for future in futures]


def test_by_length_fails_only_the_jobs_of_the_part_that_failed() -> None:
    process: Any = by_length(Recording("raises", "bb"), 2)
    results = list(process(["a", "bb", "c"]))
    assert [(0, "aa"), (2, "cc")] == [(each.index, each.value) for each in results[:2]]
    assert (1, "ValueError bb") == (results[2].index, *plain([results[2].value]))


def test_the_results_of_by_length_can_be_sent_back_by_a_process() -> None:
    process: Any = by_length(RecordingProcessor[str](), 9)
    parts = process(["bb", "a"])
    for _ in ("once", "again after a failed attempt"):
        results = pickle.loads(pickle.dumps(parts))
        assert [(1, "a"), (0, "bb")] == [(each.index, each.value) for each in results]


# -- deduplicating --


@pytest.mark.parametrize(
    "options, calls",
    [
        ({}, [("a", 1), ("b", 5)]),
        ({"keep": "last"}, [("a", 2), ("b", 5)]),
        ({"merge": lambda old, new: (old[0], old[1] + new[1])}, [("a", 3), ("b", 5)]),
    ],
    ids=["the first", "the last", "merged"],
)
def test_deduplicating_processes_one_of_equal_jobs(options: Any, calls: list[Any]) -> None:
    processor = RecordingProcessor[Any]()
    outcomes = deduplicating(processor, key=lambda job: job[0], **options)([("a", 1), ("b", 5), ("a", 2)])
    assert [calls] == processor.batches
    assert [calls[0], calls[1], calls[0]] == outcomes


def test_deduplicating_keeps_either_the_first_or_the_last() -> None:
    with pytest.raises(ValueError, match="keep must be 'first' or 'last', got 'newest'"):
        deduplicating(list, keep="newest")  # type: ignore[call-overload]


@pytest.mark.parametrize("how", ["raises", "returns", "yields"])
def test_deduplicating_processes_equal_jobs_once_and_gives_them_the_same_outcome(how: str) -> None:
    processor = Recording(how, "b")
    outcomes = bisecting(deduplicating(processor))(["a", "b", "a", "c", "b"])
    assert ["aa", "ValueError b", "aa", "cc", "ValueError b"] == plain(outcomes)
    assert ["a", "b", "c"] == processor.calls[0]


def test_the_key_of_deduplicating_decides_which_jobs_are_equal() -> None:
    processor = Recording("returns")
    assert ["AA", "AA", "bb"] == deduplicating(processor, key=str.lower)(["A", "a", "b"])
    assert [["A", "b"]] == processor.calls


# -- within --


class Transaction:
    """A context manager that records how each of its contexts ended."""

    def __init__(self, suppresses: bool = False) -> None:
        self.ends: list[Any] = []
        self._suppresses = suppresses

    def __enter__(self) -> None:
        self.ends.append("open")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.ends[-1] = kind
        return self._suppresses


def test_the_context_of_within_is_open_until_the_last_result() -> None:
    transaction = Transaction()
    process = within(lambda jobs: (list(transaction.ends) for _ in jobs), lambda: transaction)
    assert [["open"], ["open"]] == process([1, 2])
    assert [[None, "open"]] == process([3])
    assert [None, None] == transaction.ends


@pytest.mark.parametrize("how", ["raises", "yields"])
@pytest.mark.parametrize("suppresses", [False, True], ids=["passes on", "suppresses"])
def test_an_exception_leaves_through_the_context_of_within_and_fails_all_jobs(how: str, suppresses: bool) -> None:
    transaction = Transaction(suppresses)
    with pytest.raises(ValueError, match="2"):
        within(Recording(how, 2), lambda: transaction)([1, 2, 3])
    assert [ValueError] == transaction.ends


def test_an_exception_after_the_last_result_leaves_through_the_context_of_within_too() -> None:
    def processor(jobs: list[int]) -> Iterator[int]:
        yield from jobs
        raise ValueError("the rows are not written")

    transaction = Transaction()
    with pytest.raises(ValueError, match="not written"):
        within(processor, lambda: transaction)([1, 2])
    assert [ValueError] == transaction.ends


def test_a_context_that_suppresses_a_keyboard_interrupt_gives_a_runtime_error() -> None:
    def processor(jobs: list[Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="the context suppressed an exception of the processor"):
        within(processor, lambda: suppress(KeyboardInterrupt))([1])


def test_exceptions_as_results_do_not_reach_the_context_of_within() -> None:
    transaction = Transaction()
    assert [2, "ValueError 2"] == plain(within(Recording("returns", 2), lambda: transaction)([1, 2]))
    assert [None] == transaction.ends


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_within_passes_the_value_of_its_context_through_other_wrappers(wrap: Any) -> None:
    def processor(jobs: list[int], connection: str) -> list[str]:
        return [f"{job} by {connection}" for job in jobs]

    process: Any = within(wrap(processor), lambda: nullcontext("a connection"), pass_value=True)
    assert ["1 by a connection", "2 by a connection"] == process([1, 2])


def test_within_passes_the_value_of_its_context_to_a_lookup() -> None:
    def fetch(keys: list[int], connection: str) -> dict[int, str]:
        return {key: f"{key} by {connection}" for key in keys}

    process = within(by_key(fetch), lambda: nullcontext("a connection"), pass_value=True)
    assert ["2 by a connection", "1 by a connection"] == process([2, 1])


# -- combinations --

jobs = st.lists(st.integers(0, 5), max_size=12)
bad = st.frozensets(st.integers(0, 5))
wrappers = st.lists(st.sampled_from(list(WRAPPERS.values())), min_size=1, max_size=4)


@given(jobs=jobs, bad=bad, how=st.sampled_from(["raises", "returns", "yields"]), wrappers=wrappers)
def test_any_combination_of_wrappers_gives_each_job_one_outcome_of_its_own(
    jobs: list[int], bad: Any, how: str, wrappers: Any
) -> None:
    processor: Processor = Recording(how, *bad)
    for wrap in wrappers:
        processor = wrap(processor)
    alone = [f"ValueError {job}" if job in bad else job * 2 for job in jobs]
    outcomes = plain(outcomes_of(processor, jobs))
    if bisecting in wrappers or how == "returns":
        assert alone == outcomes
    else:  # the jobs after a bad job failed with it
        assert all(expected == outcome or outcome in alone for expected, outcome in zip(alone, outcomes))


words = st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=8)
options = st.sampled_from(
    [
        *WRAPPERS.values(),
        lambda processor: bisecting(processor, unless=()),
        lambda processor: retrying_once(processor, retry=retry_if_exception_type()),
    ]
)


@given(jobs=words, wrappers=st.lists(options, min_size=1, max_size=4))
def test_no_combination_of_wrappers_gives_a_job_the_value_of_another_if_results_are_missing(
    jobs: list[str], wrappers: Any
) -> None:
    processor: Processor = skipping
    for wrap in wrappers:
        processor = wrap(processor)
    for job, outcome in zip(jobs, outcomes_of(processor, jobs)):
        assert outcome == job.upper() != "" or isinstance(outcome, ResultCountError)


def test_wrapped_processors_can_be_pickled() -> None:
    processor = within(deduplicating(bisecting(retrying_once(sorted)), key=str), nullcontext)
    assert [1, 2] == pickle.loads(pickle.dumps(processor))([2, 1])

    assert ["ada", "KeyError 7"] == plain(pickle.loads(pickle.dumps(by_key(names)))([1, 7]))


def names(ids: list[int]) -> dict[int, str]:
    return {1: "ada"}


def test_with_wrappers_in_a_batcher_each_caller_gets_the_outcome_of_its_own_job() -> None:
    processor = retrying_once(bisecting(deduplicating(Recording("raises", "bad"))))
    with Batcher[Any, Any](processor, Size(5)) as batcher:
        futures = [batcher.submit(job) for job in ("a", "bad", "b", "bad", "a")]
    errors = [future.exception() for future in futures]
    assert [None, "bad", None, "bad", None] == [error and str(error) for error in errors]
    assert ["aa", "bb", "aa"] == [future.result().value for future in futures if not future.exception()]
    assert errors[1] is not errors[3]
