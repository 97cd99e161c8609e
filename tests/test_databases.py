"""Errors of real database drivers reach every caller with their details, such as the constraint and the row."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from microbatch import Batcher, JobFuture, Size
from tests.extras import needs

needs("django", "psycopg", "psycopg2", "pymongo")
import psycopg
import psycopg2
import pymongo.errors

CREATE = "CREATE TEMPORARY TABLE orders (id integer CONSTRAINT one_row_per_order PRIMARY KEY)"
INSERT = "INSERT INTO orders SELECT unnest(%s)"


def futures_of(insert: Callable[[list[int]], None], jobs: list[int]) -> list[JobFuture[None]]:
    with Batcher(insert, Size(len(jobs))) as batcher:
        return [batcher.submit(job) for job in jobs]


@pytest.mark.server
@pytest.mark.parametrize("driver", [psycopg2, psycopg], ids=["psycopg2", "psycopg"])
def test_each_caller_can_read_the_diagnostics_of_postgresql(driver: Any, postgresql: str) -> None:
    connection = driver.connect(postgresql)
    cursor = connection.cursor()
    cursor.execute(CREATE)

    def insert(ids: list[int]) -> None:
        cursor.execute(INSERT, (ids,))

    for future in futures_of(insert, [1, 2, 2]):
        with pytest.raises(driver.errors.UniqueViolation) as caught:
            future.result(timeout=0)
        error: Any = caught.value
        assert ("one_row_per_order", "orders") == (error.diag.constraint_name, error.diag.table_name)
        assert "23505" == error.diag.sqlstate
        assert "Key (id)=(2) already exists." in str(error)
        error.tenant = future.job
    connection.close()
    assert not hasattr(futures_of(insert, [3, 4])[0].exception(timeout=0), "tenant")


@pytest.mark.server
def test_each_caller_can_follow_a_django_error_to_the_error_of_the_driver(postgresql: str) -> None:
    script = """
    import sys
    import django
    from django import conf, db
    from microbatch import Batcher, Size

    url, create, insert = sys.argv[1:]
    host, port = url.split("@")[1].split("/")[0].split(":")
    database = {"ENGINE": "django.db.backends.postgresql", "NAME": "postgres", "USER": "postgres"}
    conf.settings.configure(DATABASES={"default": {**database, "HOST": host, "PORT": port}})
    django.setup()

    def process(ids):
        with db.connection.cursor() as cursor:
            cursor.execute(create)
            cursor.execute(insert, [ids])

    with Batcher(process, Size(2)) as batcher:
        futures = [batcher.submit(1), batcher.submit(1)]
    for future in futures:
        try:
            future.result()
        except db.IntegrityError as error:
            print(error.__cause__.diag.constraint_name)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), postgresql, CREATE, INSERT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=25)
    assert ("one_row_per_order\n" * 2, "") == (done.stdout, done.stderr)


def test_each_caller_has_its_own_copy_of_the_details_of_a_mongodb_bulk_write_error() -> None:
    rows = list(range(2_000))

    def insert(jobs: list[int]) -> None:
        errors = [{"index": row, "code": 11000, "errmsg": "duplicate key", "op": {"_id": row}} for row in jobs]
        raise pymongo.errors.BulkWriteError({"writeErrors": errors, "nInserted": 0})

    one, other, *_ = (future.exception(timeout=0) for future in futures_of(insert, rows))
    assert isinstance(one, pymongo.errors.BulkWriteError) and isinstance(other, pymongo.errors.BulkWriteError)
    one.details["writeErrors"][7]["op"].clear()
    assert ({"_id": 7}, 65) == (other.details["writeErrors"][7]["op"], other.code)
