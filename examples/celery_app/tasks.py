"""Celery tasks that insert people in batches, and wait for the number of their own row.

    $ python -m pip install ../.. celery
    $ celery --app tasks worker --pool threads --concurrency 32

From another shell, in the same folder:

    $ python -c 'from tasks import add_person; print(add_person.delay("Ada").get(timeout=10))'
    {'id': 1, 'batch': 1}
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from celery import Celery
from celery.signals import worker_process_shutdown

from microbatch import Batcher

# The broker is a folder, so that you can try this without a server.
Path("queue").mkdir(exist_ok=True)
app = Celery("tasks", broker="filesystem://", backend="file://queue")
app.conf.broker_transport_options = {
    "data_folder_in": "queue",
    "data_folder_out": "queue",
    "control_folder": "queue",
}


def insert_many(names: list[str]) -> list[int | None]:  # called with a list of jobs, in a worker thread
    with closing(sqlite3.connect("people.sqlite3", timeout=20)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS people (id INTEGER PRIMARY KEY, name TEXT)")
        insert = "INSERT INTO people (name) VALUES (?)"
        return [database.execute(insert, (name,)).lastrowid for name in names]


inserts = Batcher(insert_many, name="inserts")


@app.task
def add_person(name: str) -> dict[str, int | None]:
    result = inserts.submit(name).result(timeout=60)
    return {"id": result.value, "batch": result.batch.size}


@worker_process_shutdown.connect
def drain(**kwargs: object) -> None:
    inserts.shutdown()


@app.task
def add_person_later(name: str) -> None:
    inserts.submit(name)
