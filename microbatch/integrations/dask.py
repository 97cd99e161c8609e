"""Shares one batcher between several processes, with a Dask cluster. Needs the extra ``dask``.

If jobs come from several processes, each process sees only some of them. `shared` returns a processor that sends its
jobs to one `Batcher` in the cluster. All processes that use the same name share that batcher, so its batches hold jobs
from all of them::

    def connect():
        return Client("tcp://scheduler:8786")

    inserts = Batcher(shared("inserts", insert_many, Size(500) | Natural(), client=connect))
    inserts.submit(row).result().value

The local batcher ``inserts`` only collects the jobs of one message to the cluster.

If you only want to process batches in a cluster, and form them locally, you don't need this module. Use
``Batcher(insert_many, executor=client.get_executor())``.
"""

import asyncio
import io
import os
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from pickle import PickleBuffer, PicklingError, UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from distributed import Client, Lock, Variable
from distributed.protocol import to_serialize
from distributed.protocol.pickle import cloudpickle, dumps, loads

from microbatch import DEFAULT_POLICY, BacklogFull, Batcher, BatcherStats, BatchingPolicy, MicrobatchError
from microbatch.batcher import UnnamedOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CollectorLost", "SharedProcessor", "shared"]

# What Dask raises if a connection, a client or an actor is lost. AttributeError comes from a closed client.
_DASK_ERRORS = (OSError, RuntimeError, AttributeError, CancelledError, asyncio.TimeoutError)
# Exceptions of user code. One that reaches the event loop of a Dask worker would end the worker for all processes.
_USER_ERRORS = (Exception, SystemExit)

_PROTOCOL = 5  # of pickle
_LARGE = 64 * 1024  # bytes. A buffer of this size is sent beside the pickled message, instead of being copied into it.
_CONNECT = 2.0  # seconds to wait for an answer of the collector over a direct connection


class CollectorLost(MicrobatchError, ConnectionError):
    """The process with the shared batcher has died, or can't be reached.

    If the message says that nothing was sent, the jobs were not processed. Otherwise, they may have been.
    """


