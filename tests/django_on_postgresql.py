"""Checks the processors for Django on the pages for PostgreSQL. The argument is the address of the database.

`tests.test_postgresql` runs this program in a process of its own, because a process has only one configuration of Django.
"""

import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import django
import psycopg
from django import conf, db
from django.db import connections, models, transaction

from microbatch import Batcher, Size
from microbatch.integrations.django import closing_old_connections
from tests.pages import section

ADDRESS = psycopg.conninfo.conninfo_to_dict(sys.argv[1])
OPTIONS = {"isolation_level": psycopg.IsolationLevel.SERIALIZABLE}
DATABASE: dict[str, Any] = {
    "ENGINE": "django.db.backends.postgresql",
    "HOST": ADDRESS["host"],
    "PORT": ADDRESS["port"],
    "USER": ADDRESS["user"],
    "NAME": ADDRESS["dbname"],
}
conf.settings.configure(DATABASES={"default": DATABASE, "serializable": {**DATABASE, "OPTIONS": OPTIONS}})
django.setup()


class Person(models.Model):
    email: Any = models.TextField(unique=True)
    name: Any = models.TextField()

    class Meta:
        app_label = "people"
        db_table = "people"


people: Any = ModuleType("people.models")
people.Person = Person
sys.modules.update({"people": ModuleType("people"), "people.models": people})


def code(name: str, title: str = "Django") -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for block in section(name, title):
        exec(compile(block, f"{name}.rst", "exec"), variables)
    return variables


LOOK_UP, INSERT, UPSERT, UPDATE = (code(name) for name in ("look_up", "insert", "upsert", "update"))
RETRYING = code("downstreams", "Serialization failures and deadlocks")["retrying_conflicts"]


def outcomes(processor: Callable[[list[Any]], Any], jobs: list[Any]) -> list[Any]:
    with Batcher(closing_old_connections(processor), Size(len(jobs))) as batcher:
        futures = [batcher.submit(job) for job in jobs]
        return [future.exception(timeout=20) or future.result().value for future in futures]


def names() -> dict[str, str]:
    return dict(Person.objects.values_list("email", "name"))


def is_missing(error: Any, key: int) -> bool:
    return type(error) is KeyError and error.args == (key,)


def each_of_100_callers_gets_its_own_object() -> None:
    ids = random.Random(1).sample(range(1, 101), 100)
    assert ids == [person.pk for person in outcomes(LOOK_UP["look_up"], ids)]
    one, missing = outcomes(LOOK_UP["look_up"], [7, 101])
    assert "name 7" == one.name and is_missing(missing, 101)


def each_of_100_callers_gets_the_id_of_its_own_row_and_bad_rows_fail_alone() -> None:
    rows: list[Any] = [(f"{i}@new", f"new {i}") for i in random.Random(1).sample(range(100), 100)]
    rows[7], rows[50] = ("1@old", "exists"), ("nul", "\0")
    values = outcomes(INSERT["insert"], rows)
    assert [7, 50] == [place for place, value in enumerate(values) if isinstance(value, Exception)]
    inserted = Person.objects.in_bulk([value for value in values if not isinstance(value, Exception)])
    assert all(inserted[pk].email == row[0] for pk, row in zip(values, rows) if pk in inserted)


def rows_are_fetched_whether_they_existed_or_not() -> None:
    jobs = ["new", "1@old", "newer", "new"]
    assert jobs == [person.email for person in outcomes(INSERT["people_by_email"], jobs)]
    ignored = Person.objects.bulk_create([Person(email="newest")], ignore_conflicts=True)
    assert [None] == [person.pk for person in ignored]


def the_last_of_equal_upserts_wins() -> None:
    jobs = [("1@old", "one"), ("ada", "two"), ("1@old", "three"), ("ada", "four")]
    assert [None] * 4 == outcomes(UPSERT["upsert"], jobs)
    assert ("three", "four") == (names()["1@old"], names()["ada"])


def the_last_of_equal_updates_wins_and_a_missing_row_fails_alone() -> None:
    first, missing, other, last = outcomes(UPDATE["update"], [(5, "one"), (101, "two"), (3, "three"), (5, "four")])
    assert is_missing(missing, 101)
    assert ["four", "three", "four"] == [first.name, other.name, last.name]
    assert ("three", "four") == (names()["3@old"], names()["5@old"])


def bulk_update_saves_the_first_of_equal_objects() -> None:
    assert 1 == Person.objects.bulk_update([Person(pk=5, name="one"), Person(pk=5, name="two")], ["name"])
    assert "one" == names()["5@old"]


def a_missing_row_can_not_be_deleted() -> None:
    first, missing, *others = outcomes(UPDATE["delete"], [5, 101, 3, 5])
    assert is_missing(missing, 101)
    assert [5, 3, 5] == [person.pk for person in [first, *others]]
    assert not {"3@old", "5@old"} & set(names())


def a_value_that_does_not_fit_its_field_fails_alone() -> None:
    values = outcomes(UPDATE["update"], [(5, "one"), ("x", "two")])
    assert "one" == values[0].name and isinstance(values[1], ValueError)


def a_batch_that_conflicts_with_another_transaction_is_retried() -> None:
    seen: list[str] = []

    @transaction.atomic(using="serializable")
    def rename(jobs: list[Any]) -> list[Any]:
        person = Person.objects.using("serializable").get(pk=1)
        seen.append(person.name)
        if len(seen) == 1:
            Person.objects.using("default").filter(pk=1).update(name="Ada")
        person.name += "!"
        person.save()
        return jobs

    assert [1] == outcomes(RETRYING(rename), [1])
    assert (["name 1", "Ada"], "Ada!") == (seen, names()["1@old"])


def a_server_that_is_down_is_asked_once_per_batch() -> None:
    calls = []
    connection: Any = connections["default"]
    connection.close()

    def refuse(*arguments: Any) -> Any:
        calls.append(arguments)
        raise db.OperationalError("the server is down")

    connection.get_new_connection = refuse
    try:
        INSERT["insert"]([(f"{i}", "name") for i in range(20)])
    except db.OperationalError:
        assert 1 == len(calls)
    else:
        raise AssertionError("there was no error")
    finally:
        del connection.get_new_connection


for check in [
    value for name, value in vars().copy().items() if name.startswith(("a_", "each", "rows", "the_", "bulk_"))
]:
    try:
        with connections["default"].cursor() as cursor:
            cursor.execute("DELETE FROM people; SELECT setval('people_id_seq', 1, false)")
            cursor.execute(
                "INSERT INTO people (email, name) SELECT i || '@old', 'name ' || i FROM generate_series(1, 100) AS i"
            )
        check()
    finally:
        connections.close_all()
