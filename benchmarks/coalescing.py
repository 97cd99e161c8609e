"""Compares ways to look up keys of which some are much more frequent: ``python -m benchmarks.coalescing``."""

import argparse
import asyncio
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine
from benchmarks.tables import Table, render, rst
from microbatch import Batcher, coalescing
from microbatch.processors import deduplicating

CALLERS = 64
KEYS = 10_000

ABOUT = f"""\
{CALLERS} callers each look up a key, wait for the result, and look up the next key. There are {KEYS:,} keys. How often
each is looked up follows Zipf's law: the key of rank *r* is looked up in proportion to 1 / *r* ** *s*. With *s* = 1.2,
one lookup in five is for the most frequent key. With *s* = 0, all keys are equally frequent. A call to the downstream
system takes 5 ms, plus 20 µs for each of its keys. *Keys per lookup* says how many keys the downstream system had to
look up in all, divided by the number of lookups.

* ``Batcher`` has the default policy and one worker. With ``deduplicating``, the processor gets equal jobs of a batch
  only once.
* ``aiodataloader`` has coroutines as callers, and batches whatever they ask for in one turn of their event loop. Each
  key is removed from its cache when its result has arrived, because all others look up the current value too.
* ``coalescer`` lets threads that call the same function with the same argument share the call. Each call is for one
  key, and all of them may run at the same time, so the downstream system has to bear up to {CALLERS} calls at once.
"""


class Downstream:
    """Counts its calls and the keys that it looks up."""

    def __init__(self) -> None:
        self.calls = self.keys = 0
        self._lock = threading.Lock()  # guards the counts

    def time_of(self, count: int) -> float:
        """Count a call for *count* keys, and return how long it takes."""
        with self._lock:
            self.calls += 1
            self.keys += count
        return 5e-3 + 20e-6 * count

    def __call__(self, keys: list[int]) -> list[int]:
        time.sleep(self.time_of(len(keys)))
        return keys


class Run(NamedTuple):
    """What was measured in one run. The times are in milliseconds."""

    calls: float
    keys: float
    rate: float
    p50: float
    p99: float


Look = Callable[[int], Any]


def zipf(exponent: float, lookups: int) -> list[list[int]]:
    """Return the keys that each caller looks up."""
    weights = list(accumulate(1 / rank**exponent for rank in range(1, KEYS + 1)))
    chance = random.Random(5)
    return [chance.choices(range(KEYS), cum_weights=weights, k=lookups // CALLERS) for _ in range(CALLERS)]


def run_threads(look_up: Look, keys: list[list[int]]) -> list[float]:
    """Have threads look up the keys, and return how long each lookup took."""
    times: list[float] = []

    def call(mine: list[int]) -> None:
        for key in mine:
            begin = time.perf_counter()
            if look_up(key) != key:
                raise AssertionError("the result of another key")
            times.append(time.perf_counter() - begin)

    with ThreadPoolExecutor(CALLERS) as pool:
        for _ in pool.map(call, keys):
            pass
    return times


def with_batcher(downstream: Downstream, keys: list[list[int]]) -> list[float]:
    """Look up each key as a job."""
    with Batcher[int, int](downstream) as batcher:
        return run_threads(lambda key: batcher.submit(key).result().value, keys)


def with_deduplicating(downstream: Downstream, keys: list[list[int]]) -> list[float]:
    """Look up equal keys of a batch once."""
    with Batcher[int, int](deduplicating(downstream)) as batcher:
        return run_threads(lambda key: batcher.submit(key).result().value, keys)


def with_coalescing(downstream: Downstream, keys: list[list[int]]) -> list[float]:
    """Look up equal keys that are in flight once."""
    with Batcher[int, int](downstream) as batcher:
        people = coalescing(batcher)
        return run_threads(lambda key: people.submit(key).result().value, keys)


def with_aiodataloader(downstream: Downstream, keys: list[list[int]]) -> list[float]:
    """Look up keys in coroutines."""
    from aiodataloader import DataLoader

    async def load(batch: list[int]) -> list[int]:
        await asyncio.sleep(downstream.time_of(len(batch)))
        return batch

    async def main() -> list[float]:
        loader: Any = DataLoader(load)
        times: list[float] = []

        async def call(mine: list[int]) -> None:
            for key in mine:
                begin = time.perf_counter()
                if await loader.load(key) != key:
                    raise AssertionError("the result of another key")
                loader.clear(key)
                times.append(time.perf_counter() - begin)

        await asyncio.gather(*map(call, keys))
        return times

    return asyncio.run(main())


def with_coalescer(downstream: Downstream, keys: list[list[int]]) -> list[float]:
    """Look up each key in a call of its own, unless another thread does."""
    from coalescer.sync import Coalescer

    group: Any = Coalescer()
    return run_threads(lambda key: group.do(key, downstream, [key])[0], keys)


Way = Callable[[Downstream, list[list[int]]], list[float]]


def ways() -> Iterator[tuple[str, Way]]:
    """Yield the ways whose packages are installed."""
    yield "``Batcher``", with_batcher
    yield "``Batcher``, ``deduplicating``", with_deduplicating
    yield "``Batcher``, ``coalescing``", with_coalescing
    if find_spec("aiodataloader"):
        yield "``aiodataloader``", with_aiodataloader
    if find_spec("coalescer"):
        yield "``ThreadPoolExecutor``, ``coalescer``", with_coalescer


def measure(way: Way, keys: list[list[int]]) -> Run:
    """Run one way once."""
    downstream, begin = Downstream(), time.perf_counter()
    times = sorted(way(downstream, keys))
    count, seconds = len(times), time.perf_counter() - begin
    p50, p99 = 1e3 * times[count // 2], 1e3 * times[int(0.99 * count)]
    return Run(downstream.calls / count, downstream.keys / count, count / seconds, p50, p99)


def table(exponent: float, lookups: int, repeats: int) -> Table:
    """Compare all ways."""
    keys = zipf(exponent, lookups)
    runs: dict[str, list[Run]] = {name: [] for name, _ in ways()}
    for _ in range(repeats):
        for name, way in ways():
            runs[name].append(measure(way, keys))
    rows = []
    for name, made in runs.items():
        calls, found, rate, p50, p99 = map(statistics.median, zip(*made))
        worst = max(run.p99 for run in made)
        rows.append([name, f"{calls:.3f}", f"{found:.2f}", f"{rate:,.0f}", f"{p50:.1f}", f"{p99:.1f}", f"{worst:.1f}"])
    columns = ["", "calls per lookup", "keys per lookup", "lookups/s", "p50, ms", "p99, ms", "worst p99, ms"]
    return Table(f"s = {exponent}", columns, rows, [])


def main(arguments: Sequence[str]) -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coalescing", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--lookups", type=int, default=12_800, metavar="N", help="of each run (default: %(default)s)")
    default = Path(__file__).parent / "results" / "coalescing.rst"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE")
    options = parser.parse_args(arguments)
    lines = [
        rst("Equal jobs", "="),
        *[f"* {name}: {value}" for name, value in machine().items()],
        "",
        f"Each figure is the median of {options.repeats} runs. The rows of a table are measured in turn.",
        "",
        ABOUT,
        *[render(table(exponent, options.lookups, options.repeats)) for exponent in (1.2, 0.8, 0.0)],
    ]
    print(*lines, sep="\n")
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
