"""Shows what ``microbatch.aio`` costs an event loop: ``python -m benchmarks.aio``."""

import argparse
import asyncio
import importlib.util
import itertools
import multiprocessing
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst
from microbatch import BacklogFull, Batcher, Size, Natural
from microbatch.aio import on_loop, submit

OVERLOAD = """\
Coroutines submit 5,000 jobs per second, twice as many as the batcher can process: a call takes 20 ms plus 0.2 ms per
job, with at most 100 jobs, and 1,000 jobs may wait. *Waiting for space* is ``await microbatch.aio.submit(batcher,
job)``. *Polling* tries again every 10 ms while the queue is full. *Nothing* submits no jobs. *Lag* is how much longer
than 1 ms ``asyncio.sleep(0.001)`` takes. *In order* says whether the results came in the order of the jobs in all runs.
"""

RETURNS = """\
64 coroutines each submit a job, await its result, and submit the next one. The processor returns the list that it gets.
"""


WEB = """\
64 clients send one request after another to a small application: ``GET /lengths/tea``. *Without* answers with the
length of the word. *With* awaits ``microbatch.aio.submit`` for it, with the default policy and a processor that costs
nothing. So the ratio shows what the library costs if it saves nothing. *Waiting* awaits a timer of 3 ms, as a request to
a database would take, and *ratio to waiting* compares with that.

*Under uvicorn*, the application is in a process of its own, and the clients in another. *Called directly* means that the
clients call the application in its own event loop, without a server and without HTTP. There, a request costs so little
that most of the difference is what it costs to wait at all: *without* never waits.
"""

PEERS = """\
64 coroutines each submit a job, await its result, and submit the next one, with batches of at most 64 jobs. The peers
work in the event loop of their callers, and only there. Each has the fastest of the longest waits 0, 1 and 5 ms, as the
first run finds it. The free processor returns the list that it gets. The other one takes 5 ms per call. Where a library
can call a coroutine function in the loop of the callers, it does (``on_loop(processor, loop)`` for microbatch).
"""


class Run(NamedTuple):
    """What was measured in one run.

    Attributes:
        lags: The lags of the loop in seconds, sorted.
        in_order: Whether the results came in the order of the jobs.
    """

    lags: list[float]
    in_order: bool

    def lag(self, share: float) -> float:
        """Return a quantile of the lags in milliseconds."""
        return 1e3 * self.lags[min(len(self.lags) - 1, int(share * len(self.lags)))]


Way = Callable[[Batcher[int, int], int], Awaitable[Any]]


async def waiting(batcher: Batcher[int, int], job: int) -> None:
    """Wait for space in the queue."""
    await submit(batcher, job)


async def polling(batcher: Batcher[int, int], job: int) -> None:
    """Try again until there is space."""
    while True:
        try:
            await asyncio.wrap_future(batcher.submit(job, timeout=0))
            return
        except BacklogFull:
            await asyncio.sleep(0.01)


async def wrapping(batcher: Batcher[int, int], job: int) -> None:
    """Await the future of a job without ``microbatch.aio``."""
    await asyncio.wrap_future(batcher.submit(job, timeout=0))


def overloaded(way: Way | None, seconds: float) -> Run:
    """Submit twice as many jobs as the batcher can process."""

    def processor(jobs: list[int]) -> list[int]:
        time.sleep(20e-3 + 0.2e-3 * len(jobs))
        return jobs

    async def main() -> Run:
        lags: list[float] = []
        arrived: list[int] = []

        async def tick() -> None:
            while True:
                begin = time.perf_counter()
                await asyncio.sleep(1e-3)
                lags.append(time.perf_counter() - begin - 1e-3)

        async def call(job: int) -> None:
            assert way is not None
            await way(batcher, job)
            arrived.append(job)

        ticking = asyncio.create_task(tick())
        begin, calls = time.perf_counter(), list[asyncio.Task[None]]()
        while (elapsed := time.perf_counter() - begin) < seconds:
            missing = int(5_000 * elapsed) - len(calls) if way is not None else 0
            calls += [asyncio.create_task(call(len(calls) + number)) for number in range(missing)]
            await asyncio.sleep(2e-3)
        if calls:
            await asyncio.wait(calls)
        ticking.cancel()
        return Run(sorted(lags), arrived == sorted(arrived))

    with Batcher[int, int](processor, Size(100) | Natural(), max_pending=1_000) as batcher:
        return asyncio.run(main())


