"""Helpers to test a collector alone: no thread, no lock, no clock. Moments are plain numbers."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from microbatch import NEVER, NOW, BatchInfo, BatchingPolicy, BatchReport, Window
from microbatch._forming.collector import Collector


@dataclass(eq=False)
class Job:
    job: Any
    key: Hashable = None
    weight: float = 1.0
    submitted: float = 0.0
    _expires: float = NEVER
    _epoch: int = 0
    _is_waiting: bool = True


class Light(BatchingPolicy[Any]):
    """At most 10 in weight, and never due: only a full batch is dispatched."""

    def due(self, window: Window[Any]) -> float:
        return float("inf")  # not the same object as NEVER

    def fits(self, window: Window[Any], weight: float) -> bool:
        return window.weight + weight <= 10


class Wavering(BatchingPolicy[Any]):
    """Due soon, then never, then now."""

    def due(self, window: Window[Any]) -> float:
        return {1: window.opened + 5, 2: float("inf"), 3: NOW}[window.count]


class Broken(BatchingPolicy[Any]):
    def due(self, window: Window[Any]) -> float:
        if "bad" in window.jobs:
            raise KeyError("bad")
        return window.opened + 1


class Counted(BatchingPolicy[Any]):
    """A policy without hints that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def due(self, window: Window[Any]) -> float:
        self.asked += 1
        return self.moment(window)

    def moment(self, window: Window[Any]) -> float:
        return window.opened


def collector(policy: BatchingPolicy[Any], workers: int = 1) -> Collector[Job]:
    return Collector(policy, workers, started=0.0)


def jobs(text: str, submitted: float = 0.0, **options: Any) -> list[Job]:
    return [Job(letter, submitted=submitted, **options) for letter in text]


def drop(collector: Collector[Job], job: Job) -> None:
    job._is_waiting = False
    collector.drop([job])


def take_all(collector: Collector[Job], now: float, pressed: bool = False) -> list[str]:
    """Take every batch that may be dispatched, finish none of them, and return each as ``jobs:trigger``."""
    taken = []
    while (batch := collector.take(now, pressed)) is not None:
        assert batch.error is None
        collector.started(now, batch.runs)
        taken.append("".join(entry.job for entry in batch.entries) + ":" + batch.trigger)
    return taken


def drain(c: Collector[Job], now: float = 0.0) -> list[Any]:
    """Take all batches, finish each a moment later, and return the jobs in the order in which they were dispatched."""
    taken = []
    while c:
        while (batch := c.take(now)) is not None:
            assert batch.error is None
            taken += [entry.job for entry in batch.entries]
            c.started(now)
        if c.in_flight:
            c.finished(0.5)
            c.policy.observe(BatchReport(BatchInfo(1, 1, 1.0, None, ""), 0.5, 0))
        elif (moment := c.next_moment()) < NEVER:
            now = max(now, moment)
        else:
            raise AssertionError("no batch would ever be dispatched")
        now += 0.25
    return taken
