"""The faults in ``mutants.py``. ``python -m tests.schedules --mutants ''`` finds out which models notice them."""

from pathlib import Path

import pytest

import microbatch
from tests.schedules.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: str(mutant.name))
def test_the_text_that_a_mutant_replaces_is_in_its_file_once(mutant: Mutant) -> None:
    assert Path(microbatch.__file__).parent.joinpath(mutant.file).read_text().count(mutant.old) == 1
