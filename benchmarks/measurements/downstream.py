"""What the batches are sent to, where a measurement needs it to take time: 5 ms for a call and 20 µs for a job."""

import statistics
import threading
import time

CALL = 0.005
JOB = 0.000_020


class Downstream:
    """A processor that waits as long as a real one would, and notes when each call ended.

    It serves *at_once* calls at a time and lets others queue, so that a contender which starts a thread per batch can't
    do more than the others. A call takes *call* seconds, and 20 µs more for each job. `time.sleep` is always late by
    about the same; that is measured first, and taken off.

    Attributes:
        calls: for each call the moment of its end, by `time.perf_counter`, and its jobs.
        limit: how many jobs a second it can do at most, in calls of the given size.
    """

    def __init__(self, at_once: int, size: int, call: float = CALL) -> None:
        self._places = threading.Semaphore(at_once)
        self._call = call
        self._late = min(_lateness(), call / 10)
        self.calls: list[tuple[float, list[bytes]]] = []
        self.limit = at_once * size / (call + JOB * size)

    def __call__(self, jobs: list[bytes]) -> list[bytes]:
        with self._places:
            time.sleep(self._call + JOB * len(jobs) - self._late)
        self.calls.append((time.perf_counter(), jobs))
        return jobs

    @property
    def mean_batch(self) -> float:
        """Return how many jobs a call had on average."""
        return statistics.mean(len(jobs) for _, jobs in self.calls)


def _lateness() -> float:
    late = []
    for _ in range(20):
        start = time.perf_counter()
        time.sleep(0.001)
        late.append(time.perf_counter() - start - 0.001)
    return statistics.median(late)
