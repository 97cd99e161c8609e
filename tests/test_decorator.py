"""`batched`: functions and methods that take many jobs are called with one."""

import copy
import dataclasses
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import pytest

from microbatch import Batcher, Interval, Size, batched
from microbatch.testing import RecordingProcessor


class Shop:
    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.batches: list[list[int]] = []

    @batched(Size(2) | Interval(0.001))
    def price(self, items: list[int]) -> list[int]:
        """Price items."""
        self.batches.append(list(items))
        return [item * self.rate for item in items]


@batched(Size(2) | Interval(0.001), name="doubling")
def double(numbers: list[int]) -> list[int]:
    """Double numbers."""
    return [number * 2 for number in numbers]


@pytest.fixture(autouse=True, scope="module")
def shut_down_at_the_end() -> Any:
    double(0)  # starts its threads before any test
    yield
    double.shutdown()


def test_a_batched_function_takes_a_single_job_and_returns_its_plain_value() -> None:
    assert 14 == double(7)


def test_a_batched_function_keeps_the_name_and_the_docstring() -> None:
    assert ("double", "Double numbers.") == (getattr(double, "__name__"), double.__doc__)


def test_a_batched_function_has_the_methods_of_its_batcher() -> None:
    assert isinstance(double.batcher, Batcher)
    assert 6 == double.submit(3, timeout=1, expires_in=60).result(timeout=10).value
    assert [2, 4] == [result.value for result in double.map([1, 2], buffersize=1)]


def test_calls_from_several_threads_share_a_batch() -> None:
    processor = RecordingProcessor[int]()
    function = batched(Size(4))(processor)
    callers: list[Future[Any]] = [Future() for _ in range(4)]
    for number, caller in enumerate(callers):
        threading.Thread(target=lambda n=number, c=caller: c.set_result(function(n))).start()
    wait(callers, timeout=10)
    assert [0, 1, 2, 3] == [caller.result(timeout=0) for caller in callers]
    assert [4] == [len(batch) for batch in processor.batches]
    assert function.shutdown()


def test_the_exception_of_a_job_is_raised() -> None:
    function = batched()(RecordingProcessor[str](lambda job: KeyError(job)))
    with pytest.raises(KeyError):
        function("a")
    function.shutdown()


def test_each_instance_of_a_class_has_its_own_batcher() -> None:
    cheap, expensive = Shop(2), Shop(3)
    assert (10, 15) == (cheap.price(5), expensive.price(5))
    assert ([[5]], [[5]]) == (cheap.batches, expensive.batches)
    assert cheap.price.batcher is cheap.price.batcher is not expensive.price.batcher
    assert cheap.price.shutdown()
    assert 18 == expensive.price(6)
    expensive.price.shutdown()


def test_a_copied_instance_does_not_share_the_batcher_of_the_original() -> None:
    shop = Shop(2)
    assert 2 == shop.price(1)
    twin = copy.deepcopy(shop)
    twin.rate = 5
    assert 5 == twin.price(1)
    shop.price.shutdown()
    twin.price.shutdown()


def test_a_bound_method_keeps_its_instance_alive() -> None:
    price = Shop(4).price
    gc.collect()
    assert 8 == price(2)
    price.shutdown()
    with pytest.warns(ResourceWarning):
        assert [12] == [result.value for result in Shop(4).price.map([3])]
        gc.collect()


def test_a_pending_job_keeps_its_instance_alive() -> None:
    shop = Shop(3)
    batcher, future, reference = shop.price.batcher, shop.price.submit(7), weakref.ref(shop)
    del shop
    assert 21 == future.result(timeout=10).value
    batcher.shutdown()
    assert reference() is None


def test_an_unused_instance_can_be_garbage_collected() -> None:
    shop = Shop(2)
    shop.price(1)
    shop.price.shutdown()
    reference = weakref.ref(shop)
    del shop
    gc.collect()
    assert reference() is None


def test_a_batcher_that_outlives_its_instance_fails_its_jobs_with_reference_error() -> None:
    batcher = Shop(2).price.batcher
    gc.collect()
    with batcher:
        assert isinstance(batcher.submit(1).exception(timeout=10), ReferenceError)


