"""``microbatch run --resume``: a run goes on after it was killed."""

import contextlib
import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from microbatch import Batcher, Size
from microbatch.cli import main
from microbatch.cli.journal import Journal, Recorder
from microbatch.cli.lines import Line, Outcome
from microbatch.cli.summary import Durations

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "10"))
"""How many runs are killed, each at two random points."""

MODULE = """
import atexit
import json
import os
import pathlib
import signal
import sys
import threading

left = events = int(os.environ.get("KILL_AFTER", "0"))

def count(*_):
    global left
    left -= 1
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)

if events:  # kill this process when so many functions were called or have returned, in any thread
    threading.setprofile(count)
    sys.setprofile(count)
    atexit.register(lambda: pathlib.Path("events").write_text(str(events - left)))

def note(jobs):
    with open("calls.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps([os.getpid(), jobs]).encode() + b"\\n")

def process(jobs):
    note(jobs)
    if any(job % 40 == 7 for job in jobs):
        raise ValueError("ends with 7 or so")
    return [KeyError(job) if job % 30 == 3 else "\\N{SNOWMAN}" * (job % 5) for job in jobs]

def same(jobs):
    note(jobs)
    return jobs

def flaky(jobs):
    note(jobs)
    if not pathlib.Path("second").exists():
        pathlib.Path("second").touch()
        raise ConnectionError
    return jobs

def unreachable(jobs):
    raise ConnectionError

def waiting(jobs):
    pathlib.Path("started").touch()
    sys.stdin.read()
    return jobs
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with functions in it."""
    (tmp_path / "functions.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "functions", raising=False)
    return tmp_path


RUN = "run functions:process in.jsonl -o out.jsonl --errors errors.jsonl --size 4 --interval 60 --bisect".split()
RESUME = ["--resume", "journal"]


def write_input(lines: int) -> None:
    """Write a blank line, one that is not JSON, and *lines* numbers."""
    Path("in.jsonl").write_text("\nno\n" + "".join(f"{number}\n" for number in range(lines)))


def run(*arguments: str) -> tuple[int, str]:
    """Run the command, and return its status and what it prints to standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(arguments)
    return status, errors.getvalue()


def outputs() -> tuple[str, str]:
    """Return the results and the errors."""
    return Path("out.jsonl").read_text(encoding="utf-8"), Path("errors.jsonl").read_text(encoding="utf-8")


def calls() -> dict[int, list[list[int]]]:
    """Return the jobs of each call in each process. The next time, return only newer ones."""
    found: dict[int, list[list[int]]] = {}
    path = Path("calls.jsonl")
    for line in path.read_text().splitlines() if path.exists() else []:
        process, jobs = json.loads(line)
        found.setdefault(process, []).append(jobs)
    path.unlink(missing_ok=True)
    return found


def called() -> list[list[int]]:
    """Return the jobs of each call. The next time, return only newer ones."""
    return [jobs for those in calls().values() for jobs in those]


def in_a_process(*arguments: str, kill_after: int = 0) -> int:
    """Run the command in a process of its own, and return its status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILL_AFTER": str(kill_after)}
    done = subprocess.run(
        [sys.executable, "-m", "microbatch", *arguments], env=environment, capture_output=True, timeout=20
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_after_kills_the_output_is_that_of_one_run_and_only_the_batches_in_flight_were_repeated(seed: int) -> None:
    chance, workers = random.Random(seed), 2
    options = ["--workers", str(workers)]
    write_input(lines=80)
    assert 1 == in_a_process(*RUN, *options, kill_after=10**9)
    expected, events = outputs(), int(Path("events").read_text())
    calls()
    Path("out.jsonl").write_text("of another run")
    for kill_after in (chance.randrange(1, events), chance.randrange(1, events), 0):
        status = in_a_process(*RUN, *RESUME, *options, kill_after=kill_after)
        if status == 1:  # a resumed run has fewer events
            break
        assert -signal.SIGKILL == status
    assert expected == outputs()
    done = set[int]()
    for batches in calls().values():
        jobs = {job for batch in batches for job in batch}
        assert len(jobs & done) <= 4 * workers
        done |= jobs
    assert done == set(range(80))


def test_a_journal_that_is_torn_anywhere_gives_the_same_output(folder: Path) -> None:
    write_input(lines=12)
    run(*RUN, *RESUME)
    expected, journal = outputs(), Path("journal").read_bytes()
    records = [match.end() for match in re.finditer(rb"\n", journal)]
    assert 4 == len(records)  # the first line, and three batches
    calls()
    for length in sorted(
        {end + change for end in [0, *records] for change in (-20, -1, 0, 1, 20)} & {*range(len(journal))}
    ):
        Path("journal").write_bytes(journal[:length])
        assert 1 == run(*RUN, *RESUME)[0]
        assert (expected, len(journal)) == (outputs(), len(Path("journal").read_bytes()))
        complete = max(0, sum(end <= length for end in records) - 1)
        assert 4 * (3 - complete) == len({job for batch in called() for job in batch})


def test_a_last_record_of_zeros_is_ignored() -> None:
    write_input(lines=12)
    run(*RUN, *RESUME)
    expected, journal = outputs(), Path("journal").read_bytes()
    called()
    with open("journal", "ab") as file:
        file.write(bytes(100))
    assert (1, journal) == (run(*RUN, *RESUME)[0], Path("journal").read_bytes())
    assert (expected, []) == (outputs(), called())


def test_outcomes_are_on_the_disk_before_the_worker_calls_the_function_again(monkeypatch: pytest.MonkeyPatch) -> None:
    write_input(lines=12)
    synced = list[int]()
    fsync = os.fsync

    def note(file: int) -> None:
        fsync(file)
        synced.append(Path("journal").read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", note)
    run("run", "functions:same", "in.jsonl", "-o", "out.jsonl", "--size", "4", "--interval", "60", *RESUME)
    assert [1, 2, 3, 4] == synced  # once for the first line, and once per batch


def test_a_finished_run_is_not_repeated_and_its_output_is_written_again() -> None:
    write_input(lines=12)
    run(*RUN, *RESUME)
    expected = outputs()
    called()
    Path("out.jsonl").unlink()
    status, text = run(*RUN, *RESUME)
    assert (1, expected, []) == (status, outputs(), called())
    assert "jobs        13, 12 of them from the journal and 1 not JSON\n" in text
    assert "calls       0, because the journal has all outcomes\n" in text


def test_lines_that_were_added_to_the_input_are_processed() -> None:
    write_input(lines=8)
    run(*RUN, *RESUME)
    called()
    write_input(lines=10)
    assert 1 == run(*RUN, *RESUME)[0]
    assert [8, 9] == [job for batch in called() for job in batch]
    assert 11 == len(outputs()[0].splitlines())


def test_the_number_of_workers_and_the_size_of_the_batches_may_change() -> None:
    write_input(lines=50)
    run(*RUN, "--size", "20", "--workers", "2", *RESUME)
    expected, journal = outputs(), Path("journal").read_bytes().splitlines(keepends=True)
    Path("journal").write_bytes(b"".join(journal[:2]))
    assert 1 == run(*RUN, "--size", "7", "--interval", "1ms", *RESUME)[0]
    assert expected == outputs()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda text: text.replace("\n5\n", "\n55\n"), "line 8 of the input has changed since the journal journal was"),
        (lambda text: text.replace("5\n", ""), "line 8 of the input has changed"),
        (lambda text: text.replace("\n11\n", "\n"), "line 14 is missing from the input or has changed"),
        (lambda text: text.replace("\n5\n", "\n?\n"), "line 8 is missing from the input or has changed"),
        (lambda text: "", "line 3 is missing from the input or has changed"),
    ],
)
def test_another_input_is_refused_and_the_output_is_kept(change: Any, complaint: str) -> None:
    write_input(lines=12)
    run(*RUN, *RESUME)
    expected, journal = outputs(), Path("journal").read_bytes()
    Path("in.jsonl").write_text(change(Path("in.jsonl").read_text()))
    status, text = run(*RUN, *RESUME)
    assert (2, 1) == (status, len(text.splitlines()))
    assert complaint in text and "give the same input, or name another journal (see " in text and "--help)" in text
    assert (expected, journal) == (outputs(), Path("journal").read_bytes())


