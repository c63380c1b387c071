"""The handler that one would write first: FastAPI, one picture a request, no batches, a model that is free.

Uvicorn with a thread pool for decoding, as FastAPI's documentation suggests for blocking work. Started by
`benchmarks.host_path`: `python -m benchmarks.rivals.naive PORT`.
"""

import sys

import uvicorn
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from dino_core.preprocess import Preprocessing, load_pixels

PREPROCESSING = Preprocessing()
app = FastAPI()


def free_embedding(data: bytes) -> list[float]:
    """Decoding, resize and crop; the embedding costs nothing and has as many values as ours."""
    pixels_CHW = load_pixels(data, PREPROCESSING)
    return [float(pixels_CHW[0, 0, 0])] * 16


@app.post("/embed")
async def embed(request: Request) -> dict[str, list[float]]:
    """One picture as the raw body."""
    return {"embedding": await run_in_threadpool(free_embedding, await request.body())}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
