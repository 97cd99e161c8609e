"""Turns the return value of a processor into one result per job, or refuses it."""

import logging
from collections import UserString
from collections.abc import Awaitable, Coroutine, Generator, ItemsView, Iterable, Iterator, KeysView, Mapping, Set
from concurrent.futures import Future
from functools import partial
from itertools import islice
from operator import is_
from types import FunctionType, MemberDescriptorType
from typing import Any, Generic, NoReturn, TypeVar, final

from microbatch._basics.arguments import check_count
from microbatch._basics.log import report

__all__ = ["ResultAt", "exhaust", "expect_end", "in_order", "numbered", "results_of"]

Value = TypeVar("Value")

_ONE_VALUE = (str, UserString, bytes, bytearray, memoryview)
_VIEWS = (KeysView, ItemsView)  # subclasses of Set, but with the order of their dict


@final
class ResultAt(Generic[Value]):
    """A result with the position of its job in the batch, for processors whose results come out of order.

    A processor may return an iterable of these in any order, one for each job. If it yields them, each job is settled
    as soon as its result is yielded:

    >>> from microbatch import Batcher, ResultAt, Size
    >>> def shortest_first(words):
    ...     for index in sorted(range(len(words)), key=lambda index: len(words[index])):
    ...         yield ResultAt(index, words[index].upper())
    >>> with Batcher(shortest_first, Size(2)) as batcher:
    ...     [future.result().value for future in [batcher.submit("grace"), batcher.submit("ada")]]
    ['GRACE', 'ADA']

    Args:
        index: The position of the job in the list that the processor was called with.
        value: The result of that job, or the exception that it fails with.
    """

    __slots__ = ("index", "value")

    def __init__(self, index: int, value: "Value | BaseException") -> None:
        self.index: int = index
        self.value: Value | BaseException = value

    def __init_subclass__(cls) -> NoReturn:  # otherwise its instances would be taken for values
        raise TypeError("ResultAt can't be subclassed")

    def __repr__(self) -> str:
        return f"ResultAt({self.index!r}, {self.value!r})"


def numbered(results: Iterable[Any], count: int) -> Iterator[tuple[int, Any]]:
    """Yield each result with the index of its job, until *count* results have come or *results* has ended.

    Raises:
        TypeError: Some results are a `ResultAt`, and others are not; or an index is not an integer.
        ValueError: There is no job with the index of a `ResultAt`, or the job has a result already.
    """
    given: set[int] = set()
    for position, result in enumerate(results):
        if given or type(result) is ResultAt:
            yield _index(results, result, position, given, count), result.value
        else:
            yield position, result
        if position + 1 == count:
            return


def _index(results: Iterable[Any], result: Any, position: int, given: set[int], count: int) -> int:
    """Return the index of a `ResultAt`, and add it to *given*."""
    try:
        if type(result) is not ResultAt or len(given) != position:
            raise TypeError("the processor must return a ResultAt for each job or for none, got both")
        index = check_count("the index of a ResultAt", result.index, 0, count - 1)
        if index in given:
            raise ValueError(f"the processor must return one result per job, got two for index {index}")
    except (TypeError, ValueError):
        if isinstance(results, Generator):
            results.close()  # it may hold a connection, and the traceback refers to it
        raise
    given.add(index)
    return index


def in_order(results: list[Any]) -> list[Any]:
    """Return the results in the order of their jobs, of which there are as many.

    Raises:
        TypeError: See `numbered`.
        ValueError: See `numbered`.
    """
    if not any(map(_is_result_at, map(type, results))):
        return results
    values = dict(numbered(results, len(results)))
    return [values[index] for index in range(len(results))]


_is_result_at = partial(is_, ResultAt)


def results_of(returned: Any) -> list[Any] | Iterator[Any]:
    """Return the results as a list if their number is known, or else as an iterator.

    Most iterables are accepted, because they give one result per job, in order: lists, tuples, arrays (along their
    first axis), series, deques, ranges, views of a dict, generators, and iterable classes that the user defines.

    The following are refused, because they are not iterable, or iterate over something other than results:

    * coroutines, futures and tasks, which must be waited for
    * strings, bytes and zero-dimensional arrays, which are a single value
    * sets, which have no order
    * objects that hold values by name: mappings and classes with the methods of a mapping, named tuples, rows, models,
      and objects that iterate over their own attributes
    * tables, which iterate over columns, and responses of HTTP clients, which iterate over chunks of bytes
    * objects that yield more or fewer items than their length

    Classes of other libraries are recognized by the names that they define, so no library has to be imported. Names are
    looked up in the class, because some objects, such as mocks, have an attribute for any name.

    Raises:
        TypeError: The value is refused. The message says why, and what to return instead.
    """
    if type(returned) is list:
        return list(returned)  # a copy, because the processor may still change its list
    flaw = _flaw(returned)
    if flaw is not None:
        raise _refusal(returned, flaw)
    items: Iterator[Any] = iter(returned)
    if isinstance(_defined(type(returned), "__iter__"), FunctionType) and items is not returned:
        items = _without_fields(returned, items)
    length = _length(returned)
    if length is None:
        return items
    values = list(islice(items, length + 1))
    if len(values) != length:
        given = len(values) if len(values) < length else "more"
        raise _refusal(returned, f"which has length {length} but yields {given} items: {_A_LIST}")
    return values


def exhaust(values: Iterator[Any], count: int, batch: str) -> None:
    """Run *values*, which has yielded all results, to its end. Log what else it yields or raises. Never raises."""
    # Every job has its result already, so an exception can only be logged.
    try:
        expect_end(values, count, batch)
    except BaseException:
        report("the processor raised after its last result, in %s", batch)


