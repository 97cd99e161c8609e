"""Batchers in the settings of a Django project, and the database connections of their threads."""

import os
import subprocess
import sys
import threading
import unittest
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from microbatch import Batcher, Hints, Interval, Size
from microbatch.testing import RecordingProcessor
from tests.extras import needs
from tests.pages import files, in_a_hurry, makes_the_batcher_busy

needs("django")
import django
from django import conf
from django.apps import apps
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections
from django.db.transaction import atomic
from django.test import LiveServerTestCase, RequestFactory, TestCase, TransactionTestCase, override_settings
from django.test.utils import CaptureQueriesContext, setup_databases, teardown_databases

import microbatch.integrations.django as integration
from microbatch.integrations.django import (
    Microbatch,
    SharedConnections,
    batchers,
    closing_old_connections,
    sharing_connections,
)

PROJECT = Path(__file__).parent.parent / "examples" / "django_app"
HERE = "tests.test_django."


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("django")
    conf.settings.configure(
        DATABASES={
            alias: {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / f"{alias}.sqlite3")}
            for alias in ("default", "other")
        },
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
        ({"rows": {"PROCESSOR": double, "MAX_WORKER": 2}}, "MICROBATCH['rows'] has no setting 'MAX_WORKER', only DROP"),
        ({"rows": {"PROCESSOR": ".f.g"}}, "MICROBATCH['rows']['PROCESSOR']: "),
        ({1: {"PROCESSOR": double}}, "MICROBATCH[1] must be MICROBATCH['1']: the name of a batcher must be a string"),
        ({"rows": {"PROCESSOR": double, "NAME": "x"}}, "MICROBATCH['rows'] has no setting 'NAME', only DROP_OLDEST, "),
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


@pytest.mark.parametrize("app", ["microbatch.integrations.django.Microbatch", "microbatch"])
def test_the_app_may_have_a_long_or_a_short_name(app: str) -> None:
    with configured(), override_settings(INSTALLED_APPS=[app]):
        assert isinstance(apps.get_app_config("microbatch"), Microbatch)
        call_command("check", fail_level="WARNING")


@pytest.mark.parametrize(
    "installed, complaints",
    [
        (["microbatch.integrations.django"], ["microbatch.E002"]),
        (["microbatch.integrations"], ["microbatch.W001", "microbatch.E002"]),
        ([], ["microbatch.W001", "microbatch.E002"]),
    ],
    ids=str,
)
def test_a_bad_setting_and_a_wrong_or_missing_app_are_reported(installed: list[str], complaints: list[str]) -> None:
    with configured(PROCESSOR="shop.no"), override_settings(INSTALLED_APPS=installed):
        assert complaints == [message.id for message in run_checks()]


def test_an_app_that_is_missing_is_not_reported_if_there_are_no_batchers() -> None:
    with override_settings(INSTALLED_APPS=[]):
        call_command("check", fail_level="WARNING")


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


def test_sharing_ends_even_if_waiting_for_the_jobs_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with configured(PROCESSOR=used, POLICY=Size(1)):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), sharing_connections():
            patched.setattr(batchers, "flush", interrupted)
        assert connections["default"] is not batchers["rows"].submit(1).result(timeout=10).value[0]
        assert not connections["default"].allow_thread_sharing


def test_jobs_that_the_tests_have_left_behind_do_not_reach_the_real_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_names", {})
    monkeypatch.setattr(integration, "_replaced", set())
    with configured(PROCESSOR=used, POLICY=Interval(60)), override_settings(INSTALLED_APPS=["microbatch"]):
        databases = setup_databases(verbosity=0, interactive=False)
        done = batchers["rows"].submit(1)
        batchers.flush()
        left = batchers["rows"].submit(2)
        teardown_databases(databases, verbosity=0)
        batchers.flush()
    assert done.result(timeout=0).value[0] is not connections["default"]
    with pytest.raises(RuntimeError, match="the tests have ended, .* the batch would use the real one"):
        left.result(timeout=0)


