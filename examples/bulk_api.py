"""Calls a bulk API over HTTP, first with one request per job, and then with one request per batch.

    $ python -m pip install .
    $ python examples/bulk_api.py

This program also serves the API, on loopback. If the API refuses a job, only the caller of that job gets an exception.
"""

import json
import threading
from contextlib import closing
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from measured import compare

from microbatch import Natural, Size


class Refused(Exception):
    """The API refused a job."""


class API(BaseHTTPRequestHandler):
    """Takes a list of words, and replies with a list that has one entry per word: its length, or an error."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Reply to a list of words."""
        words = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        replies = [{"length": len(word)} if word.isalpha() else {"error": f"{word!r} is not a word"} for word in words]
        body = json.dumps(replies).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class Server(ThreadingHTTPServer):
    """Serves the API."""

    request_queue_size = 128  # with the default of 5, connections could be reset if many clients connect together


class Client:
    """A client of the API. It keeps one connection per thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._mine = threading.local()
        self._connections: list[HTTPConnection] = []

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._connections:
            connection.close()

    def post(self, words: list[str]) -> list[dict[str, Any]]:
        """Send one request, and return the entry for each word."""
        if not hasattr(self._mine, "connection"):
            self._mine.connection = HTTPConnection("127.0.0.1", self._port)
            self._connections.append(self._mine.connection)
        self._mine.connection.request("POST", "/lengths", json.dumps(words))
        replies: list[dict[str, Any]] = json.loads(self._mine.connection.getresponse().read())
        return replies

    def lengths(self, words: list[str]) -> list[int | Refused]:
        """Return one outcome per word: its length, or an exception."""
        return [reply["length"] if "length" in reply else Refused(reply["error"]) for reply in self.post(words)]


def main() -> None:
    """Get the lengths of 3,000 words in both ways, and check them."""
    with Server(("127.0.0.1", 0), API) as server, closing(Client(server.server_port)) as client:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ["a" * (number % 20 + 1) for number in range(3_000)]
        lengths = compare(lambda word: client.lengths([word])[0], client.lengths, words, Size(200) | Natural())
        print(f"each caller has the length of its own word: {lengths == [len(word) for word in words]}")
        server.shutdown()


if __name__ == "__main__":
    main()
