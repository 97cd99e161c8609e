"""`batched`: functions and methods of many jobs, called with one."""

import copy
import gc
import threading
import weakref
from concurrent.futures import Future, wait
from typing import Any, List

import pytest

from microbatch import Batcher, Interval, Size, batched
from microbatch.testing import RecordingProcessor


class Shop:
    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.batches: List[List[int]] = []

    @batched(Size(2) | Interval(0.001))
    def price(self, items: List[int]) -> List[int]:
        """Price items."""
        self.batches.append(list(items))
        return [item * self.rate for item in items]


@batched(Size(2) | Interval(0.001), name="doubling")
def double(numbers: List[int]) -> List[int]:
    """Double numbers."""
    return [number * 2 for number in numbers]


@pytest.fixture(autouse=True, scope="module")
def shut_down_at_the_end() -> Any:
    double(0)  # so that its threads are no test's
    yield
    double.shutdown()


def test_it_takes_a_single_job_and_returns_its_plain_value() -> None:
    assert 14 == double(7)


def test_it_looks_like_the_function() -> None:
    assert ("double", "Double numbers.") == (getattr(double, "__name__"), double.__doc__)


def test_its_batcher_is_at_hand() -> None:
    assert isinstance(double.batcher, Batcher)
    assert 6 == double.submit(3, timeout=1, expires_in=60).result(timeout=10).value
    assert [2, 4] == [result.value for result in double.map([1, 2], buffersize=1)]


def test_calls_of_many_threads_go_together() -> None:
    processor = RecordingProcessor[int]()
    function = batched(Size(4))(processor)
    callers: List[Future[Any]] = [Future() for _ in range(4)]
    for number, caller in enumerate(callers):
        threading.Thread(target=lambda n=number, c=caller: c.set_result(function(n))).start()
    wait(callers, timeout=10)
    assert [0, 1, 2, 3] == [caller.result(timeout=0) for caller in callers]
    assert [4] == [len(batch) for batch in processor.batches]
    assert function.shutdown()


def test_an_error_of_a_job_is_raised() -> None:
    function = batched()(RecordingProcessor[str](lambda job: KeyError(job)))
    with pytest.raises(KeyError):
        function("a")
    function.shutdown()


def test_each_instance_of_a_class_has_a_batcher_of_its_own() -> None:
    cheap, dear = Shop(2), Shop(3)
    assert (10, 15) == (cheap.price(5), dear.price(5))
    assert ([[5]], [[5]]) == (cheap.batches, dear.batches)
    assert cheap.price.batcher is cheap.price.batcher is not dear.price.batcher
    assert cheap.price.shutdown()
    assert 18 == dear.price(6)
    dear.price.shutdown()


def test_a_copied_instance_does_not_share_the_batcher_of_the_original() -> None:
    shop = Shop(2)
    assert 2 == shop.price(1)
    twin = copy.deepcopy(shop)
    twin.rate = 5
    assert 5 == twin.price(1)
    shop.price.shutdown()
    twin.price.shutdown()


def test_a_bound_method_that_is_kept_keeps_its_instance() -> None:
    price = Shop(4).price
    gc.collect()
    assert 8 == price(2)
    price.shutdown()
    with pytest.warns(ResourceWarning):
        assert [12] == [result.value for result in Shop(4).price.map([3])]
        gc.collect()


def test_a_pending_job_keeps_the_instance() -> None:
    shop = Shop(3)
    batcher, future, reference = shop.price.batcher, shop.price.submit(7), weakref.ref(shop)
    del shop
    assert 21 == future.result(timeout=10).value
    batcher.shutdown()
    assert reference() is None


def test_an_instance_that_nobody_uses_can_be_collected() -> None:
    shop = Shop(2)
    shop.price(1)
    shop.price.shutdown()
    reference = weakref.ref(shop)
    del shop
    gc.collect()
    assert reference() is None


def test_a_batcher_that_outlives_its_instance_says_so() -> None:
    batcher = Shop(2).price.batcher
    gc.collect()
    with batcher:
        assert isinstance(batcher.submit(1).exception(timeout=10), ReferenceError)


def test_a_finalizer_may_use_the_method() -> None:
    class Repository:
        def __init__(self) -> None:
            self.me = self

        @batched(Size(10) | Interval(0))
        def save(self, rows: List[Any]) -> List[Any]:
            return rows

        def __del__(self) -> None:
            self.save.shutdown()

    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(1)
    for _ in range(200):
        Repository().save
    gc.set_threshold(*threshold)
    gc.unfreeze()
    gc.collect()


def test_the_class_gives_the_decorated_function() -> None:
    assert "Price items." == Shop.price.__doc__
