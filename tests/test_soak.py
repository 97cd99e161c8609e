"""The short form of ``python -m tests.soak``, for ``SOAK_SECONDS`` (20)."""

import os
import sys

import pytest

from tests.soak import grown, soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "20"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc"),
    pytest.mark.timeout(SECONDS + 240),
]


def test_a_process_that_uses_batchers_for_a_long_time_does_not_grow() -> None:
    samples = list(soak(SECONDS, max_round=1.0))
    assert {"megabytes"} >= set(grown(samples))  # the memory still grows in the first minute
