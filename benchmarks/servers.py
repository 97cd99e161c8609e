"""Measures the examples under real servers: ``python -m benchmarks.servers > benchmarks/results/servers.rst``.

Clients in another process place orders in a loop. There are 64 clients, or fewer if the server does not accept so many
connections. The database is SQLite, and everything runs on the same cores. *Answers* counts the responses, *wrong* the
responses that belong to another request, and *lost* the requests without a valid response. *Calls* are calls of the
processor.
"""

import argparse
import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.load import Load
from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst

__all__ = ["SERVERS", "Served", "Server", "load", "serving"]

ROOT = Path(__file__).parent.parent
DJANGO, FLASK = ROOT / "examples" / "django_app", ROOT / "examples" / "flask_app"
GUNICORN = ["gunicorn", "--no-control-socket", "--graceful-timeout=20", "--bind=127.0.0.1:{port}"]
GTHREAD = [*GUNICORN, "--workers=2", "--worker-class=gthread", "--threads=32"]
WAITRESS = ["waitress", "--listen=127.0.0.1:{port}", "--threads=64"]


class Server(NamedTuple):
    """A way to serve an example.

    Attributes:
        folder: The folder of the example.
        command: The module that serves it, and the arguments.
        restarts: Whether SIGHUP restarts it.
        batches: Whether a process handles several requests at a time. Only then can their jobs share a batch.
        connections: The number of clients that it accepts. The server of Django queues only ten new connections.
    """

    folder: Path
    command: Sequence[str]
    restarts: bool = False
    batches: bool = True
    connections: int = 64


SERVERS: dict[str, Server] = {
    "Django, gunicorn sync": Server(DJANGO, [*GUNICORN, "--workers=4", "shop.wsgi"], restarts=True, batches=False),
    "Django, gunicorn gthread": Server(DJANGO, [*GTHREAD, "shop.wsgi"], restarts=True),
    "Django, gunicorn gthread --preload": Server(DJANGO, [*GTHREAD, "--preload", "shop.wsgi"], restarts=True),
    "Django, waitress": Server(DJANGO, [*WAITRESS, "shop.wsgi:application"]),
    "Django, runserver": Server(DJANGO, ["manage", "runserver", "127.0.0.1:{port}"], connections=8),
    "Flask, gunicorn sync": Server(
        FLASK, [*GUNICORN, "--workers=4", "application:create_app()"], restarts=True, batches=False
    ),
    "Flask, gunicorn gthread": Server(FLASK, [*GTHREAD, "application:create_app()"], restarts=True),
    "Flask, gunicorn gthread --preload": Server(
        FLASK, [*GTHREAD, "--preload", "application:create_app()"], restarts=True
    ),
    "Flask, waitress": Server(FLASK, [*WAITRESS, "--call", "application:create_app"]),
    "Flask, run --debug": Server(FLASK, ["flask", "--app=application", "run", "--debug", "--port={port}"]),
}


class Served(NamedTuple):
    """A running server."""

    server: Server
    process: "subprocess.Popen[bytes]"
    port: int
    database: Path

    def rows(self, table: str = "") -> dict[str, Any]:
        """Return the rows of a table by their number. The default is the table of orders."""
        table = table or ("shop_order" if self.server.folder == DJANGO else "orders")
        with closing(sqlite3.connect(self.database, timeout=20)) as connection:
            return {str(number): what for number, what in connection.execute(f"SELECT * FROM {table}")}

    def wait(self) -> None:
        """Wait until the server accepts connections.

        Raises:
            TimeoutError: It does not accept one within half a minute, or its process has ended.
        """
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError(self.database.with_name("log.txt").read_text())


@contextmanager
def serving(server: Server, folder: Path, source: Path | None = None) -> Iterator[Served]:
    """Start a server with a new database, enter when it accepts connections, and kill it at the end.

    Args:
        server: The server to start.
        folder: An empty folder, for the database and the log.
        source: The folder of the example, if it differs from the folder of *server*.
    """
    database, source = folder / "shop.sqlite3", source or server.folder
    environment = {**os.environ, "SHOP_DATABASE": str(database), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if server.folder == DJANGO:
        subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=source, env=environment, check=True)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", *(part.format(port=port) for part in server.command)]
    with (
        open(folder / "log.txt", "wb") as log,
        subprocess.Popen(
            command, cwd=source, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            served = Served(server, process, port, database)
            served.wait()
            yield served
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def load(served: Served, requests: int, number: int | None = None) -> Load:
    """Run clients that place orders in a loop. Halfway, send the signal *number* to the server, if there is one."""
    options = [f"--connections={served.server.connections}", f"--requests={requests}"]
    command = [sys.executable, "-m", "benchmarks.load", str(served.port), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "half\n" == process.stdout.readline()
        if number is not None:
            served.process.send_signal(number)
        return Load(**json.loads(process.stdout.read()))


def _row(name: str, found: Load) -> list[str]:
    p50, p99 = statistics.median(found.times), statistics.quantiles(found.times, n=100)[98]
    figures = [len(found.times), len(found.wrong), len(found.lost), found.calls]
    return [name, *(f"{figure:,}" for figure in figures), f"{p50 * 1e3:.1f}", f"{p99 * 1e3:.1f}"]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers", description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=4_000)
    requests = parser.parse_args().requests
    steady: list[list[str]] = []
    restarted: list[list[str]] = []
    for name, server in SERVERS.items():
        with tempfile.TemporaryDirectory() as folder, serving(server, Path(folder)) as served:
            load(served, requests // 10)  # warms the caches
            steady.append(_row(name, load(served, requests)))
            if server.restarts:
                restarted.append(_row(name, load(served, requests, signal.SIGHUP)))
    print(rst("The examples under real servers", "="))
    print(f"{__doc__.partition(chr(10))[2].strip()}\n")
    for name, value in machine().items():
        print(f":{name}: {value}")
    print()
    headings = ["", "answers", "wrong", "lost", "calls", "p50, ms", "p99, ms"]
    print(render(Table("A steady load", headings, steady, [])))
    print(render(Table("The same, with a graceful restart (SIGHUP) halfway", headings, restarted, [])))


if __name__ == "__main__":
    main()
