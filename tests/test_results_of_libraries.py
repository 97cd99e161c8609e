"""The outcome of each job if the processor returns objects of NumPy, pandas, Arrow, Pydantic or HTTP clients."""

from typing import Any

import pytest

from tests.extras import needs
from tests.test_results import a_result, check_refusal, errors, run, values

needs("httpx", "numpy", "pandas", "pydantic", "requests")
import httpx
import numpy
import pandas
import pydantic
import pydantic.v1
import requests


class RootModel(pydantic.RootModel[list[int]]):
    """Iterates over its list, as Pydantic's documentation shows."""

    def __iter__(self) -> Any:
        return iter(self.root)


class Item(pydantic.BaseModel):
    label: str = "x"
    score: int = 1


class OpenItem(Item, extra="allow"):
    """Keeps fields that it does not define."""


class OldItem(pydantic.v1.BaseModel):
    label: str = "x"
    score: int = 1


@pytest.mark.parametrize(
    "returned",
    [
        RootModel([1, 2, 3]),
        numpy.array([1, 2, 3]),
        numpy.ma.array([1, 2, 3]),
        pandas.Series([1, 2, 3], index=["x", "y", "z"]),
        pandas.Index([1, 2, 3]),
        pandas.DataFrame({"label": [1, 2, 3]}).label,
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_each_job_gets_the_value_in_its_place(returned: Any) -> None:
    assert [1, 2, 3] == values(run(lambda jobs: returned))


def test_each_job_gets_an_element_of_an_array_along_its_first_axis() -> None:
    matrix = numpy.array([[1, 2], [3, 4], [5, 6]])
    assert [[1, 2], [3, 4], [5, 6]] == [value.tolist() for value in values(run(lambda jobs: matrix))]
    structured = numpy.array([(1, 0.5), (2, 1.5), (3, 2.5)], dtype=[("label", int), ("score", float)])
    assert [(1, 0.5), (2, 1.5), (3, 2.5)] == [value.item() for value in values(run(lambda jobs: structured))]


def test_each_value_of_an_arrow_column_is_the_result_of_one_job() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"label": [1, 2, 3]})
    for column in (table["label"], pyarrow.array([1, 2, 3]), table["label"].chunk(0)):
        assert [1, 2, 3] == [value.as_py() for value in values(run(lambda jobs: column))]


@pytest.mark.parametrize("value", [2, "two", [2]], ids=repr)
def test_multiplying_an_array_by_a_result_raises_and_names_the_attribute(value: Any) -> None:
    with pytest.raises(TypeError, match=r"\.value"):
        numpy.array([1, 2]) * a_result(value)


@pytest.mark.parametrize(
    "returned, why",
    [
        (numpy.array(3), "is one value"),
        (numpy.zeros(1, dtype=[("x", int), ("y", int), ("z", int)])[0], "is one value"),
        (Item(), "holds values by name"),
        (OpenItem(more=2), "holds values by name"),  # type: ignore[call-arg]
        (OldItem(), "holds values by name"),
        (pandas.DataFrame({"label": ["x", "y"], "score": [1, 2]}), "iterates over columns"),
        (requests.Response(), "iterates over chunks of its body"),
        (httpx.Response(200, content=b"abc"), "iterates over chunks of its body"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_return_value_that_is_not_one_result_per_job_in_order_is_refused(returned: Any, why: str, count: int) -> None:
    check_refusal(returned, why, count)


def test_an_arrow_table_is_refused() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"label": ["x", "y"], "score": [1, 2]})
    for returned in (table, table.to_batches()[0]):
        assert "which iterates over columns" in str(errors(run(lambda jobs: returned, "ab"))[0])
