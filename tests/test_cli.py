"""The command line, ``python -m microbatch``."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microbatch import DEFAULT_POLICY
from microbatch.cli import demo, main
from microbatch.cli.run import wrap_processor

ROOT = Path(__file__).parent.parent

PROCESSORS = """
import atexit
import pathlib
import sys
import threading
import time
import traceback

def double(jobs):
    return [job * 2 for job in jobs]

def picky(jobs):
    return [KeyError(job) if job == 3 else job for job in jobs]

def failing(jobs):
    raise OSError("out of\\norder")

def objects(jobs):
    return [object() for job in jobs]

class Mute(Exception):
    def __str__(self):
        raise RuntimeError

def mute(jobs):
    raise Mute

def nameless(jobs):
    raise KeyError

def colored(jobs):
    raise ValueError("\\x1b[31mred" + "!" * 5000)

def until_main_is_in(name):
    main = threading.main_thread().ident
    while name not in [frame.name for frame in traceback.extract_stack(sys._current_frames()[main])]:
        time.sleep(0.01)

def hang(jobs):
    pathlib.Path("hanging").touch()
    until_main_is_in("shutdown")
    atexit.register(time.sleep, 0.2)  # so that other threads run while the interpreter exits
    pathlib.Path("interrupted").touch()
    time.sleep(600)

def hang_at_the_end(jobs):
    until_main_is_in("wait")  # otherwise a signal may be noticed only when that wait ends
    hang(jobs)

def finish(jobs):
    if jobs != [1]:
        until_main_is_in("wait")
        pathlib.Path("hanging").touch()
        until_main_is_in("shutdown")
    return jobs

def same(jobs):
    return jobs

def strict(jobs):
    bad = [job for job in jobs if job in (3, 5)]
    if bad:
        raise ValueError(f"refused {bad}")
    return jobs

def missing_files(jobs):
    return [pathlib.Path(job).read_text() for job in jobs]

def emptying(jobs):
    for job in jobs:
        job.clear()
    raise ValueError("no")

attempts = []

def flaky(jobs):
    attempts.append(jobs)
    if len(attempts) < 3:
        raise ConnectionError(f"attempt {len(attempts)}")
    return jobs

def unreachable(jobs):
    attempts.append(jobs)
    raise ConnectionError("nobody there")

def printing(jobs):
    print("a word in between")
    return jobs

def endless(jobs):
    return [float("nan") for job in jobs]

def sizes(jobs):
    return [len(jobs)] * len(jobs)

def slow(jobs):
    time.sleep(0.01)
    return jobs

async def coroutine(jobs):
    return jobs

