"""Batchers in asyncio programs: await the result of a job, and process batches in coroutines.

A `Batcher` works in threads. Waiting in a function of this module does not block the event loop, and does not poll.

>>> import asyncio
>>> from microbatch import Batcher
>>> async def lengths(words):                # the processor, which may also be a plain function
...     await asyncio.sleep(0.001)
...     return [len(word) for word in words]
>>> async def main():
...     return [result.value for result in await asyncio.gather(submit(batcher, "tea"), submit(batcher, "milk"))]
>>> with Batcher(on_loop(lengths)) as batcher:
...     asyncio.run(main())
[3, 4]
"""

import asyncio
import contextvars
import inspect
import logging
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing
from functools import partial
from itertools import chain, islice
from typing import Any, ParamSpec, TypeVar

from microbatch._basics.arguments import check_count, check_timeout, shown
from microbatch._basics.clock import NEVER
from microbatch._basics.host import Host
from microbatch._basics.log import report
from microbatch._basics.waiting import Flag, Waiter, Waiters, try_to_find
from microbatch._engine.bounds import Bound
from microbatch._engine.process import is_exiting
from microbatch._engine.queue import JobQueue
from microbatch.batcher import Batcher
from microbatch.coalescer import Coalescer
from microbatch.errors import BacklogFull, ForkedError
from microbatch.futures.job_future import NOT_ACCEPTED, JobFuture
from microbatch.results import JobResult

__all__ = ["amap", "on_loop", "submit"]

Job = TypeVar("Job")
Value = TypeVar("Value")
Returned = TypeVar("Returned")
More = ParamSpec("More")

_TURN = 16
"""After so many jobs, `amap` lets other coroutines run."""

_PATIENCE = 5.0
"""So many seconds after tasks were cancelled, the log says which of them have not ended."""

_YEARS = 1e9
"""A time in seconds after which a timer never fires in practice."""


async def submit(
    batcher: "Batcher[Job, Value] | Coalescer[Job, Value]",
    job: Job,
    *,
    timeout: float | None = None,
    expires_in: float | None = None,
) -> JobResult[Value]:
    """Submit a job, and return its result.

    While the queue is full, the coroutine waits in the same line as the threads that `Batcher.submit` blocks. If it is
    cancelled, its job is cancelled too, unless a worker has already taken it. If a job has to wait for space, the
    *key* and *weigh* functions of the batcher may be called twice for it.

    Args:
        batcher: The batcher, or what `coalescing` returns. All event loops and threads may use it.
        job: Any object.
        timeout: How many seconds to wait while the queue is full. None means no limit, and 0 means not to wait. To
            limit the time until the result, use `asyncio.wait_for`.
        expires_in: See `Batcher.submit`.

    Raises:
        concurrent.futures.CancelledError: The job was cancelled, but not the coroutine.
        Exception: Any exception that `Batcher.submit` raises, or the exception with which the job failed.
    """
    return await _outcome(await _accepted(batcher, job, timeout, expires_in))


async def amap(
    batcher: "Batcher[Job, Value] | Coalescer[Job, Value]",
    jobs: Iterable[Job] | AsyncIterable[Job],
    *,
    buffersize: int | None = None,
) -> AsyncGenerator[JobResult[Value], None]:
    """Submit *jobs* one after another, and yield their results in the same order: `Batcher.map` for coroutines.

    Close the iterator if you leave the loop early, for example with `contextlib.aclosing`. That cancels the jobs that
    no worker has taken.

    >>> import asyncio
    >>> async def main():
    ...     return [result.value async for result in amap(batcher, ["tea", "milk"])]
    >>> with Batcher(lambda words: [len(word) for word in words]) as batcher:
    ...     asyncio.run(main())
    [3, 4]

    Args:
        batcher: The batcher, or what `coalescing` returns.
        jobs: The jobs. They are submitted while you iterate over the results. An iterable that is not asynchronous is
            read in the event loop, so reading it should not block.
        buffersize: The maximum number of jobs that are submitted before their results are yielded. None means 1,000.
    """
    size = 1_000 if buffersize is None else check_count("buffersize", buffersize)
    ahead: deque[JobFuture[Value]] = deque()
    submitted = 0
    try:
        async with aclosing(_each(jobs)) as each:
            async for job in each:
                if len(ahead) == size:
                    yield await _next_of(batcher, ahead)
                ahead.append(await _accepted(batcher, job, None, None))
                submitted += 1
                if submitted % _TURN == 0:
                    await asyncio.sleep(0)  # because nothing may have had to wait
        for _ in tuple(ahead):
            yield await _next_of(batcher, ahead)
    finally:
        for future in ahead:
            _give_up(future)


