"""The lines of the input, and their outcomes."""

import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from microbatch import JobFuture

__all__ = ["Line", "Outcome", "failure", "in_one_line", "outcome_of", "read_lines"]


class Line(NamedTuple):
    """A line of the input that is not blank."""

    number: int
    """The number of the line in the input, counted from 1. Blank lines count too."""
    text: str
    """The line if it is JSON, otherwise a JSON string that contains it."""
    job: Any
    """The value of the line, or None if it is not JSON."""
    problem: str = ""
    """Why the line is not JSON, or an empty string if it is."""

    @property
    def checksum(self) -> int:
        """The CRC-32 of the text. If the text changes, this almost certainly changes too."""
        return zlib.crc32(self.text.encode())


class Outcome(NamedTuple):
    """The outcome of a line: a result, or a failure."""

    result: str | None
    """The result as JSON, or None if the line failed."""
    kind: str = ""
    """The type of the failure."""
    error: str = ""
    """The message of the failure."""


def read_lines(source: Iterable[bytes]) -> Iterator[Line]:
    """Parse the lines of *source*, except those that are blank."""
    return (_parsed(number, line) for number, line in enumerate(source, start=1) if line.strip())


def _parsed(number: int, line: bytes) -> Line:
    try:
        text = line.decode("utf-8-sig")
        return Line(number, text.strip(), json.loads(text, parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        text = line.decode(errors="backslashreplace").strip()
        return Line(number, json.dumps(text, ensure_ascii=False), None, f"not JSON: {problem}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def outcome_of(future: JobFuture[Any]) -> Outcome:
    """Wait for *future*, and return its result as JSON, or its failure."""
    try:
        result = json.dumps(future.result().value, ensure_ascii=False, allow_nan=False)
        result.encode()  # fails if the result has a lone surrogate
    except BaseException as error:
        return failure(error)
    return Outcome(result)


def failure(error: BaseException) -> Outcome:
    """Return the outcome of a line that failed with *error*."""
    return Outcome(None, type(error).__name__, in_one_line(error))


def in_one_line(error: BaseException) -> str:
    """Return the class and the beginning of the text of *error*, in one line, without `ValueError` if it has text."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as another:  # from the user's exception class
        text = f"(its text is not available: {type(another).__name__})"
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:1000]).split())
    return text if type(error) is ValueError and text else f"{name}: {text}" if text else name
