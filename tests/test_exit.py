"""The end of the interpreter: every accepted job is processed, and then the process ends."""

import subprocess
import sys
import textwrap
from typing import Tuple

import pytest

HEAD = """
import sys, threading
from microbatch import Batcher, Interval, Size
def processor(jobs):
    print(*jobs)
    return jobs
"""


def run(script: str) -> Tuple[int, str, str]:
    command = [sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "script, status",
    [
        ("b = Batcher(processor, Size(9)); b.submit(1)", 0),
        ("b = Batcher(processor, Size(9)); b.submit(1); sys.exit(3)", 3),
        ("b = Batcher(processor, Size(9)); b.submit(1); raise KeyError", 1),
        ("b = Batcher(processor, Interval(3600)); b.submit(1)", 0),
        (
            "t = threading.Thread(target=lambda: globals().update(b=Batcher(processor, Size(9)))); t.start(); t.join(); b.submit(1)",
            0,
        ),
        ("b = Batcher(processor, Size(9), max_workers=4); b.submit(1)", 0),
    ],
    ids=["plain", "sys.exit", "exception", "interval", "thread", "workers"],
)
def test_a_forgotten_shutdown_loses_nothing(script: str, status: int) -> None:
    code, out, err = run(script)
    assert (status, "1\n") == (code, out), err


def test_an_executor_whose_module_was_imported_late_still_does_its_jobs() -> None:
    script = """
    early = Batcher(processor)
    early.submit(1).result()
    from concurrent.futures import ProcessPoolExecutor
    pool = ProcessPoolExecutor(1)
    pool.submit(abs, -2).result()  # CPython 3.12 starts no process once the interpreter is going down
    late = Batcher(abs_all, Size(9), executor=pool)
    late.submit(-2).add_done_callback(lambda future: print(future.result().value))
    """
    assert (0, "1\n2\n", "") == run(
        "def abs_all(jobs):\n    return [abs(job) for job in jobs]\n" + textwrap.dedent(script)
    )


def test_several_batchers_with_full_queues_and_slow_processors_are_drained() -> None:
    script = """
    import time
    def slow(jobs):
        time.sleep(0.01)
        print("".join(f"{job}\\n" for job in jobs), end="")
    batchers = [Batcher(slow, Size(2), max_workers=2) for _ in range(3)]
    for number in range(21):
        for batcher in batchers:
            batcher.submit(number)
    """
    code, out, err = run(script)
    assert (0, sorted([*range(21)] * 3)) == (code, sorted(map(int, out.split()))), err


def test_a_job_that_a_processor_submits_at_the_end_is_refused_and_nothing_hangs() -> None:
    script = """
    def again(jobs):
        try:
            b.submit(2)
        except RuntimeError as error:
            print(type(error).__name__)
        return jobs
    b = Batcher(again, Size(9)); b.submit(1)
    """
    assert (0, "BatcherClosed\n", "") == run(script)


def test_a_first_job_that_comes_too_late_is_refused() -> None:
    script = """
    import atexit
    b = Batcher(processor)
    def late():
        try:
            b.submit(1)
        except RuntimeError as error:
            print(type(error).__name__)
    atexit.register(late)
    """
    assert (0, "BatcherClosed\n", "") == run(script)


def test_a_processor_that_never_returns_does_not_hold_up_the_end_for_longer_than_it_may() -> None:
    script = """
    import logging
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
    def dead(jobs):
        threading.Event().wait()
    b = Batcher(dead, Size(1), exit_timeout=0.2, name="inserts")
    futures = [b.submit(number) for number in range(3)]
    futures[0].add_done_callback(lambda future: print(type(future.exception()).__name__, future.exception()))
    """
    code, out, err = run(script)
    assert (0, "") == (code, err)
    assert "BatcherClosed the interpreter went down before the job was done\n" in out
    assert (
        "inserts" in out
        and "lost 3 jobs: the interpreter did not wait for them any longer" in out
        and "NoneType" not in out
    )


@pytest.mark.parametrize(
    "shutdown",
    ["import atexit; atexit.register(b.shutdown)", "threading.Thread(target=b.shutdown).start()"],
    ids=["in an atexit function", "in another thread"],
)
def test_a_shutdown_does_not_wait_for_what_the_end_of_the_interpreter_has_given_up(shutdown: str) -> None:
    script = """
    import logging
    logging.disable()
    b = Batcher(lambda jobs: threading.Event().wait(), exit_timeout=0.2)
    b.submit(1)
    """
    assert (0, "", "") == run(textwrap.dedent(script) + shutdown)


def test_ctrl_c_inside_a_with_block_settles_all_that_was_accepted() -> None:
    script = """
    import os, signal
    def settled(future):
        print("done" if future.exception() is None else "failed")
    with Batcher(processor, Size(9)) as b:
        b.submit(1).add_done_callback(settled)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(20)
    """
    code, out, err = run(script)
    assert ("1\ndone\n", True) == (out, "KeyboardInterrupt" in err)