async def _each(jobs: Any) -> AsyncGenerator[Any, None]:
    if isinstance(jobs, AsyncIterable):
        async for job in jobs:
            yield job
    elif isinstance(jobs, Iterable):
        for job in jobs:
            yield job
    else:
        raise TypeError(f"jobs must be an iterable or an asynchronous iterable, got {shown(jobs)}")


async def _next_of(
    batcher: "Batcher[Any, Value] | Coalescer[Any, Value]", ahead: deque[JobFuture[Value]]
) -> JobResult[Value]:
    batcher._flush_for(ahead[0])
    result = await _outcome(ahead[0])
    ahead.popleft()
    return result


def _give_up(future: JobFuture[Any]) -> None:
    future.cancel()
    future.add_done_callback(_ignore)


def _ignore(future: JobFuture[Any]) -> None:
    """Do nothing. A done-callback counts as asking for the outcome, so a failure is not logged."""


# -- the event loops whose coroutines wait --


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> bool:
    """Schedule a call on an event loop. Return False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():  # the error comes from a signal handler
            raise
        return False
    return True


class _LoopCall:
    """A call of *function* on an event loop. Any thread may schedule it, and it runs once for all that do until then."""

    def __init__(self, loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
        self._loop = loop
        self._function = function
        self._is_scheduled = False

    def schedule(self) -> bool:
        """Schedule the call. Return False if the loop is closed."""
        if self._is_scheduled:  # L8
            return True
        try:
            self._is_scheduled = True
            return _call_soon(self._loop, self._run)
        except BaseException:  # from a signal handler, and other threads leave it to this one
            self._loop.call_soon_threadsafe(self._run)
            raise

    def _run(self) -> None:
        self._is_scheduled = False
        try:
            self._function()
        except BaseException:  # from a signal handler
            self._loop.call_soon_threadsafe(self._run)
            raise


class _Agent:
    """What is known of the coroutines of an event loop that wait.

    Attributes:
        loop: The loop.
        places: The places of the loop in the line of each bound, the first one first. Only the thread of the loop uses
            this.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.places: dict[Bound, list[_Place]] = {}
        self._arrived: deque[asyncio.Future[None]] = deque()
        self._wake_all = _LoopCall(loop, self._set_all)

    def put(self, arrival: "asyncio.Future[None]") -> None:
        """Wake a coroutine. Any thread may call this. There is one call into the loop for all that are ready."""
        self._arrived.append(arrival)
        self._wake_all.schedule()

    def _set_all(self) -> None:
        for _ in range(len(self._arrived)):
            arrival = self._arrived[0]
            if not arrival.done():
                arrival.set_result(None)
            self._arrived.popleft()

    def last_place(self, queue: JobQueue, bound: Bound) -> "_Place":
        """Return the place of the loop at the end of the line of a bound."""
        places = self.places.setdefault(bound, [])
        if not places or _last_of(bound.line) is not places[-1]:
            places.append(_Place(self, queue, bound))
        return places[-1]

    def forget(self, place: "_Place", bound: Bound) -> None:
        """Remove a place that no coroutine needs any more."""
        places = self.places[bound]
        places.remove(place)
        if not places:
            del self.places[bound]

    def is_next(self, bound: Bound, entry: "_Entry") -> bool:
        """Return whether no other coroutine of the loop waits for the bound before this one."""
        places = self.places.get(bound)
        return not places or next(iter(places[0].entries), entry) is entry


# By the ident of the loop. Weak, because an agent refers to its loop. The coroutines that wait keep it alive.
_agents: "weakref.WeakValueDictionary[int, _Agent]" = weakref.WeakValueDictionary()


def _agent() -> _Agent:
    """Return the agent of the running loop."""
    loop = asyncio.get_running_loop()
    found = _agents.get(id(loop))
    if found is None:
        found = _agents[id(loop)] = _Agent(loop)
    return found


