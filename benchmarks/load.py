"""HTTP clients in a process of their own: ``python -m benchmarks.load PORT --connections 64 --requests 2000``.

Each posts an order, checks that the answer is to its own, and posts the next one, each on a connection of its own. Prints a
line when half of them are made, for those who want to do something to the server just then, and in the end a line of JSON.
Ends early when a connection is refused.
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
    """What became of all requests.

    Attributes:
        orders: what was ordered, by the number in the answer.
        wrong: answers to somebody else's request.
        lost: what was wrong where there was no answer.
        refused: connections that the server did not accept.
        times: seconds for each answer.
        batches: with how many others each order was inserted, itself included.
    """

    orders: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    times: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """How many calls downstream there were."""
        return round(sum(1 / size for size in self.batches))

    def post(self, port: int, what: str) -> None:
        """Order something."""
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
    """Post all requests, each as soon as one of the connections is free."""
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
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.partition("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2_000)
    arguments = parser.parse_args()
    print(json.dumps(asdict(run(**vars(arguments)))))


if __name__ == "__main__":
    main()
