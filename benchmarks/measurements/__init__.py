"""The measurements, with a module for each question."""

from benchmarks.measurements.closed import CLOSED
from benchmarks.measurements.contention import CONTENTION
from benchmarks.measurements.gather import GATHER
from benchmarks.measurements.idle import IDLE
from benchmarks.measurements.importing import IMPORT
from benchmarks.measurements.listeners import LISTENERS
from benchmarks.measurements.lone import LONE
from benchmarks.measurements.memory import MEMORY
from benchmarks.measurements.open_loop import OPEN
from benchmarks.measurements.scale import JOBS, KEYS, THREADS
from benchmarks.measurements.shutdown import SHUTDOWN
from benchmarks.measurements.timer import TIMER

MEASUREMENTS = {
    measurement.name: measurement
    for measurement in (
        GATHER,
        CLOSED,
        CONTENTION,
        LONE,
        OPEN,
        IDLE,
        IMPORT,
        TIMER,
        MEMORY,
        SHUTDOWN,
        JOBS,
        THREADS,
        KEYS,
        LISTENERS,
    )
}
