"""Tries many schedules of each model: see ``search.py``.

``SCHEDULES`` is the number of schedules of each model (125). ``python -m tests.schedules`` tries more.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("interleave_test", reason="interleave-test needs Python 3.12 or later")

from tests.schedules.__main__ import report, search_in_subprocess
from tests.schedules.models import MODELS
from tests.schedules.search import Replay, Switch, run

pytestmark = [pytest.mark.schedules, pytest.mark.timeout(300)]

SCHEDULES = int(os.environ.get("SCHEDULES", "125"))


@pytest.mark.parametrize("model", MODELS)
def test_no_schedule_makes_a_model_fail(model: str) -> None:
    result = search_in_subprocess(model, SCHEDULES)
    assert not result["found"], report(result["found"])
    assert result["schedules"] == SCHEDULES


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("found/*.json")), ids=lambda path: str(path.stem))
def test_a_schedule_that_once_made_a_model_fail_passes(path: Path) -> None:
    found = json.loads(path.read_text())
    result = run(MODELS[found["model"]], Replay(tuple(Switch(*switch) for switch in found["switches"])))
    assert result.ok, result.failure.traceback