class Group:
    double = staticmethod(double)

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with processors in it."""
    (tmp_path / "processors.py").write_text(PROCESSORS)
    (tmp_path / "broken.py").write_text("1 +")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)")
    (tmp_path / "lacking.py").write_text("import json\nimport no_such_library\n")
    (tmp_path / "using.py").write_text("import lacking\n")
    (tmp_path / "wrong.py").write_text("import json\n\njson.loads('')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("processors", "broken", "leaving", "lacking", "using", "wrong"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(target: str, text: str, *options: str) -> tuple[int, list[Any], str]:
    """Process the lines of *text*; return the status, the values written, and the text on standard error."""
    Path("in.jsonl").write_text(text, encoding="utf-8")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(["run", target, "in.jsonl", "-o", "out.jsonl", *options])
    written = Path("out.jsonl").read_text(encoding="utf-8") if Path("out.jsonl").exists() else ""
    return status, [json.loads(line) for line in written.splitlines()], errors.getvalue()


@contextlib.contextmanager
def command(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run the command. If the test fails, kill it: it might never end."""
    with subprocess.Popen(
        [sys.executable, "-m", "microbatch", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Send Ctrl-C, and then a line: a signal just before the wait for a line is only noticed when that wait ends."""
    process.send_signal(signal.SIGINT)
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):
        os.write(process.stdin.fileno(), b"2\n")


def test_results_are_written_in_the_order_of_the_input() -> None:
    lines = "".join(f"{number}\n" for number in range(1000))
    assert (0, [number * 2 for number in range(1000)], "") == run("processors:double", lines, "--workers", "3")


def test_a_batch_has_at_most_as_many_jobs_as_the_size_option_says() -> None:
    status, values, _ = run("processors:sizes", "1\n" * 100, "--size", "7", "--interval", "60")
    assert (0, [7] * 98 + [2] * 2) == (status, values)


def test_json_values_are_written_unchanged() -> None:
    assert (0, ["äö", {"a": None}, 1.5]) == run("processors:slow", '"äö"\n{"a": null}\n1.5')[:2]
    assert '"äö"' in Path("out.jsonl").read_text(encoding="utf-8")


def test_a_line_that_is_not_json_is_reported_and_the_other_lines_are_processed() -> None:
    status, values, errors = run("processors:double", "1\nno\n\n \nNaN\n4")
    assert (1, [2, None, None, 8]) == (status, values)
    assert [
        "line 2: not JSON: Expecting value: line 1 column 1 (char 0)",
        "line 5: not JSON: NaN is not a JSON value",
    ] == (errors.splitlines())


def test_a_line_that_is_not_utf8_is_reported() -> None:
    Path("in.jsonl").write_bytes(b'"\xff"\n1\n')
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert 1 == main(["run", "processors:double", "in.jsonl", "-o", "out.jsonl"])
    assert errors.getvalue().startswith("line 1: not JSON: 'utf-8' codec can't decode")
    assert "null\n2\n" == Path("out.jsonl").read_text()


def test_a_job_that_fails_is_reported_and_the_other_lines_are_processed() -> None:
    assert (1, [1, 2, None, 4], "line 3: KeyError: 3\n") == run("processors:picky", "1\n2\n3\n4\n")


def test_a_batch_that_fails_is_reported_line_by_line() -> None:
    assert (1, [None, None], "line 1: OSError: out of order\nline 2: OSError: out of order\n") == run(
        "processors:failing", "1\n2\n"
    )


@pytest.mark.parametrize("target, word", [("objects", "not JSON serializable"), ("endless", "not JSON compliant")])
def test_a_result_that_json_cannot_represent_is_reported(target: str, word: str) -> None:
    status, values, errors = run(f"processors:{target}", "1\n")
    assert (1, [None]) == (status, values)
    assert word in errors and errors.startswith("line 1: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, line, error",
    [
        ("same", '"\\ud800"', "UnicodeEncodeError: 'utf-8' codec can't encode"),
        ("same", "[" * 100_000, "not JSON: "),
        ("mute", "1", "Mute: (its text is not available: RuntimeError)"),
        ("nameless", "1", "KeyError\n"),
        ("colored", "1", " [31mred!!!"),
    ],
)
def test_no_bad_line_stops_the_other_lines(target: str, line: str, error: str) -> None:
    status, values, errors = run(f"processors:{target}", f"{line}\n" + "7\n" * 1000, "--size", "1")
    assert (1, [None] + [7 if target == "same" else None] * 1000) == (status, values)
    assert errors.startswith(f"line 1: {error.lstrip()}")
    assert len(errors.splitlines()[0]) < 1100


def test_the_target_may_be_a_callable_inside_a_class() -> None:
    assert (0, [6], "") == run("processors:Group.double", "3")


def test_a_failed_line_keeps_its_place_in_the_output() -> None:
    status, values, _ = run("processors:strict", "".join(f"{n}\n" for n in range(1, 8)), "--size", "2")
    assert (1, [1, 2, None, None, None, None, 7]) == (status, values)


def test_bisecting_fails_only_the_bad_lines() -> None:
    lines = "".join(f"{n}\n" for n in range(100))
    expected = [None if n in (3, 5) else n for n in range(100)]
    errors = "line 4: refused [3]\nline 6: refused [5]\n"
    assert (1, expected, errors) == run("processors:strict", lines, "--bisect")


def test_bisecting_finds_every_bad_line_however_many_there_are() -> None:
    status, values, _ = run("processors:strict", "3\n" * 299 + "4\n", "--bisect", "--size", "300")
    assert (1, [None] * 299 + [4]) == (status, values)


def test_bisecting_finds_the_line_whose_file_is_missing() -> None:
    Path("there").write_text("text")
    status, values, errors = run("processors:missing_files", '"there"\n"nowhere"\n"there"\n', "--bisect")
    assert (1, ["text", None, "text"]) == (status, values)
    assert errors.startswith("line 2: FileNotFoundError: ")


def test_bisecting_does_not_call_an_unreachable_downstream_again() -> None:
    assert 1 == run("processors:unreachable", "1\n" * 8, "--bisect", "--size", "8", "--interval", "60")[0]
    assert [[1] * 8] == sys.modules["processors"].attempts


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause before a retry."""
    tenacity = pytest.importorskip("tenacity")
    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda **_: tenacity.wait_none())


@pytest.mark.parametrize("retries, expected", [("0", None), ("1", None), ("2", 7)])
def test_n_retries_are_n_attempts_after_the_first(retries: str, expected: Any, no_pause: None) -> None:
    status, values, errors = run("processors:flaky", "7\n", "--retry", retries)
    assert (0 if expected else 1, [expected]) == (status, values)
    assert min(int(retries) + 1, 3) == len(sys.modules["processors"].attempts)
    assert ("" if expected else f"line 1: ConnectionError: attempt {int(retries) + 1}\n") == errors


def test_only_the_bad_lines_are_retried_if_a_batch_is_bisected(no_pause: None) -> None:
    lines = "".join(f"{n}\n" for n in range(1, 5))
    status, values, _ = run("processors:strict", lines, "--bisect", "--retry", "1", "--size", "4")
    assert (1, [1, 2, None, 4]) == (status, values)


def test_an_interrupt_ends_the_pause_before_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    tenacity = pytest.importorskip("tenacity")
    interrupted, calls = threading.Event(), []

    def pause(state: Any) -> float:
        interrupted.set()
        return 3600.0

    def failing(jobs: list[int]) -> None:
        calls.append(jobs)
        raise ConnectionError

    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda **_: pause)
    with pytest.raises(ConnectionError):
        wrap_processor(failing, bisect=False, retries=9, size=1, interrupted=interrupted)([1])
    assert [[1]] == calls


