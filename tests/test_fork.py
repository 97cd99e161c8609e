"""After a fork, the child has an empty, working batcher, and the parent keeps its jobs."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import microbatch._engine.process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

HEAD = """
import os, signal, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor, wait
from microbatch import Batcher, BatcherClosed, BatchListener, ForkedError, Interval, JobState, Size

def in_child(function):
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(10)  # a child that hangs must not outlive the test
        try:
            function()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"

def echo(jobs):
    return jobs
"""


# Like a server that forks in C, such as uWSGI, except that CPython still reinitializes its own locks.
NO_HOOKS = """
import concurrent.futures.thread, logging, os, threading
os.register_at_fork = lambda **hooks: None
"""


def run(script: str, timeout: float = 30, head: str = "") -> str:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", head + HEAD + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def test_a_batcher_used_before_the_fork_works_in_the_child_and_in_the_parent() -> None:
    script = """
    batcher = Batcher(echo, Size(2) | Interval(0.01))
    print("parent", batcher.submit(1).result(timeout=10).value, flush=True)
    in_child(lambda: print("child", batcher.submit(2).result(timeout=10).value, batcher.stats().accepted, batcher.shutdown()))
    print("parent", batcher.submit(3).result(timeout=10).value, batcher.stats().accepted)
    """
    assert "parent 1\nchild 2 1 True\nparent 3 2\n" == run(script)


def test_the_child_does_not_process_the_jobs_of_the_parent() -> None:
    script = """
    def processor(jobs):
        print(os.getpid() == parent, jobs, flush=True)
        return jobs
    parent = os.getpid()
    batcher = Batcher(processor, Size(9))
    batcher.submit("parent's")
    in_child(lambda: (batcher.submit("child's"), batcher.shutdown()))
    """
    assert 'False ["child\'s"]\nTrue ["parent\'s"]\n' == run(script)


def test_inherited_futures_fail_at_once_in_the_child_and_not_in_the_parent() -> None:
    script = """
    release = threading.Event()
    def hold(jobs):
        started.set()
        release.wait()
        return jobs
    started = threading.Event()
    batcher = Batcher(hold, Size(2))
    futures = [batcher.submit(number) for number in range(5)]
    started.wait()
    called = []
    futures[0].add_done_callback(called.append)
    def child():
        assert wait(futures, timeout=10).not_done == set()
        for future in futures:
            assert isinstance(future.exception(timeout=0), ForkedError), future.exception()
            assert future.state is JobState.FAILED and not future.cancel()
        assert called == []
    in_child(child)
    release.set()
    batcher.shutdown()
    print([future.result().value for future in futures], len(called))
    """
    assert "[0, 1, 2, 3, 4] 1\n" == run(script)


def test_a_future_cancelled_before_the_fork_can_be_cancelled_and_waited_for_in_the_child() -> None:
    script = """
    def hold():
        with future._owner.mutex:  # as any call of the batcher does, for a moment
            held.set()
            release.wait()
    held, release = threading.Event(), threading.Event()
    with Batcher(echo, Size(9)) as batcher:
        future = batcher.submit("job")
        future.add_done_callback(lambda future: None)
        future.cancel()
        batcher.flush()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        in_child(lambda: print(future.cancel(), wait([future]).done == {future}))
        release.set()
        holder.join()
    """
    assert "True True\n" == run(script)


def test_futures_whose_batcher_is_gone_fail_in_the_child_too() -> None:
    script = """
    go_on = threading.Event()
    def ask():
        batcher = Batcher(lambda jobs: [go_on.wait()])
        future = batcher.submit("job")
        batcher.shutdown(wait=False)
        return future
    future = ask()
    in_child(lambda: print("child", type(future.exception(timeout=10)).__name__))
    go_on.set()
    print("parent", future.result(timeout=10).value)
    """
    assert "child ForkedError\nparent True\n" == run(script)


def test_a_thread_that_waits_for_futures_during_the_fork_does_not_deadlock_the_child() -> None:
    script = """
    from microbatch._basics.waiting import Flag
    about_to_sleep, go_on = threading.Event(), threading.Event()
    def stop_just_before_it_sleeps(frame, event, argument):
        if frame.f_code is Flag.wait.__code__:
            about_to_sleep.set()
            go_on.wait()
    batcher = Batcher(echo, Size(9))
    futures = [batcher.submit(number) for number in range(2)]
    def wait_for_all():
        sys.settrace(stop_just_before_it_sleeps)
        wait(futures)
    thread = threading.Thread(target=wait_for_all, daemon=True)
    thread.start()
    about_to_sleep.wait()
    in_child(lambda: print([type(future.exception(timeout=0)).__name__ for future in futures]))
    go_on.set()
    batcher.shutdown()
    thread.join()
    """
    assert "['ForkedError', 'ForkedError']\n" == run(script)


def test_a_first_submit_in_another_thread_during_the_fork_does_not_deadlock_the_child() -> None:
    script = """
    starting, go_on = threading.Event(), threading.Event()
    def stop_with_all_locks_of_the_start_held(frame, event, argument):
        if frame.f_code is threading._register_atexit.__code__:
            starting.set()
            go_on.wait()
    def submit_first():
        sys.settrace(stop_with_all_locks_of_the_start_held)
        print("parent", batcher.submit(1).result().value)
    batcher = Batcher(echo)
    thread = threading.Thread(target=submit_first, daemon=True)
    thread.start()
    starting.wait()
    in_child(lambda: print("child", batcher.submit(2).result(timeout=5).value, batcher.shutdown()))
    go_on.set()
    thread.join()
    """
    assert "child 2 True\nparent 1\n" == run(script)


def test_a_settled_future_keeps_its_result_in_the_child() -> None:
    script = """
    batcher = Batcher(echo)
    future = batcher.submit(1)
    future.result()
    in_child(lambda: print(future.result(timeout=0).value))
    """
    assert "1\n" == run(script)


def test_a_batcher_that_was_shut_down_stays_shut_down_in_the_child() -> None:
    script = """
    batcher = Batcher(echo)
    batcher.shutdown()
    def child():
        try:
            batcher.submit(1)
        except BatcherClosed:
            print("closed")
    in_child(child)
    """
    assert "closed\n" == run(script)


def test_listeners_are_not_notified_of_the_shutdown_again_in_the_child() -> None:
    script = """
    class Telling(BatchListener):
        def shutdown(self, event):
            print("shut down", flush=True)
    batcher = Batcher(echo, listeners=[Telling()])
    batcher.shutdown()
    in_child(batcher.shutdown)
    """
    assert "shut down\n" == run(script)


def test_a_trace_that_is_written_during_the_fork_does_not_block_the_child() -> None:
    script = """
    from microbatch.traces import TraceRecorder
    class Slow:
        def write(self, text):
            if os.getpid() == parent:
                writing.set()
                go_on.wait()
    parent, writing, go_on = os.getpid(), threading.Event(), threading.Event()
    with Batcher(echo, listeners=[TraceRecorder(Slow())]) as batcher:
        batcher.submit(1)
        writing.wait()
        in_child(lambda: print(batcher.submit(2).result().value, batcher.shutdown(timeout=10)))
        go_on.set()
    """
    assert "2 True\n" == run(script)


def test_a_batcher_with_a_supplied_executor_refuses_jobs_in_the_child() -> None:
    script = """
    with ThreadPoolExecutor(1) as executor, Batcher(echo, executor=executor) as batcher:
        batcher.submit(1).result()
        def child():
            try:
                batcher.submit(2)
            except ForkedError as error:
                print(error)
        in_child(child)
        print(batcher.submit(3).result(timeout=10).value)
    """
    assert "the executor belongs to the parent process\n3\n" == run(script)


def test_a_child_that_exits_normally_processes_its_jobs_first() -> None:
    script = """
    batcher = Batcher(echo, Size(9))
    batcher.submit("parent").add_done_callback(lambda future: print(future.result().value, flush=True))
    if os.fork() == 0:
        batcher.submit("child").add_done_callback(lambda future: print(future.result().value, flush=True))
    else:
        os.wait()
    """
    assert "child\nparent\n" == run(script)


def test_forks_while_many_threads_submit_neither_lose_jobs_nor_deadlock() -> None:
    script = """
    over = threading.Event()
    with Batcher(echo, Size(5) | Interval(0), max_workers=2, max_pending=50) as batcher:
        def keep_submitting():
            count = 0
            while not over.is_set():
                assert batcher.submit(count).result(timeout=30).value == count
                count += 1
        with ThreadPoolExecutor(8) as pool:
            threads = [pool.submit(keep_submitting) for _ in range(8)]
            def child():
                assert batcher.submit("job").result(timeout=10).value == "job"
                assert batcher.shutdown(timeout=10)
            for _ in range(500):
                in_child(child)
            over.set()
            for thread in threads:
                thread.result()
    stats = batcher.stats()
    print(stats.accepted == stats.succeeded > 0)
    """
    assert "True\n" == run(script, timeout=120)


@pytest.mark.parametrize(
    "first_use",
    ["batcher.submit('x')", "next(batcher.map('x'))", "batcher.flush()", "batcher.stats()", "batcher.shutdown()"],
)
def test_a_fork_without_hooks_is_noticed_by_the_first_use_in_the_child(first_use: str) -> None:
    script = f"""
    batcher, other = Batcher(echo, Interval(0)), Batcher(echo, Size(9))
    inherited = [batcher.submit(1), batcher.submit(2), other.submit(3)]
    wait(inherited[:2])
    def child():
        {first_use}
        print(type(inherited[2].exception(timeout=0)).__name__, batcher.stats().accepted, other.stats().accepted)
        assert other.submit(4) and other.flush(timeout=5)
        assert batcher.shutdown(timeout=5)
    in_child(child)
    print(other.flush(), inherited[2].result().value, flush=True)
    """
    used = int("'x'" in first_use)
    assert f"ForkedError {used} 0\nTrue 3\n" == run(script, head=NO_HOOKS)


@pytest.mark.parametrize("use", ["pass", "batcher.submit('child')", "warnings.simplefilter('error'); del batcher"])
def test_a_child_of_a_fork_without_hooks_exits_normally_and_processes_only_its_own_jobs(use: str) -> None:
    script = f"""
    def show(jobs):
        print(*jobs, flush=True)
    batcher = Batcher(show, Size(9))
    batcher.submit("parent")
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        {use}
        sys.exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    own = "child\n" * ("child" in use)
    assert f"{own}3\nparent\n" == run(script, head=NO_HOOKS)


