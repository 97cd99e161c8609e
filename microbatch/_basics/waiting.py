"""Ways to wait for another thread, and to pass things to it, that need no lock.

So they stay correct if a signal handler or a finalizer interrupts a thread at any point, and neither of the two can
cause a deadlock. The rules for their use are in ``_engine/__init__.py``.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

__all__ = ["Flag", "Inbox", "Waiter", "Waiters", "first_of", "is_unlocked", "try_to_find"]

Item = TypeVar("Item")


def is_unlocked(error: RuntimeError) -> bool:
    """Return whether a lock could not be released because it is unlocked. Otherwise, *error* is from a signal handler."""
    return "unlocked lock" in str(error)


class Waiter(threading.Condition):
    """A condition for one waiting thread. It guards nothing, and remembers a `notify` that comes before the `wait`.

    So the waiting thread can check what it waits for, and then sleep. If another thread changes that in between, the
    sleep ends immediately. You need not acquire this condition, and acquiring it does nothing.
    """

    # Data about the thread that waits, its ident, and the job that it wants to add. The user of this class sets them.
    caller: Any = None
    thread = 0
    job: Any = None
    late_at: float | None = None  # for coroutines: when they lose their turn, or `NEVER` while they have no turn
    interrupted = False  # whether a signal handler or a finalizer has interrupted the wait, and waits in the same line

    def __init__(self) -> None:
        # `Condition.__init__` is not called, because it creates objects that a waiter does not need.
        self._signal = threading.Lock()  # `wake` releases it, and `wait` acquires it
        self._signal.acquire()

    @property
    def ring(self) -> Callable[[], None]:
        """A function that is written in C, and notifies the waiting thread.

        It raises `RuntimeError` if there is a notification already.
        """
        return self._signal.release

    def __repr__(self) -> str:
        return object.__repr__(self)  # `Condition.__repr__` uses attributes that do not exist here

    def acquire(self, *arguments: Any) -> bool:
        """Do nothing."""
        return True

    def release(self) -> None:
        """Do nothing."""

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *exception: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a notification or for *timeout* seconds, and return whether there was a notification."""
        return self._signal.acquire(True, -1 if timeout is None else timeout if timeout > 0 else 0)

    def reset(self) -> None:
        """Forget earlier notifications. Check the condition after this call, not before it."""
        self._signal.acquire(blocking=False)

    def wake(self) -> bool:
        """Notify the waiting thread. Return False if another one has to be notified too."""
        if not self._signal.locked():  # there is a notification already; faster than to catch the exception below
            return False
        try:
            self._signal.release()
        except RuntimeError as error:
            if not is_unlocked(error):
                raise
            return False  # another thread has called this since the check
        return True

    def notify(self, n: int = 1) -> None:
        """Notify the waiting thread."""
        self.wake()

    def notify_all(self) -> None:
        """Notify the waiting thread, of which there is only one."""
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
            if waiter.interrupted:
                self._wake_thread(waiter.thread)

    def _wake_thread(self, thread: int) -> None:
        for waiter in self.copy():
            if waiter.thread == thread:
                waiter.wake()

    def notify_all(self) -> None:
        """Notify all waiters."""
        for waiter in self.copy():
            waiter.wake()


def first_of(items: dict[Item, Any]) -> Item | None:
    """Return the first key of a dict that other threads may change, or None.

    This does not copy the dict (L6), which could take too long. But it passes over the keys that were removed from the
    front since the dict was last resized.
    """
    while (found := try_to_find(iter, items)) is items:
        pass
    return found  # type: ignore[return-value]


def try_to_find(order: Callable[[dict[Any, Any]], Iterator[Any]], items: dict[Any, Any]) -> object:
    """Return the first key in an order, which is `iter` or `reversed`, or None if there is no key.

    Return *items* if another thread changes them now.
    """
    try:
        return next(order(items), None)
    except RuntimeError as error:
        if "during iteration" not in str(error):  # it comes from a signal handler
            raise
        return items


class Inbox(Generic[Item]):
    """A list to which any thread appends, and from which one thread at a time takes all items.

    Attributes:
        items: How many items were taken so far, and then those that were not taken yet. Because this number is in the
            list, taking the items and counting them is one step.
    """

    def __init__(self) -> None:
        self.items: list[Any] = [0]
        self.append: Callable[[Item], None] = self.items.append

    def __len__(self) -> int:
        return len(self.items) - 1

    def take(self) -> list[Item]:
        """Take out all items. An exception from outside leaves either all of them in the list or none."""
        items = self.items[1:]
        self.drop(len(items))
        return items

    def drop(self, count: int) -> None:
        """Take out the first *count* items."""
        self.items[: count + 1] = [self.items[0] + count]

    def peek(self) -> list[Item]:
        """Return the items that were not taken yet."""
        return self.items[1:]

    def total(self) -> int:
        """Return how many items were ever appended."""
        while True:
            taken, count = self.items[:1], len(self.items)
            if self.items[:1] == taken:  # otherwise, some were taken in the meantime; slices because of L1
                return int(taken[0]) + count - 1


class Flag:
    """Like `threading.Event`, but for one waiting thread, and with a `set` that never blocks.

    If a signal interrupts `Event.wait`, the lock of the event may stay locked. `Event.set` would then block forever.
    """

    def __init__(self, is_set: bool) -> None:
        self._is_set = is_set
        self._waiter = Waiter()

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
            self._waiter.wait(timeout)
        return self._is_set