FORKING = """
import os, signal, sys, threading
import django
from django import conf
database = {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1], "CONN_MAX_AGE": None}
conf.settings.configure(DATABASES={"default": database})
django.setup()
from django.db import connections
from microbatch import Batcher, Size
from microbatch.integrations.django import batchers, closing_old_connections, sharing_connections

def processor(jobs):
    connections["default"].ensure_connection()
    if jobs == ["hold"]:
        started.set()
        release.wait()
    return [connections["default"]]

started, release = threading.Event(), threading.Event()
batcher = Batcher(closing_old_connections(processor), Size(1))
of_the_thread = batcher.submit("job").result(timeout=10).value
batcher.flush()
with sharing_connections():
    batcher.submit("hold")
    started.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        print(batcher.submit("job").result(timeout=5).value in (of_the_thread, connections["default"]))
        batchers.shutdown()
        print(of_the_thread.connection is None)
        sys.stdout.flush()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    release.set()
batcher.shutdown()
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_neither_uses_nor_closes_the_connections_of_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, str(tmp_path / "db.sqlite3")]
    assert ["False", "False"] == subprocess.check_output(command, text=True, timeout=30).split()


# -- test cases --


def run(case: type[unittest.TestCase]) -> None:
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert result.testsRun and result.wasSuccessful(), "".join(text for _, text in result.failures + result.errors)


def is_shared(jobs: list[Any]) -> list[Any]:
    """Return for each job whether the batch runs on the main thread's connection, and in its transaction."""
    connection = used(jobs)[0][0]
    return [(connection is of_the_test, connection.in_atomic_block) for _ in jobs]


of_the_test: Any = None


@pytest.fixture
def main_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "of_the_test", connections["default"])


CASES = [TestCase, TransactionTestCase, LiveServerTestCase]


@pytest.mark.parametrize("base", CASES)
def test_a_test_case_with_the_mixin_shares_its_connection_everywhere(base: Any, main_connection: None) -> None:
    got: dict[str, Any] = {}

    def submit(where: str) -> None:
        got[where] = batchers["rows"].submit(where).result(timeout=10).value

    class RowsTest(SharedConnections, base):  # type: ignore[misc]
        @classmethod
        def setUpClass(cls) -> None:
            super().setUpClass()
            submit("setUpClass")

        @classmethod
        def setUpTestData(cls) -> None:
            submit("setUpTestData")

        def setUp(self) -> None:
            submit("setUp")

        def test(self) -> None:
            submit("test")
            with ThreadPoolExecutor(1) as threads:
                threads.submit(submit, "thread").result()

        async def test_async(self) -> None:
            submit("async")

        def tearDown(self) -> None:
            submit("tearDown")

        @classmethod
        def tearDownClass(cls) -> None:
            submit("tearDownClass")
            super().tearDownClass()

    with configured(PROCESSOR=is_shared, POLICY=Size(1)):
        run(RowsTest)
        in_transaction = base is TestCase
        assert (8 if in_transaction else 7) == len(got)
        assert {(True, in_transaction)} == set(got.values())
        assert (False, False) == batchers["rows"].submit("later").result(timeout=10).value


def test_the_mixin_waits_for_all_jobs_before_a_transaction_is_rolled_back(main_connection: None) -> None:
    futures: list[Any] = []

    class RowsTest(SharedConnections, TestCase):
        @classmethod
        def setUpTestData(cls) -> None:
            futures.append(batchers["rows"].submit("data"))
            batchers.flush()

        def tearDown(self) -> None:
            self.addCleanup(lambda: futures.append(batchers["rows"].submit("cleanup")))

        def test_first(self) -> None:
            self.assertTrue(all(future.done() for future in futures))

        def test_second(self) -> None:
            self.assertTrue(all(future.done() for future in futures))

        @classmethod
        def tearDownClass(cls) -> None:
            futures.append(batchers["rows"].submit("class"))
            super().tearDownClass()

    with configured(PROCESSOR=is_shared, POLICY=Interval(60)):
        run(RowsTest)
        assert [(True, True)] * 4 == [future.result(timeout=0).value for future in futures]


