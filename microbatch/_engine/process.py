"""The engines of this process, and what happens to them when the interpreter exits and when the process is forked."""

import mmap
import os
import sys
import threading
import weakref
from typing import Any, Protocol

from microbatch._basics.clock import NOW
from microbatch.errors import BatcherClosed

__all__ = ["current_mark", "enlist", "living", "check_for_fork"]


class Member(Protocol):
    """The part of an `Engine` that this module uses."""

    def exit_deadline(self) -> float:
        """Return the moment until which the exit of the interpreter may wait, if the wait begins now. Never raises."""

    def close(self) -> None:
        """Accept no more jobs, and make all accepted jobs due. Does not wait."""

    def wait_ended(self, moment: float) -> bool:
        """Wait until all jobs are settled and the threads have ended. Return False if *moment* comes first."""

    def give_up(self) -> None:
        """Fail all jobs that are left, and let no thread wait for them."""

    def disown_threads(self) -> None:
        """Let the interpreter exit without waiting for the threads of the engine."""

    def leave_to_parent(self) -> None:
        """Fail, in a forked child, all jobs that the parent process still has to do."""


# -- exit --

_registry = threading.RLock()  # guards the next three; re-entrant, because a finalizer may interrupt its holder
_living: "weakref.WeakSet[Member]" = weakref.WeakSet()
_exiting = False
_hook: Any = None  # the entry in the hooks of ``threading`` that the last registration of `_at_exit` added


def enlist(worker: Member) -> None:
    """Make the interpreter wait for this engine when it exits.

    An ``atexit`` function would run too late, because `concurrent.futures` has closed all pools by then. It does that
    in exit hooks of ``threading``, which run earlier. The hook of this module is one of these too. The hook that was
    registered last runs first, and this one must run while the pools still accept work. But ``concurrent.futures``
    registers the hook for process pools when that module is imported, which may be late. So this function registers the
    hook of this module again if it is not the last one.

    Raises:
        BatcherClosed: The interpreter is exiting.
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
            raise BatcherClosed("the interpreter is exiting, so no batcher can start") from None
        if _exiting:
            raise BatcherClosed("the interpreter is exiting, so no batcher can start")
        _living.add(worker)


def living() -> list[Any]:
    """Return the engines of this process that were started, or tried to, and that still exist."""
    check_for_fork()
    with _registry:
        return list(_living)


def _at_exit() -> None:
    try:
        _end_all()
    except BaseException:  # for example Ctrl-C: exit now, and log how many jobs are lost
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
    """A replacement for the memory page in `_make_mark` on systems that can't wipe a page at a fork."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def __getitem__(self, index: int) -> bool:
        return self._process == os.getpid()


def _make_mark() -> Any:
    """Return an object whose first item is true in this process, and false in its forked children.

    On Linux, reading the item takes no system call, unlike `os.getpid`. It is an item and not a function call, because
    `Batcher.submit` reads it for each job.
    """
    if sys.platform == "linux":
        try:
            page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            page.madvise(18)  # MADV_WIPEONFORK: in a child, the page contains only zeros
            page[0] = 1
            return page
        except (OSError, ValueError):
            pass
    return _Process()


_mark = _make_mark()
_renewing = threading.RLock()  # if the fork hook did not run in a child, only one thread does its work


def current_mark() -> Any:
    """Return an object whose first item is true in this process, and false in children that are forked from now on.

    An object that stores the mark belongs to this process. A child notices that when it first uses the object, and then
    replaces it. Objects that the child never uses cost it nothing.
    """
    check_for_fork()
    return _mark


def check_for_fork() -> None:
    """Do the work of the fork hook, if this process is a forked child and the hook did not run.

    The hook does not run if C code forks without telling Python, as uWSGI does by default.
    """
    if not _mark[0]:
        with _renewing:
            if not _mark[0]:
                _leave_all_to_parent()


def _leave_all_to_parent() -> None:
    global _registry, _living, _mark
    _registry = threading.RLock()  # a thread that does not exist here may have held the old one
    workers, _living = list(_living), weakref.WeakSet()
    for worker in workers:  # including the engines whose batchers were deleted
        worker.disown_threads()
        worker.leave_to_parent()
    _mark = _make_mark()


def _begin_in_child() -> None:
    global _renewing
    _renewing = threading.RLock()
    check_for_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)
