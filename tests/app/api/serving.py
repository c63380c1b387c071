"""A real service in this process: uvicorn on a free port, a real engine, real collections on disk."""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from app.cli import server_config
from app.fetching import Address, is_public
from app.inference.embedder import Embedder
from app.inference.engine import Engine
from app.main import create_app
from app.search.collection import Catalogue
from app.search.embedded.library import Collections
from app.served_models import ServedModel, ServedModels, serve_bundle
from app.settings import Settings
from app.telemetry import Metrics
from app.tracing import Tracing
from dino_core.bundle import Bundle, load_bundle

START_TIMEOUT_S = 60


@dataclass
class Api:
    """A service that runs.

    Attributes:
        http: A client whose addresses begin with "/".
        url: Where it is.
        engine: Of its first model.
        catalogue: Its collections.
        bundle: Its model.
    """

    http: httpx.Client
    url: str
    engine: Engine
    catalogue: Catalogue
    bundle: Bundle


@contextlib.contextmanager
def serving(
    bundle: Bundle,
    data_dir: Path,
    *,
    beside: Sequence[Bundle] = (),
    embedder: Embedder | None = None,
    fetches_from: Callable[[Address], bool] = is_public,
    catalogue: Catalogue | None = None,
    tracing: Tracing | None = None,
    **settings: Any,  # noqa: ANN401
) -> Iterator[Api]:
    """Serves until the block ends.

    Args:
        bundle: Loaded.
        data_dir: For collections.
        beside: Further models.
        fetches_from: Addresses that images by URL may have.
        embedder: In place of the bundle's model.
        catalogue: In place of the collections in `data_dir`.
        tracing: Where spans go.
        settings: Other than the defaults.
    """
    chosen = Settings(data_dir=data_dir, port=0, **settings)
    metrics = Metrics()

    def load(name: str | None, path: Path) -> ServedModel:
        return serve_bundle(load_bundle(path), chosen.inference(), name=name, metrics=metrics)

    served = [serve_bundle(one, chosen.inference(), metrics=metrics) for one in (bundle, *beside)]
    if embedder is not None:
        served[0].name = embedder.model.id
        served[0].engine = Engine(embedder, chosen.inference(), observer=metrics.of(embedder.model.id))
    models = ServedModels(served, load=load, root=bundle.path.parent, patience_s=chosen.drain_seconds)
    with contextlib.ExitStack() as stack:
        if catalogue is None:
            catalogue = stack.enter_context(Collections.open(data_dir))
        app = create_app(
            chosen, models, catalogue, metrics=metrics, tracing=tracing, fetches_from=fetches_from
        )
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server = uvicorn.Server(server_config(app, chosen))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not server.started:
                assert thread.is_alive(), "the service did not start: see the log"
                assert time.monotonic() < deadline_s, "the service takes too long to start"
                time.sleep(0.01)
            http = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            yield Api(http, url, served[0].engine, catalogue, bundle)
        finally:
            server.should_exit = True
            thread.join()


def multipart(images: Sequence[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """The field `images`, once for each."""
    return [("images", (f"{index}.jpg", data)) for index, data in enumerate(images)]


def photo(seed: int, *, size_px: tuple[int, int] = (96, 64), image_format: str = "JPEG") -> bytes:
    """A picture of its own for each seed: broad fields of random colours, which resizing keeps apart."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(blocks).resize(size_px, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, image_format)
    return file.getvalue()


def zeros_png(width_px: int, height_px: int) -> bytes:
    """A small file that declares a large picture."""
    file = io.BytesIO()
    Image.new("1", (width_px, height_px)).save(file, "PNG")
    return file.getvalue()