# -- waiting for space --


async def _accepted(
    batcher: "Batcher[Any, Value] | Coalescer[Any, Value]", job: Any, timeout: float | None, expires_in: float | None
) -> JobFuture[Value]:
    """Submit a job, and return its future."""
    if not isinstance(batcher, (Batcher, Coalescer)):
        hint = "if it is decorated with @batched, pass its attribute 'batcher'"  # type: ignore[unreachable]
        raise TypeError(f"batcher must be a Batcher, got {shown(batcher)}: {hint}")
    seconds, queue = check_timeout("timeout", timeout), batcher._engine.queue
    if _host.get() is not None and _host.get() is queue.host:
        raise RuntimeError("the processor of a batcher can't wait for a job of that batcher: that could deadlock")
    can_wait = seconds > 0 and not queue.this_thread.is_own and not queue.drops
    agent = _agents.get(id(asyncio.get_running_loop()))
    if can_wait and agent is not None and agent.places:  # a plain `submit` could overtake another job of this loop
        if expires_in is not None:
            expires_in = check_timeout("expires_in", expires_in)
        if (future := batcher._accepted_now(job, expires_in)) is not None:
            return future
    else:
        try:
            return batcher.submit(job, timeout=0, expires_in=expires_in)
        except BacklogFull:
            if not can_wait:
                raise
    return await _accepted_later(batcher, job, seconds, expires_in)


async def _accepted_later(
    batcher: "Batcher[Any, Value] | Coalescer[Any, Value]", job: Any, seconds: float, expires_in: float | None
) -> JobFuture[Value]:
    """Wait until a job has entered all bounds of the queue, and then submit it."""
    queue = batcher._engine.queue
    future: JobFuture[Value] = batcher._waiting_job(job)
    future.submitted = queue.clock.now()
    entry = _Entry(future)
    loop = asyncio.get_running_loop()
    # Not `asyncio.wait_for`. Before Python 3.12, it ignores a cancellation that comes just when the wait is over.
    timer = loop.call_later(seconds, entry.expire) if seconds < NEVER else None
    try:
        await _enter(_agent(), queue, entry, queue.bounds_of(future))
        return batcher._accept_waiting(future, expires_in)
    except BaseException:
        if future._epoch == NOT_ACCEPTED and future._stage is None:
            queue.waiting.pop(future, None)  # L4
            try:
                queue.make_room_for_another(future)
            except BaseException:  # from a signal handler
                queue.make_room_for_another(future)
                raise
        raise
    finally:
        if timer is not None:
            timer.cancel()


class _Entry:
    """A coroutine that waits until its job can enter the bounds of the queue.

    Attributes:
        job: The job.
        changed: Set when the coroutine has to look again.
        has_expired: Whether it has waited for as long as it may.
    """

    def __init__(self, job: JobFuture[Any]) -> None:
        self.job = job
        self.changed = asyncio.Event()
        self.has_expired = False

    def expire(self) -> None:
        """End the wait, unless there is space. Only the loop calls this."""
        self.has_expired = True
        self.changed.set()


async def _enter(agent: _Agent, queue: JobQueue, entry: _Entry, bounds: list[Bound]) -> None:
    full = queue.enter_all(bounds, entry.job, partial(agent.is_next, entry=entry))
    while full is not None:
        full = await _wait_for(full, agent, queue, entry, bounds)


async def _wait_for(bound: Bound, agent: _Agent, queue: JobQueue, entry: _Entry, bounds: list[Bound]) -> Bound | None:
    """Wait in the line of a bound until the job can enter it. Return another bound that it can't enter then, or None."""
    place = agent.last_place(queue, bound)
    try:
        place.join(entry)
        return await _wait_in_line(bound, agent, queue, entry, bounds)
    finally:
        place.entries.pop(entry, None)  # L4
        place.leave(entry)


async def _wait_in_line(  # L9
    bound: Bound, agent: _Agent, queue: JobQueue, entry: _Entry, bounds: list[Bound]
) -> Bound | None:
    while (full := queue.enter_all(bounds, entry.job, partial(agent.is_next, entry=entry))) is bound:
        if entry.has_expired:
            raise bound.error()
        moment = bound.look_again()
        if moment < NEVER and agent.is_next(bound, entry):
            agent.loop.call_later(moment - queue.clock.now(), entry.changed.set)
        await entry.changed.wait()
        entry.changed.clear()  # before the bounds are checked again (L8)
    return full


