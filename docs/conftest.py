"""Runs the examples on the pages in an empty folder, because some of them write files."""

from pathlib import Path

import pytest

collect_ignore = ["conf.py"]  # needs Sphinx


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
