"""Simulates a policy under a load, in virtual time, before you use it in production.

>>> from microbatch import Interval, Size
>>> report = simulate(Size(3) | Interval(0.5), arrivals=[0.0, 0.1, 0.2, 5.0], service_time=lambda size: 1.0)
>>> report.batch_sizes, dict(report.triggers)
((3, 1), {'size': 1, 'interval': 1})
>>> round(report.mean, 3), round(report.utilisation, 3)
(1.2, 0.308)

The simulator uses the same collector as a real batcher, but no threads, and it never sleeps. So an hour of load takes
seconds to simulate, and the same arguments always give the same report.
"""

from microbatch.simulation.simulator import (
    Arrival,
    Run,
    SimulatedBatch,
    SimulatedFailure,
    SimulationReport,
    callers,
    lognormal,
    poisson,
    simulate,
)

__all__ = [
    "Arrival",
    "Run",
    "SimulatedBatch",
    "SimulatedFailure",
    "SimulationReport",
    "callers",
    "lognormal",
    "poisson",
    "simulate",
]