def returning(way: Way, jobs: int) -> tuple[float, float]:
    """Return the jobs per second of a closed loop, and the microseconds of CPU time per job."""

    async def call() -> None:
        for job in range(jobs // 64):
            await way(batcher, job)

    async def main() -> tuple[float, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*[call() for _ in range(64)])
        return jobs / (time.perf_counter() - begin), 1e6 * (time.process_time() - cpu) / jobs

    with Batcher[int, int](list) as batcher:
        return asyncio.run(main())


def installed(module: str) -> bool:
    """Return whether a library can be measured."""
    return importlib.util.find_spec(module) is not None


Length = Callable[[str], Awaitable[int]]
App = Callable[..., Awaitable[None]]


def fastapi_app(length: Length) -> App:
    """Return the application of the page on FastAPI."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/lengths/{word}")
    async def get_length(word: str) -> int:
        return await length(word)

    return app


def starlette_app(length: Length) -> App:
    """Return the same application without FastAPI."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def get_length(request: Request) -> JSONResponse:
        return JSONResponse(await length(request.path_params["word"]))

    return Starlette(routes=[Route("/lengths/{word}", get_length)])


@asynccontextmanager
async def called(app: App) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """Call an application directly."""
    path = "/lengths/tea"
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [],
        "client": ("client", 1),
        "server": ("server", 80),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def get() -> bytes:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(dict(scope), receive, send)
        return b"".join([message.get("body", b"") for message in sent])

    yield get


def lengths(words: list[str]) -> list[int]:
    """Process a batch."""
    return [len(word) for word in words]


@contextmanager
def batching_app(make: Callable[[Length], App], way: str) -> Iterator[App]:
    """Return an application that finds the length of a word in one of the three ways."""

    async def direct(word: str) -> int:
        return len(word)

    async def waited(word: str) -> int:
        await asyncio.sleep(3e-3)
        return len(word)

    async def submitted(word: str) -> int:
        return (await submit(batcher, word)).value

    with Batcher[str, int](lengths) as batcher:
        yield make({"without": direct, "waiting": waited, "with": submitted}[way])


def serve(make: Callable[[Length], App], way: str, listening: socket.socket) -> None:
    """Serve an application until the process is terminated."""
    import uvicorn

    with batching_app(make, way) as app:
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run([listening])


@asynccontextmanager
async def requested(port: int) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """Send requests to a server, over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def get() -> bytes:
        writer.write(b"GET /lengths/tea HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        return await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))

    yield get
    writer.close()


async def rate(client: Callable[[], Any], requests: int) -> float:
    """Return the requests per second of 64 clients."""

    async def call(count: int) -> None:
        async with client() as get:
            for _ in range(count):
                assert await get() == b"3"

    await asyncio.gather(*[call(5) for _ in range(64)])
    begin = time.perf_counter()
    await asyncio.gather(*[call(requests // 64) for _ in range(64)])
    return requests / (time.perf_counter() - begin)


def called_directly(make: Callable[[Length], App], way: str, requests: int) -> float:
    """Return the requests per second without a server."""
    with batching_app(make, way) as app:
        return asyncio.run(rate(lambda: called(app), requests))


def under_uvicorn(make: Callable[[Length], App], way: str, requests: int) -> float:
    """Return the requests per second of a server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        server = multiprocessing.get_context("fork").Process(target=serve, args=(make, way, listening))
        server.start()
        try:
            return asyncio.run(rate(lambda: requested(listening.getsockname()[1]), requests))
        finally:
            server.terminate()
            server.join()


def web_table(requests: int, repeats: int) -> Table:
    """Compare an application with and without the library."""
    rows = []
    apps = [("fastapi", "FastAPI", fastapi_app), ("starlette", "Starlette", starlette_app)]
    clients = [("uvicorn", "under uvicorn", under_uvicorn), ("asyncio", "called directly", called_directly)]
    for (library, app, make), (needed, name, measure) in itertools.product(apps, clients):
        if installed(library) and installed(needed):
            ways = ("without", "waiting", "with")
            runs = [[measure(make, way, requests) for way in ways] for _ in range(repeats)]
            row = [f"{statistics.median(rates):,.0f}" for rates in zip(*runs)]
            for ratios in ([run[2] / run[0] for run in runs], [run[2] / run[1] for run in runs]):
                row += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}"]
            rows.append([f"{app}, {name}", *row])
    columns = ["", "without", "waiting", "with", "ratio", "worst run", "ratio to waiting", "worst run"]
    return Table("requests per second", columns, rows, [])


Peer = Callable[[Any, Any, float], Any]


@asynccontextmanager
async def with_microbatch(plain: Any, coroutine: Any, wait: float) -> AsyncIterator[Callable[[int], Awaitable[Any]]]:
    """Use this library with a processor in a worker thread. *wait* has no use for the default policy."""
    batcher = Batcher[int, int](plain, Size(64) | Natural())
    yield partial(submit, batcher)
    await asyncio.to_thread(batcher.shutdown)


@asynccontextmanager
async def with_on_loop(plain: Any, coroutine: Any, wait: float) -> AsyncIterator[Callable[[int], Awaitable[Any]]]:
    """Use this library with a processor in the loop of the callers."""
    batcher = Batcher[int, int](on_loop(coroutine, asyncio.get_running_loop()), Size(64) | Natural())
    yield partial(submit, batcher)
    await asyncio.to_thread(batcher.shutdown)


