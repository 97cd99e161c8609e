"""A model behind two web servers: ``python -m benchmarks.embeddings > benchmarks/results/embeddings.rst``.

The program in ``examples/embeddings`` serves a sentence-embedding model on the CPU. A client in another process sends
478 docstrings of Python, each once. In the closed loop, it has 32 connections, and sends the next text over each when
the answer to the last one has come. In the open loops, texts arrive at random, at 50 % and 90 % of the rate that the
unbatched server reached in the closed loop. The client compares each embedding with one that was computed alone.

In each repeat and under each load, the server runs once unbatched, which comes first, and then once with each kind of
batcher in ``batchers.py``. The page on model inference explains these. The texts have the same order in all runs of a
repeat. *CPU* is the CPU time of the server for each answer, in milliseconds. *Ratio* is that time divided by that of
the unbatched server in the same repeat. *Padding* is the number of tokens with padding divided by the number without.
*Busy* counts the answers with status 503, *wrong* those with a different embedding, and *lost* the requests without an
answer. These three are sums over the repeats. Each other figure is a median over the repeats, taken for each column on
its own. The rate of an open loop differs between repeats, so a row can mix figures of different repeats.
"""

import argparse
import json
import os
import queue
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "embeddings"
SERVERS = {
    "Flask, waitress": ["waitress", "--listen=127.0.0.1:{port}", "--threads=96", "--call", "with_flask:create_app"],
    "FastAPI, uvicorn": [
        "uvicorn",
        "--factory",
        "with_fastapi:create_app",
        "--port={port}",
        "--log-level=warning",
        "--timeout-keep-alive=120",
    ],
}
WAYS = ("unbatched", "default", "size", "buckets", "by_length", "processes")
CLIENTS = 32
CONNECTIONS = 96
"""The maximum number of requests at a time in an open loop. Later ones start late, but their time counts from when they
were due."""
TOLERANCE = 1e-5


