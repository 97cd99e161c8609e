"""Shows the progress of the jobs of a batcher with `tqdm`. Needs the extra ``progress``.

>>> import io
>>> from microbatch import Batcher
>>> rows = ["Ada", "Grace", "Edsger"]
>>> bar = Bar(total=len(rows), file=io.StringIO())
>>> with bar, Batcher(list, listeners=[TqdmListener(bar)]) as batcher:
...     results = list(batcher.map(rows))
>>> bar.n
3
"""

import os
import threading
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from microbatch import BatcherShutDown, BatchFinished, BatchListener, JobAccepted

__all__ = ["Bar", "TqdmListener"]


if TYPE_CHECKING:
    _Tqdm = tqdm[Any]
else:  # the class can't be subscripted at run time
    _Tqdm = tqdm


class Bar(_Tqdm):
    """A `tqdm` without a monitor thread. It needs none, because every update may redraw it."""

    monitor_interval = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"miniters": 1, **options})


class TqdmListener(BatchListener):
    """A listener that advances a progress bar by one for each job that succeeds or fails.

    Jobs that were cancelled or dropped, or that expired, are counted at the shutdown. Use a new listener for each batcher. It only
    works in the process that created it, not in a forked child.

    Args:
        bar: A `tqdm` of any kind, such as one for a notebook. If it has no total, the listener sets the total to the
            number of jobs submitted so far. None to create a bar, which is closed at the shutdown.
    """

    def __init__(self, bar: Any | None = None) -> None:
        self._own = bar is None
        self._bar = Bar(unit=" jobs") if bar is None else bar
        self._grows = self._bar.total is None
        # Guards the bar. Re-entrant, because a finalizer may submit a job in the same thread.
        self._mutex = threading.RLock()
        self._process = os.getpid()  # a forked child must not use the mutex, which may have been held at the fork

    def job_accepted(self, event: JobAccepted) -> None:
        """Add the job to the total."""
        if self._grows and self._process == os.getpid():
            with self._mutex:
                self._bar.total = (self._bar.total or 0) + 1

    def batch_finished(self, event: BatchFinished) -> None:
        """Advance the bar by the jobs of the batch."""
        self._update(event.batch.size)

    def shutdown(self, event: BatcherShutDown) -> None:
        """Advance the bar by the jobs that were in no batch. Close the bar if this listener created it."""
        self._update(event.stats.cancelled + event.stats.expired + event.stats.dropped)
        if self._own and self._process == os.getpid():
            self._bar.close()

    def _update(self, jobs: int) -> None:
        if self._process == os.getpid():
            with self._mutex:
                self._bar.update(jobs)
