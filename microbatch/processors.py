"""Wrappers for processors. Each takes a processor and returns one, so you can combine them, and try them with a list.

>>> def insert(rows):
...     if "poison" in rows:
...         raise ValueError("a bad row")
...     return [f"id of {row}" for row in rows]
>>> bisecting(insert)(["Ada", "poison", "Grace"])
['id of Ada', ValueError('a bad row'), 'id of Grace']

A wrapped processor returns one outcome per job, in order: its value, or the exception that it failed with. If all jobs
of the batch fail with the same exception, it raises that exception.

The processor that you pass in may return and raise the same as one of a `Batcher`: an iterable of results, None for all
jobs, and exceptions in place of results. If an iterable ends early, all jobs of that call fail with `ResultCountError`,
because nothing tells which jobs the missing results belong to. Exceptions that do not derive from `Exception`, such as
`KeyboardInterrupt`, pass through.

A wrapped processor can be pickled, for an executor with processes, if everything that you passed to the wrapper can be
pickled.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar, overload

from microbatch._basics.arguments import check_callable, check_count, shown
from microbatch._basics.returned import exhaust, results_of
from microbatch.errors import ResultCountError

__all__ = ["bisecting", "deduplicating", "retrying", "within"]

Job = TypeVar("Job")
Value = TypeVar("Value")

Processor = Callable[[list[Any]], Any]
_WithResults = Callable[[list[Job]], Iterable[Value | BaseException]]
_WithoutResults = Callable[[list[Job]], None]
_Wrapped = Callable[[list[Job]], list[Value]]
_Key = Callable[[Job], Hashable]
_Context = Callable[[], AbstractContextManager[Any]]
_Kinds = type[Exception] | tuple[type[Exception], ...]

_NOT_THE_JOBS: _Kinds = (OSError, ResultCountError)
"""Exceptions that no single job causes."""


class _CallResult(NamedTuple):
    """What one call of a processor returned or raised."""

    values: list[Any]
    """The results of the first jobs, or of all jobs if the processor raised nothing."""
    error: Exception | None
    """The exception that the processor raised for the other jobs."""

    def outcomes(self, count: int) -> list[Any]:
        """Return one outcome for each of *count* jobs."""
        return self.values + [self.error] * (count - len(self.values))


def _call(processor: Processor, jobs: Sequence[Any]) -> _CallResult:
    values: list[Any] = []
    try:
        returned = processor(list(jobs))
        results = [None] * len(jobs) if returned is None else results_of(returned)
        values.extend(results if isinstance(results, list) else islice(results, len(jobs)))
        if len(values) != len(jobs):  # any job may be the one without a result, so none of the values can be trusted
            return _CallResult([], ResultCountError(len(jobs), len(values)))
        if not isinstance(results, list):
            exhaust(results, len(jobs), "a batch")
    except Exception as error:
        return _CallResult(values, error)
    return _CallResult(values, None)


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
    processor: _WithResults[Job, Value], *, stop: Any, wait: Any, retry: Any = None
) -> _Wrapped[Job, Value]: ...


@overload
def retrying(processor: _WithoutResults[Job], *, stop: Any, wait: Any, retry: Any = None) -> _Wrapped[Job, None]: ...


def retrying(processor: Processor, *, stop: Any, wait: Any, retry: Any = None) -> _Wrapped[Any, Any]:
    """Return a processor that calls *processor* again with only the jobs that failed, as long as `tenacity` allows.

    A job may be processed more than once: if the downstream has processed it but could not confirm that, it processes
    it again. So make the downstream idempotent. The pauses block the thread that runs the batch, so `Batcher.shutdown`
    waits for them too.

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
            again. The strategy is called for each failed job. Its argument always has the state of a first attempt. If
            it raises an exception, the failed jobs fail with that.

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


def _retried(processor: Processor, stop: Any, wait: Any, again: Any, jobs: list[Any]) -> list[Any]:
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
        for place, outcome in zip(left, _call(processor, [jobs[place] for place in left]).outcomes(len(left))):
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
    processor: _WithResults[Job, Value], *, on: _Kinds = Exception, unless: _Kinds = _NOT_THE_JOBS, max_calls: int = 100
) -> _Wrapped[Job, Value]: ...


@overload
def bisecting(
    processor: _WithoutResults[Job], *, on: _Kinds = Exception, unless: _Kinds = _NOT_THE_JOBS, max_calls: int = 100
) -> _Wrapped[Job, None]: ...


