"""Batches on a Dask cluster of processes: run there by an executor, or formed there for many client processes."""

import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import Any, NamedTuple

import pytest

from microbatch import (
    Batcher,
    BatcherClosed,
    BatchListener,
    Interval,
    JobAccepted,
    JobTooLarge,
    Natural,
    Rate,
    Size,
    Weight,
)
from tests.extras import needs
from tests.pages import blocks
from tests.test_processes import InFlight, where

needs("distributed")
import cloudpickle
from distributed import Client, Lock, Variable
from distributed.actor import ProxyRPC

from microbatch.integrations.dask import CollectorLost, _pickle_together, shared

pytestmark = [pytest.mark.dask, pytest.mark.timeout(120)]


CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    options = dict(n_workers=int(sys.argv[1]), threads_per_worker=2, processes=True, dashboard_address=None, silence_logs=50)
    with LocalCluster(**options) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


@contextmanager
def cluster(program: Path, workers: int) -> Iterator[str]:
    program.write_text(CLUSTER)
    with subprocess.Popen(
        [sys.executable, str(program), str(workers)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with cluster(tmp_path_factory.mktemp("dask") / "cluster.py", 3) as address, Client(address) as client:
        yield client


def strict(jobs: list[str]) -> list[Any]:
    return [ValueError(job) if job == "bad" else job.upper() for job in jobs]


def kill_the_process(jobs: list[str]) -> list[Any]:
    """Kill this process at the first job that names an existing file, and remove that file."""
    for job in jobs:
        if job and os.path.exists(job):
            os.remove(job)
            os.kill(os.getpid(), signal.SIGKILL)
    return [os.getpid() for _ in jobs]


def test_batches_are_processed_in_worker_processes(client: Client) -> None:
    executor = client.get_executor()
    with Batcher[int, Any](where, Size(10), executor=executor, max_workers=3) as batcher:
        results = [future.result(timeout=60).value for future in [batcher.submit(number) for number in range(100)]]
    assert list(range(100)) == [job for job, _, _ in results]
    assert {10} == {size for _, _, size in results}
    assert os.getpid() not in {process for _, process, _ in results}


def log_done(jobs: list[str]) -> list[str]:
    with open(jobs[0], "a") as file:
        file.write("done\n")
    return jobs


def test_equal_batches_are_all_processed(client: Client, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    with Batcher[str, str](log_done, Size(1), executor=client.get_executor(), max_workers=3) as batcher:
        assert [path] * 5 == [result.value for result in batcher.map([path] * 5)]
    assert "done\n" * 5 == (tmp_path / "notes").read_text()


def test_the_cluster_never_has_more_than_max_workers_batches(client: Client) -> None:
    in_flight = InFlight()
    executor = client.get_executor()
    with Batcher[int, Any](where, Size(1), executor=executor, max_workers=2, listeners=[in_flight]) as batcher:
        assert 50 == len([batcher.submit(number) for number in range(50)])
    assert 2 == in_flight.most


def test_an_unpicklable_job_is_named_in_the_error_of_its_batch_and_later_batches_run(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "distributed")
    with Batcher[Any, Any](where, Size(3), executor=client.get_executor()) as batcher:
        failed = [batcher.submit(each) for each in ("a", threading.Lock(), "b")]
        later = [batcher.submit(each) for each in "cde"]
    for future in failed:
        with pytest.raises(PicklingError, match="^job 2 of 3 in the batch, of type lock, can't be sent"):
            future.result()
    assert ["c", "d", "e"] == [future.result().value[0] for future in later]


def test_dask_runs_a_batch_again_if_its_process_is_killed(client: Client, tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    with Batcher[str, Any](kill_the_process, Size(2), executor=client.get_executor()) as batcher:
        futures = [batcher.submit(job) for job in (str(tmp_path / "die"), "", "", "")]
        assert os.getpid() not in {future.result(timeout=60).value for future in futures}
    assert not (tmp_path / "die").exists()


PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from distributed import Client
from microbatch import Batcher, Natural, Size
from microbatch.integrations.dask import shared
from tests.test_processes import where

def main():
    with Client(sys.argv[1]) as client:
        processor = shared("across", where, Size(64) | Natural(), client=lambda: client)
        with Batcher(processor, max_workers=4) as batcher, ThreadPoolExecutor(8) as callers:
            names = [f"{sys.argv[2]} {number}" for number in range(200)]
            results = list(callers.map(lambda name: batcher.submit(name).result().value, names))
        print([job for job, _, _ in results] == names, {process for _, process, _ in results})

if __name__ == "__main__":
    main()
"""


def test_all_processes_share_one_batcher_and_each_gets_its_own_results(client: Client, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    address = client.scheduler.address
    commands = [[sys.executable, str(tmp_path / "program.py"), address, name] for name in "abcd"]
    with ThreadPoolExecutor(4) as runners:
        said = list(runners.map(lambda command: subprocess.check_output(command, env=ENVIRONMENT, text=True), commands))
    assert all(line.startswith("True {") for line in said)
    assert 1 == len({line.split("{")[1] for line in said})
    assert 800 == shared("across", where, client=lambda: client).stats().succeeded


def test_results_and_errors_of_a_shared_batcher_are_like_those_of_a_local_one(client: Client) -> None:
    processor = shared("strict", strict, Size(3) | Weight(9) | Natural(), client=lambda: client, weigh=len)
    with Batcher[Any, Any](processor, Size(5)) as batcher:
        good, bad, heavy, other, lock = [
            batcher.submit(job) for job in ("good", "bad", "much too heavy", "other", threading.Lock())
        ]
    assert ["GOOD", "OTHER"] == [future.result().value for future in (good, other)]
    assert (ValueError, ("bad",)) == (type(bad.exception()), getattr(bad.exception(), "args"))
    assert isinstance(heavy.exception(), JobTooLarge)
    assert isinstance(lock.exception(), PicklingError) and "the job can't be sent" in str(lock.exception())


def locks(jobs: list[Any]) -> list[Any]:
    return [threading.Lock() if job == "lock" else job for job in jobs]


def test_an_unpicklable_result_fails_alone(client: Client) -> None:
    outcomes = shared("locks", locks, Size(2), client=lambda: client)(["lock", "good"])
    assert isinstance(outcomes[0], PicklingError) and "the result can't be sent" in str(outcomes[0])
    assert "good" == outcomes[1]


class RefusedBy:
    """Raises an exception if a certain process unpickles it."""

    def __init__(self, process: int) -> None:
        if process == os.getpid():
            raise ValueError("not here")
        self.process = process

    def __reduce__(self) -> Any:
        return RefusedBy, (self.process,)


def refused(jobs: list[Any]) -> list[Any]:
    return [RefusedBy(job) if isinstance(job, int) else job for job in jobs]


def test_a_result_that_the_caller_cannot_unpickle_fails_alone(client: Client) -> None:
    before, fails, after = shared("refused", refused, Size(3), client=lambda: client)(["before", os.getpid(), "after"])
    assert ("before", UnpicklingError, "after") == (before, type(fails), after)
    assert "the outcome can't be read in this process: not here" == str(fails)


def test_a_job_whose_class_no_worker_can_import_is_sent_by_value_from_the_main_module_or_if_it_is_registered(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_in_client.py").write_text("class Job: pass")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("only_in_client")
    main = type("OfMain", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "OfMain", main, raising=False)
    processor = shared("by value", names_of_types, Size(1), client=lambda: client)
    assert ["OfMain", "OfMain"] == processor([main(), main()])
    unregistered, known = processor([module.Job(), "known"])
    assert (ModuleNotFoundError, "str") == (type(unregistered), known)
    cloudpickle.register_pickle_by_value(module)
    try:
        assert ["Job", "Job"] == processor([module.Job(), module.Job()])
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def names_of_types(jobs: list[Any]) -> list[str]:
    return [type(job).__name__ for job in jobs]


def doubled_in_place(jobs: list[Any]) -> list[Any]:
    for job in jobs:
        job *= 2
    return jobs


@pytest.mark.parametrize("direct", [None, False])
def test_arrays_of_any_size_can_be_changed_by_the_processor_and_by_the_caller(
    client: Client, direct: bool | None
) -> None:
    numpy = pytest.importorskip("numpy")
    with Client(client.scheduler.address, set_as_default=False, direct_to_workers=direct) as own:
        processor = shared(f"arrays {direct}", doubled_in_place, Size(4), client=lambda: own)
        jobs = [numpy.arange(size) for size in (3, 20_000, 0, 300_000)]
        for job, result in zip(jobs, processor(jobs), strict=True):
            result += 1
            assert numpy.array_equal(numpy.arange(job.size) * 2 + 1, result)


def test_large_arrays_are_not_copied_into_a_message() -> None:
    numpy = pytest.importorskip("numpy")
    small, large = numpy.arange(10), numpy.arange(100_000)
    message, *buffers = _pickle_together([small, large, "text"])
    assert len(message) < 1_000 and [large.nbytes] == [each.nbytes for each in buffers]
    assert numpy.shares_memory(large, numpy.asarray(buffers[0]))


def test_a_message_waits_for_all_of_its_jobs_while_the_batcher_answers_other_messages(
    client: Client, tmp_path: Path
) -> None:
    processor = shared("files", read_files, Size(1), client=lambda: client, key=str, max_workers=2)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("last")
    with ThreadPoolExecutor(1) as callers:
        waiting = callers.submit(processor, [str(tmp_path / "pipe"), str(tmp_path / "file")])
        with (tmp_path / "pipe").open("w") as pipe:  # from here on the first job is being processed
            while processor.stats().succeeded < 1:  # the last job
                pass
            assert ["last"] == processor([str(tmp_path / "file")])
            assert not waiting.done()
            pipe.write("first")
        assert ["first", "last"] == waiting.result(timeout=60)


class Unreachable:
    """A connection pool that can't reach any worker."""

    def __call__(self, address: str) -> "Unreachable":
        return self

    async def actor_execute(self, **arguments: Any) -> None:
        raise OSError("unreachable")


def test_messages_go_through_the_scheduler_if_no_other_way_is_open(client: Client) -> None:
    with Client(client.scheduler.address, set_as_default=False) as own:
        pool, own.rpc = own.rpc, Unreachable()
        try:
            processor = shared("through the scheduler", strict, Size(2), client=lambda: own)
            assert ["A", "B"] == processor(["a", "b"])
        finally:
            own.rpc = pool


def test_messages_go_to_the_worker_without_the_scheduler(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProxyRPC, "__getattr__", None)
    assert ["A", "B"] == shared("direct", strict, Size(2), client=lambda: client)(["a", "b"])


def test_a_processor_that_no_worker_can_import_raises_the_import_error(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def process(jobs): return jobs")
    monkeypatch.syspath_prepend(tmp_path)
    processor = shared("unmade", importlib.import_module("only_here").process, client=lambda: client)
    with pytest.raises(ModuleNotFoundError, match="only_here"):
        processor(["a"])


class ExitingWhenUnpickled:
    """Exits the process that unpickles it, unless that is prevented."""

    def __reduce__(self) -> Any:
        return sys.exit, (7,)


def test_a_job_that_raises_system_exit_fails_alone(client: Client) -> None:
    outcomes = shared("leaving", where, Size(1), client=lambda: client, weigh=sys.exit)([1])
    assert [SystemExit] == [type(outcome) for outcome in outcomes]
    processor = shared("left by", where, Size(1), client=lambda: client)
    before, leaving, after = processor(["before", ExitingWhenUnpickled(), "after"])
    assert [before[1], SystemExit, before[1]] == [after[1], type(leaving), processor(["later"])[0][1]]


class CancellingListener(BatchListener):
    """Cancels some jobs as soon as they are accepted."""

    def job_accepted(self, event: JobAccepted) -> None:
        if event.future.job == "unwanted":
            event.future.cancel()


def test_a_job_cancelled_on_the_cluster_is_reported_as_cancelled(client: Client) -> None:
    processor = shared("cancelling", strict, Size(2), client=lambda: client, listeners=[CancellingListener()])
    unwanted, *wanted = processor(["unwanted", "a", "b"])
    assert (CancelledError, ["A", "B"]) == (type(unwanted), wanted)


def test_a_caller_of_a_shared_batcher_waits_while_the_queue_is_full(client: Client) -> None:
    processor = shared("small", where, Size(2) | Interval(0.001), client=lambda: client, max_pending=2)
    assert list(range(50)) == [job for job, _, _ in processor(list(range(50)))]


def test_the_shutdown_of_a_shared_batcher_does_not_wait_for_blocked_callers(client: Client) -> None:
    processor = shared("crowd", strict, Size(1) & Rate(1, per=3600), client=lambda: client, max_pending=1)
    with ThreadPoolExecutor(40) as callers:
        waiting = [callers.submit(processor, [name]) for name in ["a"] * 40]
        while processor.stats().accepted < 2:  # one job is done, one fills the queue, and the other callers are blocked
            pass
        processor.shutdown()
        outcomes = [future.result(timeout=60)[0] for future in waiting]
    assert {str, BatcherClosed} == {type(outcome) for outcome in outcomes}


def test_callers_get_an_error_if_a_shared_batcher_dies_and_later_jobs_get_a_new_one(
    client: Client, tmp_path: Path
) -> None:
    processor = shared("kill_the_process", kill_the_process, Size(2), client=lambda: client)
    with Batcher[str, Any](processor, Size(2)) as batcher:
        before = [batcher.submit("") for _ in range(2)]
        first = before[0].result(timeout=60).value
        (tmp_path / "die").touch()
        lost = [batcher.submit(job) for job in (str(tmp_path / "die"), "")]
        assert {CollectorLost} == {type(future.exception(timeout=60)) for future in lost}
        after = [batcher.submit("") for _ in range(2)]
        assert first != after[0].result(timeout=60).value


def test_after_a_shutdown_jobs_are_refused_and_the_same_name_gives_a_new_batcher(client: Client) -> None:
    processor = shared("short", strict, Size(2), client=lambda: client)
    assert ["A", "B"] == processor(["a", "b"])
    processor.shutdown()
    assert [BatcherClosed] * 2 == [type(outcome) for outcome in processor(["a", "b"])]
    assert ["A", "B"] == shared("short", strict, Size(2), client=lambda: client)(["a", "b"])


def test_a_second_shutdown_does_not_affect_the_next_batcher_of_the_same_name(client: Client) -> None:
    one, two, after = [shared("again", strict, Size(1), client=lambda: client) for _ in range(3)]
    assert [["A"], ["B"]] == [one(["a"]), two(["b"])]
    one.shutdown()
    assert ["C"] == after(["c"])
    two.shutdown()
    assert 1 == shared("again", strict, Size(1), client=lambda: client).stats().accepted


def read_files(jobs: list[str]) -> list[str]:
    return [Path(job).read_text() for job in jobs]


def test_a_caller_during_a_shutdown_gets_a_new_batcher(client: Client, tmp_path: Path) -> None:
    closing, next_one = [shared("closing", read_files, Size(1), client=lambda: client, max_workers=2) for _ in range(2)]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("next")
    with ThreadPoolExecutor(2) as callers:
        waiting = callers.submit(closing, [str(tmp_path / "pipe")])
        with (tmp_path / "pipe").open("w") as pipe:  # from here on the job is being processed
            over = callers.submit(closing.shutdown)
            while not isinstance(closing([str(tmp_path / "file")])[0], BatcherClosed):
                pass
            assert ["next"] == next_one([str(tmp_path / "file")])
            assert not over.done()
            pipe.write("last")
        assert ["last"] == waiting.result(timeout=60)


def test_a_caller_that_lost_its_connection_reaches_the_same_batcher_again(client: Client) -> None:
    connected = []

    def connect() -> Client:
        connected.append(Client(client.scheduler.address, set_as_default=False))
        return connected[-1]

    processor = shared("way", strict, Size(2), client=connect)
    here = shared("way", strict, Size(2), client=lambda: client)
    with ThreadPoolExecutor(1) as callers:
        lost = callers.submit(processor, ["lost"])
        while here.stats().accepted == 0:
            pass
        connected[0].close()
        assert isinstance(lost.exception(timeout=60), CollectorLost)
    assert ["MINE"] == processor(["mine"])  # in a batch with the job whose result is lost
    assert 2 == here.stats().succeeded == len(connected)
    connected[1].close()


def test_callers_get_a_new_batcher_after_the_cluster_restarts(tmp_path: Path) -> None:
    # On a cluster of its own: shortly after a worker has died, as in other tests, the restart of Dask may never end.
    with cluster(tmp_path / "cluster.py", 1) as address, Client(address, set_as_default=False) as client:
        processor = shared("restarted", strict, Size(1), client=lambda: client)
        assert ["A"] == processor(["a"])
        client.restart()
        assert ["B"] == processor(["b"])


def cancel(client: Client, name: str) -> None:
    variable = Variable(name, client=client)
    client.cancel([variable.get()], force=True)
    while variable.get().status == "finished":  # until the scheduler knows of the cancellation
        pass


def test_callers_get_an_error_if_a_shared_batcher_is_cancelled(client: Client) -> None:
    processor = shared("cancelled", strict, Size(2), client=lambda: client)
    with ThreadPoolExecutor(1) as callers:
        lost = callers.submit(processor, ["lost"])
        while processor.stats().accepted == 0:
            pass
        cancel(client, "microbatch-cancelled")
        assert isinstance(lost.exception(timeout=60), CollectorLost)
    assert ["A", "B"] == processor(["a", "b"])


def test_no_lock_is_left_over_from_looking_up_a_batcher(client: Client) -> None:
    processor = shared("locked", strict, Size(1), client=lambda: client)
    for _ in range(3):
        assert ["A"] == processor(["a"])
        cancel(client, "microbatch-locked")
    assert ["A"] == processor(["a"])
    gc.collect()
    assert not any(type(each) is Lock and each.name == "microbatch-locked" for each in gc.get_objects())


def test_callers_get_an_error_if_their_client_is_closed_while_they_wait_for_a_batcher(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster.py", 0) as address, ThreadPoolExecutor(8) as callers:
        client = Client(address, set_as_default=False)
        processors = [shared(name, strict, client=lambda: client) for name in "abcdefgh"]
        waiting = [callers.submit(processor, ["a"]) for processor in processors]
        while len(client.futures) < 8:  # there is no worker to create the batchers
            pass
        client.close()
        assert {CollectorLost} == {type(future.exception(timeout=60)) for future in waiting}


def test_a_client_factory_that_uses_its_own_processor_fails() -> None:
    processor = shared("circle", strict, client=lambda: processor.stats())
    with pytest.raises(CollectorLost, match="nothing was sent"):
        processor(["a"])


FORKED = """
import os, signal, sys, threading
from distributed import Client
from microbatch import Size
from microbatch.integrations.dask import shared
from tests.test_dask import strict

if __name__ == "__main__":
    parent, connecting, forked = os.getpid(), threading.Event(), threading.Event()

    def connect():
        if os.getpid() == parent:
            connecting.set()
            forked.wait()
        return Client(sys.argv[1], set_as_default=False)

    processor = shared("forked", strict, Size(1), client=connect)
    thread = threading.Thread(target=lambda: print(*processor(["parent"]), flush=True))
    thread.start()
    connecting.wait()
    if not (child := os.fork()):
        signal.alarm(30)
        print(*processor(["child"]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    forked.set()
    thread.join()
"""


def test_a_child_forked_while_its_parent_connects_has_its_own_client(client: Client, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(FORKED))
    command = [sys.executable, str(tmp_path / "program.py"), client.scheduler.address]
    assert "CHILD\nPARENT\n" == subprocess.check_output(command, env=ENVIRONMENT, text=True)


class Fickle:
    """A processor that can't be unpickled while a file exists."""

    def __init__(self, path: str) -> None:
        if os.path.exists(path):
            raise ValueError("not now")
        self.path = path

    def __call__(self, jobs: list[str]) -> list[str]:
        return [job.upper() for job in jobs]

    def __reduce__(self) -> Any:
        return Fickle, (self.path,)


FORKED_LATER = """
import os, signal, sys
from distributed import Client
from microbatch import Size
from microbatch.integrations.dask import shared
from tests.test_dask import Fickle, cancel

if __name__ == "__main__":
    address, path = sys.argv[1:]

    def connect():
        return Client(address, set_as_default=False)

    processor = shared("fickle", Fickle(path), Size(1), client=connect)
    print(*processor(["parent"]), flush=True)
    if not (child := os.fork()):
        signal.alarm(30)
        cancel(connect(), "microbatch-fickle")
        open(path, "w").close()
        try:
            processor(["child"])
        except ValueError as error:
            print(error)
        os.remove(path)
        print(*processor(["child"]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_child_that_found_no_batcher_at_first_tries_again(client: Client, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(FORKED_LATER))
    command = [sys.executable, str(tmp_path / "program.py"), client.scheduler.address, str(tmp_path / "there")]
    assert "PARENT\nnot now\nCHILD\n" == subprocess.check_output(command, env=ENVIRONMENT, text=True)


DYING = """
import sys
from distributed import Client
from microbatch import Interval, Size
from microbatch.integrations.dask import shared
from tests.test_dask import strict
import os, threading

if __name__ == "__main__":
    client = Client(sys.argv[1])
    processor = shared("left", strict, Size(2), client=lambda: client)
    threading.Thread(target=processor, args=(["left behind"],), daemon=True).start()
    while processor.stats().accepted == 0:
        pass
    os._exit(7)
"""


def test_a_caller_that_dies_does_not_affect_the_others(client: Client, tmp_path: Path) -> None:
    processor = shared("left", strict, Size(2), client=lambda: client)
    assert 0 == processor.stats().accepted
    (tmp_path / "program.py").write_text(textwrap.dedent(DYING))
    command = [sys.executable, str(tmp_path / "program.py"), client.scheduler.address]
    assert 7 == subprocess.run(command, env=ENVIRONMENT).returncode
    assert ["MINE"] == processor(["mine"])  # in a batch with the job of the dead caller
    assert 2 == processor.stats().succeeded


class Row(NamedTuple):
    tenant: str


def tenants(rows: list[Row]) -> list[str]:
    return [f"{row.tenant} of {len({each.tenant for each in rows})}" for row in rows]


def test_the_examples_of_the_page_work(client: Client) -> None:
    names: dict[str, Any] = {"client": client, "insert_many": tenants, "Batcher": Batcher}
    rows = [Row(tenant) for tenant in ("acme", "initech", "hooli", "umbrella")] * 3
    found = [block.replace('Client("tcp://scheduler:8786")', "client") for block in blocks("processes")]
    for block, batcher in zip(found, ("batcher", "inserts", "inserts"), strict=True):
        exec(block, names)
        with names[batcher] as opened:
            values = [result.value for result in opened.map(rows)]
        assert [row.tenant for row in rows] == [value.split()[0] for value in values]
    assert max(int(value.split()[-1]) for value in values) < 4  # each batch has the tenants of one shard


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"policy": 3}, "policy must be"),
        ({"max_worker": 3}, "max_worker"),
        ({"key": threading.Lock().acquire}, "processor, policy and options must be picklable: "),
    ],
)
def test_bad_arguments_are_refused_in_the_calling_process(arguments: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        shared("bad", strict, client=lambda: None, **arguments)