def test_the_first_missing_line_is_named_although_batches_ended_out_of_order() -> None:
    Path("in.jsonl").write_text("1\n2\n3\n4\n5\n6\n")
    same = ["run", "functions:same", "in.jsonl", "-o", "out.jsonl", "--size", "2", "--interval", "60", *RESUME]
    assert 0 == run(*same)[0]
    header, first, second, third = Path("journal").read_bytes().splitlines(keepends=True)
    Path("journal").write_bytes(header + first + third + second)
    Path("in.jsonl").write_text("1\n2\n")
    assert "line 3 is missing from the input or has changed" in run(*same)[1]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["functions:same"], "'microbatch run functions:process --bisect', not of 'microbatch run functions:same -"),
        (["functions:process", "--retry", "2"], "not of 'microbatch run functions:process --bisect --retry 2': give"),
        (["functions:process", "--resume", "-"], "--resume needs the name of a file for the journal, got '-'"),
        (["functions:process", "--resume", "."], "the journal must be a file, got the directory ."),
        (["functions:process", "--resume", os.devnull], f"the journal must be a regular file, got {os.devnull}"),
        (["functions:process", "--resume", "in.jsonl"], "in.jsonl can't be used for both input and journal"),
        (["functions:process", "--resume", "out.jsonl"], "out.jsonl can't be used for both output and journal"),
        (["functions:process", "--resume", "notes"], "notes is not a journal of this version of microbatch run"),
        (["functions:process", "--resume", "numbers"], "numbers is not a journal of this version of microbatch run"),
        (["functions:process", "--resume", "damaged"], "the journal damaged is damaged at byte 78: name another file"),
    ],
)
def test_an_unusable_journal_is_refused_and_nothing_is_overwritten(arguments: list[str], complaint: str) -> None:
    if "--retry" in arguments:
        pytest.importorskip("tenacity")
    write_input(lines=12)
    run(*RUN, *RESUME)
    called()
    Path("notes").write_text("hello")
    Path("numbers").write_text("1\n2\n")
    first, second, *rest = Path("journal").read_bytes().splitlines(keepends=True)
    Path("damaged").write_bytes(b"".join([first, second.replace(b"[", b"(", 1), *rest]))
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    target, *options = arguments
    status, text = run("run", target, *RUN[2:], *RESUME, *options)
    assert (2, 1, []) == (status, len(text.splitlines()), called())
    assert complaint in text and "--help)" in text
    assert before == {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


@pytest.mark.parametrize("journal", ["journal", "notes", ".", "missing/journal", "new.jsonl"])
def test_a_run_that_is_refused_creates_no_files(folder: Path, journal: str) -> None:
    write_input(lines=12)
    run(*RUN, *RESUME)
    write_input(lines=3)
    Path("notes").write_text("hello")
    before = sorted(path.name for path in folder.iterdir())
    new = ["-o", "new.jsonl", "--errors", "new_errors.jsonl"]
    assert 2 == run(*RUN, *new, "--resume", journal)[0]
    assert 2 == run(*RUN, *new, "--resume", "another", "missing.jsonl")[0]
    assert before == sorted(path.name for path in folder.iterdir())


def test_two_runs_do_not_use_a_journal_at_the_same_time(folder: Path) -> None:
    pytest.importorskip("fcntl")
    Path("in.jsonl").write_text("1\n")
    arguments = ["run", "functions:waiting", "in.jsonl", "-o", "out.jsonl", *RESUME]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "microbatch", *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as first:
        try:
            while not (folder / "started").exists():
                assert first.poll() is None
            status, text = run(*arguments)
            assert (2, True) == (status, "another run is using the journal journal" in text and "--help)" in text)
        finally:
            first.communicate()
    assert (0, "1\n") == (first.returncode, Path("out.jsonl").read_text())


@pytest.mark.slow
def test_a_pipe_as_input_and_output_must_give_the_same_lines_again(folder: Path) -> None:
    def piped(text: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "microbatch", "run", "functions:same", *RESUME],
            input=text,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=20,
        )
        return done.returncode, done.stdout, done.stderr.splitlines()[-1]

    assert (0, "1\n2\n", "failed      0") == piped("1\n2\n")
    assert (0, "1\n2\n3\n", "failed      0") == piped("1\n2\n3\n")
    assert [1, 2, 3] == [job for batch in called() for job in batch]
    status, text, error = piped("1\n4\n")
    assert (2, "1\n") == (status, text)
    assert error.startswith("microbatch: line 2 of the input has changed")
    assert piped("1\n")[2].startswith("microbatch: line 2 is missing from the input or has changed")


