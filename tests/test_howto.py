"""The code on the pages on Django, Flask and downstreams works as shown."""

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from microbatch import Batcher
from tests.extras import needs
from tests.pages import ROOT, blocks, page, section, write_files


def run(folder: Path, *commands: Sequence[str]) -> str:
    done = ""
    for command in commands:
        outcome = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=25,
        )
        done += outcome.stdout
        assert 0 == outcome.returncode, done
    return done


def test_a_new_django_project_that_follows_the_page_works(tmp_path: Path) -> None:
    needs("django")
    run(tmp_path, ["-m", "django", "startproject", "shop", "."], ["manage.py", "startapp", "orders"])
    write_files("django", tmp_path)
    done = run(
        tmp_path,
        ["manage.py", "makemigrations", "orders"],
        ["manage.py", "migrate", "-v0"],
        ["-W", "error", "manage.py", "test"],
    )
    assert "Ran 1 test" in done and "OK" in done


def test_the_page_on_django_names_all_settings_and_shows_an_actual_error_message(tmp_path: Path) -> None:
    needs("django")
    from microbatch.integrations.django import _ARGUMENTS

    assert [] == [name for name in _ARGUMENTS if f"``{name}``" not in page("django")]
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Batcher(list, max_workers=0)
    assert "['MAX_WORKERS'] must be at least 1, got 0" in page("django")


def test_a_flask_application_that_follows_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("flask")
    write_files("flask", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shop = importlib.import_module("shop")
    app = shop.create_app()
    assert "id of Ada" == app.test_client().post("/people", data={"name": "Ada"}).text
    with app.app_context():
        shop.inserts.batcher.shutdown()
    del sys.modules["shop"]


def test_each_line_of_code_on_the_page_on_downstreams_is_in_an_example() -> None:
    examples = "".join(path.read_text() for path in (ROOT / "examples").glob("*.py")).replace("self.", "")
    with_postgresql = section("downstreams", "Serialization failures and deadlocks")  # see tests/test_postgresql.py
    rest = [block for block in blocks("downstreams") if block not in with_postgresql]
    shown = [line.strip() for block in rest for line in block.splitlines()]
    assert [] == [line for line in shown if not line.startswith("def ") and line not in examples]