def test_the_retry_option_without_tenacity_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    assert 2 == main(["run", "processors:double", "in.jsonl", "-o", "out.jsonl", "--retry", "3"])
    assert not Path("out.jsonl").exists()
    assert "--retry needs tenacity: python -m pip install '.[retry]' in a clone" in capsys.readouterr().err


def errors_of(target: str, text: str, *options: str) -> list[dict[str, Any]]:
    """Process the lines of *text*, and return the entries of the errors file."""
    assert 1 == run(target, text, "--errors", "errors.jsonl", *options)[0]
    return [json.loads(line) for line in Path("errors.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_errors_file_has_an_object_for_each_failed_line() -> None:
    assert [
        {"number": 2, "input": "nö", "error": "not JSON: Expecting value: line 1 column 1 (char 0)"},
        {"number": 4, "input": 3, "error": "KeyError: 3"},
    ] == errors_of("processors:picky", "1\nnö\n\n3\n4\n")


def test_the_errors_file_has_the_original_input_even_if_the_processor_changes_it() -> None:
    assert [{"a": 1e400}] == [entry["input"] for entry in errors_of("processors:emptying", ' {"a": 1e400} \n')]


def test_the_errors_file_is_overwritten_and_empty_if_no_line_fails() -> None:
    Path("errors.jsonl").write_text("of the last run")
    assert 0 == run("processors:same", "1\n", "--errors", "errors.jsonl")[0]
    assert "" == Path("errors.jsonl").read_text()


def test_errors_may_go_to_standard_output() -> None:
    with command("run", "processors:picky", "-o", "out.jsonl", "--errors", "-") as process:
        out, _ = process.communicate("1\n3\n")
    assert [{"number": 2, "input": 3, "error": "KeyError: 3"}] == [json.loads(line) for line in out.splitlines()]
    assert "1\nnull\n" == Path("out.jsonl").read_text()


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--errors", "no/where"], "No such file or directory: 'no/where'"),
        (["--errors", "in.jsonl"], "in.jsonl can't be used for both input and output"),
        (["--errors", "out.jsonl"], "out.jsonl can't be used for both outputs"),
        (["--errors", "./new.jsonl", "-o", "new.jsonl"], "./new.jsonl can't be used for both outputs"),
        (["--errors", "-", "-o", "-"], "the results and the errors can't both go to standard output"),
    ],
)
def test_unusable_files_are_refused_and_nothing_is_overwritten(options: list[str], complaint: str) -> None:
    Path("out.jsonl").write_text("of the last run")
    status, errors = 0, io.StringIO()
    Path("in.jsonl").write_text("1\n")
    with contextlib.redirect_stderr(errors):
        status = main(["run", "processors:unreachable", "in.jsonl", "-o", "out.jsonl", *options])
    assert (2, []) == (status, sys.modules["processors"].attempts if "processors" in sys.modules else [])
    assert complaint in errors.getvalue()
    assert ("of the last run", "1\n") == (Path("out.jsonl").read_text(), Path("in.jsonl").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["-o in.jsonl < in.jsonl", "in.jsonl >> in.jsonl"])
