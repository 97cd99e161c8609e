"""Ways to wait for another thread that stay correct if a signal handler or a finalizer interrupts them at any point."""

import threading
from typing import Any

__all__ = ["Waiter", "Waiters", "Flag", "StartLatch"]


class Waiter(threading.Condition):
    """A condition for one waiting thread. It remembers a `notify` that comes before the `wait`.

    A finalizer may submit a job, or a signal handler may shut down, just after the waiting thread has checked its
    condition and just before it sleeps. They run in that thread, so the lock does not stop them, and an ordinary
    condition would lose their `notify`.

    Args:
        lock: A re-entrant lock. `wait` releases it completely, even if the thread has acquired it several times.
    """

    caller: Any = None  # data about the thread that waits; the user of this class sets it

    def __init__(self, lock: Any) -> None:
        # `Condition.__init__` is not called, because it creates objects that a waiter does not need.
        self._lock = lock
        self._signal = threading.Lock()  # `wake` releases it, and `sleep` acquires it
        self._signal.acquire()

    acquire = property(lambda self: self._lock.acquire)
    release = property(lambda self: self._lock.release)
    __repr__ = object.__repr__  # `Condition.__repr__` uses attributes that do not exist here

    def reset(self) -> None:
        """Forget earlier notifications. Check the condition after this call, not before it."""
        self._signal.acquire(blocking=False)

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait for a notification or for *timeout* seconds, and acquire the lock again.

        Returns:
            Whether there was a notification.
        """
        saved = 1, threading.get_ident()  # in case a signal interrupts the next statement before it assigns
        try:
            saved = self._lock._release_save()
            notified = self.sleep(timeout)
        finally:
            try:
                self._reacquire(saved)
            except BaseException:  # from a signal handler; the caller will release the lock, so acquire it again
                self._reacquire(saved)
                raise
        return notified

    def wait_unlocked(self, timeout: float | None = None) -> bool:
        """Wait like `wait`, but for a caller that does not hold the lock, so that woken threads do not queue for it."""
        if self._lock._is_owned():  # by code that this call has interrupted, as in a signal handler
            return self.wait(timeout)
        return self.sleep(timeout)

    def sleep(self, timeout: float | None = None) -> bool:
        """Wait for a notification or for *timeout* seconds, without touching the lock, and return whether one came."""
        return self._signal.acquire(True, -1 if timeout is None else timeout if timeout > 0 else 0)

    def _reacquire(self, saved: Any) -> None:
        if not self._lock._is_owned():
            self._lock._acquire_restore(saved)

    def wake(self) -> bool:
        """Notify the waiting thread. Return False if there is a notification already."""
        if not self._signal.locked():  # faster than to catch the exception below
            return False
        try:
            self._signal.release()
        except RuntimeError:  # a signal handler or a finalizer has called this since the check
            return False
        return True

    def notify(self, n: int = 1) -> None:
        """Notify the waiting thread."""
        self.wake()

    def notify_all(self) -> None:
        """Notify the waiting thread. There is only one."""
        self.wake()


class Waiters(dict[Waiter, None]):
    """The waiters of several threads that wait for the same condition.

    A thread adds its waiter before it checks whether it has to wait. It adds it inside a ``try`` whose ``finally``
    removes it, because a signal may interrupt the thread at any point.

    This is a dict, because adding and removing an entry is then atomic, and the waiters stay in order.
    """

    def notify(self, n: int = 1) -> None:
        """Notify the first *n* waiters that have not been notified yet."""
        for waiter in self.copy():
            if n < 1:
                return
            n -= waiter.wake()

    def notify_all(self) -> None:
        """Notify all waiters."""
        for waiter in self.copy():
            waiter.wake()


class Flag:
    """Like `threading.Event`, but for one waiting thread, and with a `set` that never blocks.

    If a signal interrupts `Event.wait`, the lock of the event may stay locked. `Event.set` would then block forever.
    """

    def __init__(self, is_set: bool) -> None:
        self._is_set = is_set
        self._waiter = Waiter(None)

    def is_set(self) -> bool:
        """Return whether the flag is set."""
        return self._is_set

    def set(self) -> None:
        """Set the flag, and wake the waiting thread."""
        self._is_set = True
        self._waiter.wake()

    def clear(self) -> None:
        """Reset the flag."""
        self._is_set = False
        self._waiter.reset()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the flag is set or *timeout* seconds have passed, and return whether it is set."""
        if not self._is_set:
            self._waiter.sleep(timeout)
        return self._is_set


class StartLatch:
    """Tells waiting threads that the worker threads have started, or why they could not start.

    It uses no lock, so a signal handler may use it at any point.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._settled = False
        self._waiting = Waiters()

    def settle(self, error: BaseException | None = None) -> None:
        """Record that the threads have started, or the *error* because of which they could not. Call this only once."""
        self._error = error
        self._settled = True
        self._waiting.notify_all()

    def wait(self, timeout: float | None) -> None:
        """Wait until the threads have started, for at most *timeout* seconds.

        Raises:
            BaseException: The *error* with which `settle` was called.
        """
        waiter = Waiter(None)
        self._waiting[waiter] = None  # before the check, so that no notification is missed
        if not self._settled:
            waiter.sleep(timeout)
        if self._error is not None:
            raise self._error
