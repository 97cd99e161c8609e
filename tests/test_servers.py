"""The examples under real web servers, with clients in another process."""

import re
import shutil
import signal
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from benchmarks.servers import SERVERS, Served, load, serving
from tests.extras import needs

needs("django", "flask", "gunicorn", "waitress")

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform == "win32", reason="gunicorn needs Unix"),
]

GUNICORN = [name for name, server in SERVERS.items() if server.restarts]
DEVELOPMENT = [name for name in SERVERS if name.rpartition(", ")[2].startswith("run")]


@pytest.mark.parametrize("name", SERVERS)
def test_every_request_gets_its_own_response(name: str, tmp_path: Path) -> None:
    with serving(SERVERS[name], tmp_path) as served:
        found = load(served, requests := 1_000 if SERVERS[name].batches else 300)
        assert ([], [], requests) == (found.wrong, found.lost, len(found.times))
        assert found.orders == served.rows()
    assert found.calls < requests or not SERVERS[name].batches  # the benchmark measures by how much


@pytest.mark.parametrize("name", GUNICORN)
def test_no_request_is_lost_during_a_graceful_restart(name: str, tmp_path: Path) -> None:
    with serving(SERVERS[name], tmp_path) as served:
        found = load(served, requests := 2_000 if SERVERS[name].batches else 600, signal.SIGHUP)
        assert ([], [], requests) == (found.wrong, found.lost, len(found.times))
        assert found.orders == served.rows()


@pytest.mark.parametrize("name", GUNICORN)
def test_each_job_that_a_stopped_server_has_processed_is_answered(name: str, tmp_path: Path) -> None:
    with serving(SERVERS[name], tmp_path) as served:
        found = load(served, 1_000, signal.SIGTERM)
        assert 0 == served.process.wait(timeout=30)
        assert [] == found.wrong and found.refused > 0 and len(found.times) > 100
        assert found.orders == served.rows()


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the example that the test may edit."""
    ignored = shutil.ignore_patterns("__pycache__", "*.sqlite3*")
    return Path(shutil.copytree(SERVERS[request.getfixturevalue("name")].folder, tmp_path / "source", ignore=ignored))


def post(served: Served, path: str, data: bytes = b"") -> None:
    with urlopen(Request(f"http://127.0.0.1:{served.port}{path}", data), timeout=10) as answer:
        assert 200 == answer.status


def edit(path: Path, served: Served, log: Path) -> None:
    """Edit a file until the server, which checks once a second, reloads, and wait until it has restarted."""
    deadline = time.monotonic() + 30
    while not re.search("changed, reloading|Detected change", log.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        path.write_text(path.read_text() + "\n")
        time.sleep(0.2)
    while len(re.findall("Starting development server|Debugger is active", log.read_text())) < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    served.wait()


@pytest.mark.parametrize("name", DEVELOPMENT)
def test_a_development_server_keeps_working_after_an_edit(name: str, source: Path, tmp_path: Path) -> None:
    (edited,) = [*source.rglob("batches.py"), *source.rglob("application.py")]
    with serving(SERVERS[name], tmp_path, source) as served:
        before = load(served, 100)
        edit(edited, served, tmp_path / "log.txt")
        after = load(served, 100)
        assert [[], []] == [found.wrong + found.lost for found in (before, after)]
        assert {**before.orders, **after.orders} == served.rows()


@pytest.mark.parametrize("name", ["Django, runserver"])
def test_waiting_jobs_are_processed_before_a_development_server_reloads(
    name: str, source: Path, tmp_path: Path
) -> None:
    settings = source / "shop" / "settings.py"
    settings.write_text(settings.read_text().replace("Size(50) | Natural()", "Size(50)"))
    with serving(SERVERS[name], tmp_path, source) as served:
        post(served, "/orders", b"what=tea")
        post(served, "/orders/1/pay")
        assert {} == served.rows("shop_receipt")
        edit(settings, served, tmp_path / "log.txt")
        assert {"1": 1} == served.rows("shop_receipt")
