"""Waiting until threads run that are being started."""

import threading
from typing import Optional

__all__ = ["Opening"]


class Opening:
    """Tells whether the threads run. No condition, for the handler of a signal that comes in may wait for those threads."""

    def __init__(self) -> None:
        self._error: Optional[BaseException] = None
        self._latch = threading.Lock()  # taken until that is known
        self._latch.acquire()

    def settle(self, error: Optional[BaseException] = None) -> None:
        """Say that they run, or why not. To be called once."""
        self._error = error
        self._latch.release()

    def wait(self, timeout: float) -> None:
        """Wait until they run, for *timeout* seconds at most, or raise why they don't."""
        if self._latch.acquire(timeout=timeout):
            self._latch.release()
        if self._error is not None:
            raise self._error
