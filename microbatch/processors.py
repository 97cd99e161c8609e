"""Wrappers for processors. Each takes a processor and returns one, so you can combine them, and try them with a list.

>>> def insert(rows):
...     if "poison" in rows:
...         raise ValueError("a bad row")
...     return [f"id of {row}" for row in rows]
>>> bisecting(insert)(["Ada", "poison", "Grace"])
['id of Ada', ValueError('a bad row'), 'id of Grace']

A wrapped processor returns one outcome per job, in order: its value, or the exception that it failed with. If all jobs
of the batch fail with the same exception, it raises that exception.

The processor that you pass in may return and raise what the processor of a `Batcher` may: an iterable of results, None
for all jobs, and exceptions in place of results. If an iterable ends early, all jobs of that call fail with
`ResultCountError`, because it is not known which jobs the missing results belong to. Exceptions that do not derive from
`Exception`, such as `KeyboardInterrupt`, pass through.

The order matters if you combine wrappers. From the outside in, use `deduplicating`, `retrying`, `bisecting`, `within`
and `by_key`. The page on failures says why.

A wrapped processor passes further arguments on: if a wrapper around it calls it with a second argument, *processor*
gets that argument too. `within` can pass a database connection in this way.

A wrapped processor can be pickled, for an executor with processes, if everything that you passed to the wrapper can be
pickled.
"""

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, NamedTuple, NoReturn, ParamSpec, TypeVar, overload

from microbatch._basics.arguments import check_callable, check_count, check_flag, check_number, check_positive, shown
from microbatch._basics.returned import ResultAt, exhaust, expect_end, numbered, results_of
from microbatch.errors import ResultCountError

__all__ = ["bisecting", "by_key", "by_length", "deduplicating", "retrying", "within"]

Job = TypeVar("Job")
Value = TypeVar("Value")
Key = TypeVar("Key", bound=Hashable)
Resource = TypeVar("Resource")
More = ParamSpec("More")  # what a processor takes besides the jobs: see `within`

Processor = Callable[..., Any]
_WithResults = Callable[Concatenate[list[Job], More], Iterable[Value | BaseException]]
_WithoutResults = Callable[Concatenate[list[Job], More], None]
_Wrapped = Callable[Concatenate[list[Job], More], list[Value]]
_Key = Callable[[Job], Hashable]
_Context = Callable[[], AbstractContextManager[Resource]]
_Kinds = type[Exception] | tuple[type[Exception], ...]

if TYPE_CHECKING:
    import typing_extensions

    Default = typing_extensions.TypeVar("Default", default=NoReturn)

    class _Lookup(Generic[Job, More, Value]):
        """The processor that `by_key` returns. With a `Callable`, mypy would take *row_key* for a wrong argument if
        another wrapper is around it, because it would infer the type of a row from that wrapper."""

        def __call__(self, jobs: list[Job], /, *more: More.args, **named: More.kwargs) -> list[Value]: ...

else:
    Default = TypeVar("Default")

_NOT_THE_JOBS: _Kinds = (OSError, ResultCountError)
"""Exceptions that no single job causes."""


class _CallResult(NamedTuple):
    """What one call of a processor returned or raised."""

    outcomes: list[Any]
    """One outcome for each job."""
    error: Exception | None
    """The exception that the processor raised."""


def _call(
    processor: Processor, jobs: Sequence[Any], *more: Any, finish: Callable[[Iterator[Any], int, str], None] = exhaust
) -> _CallResult:
    outcomes: dict[int, Any] = {}
    try:
        returned = processor(list(jobs), *more)
        results = [None] * len(jobs) if returned is None else results_of(returned)
        if isinstance(results, list) and len(results) != len(jobs):
            raise ResultCountError(len(jobs), len(results))
        outcomes.update(numbered(results, len(jobs)))
        if len(outcomes) < len(jobs):  # any job may be the one without a result, so none of the values can be trusted
            number = len(outcomes)
            outcomes.clear()
            raise ResultCountError(len(jobs), number)
        if not isinstance(results, list):
            finish(results, len(jobs), "a batch")
    except Exception as error:
        return _CallResult([outcomes.get(index, error) for index in range(len(jobs))], error)
    return _CallResult([outcomes[index] for index in range(len(jobs))], None)


