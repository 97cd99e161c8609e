"""The commands, pictures and links of the pages work, and the reference is complete."""

import re
import shlex
from pathlib import Path

import pytest

import microbatch
from microbatch.cli import main
from tests.extras import needs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]


def commands(name: str) -> list[list[str]]:
    return [
        shlex.split(line)
        for page in PAGES
        for line in re.findall(rf"^ +\$ microbatch {name} (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


SIMULATIONS = commands("simulate")
QUESTIONS = commands("advise")


def test_the_pages_contain_commands() -> None:
    assert len(SIMULATIONS) > 5
    assert len(QUESTIONS) > 1


@pytest.mark.parametrize("command", SIMULATIONS, ids=" ".join)
def test_a_command_from_a_page_runs_and_prints_a_row_for_each_policy(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "trace.jsonl").write_text('{"submitted": [1, 2], "service_time": 1}', encoding="utf-8")
    if "--plot" in command:
        needs("matplotlib")
    assert 0 == main(["simulate", *command, "--jobs", "300"])
    rows = capsys.readouterr().out.splitlines()
    assert (len([word for word in command if "(" in word]) or 3) == len(rows) - 1
    assert [path for path in command if path.endswith(".svg")] == [
        f"docs/{path.name}" for path in tmp_path.rglob("*.svg")
    ]


@pytest.mark.parametrize("command", QUESTIONS, ids=" ".join)
def test_a_question_from_a_page_gets_an_answer(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "trace.jsonl").write_text('{"submitted": [1, 2], "service_time": 1}', encoding="utf-8")
    if "--plot" in command:
        needs("matplotlib")
    assert 0 == main(["advise", *command, "--jobs", "60"])
    assert 1 == capsys.readouterr().out.count("\n    policy = ")
    assert [path for path in command if path.endswith(".svg")] == [
        f"docs/{path.name}" for path in tmp_path.rglob("*.svg")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_picture_of_a_page_exists(page: Path) -> None:
    for path in re.findall(r"^\.\. image:: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert (page.parent / path).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_page_that_a_page_links_to_exists(page: Path) -> None:
    for path in re.findall(r"<([\w./]+\.rst)(?:#[\w-]+)?>`__", page.read_text(encoding="utf-8")):
        assert (page.parent / path).is_file(), path


def test_the_reference_documents_each_public_name_exactly_once() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.rst"))
    entries = re.findall(r"^\.\. (?!automodule)[a-z:]+:: microbatch\.(\w+)(?:\(\))?$", pages, re.MULTILINE)
    assert sorted(microbatch.__all__) == sorted(entries)


def test_the_map_names_only_files_and_objects_that_exist() -> None:
    sources = [path for folder in ("microbatch", "tests", "docs") for path in (ROOT / folder).rglob("*.*")]
    paths = [f"/{path.relative_to(ROOT).as_posix()}" for path in sources]
    code = "".join(path.read_text(encoding="utf-8") for path in sources if path.suffix == ".py")
    words = set(re.findall(r"\w+", code))
    page = (ROOT / "docs" / "map.rst").read_text(encoding="utf-8")
    names = re.findall(r"``([\w./]+)(?:\(\))?``", page)
    files = [name for name in names if "/" in name or name.endswith(".py")]
    assert [] == [name for name in files if not any(f"/{name}" in path for path in paths)]
    assert [] == [name for name in names if name not in files and not words.issuperset(name.split("."))]
