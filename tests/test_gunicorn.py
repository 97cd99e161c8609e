"""Under gunicorn with `preload_app`: the threads of the batcher start before the workers are forked."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from tests.extras import needs

pytestmark = pytest.mark.server
pytest.importorskip("fcntl", reason="gunicorn needs Unix")
needs("gunicorn")

APPLICATION = """
import os
from microbatch import Batcher, ForkedError, Interval, Size

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # writes whole lines, whatever other processes write

def squares(jobs):
    return [job * job for job in jobs]

def keep(jobs):
    say("kept", os.getpid(), *jobs)

batcher = Batcher(squares, Size(4) | Interval(0.02))
batcher.submit(3).result(timeout=10)
keeper = Batcher(keep, Size(1000))
inherited = keeper.submit("parents")

def application(environ, start_response):
    number = int(environ["PATH_INFO"][1:])
    keeper.submit(number)
    result = batcher.submit(number).result(timeout=10)
    error = type(inherited.exception(timeout=0)).__name__
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{result.value} {os.getpid()} {result.batch.size} {error}".encode()]
"""

SETTINGS = """
from application import say
bind = "unix:server.sock"
preload_app = True
control_socket_disable = True
graceful_timeout = 5

def post_worker_init(worker):
    say("worker", worker.pid)
"""


class Answer(NamedTuple):
    value: int
    worker: int
    batch_size: int
    error: str


class Server:
    """A running gunicorn."""

    def __init__(self, process: "subprocess.Popen[str]", address: str) -> None:
        assert process.stdout is not None
        self.process = process
        self._address = address
        self._said: IO[str] = process.stdout
        self._kept: list[str] = []

    def wait_for_worker(self) -> int:
        """Return the process id of the next worker that is ready."""
        for line in self._said:
            word, _, rest = line.strip().partition(" ")
            if word == "worker":
                return int(rest)
            self._kept.append(rest)
        raise EOFError("gunicorn has ended")

    def get(self, number: int) -> Answer:
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(10)
            connection.connect(self._address)
            connection.sendall(f"GET /{number} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        value, worker, batch_size, error = answer.partition(b"\r\n\r\n")[2].decode().split()
        return Answer(int(value), int(worker), int(batch_size), error)

    def stop(self) -> list[list[str]]:
        """Stop the server as a service manager does. Return for each process the jobs that it kept."""
        self.process.send_signal(signal.SIGTERM)
        self._kept += [line.strip().partition(" ")[2] for line in self._said]
        assert 0 == self.process.wait(timeout=10)
        return [line.split() for line in self._kept]


@contextmanager
def gunicorn(directory: Path, *options: str) -> Iterator[Server]:
    (directory / "application.py").write_text(APPLICATION)
    (directory / "gunicorn.conf.py").write_text(SETTINGS)
    command = [sys.executable, "-m", "gunicorn", *options, "application"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            # An absolute path may be too long for a socket.
            yield Server(process, os.path.relpath(directory / "server.sock"))
        finally:  # the server has stopped by then, unless the test has failed
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("options", [(), ("--worker-class=gthread", "--threads=4")], ids=["sync", "gthread"])
def test_each_request_gets_its_own_result_and_each_process_processes_its_own_jobs(
    options: list[str], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(8) as clients, gunicorn(tmp_path, "--workers=2", *options) as server:
        workers = {server.wait_for_worker(), server.wait_for_worker()}
        answers: list[Answer] = []
        while (
            {answer.worker for answer in answers} != workers
            or options
            and not any(answer.batch_size > 1 for answer in answers)
        ):
            answers += clients.map(server.get, range(len(answers), len(answers) + 40))
        assert [number * number for number in range(len(answers))] == [answer.value for answer in answers]
        assert {"ForkedError"} == {answer.error for answer in answers}
        kept = server.stop()
    assert [[str(server.process.pid), "parents"]] == [line for line in kept if "parents" in line]
    by_worker: dict[int, list[int]] = {answer.worker: [] for answer in answers}
    for number, answer in enumerate(answers):
        by_worker[answer.worker].append(number)
    assert by_worker == {int(line[0]): sorted(map(int, line[1:])) for line in kept if "parents" not in line}


def test_workers_started_after_a_reload_or_a_crash_have_a_working_batcher(tmp_path: Path) -> None:
    with gunicorn(tmp_path) as server:
        first = server.wait_for_worker()
        assert first == server.get(1).worker
        server.process.send_signal(signal.SIGHUP)
        second = server.wait_for_worker()
        while (answer := server.get(2)).worker != second:
            pass  # the first worker stops only when the second is ready
        assert Answer(4, second, 1, "ForkedError") == answer
        os.kill(second, signal.SIGKILL)
        third = server.wait_for_worker()
        assert Answer(9, third, 1, "ForkedError") == server.get(3)
        kept = server.stop()
    assert [str(first), "1"] == kept[0][:2]
    assert [[str(third), "3"], [str(server.process.pid), "parents"]] == kept[-2:]
