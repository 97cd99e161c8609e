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
from pickle import PicklingError, UnpicklingError
from typing import Any, Callable, List

from distributed import Client, Lock, Variable
from distributed.protocol.pickle import dumps, loads

from microbatch import DEFAULT_POLICY, BacklogFull, Batcher, BatcherStats, BatchingPolicy, MicrobatchError

__all__ = ["CollectorLost", "SharedProcessor", "shared"]


class CollectorLost(MicrobatchError, ConnectionError):
    """The process that collected the jobs of all has died, or can't be reached: nobody knows whether these were done."""


class SharedProcessor:
    """Hands jobs on to a batcher in the cluster. Made by `shared`."""

    def __init__(self, name: str, ingredients: bytes, connect: Callable[[], Client]) -> None:
        self._name = f"microbatch-{name}"
        self._ingredients = ingredients  # of a collector
        self._connect = connect
        self._mutex = threading.Lock()  # guards what follows, and is held while it connects and searches: once for all
        self._process = 0  # which is connected
        self._client: Any = None
        self._found: Any = None  # the future of the actor
        self._dead = ""  # the key of the one before, of which the scheduler may not know yet

    def __call__(self, jobs: List[Any]) -> List[Any]:
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
        Variable(self._name, client=self._client).delete()

    def _ask(self, method: str, *arguments: Any) -> Any:
        future = self._actor()  # what Dask raises here says why, and nothing has been sent
        try:
            return getattr(future.result(), method)(*arguments).result()
        except (OSError, RuntimeError) as error:  # of Dask: what the batcher raises is among the outcomes
            self._dead = future.key
            raise CollectorLost(f"{self._name} has died, or can't be reached") from error

    def _actor(self) -> Any:
        """Return the future of the actor, and look for one if there is none, or if it has died."""
        with self._mutex:
            if self._process != os.getpid():
                self._process, self._client, self._found = os.getpid(), self._connect(), None
            if self._found is None or self._found.key == self._dead or self._found.status != "finished":
                with Lock(self._name, scheduler_rpc=self._client.scheduler, loop=self._client.loop):
                    self._found = self._published() or self._published_anew()
            return self._found

    def _published(self) -> Any:
        try:
            future = Variable(self._name, client=self._client).get(timeout=0.1)
            future.result()
        except (asyncio.TimeoutError, RuntimeError):
            return None  # there is none, or it has died
        return future if future.key != self._dead else None

    def _published_anew(self) -> Any:
        # As bytes, so that the scheduler need not have the module of the processor.
        future = self._client.submit(_Collector, self._ingredients, actor=True, pure=False)
        future.result()
        Variable(self._name, client=self._client).set(future)
        return future


class _Collector:
    """The batcher in the cluster: a Dask actor."""

    def __init__(self, ingredients: bytes) -> None:
        processor, policy, options = loads(ingredients)
        self._batcher: Batcher[Any, Any] = Batcher(processor, policy, **options)

    async def run(self, messages: List[bytes]) -> List[bytes]:
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

        outcomes: List[Any] = []
        for message in messages:
            try:
                job = loads(message)
                try:
                    outcomes.append(self._batcher.submit(job, timeout=0))
                except BacklogFull:
                    outcomes.append(await loop.run_in_executor(None, self._batcher.submit, job))
                outcomes[-1].add_done_callback(count)
            except Exception as error:
                outcomes.append(error)
                count(None)
        await over
        return [_answer(outcome) for outcome in outcomes]

    def stats(self) -> BatcherStats:
        """See `SharedProcessor.stats`."""
        return self._batcher.stats()

    async def shutdown(self) -> None:
        """See `SharedProcessor.shutdown`."""
        await asyncio.get_running_loop().run_in_executor(None, self._batcher.shutdown)


def shared(
    name: str,
    processor: Callable[[List[Any]], Any],
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
        client: gives the Dask client of this process; called once in each, so after a fork too.
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


def _packed(job: Any) -> Any:
    try:
        return dumps(job)
    except Exception as error:
        return PicklingError(f"the job can't be sent to another process: {error}")


def _answer(outcome: Any) -> bytes:
    error = outcome if isinstance(outcome, Exception) else outcome.exception()
    try:
        message: bytes = dumps((error, None) if error is not None else (None, outcome.result().value))
    except Exception as reason:
        what = "result" if error is None else f"exception {type(error).__name__}"
        message = dumps((PicklingError(f"the {what} can't be sent to another process: {reason}"), None))
    return message


def _unpacked(message: bytes) -> Any:
    try:
        error, value = loads(message)
    except Exception as reason:
        return UnpicklingError(f"the outcome can't be read in this process: {reason}")
    return value if error is None else error