class _Place(Waiter):
    """The place of an event loop in the line of a bound, among the waiters of blocked threads.

    The coroutines of the loop that come one after another share it. Only the first one of the loop enters the bound, so
    they enter in the order in which they came. (Threads may overtake each other.)

    Attributes:
        entries: The coroutines, the first one first. Only the thread of the loop changes this.
    """

    def __init__(self, agent: _Agent, queue: JobQueue, bound: Bound) -> None:
        self.entries: OrderedDict[_Entry, None] = OrderedDict()
        self._agent = agent
        self._queue = queue
        self._bound = bound
        self._looking = _LoopCall(agent.loop, self._look)

    def join(self, entry: _Entry) -> None:
        """Add a coroutine. It has to look for space again then (L8)."""
        self.entries[entry] = None
        self._stand()

    def _stand(self) -> None:
        self.thread = threading.get_ident()
        self.interrupted, self.late_at = False, NEVER
        self.job = next(iter(self.entries)).job
        if self not in self._bound.line:
            self._queue.stand_in_line(self._bound, self)

    def leave(self, entry: _Entry) -> None:
        """Remove a coroutine, and let the next caller look."""
        self.entries.pop(entry, None)
        if self.entries:
            self._stand()
        else:
            self._bound.line.pop(self, None)
            self._agent.forget(self, self._bound)
        self._queue.pass_on(self._bound)

    def wake(self) -> bool:
        """Let the first coroutine look again. Return False, because its loop may not run (L10)."""
        if not self._looking.schedule():
            self._bound.line.pop(self, None)
        return False

    def _look(self) -> None:
        places = self._agent.places.get(self._bound, [])
        if self in places:
            self._stand()  # it may have been late
        entries = chain.from_iterable([place.entries for place in places])
        for entry in list(entries if self._queue.closed else islice(entries, 1)):
            entry.changed.set()


def _last_of(line: Waiters) -> object:
    """Return the last waiter in a line, or None. If another thread changes the line now, return what is no waiter."""
    return try_to_find(reversed, line)


# -- waiting for the outcome --


class _Recipient(Waiter):
    """A coroutine that waits for the outcome of a job, among the waiters of blocked threads."""

    def __init__(self) -> None:
        self.arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._agent = _agent()

    def wake(self) -> bool:
        """See `Waiter.wake`. Can be called again if an exception interrupts it."""
        self._agent.put(self.arrival)
        return True


async def _outcome(future: JobFuture[Value]) -> JobResult[Value]:
    if not future.done():
        recipient, attachments = _Recipient(), future._attach()
        try:
            attachments[recipient] = None
            if not future.done():  # L8
                await recipient.arrival
        except BaseException:
            _give_up(future)
            raise
        finally:
            attachments.pop(recipient, None)
    return future.result()


# -- processors that are coroutine functions --


