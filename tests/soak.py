"""A soak test: uses three batchers for an hour, the way a server does.

Run it with ``python -m tests.soak --minutes 60`` (Linux only). The load changes from round to round: the number of
callers, what they do, and how the downstream system fails. That system is a separate process. It breaks connections,
answers nonsense, is slow, or is killed and comes back. Some callers are clients of a socket server, and may disconnect
without reading the results. In each round, a child process is forked, and uses the batchers too.

After each round, no job is left. Then the counts of ``stats()`` must equal the callers' own counts, and the memory, the
threads and the file descriptors of the process are measured. At the end, the command fails if one of them has grown.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import csv
import gc
import json
import logging
import os
import random
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from microbatch import (
    Adaptive,
    BacklogFull,
    Batcher,
    BatcherClosed,
    BatchListener,
    Interval,
    JobFuture,
    JobState,
    Natural,
    ResultCountError,
    Size,
)
from microbatch.processors import bisecting

ROOT = Path(__file__).parent.parent
MODES = ("healthy", "healthy", "slow", "failing", "gone")
CALLERS = (1, 2, 4, 8, 16, 32)

_numbers = count(1)  # each job is a number of its own


class Sample(NamedTuple):
    """One round, and the size of the process after it, when no job is left."""

    minutes: float  # when the round began
    jobs: int
    callers: int
    mode: str
    megabytes: float  # in memory
    objects: int  # that the garbage collector knows
    threads: int
    descriptors: int


# -- the downstream system --


def is_bad(job: int) -> bool:
    """Return whether the downstream system refuses this job."""
    return job % 50 == 0


class DownstreamHandler(socketserver.StreamRequestHandler):
    """Answers each batch, a line of JSON, with another line. A line of text selects how it fails from then on."""

    mode = "healthy"
    dice = random.Random(0)

    def handle(self) -> None:
        """See `socketserver.BaseRequestHandler`."""
        for line in self.rfile:
            request = json.loads(line)
            if isinstance(request, str):
                DownstreamHandler.mode = request
                continue
            fault = self.dice.random() if self.mode == "failing" else 1.0
            if fault < 0.1:
                return  # closes the connection without an answer
            if self.mode == "slow":
                time.sleep(self.dice.uniform(0, 0.02))
            answer: Any = [None if is_bad(job) else 7 * job for job in request]
            if fault < 0.2:
                answer = answer[1:]
            elif fault < 0.3:
                answer = "out of order"
            self.wfile.write(json.dumps(answer).encode() + b"\n")


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A server with a thread for each connection."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, path: Path, handler: Callable[..., socketserver.BaseRequestHandler]) -> None:
        super().__init__(str(path), handler)
        self.errors: list[BaseException | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep the exception, unless a client has left."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.errors.append(error)


class Downstream:
    """The process of the downstream system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, and wait until it accepts connections."""
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen([sys.executable, "-m", "tests.soak", "--serve", str(self.path)], cwd=ROOT)
        while True:
            try:
                return connect(self.path).close()
            except OSError:
                time.sleep(0.01)

    def set_mode(self, mode: str) -> None:
        """Let it fail in this way from now on."""
        with contextlib.closing(connect(self.path)) as connection:
            connection.sendall(json.dumps(mode).encode() + b"\n")

    def kill(self) -> None:
        """Kill the process."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def connect(path: Path) -> socket.socket:
    """Return a connection to the server with this socket."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(10)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


class DownstreamProcessor:
    """A processor that sends each batch to the downstream system. It connects again after an error, and after a fork.

    Args:
        path: The socket of the downstream system.
        strict: Whether a bad job fails the whole batch.
    """

    def __init__(self, path: Path, strict: bool = False) -> None:
        self._path = path
        self._strict = strict
        # The open connections that no batch uses now, for each process, because a child can't share them.
        self._idle: defaultdict[int, deque[socket.socket]] = defaultdict(deque)

    def __call__(self, jobs: list[int]) -> list[Any]:
        idle = self._idle[os.getpid()]
        try:
            connection = idle.pop()
        except IndexError:
            connection = connect(self._path)
        try:
            connection.sendall(json.dumps(jobs).encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline()
            if not line:
                raise ConnectionResetError("the downstream system has closed the connection")
        except OSError:
            connection.close()
            raise
        idle.append(connection)
        answer = json.loads(line)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        if self._strict and None in answer:
            raise ValueError("refused")
        return [ValueError("refused") if value is None else value for value in answer]

    def close(self) -> None:
        """Close the connections that no batch uses now."""
        idle = self._idle[os.getpid()]
        while idle:
            idle.pop().close()


def multiply(jobs: list[int]) -> list[int]:
    """Process a batch without the downstream system."""
    return [7 * job for job in jobs]


# -- the batchers, and the counts of their callers --


class CheckedBatcher(BatchListener):
    """A batcher, what its callers know about their jobs, and how many batches have started and finished."""

    def __init__(self, processor: Callable[[list[int]], Any], *policy: Any, **options: Any) -> None:
        self.inner: Batcher[int, Any] = Batcher(processor, *policy, listeners=[self], **options)
        self._changed = threading.Condition()
        self.accepted = 0
        self.settled: Counter[JobState] = Counter()
        self.started = self.finished = 0

    def renew_lock(self) -> None:
        """Replace the lock in a child process, because another thread may have held it during the fork."""
        self._changed = threading.Condition()

    def submit(self, **options: Any) -> JobFuture[Any]:
        """Submit a new job."""
        future = self.inner.submit(next(_numbers), **options)
        with self._changed:
            self.accepted += 1
        future.add_done_callback(self._count)
        return future

    def _count(self, future: Any) -> None:
        with self._changed:
            self.settled[future.state] += 1
            self._changed.notify_all()

    def batch_started(self, event: Any) -> None:
        """See `BatchListener`."""
        with self._changed:
            self.started += 1

    def batch_finished(self, event: Any) -> None:
        """See `BatchListener`."""
        with self._changed:
            self.finished += 1
            self._changed.notify_all()

    def check(self) -> None:
        """Check that all jobs are settled, and that the batcher has the same counts.

        The last callbacks and listeners may be called just after the last job is settled, so this waits for them.
        """
        stats = self.inner.stats()
        counts = Counter({state: getattr(stats, state.value) for state in JobState})
        assert stats.accepted == self.accepted == counts.total(), f"{stats}, but {self.accepted} were accepted"
        with self._changed:
            self._changed.wait_for(lambda: counts == self.settled and self.finished == stats.batches, timeout=10)
            assert counts == self.settled, f"{stats}, but the outcomes are {self.settled}"
            assert self.started == self.finished == stats.batches, f"{stats.batches}, {self.started}, {self.finished}"


def check_outcome(future: Any, timeout: float | None = 60) -> None:
    """Wait for a job, and check that its outcome is its own."""
    try:
        value = future.result(timeout=timeout).value
    except (OSError, RuntimeError, ResultCountError, concurrent.futures.CancelledError):
        pass  # the downstream system has failed, or the job has expired or was cancelled
    except ValueError:
        assert is_bad(future.job), f"job {future.job} was not refused"
    else:
        assert value == 7 * future.job, f"job {future.job} has the result {value}"


# -- what callers do --


class Caller:
    """Does one thing after another until the round ends, as one of many threads."""

    def __init__(self, batchers: list[CheckedBatcher], front: Path, end: float) -> None:
        self._batchers = batchers
        self._front = front
        self._end = end
        self._dice = random.Random()
        self.error: BaseException | None = None

    def __call__(self) -> None:
        actions = [self.submit_one] * 4 + [self.submit_many] * 4 + [self.use_server] * 2
        actions += [self.cancel, self.expire, self.leave, self.wait, self.map, self.use_asyncio, self.use_another]
        try:
            while time.monotonic() < self._end:
                with contextlib.suppress(BacklogFull):
                    self._dice.choice(actions)(self._dice.choice(self._batchers))
        except BaseException as error:
            self.error = error

    def submit_one(self, batcher: CheckedBatcher) -> None:
        """Wait for one job after another."""
        for _ in range(10):
            check_outcome(batcher.submit())

    def submit_many(self, batcher: CheckedBatcher) -> None:
        """Submit many jobs, and then wait for all of them."""
        for future in [batcher.submit() for _ in range(self._dice.choice([5, 50, 200]))]:
            check_outcome(future)

    def use_server(self, batcher: CheckedBatcher) -> None:
        """Send some jobs to the server, and maybe leave without reading the results."""
        jobs = self._dice.choice([1, 5, 20])
        with contextlib.closing(connect(self._front)) as connection, connection.makefile("rb") as answers:
            connection.sendall(b"%d\n" % self._batchers.index(batcher) * jobs)
            if self._dice.random() < 0.8:
                connection.shutdown(socket.SHUT_WR)
                assert answers.read() == b"ok\n" * jobs

    def cancel(self, batcher: CheckedBatcher) -> None:
        """Cancel some jobs, and ignore the others."""
        futures = [batcher.submit() for _ in range(20)]
        for future in futures[::2]:
            assert future.cancel() == future.cancelled()

    def expire(self, batcher: CheckedBatcher) -> None:
        """Let jobs expire, maybe."""
        for future in [batcher.submit(expires_in=self._dice.choice([0, 0.001, 0.05])) for _ in range(20)]:
            check_outcome(future)

    def leave(self, batcher: CheckedBatcher) -> None:
        """Give up quickly, on a full queue and on a result."""
        future = batcher.submit(timeout=0.001)
        with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
            check_outcome(future, timeout=0.001)

    def wait(self, batcher: CheckedBatcher) -> None:
        """Wait for jobs of all batchers with the functions of the standard library."""
        futures = [each.submit() for each in self._batchers for _ in range(5)]
        for future in concurrent.futures.as_completed(futures, timeout=60):
            check_outcome(future)
        assert not concurrent.futures.wait(futures, timeout=60).not_done

    def map(self, batcher: CheckedBatcher) -> None:
        """Read a stream of results from a new batcher, and maybe leave before it ends."""
        with Batcher(multiply, max_pending=10) as other:
            for job, result in enumerate(other.map(range(50), buffersize=20)):
                assert result.value == 7 * job
                if self._dice.random() < 0.02:
                    return

    def use_asyncio(self, batcher: CheckedBatcher) -> None:
        """Await jobs in an event loop."""

        async def use() -> None:
            futures = [batcher.submit() for _ in range(10)]
            await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            for future in futures:
                check_outcome(future, timeout=0)

        asyncio.run(use())

    def use_another(self, batcher: CheckedBatcher) -> None:
        """Use a new batcher, and shut it down before all jobs are processed."""
        other = CheckedBatcher(multiply, Size(3) | Interval(0.001), max_workers=2)
        futures = [other.submit() for _ in range(20)]
        other.inner.shutdown(cancel_futures=self._dice.random() < 0.5)
        for future in futures:
            check_outcome(future, timeout=0)
        with contextlib.suppress(BatcherClosed):
            other.submit()
        other.check()


class Soak:
    """The batchers, the downstream system, and a server whose clients submit jobs."""

    def __init__(self, folder: Path) -> None:
        self._downstream = Downstream(folder / "downstream")
        self._front = folder / "front"
        plain, strict = DownstreamProcessor(self._downstream.path), DownstreamProcessor(
            self._downstream.path, strict=True
        )
        self._processors = plain, strict
        self.batchers = [
            CheckedBatcher(plain),
            CheckedBatcher(
                bisecting(strict, on=ValueError, max_calls=1_000),
                Size(50) | Interval(0.002),
                key=lambda job: job % 7,
                max_workers=4,
                max_pending=64,
            ),
            CheckedBatcher(plain, Adaptive(0.05) | Natural(), max_workers=2, max_pending=1_000),
        ]
        batchers = self.batchers

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    with contextlib.suppress(BacklogFull):
                        check_outcome(batchers[int(line)].submit(timeout=60))
                    self.wfile.write(b"ok\n")

        self._server = UnixServer(self._front, Handler)

    def __enter__(self) -> "Soak":
        self._downstream.start()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="front").start()
        return self

    def __exit__(self, *error: Any) -> None:
        for batcher in self.batchers:
            batcher.inner.shutdown(timeout=60)
        self._server.shutdown()
        self._server.server_close()
        for processor in self._processors:
            processor.close()
        self._downstream.kill()

    def round(self, callers: int, mode: str, seconds: float) -> int:
        """Run this number of callers for some seconds, and return the number of jobs."""
        before = sum(batcher.accepted for batcher in self.batchers)
        self._downstream.kill() if mode == "gone" else self._downstream.set_mode(mode)
        end = time.monotonic() + seconds
        working = [Caller(self.batchers, self._front, end) for _ in range(callers)]
        threads = [threading.Thread(target=caller, name="caller") for caller in working]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        if mode == "gone":
            self._downstream.start()
        self._fork()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a caller waits forever"
        for caller in working:
            if caller.error is not None:
                raise caller.error
        self._settle()
        return sum(batcher.accepted for batcher in self.batchers) - before

    def _fork(self) -> None:
        """Use all batchers in a child process, too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads forks
            child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(60)
            try:
                for batcher in self.batchers:
                    batcher.renew_lock()
                    for future in [batcher.inner.submit(next(_numbers)) for _ in range(20)]:
                        check_outcome(future)
                    batcher.inner.shutdown()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0, "a child process has failed"

    def _settle(self) -> None:
        """Wait until no job and no connection is left, and check the counts."""
        for batcher in self.batchers:
            assert batcher.inner.flush(timeout=60)
        end = time.monotonic() + 60
        while any("process_request" in thread.name for thread in threading.enumerate()):
            assert time.monotonic() < end, "a client is connected forever"
            time.sleep(0.01)
        for processor in self._processors:
            processor.close()
        assert self._server.errors == []
        for batcher in self.batchers:
            batcher.check()


