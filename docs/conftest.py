"""What the pages show runs in an empty folder, since some of it writes files."""

from pathlib import Path

import pytest

collect_ignore = ["conf.py"]  # which needs Sphinx


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
