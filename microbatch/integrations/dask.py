"""One stream of batches for many processes, collected in a Dask cluster: the extra ``dask``.

Each process sees only a part of the jobs. `shared` is a processor that hands them on to a `Batcher` in the cluster, which is
the same for all who say its name; so batches form across all of them::

    def connect():
        return Client("tcp://scheduler:8786")

    inserts = Batcher(shared("inserts", insert_many, Size(500) | Natural(), client=connect))
    inserts.submit(row).result().value

The batcher here only gathers what goes to the cluster in one message. To process in a cluster what is collected here is
another thing, and needs nothing of this: ``Batcher(insert_many, executor=client.get_executor())``.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager
from pickle import PicklingError, UnpicklingError
from typing import Any

from distributed import Client, Lock, Variable
from distributed.protocol.pickle import dumps, loads

from microbatch import DEFAULT_POLICY, BacklogFull, Batcher, BatcherStats, BatchingPolicy, MicrobatchError

__all__ = ["CollectorLost", "SharedProcessor", "shared"]

# What Dask raises if a connection, a client or an actor is lost; a closed client lacks attributes.
_OF_DASK = (OSError, RuntimeError, AttributeError, CancelledError, asyncio.TimeoutError)
_OF_USERS = (Exception, SystemExit)  # one that goes through the loop of a worker ends it, for all


class CollectorLost(MicrobatchError, ConnectionError):
    """The process that collected the jobs of all has died, or can't be reached: nobody knows whether these were done.

    Unless it says that nothing was sent.
    """


class SharedProcessor:
    """Hands jobs on to a batcher in the cluster. Made by `shared`."""

    def __init__(self, name: str, ingredients: bytes, connect: Callable[[], Client]) -> None:
        self._name = f"microbatch-{name}"
        self._ingredients = ingredients  # of a collector
        self._connect = connect
        # Held while it connects and searches: once for all. By process, as one that is held at a fork is held in the child
        # for ever; and by a thread as often as it likes, so that one whose client= comes back here gets a RecursionError.
        self._mutexes: dict[int, Any] = {}
        self._process = 0  # which is connected
        self._client: Any = None
        self._found: Any = None  # the actor, and its future

    def __call__(self, jobs: list[Any]) -> list[Any]:
        """Return one outcome for each job: a value, or an exception."""
        messages = [_packed(job) for job in jobs]
        sent = [message for message in messages if isinstance(message, bytes)]
        received = iter(self._ask("run", sent)) if sent else iter(())
        return [_unpacked(next(received)) if isinstance(message, bytes) else message for message in messages]

    def stats(self) -> BatcherStats:
        """Return what the batcher in the cluster has done, for all."""
        stats: BatcherStats = self._ask("stats")
        return stats

    def shutdown(self) -> None:
        """Shut down the batcher in the cluster, for all, and return when all of its jobs are done. Its name is free then."""
        self._ask("shutdown")
        _waited_for(self._client, self._forgotten(self._client))

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            client, actor, future = self._actor()
        except _OF_DASK as error:
            raise CollectorLost(f"{self._name} can't be reached, so nothing was sent: {error}") from error
        try:
            return _waited_for(client, _answer_of(actor, future, method, *arguments))
        except _OF_DASK as error:  # what the batcher raises is among the outcomes
            self._found = None  # it may be alive all the same: that is asked when it is looked for
            raise CollectorLost(f"{self._name} has died, or can't be reached any more") from error

    def _actor(self) -> Any:
        """Return the client, the actor and its future, and look for one if there is none, or if it has died."""
        with self._mutexes.setdefault(os.getpid(), threading.RLock()):
            client, found = self._client, self._found
            if self._process != os.getpid() or client.status == "closed":
                client, found = self._connect(), None
                if client.status == "closed":
                    raise RuntimeError("client= gives a client that is closed")
                self._process, self._client, self._found = os.getpid(), client, None
            if found is None or found[1].status != "finished":
                with client.as_current():  # which an actor takes for its own
                    self._found = found = _waited_for(client, self._looked_for(client))
            return client, *found

    async def _looked_for(self, client: Client) -> Any:
        async with self._alone(client):
            found = await self._published(client)
            if found is None:
                # As bytes, so that the scheduler need not have the module of the processor.
                future = client.submit(_Collector, self._ingredients, actor=True, pure=False)
                found = await future, future
                await Variable(self._name, client=client).set(future)
            return found

    @asynccontextmanager
    async def _alone(self, client: Client) -> AsyncIterator[None]:
        lock = Lock(self._name, scheduler_rpc=client.scheduler, loop=client.loop)
        try:
            async with lock:
                yield
        finally:
            if hasattr(lock, "refresh_callback"):  # it keeps the lock, and goes on, for as long as there is the client
                lock.refresh_callback.stop()

    async def _published(self, client: Client) -> Any:
        """Return the actor that has the name, and its future, if it is alive and open."""
        try:
            future = await Variable(self._name, client=client).get(timeout=0.1)  # at once, unless it was never set
            if future is not None and future.status == "finished":
                actor = await future
                return (actor, future) if await _answer_of(actor, future, "is_open") else None
        except _OF_DASK:
            pass
        return None

    async def _forgotten(self, client: Client) -> None:
        async with self._alone(client):
            if await self._published(client) is None:  # and not another one, made since
                await Variable(self._name, client=client).set(None)


class _Collector:
    """The batcher in the cluster: a Dask actor."""

    def __init__(self, ingredients: bytes) -> None:
        processor, policy, options = loads(ingredients)
        self._batcher: Batcher[Any, Any] = Batcher(processor, policy, **options)
        self._open = True
        # For room. One thread is as fast as many, and the loop's own stay free for a shutdown.
        self._waiting = ThreadPoolExecutor(1)

    async def run(self, messages: list[bytes]) -> list[bytes]:
        """Do some jobs, and give back one outcome for each."""
        loop = asyncio.get_running_loop()
        over, left = loop.create_future(), len(messages)
        mutex = threading.Lock()  # guards left

        def count(future: Any) -> None:
            nonlocal left
            with mutex:
                left -= 1
                last = not left
            if last:
                loop.call_soon_threadsafe(over.set_result, None)

        outcomes: list[Any] = []
        for message in messages:
            try:
                job = loads(message)
                try:
                    outcomes.append(self._batcher.submit(job, timeout=0))
                except BacklogFull:
                    outcomes.append(await loop.run_in_executor(self._waiting, self._batcher.submit, job))
                outcomes[-1].add_done_callback(count)
            except _OF_USERS as error:
                outcomes.append(error)
                count(None)
        await over
        return [_answer(outcome) for outcome in outcomes]

    def stats(self) -> BatcherStats:
        """See `SharedProcessor.stats`."""
        return self._batcher.stats()

    def is_open(self) -> bool:
        """Return False from the moment on that it is being shut down."""
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
    **options: Any,
) -> SharedProcessor:
    """Return a processor that hands its jobs on to one `Batcher` in a Dask cluster, for all processes that say its name.

    The first one to use it has that batcher made, on some worker of the cluster, with its arguments; who comes later gets
    that one. *processor*, *policy* and *options* travel there, and jobs, results and exceptions to and fro, so all of them
    must be such that they can be pickled; one that can't be fails alone. If the batcher's process dies, each caller that
    waits for it gets `CollectorLost`, and the next jobs have another one made.

    Args:
        name: what it is called in the cluster.
        processor: as for `Batcher`; called there.
        policy: as for `Batcher`.
        client: gives the Dask client of this process; called once in each, so after a fork too, and again once it is closed.
        options: the other arguments of `Batcher`.

    Raises:
        TypeError: *processor*, *policy* or one of the *options* is not what it must be, or can't be pickled.
    """
    Batcher(processor, policy, **options)  # which complains here, and not in the cluster
    try:
        ingredients = dumps((processor, policy, options))
    except Exception as error:
        raise TypeError(f"processor, policy and options must be such that they can be pickled: {error}") from error
    return SharedProcessor(name, ingredients, client)


def _waited_for(client: Client, reply: Coroutine[Any, Any, Any]) -> Any:
    """Wait for Dask, which leaves some waiting for ever whose client is closed."""
    result = asyncio.run_coroutine_threadsafe(reply, client.loop.asyncio_loop)
    while not wait([result], timeout=1).done:
        if client.status == "closed":
            raise RuntimeError("the client is closed")
    return result.result()


async def _answer_of(actor: Any, future: Any, method: str, *arguments: Any) -> Any:
    """Call a method of an actor, which never answers if it is cancelled meanwhile."""
    answer = asyncio.ensure_future(getattr(actor, method)(*arguments))
    while not (await asyncio.wait([answer], timeout=1))[0]:
        if future.status != "finished":
            answer.cancel()
            raise RuntimeError("the actor is lost")
    return await answer


def _packed(job: Any) -> Any:
    try:
        return dumps(job)
    except _OF_USERS as error:
        return PicklingError(f"the job can't be sent to another process: {error}")


def _answer(outcome: Any) -> bytes:
    error = outcome
    if not isinstance(outcome, BaseException):
        error = CancelledError() if outcome.cancelled() else outcome.exception()
    try:
        message: bytes = dumps((error, None) if error is not None else (None, outcome.result().value))
    except _OF_USERS as reason:
        what = "result" if error is None else f"exception {type(error).__name__}"
        message = dumps((PicklingError(f"the {what} can't be sent to another process: {reason}"), None))
    return message


def _unpacked(message: bytes) -> Any:
    try:
        error, value = loads(message)
    except _OF_USERS as reason:
        return UnpicklingError(f"the outcome can't be read in this process: {reason}")
    return value if error is None else error
