"""PostgreSQL, row by row and in batches: ``python -m benchmarks.postgresql --delay 0 0.5 > benchmarks/results/postgresql.rst``.

Callers in one process insert a row and get its ID, add to the counter of a key, or look a row up by its ID. Each caller
is a thread that waits for its result before it goes on. Without batches, there are as many connections as callers. All
connections are in autocommit mode, so that each call takes one round trip. The server has its default settings, so each
commit waits for the disk. All results are checked.

The ways take turns. Before each turn, the tables are filled anew, and there is a ``VACUUM`` and a ``CHECKPOINT``. A
figure is the median of all turns, and *worst* is the slowest one. *Ratio* is the ratio of the rows/s to those of the
first way in the same round: the median, and the lowest. The CPU time of the server is that of all its processes.

With ``--delay``, connections also go through a proxy, in a process of its own, that holds back each reply for so many
milliseconds. The proxy shares the cores too. A delay of 0 shows what the proxy itself costs.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import psycopg_pool
from psycopg.conninfo import make_conninfo

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst
from microbatch import Batcher, Natural, Size
from microbatch.processors import by_key, deduplicating, within

__all__ = ["main"]

ROOT = Path(__file__).parent.parent
POLICY = Size(500) | Natural()
CPU = ("client", "server", "proxy")
PAGES = 10_000
PEOPLE = range(100_000, 200_000)  # all take four bytes, so that each connection prepares one statement only

TABLES = f"""
    DROP TABLE IF EXISTS new_people, pages, people;
    CREATE TABLE new_people (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);
    CREATE TABLE pages (id bigint PRIMARY KEY, visits bigint);
    CREATE TABLE people (id bigint PRIMARY KEY, name text);
    INSERT INTO people SELECT id, 'person ' || id FROM generate_series({PEOPLE.start}, {PEOPLE.stop - 1}) AS id
"""

RESET = [
    "TRUNCATE new_people, pages",
    f"INSERT INTO pages SELECT id, 0 FROM generate_series(0, {PAGES - 1}) AS id",
    "VACUUM ANALYZE new_people, pages, people",
    "CHECKPOINT",
]

Connection = psycopg.Connection[tuple[Any, ...]]
Pool = psycopg_pool.ConnectionPool[Connection]


def insert(name: str, connection: Connection) -> int:
    """Insert one row, and return its ID."""
    row = connection.execute("INSERT INTO new_people (name) VALUES (%s) RETURNING id", (name,)).fetchone()
    assert row is not None
    return int(row[0])


def insert_many(names: list[str], connection: Connection) -> list[int]:
    """Insert rows, and return their IDs."""
    rows = connection.execute(
        "INSERT INTO new_people (name) SELECT name FROM unnest(%s::text[]) WITH ORDINALITY AS new (name, place) "
        "ORDER BY place RETURNING id",
        (names,),
    )
    return [int(number) for (number,) in rows]


def count(visit: tuple[int, int], connection: Connection) -> None:
    """Add to one counter."""
    connection.execute(
        "INSERT INTO pages AS old (id, visits) VALUES (%s, %s) "
        "ON CONFLICT (id) DO UPDATE SET visits = old.visits + EXCLUDED.visits",
        visit,
    )


def count_many(visits: list[tuple[int, int]], connection: Connection) -> None:
    """Add to different counters, in the order of their keys, so that two batches can't deadlock."""
    connection.execute(
        "INSERT INTO pages AS old (id, visits) SELECT * FROM unnest(%s::bigint[], %s::bigint[]) ORDER BY 1 "
        "ON CONFLICT (id) DO UPDATE SET visits = old.visits + EXCLUDED.visits",
        tuple(map(list, zip(*visits))),
    )


def look_up(number: int, connection: Connection) -> tuple[Any, ...] | None:
    """Return one row."""
    return connection.execute("SELECT id, name FROM people WHERE id = %s", (number,)).fetchone()


def look_up_many(numbers: list[int], connection: Connection) -> list[tuple[Any, ...]]:
    """Return rows, in any order."""
    return connection.execute("SELECT id, name FROM people WHERE id = ANY(%s)", (numbers,)).fetchall()


def _check_inserted(names: list[str], ids: list[int], connection: Connection) -> bool:
    rows = connection.execute("SELECT id, name FROM new_people WHERE name <> ''").fetchall()
    return sorted(rows) == sorted(zip(ids, names))


