"""Runs the contenders in turns, each in a new process. So a slow machine slows down all of them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measurements.base import Case, Measurement

ROOT = Path(__file__).parents[1]

Launch = Callable[[Sequence[str], float], Mapping[str, Any]]
"""Runs `benchmarks.one` with the given arguments for at most the given seconds, and returns what it prints."""


@dataclass(frozen=True)
class Run:
    """One run of one contender: its figures, or the reason why it has none."""

    measurement: str
    case: str
    contender: str
    repeat: int
    figures: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


def launch(arguments: Sequence[str], timeout: float) -> Mapping[str, Any]:
    """Run `benchmarks.one` in a new process, and return its outcome, also if it hangs or crashes."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.one", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"hung": f"killed after {timeout:g} s"}
    lines = done.stdout.splitlines()
    try:
        outcome: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = done.stderr.splitlines()[-1:] or [""]
        return {"failed": f"exit status {done.returncode}: {last[0]}"}
    return outcome


def alternate(
    measurement: Measurement,
    cases: Iterable[Case],
    contenders: Sequence[str],
    repeats: int,
    timeout: float,
    launch: Launch = launch,
) -> Iterator[Run]:
    """Yield each run of a measurement when it ends.

    If a contender does not support a case, or hangs in it, it is not run again in that case.
    """
    out = set()
    cases = list(cases)
    for repeat in range(repeats):
        for case in cases:
            for contender in contenders:
                if (case.label, contender) in out:
                    continue
                settings = [f"{key}={value}" for key, value in case.settings.items()]
                outcome = launch([measurement.name, contender, *settings], timeout)
                if "skipped" in outcome or "hung" in outcome:
                    out.add((case.label, contender))
                yield Run(
                    measurement.name, case.label, contender, repeat, outcome.get("figures", {}), _problem(outcome)
                )


def _problem(outcome: Mapping[str, Any]) -> str:
    problem = next((f"{word}: {outcome[word]}" for word in ("skipped", "failed", "hung") if word in outcome), "")
    return re.sub(r"\S*[/\\](?=\S)", "", problem)[:120]  # no path of this machine


def to_json(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return *runs* as objects that JSON can represent."""
    return [asdict(run) for run in runs]