def _is(outcome: Any, kinds: _Kinds) -> bool:
    return issubclass(type(outcome), kinds)  # not `isinstance`, which a value can deceive with a `__class__` of its own


def _raise_for_all(outcomes: list[Any]) -> list[Any]:
    """Return the outcomes, or raise the exception if all jobs failed with the same one."""
    first: Any = outcomes[0] if outcomes else None
    if _is(first, Exception) and all(outcome is first for outcome in outcomes):
        raise first
    return outcomes


@overload
def retrying(
    processor: _WithResults[Job, More, Value], *, stop: Any, wait: Any, retry: Any = None
) -> _Wrapped[Job, More, Value]: ...


@overload
def retrying(
    processor: _WithoutResults[Job, More], *, stop: Any, wait: Any, retry: Any = None
) -> _Wrapped[Job, More, None]: ...


def retrying(processor: Processor, *, stop: Any, wait: Any, retry: Any = None) -> Processor:
    """Return a processor that calls *processor* again with only the jobs that failed, as long as `tenacity` allows.

    A job may be processed more than once: if the downstream has processed a job but could not confirm that, the retry
    makes it process the job again. So make the downstream idempotent. The pauses block the thread that runs the batch,
    so `Batcher.shutdown` waits for them too.

    >>> from tenacity import retry_if_exception_type, stop_after_attempt, wait_none
    >>> calls = []
    >>> def flaky(jobs):
    ...     calls.append(jobs)
    ...     return [ConnectionError() if job == "b" and len(calls) < 3 else job for job in jobs]
    >>> retrying(flaky, stop=stop_after_attempt(5), wait=wait_none())(["a", "b", "c"])
    ['a', 'b', 'c']
    >>> calls
    [['a', 'b', 'c'], ['b'], ['b']]

    Args:
        processor: The processor to wrap.
        stop: When to give up, such as ``tenacity.stop_after_attempt(5)``. The outcome of a job is then its last
            exception.
        wait: How long to wait before each further attempt, such as ``tenacity.wait_random_exponential(max=10)``.
        retry: Which exceptions to retry, such as ``tenacity.retry_if_exception_type(ConnectionError)``. The default is
            all except `ResultCountError`, because a processor that returns the wrong number of results would do so
            again. *retry* is called for each failed job, and its argument always describes a first attempt. If *retry*
            raises an exception, the failed jobs fail with that exception.

    Raises:
        ImportError: ``tenacity`` is not installed. The extra ``retry`` installs it.
    """
    import tenacity

    again = tenacity.retry_if_not_exception_type(ResultCountError) if retry is None else retry
    check_callable("processor", processor)
    for name, argument in (("stop", stop), ("wait", wait), ("retry", again)):
        check_callable(name, argument)
        if isinstance(argument, type):  # a class is callable too, but is no strategy
            raise TypeError(f"{name} must be a strategy of tenacity, got {shown(argument)}: pass an instance")

    return partial(_retried, processor, stop, wait, again)


def _retried(processor: Processor, stop: Any, wait: Any, again: Any, jobs: list[Any], *more: Any) -> list[Any]:
    import tenacity

    outcomes: list[Any] = [None] * len(jobs)
    left = list(range(len(jobs)))
    attempts = tenacity.Retrying(
        stop=stop,
        wait=wait,
        # Retries the failures of jobs, but not an exception that a strategy raised.
        retry=lambda state: bool(left) and _error_of(state) is outcomes[left[0]],
        retry_error_callback=lambda state: None,
    )

    def is_worth_it(error: Exception) -> bool:
        state = tenacity.RetryCallState(attempts, None, (), {})
        state.set_exception((type(error), error, error.__traceback__))
        return bool(again(state))

    def attempt() -> None:
        for place, outcome in zip(left, _call(processor, [jobs[place] for place in left], *more).outcomes):
            outcomes[place] = outcome
        left[:] = [place for place in left if _is(outcomes[place], Exception)]
        left[:] = [place for place in left if is_worth_it(outcomes[place])]
        if left:
            raise outcomes[left[0]]

    try:
        if jobs:
            attempts(attempt)
    except Exception as error:  # raised by a strategy
        for place in left:
            outcomes[place] = error
    return _raise_for_all(outcomes)


