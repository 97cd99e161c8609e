"""Posts orders to a server from many HTTP clients: ``python -m benchmarks.load PORT --connections 64 --requests 2000``.

Each client posts an order, checks that the response belongs to it, and posts the next one, each on a new connection.
Halfway, this prints the line ``half``, so the caller can do something to the server at that moment. At the end, it
prints a line of JSON. If the server refuses a connection, it ends early.
"""

import argparse
import json
import threading
import time
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from itertools import count
from urllib.parse import urlencode

__all__ = ["Load"]


@dataclass
class Load:
    """The outcomes of all requests.

    Attributes:
        orders: The item of each order. The keys are the order numbers in the responses.
        wrong: The requests whose response belongs to another request.
        lost: The requests without a valid response, each with the reason.
        refused: The number of connections that the server refused.
        times: The time that each response took, in seconds.
        batches: For each order, the number of orders in its batch.
    """

    orders: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    times: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """The number of calls of the processor."""
        return round(sum(1 / size for size in self.batches))

    def post(self, port: int, what: str) -> None:
        """Post one order, and record its outcome."""
        started = time.perf_counter()
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            headers = {"Content-Type": "application/x-www-form-urlencoded", "Connection": "close"}
            connection.request("POST", "/orders", urlencode({"what": what}), headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                self.lost.append(f"{what}: {answer.status}")
                return
            order = json.loads(body)
        except ConnectionRefusedError:
            self.refused += 1
            return
        except Exception as error:
            self.lost.append(f"{what}: {error!r}")
            return
        finally:
            connection.close()
        self.times.append(time.perf_counter() - started)
        self.batches.append(order["batch"])
        if order["what"] != what or self.orders.setdefault(str(order["order"]), what) != what:
            self.wrong.append(what)


def run(port: int, connections: int, requests: int) -> Load:
    """Post *requests* orders from *connections* clients at a time, and return their outcomes."""
    load, numbers = Load(), count()

    def client() -> None:
        while (number := next(numbers)) < requests and not load.refused:
            if number == requests // 2:
                print("half", flush=True)
            load.post(port, f"tea {number}")

    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.partition("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2_000)
    arguments = parser.parse_args()
    print(json.dumps(asdict(run(**vars(arguments)))))


if __name__ == "__main__":
    main()
