"""Taking apart what a processor gives back."""

import logging
from collections import UserString
from collections.abc import Coroutine, ItemsView, Iterator, KeysView, Mapping, Set
from concurrent.futures import Future
from inspect import isawaitable
from itertools import islice
from types import FunctionType, MemberDescriptorType
from typing import Any

from microbatch._basics.log import report

__all__ = ["exhaust", "results_of"]

_ONE_VALUE = (str, UserString, bytes, bytearray, memoryview)
_VIEWS = (KeysView, ItemsView)  # sets too, but in the order of their dict


def results_of(returned: Any) -> list[Any] | Iterator[Any]:
    """Return the results: in a list if all of them are there at once, so that their number is known; else one by one.

    Whatever Python iterates over is accepted, since it gives one result per job in order: lists, tuples, arrays (along
    their first axis), series, deques, ranges, views of a dict, generators, iterable classes of the user's own.

    The following iterate over something other than results, so they are refused, and never taken apart:

    * Coroutines, futures and tasks, which have to be waited for.
    * Text, bytes and zero-dimensional arrays, which are one value. Sets, which have no order.
    * Mappings, classes with their methods, named tuples, rows, models, and objects whose items turn out to be their own
      attributes, which hold values by name.
    * Tables, which iterate over columns, and responses of HTTP clients, which iterate over chunks of bytes.
    * Anything that yields more or fewer items than its length.

    Classes of other libraries are recognised by what they define, so that nothing is imported. Names are looked up in
    the class, because objects may answer to any name.

    Raises:
        TypeError: it is refused. The message says why, and what to return instead.
    """
    if type(returned) is list:
        return list(returned)  # a copy, since the processor may still have the other
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
        raise _refusal(returned, f"whose length is {length} but which yields {given}: {_A_LIST}")
    return values


def exhaust(values: Iterator[Any], count: int, batch: str) -> None:
    """Let *values*, which has given all results, come to its end, and log whatever else it does. Never raises."""
    # Every job has its result, so all that is left to do with an error is to report it.
    try:
        next(values)
    except StopIteration:
        return
    except BaseException:
        report("the processor raised after its last result, in %s", batch)
        return
    report("the processor gave more than %d results for %s", count, batch, level=logging.WARNING)


def _refusal(returned: Any, flaw: str) -> TypeError:
    kind = type(returned).__name__
    return TypeError(f"the processor must return one result per job in order, or None, got {kind}, {flaw}")


_A_LIST = "return a list with one value per job"
_BY_NAME = f"which holds values by name: {_A_LIST}"


def _flaw(returned: Any) -> str | None:
    """Return why *returned* is refused, and what to return instead; None if it may be iterated over."""
    kind = type(returned)
    if isinstance(returned, Coroutine):
        returned.close()  # or Python warns that it was never awaited
    if isinstance(returned, Future) or isawaitable(returned):
        return "which has to be waited for: return its result"
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
        return f"which can't be iterated over: {_A_LIST}"
    return None


def _defined(kind: type, name: str) -> Any:
    """Return what a class, or one of its bases, defines under *name*; None if there is nothing."""
    for base in kind.__mro__:  # a loop, which takes a third of the time of a generator: this is asked for each batch
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
    # Results of queries may know their columns too, but iterate over rows.
    return any(_defined(kind, name) is not None for name in ("dtypes", "schema", "shape", "num_rows"))


def _looks_like_a_mapping(returned: Any) -> bool:
    kind = type(returned)
    if _defined(kind, "keys") is None or _defined(kind, "__getitem__") is None:
        return False
    return bool(_dimensions(returned) != 1)  # a series of pandas has both, and iterates over its values


def _holds_fields(kind: type) -> bool:
    if issubclass(kind, tuple) and (_defined(kind, "_fields") or _defined(kind, "n_sequence_fields")):
        return True  # made by `collections.namedtuple`, or the same in C
    module = getattr(_defined(kind, "__iter__"), "__module__", None)  # a model may have an `__iter__` of its own
    return _defined(kind, "_asdict") is not None or str(module).partition(".")[0] == "pydantic"


def _length(returned: Any) -> int | None:
    try:
        return len(returned)
    except Exception:  # it has none, or not yet: a progress bar around a generator, say
        return None


def _without_fields(returned: Any, items: Iterator[Any]) -> Iterator[Any]:
    """Yield *items*, once it is clear that they are not just the fields of *returned*, from the first to the last.

    Fields are its public attributes, and what it keeps in a dict: their names, or pairs of name and value, or the
    attributes' values.

    Raises:
        TypeError: they are.
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
    """Return the attributes of the object itself, and not of its class, by their names."""
    found: dict[str, Any] = {}
    for base in reversed(type(returned).__mro__):
        slots = [name for name, member in vars(base).items() if isinstance(member, MemberDescriptorType)]
        found.update((name, getattr(returned, name, None)) for name in slots)
    found.update(getattr(returned, "__dict__", {}))
    return found


def _same(expected: Any, item: Any) -> bool:
    """Return whether an item is the expected name, value, or pair of both. The value is not asked."""
    if item is expected:
        return True
    if type(expected) is type(item) is tuple:
        return len(expected) == len(item) and all(map(_same, expected, item))
    return type(expected) is type(item) is str and bool(expected == item)
