"""Search all models for a schedule in which they fail, and find out whether they notice the faults in ``mutants.py``.

This needs Python 3.12 or later. A schedule in which a model fails is printed, and written to a file that
``test_schedules.py`` replays.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.schedules.models import MODELS
from tests.schedules.mutants import MUTANTS, Mutant
from tests.schedules.search import search

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def search_in_subprocess(model: str, schedules: int, seed: int = 0, mutant: Mutant | None = None) -> dict[str, Any]:
    """Search a model in a process of its own, which imports a copy of the package with the fault, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        if mutant is not None:
            _make_mutant(mutant, Path(folder, "microbatch"))
        command = [sys.executable, "-m", "tests.schedules", "--json", model]
        command += ["--schedules", str(schedules), "--seed", str(seed)]
        done = subprocess.run(command, env=_environment(folder), capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        raise RuntimeError(f"the search of {model} failed: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return result


def _environment(folder: str) -> dict[str, str]:
    """Return environment variables with which Python imports what is in *folder* first."""
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}


def first_failing_seed(mutant: Mutant) -> str | None:
    """Return the first seed of ``test_seeds.py`` that fails with a fault in the package."""
    with tempfile.TemporaryDirectory() as folder:
        _make_mutant(mutant, Path(folder, "microbatch"))
        command = [sys.executable, "-m", "pytest", "-m", "", "--import-mode=append", "-p", "no:cacheprovider"]
        command.append("tests/test_seeds.py")
        done = subprocess.run(command, cwd=ROOT, env=_environment(folder), capture_output=True, text=True)
    seed = re.search(r"AssertionError: seed (\d+)", done.stdout)
    return None if seed is None else seed[1]


def _make_mutant(mutant: Mutant, package: Path) -> None:
    shutil.copytree(ROOT / "microbatch", package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has changed, so change this mutant too: {mutant.name}")
    path.write_text(text.replace(mutant.old, mutant.new))


def report(found: dict[str, Any]) -> str:
    """Return what to print about a schedule in which a model fails."""
    switches = "\n".join(str(switch) for switch in found["plan"])
    return f"{found['error']}\n{switches}\n{found['columns']}"


def _search_models(names: list[str], schedules: int, seed: int) -> bool:
    """Return whether no model fails."""
    passed = True
    for name in names:
        result = search_in_subprocess(name, schedules, seed)
        complete = (
            f"all with {result['complete_in_focus']} switches in its focus, {result['complete_anywhere']} anywhere"
        )
        print(f"{name:34} {result['schedules']:6,} schedules in {result['seconds']:5.1f} s: {complete}", flush=True)
        if result["found"]:
            passed = False
            print(report(result["found"]))
            path = HERE / "found" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"model": name, "switches": result["found"]["plan"]}, indent=1) + "\n")
            print(f"This schedule is in {path}.")
    return passed


def _search_mutants(text: str, schedules: int, seed: int) -> bool:
    """Return whether all faults are found."""
    passed = True
    for mutant in MUTANTS:
        if text in mutant.name:
            if mutant.model == "seeds":
                failing = first_failing_seed(mutant)
                found = "NOT FOUND" if failing is None else f"with seed {failing}"
            else:
                result = search_in_subprocess(mutant.model, schedules, seed, mutant)
                found = f"after {result['schedules']:,} schedules" if result["found"] else "NOT FOUND"
            print(f"{mutant.name:64} {mutant.model:34} {found}", flush=True)
            passed = passed and found != "NOT FOUND"
    return passed


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.schedules", description=__doc__)
    parser.add_argument("models", nargs="*", help="the models to search (all)")
    parser.add_argument(
        "--mutants", metavar="TEXT", help="check that the faults whose names contain TEXT are found (all: '')"
    )
    parser.add_argument("--schedules", type=int, default=1_000, help="how many schedules of each model to try (1000)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the random choices (0)")
    parser.add_argument("--json", action="store_true", help="search one model in this process, and print JSON")
    options = parser.parse_args()
    if options.json:
        searched = search(MODELS[options.models[0]], options.schedules, options.seed)
        found = searched.found
        print(json.dumps({**searched._asdict(), "found": found and found._asdict()}), flush=True)
        os._exit(0)  # does not wait for threads that a fault has left waiting
    elif options.mutants is not None:
        sys.exit(not _search_mutants(options.mutants, options.schedules, options.seed))
    else:
        sys.exit(not _search_models(options.models or list(MODELS), options.schedules, options.seed))


if __name__ == "__main__":
    _main()