def bisecting(
    processor: Processor, *, on: _Kinds = Exception, unless: _Kinds = _NOT_THE_JOBS, max_calls: int = 100
) -> _Wrapped[Any, Any]:
    """Return a processor that finds the bad jobs of a batch that fails, so that only these jobs fail.

    If a call raises, it calls *processor* again with each half of the jobs that got the exception, and splits these
    halves again, until each bad job is alone. A single bad job among *n* takes about 2 log2 *n* more calls.

    A job may be processed more than once if a call processes some of its jobs before it raises. So use this with calls
    that process either all of their jobs or none, as in a transaction, or with an idempotent downstream.

    Args:
        processor: The processor to wrap.
        on: The classes of exceptions for which to split.
        unless: The classes of exceptions for which never to split, because no single job causes them. The default
            covers a downstream that can't be reached, and a wrong number of results. If your client library has
            exceptions of its own for such errors, pass them too.
        max_calls: The maximum number of calls for one batch. After that, jobs that are not separated yet all fail with
            the exception that they share.
    """
    check_callable("processor", processor)
    max_calls = check_count("max_calls", max_calls)
    on, unless = _kinds("on", on), _kinds("unless", unless)

    return partial(_bisected, processor, on, unless, max_calls)


def _bisected(processor: Processor, on: _Kinds, unless: _Kinds, max_calls: int, jobs: list[Any]) -> list[Any]:
    outcomes: list[Any] = [None] * len(jobs)
    parts = [list(range(len(jobs)))] if jobs else []
    for _ in range(max_calls):
        if not parts:
            break
        part = parts.pop(0)
        for place, outcome in zip(part, _call(processor, [jobs[place] for place in part]).outcomes(len(part))):
            outcomes[place] = outcome
        blamed: dict[int, list[int]] = {}
        for place in part:
            if _is(outcomes[place], on) and not _is(outcomes[place], unless):
                blamed.setdefault(id(outcomes[place]), []).append(place)
        for places in blamed.values():
            middle = len(places) // 2
            parts += [places[:middle], places[middle:]] if middle else []
    return _raise_for_all(outcomes)


@overload
def deduplicating(processor: _WithResults[Job, Value], key: _Key[Job] | None = None) -> _Wrapped[Job, Value]: ...


@overload
def deduplicating(processor: _WithoutResults[Job], key: _Key[Job] | None = None) -> _Wrapped[Job, None]: ...


def deduplicating(processor: Processor, key: _Key[Any] | None = None) -> _Wrapped[Any, Any]:
    """Return a processor that calls *processor* without duplicates, and gives equal jobs the same outcome.

    >>> calls = []
    >>> deduplicating(lambda words: calls.append(words) or [word.upper() for word in words])(["b", "a", "b"])
    ['B', 'A', 'B']
    >>> calls
    [['b', 'a']]

    Args:
        processor: The processor to wrap. It gets only the first of several equal jobs. All of them share its result
            object.
        key: Returns a hashable value for a job. Jobs with equal values are equal. By default, the jobs themselves are
            compared, and must be hashable.
    """
    check_callable("processor", processor)
    if key is not None:
        check_callable("key", key)

    return partial(_deduplicated, processor, key)


def _deduplicated(processor: Processor, key: _Key[Any] | None, jobs: list[Any]) -> list[Any]:
    kinds = [key(job) for job in jobs] if key is not None else jobs
    firsts: dict[Hashable, int] = {}
    for place, kind in enumerate(kinds):
        firsts.setdefault(kind, place)
    result = _call(processor, [jobs[place] for place in firsts.values()]) if jobs else _CallResult([], None)
    outcome_of = dict(zip(firsts, result.outcomes(len(firsts))))
    return _raise_for_all([outcome_of[kind] for kind in kinds])


@overload
def within(processor: _WithResults[Job, Value], context: _Context) -> _Wrapped[Job, Value]: ...


@overload
def within(processor: _WithoutResults[Job], context: _Context) -> _Wrapped[Job, None]: ...


def within(processor: Processor, context: _Context) -> _Wrapped[Any, Any]:
    """Return a processor that calls *processor* inside a new context for each batch, such as a transaction.

    If the processor returns an iterable, all results are read before the context ends.

    If the processor raises an exception, it passes through the context, and all jobs of the batch fail with it. So do
    jobs that have a result already, because the context may have rolled back their work.

    >>> import contextlib
    >>> @contextlib.contextmanager
    ... def transaction():
    ...     print("begin")
    ...     yield
    ...     print("commit")
    >>> within(lambda rows: (row.upper() for row in rows), transaction)(["ada", "grace"])
    begin
    commit
    ['ADA', 'GRACE']

    Args:
        processor: The processor to wrap.
        context: Returns a new context manager for each batch, such as ``app.app_context`` in Flask or
            ``transaction.atomic`` in Django.
    """
    check_callable("processor", processor)
    check_callable("context", context)

    return partial(_within, processor, context)


def _within(processor: Processor, context: _Context, jobs: list[Any]) -> list[Any]:
    if not jobs:
        return []
    suppressed = "the context suppressed an exception of the processor that is not a subclass of Exception"
    result = _CallResult([], RuntimeError(suppressed))
    with context():
        result = _call(processor, jobs)
        if result.error is not None:
            raise result.error
    if result.error is not None:  # the context suppressed it
        raise result.error
    return result.values


def _kinds(name: str, value: Any) -> tuple[type[Exception], ...]:
    kinds: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        raise TypeError(f"{name} must be a class of exceptions, or a tuple of them, got {shown(value)}")
    return kinds
