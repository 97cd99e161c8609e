"""Sentence embeddings from FastAPI. ``with_flask.py`` says which packages it needs, with fastapi and uvicorn instead.

    $ uvicorn --factory with_fastapi:create_app

From another shell:

    $ curl --json '{"text": "a cup of tea"}' localhost:8000/embeddings
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from batchers import BATCHERS, CORES
from fastapi import Body, FastAPI, HTTPException, Request
from minilm import embed, load, tokenize

from microbatch import BacklogFull, JobExpired


def create_app(mode: str = os.environ.get("EMBEDDINGS", "buckets")) -> FastAPI:
    """Create the application."""
    if mode == "unbatched":
        return _unbatched()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        batcher = await asyncio.to_thread(BATCHERS[mode])
        try:
            yield {"batcher": batcher}
        finally:
            await asyncio.to_thread(batcher.shutdown)

    app = FastAPI(lifespan=lifespan)

    @app.post("/embeddings")
    async def embeddings(request: Request, text: str = Body(embed=True)) -> dict[str, Any]:
        try:
            future = request.state.batcher.submit(tokenize(text), timeout=0, expires_in=5)
            result = await asyncio.wait_for(asyncio.wrap_future(future), timeout=10)
        except (BacklogFull, JobExpired, asyncio.TimeoutError):
            raise HTTPException(503, "busy", {"Retry-After": "1"})
        embedding: dict[str, Any] = result.value._asdict()
        return embedding

    return app


def _unbatched() -> FastAPI:
    load()
    free = threading.Semaphore(CORES)  # more calls at a time would only take turns
    app = FastAPI()

    @app.post("/embeddings")
    def embeddings(text: str = Body(embed=True)) -> dict[str, Any]:
        tokens = tokenize(text)
        with free:
            return embed([tokens])[0]._asdict()

    return app
