"""Batches that a rate limit or other batches hold back, and lanes that are asked again when their answer may change."""

from typing import Any

import pytest

from microbatch import NEVER, NOW, BatchingPolicy, Hints, Natural, Rate, Size, Window
from tests.collectors import Counted, Job, collector, jobs, take_all


def test_a_rate_limit_applies_to_all_keys_together() -> None:
    c = collector(Size(1) & Rate(2, per=60), workers=9)
    c.add([Job(letter, key=letter) for letter in "abcde"])
    assert ["a:size & rate", "b:size & rate"] == take_all(c, 10.0)
    assert (60 + 10.0, []) == (c.next_moment(), take_all(c, 69.9))
    assert ["c:size & rate", "d:size & rate"] == take_all(c, 70.0)


def test_a_rate_limit_beyond_the_usual_history_is_kept() -> None:
    c = collector(Size(1) & Rate(2_000, per=60), workers=9_999)
    c.add(jobs("a" * 3_000))
    assert 2_000 == len(take_all(c, 10.0))
    assert 1_000 == len(take_all(c, 70.0))


def test_a_flush_keeps_to_the_rate_limit_and_a_shutdown_does_not() -> None:
    c = collector(Size(9) & Rate(1, per=60), workers=9)
    c.add(jobs("ab"))
    c.flush(0)
    assert ["ab:flush"] == take_all(c, 10.0)
    c.add(jobs("c", _epoch=1))
    c.flush(1)
    assert ([], 70.0) == (take_all(c, 69.9), c.next_moment())
    assert ["c:flush"] == take_all(c, 70.0)
    c.add(jobs("d", _epoch=2))
    c.flush(1, closing=True)
    assert ["d:shutdown"] == take_all(c, 70.1)


def test_a_lane_held_back_by_the_start_of_another_batch_is_asked_again_in_its_turn() -> None:
    c = collector(Natural(), workers=2)
    c.finished(4.0)  # an earlier batch
    c.started(0.0)
    c.add([Job("a", key="a"), Job("b", key="b"), Job("c", key="c")])
    assert ["a:natural"] == take_all(c, 10.0)
    assert ([], 12.0) == (take_all(c, 11.9), c.next_moment())
    assert ["b:natural"] == take_all(c, 12.0)
    c.finished(4.0)
    assert ([], 14.0) == (take_all(c, 13.9), c.next_moment())
    assert ["c:natural"] == take_all(c, 14.0)


def test_a_batch_that_natural_holds_back_is_dispatched_when_all_workers_are_idle() -> None:
    c = collector(Natural(), workers=2)
    c.finished(4000.0)  # an earlier batch
    c.started(0.0)
    c.add(jobs("a"))
    assert ["a:natural"] == take_all(c, 10.0)
    c.add(jobs("b"))
    assert ([], 2010.0) == (take_all(c, 10.5), c.next_moment())
    c.finished(1.0)
    assert ["b:natural"] == take_all(c, 11.0)


def test_a_full_batch_is_dispatched_while_other_batches_are_held_back() -> None:
    c = collector(Size(2) | Natural(), workers=4)
    c.finished(4.0)  # an earlier batch
    c.started(0.0)
    c.add([Job("a", key="a"), Job("b", key="b")])
    assert ["a:natural"] == take_all(c, 10.0)
    c.add([Job("c", key="c", submitted=10.0), Job("d", key="c", submitted=10.0)])
    assert (["cd:size"], 11.0) == (take_all(c, 10.0), c.next_moment())
    assert ["b:natural"] == take_all(c, 11.0)


def test_one_slow_batch_does_not_change_the_service_time() -> None:
    seen: list[float] = []

    class Watching(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            seen.append(window.service_time)
            return NOW

    c = collector(Watching())
    for time in [4.0, 4.0, 900.0, 5.0, 3.0, 3.0]:
        c.add(jobs("a"))
        take_all(c, 0)
        c.finished(time)
    assert [0.0, 4.0, 4.0, 4.0, 5.0, 4.0] == seen


@pytest.mark.parametrize("text", ["Natural()", "Size(100) | Natural()", "Natural() & Rate(100, 1)"])
@pytest.mark.parametrize("keys", [["a"], ["a", "b"]], ids=len)
def test_a_batch_is_dispatched_sooner_once_batches_turn_out_to_be_faster(text: str, keys: list[str]) -> None:
    c = collector(eval(text), workers=4)
    for service_time in (100.0, 1.0):
        c.started(0)
        c.finished(service_time)
    c.started(0)  # and hangs
    c.started(1)
    c.add([Job(key, key=key, submitted=1) for key in keys])
    assert ([], 26.0) == (take_all(c, 1), c.next_moment())
    c.finished(1.0)
    assert ["a"] == [taken[0] for taken in take_all(c, 2)]


class Idle(BatchingPolicy[Any]):
    """Due while nothing else runs."""

    def due(self, window: Window[Any]) -> float:
        return NOW if window.in_flight == 0 else NEVER


def test_a_policy_that_watches_the_flow_is_asked_again_when_a_batch_ends() -> None:
    c = collector(Idle(), workers=4)
    c.add(jobs("a"))
    assert ["a:idle"] == take_all(c, 0)
    c.add(jobs("b"))
    assert [] == take_all(c, 0)
    c.finished()
    assert ["b:idle"] == take_all(c, 0)


class Quiet(Size):
    """Not even a flush dispatches a batch while another one runs."""

    def _earliest(self, window: Window[Any]) -> float:
        return NOW if window.in_flight == 0 else NEVER


def test_an_overridden_earliest_is_asked_again_when_a_batch_ends_despite_inherited_hints() -> None:
    c = collector(Quiet(2), workers=4)
    c.add(jobs("ab"))
    assert ["ab:quiet"] == take_all(c, 0)
    c.add(jobs("c", 1))
    c.flush(0)
    assert [] == take_all(c, 1)
    c.finished()
    assert ["c:flush"] == take_all(c, 2)


def test_every_lane_whose_answer_may_have_changed_is_asked_again_in_the_end_and_then_left_alone() -> None:
    class Picky(Counted):
        def moment(self, window: Window[Any]) -> float:
            return NOW if window.in_flight == 0 and window.key in ("first", 900) else NEVER

    policy = Picky()
    c = collector(policy, workers=4)
    c.add([Job("first", key="first")])
    assert ["first:picky"] == take_all(c, 0)
    c.add([Job("a", key=key) for key in range(1000)])
    assert [] == take_all(c, 0)
    c.finished()
    now, looks = 0.0, 0
    while not (taken := take_all(c, now)):
        now, looks = c.next_moment(), looks + 1
        assert looks < 100
    assert (["a:picky"], now < 0.1) == (taken, True)
    while (moment := c.next_moment()) < NEVER:
        assert [] == take_all(c, moment)
        looks += 1
        assert looks < 200
    before = policy.asked
    assert [] == take_all(c, now + 1)
    assert before == policy.asked


def test_lanes_are_not_asked_again_if_their_policy_does_not_watch_the_flow() -> None:
    class Steady(Counted):
        hints = Hints(watches_flow=False)

    policy = Steady()
    policy.moment = lambda window: NEVER  # type: ignore[method-assign]
    c = collector(policy, workers=4)
    c.add([Job("a", key=key) for key in range(100)])
    for _ in range(10):
        c.started(0)
        assert [] == take_all(c, 0)
        c.finished()
    assert 100 == policy.asked
