"""Inserts rows into PostgreSQL and gets their IDs, first with one statement per row, and then with one per batch.

Without batches, each of the 32 callers can have a connection. Batches take only one.

    $ python -m pip install . 'psycopg[binary,pool]'
    $ python examples/postgresql.py postgresql://postgres@127.0.0.1:43211/postgres

The argument is the address of a server, such as the one that ``examples/serve_postgresql.py`` starts.
"""

import sys

from measured import compare
from psycopg_pool import ConnectionPool

from microbatch import Natural, Size


def main(address: str) -> None:
    """Insert 3,000 people in both ways, and check the IDs."""
    autocommit = {"autocommit": True}  # each insert is one statement, and so a transaction of its own
    with (
        ConnectionPool(address, min_size=32, max_size=32, kwargs=autocommit) as large_pool,
        ConnectionPool(address, min_size=1, max_size=1, kwargs=autocommit) as pool,
    ):

        def insert(name: str) -> int:
            with large_pool.connection() as connection:
                row = connection.execute("INSERT INTO people (name) VALUES (%s) RETURNING id", (name,)).fetchone()
            assert row is not None
            return int(row[0])

        def insert_many(names: list[str]) -> list[int]:
            with pool.connection() as connection:
                rows = connection.execute(
                    "INSERT INTO people (name) SELECT name FROM unnest(%s::text[]) WITH ORDINALITY AS new (name, place) "
                    "ORDER BY place RETURNING id",
                    (names,),
                )
                return [int(number) for (number,) in rows]

        large_pool.wait()
        with pool.connection() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS people (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name TEXT)"
            )
        names = [f"person {number}" for number in range(3_000)]
        ids = compare(insert, insert_many, names, Size(500) | Natural())
        with pool.connection() as connection:
            found: dict[int, str] = dict(
                connection.execute("SELECT id, name FROM people WHERE id = ANY(%s)", (ids,)).fetchall()
            )
        print(f"each caller has the id of its own row: {[found[number] for number in ids] == names}")


if __name__ == "__main__":
    main(sys.argv[1])
