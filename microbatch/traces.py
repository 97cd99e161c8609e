"""Records the load of a batcher in production as JSON Lines, so that you can simulate other policies on it.

>>> import io
>>> from microbatch import Batcher, Natural, Size
>>> from microbatch.simulation import simulate
>>> file = io.StringIO()
>>> with Batcher(list, listeners=[TraceRecorder(file)]) as batcher:
...     results = [result.value for result in batcher.map("abc")]
>>> trace = read_trace(file.getvalue().splitlines())
>>> simulate(Size(1) | Natural(), trace.arrivals, trace.service_time).batch_sizes
(1, 1, 1)
"""

import hashlib
import json
import os
import statistics
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from microbatch._basics.arguments import check_answer, check_number, shown
from microbatch.listeners import BatchFinished, BatchListener
from microbatch.simulation import Arrival

__all__ = ["ServiceTime", "Trace", "TraceRecorder", "read_trace"]

_TOO_LARGE = 1e15
"""Numbers of at least this size are refused as a mistake. Sums of squares of smaller numbers stay finite."""

_OUTLIERS, _FITS = 0.1, 4
"""The share of the batches that each fit of a line after the first one leaves out, and the number of fits."""


class TraceRecorder(BatchListener):
    """A listener that writes a line of JSON for each batch: how long it took, and when each of its jobs was submitted.

    The trace does not contain jobs or results, and only a digest of each key. Jobs that were never dispatched are not
    in the trace.

    Args:
        file: A file that is open for writing text. The threads of the workers write one line at a time. Close it after
            the shutdown. Don't use it in a forked child: create a new file, recorder and batcher there. Otherwise, both
            processes write the text that was in the buffer of the file at the fork.
    """

    def __init__(self, file: TextIO) -> None:
        if not callable(getattr(file, "write", None)):
            raise TypeError(f"file must be a file open for writing, got {shown(file)}")
        self._file = file
        # Guards the file, with one mutex for each process. At a fork, a thread that does not exist in the child may
        # hold the mutex of the parent.
        self._mutexes: dict[int, threading.Lock] = {}

    def batch_finished(self, event: BatchFinished) -> None:
        """Write one line for the batch."""
        line: dict[str, Any] = {
            "service_time": event.service_time,
            "trigger": event.batch.trigger,
            "submitted": [future.submitted for future in event.futures],
        }
        if event.batch.key is not None:
            line["key"] = hashlib.blake2b(repr(event.batch.key).encode(errors="replace"), digest_size=8).hexdigest()
        weights = [future.weight for future in event.futures]
        if set(weights) != {1.0}:
            line["weights"] = weights
        text = json.dumps(line) + "\n"
        with self._mutexes.setdefault(os.getpid(), threading.Lock()):
            self._file.write(text)


@dataclass(frozen=True)
class ServiceTime:
    """How long a batch takes: a line that was fitted to the recorded batches. Call it with the size of a batch.

    The line is fitted by least squares. Then the tenth of the batches that is farthest from the line is left out, and
    the line is fitted again. Otherwise, a few very slow batches would decide its slope.

    Attributes:
        fixed: How many seconds any batch takes.
        each: How many more seconds it takes for each of its jobs.
        sizes: The sizes of the recorded batches, in order.
        ratios: How many times longer than by the line each recorded batch took, in order.
    """

    fixed: float
    each: float
    sizes: tuple[int, ...] = field(repr=False)
    ratios: tuple[float, ...] = field(repr=False)

    def __call__(self, size: int) -> float:
        return self.fixed + self.each * size


@dataclass(frozen=True)
class Trace:
    """A recorded load, as the arguments of `microbatch.simulation.simulate`.

    Attributes:
        arrivals: When the jobs were submitted, in order. The first one is at 0.
        service_time: Returns how many seconds a batch of a given size takes.
    """

    arrivals: tuple[Arrival, ...]
    service_time: ServiceTime


def read_trace(lines: Iterable[str]) -> Trace:
    """Return the trace that a `TraceRecorder` has written.

    If the last line is incomplete, because the file is still being written, it is ignored.

    Args:
        lines: The lines of the trace: an open file, or a list.

    Raises:
        ValueError: A line was not written by a `TraceRecorder`, or the trace has no job.
    """
    if isinstance(lines, (str, bytes)) or not isinstance(lines, Iterable):
        raise TypeError(f"lines must be the lines of a trace, got {shown(lines)}")
    arrivals: list[Arrival] = []
    batches: list[tuple[int, float]] = []
    for number, text in enumerate(_complete_lines(list(lines)), 1):
        try:
            line = json.loads(text)
            moments = [_finite(moment) for moment in line["submitted"]]
            weights = [
                check_number("weights", weight, below=_TOO_LARGE)
                for weight in line.get("weights", [1.0] * len(moments))
            ]
            batches.append((len(moments), check_number("service_time", line["service_time"], below=_TOO_LARGE)))
            pairs = zip(moments, weights, strict=True)
            arrivals += [Arrival(moment, line.get("key"), weight) for moment, weight in pairs]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"line {number} must be a line of a trace, got {shown(text)} ({error!r})") from None
    if not arrivals:
        raise ValueError("a trace must have at least one job")
    first = min(arrival.moment for arrival in arrivals)
    arrivals.sort(key=lambda arrival: arrival.moment)
    return Trace(tuple(arrival._replace(moment=arrival.moment - first) for arrival in arrivals), _fitted(batches))


def _complete_lines(lines: list[str]) -> list[str]:
    if len(lines) > 1:
        try:
            json.loads(lines[-1])
        except (ValueError, RecursionError):
            return lines[:-1]
    return lines


def _finite(moment: Any) -> float:
    number = check_answer("submitted", moment)  # may be negative, because the zero of a clock is arbitrary
    check_number("submitted", abs(number), below=_TOO_LARGE)
    return number


def _fitted(batches: Sequence[tuple[int, float]]) -> ServiceTime:
    fixed, each = _line(batches)
    for _ in range(1, _FITS):
        by_distance = sorted(batches, key=lambda batch: abs(batch[1] - fixed - each * batch[0]))
        fixed, each = _line(by_distance[: len(batches) - int(_OUTLIERS * len(batches))])
    ratios = sorted(time / (fixed + each * size) if fixed + each * size else 1.0 for size, time in batches)
    return ServiceTime(fixed, each, tuple(sorted(size for size, _ in batches)), tuple(ratios))


def _line(batches: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return the time for a batch and the time for each job, by least squares."""
    sizes, times = zip(*batches)
    if len(set(sizes)) > 1:
        slope, intercept = statistics.linear_regression(sizes, times)
        if slope > 0:
            return max(0.0, intercept), slope if intercept > 0 else sum(times) / sum(sizes)
    return statistics.median(times), 0.0  # all sizes are equal, or larger batches took no longer