def on_loop(
    function: Callable[More, Awaitable[Returned]], loop: asyncio.AbstractEventLoop | None = None
) -> Callable[More, Returned]:
    """Return a processor that runs a coroutine function on an event loop.

    A worker of the batcher waits for each call, so *max_workers* calls run at the same time. If the coroutine is
    cancelled, or its loop is closed, the batch fails with `RuntimeError`.

    Args:
        function: The ``async def`` function. It is called with the list of jobs, and returns what the processor of a
            `Batcher` may return.
        loop: The loop. None means a loop in a thread of its own. The thread starts with the first batch, and all
            batchers that have this processor share it. When they have been shut down, everything that still runs on the
            loop is cancelled, and the thread ends. If you call the processor without a batcher, each call runs on a new
            loop in your thread.

    If you pass the loop of your program, the batcher needs that loop until it has been shut down. So in the thread of
    the loop, `Batcher.shutdown`, `Batcher.flush` and ``batcher.submit(...).result()`` raise `RuntimeError` instead of
    blocking it. Write ``await asyncio.to_thread(batcher.shutdown)``. While that loop is stopped, batches wait for it. If
    it is stopped when the interpreter exits, they fail with `RuntimeError`.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {shown(function)}")
    if loop is not None and not isinstance(loop, asyncio.AbstractEventLoop):
        raise TypeError(f"loop must be an event loop, got {shown(loop)}")
    return _OnLoop(function, loop)


_host: "contextvars.ContextVar[_OnLoop | None]" = contextvars.ContextVar("microbatch.aio", default=None)
"""The processor whose coroutine runs."""


class _OnLoop(Host):
    """The processor that `on_loop` returns."""

    def __init__(self, function: Callable[..., Awaitable[Any]], loop: asyncio.AbstractEventLoop | None) -> None:
        self._function = function
        self._loop = loop
        self._home = os.getpid()  # the process of the loop
        self._exits = False
        self._waiting: dict[_Outcome, None] = {}  # of the calls that run
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._use = _Use(0, None)

    def __reduce__(self) -> Any:
        if self._loop is not None:
            raise TypeError(
                "this processor can't be copied or pickled, because its event loop can't leave the process: call "
                "on_loop without a loop"
            )
        return on_loop, (self._function,)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the coroutine function, and wait for it."""
        call = partial(self._function, *arguments, **named)
        if self.needs_this_thread():
            raise RuntimeError("a thread can't wait for a coroutine on the event loop that it runs itself")
        if self._loop is not None and self._home != os.getpid():
            raise ForkedError("the event loop belongs to the parent process")
        loop = self._loop or self._own_loop()
        if loop is None:  # no batcher would end its thread, or it can't be started
            return asyncio.run(_awaited(call))
        outcome = _Outcome()
        try:
            self._waiting[outcome] = None
            loop.call_soon_threadsafe(_Run(partial(_run, call, outcome, self), outcome, self._latest().tasks).start)
            if self._exits:  # L8
                self._end_stopped()
            if not loop.is_closed():  # otherwise it may have been closed before the call came in
                outcome.done.wait()
        finally:
            self._waiting.pop(outcome, None)
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def _own_loop(self) -> asyncio.AbstractEventLoop | None:
        while True:
            use = self._latest()
            if use.thread is not None and not use.thread.has_ended():
                return use.thread.loop
            thread = _new_thread() if use.users else None
            if thread is None or use.replace(_Use(use.users, thread)):
                return None if thread is None else thread.loop
            thread.end()  # another worker has started one, or a batcher has come or gone

    def _latest(self) -> "_Use":
        while (successor := self._use.successor) is not None:
            self._use = successor
        return self._use

    def open(self) -> Callable[[], object]:
        """See `Host.open`."""
        if self._process != os.getpid():  # in a forked child, the thread does not exist
            self._reset()
        while not (use := self._latest()).replace(_Use(use.users + 1, use.thread, use.tasks)):
            pass
        return self._close

    def _close(self) -> None:
        while not (use := self._latest()).replace(use.without_one()):
            pass
        if use.users > 1:
            return
        if self._loop is not None:
            _call_soon(self._loop, _cancel_all, use.tasks)
        if use.thread is not None:
            use.thread.end()

    def note_exit(self) -> None:
        """See `Host.note_exit`."""
        self._exits = True
        self._end_stopped()

    def _end_stopped(self) -> None:
        if self._loop is not None and not self._loop.is_running():
            for outcome in list(self._waiting):
                outcome.error = RuntimeError("the interpreter is exiting, and the event loop of on_loop does not run")
                outcome.done.set()

    def needs_this_thread(self) -> bool:
        """See `Host.needs_this_thread`."""
        thread = self._latest().thread
        loop = self._loop if thread is None else thread.loop
        return loop is not None and asyncio._get_running_loop() is loop


class _Use:
    """The batchers that use a processor, and what they share. Never changes, but is replaced, without a lock (L1).

    Attributes:
        users: How many batchers have the processor and have not been shut down.
        thread: The thread of the processor's own loop.
        tasks: The calls on a loop that was passed. Weak, so that they are dropped with the loop. Only the thread of the
            loop uses this.
        successor: The object that has replaced this one, or None.
    """

    successor: "_Use | None" = None

    def __init__(
        self, users: int, thread: "_LoopThread | None", tasks: "weakref.WeakSet[asyncio.Task[None]] | None" = None
    ) -> None:
        self.users = users
        self.thread = thread
        self.tasks = weakref.WeakSet[asyncio.Task[None]]() if tasks is None else tasks

    def replace(self, successor: "_Use") -> bool:
        """Replace this, unless another thread has done so."""
        return vars(self).setdefault("successor", successor) is successor

    def without_one(self) -> "_Use":
        """Return what is left if a batcher goes. The next one shares nothing with the last one."""
        return _Use(0, None) if self.users == 1 else _Use(self.users - 1, self.thread, self.tasks)


