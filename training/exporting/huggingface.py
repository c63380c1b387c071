"""A model -> a directory that transformers opens with `AutoModel.from_pretrained`, compared with ours before.

    config.json                what the model is
    model.safetensors          its tensors
    preprocessor_config.json   our preprocessing, as `AutoImageProcessor` reads it
    README.md                  how its output becomes our embedding, and how well the two agree

Dimension key: B images · D embedding
"""

import importlib
import json
import secrets
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dino_core.bundle import reference_embeddings
from dino_core.embedding import EmbeddingModel
from dino_core.errors import ConversionError
from dino_core.parity import MIN_AGREEMENT, reference_pixels
from dino_core.preprocess import Preprocessing, normalise
from training.errors import ConfigError
from training.exporting.transformers_names import as_transformers

# Both compute in float32 and in the same order, but for how attention is split.
MAX_DIFFERENCE = 1e-4


def write_transformers(model: EmbeddingModel, out: Path, *, name: str) -> tuple[float, float]:
    """Writes a directory of transformers, once it computes what ours does.

    Args:
        model: In float32, on the CPU.
        out: The directory to make.
        name: What the card calls it.

    Returns:
        The lowest cosine of the reference pictures' embeddings with ours, and the largest difference of any
        number.

    Raises:
        ConfigError: Something is at `out`.
        ConversionError: transformers is missing, has no such model, or computes something else.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: give --hf another name, or move it away")
    if model.projection is not None:
        raise ConversionError(
            "transformers' models have nothing like the projection that follows this bundle's pooling: "
            "export it to ONNX with --onnx, or export the bundle that it was fitted on"
        )
    config, tensors = as_transformers(model.backbone, crop_px=model.preprocessing.crop_px)
    transformers = _transformers()
    partial = out.absolute().parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        contiguous = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
        save_file(contiguous, partial / "model.safetensors", metadata={"format": "pt"})
        processor = json.dumps(_processor(model.preprocessing), indent=2)
        (partial / "preprocessor_config.json").write_text(processor + "\n")
        cosine, difference = _compared(transformers, partial, model)
        (partial / "README.md").write_text(_card(name, model, cosine=cosine, difference=difference))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return cosine, difference


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConversionError(
            "transformers is needed to compare its model with ours, and is not installed: pip install "
            "'transformers>=5'"
        ) from error


@torch.no_grad()
def _compared(transformers: ModuleType, directory: Path, model: EmbeddingModel) -> tuple[float, float]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        theirs, report = transformers.AutoModel.from_pretrained(
            directory, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # a configuration that it doesn't bear: it raises anything
        raise ConversionError(
            f"transformers cannot make {model.backbone.architecture} ({type(error).__name__}: {error})"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    # A pooler that we don't have, and nobody asks, is drawn at random.
    wrong = [
        *(key for key in report["missing_keys"] if not key.startswith("pooler.")),
        *report["unexpected_keys"],
        *(str(key) for key in report["mismatched_keys"]),
    ]
    if wrong:
        raise ConversionError(
            f"transformers has other tensors for {model.backbone.architecture}, such as {wrong[0]}: it is "
            "another network there"
        )
    pixels = reference_pixels(model.preprocessing)
    preprocessing = model.preprocessing
    images = normalise(pixels, mean=preprocessing.mean, std=preprocessing.std)
    found_BD = _embedding(theirs.eval()(images), model)
    expected_BD = reference_embeddings(model)
    cosine = float(functional.cosine_similarity(found_BD, expected_BD).min())
    difference = float((found_BD - expected_BD).abs().max() / expected_BD.abs().max())
    if not (
        cosine >= MIN_AGREEMENT and difference <= MAX_DIFFERENCE
    ):  # so written that NaN is refused as well
        raise ConversionError(
            f"transformers computes something else than ours from {model.backbone.architecture}: cosine "
            f"{cosine:.6f}, largest difference {difference:.1e} of the largest number; nothing was written"
        )
    return cosine, difference


def _embedding(output: Any, model: EmbeddingModel) -> Tensor:  # noqa: ANN401  transformers' output
    """Our pooling of transformers' output [B, D]."""
    if output.last_hidden_state.ndim == 4:
        pooled_BD: Tensor = output.last_hidden_state.mean(dim=(2, 3))
    else:
        tokens = output.last_hidden_state
        prefix = int(getattr(model.backbone.network, "num_prefix_tokens", 1))
        cls_BD, mean_BD = tokens[:, 0], tokens[:, prefix:].mean(dim=1)
        by_pooling = {"cls": cls_BD, "mean": mean_BD, "cls+mean": torch.cat([cls_BD, mean_BD], dim=1)}
        pooled_BD = by_pooling[model.pooling]
    return functional.normalize(pooled_BD, dim=1) if model.normalise else pooled_BD


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize_px},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": preprocessing.crop_px, "width": preprocessing.crop_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _card(name: str, model: EmbeddingModel, *, cosine: float, difference: float) -> str:
    prefix = int(getattr(model.backbone.network, "num_prefix_tokens", 1))
    tokens = "output.last_hidden_state"
    cls, mean = f"{tokens}[:, 0]", f"{tokens}[:, {prefix}:].mean(dim=1)"
    pooled = {"cls": cls, "mean": mean, "cls+mean": f"torch.cat([{cls}, {mean}], dim=1)"}[model.pooling]
    if not hasattr(model.backbone.network, "num_prefix_tokens"):
        pooled = f"{tokens}.mean(dim=(2, 3))"
    if model.normalise:
        pooled = f"torch.nn.functional.normalize({pooled}, dim=1)"
    return f"""# {name}

An image embedding, exported by dinoserve for Hugging Face's transformers (`{model.backbone.architecture}`
of timm).

```python
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}").eval()
with torch.no_grad():
    output = model(**processor(images=image, return_tensors="pt"))
embedding = {pooled}
```

On dinoserve's reference pictures, from the same pixels, this model's embeddings have a cosine of at least
{cosine:.7f} with dinoserve's, and no number differs by more than {difference:.1e} of the largest. That holds
for crops of {model.preprocessing.crop_px} px; at others transformers resamples learnt positions in its own
way. Its processor resizes with other code: a pixel may differ by a grey level.
"""