class SharedProcessor:
    """A processor that sends jobs to a batcher in a Dask cluster. Create it with `shared`."""

    def __init__(self, name: str, batcher_arguments: bytes, connect: Callable[[], Client]) -> None:
        self._name = f"microbatch-{name}"
        self._arguments = batcher_arguments  # the pickled arguments of a collector
        self._connect = connect
        # By process. A mutex is held while a thread connects and looks for the actor, so that only one thread does.
        # Each process has its own, because a mutex that is held at a fork is held in the child forever. It is
        # re-entrant, so that a *client* function that calls this processor gets a RecursionError instead of blocking.
        self._mutexes: dict[int, Any] = {}
        self._process = 0  # the process that `_client` belongs to
        self._client: Any = None
        self._found: Any = None  # the link to the actor

    def __call__(self, jobs: list[Any]) -> list[Any]:
        """Send *jobs* to the shared batcher, wait, and return one outcome per job: a value or an exception.

        Raises:
            CollectorLost: The shared batcher can't be reached, or its process has died.
        """
        message = _pickle_together(jobs)
        answer = self._ask("run", *message) if message else None
        return self._send_separately(jobs) if answer is None else _unpickle_outcomes(*answer)

    def _send_separately(self, jobs: list[Any]) -> list[Any]:
        """Pickle jobs one by one if they can't be pickled or unpickled together. Only the bad ones fail."""
        pickled = [_pickle_job(job) for job in jobs]
        sent = [job for job in pickled if isinstance(job, bytes)]
        answers = iter(_unpickle_outcomes(*self._ask("run_separately", pickle.dumps(sent))) if sent else ())
        return [next(answers) if isinstance(job, bytes) else job for job in pickled]

    def stats(self) -> BatcherStats:
        """Return the counts of the shared batcher, for all processes together."""
        stats: BatcherStats = self._ask("stats")
        return stats

    def shutdown(self) -> None:
        """Shut down the shared batcher for all processes. Block until its jobs are done. Then free its name."""
        self._ask("shutdown")
        _wait_for(self._client, self._unpublish(self._client))

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            client, link = self._link()
        except _DASK_ERRORS as error:
            raise CollectorLost(f"{self._name} can't be reached, so nothing was sent: {error}") from error
        try:
            return _wait_for(client, link.call(method, *arguments))
        except _DASK_ERRORS as error:  # exceptions of the batcher itself are among the outcomes
            self._found = None  # the actor may still be alive; the next call looks for it again
            raise CollectorLost(f"{self._name} has died, or can't be reached any more") from error

    def _link(self) -> "tuple[Client, _Link]":
        """Return the client and a link to the actor. If no living actor is known, find or create one."""
        with self._mutexes.setdefault(os.getpid(), threading.RLock()):
            client, found = self._client, self._found
            if self._process != os.getpid() or client.status == "closed":
                client, found = self._connect(), None
                if client.status == "closed":
                    raise RuntimeError("client= must return an open client, got a closed one")
                self._process, self._client, self._found = os.getpid(), client, None
            if found is None or found.future.status != "finished":
                with client.as_current():  # an actor uses the current client
                    self._found = found = _wait_for(client, self._find_or_create(client))
            return client, found

    async def _find_or_create(self, client: Client) -> "_Link":
        async with self._locked(client):
            link = await self._find(client)
            if link is None:
                # The arguments are bytes, so that the scheduler does not need the module of the processor.
                future = client.submit(_Collector, self._arguments, actor=True, pure=False)
                link = await _Link.to(client, future)
                await Variable(self._name, client=client).set(future)
            return link

    @asynccontextmanager
    async def _locked(self, client: Client) -> AsyncIterator[None]:
        lock = Lock(self._name, scheduler_rpc=client.scheduler, loop=client.loop)
        try:
            async with lock:
                yield
        finally:
            if hasattr(lock, "refresh_callback"):  # stopped, or it would renew the lock as long as the client exists
                lock.refresh_callback.stop()

    async def _find(self, client: Client) -> "_Link | None":
        """Return a link to the actor of this name, or None if there is no actor that is alive and open."""
        try:
            # Returns immediately, unless the variable was never set.
            future = await Variable(self._name, client=client).get(timeout=0.1)
            if future is not None and future.status == "finished":
                link = await _Link.to(client, future)
                return link if await link.call("is_open") else None
        except _DASK_ERRORS:
            pass
        return None

    async def _unpublish(self, client: Client) -> None:
        async with self._locked(client):
            if await self._find(client) is None:  # not if another actor has been created since
                await Variable(self._name, client=client).set(None)


