"""Helpers to call a function in a new thread, and to make the start of a thread fail."""

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

    threading.Thread(target=call, daemon=True).start()  # a thread that hangs must not block the end of the test run
    return outcome


class FailingStart:
    """Makes the first start of the thread with this name fail, once `go_on` is set."""

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