@pytest.mark.slow
def test_a_finalizer_may_use_a_batched_method() -> None:
    class Repository:
        def __init__(self) -> None:
            self.me = self

        @batched(Size(10) | Interval(0))
        def save(self, rows: list[Any]) -> list[Any]:
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


def test_the_class_attribute_is_the_decorated_function() -> None:
    assert "Price items." == Shop.price.__doc__


# -- in all kinds of classes --


def doubled(items: list[int]) -> list[int]:
    return [item * 2 for item in items]


def priced(items: list[int], rate: int = 2) -> list[int]:
    return [item * rate for item in items]


@dataclasses.dataclass
class Unhashable:
    rate: int = 2

    @batched(Size(2) | Interval(0))
    def price(self, items: list[int]) -> list[int]:
        return [item * self.rate for item in items]


@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: int = 2

    @batched(Size(2) | Interval(0))
    def price(self, items: list[int]) -> list[int]:
        return [item * self.rate for item in items]


class Referable:
    __slots__ = ("__weakref__",)


@dataclasses.dataclass(slots=True)
class Slotted(Referable):
    rate: int = 2

    @batched(Size(2) | Interval(0))
    def price(self, items: list[int]) -> list[int]:
        return [item * self.rate for item in items]


class Mixin:
    __slots__ = ()
    rate: int

    @batched(Size(2) | Interval(0))
    def price(self, items: list[int]) -> list[int]:
        return [item * self.rate for item in items]


class Mixed(Mixin):
    def __init__(self, rate: int = 2) -> None:
        self.rate = rate


KINDS: list[Any] = [Unhashable, Frozen, Slotted, Mixed]
if sys.version_info >= (3, 11):

    @dataclasses.dataclass(slots=True, weakref_slot=True)
    class WithWeakrefs:
        rate: int = 2

        @batched(Size(2) | Interval(0))
        def price(self, items: list[int]) -> list[int]:
            return [item * self.rate for item in items]

    KINDS.append(WithWeakrefs)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_instances_and_instances_with_slots_each_have_their_own_batcher(kind: Any) -> None:
    first, second = kind(), kind()
    assert (6, 8) == (first.price(3), second.price.submit(4).result(timeout=10).value)
    assert first.price.batcher is first.price.batcher is not second.price.batcher
    first.price.shutdown()
    second.price.shutdown()
    reference = weakref.ref(first)
    del first
    gc.collect()
    assert reference() is None


def refused(make: Callable[[], object]) -> str:
    """Return why a class can't be made. Before Python 3.12 that is the cause of a RuntimeError."""
    with pytest.raises((TypeError, RuntimeError)) as caught:
        make()
    return str(caught.value if isinstance(caught.value, TypeError) else caught.value.__cause__)


def test_a_class_whose_instances_cannot_be_weakly_referenced_is_refused() -> None:
    def dataclass() -> object:
        @dataclasses.dataclass(slots=True)
        class Shop:
            rate: int = 2

            @batched()
            def price(self, items: list[int]) -> list[int]:
                return items

        return Shop

    def slots() -> object:
        class Shop:
            __slots__ = ("rate",)

            @batched()
            def price(self, items: list[int]) -> list[int]:
                return items

        return Shop

    for make in (dataclass, slots):
        assert "Shop can't have a batched method" in refused(make)
        assert "add '__weakref__' to its __slots__" in refused(make) and "weakref_slot=True" in refused(make)


def test_a_call_on_an_instance_that_cannot_be_weakly_referenced_raises() -> None:
    class Shop(Mixin):
        __slots__ = ("rate",)

    with pytest.raises(TypeError, match="Shop can't have a batched method"):
        Shop().price(3)


class Registry:
    rate = 2

    @batched(Size(2) | Interval(0))
    @classmethod
    def priced(cls, items: list[int]) -> list[int]:
        return [item * cls.rate for item in items]

    @classmethod
    @batched(Size(2) | Interval(0))
    def classmethod_above(cls, items: list[int]) -> list[int]:
        return [item * cls.rate for item in items]

    @batched(Size(2) | Interval(0))
    @staticmethod
    def doubled(items: list[int]) -> list[int]:
        return [item * 2 for item in items]

    @staticmethod
    @batched(Size(2) | Interval(0))
    def staticmethod_above(items: list[int]) -> list[int]:
        return [item * 2 for item in items]