def test_a_file_redirected_by_the_shell_is_not_read_and_written_at_once(redirection: str) -> None:
    Path("in.jsonl").write_text("1\n")
    done = shell(f"run processors:double {redirection}")
    assert (2, "1\n") == (done.returncode, Path("in.jsonl").read_text())
    assert "can't be used for both input and output" in done.stderr


def test_the_prints_of_a_processor_are_not_mixed_with_the_results(capfdbinary: Any) -> None:
    Path("in.jsonl").write_text("1\n2\n")
    assert 0 == main(["run", "processors:printing", "in.jsonl"])
    assert (b"1\n2\n", b"a word in between\n") == capfdbinary.readouterr()


def test_an_empty_input_gives_an_empty_output() -> None:
    assert (0, [], "") == run("processors:double", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "nowhere:x"], "can't use nowhere:x: ModuleNotFoundError: No module named 'nowhere'"),
        (["run", "processors:x"], "can't use processors:x: AttributeError: .*'x'"),
        (["run", "processors:number"], "can't use processors:number: TypeError: processor must be callable, got 3"),
        (["run", "processors:coroutine"], "can't use processors:coroutine: TypeError: .* must be a plain function"),
        (["run", "broken:x"], r"can't use broken:x: SyntaxError: invalid syntax \(broken.py, line 1\)"),
        (
            ["run", "lacking:x"],
            "can't use lacking:x: ModuleNotFoundError: No module named 'no_such_library', in .*/lacking.py, line 2 ",
        ),
        (["run", "using:x"], "can't use using:x: ModuleNotFoundError: .*, in .*/lacking.py, line 2 "),
        (["run", "wrong:x"], "can't use wrong:x: JSONDecodeError: .*, in .*/wrong.py, line 3 "),
        (["run", "processors.py:same"], "the target must be a module, as in processors:same, not a file, got"),
        (["run", "leaving:x"], "can't use leaving:x: SystemExit: 0"),
        (["run", "processors"], "the target must be MODULE:CALLABLE, got 'processors'"),
        (["run", ":x"], "the target must be MODULE:CALLABLE, got ':x'"),
        (["run", "processors:double", "nofile"], ".*No such file or directory: 'nofile'"),
        (["run", "processors:double", "."], "the input must be a file, got the directory ."),
        (
            ["run", "processors:double", "processors.py", "-o", "processors.py"],
            "processors.py can't be used for both input and output",
        ),
        (["run", "processors:double", "processors.py", "-o", "no/where"], ".*No such file or directory: 'no/where'"),
        (["run", "processors:double", "--size", "0"], "argument --size: must be an integer of at least 1, got '0'"),
        (["run", "processors:double", "--size", "x"], "argument --size: must be an integer of at least 1, got 'x'"),
        (["run", "processors:double", "--workers", "-1"], "argument --workers: "),
        (
            ["run", "processors:double", "--interval", "nan"],
            "argument --interval: must be a number of seconds or a time",
        ),
        (
            ["run", "processors:double", "--interval", "x"],
            "argument --interval: must be a number of seconds",
        ),
        (["run", "processors:double", "--nonsense"], "unrecognized arguments: --nonsense .see .*microbatch run --help"),
        (["run", "processors:double", "--size", "2", "a", "b"], "unrecognized arguments: a b"),
        (["run", "processors:double", "a", "--size", "2", "b"], "unrecognized arguments: b"),
        (["run", "processors:double", "--retry", "-1"], "argument --retry: must be an integer of at least 0, got '-1'"),
        (["run"], "the following arguments are required: MODULE:CALLABLE"),
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "argument COMMAND: "),
        (["demo", "--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["demo", "--threads", "10001"], "argument --threads: must be an integer of at most 10000, got '10001'"),
        (["run", "processors:double", "--workers", "10001"], "argument --workers: must be an integer of at most 10000"),
    ],
)
def test_bad_arguments_give_a_one_line_error_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 2 == main(arguments)
    out, err = capsys.readouterr()
    assert "" == out
    assert 1 == len(err.splitlines())
    assert re.match(f"microbatch: {message}", err), err
    assert "--help)" in err