def test_sharing_ends_if_the_set_up_of_the_class_fails(main_connection: None) -> None:
    class RowsTest(SharedConnections, TestCase):
        @classmethod
        def setUpTestData(cls) -> None:
            raise ValueError("no data")

        def test(self) -> None: ...

    with pytest.raises(AssertionError, match="no data"):
        run(RowsTest)
    with configured(PROCESSOR=is_shared, POLICY=Size(1)):
        assert (False, False) == batchers["rows"].submit(1).result(timeout=10).value


def test_jobs_of_a_failed_set_up_of_test_data_are_rolled_back(main_connection: None) -> None:
    futures: list[Any] = []

    class RowsTest(SharedConnections, TestCase):
        @classmethod
        def setUpTestData(cls) -> None:
            futures.append(batchers["rows"].submit(1))
            raise ValueError("no data")

        def test(self) -> None: ...

    with configured(PROCESSOR=is_shared, POLICY=Interval(60)):
        with pytest.raises(AssertionError, match="no data"):
            run(RowsTest)
        assert [(True, True)] == [future.result(timeout=0).value for future in futures]


def test_the_mixin_must_come_before_the_test_case() -> None:
    with pytest.raises(TypeError, match="SharedConnections must come before the TestCase in the bases of RowsTest"):

        class RowsTest(TestCase, SharedConnections): ...

    class Base(SharedConnections): ...

    class Sub(Base, TestCase): ...


def test_production_imports_neither_unittest_nor_the_test_tools_of_django() -> None:
    program = "import sys, microbatch.integrations.django; print({'unittest', 'django.test'} & {*sys.modules})"
    assert "set()" == subprocess.check_output([sys.executable, "-c", program], text=True).strip()


ON_ITS_OWN = "a batch uses a database connection of its own while a TestCase is inside its transaction"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_batch_on_its_own_connection_in_a_test_case_is_warned_of_once(asynchronous: bool) -> None:
    def submit() -> None:
        batchers["rows"].submit(1).result(timeout=10)

    def normally(case: TestCase) -> None:
        submit()

    async def asynchronously(case: TestCase) -> None:
        submit()

    class RowsTest(TestCase):
        @classmethod
        def setUpTestData(cls) -> None:
            submit()

        test_first = asynchronously if asynchronous else normally

        def test_second(self) -> None:
            submit()

    with configured(PROCESSOR=used), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run(RowsTest)
    assert [RuntimeWarning] == [warning.category for warning in caught] and ON_ITS_OWN in str(caught[0].message)


def test_if_warnings_are_errors_a_batch_on_its_own_connection_fails_before_its_first_query() -> None:
    def insert(rows: list[Any]) -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute("CREATE TABLE rows (x)")

    class RowsTest(TestCase):
        def test(self) -> None:
            error = batchers["rows"].submit(1).exception(timeout=10)
            self.assertIsInstance(error, RuntimeWarning)
            with connections["default"].cursor() as cursor:
                self.assertEqual([], connections["default"].introspection.table_names(cursor))

    with configured(PROCESSOR=insert):
        run(RowsTest)


@pytest.mark.parametrize("base", CASES[1:])
def test_a_batch_on_its_own_connection_is_fine_if_the_test_commits(base: Any) -> None:
    class RowsTest(base):  # type: ignore[misc]
        def test(self) -> None:
            with atomic():
                batchers["rows"].submit(1).result(timeout=10)

    class EarlierTest(TestCase):
        def test(self) -> None:
            self.assertTrue(connections["default"].in_atomic_block)

    with configured(PROCESSOR=used):
        run(EarlierTest)
        run(RowsTest)
        batchers["rows"].submit(1).result(timeout=10)


def test_a_batch_that_sends_no_query_is_fine_in_a_test_case() -> None:
    class RowsTest(TestCase):
        def test(self) -> None:
            self.assertEqual(2, batchers["rows"].submit(1).result(timeout=10).value)

    with configured():
        run(RowsTest)


def test_the_tests_of_the_example_pass_without_a_warning() -> None:
    command = [sys.executable, "-W", "error", "manage.py", "test"]
    done = subprocess.run(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (0, True) == (done.returncode, "Ran 3 tests" in done.stderr), done.stderr
