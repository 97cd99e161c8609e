"""A progress bar of `tqdm` over the jobs of a batcher: the extra ``progress``.

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
else:  # it can't be subscripted
    _Tqdm = tqdm


class Bar(_Tqdm):
    """A `tqdm` without a thread that looks after it, and which needs none: it draws whenever it moves, if time allows."""

    monitor_interval = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"miniters": 1, **options})


class TqdmListener(BatchListener):
    """Moves a progress bar on by each job that is done, failed ones too; by those cancelled or expired at the shutdown.

    One is for one batcher, in the process that made it.

    Args:
        bar: a `tqdm`, of the console, a notebook or another; None for one of its own, which is closed at the shutdown.
            Where it knows no total, that is how many jobs have been submitted until then.
    """

    def __init__(self, bar: Any | None = None) -> None:
        self._own = bar is None
        self._bar = Bar(unit=" jobs") if bar is None else bar
        self._grows = self._bar.total is None
        self._mutex = threading.RLock()  # guards the bar; re-entrant for the sake of a finalizer that submits
        self._process = os.getpid()  # whose bar it is: a child may have been forked while the mutex was held

    def job_accepted(self, fact: JobAccepted) -> None:
        """Count a job in the total."""
        if self._grows and self._process == os.getpid():
            with self._mutex:
                self._bar.total = (self._bar.total or 0) + 1

    def batch_finished(self, fact: BatchFinished) -> None:
        """Move on."""
        self._update(fact.batch.size)

    def shutdown(self, fact: BatcherShutDown) -> None:
        """Move on by the jobs that were in no batch, and close the bar if nobody else will."""
        self._update(fact.stats.cancelled + fact.stats.expired)
        if self._own and self._process == os.getpid():
            self._bar.close()

    def _update(self, jobs: int) -> None:
        if self._process == os.getpid():
            with self._mutex:
                self._bar.update(jobs)