def _check_counted(visits: list[tuple[int, int]], _: list[None], connection: Connection) -> bool:
    expected: Counter[int] = Counter()
    for page, number in visits:
        expected[page] += number
    return expected == dict(connection.execute("SELECT id, visits FROM pages WHERE visits > 0").fetchall())


def _check_found(ids: list[int], rows: list[tuple[Any, ...]], _: Connection) -> bool:
    return [(number, f"person {number}") for number in ids] == rows


class Operation(NamedTuple):
    """What is done with one row, and with many."""

    label: str
    job: Callable[[random.Random], Any]
    """Makes a job."""
    idle: Any
    """A job that `check` ignores, to warm up."""
    one: Callable[[Any, Connection], Any]
    many: Callable[[list[Any], Connection], Any]
    check: Callable[[list[Any], list[Any], Connection], bool]
    """Takes all jobs and their results, and returns whether the results and the tables are right."""


OPERATIONS = [
    Operation("insert", lambda chance: f"person {chance.random()}", "", insert, insert_many, _check_inserted),
    Operation(
        "upsert",
        lambda chance: (chance.randrange(PAGES), chance.randint(1, 9)),
        (0, 0),
        count,
        deduplicating(count_many, key=lambda visit: visit[0], merge=lambda a, b: (a[0], a[1] + b[1])),
        _check_counted,
    ),
    Operation(
        "lookup",
        lambda chance: chance.choice(PEOPLE),
        PEOPLE.start,
        look_up,
        by_key(look_up_many, row_key=lambda row: row[0]),
        _check_found,
    ),
]


class Way(NamedTuple):
    """How rows get to the server."""

    label: str
    connections: int
    workers: int
    """Of the batcher; 0 if there is no batcher."""


class Turn(NamedTuple):
    """What it took to process all jobs in one way."""

    jobs: int
    calls: int
    seconds: float
    cpu: tuple[float, float, float]
    """CPU seconds of the client, of the server, and of the proxy."""

    @property
    def rate(self) -> float:
        """The jobs/s."""
        return self.jobs / self.seconds


class Processes:
    """The processes whose CPU time is measured: this one, a server on this machine, and perhaps a proxy."""

    def __init__(self, backend: int, proxy: int | None) -> None:
        self._server = int(_stat(backend)[1])  # the parent of the process that serves one connection
        self._proxy = proxy

    def cpu(self) -> tuple[float, float, float]:
        """Return the CPU seconds so far of the client, of the server, and of the proxy."""
        server = proxy = 0
        for process in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                stat = _stat(process)
                if process == self._server:
                    server += sum(map(int, stat[11:15]))  # with its children that have ended
                elif int(stat[1]) == self._server:
                    server += sum(map(int, stat[11:13]))
                elif process == self._proxy:
                    proxy = sum(map(int, stat[11:13]))
        ticks = os.sysconf("SC_CLK_TCK")
        return time.process_time(), server / ticks, proxy / ticks


def _stat(process: int) -> list[str]:
    """Return what the kernel tells about a process, from its state on."""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def take_turn(operation: Operation, way: Way, pool: Pool, jobs: list[Any], callers: int, processes: Processes) -> Turn:
    """Process all jobs in one way."""
    for _ in range(10 * way.connections):  # the pool hands out the connection that has not been used the longest
        with pool.connection() as connection:
            operation.many([operation.idle], connection) if way.workers else operation.one(operation.idle, connection)

    def directly(job: Any) -> Any:
        with pool.connection() as connection:
            return operation.one(job, connection)

    results: list[Any] = [None] * len(jobs)
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(callers))
        call, batcher = directly, None
        if way.workers:
            processor = within(operation.many, pool.connection, pass_value=True)
            batcher = stack.enter_context(Batcher(processor, POLICY, max_workers=way.workers))
            call = lambda job: batcher.submit(job).result().value

        def caller(number: int) -> None:
            for place in range(number, len(jobs), callers):
                results[place] = call(jobs[place])

        before, started = processes.cpu(), time.perf_counter()
        list(threads.map(caller, range(callers)))
        seconds, after = time.perf_counter() - started, processes.cpu()
        calls = batcher.stats().batches if batcher else len(jobs)
    with pool.connection() as connection:
        if not operation.check(jobs, results, connection):
            sys.exit(f"{operation.label}, {way.label}: wrong results")
    client, server, proxy = (late - early for early, late in zip(before, after))
    return Turn(len(jobs), calls, seconds, (client, server, proxy))


