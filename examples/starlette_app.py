"""An application in Starlette. Requests that arrive at the same time share a batch.

    $ python -m pip install .. starlette uvicorn
    $ python -m uvicorn starlette_app:app

From another shell:

    $ curl localhost:8000/lengths/microbatch
    10
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from microbatch import BacklogFull, Batcher, JobExpired
from microbatch.aio import submit


def measure(words: list[str]) -> list[int]:
    """Return the length of each word, in a worker thread: a processor may block."""
    return [len(word) for word in words]


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    """Give each start of the application a batcher, and process all its jobs before the application ends."""
    batcher = Batcher(measure)
    try:
        yield {"batcher": batcher}
    finally:
        await asyncio.to_thread(batcher.shutdown)


async def get_length(request: Request) -> JSONResponse:
    """Respond with the length of a word, or with status 503 if the batcher is busy."""
    try:
        job = submit(request.state.batcher, request.path_params["word"], timeout=1, expires_in=5)
        result = await asyncio.wait_for(job, timeout=10)
    except (BacklogFull, JobExpired, asyncio.TimeoutError):
        raise HTTPException(503, "busy, try again later", {"Retry-After": "1"})
    return JSONResponse(result.value)


app = Starlette(lifespan=lifespan, routes=[Route("/lengths/{word}", get_length)])
