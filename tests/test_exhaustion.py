"""When memory, the stack, threads or file descriptors run out, calls raise, and the batcher goes on when it can."""

import contextlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import CancelledError, TimeoutError
from typing import Any

import pytest

from microbatch import Batcher, Interval, JobFuture, Size

pytestmark = pytest.mark.slow


def run(program: str) -> None:
    """Run a program in a process of its own, because its limits would also hold for the other tests."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.endswith("the end\n"), done.stdout[-2000:] + done.stderr[-5000:]


# -- the stack --


def frames_left() -> int:
    """Return about how many more functions can be called inside each other."""
    depth, frame = 0, sys._getframe().f_back
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return sys.getrecursionlimit() - depth


def with_frames_left(frames: int, call: Callable[[], object]) -> bool:
    """Call a function when only so many more functions can be called inside each other. Return whether it returned."""

    def descend(more: int) -> None:
        if more > 0:
            descend(more - 1)
        else:
            call()

    try:
        descend(frames_left() - frames - 2)
    except RecursionError:
        return False
    return True


CALLS: dict[str, Callable[[Batcher[Any, Any], JobFuture[Any]], object]] = {
    "submit": lambda batcher, future: batcher.submit("more"),
    "submit with a time limit": lambda batcher, future: batcher.submit("more", timeout=0, expires_in=100),
    "cancel": lambda batcher, future: future.cancel(),
    "result": lambda batcher, future: future.result(timeout=0),
    "add_done_callback": lambda batcher, future: future.add_done_callback(lambda done: None),
    "flush": lambda batcher, future: batcher.flush(timeout=0),
    "stats": lambda batcher, future: batcher.stats(),
    "explain": lambda batcher, future: batcher.explain(),
    "shutdown": lambda batcher, future: batcher.shutdown(timeout=0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("started", [True, False])
def test_a_call_that_finds_the_stack_full_raises_and_loses_no_job(name: str, started: bool) -> None:
    futures: list[JobFuture[Any]] = []
    for frames in range(60):
        batcher: Batcher[Any, Any] = Batcher(lambda jobs: [[job] for job in jobs], Size(2) | Interval(0.001))
        if started:
            future = batcher.submit("job")
            futures.append(future)

        def call() -> None:
            with contextlib.suppress(TimeoutError, CancelledError):
                made = CALLS[name](batcher, future if started else batcher.submit("job"))
                if isinstance(made, JobFuture):
                    futures.append(made)

        complete = with_frames_left(frames, call)
        if name != "shutdown":
            assert batcher.submit("after").result(timeout=10).value == ["after"]
        assert batcher.shutdown(timeout=10)
        assert all(future.done() for future in futures)
    assert complete, "60 frames are enough for each call"


def test_a_processor_that_fills_the_stack_fails_its_batch_only() -> None:
    def processor(jobs: list[Any]) -> Any:
        return processor(jobs) if jobs == ["deep"] else jobs

    with Batcher(processor, Size(1)) as batcher:
        assert isinstance(batcher.submit("deep").exception(timeout=10), RecursionError)
        assert batcher.submit("flat").result(timeout=10).value == "flat"


# -- memory --

MEMORY = """
    import resource, sys
    from microbatch import Batcher, Size

    def limit(more):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
@pytest.mark.parametrize("megabytes", [1, 8, 64])
def test_submit_raises_when_there_is_no_memory_and_all_accepted_jobs_are_processed(megabytes: int) -> None:
    run(MEMORY + f"""
    batcher = Batcher(lambda jobs: [len(job) for job in jobs], Size(1_000), max_pending=0)
    batcher.submit(b"")
    batcher.flush()  # so that all threads run
    futures, refused, left = [], 0, [None] * 100_000
    limit({megabytes} << 20)
    for number in range(100_000):
        try:
            left[number] = batcher.submit(b"x" * 10_000)
        except MemoryError:
            refused += 1
            if refused > 1_000:
                break
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert refused, "the limit was never reached"
    batcher.shutdown()
    outcomes = [future.exception() for future in left if future is not None]
    assert all(error is None or isinstance(error, MemoryError) for error in outcomes)
    print(len(outcomes), "jobs,", refused, "refused,", outcomes.count(None), "processed")
    print("the end")
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_a_batcher_goes_on_after_its_processor_had_no_memory() -> None:
    run(MEMORY + """
    def processor(jobs):
        return [len(bytearray(size)) for size in jobs]

    with Batcher(processor, Size(1)) as batcher:
        assert batcher.submit(1).result().value == 1
        limit(32 << 20)
        for _ in range(100):
            assert isinstance(batcher.submit(1 << 30).exception(timeout=10), MemoryError)
            assert batcher.submit(1_000).result(timeout=10).value == 1_000
    print("the end")
    """)


# -- threads and file descriptors --


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_a_batcher_that_gets_no_thread_fails_its_jobs_and_starts_later() -> None:
    run(MEMORY + """
    import threading
    threading.stack_size(1 << 28)
    limit(1 << 26)
    batcher = Batcher(list, Size(1))
    for _ in range(10):
        try:
            future = batcher.submit(1)
        except RuntimeError as error:
            assert "thread" in str(error), error
        else:
            assert "thread" in str(future.exception(timeout=10)), future.exception()
    threading.stack_size(0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert batcher.submit(2).result(timeout=10).value == 2
    assert batcher.shutdown(timeout=10)
    print("the end")
    """)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of this kind")
def test_a_batcher_needs_no_file_descriptor() -> None:
    run("""
    import os, resource
    from microbatch import DEFAULT_POLICY, Batcher, Size
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    try:
        os.pipe()
    except OSError:
        pass
    else:
        raise AssertionError("there is a file descriptor")
    for policy in (Size(1), DEFAULT_POLICY):
        with Batcher(list, policy) as batcher:
            assert batcher.submit(1).result(timeout=10).value == 1
    print("the end")
    """)
