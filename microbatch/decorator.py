"""The decorator `batched`: write a function that takes a list of jobs, and call it with a single job."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar, overload

from microbatch._basics.arguments import shown
from microbatch.batcher import Batcher, BatcherOptions
from microbatch.futures.job_future import JobFuture, KeepAlive
from microbatch.policies import DEFAULT_POLICY
from microbatch.policies.base import BatchingPolicy, check_policy
from microbatch.results import JobResult, ResultAt

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BatchedFunction", "batched"]

Job = TypeVar("Job")
Value = TypeVar("Value")


class BatchedFunction(Generic[Job, Value]):
    """A function that was decorated with `batched`. Call it with a single job, from any thread.

    Attributes:
        batcher: The `Batcher` of the function. The methods `submit`, `map` and `shutdown` call those of the batcher.
    """

    def __init__(self, function: Callable[..., Any], make: Callable[..., Batcher[Job, Value]]) -> None:
        inner: Any = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
        # Called first, so that attributes of the function do not replace the attributes below. If the callable is not a
        # plain function, its attributes are not copied at all, because they could replace even methods.
        functools.update_wrapper(self, inner, updated=("__dict__",) if isinstance(inner, FunctionType) else ())
        self.batcher: Batcher[Job, Value] = make(inner)
        self._of_class = isinstance(function, classmethod)
        # As for any attribute of a class, a callable that is bound already, or that can't be bound, stays as it is.
        can_bind = hasattr(type(function), "__get__") and not isinstance(function, _NOT_BOUND)
        self._binds = can_bind and _takes(inner, 2)
        self._unbound = self._of_class or not _takes(inner, 1)  # it must be bound before it can be called
        if self._unbound and not self._binds:
            raise TypeError(f"function must take a list of jobs, or self and a list of jobs, got {shown(function)}")
        self._function = inner
        self._make = make
        self._owner: object | None = None  # in the result of `__get__`, the instance or the class
        self._batchers: dict[int, Batcher[Job, Value]] = {}  # by the id of the owner, which is alive

    def __call__(self, job: Job, *others: NoReturn) -> Value:
        """Submit *job*, wait for its result, and return its value.

        Raises:
            Exception: Whatever exception `submit` raises or the job fails with.
        """
        self._refuse_unbound()
        if others:
            raise TypeError(f"{_name(self._function)} takes a single job, got {1 + len(others)}")
        return self.submit(job).result().value

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> JobFuture[Value]:
        """Submit a job: see `Batcher.submit`."""
        self._refuse_unbound()
        future = self.batcher.submit(job, timeout=timeout, expires_in=expires_in)
        if self._owner is not None:
            future.add_done_callback(KeepAlive(self._owner))
        return future

    def map(
        self, jobs: Iterable[Job], *, timeout: float | None = None, buffersize: int | None = None
    ) -> Iterator[JobResult[Value]]:
        """Submit jobs and yield their results: see `Batcher.map`."""
        self._refuse_unbound()
        results = self.batcher.map(jobs, timeout=timeout, buffersize=buffersize)
        return results if self._owner is None else _keeping(self._owner, results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> bool:
        """Shut down the batcher: see `Batcher.shutdown`."""
        return self.batcher.shutdown(wait, cancel_futures=cancel_futures, timeout=timeout)

    def __set_name__(self, owner: type, name: str) -> None:
        # A mixin that has no attributes is accepted, because its subclasses may allow weak references.
        holds_something = owner.__basicsize__ > object.__basicsize__
        if self._binds and not self._of_class and holds_something and not owner.__weakrefoffset__:
            raise _not_referable(owner)

    def __get__(self, instance: object | None, owner: type | None = None) -> "BatchedFunction[Job, Value]":
        """Bind to an instance like a method, or to a class like a class method. Each owner has its own batcher."""
        if self._of_class:
            instance = type(instance) if owner is None else owner
        if instance is None or not self._binds:
            return self
        bound = BatchedFunction[Job, Value].__new__(BatchedFunction)
        bound.__dict__.update(self.__dict__, _owner=instance, _unbound=False, batcher=self._batcher_of(instance))
        return bound

    def _refuse_unbound(self) -> None:
        # Since Python 3.13, a `classmethod` around this object does not bind it.
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
            # The threads of the batcher must not keep the instance alive. So an unused instance can be
            # garbage-collected, which shuts down its batcher. While it has pending jobs, their futures keep it alive:
            # see `submit`.
            batcher = self._make(functools.partial(_call_method, self._function, reference))
            # If two threads get here at the same time, both use the batcher of the first one.
            batcher = self._batchers.setdefault(id(instance), batcher)
            weakref.finalize(instance, self._batchers.pop, id(instance), None).atexit = False
        return batcher


_NOT_BOUND = (staticmethod, MethodType, functools.partial)


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether *function* accepts *count* positional arguments. If it has no signature, assume that it does."""
    import inspect  # takes long, and programs that don't decorate a function do not need it

    try:
        # `function` itself is called, and the function that it wraps may have other parameters.
        inspect.signature(function, follow_wrapped=False).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or shown(function)


