"""LitServe with batching and the same free model: `python -m benchmarks.rivals.litserve_free PORT`.

Not a dependency of ours: `pip install litserve`, and `benchmarks.host_path` takes it along.
"""

import sys
from typing import Any, cast

import litserve
from starlette.requests import Request

from dino_core.preprocess import Preprocessing, load_pixels

PREPROCESSING = Preprocessing()
MAX_BATCH = 32
BATCH_TIMEOUT_S = 0.005  # of the values from 0 to 0.05, among the fastest here


class FreeModel(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """Decoding, resize and crop; the embedding costs nothing and has as many values as ours."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def decode_request(self, request: Request) -> bytes:
        """The file of a form, as in LitServe's own examples with images."""
        upload = cast(Any, request)["images"]  # LitServe has parsed the form already
        return cast(bytes, upload.file.read())

    def predict(self, pictures: list[bytes]) -> list[list[float]]:
        """A batch."""
        return [[float(load_pixels(data, PREPROCESSING)[0, 0, 0])] * 16 for data in pictures]

    def encode_response(self, embedding: list[float]) -> dict[str, list[float]]:
        """As ours."""
        return {"embedding": embedding}


if __name__ == "__main__":
    api = FreeModel(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
