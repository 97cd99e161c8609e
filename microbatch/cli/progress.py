"""Shows the progress of a command in one line, if standard error is a terminal. Otherwise, it writes nothing."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from microbatch._basics.clock import SystemClock

__all__ = ["Progress", "show_progress"]


class Progress(Protocol):
    """Interface of a progress display, such as a `tqdm`."""

    def update(self) -> object:
        """Count one more step."""

    def clear(self) -> object:
        """Remove the line, so that other text can be printed. The next `update` may print it again."""


@contextlib.contextmanager
def show_progress(
    unit: str, total: int | None = None, *, title: str = "", keep: bool = False, wanted: bool = True
) -> Iterator[Progress]:
    """Show how many steps are done, if standard error is a terminal.

    Args:
        unit: What one step is, in the plural, such as ``jobs``.
        total: The total number of steps, or None if it is unknown.
        title: A title for the line.
        keep: Leave the line on the screen at the end.
        wanted: Whether to show the line at all.
    """
    if not (wanted and sys.stderr.isatty()):
        yield _NoProgress()
        return
    try:
        from microbatch.integrations.tqdm import Bar
    except ImportError:
        counter = _Counter(f"{title}: " if title else "", f" of {total:,} {unit}" if total else f" {unit}")
        try:
            yield counter
        finally:
            counter.show("\n") if keep else counter.clear()
    else:
        with Bar(total=total, desc=title or None, unit=f" {unit}", leave=keep, file=sys.stderr) as bar:
            yield bar


class _NoProgress:
    def update(self) -> None:
        """See `Progress`."""

    def clear(self) -> None:
        """See `Progress`."""


class _Counter:
    """A progress display without `tqdm`. It updates the count about ten times per second."""

    def __init__(self, before: str, after: str) -> None:
        self._before, self._after = before, after
        self._clock = SystemClock()
        self._count = 0
        self._shown = self._clock.now()
        self._width = 0

    def update(self) -> None:
        """See `Progress`."""
        self._count += 1
        if self._clock.now() - self._shown >= 0.1:
            self.show("")

    def clear(self) -> None:
        """See `Progress`."""
        if self._width:
            print("\r" + " " * self._width, end="\r", file=sys.stderr, flush=True)
            self._width = 0

    def show(self, end: str) -> None:
        """Print the line, and *end* after it."""
        self._shown = self._clock.now()
        line = f"{self._before}{self._count:,}{self._after}"
        self._width = len(line)
        print(f"\r{line}", end=end, file=sys.stderr, flush=True)
