"""`batched`: a function of many jobs, called with one."""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from inspect import isfunction
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar, overload

from microbatch._basics.arguments import shown
from microbatch.batcher import Batcher, BatcherOptions
from microbatch.futures.job_future import JobFuture, Keep
from microbatch.policies import DEFAULT_POLICY
from microbatch.policies.base import BatchingPolicy, check_policy
from microbatch.results import JobResult

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BatchedFunction", "batched"]

Job = TypeVar("Job")
Value = TypeVar("Value")


class BatchedFunction(Generic[Job, Value]):
    """What `batched` makes of a function: call it with a single job, from as many threads as you like.

    Attributes:
        batcher: the `Batcher` behind it. `submit`, `map` and `shutdown` are its own.
    """

    def __init__(self, function: Callable[..., Any], make: Callable[..., Batcher[Job, Value]]) -> None:
        inner: Any = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
        # First, so that no attribute of the function replaces ours; an object may have some that replace even methods.
        functools.update_wrapper(self, inner, updated=("__dict__",) if isfunction(inner) else ())
        self.batcher = make(inner)
        self._of_class = isinstance(function, classmethod)
        # As Python does: what is bound already, or can't be bound, is left as it is.
        can_bind = hasattr(type(function), "__get__") and not isinstance(function, _NOT_BOUND)
        self._binds = can_bind and _takes(inner, 2)
        self._unbound = self._of_class or not _takes(inner, 1)  # so that it can't be called before it is bound
        if self._unbound and not self._binds:
            raise TypeError(f"function must take a list of jobs, or self and a list of jobs, got {shown(function)}")
        self._function = inner
        self._make = make
        self._owner: object | None = None  # the instance, or the class, in what `__get__` returns
        self._batchers: dict[int, Batcher[Job, Value]] = {}  # by the id of a living owner

    def __call__(self, job: Job, *others: NoReturn) -> Value:
        """Submit *job*, wait for its result, and return its value. Raises what `submit` and the job raise."""
        self._refuse_unbound()
        if others:
            raise TypeError(f"{_name(self._function)} takes a single job, got {1 + len(others)}")
        return self.submit(job).result().value

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> JobFuture[Value]:
        """See `Batcher.submit`."""
        self._refuse_unbound()
        future = self.batcher.submit(job, timeout=timeout, expires_in=expires_in)
        if self._owner is not None:
            future.add_done_callback(Keep(self._owner))
        return future

    def map(
        self, jobs: Iterable[Job], *, timeout: float | None = None, buffersize: int | None = None
    ) -> Iterator[JobResult[Value]]:
        """See `Batcher.map`."""
        self._refuse_unbound()
        results = self.batcher.map(jobs, timeout=timeout, buffersize=buffersize)
        return results if self._owner is None else _keeping(self._owner, results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> bool:
        """See `Batcher.shutdown`."""
        return self.batcher.shutdown(wait, cancel_futures=cancel_futures, timeout=timeout)

    def __set_name__(self, owner: type, name: str) -> None:
        # A mixin without attributes may have subclasses with weak references.
        holds_something = owner.__basicsize__ > object.__basicsize__
        if self._binds and not self._of_class and holds_something and not owner.__weakrefoffset__:
            raise _not_referable(owner)

    def __get__(self, instance: object | None, owner: type | None = None) -> "BatchedFunction[Job, Value]":
        """Bind to an instance, as a method does, or to the class, as a class method does. Each has a batcher of its own."""
        if self._of_class:
            instance = type(instance) if owner is None else owner
        if instance is None or not self._binds:
            return self
        bound = BatchedFunction[Job, Value].__new__(BatchedFunction)
        bound.__dict__.update(self.__dict__, _owner=instance, _unbound=False, batcher=self._batcher_of(instance))
        return bound

    def _refuse_unbound(self) -> None:
        # From Python 3.13 on, a `classmethod` around this does not bind it.
        if self._unbound:
            name = _name(self._function)
            hint = "call it on an instance, or, for a class method, put @batched above @classmethod"
            raise TypeError(f"{name} takes self and a list of jobs: {hint}")

    def _batcher_of(self, instance: object) -> Batcher[Job, Value]:
        batcher = self._batchers.get(id(instance))
        if batcher is None:
            try:
                reference = weakref.ref(instance)
            except TypeError:
                raise _not_referable(type(instance)) from None
            # The worker thread must not keep the instance: an unused one can then be collected, which shuts its
            # batcher down. While it has jobs to do, their futures keep it: see `submit`.
            batcher = self._make(functools.partial(_call_method, self._function, reference))
            batcher = self._batchers.setdefault(id(instance), batcher)  # of two threads, one gets its own in
            weakref.finalize(instance, self._batchers.pop, id(instance), None).atexit = False
        return batcher


_NOT_BOUND = (staticmethod, MethodType, functools.partial)


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether *function* can be called with *count* arguments, as far as its signature tells."""
    try:
        # A wrapped function may take other arguments than its wrapper.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or shown(function)


def _not_referable(owner: type) -> TypeError:
    return TypeError(
        f"{owner.__qualname__} can't have a batched method, since its instances can't be weakly referenced: add "
        "'__weakref__' to its __slots__. In a dataclass with slots=True, add weakref_slot=True; before Python 3.11, "
        "inherit from a class whose __slots__ are ('__weakref__',)"
    )


class Decorator(Protocol):
    """What `batched` returns: takes a function, or a method, of a list of jobs."""

    @overload
    def __call__(self, function: Callable[[list[Job]], None], /) -> BatchedFunction[Job, None]: ...
    @overload
    def __call__(self, function: Callable[[list[Job]], Iterable[Value]], /) -> BatchedFunction[Job, Value]: ...
    @overload
    def __call__(self, function: Callable[[Any, list[Job]], None], /) -> BatchedFunction[Job, None]: ...
    @overload
    def __call__(self, function: Callable[[Any, list[Job]], Iterable[Value]], /) -> BatchedFunction[Job, Value]: ...


def batched(policy: BatchingPolicy[Any] = DEFAULT_POLICY, **options: "Unpack[BatcherOptions]") -> Decorator:
    """Make a function of many jobs callable with one, so that calls from many threads go together.

    >>> from microbatch import Interval, Size
    >>> @batched(Size(100) | Interval(0.01))
    ... def lengths(words):
    ...     return [len(word) for word in words]
    >>> lengths("microbatch")
    10
    >>> lengths.shutdown()
    True

    On a method, each instance has its own batcher, so the class must allow weak references to its instances. On a class
    method, each class has its own batcher; put ``@batched`` above ``@classmethod``. On a static method, the order of
    the two decorators does not matter.

    Args:
        policy: see `Batcher`.
        options: all other arguments of `Batcher`.

    Raises:
        TypeError, ValueError: as `Batcher` does, when the function is decorated.
    """
    check_policy("policy", policy, ": write @batched(Size(100)), or @batched() for the default policy")

    def make(processor: Callable[[list[Any]], Any]) -> Batcher[Any, Any]:
        return Batcher(processor, policy, **options)

    def decorate(function: Callable[..., Any]) -> BatchedFunction[Any, Any]:
        return BatchedFunction(function, make)

    return decorate


def _call_method(function: Callable[..., Any], reference: "weakref.ref[object]", jobs: list[Any]) -> Any:
    instance = reference()
    if instance is None:  # only the batcher was kept
        raise ReferenceError(f"the instance that the method {_name(function)} is bound to was garbage-collected")
    return function(instance, jobs)


def _keeping(owner: object, results: Iterator[JobResult[Value]]) -> Iterator[JobResult[Value]]:
    yield from results
