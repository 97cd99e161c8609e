"""Taking apart what a processor gives back."""

import inspect
import logging
from collections import UserString
from collections.abc import Iterable, Iterator, Mapping, Set, Sized
from typing import Any

from microbatch._log import report

__all__ = ["as_iterator", "exhaust", "is_whole"]

# Iterable, but not one result per job in order: never taken apart.
_REFUSED = (str, UserString, bytes, bytearray, memoryview, Mapping, Set)


def is_whole(returned: Any) -> bool:
    """Return whether all results are there at once, so that their number is known."""
    # The usual case first, since the other asks many abstract classes.
    return type(returned) is list or isinstance(returned, Sized) and not isinstance(returned, _REFUSED)


def as_iterator(returned: Any) -> Iterator[Any]:
    """Return the results one by one.

    Raises:
        TypeError: it is nothing that has one result per job, in order.
    """
    if inspect.iscoroutine(returned):
        returned.close()
    if isinstance(returned, _REFUSED) or not isinstance(returned, Iterable) and not _is_sequence(returned):
        kind = type(returned).__name__
        raise TypeError(f"the processor must return one result per job in order, or None, got {kind}")
    return iter(returned)


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


def _is_sequence(returned: Any) -> bool:
    return hasattr(returned, "__getitem__")  # iterable the old way, which Iterable does not know
