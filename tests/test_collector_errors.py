"""An error breaks the batch that it concerns, and no other batch."""

from typing import Any

from microbatch import NEVER, BatchingPolicy, JobTooLarge, Size, Window
from tests.collectors import Broken, Job, Light, collector, jobs, take_all


def test_a_policy_that_raises_breaks_its_batch_at_once_and_no_other_batch() -> None:
    c = collector(Broken(), workers=1)
    c.add([Job("a", key=1)])
    assert ["a:interval"] != take_all(c, 1)
    c.add([Job("bad", key=2), Job("c", key=3, submitted=1.0)])
    batch = c.take(1)
    assert batch is not None and isinstance(batch.error, KeyError)
    assert ["bad"] == [entry.job for entry in batch.entries]
    c.finished()
    assert ["c:broken"] == take_all(c, 2)


def test_a_reason_that_raises_breaks_the_batch() -> None:
    class RaisingReason(Size):
        def reason(self, window: Window[Any]) -> str:
            raise LookupError

    c = collector(RaisingReason(1))
    c.add(jobs("a"))
    batch = c.take(0)
    assert batch is not None and isinstance(batch.error, LookupError)


def test_the_jobs_of_a_batch_whose_reason_raises_fail_with_it() -> None:
    class RaisingReason(Size):
        def reason(self, window: Window[Any]) -> str:
            raise LookupError

    c = collector(RaisingReason(2))
    c.add(jobs("ab", key="k"))
    batch = c.take(0)
    assert batch is not None
    assert ("k", ["a", "b"]) == (batch.key, [entry.job for entry in batch.entries])


def test_a_fits_that_raises_breaks_one_batch_after_another_until_no_job_is_left() -> None:
    class Raising(BatchingPolicy[Any]):
        def due(self, window: Window[Any]) -> float:
            return NEVER

        def fits(self, window: Window[Any], weight: float) -> bool:
            raise SystemExit

    c = collector(Raising())
    c.add(jobs("ab"))
    batch = c.take(0)
    assert batch is not None and isinstance(batch.error, SystemExit)
    assert ["a"] == [entry.job for entry in batch.entries]
    batch = c.take(0)
    assert batch is not None and ["b"] == [entry.job for entry in batch.entries]
    assert not c


def test_a_job_that_fits_into_no_batch_fails_alone() -> None:
    c = collector(Light(), workers=9)
    c.add([Job("a", weight=11), Job("b", weight=10)])
    batch = c.take(0)
    assert batch is not None and isinstance(batch.error, JobTooLarge)
    assert ["a"] == [entry.job for entry in batch.entries]
    assert [] == take_all(c, 0)
    c.flush(0)
    assert ["b:flush"] == take_all(c, 0)


def test_an_error_message_names_the_cause() -> None:
    class WrongDue(Light):
        def due(self, window: Window[Any]) -> float:
            return "soon"  # type: ignore[return-value]

    c = collector(WrongDue())
    c.add([Job("a", weight=11), Job("b", weight=10)])
    errors = [batch.error for batch in (c.take(0), c.take(0)) if batch is not None]
    assert [
        "a job of weight 11 does not fit into any batch",
        "the due() of a policy must be a number, got 'soon'",
    ] == list(map(str, errors))
