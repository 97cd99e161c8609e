"""`Congestion`: how many batches run at once. Its rules, its limit on every path, and what it learns in the simulator."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import wait
from copy import deepcopy
from email.message import Message
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest

from microbatch import (
    NEVER,
    NOW,
    Batcher,
    BatchingPolicy,
    BatchInfo,
    BatchReport,
    Congestion,
    Interval,
    Natural,
    Size,
    Window,
)
from microbatch.policies.text import parse_policy
from microbatch.simulation import SimulatedBatch, SimulatedFailure, callers, poisson, simulate
from microbatch.testing import ManualClock, RecordingProcessor
from tests.collectors import Job, collector, jobs, take_all


class Busy(Exception):
    """What a stand-in for an API raises if too many calls run at once."""


def is_busy(error: BaseException) -> bool:
    return isinstance(error, Busy)


class Feed:
    """Feeds a policy with reports of batches that ran one after another, one second apart."""

    def __init__(self, policy: Congestion) -> None:
        self.policy = policy
        self.number = 0

    def batch(
        self,
        time: float = 0.5,
        error: BaseException | None = None,
        running: int | None = None,
        started: float | None = None,
        size: int = 1,
        failed: int | None = None,
    ) -> str:
        """Report a batch, and return the name of the rule that was applied."""
        self.number += 1
        info = BatchInfo(self.number, size, size, None, "size")
        many = size if error is not None else 0
        start = float(self.number) if started is None else started
        report = BatchReport(info, time, many if failed is None else failed, error, start, running or self.limit)
        self.policy.observe(report)
        return self.policy._last.split(":")[0]

    def round(self, time: float = 0.5) -> str:
        """Report batches until the limit changes, or a round is over, and return the last rule."""
        while (rule := self.batch(time)) == "C5":
            pass
        return rule

    def grow_to(self, limit: int) -> None:
        while self.limit < limit:
            self.round()
        assert limit == self.limit

    @property
    def limit(self) -> int:
        return int(self.policy._most_running())


@pytest.fixture
def feed() -> Feed:
    return Feed(Congestion(16, push_back=is_busy))


# -- the rules --


def test_the_limit_is_1_at_first_and_doubles_after_each_round_in_which_nothing_was_refused_or_slow(feed: Feed) -> None:
    assert 1 == feed.limit
    assert ["C5", "C5", "C5", "C10"] == [feed.batch() for _ in range(4)]
    assert [2, 4, 8, 16] == [feed.limit, *((feed.round(), feed.limit)[1] for _ in range(3))]


def test_the_limit_never_exceeds_most(feed: Feed) -> None:
    for most in (1, 3, 16):
        other = Feed(Congestion(most))
        assert "C9" == [other.round() for _ in range(9)][-1]
        assert most == other.limit


def test_a_refused_batch_lowers_the_limit_to_three_quarters_of_the_batches_that_ran(feed: Feed) -> None:
    feed.grow_to(16)
    assert "C1" == feed.batch(error=Busy(), running=12)
    assert 9 == feed.limit


def test_batches_that_were_refused_together_lower_the_limit_once(feed: Feed) -> None:
    feed.grow_to(16)
    assert "C1" == feed.batch(error=Busy(), running=9, started=100.0)
    assert "C2" == feed.batch(error=Busy(), running=10, started=100.0)
    assert 6 == feed.limit


def test_a_refused_batch_at_limit_1_leaves_it_at_1(feed: Feed) -> None:
    assert "C1" == feed.batch(error=Busy())
    assert 1 == feed.limit


def test_a_limit_that_was_refused_is_tried_again_after_8_rounds_then_after_16_and_up_to_64(feed: Feed) -> None:
    feed.grow_to(8)
    tries = []
    for _ in range(5):
        feed.batch(error=Busy(), running=5)  # so the limit is 3, and 5 is too many
        feed.grow_to(4)
        assert feed.number < 10_000
        rounds = 1
        while feed.round() == "C9":
            rounds += 1
        tries.append(rounds)
        assert 5 == feed.limit
    assert [8, 16, 32, 64, 64] == tries


def test_a_limit_that_was_refused_once_and_is_not_any_more_is_forgotten(feed: Feed) -> None:
    feed.grow_to(8)
    feed.batch(error=Busy(), running=5)
    while feed.limit < 5:
        feed.round()
    assert ["C10"] * 11 == [feed.round() for _ in range(11)]  # one by one, because the API has a limit
    assert 16 == feed.limit


def test_batches_that_take_longer_with_a_higher_limit_lower_it_again(feed: Feed) -> None:
    feed.grow_to(8)
    assert "C7" == feed.round(time=0.95)  # as fast as with 4 at once, 8 would take at most 0.71
    assert 4 == feed.limit
    assert ["C10", 5] == [feed.round(), feed.limit]


def test_batches_that_take_a_little_longer_with_a_higher_limit_do_not_lower_it(feed: Feed) -> None:
    feed.grow_to(8)
    assert ["C10", 16] == [feed.round(time=0.6), feed.limit]


def test_a_limit_that_is_slow_falls_to_at_most_three_quarters_of_itself(feed: Feed) -> None:
    feed.grow_to(8)
    feed.batch(error=Busy(), running=8)
    feed.grow_to(7)
    assert [7, "C7", 5] == [feed.limit, feed.round(time=0.9), feed.limit]  # not to 6, with which batches took 0.5 s


def test_the_times_of_lower_limits_are_forgotten_when_the_downstream_becomes_faster(feed: Feed) -> None:
    feed.grow_to(8)
    feed.round(time=0.1)
    assert 16 == feed.limit
    assert not {2, 4} & set(feed.policy._times)  # with which batches took 0.5 s
    assert ["C7", 8] == [feed.round(time=0.2), feed.limit]


def test_if_the_downstream_is_slow_with_a_lower_limit_too_the_limit_is_restored(feed: Feed) -> None:
    feed.grow_to(8)
    assert "C7" == feed.round(time=1.0)
    assert "C6" == feed.round(time=1.0)
    assert 8 == feed.limit
    assert ["C10", 9] == [feed.round(time=1.0), feed.limit]  # what lower limits once took does not count any more


def test_a_limit_that_was_slow_is_not_restored_after_a_refusal(feed: Feed) -> None:
    feed.grow_to(8)
    assert "C7" == feed.round(time=1.0)
    assert "C1" == feed.batch(error=Busy())
    assert "C7" == feed.round(time=1.0)
    assert feed.limit < 3


def test_batches_that_start_while_the_limit_is_reached_count_too(feed: Feed) -> None:
    feed.grow_to(8)
    assert "C4" == feed.batch(running=4, started=100.0)
    assert "C5" == feed.batch(running=8, started=100.0)
    assert ["C5", "C5", "C4"] == [feed.batch(running=2, started=moment) for moment in (100.0, 100.5, 100.6)]


def test_batches_that_may_be_slow_are_compared_with_those_of_the_lower_limit_once_more(feed: Feed) -> None:
    noise = cycle([0.6, 1.4])
    while feed.limit < 8:
        feed.batch(time=next(noise))
    while feed.limit == 8:
        feed.batch(time=2.2 * next(noise))
    assert ("C8", 4) == (feed.policy._last[:2], feed.limit)


def test_if_nothing_is_known_of_much_lower_limits_the_limit_falls_by_a_quarter_to_measure_again(feed: Feed) -> None:
    noise = cycle([0.6, 1.4])
    feed.grow_to(8)
    feed.batch(error=Busy())
    while feed.limit == 6:
        feed.batch(time=0.1 * next(noise))  # so much less that the times of lower limits are forgotten
    while feed.limit == 7:
        feed.batch(time=0.15 * next(noise))
    assert ("C8", 5) == (feed.policy._last[:2], feed.limit)


def test_a_larger_batch_may_take_longer(feed: Feed) -> None:
    chance = random.Random(0)

    def batch(running: float) -> None:
        size = round(chance.uniform(50, 150) / running)  # with more batches at once, they are smaller
        feed.batch(time=0.01 * size * (running / 4 if running > 4 else 1.0), size=size)

    while feed.limit < 8:
        batch(feed.limit)
    for _ in range(8):
        batch(8)
    assert ("C7", 4) == (feed.policy._last[:2], feed.limit)  # although a batch took as long as with 4 at once


def test_batches_below_the_limit_or_that_failed_for_another_reason_teach_nothing(feed: Feed) -> None:
    feed.grow_to(8)
    before = deepcopy(vars(feed.policy)["_times"])
    assert "C4" == feed.batch(time=9.0, running=3)
    assert "C4" == feed.batch(time=9.0, running=9)  # it started before the batcher got this policy
    assert "C3" == feed.batch(error=KeyError("x"))
    assert "C3" == feed.batch(time=float("nan"))
    assert [vars(old) for old in before.values()] == [vars(new) for new in feed.policy._times.values()]


def test_a_batch_of_which_one_job_failed_still_shows_the_service_time(feed: Feed) -> None:
    assert ["C5"] * 3 == [feed.batch(error=KeyError("x"), size=5, failed=1) for _ in range(3)]


def test_one_refused_job_is_enough(feed: Feed) -> None:
    feed.grow_to(8)
    assert "C1" == feed.batch(error=Busy(), size=5, failed=1)


def test_each_report_applies_exactly_one_rule_and_the_note_names_it(feed: Feed) -> None:
    chance = random.Random(5)
    seen = set()
    for _ in range(6_000):
        running = chance.choice([feed.limit] * 9 + [1])
        error = chance.choice([None] * 500 + [Busy(), KeyError()])
        before = feed.limit
        rule = feed.batch(chance.lognormvariate(0, 0.3) * (1 if running < 6 else running / 5), error, running)
        seen.add(rule)
        assert f"last rule: {rule}: " in feed.policy._note()
        if rule in ("C2", "C3", "C4", "C5", "C9"):
            assert before == feed.limit
    assert {"C1", "C3", "C4", "C5", "C7", "C8", "C10"} <= seen


# -- push-back --


class RefusedByHttpx(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        self.response = SimpleNamespace(
            status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )


def from_urllib(status: int, **headers: str) -> HTTPError:
    message = Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return HTTPError("http://localhost", status, "no", message, None)


@pytest.mark.parametrize("error", [RefusedByHttpx, from_urllib])
def test_without_a_function_the_status_429_or_503_is_push_back(error: Callable[..., BaseException]) -> None:
    for status, rule in ((429, "C1"), (503, "C1"), (404, "C3"), (500, "C3")):
        assert rule == Feed(Congestion(9)).batch(error=error(status))


@pytest.mark.parametrize("error", [RefusedByHttpx, from_urllib])
@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"Retry_After": "7"}, 7.0),
        ({"Retry_After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"Retry_After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "Wed, 21 Oct 2015 07:29:00 GMT"}, 0.0),
    ],
)
def test_without_a_function_the_header_retry_after_is_honoured(
    error: Callable[..., BaseException], headers: dict[str, str], seconds: float
) -> None:
    policy = Congestion(9)
    Feed(policy).batch(error=error(429, **headers), started=100.0, time=0.5)
    assert 100.5 + seconds == policy.due(Window(count=1)) == policy._earliest(Window(count=1))


@pytest.mark.parametrize("headers", [{}, {"Retry_After": "soon"}, {"Retry_After": "Wed, 21 Oct 2015 07:28:30 GMT"}])
def test_without_a_valid_header_retry_after_nothing_waits(headers: dict[str, str]) -> None:
    policy = Congestion(9)
    Feed(policy).batch(error=RefusedByHttpx(429, **headers))
    assert (NOW, "C1") == (policy.due(Window(count=1)), policy._last[:2])


def test_retry_after_is_honoured_for_a_batch_that_started_before_the_limit_was_lowered_too() -> None:
    pauses = iter([3.0, 1.0, 5.0, None])
    policy = Congestion(9, push_back=is_busy, retry_after=lambda error: next(pauses))
    feed = Feed(policy)
    found = []
    for _ in range(4):
        feed.batch(error=Busy(), started=100.0, time=1.0)
        found.append(policy.due(Window(count=1)))
    assert [104.0, 104.0, 106.0, 106.0] == found


@pytest.mark.parametrize("wrong", [True, -1.0, float("nan"), float("inf"), "7"])
def test_the_limit_is_lowered_even_if_retry_after_is_no_number_of_seconds(wrong: Any) -> None:
    feed = Feed(Congestion(9, push_back=is_busy, retry_after=lambda error: wrong))
    feed.grow_to(8)
    with pytest.raises((TypeError, ValueError), match="the result of retry_after must be"):
        feed.batch(error=Busy())
    assert (6, NOW) == (feed.limit, feed.policy.due(Window(count=1)))


def test_an_error_of_the_function_push_back_is_logged_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: BaseException) -> bool:
        raise LookupError("what is this?")

    def refuse(jobs: list[int]) -> None:
        raise Busy

    with Batcher(refuse, Size(1) & Congestion(2, push_back=fail), max_workers=2) as batcher:
        assert isinstance(batcher.submit(1).exception(), Busy)
    assert "the observe() of a policy raised" in caplog.text


# -- copies and text --


def test_a_copy_has_learned_the_same_but_shares_the_functions(feed: Feed) -> None:
    class Counter:
        lock = threading.Lock()  # which can't be copied

        def __call__(self, error: BaseException) -> bool:
            return True

    policy = Congestion(16, push_back=Counter())
    Feed(policy).grow_to(8)
    twin = deepcopy(policy)
    assert policy.push_back is twin.push_back
    other = Feed(twin)
    other.number = 1_000
    other.batch(error=Busy())
    assert (8, 6) == (policy._most_running(), other.limit)


def test_the_repr_names_the_functions() -> None:
    assert "Congestion(16, push_back=is_busy)" == repr(Congestion(16, push_back=is_busy))
    assert "(Size(9) | Natural()) & Congestion(16)" == repr(parse_policy("(Size(9) | Natural()) & Congestion(16)"))


def test_each_batcher_learns_for_itself() -> None:
    policy = Congestion(4)
    with Batcher[int, int](list, Size(1) & policy) as batcher:
        list(batcher.map(range(9)))
    assert 1 == policy._most_running()


# -- the limit holds on every path --


class Fixed(Congestion):
    """Always lets as many batches run as *most* says."""

    def _most_running(self) -> float:
        return self.most


@pytest.mark.parametrize("combine", [lambda a, b: a & b, lambda a, b: b | a])
def test_the_limit_holds_for_full_batches_flushed_ones_pressed_ones_several_keys_and_shutdown(
    combine: Callable[[Any, Any], BatchingPolicy[Any]],
) -> None:
    c = collector(combine(Size(2) | Interval(9), Fixed(3)), workers=5)
    c.add([Job("a", key=key) for key in "uuvvwwxx"])
    assert 3 == len(take_all(c, 0)) and not c.has_worker  # full
    assert (NEVER, NEVER) == (c.wanted(), c.next_moment())
    c.add(jobs("b", _epoch=1))
    c.flush(1)
    assert [] == take_all(c, 0)
    assert [] == take_all(c, 0, pressed=True)
    c.finished()
    assert 1 == len(take_all(c, 0))
    c.flush(-1, closing=True)
    assert [] == take_all(c, 0)
    c.finished()
    assert 1 == len(take_all(c, 0)) and 3 == c.in_flight


def test_random_reports_never_let_more_batches_run_than_the_limit_of_that_moment() -> None:
    for seed in range(6):
        chance = random.Random(seed)
        policy = Congestion(6, push_back=is_busy)
        c = collector((Size(2) | Natural()) & policy, workers=8)
        running = list[tuple[BatchInfo, Any, float, int]]()
        for step in range(300):
            now = float(step)
            c.add([Job("a", chance.randrange(3), submitted=now, _epoch=step) for _ in range(chance.randrange(4))])
            if chance.random() < 0.1:
                c.flush(step, closing=step > 280)
            if running and chance.random() < 0.7:
                info, runs, started, in_flight = running.pop(chance.randrange(len(running)))
                c.finished(now - started, runs)
                error = Busy() if chance.random() < 0.1 else None
                policy.observe(BatchReport(info, now - started, 0, error, started, in_flight))
            while (batch := c.take(now)) is not None:
                assert c.in_flight < policy._most_running()
                c.started(now, batch.runs)
                size = len(batch.entries)
                running.append((BatchInfo(step, size, size, batch.key, ""), batch.runs, now, c.in_flight))
        assert len(running) == c.in_flight


def test_a_window_shows_how_many_batches_may_run_now() -> None:
    class Seen(BatchingPolicy[Any]):
        workers = 0

        def due(self, window: Window[Any]) -> float:
            self.workers = window.workers
            return NOW

    seen, policy = Seen(), Congestion(8)
    c = collector(seen & policy, workers=6)
    for expected in (1, 2, 4, 6):
        c.add(jobs("a"))
        take_all(c, 0)
        assert expected == seen.workers == c.limit
        c.finished(1.0)
        Feed(policy).round()


def test_natural_spaces_dispatches_by_the_number_of_batches_that_may_run() -> None:
    policy = Congestion(8)
    c = collector(Natural() & policy, workers=8)
    Feed(policy).grow_to(2)
    c.add(jobs("a"))
    c.started(0)
    c.finished(8.0)
    c.started(0)
    assert [] == take_all(c, 3.9) and 4.0 == c.next_moment()
    assert ["a:natural & congestion"] == take_all(c, 4.0)


def test_natural_notices_with_many_keys_too_that_more_batches_may_run() -> None:
    policy = Congestion(8)
    c = collector(Natural() & policy, workers=8)
    c.add([Job("a", key=key) for key in "xyz"])
    assert 1 == len(take_all(c, 0))
    c.finished(8.0)
    assert 1 == len(take_all(c, 8.0))
    Feed(policy).grow_to(2)
    assert [] == take_all(c, 8.1)  # one of two batches just started, so the next one waits for half of 8 seconds
    assert 1 == len(take_all(c, 12.0))


def test_nothing_is_dispatched_before_retry_after_not_even_by_a_flush_but_by_a_shutdown() -> None:
    for key in (None, "k"):
        policy = Congestion(4, push_back=is_busy, retry_after=lambda error: 30.0)
        c = collector((Size(1) | Natural()) & policy, workers=4)
        c.add([Job("a"), Job("b", key=key, _epoch=1)])
        assert 1 == len(take_all(c, 0))
        c.finished(1.0)
        Feed(policy).batch(error=Busy(), started=0.0, time=1.0)
        c.flush(1)
        assert [] == take_all(c, 1) == take_all(c, 30.9, pressed=True)
        assert 31.0 == c.next_moment()
        c.flush(-1, closing=True)
        assert ["b:shutdown"] == take_all(c, 2)


def test_a_report_says_when_the_batch_started_and_how_many_ran() -> None:
    reports = list[BatchReport]()

    class Learning(Size):
        def observe(self, report: BatchReport) -> None:
            reports.append(report)

    clock, processor = ManualClock(), RecordingProcessor[int]()
    started = clock.now()
    processor.hold()
    with Batcher(processor, Learning(1), max_workers=3, clock=clock) as batcher:
        for number in range(1, 4):
            clock.advance(1.0)
            batcher.submit(number)
            processor.wait_for_batches(number)
        clock.advance(1.0)
        processor.release()
    found = sorted((report.batch.id, report.started - started, report.in_flight) for report in reports)
    assert [(1, 1.0, 1), (2, 2.0, 2), (3, 3.0, 3)] == found


@pytest.mark.parametrize("returned", [None, [1, Busy("second")], [Busy("first"), 2], Busy("all")])
def test_a_report_has_the_exception_of_the_first_job_that_failed(returned: Any) -> None:
    reports = list[BatchReport]()

    class Learning(Size):
        def observe(self, report: BatchReport) -> None:
            reports.append(report)

    def process(jobs: list[int]) -> Any:
        if isinstance(returned, BaseException):
            raise returned
        return returned

    with Batcher(process, Learning(2)) as batcher:
        wait([batcher.submit(1), batcher.submit(2)])
    (report,) = reports
    expected = returned if isinstance(returned, BaseException) else next(filter(is_busy, returned or []), None)
    assert report.error is expected
    assert report.failed == (2 if returned is expected and returned else 1 if expected else 0)


def test_explain_says_that_a_batch_waits_until_fewer_batches_run() -> None:
    processor = RecordingProcessor[str]()
    processor.hold()
    with Batcher(processor, Size(1) & Congestion(4), max_workers=4) as batcher:
        first, second = batcher.submit("a"), batcher.submit("b")
        processor.wait_for_batches(1)
        while "open batch" not in batcher.explain():
            pass
        assert "1 job, due by size & congestion, and waits until no other batch runs" in batcher.explain()
        assert "at most 1 batch runs at once by Congestion, since the start; last rule: no batch" in batcher.explain()
        processor.release()
        assert ["a", "b"] == [first.result().value, second.result().value]


def test_no_more_batches_run_in_a_batcher_than_the_limit_with_keys_flush_and_shutdown() -> None:
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)

    def process(jobs: list[int]) -> list[int]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(timeout=60)  # two at once, so the limit is reached
        with lock:
            running -= 1
        both.wait(timeout=60)
        return jobs

    batcher = Batcher(process, (Size(3) | Interval(60)) & Fixed(2), key=lambda job: job % 6, max_workers=6)
    futures = [batcher.submit(job) for job in range(36)]  # two full batches per key
    batcher.flush()
    futures += [batcher.submit(job) for job in range(6)]
    batcher.shutdown()
    assert [*range(36), *range(6)] == [future.result().value for future in futures]
    assert 2 == most


# -- what it learns --


class Api:
    """A stand-in for an API that refuses batches, or is slow, if more than *knee* run at once. Times vary at random."""

    def __init__(self, knees: "dict[int, int] | int" = 8, refuses: bool = True, noise: float = 0.1) -> None:
        self.knees = {0: knees} if isinstance(knees, int) else knees
        self.refuses = refuses
        self.noise = noise
        self.chance = random.Random(0)
        self.running = list[int]()
        self.refused = list[int]()

    def __call__(self, batch: SimulatedBatch) -> "float | SimulatedFailure":
        knee = next(knee for start, knee in reversed(self.knees.items()) if start <= len(self.running))
        self.running.append(batch.in_flight)
        time = (0.1 + 0.001 * batch.count) * self.chance.lognormvariate(0, self.noise)
        if batch.in_flight <= knee:
            return time
        if not self.refuses:
            return time * batch.in_flight / knee
        self.refused.append(len(self.running))
        return SimulatedFailure(0.02, Busy())

    def most_running(self, first: int, last: int) -> int:
        return max(self.running[first:last])

    def mean_running(self, first: int, last: int) -> float:
        return sum(self.running[first:last]) / (last - first)


POLICY = (Size(20) | Natural()) & Congestion(32, push_back=is_busy)


def test_it_finds_the_limit_of_an_api_that_refuses_and_tries_a_higher_one_rarely() -> None:
    api = Api()
    report = simulate(POLICY, callers(1_000, jobs=16_000), cost=api, max_workers=32)
    assert 16_000 == report.jobs and 20 * len(api.refused) == report.failed
    assert 7.5 <= api.mean_running(150, 800) <= 8
    assert api.most_running(150, 800) <= 9
    assert 1 <= len([number for number in api.refused if number > 150]) <= 20


def test_it_finds_the_limit_of_an_api_that_becomes_slow() -> None:
    api = Api(refuses=False)
    simulate(POLICY, callers(1_000, jobs=16_000), cost=api, max_workers=32)
    assert 7 <= api.mean_running(400, 800) <= 9.5


def test_it_uses_all_workers_of_an_api_without_a_limit() -> None:
    api = Api(knees=99, noise=0.3)
    simulate(POLICY, callers(1_000, jobs=16_000), cost=api, max_workers=32)
    assert api.mean_running(400, 800) > 30


@pytest.mark.simulation
@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_it_follows_a_limit_that_changes(refuses: bool, noise: float) -> None:
    api = Api({0: 8, 1_500: 4, 3_000: 12}, refuses, noise)
    simulate(POLICY, callers(1_000, jobs=100_000), cost=api, max_workers=32)
    for first, last, knee in ((500, 1_500, 8), (2_200, 3_000, 4), (4_200, 5_000, 12)):
        assert 0.85 * knee <= api.mean_running(first, last) <= (1.0 if refuses else 1.45) * knee


@pytest.mark.simulation
def test_under_a_moderate_load_it_is_nearly_as_good_as_the_best_fixed_number_of_workers() -> None:
    for refuses in (True, False):
        for rate in (300, 1_000):
            load = poisson(rate, jobs=20_000)
            learned = simulate(POLICY, load, cost=Api(refuses=refuses), max_workers=32)
            best = simulate(Size(20) | Natural(), load, cost=Api(refuses=refuses), max_workers=8)
            assert learned.p50 <= 1.2 * best.p50


def test_a_copy_knows_the_limit_but_no_moments_because_it_may_be_for_another_clock() -> None:
    policy = Congestion(16, push_back=lambda error: True, retry_after=lambda error: 1e6)
    with Batcher[int, int](fails, Size(1) & policy, max_workers=16) as batcher:
        assert batcher.submit(1).exception(10) is not None
        report = simulate(batcher.policy, poisson(10, 50), lambda size: 0.01, max_workers=16)
    assert report.p99 < 1


def fails(jobs: list[int]) -> list[int]:
    raise ConnectionError
