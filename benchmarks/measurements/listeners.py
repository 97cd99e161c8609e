"""What it costs to be told: submit then gather, with nobody who listens, and with each who could.

As ``gather``, from one thread. A listener to batches is called twice for 64 jobs; one to jobs once for each of them too,
in the thread that submits. Both do nothing, so that what is left is the telling; the integrations do their work, without
somebody who scrapes, exports or reads. The log goes nowhere, at the level of a batch that went well.
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
