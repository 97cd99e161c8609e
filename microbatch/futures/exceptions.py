"""One exception for several callers: gives each of them its own, with everything that the original carries.

Callers must not share an exception object. Raising it lengthens its traceback, and what one caller changes (a note, an
item of a list in an attribute) the others would see. So each caller gets one of these:

1. A *copy*: an object of the same type, made without running ``__init__``, with the same arguments, attributes, slots
   and fields of C code. Lists, dicts, sets and the like are copied in depth, and so are other exceptions: the cause, the
   context, the members of a group, and any in an attribute. Other objects are the same in all copies.
2. A *view*, where a copy would lack a field that only C code can set (``diag`` of a psycopg2 error), or where copying a
   large container for each caller would make a failed batch cost the square of its size. It is an instance of a subclass
   that reads those fields from the original, and copies a container when somebody looks at it.
3. The original, where its type allows neither.

Nothing here compares values or asks for their text: those would run a user's code once per caller.
"""

import atexit
import functools
import os
import sys
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import islice
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, Protocol

from microbatch._basics.log import report

__all__ = ["Failures", "separate"]

_LARGE = 100
"""A container with more items is copied only for a caller that looks at it. The members of a larger group are shared,
and so is the rest of a longer chain of causes."""

_UNSET = object()
_SCALARS = (int, float, str, bytes)
_CONTAINERS = (list, dict, set, tuple, deque, bytearray, Counter, OrderedDict, defaultdict)

if sys.version_info >= (3, 11):
    _Group = BaseExceptionGroup
else:  # there is no such thing

    class _Group(BaseException):
        message: str
        exceptions: tuple[BaseException, ...]


_Memo = dict[Any, Any]  # what stands for an original, by its identity
_COUNT = "exceptions"  # the key under which a memo counts its exceptions


class Poster(Protocol):
    """What `Failures` needs of the batcher's queue."""

    closed: bool

    def is_held(self) -> bool:
        """Return whether the calling thread holds the mutex."""

    def post(self, note: Callable[[], None]) -> None:
        """Have *note* called by a thread of the batcher that does not hold the mutex."""


class Failures:
    """The failures of jobs that failed together, such as those of one batch.

    Gives each caller its own exception. Each failed future refers to this object until somebody asks for its outcome.
    So when the last such future is gone, this object goes too, and then logs once how many jobs nobody asked about.

    Args:
        what: how the log names these jobs.
        queue: the queue of their batcher.
    """

    # By the identity of the future. Empty in an object that a signal left half made.
    _unasked: dict[int, BaseException] = {}

    def __init__(self, what: str, queue: Poster) -> None:
        self._what = what
        self._queue = queue
        self._process = os.getpid()
        self._jobs: dict[int, int] = {}  # how many failed with an exception or because of it, by its identity
        self._unasked = {}
        _all_failures[id(self)] = self

    def add(self, future: object, error: BaseException) -> None:
        """Note that the job of *future* fails with *error*. With the mutex held."""
        self._unasked[id(future)] = error
        for each in _chain(error):
            self._jobs[id(each)] = self._jobs.get(id(each), 0) + 1

    def note_asked(self, future: object) -> None:
        """Note that somebody has asked for the outcome of *future*, or is about to be told of it."""
        self._unasked.pop(id(future), None)

    def exception_for_caller(self, error: BaseException) -> BaseException:
        """Return *error* itself if only one job failed with it and its causes, otherwise one like it for one caller."""
        own = separate(error) if any(self._jobs.get(id(each), 1) > 1 for each in _chain(error)) else error
        if not issubclass(type(own), (StopIteration, StopAsyncIteration)):
            return own
        # These would silently end the caller's generator or coroutine, and asyncio refuses them: see PEP 479.
        stopped = RuntimeError(f"the processor raised {type(own).__name__}")
        stopped.__cause__ = own
        return stopped

    def report(self) -> None:
        """Log the jobs whose outcome nobody has asked for, unless that has been done."""
        unasked, self._unasked = self._unasked, {}
        if unasked and self._process == os.getpid():  # a child leaves it to its parent
            _report_unasked(self._what, list(unasked.values()))

    def __del__(self) -> None:
        if self._unasked and self._process == os.getpid():
            # The garbage collector may call this in any thread, with any lock held. Logging runs users' handlers, so
            # a thread of the batcher does it, while there is one.
            log = functools.partial(_report_unasked, self._what, list(self._unasked.values()))
            log() if self._queue.closed and not self._queue.is_held() else self._queue.post(log)


