"""PostgreSQL by row and in batches: ``python -m benchmarks.postgresql --delay 0.5 > benchmarks/results/postgresql.rst``.

Callers in one process insert a row and get its ID, add to the counter of a key, or look a row up by its ID. Each caller
is a thread that waits for its result before it goes on. All connections are in autocommit mode, so each call is one
statement and takes one round trip. The server has its default settings, so each commit waits for the disk. Callers and
server share the cores. All results are checked.

The rows of a table are measured in turn. Before each turn, the tables in the database are filled anew, and there is a
``VACUUM`` and a ``CHECKPOINT``. A figure is the median of all rounds, and *worst* is the slowest one. *Ratio* is the
ratio of the rows/s to those of the first row in the same round, and *worst ratio* is the lowest one. *Client* and
*server* are CPU time per row. That of the server is the sum of all its processes.

With ``--delay``, everything is measured again with a network that takes that many milliseconds longer for each round
trip: before each statement, the thread that has the connection sleeps. This costs some CPU time too, which is part of
that of the client. (A proxy that holds back each reply would cost more, and take it from the same cores.)
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import psycopg_pool

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst
from microbatch import Batcher, Natural, Size
from microbatch.processors import by_key, deduplicating, within

__all__ = ["main"]

ROOT = Path(__file__).parent.parent
POLICY = Size(500) | Natural()
PAGES = 10_000
PEOPLE = range(100_000, 200_000)  # all take four bytes, so that each connection prepares one statement only

SCHEMA = "microbatch_benchmark"
TABLES = f"""
    DROP SCHEMA IF EXISTS {SCHEMA} CASCADE;
    CREATE SCHEMA {SCHEMA};
    CREATE TABLE new_people (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text);
    CREATE TABLE pages (id bigint PRIMARY KEY, visits bigint);
    CREATE TABLE people (id bigint PRIMARY KEY, name text);
    INSERT INTO people SELECT id, 'person ' || id FROM generate_series({PEOPLE.start}, {PEOPLE.stop - 1}) AS id
