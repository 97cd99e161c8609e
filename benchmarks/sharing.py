"""Many processes with a batcher each, or with one for all: ``python -m benchmarks.sharing > benchmarks/results/sharing.rst``.

Client processes, each with callers in threads that wait for each result, submit to batchers of their own, and then to one in
a Dask cluster on the same cores. A call takes 5 ms and 20 µs for each job; then nothing, to see what one collector can do.
Each caller checks that the answer is to its own job. The second part simulates more processes than a machine has.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Tuple

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst
from microbatch import Batcher, Natural, Size
from microbatch.simulation import poisson, simulate

POLICY = Size(500) | Natural()
CALL, JOB = 0.005, 20e-6


def slow(jobs: List[str]) -> List[Tuple[str, int]]:
    """Take as long as a database."""
    time.sleep(CALL + JOB * len(jobs))
    return [(job, len(jobs)) for job in jobs]


def instant(jobs: List[str]) -> List[Tuple[str, int]]:
    """Take no time."""
    return [(job, len(jobs)) for job in jobs]


PROCESSORS: Dict[str, Callable[[List[str]], Any]] = {"slow": slow, "instant": instant}


def client(address: str, name: str, processor: str, callers: int, seconds: float) -> None:
    """Submit in a loop from some threads, and print what came of it; with an *address*, to the batcher that all share."""
    options: Dict[str, Any] = {"policy": POLICY}
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

        def loop(caller: int) -> Tuple[int, int, float]:
            done, wrong, calls = 0, 0, 0.0
            while time.monotonic() < deadline:
                job = f"{name} {caller} {done}"
                answer, size = batcher.submit(job).result().value
                done, wrong, calls = done + 1, wrong + (answer != job), calls + 1 / size
            return done, wrong, calls

        print(json.dumps(list(pool.map(loop, range(callers)))), flush=True)


def measure(address: str, processor: str, processes: int, callers: int, seconds: float) -> List[str]:
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


def simulated(rate: float, processes: int) -> List[str]:
    """Return a row for so many processes that share a load: each with a batcher, and all with one."""
    alone, together = (
        simulate(POLICY, poisson(each, 20_000), lambda size: CALL + JOB * size) for each in (rate / processes, rate)
    )
    cells = [f"{report.jobs / report.batches:.1f}" for report in (alone, together)]
    cells += [f"{rate * report.batches / report.jobs:,.0f}" for report in (alone, together)]
    return [f"{processes:,}", *cells, *(f"{1e3 * report.p50:.1f}" for report in (alone, together))]


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__.partition("\n")[0])
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--callers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
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
        "batch, each",
        "batch, shared",
        "calls/s, each",
        "calls/s, shared",
        "p50 ms, each",
        "shared",
    ]
    made = [simulated(2_000, processes) for processes in (1, 10, 100, 1_000)]
    print(render(Table("Simulated: 2,000 jobs/s over all processes, 5 ms and 20 µs per job", headings, made, [])))


if __name__ == "__main__":
    main()