def test_a_failure_after_an_interrupt_is_not_in_the_journal() -> None:
    interrupted, good, *bad = threading.Event(), Line(1, "10", 10), Line(2, "20", 20), Line(3, "30", 30)

    def process(lines: list[Line]) -> list[Any]:
        interrupted.set()
        return [line.job if line is good else KeyError(line.job) for line in lines]

    with open("journal", "a+b", buffering=0) as file:
        recorder = Recorder(Journal("journal", file, "m:f"), interrupted)
        with Batcher(process, Size(2), listeners=[recorder]) as batcher:
            for line in (good, *bad):
                batcher.submit(line)
        journal = Journal("journal", file, "m:f")
        assert [Outcome("10"), None, None] == [journal.take(line) for line in (good, *bad)]
        journal.finish()
    assert recorder.error is None
    assert 2 == len(Path("journal").read_text().splitlines())  # the first line, and the batch with a result


def test_a_journal_that_cannot_be_written_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(journal: Journal, outcomes: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Journal, "append", fail)
    write_input(lines=1_000)
    status, text = run(*RUN, *RESUME)
    assert (2, "microbatch: the disk is full") == (status, text.splitlines()[-1])
    assert len(called()) < 100


def test_retries_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    tenacity = pytest.importorskip("tenacity")
    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda **_: tenacity.wait_none())
    Path("in.jsonl").write_text("1\n2\n")
    arguments = ["run", "functions:flaky", "in.jsonl", "-o", "out.jsonl", "--interval", "60", "--retry", "1", *RESUME]
    status, text = run(*arguments)
    assert (0, "1\n2\n", [[1, 2], [1, 2]]) == (status, Path("out.jsonl").read_text(), called())
    assert "calls       2, for 1 batch of 2.0 jobs on average\n" in text
    assert (0, "1\n2\n", []) == (run(*arguments)[0], Path("out.jsonl").read_text(), called())


