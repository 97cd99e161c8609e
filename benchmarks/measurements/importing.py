"""Import: the CPU time of a new interpreter that imports a contender and ends."""

import os
import resource
import subprocess
import sys

from benchmarks.contenders import Contender
from benchmarks.measurements.base import POOL, Case, Figure, Measurement

MODULES = {"microbatch": "microbatch", POOL: "concurrent.futures.thread"}


def run(contender: type[Contender], *, times: int) -> dict[str, float]:
    """See the module."""
    command = [sys.executable, "-c", f"import {MODULES[contender.name]}"]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(command, check=True)  # compiles the module, if that has not been done yet
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(times):
        subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu / times * 1e3}


IMPORT = Measurement(
    name="import",
    title="Import",
    about="CPU time of an interpreter that imports the module and ends.",
    run=run,
    figures={"cpu": Figure("CPU, ms", 1)},
    contenders=tuple(MODULES),
    cases=[Case("10 times", {"times": 10})],
    quick=[Case("twice", {"times": 2})],
    ratios=[("cpu", POOL)],
)