def _cancel_all(tasks: "weakref.WeakSet[asyncio.Task[None]]") -> None:
    for task in list(tasks):
        task.cancel()


def _new_thread() -> "_LoopThread | None":
    """Start the thread of a loop. Return None if the interpreter is exiting, so that no thread can start."""
    try:
        return _LoopThread()
    except RuntimeError as error:
        if not is_exiting(error):
            raise
        return None


class _LoopThread(threading.Thread):
    """A thread that runs an event loop."""

    def __init__(self) -> None:
        super().__init__(name="microbatch-loop", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._runs = Flag(False)
        self.start()
        self._runs.wait()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Run the loop until `end` is called. Then cancel what is left."""
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # the loop could not be created
            self._error = error
        finally:
            self._runs.set()

    async def _serve(self) -> None:
        self.loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        self._runs.set()
        await self._ending.wait()
        self.loop.call_later(_PATIENCE, _report_all, asyncio.current_task())  # unless the loop is closed by then

    def has_ended(self) -> bool:
        """Return whether the loop has ended too early, as when a callback has raised `SystemExit`."""
        return self.loop is None or self.loop.is_closed()

    def end(self) -> None:
        """End the loop, and wait until the thread has ended."""
        if self.loop is not None:
            _call_soon(self.loop, self._ending.set)
        self.join()


def _report_all(but: object) -> None:
    """Log the tasks that keep a loop from ending."""
    tasks = [task for task in asyncio.all_tasks() if task is not but]
    report("the shutdown waits for tasks that were cancelled but do not end: %s", tasks, level=logging.WARNING)


class _Outcome:
    """What the coroutine of a batch returned or raised."""

    def __init__(self) -> None:
        self.done = Flag(False)
        self.value: Any = None
        self.error: BaseException | None = RuntimeError("the processor was cancelled, or its event loop was closed")


class _Run:
    """The call of a coroutine function for a batch.

    Only the loop refers to it: first the call of `start`, and then a timer. Both are dropped when the loop is closed.
    So that ends the wait for the outcome, even if the coroutine is neither cancelled nor collected then.
    """

    def __init__(
        self,
        function: Callable[[], Coroutine[Any, Any, None]],
        outcome: _Outcome,
        tasks: "weakref.WeakSet[asyncio.Task[None]]",
    ) -> None:
        self._function = function
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self._outcome = outcome
        self._tasks = tasks

    def start(self) -> None:
        """Start the coroutine."""
        loop = asyncio.get_running_loop()
        self._coroutine = self._function()
        task = loop.create_task(self._coroutine)
        self._tasks.add(task)
        timer = weakref.ref(loop.call_later(_YEARS, self.start))
        task.add_done_callback(partial(_cancel, timer))

    def __del__(self) -> None:
        self._outcome.done.set()
        coroutine = self._coroutine
        if coroutine is not None and inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
            coroutine.close()  # so that Python does not warn that it was never awaited


def _cancel(timer: "weakref.ref[asyncio.TimerHandle]", task: object) -> None:
    handle = timer()
    if handle is not None:
        handle.cancel()


async def _run(function: Callable[[], Awaitable[Any]], outcome: _Outcome, host: _OnLoop) -> None:
    _host.set(host)
    try:
        outcome.value = await _awaited(function)
        outcome.error = None
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:  # even `SystemExit`, which would end the loop, and so fail all other batches
        outcome.error = error
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        outcome.done.set()


async def _awaited(function: Callable[[], Awaitable[Any]]) -> Any:
    returned: object = function()
    if not isinstance(returned, Awaitable):
        got = shown(returned)
        raise TypeError(f"the function must return an awaitable, got {got}: a plain function needs no on_loop")
    return await returned