@pytest.mark.parametrize(
    "arguments",
    [
        "processors:double in.jsonl --size 2",
        "processors:double --size 2 in.jsonl",
        "--size 2 processors:double in.jsonl",
        "--size 2 processors:double --summary in.jsonl",
    ],
)
def test_the_input_file_may_stand_before_or_after_the_options(arguments: str, capfdbinary: Any) -> None:
    Path("in.jsonl").write_text("1\n2\n")
    assert 0 == main(["run", *arguments.split()])
    assert b"2\n4\n" == capfdbinary.readouterr().out


def test_a_result_is_written_before_the_next_line_arrives() -> None:
    with command("run", "processors:double") as process:
        assert process.stdin and process.stdout
        for number in range(3):
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            assert f"{number * 2}\n" == process.stdout.readline()
    assert 0 == process.returncode


def test_a_closed_output_pipe_ends_the_command_quietly() -> None:
    with command("run", "processors:slow", "--size", "10") as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("1\n" * 500)
        process.stdin.flush()
        assert "1\n" == process.stdout.readline()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            while process.poll() is None:
                process.stdin.write("1\n" * 100)
                process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        assert ("", 0) == (process.stderr.read(), process.wait(timeout=20))


def test_ctrl_c_ends_the_command_without_a_traceback() -> None:
    with command("run", "processors:double") as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("1\n")
        process.stdin.flush()
        assert "2\n" == process.stdout.readline()
        interrupt(process)
        assert (130, "") == (process.wait(timeout=20), process.stderr.read())


def test_a_second_ctrl_c_does_not_wait_for_a_batch_that_hangs(folder: Path) -> None:
    with command("run", "processors:hang") as process:
        assert process.stdin and process.stderr
        process.stdin.write("1\n")
        process.stdin.flush()
        while not (folder / "hanging").exists():
            assert process.poll() is None
        interrupt(process)
        while not (folder / "interrupted").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert 130 == process.wait(timeout=20)
        output = process.stderr.read()
        assert "<Batcher 'microbatch run'> lost 1 jobs" in output
        assert "line 1" not in output  # written while the interpreter exits, which may make it abort


def test_ctrl_c_after_the_last_line_drops_the_jobs_that_have_not_been_dispatched(folder: Path) -> None:
    with command("run", "processors:hang_at_the_end", "--size", "1") as process:
        assert process.stdin and process.stderr
        process.stdin.write("1\n2\n3\n")
        process.stdin.close()
        process.stdin = None
        for seen in ("hanging", "interrupted"):
            while not (folder / seen).exists():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
        assert 130 == process.wait(timeout=20)
        output = process.stderr.read()
        assert "<Batcher 'microbatch run'> lost 1 jobs" in output
        assert "line 1" not in output  # written while the interpreter exits, which may make it abort


def test_after_a_signal_the_results_of_the_running_batch_are_written_and_no_others(folder: Path) -> None:
    with command("run", "processors:finish", "--size", "1", "-o", "out.jsonl", "--errors", "errors.jsonl") as process:
        assert process.stdin and process.stderr
        process.stdin.write("1\n2\n3\n4\n")
        process.stdin.close()
        process.stdin = None
        while not (folder / "hanging").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert (143, "") == (process.wait(timeout=20), process.stderr.read())
    assert ("1\n2\n", "") == (Path("out.jsonl").read_text(), Path("errors.jsonl").read_text())


def test_ctrl_c_ends_the_command_even_if_no_process_reads_the_results() -> None:
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    os.mkfifo("pipe")
    Path("in.jsonl").write_text('"%s"\n' % ("x" * 10_000) * 100)
    reader, held = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK), bytearray(4)
    try:
        with command("run", "processors:same", "in.jsonl", "-o", "pipe") as process:
            while int.from_bytes(held, sys.byteorder) < 60_000:  # the pipe is full: no further line fits
                assert process.poll() is None
                fcntl.ioctl(reader, termios.FIONREAD, held)
            while process.poll() is None:  # the first Ctrl-C stops the reading, the second the waiting
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
            # On a busy machine one more may arrive while the interpreter exits. A shell reports 130 for either.
            assert process.returncode in (130, -signal.SIGINT)
    finally:
        os.close(reader)


