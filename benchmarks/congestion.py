"""Compares Congestion with fixed limits: ``python -m benchmarks.congestion > benchmarks/results/congestion.rst``.

A stand-in for an API can process 8 batches at once. There are two kinds: if more batches run, one refuses those above
8, and the other takes longer for each in proportion to their number. A batch of 20 jobs takes 50 ms, varied at random
by 10 % (log-normal). All jobs are submitted at once. A job of a refused batch fails, except in the row with
``retrying``, which repeats the call after 100 ms.

*Found* is the first batch after which at least 90 of 100 batches in a row start while 7 to 9 run. *Running* is the mean
number of batches that run when a batch starts, in the second half of a run. *Share* is the ratio of the jobs/s, without
those that failed, to those with 8 workers. ``adaptive-concurrency`` is a library on PyPI that runs batches of a given
list. It is left out if it is not installed. The columns with *simulated* are from the simulator, with the same policy
and load.

The last two tables are from simulations only. One varies the service time by other percentages (*noise*). In the other,
the limit of the API changes from 8 to 4, and then to 12.
"""

import importlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tenacity import retry_if_exception_type, stop_never, wait_fixed

from benchmarks.machine import machine
from benchmarks.tables import NOTHING, Table, render, rst
from microbatch import Batcher, BatchingPolicy, Congestion, Natural, Size
from microbatch.processors import retrying
from microbatch.simulation import SimulatedBatch, SimulatedFailure, simulate

SIZE, KNEE, MOST = 20, 8, 32
CALL, REFUSAL, PAUSE = 0.05, 0.005, 0.1
"""How many seconds a call takes, how many one that is refused, and how many pass until ``retrying`` repeats it."""
BATCHES = 1_500


class Refused(Exception):
    """The stand-in had too many calls. The default of `Congestion` recognises it by its status."""

    status_code = 429


class Api:
    """A stand-in for an API, for real threads and for the simulator.

    Attributes:
        running: The number of calls that ran when each call began, itself included.
        refused: The number of calls that were refused.
    """

    def __init__(self, refuses: bool, noise: float = 0.1, knees: Callable[[int], int] = lambda number: KNEE) -> None:
        self.running: list[int] = []
        self.refused = 0
        self._refuses = refuses
        self._noise = noise
        self._knees = knees
        self._chance = random.Random(1)
        self._lock = threading.Lock()
        self._now = 0

    def outcome(self, running: int) -> "float | SimulatedFailure":
        """Return how long the next call takes, or its failure, while *running* calls run."""
        knee = self._knees(len(self.running))
        self.running.append(running)
        seconds = CALL * self._chance.lognormvariate(-(self._noise**2) / 2, self._noise)
        if running > knee and self._refuses:
            self.refused += 1
            return SimulatedFailure(REFUSAL, Refused())
        return seconds * max(1.0, running / knee)

    def simulated(self, batch: SimulatedBatch) -> "float | SimulatedFailure":
        """Do the same in the simulator."""
        return self.outcome(batch.in_flight)

    def __call__(self, jobs: Sequence[int]) -> list[int]:
        """Process a batch."""
        with self._lock:
            self._now += 1
            outcome = self.outcome(self._now)
        try:
            if isinstance(outcome, SimulatedFailure):
                time.sleep(outcome.seconds)
                raise outcome.error
            time.sleep(outcome)
            return list(jobs)
        finally:
            with self._lock:
                self._now -= 1


class Result(NamedTuple):
    """What became of the jobs."""

    api: Api
    rate: float
    failed: int

    def cells(self, best: float) -> list[str]:
        """Return the cells of a row."""
        found = found_at(self.api.running, KNEE)
        return [
            f"{self.rate:,.0f}",
            f"{self.rate / best:.2f}",
            f"{self.api.refused:,}",
            f"{self.failed:,}",
            NOTHING if found is None else f"{found:,}",
            f"{mean_running(self.api.running):.1f}",
        ]


def found_at(running: Sequence[int], knee: int, first: int = 0) -> int | None:
    """Return the first batch after *first* that starts a run at a limit of about *knee*, or None."""
    near = [abs(number - knee) <= 1 for number in running[first:]]
    return next((place for place in range(len(near) - 99) if sum(near[place : place + 100]) >= 90), None)


