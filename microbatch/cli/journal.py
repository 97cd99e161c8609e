"""The journal of ``microbatch run --resume``: the outcomes of a run, so that it can continue after a kill.

The first line of the file identifies the run. Each further line is a record: the outcomes of one batch, with the number
and the checksum of each line of the input. The worker of the batch writes and syncs the record before it runs another
batch. So if the process is killed, only the batches that were running are processed again. A record is written only
after the previous one was synced, so only the last record can be incomplete. An incomplete record is cut off.

The output needs no repair, even if it is incomplete, compressed or a pipe. Each run writes it from the beginning, with
the outcomes from the journal.

Records are almost in the order of the input, because only a few batches are read ahead of the first line that has no
outcome yet. So the journal is read along with the input, and only a few outcomes are in memory.
"""

import io
import json
import os
import threading
from collections.abc import Iterable
from typing import Any, NoReturn

from microbatch.cli.lines import Line, Outcome, outcome_of
from microbatch.listeners import BatchFinished, BatchListener

__all__ = ["Journal", "JournalError", "Recorder"]

_FORMAT = "microbatch run, version 1"


class JournalError(Exception):
    """The journal can't be used for this run."""


class Journal:
    """The journal of one run. Call `take` for each line in order, and `append` the outcomes that the journal lacks.

    Args:
        path: The path of the file, for messages.
        file: The file, opened with ``"a+b"`` and ``buffering=0``. It must stay open, because closing it unlocks it.
        run: The command-line arguments that the outcomes depend on.

    Raises:
        JournalError: The file is the journal of another run or not a journal, or another process is using it.
    """

    def __init__(self, path: str, file: io.FileIO, run: str) -> None:
        self._path = path
        self._file = file
        self._reader = io.BufferedReader(file)
        self._mutex = threading.Lock()  # one record at a time, so that only the last one can be incomplete
        self._lock()
        header = json.dumps({"journal": _FORMAT, "run": run}).encode() + b"\n"
        self._rewind()
        if self._first != header and header.startswith(self._first):  # new, or incomplete
            file.truncate(0)
            self._write(header)
            self._rewind()
        elif self._first != header:
            self._refuse_header(run)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # on Windows
            return
        try:
            # Unlike `flock`, a process that the user's function forks does not inherit this lock.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # depends on the system
            raise JournalError(f"another run is using the journal {self._path}") from None

    def _refuse_header(self, run: str) -> NoReturn:
        try:
            found = json.loads(self._first)
            other = found["run"] if found["journal"] == _FORMAT else None
        except (ValueError, TypeError, LookupError):
            other = None
        if other is None:
            raise JournalError(f"{self._path} is not a journal of this version of microbatch run: name another file")
        raise JournalError(
            f"{self._path} is the journal of 'microbatch run {other}', not of 'microbatch run {run}': give the same "
            "arguments, or name another journal"
        )

    def _rewind(self) -> None:
        self._reader.seek(0)
        self._first = self._reader.readline()
        self._ahead = dict[int, list[Any]]()  # outcomes that were read, by number, whose lines come later
        self._ended = False

    def check(self, lines: Iterable[Line]) -> None:
        """Raise `JournalError` unless *lines* begin with those in the journal. Then read it from the start again."""
        for line in lines:
            self.take(line)
            if self._ended and not self._ahead:
                break
        self.finish()
        self._rewind()

    def take(self, line: Line) -> Outcome | None:
        """Return the outcome of *line*, or None if the journal has none. Call this once per line, in order.

        Raises:
            JournalError: The journal has the outcome of another line with this number, or it is damaged.
        """
        if line.problem:  # not JSON, so it was in no batch
            return None
        while line.number not in self._ahead and self._read():
            pass
        if line.number not in self._ahead:
            return None
        checksum, *outcome = self._ahead.pop(line.number)
        if checksum != line.checksum:
            self._refuse_input(f"line {line.number} of the input has changed")
        return Outcome(*outcome)

    def finish(self) -> None:
        """Raise `JournalError` if the journal has outcomes that were not taken."""
        missing = set[int]()
        while self._ahead or self._read():  # with several workers, the next record may be of an earlier line
            missing.update(self._ahead)
            self._ahead.clear()
        if missing:
            self._refuse_input(f"line {min(missing)} is missing from the input or has changed")

    def _refuse_input(self, difference: str) -> NoReturn:
        raise JournalError(
            f"{difference} since the journal {self._path} was written: give the same input, or name another journal"
        )

    def _read(self) -> bool:
        """Read the next record. Return False if there is none."""
        # After the end was reached, this run appends its own records, which must not be read.
        if self._ended:
            return False
        start = self._reader.tell()
        text = self._reader.readline()
        try:
            self._ahead.update((number, rest) for number, *rest in json.loads(text if text.endswith(b"\n") else b""))
        except (ValueError, TypeError):
            if self._reader.read(1):
                raise JournalError(f"the journal {self._path} is damaged at byte {start}: name another file") from None
            self._file.truncate(start)
            self._ended = True
        return not self._ended

    def append(self, outcomes: Iterable[tuple[Line, Outcome]]) -> None:
        """Write a record, and return after it was synced to the disk."""
        record = [
            [line.number, line.checksum, *(outcome if outcome.error else outcome[:1])] for line, outcome in outcomes
        ]
        with self._mutex:
            self._write(json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def _write(self, text: bytes) -> None:
        while text:
            text = text[self._file.write(text) :]
        os.fsync(self._file.fileno())


class Recorder(BatchListener):
    """Appends the outcomes of each batch to the journal, if there is one.

    Attributes:
        error: Why the journal can't be written, or None.
    """

    def __init__(self, journal: Journal | None, interrupted: threading.Event) -> None:
        self.error: BaseException | None = None
        self._journal = journal
        self._interrupted = interrupted

    def batch_finished(self, event: BatchFinished) -> None:
        """Append a record. After an interrupt, leave out failures, because the interrupt may have caused them."""
        if self._journal is None or self.error is not None:
            return
        try:
            outcomes = [(future.job, outcome_of(future)) for future in event.futures]
            if self._interrupted.is_set():
                outcomes = _without_failures(outcomes)
            if outcomes:
                self._journal.append(outcomes)
        except BaseException as error:  # the batcher would only log it
            self.error = error


def _without_failures(outcomes: list[tuple[Line, Outcome]]) -> list[tuple[Line, Outcome]]:
    return [(line, outcome) for line, outcome in outcomes if not outcome.error]
