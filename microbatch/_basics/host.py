"""Processors that need something to run while a batcher uses them, such as an event loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["Host", "host_of"]


class Host:
    """A processor that needs something to run while a batcher uses it."""

    def open(self) -> Callable[[], object]:
        """Note that a batcher uses the processor. Return what to call when that batcher has been shut down."""
        raise NotImplementedError

    def needs_this_thread(self) -> bool:
        """Return whether no call can end while the calling thread waits for it."""
        raise NotImplementedError


def host_of(processor: Any) -> Host | None:
    """Return the host in a processor, which the wrappers of ``processors.py`` or a `partial` may be around."""
    while isinstance(processor, partial):
        processor = processor.args[0] if processor.args else processor.func
    return processor if isinstance(processor, Host) else None
