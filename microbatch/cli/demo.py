"""``python -m microbatch demo``: inserts rows into a database with one commit per job, then with one commit per batch.

The rows are the function definitions in the source files of Python's standard library. The downstream system is an
SQLite file. Its commits are durable: each waits for the disk.
"""

import ast
import secrets
import shutil
import sqlite3
import sysconfig
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from microbatch import Batcher, BatchingPolicy
from microbatch.cli.progress import show_progress

__all__ = ["run_demo"]

Row = tuple[str, str, int, str]
"""The name of a function, its file, its line and its signature."""

_TRIALS = 20  # commits that are timed first, to choose the number of jobs
_SECONDS = 20.0  # about how long the run with one commit per job takes
_FEWEST, _MOST = 2_000, 5_000  # jobs


@dataclass(frozen=True)
class Measured:
    """The measurements of one way to insert the rows. All times are in seconds."""

    title: str
    seconds: float
    waits: list[float]
    batch_sizes: list[int]


class Database:
    """An SQLite file. Each call of `insert` is one durable transaction."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()  # guards the connection, because many threads insert
        self._connection = sqlite3.connect(path, check_same_thread=False)
        self._connection.execute("PRAGMA synchronous = FULL")
        self.batch_sizes: list[int] = []

    def insert(self, table: str, rows: Sequence[Row]) -> None:
        """Insert *rows*. Block until they are on the disk."""
        with self._lock, self._connection:
            self._connection.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", rows)
            self.batch_sizes.append(len(rows))

    def create(self, table: str) -> None:
        """Create a table, and reset `batch_sizes`."""
        with self._lock, self._connection:
            self._connection.execute(f"CREATE TABLE {table} (name, file, line, signature)")
            self.batch_sizes = []

    def rows(self, table: str) -> list[Row]:
        """Return all rows of a table, sorted."""
        return sorted(self._connection.execute(f"SELECT name, file, line, signature FROM {table}"))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def run_demo(threads: int, policy: BatchingPolicy[object], jobs: int | None, echo: Callable[[str], object]) -> bool:
    """Run the demo, and return whether both tables have the same rows.

    Args:
        threads: The number of threads that insert at the same time.
        policy: When a batch is dispatched.
        jobs: The number of rows to insert, or None for as many as the disk takes in about 20 seconds.
        echo: Called with each line of the report.
    """
    folder = Path(tempfile.gettempdir()) / f"microbatch-{secrets.token_hex(8)}"
    try:  # before the folder is created, so that it is removed even if a signal comes immediately
        folder.mkdir(mode=0o700)
        database = Database(folder / "demo.sqlite")
        try:
            number = jobs or _fitting_number(database)
            rows = []
            with show_progress("rows", number, title="reading") as progress:
                for row in islice(function_definitions(), number):
                    rows.append(row)
                    progress.update()
            echo(f"{len(rows):,} function definitions of Python's standard library, from {threads} threads")
            echo("into an SQLite file with durable commits\n")
            measured = partial(_measured, database, rows, threads)
            one_by_one = measured("one commit per job", "one_by_one", lambda row: database.insert("one_by_one", [row]))
            with Batcher(partial(database.insert, "batched"), policy) as batcher:
                batched = measured("through a Batcher", "batched", lambda row: batcher.submit(row).result())
            same = sorted(rows) == database.rows("one_by_one") == database.rows("batched")
        finally:
            database.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for line in _report(one_by_one, batched):
        echo(line)
    echo(f"both tables hold the same {len(rows):,} rows: {'yes' if same else 'NO'}")
    return same


def function_definitions() -> Iterator[Row]:
    """Yield the function definitions in the source files of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if "site-packages" not in name:
            yield from _functions_in(path, name)


def _functions_in(path: Path, name: str) -> Iterator[Row]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):  # some of the library's test files are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, name, node.lineno, ast.unparse(node.args)


def _fitting_number(database: Database) -> int:
    database.create("trial")
    started = time.perf_counter()
    for number in range(_TRIALS):
        database.insert("trial", [("name", "file", number, "signature")])
    commit_time = (time.perf_counter() - started) / _TRIALS
    return min(_MOST, max(_FEWEST, int(_SECONDS / commit_time)))


def _measured(
    database: Database, rows: list[Row], threads: int, title: str, table: str, insert: Callable[[Row], object]
) -> Measured:
    """Create the table, and insert every row, from many threads."""
    database.create(table)

    def wait_for(row: Row) -> float:
        started = time.perf_counter()
        insert(row)
        return time.perf_counter() - started

    waits = []
    callers = ThreadPoolExecutor(threads)
    try:
        with show_progress("jobs", len(rows), title=title) as progress:
            started = time.perf_counter()
            for wait in callers.map(wait_for, rows):
                waits.append(wait)
                progress.update()
            return Measured(title, time.perf_counter() - started, waits, database.batch_sizes)
    finally:
        callers.shutdown(cancel_futures=True)  # if a signal comes, some rows are left


def _report(one_by_one: Measured, batched: Measured) -> Iterator[str]:
    yield f"{'':20}{'jobs':>8}{'calls':>8}{'mean batch':>12}{'seconds':>10}{'jobs/s':>10}{'p50 ms':>9}{'p99 ms':>9}"
    for way in (one_by_one, batched):
        jobs, calls, waits = len(way.waits), len(way.batch_sizes), sorted(way.waits)
        p50, p99 = waits[jobs // 2] * 1000, waits[jobs * 99 // 100] * 1000
        yield (
            f"{way.title:20}{jobs:8,}{calls:8,}{jobs / calls:12.1f}{way.seconds:10.2f}"
            f"{jobs / way.seconds:10,.0f}{p50:9.1f}{p99:9.1f}"
        )
    yield f"\n{one_by_one.seconds / batched.seconds:.1f} times as fast. How many jobs the batches held:\n"
    yield from _bars(batched.batch_sizes)
    yield ""


def _bars(sizes: list[int], rows: int = 10, width: int = 50) -> Iterator[str]:
    step = -(-max(sizes) // rows)
    counts = Counter((size - 1) // step for size in sizes)
    for place in range(max(counts) + 1):
        low, high = place * step + 1, (place + 1) * step
        label = f"{low}" if step == 1 else f"{low} to {high}"
        yield f"{label:>10} {'#' * -(-counts[place] * width // max(counts.values()))} {counts[place]}".rstrip()
