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

import functools
import os
import sys
from collections import OrderedDict, defaultdict, deque
from itertools import islice
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any, Callable, Dict, Iterator, List, Protocol, Tuple, Type

from microbatch._log import report

__all__ = ["Failures", "separate"]

_LARGE = 100
"""A container with more items is only copied for a caller that looks at it, and a longer chain of causes is shared."""

_HANDLED = frozenset(
    {*vars(BaseException), "exceptions", "message", "__weakref__"}
)  # fields that are not copied as others are
_SCALARS = (int, float, str, bytes)
_CONTAINERS = (list, dict, set, tuple, deque, bytearray, OrderedDict, defaultdict)

if sys.version_info >= (3, 11):
    _Group = BaseExceptionGroup
else:  # there is no such thing

    class _Group(BaseException):
        message: str
        exceptions: Tuple[BaseException, ...]


_Memo = Dict[int, Any]  # what stands for an original, by its identity


class Poster(Protocol):
    """What `Failures` needs of the batcher's queue."""

    closed: bool

    def is_held(self) -> bool:
        """Return whether the calling thread holds the mutex."""

    def post(self, note: Callable[[], None]) -> None:
        """Have *note* called by a thread of the batcher that does not hold the mutex."""


class Failures:
    """What failed together, such as the jobs of one batch.

    Gives each caller its exception. Each failed future refers to this until somebody asks for its outcome. So when the
    last of them is gone, this is, and logs those that nobody asked about: once, whatever their number.

    Args:
        what: names them in the log.
        queue: that of their batcher.
    """

    _unasked: Dict[int, BaseException] = (
        {}
    )  # by the identity of the future; none in an object that a signal left half made

    def __init__(self, what: str, queue: Poster) -> None:
        self._what = what
        self._queue = queue
        self._process = os.getpid()
        self._jobs: Dict[int, int] = {}  # how many failed with an exception, by its identity
        self._unasked = {}

    def add(self, future: object, error: BaseException) -> None:
        """Note that the job of *future* fails with *error*. With the mutex held."""
        self._unasked[id(future)] = error
        self._jobs[id(error)] = self._jobs.get(id(error), 0) + 1

    def note_asked(self, future: object) -> None:
        """Note that somebody has asked for the outcome of *future*, or is about to be told of it."""
        self._unasked.pop(id(future), None)

    def exception_for_caller(self, error: BaseException) -> BaseException:
        """Return *error* if just one job failed with it, otherwise an exception like it for one of their callers."""
        own = separate(error) if self._jobs[id(error)] > 1 else error
        if not isinstance(own, (StopIteration, StopAsyncIteration)):
            return own
        # These would end the caller's generator or coroutine without a word, and asyncio refuses them: see PEP 479.
        stopped = RuntimeError(f"the processor raised {type(own).__name__}")
        stopped.__cause__ = own
        return stopped

    def __del__(self) -> None:
        if self._unasked and self._process == os.getpid():  # a child leaves it to its parent
            log = functools.partial(_report_unasked, self._what, list(self._unasked.values()))
            # The garbage collector may call this in any thread, with any lock held. Logging runs the handlers of users,
            # so a thread of the batcher does it, while there is one.
            log() if self._queue.closed and not self._queue.is_held() else self._queue.post(log)


def _report_unasked(what: str, errors: List[BaseException]) -> None:
    count = "1 job" if len(errors) == 1 else f"{len(errors):,} jobs"
    report("%s of %s failed, and nobody asked for the outcome; the first failed with:", count, what, error=errors[0])


def separate(error: BaseException) -> BaseException:
    """Return an exception like *error* that shares nothing with it that a caller can change. Never raises."""
    return _separated_exception(error, {})


def _separated_exception(error: BaseException, memo: _Memo) -> BaseException:
    if id(error) in memo:
        return memo[id(error)]  # type: ignore[no-any-return]
    if len(memo) > _LARGE:
        return error
    try:
        twin = _twin(error, memo)
    except BaseException:  # whatever the class of a user does when an object of it is made
        return error
    for name in ("__cause__", "__context__"):
        linked = _get(error, name)
        if linked is not None:
            _set(twin, name, _separated_exception(linked, memo))
    for name in ("__suppress_context__", "__traceback__"):
        _set(twin, name, _get(error, name))
    return twin


def _get(error: BaseException, name: str) -> Any:
    # As Python itself reads it, past what the class of a user says.
    return vars(BaseException)[name].__get__(error)


