"""Waiting until threads run that are being started."""

from typing import Optional

from microbatch._bells import Bell, Bells

__all__ = ["Opening"]


class Opening:
    """Tells whether the threads run. Without a lock, so that a signal or its handler can come in anywhere."""

    def __init__(self) -> None:
        self._error: Optional[BaseException] = None
        self._settled = False
        self._waiting = Bells()

    def settle(self, error: Optional[BaseException] = None) -> None:
        """Say that they run, or why not. To be called once."""
        self._error = error
        self._settled = True
        self._waiting.notify_all()

    def wait(self, timeout: Optional[float]) -> None:
        """Wait until they run, for *timeout* seconds at most, or raise why they don't."""
        bell = Bell(None)
        self._waiting[bell] = None  # before the look
        if not self._settled:
            bell.sleep(timeout)
        if self._error is not None:
            raise self._error
