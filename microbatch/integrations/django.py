"""Batchers of a Django project: the extra ``django``.

In the settings, each with a name and the arguments of `Batcher` in capitals::

    INSTALLED_APPS = [..., "microbatch.integrations.django.Microbatch"]
    MICROBATCH = {
        "inserts": {"PROCESSOR": "shop.batches.insert_many", "POLICY": Size(100) | Interval(0.005)},
    }

and wherever there is a job::

    from microbatch.integrations.django import batchers

    batchers["inserts"].submit(row).result(timeout=5).value
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from django import conf
from django.apps import AppConfig
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.db import close_old_connections, connections
from django.utils.module_loading import import_string

from microbatch import Batcher
from microbatch.processors import within

__all__ = ["Batchers", "Microbatch", "batchers", "closing_old_connections", "sharing_connections"]

_ARGUMENTS = {name.upper() for name in inspect.signature(Batcher).parameters} - {"NAME", "CLOCK"}


class Batchers(Mapping[str, "Batcher[Any, Any]"]):
    """The batchers of the settings, by name. Each is made when it is first asked for, and is the same for all threads.

    Its processor is called as by `closing_old_connections`.

    Raises:
        KeyError: there is none of that name in ``settings.MICROBATCH``.
        ImproperlyConfigured: it can't be made as the settings say; ``manage.py check`` says so before.
    """

    def __init__(self) -> None:
        self._made: dict[str, Batcher[Any, Any]] = {}

    def __getitem__(self, name: str) -> "Batcher[Any, Any]":
        found = self._made.get(name)
        if found is None:
            made = _make(name)
            # Of two that are made at once, one starts no thread and is dropped.
            found = self._made.setdefault(name, made)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_configured())

    def __len__(self) -> int:
        return len(_configured())

    def shutdown(self) -> None:
        """Shut down all that were made, wait for them, and close their connections. Whoever asks for one gets a new one."""
        made, self._made = self._made, {}
        for batcher in made.values():
            batcher.shutdown()
        _close_left()

    def flush(self) -> None:
        """Wait until all jobs of all batchers are done, those too that other jobs have submitted."""
        while any(
            stats.queued + stats.batched + stats.running for stats in [each.stats() for each in self._made.values()]
        ):
            for batcher in list(self._made.values()):
                batcher.flush()


batchers: Batchers = Batchers()
"""All of ``settings.MICROBATCH``."""


def _configured() -> Any:
    return getattr(conf.settings, "MICROBATCH", None) or {}


def _make(name: str) -> "Batcher[Any, Any]":
    configured = _configured()
    if name not in configured:
        raise KeyError(f"MICROBATCH has no {name!r}, only {', '.join(map(repr, configured)) or 'nothing at all'}")
    where = f"MICROBATCH[{name!r}]"
    if not isinstance(name, str):
        raise ImproperlyConfigured(f"{where} must be MICROBATCH[{str(name)!r}]: the name of a batcher is a text")
    if not isinstance(configured[name], Mapping) or "PROCESSOR" not in configured[name]:
        raise ImproperlyConfigured(f"{where} must be a dict with at least a 'PROCESSOR'")
    arguments: dict[str, Any] = {}
    for setting, value in configured[name].items():
        if setting not in _ARGUMENTS:
            raise ImproperlyConfigured(f"{where} has no {setting!r}, only {', '.join(sorted(_ARGUMENTS))}")
        try:
            arguments[setting.lower()] = _imported(value)
        except Exception as error:  # whatever the module raises
            raise ImproperlyConfigured(f"{where}[{setting!r}]: {error}") from error
    try:
        processor = closing_old_connections(arguments.pop("processor"))
        return Batcher(processor, name=name, **arguments)
    except (TypeError, ValueError) as error:
        setting, _, complaint = str(error).partition(" ")
        raise ImproperlyConfigured(f"{where}[{setting.upper()!r}] {complaint}") from error


def _imported(value: Any) -> Any:
    """Return what *value* is the dotted path of, or the value itself."""
    if isinstance(value, str):
        return import_string(value)
    return [_imported(each) for each in value] if isinstance(value, (list, tuple)) else value


class Microbatch(AppConfig):
    """Has ``manage.py`` look at the settings before it runs anything: an app for ``INSTALLED_APPS``."""

    name = "microbatch.integrations.django"
    label = "microbatch"

    def ready(self) -> None:
        """Register the check, and have tests with other settings get other batchers."""
        checks.register(_check)
        setting_changed.connect(_forget)


def _check(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    configured = _configured()
    if not isinstance(configured, Mapping):
        return [checks.Error("MICROBATCH must be a dict of dicts, by the names of batchers", id="microbatch.E001")]
    errors: list[checks.CheckMessage] = []
    for name in configured:
        try:
            batchers[name]
        except ImproperlyConfigured as error:
            errors.append(checks.Error(str(error), id="microbatch.E002"))
    return errors


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting == "MICROBATCH":
        batchers.shutdown()


def closing_old_connections(processor: Callable[[list[Any]], Any]) -> Callable[[list[Any]], list[Any]]:
    """Return *processor*, with Django's database connections looked after before and after each batch, as for a request.

    A worker thread has connections of its own, and no request ends there. Those that had an error or are older than
    ``CONN_MAX_AGE`` are closed: set that, or each batch opens a new one.
    """
    return within(processor, _connections)


_mutex = threading.RLock()  # guards what follows, and is held by a batch that uses shared connections: one at a time
_shared: dict[str, Any] = {}
_opened: "weakref.WeakKeyDictionary[Any, threading.Thread]" = weakref.WeakKeyDictionary()


@contextmanager
def _connections() -> Iterator[None]:
    with _mutex:
        if _shared:
            with _instead_of_own(_shared):
                yield
            return
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()
        with _mutex:
            _opened.update(dict.fromkeys(connections.all(initialized_only=True), threading.current_thread()))


@contextmanager
def _instead_of_own(shared: dict[str, Any]) -> Iterator[None]:
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


def _close_left() -> None:
    """Close the connections of threads that have ended, which no collection of garbage has come to yet."""
    with _mutex:
        opened = list(_opened.items())
    for connection, thread in opened:
        if thread.is_alive():
            continue
        connection.inc_thread_sharing()
        connection.close()


@contextmanager
def sharing_connections() -> Iterator[None]:
    """For tests: have batches run on the database connections of this thread, so inside the transaction of a ``TestCase``.

    Without it, a worker thread sees nothing of what a test has not committed, and what it commits outlives the test. At the
    end it waits until all jobs of the batchers of the settings are done. While a batch runs, the test must not use the
    database: let it wait for a result, or `Batcher.flush`. Batches run one at a time, so that one can't wait for another.
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
        batchers.flush()
        with _mutex:
            _shared.clear()
            _shared.update(before)
        for connection in mine.values():
            connection.dec_thread_sharing()
