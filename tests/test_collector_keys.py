"""Jobs share a batch if their keys are equal, and no key starves or harms another."""

import subprocess
import sys
from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any

import pytest

from microbatch import NEVER, NOW, BatchingPolicy, Interval, Size, Window
from tests.collectors import Job, collector, take_all
from tests.extras import needs


def test_jobs_with_different_keys_never_share_a_batch() -> None:
    c = collector(Size(2), workers=9)
    c.add([Job("a", key=1), Job("b", key=2), Job("c", key=1), Job("d", key=2), Job("e", key=3)])
    assert ["ac:size", "bd:size"] == take_all(c, 0)


def test_a_busy_key_does_not_starve_the_others() -> None:
    c = collector(Size(2) | Interval(1))
    c.add([Job("q", key="quiet")])
    taken = []
    for now in range(1, 5):
        c.add([Job("b", key="busy", submitted=now) for _ in range(4)])
        taken += take_all(c, now)
        c.finished()
    assert "q:interval" in taken[:2]


class Eager(BatchingPolicy[Any]):
    """A single job is due too, once five batches have been dispatched."""

    def due(self, window: Window[Any]) -> float:
        return NOW if window.count >= 2 or len(window.sent) >= 5 else NEVER


def test_a_due_batch_is_dispatched_even_if_another_key_is_always_ready() -> None:
    c = collector(Eager())
    c.add([Job("rare", key="rare")])
    for batch in range(10):
        c.add([Job("busy", key="busy"), Job("busy", key="busy")])
        taken = take_all(c, batch)
        c.finished()
        if "rare:eager" in taken:
            break
    assert "rare:eager" in taken


class Colliding(int):
    """Integers that differ, but all have the same hash."""

    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize("kind", [int, Colliding, lambda number: ("table", int(number))], ids=["int", "hash", "tuple"])
def test_jobs_share_a_batch_if_and_only_if_their_keys_are_equal(kind: Callable[[str], Hashable]) -> None:
    c = collector(Size(2), workers=9)
    c.add([Job(letter, key=kind(number)) for letter, number in zip("abcdef", "213213")])
    assert ["ad:size", "be:size", "cf:size"] == take_all(c, 0)
    assert not c


class Tenant(str, Enum):
    ACME = "acme"


EQUAL_KEYS: list[list[Hashable]] = [
    [1, 1.0, True],
    ["acme", Tenant.ACME],
    [(1, "acme"), (True, Tenant.ACME)],
]


def check_that_they_share_a_batch(keys: list[Hashable]) -> None:
    c = collector(Size(len(keys)), workers=9)
    c.add([Job(str(number), key=key) for number, key in enumerate(keys)])
    assert ["".join(map(str, range(len(keys)))) + ":size"] == take_all(c, 0)
    assert not c


@pytest.mark.parametrize("keys", EQUAL_KEYS + [keys[::-1] for keys in EQUAL_KEYS], ids=repr)
def test_equal_keys_share_a_batch_whatever_their_types(keys: list[Hashable]) -> None:
    check_that_they_share_a_batch(keys)


def test_numpy_keys_share_a_batch_with_equal_python_keys() -> None:
    needs("numpy")
    import numpy

    numbers: list[Hashable] = [1, 1.0, True, numpy.int64(1), numpy.bool_(True)]
    texts: list[Hashable] = ["acme", Tenant.ACME, numpy.str_("acme")]
    for keys in (numbers, numbers[::-1], texts, texts[::-1]):
        check_that_they_share_a_batch(keys)


def test_bytes_and_str_are_different_keys_even_if_python_refuses_to_compare_them() -> None:
    script = """if True:
        from microbatch import Batcher, Size
        with Batcher(list, Size(2), key=lambda job: job) as batcher:
            futures = [batcher.submit(job) for job in [b"a", "a", b"a", "a"]]
            print(*(future.result().batch.id for future in futures))
    """
    command = [sys.executable, "-bb", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ("1 2 1 2\n", "") == (done.stdout, done.stderr)


def test_a_key_that_raises_when_compared_harms_no_other_key() -> None:
    class RaisingEq:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    c = collector(Size(2) | Interval(1), workers=9)
    same = RaisingEq()
    c.add([Job("a", key=same), Job("b", key=RaisingEq()), Job("c", key=same)])
    assert ["ac:size"] == take_all(c, 0)
    assert ["b:interval"] == take_all(c, 1)
    assert not c


def test_a_key_that_raises_when_compared_harms_no_plain_key_with_the_same_hash() -> None:
    class RaisingEq:
        def __hash__(self) -> int:
            return hash(1)

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    c = collector(Size(2) | Interval(1), workers=9)
    c.add([Job("a", key=RaisingEq()), Job("b", key=1), Job("c", key=RaisingEq()), Job("d", key=1.0)])
    assert ["bd:size"] == take_all(c, 0)
    assert ["a:interval", "c:interval"] == take_all(c, 1)
    assert not c


def test_a_key_whose_hash_changes_harms_no_other_key() -> None:
    class ChangingHash:
        value = 1

        def __hash__(self) -> int:
            return self.value

    key = ChangingHash()
    c = collector(Size(2) | Interval(1), workers=9)
    c.add([Job("a", key=key)])
    key.value = 2
    c.add([Job("b", key=key)])
    assert ["a:interval", "b:interval"] == take_all(c, 1)
    assert not c


def test_a_key_that_is_no_longer_hashable_equals_only_itself() -> None:
    class RaisingHash:
        def __hash__(self) -> int:
            raise RuntimeError

    c = collector(Size(2) | Interval(1), workers=9)
    same = RaisingHash()
    gone, stays = Job("a", key=same), Job("b", key=RaisingHash())
    c.add([gone, stays, Job("c", key=same), Job("d", key=same)])
    assert ["ac:size"] == take_all(c, 0)
    assert ["b:interval", "d:interval"] == take_all(c, 1)
    assert not c
