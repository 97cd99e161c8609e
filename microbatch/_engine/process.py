"""The engines of this process, and what happens to them when the interpreter exits and when the process is forked."""

import mmap
import os
import sys
import threading
import weakref
from typing import Any, Protocol

from microbatch._basics.clock import NOW
from microbatch.errors import BatcherClosed

__all__ = ["check_for_fork", "enlist", "is_exiting", "process_flag", "started_engines"]


class Member(Protocol):
    """The part of an `Engine` that this module uses."""

    def exit_deadline(self) -> float:
        """Return until when the interpreter waits for this engine if it begins to exit now. Never raises."""

    def close(self) -> None:
        """Accept no more jobs, and make all accepted jobs due. Does not wait."""

    def note_exit(self) -> None:
        """End the calls of the processor that can't end any more because the interpreter is exiting."""

    def wait_ended(self, moment: float) -> bool:
        """Wait until all jobs are settled and the threads have ended. Return False if *moment* comes first."""

    def give_up(self) -> None:
        """Fail all jobs that are left, and let no thread wait for them."""

    def disown_threads(self) -> None:
        """Let the interpreter exit without waiting for the threads of the engine."""

    def leave_to_parent(self) -> None:
        """Fail, in a forked child, all jobs that the parent process still has to do."""


# -- exit --

_engines: "weakref.WeakKeyDictionary[Member, None]" = weakref.WeakKeyDictionary()
_exiting = False
_exit_hook: object = None  # what `threading` calls at exit to call `_at_exit`


def enlist(engine: Member) -> None:
    """Make the interpreter wait for this engine when it exits.

    An ``atexit`` function would run too late, because ``concurrent.futures`` closes all pools earlier, in exit hooks of
    ``threading``. So this module uses such a hook too. It must run while the pools still accept work, and the hook that
    was registered last runs first. But ``concurrent.futures.process`` registers its hook when it is first imported,
    which may be late. So this function registers the hook of this module again whenever it is not the last one.

    Raises:
        BatcherClosed: The interpreter is exiting.
    """
    global _exit_hook
    check_for_fork()
    hooks = threading._threading_atexits  # type: ignore[attr-defined]
    if hooks[-1:] != [_exit_hook]:
        try:
            threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
        except RuntimeError as error:
            if "after shutdown" not in str(error):  # it comes from a signal handler
                raise
            raise BatcherClosed("the interpreter is exiting, so no batcher can start") from None
        _exit_hook = hooks[-1]
    _engines[engine] = None  # before the check: `_drain_all` sets the flag first, and then looks here
    if _exiting:
        raise BatcherClosed("the interpreter is exiting, so no batcher can start")


def is_exiting(error: BaseException) -> bool:
    """Return whether a thread could not be started because the interpreter is exiting (CPython 3.12 and later)."""
    return isinstance(error, RuntimeError) and "interpreter shutdown" in str(error)


def started_engines() -> list[Any]:
    """Return the engines of this process that have started, or tried to, and that still exist."""
    check_for_fork()
    return _living(_engines.keyrefs())


def _living(references: list[Any]) -> list[Any]:
    """Return the engines that still exist. Iterating over `_engines` would break L6."""
    return [engine for reference in references if (engine := reference()) is not None]


def _at_exit() -> None:
    try:
        _drain_all()
    except BaseException:  # for example Ctrl-C: exit now, and log how many jobs are lost
        for engine in _living(_engines.keyrefs()):
            if not engine.wait_ended(NOW):
                engine.give_up()
        raise


def _drain_all() -> None:
    global _exiting
    check_for_fork()
    _exiting = True
    engines = _living(_engines.keyrefs())
    deadlines = {engine: engine.exit_deadline() for engine in engines}
    for engine in engines:
        engine.close()
        engine.note_exit()
    for engine in sorted(engines, key=deadlines.__getitem__):
        if not engine.wait_ended(deadlines[engine]):
            engine.give_up()


# -- forks --


class _ProcessFlag:
    """A process flag for systems that can't wipe a page of memory at a fork."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def __getitem__(self, index: int) -> bool:
        return self._process == os.getpid()


def _make_process_flag() -> Any:
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
    return _ProcessFlag()


_flag = _make_process_flag()
_fork_lock = threading.RLock()  # held while a thread does the work of a fork hook that did not run


def process_flag() -> Any:
    """Return an object whose first item is true in this process, and false in children that are forked from now on.

    An object that belongs to one process stores this flag. A child sees that the flag is false when it first uses the
    object, and replaces the object then. Objects that the child never uses cost it nothing.
    """
    check_for_fork()
    return _flag


def check_for_fork() -> None:
    """Do the work of the fork hook, if this process is a forked child and the hook did not run.

    The hook does not run if C code forks without telling Python, as uWSGI does by default.
    """
    if not _flag[0]:
        with _fork_lock:
            if not _flag[0]:
                _leave_all_to_parent()


def _leave_all_to_parent() -> None:
    global _engines, _flag
    references, _engines = _engines.keyrefs(), weakref.WeakKeyDictionary()
    for engine in _living(references):  # also those whose batchers were deleted
        engine.disown_threads()
        engine.leave_to_parent()
    _flag = _make_process_flag()


def _begin_in_child() -> None:
    global _fork_lock
    _fork_lock = threading.RLock()
    check_for_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)
