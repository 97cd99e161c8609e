"""The processors on the pages for PostgreSQL, run as they are shown, and the traps that the pages warn of."""

import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any

import pytest

import microbatch
from microbatch import Batcher, Natural, ResultCountError, Size
from microbatch.processors import bisecting, deduplicating, within
from tests.extras import needs
from tests.pages import ROOT, page, section

needs("django", "psycopg", "psycopg_pool", "sqlalchemy", "tenacity")
import psycopg
import psycopg_pool
import sqlalchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import DetachedInstanceError, StaleDataError

pytestmark = pytest.mark.server

HUNDRED = range(1, 101)
# TRUNCATE would create new files for each test.
EMPTY = "DELETE FROM people; DELETE FROM page_views; SELECT setval('people_id_seq', 1, false)"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def address(postgresql: str) -> Iterator[str]:
    """The address of a database with the tables of the pages."""
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE DATABASE pages")
        connection.execute("ALTER DATABASE pages SET synchronous_commit = off")  # no test waits for the disk
    address = postgresql.removesuffix("postgres") + "pages"
    [tables] = re.findall(r"\.\. code-block:: sql\n\n((?: {4}.*\n|\n)+)", page("downstreams"))
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(tables)
    yield address


@pytest.fixture(autouse=True)
def database(address: str) -> Iterator["psycopg.Connection[Any]"]:
    """A connection to the database, in which there are 100 people with the IDs 1 to 100."""
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(EMPTY)
        connection.execute(
            "INSERT INTO people (email, name) SELECT i || '@old', 'name ' || i FROM generate_series(1, 100) AS i"
        )
        yield connection


