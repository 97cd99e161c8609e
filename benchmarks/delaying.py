"""A proxy that makes a server look farther away: ``python -m benchmarks.delaying PORT --delay 0.5``.

It listens on a port of its own, which it prints, and forwards each connection to PORT on this machine. It passes
requests on at once, and holds each reply back for the delay, in milliseconds. So a round trip takes that much longer.
The bandwidth is not limited. The proxy runs until its standard input ends. It needs Linux.
"""

import argparse
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

__all__ = ["Proxy"]


class Proxy:
    """Forwards connections to a server, in the thread that calls `run`.

    Args:
        port: The port of the server.
        delay: How long to hold each reply back, in seconds.
    """

    def __init__(self, port: int, delay: float) -> None:
        self._server = ("127.0.0.1", port)
        self._delay = delay
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listening.getsockname()[1])
        self._readable = select.epoll()
        self._peers: dict[int, tuple[socket.socket, socket.socket, bool]] = {}
        """Where data comes from, where it goes, and whether it is a reply, by the number of the file it comes from."""
        self._held: deque[tuple[float, socket.socket, socket.socket, bytes]] = deque()
        """Replies, and when to pass them on. The delay is the same for all, so the oldest is the first."""

    def run(self, end: int) -> None:
        """Forward until the file with the number *end* can be read, or is at its end."""
        for number in (end, self._listening.fileno()):
            self._readable.register(number, select.EPOLLIN)
        while True:
            pause = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            select.select([self._readable], [], [], pause)  # `epoll` itself would wait for whole milliseconds
            while self._held and self._held[0][0] <= time.monotonic():
                self._pass_on(*self._held.popleft()[1:])
            for number, _ in self._readable.poll(0):
                if number == end:
                    return
                if number == self._listening.fileno():
                    self._accept()
                    break  # a new file may have the number of one that was closed just now; what is left comes again
                if number in self._peers:
                    self._forward(*self._peers[number])

    def _accept(self) -> None:
        client, server = self._listening.accept()[0], socket.create_connection(self._server)
        for source, target, is_reply in ((client, server, False), (server, client, True)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[source.fileno()] = (source, target, is_reply)
            self._readable.register(source, select.EPOLLIN)

    def _forward(self, source: socket.socket, target: socket.socket, is_reply: bool) -> None:
        data = b""
        with suppress(ConnectionError):
            data = source.recv(1 << 16)
        if not is_reply or not self._delay:
            self._pass_on(source, target, data)
            return
        if not data:
            self._readable.unregister(source)
        self._held.append((time.monotonic() + self._delay, source, target, data))

    def _pass_on(self, source: socket.socket, target: socket.socket, data: bytes) -> None:
        with suppress(OSError):  # the other side has closed its connection
            target.sendall(data)
        if not data:
            for closed in (source, target):
                self._peers.pop(closed.fileno(), None)
                closed.close()


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delaying", description=__doc__.partition("\n")[0])
    parser.add_argument("port", type=int, help="of the server")
    parser.add_argument("--delay", type=float, default=0.0, help="of each reply, in milliseconds")
    arguments = parser.parse_args()
    proxy = Proxy(arguments.port, arguments.delay / 1e3)
    print(proxy.port, flush=True)
    proxy.run(sys.stdin.fileno())


if __name__ == "__main__":
    main()
