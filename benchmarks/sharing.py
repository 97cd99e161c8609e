"""Compares a batcher per process with one for all: ``python -m benchmarks.sharing > benchmarks/results/sharing.rst``.

Each client process has several callers, which are threads. A caller submits one job, or 500 jobs, and waits for the
results. First, each process has a batcher of its own. Then all processes share one batcher, the *collector*, in a Dask
cluster on the same cores. A call takes 5 ms plus 20 µs per job. The collector makes one call at a time, or up to two,
while each of the other batchers makes one. Then the same is measured with calls that take no time, which shows how many
jobs one collector can accept. Each caller checks that the result belongs to its own job.

The ways alternate, and a row is the run with the median of jobs/s. *Share* is the median of the ratios to the jobs/s
with a batcher each, in the same round. The CPU time is given per job, for all clients together, and for the Dask cluster
with the scheduler. The last part simulates more processes than a machine can run.

``python -m benchmarks.sharing --plot docs/sharing.svg`` only draws the simulated part.
"""

import argparse
import json
import random
import statistics
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
LOADS = ((8, 1), (64, 1), (1, 500))
"""The callers in each process, and the number of jobs that a caller submits before it waits."""
WAYS = (
    ("slow", 0, "5 ms and 20 µs per job, a batcher each"),
    ("slow", 1, "5 ms and 20 µs per job, one for all"),
    ("slow", 2, "5 ms and 20 µs per job, one for all, two calls"),
    ("instant", 0, "no time, a batcher each"),
    ("instant", 1, "no time, one for all"),
)
"""The processor, the number of calls that the collector makes at the same time, if there is one, and a label."""
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


class Load(NamedTuple):
    """What a client process does.

    Attributes:
        address: The Dask cluster with the shared batcher, or an empty text, if each process has its own.
        processor: The name of the processor.
        workers: How many calls the shared batcher makes at the same time.
        callers: The number of threads that submit jobs.
        at_once: The number of jobs that each of them submits before it waits for their results.
        seconds: How long it does so.
    """

    address: str
    processor: str
    workers: int
    callers: int
    at_once: int
    seconds: float


def client(load: Load, name: str) -> None:
    """Submit jobs in a loop, and print their number, the wrong results, the calls and the CPU time."""
    work: Callable[[list[str]], Any] = PROCESSORS[load.processor]
    if load.address:
        from distributed import Client

        from microbatch.integrations.dask import shared

        connection = Client(load.address)
        collector = f"{load.processor} {load.workers}"
        work = shared(collector, work, POLICY, client=lambda: connection, max_workers=load.workers)
        work([])
    print("ready", flush=True)
    sys.stdin.readline()
    with Batcher(work, POLICY) as batcher, ThreadPoolExecutor(load.callers) as pool:
        started, deadline = time.process_time(), time.monotonic() + load.seconds

        def loop(caller: int) -> tuple[int, int, float]:
            done, wrong, calls = 0, 0, 0.0
            while time.monotonic() < deadline:
                jobs = [f"{name} {caller} {number}" for number in range(done, done + load.at_once)]
                futures = [batcher.submit(job) for job in jobs]
                for job, future in zip(jobs, futures):
                    answer, size = future.result().value
                    done, wrong, calls = done + 1, wrong + (answer != job), calls + 1 / size
            return done, wrong, calls

        found = list(pool.map(loop, range(load.callers)))
        print(json.dumps([*map(sum, zip(*found)), time.process_time() - started]), flush=True)


class Measured(NamedTuple):
    """What all clients together have done.

    Attributes:
        jobs: The number of jobs.
        wrong: The number of results that were lost, or belonged to another job.
        calls: The number of calls of the processor.
        rate: The jobs per second.
        client: The CPU time of the clients per job in µs.
        cluster: The CPU time of the Dask cluster per job in µs.
    """

    jobs: int
    wrong: int
    calls: float
    rate: float
    client: float
    cluster: float

    def cells(self) -> list[str]:
        """Return the cells of a row."""
        figures = (self.jobs, self.wrong, self.calls, self.jobs / self.calls, self.rate, self.client, self.cluster)
        return [f"{figure:,.{digits}f}" for figure, digits in zip(figures, (0, 0, 0, 1, 0, 1, 1))]