_all_failures: "weakref.WeakValueDictionary[int, Failures]" = weakref.WeakValueDictionary()


@atexit.register
def _report_all_unasked() -> None:
    # Of futures that are kept until the interpreter ends, since by the time it drops them it can't log any more.
    # The list is made in one step, since threads that are still running may add to them.
    for reference in _all_failures.valuerefs():
        failures = reference()
        if failures is not None:
            failures.report()


def _report_unasked(what: str, errors: list[BaseException]) -> None:
    count = "1 job" if len(errors) == 1 else f"{len(errors):,} jobs"
    report("%s of %s failed, and nobody asked for the outcome; the first failed with:", count, what, error=errors[0])


def separate(error: BaseException) -> BaseException:
    """Return an exception like *error* that shares nothing with it that a caller can change. Never raises."""
    return _separated_exception(error, {})


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error*, its cause or context, and so on, up to 20 in all."""
    each: Any = error
    for _ in range(20):
        if each is None:
            return
        yield each
        cause = _get(each, "__cause__")
        each = _get(each, "__context__") if cause is None else cause


def _separated_exception(error: BaseException, memo: _Memo) -> BaseException:
    if id(error) in memo:
        return memo[id(error)]  # type: ignore[no-any-return]
    memo[_COUNT] = memo.get(_COUNT, 0) + 1
    if memo[_COUNT] > _LARGE:
        return error
    try:
        twin = _twin(error, memo)
        _link(twin, error, memo)
        return twin
    except Exception:  # a user's class may raise anything when an object of it is made
        return error


def _link(twin: BaseException, error: BaseException, memo: _Memo) -> None:
    for name in ("__cause__", "__context__"):
        linked = _get(error, name)
        if linked is not None:
            _set(twin, name, _separated_exception(linked, memo))
    for name in ("__suppress_context__", "__traceback__"):
        _set(twin, name, _get(error, name))


def _get(error: BaseException, name: str) -> Any:
    # As Python itself reads it, whatever a user's class defines.
    return vars(BaseException)[name].__get__(error)


def _set(error: BaseException, name: str, value: Any) -> None:
    # Not through ``__setattr__`` either: a frozen dataclass refuses every assignment.
    vars(BaseException)[name].__set__(error, value)


def _twin(error: BaseException, memo: _Memo) -> BaseException:
    """Return a copy or a view of *error*, without its cause and context."""
    kind: Any = type(error)
    state: dict[str, Any] = _get(error, "__dict__")
    missing = [name for name, value in [("args", _get(error, "args")), *state.items()] if _is_large(value)]
    cls = _view_class(kind, tuple(missing)) if missing else kind
    twin = _blank(cls, error, memo)
    lacking = [name for name in _copy_fields(error, twin) if name not in missing]
    if lacking:  # known only now, so make it again, with these read from the original too
        missing += lacking
        cls = _view_class(kind, tuple(missing))
        twin = _blank(cls, error, memo)
        _copy_fields(error, twin)
    if missing:
        vars(cls)["_original"].__set__(twin, error)
    memo[id(error)] = twin
    if "args" not in missing and not issubclass(kind, _Group):
        _set(twin, "args", tuple([_separated(each, memo) for each in _get(error, "args")]))
    for name, field in _fields(kind):
        value = _value(field, error)
        if name not in missing and (type(value) in _CONTAINERS or issubclass(type(value), BaseException)):
            field.__set__(twin, _separated(value, memo))
    _get(twin, "__dict__").update({name: _separated(each, memo) for name, each in state.items() if name not in missing})
    return twin


def _blank(cls: Any, error: BaseException, memo: _Memo) -> BaseException:
    """Return an object of *cls* that is not initialised, as pickle would make it, with arguments and nothing else."""
    arguments: tuple[Any, ...] = _get(error, "args")
    if issubclass(type(error), _Group):
        # Python itself splits groups (for ``except*``), so it needs their members where it keeps them.
        group: Any = error
        members = group.exceptions
        if len(members) <= _LARGE:  # otherwise they are shared
            members = [_separated_exception(each, memo) for each in members]
        arguments = (group.message, members)
    make = next(new for base in cls.__mro__ if type(new := vars(base).get("__new__")) is BuiltinFunctionType)
    try:
        twin: BaseException = make(cls, *arguments)
    except TypeError:  # of a type that only its own code can make, such as pydantic's ValidationError
        reduced: Any = error.__reduce_ex__(4)
        twin = reduced[0](*reduced[1])
    if type(twin) is not cls or twin is error:
        raise TypeError(f"{cls.__name__} can't be copied")
    if not issubclass(cls, _Group):
        _set(twin, "args", arguments)
    return twin


def _copy_fields(error: BaseException, twin: BaseException) -> list[str]:
    """Copy slots, and the fields that C code defines, and return the names of those that can't be or are large."""
    missing = []
    kind: Any = type(error)
    for name, field in _fields(kind):
        value = _value(field, error)
        if value is _UNSET:
            continue
        try:
            if not _is_same(value, _value(field, twin)):
                field.__set__(twin, value)
            if _is_large(value) or not _is_same(value, _value(field, twin)):
                missing.append(name)
        except (AttributeError, TypeError):
            missing.append(name)
    return missing