class _Link(NamedTuple):
    """A way to call the methods of an actor."""

    actor: Any
    future: Any
    worker: Any  # the worker of the actor, or None if only the scheduler can reach it

    @classmethod
    async def to(cls, client: Client, future: Any) -> "_Link":
        """Create a link to the actor that *future* has as its result.

        It connects to the worker directly if that is possible, because the scheduler would spend as much time on a
        message as the worker does.
        """
        actor = await future
        link = cls(actor, future, client.rpc(actor._address))
        try:
            if client.direct_to_workers is not False:
                await asyncio.wait_for(link._send("is_open"), _CONNECT)
                return link
        except _DASK_ERRORS:
            pass
        return link._replace(worker=None)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the actor. Raise RuntimeError if the actor is lost, because Dask may then never reply."""
        send = getattr(self.actor, method) if self.worker is None else partial(self._send, method)
        answer = asyncio.ensure_future(send(*arguments))
        while not (await asyncio.wait([answer], timeout=1))[0]:
            if self.future.status != "finished":
                answer.cancel()
                raise RuntimeError("the actor is lost")
        return await answer

    async def _send(self, method: str, *arguments: Any) -> Any:
        wrapped = [to_serialize(argument) for argument in arguments]
        try:
            reply = await self.worker.actor_execute(actor=self.actor.key, function=method, args=wrapped)
        except KeyError as error:
            raise RuntimeError("the worker doesn't have the actor any more") from error
        if "exception" in reply:
            raise reply["exception"]
        return reply["result"]


class _Collector:
    """The Dask actor that has the shared batcher."""

    def __init__(self, batcher_arguments: bytes) -> None:
        processor, policy, options = loads(batcher_arguments)
        self._batcher: Batcher[Any, Any] = Batcher(processor, policy, **options)
        self._open = True
        # Waits while the queue is full. One thread is as fast as several, and the default threads of the event loop
        # stay free for a shutdown.
        self._waiting = ThreadPoolExecutor(1)

    async def run(self, message: bytes, *buffers: Any) -> Any:
        """Process the jobs of a message, and return their pickled outcomes, or None if the jobs can't be unpickled."""
        try:
            jobs = pickle.loads(message, buffers=buffers)
        except _USER_ERRORS:
            return None
        return _pickle_outcomes(await self._process(jobs))

    async def run_separately(self, message: bytes) -> Any:
        """Process jobs that were pickled one by one, and return their pickled outcomes."""
        jobs, errors = [], {}
        for number, job in enumerate(pickle.loads(message)):
            try:
                jobs.append(loads(job))
            except _USER_ERRORS as error:
                errors[number] = error
        outcomes = await self._process(jobs)
        for number in errors:  # in ascending order
            outcomes.insert(number, errors[number])
        return _pickle_outcomes(outcomes)

    async def _process(self, jobs: list[Any]) -> list[Any]:
        """Submit *jobs*, wait until they are done, and return the future of each job, or the error of `submit`."""
        loop = asyncio.get_running_loop()
        outcomes: list[Any] = []
        self._submit(jobs, outcomes, timeout=0)
        if len(outcomes) < len(jobs):
            await loop.run_in_executor(self._waiting, self._submit, jobs, outcomes, None)
        # The last job is usually done last, so there is one callback for all.
        for outcome in reversed(outcomes):
            if not isinstance(outcome, BaseException) and not outcome.done():
                done: Any = loop.create_future()
                outcome.add_done_callback(partial(loop.call_soon_threadsafe, done.set_result))
                await done
        return outcomes

    def _submit(self, jobs: list[Any], outcomes: list[Any], timeout: float | None) -> None:
        """Submit the jobs that have no outcome yet. Return if there is no space in the queue after *timeout* seconds."""
        for job in jobs[len(outcomes) :]:
            try:
                outcomes.append(self._batcher.submit(job, timeout=timeout))
            except BacklogFull as error:
                if timeout is not None:
                    return
                outcomes.append(error)  # of *key* or *weigh*
            except _USER_ERRORS as error:
                outcomes.append(error)

    def stats(self) -> BatcherStats:
        """See `SharedProcessor.stats`."""
        return self._batcher.stats()

    def is_open(self) -> bool:
        """Return whether the batcher has not been shut down yet."""
        return self._open

    async def shutdown(self) -> None:
        """See `SharedProcessor.shutdown`."""
        self._open = False
        await asyncio.get_running_loop().run_in_executor(None, self._batcher.shutdown)


def shared(
    name: str,
    processor: Callable[[list[Any]], Any],
    policy: "BatchingPolicy[Any]" = DEFAULT_POLICY,
    *,
    client: Callable[[], Client],
    **options: "Unpack[UnnamedOptions]",
) -> SharedProcessor:
    """Return a processor that sends its jobs to a `Batcher` in a Dask cluster, which processes share by its name.

    The first process that uses the name creates this batcher on a worker of the cluster, with its own arguments. The
    other processes use that batcher, and their arguments have no effect.

    *processor*, *policy*, *options*, jobs, results and exceptions are sent between processes, so they must be
    picklable. A job whose pickling fails, or whose result can't be pickled, fails alone.
    The jobs of one call are pickled together, so an object that two of them share is still shared when it arrives.

    If the process of the shared batcher dies, each caller that waits for it gets `CollectorLost`. The next jobs create
    a new batcher.

    Args:
        name: The name of the shared batcher in the cluster.
        processor: As for `Batcher`. It is called in the cluster.
        policy: As for `Batcher`.
        client: Returns the Dask client of this process. It is called once in each process, also after a fork, and again
            if the client was closed.
        options: The other arguments of `Batcher`.

    Raises:
        TypeError, ValueError: An argument of the batcher is invalid. `TypeError` is also raised if one can't be
            pickled.
    """
    Batcher(processor, policy, **options)  # checks the arguments here, not only in the cluster
    try:
        batcher_arguments = dumps((processor, policy, options))
    except Exception as error:
        raise TypeError(f"processor, policy and options must be picklable: {error}") from error
    return SharedProcessor(name, batcher_arguments, client)


