"""Batchers in the settings of a Django project, and the database connections of their threads."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from microbatch import Batcher, Hints, Size
from microbatch.testing import RecordingProcessor
from tests.extras import needs
from tests.pages import files, in_a_hurry, makes_the_batcher_busy

needs("django")
import django
from django import conf
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections
from django.test import RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext

from microbatch.integrations.django import batchers, closing_old_connections, sharing_connections

PROJECT = Path(__file__).parent.parent / "examples" / "django_app"
HERE = "tests.test_django."


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory) -> None:
    database = tmp_path_factory.mktemp("django") / "database.sqlite3"
    conf.settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(database)}},
        INSTALLED_APPS=["microbatch.integrations.django.Microbatch"],
        LOGGING_CONFIG=None,
    )
    django.setup()


@pytest.fixture(autouse=True)
def shut_everything_down() -> Iterator[None]:
    yield
    batchers.shutdown()
    connections.close_all()


def configured(**batcher: Any) -> Any:
    return override_settings(MICROBATCH={"rows": {"PROCESSOR": HERE + "double", **batcher}})


def double(rows: list[Any]) -> list[Any]:
    return [row * 2 for row in rows]


def one(row: Any) -> float:
    return 1.0


recording = RecordingProcessor[Any]()
policy = Size(2)


def test_a_batcher_is_created_from_its_settings_on_first_use() -> None:
    with configured(POLICY=HERE + "policy", MAX_WORKERS=2, WEIGH=HERE + "one"):
        batcher = batchers["rows"]
        assert batcher is batchers["rows"]
        assert [2, 4] == [future.result(timeout=10).value for future in [batcher.submit(1), batcher.submit(2)]]
        assert ["rows"] == list(batchers)
        assert batcher.explain().startswith("<Batcher 'rows' with Size(2)>")


@pytest.mark.parametrize(
    "setting, policy",
    [
        ("Size(64) | Interval(0.005)", "Size(64) | Interval(0.005)"),
        ("Natural", "Natural()"),
        (HERE + "policy", "Size(2)"),
        (policy, "Size(2)"),
    ],
    ids=str,
)
def test_a_policy_may_be_text_a_dotted_path_or_an_object(setting: Any, policy: str) -> None:
    with configured(POLICY=setting):
        assert f"<Batcher 'rows' with {policy}>" == repr(batchers["rows"])


def test_all_threads_get_the_same_batcher() -> None:
    with configured():
        got: list[Any] = []
        threads = [threading.Thread(target=lambda: got.append(batchers["rows"])) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 8 == len(got) and {batchers["rows"]} == set(got)


def test_a_batcher_created_while_the_others_are_shut_down_is_kept() -> None:
    class Interrupting(Size):
        @property
        def hints(self) -> Hints:
            batchers.shutdown()
            return super().hints

    with configured(POLICY=Interrupting(2)):
        assert batchers["rows"] is batchers["rows"]


@pytest.mark.parametrize("names, only", [({}, "because"), ({"rows": {}, "mails": {}}, "only 'rows', 'mails'")])
def test_a_name_that_is_not_in_the_settings_raises_key_error(names: dict[str, Any], only: str) -> None:
    with override_settings(MICROBATCH=names), pytest.raises(KeyError, match=f"has no batcher 'row', {only}"):
        batchers["row"]


def test_without_the_setting_there_are_no_batchers() -> None:
    assert ([], 0) == (list(batchers), len(batchers))
    call_command("check")


@pytest.mark.parametrize(
    "setting, complaint",
    [
        ([1], "MICROBATCH must be a dict of dicts, with names of batchers as keys"),
        ({"rows": list}, "MICROBATCH['rows'] must be a dict with at least a 'PROCESSOR'"),
        ({"rows": {"POLICY": policy}}, "MICROBATCH['rows'] must be a dict with at least a 'PROCESSOR'"),
        ({"rows": {"PROCESSOR": "shop.no"}}, "MICROBATCH['rows']['PROCESSOR']: No module named 'shop'"),
        (
            {"rows": {"PROCESSOR": HERE + "no"}},
            "MICROBATCH['rows']['PROCESSOR']: Module \"tests.test_django\" does not",
        ),
        ({"rows": {"PROCESSOR": 3}}, "MICROBATCH['rows']['PROCESSOR'] must be callable, got 3"),
        ({"rows": {"PROCESSOR": double, "MAX_WORKERS": 0}}, "MICROBATCH['rows']['MAX_WORKERS'] must be"),
        ({"rows": {"PROCESSOR": double, "POLICY": 100}}, "MICROBATCH['rows']['POLICY'] must be"),
        (
            {"rows": {"PROCESSOR": double, "POLICY": "Size(0) | Natural()"}},
            "MICROBATCH['rows']['POLICY']: can't create the policy 'Size(0)': n must be at least 1, got 0",
        ),
        (
            {"rows": {"PROCESSOR": double, "POLICY": "Natural() | shop.POLICY"}},
            "MICROBATCH['rows']['POLICY']: a policy must be made of Adaptive, ",
        ),
        (
            {"rows": {"PROCESSOR": double, "POLICY": "shop.Natural"}},
            "MICROBATCH['rows']['POLICY']: No module named 'shop'",
        ),
        (
            {"rows": {"PROCESSOR": "Natural"}},
            "MICROBATCH['rows']['PROCESSOR']: Natural doesn't look like a module path",
        ),
        ({"rows": {"PROCESSOR": double, "LISTENERS": [HERE + "double"]}}, "MICROBATCH['rows']['LISTENERS'] must be"),
        ({"rows": {"PROCESSOR": double, "MAX_WORKER": 2}}, "MICROBATCH['rows'] has no setting 'MAX_WORKER', only EXEC"),
        ({"rows": {"PROCESSOR": ".f.g"}}, "MICROBATCH['rows']['PROCESSOR']: "),
        ({1: {"PROCESSOR": double}}, "MICROBATCH[1] must be MICROBATCH['1']: the name of a batcher must be a string"),
        ({"rows": {"PROCESSOR": double, "NAME": "x"}}, "MICROBATCH['rows'] has no setting 'NAME', only EXECUTOR, "),
    ],
)
def test_a_bad_setting_is_reported_by_its_name_by_the_system_check(setting: Any, complaint: str) -> None:
    with override_settings(MICROBATCH=setting):
        with pytest.raises(SystemCheckError) as caught:
            call_command("check")
        assert complaint in str(caught.value)
        if "rows" in setting:
            with pytest.raises(ImproperlyConfigured):
                batchers["rows"]


def test_changed_settings_give_new_batchers_and_the_old_ones_are_shut_down() -> None:
    with configured():
        first = batchers["rows"]
        future = first.submit(1)
        with configured(POLICY=policy):
            assert 2 == future.result(timeout=0).value
            assert "shut down" in first.explain() and first is not batchers["rows"]


@makes_the_batcher_busy
def test_the_view_on_the_page_responds_with_503_if_the_batcher_is_busy(
    wait: str, others: list[str], expired: int, processor: RecordingProcessor[Any]
) -> None:
    views: dict[str, Any] = {}
    exec(in_a_hurry(dict(files("django"))["orders/views.py"], wait), views)
    settings = {"orders": {"PROCESSOR": processor, "POLICY": Size(1), "MAX_PENDING": 1}}
    with override_settings(MICROBATCH=settings), ExitStack() as stack:
        stack.callback(processor.release)
        for job in others:
            batchers["orders"].submit(job)
            processor.wait_for_batches(1)
        response = views["order"](RequestFactory().post("/orders", {"what": "tea"}))
        assert (503, "1") == (response.status_code, response.headers["Retry-After"])
        stats = batchers["orders"].stats()
        assert (2, expired) == (stats.accepted, stats.expired)


# -- connections --


def used(jobs: list[Any]) -> list[Any]:
    """Use the database, and return for each job the connection of Django and that of the driver."""
    connection = connections["default"]
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return [(connection, connection.connection)] * len(jobs)


def yielded(jobs: list[Any]) -> Iterator[Any]:
    yield from used(jobs)


@pytest.mark.parametrize("processor", [used, yielded])
def test_no_connection_is_left_open_after_a_batch(processor: Any) -> None:
    with Batcher[Any, Any](closing_old_connections(processor), Size(1)) as batcher:
        wrapper, raw = batcher.submit(1).result(timeout=10).value
        batcher.flush()
        assert wrapper is not connections["default"] and raw is not None
        assert wrapper.connection is None


def test_no_connection_is_left_open_after_a_batch_that_raises() -> None:
    def processor(jobs: list[Any]) -> None:
        left.extend(used(jobs))
        raise ValueError

    left: list[Any] = []
    with Batcher[Any, Any](closing_old_connections(processor), Size(1)) as batcher:
        assert isinstance(batcher.submit(1).exception(timeout=10), ValueError)
    assert left[0][0].connection is None


def test_a_persistent_connection_is_reused_by_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf.settings.DATABASES["default"], "CONN_MAX_AGE", None)
    with Batcher[Any, Any](closing_old_connections(used), Size(1)) as batcher:
        (wrapper, first), (_, second) = (batcher.submit(job).result(timeout=10).value for job in (1, 2))
        batcher.flush()
        assert first is second is wrapper.connection
    batchers.shutdown()
    assert wrapper.connection is None  # otherwise a test database could not be dropped


def test_tests_can_share_their_connection_with_the_batches() -> None:
    with configured(PROCESSOR=used, POLICY=Size(1)):
        own = batchers["rows"].submit(1).result(timeout=10).value[0]
        with sharing_connections(), CaptureQueriesContext(connections["default"]) as queries:
            shared = batchers["rows"].submit(2).result(timeout=10).value[0]
        assert (connections["default"], 1) == (shared, len(queries))
        assert own is batchers["rows"].submit(3).result(timeout=10).value[0]


def test_sharing_ends_when_all_submitted_jobs_are_settled() -> None:
    with configured(PROCESSOR=used):
        with sharing_connections():
            futures = [batchers["rows"].submit(number) for number in range(9)]
        assert {connections["default"]} == {future.result(timeout=0).value[0] for future in futures}


def test_sharing_may_be_nested() -> None:
    with configured(PROCESSOR=used, POLICY=Size(1)), sharing_connections():
        with sharing_connections():
            pass
        assert connections["default"] is batchers["rows"].submit(1).result(timeout=10).value[0]


def test_sharing_waits_for_jobs_that_other_jobs_submit() -> None:
    def passing_on(jobs: list[Any]) -> list[Any]:
        return [batchers["first"].submit(job) for job in jobs]

    settings = {"first": {"PROCESSOR": used}, "second": {"PROCESSOR": passing_on}}
    with override_settings(MICROBATCH=settings):
        with sharing_connections():
            batchers["first"].flush()
            passed = batchers["second"].submit(1)
        assert connections["default"] is passed.result(timeout=0).value.result(timeout=0).value[0]


def test_the_tests_of_the_example_pass_without_a_warning() -> None:
    command = [sys.executable, "-W", "error", "manage.py", "test"]
    done = subprocess.run(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (0, True) == (done.returncode, "Ran 3 tests" in done.stderr), done.stderr
