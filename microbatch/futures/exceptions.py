"""When several jobs fail with the same exception, each caller gets an exception object of its own.

Callers must not share an exception object. Raising it adds to its traceback, and if one caller changes it (adds a note,
or changes a list in an attribute), the others would see the change. So each caller gets one of the following:

1. A *copy*: an object of the same type, created without running ``__init__``, with the same arguments, attributes,
   slots and fields of C code. Lists, dicts, sets and other containers are copied in depth. So are other exceptions: the
   cause, the context, the members of a group, and exceptions in attributes. Copies share all other objects.
2. A *view*: an instance of a subclass that reads some fields from the original, and copies a container on first access.
   It is used if a copy would lack a field that only C code can set, such as ``diag`` of a psycopg2 error. It is also
   used for large containers, because copying them for each caller would make the cost of a failed batch quadratic in
   its size.
3. The original, if its type allows neither a copy nor a view.

This module does not compare values of users' classes or convert them to text, because that would run users' code once
per caller.
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

__all__ = ["Failures", "chain_of", "separate"]

_LARGE = 100
"""The maximum number of items in a container that is copied at once. A larger one is copied on first access.

It is also the maximum number of exceptions that are copied with one exception. The rest of a longer chain of causes is
shared, and so are all members of a larger group.
"""

_UNSET = object()
_SCALARS = (int, float, str, bytes)
_CONTAINERS = (list, dict, set, tuple, deque, bytearray, Counter, OrderedDict, defaultdict)

if sys.version_info >= (3, 11):
    _Group = BaseExceptionGroup
else:  # a replacement that no exception is an instance of

    class _Group(BaseException):
        message: str
        exceptions: tuple[BaseException, ...]


_Memo = dict[Any, Any]  # the copies by the `id` of their originals, as in `copy.deepcopy`
_COUNT = "exceptions"  # the key under which a memo has the number of exceptions that were copied


class Poster(Protocol):
    """The part of the batcher's queue that `Failures` uses."""

    closed: bool

    def post(self, call: Callable[[], None]) -> None:
        """Make a thread of the batcher run *call*."""


class Failures:
    """The failures of jobs that failed together, such as those of one batch. Gives each caller its own exception.

    Each failed future refers to this object until its outcome is asked for. When no future refers to it any more, it is
    deleted. If the outcomes of some jobs were never asked for, it then logs their number once.

    Args:
        what: The name of their batch or batcher in the log, such as ``batch 7 of 'inserts'``.
        queue: The queue of their batcher.
    """

    # The exceptions by the `id` of their future. The class has this attribute too, because `__del__` runs even if a
    # signal has interrupted `__init__`.
    _unasked: dict[int, BaseException] = {}

    def __init__(self, what: str, queue: Poster) -> None:
        self._what = what
        self._queue = queue
        self._process = os.getpid()
        # By the `id` of an exception: how many jobs failed with it, or with an exception that it caused.
        self._jobs: dict[int, int] = {}
        self._unasked = {}
        _all_failures[id(self)] = self

    def add(self, future: object, error: BaseException) -> None:
        """Record that the job of *future* fails with *error*. Only one thread at a time may call this."""
        self._unasked[id(future)] = error
        for each in chain_of(error):
            self._jobs[id(each)] = self._jobs.get(id(each), 0) + 1

    def note_asked(self, future: object) -> None:
        """Record that the outcome of *future* was asked for, or is about to be passed to a callback."""
        self._unasked.pop(id(future), None)

    def exception_for_caller(self, error: BaseException) -> BaseException:
        """Return *error* itself if only one job failed with it and its causes. Otherwise return a new copy or view.

        A `StopIteration` or `StopAsyncIteration` becomes the cause of a `RuntimeError`.
        """
        shared = any(self._jobs.get(id(each), 1) > 1 for each in chain_of(error))
        raised = separate(error) if shared else error
        if not issubclass(type(raised), (StopIteration, StopAsyncIteration)):
            return raised
        # These exceptions could silently end a loop of the caller, such as one over `map(...)`. Also, asyncio refuses
        # them.
        stopped = RuntimeError(f"the processor raised {type(raised).__name__}")
        stopped.__cause__ = raised
        return stopped

    def report(self) -> None:
        """Log the number of jobs whose outcomes were never asked for, once."""
        unasked, self._unasked = self._unasked, {}
        if unasked and self._process == os.getpid():  # in a forked child, the parent process logs it
            _report_unasked(self._what, list(unasked.values()))

    def __del__(self) -> None:
        if self._unasked and self._process == os.getpid():
            # The garbage collector may call this in any thread, and that thread may hold any lock. Logging runs users'
            # handlers. So a thread of the batcher does it, as long as the batcher is not closed.
            log = functools.partial(_report_unasked, self._what, list(self._unasked.values()))
            log() if self._queue.closed else self._queue.post(log)


_all_failures: "weakref.WeakValueDictionary[int, Failures]" = weakref.WeakValueDictionary()


