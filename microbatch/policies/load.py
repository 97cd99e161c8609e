"""Policies that decide by the load: by which workers are free, and by which callers wait for results."""

import sys

from microbatch._basics.arguments import check_positive
from microbatch.policies.base import BatchingPolicy, BuiltInPolicy, Hints, Window
from microbatch.policies.best_size import BestSize

__all__ = ["AllWaiting", "DEFAULT_POLICY", "Natural"]


class Natural(BuiltInPolicy):
    """Dispatches a batch as soon as a worker is free, except in the two cases below.

    While all workers are busy, jobs gather. So batches grow with the load, and with the service time of the processor.

    First, with several workers, it spaces the dispatches, so that idle workers don't each take a batch of one job. The
    time between two dispatches is at least the service time divided by the number of workers. If all workers are idle,
    it does not wait, because the next batch may take much less time than the last ones did:

    >>> [Natural().due(Window(opened=10.0, sent=[9.75], in_flight=1, service_time=2.0, workers=n)) for n in (1, 4, 8)]
    [10.0, 10.25, 10.0]
    >>> Natural().due(Window(opened=10.0, sent=[9.75], in_flight=0, service_time=2.0, workers=4))
    10.0

    Second, if only one worker is free, it waits for callers that just got a result and are likely to submit their next
    job soon. Otherwise these callers would miss the batch, and would have to wait for a whole service time. The more
    jobs are in the batch, the shorter the wait, because all of them pay for it:

    >>> from microbatch import CallerActivity
    >>> soon = CallerActivity(returning=1, return_by=11.0)
    >>> [Natural().due(Window(count=n, newest=10.0, service_time=2.0, callers=soon)) for n in (1, 4, 40)]
    [11.0, 10.5, 10.05]

    In both cases, it stops waiting when the next job does not fit into the batch.
    """

    _gates = 1
    hints: Hints = Hints(watches_callers=True)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        due = window.opened
        if window.full:
            return due  # waiting longer is useless: no more jobs can join
        # If all workers are busy, one of them becomes free every `pace` seconds on average.
        pace = window.service_time / min(window.workers, sys.maxsize)
        if window.workers > 1 and window.in_flight and window.sent:
            due = max(due, window.sent[-1] + pace)
        if window.callers.returning and window.in_flight == window.workers - 1:
            patience = pace * window.callers.returning / window.count
            due = max(due, min(window.newest + patience, window.callers.return_by))
        return due


class AllWaiting(BuiltInPolicy):
    """Dispatches a batch as soon as every caller that was active in the last *recent* seconds waits for a result.

    A caller is active when it submits a job or gets a result. While it waits in `JobFuture.result`, it can't add a job.
    So a script with one thread that calls ``submit().result()`` never waits for other jobs. Several callers that each
    submit and wait in a loop share a batch, which is dispatched when the last of them has submitted its job.

    A caller that submits jobs without waiting keeps the batch open until it has been inactive for *recent* seconds. Add
    ``| Interval(seconds)`` to limit that. Callers that wait with ``concurrent.futures.wait``, ``as_completed``, a
    callback or asyncio keep it open too, because the batcher does not notice that they wait.

    >>> from microbatch import CallerActivity, Interval
    >>> policy = AllWaiting(recent=0.1) | Interval(0.005)
    >>> policy.due(Window(count=1, opened=10.0, callers=CallerActivity(heard=10.0)))
    10.005
    >>> policy.due(Window(count=1, opened=10.0))
    -inf
    """

    _gates = 1

    def __init__(self, recent: float = 0.1) -> None:
        self.recent: float = check_positive("recent", recent)

    @property
    def hints(self) -> Hints:
        """See `BatchingPolicy.hints`."""
        return Hints(watches_flow=False, recalls=self.recent)

    def due(self, window: Window[object]) -> float:
        """See `BatchingPolicy.due`."""
        return window.callers.heard + self.recent


DEFAULT_POLICY: BatchingPolicy[object] = BestSize(100) | Natural()
"""Dispatches a batch of at most 100 jobs as soon as a worker is free (natural batching).

A single job does not wait for others, and batches grow with the load. If larger batches turn out to take more time per
job, `BestSize` keeps them smaller. `Natural` describes two cases in which a batch that is not full waits a moment
longer.
"""
