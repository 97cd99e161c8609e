"""The code on the pages on Django, Flask and downstreams works as shown."""

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microbatch.integrations.pytest import pytest_microbatch
from tests.extras import needs
from tests.pages import ROOT, blocks, page, section, write_files

PLUGIN = Path(pytest_microbatch.__file__)


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


@pytest.fixture(scope="module")
def django_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project, with the code of the page."""
    needs("django")
    folder = tmp_path_factory.mktemp("django")
    run(folder, ["-m", "django", "startproject", "shop", "."], ["manage.py", "startapp", "orders"])
    write_files("django", folder)
    run(folder, ["manage.py", "makemigrations", "orders"])
    return folder


def test_a_new_django_project_that_follows_the_page_works(django_project: Path) -> None:
    done = run(django_project, ["manage.py", "migrate", "-v0"], ["-W", "error", "manage.py", "test"])
    assert "Ran 1 test" in done and "OK" in done
    assert "batch 1 of orders: 1 jobs" in done


def test_the_test_for_pytest_on_the_page_on_django_passes(
    django_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("pytest_django")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # whether or not this package is installed
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [ROOT, PLUGIN.parent])))
    plugins = ["-p", "pytest_django.plugin", "-p", PLUGIN.stem]
    done = run(django_project, ["-m", "pytest", "-W", "error", "--ds=shop.settings", *plugins])
    assert "1 passed" in done
    assert "Logging error" not in done  # as for a batcher that is shut down when pytest has closed its streams


def test_the_page_on_django_names_all_settings() -> None:
    needs("django")
    from microbatch.integrations.django import _ARGUMENTS

    assert [] == [name for name in _ARGUMENTS if f"``{name}``" not in page("django")]


@pytest.mark.parametrize("wrong", [{"MAX_WORKERS": 0}, {"POLICY": "Size(0)"}], ids=str)
def test_the_page_on_django_shows_the_message_for_a_wrong_setting(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("django")
    from django.core.exceptions import ImproperlyConfigured

    from microbatch.integrations import django

    settings = SimpleNamespace(MICROBATCH={"orders": {"PROCESSOR": list, **wrong}})
    monkeypatch.setattr(django, "conf", SimpleNamespace(settings=settings))
    with pytest.raises(ImproperlyConfigured) as raised:
        django.Batchers()["orders"]
    assert f"``{raised.value}``" in " ".join(page("django").split())


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


def test_the_code_on_the_page_on_downstreams_is_in_the_examples() -> None:
    examples = [without_signatures(path.read_text(encoding="utf-8")) for path in (ROOT / "examples").glob("*.py")]
    with_postgresql = section("downstreams", "Serialization failures and deadlocks")  # see tests/test_postgresql.py
    shown = [without_signatures(block) for block in blocks("downstreams") if block not in with_postgresql]
    assert shown
    assert [] == [code for code in shown if not any(code in example for example in examples)]


def without_signatures(code: str) -> str:
    """Return the lines of *code*, without the lines that define a function, which have types in the examples."""
    lines = [line.strip().replace("self.", "") for line in code.splitlines()]
    return "".join(f"\n{line}\n" for line in lines if line and not line.startswith("def "))
