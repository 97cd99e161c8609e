"""Interpreter exit: every accepted job is processed, and then the process ends."""

import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from microbatch import Batcher

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parent.parent / "docs" / "shutdown.rst").read_text(encoding="utf-8")

HEAD = """
import os, signal, sys, threading
from microbatch import Batcher, BatcherClosed, Interval, Size
def processor(jobs):
    print(*jobs)
    return jobs
"""


def run(script: str, directory: Path | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=directory)
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
        (
            "b = Batcher(processor, Size(9)); t = threading.Thread(target=lambda: b.submit(1) and 1 / 0); t.start(); t.join()",
            0,
        ),
    ],
    ids=["plain", "sys.exit", "exception", "interval", "thread", "workers", "exception in a thread"],
)
def test_a_forgotten_shutdown_loses_no_job(script: str, status: int) -> None:
    code, out, err = run(script)
    assert (status, "1\n") == (code, out), err


def test_several_batchers_with_full_queues_and_slow_processors_are_drained_at_exit() -> None:
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


def test_a_job_that_a_processor_submits_at_exit_is_refused_and_the_process_does_not_hang() -> None:
    script = """
    def submit_another(jobs):
        try:
            b.submit(2)
        except RuntimeError as error:
            print(type(error).__name__)
        return jobs
    b = Batcher(submit_another, Size(9)); b.submit(1)
    """
    assert (0, "BatcherClosed\n", "") == run(script)


def test_the_first_job_of_a_batcher_is_refused_at_exit() -> None:
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


def test_a_processor_that_hangs_delays_the_exit_no_longer_than_the_exit_timeout() -> None:
    script = """
    import logging
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
    def hang(jobs):
        threading.Event().wait()
    b = Batcher(hang, Size(1), exit_timeout=0.2, name="inserts")
    futures = [b.submit(number) for number in range(3)]
    futures[0].add_done_callback(lambda future: print(type(future.exception()).__name__, future.exception()))
    """
    code, out, err = run(script)
    assert (0, "") == (code, err)
    assert "BatcherClosed the interpreter exited before the job was done\n" in out
    assert (
        "inserts" in out
        and "lost 3 jobs: the interpreter stopped waiting for them at exit" in out
        and "NoneType" not in out
    )


@pytest.mark.parametrize(
    "shutdown",
    ["import atexit; atexit.register(b.shutdown)", "threading.Thread(target=b.shutdown).start()"],
    ids=["in an atexit function", "in another thread"],
)
def test_a_shutdown_at_exit_does_not_wait_for_jobs_that_were_given_up(shutdown: str) -> None:
    script = """
    import logging
    logging.disable()
    b = Batcher(lambda jobs: threading.Event().wait(), exit_timeout=0.2)
    b.submit(1)
    """
    assert (0, "", "") == run(textwrap.dedent(script) + shutdown)


def test_ctrl_c_inside_a_with_block_settles_all_accepted_jobs() -> None:
    script = """
    def settled(future):
        print("done" if future.exception() is None else "failed")
    with Batcher(processor, Size(9)) as b:
        b.submit(1).add_done_callback(settled)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(20)
    """
    code, out, err = run(script)
    assert ("1\ndone\n", True) == (out, "KeyboardInterrupt" in err)


def test_the_batcher_of_an_imported_module_is_drained_at_exit(tmp_path: Path) -> None:
    (tmp_path / "inserts.py").write_text(
        "from microbatch import *\nbatcher = Batcher(lambda jobs: print(*jobs), Size(9))"
    )
    assert (0, "1\n", "") == run("import inserts; inserts.batcher.submit(1); del inserts", tmp_path)


def test_a_batcher_created_in_a_thread_that_has_ended_is_drained_at_exit() -> None:
    script = """
    def work():
        global b
        b = Batcher(processor, Size(9))
        b.submit(1)
    thread = threading.Thread(target=work); thread.start(); thread.join()
    """
    assert (0, "1\n", "") == run(script)


def test_a_blocked_submit_raises_at_exit_and_the_accepted_jobs_are_processed() -> None:
    script = """
    full, refused = threading.Event(), threading.Event()
    def slow(jobs):
        refused.wait()
        return processor(jobs)
    def submit_too_many():
        for number in (1, 2):
            b.submit(number)
        full.set()
        try:
            b.submit(3)
        except BatcherClosed as error:
            print(error, flush=True)
            refused.set()
    b = Batcher(slow, Size(1), max_pending=1)
    threading.Thread(target=submit_too_many).start()
    full.wait()
    """
    assert (0, "the batcher is shut down\n1\n2\n", "") == run(script)


def test_each_batcher_has_its_own_exit_timeout() -> None:
    script = """
    released = threading.Event()
    def hang(jobs):
        threading.Event().wait()
    def outcome(future):
        print(future.job, "failed" if future.exception() else "done")
        if future.job == "second":
            released.set()
    batchers = [
        Batcher(lambda jobs: released.wait() and jobs, exit_timeout=3600, name="third"),
        Batcher(hang, exit_timeout=0.3, name="second"),
        Batcher(hang, exit_timeout=0.1, name="first"),
    ]
    for batcher, name in zip(batchers, ("third", "second", "first")):
        batcher.submit(name).add_done_callback(outcome)
    """
    code, out, err = run(script)
    assert (0, "first failed\nsecond failed\nthird done\n") == (code, out), err


def test_jobs_in_a_slow_supplied_executor_fail_after_the_exit_timeout_but_python_waits_for_it() -> None:
    script = """
    from concurrent.futures import ThreadPoolExecutor
    started, released = threading.Event(), threading.Event()
    def slow(jobs):
        started.set()
        released.wait()
        return processor(jobs)
    def outcome(future):
        print(type(future.exception()).__name__, flush=True)
        released.set()
    b = Batcher(slow, exit_timeout=0.1, executor=ThreadPoolExecutor(1))
    b.submit(1).add_done_callback(outcome)
    started.wait()
    """
    code, out, err = run(script)
    assert (0, "BatcherClosed\n1\n") == (code, out), err