@pytest.fixture
def run(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the code at the top of a page, and that of a section, and returns the variables.

    With a *policy*, the batchers have this one, and the lines that submit a job do not run.
    """
    monkeypatch.setenv("DATABASE_URL", address)
    engine = sqlalchemy.create_engine(address.replace("postgresql:", "postgresql+psycopg:"))
    made: list[dict[str, Any]] = []

    def run(name: str, title: str = "", **options: Any) -> dict[str, Any]:
        variables: dict[str, Any] = {"Person": Person, "engine": engine}
        made.append(variables)
        titles = [title] if title == "SQLAlchemy" else dict.fromkeys(["", title])  # its code stands alone
        with monkeypatch.context() as patch:
            patch.setattr(microbatch, "Batcher", partial(Batcher, **options))
            for block in [block for each in titles for block in section(name, each)]:
                if not options or ".submit(" not in block:
                    exec(compile(block, f"{name}.rst", "exec"), variables)
        return variables

    yield run
    everything = [value for variables in made for value in variables.values()]
    for batcher in everything:
        if isinstance(batcher, Batcher):
            batcher.shutdown(cancel_futures=True)
    for pool in everything:
        if isinstance(pool, psycopg_pool.ConnectionPool):
            pool.close()
    engine.dispose()


class Base(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(sqlalchemy.BigInteger, primary_key=True)
    email: Mapped[str] = mapped_column(sqlalchemy.Text, unique=True)
    name: Mapped[str] = mapped_column(sqlalchemy.Text)


def outcomes(batcher: "Batcher[Any, Any]", jobs: list[Any]) -> list[Any]:
    """Submit the jobs in order, and return their values and exceptions."""
    futures = [batcher.submit(job) for job in jobs]
    return [future.exception(timeout=20) or future.result().value for future in futures]


def outcomes_of(processor: Callable[[list[Any]], Any], jobs: list[Any]) -> list[Any]:
    """Let the processor have the jobs in one batch, and return their values and exceptions."""
    with Batcher(processor, Size(len(jobs))) as batcher:
        return outcomes(batcher, jobs)


# The page, the section and the variable of each batcher; the job of a caller; and whether its value is right, if `ids` are
# the IDs of the people by email, and `names` their names by ID.
PROCESSORS: dict[str, tuple[str, str, str, Callable[[int], Any], Callable[[int, Any, Any, Any], Any]]] = {
    "look_up": ("look_up", "", "people", lambda i: i, lambda i, value, ids, names: value == (i, f"name {i}")),
    "look_up, many": (
        *("look_up", "Several rows for a key", "people_by_name", lambda i: f"name {i}"),
        lambda i, value, ids, names: value == [(f"name {i}", i)],
    ),
    "look_up, SQLAlchemy": (
        *("look_up", "SQLAlchemy", "people", lambda i: i),
        lambda i, value, ids, names: (value.id, value.name) == (i, f"name {i}"),
    ),
    "insert": (
        *("insert", "", "people", lambda i: (f"{i}@new", f"new {i}")),
        lambda i, value, ids, names: (value, names[value]) == (ids[f"{i}@new"], f"new {i}"),
    ),
    "insert, new ones only": (
        *("insert", "Rows that may exist", "new_people", lambda i: (f"{i}@{'old' if i % 2 else 'new'}", f"new {i}")),
        lambda i, value, ids, names: value is None if i % 2 else names[value] == f"new {i}",
    ),
    "insert, or get": (
        *("insert", "Rows that may exist", "people_by_email", lambda i: f"{i}@{'old' if i % 2 else 'new'}"),
        lambda i, value, ids, names: value[0].startswith(f"{i}@") and value[1] == ids[value[0]],
    ),
    "insert, SQLAlchemy": (
        *("insert", "SQLAlchemy", "people", lambda i: {"email": f"{i}@new", "name": f"new {i}"}),
        lambda i, value, ids, names: (value, names[value]) == (ids[f"{i}@new"], f"new {i}"),
    ),
    "upsert": (
        *("upsert", "", "people", lambda i: (f"{i}@{'old' if i % 2 else 'new'}", f"new {i}")),
        lambda i, value, ids, names: names[value] == f"new {i}",
    ),
    "upsert, SQLAlchemy": (
        *("upsert", "SQLAlchemy", "people", lambda i: {"email": f"{i}@old", "name": f"new {i}"}),
        lambda i, value, ids, names: (value, names[i]) == (None, f"new {i}"),
    ),
    "count": ("upsert", "Count", "page_views", lambda i: (f"/{i}", i), lambda i, value, ids, names: value == i),
    "update": (
        *("update", "", "renames", lambda i: (i, f"new {i}")),
        lambda i, value, ids, names: value == (i, f"new {i}") and names[i] == f"new {i}",
    ),
    "update, SQLAlchemy": (
        *("update", "SQLAlchemy", "renames", lambda i: (i, f"new {i}")),
        lambda i, value, ids, names: value is None and names[i] == f"new {i}",
    ),
    "delete": (
        *("update", "Delete", "deletions", lambda i: i),
        lambda i, value, ids, names: value == (i, f"name {i}") and i not in names,
    ),
    "delete, SQLAlchemy": (
        *("update", "SQLAlchemy", "deletions", lambda i: i),
        lambda i, value, ids, names: tuple(value) == (i, f"name {i}") and i not in names,
    ),
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_of_100_callers_gets_the_outcome_of_its_own_job(
    processor: str, run: Run, database: "psycopg.Connection[Any]"
) -> None:
    name, title, variable, job, is_right = PROCESSORS[processor]
    batcher = run(name, title, policy=Size(100))[variable]
    callers = random.Random(1).sample(HUNDRED, 100)
    with ThreadPoolExecutor(100) as threads:
        values = list(threads.map(lambda i: batcher.submit(job(i)).result(timeout=20).value, callers))
    rows = database.execute("SELECT id, email, name FROM people").fetchall()
    ids, names = {row[1]: row[0] for row in rows}, {row[0]: row[2] for row in rows}
    assert [] == [(i, value) for i, value in zip(callers, values) if not is_right(i, value, ids, names)]
    assert 1 == batcher.stats().batches


@pytest.mark.parametrize(
    "naive",
    [
        "SELECT id, name FROM people WHERE id = ANY(%s)",
        "UPDATE people SET name = 'x' FROM unnest(%s::bigint[]) AS new (id) WHERE people.id = new.id RETURNING people.id",
        "DELETE FROM people WHERE id = ANY(%s) RETURNING id",
    ],
    ids=["lookup", "update", "delete"],
)
def test_without_the_wrappers_nearly_all_callers_get_the_row_of_another_one(
    naive: str, database: "psycopg.Connection[Any]"
) -> None:
    database.execute("SET enable_hashjoin = off; SET enable_nestloop = off")  # the order depends on the plan
    jobs = random.Random(1).sample(HUNDRED, 100)
    values = outcomes_of(lambda ids: database.execute(naive, (ids,)), jobs)
    assert len([job for job, value in zip(jobs, values) if job != value[0]]) > 90


@pytest.mark.parametrize("name", ["look_up", "insert", "upsert", "update"])
def test_the_code_at_the_top_of_a_page_works_as_shown(name: str, run: Run, database: "psycopg.Connection[Any]") -> None:
    database.execute("DELETE FROM people WHERE id > 1; UPDATE people SET email = 'ada@example.com', name = 'Ada'")
    shown = run(name)
    saved = database.execute("SELECT id, name FROM people ORDER BY id").fetchall()
    if name == "look_up":
        assert (1, "Ada") == (shown["number"], shown["name"])
    elif name == "insert":
        assert [(1, "Ada"), (shown["id"], "Grace")] == saved
    else:
        assert [(shown["id"], "Ada Lovelace")] == saved


@pytest.mark.parametrize("processor", ["look_up", "look_up, SQLAlchemy", "delete", "delete, SQLAlchemy"])
def test_a_job_with_a_missing_id_fails_alone(processor: str, run: Run) -> None:
    name, title, variable, _, is_right = PROCESSORS[processor]
    jobs = [5, 101, 3, 5]
    first, missing, *others = outcomes(run(name, title, policy=Size(4))[variable], jobs)
    assert (KeyError, (101,)) == (type(missing), missing.args)
    assert [True] * 3 == [is_right(job, value, {}, {}) for job, value in zip([5, 3, 5], [first, *others])]


@pytest.mark.parametrize("title", ["", "SQLAlchemy"])
def test_an_update_of_a_missing_row_fails_alone_and_the_last_of_equal_ids_wins(
    title: str, run: Run, database: "psycopg.Connection[Any]"
) -> None:
    jobs = [(5, "one"), (101, "two"), (3, "three"), (5, "four")]
    first, missing, *others = outcomes(run("update", title, policy=Size(4))["renames"], jobs)
    assert (KeyError, (101,)) == (type(missing), missing.args)
    assert ([None, None, None] if title else [(5, "four"), (3, "three"), (5, "four")]) == [first, *others]
    changed = database.execute("SELECT id, name FROM people WHERE id IN (3, 5) ORDER BY id").fetchall()
    assert [(3, "three"), (5, "four")] == changed


def test_an_id_of_another_type_fails_the_batch_with_an_error_that_names_it(run: Run) -> None:
    people = run("look_up", policy=Size(1))["people"]
    with pytest.raises(ValueError, match="must return only keys that it was called with, got 1"):
        people.submit("1").result(timeout=20)


@pytest.mark.parametrize("title", ["", "SQLAlchemy"])
def test_the_last_of_equal_upserts_wins(title: str, run: Run, database: "psycopg.Connection[Any]") -> None:
    rows = [("1@old", "one"), ("ada", "two"), ("1@old", "three"), ("ada", "four")]
    jobs = [{"email": email, "name": name} for email, name in rows] if title else rows
    values = outcomes(run("upsert", title, policy=Size(4))["people"], jobs)
    assert ([None] * 4 if title else [1, values[1], 1, values[1]]) == values
    saved = database.execute("SELECT email, name FROM people WHERE id = 1 OR id > 100 ORDER BY id").fetchall()
    assert [("1@old", "three"), ("ada", "four")] == saved


def test_without_deduplicating_equal_upserts_fail_and_by_default_the_newest_value_is_lost(
    run: Run, database: "psycopg.Connection[Any]"
) -> None:
    upsert_many = run("upsert", policy=Size(1))["upsert_many"]
    rows: list[Any] = [("ada", "old"), ("ada", "new")]
    with pytest.raises(psycopg.errors.CardinalityViolation, match="cannot affect row a second time"):
        upsert_many(rows, database)
    assert "cannot affect row a second time" in re.sub(r"\s+", " ", page("upsert"))
    deduplicating(upsert_many, key=itemgetter(0))(rows, database)
    assert [("old",)] == database.execute("SELECT name FROM people WHERE email = 'ada'").fetchall()


def test_counts_from_four_workers_are_all_added(run: Run, database: "psycopg.Connection[Any]") -> None:
    jobs = [(f"/{i % 30}", 1) for i in random.Random(1).sample(range(1_500), 1_500)]
    totals = outcomes(run("upsert", "Count", policy=Size(20) | Natural(), max_workers=4)["page_views"], jobs)
    assert {50} == {total for _, total in database.execute("SELECT page, views FROM page_views")}
    assert [] == [total for total in totals if not 1 <= total <= 50]


SLOWLY = """
    CREATE FUNCTION sleep() RETURNS trigger AS 'BEGIN PERFORM pg_sleep(0.1); RETURN NEW; END' LANGUAGE plpgsql;
    CREATE TRIGGER sleep BEFORE INSERT OR UPDATE ON people FOR EACH ROW EXECUTE FUNCTION sleep();
"""
LOCKS: dict[str, tuple[str, str, str, list[Any], str]] = {  # the page, the function, two rows, and how to make it naive
    "upsert": ("upsert", "", "upsert_many", [("1@old", "one"), ("2@old", "two")], r"ORDER BY email"),
    "insert": (
        "insert",
        "Rows that may exist",
        "insert_new",
        [("ada", "one"), ("grace", "two")],
        r"ORDER BY email, place",
    ),
    "update": ("update", "", "update_many", [(1, "one"), (2, "two")], r"ORDER BY id FOR UPDATE"),
}


@pytest.mark.parametrize("ordered", [True, False], ids=["as shown", "without the order"])
@pytest.mark.parametrize("name", LOCKS)
def test_batches_with_the_same_rows_deadlock_unless_they_lock_them_in_order(
    name: str, ordered: bool, address: str, run: Run, database: "psycopg.Connection[Any]"
) -> None:
    where, title, function, rows, order = LOCKS[name]
    options = "-c deadlock_timeout=10ms -c enable_hashjoin=off -c enable_mergejoin=off -c enable_seqscan=off"
    process = run(where, title, policy=Size(1))[function]
    both = threading.Barrier(2)

    class Connection(psycopg.Connection[Any]):
        def execute(self, query: Any, *arguments: Any, **more: Any) -> Any:
            return super().execute(query if ordered else re.sub(order, "", query), *arguments, **more)

    def save(jobs: list[Any]) -> Any:
        with Connection.connect(address, autocommit=True, options=options) as connection:
            both.wait(timeout=10)
            return process(jobs, connection)

    database.execute(SLOWLY)
    try:
        with ThreadPoolExecutor(2) as threads:
            errors = [future.exception() for future in [threads.submit(save, rows), threads.submit(save, rows[::-1])]]
    finally:
        database.execute("DROP FUNCTION sleep CASCADE")
    assert ([] if ordered else [psycopg.errors.DeadlockDetected]) == [type(error) for error in errors if error]


def test_rows_that_exist_are_no_error_with_do_nothing_and_the_first_of_equal_rows_is_inserted(
    run: Run, database: "psycopg.Connection[Any]"
) -> None:
    jobs = [("1@old", "one"), ("b@new", "two"), ("a@new", "three"), ("b@new", "four")]
    values = outcomes(run("insert", "Rows that may exist", policy=Size(4))["new_people"], jobs)
    assert [None, 102, 101, None] == [value and value - min(filter(None, values)) + 101 for value in values]
    inserted = dict(database.execute("SELECT id, name FROM people WHERE id > 100").fetchall())
    assert {values[1]: "two", values[2]: "three"} == inserted


def test_returning_the_rows_of_do_nothing_as_they_come_fails_the_batch_although_they_are_committed(
    database: "psycopg.Connection[Any]",
) -> None:
    def insert(emails: list[str]) -> Any:
        statement = (
            "INSERT INTO people (email, name) SELECT unnest(%s::text[]), '' ON CONFLICT (email) DO NOTHING RETURNING id"
        )
        return database.execute(statement, (emails,)).fetchall()

    errors = outcomes_of(insert, ["1@old", "ada"])
    assert [ResultCountError] * 2 == [type(error) for error in errors]
    assert [(1,)] == database.execute("SELECT count(*) FROM people WHERE email = 'ada'").fetchall()


BAD_ROWS: list[tuple[str, Any]] = [("1@old", "exists"), ("null", None), ("nul", "\0")]


@pytest.mark.parametrize(
    "name, title", [("insert", ""), ("insert", "SQLAlchemy"), ("upsert", ""), ("upsert", "SQLAlchemy")]
)
def test_bad_rows_fail_alone(name: str, title: str, run: Run, database: "psycopg.Connection[Any]") -> None:
    bad = BAD_ROWS[name == "upsert" :]
    rows = [(f"{i}@new", f"new {i}") for i in range(20)]
    rows[3:3] = bad
    jobs = [{"email": email, "name": name} for email, name in rows] if title else rows
    values = outcomes(run(name, title, policy=Size(len(jobs)))["people"], jobs)
    failed = [row[0] for row, value in zip(rows, values) if isinstance(value, Exception)]
    assert [email for email, _ in bad] == failed
    inserted = database.execute("SELECT name FROM people WHERE email LIKE '%@new' ORDER BY id").fetchall()
    assert {f"new {i}" for i in range(20)} == {name for (name,) in inserted}


@pytest.mark.parametrize("name, variable", [("insert", "people"), ("upsert", "people"), ("update", "renames")])
def test_a_server_that_is_down_is_asked_once_per_batch(
    name: str, variable: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = down(run, name, monkeypatch)
    errors = outcomes(shown[variable], [(f"{i}", "name") for i in range(20)])
    assert {psycopg_pool.PoolTimeout} == {type(error) for error in errors}
    assert 1 == shown["pool"].get_stats()["requests_num"]


def test_without_naming_exceptions_bisecting_asks_a_server_that_is_down_seven_times(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = down(run, "insert", monkeypatch)["pool"]
    errors: list[Any] = bisecting(within(print, pool.connection, pass_value=True))(list(range(20)))
    assert {psycopg_pool.PoolTimeout} == {type(error) for error in errors}
    assert 7 == pool.get_stats()["requests_num"]


def down(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the top of a page, for batches of 20 jobs, with a server that can't be reached."""
    real = psycopg_pool.ConnectionPool
    pool: Any = lambda address, **options: real("postgresql://127.0.0.1:1/none", **{**options, "timeout": 0.05})
    with monkeypatch.context() as patch:
        patch.setattr(psycopg_pool, "ConnectionPool", pool)
        return run(name, policy=Size(20))


def test_catching_the_error_of_each_row_gives_callers_ids_of_rows_that_do_not_exist(
    address: str, database: "psycopg.Connection[Any]"
) -> None:
    def insert(emails: list[str]) -> Iterator[Any]:
        with psycopg.connect(address) as connection:
            for email in emails:
                try:
                    statement = "INSERT INTO people (email, name) VALUES (%s, '') RETURNING id"
                    [[number]] = connection.execute(statement, (email,))
                    yield number
                except psycopg.Error as error:
                    yield error

    number, *errors = outcomes_of(lambda emails: list(insert(emails)), ["ada", "1@old", "grace"])
    assert [] == database.execute("SELECT * FROM people WHERE id = %s", (number,)).fetchall()
    assert [psycopg.errors.UniqueViolation, psycopg.errors.InFailedSqlTransaction] == [type(error) for error in errors]


def test_in_a_pipeline_the_error_of_a_row_appears_at_another_one(database: "psycopg.Connection[Any]") -> None:
    def insert(emails: list[str]) -> Iterator[Any]:
        # All rows are sent before the server replies. Otherwise, the error could appear at any row but its own.
        statement = "INSERT INTO people (email, name) VALUES (%s, pg_sleep(0.2)::text) RETURNING id"
        with database.pipeline():
            for cursor in [database.execute(statement, (email,)) for email in emails]:
                try:
                    [[number]] = cursor
                    yield number
                except psycopg.Error as error:
                    yield error

    errors = outcomes_of(lambda emails: list(insert(emails)), ["ada", "1@old", "grace"])
    assert "Key (email)=(1@old) already exists" in str(errors[0])
    assert not any("already exists" in str(error) for error in errors[1:])


@pytest.mark.parametrize("library", ["psycopg", "SQLAlchemy"])
def test_a_batch_that_conflicts_with_another_transaction_is_retried(
    library: str, address: str, run: Run, database: "psycopg.Connection[Any]"
) -> None:
    retrying_conflicts = run("downstreams", "Serialization failures and deadlocks")["retrying_conflicts"]
    seen: list[str] = []

    def rename(jobs: list[str], connection: Any) -> list[str]:
        [name] = connection.execute(text("SELECT name FROM people WHERE id = 1")).fetchone()
        seen.append(name)
        if len(seen) == 1:
            database.execute("UPDATE people SET name = 'Ada' WHERE id = 1")
        connection.execute(text("UPDATE people SET name = name || '!' WHERE id = 1"))
        return jobs

    text: Any = str
    if library == "psycopg":
        connect: Any = partial(psycopg.connect, address, options="-c default_transaction_isolation=serializable")
        assert ["job"] == retrying_conflicts(within(rename, connect, pass_value=True))(["job"])
    else:
        text = sqlalchemy.text
        engine = run("look_up", "SQLAlchemy")["engine"].execution_options(isolation_level="SERIALIZABLE")
        assert ["job"] == retrying_conflicts(within(rename, engine.begin, pass_value=True))(["job"])
    assert ["name 1", "Ada"] == seen
    assert [("Ada!",)] == database.execute("SELECT name FROM people WHERE id = 1").fetchall()


def test_other_failures_are_not_retried(run: Run) -> None:
    retrying_conflicts = run("downstreams", "Serialization failures and deadlocks")["retrying_conflicts"]
    calls = []

    def fail(jobs: list[int]) -> None:
        calls.append(jobs)
        raise psycopg.OperationalError("the connection is lost")

    with pytest.raises(psycopg.OperationalError):
        retrying_conflicts(fail)([1])
    assert [[1]] == calls


def test_an_engine_with_autocommit_serves_batches_of_one_statement(run: Run) -> None:
    variables = run("look_up", "SQLAlchemy")
    connect = variables["engine"].execution_options(isolation_level="AUTOCOMMIT").connect
    insert_many = run("insert", "SQLAlchemy")["insert_many"]
    [number] = within(insert_many, connect, pass_value=True)([{"email": "ada", "name": "Ada"}])
    assert "Ada" == variables["people"].submit(number).result(timeout=20).value.name


def test_the_usual_ways_of_sqlalchemy_to_look_up_and_to_update_fail_all_callers(run: Run) -> None:
    variables = run("look_up", "SQLAlchemy")
    begin = variables["sessionmaker"](variables["engine"]).begin
    [person] = within(variables["look_up"], begin, pass_value=True)([1])
    with pytest.raises(DetachedInstanceError):
        person.name

    def update(rows: list[dict[str, Any]], session: Any) -> None:
        session.execute(sqlalchemy.update(Person), rows)

    with pytest.raises(StaleDataError):
        within(update, begin, pass_value=True)([{"id": 1, "name": "one"}, {"id": 101, "name": "two"}])


def test_a_pool_can_be_closed_with_its_batcher(run: Run) -> None:
    shown = run("look_up")
    shown["people"].add_shutdown_callback(shown["pool"].close)
    shown["people"].shutdown()
    assert shown["pool"].closed


def test_the_django_processors_give_each_caller_its_own_outcome(address: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.django_on_postgresql", address]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=25)
    assert (0, "") == (done.returncode, done.stderr)
