"""A service with plain threads. It stores events in batches, and loses no accepted event when ``SIGTERM`` stops it.

    $ python examples/service.py 9000 events.sqlite3

A client sends an event as one line. The answer ``accepted`` means that it will be stored. From another shell, in Bash:

    $ exec 3<>/dev/tcp/localhost/9000; echo tea >&3; cat <&3
    accepted

Ctrl-C stops the service too.
"""

import signal
import sqlite3
import sys
from contextlib import closing
from functools import partial
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

from microbatch import BacklogFull, Batcher, Interval, Size


def insert_many(path: str, events: list[str]) -> None:
    """Store the events in one transaction."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS events (what TEXT NOT NULL)")
        database.executemany("INSERT INTO events VALUES (?)", [(event,) for event in events])


class Connection(StreamRequestHandler):
    """Submits the event of one client, in a thread of its own."""

    server: "Service"
    timeout = 5  # a client that sends nothing must not delay the shutdown for longer

    def handle(self) -> None:
        """Answer when the event is accepted, without waiting until it is stored."""
        event = self.rfile.readline().decode().strip()
        try:
            self.server.inserts.submit(event, timeout=1)
            self.wfile.write(b"accepted\n")
        except BacklogFull:
            self.wfile.write(b"busy\n")


class Service(ThreadingTCPServer):
    """Accepts clients. At its end, a ``with`` block waits for the threads of all clients that were accepted."""

    allow_reuse_address = True
    request_queue_size = 100

    def __init__(self, port: int, inserts: Batcher[str, None]) -> None:
        self.inserts = inserts
        super().__init__(("127.0.0.1", port), Connection)


def main(port: int, path: str) -> None:
    """Serve until a signal comes. Then stop in this order: no more clients, no more threads that submit, no more jobs."""
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # inherited by all threads, so that only `sigwait` receives them
    with Batcher(partial(insert_many, path), Size(100) | Interval(1), name="events") as inserts:
        with Service(port, inserts) as service:
            Thread(target=service.serve_forever).start()
            print(f"listening on port {service.server_address[1]}", flush=True)
            signal.sigwait(stop)
            service.shutdown()
    stats = inserts.stats()
    print(f"{stats.succeeded} of {stats.accepted} events stored, in {stats.batches} batches")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[1].isdecimal():
        sys.exit("usage: python examples/service.py PORT DATABASE")
    main(int(sys.argv[1]), sys.argv[2])
