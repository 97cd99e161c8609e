"""With one key per tenant, no batch has jobs of two tenants, and no failure of one tenant affects another."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch import (
    BacklogFull,
    Batcher,
    Interval,
    JobExpired,
    JobFuture,
    JobTooLarge,
    Natural,
    ResultCountError,
    Size,
    Weight,
)
from microbatch.processors import bisecting, deduplicating
from microbatch.testing import ManualClock, RecordingProcessor


class Job(NamedTuple):
    tenant: str
    value: Any
    credentials: str = "a token"


def tenant_of(job: Job) -> str:
    return job.tenant


def outcomes(futures: list[JobFuture[Any]]) -> list[Any]:
    """Return the value of each future, or the type of its exception."""
    errors = [future.exception(timeout=10) for future in futures]
    return [future.result().value if error is None else type(error) for future, error in zip(futures, errors)]


def two_of_each(batcher: Batcher[Job, Any]) -> tuple[list[JobFuture[Any]], list[JobFuture[Any]]]:
    """Submit jobs of two tenants in turn. Return the futures of the bad tenant and those of the good one."""
    jobs = [Job(tenant, number) for number in (1, 2) for tenant in ("bad", "good")]
    futures = [batcher.submit(job) for job in jobs]
    return futures[::2], futures[1::2]


# -- which jobs share a batch --

policies = st.sampled_from([Size(1), Size(3), Size(3) | Natural(), Natural(), Weight(2.5), Interval(0)])


@pytest.mark.slow
@given(
    jobs=st.lists(st.builds(Job, st.sampled_from("abc"), st.integers(0, 9), st.sampled_from("xy")), max_size=30),
    bad=st.sampled_from("abc"),
    policy=policies,
    max_workers=st.integers(1, 3),
)
def test_no_batch_has_jobs_of_two_tenants_and_a_failure_affects_only_one(
    jobs: list[Job], bad: str, policy: Any, max_workers: int
) -> None:
    def fail_for_one(batch: list[Job]) -> list[Any]:
        if batch[0].tenant == bad:
            raise PermissionError(bad)
        return [job.value for job in batch]

    processor = RecordingBatches(fail_for_one)
    with Batcher(processor, policy, key=lambda job: (job.tenant, job.credentials), max_workers=max_workers) as batcher:
        futures = [batcher.submit(job) for job in jobs]
    assert [1] * len(processor.batches) == [
        len({job._replace(value=0) for job in batch}) for batch in processor.batches
    ]
    assert [PermissionError if job.tenant == bad else job.value for job in jobs] == outcomes(futures)


class RecordingBatches:
    """A processor that records its batches and calls a function with each batch."""

    def __init__(self, function: Callable[[list[Job]], Any]) -> None:
        self.batches: list[list[Job]] = []
        self._function = function

    def __call__(self, jobs: list[Job]) -> Any:
        self.batches.append(list(jobs))
        return self._function(jobs)


def test_jobs_of_one_tenant_with_different_credentials_do_not_share_a_batch() -> None:
    processor = RecordingBatches(lambda jobs: jobs)
    with Batcher(processor, Size(2), key=lambda job: (job.tenant, job.credentials)) as batcher:
        for value, token in enumerate(["old token", "new token"] * 2):
            batcher.submit(Job("acme", value, token))
    assert [[0, 2], [1, 3]] == [[job.value for job in batch] for batch in processor.batches]


# -- failures in the processor --


def raises(jobs: list[Job]) -> None:
    raise PermissionError


def exits(jobs: list[Job]) -> None:
    raise SystemExit


def yields_one_and_raises(jobs: list[Job]) -> Iterator[int]:
    yield jobs[0].value
    raise PermissionError


@pytest.mark.parametrize(
    "failure, bad",
    [
        (raises, [PermissionError, PermissionError]),
        (exits, [SystemExit, SystemExit]),
        (yields_one_and_raises, [1, PermissionError]),
        (lambda jobs: [PermissionError(), 2], [PermissionError, 2]),
        (lambda jobs: [1], [ResultCountError, ResultCountError]),
        (lambda jobs: "12", [TypeError, TypeError]),
        (lambda jobs: jobs.clear(), [None, None]),
    ],
    ids=["raises", "exits", "raises midway", "an exception as a result", "too few", "a string", "empties its list"],
)
@pytest.mark.parametrize("max_workers", [1, 2])
def test_a_failure_in_the_processor_for_one_tenant_does_not_affect_another(
    failure: Callable[[list[Job]], Any], bad: list[Any], max_workers: int
) -> None:
    def processor(jobs: list[Job]) -> Any:
        return failure(jobs) if jobs[0].tenant == "bad" else [job.value for job in jobs]

    with Batcher(processor, Size(2), key=tenant_of, max_workers=max_workers) as batcher:
        futures = two_of_each(batcher)
    assert (bad, [1, 2]) == tuple(map(outcomes, futures))
    assert ["good", "good"] == [future.result().batch.key for future in futures[1]]


def test_if_one_exception_object_is_raised_for_two_tenants_each_job_gets_its_own_copy() -> None:
    error = PermissionError("the same")

    def processor(jobs: list[Job]) -> None:
        raise error

    with Batcher(processor, Size(2), key=tenant_of) as batcher:
        futures = [future for one in two_of_each(batcher) for future in one]
    assert 4 == len({id(future.exception()) for future in futures})


def test_with_two_workers_a_slow_tenant_does_not_block_another(processor: RecordingProcessor[Any]) -> None:
    def hold_one(jobs: list[Job]) -> Any:
        return processor(jobs) if jobs[0].tenant == "bad" else [job.value for job in jobs]

    with Batcher(hold_one, Size(2), key=tenant_of, max_workers=2) as batcher:
        bad, good = two_of_each(batcher)
        assert [1, 2] == outcomes(good)
        assert not any(future.done() for future in bad)
        processor.release()


def test_equal_jobs_of_two_tenants_are_not_deduplicated() -> None:
    processor = RecordingBatches(lambda jobs: [f"for {job.tenant}" for job in jobs])
    deduplicated = bisecting(deduplicating(processor, key=lambda job: job.value))
    with Batcher(deduplicated, Size(2), key=tenant_of) as batcher:
        futures = [batcher.submit(Job(tenant, "the same")) for tenant in ("acme", "initech") * 2]
    assert ["for acme", "for initech"] * 2 == outcomes(futures)
    assert [1, 1] == list(map(len, processor.batches))


# -- failures before the processor --


def test_a_cancelled_job_does_not_affect_the_batches_of_other_tenants() -> None:
    processor = RecordingProcessor[Job]()
    with Batcher(processor, Size(2), key=tenant_of) as batcher:
        bad, good = batcher.submit(Job("bad", 1)), [batcher.submit(Job("good", 1))]
        assert bad.cancel()
        good.append(batcher.submit(Job("good", 2)))
    assert [[future.job for future in good]] == processor.batches


def test_an_expired_job_does_not_affect_the_batches_of_other_tenants(clock: ManualClock) -> None:
    processor = RecordingProcessor[Job]()
    with Batcher(processor, Size(2), key=tenant_of, clock=clock) as batcher:
        bad, good = batcher.submit(Job("bad", 1), expires_in=5), batcher.submit(Job("good", 1))
        clock.wait_for_sleeper(5.0)
        clock.advance(5)
        assert [JobExpired] == outcomes([bad])
        assert not good.done()
        batcher.submit(Job("good", 2))
    assert [[Job("good", 1), Job("good", 2)]] == processor.batches


def test_a_job_that_is_too_large_does_not_affect_the_batches_of_other_tenants() -> None:
    processor = RecordingProcessor[Job]()
    with Batcher(processor, Weight(3), key=tenant_of, weigh=lambda job: job.value) as batcher:
        batcher.submit(Job("good", 1))
        with pytest.raises(JobTooLarge):
            batcher.submit(Job("bad", 4))
        batcher.submit(Job("good", 2))
    assert [[Job("good", 1), Job("good", 2)]] == processor.batches


class Biased(Size):
    """Raises for one tenant, in the method that *question* names."""

    def __init__(self, n: int, question: str) -> None:
        super().__init__(n)
        self._question = question

    def due(self, window: Any) -> float:
        self._refuse("due", window)
        return super().due(window)

    def _room(self, window: Any) -> float:
        self._refuse("room", window)
        return super()._room(window)

    def reason(self, window: Any) -> str:
        self._refuse("reason", window)
        return super().reason(window)

    def _refuse(self, question: str, window: Any) -> None:
        if question == self._question and window.key == "bad":
            raise PermissionError


@pytest.mark.parametrize("question", ["due", "room", "reason"])
def test_a_policy_that_raises_for_one_tenant_dispatches_the_jobs_of_others(question: str) -> None:
    processor = RecordingProcessor[Job]()
    with Batcher(processor, Biased(2, question), key=tenant_of) as batcher:
        bad, good = two_of_each(batcher)
        assert [PermissionError, PermissionError] == outcomes(bad)
    assert [future.job for future in good] == outcomes(good)
    assert [[future.job for future in good]] == processor.batches


def test_a_key_function_that_raises_for_one_tenant_refuses_only_its_job() -> None:
    keys: dict[str, str] = {"good": "key"}
    processor = RecordingProcessor[Job]()
    with Batcher(processor, Size(9), key=lambda job: keys[job.tenant]) as batcher:
        with pytest.raises(KeyError, match="bad"):
            batcher.submit(Job("bad", 1))
        batcher.submit(Job("good", 1))
    assert [[Job("good", 1)]] == processor.batches


# -- resources that tenants share --


def test_all_tenants_share_max_pending(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(1), key=tenant_of, max_pending=2) as batcher:
        batcher.submit(Job("running", 0))
        processor.wait_for_batches(1)
        same_tenant = [batcher.submit(Job("bad", number), timeout=0) for number in (1, 2)]
        with pytest.raises(BacklogFull):
            batcher.submit(Job("good", 1), timeout=0)
        processor.release()
    assert [Job("bad", 1), Job("bad", 2)] == outcomes(same_tenant)


def test_a_single_worker_takes_the_batch_that_has_waited_longest(processor: RecordingProcessor[Any]) -> None:
    with Batcher(processor, Size(2), key=tenant_of) as batcher:
        batcher.submit(Job("bad", 0))
        batcher.submit(Job("bad", 0))
        processor.wait_for_batches(1)
        for tenant in ("good", "bad", "good", "bad", "bad", "bad"):
            batcher.submit(Job(tenant, 1))
        processor.release()
    assert ["bad", "good", "bad", "bad"] == [batch[0].tenant for batch in processor.batches]
