"""Compares a batcher per process with one for all: ``python -m benchmarks.sharing > benchmarks/results/sharing.rst``.

Each client process has several callers, which are threads that wait for each result. First, each process has a batcher
of its own. Then all processes share one batcher, the *collector*, in a Dask cluster on the same cores. A call takes 5 ms
plus 20 µs per job. Then the same is measured with calls that take no time, which shows how many jobs one collector can
accept. Each caller checks that the result belongs to its own job. The second part simulates more processes than a
machine can run.

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
from microbatch.simulation.plots import line_style

POLICY = Size(500) | Natural()
CALL, JOB = 0.005, 20e-6
RATE = 2_000
"""The simulated jobs per second of all processes together."""


def slow(jobs: list[str]) -> list[tuple[str, int]]:
    """Take as long as a database would."""
    time.sleep(CALL + JOB * len(jobs))
    return [(job, len(jobs)) for job in jobs]


def instant(jobs: list[str]) -> list[tuple[str, int]]:
    """Take no time."""
    return [(job, len(jobs)) for job in jobs]


PROCESSORS: dict[str, Callable[[list[str]], Any]] = {"slow": slow, "instant": instant}


def client(address: str, name: str, processor: str, callers: int, seconds: float) -> None:
    """Submit jobs in a loop from *callers* threads, and print the outcomes.

    With an *address*, all processes share the batcher in that Dask cluster. Otherwise, this process has its own.
    """
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
    """Run *processes* clients at the same time, and return a row: jobs, wrong answers, calls, mean batch, jobs/s."""
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
    """The result of a simulation.

    Attributes:
        batch: The mean number of jobs in a batch.
        calls: The calls per second of all collectors together.
        latency: The mean latency of a job in ms.
    """

    batch: float
    calls: float
    latency: float


def simulated(rate: float, collectors: int, each: float = 0.0) -> Simulated:
    """Simulate a load that several collectors share. Each takes *each* seconds to accept a job.

    All collectors behave alike, so only one of them is simulated.
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
    """Return a row for a number of processes that share a load, each with its own batcher, and all with one."""
    pairs = zip(simulated(rate, processes), simulated(rate, 1))
    return [f"{processes:,}", *(f"{value:,.{digits}f}" for pair, digits in zip(pairs, (1, 0, 1)) for value in pair)]


def draw(path: Path, capacity: float) -> None:
    """Draw the effect of sharing on batches, calls and latency, and the load at which collectors are overloaded.

    Args:
        path: The file to write, as SVG.
        capacity: The number of jobs per second that one collector can accept.
    """
    with figure(path) as drawn:
        drawn.set_size_inches(5.5, 9)
        *before, end = drawn.subplots(4)
        processes = (1, 2, 4, 10, 20, 40, 100, 200, 400, 1_000)
        ways = (
            ("a batcher in each process", processes, 0.0),
            ("one batcher for all", [1] * len(processes), 1 / capacity),
        )
        for number, (label, collectors, each) in enumerate(ways):
            for axes, values in zip(before, zip(*(simulated(RATE, count, each) for count in collectors))):
                axes.plot(processes, values, label=label, **line_style(number, len(ways)))
        drawn.legend(*before[0].get_legend_handles_labels(), loc="outside upper left", frameon=False)
        for axes, title in zip(before, ("jobs in a batch", "calls per second", "mean latency in the batcher, ms")):
            axes.set_title(title, loc="left", fontsize=10)
        before[-1].set_xlabel(f"processes, with {RATE:,} jobs per second in all")
        collectors = (1, 2, 4, 8)
        for number, count in enumerate(collectors):
            loads = [capacity * count * share / 20 for share in range(1, 23)]
            found = [simulated(load, count, 1 / capacity).latency for load in loads]
            end.plot(loads, found, label=f"{count}", **line_style(number, len(collectors)))
        title = f"mean latency with several collectors, ms\n(one takes {capacity:,.0f} jobs per second)"
        end.set_title(title, loc="left", fontsize=10)
        end.set_xlabel("jobs per second in all")
        end.set_ylim(top=40)
        end.legend(title="collectors", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        for axes in (*before, end):
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__.partition("\n")[0])
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--callers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--plot", type=Path, help="only draw the simulated part, to this file")
    parser.add_argument(
        "--capacity", type=float, default=12_800, help="jobs per second that one collector can accept, for the plot"
    )
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