def expect_end(values: Iterator[Any], count: int, batch: str) -> None:
    """Run *values*, which has yielded all results, to its end. Log what else it yields, and raise what it raises."""
    if next(values, _END) is not _END:
        report("the processor returned more than %d results for %s", count, batch, level=logging.WARNING)


def _refusal(returned: Any, flaw: str) -> TypeError:
    kind = type(returned).__name__
    return TypeError(f"the processor must return one result per job in order, or None, got {kind}, {flaw}")


_A_LIST = "return a list with one value per job"
_BY_NAME = f"which holds values by name: {_A_LIST}, or look up values by key with microbatch.processors.by_key"


def _flaw(returned: Any) -> str | None:
    """Return why *returned* is refused, and what to return instead; or None if it is accepted."""
    kind = type(returned)
    if isinstance(returned, Coroutine):
        returned.close()  # otherwise Python warns that it was never awaited
    if isinstance(returned, (Future, Awaitable)):
        return "which must be waited for: return its result"
    if isinstance(returned, _ONE_VALUE) or _dimensions(returned) == 0:
        return f"which is one value: {_A_LIST}"
    if isinstance(returned, Set) and not isinstance(returned, _VIEWS):
        return "which has no order: return a list in the order of the jobs"
    if _is_table(kind):
        return "which iterates over columns: return a list of rows, or one of the columns"
    if isinstance(returned, Mapping) or _holds_fields(kind) or _looks_like_a_mapping(returned):
        return _BY_NAME
    if _defined(kind, "iter_lines") or _defined(kind, "getheader"):  # as in requests, httpx, botocore; in http.client
        return "which iterates over chunks of its body: return a list made from its content"
    if _defined(kind, "__iter__") is None and _defined(kind, "__getitem__") is None:
        return f"which is not iterable: {_A_LIST}"
    return None


def _defined(kind: type, name: str) -> Any:
    """Return the attribute *name* that a class or one of its bases defines, or None."""
    for base in kind.__mro__:  # a loop takes a third of the time of a generator, and this runs for each batch
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def _dimensions(returned: Any) -> Any:
    return returned.ndim if _defined(type(returned), "ndim") is not None else None


def _is_table(kind: type) -> bool:
    if _defined(kind, "__dataframe__") is not None:
        return True
    columns = _defined(kind, "columns") or _defined(kind, "column_names")
    if columns is None or callable(columns):
        return False
    # The result of a query may have columns too, but iterates over rows.
    return any(_defined(kind, name) is not None for name in ("dtypes", "schema", "shape", "num_rows"))


def _looks_like_a_mapping(returned: Any) -> bool:
    kind = type(returned)
    if _defined(kind, "keys") is None or _defined(kind, "__getitem__") is None:
        return False
    return bool(_dimensions(returned) != 1)  # a series of pandas has both methods, but iterates over its values


def _holds_fields(kind: type) -> bool:
    if issubclass(kind, tuple) and (_defined(kind, "_fields") or _defined(kind, "n_sequence_fields")):
        return True  # created by `collections.namedtuple`, or its equivalent in C
    # A subclass that defines `__iter__` may iterate over anything, so it is not refused here.
    module = getattr(_defined(kind, "__iter__"), "__module__", None)
    return _defined(kind, "_asdict") is not None or str(module).partition(".")[0] == "pydantic"


def _length(returned: Any) -> int | None:
    try:
        return len(returned)
    except Exception:  # it has no length, or none yet: for example, a progress bar around a generator
        return None


def _without_fields(returned: Any, items: Iterator[Any]) -> Iterator[Any]:
    """Yield *items*, but only once it is certain that they are not just the fields of *returned*.

    Fields are the public attributes of *returned*, and the items of each dict that it has as an attribute. An object
    may iterate over the names of its fields, over pairs of name and value, or over the values of its public attributes.

    Raises:
        TypeError: All items are the fields of *returned*, in order.
    """
    attributes = _attributes(returned)
    public = {name: value for name, value in attributes.items() if not name.startswith("_")}
    fields = [public, *(value for value in attributes.values() if issubclass(type(value), dict))]
    suspects: list[Iterator[Any]] = [iter(public.values())]
    for each in fields:
        suspects += [iter(dict.keys(each)), iter(dict.items(each))]
    held: list[Any] = []
    for item in items:
        held.append(item)
        suspects = [suspect for suspect in suspects if _same(next(suspect, _END), item)]
        if not suspects:
            break
    else:
        if held and any(next(suspect, _END) is _END for suspect in suspects):
            raise _refusal(returned, _BY_NAME)
    yield from held
    yield from items


_END = object()


def _attributes(returned: Any) -> dict[str, Any]:
    """Return the attributes of the object by name, without those of its class."""
    found: dict[str, Any] = {}
    for base in reversed(type(returned).__mro__):
        slots = [name for name, member in vars(base).items() if isinstance(member, MemberDescriptorType)]
        found.update((name, getattr(returned, name, None)) for name in slots)
    found.update(getattr(returned, "__dict__", {}))
    return found


def _same(expected: Any, item: Any) -> bool:
    """Return whether an item is the expected name, value or pair. Values are compared by identity, not with ``==``."""
    if item is expected:
        return True
    if type(expected) is type(item) is tuple:
        return len(expected) == len(item) and all(map(_same, expected, item))
    return type(expected) is type(item) is str and bool(expected == item)
