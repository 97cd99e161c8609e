"""Equal jobs that are in flight at the same time share one job."""

import os
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from microbatch._basics.arguments import check_callable, check_number, check_timeout, shown
from microbatch._basics.clock import let_others_run
from microbatch._engine.engine import Engine
from microbatch._forming.lanes import safe
from microbatch.batcher import Batcher
from microbatch.errors import BacklogFull
from microbatch.futures.coalesced import TRIES, CoalescedFuture, JobsInFlight, SharedJob
from microbatch.futures.job_future import NOT_ACCEPTED, JobFuture

__all__ = ["Coalescer", "coalescing"]

Job = TypeVar("Job")
Value = TypeVar("Value")


class Coalescer(Generic[Job, Value]):
    """Submits jobs to a batcher, but not while an equal job is in flight. See `coalescing`.

    Attributes:
        batcher: The batcher.
    """

    def __init__(self, batcher: Batcher[Job, Value], key: Callable[[Job], Hashable] | None) -> None:
        self.batcher = batcher
        self._key = key
        # With the ident of the process, because a forked child must not wait for a job of its parent.
        self._in_flight = JobsInFlight()

    def submit(self, job: Job, *, timeout: float | None = None, expires_in: float | None = None) -> JobFuture[Value]:
        """Return a future for the result of an equal job that waits or runs. If there is none, submit *job*.

        This blocks and raises as `Batcher.submit` does if it has to submit *job*. Otherwise, it never blocks, even if
        the queue is full.

        Args:
            job: Any object. If an equal job waits or runs, the processor does not get this one.
            timeout: See `Batcher.submit`.
            expires_in: See `Batcher.submit`. A job with several callers expires when the times of all of them have run
                out, and never if one of them set none. Callers that have cancelled count too.

        Raises:
            TypeError: The key of *job* is not hashable. Without a *key* function, that is *job* itself.
            Exception: Whatever *key* or `Batcher.submit` raises.
        """
        if timeout is not None:
            timeout = check_number("timeout", timeout)
        if expires_in is not None:
            expires_in = check_timeout("expires_in", expires_in)
        place = self._place_of(job)
        caller = self._new_caller(job, expires_in)
        try:
            if not self._joins(place, caller):
                self._submit(place, caller, timeout, expires_in)
        except BaseException:
            caller.give_up()
            raise
        return caller

    @property
    def _engine(self) -> Engine:
        return self.batcher._engine

    def _place_of(self, job: Any) -> Hashable:
        """Return the key of a job in the dict of the jobs in flight."""
        try:
            key: Hashable = job if self._key is None else self._key(job)
        except StopIteration as error:  # it could silently end a loop of the caller, such as one over `map(...)`
            raise RuntimeError("key raised StopIteration") from error
        return os.getpid(), safe(self.batcher._hashable(key))

    def _new_caller(self, job: Any, expires_in: float | None) -> CoalescedFuture[Any]:
        queue = self._engine.queue
        queue.refuse_if_closed()
        caller: CoalescedFuture[Any] = CoalescedFuture(job, queue)
        caller.submitted = now = queue.clock.now()
        if expires_in is not None:
            caller.expires_in, caller._expires = expires_in, now + expires_in
        return caller

    def _joins(self, place: Hashable, caller: CoalescedFuture[Any]) -> bool:
        """Have a caller join an equal job, and return whether there is one."""
        shared = self._in_flight.get(place)
        if shared is None or not shared.add(caller):
            return False
        self._engine.queue.note_return(caller.submitted)
        return True

    def _submit(
        self, place: Hashable, caller: CoalescedFuture[Any], timeout: float | None, expires_in: float | None
    ) -> None:
        try:
            self._accept(self._new_job(place, caller.job), caller, 0, expires_in)
        except BacklogFull:
            if timeout == 0:
                raise
            self._accept(self._new_job(place, caller.job), caller, timeout, expires_in)

    def _new_job(self, place: Hashable, job: Any) -> SharedJob:
        shared = SharedJob(job, self._engine.queue, self._in_flight, place)
        self.batcher._set_attributes(shared)
        return shared

    def _accept(
        self, shared: SharedJob, caller: CoalescedFuture[Any], timeout: float | None, expires_in: float | None
    ) -> None:
        """Submit *shared*, or have the caller join an equal job. Wait for space first, unless *timeout* is 0."""
        queue = self._engine.queue
        try:
            if timeout != 0:
                queue.reserve(shared, timeout)
            shared.callers[caller] = None  # before others find the job, because nobody wants a job without callers
            if self._joins_another(shared, caller):
                shared.callers.clear()
            else:
                caller.shared = shared
                self.batcher._accept(self._engine, shared, 0, expires_in)
        finally:
            if shared._epoch == NOT_ACCEPTED and shared._stage is None:
                queue.waiting.pop(shared, None)  # L4
                try:
                    queue.make_room_for_another(shared)
                except BaseException:  # from a signal handler
                    queue.make_room_for_another(shared)
                    raise
            if shared._stage is not None:  # other callers may have joined even if the job is refused after all
                shared._run_callbacks()

    def _joins_another(self, shared: SharedJob, caller: CoalescedFuture[Any]) -> bool:
        """Have a caller join an equal job and return True, or make *shared* the job that others join."""
        for _ in range(TRIES):
            found = self._in_flight.setdefault(shared.place, shared)
            if found is shared:
                return False
            if found.add(caller):
                self._engine.queue.note_return(caller.submitted)
                return True
            if not (found.done() and self._in_flight.try_to_remove(found)):
                let_others_run()  # it is not accepted yet, or being cancelled or removed
        return False  # no other caller can join this job

    # -- for `microbatch.aio` --

    def _accepted_now(self, job: Any, expires_in: float | None) -> JobFuture[Any] | None:
        """Return the future of a job if submitting it needs no space, and None otherwise."""
        caller = self._new_caller(job, expires_in)
        try:
            return caller if self._joins(self._place_of(job), caller) else None
        except BaseException:
            caller.give_up()
            raise

    def _waiting_job(self, job: Any) -> JobFuture[Any]:
        """Return the future of a job that has to wait for space. Then call `_accept_waiting`."""
        return self._new_job(self._place_of(job), job)

    def _accept_waiting(self, shared: Any, expires_in: float | None) -> JobFuture[Any]:
        """Accept a job that has entered all bounds, and return the future for its caller."""
        caller = self._new_caller(shared.job, expires_in)
        try:
            self._accept(shared, caller, 0, expires_in)
        except BaseException:
            caller.give_up()
            raise
        return caller

    def _flush_for(self, future: JobFuture[Any]) -> None:
        self.batcher._flush_for(future)

    def __repr__(self) -> str:
        return f"coalescing({self.batcher!r})"


def coalescing(batcher: Batcher[Job, Value], key: Callable[[Job], Hashable] | None = None) -> Coalescer[Job, Value]:
    """Return an object whose `Coalescer.submit` lets equal jobs that are in flight share one job.

    A job is in flight from its submission until it is settled. If a caller submits an equal job in that time, nothing
    is added to the queue: the caller gets a future of its own, with the result of the first job. All callers get the
    same value, so none of them should change it. If the job fails, each gets an exception object of its own. The job is
    cancelled when all of its callers have cancelled.

    A caller may join a job that is already running. So the value may be older than a change that the caller has just
    made. To read it in any case, call `Batcher.submit`.

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
