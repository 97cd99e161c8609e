"""Under gevent's monkey-patching, where threads are greenlets and locks are gevent's."""

import subprocess
import sys

from tests.extras import needs

needs("gevent")

SCRIPT = """
from gevent import monkey
monkey.patch_all()

import os, time
import gevent
from microbatch import Batcher, Interval, Size

def double(jobs):
    time.sleep(0.001)  # lets the other greenlets run
    return [job * 2 for job in jobs]

batcher = Batcher(double, Size(10) | Interval(0.005), max_workers=2)
callers = [gevent.spawn(lambda job=job: batcher.submit(job).result(timeout=10).value) for job in range(100)]
gevent.joinall(callers, raise_error=True)
print([caller.value for caller in callers] == [job * 2 for job in range(100)], batcher.stats().batches <= 20, flush=True)

waiting = batcher.submit(1)
print(batcher.flush(timeout=10), waiting.done(), flush=True)

child = os.fork()
if child == 0:
    print("child", batcher.submit(2).result(timeout=10).value, batcher.shutdown(timeout=10), flush=True)
    os._exit(0)
os.waitpid(child, 0)

batcher.submit(3).add_done_callback(lambda future: print("at exit", future.result().value))
"""


def test_greenlets_submit_wait_flush_fork_and_exit_like_threads() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ("True True\nTrue True\nchild 4 True\nat exit 6\n", "") == (done.stdout, done.stderr)
