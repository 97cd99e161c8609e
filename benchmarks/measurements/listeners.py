"""Listeners: what it costs to notify them.

Like ``gather``, from one thread, without a listener and with each of several listeners. A listener to batches is called
twice per batch. A listener to jobs is also called once per job, in the thread that submits it. These two do nothing, so
they show the cost of the calls. The integrations do their usual work, but their log lines, metrics, spans and bars stay
in memory.
"""

from benchmarks.measurements.base import Measurement
from benchmarks.measurements.gather import FIGURES, GATHER, run

LISTENERS = Measurement(
    name="listeners",
    title="Listeners",
    about="Submit all jobs, then read all results, with and without listeners.",
    run=run,
    figures=FIGURES,
    contenders=(
        "microbatch",
        "listener-batches",
        "listener-jobs",
        "listener-context",
        "listener-logging",
        "listener-prometheus",
        "listener-opentelemetry",
        "listener-tqdm",
    ),
    cases=GATHER.cases[:1],
    quick=GATHER.quick[:1],
    ratios=[("wall", "microbatch")],
    plot="wall",
)
