"""Wrappers around a processor: callable to callable, to be composed in any order, and to be tried with a list.

>>> def insert(rows):
...     if "poison" in rows:
...         raise ValueError("a bad row")
...     return [f"id of {row}" for row in rows]
>>> bisecting(insert)(["Ada", "poison", "Grace"])
['id of Ada', ValueError('a bad row'), 'id of Grace']

Each returns one outcome per job, in order: its value, or the exception that it failed with. What a wrapped processor may
return or raise is what one of a `Batcher` may: results in any iterable, None for all, exceptions in place of results. What
is raised for all jobs of a batch, a wrapper raises too. If an iterable ends early, all jobs of that call fail with
`ResultCountError`, since nothing tells which jobs the missing results belong to. `KeyboardInterrupt` and others that do
not derive from `Exception` pass through. A wrapped processor can be pickled, for an executor of processes, if all that
it was made of can.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from microbatch._basics.arguments import check_callable, check_count, shown
from microbatch._basics.returned import exhaust, results_of
from microbatch.errors import ResultCountError

__all__ = ["bisecting", "deduplicating", "retrying", "within"]

Processor = Callable[[list[Any]], Any]
_Kinds = type[Exception] | tuple[type[Exception], ...]


class _Given(NamedTuple):
    """What a processor gave for some jobs."""

    values: list[Any]
    """Those of the first jobs; of all, if it raised nothing."""
    error: Exception | None
    """What it raised for the others."""

    def outcomes(self, count: int) -> list[Any]:
        """Return one outcome for each of *count* jobs."""
        return self.values + [self.error] * (count - len(self.values))


def _call(processor: Processor, jobs: Sequence[Any]) -> _Given:
    values: list[Any] = []
    try:
        returned = processor(list(jobs))
        if returned is None:
            return _Given([None] * len(jobs), None)
        results = results_of(returned)
        if isinstance(results, list):
            if len(results) != len(jobs):
                raise ResultCountError(len(jobs), len(results))
            return _Given(results, None)
        values.extend(islice(results, len(jobs)))
        if len(values) < len(jobs):  # nobody knows which jobs have no result, so none of the values can be trusted
            return _Given([], ResultCountError(len(jobs), len(values)))
        exhaust(results, len(jobs), "a batch")
    except Exception as error:
        return _Given(values, error)
    return _Given(values, None)


def _is(outcome: Any, kinds: _Kinds) -> bool:
    return issubclass(type(outcome), kinds)  # not `isinstance`, which asks the value, and values say what they like


def _raise_for_all(outcomes: list[Any]) -> list[Any]:
    """Return the outcomes, or raise what was raised for every one of the jobs."""
    first: Any = outcomes[0] if outcomes else None
    if _is(first, Exception) and all(outcome is first for outcome in outcomes):
        raise first
    return outcomes


def retrying(
    processor: Processor, *, stop: Any, wait: Any, retry: Any | None = None
) -> Callable[[list[Any]], list[Any]]:
    """Return *processor*, called again with those jobs only that failed, as long as `tenacity` says so.

    A job may be processed more than once: a downstream that did it, and failed to say so, does it again. The thread that
    runs the batch waits in between, so a shutdown waits too.

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
        processor: the one that fails now and then.
        stop: when to give up, as ``tenacity.stop_after_attempt(5)``; what a job failed with last is then its outcome.
        wait: for how long to wait before each attempt, as ``tenacity.wait_random_exponential(max=10)``.
        retry: which failures to retry, as ``tenacity.retry_if_exception_type(ConnectionError)``; by default all but
            `ResultCountError`, because a processor that miscounts would do so again. It is asked about each failed job,
            as if after the first attempt. If it raises, the failed jobs fail with that exception.

    Raises:
        ImportError: ``tenacity`` is not installed, which is the extra ``retry``.
    """
    import tenacity

    again = tenacity.retry_if_not_exception_type(ResultCountError) if retry is None else retry
    for name, argument in (("processor", processor), ("stop", stop), ("wait", wait), ("retry", again)):
        check_callable(name, argument)
        if name != "processor" and isinstance(argument, type):  # which can be called, and takes whatever comes
            raise TypeError(f"{name} must be a strategy, got {shown(argument)}: make an instance")

    return partial(_retried, processor, stop, wait, again)


def _retried(processor: Processor, stop: Any, wait: Any, again: Any, jobs: list[Any]) -> list[Any]:
    import tenacity

    outcomes: list[Any] = [None] * len(jobs)
    left = list(range(len(jobs)))
    attempts = tenacity.Retrying(
        stop=stop,
        wait=wait,
        retry=lambda state: bool(left) and _error_of(state) is outcomes[left[0]],  # and not what a strategy raised
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
    except Exception as error:  # of one of the strategies
        for place in left:
            outcomes[place] = error
    return _raise_for_all(outcomes)


def _error_of(attempt: Any) -> BaseException | None:
    error: BaseException | None = attempt.outcome.exception()
    return error


def bisecting(
    processor: Processor,
    *,
    on: _Kinds = Exception,
    unless: _Kinds = (OSError, ResultCountError),
    max_calls: int = 100,
) -> Callable[[list[Any]], list[Any]]:
    """Return *processor*, called for either half of the jobs that share an exception, until those to blame stand alone.

    A job may be processed more than once, if the processor did some before it raised: best where a call does all of its
    jobs or none, as in a transaction. One bad job among *n* takes about 2 log2 *n* more calls.

    Args:
        processor: the one that raises for all because of one.
        on: what to halve for.
        unless: what never to halve for, since it would fail all the same: a downstream that can't be reached, a processor
            that miscounts. Where a library has exceptions of its own for that, name them too.
        max_calls: for one batch; jobs that are not told apart by then fail with what was raised for them together.
    """
    check_callable("processor", processor)
    max_calls = check_count("max_calls", max_calls)
    on, unless = _kinds("on", on), _kinds("unless", unless)

    return partial(_bisected, processor, on, unless, max_calls)


def _bisected(processor: Processor, on: _Kinds, unless: _Kinds, max_calls: int, jobs: list[Any]) -> list[Any]:
    outcomes: list[Any] = [None] * len(jobs)
    parts = [list(range(len(jobs)))] if jobs else []
    for part in islice(_taken_out(parts), max_calls):
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


def _taken_out(parts: list[list[int]]) -> Iterator[list[int]]:
    while parts:
        yield parts.pop(0)


def deduplicating(
    processor: Processor, key: Callable[[Any], Hashable] | None = None
) -> Callable[[list[Any]], list[Any]]:
    """Return *processor*, called with one of each kind of equal jobs; all of a kind get its outcome, the same object.

    >>> calls = []
    >>> deduplicating(lambda words: calls.append(words) or [word.upper() for word in words])(["b", "a", "b"])
    ['B', 'A', 'B']
    >>> calls
    [['b', 'a']]

    Args:
        processor: the one that need not do the same twice.
        key: what makes jobs equal; by default they are compared themselves, and must be hashable.
    """
    check_callable("processor", processor)
    if key is not None:
        check_callable("key", key)

    return partial(_deduplicated, processor, key)


def _deduplicated(processor: Processor, key: Callable[[Any], Hashable] | None, jobs: list[Any]) -> list[Any]:
    kinds = [key(job) for job in jobs] if key is not None else jobs
    firsts: dict[Hashable, int] = {}
    for place, kind in enumerate(kinds):
        firsts.setdefault(kind, place)
    given = _call(processor, [jobs[place] for place in firsts.values()]) if jobs else _Given([], None)
    outcome_of = dict(zip(firsts, given.outcomes(len(firsts))))
    return _raise_for_all([outcome_of[kind] for kind in kinds])


def within(
    processor: Processor, context: Callable[[], "AbstractContextManager[Any]"]
) -> Callable[[list[Any]], list[Any]]:
    """Return *processor*, called within a context of its own for each batch, and with a generator at its end in there.

    What is raised leaves through the context, and fails all jobs of the batch, since the context may undo what was done
    for the first of them.

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
        processor: the one that needs it.
        context: gives a new one for each batch: ``app.app_context`` in Flask, ``transaction.atomic`` in Django.
    """
    check_callable("processor", processor)
    check_callable("context", context)

    return partial(_within, processor, context)


def _within(processor: Processor, context: Callable[[], "AbstractContextManager[Any]"], jobs: list[Any]) -> list[Any]:
    if not jobs:
        return []
    given = _Given([], RuntimeError("the processor was left by what is no Exception, and the context suppressed that"))
    with context():
        given = _call(processor, jobs)
        if given.error is not None:
            raise given.error
    if given.error is not None:  # which the context suppressed
        raise given.error
    return given.values


def _kinds(name: str, value: Any) -> tuple[type[Exception], ...]:
    kinds: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        raise TypeError(f"{name} must be a class of exceptions, or a tuple of them, got {shown(value)}")
    return kinds
