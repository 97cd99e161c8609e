"""Batchers in subinterpreters, including isolated ones, which have no daemon threads."""

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="before Python 3.12, there are no isolated subinterpreters"
)

HEAD = """
import sys, textwrap
if sys.version_info >= (3, 13):
    import _interpreters
    create = _interpreters.create
else:
    import _xxsubinterpreters as _interpreters
    create = lambda config: _interpreters.create(isolated=config == "isolated")

def run_inside(config, script):
    interpreter = create(config)
    failure = _interpreters.run_string(interpreter, textwrap.dedent(script))
    assert failure is None, failure
    _interpreters.destroy(interpreter)
    print("destroyed", flush=True)
"""

SETUP = """
from concurrent.futures import ThreadPoolExecutor
import threading
from microbatch import Batcher, BatcherClosed, Interval, Size

def show(jobs):
    print("".join(f"{job}\\n" for job in jobs), end="", flush=True)  # in one call, since several threads may print
    return jobs
"""


def run(config: str, script: str) -> "tuple[int, str, str]":
    """Run *script* in a subinterpreter, then destroy the subinterpreter."""
    inside = SETUP + textwrap.dedent(script)
    command = [sys.executable, "-c", f"{HEAD}\nrun_inside({config!r}, {inside!r})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(params=["isolated", "legacy"])
def config(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_batcher_works_in_a_subinterpreter(config: str) -> None:
    script = """
    with Batcher(lambda jobs: [job * 2 for job in jobs], Size(2), max_workers=2) as batcher:
        futures = [batcher.submit(number) for number in range(5)]
    print(*(future.result().value for future in futures))
    print([thread.name for thread in threading.enumerate() if thread.name.startswith("microbatch")])
    """
    assert (0, "0 2 4 6 8\n[]\ndestroyed\n", "") == run(config, script)


def test_waiting_jobs_are_processed_before_a_subinterpreter_ends(config: str) -> None:
    script = """
    held = Batcher(show, Size(9), max_workers=2)
    held.submit("held")
    later = Batcher(show, Interval(3600))
    later.submit("later")
    """
    code, out, err = run(config, script)
    assert (0, ["destroyed", "held", "later"], "") == (code, sorted(out.splitlines()), err)


def test_a_subinterpreter_ends_only_after_the_running_batch(config: str) -> None:
    script = """
    def slow(jobs):
        started.set()
        threading.Event().wait(0.2)
        return show(jobs)
    started = threading.Event()
    batcher = Batcher(slow, Size(1))
    for number in range(3):
        batcher.submit(number)
    started.wait()
    """
    assert (0, "0\n1\n2\ndestroyed\n", "") == run(config, script)


@pytest.mark.parametrize("runs", [True, False])
def test_at_the_exit_timeout_of_a_subinterpreter_jobs_fail_but_a_running_batch_is_waited_for(
    runs: bool,
) -> None:
    script = f"""
    import logging
    logging.disable()
    def slow(jobs):
        running.set()
        failed.wait()
        return show(jobs)
    def outcome(future):
        print(type(future.exception()).__name__, flush=True)
        failed.set()
    class Clock:  # an exit timeout of 0 runs out as soon as the exit begins
        def now(self):
            return 0.0
        def wait_until(self, condition, moment):
            condition.wait()
    running, failed = threading.Event(), threading.Event()
    batcher = Batcher(slow, Interval(0 if {runs} else 9), exit_timeout=0, clock=Clock())
    batcher.submit("job").add_done_callback(outcome)
    if {runs}:
        running.wait()
    """
    expected = "BatcherClosed\n" + "job\n" * runs + "destroyed\n"
    assert (0, expected, "") == run("isolated", script)


def test_a_supplied_executor_works_in_a_subinterpreter(config: str) -> None:
    if config == "isolated" and sys.version_info < (3, 13):
        pytest.skip("before Python 3.13, a ThreadPoolExecutor alone crashes the interpreter")
    script = """
    with ThreadPoolExecutor(1) as pool, Batcher(show, Size(2), executor=pool) as batcher:
        batcher.submit(1), batcher.submit(2)
    """
    assert (0, "1\n2\ndestroyed\n", "") == run(config, script)


def test_the_end_of_a_subinterpreter_does_not_affect_a_batcher_of_the_main_interpreter() -> None:
    script = """
    from microbatch import Batcher, Size
    batcher = Batcher(lambda jobs: [job * 2 for job in jobs], Size(9))
    future = batcher.submit(1)
    run_inside("isolated", "from microbatch import Batcher; Batcher(list).submit(1)")
    print(batcher.flush(), future.result().value, batcher.shutdown())
    """
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(script)], capture_output=True, text=True, timeout=30
    )
    assert (0, "destroyed\nTrue 2 True\n", "") == (done.returncode, done.stdout, done.stderr)
