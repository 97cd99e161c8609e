"""The journal of ``microbatch run --resume``: the outcomes of a run, so that it can go on after it was killed.

The first line of the file says which run it is of. Each further line is a record: the outcomes of one batch, with the
number and the checksum of each line of the input. The worker of the batch writes and syncs the record before it runs
another batch. So if the process is killed, only the batches in flight are processed again. Only the last record can be
torn, because the next one is written after it was synced. A torn record is cut off.

The output needs no repair, whether it is torn, compressed or a pipe: each run writes it from the beginning, and takes
from the journal what is there.

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
    """The journal of one run. Ask it for each line in order with `take`, and `append` the outcomes that it lacks.

    Args:
        path: The path of the file, for messages.
        file: The file, opened with ``"a+b"`` and ``buffering=0``. It must stay open, because closing it unlocks it.
        run: The arguments that decide what the outcomes are.

    Raises:
        JournalError: The file is the journal of another run or is no journal, or another process is using it.
    """

    def __init__(self, path: str, file: io.FileIO, run: str) -> None:
        self._path = path
        self._file = file
        self._reader = io.BufferedReader(file)
        self._mutex = threading.Lock()  # one record at a time, so that only the last one can be torn
        self._lock()
        header = json.dumps({"journal": _FORMAT, "run": run}).encode() + b"\n"
        self._rewind()
        if self._first != header and header.startswith(self._first):  # new, or torn while it was created
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
            # Unlike `flock`, this does not stay locked while a process lives that the user's function has forked.
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
        self._ahead = dict[int, list[Any]]()  # what was read, but is of a later line
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
        """Return the outcome of *line*, or None if the journal has none. Lines must be asked for in order, and once.

        Raises:
            JournalError: The journal has the outcome of another line with this number, or it is damaged.
        """
        if line.problem:  # it was in no batch
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
        """Raise `JournalError` if the journal has outcomes that no line has taken."""
        if self._ahead or self._read():
            self._refuse_input(f"line {min(self._ahead)} is missing in the input or has changed")

    def _refuse_input(self, difference: str) -> NoReturn:
        raise JournalError(
            f"{difference} since the journal {self._path} was written: give the same input, or name another journal"
        )

    def _read(self) -> bool:
        """Read a record. Return False if there is no other one."""
        # Once the end was reached, what follows are the records of this run.
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
        """Write a record, and return when it is on the disk."""
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
        """Append a record. After an interrupt, leave out failures: it may be their cause, and it ends the retries."""
        if self._journal is None or self.error is not None:
            return
        try:
            outcomes = [(future.job, outcome_of(future)) for future in event.futures]
            if self._interrupted.is_set():
                outcomes = [(line, outcome) for line, outcome in outcomes if not outcome.error]
            if outcomes:
                self._journal.append(outcomes)
        except BaseException as error:  # the batcher would only log it
            self.error = error