@asynccontextmanager
async def with_batched(plain: Any, coroutine: Any, wait: float) -> AsyncIterator[Callable[[int], Awaitable[Any]]]:
    """Use `batched.aio`."""
    from batched.aio import dynamically

    yield dynamically(coroutine, batch_size=64, timeout_ms=1e3 * wait)


@asynccontextmanager
async def with_batchlet(plain: Any, coroutine: Any, wait: float) -> AsyncIterator[Callable[[int], Awaitable[Any]]]:
    """Use `batchlet`."""
    from batchlet import AsyncBatcher, BatchPolicy

    async with AsyncBatcher(coroutine, policy=BatchPolicy(max_items=64), max_wait_ms=1e3 * wait) as batcher:
        yield batcher.submit


def batching(peer: Peer, seconds: float, wait: float, jobs: int) -> float:
    """Return the jobs per second of a closed loop of 64 coroutines, with a processor that takes so long per call."""

    def plain(jobs: list[int]) -> list[int]:
        if seconds:
            time.sleep(seconds)
        return jobs

    async def coroutine(jobs: list[int]) -> list[int]:
        if seconds:
            await asyncio.sleep(seconds)
        return jobs

    async def main() -> float:
        async with peer(plain, coroutine, wait) as call:

            async def calls(count: int) -> None:
                for job in range(count):
                    await call(job)

            await asyncio.gather(*[calls(2) for _ in range(64)])
            begin = time.perf_counter()
            await asyncio.gather(*[calls(jobs // 64) for _ in range(64)])
            return jobs / (time.perf_counter() - begin)

    return asyncio.run(main())


def peers_table(jobs: int, repeats: int) -> Table:
    """Compare this library with others for asyncio."""
    peers: dict[str, Peer] = {
        "microbatch, in a thread": with_microbatch,
        "microbatch, ``on_loop``": with_on_loop,
        "batched": with_batched,
        "batchlet": with_batchlet,
    }
    peers = {name: peer for name, peer in peers.items() if name.startswith("microbatch") or installed(name)}
    rows = {name: [name] for name in peers}
    for seconds in (0.0, 5e-3):
        count = jobs if not seconds else jobs // 4
        waits = {
            name: max((0.0, 1e-3, 5e-3), key=lambda wait: batching(peer, seconds, wait, count))
            for name, peer in peers.items()
        }
        runs: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(repeats):
            for name, peer in peers.items():
                runs[name].append(batching(peer, seconds, waits[name], count))
        for name, made in runs.items():
            rows[name] += [f"{statistics.median(made):,.0f}", f"{min(made):,.0f}"]
    columns = ["", "free, jobs/s", "worst run", "5 ms, jobs/s", "worst run"]
    return Table("a closed loop of 64 coroutines", columns, list(rows.values()), [])


def overload_table(seconds: float, repeats: int) -> Table:
    """Compare the ways to wait for space."""
    ways: dict[str, Way | None] = {"waiting for space": waiting, "polling": polling, "nothing": None}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(overloaded(way, seconds))
    rows = [
        [
            name,
            f"{statistics.median([run.lag(0.5) for run in made]):.2f}",
            f"{statistics.median([run.lag(0.99) for run in made]):.2f}",
            f"{max([run.lag(0.99) for run in made]):.2f}",
            "" if ways[name] is None else "yes" if all([run.in_order for run in made]) else "no",
        ]
        for name, made in runs.items()
    ]
    return Table("the lag of the loop", ["", "p50, ms", "p99, ms", "worst p99, ms", "in order"], rows, [])


def returning_table(jobs: int, repeats: int) -> Table:
    """Compare the ways to await a result."""
    ways = {"``microbatch.aio.submit``": waiting, "``asyncio.wrap_future``": wrapping}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(returning(way, jobs))
    rows = []
    for name, made in runs.items():
        rates, times = zip(*made)
        row = [f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}", f"{statistics.median(times):.1f}"]
        rows.append([name, *row])
    return Table("a closed loop of 64 coroutines", ["", "jobs/s", "worst run", "CPU per job, µs"], rows, [])


def main(arguments: Sequence[str]) -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aio", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="of each overload (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=20_000, metavar="N", help="of each closed loop")
    parser.add_argument("--requests", type=int, default=3_200, metavar="N", help="of each run of an application")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "aio.rst", metavar="FILE")
    options = parser.parse_args(arguments)
    lines = [
        rst("Callers in asyncio", "="),
        *[f"* {name}: {value}" for name, value in machine().items()],
        "",
        f"Each figure is the median of {options.repeats} runs. The rows of a table are measured in turn.",
        "",
        rst("Twice the load that the batcher can take"),
        OVERLOAD,
        render(overload_table(options.seconds, options.repeats)),
        rst("Waiting for results"),
        RETURNS,
        render(returning_table(options.jobs, options.repeats)),
        rst("A web application"),
        WEB,
        render(web_table(options.requests, options.repeats)),
        rst("Other libraries for asyncio"),
        PEERS,
        render(peers_table(options.jobs, options.repeats)),
    ]
    print(*lines, sep="\n")
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