def _error_of(attempt: Any) -> BaseException | None:
    error: BaseException | None = attempt.outcome.exception()
    return error


@overload
def bisecting(
    processor: _WithResults[Job, More, Value],
    *,
    on: _Kinds | None = None,
    unless: _Kinds = _NOT_THE_JOBS,
    max_calls: int = 100,
) -> _Wrapped[Job, More, Value]: ...


@overload
def bisecting(
    processor: _WithoutResults[Job, More],
    *,
    on: _Kinds | None = None,
    unless: _Kinds = _NOT_THE_JOBS,
    max_calls: int = 100,
) -> _Wrapped[Job, More, None]: ...


def bisecting(
    processor: Processor, *, on: _Kinds | None = None, unless: _Kinds = _NOT_THE_JOBS, max_calls: int = 100
) -> Processor:
    """Return a processor that finds the bad jobs of a batch that fails, so that only these jobs fail.

    If a call of *processor* raises, the returned processor calls it again with each half of the jobs that got the
    exception, and splits these halves again, until each bad job is alone. A single bad job among *n* takes about 2 log2
    *n* more calls.

    A job may be processed more than once if a call processes some of its jobs before it raises. So use this with calls
    that process either all of their jobs or none, as in a transaction, or with an idempotent downstream.

    Args:
        processor: The processor to wrap.
        on: The classes of exceptions for which single jobs can be to blame, such as ``psycopg.IntegrityError``. By
            default, these are all classes. In that case, the returned processor gives up on a batch of more than 16
            jobs after seven calls if the whole batch, both halves and their halves all fail with the same class,
            because the downstream is probably the cause.
        unless: The classes of exceptions for which a batch is never split, because no single job causes them. The
            default covers a downstream that can't be reached, and a wrong number of results. If your client library has
            exceptions of its own for such errors, pass them too.
        max_calls: The maximum number of calls for one batch. After that, jobs that are not separated yet all fail with
            the exception that they share.
    """
    check_callable("processor", processor)
    max_calls = check_count("max_calls", max_calls)
    named = None if on is None else _kinds("on", on)

    return partial(_bisected, processor, named, _kinds("unless", unless), max_calls)


_HOPELESS = 7
"""The number of calls after which `bisecting` may give up: for the batch, its halves and their halves."""

_SMALL = 16
"""The largest batch for which it does not give up: its jobs take at most 31 calls."""


def _is_hopeless(failures: list[Exception | None]) -> bool:
    kinds = set(map(type, failures))
    return len(failures) == _HOPELESS and len(kinds) == 1 and type(None) not in kinds


def _bisected(
    processor: Processor, named: _Kinds | None, unless: _Kinds, max_calls: int, jobs: list[Any], *more: Any
) -> list[Any]:
    on = Exception if named is None else named
    outcomes: list[Any] = [None] * len(jobs)
    parts = [list(range(len(jobs)))] if jobs else []
    failures: list[Exception | None] = []  # the exception of each call that failed as a whole
    for _ in range(max_calls):
        if not parts or (named is None and len(jobs) > _SMALL and _is_hopeless(failures)):
            break
        part = parts.pop(0)
        result = _call(processor, [jobs[place] for place in part], *more)
        for place, outcome in zip(part, result.outcomes):
            outcomes[place] = outcome
        failures.append(result.error if all(outcome is result.error for outcome in result.outcomes) else None)
        blamed: dict[int, list[int]] = {}
        for place in part:
            if _is(outcomes[place], on) and not _is(outcomes[place], unless):
                blamed.setdefault(id(outcomes[place]), []).append(place)
        for places in blamed.values():
            middle = len(places) // 2
            parts += [places[:middle], places[middle:]] if middle else []
    return _raise_for_all(outcomes)


