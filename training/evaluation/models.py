"""What a user names on the command line -> a model to measure.

models/NAME                      a bundle
runs/NAME                        a run: the teacher of its newest checkpoint that is whole
runs/NAME/checkpoints/step-…     the teacher of that checkpoint
timm:resnet50.a1_in1k            a timm model with its published weights, where the internet has them
timm:resnet50 --untrained        the same network with random weights
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dino_core.backbones import make_backbone
from dino_core.bundle import load_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.manifest import MANIFEST
from training.checkpoint import DESCRIPTION_FILE, checkpoints_in, load_checkpoint
from training.errors import CheckpointError, ConfigError
from training.export import teacher_model
from training.importing.published import TIMM, published_weights
from training.starting import described


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model, what to call it, and which one exactly it is, if that is known.

    Attributes:
        name: For people.
        model: On the device asked for.
        fingerprint: A bundle's.
        remarks: What a user must know: that a damaged checkpoint was passed over.
    """

    name: str
    model: EmbeddingModel
    fingerprint: str | None = None
    remarks: tuple[str, ...] = ()


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
        CheckpointError: The checkpoint is, or all of the run's are.
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
        return _from_run(path, device)
    bundle = load_bundle(path, device=device)
    return NamedModel(name=bundle.manifest.id, model=bundle.model, fingerprint=bundle.manifest.fingerprint)


def _from_run(run: Path, device: torch.device) -> NamedModel:
    checkpoints = checkpoints_in(run / "checkpoints")
    if not checkpoints:
        raise ConfigError(f"{run} has no checkpoint yet: wait for its first, or name another run")
    refused: list[str] = []
    for checkpoint in checkpoints:
        try:
            return replace(_from_checkpoint(checkpoint, device), remarks=tuple(refused))
        except CheckpointError as error:
            refused.append(f"passed over {checkpoint.name}: {error}")
    raise CheckpointError(f"no checkpoint in {run / 'checkpoints'} can be used; the newest: {refused[0]}")


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
            what.removeprefix(TIMM), {}, instead="measure the network with random weights by --untrained"
        )
        backbone.network.load_state_dict(weights, strict=True)
    return EmbeddingModel(backbone, preprocessing=start.preprocessing, pooling=backbone.default_pooling)
