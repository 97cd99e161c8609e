"""Pages of results that are made of parts, so that a part can be measured again without the others."""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from benchmarks.tables import Table, render, rst

Item = TypeVar("Item")
Found = TypeVar("Found")


class Part(NamedTuple):
    """A section of a page.

    Attributes:
        title: Its heading, which no other part of the page may have.
        introduction: The text before its tables. Its lines are wrapped again.
        tables: Measures or simulates, and returns the tables.
    """

    title: str
    introduction: str
    tables: Callable[[], Iterable[Table]]

    def text(self) -> str:
        """Return the section without its heading."""
        paragraphs = [
            textwrap.fill(paragraph, 120, break_on_hyphens=False) for paragraph in self.introduction.split("\n\n")
        ]
        return "\n".join(["\n\n".join(paragraphs), "", *map(render, self.tables())])


def update(path: Path, title: str, parts: Mapping[str, Part], chosen: Iterable[str]) -> str:
    """Measure some parts of a page, and return the whole page. The other parts stay as they are in the file."""
    texts = sections(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in chosen:
        texts[parts[name].title] = parts[name].text()
    known = [part.title for part in parts.values() if part.title in texts]
    page = "\n".join([rst(title, "="), *(f"{rst(title)}\n{texts[title].strip()}\n" for title in known)])
    path.write_text(page, encoding="utf-8")
    return page


def sections(page: str) -> dict[str, str]:
    """Return the text of each section of a page, by its title."""
    _, *rest = re.split(r"^(.+)\n-+\n", page, flags=re.MULTILINE)
    return dict(zip(rest[::2], rest[1::2]))


def spread(function: Callable[[Item], Found], items: Iterable[Item], processes: int | None) -> list[Found]:
    """Call *function* with each item in several processes, and return the results in order."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(function, items))
