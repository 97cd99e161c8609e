"""The applications on the page on FastAPI and Starlette, and examples/starlette_app.py."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from microbatch import Batcher, Size
from microbatch.testing import RecordingProcessor
from tests.extras import needs
from tests.pages import ROOT, in_a_hurry, write_files

needs("fastapi", "httpx")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # recent versions of Starlette prefer httpx2, which needs Python 3.11
    from starlette.testclient import TestClient


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files of the page and the example, from which a test can import them."""
    write_files("fastapi", tmp_path)
    shutil.copy(ROOT / "examples" / "starlette_app.py", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in ("batching", "main", "plain", "starlette_app", "test_main"):
        sys.modules.pop(module, None)


@pytest.fixture(params=["main", "plain", "starlette_app"], ids=["FastAPI", "Starlette", "example"])
def name(request: pytest.FixtureRequest) -> Any:
    """The module of the application."""
    return request.param


@pytest.fixture
def batching(name: str) -> str:
    """The module that creates the batcher of the application."""
    return "starlette_app" if name == "starlette_app" else "batching"


def test_each_start_of_an_application_has_a_batcher_of_its_own(folder: Path, name: str) -> None:
    app = importlib.import_module(name).app
    batchers: list[Batcher[str, int]] = []
    for _ in range(2):
        with TestClient(app) as client:
            assert [(200, 3), (200, 4)] == [
                (response.status_code, response.json())
                for response in map(client.get, ("/lengths/tea", "/lengths/milk"))
            ]
            batchers.append(client.app_state["batcher"])
    assert batchers[0] is not batchers[1]
    assert [True, True] == ["shut down" in batcher.explain() for batcher in batchers]


def test_an_application_may_run_twice_at_once(folder: Path, name: str) -> None:
    app = importlib.import_module(name).app
    with TestClient(app) as outer:
        with TestClient(app) as inner:
            assert 3 == inner.get("/lengths/tea").json()
        assert 3 == outer.get("/lengths/tea").json()


@pytest.mark.parametrize(
    "wait, others, left",
    [
        ("timeout=1,", ["running", "waiting"], {"accepted": 2, "expired": 0, "cancelled": 0}),
        ("expires_in=5", ["running"], {"accepted": 2, "expired": 1, "cancelled": 0}),
        ("timeout=10", ["running"], {"accepted": 2, "expired": 0, "cancelled": 1}),
    ],
    ids=["BacklogFull", "JobExpired", "TimeoutError"],
)
def test_the_response_has_status_503_if_the_batcher_is_busy(
    wait: str,
    others: list[str],
    left: dict[str, int],
    folder: Path,
    name: str,
    batching: str,
    processor: RecordingProcessor[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = folder / f"{batching}.py"
    source.write_text(in_a_hurry(source.read_text(), wait))
    module = importlib.import_module(batching)
    monkeypatch.setattr(module, "measure", processor)
    monkeypatch.setattr(module, "Batcher", partial(Batcher, policy=Size(1), max_pending=1))
    with TestClient(importlib.import_module(name).app) as client, ExitStack() as stack:
        stack.callback(processor.release)
        batcher: Batcher[str, Any] = client.app_state["batcher"]
        for job in others:
            batcher.submit(job)
            processor.wait_for_batches(1)
        response = client.get("/lengths/tea")
        assert (503, "1") == (response.status_code, response.headers["retry-after"])
        stats = batcher.stats()
        assert left == {state: getattr(stats, state) for state in left}


def test_jobs_that_no_request_waits_for_are_processed_before_the_lifespan_ends(
    folder: Path, name: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = RecordingProcessor[str]()
    module = importlib.import_module(batching)
    monkeypatch.setattr(module, "measure", processor)
    monkeypatch.setattr(module, "Batcher", partial(Batcher, policy=Size(100)))
    with TestClient(importlib.import_module(name).app) as client:
        client.app_state["batcher"].submit("later")
    assert [["later"]] == processor.batches


def test_the_tests_on_the_page_pass(folder: Path) -> None:
    tests = [test for name, test in vars(importlib.import_module("test_main")).items() if name.startswith("test_")]
    assert 2 == len(tests)
    for test in tests:
        test()


# The application with a processor that waits for files, and with two more paths.
SERVED = """
import os
import time

import {batching}
from starlette.responses import JSONResponse
from starlette.routing import Route

def measure(words):
    for word in words:
        while not os.path.exists("release later" if "later" in word else "release"):
            time.sleep(0.01)
        with open("processed", "a") as file:
            file.write(word + "\\n")
        yield len(word)

{batching}.measure = measure
from {name} import app

async def accepted(request):
    return JSONResponse(request.state.batcher.stats().accepted)

async def later(request):
    request.state.batcher.submit("later", timeout=0)
    return JSONResponse(None)

app.router.routes += [Route("/accepted", accepted), Route("/later", later)]
"""


@pytest.mark.server
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_a_stopped_uvicorn_answers_the_pending_requests_and_processes_all_jobs(
    folder: Path, name: str, batching: str
) -> None:
    needs("uvicorn")
    (folder / "served.py").write_text(SERVED.format(name=name, batching=batching))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = int(free.getsockname()[1])
    words = ["x" * length for length in range(1, 21)]

    def get(path: str) -> str:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as response:
            return bytes(response.read()).decode()

    def is_listening() -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return True
        return False

    command = [sys.executable, "-m", "uvicorn", "served:app", f"--port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = folder / "log.txt"
    with (
        log.open("wb") as file,
        ThreadPoolExecutor(len(words)) as clients,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            until(is_listening)
            responses = [clients.submit(get, f"/lengths/{word}") for word in words]
            until(lambda: get("/accepted") == "20")
            get("/later")
            process.send_signal(signal.SIGTERM)
            until(lambda: not is_listening())
            assert not any(response.done() for response in responses)
            (folder / "release").touch()
            assert [str(len(word)) for word in words] == [response.result(timeout=20) for response in responses]
            until(lambda: "Waiting for application shutdown" in log.read_text())
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)  # for the job that no request waits for
            (folder / "release later").touch()
            process.wait(timeout=20)
        finally:
            process.kill()
    assert sorted([*words, "later"]) == sorted((folder / "processed").read_text().split())


def until(condition: Any) -> None:
    """Wait until *condition* is true, for half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
