"""The code that the pages in docs/ show."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_BLOCK = r"\.\. code-block:: python\n\n((?: {4}.*\n|\n)+)"


def page(name: str) -> str:
    """Return the text of a page."""
    return (ROOT / "docs" / f"{name}.rst").read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """Return the code blocks of a page that are not doctests."""
    return [block for block in _python(page(name)) if ">>>" not in block]


def section(name: str, title: str = "") -> list[str]:
    """Return the code blocks in one section of a page, or those before the first section."""
    parts = re.split(r"\n\n(\S.*)\n(?:[-~]{4,}\n)", page(name))
    return _python(dict(zip(["", *parts[1::2]], parts[::2]))[title])


def _python(text: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(_BLOCK, text + "\n")]


def files(name: str) -> list[tuple[str, str]]:
    """Return the path and the code of each block of a page to which the page gives a path."""
    # The sentence before it may come first: "Without FastAPI, use the same file. Add to ``plain.py``:".
    found = re.findall(rf"Add to ``(\S+)``:\n\n{_BLOCK}", page(name))
    return [(path, textwrap.dedent(block)) for path, block in found]


def write_files(name: str, folder: Path) -> None:
    """Write the files of a page, which may continue a file that exists."""
    for path, code in files(name):
        with open(folder / path, "a", encoding="utf-8") as file:
            file.write(code)


makes_the_batcher_busy = pytest.mark.parametrize(
    "wait, others, expired",
    [("timeout=1,", ["running", "waiting"], 0), ("expires_in=5", ["running"], 1), ("timeout=10", ["running"], 0)],
    ids=["BacklogFull", "JobExpired", "TimeoutError"],
)
"""The cases in which a view on a page responds with status 503, if batches have one job and so has the queue.

Each case has the time limit that runs out, the jobs that are submitted before that of the view, and how many jobs expire.
"""


def in_a_hurry(code: str, wait: str) -> str:
    """Return the code of a page with one of its time limits set to almost nothing."""
    assert 1 == code.count(wait), f"the page should have {wait!r} once"
    return code.replace(wait, re.sub(r"\d+", "0.01", wait))