"""

OPTIONS: dict[str, Any] = {"autocommit": True, "options": f"-c search_path={SCHEMA}"}

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
    return sorted(number for (number,) in rows)  # they are numbered in order, but may come in another


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
    client: float
    server: float
    others: float
    """CPU seconds, as the two above: those of all other programs."""

    @property
    def rate(self) -> float:
        """The jobs/s."""
        return self.jobs / self.seconds


Turns = dict[tuple[float, str, Way], list[Turn]]
"""The turns of each delay, operation and way."""


class Server:
    """A server on this machine.

    Args:
        backend: The process that serves one of the connections.
    """

    def __init__(self, backend: int) -> None:
        self._process = int(_stat(backend)[1])  # its parent

    def cpu(self) -> float:
        """Return the CPU seconds so far of all its processes."""
        ticks = sum(map(int, _stat(self._process)[11:15]))  # with its children that have ended
        for process in [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                stat = _stat(process)
                if int(stat[1]) == self._process:
                    ticks += sum(map(int, stat[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


def busy() -> float:
    """Return the CPU seconds so far of all programs on this machine."""
    user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def _stat(process: int) -> list[str]:
    """Return what the kernel tells about a process, from its state on."""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def slowed(function: Callable[[Any, Connection], Any], delay: float) -> Callable[[Any, Connection], Any]:
    """Return a function that takes longer, as if the statement that it executes went through a network."""

    def call(jobs: Any, connection: Connection) -> Any:
        time.sleep(delay)
        return function(jobs, connection)

    return call if delay else function


def take_turn(
    operation: Operation, way: Way, delay: float, pool: Pool, jobs: list[Any], callers: int, server: Server
) -> Turn:
    """Process all jobs in one way."""
    for _ in range(10 * way.connections):  # the pool hands out the connection that has not been used the longest
        with pool.connection() as connection:
            operation.many([operation.idle], connection) if way.workers else operation.one(operation.idle, connection)

    one, many = slowed(operation.one, delay), slowed(operation.many, delay)

    def alone(job: Any) -> Any:
        with pool.connection() as connection:
            return one(job, connection)

    results: list[Any] = [None] * len(jobs)
    processor = within(many, pool.connection, pass_value=True)
    with Batcher(processor, POLICY, max_workers=way.workers or 1) as batcher, ThreadPoolExecutor(callers) as threads:

        def together(job: Any) -> Any:
            return batcher.submit(job).result().value

        process = together if way.workers else alone

        def caller(number: int) -> None:
            for place in range(number, len(jobs), callers):
                results[place] = process(jobs[place])

        before, started = (time.process_time(), server.cpu(), busy()), time.perf_counter()
        list(threads.map(caller, range(callers)))
        seconds, after = time.perf_counter() - started, (time.process_time(), server.cpu(), busy())
        calls = batcher.stats().batches if way.workers else len(jobs)
    ours, theirs, total = (late - early for early, late in zip(before, after))
    turn = Turn(len(jobs), calls, seconds, ours, theirs, total - ours - theirs)
    with pool.connection() as connection:
        if not operation.check(jobs, results, connection):
            sys.exit(f"{operation.label}, {way.label}: wrong results")
    return turn


def measure(address: str, ways: list[Way], delays: list[float], callers: int, jobs: int, repeats: int) -> Turns:
    """Process all jobs in all ways, in rounds."""
    turns: Turns = {}
    with ExitStack() as stack:
        pools = {}
        for way in ways:
            size = way.connections
            pool = Pool(address, min_size=size, max_size=size, kwargs=OPTIONS)
            pools[way] = stack.enter_context(pool)
            pool.wait()
        connection = stack.enter_context(psycopg.connect(address, **OPTIONS))
        connection.execute(TABLES)
        server = Server(connection.info.backend_pid)
        for repeat, delay, operation in product(range(repeats), delays, OPERATIONS):
            chance = random.Random(repeat)
            made = [operation.job(chance) for _ in range(jobs)]
            first = repeat % len(ways)
            for way in ways[first:] + ways[:first]:
                for statement in RESET:
                    connection.execute(statement)
                turn = take_turn(operation, way, delay, pools[way], made, callers, server)
                turns.setdefault((delay, operation.label, way), []).append(turn)
        connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    return turns


def row(label: str, turns: list[Turn], first: list[Turn]) -> list[str]:
    """Return a row of a table."""
    ratios = [turn.rate / reference.rate for turn, reference in zip(turns, first)]
    return [
        label,
        f"{statistics.median(turn.jobs / turn.calls for turn in turns):.1f}",
        f"{statistics.median(turn.rate for turn in turns):,.0f}",
        f"{min(turn.rate for turn in turns):,.0f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f}",
        f"{statistics.median(turn.client / turn.jobs for turn in turns) * 1e6:.0f}",
        f"{statistics.median(turn.server / turn.jobs for turn in turns) * 1e6:.0f}",
    ]


def compare(address: str, delays: list[float], callers: int, jobs: int, repeats: int) -> None:
    """Print tables of what was measured."""
    ways = [
        Way(f"one call per row, {callers} connections", callers, 0),
        Way("one call per row, 4 connections", 4, 0),
        Way("batches, 4 workers, 4 connections", 4, 4),
        Way("batches, 1 worker, 1 connection", 1, 1),
    ]
    with psycopg.connect(address) as connection:
        version = connection.info.parameter_status("server_version")
    print(rst("PostgreSQL by row and in batches", "="))
    print(f"{__doc__.partition(chr(10))[2].strip()}\n")
    versions = {"PostgreSQL": version, "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})"}
    for name, value in {**machine(), **versions}.items():
        print(f":{name}: {value}")
    print(f":measured: {callers} callers, {jobs:,} rows per turn, {repeats} rounds\n", flush=True)
    turns = measure(address, ways, delays, callers, jobs, repeats)
    headings = ["", "rows/call", "rows/s", "worst", "ratio", "worst ratio", "client, µs", "server, µs"]
    for delay, operation in product(delays, OPERATIONS):
        where = f"over a network that takes {delay * 1e3:g} ms more" if delay else "on loopback"
        rows = [row(way.label, *(turns[delay, operation.label, each] for each in (way, ways[0]))) for way in ways]
        print(render(Table(f"{operation.label} {where}", headings, rows, [])))
    all_turns = [turn for those in turns.values() for turn in those]
    share = sum(turn.others for turn in all_turns) / sum(turn.seconds for turn in all_turns) / (os.cpu_count() or 1)
    print(f"During the turns, other programs and the kernel used {share:.0%} of all CPU time.")


@contextmanager
def serving() -> Iterator[str]:
    """Start a server, and stop it afterwards. The value is its address."""
    command = [sys.executable, str(ROOT / "examples" / "serve_postgresql.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postgresql", description=__doc__.partition("\n")[0])
    parser.add_argument("address", nargs="?", help="of a server on this machine; by default, it starts one")
    parser.add_argument("--delay", type=float, help="of a network, for each round trip, in milliseconds")
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    delays = [0.0] if options.delay is None else [0.0, options.delay / 1e3]
    with nullcontext(options.address) if options.address else serving() as address:
        compare(address, delays, options.callers, options.jobs, options.repeats)


if __name__ == "__main__":
    main()
