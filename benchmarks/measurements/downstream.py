"""A simulated downstream, in which a call takes 5 ms plus 20 µs per job."""

import statistics
import threading
import time

CALL = 0.005
JOB = 0.000_020


class Downstream:
    """A processor that sleeps as long as a call would take, and records when each call ended.

    It serves *at_once* calls at a time, and other calls wait. So a contender that starts a thread per batch can't do
    more than the others. A call takes *call* seconds, plus 20 µs for each job. `time.sleep` always takes too long by
    about the same time, so this measures that time first, and sleeps for a shorter time to compensate.

    Attributes:
        calls: For each call, the moment of its end (of `time.perf_counter`) and its jobs.
        limit: The maximum number of jobs per second, in calls of *size* jobs.
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
        """Return the mean number of jobs per call."""
        return statistics.mean(len(jobs) for _, jobs in self.calls)


def _lateness() -> float:
    late = []
    for _ in range(20):
        start = time.perf_counter()
        time.sleep(0.001)
        late.append(time.perf_counter() - start - 0.001)
    return statistics.median(late)