def test_an_executor_imported_after_the_first_job_runs_its_jobs_at_exit() -> None:
    script = """
    first = Batcher(processor)
    first.submit(0).result()
    assert "concurrent.futures.process" not in sys.modules
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    pool.submit(int).result()  # from Python 3.12 on, no process can be started at exit
    second = Batcher(list, Size(9), executor=pool)
    for job in (1, 2):
        second.submit(job).add_done_callback(lambda future: print(future.result().value))
    """
    assert (0, "0\n1\n2\n", "") == run(script)


def test_many_batchers_need_one_exit_hook() -> None:
    def hooks() -> int:
        return len(threading._threading_atexits)  # type: ignore[attr-defined]

    def use_another_batcher() -> None:
        with Batcher[int, int](list) as batcher:
            batcher.submit(1).result(timeout=10)

    use_another_batcher()
    before = hooks()
    for _ in range(5):
        use_another_batcher()
    assert before == hooks()


def test_lost_jobs_are_reported_once_at_exit_however_many_kinds_of_executors_there_are() -> None:
    script = """
    from microbatch.testing import InlineExecutor
    def hang(jobs):
        threading.Event().wait()
    inline = Batcher(processor, executor=InlineExecutor())
    inline.submit(1)
    b = Batcher(hang, exit_timeout=0.1)
    b.submit(2)
    """
    code, out, err = run(script)
    assert (0, "1\n", 1) == (code, out, err.count(" lost ")), err


def test_sigterm_drains_nothing_unless_the_lines_from_the_docs_turn_it_into_an_exit() -> None:
    three_lines = re.search(
        r"three lines in the main thread to turn it into a\nnormal exit:\n\n.*\n\n((?:    .*\n)+)", PAGE
    )
    assert three_lines is not None
    script = """
    b = Batcher(processor, Size(9))
    b.submit(1)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
    """
    assert (-signal.SIGTERM, "", "") == run(script)
    assert (0, "1\n", "") == run(textwrap.dedent(three_lines[1]) + textwrap.dedent(script))


def test_sigterm_turned_into_an_exit_drains_a_with_block() -> None:
    script = """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(5))
    with Batcher(processor, Size(9)) as b:
        b.submit(1)
        b.add_shutdown_callback(lambda: print("ended"))
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()
    """
    assert (5, "1\nended\n", "") == run(script)


def test_ctrl_c_at_exit_stops_the_wait_and_a_second_one_leaves_no_future_unsettled() -> None:
    script = """
    interrupted = threading.Event()
    def hang(jobs):
        threading.Event().wait()
    def interrupt_at_the_end():
        try:
            for number in range(3, 9):
                b.submit(number)
        except BatcherClosed:
            while not interrupted.wait(0.1):  # a signal just before the wait does not interrupt it
                os.kill(os.getpid(), signal.SIGINT)
    def outcome(future):
        interrupted.set()
        print(future.job, type(future.exception()).__name__, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
    b = Batcher(hang, Size(1), max_pending=2)
    for number in (1, 2):
        b.submit(number).add_done_callback(outcome)
    threading.Thread(target=interrupt_at_the_end, daemon=True).start()
    """
    code, out, err = run(script)
    assert (0, "1 BatcherClosed\n2 BatcherClosed\n") == (code, out), err
    assert "KeyboardInterrupt" in err and "the interpreter stopped waiting for them at exit" in err


def test_ctrl_c_while_jobs_are_given_up_at_exit_leaves_no_future_unsettled() -> None:
    script = """
    told = []
    def interrupt(frame, event, argument):
        if frame.f_code.co_name == "_run_callbacks":
            told.append(frame)
            if len(told) == 2:
                sys.settrace(None)
                raise KeyboardInterrupt
    b = Batcher(lambda jobs: threading.Event().wait(), exit_timeout=0)
    for number in range(3):
        b.submit(number).add_done_callback(lambda future: print(future.job, type(future.exception()).__name__))
    sys.settrace(interrupt)
    """
    code, out, err = run(script)
    assert [f"{number} BatcherClosed" for number in range(3)] == sorted(out.splitlines()), err
    assert "KeyboardInterrupt" in err


def test_ctrl_c_as_the_exit_begins_gives_up_the_jobs_and_reports_them() -> None:
    script = """
    def interrupt(frame, event, argument):
        if frame.f_code.co_name == "check_for_fork":
            sys.settrace(None)
            raise KeyboardInterrupt
    b = Batcher(lambda jobs: threading.Event().wait())
    b.submit(1).add_done_callback(lambda future: print(type(future.exception()).__name__))
    sys.settrace(interrupt)
    """
    code, out, err = run(script)
    assert "BatcherClosed\n" == out, err
    assert "lost 1 jobs" in err


def test_a_clock_that_raises_at_exit_fails_only_the_jobs_of_its_own_batcher() -> None:
    script = """
    import logging, os, time
    logging.disable()
    class Clock:
        broken = False
        def now(self):
            if self.broken:
                raise OSError("no clock")
            return time.monotonic()
        def wait_until(self, condition, moment):
            condition.wait()
    def show(future):
        os.write(1, f"{future.state.name}\\n".encode())
    batchers = [Batcher(lambda jobs: jobs, Size(9), clock=clock) for clock in (Clock(), None)]
    for batcher in batchers:
        batcher.submit("job").add_done_callback(show)
    Clock.broken = True
    """
    assert ["FAILED", "SUCCEEDED"] == sorted(run(script)[1].split())
