"""The programs in examples/ run, and print the expected output."""

import signal
import socket
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from tests.extras import needs

EXAMPLES = Path(__file__).parent.parent / "examples"


def output(example: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=25).stdout
    return [line.rstrip() for line in out.splitlines()]


@pytest.mark.slow
def test_the_same_ten_jobs_appear_in_the_log_in_the_spans_and_in_a_scrape() -> None:
    lines = output("observing.py")
    log, tree, scrape = (part.splitlines() for part in "\n".join(lines).split("\n\n"))
    batches = [line for line in log if "batch " in line]
    assert ["WARNING", "INFO", "INFO"] == [line.split()[0] for line in batches]
    assert ["1 of 4 jobs failed", "4 jobs", "2 jobs"] == [line.split(": ")[2].split(", ")[0] for line in batches]
    linked = "process orders (linked to POST /orders/1, POST /orders/2)"
    assert [
        "POST /orders/1",
        "POST /orders/2",
        f"{linked} 1 of 4 jobs failed",
        "    INSERT orders",
        linked,
        "    INSERT orders",
        linked,
        "    INSERT orders",
    ] == tree
    assert {
        'microbatch_jobs_total{batcher="orders",outcome="succeeded"} 9.0',
        'microbatch_jobs_total{batcher="orders",outcome="failed"} 1.0',
        'microbatch_batch_size_jobs_sum{batcher="orders"} 10.0',
        'microbatch_batches_total{batcher="orders",trigger="size"} 2.0',
        'microbatch_batches_total{batcher="orders",trigger="shutdown"} 1.0',
    } <= set(scrape)


@pytest.mark.server
def test_postgresql_rows_are_inserted_in_batches_and_each_caller_gets_its_own_id(postgresql: str) -> None:
    needs("psycopg", "psycopg_pool")
    lines = output("postgresql.py", postgresql)
    assert "each caller has the id of its own row: True" == lines[-1]
    assert int(lines[2].split()[-2].replace(",", "")) < 1_000


@pytest.mark.server
def test_api_calls_are_made_in_batches_and_each_caller_gets_its_own_reply() -> None:
    lines = output("bulk_api.py")
    assert "each caller has the length of its own word: True" == lines[-1]
    assert int(lines[2].split()[-2].replace(",", "")) < 1_000


@pytest.mark.parametrize("arguments", [[], ["9000"], ["nine", "events.sqlite3"], ["1", "2", "3"]])
def test_the_service_says_which_arguments_it_takes(arguments: list[str]) -> None:
    command = [sys.executable, str(EXAMPLES / "service.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (1, "usage: python examples/service.py PORT DATABASE\n") == (done.returncode, done.stderr)


@pytest.mark.server
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_service_that_is_stopped_while_clients_send_events_stores_each_event_that_it_has_accepted(
    tmp_path: Path,
) -> None:
    stored = tmp_path / "events.sqlite3"
    command = [sys.executable, "-W", "error", str(EXAMPLES / "service.py"), "0", str(stored)]
    busy = Event()

    def send_until_it_refuses(client: int) -> list[str]:
        accepted: list[str] = []
        try:
            while True:
                event = f"event {len(accepted)} of client {client}"
                with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                    connection.sendall(f"{event}\n".encode())
                    if connection.recv(100) != b"accepted\n":
                        return accepted
                accepted.append(event)
                if len(accepted) == 20:
                    busy.set()
        except OSError:
            return accepted

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(8) as clients:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split()[-1])
            sent = [clients.submit(send_until_it_refuses, client) for client in range(8)]
            assert busy.wait(timeout=10)
            process.send_signal(signal.SIGTERM)
            accepted = [event for events in sent for event in events.result(timeout=20)]
            printed = process.stdout.read()
            process.wait(timeout=10)
        finally:
            process.kill()
    assert 0 == process.returncode
    with closing(sqlite3.connect(stored)) as database:
        rows = [what for (what,) in database.execute("SELECT what FROM events")]
    assert set(accepted) <= set(rows)
    assert printed.startswith(f"{len(set(rows))} of {len(rows)} events stored")