@overload
def deduplicating(
    processor: _WithResults[Job, More, Value],
    key: _Key[Job] | None = None,
    *,
    keep: Literal["first", "last"] = "first",
    merge: Callable[[Job, Job], Job] | None = None,
) -> _Wrapped[Job, More, Value]: ...


@overload
def deduplicating(
    processor: _WithoutResults[Job, More],
    key: _Key[Job] | None = None,
    *,
    keep: Literal["first", "last"] = "first",
    merge: Callable[[Job, Job], Job] | None = None,
) -> _Wrapped[Job, More, None]: ...


def deduplicating(
    processor: Processor,
    key: _Key[Any] | None = None,
    *,
    keep: Any = "first",
    merge: Callable[[Any, Any], Any] | None = None,
) -> Processor:
    """Return a processor that calls *processor* without duplicates, and gives equal jobs the same outcome.

    >>> calls = []
    >>> deduplicating(lambda words: calls.append(words) or [word.upper() for word in words])(["b", "a", "b"])
    ['B', 'A', 'B']
    >>> calls
    [['b', 'a']]

    If jobs with equal keys differ in other ways, as in an upsert, say what becomes of them. *keep* chooses one of them,
    and *merge* combines two into one. To add up counts of the same word:

    >>> def count(pairs):
    ...     print(pairs)
    >>> add = lambda a, b: (a[0], a[1] + b[1])
    >>> deduplicating(count, key=lambda pair: pair[0], merge=add)([("ada", 1), ("grace", 5), ("ada", 2)])
    [('ada', 3), ('grace', 5)]
    [None, None, None]

    Put this around other wrappers, as in ``deduplicating(bisecting(upsert), keep="last")``. Inside them, equal jobs may
    get into different calls, and `bisecting` and `by_length` may process the newest one first.

    Args:
        processor: The processor to wrap. It gets one job in place of all equal ones, and all of these share the result
            object of that job.
        key: Returns a hashable value for a job. Jobs with equal values are equal. By default, the jobs themselves are
            compared, and must be hashable.
        keep: Which of several equal jobs *processor* gets: the ``"first"``, or the ``"last"`` that was submitted. For
            writes that replace each other, use ``"last"``: otherwise the newest value is lost.
        merge: Takes two equal jobs, the older one first, and returns a new job that stands for both. It must not change
            them. With *merge*, *keep* has no effect.
    """
    check_callable("processor", processor)
    for name, function in (("key", key), ("merge", merge)):
        if function is not None:
            check_callable(name, function)
    if keep not in ("first", "last"):
        kind = ValueError if isinstance(keep, str) else TypeError
        raise kind(f"keep must be 'first' or 'last', got {shown(keep)}")

    return partial(_deduplicated, processor, key, keep, merge)


def _deduplicated(
    processor: Processor,
    key: _Key[Any] | None,
    keep: str,
    merge: Callable[[Any, Any], Any] | None,
    jobs: list[Any],
    *more: Any,
) -> list[Any]:
    kinds = [key(job) for job in jobs] if key is not None else jobs
    distinct: dict[Hashable, Any] = {}
    for kind, job in zip(kinds, jobs):
        if kind not in distinct:
            distinct[kind] = job
        elif merge is not None:
            distinct[kind] = merge(distinct[kind], job)
        elif keep == "last":
            distinct[kind] = job
    outcomes = _call(processor, list(distinct.values()), *more).outcomes if jobs else []
    outcome_of = dict(zip(distinct, outcomes))
    return _raise_for_all([outcome_of[kind] for kind in kinds])