def test_a_class_method_has_a_batcher_for_each_class() -> None:
    class ExpensiveRegistry(Registry):
        rate = 3

    assert (10, 15) == (Registry.priced(5), ExpensiveRegistry.priced(5))
    assert (10, 15) == (Registry().priced(5), ExpensiveRegistry().priced.submit(5).result(timeout=10).value)
    assert [10] == [result.value for result in Registry.priced.map([5])]
    assert Registry.priced.batcher is Registry().priced.batcher is not ExpensiveRegistry.priced.batcher
    Registry.priced.shutdown()
    ExpensiveRegistry.priced.shutdown()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="a class method no longer binds the object that it wraps")
def test_a_class_method_around_a_batched_function_works() -> None:
    priced: Any = Registry.classmethod_above
    assert (10, 10) == (priced(5), priced.submit(5).result(timeout=10).value)
    priced.shutdown()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="a class method binds the object that it wraps")
def test_a_class_method_around_a_batched_function_says_how_to_write_it() -> None:
    priced: Any = Registry.classmethod_above
    for use in (partial(priced, 5), partial(priced.submit, 5), partial(priced.map, [5])):
        with pytest.raises(TypeError, match="for a class method, put @batched above @classmethod"):
            use()


@pytest.mark.parametrize("name", ["doubled", "staticmethod_above"])
def test_a_static_method_has_one_batcher_in_either_order_of_the_decorators(name: str) -> None:
    of_class, of_instance = getattr(Registry, name), getattr(Registry(), name)
    assert (10, 10) == (of_class(5), of_instance(5))
    assert of_class.batcher is of_instance.batcher
    of_class.shutdown()


def test_a_method_called_without_an_instance_raises_and_starts_nothing() -> None:
    price: Any = Shop.price
    for use in (partial(price, 5), partial(price, Shop(2), 5), partial(price.submit, 5), partial(price.map, [5])):
        with pytest.raises(TypeError, match="price takes self and a list of jobs: call it on an instance"):
            use()
    assert 0 == price.batcher.stats().accepted


@pytest.mark.parametrize(
    "function",
    [lambda: [], lambda a, b, c: [], classmethod(lambda items: []), staticmethod(lambda a, b: [])],
    ids=["no parameter", "three parameters", "a class method without jobs", "a static method with two"],
)
def test_a_function_with_the_wrong_parameters_is_refused_when_it_is_decorated(function: Any) -> None:
    with pytest.raises(TypeError, match="function must take a list of jobs, or self and a list of jobs, got <"):
        batched()(function)


class Doubling:
    """Has attributes with the same names as a batched function."""

    def __init__(self) -> None:
        self.submit = self.batcher = self._owner = "mine"

    def __call__(self, items: list[int]) -> list[int]:
        return [item * 2 for item in items]


@pytest.mark.parametrize(
    "function",
    [
        partial(priced, rate=2),
        partial(lambda rate, items: priced(items, rate), 2),
        Doubling(),
        Doubling().__call__,
        functools.wraps(lambda session, items: items)(lambda items: doubled(items)),
        lambda *arguments: doubled(arguments[-1]),
        lambda items, rate=2: priced(items, rate),
    ],
    ids=["partial", "partial by position", "an object", "a bound method", "wrapped", "any arguments", "with a default"],
)
def test_any_callable_that_takes_a_list_of_jobs_can_be_decorated(function: Any) -> None:
    decorated = batched(Size(2) | Interval(0))(function)
    assert (6, 6) == (decorated(3), decorated.submit(3).result(timeout=10).value)
    decorated.shutdown()


@pytest.mark.parametrize("function", [partial(priced, rate=2), Doubling(), Doubling().__call__])
def test_a_callable_that_a_class_does_not_bind_is_not_bound(function: Any) -> None:
    decorated = batched(Size(2) | Interval(0))(function)
    kind: Any = type("Shop", (), {"price": decorated})
    assert (6, 6) == (kind.price(3), kind().price(3))
    decorated.shutdown()


def test_more_than_one_job_in_a_call_is_refused() -> None:
    with pytest.raises(TypeError, match="double takes a single job, got 2"):
        double(1, 2)  # type: ignore[arg-type]
