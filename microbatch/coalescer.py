"""Equal jobs that are in flight at the same time share one job."""

import os
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from microbatch._basics.arguments import check_callable, check_number, check_timeout, shown
from microbatch._basics.clock import let_others_run
from microbatch._forming.lanes import safe
from microbatch.batcher import Batcher
from microbatch.errors import BacklogFull
from microbatch.futures.coalesced import CoalescedFuture, SharedJob
from microbatch.futures.job_future import NOT_ACCEPTED, JobFuture

__all__ = ["Coalescer", "coalescing"]

Job = TypeVar("Job")
Value = TypeVar("Value")

_TRIES = 1_000
"""How often a call looks whether an equal job has been accepted, or removed. Then it submits a job of its own, which no
other call can join. It may have interrupted the call that submits the other job, or the user's class of the key may not
find its own keys."""


class Coalescer(Generic[Job, Value]):
    """Submits jobs to a batcher, but not while an equal job is in flight. See `coalescing`.

    Attributes:
        batcher: The batcher.
    """

    def __init__(self, batcher: Batcher[Job, Value], key: Callable[[Job], Hashable] | None) -> None:
        self.batcher = batcher
        self._key = key
        # With the ident of the process, because a forked child must not wait for a job of its parent.
        self._in_flight: dict[Hashable, SharedJob] = {}

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> JobFuture[Value]:
        """Return a future of the `JobResult` of an equal job that is in flight. If there is none, submit *job*.

        This blocks and raises as `Batcher.submit` does if it has to submit *job*. Otherwise, it never blocks, even if
        the queue is full.

        Args:
            job: Any object. If an equal job is in flight, the processor does not get this one.
            timeout: See `Batcher.submit`.
            expires_in: See `Batcher.submit`. A job with several callers expires at the latest of their times, and never
                if one of them set none. Callers that have cancelled count too.

        Raises:
            TypeError: *key* is not given, and *job* is not hashable; or the key is not.
            Exception: Whatever *key* or `Batcher.submit` raises.
        """
        if timeout is not None:
            timeout = check_number("timeout", timeout)
        if expires_in is not None:
            expires_in = check_timeout("expires_in", expires_in)
        place = os.getpid(), safe(self._key_of(job))
        queue = self.batcher._engine.queue
        queue.refuse_if_closed()
        caller: CoalescedFuture[Value] = CoalescedFuture(job, queue)
        caller.submitted = now = queue.clock.now()
        if expires_in is not None:
            caller.expires_in, caller._expires = expires_in, now + expires_in
        try:
            shared = self._in_flight.get(place)
            if shared is not None and shared.add(caller):
                queue.note_return(now)
            else:
                self._submit(place, caller, timeout, expires_in)
        except BaseException:
            if "shared" in vars(caller):
                caller.cancel()
            raise
        return caller

    def _key_of(self, job: Job) -> Hashable:
        try:
            key: Hashable = job if self._key is None else self._key(job)
        except StopIteration as error:  # it would silently end a generator of the caller: see PEP 479
            raise RuntimeError("key raised StopIteration") from error
        return self.batcher._hashable(key)

    def _submit(
        self, place: Hashable, caller: CoalescedFuture[Any], timeout: float | None, expires_in: float | None
    ) -> None:
        try:
            self._try_to_submit(place, caller, 0, expires_in)
        except BacklogFull:
            if timeout == 0:
                raise
            self._try_to_submit(place, caller, timeout, expires_in)

    def _try_to_submit(
        self, place: Hashable, caller: CoalescedFuture[Any], timeout: float | None, expires_in: float | None
    ) -> None:
        """Submit a job, or join an equal one. With a *timeout*, first wait for space."""
        batcher = self.batcher
        engine = batcher._engine
        queue = engine.queue
        shared = SharedJob(caller.job, queue, self._in_flight, place)
        batcher._set_attributes(shared)
        try:
            if timeout != 0:
                queue.reserve(shared, timeout)
            if self._joins_another(place, shared, caller):
                queue.note_return(caller.submitted)
            else:
                caller.shared = shared
                shared.callers[caller] = None
                batcher._accept(engine, shared, 0, expires_in)
        finally:
            if shared._epoch == NOT_ACCEPTED and not shared.done():
                queue.waiting.pop(shared, None)
                queue.withdraw(shared)
            if shared.done():  # refused after all, perhaps when other callers had joined
                shared._run_callbacks()

    def _joins_another(self, place: Hashable, shared: SharedJob, caller: CoalescedFuture[Any]) -> bool:
        """Enter *shared* into the jobs in flight, unless the caller can join one of them. Return whether it has."""
        for _ in range(_TRIES):
            found = self._in_flight.setdefault(place, shared)
            if found is shared:
                return False
            if found.add(caller):
                return True
            if found.is_over:
                found.retire()
            else:
                let_others_run()  # it is not accepted yet
        return False

    def __repr__(self) -> str:
        return f"coalescing({self.batcher!r})"


def coalescing(batcher: Batcher[Job, Value], key: Callable[[Job], Hashable] | None = None) -> Coalescer[Job, Value]:
    """Return an object whose `Coalescer.submit` lets equal jobs that are in flight share one job.

    A job is in flight from its submission until it is settled. If a caller submits an equal job in that time, nothing
    is added to the queue: the caller gets a future of its own, with the result of the first job. All callers get the
    same value, so none of them should change it. If the job fails, each gets an exception object of its own. The job is
    cancelled when all of its callers have cancelled.

    The jobs that you pass to `Batcher.submit` are not shared, nor are those of another coalescer of the same batcher.

    >>> from microbatch import Batcher, Size
    >>> calls = []
    >>> def look_up(names):
    ...     calls.append(names)
    ...     return [name.upper() for name in names]
    >>> with Batcher(look_up, Size(2)) as batcher:
    ...     people = coalescing(batcher)
    ...     futures = [people.submit(name) for name in ["ada", "ada", "ada", "grace"]]
    ...     [future.result().value for future in futures]
    ['ADA', 'ADA', 'ADA', 'GRACE']
    >>> calls
    [['ada', 'grace']]

    Args:
        batcher: The batcher that processes the jobs. Shut it down as usual.
        key: A function that returns a hashable key. Jobs with the same key are equal. None means that the job is the
            key. Keys are compared as in a dict.
    """
    if not isinstance(batcher, Batcher):
        raise TypeError(f"batcher must be a Batcher, got {shown(batcher)}")
    if key is not None:
        check_callable("key", key)
    return Coalescer(batcher, key)
