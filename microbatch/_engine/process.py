"""What happens to a process: its end, and forks. Which workers live here, and what becomes of them then."""

import mmap
import os
import sys
import threading
import weakref
from typing import Any, Protocol

from microbatch._basics.clock import NOW
from microbatch.errors import BatcherClosed

__all__ = ["current_mark", "enlist", "check_for_fork"]


class Member(Protocol):
    """What is to be known of a worker here."""

    def exit_deadline(self) -> float:
        """Return the moment until which the interpreter's end may wait, if that wait begins now. Never raises."""

    def close(self) -> None:
        """Accept no more jobs, and make all that were accepted due. Does not wait."""

    def wait_ended(self, moment: float) -> bool:
        """Wait until every job is settled; False if *moment* comes first."""

    def give_up(self) -> None:
        """Fail what is left, and have nobody wait for it."""

    def disown_threads(self) -> None:
        """Have the interpreter end without waiting for threads."""

    def leave_to_parent(self) -> None:
        """Fail, in a forked child, what the parent has to do."""


# -- the end --

_registry = threading.RLock()  # guards the next three; re-entrant, since a finalizer may interrupt its holder
_living: "weakref.WeakSet[Member]" = weakref.WeakSet()
_exiting = False
_hook: Any = None  # what ``threading`` made of our exit hook when it was last registered


def enlist(worker: Member) -> None:
    """Have the interpreter wait for this worker when it ends.

    An ``atexit`` function would come too late: `concurrent.futures` has closed every pool by then. Its own hook, and
    this one, are called by ``threading`` before that, the last registered first; and each module of pools registers its
    hook when it is imported, which for that of the process pools may be late. So ours is registered once more where it
    is not the last, and runs while the pools still take work.
    """
    global _hook
    check_for_fork()
    with _registry:
        hooks = threading._threading_atexits  # type: ignore[attr-defined]
        try:
            if _hook is None or hooks[-1] is not _hook:
                threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
                _hook = hooks[-1]
        except RuntimeError:
            raise BatcherClosed("the interpreter is going down") from None
        if _exiting:
            raise BatcherClosed("the interpreter is going down")
        _living.add(worker)


def _at_exit() -> None:
    try:
        _end_all()
    except BaseException:  # Ctrl-C: leave now, and say what that costs
        for worker in list(_living):
            if not worker.wait_ended(NOW):
                worker.give_up()
        raise


def _end_all() -> None:
    global _exiting
    check_for_fork()
    with _registry:
        _exiting = True
        workers = list(_living)
    deadlines = {worker: worker.exit_deadline() for worker in workers}
    for worker in workers:
        worker.close()
    for worker in sorted(workers, key=deadlines.__getitem__):
        if not worker.wait_ended(deadlines[worker]):
            worker.give_up()


# -- forks --


class _Process:
    """Stands for the mark where there is none that a fork wipes."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def __getitem__(self, index: int) -> bool:
        return self._process == os.getpid()


def _make_mark() -> Any:
    """Return an object whose first item is true in this process, and false in every child of it.

    Where possible, reading it takes no system call, unlike ``os.getpid``. It is not a function, since every submit
    reads it.
    """
    if sys.platform == "linux":
        try:
            page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            page.madvise(18)  # MADV_WIPEONFORK: a child finds nothing but zeros
            page[0] = 1
            return page
        except (OSError, ValueError):
            pass
    return _Process()


_mark = _make_mark()
_renewing = threading.RLock()  # lets one thread of a child do what no hook has done


def current_mark() -> Any:
    """Return an object whose first item is true in this process, and false in every child that is forked from now on.

    Whatever is kept with a mark belongs to the process that made it. So a child can replace it on its first
    use there, and whatever the child never uses costs it nothing.
    """
    check_for_fork()
    return _mark


def check_for_fork() -> None:
    """Do what our hook does after a fork, if this process is a child and that was not called: by uWSGI it is not."""
    if not _mark[0]:
        with _renewing:
            if not _mark[0]:
                _leave_all_to_parent()


def _leave_all_to_parent() -> None:
    global _registry, _living, _mark
    _registry = threading.RLock()  # a thread that does not exist here may have held the old one
    workers, _living = list(_living), weakref.WeakSet()
    for worker in workers:  # those too whose batchers are gone
        worker.disown_threads()
        worker.leave_to_parent()
    _mark = _make_mark()


def _begin_in_child() -> None:
    global _renewing
    _renewing = threading.RLock()
    check_for_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)
