"""Uses some batchers for an hour, like a server does: ``python -m tests.soak --minutes 60``. Needs Linux.

The load changes from round to round: the number of callers, what they do, and how the downstream system fails. It is a
process of its own, which breaks connections, answers nonsense, is slow, or is killed and comes back. Some callers are
clients of a server: they connect, send some jobs, and may leave without reading the results. In each round, a child
process is forked, which uses the batchers too.

After each round, no job is left. Then the counts of ``stats()`` must be exactly those of the callers, and the memory,
the threads and the file descriptors of the process are measured. None of them may grow.
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
    """What is measured at the end of a round, when no job is left."""

    minutes: float
    jobs: int  # in this round
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


class Table(socketserver.StreamRequestHandler):
    """Answers each batch, a line of JSON, with another line. A line of text selects how it fails from then on."""

    mode = "healthy"
    dice = random.Random(0)

    def handle(self) -> None:
        """See `socketserver.BaseRequestHandler`."""
        for line in self.rfile:
            request = json.loads(line)
            if isinstance(request, str):
                Table.mode = request
                continue
            fault = self.dice.random() if self.mode == "failing" else 1.0
            if fault < 0.1:
                return  # closes the connection without an answer
            if self.mode == "slow":
                time.sleep(self.dice.uniform(0, 0.02))
            answer: Any = [None if is_bad(job) else 7 * job for job in request]
            if fault < 0.2:
                answer = answer[1:]
            if fault < 0.3:
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
        while not self.path.exists():
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


class Client:
    """A processor that sends each batch to the downstream system. It connects again after an error, and after a fork.

    Args:
        path: The socket of the downstream system.
        strict: Whether a bad job lets the whole batch fail.
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


# -- the batchers and their ledgers --


