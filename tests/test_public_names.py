"""The public names: all of them are exported, documented and stable."""

import importlib
import inspect
import pickle
from types import GenericAlias
from typing import Any

import pytest

import microbatch
from microbatch import errors
from tests.extras import is_missing, needs

MODULES = [
    "microbatch",
    "microbatch.batcher",
    "microbatch.errors",
    "microbatch.integrations.dask",
    "microbatch.integrations.django",
    "microbatch.integrations.flask",
    "microbatch.integrations.logging",
    "microbatch.integrations.opentelemetry",
    "microbatch.integrations.prometheus",
    "microbatch.integrations.pytest.pytest_microbatch",
    "microbatch.integrations.tqdm",
    "microbatch.policies",
    "microbatch.policies.text",
    "microbatch.processors",
    "microbatch.simulation",
    "microbatch.testing",
    "microbatch.traces",
]


FRAMEWORKS = {
    "microbatch.integrations.dask": "distributed",
    "microbatch.integrations.django": "django",
    "microbatch.integrations.flask": "flask",
}
"""The package that each of these modules imports."""


@pytest.mark.parametrize("name", MODULES)
def test_all_is_complete_and_sorted(name: str) -> None:
    if name in FRAMEWORKS:
        needs(FRAMEWORKS[name])
    module = importlib.import_module(name)
    assert sorted(module.__all__) == module.__all__
    defined = [
        key
        for key, value in vars(module).items()
        if inspect.isclass(value) and not key.startswith("_") and value.__module__ == name
    ]
    assert set(defined) - {"Either", "Both"} <= set(module.__all__)


def test_the_package_exports_the_names_of_its_modules() -> None:
    offered = set(microbatch.__all__)
    assert set(errors.__all__) <= offered
    assert {"Batcher", "JobFuture", "JobResult", "JobState", "BatchInfo", "BatcherStats", "batched"} <= offered
    assert {"BatchingPolicy", "Window", "Size", "Interval", "BatchReport", "DEFAULT_POLICY", "NOW", "NEVER"} <= offered


def public_callables() -> Any:
    for name in MODULES + ["microbatch.decorator"]:
        if name in FRAMEWORKS and is_missing(FRAMEWORKS[name]):
            continue
        module = importlib.import_module(name)
        for key in module.__all__:
            value = getattr(module, key)
            if isinstance(value, GenericAlias):
                continue  # on Python 3.10, `inspect.isclass` is true for it
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{name}.{key}", value
                if inspect.isclass(value):
                    for method, function in vars(value).items():
                        if inspect.isfunction(function) and not method.startswith("_"):
                            yield f"{name}.{key}.{method}", function


@pytest.mark.parametrize("name, value", list(public_callables()))
def test_every_public_class_and_function_has_a_docstring(name: str, value: Any) -> None:
    assert (value.__doc__ or "").strip(), name


@pytest.mark.parametrize(
    "error, message",
    [
        (errors.BacklogFull(3), "the queue is full: max_pending is 3"),
        (errors.BacklogFull(3.5, "max_pending_weight"), "the queue is full: max_pending_weight is 3.5"),
        (errors.BacklogFull(3, "max_pending_per_key", "a"), "the queue is full for key 'a': max_pending_per_key is 3"),
        (errors.JobDropped(3), "the job was dropped to make room for newer ones: max_pending is 3"),
        (errors.JobTooLarge(5.0, 4.0), "a job of weight 5 does not fit into any batch: the limit is 4"),
        (errors.JobTooLarge(5.0, 4.0, "the queue"), "a job of weight 5 does not fit into the queue: the limit is 4"),
        (errors.JobTooLarge(5.0), "a job of weight 5 does not fit into any batch"),
        (errors.JobExpired(0.5), "the job was not dispatched within 0.5 s"),
        (errors.ResultCountError(3, 2), "the processor must return one result per job: expected 3, got 2"),
        (errors.BatcherClosed("closed"), "closed"),
        (errors.ForkedError("forked"), "forked"),
    ],
)
def test_an_error_has_a_message_and_can_be_pickled(error: Exception, message: str) -> None:
    assert isinstance(error, errors.MicrobatchError)
    twin = pickle.loads(pickle.dumps(error))
    assert (message, message, type(error), vars(error)) == (str(error), str(twin), type(twin), vars(twin))


@pytest.mark.parametrize(
    "error, also",
    [
        (errors.BacklogFull, __import__("queue").Full),
        (errors.JobTooLarge, ValueError),
        (errors.BatcherClosed, RuntimeError),
        (errors.JobExpired, TimeoutError),
        (errors.ForkedError, RuntimeError),
        (errors.ResultCountError, ValueError),
    ],
)
def test_an_error_is_a_subclass_of_the_matching_standard_error(error: type, also: type) -> None:
    assert issubclass(error, also)


def test_the_states_of_a_job_have_these_values() -> None:
    assert ["queued", "batched", "running", "succeeded", "failed", "cancelled", "expired", "dropped"] == [
        state.value for state in microbatch.JobState
    ]