class _Missing:
    """Stands for a default that was not passed. A class, because a process that unpickles it gets the same object."""


_MISSING: Any = _Missing


@overload
def by_key(
    fetch: Callable[Concatenate[list[Key], More], Mapping[Key, Value]],
    *,
    key: Callable[[Job], Key],
    default: Default = ...,
) -> "_Lookup[Job, More, Value | Default]": ...


@overload
def by_key(
    fetch: Callable[Concatenate[list[Key], More], Mapping[Key, Value]], *, default: Default = ...
) -> "_Lookup[Key, More, Value | Default]": ...


@overload
def by_key(
    fetch: Callable[Concatenate[list[Key], More], Iterable[Value]],
    *,
    key: Callable[[Job], Key],
    row_key: Callable[[Value], Key],
    many: Literal[False] = False,
    default: Default = ...,
) -> "_Lookup[Job, More, Value | Default]": ...


@overload
def by_key(
    fetch: Callable[Concatenate[list[Key], More], Iterable[Value]],
    *,
    row_key: Callable[[Value], Key],
    many: Literal[False] = False,
    default: Default = ...,
) -> "_Lookup[Key, More, Value | Default]": ...


@overload
def by_key(
    fetch: Callable[Concatenate[list[Key], More], Iterable[Value]],
    *,
    key: Callable[[Job], Key],
    row_key: Callable[[Value], Key],
    many: Literal[True],
) -> "_Lookup[Job, More, list[Value]]": ...


@overload
def by_key(
    fetch: Callable[Concatenate[list[Key], More], Iterable[Value]],
    *,
    row_key: Callable[[Value], Key],
    many: Literal[True],
) -> "_Lookup[Key, More, list[Value]]": ...


def by_key(
    fetch: Processor,
    *,
    key: Callable[[Any], Any] | None = None,
    row_key: Callable[[Any], Any] | None = None,
    many: bool = False,
    default: Any = _MISSING,
) -> Processor:
    """Return a processor that looks up all jobs of a batch at once, and gives each job the value of its own key.

    A database returns rows in any order, and no row for a missing key. So the rows of a query must never be returned as
    they come: pass the query to this function. Data loaders call this batch loading.

    >>> def fetch(ids):
    ...     return {id: f"user {id}" for id in sorted(ids) if id != 7}
    >>> by_key(fetch)([3, 7, 1, 3])
    ['user 3', KeyError(7), 'user 1', 'user 3']

    If *fetch* returns rows, say which key a row has:

    >>> def fetch_rows(ids):
    ...     return [(1, "ada"), (3, "grace"), (3, "hopper")]
    >>> by_key(fetch_rows, row_key=lambda row: row[0], many=True)([3, 7, 1])
    [[(3, 'grace'), (3, 'hopper')], [], [(1, 'ada')]]

    Args:
        fetch: Takes a list of distinct keys. Returns a mapping from keys to values or, if you pass *row_key*, the rows
            that it found, in any order. Keys may be missing in either.
        key: Returns the key of a job, which must be hashable. By default, the job itself is the key.
        row_key: Returns the key of a row.
        many: Whether each job gets the list of all rows with its key, which may be empty. Otherwise, there must be at
            most one row for each key. If there are more, the jobs with that key fail with `ValueError`.
        default: The value for a missing key, which all jobs share. By default, a job whose key is missing fails with
            `KeyError`.

    Raises:
        ValueError: The processor raises it if *fetch* returns a key that no job asked for. Such a key is often of
            another type than the key of the job, such as ``"7"`` and ``7``.
    """
    check_callable("fetch", fetch)
    for name, function in (("key", key), ("row_key", row_key)):
        if function is not None:
            check_callable(name, function)
    check_flag("many", many)
    if many and (row_key is None or default is not _MISSING):
        raise ValueError("many=True needs a row_key, and takes no default: a job without rows gets an empty list")

    return partial(_looked_up, fetch, key, row_key, many, default)


