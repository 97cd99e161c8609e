"""A shop in Flask. It inserts orders in batches, and each request waits for the number of its own order.

    $ python -m pip install '../..[flask]'
    $ flask --app application run

From another shell:

    $ curl -d what=tea localhost:5000/orders
    {"batch":1,"order":1,"what":"tea"}
"""

import os
import random
import sqlite3
import time
from concurrent.futures import TimeoutError  # before Python 3.11, it is not the built-in one
from typing import Any

from flask import Flask, current_app, g, request

from microbatch import BacklogFull, JobExpired, Natural, Size
from microbatch.integrations.flask import FlaskBatcher


def database() -> sqlite3.Connection:
    """Return the database connection of this request or batch."""
    if "database" not in g:
        g.database = sqlite3.connect(current_app.config["DATABASE"], timeout=20)
        g.database.execute("PRAGMA synchronous = NORMAL")
    connection: sqlite3.Connection = g.database
    return connection


def close_database(error: Any) -> None:
    """Close the database connection at the end of the request or batch."""
    if "database" in g:
        g.pop("database").close()


def use_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging, so that readers and writers don't block each other.

    If several worker processes do this at the same time with a new database, it succeeds in only one of them. In the
    others, SQLite raises an error immediately, whatever its timeout is. So try again.
    """
    deadline = time.monotonic() + 20
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def insert_many(orders: list[str]) -> list[int]:
    """Insert the orders in one transaction, and return their numbers."""
    with database() as transaction:
        insert = "INSERT INTO orders (what) VALUES (?)"
        return [transaction.execute(insert, (what,)).lastrowid or 0 for what in orders]


inserts: FlaskBatcher[str, int] = FlaskBatcher(insert_many, Size(100) | Natural(), name="orders")


def add_order() -> Any:
    """Insert an order in a batch with the orders of other requests, and respond with its number."""
    try:
        result = inserts.submit(request.form["what"], timeout=1, expires_in=5).result(timeout=10)
    except (BacklogFull, JobExpired, TimeoutError):
        return {"error": "busy"}, 503, {"Retry-After": "1"}
    return {"order": result.value, "what": request.form["what"], "batch": result.batch.size}


def create_app(**config: Any) -> Flask:
    """Create the application."""
    app = Flask(__name__)
    app.config["DATABASE"] = os.environ.get("SHOP_DATABASE", "shop.sqlite3")
    app.config.update(config)
    app.teardown_appcontext(close_database)
    app.post("/orders")(add_order)
    inserts.init_app(app)
    with app.app_context(), database() as connection:
        use_wal(connection)
        connection.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, what TEXT NOT NULL)")
    return app
