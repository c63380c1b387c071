"""What a user names on the command line -> a model to measure.

models/NAME                      a bundle
runs/NAME                        a run: the teacher of its newest checkpoint
runs/NAME/checkpoints/step-…     the teacher of that checkpoint
timm:resnet50.a1_in1k            a timm model with its published weights, where the internet has them
timm:resnet50 --untrained        the same network with random weights
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dino_core.backbones import make_backbone
from dino_core.bundle import load_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.manifest import MANIFEST
from training.checkpoint import DESCRIPTION_FILE, checkpoints_in, load_checkpoint
from training.errors import ConfigError
from training.export import teacher_model
from training.starting import TIMM, described, published_weights


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model, what to call it, and which one exactly it is, if that is known."""

    name: str
    model: EmbeddingModel
    fingerprint: str | None = None


def model_named(what: str, *, device: torch.device, untrained: bool = False, seed: int = 0) -> NamedModel:
    """Finds and loads a model.

    Args:
        what: See above.
        device: Where it goes.
        untrained: For timm's: random weights in place of the published ones.
        seed: Of the random weights.

    Raises:
        ConfigError: There is nothing of that name; or published weights are not to be had.
        BundleError: The bundle is damaged.
        CheckpointError: The checkpoint is.
    """
    if what.startswith(TIMM):
        model = _from_timm(what, untrained=untrained, seed=seed).to(device)
        return NamedModel(name=f"{what} untrained" if untrained else what, model=model)
    if untrained:
        raise ConfigError(f"--untrained goes with {TIMM}NAME, and {what} is none: name the network")
    path = Path(what)
    if not path.exists():
        raise ConfigError(
            f"{what} is not there: give a bundle (models/NAME), a run (runs/NAME), a checkpoint "
            f"(runs/NAME/checkpoints/step-…) or {TIMM}NAME"
        )
    if (path / DESCRIPTION_FILE).exists():
        return _from_checkpoint(path, device)
    if (path / "checkpoints").is_dir() and not (path / MANIFEST).exists():
        newest = checkpoints_in(path / "checkpoints")
        if not newest:
            raise ConfigError(f"{path} has no checkpoint yet: wait for its first, or name another run")
        return _from_checkpoint(newest[0], device)
    bundle = load_bundle(path, device=device)
    return NamedModel(name=bundle.manifest.id, model=bundle.model, fingerprint=bundle.manifest.fingerprint)


def _from_checkpoint(path: Path, device: torch.device) -> NamedModel:
    state, config = load_checkpoint(path, device=device)
    run = path.resolve().parent.parent.name
    return NamedModel(name=f"{run} at step {state.step}", model=teacher_model(state, config))


def _from_timm(what: str, *, untrained: bool, seed: int) -> EmbeddingModel:
    start = described(what)
    network = start.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(
            network.name,
            image_size_px=network.image_size_px,
            position_interpolation=network.position_interpolation,
        )
    if not untrained:
        weights = published_weights(
            what.removeprefix(TIMM), network, instead="measure the network with random weights by --untrained"
        )
        backbone.network.load_state_dict(weights, strict=True)
    return EmbeddingModel(backbone, preprocessing=start.preprocessing, pooling=backbone.default_pooling)
