"""Many processes with a batcher each, or with one for all: ``python -m benchmarks.sharing > benchmarks/results/sharing.rst``.

Each client process has several callers, which are threads that wait for each result. First, each process has a batcher
of its own. Then all processes share one batcher in a Dask cluster on the same cores, the collector. A call takes 5 ms
plus 20 µs per job, or no time, which shows how much one collector can take. Each caller checks that the result belongs
to its own job. The second part simulates more processes than a machine can run.

``python -m benchmarks.sharing --plot docs/sharing.svg`` only draws the simulated part.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from benchmarks.plots import figure
from benchmarks.tables import Table, render, rst
from microbatch import Batcher, Natural, Size
from microbatch.simulation import poisson, simulate

POLICY = Size(500) | Natural()
CALL, JOB = 0.005, 20e-6
RATE = 2_000
"""Jobs a second over all processes that are simulated."""


def slow(jobs: list[str]) -> list[tuple[str, int]]:
    """Take as long as a database."""
    time.sleep(CALL + JOB * len(jobs))
    return [(job, len(jobs)) for job in jobs]


def instant(jobs: list[str]) -> list[tuple[str, int]]:
    """Take no time."""
    return [(job, len(jobs)) for job in jobs]


PROCESSORS: dict[str, Callable[[list[str]], Any]] = {"slow": slow, "instant": instant}


def client(address: str, name: str, processor: str, callers: int, seconds: float) -> None:
    """Submit in a loop from some threads, and print what came of it; with an *address*, to the batcher that all share."""
    options: dict[str, Any] = {"policy": POLICY}
    work = PROCESSORS[processor]
    if address:
        from distributed import Client

        from microbatch.integrations.dask import shared

        connection = Client(address)
        work, options = shared(processor, work, POLICY, client=lambda: connection), {}
        work([])
    print("ready", flush=True)
    sys.stdin.readline()
    with Batcher(work, **options) as batcher, ThreadPoolExecutor(callers) as pool:
        deadline = time.monotonic() + seconds

        def loop(caller: int) -> tuple[int, int, float]:
            done, wrong, calls = 0, 0, 0.0
            while time.monotonic() < deadline:
                job = f"{name} {caller} {done}"
                answer, size = batcher.submit(job).result().value
                done, wrong, calls = done + 1, wrong + (answer != job), calls + 1 / size
            return done, wrong, calls

        print(json.dumps(list(pool.map(loop, range(callers)))), flush=True)


def measure(address: str, processor: str, processes: int, callers: int, seconds: float) -> list[str]:
    """Run some clients at a time, and return a row: jobs, wrong answers, calls, mean batch, jobs/s."""
    command = [sys.executable, "-m", "benchmarks.sharing", "--client", address, processor, str(callers), str(seconds)]
    running = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    for process in running:
        assert process.stdout is not None and "ready\n" == process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [row for process in running for row in json.loads(process.communicate()[0].splitlines()[-1])]
    jobs, wrong, calls = (sum(column) for column in zip(*found))
    return [f"{jobs:,}", f"{wrong}", f"{calls:,.0f}", f"{jobs / calls:.1f}", f"{jobs / seconds:,.0f}"]


class Simulated(NamedTuple):
    """What becomes of a load."""

    batch: float
    """How many jobs it has on average."""
    calls: float
    """A second, by all."""
    latency: float
    """Of a job on average, in ms."""


def simulated(rate: float, collectors: int, each: float = 0.0) -> Simulated:
    """Share a load among some collectors, each of which takes a job every so many seconds, and waits for a downstream.

    Collectors are alike, so that one of them tells what all do.
    """
    arrivals = list(poisson(rate / collectors, 20_000)(random.Random(1)))
    taken: list[float] = []
    for arrival in arrivals:
        taken.append(max(arrival, taken[-1] if taken else 0.0) + each)
    report = simulate(POLICY, taken, lambda size: CALL + JOB * size)
    waiting = sum(after - before for before, after in zip(arrivals, taken)) / len(arrivals)
    last = max(run.ended for run in report.runs)
    return Simulated(report.jobs / report.batches, collectors * report.batches / last, 1e3 * (waiting + report.mean))


def compared(rate: float, processes: int) -> list[str]:
    """Return a row for so many processes that share a load: each with a batcher, and all with one."""
    pairs = zip(simulated(rate, processes), simulated(rate, 1))
    return [f"{processes:,}", *(f"{value:,.{digits}f}" for pair, digits in zip(pairs, (1, 0, 1)) for value in pair)]


def draw(path: Path, capacity: float) -> None:
    """Write a picture of what sharing does to the calls of many processes, and of where collectors have their end.

    Args:
        path: where to, as SVG.
        capacity: how many jobs a second one collector can take.
    """
    with figure(path) as drawn:
        drawn.set_size_inches(8, 6)
        *before, end = drawn.subplots(2, 2).flat
        processes = (1, 2, 4, 10, 20, 40, 100, 200, 400, 1_000)
        for label, collectors, each in (
            ("a batcher in each process", processes, 0.0),
            ("one for all", [1] * len(processes), 1 / capacity),
        ):
            for axes, values in zip(before, zip(*(simulated(RATE, count, each) for count in collectors))):
                axes.plot(processes, values, label=label)
        for axes, title in zip(before, ("jobs in a batch", "calls a second", "mean latency in ms, in the batcher")):
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel(f"processes, with {RATE:,} jobs a second in all")
        for count in (1, 2, 4, 8):
            loads = [capacity * count * share / 20 for share in range(1, 23)]
            found = [simulated(load, count, 1 / capacity).latency for load in loads]
            end.plot(loads, found, label=f"{count} collector{'s' * (count > 1)}")
        end.set_title(f"the same; a collector takes {capacity:,.0f} jobs a second", loc="left", fontsize=9)
        end.set_xlabel("jobs a second in all")
        end.set_ylim(top=40)
        for axes in (*before, end):
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.spines[["top", "right"]].set_visible(False)
        for axes in (before[0], end):
            axes.legend(frameon=False)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__.partition("\n")[0])
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--callers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--plot", type=Path, help="draw what is simulated to this file, and nothing else")
    parser.add_argument("--capacity", type=float, default=12_800, help="jobs a second of one collector, for the plot")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        draw(arguments.plot, arguments.capacity)
        return
    if arguments.client is not None:
        address, processor, callers, seconds, name = arguments.client
        client(address, name, processor, int(callers), float(seconds))
        return
    from distributed import LocalCluster

    print(rst("Many processes and one batcher", "="))
    print(f"{__doc__.partition(chr(10))[2].strip()}\n")
    for name, value in machine().items():
        print(f":{name}: {value}")
    print()
    with LocalCluster(n_workers=4, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        for callers in arguments.callers:
            rows = []
            for processor, label in (("slow", "5 ms and 20 µs per job"), ("instant", "no time")):
                for address, way in (("", "a batcher each"), (cluster.scheduler_address, "one for all")):
                    row = measure(address, processor, arguments.processes, callers, arguments.seconds)
                    rows.append([f"{label}, {way}", *row])
            headings = ["a call takes", "jobs", "wrong or lost", "calls", "mean batch", "jobs/s"]
            print(render(Table(f"{arguments.processes} processes of {callers} callers", headings, rows, [])))
    headings = [
        "processes",
        *(f"{what}, {who}" for what in ("batch", "calls/s", "mean ms") for who in ("each", "shared")),
    ]
    made = [compared(RATE, processes) for processes in (1, 10, 100, 1_000)]
    print(render(Table(f"Simulated: {RATE:,} jobs/s over all processes, 5 ms and 20 µs per job", headings, made, [])))


if __name__ == "__main__":
    main()
