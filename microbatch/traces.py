"""What a batcher did in production, recorded in JSON Lines, to try other policies on.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from microbatch._basics.arguments import check_answer, check_number, shown
from microbatch.listeners import BatchFinished, BatchListener
from microbatch.simulation import Arrival

__all__ = ["Trace", "TraceRecorder", "read_trace"]

_ENDLESS = 1e15
"""Numbers from here on are a mistake; sums of squares of smaller ones stay finite."""


class TraceRecorder(BatchListener):
    """Writes a line of JSON for each batch: what it cost, and when each of its jobs was submitted.

    Of jobs and results nothing is written, and of a key only a digest. Jobs that no worker took leave no trace.

    Args:
        file: open for writing text; written to in the workers' threads, a line at a time. Close it after the shutdown.
            A forked child needs a recorder and a batcher of its own: what the file holds back then is written by both.
    """

    def __init__(self, file: TextIO) -> None:
        if not callable(getattr(file, "write", None)):
            raise TypeError(f"file must be a file open for writing, got {shown(file)}")
        self._file = file
        # Guards the file, in each process: in a forked child, a thread that does not exist there may hold the parent's.
        self._mutexes: dict[int, threading.Lock] = {}

    def batch_finished(self, fact: BatchFinished) -> None:
        """Write the line of a batch."""
        line: dict[str, Any] = {
            "service_time": fact.service_time,
            "trigger": fact.batch.trigger,
            "submitted": [future.submitted for future in fact.futures],
        }
        if fact.batch.key is not None:
            line["key"] = hashlib.blake2b(repr(fact.batch.key).encode(errors="replace"), digest_size=8).hexdigest()
        weights = [future.weight for future in fact.futures]
        if set(weights) != {1.0}:
            line["weights"] = weights
        text = json.dumps(line) + "\n"
        with self._mutexes.setdefault(os.getpid(), threading.Lock()):
            self._file.write(text)


@dataclass(frozen=True)
class Trace:
    """A load as it was: what `microbatch.simulation.simulate` wants to know.

    Attributes:
        arrivals: when the jobs came, in order, the first at 0.
        service_time: how many seconds a batch of so many jobs took, by the line of least squares through all of them.
    """

    arrivals: tuple[Arrival, ...]
    service_time: Callable[[int], float]


def read_trace(lines: Iterable[str]) -> Trace:
    """Return what a `TraceRecorder` has written, as an open file or in a list.

    A last line that was cut off, since the file was still being written, is left out.

    Raises:
        ValueError: a line is not of a trace, or there is none.
    """
    if isinstance(lines, (str, bytes)) or not isinstance(lines, Iterable):
        raise TypeError(f"lines must be the lines of a trace, got {shown(lines)}")
    arrivals: list[Arrival] = []
    batches: list[tuple[int, float]] = []
    for number, text in enumerate(_without_half_a_line(list(lines)), 1):
        try:
            line = json.loads(text)
            moments = [_finite(moment) for moment in line["submitted"]]
            weights = [
                check_number("weights", weight, below=_ENDLESS) for weight in line.get("weights", [1.0] * len(moments))
            ]
            batches.append((len(moments), check_number("service_time", line["service_time"], below=_ENDLESS)))
            pairs = zip(moments, weights, strict=True)
            arrivals += [Arrival(moment, line.get("key"), weight) for moment, weight in pairs]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"line {number} must be one of a trace, got {shown(text)} ({error!r})") from None
    if not arrivals:
        raise ValueError("a trace must have at least one job")
    first = min(arrival.moment for arrival in arrivals)
    arrivals.sort(key=lambda arrival: arrival.moment)
    return Trace(tuple(arrival._replace(moment=arrival.moment - first) for arrival in arrivals), _line(batches))


def _without_half_a_line(lines: list[str]) -> list[str]:
    if len(lines) > 1:
        try:
            json.loads(lines[-1])
        except (ValueError, RecursionError):
            return lines[:-1]
    return lines


def _finite(moment: Any) -> float:
    number = check_answer("submitted", moment)  # of a clock that starts anywhere, maybe below zero
    check_number("submitted", abs(number), below=_ENDLESS)
    return number


def _line(batches: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    sizes, times = zip(*batches)
    fixed, each = statistics.median(times), 0.0  # where all are of one size, or the larger ones were faster
    if len(set(sizes)) > 1:
        slope, intercept = statistics.linear_regression(sizes, times)
        if slope > 0:
            fixed, each = max(0.0, intercept), slope if intercept > 0 else sum(times) / sum(sizes)
    return lambda size: fixed + each * size