def _wait_for(client: Client, reply: Coroutine[Any, Any, Any]) -> Any:
    """Wait for *reply*. Raise RuntimeError if the client is closed, because Dask may then never reply."""
    result = asyncio.run_coroutine_threadsafe(reply, client.loop.asyncio_loop)
    while not wait([result], timeout=1).done:
        if client.status == "closed":
            raise RuntimeError("the client is closed")
    return result.result()


def _pickle_together(jobs: list[Any]) -> list[Any]:
    """Return *jobs* as one message: their pickle, and its large buffers. Return an empty list if they can't be pickled."""
    if (
        cloudpickle.list_registry_pickle_by_value()
    ):  # only Dask's `dumps` uses this registry, for the class of a single job
        return []
    message: list[Any] = [b""]
    try:
        message[0] = _pickle(jobs, message, cloudpickle.dumps)
    except _USER_ERRORS:
        return []
    return message


def _pickle(value: Any, buffers: list[Any], otherwise: Callable[[Any], bytes]) -> bytes:
    """Pickle *value*, and append its large buffers to *buffers*. If `pickle` is not enough, call *otherwise*."""
    large: list[memoryview] = []

    def is_copied(buffer: PickleBuffer) -> bool:
        view = buffer.raw()
        small = view.nbytes < _LARGE
        if not small:
            large.append(view)
        return small

    try:
        pickled = pickle.dumps(value, _PROTOCOL, buffer_callback=is_copied)
    except Exception:
        return otherwise(value)
    if b"__main__" in pickled:  # the main module of the other process is another one
        return otherwise(value)
    buffers += large
    return pickled


def _pickle_job(job: Any) -> Any:
    try:
        return dumps(job)
    except _USER_ERRORS as error:
        return PicklingError(f"the job can't be sent to another process: {error}")


def _pickle_outcomes(outcomes: list[Any]) -> list[Any]:
    """Return *outcomes* as one message: their pickle, and its large buffers.

    Values of built-in types are pickled together. Errors, and all values if one of them has another type, are pickled
    one by one, because the process of the caller may not be able to unpickle some of them.
    """
    pairs = [_error_and_value(outcome) for outcome in outcomes]
    together = _pickle_plain([value for _, value in pairs])
    message: list[Any] = [b""]
    separate = {
        number: _pickle_outcome(*pair, message)
        for number, pair in enumerate(pairs)
        if together is None or pair[0] is not None
    }
    message[0] = pickle.dumps((together, separate))
    return message


def _error_and_value(outcome: Any) -> tuple[BaseException | None, Any]:
    if isinstance(outcome, BaseException):
        return outcome, None
    error = CancelledError() if outcome.cancelled() else outcome.exception()
    return error, outcome.result().value if error is None else None


class _PlainPickler(pickle.Pickler):
    """Raises an exception for each object whose type is not built in."""

    def reducer_override(self, obj: Any) -> NoReturn:
        raise PicklingError(f"{type(obj).__name__} is not built in")


def _pickle_plain(values: list[Any]) -> bytes | None:
    """Pickle *values* if all of them can be unpickled in any process. Otherwise, return None."""
    file = io.BytesIO()
    try:
        _PlainPickler(file, _PROTOCOL).dump(values)
    except Exception:
        return None
    return file.getvalue()


def _pickle_outcome(error: BaseException | None, value: Any, buffers: list[Any]) -> tuple[bytes, int]:
    """Pickle an outcome, append its large buffers to *buffers*, and return their number too."""
    before = len(buffers)
    try:
        pickled = _pickle((error, value), buffers, dumps)
    except _USER_ERRORS as reason:
        what = "result" if error is None else f"exception {type(error).__name__}"
        pickled = dumps((PicklingError(f"the {what} can't be sent to another process: {reason}"), None))
    return pickled, len(buffers) - before


def _unpickle_outcomes(message: bytes, *buffers: Any) -> list[Any]:
    together, separate = pickle.loads(message)
    outcomes: list[Any] = [None] * len(separate) if together is None else pickle.loads(together)
    rest = iter(buffers)
    for number, (pickled, count) in separate.items():
        outcomes[number] = _unpickle_outcome(pickled, list(islice(rest, count)))
    return outcomes


def _unpickle_outcome(pickled: bytes, buffers: list[Any]) -> Any:
    try:
        error, value = pickle.loads(pickled, buffers=buffers)
    except _USER_ERRORS as reason:
        return UnpicklingError(f"the outcome can't be read in this process: {reason}")
    return value if error is None else error
