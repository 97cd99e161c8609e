"""Calls in threads of their own."""

import threading
from concurrent.futures import Future
from typing import Any, Callable


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
