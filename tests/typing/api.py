"""Code for ``mypy --strict`` and pyright, never run. Each ``type: ignore`` marks an error that they must report."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any

from distributed import Client
from flask import Flask

from microbatch import (
    BatchedFunction,
    Batcher,
    BatchingPolicy,
    BatchProcessor,
    Interval,
    JobFuture,
    JobResult,
    JobState,
    ResultAt,
    Size,
    Window,
    batched,
)
from microbatch.integrations.dask import shared
from microbatch.integrations.flask import FlaskBatcher
from microbatch.processors import bisecting, by_key, by_length, deduplicating, retrying, within
from microbatch.testing import InlineExecutor, ManualClock, RecordingProcessor

if sys.version_info >= (3, 11):
    from typing import assert_type
else:
    from typing_extensions import assert_type


def lengths(words: Sequence[str]) -> list[int]:
    return [len(word) for word in words]


def insert(words: list[str]) -> None: ...


def stream(words: Sequence[str]) -> Iterator[int]:
    yield from map(len, words)


def lengths_or_errors(words: Sequence[str]) -> list[int | ValueError]:
    return [len(word) if word else ValueError() for word in words]


def no_batch(word: str) -> int:
    return len(word)


def not_iterable(words: Sequence[str]) -> int:
    return len(words)


class Urgent(BatchingPolicy[str]):
    def due(self, window: Window[str]) -> float:
        return window.opened if "!" in window.jobs[-1] else window.opened + 1


# The job and the value are inferred from the processor.
batcher = Batcher(lengths, Size(3) | Interval(0.1))
assert_type(batcher, Batcher[str, int])
assert_type(batcher.submit("a"), JobFuture[int])
assert_type(batcher.submit("a").result(), JobResult[int])
assert_type(batcher.submit("a").result().value, int)
assert_type(batcher.submit("a").state, JobState)
assert_type(batcher.map(["a"]), Iterator[JobResult[int]])
assert_type(Batcher(insert), Batcher[str, None])
assert_type(Batcher(stream), Batcher[str, int])
with Batcher(lengths) as entered:
    assert_type(entered, Batcher[str, int])
future: "Future[JobResult[int]]" = batcher.submit("a")

# A processor that returns exceptions for some jobs.
partial = Batcher(lengths_or_errors)
assert_type(partial, Batcher[str, int])  # pyright: ignore[reportAssertTypeFailure]
declared: Batcher[str, int] = Batcher(lengths_or_errors)

# Wrapped processors, and processors known only by their public type.
assert_type(Batcher(bisecting(lengths)), Batcher[str, int])
assert_type(Batcher(retrying(insert, stop=None, wait=None)), Batcher[str, None])
assert_type(Batcher(deduplicating(within(lengths, nullcontext), key=len)), Batcher[str, int])


def shortest_first(words: list[str]) -> Iterator[ResultAt[int]]:
    yield ResultAt(0, len(words[0]))


def fetch(keys: list[int]) -> dict[int, str]:
    return {}


def fetch_rows(keys: list[int]) -> list[tuple[int, str]]:
    return []


def fetch_by(keys: list[int], connection: bytes) -> list[tuple[int, str]]:
    return []


def key_of(row: tuple[int, str]) -> int:
    return row[0]


def insert_by(words: list[str], connection: bytes) -> None: ...
def lengths_by(words: list[str], connection: bytes) -> list[int]:
    return []


assert_type(Batcher(shortest_first), Batcher[str, int])
assert_type(Batcher(by_length(lengths, 100)), Batcher[str, int])
assert_type(Batcher(by_key(fetch)), Batcher[int, str])
assert_type(Batcher(by_key(fetch_rows, row_key=key_of)), Batcher[int, tuple[int, str]])
assert_type(Batcher(by_key(fetch_rows, row_key=key_of, many=True)), Batcher[int, list[tuple[int, str]]])
assert_type(Batcher(by_key(fetch, default=None)), Batcher[int, str | None])
assert_type(Batcher(by_key(fetch_rows, row_key=lambda row: row[0], default=None)), Batcher[int, tuple[int, str] | None])
assert_type(Batcher(bisecting(by_key(fetch_rows, row_key=lambda row: row[0]))), Batcher[int, tuple[int, str]])
assert_type(
    Batcher(within(by_key(fetch_by, row_key=key_of), lambda: nullcontext(b""), pass_value=True)),
    Batcher[int, tuple[int, str]],
)
assert_type(Batcher(within(insert_by, lambda: nullcontext(b""), pass_value=True)), Batcher[str, None])
assert_type(Batcher(within(bisecting(lengths_by), lambda: nullcontext(b""), pass_value=True)), Batcher[str, int])
within(by_key(fetch_by, row_key=key_of), lambda: nullcontext(7), pass_value=True)  # type: ignore[call-overload]
within(insert_by, lambda: nullcontext(7), pass_value=True)  # type: ignore[call-overload]
Batcher(within(insert_by, nullcontext))  # type: ignore[arg-type]
Batcher(insert_by)  # type: ignore[arg-type]


def from_public_type(processor: BatchProcessor[str, int]) -> Batcher[str, int]:
    return Batcher(processor)


# Policies.
assert_type(Batcher(lengths, Urgent() | Size(3)), Batcher[str, int])
Batcher(lengths, key=len, weigh=len, max_pending=0, executor=InlineExecutor(), clock=ManualClock())

# Errors.
batcher.submit(1)  # type: ignore[arg-type]
batcher.submit("a").result() + 1  # type: ignore[operator]
batcher.submit("a").result()[0]  # type: ignore[index]
len(batcher.submit("a").result())  # type: ignore[arg-type]
list(batcher.submit("a").result())  # type: ignore[call-overload]
batcher.submit("a").result().value = 1  # type: ignore[misc]
Batcher(no_batch)  # type: ignore[arg-type]
Batcher(not_iterable)  # type: ignore[arg-type]
Batcher(3)  # type: ignore[call-overload]
Batcher(lengths, 3)  # type: ignore[call-overload]
Batcher(lengths, max_workers="3")  # type: ignore[call-overload]


# The decorator.
@batched(Size(3))
def decorated(words: list[str]) -> list[int]:
    return lengths(words)


@batched(Size(3))
def inserted(words: list[str]) -> None: ...


class Shop:
    @batched(Size(3))
    def price(self, words: list[str]) -> list[float]:
        return []

    @batched(Size(3))
    def price_out_of_order(self, words: list[str]) -> Iterator[ResultAt[float]]:
        yield ResultAt(0, 1.5)

    @batched(Size(3))
    @classmethod
    def class_price(cls, words: list[str]) -> list[float]:
        return []

    @batched(Size(3))
    @staticmethod
    def static_price(words: list[str]) -> list[float]:
        return []


assert_type(decorated, BatchedFunction[str, int])
assert_type(decorated("a"), int)
assert_type(decorated.submit("a"), JobFuture[int])
assert_type(inserted.batcher, Batcher[str, None])
assert_type(Shop().price("a"), float)
assert_type(Shop().price_out_of_order("a"), float)
assert_type(Shop.class_price("a"), float)
assert_type(Shop.static_price("a"), float)
decorated("a", "b")  # type: ignore[arg-type]
decorated(1)  # type: ignore[arg-type]
batched(lengths)  # type: ignore[arg-type]

# A misspelled option.
Batcher(lengths, max_worker=4)  # type: ignore[call-overload]
Batcher(insert, max_worker=4)  # type: ignore[call-overload]
batched(Size(3), max_worker=4)  # type: ignore[call-arg]
batched(Size(3), max_workers="4")  # type: ignore[arg-type]
Batcher.from_env(lengths, max_worker=4)  # type: ignore[call-arg]

# Options that an integration passes on.
extension: FlaskBatcher[str, int] = FlaskBatcher(lengths, Size(3), max_workers=4)
extension.init_app(Flask("shop"), policy=Size(1), max_workers=1)
FlaskBatcher(lengths, max_worker=4)  # type: ignore[call-arg]
extension.init_app(Flask("shop"), max_worker=4)  # type: ignore[call-arg]
extension.submit("a", time_out=1)  # type: ignore[call-arg]
shared("inserts", lengths, Size(3), client=Client, max_workers=4)
shared("inserts", lengths, client=Client, max_worker=4)  # type: ignore[call-arg]

# The test doubles.
recorder: RecordingProcessor[str] = RecordingProcessor(len)
assert_type(recorder.batches, list[list[str]])
recorded: Batcher[str, Any] = Batcher(recorder)
