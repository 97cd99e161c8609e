"""Batchers that are configured in the settings of a Django project. Needs the extra ``django``.

In the settings, give each batcher a name, and the arguments of `Batcher` in capitals::

    INSTALLED_APPS = [..., "microbatch.integrations.django.Microbatch"]
    MICROBATCH = {
        "inserts": {"PROCESSOR": "shop.batches.insert_many", "POLICY": "Size(100) | Interval(0.005)"},
    }

Then submit jobs anywhere in the project::

    from microbatch.integrations.django import batchers

    batchers["inserts"].submit(row).result(timeout=5).value
"""

import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from django import conf
from django.apps import AppConfig, apps
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.db import close_old_connections, connections
from django.db.backends.signals import connection_created
from django.utils.module_loading import import_string

from microbatch import Batcher, BatcherStats
from microbatch.policies.text import parse_policy
from microbatch.processors import within

if TYPE_CHECKING:
    from unittest import TestCase as _TestCase
else:
    _TestCase = object  # so that production does not import unittest

__all__ = [
    "Batchers",
    "Microbatch",
    "SharedConnections",
    "batchers",
    "closing_old_connections",
    "sharing_connections",
]

_ARGUMENTS = {name.upper() for name in inspect.signature(Batcher).parameters} - {"NAME", "CLOCK"}


class Batchers(Mapping[str, "Batcher[Any, Any]"]):
    """A mapping from the names in ``settings.MICROBATCH`` to batchers.

    A batcher is created when its name is first looked up. All threads of the process share it. Its processor is wrapped
    in `closing_old_connections`.

    Raises:
        KeyError: ``settings.MICROBATCH`` has no batcher of that name.
        ImproperlyConfigured: The settings of the batcher are invalid. ``manage.py check`` reports this too.
    """

    def __init__(self) -> None:
        self._made: dict[str, Batcher[Any, Any]] = {}

    def __getitem__(self, name: str) -> "Batcher[Any, Any]":
        found = self._made.get(name)
        if found is None:
            made = _make(name)
            # If two threads get here at the same time, both use the first batcher. The other batcher was never used.
            found = self._made.setdefault(name, made)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_configured())

    def __len__(self) -> int:
        return len(_configured())

    def shutdown(self) -> None:
        """Shut down all batchers. Block until their jobs are done, and close the database connections of their threads.

        The next lookup of a name creates a new batcher.
        """
        made, self._made = self._made, {}
        for batcher in made.values():
            batcher.shutdown()
        _close_unused()

    def flush(self) -> None:
        """Block until all jobs of all batchers are done, including jobs that are submitted by other jobs."""
        while busy := [batcher for batcher in list(self._made.values()) if _is_busy(batcher.stats())]:
            for batcher in busy:
                batcher.flush()


batchers: Batchers = Batchers()
"""The batchers of ``settings.MICROBATCH``."""


def _is_busy(stats: BatcherStats) -> bool:
    return stats.queued + stats.batched + stats.running > 0


def _configured() -> Any:
    return getattr(conf.settings, "MICROBATCH", None) or {}


def _make(name: str) -> "Batcher[Any, Any]":
    configured = _configured()
    if name not in configured:
        known = f"only {', '.join(map(repr, configured))}" if configured else "because it is empty"
        raise KeyError(f"MICROBATCH has no batcher {name!r}, {known}")
    where = f"MICROBATCH[{name!r}]"
    if not isinstance(name, str):
        raise ImproperlyConfigured(f"{where} must be MICROBATCH[{str(name)!r}]: the name of a batcher must be a string")
    if not isinstance(configured[name], Mapping) or "PROCESSOR" not in configured[name]:
        raise ImproperlyConfigured(f"{where} must be a dict with at least a 'PROCESSOR'")
    arguments: dict[str, Any] = {}
    for setting, value in configured[name].items():
        if setting not in _ARGUMENTS:
            raise ImproperlyConfigured(f"{where} has no setting {setting!r}, only {', '.join(sorted(_ARGUMENTS))}")
        try:
            arguments[setting.lower()] = _value(setting, value)
        except Exception as error:  # the import runs the module, which may raise anything
            raise ImproperlyConfigured(f"{where}[{setting!r}]: {error}") from error
    try:
        processor = closing_old_connections(arguments.pop("processor"))
        return Batcher(processor, name=name, **arguments)
    except (TypeError, ValueError) as error:
        setting, _, complaint = str(error).partition(" ")
        raise ImproperlyConfigured(f"{where}[{setting.upper()!r}] {complaint}") from error