@functools.lru_cache(maxsize=256)
def _fields(cls: Any) -> list[tuple[str, Any]]:
    return [
        (name, field)
        for base in cls.__mro__
        if base not in (BaseException, _Group)  # whose fields are not copied as others are
        for name, field in vars(base).items()
        if isinstance(field, (MemberDescriptorType, GetSetDescriptorType)) and name not in ("__dict__", "__weakref__")
    ]


def _value(field: Any, error: BaseException) -> Any:
    try:
        return field.__get__(error)
    except AttributeError:
        return _UNSET


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in _SCALARS and one == other)


def _is_large(value: Any) -> bool:
    return next(islice(_items(value), _LARGE, None), None) is not None


def _items(value: Any) -> Iterator[Any]:
    """Yield something for each item of a container and of those in it."""
    left = [value]
    while left:
        each = left.pop()
        if type(each) in _CONTAINERS:
            yield from ("item" for _ in range(len(each)))
            left += each.values() if isinstance(each, dict) else () if type(each) is bytearray else each


def _separated(value: Any, memo: _Memo) -> Any:
    """Return *value*, with copies of all containers and exceptions in it."""
    kind = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if issubclass(kind, BaseException):  # not `isinstance`, which asks the value
        return _separated_exception(value, memo)
    if kind is tuple:
        items = [_separated(each, memo) for each in value]
        return value if all(map(_is_same, items, value)) else tuple(items)
    if kind not in _CONTAINERS:
        return value
    twin = memo[id(value)] = value.copy()
    if isinstance(twin, dict):
        for key, each in value.items():
            dict.__setitem__(twin, key, _separated(each, memo))
    elif isinstance(twin, (list, deque)):
        for place, each in enumerate(value):
            twin[place] = _separated(each, memo)
    return twin


class _View:
    """What the views of all types have in common. As the first base, it overrides the hooks of the original's type."""

    _original: BaseException

    def __init_subclass__(cls) -> None:
        """Do nothing, so that the hook of the original's class does not run."""

    def __str__(self) -> str:
        return str(self._original)

    def __repr__(self) -> str:
        return repr(self._original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._original.__reduce_ex__(protocol)


@functools.lru_cache(maxsize=256)
def _view_class(cls: Any, names: tuple[str, ...]) -> type[BaseException]:
    """Return a subclass of *cls* whose objects read these attributes from their original."""
    about = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body: dict[str, Any] = {
        **about,
        "__slots__": ("_original",),
        "_names": names,
        **{name: _read_through(name) for name in names},
    }
    made: type[BaseException] = type.__new__(type(cls), cls.__name__, (_View, cls), body)
    return made


def _read_through(name: str) -> property:
    def get(self: Any) -> Any:
        own: dict[str, Any] = self.__dict__
        if name not in own:
            value = getattr(self._original, name)
            try:
                value = _separated(value, {})
            except RecursionError:  # nested too deeply, so it is shared
                pass
            own.setdefault(name, value)
        return own[name]

    def set_(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, set_)
