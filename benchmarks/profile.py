"""Shows where the time of a job goes: ``python -m benchmarks.profile``. Needs Linux or macOS.

It takes about a minute and a half. For each function of microbatch, the first tables have the calls and the bytecode
instructions per job. They are counted, not timed, so they hardly depend on the machine. The next one compares the
closed loop with raw locks: CPU time in user code and in the kernel, and context switches. The last one has the rate at
which several threads can submit jobs.
"""

import resource
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from benchmarks.contenders import Contender, Locks, Microbatch
from benchmarks.measurements.base import INTERVAL, SIZE, together
from benchmarks.measurements.downstream import Downstream
from benchmarks.tables import Table, render

_THREADS = 64
_LEAST = 0.01  # the share of all instructions; the tables add up functions with fewer

Load = Callable[[Contender, int], None]
"""Sends this number of jobs through a contender, and reads their results."""


def gather(contender: Contender, jobs: int) -> None:
    """Submit all jobs in one thread, then read the results."""
    submitted = [contender.submit(b"%d" % number) for number in range(jobs)]
    for each in submitted:
        contender.result(each)


def gather_keys(contender: Contender, jobs: int) -> None:
    """Do the same with a batcher in which each job has a key of its own, and so a batch of its own."""
    gather(contender, jobs)


def closed(contender: Contender, jobs: int) -> None:
    """Submit and read one job after another in each of 64 threads."""

    def work() -> None:
        for _ in range(jobs // _THREADS):
            contender.result(contender.submit(b"job"))

    together([work] * _THREADS)


def _create(kind: type[Contender], load: Load) -> Contender:
    processor: Any = Downstream(1, SIZE) if load is closed else list
    options: dict[str, Any] = {"key": bytes} if load is gather_keys else {}
    return kind(processor, size=SIZE, interval=INTERVAL, workers=1, **options)


class Counts:
    """Counts the calls of each function of microbatch, and the instructions that it executes, in all threads."""

    def __init__(self) -> None:
        self.calls: Counter[CodeType] = Counter()
        self.instructions: Counter[CodeType] = Counter()

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """Count one event. Pass this method to `sys.settrace`."""
        code = frame.f_code
        if event == "call":
            if not frame.f_globals.get("__name__", "").startswith("microbatch."):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self.calls[code] += 1
        elif event == "opcode":
            self.instructions[code] += 1
        return self.trace


def count(load: Load, jobs: int) -> Counts:
    """Return the counts of *jobs* jobs, after some others have warmed everything up."""
    counts = Counts()
    threading.settrace(counts.trace)
    sys.settrace(counts.trace)
    try:
        contender = _create(Microbatch, load)
        load(contender, 2 * _THREADS)
        counts.calls.clear()
        counts.instructions.clear()
        load(contender, jobs)
        return counts
    finally:
        sys.settrace(None)
        threading.settrace(None)
        contender.close()


def functions(title: str, counts: Counts, jobs: int) -> Table:
    """Return a table of the functions, those with the most instructions first."""
    least = _LEAST * counts.instructions.total()
    shown = [code for code, instructions in counts.instructions.most_common() if instructions >= least]
    lines = [(getattr(code, "co_qualname", code.co_name), [code]) for code in shown]
    lines.append(("the others", [code for code in counts.instructions if code not in shown]))
    lines.append(("all together", list(counts.instructions)))
    rows = []
    for name, codes in lines:
        calls, instructions = (sum(counted[code] for code in codes) for counted in (counts.calls, counts.instructions))
        rows.append([name, f"{calls / jobs:.2f}", f"{instructions / jobs:.0f}"])
    return Table(title, ["", "calls per job", "instructions per job"], rows, [])


def _costs(kind: type[Contender], jobs: int) -> list[float]:
    """Return the jobs/s of a closed loop, and per job: µs in user code, µs in the kernel, and context switches."""
    contender = _create(kind, closed)
    before = resource.getrusage(resource.RUSAGE_SELF)
    spent, _ = together([lambda: closed(contender, jobs)])
    after = resource.getrusage(resource.RUSAGE_SELF)
    contender.close()
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    switches = after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw
    return [jobs / spent.wall, user / jobs * 1e6, system / jobs * 1e6, switches / jobs]


def compare(jobs: int, repeats: int) -> Table:
    """Return a table with the medians of alternating runs, and the lowest and highest figure of all runs."""
    runs: dict[type[Contender], list[list[float]]] = {Microbatch: [], Locks: []}
    for _ in range(repeats):
        for kind, found in runs.items():
            found.append(_costs(kind, jobs))
    rows = []
    for kind, found in runs.items():
        columns = [(statistics.median(column), min(column), max(column)) for column in zip(*found)]
        cells = [f"{{:,.{digits}f}} ({{:,.{digits}f}} to {{:,.{digits}f}})" for digits in (0, 1, 1, 2)]
        rows.append([kind.label, *(cell.format(*column) for cell, column in zip(cells, columns))])
    headings = ["", "jobs/s", "user, µs per job", "kernel, µs per job", "context switches per job"]
    return Table("closed loop, 64 callers, 1 worker: median (all runs)", headings, rows, [])


def accepted(jobs: int, repeats: int) -> Table:
    """Return a table with the jobs/s that four threads submit. Meanwhile, the batcher processes them."""
    rates = []
    for _ in range(repeats):
        contender = _create(Microbatch, gather)
        spent, _handles = together([lambda: [contender.submit(b"job") for _ in range(jobs)]] * 4)
        contender.close()
        rates.append(4 * jobs / spent.wall)
    cell = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
    return Table("submit, 4 threads: median (all runs)", ["", "accepted jobs/s"], [[Microbatch.label, cell]], [])


def main(jobs: int = 12_800, repeats: int = 7) -> None:
    """Print the tables."""
    print(render(functions("submit then gather, 1 thread", count(gather, jobs), jobs)))
    print(render(functions("submit then gather, 1 thread, a key for each job", count(gather_keys, jobs), jobs)))
    print(render(functions("closed loop, 64 callers, 1 worker", count(closed, jobs), jobs)))
    print(render(compare(jobs, repeats)))
    print(render(accepted(2 * jobs, repeats)))


if __name__ == "__main__":
    main()