def measure(minutes: float, jobs: int, callers: int, mode: str) -> Sample:
    """Measure this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    threads, descriptors = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
    return Sample(minutes, jobs, callers, mode, megabytes, len(gc.get_objects()), threads, descriptors)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let nobody print or keep the log of expected failures inside the ``with`` block. Pytest would keep it."""
    logger = logging.getLogger("microbatch")
    before, logger.propagate = logger.propagate, False
    logger.addHandler(nowhere := logging.NullHandler())
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(nowhere)


def soak(seconds: float, max_round: float = 5.0) -> Iterator[Sample]:
    """Yield a sample after each round."""
    dice = random.Random()
    with quiet(), tempfile.TemporaryDirectory() as folder, Soak(Path(folder)) as running:
        started = time.monotonic()
        while (spent := time.monotonic() - started) < seconds:
            callers, mode = dice.choice(CALLERS), dice.choice(MODES)
            jobs = running.round(callers, mode, dice.uniform(max_round / 5, max_round))
            yield measure(spent / 60, jobs, callers, mode)
            time.sleep(dice.choice([0, 0, max_round / 5]))  # idle


def growth(samples: list[Sample], figure: str) -> float:
    """Return by how much the median of a figure in the last quarter of a run exceeds that in the second quarter."""
    quarter = max(1, len(samples) // 4)
    values = [float(getattr(sample, figure)) for sample in samples]
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def read(path: Path) -> list[Sample]:
    """Return the samples that a run has written."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Sample(**{name: kind(row[name]) for name, kind in Sample.__annotations__.items()}) for row in rows]


LIMITS = {"megabytes": 5.0, "objects": 200.0, "threads": 0.0, "descriptors": 0.0}
"""How much each figure may grow. The memory and the objects depend a little on what the last round did."""


def grown(samples: list[Sample]) -> list[str]:
    """Return the figures that have grown by more than their limit."""
    return [name for name, limit in LIMITS.items() if growth(samples, name) > limit]


FIGURES = {
    "megabytes": "memory, MB",
    "objects": "objects that the garbage collector knows",
    "threads": "threads",
    "descriptors": "file descriptors",
    "jobs": "jobs in each round",
}


def plot(samples: list[Sample], path: Path) -> None:
    """Draw all figures over time."""
    from benchmarks.plots import figure

    with figure(path) as drawn:
        drawn.set_size_inches(5.5, 7)
        panels = drawn.subplots(len(FIGURES), sharex=True)
        for axes, (name, label) in zip(panels, FIGURES.items()):
            axes.plot(
                [sample.minutes for sample in samples], [getattr(sample, name) for sample in samples], linewidth=1
            )
            axes.set_title(label, loc="left", size="medium")
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("minutes")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to run (60)")
    parser.add_argument("--output", type=Path, default=Path("build/soak"), help="the folder to write to (build/soak)")
    parser.add_argument("--serve", type=Path, metavar="PATH", help="be the downstream system, with this socket")
    options = parser.parse_args()
    if options.serve:
        UnixServer(options.serve, DownstreamHandler).serve_forever()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "samples.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Sample._fields)
        for sample in soak(options.minutes * 60):
            writer.writerow(sample)  # not kept in memory, which must not grow
            file.flush()
            print(sample, flush=True)
    samples = read(path)
    plot(samples, options.output / "soak.svg")
    print(
        f"{len(samples)} rounds, {sum(sample.jobs for sample in samples):,} jobs. Growth from the second quarter to the last:"
    )
    for name in LIMITS:
        print(f"{FIGURES[name]}: {growth(samples, name):+.1f}")
    if wrong := grown(samples):
        sys.exit(f"{' and '.join(wrong)} grew")


if __name__ == "__main__":
    main()
