"""Batchers of Flask applications."""

import gc
import sqlite3
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from microbatch import Size
from microbatch.testing import RecordingProcessor
from tests.extras import needs
from tests.pages import files, in_a_hurry, makes_the_batcher_busy

needs("flask")
from flask import Flask, g

from microbatch.integrations.flask import FlaskBatcher

EXAMPLE = Path(__file__).parent.parent / "examples" / "flask_app"


class App(Flask):
    """Records the rows of each application context when it is torn down."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.torn_down: list[Any] = []
        self.teardown_appcontext(lambda error: self.torn_down.append(g.get("rows")))


@pytest.fixture
def app() -> Iterator[App]:
    app = App("shop")
    yield app
    for batcher in app.extensions.get("microbatch", {}).values():
        batcher.shutdown()


def insert_many(rows: list[str]) -> Iterator[str]:
    from flask import current_app

    g.rows = rows
    for row in rows:
        yield f"{row} in {current_app.name}"


def test_a_batch_runs_in_the_context_of_its_application(app: App) -> None:
    inserts = FlaskBatcher[str, str](insert_many, Size(2), app=app)
    with app.app_context():
        futures = [inserts.submit(row) for row in ("a", "b")]
        assert ["a in shop", "b in shop"] == [future.result(timeout=10).value for future in futures]
        inserts.batcher.flush()
    assert [["a", "b"], None] == app.torn_down


def test_each_application_has_its_own_batcher(app: App) -> None:
    inserts = FlaskBatcher[str, str](insert_many, Size(1))
    other = App("other")
    for each in (app, other):
        inserts.init_app(each)
    with app.app_context():
        mine = inserts.batcher
        assert "a in shop" == inserts.submit("a").result(timeout=10).value
    with other.app_context():
        assert "a in other" == inserts.submit("a").result(timeout=10).value
        assert mine is not inserts.batcher
        inserts.batcher.shutdown()


def test_an_application_may_have_several_batchers(app: App) -> None:
    upper = FlaskBatcher[str, str](lambda rows: [row.upper() for row in rows], app=app)
    lower = FlaskBatcher[str, str](lambda rows: [row.lower() for row in rows], app=app)
    with app.app_context():
        assert ["AB", "ab"] == [each.submit("Ab").result(timeout=10).value for each in (upper, lower)]


def test_init_app_may_override_the_options_for_one_application(app: App) -> None:
    inserts = FlaskBatcher[str, str](insert_many, Size(100), name="rows", max_workers=2)
    inserts.init_app(app, policy=Size(1))
    with app.app_context():
        assert inserts.batcher.explain().startswith("<Batcher 'rows' with Size(1)>")


@pytest.mark.parametrize(
    "arguments, options, complaint",
    [
        ((3,), {}, "processor must be callable"),
        ((list, 100), {}, "policy must be"),
        ((list,), {"max_worker": 2}, "max_worker"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: Any, options: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        FlaskBatcher(*arguments, **options)


def test_an_application_can_be_garbage_collected_with_its_batcher() -> None:
    inserts = FlaskBatcher[str, str](insert_many)
    app = Flask("shop")
    inserts.init_app(app)
    with app.app_context():
        inserts.submit("a").result(timeout=10)
        inserts.batcher.shutdown()
    alive = weakref.ref(app)
    del app
    gc.collect()
    assert alive() is None


def test_submit_raises_without_an_application_context_or_without_init_app(app: App) -> None:
    inserts = FlaskBatcher[str, str](insert_many)
    with pytest.raises(RuntimeError, match="outside of application context"):
        inserts.submit("a")
    with app.app_context(), pytest.raises(RuntimeError, match=r"init_app\(\) was not called for 'shop'"):
        inserts.submit("a")


@makes_the_batcher_busy
def test_the_view_on_the_page_responds_with_503_if_the_batcher_is_busy(
    wait: str, others: list[str], expired: int, processor: RecordingProcessor[Any]
) -> None:
    shop: dict[str, Any] = {"__name__": "shop", "__file__": __file__}
    exec(in_a_hurry(dict(files("flask"))["shop.py"], wait), shop)
    inserts = shop["inserts"] = FlaskBatcher[str, Any](processor, Size(1), max_pending=1)
    app = shop["create_app"]()
    with app.app_context(), inserts.batcher as batcher, ExitStack() as stack:
        stack.callback(processor.release)
        for job in others:
            batcher.submit(job)
            processor.wait_for_batches(1)
        response = app.test_client().post("/people", data={"name": "Ada"})
        assert (503, "1") == (response.status_code, response.headers["Retry-After"])
        assert (2, expired) == (batcher.stats().accepted, batcher.stats().expired)


def test_the_example_answers_each_request_with_its_own_order_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import application

    app = application.create_app(DATABASE=str(tmp_path / "shop.sqlite3"))
    try:

        def post(number: int) -> Any:
            return app.test_client().post("/orders", data={"what": f"tea {number}"}).get_json()

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(post, range(100)))
        with closing(sqlite3.connect(tmp_path / "shop.sqlite3")) as database:
            assert dict(database.execute("SELECT id, what FROM orders")) == {
                each["order"]: each["what"] for each in answers
            }
    finally:
        with app.app_context():
            application.inserts.batcher.shutdown()
        del sys.modules["application"]


def test_the_example_starts_even_if_another_worker_locks_the_new_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    class Busy(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if "journal_mode" in sql and len(refused) < 2:
                refused.append(sql)
                raise sqlite3.OperationalError("database is locked")
            return super().execute(sql, *arguments)

    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Busy))
    import application

    app = application.create_app(DATABASE=str(tmp_path / "shop.sqlite3"))
    with app.app_context(), closing(application.database()) as database:
        assert [("wal",)] == database.execute("PRAGMA journal_mode").fetchall()
        application.inserts.batcher.shutdown()
    assert 2 == len(refused)
    del sys.modules["application"]