def shell(line: str, stderr: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    """Run the command in a shell, with its streams buffered as they are by default."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["sh", "-c", f"{sys.executable} -m microbatch {line}"],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=20,
        env={**buffered, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_standard_stream_gives_a_one_line_error(closed: str) -> None:
    done = shell(f"run processors:double {closed}")
    assert (2, 1) == (done.returncode, len(done.stderr.splitlines())), done.stderr


def test_errors_do_not_go_to_standard_output_if_standard_error_is_closed() -> None:
    Path("in.jsonl").write_text("no\n1\n")
    done = shell("run processors:double in.jsonl 2>&-")
    assert (1, "null\n2\n") == (done.returncode, done.stdout)


def test_a_broken_standard_error_pipe_does_not_stop_the_command() -> None:
    Path("in.jsonl").write_text("no\n1\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = shell("run processors:double in.jsonl", stderr=writer)
    finally:
        os.close(writer)
    assert (1, "null\n2\n") == (done.returncode, done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["simulate Natural --rate 9 --cost 5ms --jobs 9", "demo --jobs 9", "run processors:same in.jsonl"]
)
def test_a_full_device_as_standard_output_gives_a_one_line_error(line: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    Path("in.jsonl").write_text("1\n")
    done = shell(f"{line} > /dev/full")
    assert (2, "microbatch: [Errno 28] No space left on device\n") == (done.returncode, done.stderr)


def test_a_full_disk_gives_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    Path("in.jsonl").write_text("1\n" * 10)
    assert 2 == main(["run", "processors:double", "in.jsonl", "-o", "/dev/full"])
    assert "microbatch: [Errno 28] No space left on device\n" == capsys.readouterr().err


@pytest.mark.slow
def test_only_a_few_batches_of_the_input_are_held_in_memory() -> None:
    lines, length = 10_000, 2_000
    Path("in.jsonl").write_text('"%s"\n' % ("x" * length) * lines)
    tracemalloc.start()
    assert 0 == main(["run", "processors:same", "in.jsonl", "-o", "out.jsonl"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3 * lines * length


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(*arguments: str) -> str:
    """Return the text that standard error shows on a terminal."""
    terminal = Terminal()
    with contextlib.redirect_stderr(terminal):
        assert main(arguments) in (0, 1)
    return terminal.getvalue()


def run_on_a_terminal(line: str = "1\n") -> str:
    Path("in.jsonl").write_text(line * 20)
    return on_a_terminal("run", "processors:double", "in.jsonl", "-o", "out.jsonl")


@pytest.fixture(params=["tqdm", "no tqdm"])
def with_and_without_tqdm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tqdm":
        pytest.importorskip("tqdm")
    else:
        monkeypatch.delitem(sys.modules, "microbatch.integrations.tqdm", raising=False)
        monkeypatch.setitem(sys.modules, "tqdm", None)


def test_progress_is_shown_on_a_terminal() -> None:
    pytest.importorskip("tqdm")
    assert re.search(r"20 lines \[", run_on_a_terminal())


def test_progress_without_tqdm_is_a_plain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "microbatch.integrations.tqdm", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run_on_a_terminal().endswith("\r20 lines\n")


def test_an_error_is_reported_on_a_line_without_progress(with_and_without_tqdm: None) -> None:
    assert all(text.startswith("line ") for text in re.findall(r"[^\r\n]*line \d.*", run_on_a_terminal("no\n")))


def test_no_progress_is_shown_if_the_results_go_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class TerminalStream(io.BytesIO):
        def isatty(self) -> bool:
            return True

    Path("in.jsonl").write_text("1\n2\n")
    shown = TerminalStream()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown))
    assert "" == on_a_terminal("run", "processors:double", "in.jsonl")
    assert b"2\n4\n" == shown.getvalue()


@pytest.mark.slow
def test_the_demo_shows_its_progress_on_a_terminal_and_clears_it(
    with_and_without_tqdm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microbatch.cli import progress

    class FastClock:
        moment = 0.0

        def now(self) -> float:
            self.moment += 1.0
            return self.moment

    monkeypatch.setattr(progress, "SystemClock", FastClock)
    shown = on_a_terminal("demo", "--jobs", "20", "--threads", "2")
    for title in ("reading", "one commit per job", "through a Batcher"):
        assert re.search(rf"\r{title}: ", shown)
    assert "20" in shown and "\n" not in shown
    assert re.search(r"\r +\r$", shown)


@pytest.mark.slow
def test_the_demo_shows_no_progress_if_standard_error_is_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["demo", "--jobs", "20", "--threads", "2"])
    assert "" == capsys.readouterr().err


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*")]


@contextlib.contextmanager
def demo_in(folder: Path, *prefix: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the demo with *folder* for temporary files, and continue when it has created one."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    arguments = [*prefix, sys.executable, "-m", "microbatch", "demo", "--jobs", "2000"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            while "demo.sqlite" not in temporary_files(folder):
                assert process.poll() is None
            yield process
        except BaseException:
            process.kill()
            raise


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_demo_leaves_no_file_behind_if_a_signal_ends_it(number: int, folder: Path) -> None:
    with demo_in(folder / "temporary") as process:
        process.send_signal(number)
        assert 128 + number == process.wait(timeout=20)
    assert [] == temporary_files(folder / "temporary")


def test_the_demo_leaves_no_file_behind_if_signals_arrive_while_it_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    removed = []

    def insert(database: Any, table: str, rows: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    def rmtree(folder: Path, ignore_errors: bool) -> None:
        signal.raise_signal(signal.SIGINT)
        removed.append(folder)
        shutil.rmtree(folder)

    monkeypatch.setattr(demo.Database, "insert", insert)
    monkeypatch.setattr(demo, "shutil", types.SimpleNamespace(rmtree=rmtree))
    assert 130 == main(["demo"])
    assert [False] == [folder.exists() for folder in removed]


def test_the_demo_does_not_react_to_a_signal_that_is_ignored(folder: Path) -> None:
    if shutil.which("nohup") is None:
        pytest.skip("this system has no nohup")
    with demo_in(folder / "temporary", "nohup") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert 128 + signal.SIGTERM == process.wait(timeout=20)


def test_a_failing_database_in_the_demo_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def insert(database: Any, table: str, rows: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(demo.Database, "insert", insert)
    assert 2 == main(["demo"])
    assert "microbatch: the demo's database: database or disk is full\n" == capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_shows_that_both_methods_insert_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["demo", "--jobs", "300", "--threads", "8", "--size", "4"])
    out = capsys.readouterr().out
    assert "300 function definitions of Python's standard library, from 8 threads" in out
    assert re.search(r"one commit per job +300 +300 +1\.0 ", out)
    assert re.search(r"through a Batcher +300 +\d+ +[1-4]\.\d ", out)
    assert re.search(r"\d+\.\d times as fast", out)
    assert re.search(r"^ +\d #+ \d+$", out, re.MULTILINE)
    assert out.endswith("both tables hold the same 300 rows: yes\n")


@pytest.mark.slow
def test_the_demo_leaves_no_file_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert 0 == main(["demo", "--jobs", "20", "--threads", "2"])
    assert [] == list((tmp_path / "temporary").iterdir())


def test_the_version_option_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert 0 == left.value.code
    assert re.match(r"microbatch \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_simulate_compares_policies_under_the_same_load(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "simulate",
        "Size(4)",
        "Size(8) | Interval(0.005)",
        "--cost",
        "5ms+20us",
        "--rate",
        "100",
        "--jobs",
        "64",
    ]
    assert 0 == main([*command, "--workers", "2", "--seed", "3"])
    head, four, eight = capsys.readouterr().out.splitlines()
    assert "policy mean ms p50 ms p95 ms p99 ms batch calls busy triggers" == " ".join(head.split())
    assert four.startswith("Size(4) ") and four.endswith("size 16")
    assert eight.startswith("Size(8) | Interval(0.005) ") and "interval" in eight


def test_simulate_compares_the_default_with_two_common_policies_if_none_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert 0 == main(["simulate", "--cost", "5 ms + 20 us", "--rate", "100/s", "--jobs", "64"])
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [repr(DEFAULT_POLICY), "Size(100) | Interval(0.005)", "Size(100) | Interval(0.05)"] == names


def test_simulate_accepts_a_policy_without_parentheses(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["simulate", "Size(8) | Natural", "--cost", "5ms", "--rate", "100", "--jobs", "64"])
    assert capsys.readouterr().out.splitlines()[1].startswith("Size(8) | Natural() ")


def test_simulate_supports_callers_in_a_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["simulate", "Natural()", "--cost", "5ms", "--callers", "8", "--jobs", "8000"])
    assert "8.0" in capsys.readouterr().out.splitlines()[1].split()


@pytest.mark.parametrize(
    "policy, options, size",
    [
        ("Weight(20)", [], "20.0"),
        ("Weight(20)", ["--weights", "10,10,10"], "2.0"),
        ("Weight(20)", ["--weights", "10,10,10", "--buckets", "5,20"], "1.0"),
        ("Interval(9)", ["--weights", "5,17,256"], "100.0"),
        ("Interval(9)", ["--weights", "5,17,256", "--buckets", "17,256"], "50.0"),
    ],
)
def test_simulate_gives_the_jobs_weights_and_buckets(
    policy: str, options: list[str], size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--rate", "1000/s", "--jobs", "100", "--cost", "1ms"]
    assert 0 == main(["simulate", policy, *load, *options])
    assert size == capsys.readouterr().out.splitlines()[1].split()[5]


def test_simulate_charges_for_the_padding_of_recorded_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"submitted": [7.0, 7.0], "service_time": 1, "weights": [10, 2]}', encoding="utf-8")
    assert 0 == main(["simulate", "Size(2)", "--trace", str(path), "--cost", "10ms*padded"])
    assert "200.00" == capsys.readouterr().out.splitlines()[1].split()[1]


@pytest.mark.parametrize("cost, mean", [([], "1,500.00"), (["--cost", "250ms"], "500.00")])
def test_simulate_replays_a_recorded_load(
    cost: list[str], mean: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"submitted": [7.0, 7.5], "service_time": 1.25}\n', encoding="utf-8")
    assert 0 == main(["simulate", "Size(2)", "--trace", str(path), *cost])
    assert mean == capsys.readouterr().out.splitlines()[1].split()[1]


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["Size(0)", "--cost", "5ms", "--rate", "1"], "can't create the policy 'Size(0)': n must be at least 1, got 0"),
        (["Size(1)", "--cost", "5", "--rate", "1"], "argument --cost: must be a sum of times"),
        (["Size(1)", "--cost", "5ms", "--rate", "0"], "argument --rate: must be above 0, got '0'"),
        (["Size(1)", "--cost", "5ms"], "one of the arguments --rate --callers --trace is required"),
        (["Size(1)", "--rate", "1"], "--cost is needed unless there is a --trace: for example, --cost 5ms+20us"),
        (
            ["Size(1)", "--cost", "5ms", "--rate", "x"],
            "argument --rate: must be a number of jobs per second, or a rate such as 100/s",
        ),
        (["Sise(1)", "--cost", "5ms", "--rate", "1"], "a policy must be made of Adaptive, "),
        (["Size(1)", "--trace", "nowhere.jsonl"], "argument --trace: [Errno 2] No such file or directory"),
        (["Size(1)", "--trace", os.devnull], "argument --trace: a trace must have at least one job"),
        (["Size(1)", "--cost", "5ms", "--rate", "1", "--callers", "1"], "not allowed with argument --rate"),
        (["Size(1)", "--cost", "5ms", "--rate", "inf"], "rate must be below inf, got inf"),
        (["Size(1)", "--cost", f"{'9' * 400}s", "--rate", "1"], "the cost of a batch must be below inf, got inf"),
        (["Size(1)", "--cost", "5ms", "--rate", "1", "--weights", "5"], "argument --weights: must be the least"),
        (["Size(1)", "--cost", "5ms", "--rate", "1", "--buckets", "x"], "argument --buckets: must be the upper bounds"),
        (
            ["Size(1)", "--cost", "5ms", "--rate", "1", "--weights", "5,9,32", "--buckets", "4"],
            "the last bucket must be at least the greatest weight, got '4'",
        ),
    ],
)
def test_simulate_refuses_invalid_options(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 2 == main(["simulate", *options])
    err = capsys.readouterr().err
    assert complaint in err and "microbatch simulate --help)" in err


def test_simulate_refuses_a_recorded_job_that_is_too_large_for_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"submitted": [7.0], "service_time": 1, "weights": [100]}', encoding="utf-8")
    assert 2 == main(["simulate", "Weight(10)", "--trace", str(path)])
    assert "microbatch: a job of weight 100 does not fit into any batch: the limit is 10\n" == capsys.readouterr().err


def test_an_interrupt_that_an_import_turns_into_an_error_ends_the_program_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "interrupted.py").write_text(
        "try:\n    raise KeyboardInterrupt\nexcept BaseException as error:\n    raise ImportError('no') from error"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert 130 == main(["run", "interrupted:process"])
    assert ("", "") == tuple(capsys.readouterr())


def test_an_interrupt_while_the_program_is_imported_ends_it_quietly() -> None:
    script = """if True:
        import runpy, sys

        class Finder:
            def find_spec(self, name, *_):
                if name == "microbatch.cli.commands":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Finder())
        runpy.run_module("microbatch", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=20)
    assert (130, b"", b"") == (done.returncode, done.stdout, done.stderr)
