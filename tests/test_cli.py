"""``python -m microbatch``."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest

from microbatch.cli import main

ROOT = Path(__file__).parent.parent

PROCESSORS = """
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

def coloured(jobs):
    raise ValueError("\\x1b[31mred" + "!" * 5000)

def hang(jobs):
    pathlib.Path("hanging").touch()
    main = threading.main_thread().ident
    while "shutdown" not in [frame.name for frame in traceback.extract_stack(sys._current_frames()[main])]:
        time.sleep(0.01)
    pathlib.Path("interrupted").touch()
    time.sleep(600)

def same(jobs):
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("processors", "broken", "leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def run(target: str, text: str, *options: str) -> Tuple[int, List[Any], str]:
    """Process the lines of *text*; return the status, the values written, and what was said on standard error."""
    Path("in.jsonl").write_text(text, encoding="utf-8")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(["run", target, "in.jsonl", "-o", "out.jsonl", *options])
    written = Path("out.jsonl").read_text(encoding="utf-8") if Path("out.jsonl").exists() else ""
    return status, [json.loads(line) for line in written.splitlines()], errors.getvalue()


@contextlib.contextmanager
def command(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run the command; a test that fails does not wait for its end, which may never come."""
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
    """Send Ctrl-C, and then a line: if it came just before the wait for one, it is only noticed when that wait ends."""
    process.send_signal(signal.SIGINT)
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):
        os.write(process.stdin.fileno(), b"2\n")


def test_results_come_in_the_order_of_the_input() -> None:
    lines = "".join(f"{number}\n" for number in range(1000))
    assert (0, [number * 2 for number in range(1000)], "") == run("processors:double", lines, "--workers", "3")


def test_a_batch_holds_no_more_than_its_size() -> None:
    status, values, _ = run("processors:sizes", "1\n" * 100, "--size", "7", "--interval", "60")
    assert (0, [7] * 98 + [2] * 2) == (status, values)


def test_values_are_written_as_they_are() -> None:
    assert (0, ["äö", {"a": None}, 1.5]) == run("processors:slow", '"äö"\n{"a": null}\n1.5')[:2]
    assert '"äö"' in Path("out.jsonl").read_text(encoding="utf-8")


def test_a_line_that_is_not_json_is_reported_and_the_rest_goes_on() -> None:
    status, values, errors = run("processors:double", "1\nno\n\n \nNaN\n4")
    assert (1, [2, 8]) == (status, values)
    assert [
        "line 2: not JSON: Expecting value: line 1 column 1 (char 0)",
        "line 5: not JSON: NaN is no JSON value",
    ] == (errors.splitlines())


def test_a_line_that_is_not_text_is_reported() -> None:
    Path("in.jsonl").write_bytes(b'"\xff"\n1\n')
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert 1 == main(["run", "processors:double", "in.jsonl", "-o", "out.jsonl"])
    assert errors.getvalue().startswith("line 1: not JSON: 'utf-8' codec can't decode")
    assert "2\n" == Path("out.jsonl").read_text()


def test_a_job_that_fails_is_reported_and_the_rest_goes_on() -> None:
    assert (1, [1, 2, 4], "line 3: KeyError: 3\n") == run("processors:picky", "1\n2\n3\n4\n")


def test_a_batch_that_fails_is_reported_line_by_line() -> None:
    assert (1, [], "line 1: OSError: out of order\nline 2: OSError: out of order\n") == run(
        "processors:failing", "1\n2\n"
    )


@pytest.mark.parametrize("target, word", [("objects", "not JSON serializable"), ("endless", "not JSON compliant")])
def test_a_value_that_json_cannot_hold_is_reported(target: str, word: str) -> None:
    status, values, errors = run(f"processors:{target}", "1\n")
    assert (1, []) == (status, values)
    assert word in errors and errors.startswith("line 1: ")


@pytest.mark.parametrize(
    "target, line, error",
    [
        ("same", '"\\ud800"', "UnicodeEncodeError: 'utf-8' codec can't encode"),
        ("same", "[" * 100_000, "not JSON: "),
        ("mute", "1", "Mute: (its text can't be had: RuntimeError)"),
        ("nameless", "1", "KeyError\n"),
        ("coloured", "1", " [31mred!!!"),
    ],
)
def test_whatever_a_line_does_the_rest_goes_on(target: str, line: str, error: str) -> None:
    status, values, errors = run(f"processors:{target}", f"{line}\n" + "7\n" * 1000, "--size", "1")
    assert (1, [7] * 1000 if target == "same" else []) == (status, values)
    assert errors.startswith(f"line 1: {error.lstrip()}")
    assert len(errors.splitlines()[0]) < 1100


def test_a_callable_inside_a_class_can_be_named() -> None:
    assert (0, [6], "") == run("processors:Group.double", "3")


def test_an_empty_input_is_all_right() -> None:
    assert (0, [], "") == run("processors:double", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "nowhere:x"], "can't use nowhere:x: ModuleNotFoundError: No module named 'nowhere'"),
        (["run", "processors:x"], "can't use processors:x: AttributeError: .*'x'"),
        (["run", "processors:number"], "can't use processors:number: TypeError: processor must be callable, got 3"),
        (["run", "processors:coroutine"], "can't use processors:coroutine: TypeError: .* must be a plain function"),
        (["run", "broken:x"], "can't use broken:x: SyntaxError: invalid syntax"),
        (["run", "leaving:x"], "can't use leaving:x: SystemExit: 0"),
        (["run", "processors"], "the target must be MODULE:CALLABLE, got 'processors'"),
        (["run", ":x"], "the target must be MODULE:CALLABLE, got ':x'"),
        (["run", "processors:double", "nofile"], ".*No such file or directory: 'nofile'"),
        (["run", "processors:double", "."], ".*Is a directory: '.'"),
        (
            ["run", "processors:double", "processors.py", "-o", "processors.py"],
            "processors.py can't be read and written",
        ),
        (["run", "processors:double", "processors.py", "-o", "no/where"], ".*No such file or directory: 'no/where'"),
        (["run", "processors:double", "--size", "0"], "argument --size: must be an integer of at least 1, got '0'"),
        (["run", "processors:double", "--size", "x"], "argument --size: must be an integer of at least 1, got 'x'"),
        (["run", "processors:double", "--workers", "-1"], "argument --workers: "),
        (
            ["run", "processors:double", "--interval", "nan"],
            "argument --interval: must be a number of seconds of at le",
        ),
        (
            ["run", "processors:double", "--interval", "x"],
            "argument --interval: must be a number of seconds of at leas",
        ),
        (["run", "processors:double", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["run"], "the following arguments are required: MODULE:CALLABLE"),
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "argument COMMAND: "),
        (["demo", "--threads", "0"], "argument --threads: must be an integer of at least 1, got '0'"),
        (["demo", "--threads", "10001"], "argument --threads: must be an integer of at most 10000, got '10001'"),
        (["run", "processors:double", "--workers", "10001"], "argument --workers: must be an integer of at most 10000"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line_and_status_2(
    arguments: List[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 2 == main(arguments)
    out, err = capsys.readouterr()
    assert "" == out
    assert 1 == len(err.splitlines())
    assert re.match(f"microbatch: {message}", err), err


def test_a_result_is_written_before_the_next_line_comes() -> None:
    with command("run", "processors:double") as process:
        assert process.stdin and process.stdout
        for number in range(3):
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            assert f"{number * 2}\n" == process.stdout.readline()
    assert 0 == process.returncode


def test_a_closed_pipe_ends_it_quietly() -> None:
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


def test_ctrl_c_ends_it_without_a_traceback() -> None:
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
        assert "<Batcher 'microbatch run'> lost 1 jobs" in process.stderr.read()


def test_ctrl_c_after_the_last_line_drops_what_has_not_been_sent(folder: Path) -> None:
    with command("run", "processors:hang", "--size", "1") as process:
        assert process.stdin and process.stderr
        process.stdin.write("1\n2\n3\n")
        process.stdin.close()
        process.stdin = None
        for seen in ("hanging", "interrupted"):
            while not (folder / seen).exists():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
        assert 130 == process.wait(timeout=20)
        assert "<Batcher 'microbatch run'> lost 1 jobs" in process.stderr.read()


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_stream_is_one_clear_line(closed: str) -> None:
    line = f"{sys.executable} -m microbatch run processors:double {closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, timeout=20, env=environment)
    assert (2, 1) == (done.returncode, len(done.stderr.splitlines())), done.stderr


def test_a_full_disk_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    Path("in.jsonl").write_text("1\n" * 10)
    assert 2 == main(["run", "processors:double", "in.jsonl", "-o", "/dev/full"])
    assert "microbatch: [Errno 28] No space left on device\n" == capsys.readouterr().err


def test_memory_holds_a_few_batches_and_not_the_input() -> None:
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


def run_on_a_terminal() -> str:
    Path("in.jsonl").write_text("1\n" * 20)
    terminal = Terminal()
    with contextlib.redirect_stderr(terminal):
        assert 0 == main(["run", "processors:double", "in.jsonl", "-o", "out.jsonl"])
    return terminal.getvalue()


def test_a_terminal_sees_the_progress() -> None:
    pytest.importorskip("tqdm")
    assert re.search(r"20 lines \[", run_on_a_terminal())


def test_a_terminal_sees_plain_counts_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "microbatch.integrations.tqdm", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run_on_a_terminal().endswith("\r20 lines\n")


def test_the_demo_shows_that_both_ways_leave_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["demo", "--jobs", "300", "--threads", "8", "--size", "4"])
    out = capsys.readouterr().out
    assert "300 function definitions of Python's standard library, from 8 threads" in out
    assert re.search(r"one commit per job +300 +300 +1\.0 ", out)
    assert re.search(r"through a Batcher +300 +\d+ +[1-4]\.\d ", out)
    assert re.search(r"\d+\.\d times as fast", out)
    assert re.search(r"^ +\d #+ \d+$", out, re.MULTILINE)
    assert out.endswith("both tables hold the same 300 rows: yes\n")


def test_the_demo_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tempfile

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert 0 == main(["demo", "--jobs", "20", "--threads", "2"])
    assert [] == list((tmp_path / "temporary").iterdir())


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert 0 == left.value.code
    assert re.match(r"microbatch \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_simulate_compares_policies_on_one_load(capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "policy mean ms p50 ms p95 ms p99 ms batch calls busy went by" == " ".join(head.split())
    assert four.startswith("Size(4) ") and four.endswith("size 16")
    assert eight.startswith("Size(8) | Interval(0.005) ") and "interval" in eight


def test_simulate_knows_callers_in_a_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["simulate", "Natural()", "--cost", "5ms", "--callers", "8", "--jobs", "8000"])
    assert "8.0" in capsys.readouterr().out.splitlines()[1].split()


@pytest.mark.parametrize("cost, mean", [([], "1,500.00"), (["--cost", "250ms"], "500.00")])
def test_simulate_takes_a_recorded_load(
    cost: List[str], mean: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"submitted": [7.0, 7.5], "service_time": 1.25}\n', encoding="utf-8")
    assert 0 == main(["simulate", "Size(2)", "--trace", str(path), *cost])
    assert mean == capsys.readouterr().out.splitlines()[1].split()[1]


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["Size(0)", "--cost", "5ms", "--rate", "1"], "a policy Size: n must be at least 1, got 0"),
        (["Size(1)", "--cost", "5", "--rate", "1"], "argument --cost: must be a time for each batch"),
        (["Size(1)", "--cost", "5ms", "--rate", "0"], "argument --rate: must be above 0, got '0'"),
        (["Size(1)", "--cost", "5ms"], "one of the arguments --rate --callers --trace is required"),
        (["Size(1)", "--rate", "1"], "--cost is needed without --trace"),
        (["Size(1)", "--trace", "nowhere.jsonl"], "argument --trace: [Errno 2] No such file or directory"),
        (["Size(1)", "--trace", os.devnull], "argument --trace: a trace must have at least one job"),
        (["Size(1)", "--cost", "5ms", "--rate", "1", "--callers", "1"], "not allowed with argument --rate"),
        (["Size(1)", "--cost", "5ms", "--rate", "inf"], "rate must be below inf, got inf"),
        (
            ["Size(1)", "--cost", f"{'9' * 400}s", "--rate", "1"],
            "the service_time of a batch must be below inf, got inf",
        ),
    ],
)
def test_simulate_refuses_what_makes_no_sense(
    options: List[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 2 == main(["simulate", *options])
    assert complaint in capsys.readouterr().err


def test_simulate_refuses_a_recorded_job_that_is_too_large_for_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"submitted": [7.0], "service_time": 1, "weights": [100]}', encoding="utf-8")
    assert 2 == main(["simulate", "Weight(10)", "--trace", str(path)])
    assert "microbatch: a job that weighs 100 fits in no batch\n" == capsys.readouterr().err