@dataclass
class Load:
    """What became of the requests under one load."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    padded: int = 0
    busy: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)


def client(port: int, rate: float, passes: int, seed: int, path: str) -> None:
    """Send requests, and print what became of them. With a *rate* of 0, in a closed loop."""
    chance, expected = random.Random(seed), json.loads(Path(path).read_text())
    texts = [text for _ in range(passes) for text in chance.sample(expected, len(expected))]
    load, lock, due = Load(), threading.Lock(), queue.SimpleQueue[Any]()
    connections = CONNECTIONS if rate else CLIENTS

    def send(connection: HTTPConnection, moment: float, text: str, vector: list[float]) -> None:
        try:
            connection.request("POST", "/embeddings", json.dumps({"text": text}), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except Exception as error:
            load.lost.append(repr(error))
            connection.close()
            return
        took = time.monotonic() - moment
        with lock:
            if response.status == 503:
                load.busy += 1
                return
            load.times.append(took)
            load.tokens += answer["tokens"]
            load.padded += answer["padded"]
            load.wrong += not max(abs(x - y) for x, y in zip(answer["vector"], vector, strict=True)) < TOLERANCE

    def loop() -> None:
        with closing(HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            while (job := due.get()) is not None:
                moment, (text, vector) = job
                send(connection, moment if rate else time.monotonic(), text, vector)

    threads = [threading.Thread(target=loop) for _ in range(connections)]
    for thread in threads:
        thread.start()
    moment = start = time.monotonic()
    for pair in texts:
        if rate:
            moment += chance.expovariate(rate)
            time.sleep(max(0.0, moment - time.monotonic()))
        due.put((moment, pair))
    for _ in threads:
        due.put(None)
    for thread in threads:
        thread.join()
    load.seconds = time.monotonic() - start
    print(json.dumps(asdict(load)))


class Server:
    """A server that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, expected: Path) -> None:
        self.process, self.port, self.expected = process, port, expected

    def cpu(self) -> float:
        """Return the CPU time that the server and its children have used, in seconds."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:  # its process group
                    ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def load(self, rate: float, passes: int, seed: int) -> tuple[Load, float]:
        """Put a load on the server, and return what became of it, and the CPU time that it took in seconds."""
        before = self.cpu()
        arguments = [str(self.port), str(rate), str(passes), str(seed), str(self.expected)]
        command = [sys.executable, "-m", "benchmarks.embeddings", "--client", *arguments]
        out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        return Load(**json.loads(out)), self.cpu() - before


@contextmanager
def serving(server: str, way: str, expected: Path) -> Iterator[Server]:
    """Start a server, enter when it answers, and kill it in the end."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", *(part.format(port=port) for part in SERVERS[server])]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{EXAMPLE}", "EMBEDDINGS": way}
    with subprocess.Popen(command, cwd=EXAMPLE, env=environment, start_new_session=True) as process:
        try:
            found = Server(process, port, expected)
            _wait(found)
            yield found
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def post(port: int, text: str) -> None:
    """Send a request, and drop the answer."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/embeddings", json.dumps({"text": text}), {"Content-Type": "application/json"})
        connection.getresponse().read()


def _wait(server: Server) -> None:
    deadline = time.monotonic() + 60
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
            continue
        for _ in range(10):
            post(server.port, "warm")  # also loads the models of other processes
        return
    raise TimeoutError("the server does not listen")


def write_expected(path: Path) -> None:
    """Write the texts, and the embedding of each text, computed alone."""
    sys.path.insert(0, str(EXAMPLE))
    import minilm

    texts = minilm.docstrings()
    path.write_text(json.dumps([(text, minilm.embed([minilm.tokenize(text)])[0].vector) for text in texts]))


@dataclass
class Figures:
    """The figures of one way under one load, one for each repeat."""

    rates: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def add(self, load: Load, cpu: float) -> None:
        """Add a repeat."""
        self.loads.append(load)
        self.rates.append(len(load.times) / load.seconds)
        self.cpus.append(1e3 * cpu / max(1, len(load.times)))

    def row(self, way: str, unbatched: "Figures") -> list[str]:
        """Return the row of a table."""
        times = [statistics.quantiles(load.times or [0.0, 0.0], n=100) for load in self.loads]
        ratio = statistics.median(mine / theirs for mine, theirs in zip(self.cpus, unbatched.cpus))
        padding = statistics.median(load.padded / max(1, load.tokens) for load in self.loads)
        figures = f"{statistics.median(self.rates):.1f}", f"{statistics.median(self.cpus):.1f}", f"{ratio:.2f}"
        latencies = [f"{1e3 * statistics.median(time[place] for time in times):,.0f}" for place in (49, 98)]
        counts = [sum(load.busy for load in self.loads), sum(load.wrong + len(load.lost) for load in self.loads)]
        return [way, *figures, *latencies, f"{padding:.2f}", *(f"{count:,}" for count in counts)]


def measure(server: str, ways: list[str], repeats: int, passes: int, expected: Path) -> list[Table]:
    """Return a table for each load."""
    names = ("a closed loop of 32 clients", "an open loop at 50 %", "an open loop at 90 %")
    figures = {(name, way): Figures() for name in names for way in ways}
    for repeat in range(repeats):
        capacity = 0.0
        for way in ways:
            with serving(server, way, expected) as running:
                for name, share in zip(names, (0, 0.5, 0.9)):
                    load, cpu = running.load(share * capacity, passes, repeat)
                    capacity = capacity or len(load.times) / load.seconds
                    figures[name, way].add(load, cpu)
                    if load.lost:
                        print(way, name, load.lost[0], file=sys.stderr)
                    print(server, repeat, name, figures[name, way].row(way, figures[name, ways[0]]), file=sys.stderr)
    headings = ["", "answers/s", "CPU, ms", "ratio", "p50, ms", "p99, ms", "padding", "busy", "wrong or lost"]
    return [
        Table(f"{server}: {name}", headings, [figures[name, way].row(way, figures[name, ways[0]]) for way in ways], [])
        for name in names
    ]


def calls() -> Table:
    """Return how long a call of the model takes."""
    import minilm

    def cpu(count: int, length: int) -> float:
        texts, times = [list(range(1_000, 1_000 + length))] * count, list[float]()
        minilm.embed(texts)
        while len(times) < 5 or sum(times) < 0.3:
            start = time.thread_time()
            minilm.embed(texts)
            times.append(time.thread_time() - start)
        return statistics.median(times)

    counts = (1, 2, 4, 8, 16)
    rows = [
        [f"{length}", *(f"{1e3 * cpu(count, length) / count:.1f}" for count in counts if count * length <= 1024)]
        for length in (4, 8, 16, 32, 64, 128, 256)
    ]
    for row in rows:
        row += [""] * (1 + len(counts) - len(row))
    title = "CPU time of the model for each text, in ms, by the number of tokens and of texts in the call"
    return Table(title, ["tokens", *(f"{count} text{'s' * (count > 1)}" for count in counts)], rows, [])


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embeddings", description=__doc__.partition("\n")[0])
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS, metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=list(WAYS[1:]), choices=WAYS, metavar="WAY")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", type=int, default=1, help="how often each load sends each text (%(default)s)")
    arguments = parser.parse_args()
    if arguments.client is not None:
        port, rate, passes, seed, path = arguments.client
        client(int(port), float(rate), int(passes), int(seed), path)
        return
    ways = ["unbatched", *(way for way in arguments.ways if way != "unbatched")]
    print(rst("A model behind web servers", "="))
    print(f"{__doc__.partition(chr(10))[2].strip()}\n")
    for name, value in machine().items():
        print(f":{name}: {value}")
    print()
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.json"
        write_expected(expected)
        print(render(calls()), flush=True)
        for server in arguments.servers:
            for table in measure(server, ways, arguments.repeats, arguments.passes, expected):
                print(render(table), flush=True)


if __name__ == "__main__":
    main()
