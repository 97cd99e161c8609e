"""Try a policy on a load before production: the same policies, and the same collector, in virtual time.

>>> from microbatch import Interval, Size
>>> report = simulate(Size(3) | Interval(0.5), arrivals=[0.0, 0.1, 0.2, 5.0], service_time=lambda size: 1.0)
>>> report.batch_sizes, dict(report.triggers)
((3, 1), {'size': 1, 'interval': 1})
>>> round(report.mean, 3), round(report.utilisation, 3)
(1.2, 0.308)

No thread runs and nothing sleeps, so that a simulated hour takes seconds, and the same arguments give the same report.
"""

from microbatch.simulation.simulator import Arrival, Run, SimulationReport, callers, poisson, simulate

__all__ = ["Arrival", "Run", "SimulationReport", "callers", "poisson", "simulate"]