def _value(setting: str, value: Any) -> Any:
    if setting == "POLICY" and isinstance(value, str) and not _is_dotted_path(value):
        return parse_policy(value)
    return _imported(value)


def _is_dotted_path(text: str) -> bool:
    """Return whether *text* has only names and dots. A policy as text has no dot, or has parentheses too."""
    return "." in text and text.replace(".", "").isidentifier()


def _imported(value: Any) -> Any:
    """Return the object at the dotted path *value*, or *value* itself if it is not a string."""
    if isinstance(value, str):
        return import_string(value)
    return [_imported(each) for each in value] if isinstance(value, (list, tuple)) else value


class Microbatch(AppConfig):
    """A Django app that adds ``settings.MICROBATCH`` to the system checks. Add it to ``INSTALLED_APPS``."""

    name = "microbatch.integrations.django"
    label = "microbatch"

    def ready(self) -> None:
        """Remember the names of the databases, before a test runner replaces them."""
        for alias, database in conf.settings.DATABASES.items():
            _names.setdefault(alias, database.get("NAME"))


# Registered by the import and not by the app, so that a wrong or missing app can be reported: see the end of this file.
def _check(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    configured = _configured()
    if not isinstance(configured, Mapping):
        problem = "MICROBATCH must be a dict of dicts, with names of batchers as keys"
        return [checks.Error(problem, id="microbatch.E001")]
    found: list[checks.CheckMessage] = []
    if configured and not apps.is_installed(Microbatch.name):
        problem = "MICROBATCH is set, but INSTALLED_APPS does not have the app of microbatch"
        hint = f"Add '{Microbatch.name}.Microbatch'. Without it, this check often does not run."
        found.append(checks.Warning(problem, hint, id="microbatch.W001"))
    for name in configured:
        try:
            batchers[name]
        except ImproperlyConfigured as error:
            found.append(checks.Error(str(error), id="microbatch.E002"))
    return found


def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting == "MICROBATCH":
        batchers.shutdown()


def closing_old_connections(processor: Callable[[list[Any]], Any]) -> Callable[[list[Any]], list[Any]]:
    """Return a processor that closes old database connections around each batch, as Django does around each request.

    A worker thread has its own database connections, and Django closes old ones only around requests. The returned
    processor closes connections that had an error or are older than ``CONN_MAX_AGE``. The default of that setting is 0,
    with which each batch opens a new connection. So set a higher value.
    """
    return within(processor, _connections)


# Guards the next two. It is held during a batch that uses shared connections, so such batches run one at a time.
_mutex = threading.RLock()
_shared: dict[str, Any] = {}
_opened: "weakref.WeakKeyDictionary[Any, threading.Thread]" = weakref.WeakKeyDictionary()


@contextmanager
def _connections() -> Iterator[None]:
    with _mutex:
        if _shared:
            with _replacing_own(_shared):
                yield
            return
    close_old_connections()
    try:
        with _guarding_tests():
            yield
    finally:
        close_old_connections()
        with _mutex:
            _opened.update(dict.fromkeys(connections.all(initialized_only=True), threading.current_thread()))


@contextmanager
def _replacing_own(shared: dict[str, Any]) -> Iterator[None]:
    own = {connection.alias: connection for connection in connections.all(initialized_only=True)}
    try:
        for alias, connection in shared.items():
            connections[alias] = connection
        yield
    finally:
        for alias in shared:
            del connections[alias]
        for alias, connection in own.items():
            connections[alias] = connection


_WARNING = (
    "a batch uses a database connection of its own while a TestCase is inside its transaction: the batch does not see the "
    "rows of the test, and the test does not roll back those of the batch (use microbatch.integrations.django."
    "SharedConnections, or with pytest the fixture shared_connections)"
)
_opened_in_tests: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()

_TOO_LATE = (
    "the tests have ended, and their database is gone: the batch would use the real one (shut down the batchers at the "
    "end of each test that does not wait for its jobs, or use microbatch.integrations.django.SharedConnections)"
)
_names: dict[str, Any] = {}  # of the real databases, by alias
_replaced: set[str] = set()  # aliases that have had a test database


def _on_connection_created(*, connection: Any, **kwargs: Any) -> None:
    if _may_be_testing():
        _opened_in_tests[id(connection)] = connection
        if connection.alias in _names and not _is_real(connection):
            _replaced.add(connection.alias)


def _is_real(connection: Any) -> bool:
    return bool(connection.settings_dict["NAME"] == _names.get(connection.alias))


def _may_be_testing() -> bool:
    """Return whether there can be a ``TestCase``. In production, the rest of the work for the warning is saved."""
    return "django.test" in sys.modules


@contextmanager
def _guarding_tests() -> Iterator[None]:
    """Warn before the first query that the current thread sends while a ``TestCase`` is in its transaction.

    After the tests, raise before any query to a database that a test database had replaced. Otherwise, jobs that a test
    has left behind would change the real database when the interpreter exits.
    """
    with ExitStack() as stack:
        for connection in connections.all() if _may_be_testing() else ():
            stack.enter_context(connection.execute_wrapper(_check_tests))
        yield


def _check_tests(execute: Any, sql: Any, params: Any, many: Any, context: Any) -> Any:
    if context["connection"].alias in _replaced and _is_real(context["connection"]):
        raise RuntimeError(_TOO_LATE)
    if _is_testcase_in_transaction():
        # The text and the line are always the same, so that Python shows only the first of these warnings.
        warnings.warn(_WARNING, RuntimeWarning)
    return execute(sql, params, many, context)


def _is_testcase_in_transaction() -> bool:
    """Return whether a ``TestCase`` is inside its transaction, in whichever thread it is."""
    living = (reference() for reference in _opened_in_tests.valuerefs())  # a copy, because other threads may add some
    outermost = (connection.atomic_blocks[:1] for connection in living if connection is not None)
    return any(getattr(block, "_from_testcase", False) for blocks in outermost for block in blocks)


def _close_unused() -> None:
    """Close the connections of threads that have ended. Otherwise they stay open until they are garbage-collected."""
    with _mutex:
        opened = list(_opened.items())
    for connection, thread in opened:
        if not thread.is_alive():
            connection.inc_thread_sharing()
            connection.close()


@contextmanager
def sharing_connections() -> Iterator[None]:
    """Run batches on the database connections of the current thread, inside the transaction of a ``TestCase``.

    This context manager is for tests. `SharedConnections` uses it for all tests of a class. Without it, a worker thread
    does not see what the test has not committed, and the test can't roll back what the worker thread commits. At its
    end, it blocks until all jobs of `batchers` are done.

    The test must not use the database while a batch runs. Wait for a result or call `Batcher.flush` first. Batches run
    one at a time, so a batch must not wait for a job of another batch.
    """
    mine = {alias: connections[alias] for alias in connections}
    for connection in mine.values():
        connection.inc_thread_sharing()
    with _mutex:
        before = dict(_shared)
        _shared.update(mine)
    try:
        yield
    finally:
        try:
            batchers.flush()
        finally:  # after Ctrl-C too: otherwise all later batches would use these connections
            with _mutex:
                _shared.clear()
                _shared.update(before)
            for connection in mine.values():
                connection.dec_thread_sharing()


class SharedConnections(_TestCase):
    """A mixin for ``TestCase``: batches share the database connections of the test, as in `sharing_connections`.

    ::

        class OrdersTest(SharedConnections, TestCase): ...

    The connections are shared from ``setUpClass`` to the end of ``tearDownClass``, so ``setUpTestData`` may use batchers
    too. Before the changes of a test are rolled back, the mixin blocks until all jobs of `batchers` are done.
    ``TransactionTestCase`` and ``LiveServerTestCase`` may use it too.

    Raises:
        TypeError: The mixin comes after the ``TestCase`` in the bases of the class, where it would have no effect.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the order of the bases."""
        super().__init_subclass__(**kwargs)
        from unittest import TestCase

        if TestCase in cls.__mro__ and cls.__mro__.index(TestCase) < cls.__mro__.index(SharedConnections):
            raise TypeError(f"SharedConnections must come before the TestCase in the bases of {cls.__name__}")

    @classmethod
    def setUpClass(cls) -> None:
        """Share the connections before ``setUpTestData`` is called."""
        sharing = sharing_connections()
        sharing.__enter__()
        cls.addClassCleanup(sharing.__exit__, None, None, None)
        super().setUpClass()

    def run(self, result: Any = None) -> Any:
        """Run the test, and wait for all jobs before Django rolls back the transaction of the test."""
        try:
            return super().run(result)
        finally:
            batchers.flush()

    @classmethod
    def tearDownClass(cls) -> None:
        """Wait for all jobs before Django rolls back the transaction of the class."""
        batchers.flush()
        super().tearDownClass()

    @classmethod
    def _rollback_atomics(cls, atomics: Any) -> None:
        """Wait for all jobs, also before Django rolls back the transaction of a class whose ``setUpTestData`` failed."""
        batchers.flush()
        super()._rollback_atomics(atomics)  # type: ignore[misc]


checks.register(_check)
setting_changed.connect(_on_setting_changed)
connection_created.connect(_on_connection_created)