def test_files_whose_name_ends_with_gz_are_compressed() -> None:
    with gzip.open("in.jsonl.gz", "wt") as file:
        file.write("1\nno\n2\n")
    arguments = ["run", "functions:same", "in.jsonl.gz", "-o", "out.jsonl.gz", "--errors", "errors.jsonl.gz", *RESUME]
    for _ in range(2):
        assert 1 == run(*arguments)[0]
        assert b"1\nnull\n2\n" == gzip.decompress(Path("out.jsonl.gz").read_bytes())
        assert b'{"number": 2, "input": "no", ' == gzip.decompress(Path("errors.jsonl.gz").read_bytes())[:29]
    assert [1, 2] == [job for batch in called() for job in batch]


def test_a_torn_compressed_output_is_written_again() -> None:
    write_input(lines=12)
    arguments = ["run", "functions:same", "in.jsonl", "-o", "out.jsonl.gz", *RESUME]
    run(*arguments)
    expected = gzip.decompress(Path("out.jsonl.gz").read_bytes())
    os.truncate("out.jsonl.gz", 15)
    run(*arguments)
    assert expected == gzip.decompress(Path("out.jsonl.gz").read_bytes())


@pytest.mark.parametrize(
    "content, complaint",
    [
        (gzip.compress(b"1\n" * 100)[:-9], "can't decompress in.gz: Compressed file ended before"),
        (b"1\n", "can't decompress in.gz: Not a gzipped file"),
    ],
)
@pytest.mark.parametrize("options", [[], RESUME], ids=["", "resume"])
def test_a_compressed_input_that_is_damaged_is_reported(options: list[str], content: bytes, complaint: str) -> None:
    Path("in.gz").write_bytes(content)
    status, text = run("run", "functions:same", "in.gz", "-o", "out.jsonl", *options)
    assert (2, True) == (status, f"microbatch: {complaint}" in text)


@pytest.mark.slow
def test_only_a_few_outcomes_of_the_journal_are_held_in_memory() -> None:
    lines, length = 10_000, 2_000
    Path("in.jsonl").write_text('"%s"\n' % ("x" * length) * lines)
    arguments = ["run", "functions:same", "in.jsonl", "-o", "out.jsonl", "--workers", "2", *RESUME]
    run(*arguments)
    tracemalloc.start()
    assert 0 == run(*arguments, "--size", "10")[0]  # so that only a few lines wait for a slow writer
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3 * lines * length


def test_the_summary_counts_jobs_calls_and_failures() -> None:
    write_input(lines=44)
    status, text = run(*RUN, "--summary")
    jobs, called, waiting, processing, failed = text.splitlines()[-5:]
    assert 1 == status
    assert "jobs        45" == jobs
    assert "calls       15, for 11 batches of 4.0 jobs on average" == called
    assert re.fullmatch(r"waiting     p50 [\d.,]+ m?s, p99 [\d.,]+ m?s", waiting)
    assert re.fullmatch(r"processing  p50 [\d.,]+ m?s, p99 [\d.,]+ m?s", processing)
    assert "failed      4: 2 KeyError, 1 not JSON, 1 ValueError" == failed


def test_there_is_no_summary_unless_it_is_wanted() -> None:
    Path("in.jsonl").write_text("1\n")
    arguments = ["run", "functions:same", "in.jsonl", "-o", "out.jsonl"]
    assert ("", 5) == (run(*arguments)[1], len(run(*arguments, "--summary")[1].splitlines()))


@pytest.mark.parametrize(
    "seconds, shown",
    [
        ([0.001] * 99 + [2.0] * 2, "p50 1 ms, p99 2 s"),
        ([0.0], "p50 1e-06 ms, p99 1e-06 ms"),
        ([0.9999], "p50 1 s, p99 1 s"),
        ([1_000.0], "p50 1,000 s, p99 1,000 s"),
    ],
)
def test_durations_are_shown_with_three_digits(seconds: list[float], shown: str) -> None:
    durations = Durations()
    for each in seconds:
        durations.add(each)
    assert shown == str(durations)
