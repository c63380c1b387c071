"""`GET /info`: which models, what they do to pixels, and every limit that a request can meet."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from app.api import answers
from app.api.embed import model_answer
from app.api.state import StateDep
from app.served_models import ServedModel
from dino_core.preprocess import SUPPORTED_FORMATS

router = APIRouter(tags=["operation"])


@router.get("/info", summary="Models and limits")
async def info(state: StateDep) -> Response:
    """Says what a client needs to know before it sends anything. `model` is the default of `models`."""
    settings, models = state["settings"], state["models"].all()
    limits = models[0].engine.config.limits
    described = [_described(model) for model in models]
    backends = {model.info.backend for model in models} - {"torch"}
    content = {
        "model": described[0],
        "models": described,
        "formats": list(SUPPORTED_FORMATS),
        "url_inputs": settings.allow_url_inputs,
        "limits": {
            "request_bytes": settings.max_request_bytes,
            "image_bytes": settings.max_image_bytes,
            "image_pixels": limits.max_pixels,
            "image_min_side_px": limits.min_side_px,
            "image_aspect_ratio": limits.max_aspect_ratio,
            "images_per_request": settings.max_client_batch_size,
            "concurrent_images": settings.max_concurrent_images,
            "request_timeout_s": settings.request_timeout_s,
            "max_request_timeout_s": settings.max_request_timeout_s,
        },
        "versions": {name: version(name) for name in ("dinoserve", "torch", *backends)},
    }
    return answers.structured(content, answers.JSON)


def _described(model: ServedModel) -> dict[str, Any]:
    manifest = model.manifest
    return model_answer(model.info) | {
        "bundle": model.path.name,
        "architecture": manifest.architecture,
        "pooling": manifest.pooling,
        "normalised": manifest.normalise,
        "input_px": model.engine.input_px,
        "backend": model.info.backend,
        "preprocessing": manifest.preprocessing.to_json(),
    }
