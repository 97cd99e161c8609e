"""Inserts rows into PostgreSQL and gets their IDs, first with one statement per row, and then with one per batch.

    $ python -m pip install . 'psycopg[binary,pool]'
    $ python examples/postgresql.py postgresql://postgres@127.0.0.1:43211/postgres

The argument is the address of a server, such as the one that ``examples/serve_postgresql.py`` starts. Without batches,
there is a connection for each of the 32 callers. Batches use a single connection.
"""

import sys

from measured import compare
from psycopg import Connection
from psycopg_pool import ConnectionPool

from microbatch import Natural, Size
from microbatch.processors import within

CREATE = """
    CREATE TABLE IF NOT EXISTS example_people (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text)
"""
INSERT = "INSERT INTO example_people (name) VALUES (%s) RETURNING id"
INSERT_MANY = """
    INSERT INTO example_people (name)
    SELECT name FROM unnest(%s::text[]) WITH ORDINALITY AS new (name, place)
    ORDER BY place
    RETURNING id
"""
FIND = "SELECT id, name FROM example_people WHERE id = ANY(%s)"


def insert_many(names: list[str], connection: Connection) -> list[int]:
    """Insert rows, and return their IDs in order."""
    return sorted(number for (number,) in connection.execute(INSERT_MANY, (names,)))


def main(address: str) -> None:
    """Insert 3,000 people in both ways, and check the IDs."""
    autocommit = {"autocommit": True}  # each statement is a transaction of its own, and takes one round trip
    with (
        ConnectionPool(address, min_size=32, max_size=32, kwargs=autocommit) as large_pool,
        ConnectionPool(address, min_size=1, max_size=1, kwargs=autocommit) as pool,
    ):

        def insert(name: str) -> int:
            with large_pool.connection() as connection:
                row = connection.execute(INSERT, (name,)).fetchone()
            assert row is not None
            return int(row[0])

        large_pool.wait()
        with pool.connection() as connection:
            connection.execute(CREATE)
        names = [f"person {number}" for number in range(3_000)]
        processor = within(insert_many, pool.connection, pass_value=True)
        ids = compare(insert, processor, names, Size(500) | Natural())
        with pool.connection() as connection:
            found: dict[int, str] = dict(connection.execute(FIND, (ids,)).fetchall())
        print(f"each caller has the id of its own row: {[found[number] for number in ids] == names}")


if __name__ == "__main__":
    main(sys.argv[1])
