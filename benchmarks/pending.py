"""Shows what the limits on waiting jobs do: ``python -m benchmarks.pending``."""

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst
from microbatch import BacklogFull, Batcher, BatcherClosed, Natural, Size, Weight

KILO, MEGA = 1_000, 1_000_000
LIGHTEST, HEAVIEST = 20 * KILO, 900 * KILO
LIMIT = 200 * MEGA

FLOOD = """\
Eight threads flood the queue with jobs of one tenant. Meanwhile, another tenant submits 50 jobs, one every 10 ms, with
``timeout=0``. A call takes 5 ms and processes at most 10 jobs.
"""

MEMORY = f"""\
Four threads submit byte strings of {LIGHTEST // KILO} to {HEAVIEST // KILO} kB as fast as they can. A call takes 5 ms
and processes at most 2 MB. *Peak* is by how much the memory of the process grew, relative to a limit of
{LIMIT // MEGA} MB. This includes the running batch and the jobs of the four blocked threads. With ``max_pending``, the
limit is the number of jobs of average weight that take up {LIMIT // MEGA} MB. The C library keeps freed memory in one
arena for each thread. In the last column, ``MALLOC_ARENA_MAX=1`` makes all threads share one.
"""

DROPS = """\
One thread submits 200,000 jobs while the downstream is down: the first call does not return until the end. *Survive*
says whether exactly the newest ``max_pending`` jobs were processed in the end.
"""


def flooded(**limits: Any) -> tuple[int, int]:
    """Return how many of the 50 jobs of the second tenant were accepted, and how many jobs of the first one."""

    def processor(jobs: list[str]) -> None:
        time.sleep(5e-3)

    ended = threading.Event()
    accepted = [0]

    def flood() -> None:
        with contextlib.suppress(BatcherClosed):
            while not ended.is_set():
                batcher.submit("flood")
                accepted[0] += 1

    with Batcher[str, None](processor, Size(10) | Natural(), key=str, max_pending=1_000, **limits) as batcher:
        threads = [threading.Thread(target=flood) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        urgent = 0
        for _ in range(50):
            time.sleep(0.01)
            try:
                batcher.submit("urgent", timeout=0)
            except BacklogFull:
                continue
            urgent += 1
        ended.set()
    for thread in threads:
        thread.join()
    return urgent, accepted[0]


def _any(chance: random.Random) -> int:
    return int(LIGHTEST * (HEAVIEST / LIGHTEST) ** chance.random())


def _mostly_heavy(chance: random.Random) -> int:
    return LIGHTEST if chance.random() < 0.02 else HEAVIEST


MIXES: dict[str, Callable[[random.Random], int]] = {
    "20 to 900 kB": _any,
    "98 % of 900 kB": _mostly_heavy,
}


def grown(limits: dict[str, Any], mix: str, seconds: float) -> float:
    """Return by how much the peak memory grew while the queue was full, relative to `LIMIT`."""
    ended = time.monotonic() + seconds

    def processor(jobs: list[bytes]) -> None:
        time.sleep(5e-3)

    def submit(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < ended:
            batcher.submit(b"x" * MIXES[mix](chance))

    with Batcher[bytes, None](processor, Weight(2 * MEGA) | Natural(), weigh=len, **limits) as batcher:
        batcher.submit(b"starts the threads").result()
        before = _peak()
        threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        batcher.shutdown(cancel_futures=True)
    return (_peak() - before) / LIMIT


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1_024)


def in_process(function: Callable[..., Any], *arguments: Any, arenas: str = "") -> Any:
    """Call a function in a new process, whose peak memory is its own."""
    os.environ["MALLOC_ARENA_MAX"] = arenas
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def dropping(jobs: int, size: int) -> tuple[float, float, float, bool]:
    """Return the median, the 99th percentile and the maximum of the seconds of a submit, and whether the newest survive."""
    up = threading.Event()
    times: list[float] = []
    processed: list[int] = []
    clock = time.perf_counter

    def processor(jobs: list[int]) -> list[int]:
        up.wait()
        processed.extend(jobs)
        return jobs

    with Batcher[int, int](processor, max_pending=size, drop_oldest=True) as batcher:
        running = batcher.submit(-1)
        while not running.running():
            time.sleep(0.001)
        for job in range(jobs):
            start = clock()
            batcher.submit(job)
            times.append(clock() - start)
        up.set()
    newest = list(range(jobs - size, jobs))
    return statistics.median(times), statistics.quantiles(times, n=100)[98], max(times), processed == [-1, *newest]


def tables(repeats: int, seconds: float) -> list[str]:
    """Measure everything, and return the lines of the page."""
    limits: dict[str, dict[str, Any]] = {"``max_pending=1_000``": {}}
    limits["``max_pending_per_key=500``"] = {"max_pending_per_key": 500}
    found = {name: [flooded(**options) for _ in range(repeats)] for name, options in limits.items()}
    flood = [
        [name, _range([run[0] for run in runs]), f"{statistics.median(run[1] for run in runs):,.0f}"]
        for name, runs in found.items()
    ]
    chance = random.Random(0)
    average = statistics.fmean(_any(chance) for _ in range(10_000))
    bounds = {
        f"``max_pending={LIMIT / average:.0f}``": {"max_pending": int(LIMIT / average)},
        "``max_pending_weight``": {"max_pending_weight": LIMIT},
    }
    memory = [
        [name, mix, *(_peaks(options, mix, seconds, repeats, arenas) for arenas in ("", "1"))]
        for name, options in bounds.items()
        for mix in MIXES
    ]
    times = []
    for size in (100, 1_000, 10_000):
        runs = [dropping(200_000, size) for _ in range(repeats)]
        p50s, p99s, most, survived = zip(*runs)
        row = [f"{statistics.median(p50s) * 1e6:.1f}", _range([1e6 * p99 for p99 in p99s], ".1f")]
        times.append([f"{size:,}", *row, f"{max(most) * 1e3:.1f}", "yes" if all(survived) else "no"])
    return [
        rst("Limits on waiting jobs", "="),
        *[f"* {name}: {value}" for name, value in machine().items()],
        "",
        f"Each figure is the median of {repeats} runs, with the lowest and the highest in brackets.",
        "",
        rst("A tenant that floods the queue"),
        FLOOD,
        render(Table("accepted jobs", ["", "of the 50", "of the flood"], flood, [])),
        rst("Memory"),
        MEMORY,
        render(Table("peak memory", ["", "weights", "peak", "with one arena"], memory, [])),
        rst("Dropping the oldest jobs"),
        DROPS,
        render(Table("the time of a submit", ["max_pending", "p50, µs", "p99, µs", "worst, ms", "survive"], times, [])),
    ]


def _peaks(limits: dict[str, Any], mix: str, seconds: float, repeats: int, arenas: str) -> str:
    return _range([in_process(grown, limits, mix, seconds, arenas=arenas) for _ in range(repeats)], ".2f")


def _range(figures: Sequence[float], form: str = ",.0f") -> str:
    return f"{statistics.median(figures):{form}} ({min(figures):{form}} to {max(figures):{form}})"


def main(arguments: Sequence[str]) -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pending", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each run that measures memory")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "pending.rst", metavar="FILE"
    )
    options = parser.parse_args(arguments)
    lines = tables(options.repeats, options.seconds)
    print(*lines, sep="\n")
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
