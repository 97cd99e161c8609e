"""The files of ``microbatch run``: the input, the output, the errors and the journal."""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import combinations
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from microbatch.cli.journal import Journal
from microbatch.cli.lines import read_lines

__all__ = ["Files", "GzipSink", "Sink", "open_files"]


class Sink(Protocol):
    """A file for results or errors."""

    def write(self, data: bytes, /) -> object:
        """Write *data*, or keep it in a buffer until the next `flush`."""

    def flush(self) -> None:
        """Write the contents of the buffer."""

    def isatty(self) -> bool:
        """Return whether this is a terminal."""


class Files(NamedTuple):
    """The files of a run.

    Attributes:
        source: The lines of the input.
        sink: The file for the results.
        errors: The file for failed lines, or None.
        journal: The journal, or None.
    """

    source: Iterable[bytes]
    sink: Sink
    errors: Sink | None
    journal: Journal | None


class GzipSink:
    """Compresses data into another file. Unlike `gzip.GzipFile`, it writes nothing when it is garbage-collected."""

    def __init__(self, file: Sink) -> None:
        self._file = file
        self._compressor = zlib.compressobj(wbits=31)  # with the header of a gzip file

    def write(self, data: bytes, /) -> None:
        """See `Sink`."""
        self._file.write(self._compressor.compress(data))

    def flush(self) -> None:
        """See `Sink`."""
        self._file.write(self._compressor.flush(zlib.Z_SYNC_FLUSH))
        self._file.flush()

    def isatty(self) -> bool:
        """See `Sink`."""
        return False

    def finish(self) -> None:
        """Write the end of the compressed data."""
        self._file.write(self._compressor.flush(zlib.Z_FINISH))
        self._file.flush()


def open_files(
    source_path: str,
    sink_path: str,
    errors_path: str | None,
    journal_path: str | None,
    run: str,
    *,
    stdin: BinaryIO,
    stdout: BinaryIO,
    stack: ExitStack,
) -> Files:
    """Open the files. The outputs are truncated only if all files can be used, and the journal fits the input.

    Otherwise, files that did not exist before are removed.

    A path of ``-`` means *stdin* or *stdout*. Files whose names end with ``.gz`` are compressed, except the journal.

    Args:
        source_path: The input.
        sink_path: The output for the results.
        errors_path: The output for failed lines, or None.
        journal_path: The journal, or None.
        run: The command-line arguments with which the journal must have been written.
        stdin: The standard input.
        stdout: The standard output.
        stack: Closes the files.

    Raises:
        OSError: A file can't be opened or read.
        ValueError: A file is used twice, or the journal is not a file.
        JournalError: The journal belongs to another run or another input, or another process is using it.
    """

    created = list[str]()
    stack.callback(_remove_all, created)  # after all files were closed

    def opened(role: str, path: str, mode: str) -> Any:
        if os.path.isdir(path):
            raise ValueError(f"the {role} must be a file, got the directory {path}")
        if mode != "rb":
            with suppress(FileExistsError):
                file = stack.enter_context(open(path, mode, buffering=0, opener=_create))
                created.append(path)
                return file
        return stack.enter_context(open(path, mode, buffering=-1 if mode == "rb" else 0))

    def appending(path: str) -> BinaryIO:
        # Only the raw file is closed. If a write is blocked because no program reads the pipe, it holds the lock of the
        # buffer, and closing the buffer would block too.
        return cast(BinaryIO, io.BufferedWriter(opened("output", path, "ab")))

    source = stdin if source_path == "-" else opened("input", source_path, "rb")
    sink = stdout if sink_path == "-" else appending(sink_path)
    errors = None if errors_path is None else stdout if errors_path == "-" else appending(errors_path)
    raw_journal = None if journal_path is None else opened("journal", journal_path, "a+b")
    files = [("input", source_path, source), ("output", sink_path, sink), ("output", errors_path, errors)]
    _check_distinct([*files, ("journal", journal_path, raw_journal)])
    journal = None
    if journal_path is not None and raw_journal is not None:
        if _identity(raw_journal) is None:
            raise ValueError(f"the journal must be a regular file, got {journal_path}")
        journal = Journal(journal_path, raw_journal, run)
        if source.seekable():
            start = source.tell()
            journal.check(read_lines(_lines(source_path, source)))
            source.seek(start)
    for path, output in ((sink_path, sink), (errors_path, errors)):
        if output is not None and path != "-" and _identity(output) is not None:
            output.truncate(0)
    created.clear()
    return Files(
        _lines(source_path, source),
        _compressed(sink_path, sink),
        _compressed(errors_path, errors) if errors_path is not None and errors is not None else None,
        journal,
    )


def _create(path: str, flags: int) -> int:
    """Open a file that does not exist yet."""
    return os.open(path, flags | os.O_EXCL, 0o666)


def _remove_all(paths: list[str]) -> None:
    for path in paths:
        with suppress(OSError):
            os.remove(path)


def _check_distinct(files: Iterable[tuple[str, str | None, BinaryIO | io.FileIO | None]]) -> None:
    """Raise ValueError if two of the files, each with its role and its path, are the same."""
    for (one_role, _, one), (role, path, other) in combinations(files, 2):
        if one and other and (identity := _identity(one)) is not None and identity == _identity(other):
            file = "standard output" if path == "-" else path
            both = "outputs" if role == one_role else f"{one_role} and {role}"
            raise ValueError(f"{file} can't be used for both {both}")


def _identity(file: BinaryIO | io.FileIO) -> tuple[int, int] | None:
    """Return the identity of a regular file, or None for a terminal, a pipe or a device."""
    try:
        status = os.fstat(file.fileno())
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _lines(path: str, file: BinaryIO) -> Iterable[bytes]:
    return _decompressed(path, file) if path.endswith(".gz") else file


def _decompressed(path: str, file: BinaryIO) -> Iterator[bytes]:
    return iter(partial(_read_line, path, gzip.GzipFile(fileobj=file)), b"")


def _read_line(path: str, file: gzip.GzipFile) -> bytes:
    try:
        return file.readline()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(f"can't decompress {path}: {error}") from None


def _compressed(path: str, file: BinaryIO) -> Sink:
    return GzipSink(file) if path.endswith(".gz") else file
