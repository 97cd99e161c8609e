"""Shows what ``microbatch.aio`` costs an event loop: ``python -m benchmarks.aio``."""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst
from microbatch import BacklogFull, Batcher, Size, Natural
from microbatch.aio import submit

OVERLOAD = """\
Coroutines submit 5,000 jobs per second, twice as many as the batcher can process: a call takes 20 ms plus 0.2 ms per
job, with at most 100 jobs, and 1,000 jobs may wait. *Waiting for space* is ``await microbatch.aio.submit(batcher,
job)``. *Polling* tries again every 10 ms while the queue is full. *Nothing* submits no jobs. *Lag* is how much longer
than 1 ms ``asyncio.sleep(0.001)`` takes. *In order* says whether the results came in the order of the jobs in all runs.
"""

RETURNS = """\
64 coroutines each submit a job, await its result, and submit the next one. The processor returns the list that it gets.
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
    ]
    print(*lines, sep="\n")
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
