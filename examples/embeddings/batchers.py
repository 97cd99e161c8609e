"""Ways to form batches of texts for a model that pads them. The advised ones are `in_buckets` and `by_length`."""

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context

from minilm import Embedding, Tokens, embed, load

from microbatch import Batcher, Natural, Size, Weight, processors

CORES = 2
"""The number of batches that run in parallel. Each takes one core: see ``intra_op_num_threads`` in ``minilm.py``."""


def bucket(tokens: Tokens) -> int:
    """Return the length of a text, rounded up to a multiple of 8. Only texts with the same result share a batch."""
    return math.ceil(len(tokens) / 8) * 8


def in_buckets() -> Batcher[Tokens, Embedding]:
    """Put texts of similar lengths into a batch, which has at most 256 tokens: 32 short texts, or a single long one."""
    load()
    return Batcher(embed, Weight(256) | Natural(), key=bucket, weigh=bucket, max_workers=CORES)


def by_length() -> Batcher[Tokens, Embedding]:
    """Put all texts into the same batch, and give the model parts of at most 64 tokens, in the order of length."""
    load()
    return Batcher(processors.by_length(embed, budget=64), Size(32) | Natural(), max_workers=CORES)


def in_processes() -> Batcher[Tokens, Embedding]:
    """Do the same as `in_buckets`, with a model in each of several processes."""
    pool = ProcessPoolExecutor(CORES, mp_context=get_context("spawn"), initializer=load)
    wait([pool.submit(load) for _ in range(CORES)])  # load the models now, and not during the first requests
    policy = Weight(256) | Natural()
    batcher = Batcher(embed, policy, key=bucket, weigh=bucket, executor=pool, max_workers=CORES)
    batcher.add_shutdown_callback(pool.shutdown)
    return batcher


def by_default() -> Batcher[Tokens, Embedding]:
    """Use the default policy, which learns that larger batches don't pay with a model that pads."""
    load()
    return Batcher(embed, max_workers=CORES, weigh=len)


def by_size() -> Batcher[Tokens, Embedding]:
    """Limit only the number of texts: don't do this with a model that pads. A long text makes its whole batch slow."""
    load()
    return Batcher(embed, Size(100) | Natural(), max_workers=CORES)


BATCHERS: dict[str, Callable[[], Batcher[Tokens, Embedding]]] = {
    "buckets": in_buckets,
    "by_length": by_length,
    "processes": in_processes,
    "default": by_default,
    "size": by_size,
}
