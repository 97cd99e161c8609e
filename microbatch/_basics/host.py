"""Processors that need something to run while a batcher uses them, such as an event loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["Host", "host_of"]


class Host(ABC):
    """A processor that needs something to run while a batcher uses it."""

    @abstractmethod
    def open(self) -> Callable[[], object]:
        """Note that a batcher uses the processor. Return what to call when that batcher has been shut down."""

    @abstractmethod
    def note_exit(self) -> None:
        """End the calls that can't end any more because the interpreter is exiting."""

    @abstractmethod
    def needs_this_thread(self) -> bool:
        """Return whether no call can end while the calling thread waits for it."""


def host_of(processor: Any) -> Host | None:
    """Return the host in a processor, which the wrappers of ``processors.py`` or a `partial` may be around."""
    while isinstance(processor, partial):
        processor = processor.args[0] if processor.args else processor.func
    return processor if isinstance(processor, Host) else None