def _looked_up(
    fetch: Processor,
    key: Callable[[Any], Any] | None,
    row_key: Callable[[Any], Any] | None,
    many: bool,
    default: Any,
    jobs: list[Any],
    *more: Any,
) -> list[Any]:
    keys = [key(job) for job in jobs] if key is not None else jobs
    distinct = dict.fromkeys(keys)
    if not jobs:
        return []
    found = fetch(list(distinct), *more)
    rows: Mapping[Any, Any] = found if row_key is None else _grouped(found, row_key)
    if not isinstance(rows, Mapping):
        raise TypeError(f"fetch must return a mapping from keys to values, or rows with row_key, got {shown(rows)}")
    if unknown := [each for each in rows if each not in distinct]:
        raise ValueError(f"fetch must return only keys that it was called with, got {shown(unknown[0])}")
    if many:
        return [list(rows.get(each, ())) for each in keys]
    single = row_key is None
    return [_value_of(each, rows, single, default) for each in keys]


def _grouped(rows: Any, row_key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    if rows is None or isinstance(rows, (Mapping, str, bytes)):  # iterates over its keys, not over rows
        raise TypeError(f"fetch must return an iterable of rows, because of row_key, got {shown(rows)}")
    groups: dict[Any, list[Any]] = {}
    try:
        for row in rows:
            groups.setdefault(row_key(row), []).append(row)
    finally:
        if isinstance(rows, Generator):
            rows.close()  # if row_key has raised: the generator may hold a connection, and the traceback keeps it alive
    return groups


def _value_of(key: Any, rows: Mapping[Any, Any], single: bool, default: Any) -> Any:
    found = rows.get(key, _MISSING)
    if found is _MISSING:
        return KeyError(key) if default is _MISSING else default
    if single:
        return found
    return found[0] if len(found) == 1 else ValueError(f"{len(found)} rows have the key {shown(key)}: pass many=True")


def by_length(
    processor: _WithResults[Job, More, Value],
    budget: float,
    length: Callable[[Job], float] = len,  # type: ignore[assignment]
) -> Callable[Concatenate[list[Job], More], Iterable[Value]]:
    """Return a processor that calls *processor* with parts of the batch whose jobs have similar lengths.

    It is for models that pad all inputs of a call to the longest one, so that a short input costs as much as a long one
    beside it. It sorts the jobs by length, and calls *processor* with as many at a time as fit into *budget*: their
    number times the length of the longest is at most *budget*. Each part is settled when it is done, the shortest
    inputs first.

    The calls happen while the batcher reads the results, as with a generator. So if you pass an executor that uses
    threads to the batcher, your processor must read the results itself: ``lambda texts: list(process(texts))``.

    >>> calls = []
    >>> def embed(texts):
    ...     calls.append(texts)
    ...     return [len(text) for text in texts]
    >>> results = by_length(embed, budget=12)(["a long text", "b", "ccc", "dd"])
    >>> sorted((result.index, result.value) for result in results)
    [(0, 11), (1, 1), (2, 3), (3, 2)]
    >>> calls
    [['b', 'dd', 'ccc'], ['a long text']]

    Args:
        processor: The processor to wrap.
        budget: The maximum of the number of jobs of a call times the length of the longest, such as a number of tokens.
            A job that is longer than that is processed alone.
        length: Returns the length of a job.
    """
    check_callable("processor", processor)
    check_callable("length", length)

    # For a type checker, a `ResultAt` is the value itself, so that other wrappers keep its type.
    process: Any = partial(_Parts, processor, check_positive("budget", budget), length)
    return process  # type: ignore[no-any-return]


class _Parts:
    """The results of `by_length`. An object and not a generator, so that a process can send it back as a list."""

    def __init__(
        self, processor: Processor, budget: float, length: Callable[[Any], float], jobs: list[Any], *more: Any
    ) -> None:
        self._results = _by_length(processor, budget, length, jobs, more)

    def __iter__(self) -> Iterator[ResultAt[Any]]:
        return self._results

    def __reduce__(self) -> Any:
        results = list(self._results)
        self._results = iter(results)  # some executors pickle a value twice
        return list, (results,)


def _by_length(
    processor: Processor, budget: float, length: Callable[[Any], float], jobs: list[Any], more: tuple[Any, ...]
) -> Iterator[ResultAt[Any]]:
    lengths = [check_number("the length of a job", length(job)) for job in jobs]
    left = sorted(range(len(jobs)), key=lengths.__getitem__)
    while left:
        count = 1
        while count < len(left) and (count + 1) * lengths[left[count]] <= budget:
            count += 1
        part, left = left[:count], left[count:]
        for place, outcome in zip(part, _call(processor, [jobs[place] for place in part], *more).outcomes):
            yield ResultAt(place, outcome)


@overload
def within(
    processor: _WithResults[Job, [Resource], Value], context: _Context[Resource], *, pass_value: Literal[True]
) -> Callable[[list[Job]], list[Value]]: ...


@overload
def within(
    processor: _WithoutResults[Job, [Resource]], context: _Context[Resource], *, pass_value: Literal[True]
) -> Callable[[list[Job]], list[None]]: ...


@overload
def within(
    processor: _WithResults[Job, More, Value], context: _Context[Any], *, pass_value: Literal[False] = False
) -> _Wrapped[Job, More, Value]: ...


@overload
def within(
    processor: _WithoutResults[Job, More], context: _Context[Any], *, pass_value: Literal[False] = False
) -> _Wrapped[Job, More, None]: ...


def within(processor: Processor, context: _Context[Any], *, pass_value: bool = False) -> Processor:
    """Return a processor that calls *processor* inside a new context for each batch, such as a transaction.

    If the processor returns an iterable, all results are read before the context ends.

    If the processor raises an exception, even after its last result, the exception passes through the context, and all
    jobs of the batch fail with it. This includes jobs that have a result already, because the context may have rolled
    back their work.

    >>> import contextlib
    >>> @contextlib.contextmanager
    ... def transaction():
    ...     print("begin")
    ...     yield "a connection"
    ...     print("commit")
    >>> within(lambda rows: (row.upper() for row in rows), transaction)(["ada", "grace"])
    begin
    commit
    ['ADA', 'GRACE']

    If the processor needs the value of the context, such as a connection of a pool, it gets it as a second argument:

    >>> def insert(rows, connection):
    ...     print(f"insert {rows} by {connection}")
    >>> within(insert, transaction, pass_value=True)(["ada", "grace"])
    begin
    insert ['ada', 'grace'] by a connection
    commit
    [None, None]

    Args:
        processor: The processor to wrap.
        context: Returns a new context manager for each batch, such as ``app.app_context`` in Flask,
            ``transaction.atomic`` in Django, or ``pool.connection`` in psycopg.
        pass_value: Whether to call *processor* with the value of the context as well, which is what ``with context() as
            value`` would assign.
    """
    check_callable("processor", processor)
    check_callable("context", context)
    check_flag("pass_value", pass_value)

    return partial(_within, processor, context, pass_value)


def _within(processor: Processor, context: _Context[Any], pass_value: bool, jobs: list[Any], *more: Any) -> list[Any]:
    if not jobs:
        return []
    suppressed = "the context suppressed an exception of the processor that is not a subclass of Exception"
    result = _CallResult([], RuntimeError(suppressed))
    with context() as value:
        # What the processor raises after its last result must not be committed, so it is an error of the call too.
        result = _call(processor, jobs, *((value,) if pass_value else ()), *more, finish=expect_end)
        if result.error is not None:
            raise result.error
    if result.error is not None:  # the context suppressed it
        raise result.error
    return result.outcomes


def _kinds(name: str, value: Any) -> tuple[type[Exception], ...]:
    kinds: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        raise TypeError(f"{name} must be a class of exceptions, or a tuple of them, got {shown(value)}")
    return kinds
