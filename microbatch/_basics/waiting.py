"""Waiting for a word from another thread, in a way that a signal handler or finalizer can't spoil."""

import threading
from typing import Any

__all__ = ["Waiter", "Waiters", "Flag", "StartLatch"]


class Waiter(threading.Condition):
    """A condition for one waiting thread, that remembers: a `notify` before the `wait` is not lost.

    With an ordinary condition, what interrupts the waiting thread between its last look and its sleep (a finalizer that
    submits a job, a signal handler that shuts down) would notify nobody.

    Args:
        lock: re-entrant; `wait` gives up the whole of it.
    """

    caller: Any = None  # whatever is to be known of who waits

    def __init__(self, lock: Any) -> None:
        # Not Condition's own, which makes much that a waiter has no use for.
        self._lock = lock
        self._rung = threading.Lock()
        self._rung.acquire()

    acquire = property(lambda self: self._lock.acquire)
    release = property(lambda self: self._lock.release)
    __repr__ = object.__repr__  # Condition's own asks for what is not here

    def silence(self) -> None:
        """Forget that it was rung. Look for what it may have been rung for afterwards."""
        self._rung.acquire(blocking=False)

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait until it is rung or *timeout* seconds are over, and take the lock again."""
        saved = 1, threading.get_ident()  # where a signal breaks this off before it is known
        try:
            saved = self._lock._release_save()
            rung = self.sleep(timeout)
        finally:
            try:
                self._take_back(saved)
            except BaseException:  # a signal: whoever called holds the lock, and will release it
                self._take_back(saved)
                raise
        return rung

    def hear(self, timeout: float | None = None) -> bool:
        """Wait as `wait` does, but without the lock, so that those who are rung for do not queue for it."""
        if self._lock._is_owned():  # by what this call interrupts
            return self.wait(timeout)
        return self.sleep(timeout)

    def sleep(self, timeout: float | None = None) -> bool:
        """Wait until it is rung or *timeout* seconds are over, whatever lock is held."""
        return self._rung.acquire(True, -1 if timeout is None else timeout if timeout > 0 else 0)

    def _take_back(self, saved: Any) -> None:
        if not self._lock._is_owned():
            self._lock._acquire_restore(saved)

    def ring(self) -> bool:
        """Ring it, and return whether it was silent."""
        if not self._rung.locked():  # an exception takes longer
            return False
        try:
            self._rung.release()
        except RuntimeError:  # what came in between rang it
            return False
        return True

    def notify(self, n: int = 1) -> None:
        """Ring it."""
        self.ring()

    def notify_all(self) -> None:
        """Ring it: one thread waits."""
        self.ring()


class Waiters(dict[Waiter, None]):
    """For threads that wait for one thing: each enters a waiter of its own before it looks whether it has to wait.

    It takes it out in a ``finally`` of the statement that enters it, for a signal may break that off. A dict, since either
    is then one step, and the waiters stay in the order in which they came.
    """

    def notify(self, n: int = 1) -> None:
        """Ring the first *n* of those that have not been rung."""
        for waiter in self.copy():
            if n < 1:
                return
            n -= waiter.ring()

    def notify_all(self) -> None:
        """Ring all."""
        for waiter in self.copy():
            waiter.ring()


class Flag:
    """A `threading.Event` for one waiting thread, whose `set` never waits.

    A signal in `Event.wait` may leave the lock of the event taken, and `Event.set` then waits for ever.
    """

    def __init__(self, is_set: bool) -> None:
        self._is_set = is_set
        self._waiter = Waiter(None)

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Set it, and wake the waiting thread."""
        self._is_set = True
        self._waiter.ring()

    def clear(self) -> None:
        """Reset it."""
        self._is_set = False
        self._waiter.silence()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set or *timeout* seconds are over, and return whether it is set."""
        if not self._is_set:
            self._waiter.sleep(timeout)
        return self._is_set


class StartLatch:
    """Tells whether the threads run. Without a lock, so that a signal or its handler can come in anywhere."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._settled = False
        self._waiting = Waiters()

    def settle(self, error: BaseException | None = None) -> None:
        """Say that they run, or why not. To be called once."""
        self._error = error
        self._settled = True
        self._waiting.notify_all()

    def wait(self, timeout: float | None) -> None:
        """Wait until they run, for *timeout* seconds at most, or raise why they don't."""
        waiter = Waiter(None)
        self._waiting[waiter] = None  # before the look
        if not self._settled:
            waiter.sleep(timeout)
        if self._error is not None:
            raise self._error