def test_a_batcher_created_in_the_child_of_a_fork_without_hooks_keeps_its_jobs() -> None:
    script = """
    def child():
        batcher = Batcher(echo, Size(2))
        future = batcher.submit(1)
        print(batcher.flush(timeout=5), future.done(), batcher.stats().accepted, batcher.shutdown(timeout=5))
    in_child(child)
    """
    assert "True True 1 True\n" == run(script, head=NO_HOOKS)


def test_a_fork_hook_that_runs_before_ours_may_use_a_batcher_in_the_child() -> None:
    head = """
import concurrent.futures.thread, logging, os, threading
born = []
os.register_at_fork(after_in_child=lambda: born.append(batcher.submit("born")))
"""
    script = """
    batcher = Batcher(echo, Interval(0))
    in_child(lambda: print(born[0].result(timeout=5).value, batcher.stats().accepted, batcher.shutdown(timeout=5)))
    """
    assert "born 1 True\n" == run(script, head=head)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_each_worker_of_multiprocessing_has_its_own_batcher(method: str, tmp_path: Path) -> None:
    script = f"""
        import multiprocessing
        from microbatch import Batcher

        def squares(jobs):
            return [job * job for job in jobs]

        batcher = Batcher(squares)

        def square(number):
            return batcher.submit(number).result(timeout=10).value

        if __name__ == "__main__":
            print(square(9))
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                print(pool.map(square, range(5)))
        """
    (tmp_path / "main.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(tmp_path / "main.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    assert ("81\n[0, 1, 4, 9, 16]\n", "") == (done.stdout, done.stderr)


@pytest.mark.parametrize("platform", ["linux", "any other"])
def test_a_process_flag_is_true_in_its_process_and_false_in_forked_children(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    flag = microbatch._engine.process._make_process_flag()
    child = os.fork()
    if child == 0:
        os._exit(bool(flag[0]) or not microbatch._engine.process._make_process_flag()[0])
    assert flag[0]
    assert 0 == os.waitpid(child, 0)[1]


def test_a_child_forked_while_a_progress_bar_is_drawn_works_without_the_bar() -> None:
    script = """
    from microbatch.integrations.tqdm import TqdmListener

    class Slow:
        total = None
        def update(self, jobs):
            drawing.set()
            go_on.wait()

    drawing, go_on = threading.Event(), threading.Event()
    batcher = Batcher(echo, Size(1), listeners=[TqdmListener(Slow())])
    batcher.submit(1)
    drawing.wait()
    in_child(lambda: print(batcher.submit(2).result(timeout=5).value, batcher.shutdown()))
    go_on.set()
    """
    assert "2 True\n" == run(script)


def test_the_child_can_wait_for_a_settled_future_whose_lock_was_held_during_the_fork() -> None:
    script = """
    from concurrent.futures import as_completed
    def look():
        with future._condition:  # as `wait` does, for a moment
            held.set()
            release.wait()
    held, release = threading.Event(), threading.Event()
    with Batcher(echo) as batcher:
        future = batcher.submit(1)
        future.result()
        thread = threading.Thread(target=look)
        thread.start()
        held.wait()
        in_child(lambda: print(len(wait([future], timeout=5).done), len(list(as_completed([future], timeout=5)))))
        release.set()
        thread.join()
    """
    assert "1 1\n" == run(script)


def test_a_child_does_nothing_for_a_batcher_that_it_does_not_use() -> None:
    script = """
    class Clock:
        made = 0
        def now(self):
            Clock.made += os.getpid() != parent  # each time a worker is created, before its first job
            return 0.0
        def wait_until(self, condition, moment):
            condition.wait()
    parent = os.getpid()
    batchers = [Batcher(echo, clock=Clock()) for _ in range(100)]
    batchers[0].submit("parent's").result()
    def child():
        print(Clock.made)
        print(batchers[0].submit(1).result().value, batchers[1].submit(2).result().value, batchers[2].shutdown())
    in_child(child)
    """
    assert "0\n1 2 True\n" == run(script)


@pytest.mark.parametrize("head", ["", NO_HOOKS], ids=["hooks", "no hooks"])
@pytest.mark.parametrize("first_use", ["submit(1).result().value", "flush()", "shutdown()"])
def test_an_unstarted_batcher_in_use_by_another_thread_during_the_fork_works_in_the_child(
    first_use: str, head: str
) -> None:
    script = f"""
    def hold(batcher):
        with batcher._engine.queue.mutex:  # as any call of the batcher does, for a moment
            held.set()
            release.wait()
    held, release = threading.Event(), threading.Event()
    batcher = Batcher(echo)
    holder = threading.Thread(target=hold, args=(batcher,))
    holder.start()
    held.wait()
    in_child(lambda: print(batcher.{first_use}, batcher.shutdown()))
    release.set()
    holder.join()
    print(batcher.submit(2).result().value, batcher.shutdown())
    """
    expected = 1 if "submit" in first_use else True
    assert f"{expected} True\n2 True\n" == run(script, head=head)


def test_a_batcher_that_another_thread_creates_during_the_fork_works_in_the_parent() -> None:
    script = """
    making, go_on = threading.Event(), threading.Event()
    class Clock:
        def now(self):
            making.set()
            go_on.wait()
            return 0.0
        def wait_until(self, condition, moment):
            condition.wait()
    def make():
        with Batcher(echo, clock=Clock()) as batcher:
            print("parent", batcher.submit(1).result().value)
    thread = threading.Thread(target=make)
    thread.start()
    making.wait()
    def child():
        with Batcher(echo) as batcher:
            print("child", batcher.submit(2).result().value)
    in_child(child)
    go_on.set()
    thread.join()
    """
    assert "child 2\nparent 1\n" == run(script)


def test_an_unused_batcher_with_a_supplied_executor_refuses_jobs_in_the_child() -> None:
    script = """
    with ThreadPoolExecutor(1) as executor, Batcher(echo, executor=executor) as batcher:
        def child():
            try:
                batcher.submit(1)
            except ForkedError as error:
                print(error)
            print(batcher.shutdown(timeout=5))
        in_child(child)
        print(batcher.submit(2).result(timeout=10).value)
    """
    assert "the executor belongs to the parent process\nTrue\n2\n" == run(script)


def test_several_threads_of_a_child_may_make_the_first_use_of_a_batcher_at_once() -> None:
    script = """
    class Clock:
        waiting = None
        def now(self):
            if self.waiting is not None:
                self.waiting.wait(timeout=5)  # until all threads have found that they are in a child
            return 0.0
        def wait_until(self, condition, moment):
            condition.wait()
    clock = Clock()
    batcher = Batcher(echo, Size(4), clock=clock)
    batcher.submit("parent's")
    def child():
        clock.waiting = threading.Barrier(4, action=lambda: setattr(clock, "waiting", None))
        with ThreadPoolExecutor(4) as pool:
            print(*pool.map(lambda number: batcher.submit(number).result(timeout=5).batch.size, range(4)))
        print(batcher.stats().accepted, batcher.shutdown(timeout=5))
    in_child(child)
    batcher.shutdown()
    """
    assert "4 4 4 4\n4 True\n" == run(script)


def test_the_child_of_a_child_has_its_own_batcher() -> None:
    script = """
    used, unused, closed = (Batcher(echo, name=name) for name in ("used", "unused", "closed"))
    closed.shutdown()
    used.submit(0).result()
    def use():
        try:
            closed.submit(0)
        except BatcherClosed:
            print(used.submit(1).result().value, unused.submit(2).result().value, used.stats().accepted, flush=True)
    in_child(lambda: (use(), in_child(use)))
    in_child(lambda: in_child(use))
    """
    assert "1 2 1\n" * 3 == run(script)


def test_a_wait_for_a_result_ends_in_the_child_of_a_signal_handler_that_interrupted_it() -> None:
    script = """
    def fork(number, frame):
        global child
        child = os.fork()
        if child != 0:
            batcher.flush(wait=False)
    signal.signal(signal.SIGALRM, fork)
    with Batcher(echo, Size(2)) as batcher:
        future = batcher.submit("job")
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            print(future.result().value)
        except ForkedError:
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    assert "job\n0\n" == run(script, timeout=10)
