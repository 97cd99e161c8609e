"""`batched`: a function of many jobs, called with one."""

import functools
import weakref
from typing import Any, Callable, Dict, Generic, Iterable, Iterator, List, Optional, Protocol, TypeVar, overload

from microbatch._futures import JobFuture, Keep
from microbatch._results import JobResult
from microbatch.batcher import Batcher
from microbatch._policy import BatchingPolicy, check_policy
from microbatch.policies import DEFAULT_POLICY

__all__ = ["BatchedFunction", "batched"]

Job = TypeVar("Job")
Value = TypeVar("Value")


class BatchedFunction(Generic[Job, Value]):
    """What `batched` makes of a function: call it with a single job, from as many threads as you like.

    Attributes:
        batcher: the `Batcher` behind it. `submit`, `map` and `shutdown` are its own.
    """

    def __init__(self, function: Callable[..., Any], make: Callable[..., Batcher[Job, Value]]) -> None:
        self.batcher = make(function)
        self._function = function
        self._make = make
        self._owner: Optional[object] = None  # the instance, in what `__get__` returns
        self._batchers: Dict[int, Batcher[Job, Value]] = {}  # by the id of a living instance
        functools.update_wrapper(self, function)

    def __call__(self, job: Job) -> Value:
        """Submit *job*, wait for its result, and return its value. Raises what `submit` and the job raise."""
        return self.submit(job).result().value

    def submit(
        self, job: Job, *, timeout: Optional[float] = None, expires_in: Optional[float] = None
    ) -> JobFuture[Value]:
        """See `Batcher.submit`."""
        future = self.batcher.submit(job, timeout=timeout, expires_in=expires_in)
        if self._owner is not None:
            future.add_done_callback(Keep(self._owner))
        return future

    def map(
        self, jobs: Iterable[Job], *, timeout: Optional[float] = None, buffersize: Optional[int] = None
    ) -> Iterator[JobResult[Value]]:
        """See `Batcher.map`."""
        results = self.batcher.map(jobs, timeout=timeout, buffersize=buffersize)
        return results if self._owner is None else _keeping(self._owner, results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: Optional[float] = None) -> bool:
        """See `Batcher.shutdown`."""
        return self.batcher.shutdown(wait, cancel_futures=cancel_futures, timeout=timeout)

    def __get__(self, instance: Optional[object], owner: Optional[type] = None) -> "BatchedFunction[Job, Value]":
        """Bind to an instance, as a method does. Each instance has a batcher of its own."""
        if instance is None:
            return self
        bound = BatchedFunction[Job, Value].__new__(BatchedFunction)
        bound.__dict__.update(self.__dict__, _owner=instance, batcher=self._batcher_of(instance))
        return bound

    def _batcher_of(self, instance: object) -> Batcher[Job, Value]:
        batcher = self._batchers.get(id(instance))
        if batcher is None:
            # The worker thread must not keep the instance: an unused one can then be collected, which shuts its
            # batcher down. While it has jobs to do, their futures keep it: see `submit`.
            batcher = self._make(functools.partial(_call_method, self._function, weakref.ref(instance)))
            batcher = self._batchers.setdefault(id(instance), batcher)  # of two threads, one gets its own in
            weakref.finalize(instance, self._batchers.pop, id(instance), None).atexit = False
        return batcher


class Decorator(Protocol):
    """What `batched` returns: takes a function, or a method, of a list of jobs."""

    @overload
    def __call__(self, function: Callable[[List[Job]], None], /) -> BatchedFunction[Job, None]: ...
    @overload
    def __call__(self, function: Callable[[List[Job]], Iterable[Value]], /) -> BatchedFunction[Job, Value]: ...
    @overload
    def __call__(self, function: Callable[[Any, List[Job]], None], /) -> BatchedFunction[Job, None]: ...
    @overload
    def __call__(self, function: Callable[[Any, List[Job]], Iterable[Value]], /) -> BatchedFunction[Job, Value]: ...


def batched(policy: BatchingPolicy[Any] = DEFAULT_POLICY, **options: Any) -> Decorator:
    """Make a function of many jobs callable with one, so that calls from many threads go together.

    >>> from microbatch import Interval, Size
    >>> @batched(Size(100) | Interval(0.01))
    ... def lengths(words):
    ...     return [len(word) for word in words]
    >>> lengths("microbatch")
    10
    >>> lengths.shutdown()
    True

    A method works alike, with a batcher for each instance.

    Args:
        policy: see `Batcher`.
        options: all other arguments of `Batcher`.

    Raises:
        TypeError, ValueError: as `Batcher` does, when the function is decorated.
    """
    check_policy("policy", policy, ": write @batched(Size(100)), or @batched() for the default policy")

    def make(processor: Callable[[List[Any]], Any]) -> Batcher[Any, Any]:
        return Batcher(processor, policy, **options)

    def decorate(function: Callable[..., Any]) -> BatchedFunction[Any, Any]:
        return BatchedFunction(function, make)

    return decorate


def _call_method(function: Callable[..., Any], reference: "weakref.ref[object]", jobs: List[Any]) -> Any:
    instance = reference()
    if instance is None:  # only the batcher was kept
        raise ReferenceError(f"the instance whose method {function.__name__} is has been collected")
    return function(instance, jobs)


def _keeping(owner: object, results: Iterator[JobResult[Value]]) -> Iterator[JobResult[Value]]:
    yield from results
