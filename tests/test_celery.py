"""The tasks of examples/celery_app under real workers, whose broker is a folder."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.extras import needs
from tests.pages import ROOT, blocks
from tests.test_howto import without_signatures

needs("celery")
from celery import Celery

EXAMPLE = ROOT / "examples" / "celery_app"

# The tasks, with another policy, and with a processor that waits for a file.
SERVED = """
import time
from pathlib import Path

import tasks
from microbatch import Batcher, Size
from tasks import app

insert_many = tasks.insert_many

def insert_when_released(names):
    for name in names:
        Path("started " + name).touch()
    while not Path("release").exists():
        time.sleep(0.01)
    return insert_many(names)

tasks.inserts = Batcher(insert_when_released, Size({size}))
"""

NAMES = [f"name {number}" for number in range(8)]


class Worker:
    """A worker in a process, and a client that sends it tasks."""

    def __init__(self, folder: Path, pool: str, concurrency: int, size: int) -> None:
        self.folder = folder
        (folder / "queue").mkdir(parents=True)
        (folder / "served.py").write_text(SERVED.format(size=size))
        queue = str(folder / "queue")
        folders = {name: queue for name in ("data_folder_in", "data_folder_out", "control_folder")}
        self.client = Celery("client", broker="filesystem://", backend=f"file://{queue}", set_as_current=False)
        self.client.conf.broker_transport_options = folders
        quickly = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        arguments = [f"--pool={pool}", f"--concurrency={concurrency}", *quickly]
        command = [sys.executable, "-m", "celery", "--app=served", "worker", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, EXAMPLE, folder]))}
        with (folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # its children end with it
        self.process.wait()

    def send(self, task: str) -> list[Any]:
        """Send a task for each name."""
        return [self.client.send_task(f"tasks.{task}", [name]) for name in NAMES]

    def started(self) -> list[str]:
        """Return the jobs that have been dispatched."""
        return [path.name for path in self.folder.glob("started *")]

    def release(self) -> None:
        """Let the processor insert the names."""
        (self.folder / "release").touch()

    def stop(self) -> None:
        """Ask for a warm shutdown, and return when it has begun."""
        self.process.send_signal(signal.SIGTERM)
        self.wait_for(lambda: "Warm shutdown" in self.log())

    def people(self) -> dict[int, str]:
        """Wait until the worker has exited, and return the rows."""
        assert 0 == self.process.wait(timeout=60), self.log()
        with closing(sqlite3.connect(self.folder / "people.sqlite3")) as database:
            return dict(database.execute("SELECT id, name FROM people"))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()


def stop_while_tasks_wait(folder: Path, pool: str, size: int) -> list[tuple[str, int]]:
    """Stop a worker while its tasks wait for results. Return the row and the size of the batch of each task."""
    with Worker(folder, pool, len(NAMES), size) as worker:
        tasks = worker.send("add_person")
        worker.wait_for(lambda: len(worker.started()) == len(NAMES))
        worker.stop()
        worker.release()
        people, results = worker.people(), [task.get(timeout=1) for task in tasks]
        return [(people[result["id"]], result["batch"]) for result in results]


def stop_while_jobs_wait(folder: Path, pool: str, concurrency: int) -> list[str]:
    """Stop a worker whose tasks have succeeded, but whose jobs have not been dispatched. Return the rows."""
    with Worker(folder, pool, concurrency, size=100) as worker:
        tasks = worker.send("add_person_later")
        worker.wait_for(lambda: all(task.successful() for task in tasks))
        assert [] == worker.started()
        worker.release()
        worker.process.send_signal(signal.SIGTERM)
        return sorted(worker.people().values())


SIZES = {"threads": len(NAMES), "prefork": 1}  # in the prefork pool, each process has its own batcher, and one task
CONCURRENCY = {"threads": 8, "prefork": 2, "solo": 1}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[Any, str], Future[Any]]]:
    """What each of the two functions returns with each pool. They run at once, because most of the time Celery sleeps."""
    folder = tmp_path_factory.mktemp("celery")
    cases = [
        *((stop_while_tasks_wait, pool, size) for pool, size in SIZES.items()),
        *((stop_while_jobs_wait, pool, concurrency) for pool, concurrency in CONCURRENCY.items()),
    ]
    with ThreadPoolExecutor(len(cases)) as threads:
        yield {
            (stop, pool): threads.submit(stop, folder / f"{stop.__name__} {pool}", pool, number)
            for stop, pool, number in cases
        }


starts_workers = [
    pytest.mark.server,
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM"),
]


def pools(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pool", [pytest.param(name, marks=starts_workers) for name in names])


@pools(*SIZES)
def test_running_tasks_get_their_results_at_a_warm_shutdown_and_share_a_batch_in_the_threads_pool(
    pool: str, stopped: dict[Any, Future[Any]]
) -> None:
    assert [(name, SIZES[pool]) for name in NAMES] == stopped[stop_while_tasks_wait, pool].result()


@pools(*CONCURRENCY)
def test_jobs_that_no_task_waits_for_are_processed_at_a_warm_shutdown(
    pool: str, stopped: dict[Any, Future[Any]]
) -> None:
    assert NAMES == stopped[stop_while_jobs_wait, pool].result()


def test_the_tasks_on_the_page_are_in_the_example() -> None:
    example = without_signatures((EXAMPLE / "tasks.py").read_text(encoding="utf-8"))
    shown = [without_signatures(block) for block in blocks("celery") if "from tasks import" not in block]
    assert [] == [code for code in shown if code not in example]
