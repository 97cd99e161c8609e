"""Scale: whether a job costs more if there are more jobs, more threads, or more keys.

Like *Submit then gather*, with the number of jobs, threads or keys rising in steps. With 1,000 jobs, the last batch is
not full and may wait for its interval, which is part of the cost. No contender has a constant cost up to a million
jobs, because the callers keep all handles, and the garbage collector looks at more of them each time. So the growth of
each contender is compared with that of the pool.

Only microbatch has keys, and each key has its own open batch. With 100,000 keys or more, each key has one job, so every
batch holds one job and the cost of a job should no longer grow. The pool always makes one call per job.
"""

from typing import Any

from benchmarks.contenders import Contender, Microbatch
from benchmarks.measurements import gather
from benchmarks.measurements.base import BATCHERS, INTERVAL, POOL, SIZE, Case, Measurement


def run_keys(contender: type[Contender], *, jobs: int, keys: int, workers: int = 1) -> dict[str, float]:
    """See the module."""
    options: dict[str, Any] = {}
    if issubclass(contender, Microbatch):
        options["key"] = {b"%d" % number: number % keys for number in range(jobs)}.__getitem__
    return gather.cost(
        contender(gather.no_op, size=SIZE, interval=INTERVAL, workers=workers, **options), jobs, threads=1
    )


JOBS = Measurement(
    name="scale-jobs",
    title="Scale: more jobs",
    about="Like *Submit then gather*, from one thread, with more and more jobs.",
    run=gather.run,
    figures=gather.FIGURES,
    contenders=(*BATCHERS, POOL, "one-thread"),
    cases=[Case(f"{jobs:,}", {"jobs": jobs, "threads": 1}) for jobs in (1_000, 10_000, 100_000, 1_000_000)],
    quick=[Case(f"{jobs:,}", {"jobs": jobs, "threads": 1}) for jobs in (1_000, 10_000, 100_000)],
    ratios=[("wall", POOL)],
    wide=True,
    growth=("10,000", "1,000,000"),
    plot="wall",
)

THREADS = Measurement(
    name="scale-threads",
    title="Scale: more threads",
    about="Like *Submit then gather*, with the same number of jobs from more and more threads.",
    run=gather.run,
    figures=gather.FIGURES,
    contenders=(*BATCHERS, POOL),
    cases=[Case(str(threads), {"jobs": 100_000, "threads": threads}) for threads in (1, 2, 4, 8, 16, 32, 64)],
    quick=[Case(str(threads), {"jobs": 10_000, "threads": threads}) for threads in (1, 8, 64)],
    ratios=[("wall", POOL)],
    wide=True,
    growth=("1", "64"),
    plot="wall",
)


def _keys(jobs: int, keys: int, workers: int = 1) -> Case:
    return Case(
        f"{keys:,}" + (f", {workers} workers" if workers > 1 else ""), {"jobs": jobs, "keys": keys, "workers": workers}
    )


KEYS = Measurement(
    name="scale-keys",
    title="Scale: more keys",
    about="Like *Submit then gather*, from one thread, with jobs that are spread evenly over more and more keys.",
    run=run_keys,
    figures=gather.FIGURES,
    contenders=(*BATCHERS, "microbatch-adaptive", "microbatch-plain", POOL),
    cases=[
        *(_keys(max(keys, 100_000), keys) for keys in (1, 100, 1_000, 10_000, 100_000, 1_000_000)),
        *(_keys(max(keys, 100_000), keys, workers=4) for keys in (1_000, 100_000, 1_000_000)),
    ],
    quick=[*(_keys(10_000, keys) for keys in (1, 100, 1_000, 10_000)), _keys(10_000, 10_000, workers=4)],
    ratios=[("wall", POOL), ("cpu", POOL)],
    wide=True,
    growth=("100,000", "1,000,000"),
    plot="wall",
)
