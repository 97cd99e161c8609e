"""The summary of a run: its jobs and calls, how long they took, and how many jobs failed."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from microbatch.cli.lines import Line
from microbatch.listeners import BatchFinished, BatchListener

__all__ = ["Durations", "Summary"]

_PER_E_FOLD = 1_000
"""The number of buckets from a duration to one that is *e* times as long, so a bucket is 0.1 % wide."""


class Summary(BatchListener):
    """Counts the jobs, calls, batches and failures of a run. Its memory use does not grow with the run.

    Attributes:
        jobs: The number of lines that were written. Only the thread that writes the lines changes the first three.
        resumed: How many of these lines have an outcome from the journal.
        failures: How many of these lines failed, by the type of the failure.
        finished: Whether all lines were written.
    """

    def __init__(self) -> None:
        self.jobs = 0
        self.resumed = 0
        self.failures: Counter[str] = Counter()
        self.finished = False
        self._mutex = threading.Lock()  # guards the following attributes
        self._calls = self._batches = self._batched = 0
        self._waiting, self._processing = Durations(), Durations()

    def counting(self, processor: Callable[[Any], Any]) -> Callable[[Sequence[Line]], Any]:
        """Return a function that calls *processor* with the jobs of the given lines, and counts the calls."""

        def call(lines: Sequence[Line]) -> Any:
            with self._mutex:
                self._calls += 1
            return processor([line.job for line in lines])

        return call

    def batch_finished(self, event: BatchFinished) -> None:
        """Count a batch."""
        with self._mutex:
            self._batches += 1
            self._batched += event.batch.size
            self._processing.add(event.service_time)
            for future in event.futures:
                self._waiting.add(event.started - future.submitted)

    def rows(self) -> Iterator[str]:
        """Yield the lines of the summary."""
        failed = ", ".join(f"{count:,} {kind}" for kind, count in self.failures.most_common())
        with self._mutex:
            resumed = f", {self.resumed:,} of them from the journal" if self.resumed else ""
            if resumed and (unusable := self.failures["not JSON"]):  # never in the journal
                resumed += f" and {unusable:,} not JSON"
            yield f"jobs        {self.jobs:,}{resumed}"
            if self._batches:
                size = self._batched / self._batches
                batches = f"{self._batches:,} batch{'es' if self._batches > 1 else ''}"
                yield f"calls       {self._calls:,}, for {batches} of {size:,.1f} jobs on average"
                yield f"waiting     {self._waiting}"
                yield f"processing  {self._processing}"
            elif self.resumed and self.finished:
                yield "calls       0, because the journal has all outcomes"
            else:
                yield "calls       0"
            yield f"failed      {self.failures.total():,}" + (f": {failed}" if failed else "")


class Durations:
    """A histogram of durations. Each bucket is 0.1 % wide, so its memory use does not grow with their number."""

    def __init__(self) -> None:
        self._counts = Counter[int]()

    def add(self, seconds: float) -> None:
        """Add a duration."""
        self._counts[round(math.log(max(seconds, 1e-9)) * _PER_E_FOLD)] += 1

    def __str__(self) -> str:
        return f"p50 {_shown(self._at(0.5))}, p99 {_shown(self._at(0.99))}"

    def _at(self, share: float) -> float:
        """Return the shortest duration that at least a *share* of the durations don't exceed."""
        rest = math.ceil(share * self._counts.total())
        for bucket, count in sorted(self._counts.items()):
            rest -= count
            if rest <= 0:
                return math.exp(bucket / _PER_E_FOLD)
        return math.nan


def _shown(seconds: float) -> str:
    number, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
