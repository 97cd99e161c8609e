"""Calls that do not wait for a result never wait for a lock: programs that would deadlock if one did.

A finalizer runs in any thread that collects garbage, which may be a thread of the batcher. If the finalizer wants a lock
of the application, that thread waits until a caller releases the lock. The caller may use the batcher before it
releases the lock, so it must not wait for anything that the thread of the batcher holds.

All programs are correct for a queue whose ``put`` never blocks, such as `queue.SimpleQueue`. They depend on when
garbage is collected, so one run can miss a deadlock. ``LOCK_ORDER_RUNS`` is the number of runs of each program (1). A
program that hangs prints the stacks of all its threads after ``LOCK_ORDER_LIMIT`` seconds (20), and ends.
"""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

RUNS = int(os.environ.get("LOCK_ORDER_RUNS", "1"))
LIMIT = float(os.environ.get("LOCK_ORDER_LIMIT", "20"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT + 20)]

HEAD = f"""
import contextlib, faulthandler, gc, logging, os, random, signal, sys, threading, time
from microbatch import Batcher, Size

faulthandler.dump_traceback_later({LIMIT}, exit=True)
end = time.monotonic() + 0.5
application = set()  # the threads of the application; the others belong to a batcher
lock = threading.RLock()  # a lock of the application

class Cycle:
    def __init__(self, finalizer):
        self.itself, self.finalizer = self, finalizer
    def __del__(self):
        self.finalizer()

def pause_in_threads_of_a_batcher():
    # Does not call `threading.current_thread`, which acquires a lock in a thread that is just starting.
    if threading.get_ident() not in application and time.monotonic() < end:
        time.sleep(0.0002)  # so that another thread takes its lock first

def take_the_lock():
    Cycle(take_the_lock)  # for the next collection
    pause_in_threads_of_a_batcher()
    with lock:
        pass

def started_batcher():
    batcher = Batcher(list, Size(1), max_pending=0)
    batcher.submit("first").result()
    return batcher

def call_until_the_end(function):
    application.add(threading.get_ident())
    while time.monotonic() < end:
        function()

def call_in_two_threads(function, other=None):
    thread = threading.Thread(target=call_until_the_end, args=[other or function])
    thread.start()
    call_until_the_end(function)
    thread.join()

sys.setswitchinterval(1e-5)
gc.freeze()  # exempts the objects that exist now from garbage collection, which takes less time then
"""

# Skips the exit of the interpreter, which would run the finalizers of the last garbage.
END = "\nos._exit(0)\n"


@pytest.fixture(autouse=True, params=range(1, RUNS + 1))
def repeat() -> None:
    """Run each test `RUNS` times."""


def run(program: str) -> None:
    """Run *program*. Fail if it hangs, or if an exception is raised in any of its threads."""
    command = [sys.executable, "-W", "error", "-c", HEAD + textwrap.dedent(program) + END]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT + 15)
    assert ("", 0) == (done.stderr, done.returncode)


def test_a_log_handler_may_submit_even_if_finalizers_log() -> None:
    """The logging module holds the lock of the handler while it calls the handler."""
    run("""
        class SubmittingHandler(logging.Handler):
            def emit(self, record):
                batcher.submit(record.getMessage())

        def finalize():
            pause_in_threads_of_a_batcher()
            logger.warning("closed")

        def log():
            for number in range(20):
                logger.warning("opened")
                Cycle(finalize if number == 0 else int)

        batcher = started_batcher()
        end = time.monotonic() + 1
        logger = logging.getLogger("application")
        logger.addHandler(SubmittingHandler())
        logger.warning("first")  # for its first record, a logger also acquires the lock of the logging module
        call_in_two_threads(log)
        """)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
@pytest.mark.parametrize("lock", ["threading.RLock()", "contextlib.nullcontext()"])
def test_finalizers_may_submit_to_one_batcher_and_a_signal_handler_to_another(lock: str) -> None:
    """The handler may wait for the lock, because no thread that holds the lock waits for anything."""
    run(f"""
        def finalize():
            Cycle(finalize)  # for the next collection
            pause_in_threads_of_a_batcher()
            with lock:
                from_finalizers.submit("closed")

        def handle(number, frame):
            with lock:
                from_handler.submit("alarm")
            if time.monotonic() < end:
                signal.setitimer(signal.ITIMER_REAL, 0.0001)  # the next signal arrives when this handler has returned

        def submit():
            for _ in range(50):
                with lock:
                    from_finalizers.submit("opened")
            from_finalizers.flush()
            from_handler.flush()

        lock = {lock}
        from_finalizers, from_handler = started_batcher(), started_batcher()
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0001)
        gc.set_threshold(random.randint(1, 20))
        Cycle(finalize)
        call_until_the_end(submit)
        gc.set_threshold(1000)
        from_finalizers.flush()
        from_handler.flush()
        """)


def test_the_first_submit_does_not_wait_for_a_new_thread_in_which_a_finalizer_waits_for_a_lock() -> None:
    run("""
        def start():
            with Batcher(list, max_workers=2) as batcher:
                gc.set_threshold(random.randint(1, 100))
                with lock:
                    batcher.submit("first")

        Cycle(take_the_lock)
        call_until_the_end(start)
        """)


@pytest.mark.parametrize(
    "call",
    [
        "batcher.submit('job')",
        "batcher.flush(wait=False)",
        "batcher.stats()",
        "batcher.explain()",
        "batcher.add_shutdown_callback(print)",
        "future.cancel()",
        "future.add_done_callback(id)",
        "future.done()",
    ],
)
def test_a_call_with_a_lock_held_does_not_wait_for_a_thread_in_which_a_finalizer_wants_the_lock(call: str) -> None:
    run(f"""
        def submit():
            for _ in range(10):
                batcher.submit("job")
                batcher.stats()
            batcher.flush()

        def submit_and_call():
            future = batcher.submit("job")
            time.sleep(0.0001)
            with lock:
                {call}

        batcher = started_batcher()
        gc.set_threshold(random.randint(1, 20))
        Cycle(take_the_lock)
        call_in_two_threads(submit_and_call, submit)
        gc.set_threshold(1000)
        batcher.flush()
        """)


@pytest.mark.parametrize("cancel_futures", [False, True])
def test_a_shutdown_with_a_lock_held_does_not_wait_for_a_thread_in_which_a_finalizer_wants_the_lock(
    cancel_futures: bool,
) -> None:
    run(f"""
        def start_and_shut_down():
            batcher = started_batcher()
            for _ in range(20):
                batcher.submit("job")
            time.sleep(0.0001)
            with lock:
                batcher.shutdown(wait=False, cancel_futures={cancel_futures})

        gc.set_threshold(random.randint(1, 20))
        Cycle(take_the_lock)
        call_until_the_end(start_and_shut_down)
        """)