def rounds(
    address: str, ways: list[Way], callers: int, jobs: int, repeats: int, proxy: int | None
) -> dict[tuple[str, str], list[Turn]]:
    """Process all jobs in all ways, again and again, and return the turns of each operation and way."""
    turns: dict[tuple[str, str], list[Turn]] = {}
    with ExitStack() as stack:
        pools = {
            way: stack.enter_context(
                Pool(address, min_size=way.connections, max_size=way.connections, kwargs={"autocommit": True})
            )
            for way in ways
        }
        for pool in pools.values():
            pool.wait()
        connection = stack.enter_context(psycopg.connect(address, autocommit=True))
        processes = Processes(connection.info.backend_pid, proxy)
        for repeat in range(repeats):
            for operation in OPERATIONS:
                chance = random.Random(repeat)
                made = [operation.job(chance) for _ in range(jobs)]
                for place in range(len(ways)):
                    way = ways[(place + repeat) % len(ways)]
                    for statement in RESET:
                        connection.execute(statement)
                    turn = take_turn(operation, way, pools[way], made, callers, processes)
                    turns.setdefault((operation.label, way.label), []).append(turn)
    return turns


def rows_of(turns: dict[tuple[str, str], list[Turn]], ways: list[Way]) -> list[list[str]]:
    """Return the rows of a table."""
    made = []
    for operation in OPERATIONS:
        first = turns[operation.label, ways[0].label]
        for way in ways:
            those = turns[operation.label, way.label]
            ratios = [turn.rate / single.rate for turn, single in zip(those, first)]
            cpu = [statistics.median(seconds) / those[0].jobs for seconds in zip(*(turn.cpu for turn in those))]
            made.append(
                [
                    f"{operation.label}, {way.label}",
                    f"{way.connections}",
                    f"{statistics.median(turn.jobs / turn.calls for turn in those):.1f}",
                    f"{statistics.median(turn.rate for turn in those):,.0f}",
                    f"{min(turn.rate for turn in those):,.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{min(ratios):.2f}",
                    *(f"{seconds * 1e6:.0f}" for seconds in cpu),
                ]
            )
    return made


def round_trip(address: str) -> float:
    """Return the seconds that a round trip takes if nothing else is going on."""
    times = []
    with psycopg.connect(address, autocommit=True) as connection:
        for _ in range(300):
            started = time.perf_counter()
            connection.execute("SELECT 1")
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@contextmanager
def running(*command: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Start a Python program, and end it afterwards. Return its process, and the first line that it prints."""
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


def compare(address: str, delays: list[float], callers: int, jobs: int, repeats: int) -> None:
    """Print a table for direct connections, and one for each delay."""
    ways = [Way("one call per row", callers, 0), Way("batches, 1 worker", 1, 1), Way("batches, 4 workers", 4, 4)]
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(TABLES)
        port = connection.info.port
        versions = {
            "PostgreSQL": connection.info.parameter_status("server_version"),
            "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})",
        }
    print(rst("PostgreSQL, row by row and in batches", "="))
    print(f"{__doc__.partition(chr(10))[2].strip()}\n")
    for name, value in {**machine(), **versions}.items():
        print(f":{name}: {value}")
    print(f":load: {callers} callers, {jobs:,} rows per turn, {repeats} rounds\n", flush=True)
    headings = ["", "connections", "rows/call", "rows/s", "worst", "ratio", "worst", *(f"{who}, µs" for who in CPU)]
    for delay in [None, *delays]:
        with ExitStack() as stack:
            title, here, proxy = "Direct connections", address, None
            if delay is not None:
                command = ("-m", "benchmarks.delaying", f"{port}", f"--delay={delay}")
                process, line = stack.enter_context(running(*command))
                title, proxy = f"Through a proxy with a delay of {delay:g} ms", process.pid
                here = make_conninfo(address, host="127.0.0.1", port=line)
            title += f": a round trip takes {round_trip(here) * 1e3:.2f} ms"
            rows = rows_of(rounds(here, ways, callers, jobs, repeats, proxy), ways)
            print(render(Table(title, headings, rows, [])), flush=True)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postgresql", description=__doc__.partition("\n")[0])
    parser.add_argument("address", nargs="?", help="of a server on this machine; by default, it starts one")
    parser.add_argument("--delay", type=float, nargs="+", default=[], help="of a network, in milliseconds")
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        address = arguments.address
        if address is None:
            _, address = stack.enter_context(running("examples/serve_postgresql.py"))
        compare(address, arguments.delay, arguments.callers, arguments.jobs, arguments.repeats)


if __name__ == "__main__":
    main()
