"""Measures how fast jobs are processed with one call per job, and how fast through a `Batcher`.

Many threads submit the jobs. Both ways are measured three times, in turns.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from microbatch import Batcher, BatchingPolicy

__all__ = ["compare"]


def compare(
    one: Callable[[Any], Any],
    many: Callable[[list[Any]], Any],
    jobs: Sequence[Any],
    policy: "BatchingPolicy[Any]",
    threads: int = 32,
) -> list[Any]:
    """Print how fast both ways are, and return the results of all jobs through the batcher.

    Args:
        one: Processes one job.
        many: Processes a list of jobs: the processor of the batcher.
        jobs: The jobs.
        policy: The policy of the batcher.
        threads: The number of callers. Each waits for its result before it submits its next job.
    """
    alone: list[float] = []
    together: list[float] = []
    calls = 0
    with ThreadPoolExecutor(threads) as callers:
        for _ in range(3):
            started = time.perf_counter()
            list(callers.map(one, jobs))
            alone.append(len(jobs) / (time.perf_counter() - started))
            with Batcher(many, policy) as batcher:
                started = time.perf_counter()
                results = list(callers.map(lambda job: batcher.submit(job).result().value, jobs))
                together.append(len(jobs) / (time.perf_counter() - started))
                calls = batcher.stats().batches
    print(f"{len(jobs):,} jobs from {threads} threads    calls    jobs/s")
    print(f"one call per job            {len(jobs):>9,} {statistics.median(alone):>9,.0f}")
    print(f"through a Batcher           {calls:>9,} {statistics.median(together):>9,.0f}")
    ratio = statistics.median(with_it / without for without, with_it in zip(alone, together))
    print(f"{ratio:.1f} times as fast")
    return results