def _not_referable(owner: type) -> TypeError:
    return TypeError(
        f"{owner.__qualname__} can't have a batched method, because its instances can't be weakly referenced: add "
        "'__weakref__' to its __slots__. In a dataclass with slots=True, add weakref_slot=True; before Python 3.11, "
        "inherit from a class whose __slots__ are ('__weakref__',)"
    )


class Decorator(Protocol):
    """The type of a decorator that `batched` returns. It takes a function or method that takes a list of jobs."""

    @overload
    def __call__(self, function: Callable[[list[Job]], None], /) -> BatchedFunction[Job, None]: ...
    @overload
    def __call__(
        self, function: Callable[[list[Job]], Iterable[ResultAt[Value]]], /
    ) -> BatchedFunction[Job, Value]: ...
    @overload
    def __call__(self, function: Callable[[list[Job]], Iterable[Value]], /) -> BatchedFunction[Job, Value]: ...
    @overload
    def __call__(self, function: Callable[[Any, list[Job]], None], /) -> BatchedFunction[Job, None]: ...
    @overload
    def __call__(
        self, function: Callable[[Any, list[Job]], Iterable[ResultAt[Value]]], /
    ) -> BatchedFunction[Job, Value]: ...
    @overload
    def __call__(self, function: Callable[[Any, list[Job]], Iterable[Value]], /) -> BatchedFunction[Job, Value]: ...


def batched(policy: BatchingPolicy[Any] = DEFAULT_POLICY, **options: "Unpack[BatcherOptions]") -> Decorator:
    """Decorate a function that takes a list of jobs, so that you can call it with a single job.

    Calls from several threads share batches.

    >>> from microbatch import Interval, Size
    >>> @batched(Size(100) | Interval(0.01))
    ... def lengths(words):
    ...     return [len(word) for word in words]
    >>> lengths("microbatch")
    10
    >>> lengths.shutdown()
    True

    You can decorate methods too:

    * For a method, each instance has its own batcher. The class must allow weak references to its instances.
    * For a class method, each class has its own batcher. Put ``@batched`` above ``@classmethod``.
    * For a static method, the order of the two decorators does not matter.

    Args:
        policy: When a batch is dispatched, and how much it can hold. See `Batcher`.
        options: All other arguments of `Batcher`.

    Raises:
        TypeError, ValueError: An argument is invalid, or the function does not take a list of jobs. An invalid policy
            is found immediately, and all other mistakes when the function is decorated.
    """
    check_policy("policy", policy, ": write @batched(Size(100)), or @batched() for the default policy")

    def make(processor: Callable[[list[Any]], Any]) -> Batcher[Any, Any]:
        return Batcher(processor, policy, **options)

    def decorate(function: Callable[..., Any]) -> BatchedFunction[Any, Any]:
        return BatchedFunction(function, make)

    return decorate


def _call_method(function: Callable[..., Any], reference: "weakref.ref[object]", jobs: list[Any]) -> Any:
    instance = reference()
    if instance is None:  # possible if the caller has kept only the batcher
        raise ReferenceError(f"the instance that the method {_name(function)} is bound to was garbage-collected")
    return function(instance, jobs)


def _keeping(owner: object, results: Iterator[JobResult[Value]]) -> Iterator[JobResult[Value]]:
    """Yield *results*. The generator refers to *owner*, and so keeps it alive until its end."""
    yield from results