def _set(error: BaseException, name: str, value: Any) -> None:
    # Past a ``__setattr__`` too: that of a frozen dataclass refuses everything.
    vars(BaseException)[name].__set__(error, value)


def _twin(error: BaseException, memo: _Memo) -> BaseException:
    """Return a copy or a view of *error*, without its cause and context."""
    kind: Any = type(error)
    state: Dict[str, Any] = _get(error, "__dict__")
    missing = [name for name, value in [("args", _get(error, "args")), *state.items()] if _is_large(value)]
    missing += _copy_fields(error, _blank(kind, error, _get(error, "args")))
    cls = _view_class(kind, tuple(missing)) if missing else kind
    twin = memo[id(error)] = _blank(cls, error, _arguments(error, missing, memo))
    _copy_fields(error, twin)
    if missing:
        vars(cls)["_original"].__set__(twin, error)
    _get(twin, "__dict__").update(
        {name: _separated(value, memo) for name, value in state.items() if name not in missing}
    )
    return twin


def _arguments(error: BaseException, missing: List[str], memo: _Memo) -> Tuple[Any, ...]:
    if isinstance(error, _Group):
        # Groups are told apart by Python itself, which needs its members in their place.
        return error.message, [_separated_exception(each, memo) for each in error.exceptions]
    arguments: Tuple[Any, ...] = _get(error, "args")
    return arguments if "args" in missing else tuple([_separated(each, memo) for each in arguments])


def _blank(cls: Type[BaseException], error: BaseException, arguments: Tuple[Any, ...]) -> BaseException:
    """Return an object of *cls* that is not initialised, as pickle would make it, with arguments and nothing else."""
    make = next(new for base in cls.__mro__ if type(new := vars(base).get("__new__")) is BuiltinFunctionType)
    try:
        twin: BaseException = make(cls, *arguments)
    except TypeError:  # of a type that only code of its own makes, such as pydantic's ValidationError
        reduced: Any = error.__reduce_ex__(4)
        twin = reduced[0](*reduced[1])
    if type(twin) is not cls or twin is error:
        raise TypeError(f"{cls.__name__} can't be copied")
    if not isinstance(error, _Group):
        _set(twin, "args", arguments)
    return twin


def _copy_fields(error: BaseException, twin: BaseException) -> List[str]:
    """Copy slots, and the fields that C code defines, and return the names of those that can't be."""
    missing = []
    kind: Any = type(error)
    for name, field in _fields(kind):
        try:
            value = field.__get__(error)
        except AttributeError:
            continue  # not set
        try:
            if not _is_same(value, _value(field, twin)):
                field.__set__(twin, value)
            if not _is_same(value, _value(field, twin)):
                missing.append(name)
        except (AttributeError, TypeError):
            missing.append(name)
    return missing


@functools.lru_cache(maxsize=256)
def _fields(cls: Any) -> List[Tuple[str, Any]]:
    return [
        (name, field)
        for base in cls.__mro__
        for name, field in vars(base).items()
        if isinstance(field, (MemberDescriptorType, GetSetDescriptorType)) and name not in _HANDLED
    ]


def _value(field: Any, error: BaseException) -> Any:
    try:
        return field.__get__(error)
    except AttributeError:
        return None


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
    if isinstance(value, BaseException):
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
    """What the views of all types have in common. Comes before the type of the original, whose own hooks it keeps out."""

    _original: BaseException

    def __init_subclass__(cls) -> None:
        """Keep what the original's class does with its subclasses from running."""

    def __str__(self) -> str:
        return str(self._original)

    def __repr__(self) -> str:
        return repr(self._original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._original.__reduce_ex__(protocol)


@functools.lru_cache(maxsize=256)
def _view_class(cls: Any, names: Tuple[str, ...]) -> Type[BaseException]:
    """Return a subclass of *cls* whose objects read these attributes from their original."""
    about = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body: Dict[str, Any] = {**about, "__slots__": ("_original",), **{name: _read_through(name) for name in names}}
    made: Type[BaseException] = type.__new__(type(cls), cls.__name__, (_View, cls), body)
    return made


def _read_through(name: str) -> property:
    def get(self: Any) -> Any:
        own: Dict[str, Any] = self.__dict__
        return own[name] if name in own else own.setdefault(name, _separated(getattr(self._original, name), {}))

    def set_(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, set_)
