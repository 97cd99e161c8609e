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

from microbatch import Batcher, BatcherStats
from microbatch.policies.text import parse_policy
from microbatch.processors import within

__all__ = ["Batchers", "Microbatch", "batchers", "closing_old_connections", "sharing_connections"]

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
        """Register the check. Also replace the batchers if a test overrides the settings."""
        checks.register(_check)
        setting_changed.connect(_on_setting_changed)


def _check(app_configs: Any, **kwargs: Any) -> list[checks.CheckMessage]:
    configured = _configured()
    if not isinstance(configured, Mapping):
        problem = "MICROBATCH must be a dict of dicts, with names of batchers as keys"
        return [checks.Error(problem, id="microbatch.E001")]
    errors: list[checks.CheckMessage] = []
    for name in configured:
        try:
            batchers[name]
        except ImproperlyConfigured as error:
            errors.append(checks.Error(str(error), id="microbatch.E002"))
    return errors


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

    This context manager is for tests. Without it, a worker thread does not see what the test has not committed, and the
    test can't roll back what the worker thread commits. At its end, it blocks until all jobs of `batchers` are done.

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
        batchers.flush()
        with _mutex:
            _shared.clear()
            _shared.update(before)
        for connection in mine.values():
            connection.dec_thread_sharing()
