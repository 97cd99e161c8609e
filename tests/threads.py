"""Calls in threads of their own, and threads that do not start."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest


def in_thread(function: Callable[[], Any]) -> "Future[Any]":
    """Call *function* in a new thread, and return the future of what it returns or raises."""
    outcome: Future[Any] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()  # so that one that hangs keeps no test run from its end
    return outcome


class FailingStart:
    """Lets the start of the thread of this name fail, once, but not before it is told to."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        start = threading.Thread.start

        def failing(thread: threading.Thread) -> None:
            if thread.name != name or self.reached.is_set():
                return start(thread)
            self.reached.set()
            self.go_on.wait(10)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", failing)
