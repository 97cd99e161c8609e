"""If injected code raises any exception, all futures are settled and the next job is processed."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from microbatch import Batcher, BatchingPolicy, Interval, JobState, Size, Window
from microbatch.testing import ManualClock


def echo(jobs: list[Any]) -> list[Any]:
    return jobs


def failing(jobs: list[Any]) -> list[Any]:
    return [KeyError() if job == "fail" else job for job in jobs]


VERBS = {
    JobState.SUCCEEDED: "succeed",
    JobState.FAILED: "fail",
    JobState.CANCELLED: "cancel",
    JobState.EXPIRED: "expire",
}


class Bomb:
    """Raises when it is touched while it is armed. Otherwise, it returns the value that it is touched with."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.armed = False
        self.explosions = 0

    def touch(self, value: Any = None) -> Any:
        if self.armed:
            self.explosions += 1
            raise self.error
        return value


class Key:
    def __init__(self, bomb: Bomb) -> None:
        self.bomb = bomb

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        self.bomb.touch()
        return True


def iterator(bomb: Bomb, jobs: list[Any]) -> Iterator[Any]:
    yield from bomb.touch(jobs)


def policy(bomb: Bomb, name: str) -> BatchingPolicy[Any]:
    """Return a policy that dispatches two jobs together, with a bomb in the method *name*."""

    class Mined(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            self.touch("due")
            return window.opened

        def fits(self, window: Window[Any], weight: float) -> bool:
            self.touch("fits")
            return window.count < 2

        def _room(self, window: Window[Any]) -> float:
            self.touch("room")
            return 0

        def reason(self, window: Window[Any]) -> str:
            self.touch("reason")
            return "mined"

        def observe(self, report: Any) -> None:
            self.touch("observe")

        def touch(self, method: str) -> None:
            if method == name:
                bomb.touch()

    return Mined()


class Mined(Executor):
    """Runs each function immediately, with a bomb in `submit` or in the future that it returns."""

    def __init__(self, bomb: Bomb, place: str) -> None:
        self.bomb = bomb
        self.place = place

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        if self.place == "submit":
            self.bomb.touch()
        future: Future[Any] = Future()
        if self.place == "future" and self.bomb.armed:
            self.bomb.explosions += 1
            future.set_exception(self.bomb.error)
        else:
            future.set_result(fn(*args, **kwargs))
        return future


PLACES: dict[str, Callable[[Bomb], dict[str, Any]]] = {
    "processor": lambda bomb: {"processor": bomb.touch},
    "results": lambda bomb: {"processor": lambda jobs: iterator(bomb, jobs)},
    "policy.due": lambda bomb: {"policy": policy(bomb, "due")},
    "policy.fits": lambda bomb: {"policy": policy(bomb, "fits")},
    "policy.room": lambda bomb: {"policy": policy(bomb, "room")},
    "policy.reason": lambda bomb: {"policy": policy(bomb, "reason")},
    "policy.observe": lambda bomb: {"policy": policy(bomb, "observe")},
    "key": lambda bomb: {"key": lambda job: bomb.touch("key")},
    "key.__eq__": lambda bomb: {"key": lambda job: Key(bomb)},
    "weigh": lambda bomb: {"weigh": lambda job: bomb.touch(1)},
    "executor.submit": lambda bomb: {"executor": Mined(bomb, "submit")},
    "executor's future": lambda bomb: {"executor": Mined(bomb, "future")},
}

REFUSED = ("key", "weigh")  # these raise in `submit`, and the job is not accepted

ERRORS = [ValueError("x"), SystemExit(), KeyboardInterrupt(), GeneratorExit(), StopIteration()]


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def bomb(request: pytest.FixtureRequest) -> Bomb:
    return Bomb(request.param)


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_from_injected_code_leaves_no_future_unsettled_and_the_next_job_succeeds(
    place: str, bomb: Bomb
) -> None:
    with Batcher(**{"processor": echo, **PLACES[place](bomb)}) as batcher:
        assert "before" == batcher.submit("before").result(timeout=10).value
        bomb.armed = True
        futures = []
        for job in "ab":
            if place in REFUSED:
                stops = isinstance(bomb.error, StopIteration)  # it could end an iteration of the caller
                with pytest.raises(RuntimeError if stops else type(bomb.error)):
                    batcher.submit(job)
            else:
                futures.append(batcher.submit(job))
        assert batcher.flush(timeout=10)
        assert all(future.done() for future in futures)
        bomb.armed = place == "policy.observe"  # called some time later, and changes nothing
        assert "after" == batcher.submit("after").result(timeout=10).value
    stats = batcher.stats()
    assert 2 + len(futures) == stats.accepted == stats.succeeded + stats.failed
    assert bomb.explosions > 0 or place == "key.__eq__", "the bomb did not explode"


@pytest.mark.parametrize("how", ["succeed", "fail", "cancel", "expire"])
def test_a_done_callback_that_raises_stops_neither_the_next_callback_nor_the_next_job(how: str, bomb: Bomb) -> None:
    called: list[Any] = []
    bomb.armed = True
    with Batcher[Any, Any](failing, Interval(60)) as batcher:
        future = batcher.submit(how, expires_in=0 if how == "expire" else None)
        future.add_done_callback(lambda future: bomb.touch())
        future.add_done_callback(called.append)
        if how == "cancel":
            future.cancel()
        assert batcher.flush(timeout=10)
        after = batcher.submit("after")
    assert "after" == after.result(timeout=0).value
    assert ([future], 1, how) == (called, bomb.explosions, VERBS[future.state])


def test_a_shutdown_callback_that_raises_stops_neither_the_next_callback_nor_the_shutdown(bomb: Bomb) -> None:
    called: list[str] = []
    bomb.armed = True
    for used in (False, True):
        batcher = Batcher(echo)
        batcher.add_shutdown_callback(bomb.touch)
        batcher.add_shutdown_callback(lambda: called.append("next"))
        if used:
            batcher.submit(1).result(timeout=10)
        assert batcher.shutdown(timeout=10)
        batcher.add_shutdown_callback(bomb.touch)
    assert (["next", "next"], 4) == (called, bomb.explosions)


def test_a_logging_handler_that_raises_stops_nothing(bomb: Bomb) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            bomb.touch()

    def fail(*_: Any) -> None:
        raise KeyError

    class Raising(Size):
        def observe(self, report: Any) -> None:
            fail()

    called: list[Any] = []
    handler = Handler()
    bomb.armed = True
    for name in ("microbatch", "concurrent.futures"):
        logging.getLogger(name).addHandler(handler)
    try:
        with Batcher[Any, Any](lambda jobs: iter([*jobs, "surplus"]), Raising(1)) as batcher:
            batcher.add_shutdown_callback(fail)
            for job in "ab":
                future = batcher.submit(job)
                future.add_done_callback(fail)
                future.add_done_callback(called.append)
                assert job == future.result(timeout=10).value
        assert (2, 2 * 3 + 1) == (len(called), bomb.explosions)
    finally:
        for name in ("microbatch", "concurrent.futures"):
            logging.getLogger(name).removeHandler(handler)


def test_a_job_that_cannot_be_compared_hashed_or_printed_is_processed_like_any_other(bomb: Bomb) -> None:
    class Job:
        def __eq__(self, other: object) -> bool:
            raise bomb.error

        def __hash__(self) -> int:
            raise bomb.error

        def __repr__(self) -> str:
            raise bomb.error

    job = Job()
    with Batcher[Any, Any](lambda jobs: [bomb.error] * len(jobs)) as batcher:
        future = batcher.submit(job)
        future.add_done_callback(lambda future: repr(future.job))  # this raises, and is logged
        expected = RuntimeError if isinstance(bomb.error, StopIteration) else type(bomb.error)
        assert expected is type(future.exception(timeout=10))
        assert (job is future.job, JobState.FAILED) == (True, future.state)
        assert batcher.flush(timeout=10)


def test_a_clock_that_raises_in_the_thread_of_one_batch_does_not_affect_other_batches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Clock(ManualClock):
        thread, failures = 0, 0

        def now(self) -> float:
            if self.failures and self.thread == threading.get_ident():
                self.failures -= 1
                raise OSError("no clock")
            return super().now()

    def processor(jobs: list[str]) -> list[str]:
        if jobs == ["first"]:
            clock.thread, clock.failures = threading.get_ident(), 2
        return jobs

    clock = Clock()
    batcher = Batcher(processor, clock=clock)
    assert isinstance(batcher.submit("first").exception(timeout=10), OSError)
    assert "second" == batcher.submit("second").result(timeout=10).value
    assert batcher.shutdown()
    assert ["batch 1 of microbatch can't be reported to the policy"] == caplog.messages


def test_a_job_that_is_accepted_while_the_leader_recovers_is_processed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*failure: Any) -> int:
        if not late:
            late.append(batcher.submit("late"))
            accepted.set()
        return ledger_fail(*failure)

    def interrupt() -> None:
        if errors:
            raise errors.pop()

    late, errors, accepted = list[Any](), [TimeoutError()], threading.Event()
    with Batcher[Any, Any](list, Size(1)) as batcher:
        batcher.submit("early").result(timeout=10)
        ledger_fail = batcher._engine.ledger.fail
        monkeypatch.setattr(batcher._engine.ledger, "fail", fail)
        batcher._engine.queue.post(interrupt)
        assert accepted.wait(10)
        assert "late" == late[0].result(timeout=10).value