def measure(load: Load, processes: int, cluster_time: Callable[[], float]) -> Measured:
    """Run *processes* clients at the same time. *cluster_time* returns the CPU time of the cluster."""
    command = [sys.executable, "-m", "benchmarks.sharing", "--client", *map(str, load)]
    running = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    for process in running:
        assert process.stdout is not None and "ready\n" == process.stdout.readline()
    before = cluster_time()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    after = cluster_time()
    jobs, wrong, calls, used = (sum(column) for column in zip(*found))
    return Measured(jobs, wrong, calls, jobs / load.seconds, 1e6 * used / jobs, 1e6 * (after - before) / jobs)


def compare(
    address: str,
    cluster_time: Callable[[], float],
    processes: int,
    callers: int,
    at_once: int,
    seconds: float,
    rounds: int,
) -> list[list[str]]:
    """Measure each way in each round, and return a row for each way."""
    runs: dict[str, list[Measured]] = {label: [] for _, _, label in WAYS}
    for _ in range(rounds):
        for processor, workers, label in WAYS:
            load = Load(address if workers else "", processor, max(workers, 1), callers, at_once, seconds)
            runs[label].append(measure(load, processes, cluster_time))
    alone = {processor: runs[label] for processor, workers, label in WAYS if not workers}
    rows = []
    for processor, _, label in WAYS:
        *cells, used, cluster = sorted(runs[label], key=lambda run: run.rate)[rounds // 2].cells()
        share = statistics.median(run.rate / other.rate for run, other in zip(runs[label], alone[processor]))
        rows.append([label, *cells, f"{share:.2f}", used, cluster])
    return rows


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
    parser.add_argument("--client", nargs=7, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="only draw the simulated part, to this file")
    parser.add_argument(
        "--capacity", type=float, default=15_600, help="jobs per second that one collector can accept, for the plot"
    )
    arguments = parser.parse_args()
    if arguments.plot is not None:
        draw(arguments.plot, arguments.capacity)
        return
    if arguments.client is not None:
        address, processor, workers, callers, at_once, seconds, name = arguments.client
        client(Load(address, processor, int(workers), int(callers), int(at_once), float(seconds)), name)
        return
    from distributed import Client, LocalCluster

    print(rst("Many processes and one batcher", "="))
    print(f"{__doc__.partition(chr(10))[2].strip()}\n")
    for name, value in machine().items():
        print(f":{name}: {value}")
    print()
    headings = [
        *("a call takes", "jobs", "wrong or lost", "calls", "mean batch", "jobs/s", "share"),
        *("client µs", "cluster µs"),
    ]
    options: dict[str, Any] = {"dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=4, threads_per_worker=1, **options) as cluster, Client(cluster) as connection:

        def cluster_time() -> float:
            used: dict[str, float] = connection.run(time.process_time)
            return time.process_time() + sum(used.values())  # the scheduler runs in this process

        for callers, at_once in LOADS:
            rows = compare(
                cluster.scheduler_address,
                cluster_time,
                arguments.processes,
                callers,
                at_once,
                arguments.seconds,
                arguments.rounds,
            )
            title = f"{arguments.processes} processes of {callers} callers, each submits {at_once} and waits"
            print(render(Table(title, headings, rows, [])), flush=True)
    headings = [
        "processes",
        *(f"{what}, {who}" for what in ("batch", "calls/s", "mean ms") for who in ("each", "shared")),
    ]
    made = [compared(RATE, processes) for processes in (1, 10, 100, 1_000)]
    print(render(Table(f"Simulated: {RATE:,} jobs/s over all processes, 5 ms and 20 µs per job", headings, made, [])))


if __name__ == "__main__":
    main()