def mean_running(running: Sequence[int]) -> float:
    """Return the mean over the second half."""
    half = running[len(running) // 2 :]
    return sum(half) / len(half)


def batched(policy: BatchingPolicy[Any], workers: int, wrap: Callable[[Any], Any], refuses: bool) -> Result:
    """Run all jobs in a batcher."""
    api = Api(refuses)
    with Batcher(wrap(api), policy, max_workers=workers) as batcher:
        started = time.monotonic()
        futures = [batcher.submit(job) for job in range(BATCHES * SIZE)]
        failed = [future.exception() for future in futures]
        seconds = time.monotonic() - started
    count = len(failed) - failed.count(None)
    return Result(api, (len(futures) - count) / seconds, count)


def simulated(policy: BatchingPolicy[Any], workers: int, api: Api, batches: int = BATCHES) -> Result:
    """Run all jobs in the simulator."""
    report = simulate(policy, [0.0] * (batches * SIZE), cost=api.simulated, max_workers=workers)
    seconds = max(run.ended for run in report.runs)
    return Result(api, (report.jobs - report.failed) / seconds, report.failed)


def peer(library: Any, refuses: bool) -> Result:
    """Run all jobs with adaptive-concurrency, which tunes the number of workers between 1 and `MOST`."""
    api = Api(refuses)

    def call(batch: list[int]) -> tuple[bool, int, str]:
        try:
            return True, len(api(batch)), ""
        except Refused:
            return False, 0, "HTTP 429"

    # With a fixed batch size, because it would make batches smaller each time that one is refused.
    sizes = {"batch_size": SIZE, "min_batch_size": SIZE}
    config = library.AdaptiveConfig(workers=1, max_workers=MOST, max_consecutive_failures=10**9, **sizes)
    started = time.monotonic()
    written = library.run_adaptive(list(range(BATCHES * SIZE)), call, config)
    seconds = time.monotonic() - started
    return Result(api, written / seconds, BATCHES * SIZE - written)


def compare(refuses: bool) -> Table:
    """Measure each way once with real threads, and simulate it."""
    fixed, learned = Size(SIZE) | Natural(), (Size(SIZE) | Natural()) & Congestion(MOST)

    def repeating(processor: Any) -> Any:
        return retrying(processor, stop=stop_never, wait=wait_fixed(PAUSE), retry=retry_if_exception_type(Refused))

    def plain(processor: Any) -> Any:
        return processor

    ways: list[tuple[str, BatchingPolicy[Any], int, Callable[[Any], Any]]] = [
        (f"{KNEE} workers, the best", fixed, KNEE, plain),
        (f"{MOST} workers", fixed, MOST, plain),
        ("Congestion", learned, MOST, plain),
        *([("Congestion, retrying", learned, MOST, repeating)] if refuses else []),
    ]
    rows, best = list[list[str]](), 0.0
    for label, policy, workers, wrap in ways:
        result = batched(policy, workers, wrap, refuses)
        best = best or result.rate
        cells = [NOTHING] * 3
        if wrap is plain:
            model = simulated(policy, workers, Api(refuses))
            cells = [f"{model.rate:,.0f}", f"{result.rate / model.rate:.2f}", f"{model.api.refused:,}"]
        rows.append([label, *result.cells(best), *cells])
    try:
        library = importlib.import_module("adaptive_concurrency")
        rows.append(["adaptive-concurrency", *peer(library, refuses).cells(best), *[NOTHING] * 3])
    except ImportError:
        pass
    headings = ["", "jobs/s", "share", "refused calls", "failed jobs", "found", "running"]
    headings += ["simulated jobs/s", "real / simulated", "simulated refused calls"]
    title = "refuses what is above 8" if refuses else "takes longer above 8"
    return Table(f"An API that {title}", headings, rows, [])


def noises() -> Table:
    """Simulate other noise."""
    rows = []
    for refuses in (True, False):
        for noise in (0.02, 0.1, 0.3, 0.5):
            api = Api(refuses, noise)
            found = simulated((Size(SIZE) | Natural()) & Congestion(MOST), MOST, api, 3_000)
            best = simulated(Size(SIZE) | Natural(), KNEE, Api(refuses, noise), 3_000).rate
            cells = found.cells(best)
            rows.append(["refuses" if refuses else "takes longer", f"{noise:.0%}", cells[1], cells[2], *cells[4:]])
    return Table("Other noise, simulated", ["API", "noise", "share", "refused calls", "found", "running"], rows, [])


def changes() -> Table:
    """Simulate an API whose limit changes."""
    phases = ((0, 8), (2_000, 4), (4_000, 12))
    rows = []
    for refuses in (True, False):
        api = Api(refuses, knees=lambda number: next(knee for first, knee in reversed(phases) if number >= first))
        simulated((Size(SIZE) | Natural()) & Congestion(MOST), MOST, api, 6_000)
        for first, knee in phases:
            found = found_at(api.running[: first + 2_000], knee, first)
            running = f"{mean_running(api.running[first : first + 2_000]):.1f}"
            label = "refuses" if refuses else "takes longer"
            rows.append([label, str(knee), NOTHING if found is None else f"{found:,}", running])
    return Table("A limit that changes every 2,000 batches, simulated", ["API", "limit", "found", "running"], rows, [])


def main() -> None:
    """Run the command."""
    print(rst("Learning how many batches may run at once", "="))
    print(f"{__doc__.partition(chr(10))[2].strip()}\n")
    for name, value in machine().items():
        print(f":{name}: {value}")
    print()
    for refuses in (True, False):
        print(render(compare(refuses)), flush=True)
    print(render(noises()))
    print(render(changes()))


if __name__ == "__main__":
    main()
