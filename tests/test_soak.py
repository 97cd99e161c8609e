"""The short form of ``python -m tests.soak``: a few rounds. ``SOAK_SECONDS`` (20) makes it longer."""

import os
import sys

import pytest

from tests.soak import growth, soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc"),
    pytest.mark.timeout(SECONDS + 240),
]


def test_a_process_that_uses_batchers_for_a_long_time_does_not_grow() -> None:
    samples = list(soak(SECONDS, longest=1.0))
    assert growth(samples, "threads") <= 0
    assert growth(samples, "descriptors") <= 0
    assert growth(samples, "objects") < 200
    assert growth(samples, "megabytes") < 5