@atexit.register
def _report_all_unasked() -> None:
    # For futures that are kept until the interpreter exits. When it deletes them, it can't log any more. `valuerefs`
    # returns a list, made in one step, because threads that still run may add more objects.
    for reference in _all_failures.valuerefs():
        failures = reference()
        if failures is not None:
            failures.report()


def _report_unasked(what: str, errors: list[BaseException]) -> None:
    count = "1 job" if len(errors) == 1 else f"{len(errors):,} jobs"
    report("%s of %s failed, and nobody asked for the outcome; the first failed with:", count, what, error=errors[0])


def separate(error: BaseException) -> BaseException:
    """Return a copy or a view of *error*, or *error* itself if its type allows neither. Never raises."""
    return _separated_exception(error, {})


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield *error*, its cause or context, the cause or context of that, and so on: 20 exceptions at most."""
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
    except Exception:  # a user's class may raise any exception when an object of it is created
        return error


def _link(twin: BaseException, error: BaseException, memo: _Memo) -> None:
    for name in ("__cause__", "__context__"):
        linked = _get(error, name)
        if linked is not None:
            _set(twin, name, _separated_exception(linked, memo))
    for name in ("__suppress_context__", "__traceback__"):
        _set(twin, name, _get(error, name))


def _get(error: BaseException, name: str) -> Any:
    # Reads the attribute as Python itself does, even if a user's class defines it in another way.
    return vars(BaseException)[name].__get__(error)


def _set(error: BaseException, name: str, value: Any) -> None:
    # Does not call ``__setattr__``, because a frozen dataclass refuses every assignment.
    vars(BaseException)[name].__set__(error, value)


def _twin(error: BaseException, memo: _Memo) -> BaseException:
    """Return a copy or a view of *error* without its cause, context and traceback."""
    kind: Any = type(error)
    state: dict[str, Any] = _get(error, "__dict__")
    missing = [name for name, value in [("args", _get(error, "args")), *state.items()] if _is_large(value)]
    cls = _view_class(kind, tuple(missing)) if missing else kind
    twin = _blank(cls, error, memo)
    lacking = [name for name in _copy_fields(error, twin) if name not in missing]
    if lacking:  # this is known only after copying, so create it again as a view, which reads these fields too
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
    """Return an object of *cls* with the arguments of *error*, created without running ``__init__``, as by pickle."""
    arguments: tuple[Any, ...] = _get(error, "args")
    if issubclass(type(error), _Group):
        # Python itself splits groups for ``except*``, so a group needs its members in the field where Python looks.
        group: Any = error
        members = group.exceptions
        if len(members) <= _LARGE:  # otherwise the copies share the members
            members = [_separated_exception(each, memo) for each in members]
        arguments = (group.message, members)
    make = next(new for base in cls.__mro__ if type(new := vars(base).get("__new__")) is BuiltinFunctionType)
    try:
        twin: BaseException = make(cls, *arguments)
    except TypeError:  # only the type's own code can create its objects, as for pydantic's ValidationError
        reduced: Any = error.__reduce_ex__(4)
        twin = reduced[0](*reduced[1])
    if type(twin) is not cls or twin is error:
        raise TypeError(f"{cls.__name__} can't be copied")
    if not issubclass(cls, _Group):
        _set(twin, "args", arguments)
    return twin


def _copy_fields(error: BaseException, twin: BaseException) -> list[str]:
    """Copy slots and the fields of C code. Return the names of the fields that can't be copied, or are large."""
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
        if base not in (BaseException, _Group)  # the fields of these are copied in other ways: see `_blank` and `_link`
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
    """Yield one string for each item of a container and of the containers in it. Only their number matters."""
    left = [value]
    while left:
        each = left.pop()
        if type(each) in _CONTAINERS:
            yield from ("item" for _ in range(len(each)))
            left += each.values() if isinstance(each, dict) else () if type(each) is bytearray else each


def _separated(value: Any, memo: _Memo) -> Any:
    """Return a deep copy of *value* in which only containers and exceptions are copied."""
    kind = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if issubclass(kind, BaseException):  # not `isinstance`, which reads the ``__class__`` of the value
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
    """Base class of the views of all types. As the first base, it overrides the methods of the original's type."""

    _original: BaseException

    def __init_subclass__(cls) -> None:
        """Do nothing, so that the ``__init_subclass__`` of the original's type does not run."""

    def __str__(self) -> str:
        return str(self._original)

    def __repr__(self) -> str:
        return repr(self._original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._original.__reduce_ex__(protocol)


@functools.lru_cache(maxsize=256)
def _view_class(cls: Any, names: tuple[str, ...]) -> type[BaseException]:
    """Return a subclass of *cls* whose objects read the attributes *names* from the original."""
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
            except RecursionError:  # the value is nested too deeply, so the callers share it
                pass
            own.setdefault(name, value)
        return own[name]

    def set_(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, set_)