class Events(BatchListener):
    """Counts the batches that have started and finished."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def batch_started(self, event: Any) -> None:
        """See `BatchListener`."""
        self.counts["started"] += 1

    def batch_finished(self, event: Any) -> None:
        """See `BatchListener`."""
        self.counts["finished"] += 1


class Account:
    """A batcher, and what its callers know about their jobs."""

    def __init__(self, processor: Callable[[list[int]], Any], *policy: Any, **options: Any) -> None:
        self.events = Events()
        self.batcher: Batcher[int, Any] = Batcher(processor, *policy, listeners=[self.events], **options)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.accepted = 0
        self.settled: Counter[JobState] = Counter()

    def submit(self, **options: Any) -> JobFuture[Any]:
        """Submit a new job."""
        future = self.batcher.submit(next(_numbers), **options)
        with self._lock:
            self.accepted += 1
        future.add_done_callback(self._count)
        return future

    def _count(self, future: Any) -> None:
        with self._lock:
            self.settled[future.state] += 1

    def check(self) -> None:
        """Check that all jobs are settled, and that the batcher has the same counts."""
        stats = self.batcher.stats()
        counts = Counter({state: getattr(stats, state.value) for state in JobState})
        assert counts == self.settled and stats.accepted == self.accepted == counts.total(), f"{stats}, {self.settled}"
        assert self.events.counts["started"] == self.events.counts["finished"] == stats.batches, self.events.counts


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

    def __init__(self, accounts: list[Account], front: Path, end: float) -> None:
        self._accounts = accounts
        self._front = front
        self._end = end
        self._dice = random.Random()
        self.error: BaseException | None = None

    def __call__(self) -> None:
        actions = [self.submit_one] * 4 + [self.submit_many] * 4 + [self.connect] * 2
        actions += [self.cancel, self.expire, self.leave, self.wait, self.map, self.use_asyncio, self.use_another]
        try:
            while time.monotonic() < self._end:
                with contextlib.suppress(BacklogFull):
                    self._dice.choice(actions)(self._dice.choice(self._accounts))
        except BaseException as error:
            self.error = error

    def submit_one(self, account: Account) -> None:
        """Wait for one job after another."""
        for _ in range(10):
            check_outcome(account.submit())

    def submit_many(self, account: Account) -> None:
        """Submit many jobs, and then wait for all of them."""
        for future in [account.submit() for _ in range(self._dice.choice([5, 50, 200]))]:
            check_outcome(future)

    def connect(self, account: Account) -> None:
        """Send some jobs to the server, and maybe leave without reading the results."""
        jobs = self._dice.choice([1, 5, 20])
        with contextlib.closing(connect(self._front)) as connection, connection.makefile("rb") as answers:
            connection.sendall(b"%d\n" % self._accounts.index(account) * jobs)
            if self._dice.random() < 0.8:
                connection.shutdown(socket.SHUT_WR)
                assert answers.read() == b"ok\n" * jobs

    def cancel(self, account: Account) -> None:
        """Cancel some jobs, and never look at others."""
        futures = [account.submit() for _ in range(20)]
        for future in futures[::2]:
            assert future.cancel() == future.cancelled()

    def expire(self, account: Account) -> None:
        """Let jobs expire, maybe."""
        for future in [account.submit(expires_in=self._dice.choice([0, 0.001, 0.05])) for _ in range(20)]:
            check_outcome(future)

    def leave(self, account: Account) -> None:
        """Don't wait long: neither for room in the queue nor for a result."""
        future = account.submit(timeout=0.001)
        with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
            check_outcome(future, timeout=0.001)

    def wait(self, account: Account) -> None:
        """Wait for jobs of all batchers with the functions of the standard library."""
        futures = [each.submit() for each in self._accounts for _ in range(5)]
        for future in concurrent.futures.as_completed(futures, timeout=60):
            check_outcome(future)
        assert not concurrent.futures.wait(futures, timeout=60).not_done

    def map(self, account: Account) -> None:
        """Read a stream of results from a new batcher, and maybe leave before it ends."""
        with Batcher(multiply, max_pending=10) as batcher:
            for job, result in enumerate(batcher.map(range(50), buffersize=20)):
                assert result.value == 7 * job
                if self._dice.random() < 0.02:
                    return

    def use_asyncio(self, account: Account) -> None:
        """Await jobs in an event loop."""

        async def use() -> None:
            futures = [account.submit() for _ in range(10)]
            await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            for future in futures:
                check_outcome(future, timeout=0)

        asyncio.run(use())

    def use_another(self, account: Account) -> None:
        """Use a new batcher, and shut it down before all jobs are processed."""
        other = Account(multiply, Size(3) | Interval(0.001), max_workers=2)
        futures = [other.submit() for _ in range(20)]
        other.batcher.shutdown(cancel_futures=self._dice.random() < 0.5)
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
        client, strict = Client(self._downstream.path), Client(self._downstream.path, strict=True)
        self._clients = client, strict
        self.accounts = [
            Account(client),
            Account(
                bisecting(strict, on=ValueError, max_calls=1_000),
                Size(50) | Interval(0.002),
                key=lambda job: job % 7,
                max_workers=4,
                max_pending=64,
            ),
            Account(client, Adaptive(0.05) | Natural(), max_workers=2, max_pending=1_000),
        ]
        accounts = self.accounts

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    with contextlib.suppress(BacklogFull):
                        check_outcome(accounts[int(line)].submit(timeout=60))
                    self.wfile.write(b"ok\n")

        self._server = UnixServer(self._front, Handler)

    def __enter__(self) -> "Soak":
        self._downstream.start()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="front").start()
        return self

    def __exit__(self, *error: Any) -> None:
        for account in self.accounts:
            account.batcher.shutdown(timeout=60)
        self._server.shutdown()
        self._server.server_close()
        for client in self._clients:
            client.close()
        self._downstream.kill()

    def round(self, callers: int, mode: str, seconds: float) -> int:
        """Let so many callers work for some seconds, and return the number of jobs."""
        before = sum(account.accepted for account in self.accounts)
        self._downstream.kill() if mode == "gone" else self._downstream.set_mode(mode)
        end = time.monotonic() + seconds
        working = [Caller(self.accounts, self._front, end) for _ in range(callers)]
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
        return sum(account.accepted for account in self.accounts) - before

    def _fork(self) -> None:
        """Use all batchers in a child process, too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads forks
            child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(60)
            try:
                for account in self.accounts:
                    for future in [account.batcher.submit(next(_numbers)) for _ in range(20)]:
                        check_outcome(future)
                    account.batcher.shutdown()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0, "a child process has failed"

    def _settle(self) -> None:
        """Wait until no job and no connection is left, and check the ledgers."""
        for account in self.accounts:
            assert account.batcher.flush(timeout=60)
        end = time.monotonic() + 60
        while any("process_request" in thread.name for thread in threading.enumerate()):
            assert time.monotonic() < end, "a client is connected forever"
            time.sleep(0.01)
        for client in self._clients:
            client.close()
        assert self._server.errors == []
        for account in self.accounts:
            account.check()


def measure(minutes: float, jobs: int, callers: int, mode: str) -> Sample:
    """Measure this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    threads, descriptors = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
    return Sample(minutes, jobs, callers, mode, megabytes, len(gc.get_objects()), threads, descriptors)


def soak(seconds: float, longest: float = 5.0) -> Iterator[Sample]:
    """Yield a sample after each round."""
    dice = random.Random()
    logging.getLogger("microbatch").addHandler(logging.NullHandler())  # of failures that nobody looks at
    with tempfile.TemporaryDirectory() as folder, Soak(Path(folder)) as running:
        started = time.monotonic()
        while (spent := time.monotonic() - started) < seconds:
            callers, mode = dice.choice(CALLERS), dice.choice(MODES)
            jobs = running.round(callers, mode, dice.uniform(longest / 5, longest))
            yield measure(spent / 60, jobs, callers, mode)
            time.sleep(dice.choice([0, 0, longest / 5]))  # idle


def growth(samples: list[Sample], figure: str) -> float:
    """Return by how much a figure was higher at the end than before: the last quarter of a run and its second one."""
    quarter = len(samples) // 4
    values = [float(getattr(sample, figure)) for sample in samples]
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def read(path: Path) -> list[Sample]:
    """Return the samples that a run has written."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Sample(**{name: kind(row[name]) for name, kind in Sample.__annotations__.items()}) for row in rows]


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
        UnixServer(options.serve, Table).serve_forever()
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
    print(f"{len(samples)} rounds, {sum(sample.jobs for sample in samples):,} jobs. Growth, without the first quarter:")
    for name in ("megabytes", "objects", "threads", "descriptors"):
        print(f"{FIGURES[name]}: {growth(samples, name):+.1f}")


if __name__ == "__main__":
    main()
