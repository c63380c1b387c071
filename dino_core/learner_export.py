"""A teacher that was trained in somebody's own loop -> a bundle.

A bundle names a timm model, so that it can be loaded without the code of the net that was trained. Whether
that model, with the teacher's weights, is the teacher is not believed but tried.

Dimension key: B images · C channels · H W pixels · D embedding
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dino_core.backbones import Backbone, HookedBackbone, Pooling, make_backbone
from dino_core.bundle import Manifest, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BackboneError, BundleError
from dino_core.positions import ResampledPositions
from dino_core.preprocess import Preprocessing

# Fused and plain kernels round apart; another layer or pooling is far from this.
RELATIVE_TOLERANCE = 1e-3


def export_teacher(
    teacher: nn.Module,
    path: Path | str,
    *,
    architecture: str | None,
    model_kwargs: Mapping[str, object],
    preprocessing: Preprocessing,
    card: str | None,
    overwrite: bool,
) -> Manifest:
    """Writes a teacher's backbone as a bundle.

    Args:
        teacher: A `Backbone`, or any network cut at a layer.
        path: Directory to make.
        architecture: timm's name for the network; None asks the network itself.
        model_kwargs: Further arguments of the timm model.
        preprocessing: What images go through; its crop is the network's image size.
        card: Text of the model card; None for a short one.
        overwrite: Whether a bundle that is there already gives way.

    Returns:
        What the bundle says of itself.

    Raises:
        BundleError: No timm model is known that gives the teacher's embeddings.
    """
    backbone, pooling = _as_timm(
        teacher, architecture, image_size_px=preprocessing.crop_px, model_kwargs=model_kwargs
    )
    model = EmbeddingModel(backbone, preprocessing=preprocessing, pooling=pooling)
    return write_bundle(
        path,
        model,
        provenance={"method": "DINO", "made_by": "dino_core.learner.Dino.export"},
        card=card or _card(Path(path).name, backbone, preprocessing),
        overwrite=overwrite,
    )


def _as_timm(
    teacher: nn.Module, architecture: str | None, *, image_size_px: int, model_kwargs: Mapping[str, object]
) -> tuple[Backbone, Pooling]:
    """Rebuilds a teacher with timm, on the CPU, and finds the pooling that gives its embeddings."""
    if isinstance(teacher, Backbone):
        backbone = make_backbone(
            teacher.architecture,
            image_size_px=teacher.image_size_px,
            in_channels=teacher.in_channels,
            position_interpolation=teacher.position_interpolation,
            model_kwargs=teacher.model_args,
        )
        backbone.network.load_state_dict(teacher.network.state_dict(), strict=True)
        return backbone.eval(), teacher.default_pooling
    hooked = teacher.backbone if isinstance(teacher, ResampledPositions) else teacher
    assert isinstance(hooked, HookedBackbone)
    net = hooked.net
    name = architecture or getattr(net, "pretrained_cfg", {}).get("architecture")
    if name is None:
        raise BundleError(
            f"a bundle names the timm model that its weights are for, {type(net).__name__} doesn't: "
            "give architecture=, such as 'resnet18' for torchvision's ResNet-18; a network that timm hasn't "
            "got can be kept with torch.save(learner.teacher.state_dict(), ...)"
        )
    try:
        backbone = make_backbone(
            name,
            image_size_px=image_size_px,
            position_interpolation="antialias",  # timm's, as the network does it by itself
            model_kwargs=model_kwargs,
        ).eval()
        wanted = backbone.network.state_dict()
        weights = net.state_dict()
        backbone.network.load_state_dict({key: t for key, t in weights.items() if key in wanted})
    except (BackboneError, RuntimeError) as error:
        raise BundleError(
            f"the weights of {type(net).__name__} are not those of timm's {name} with {dict(model_kwargs)}: "
            f"{error}"
        ) from error
    return backbone, _pooling_of(teacher, backbone, name, image_size_px)


@torch.no_grad()
def _pooling_of(teacher: nn.Module, backbone: Backbone, name: str, image_size_px: int) -> Pooling:
    device = next(teacher.parameters()).device
    images = torch.rand(
        2, backbone.in_channels, image_size_px, image_size_px, generator=torch.Generator().manual_seed(0)
    )
    expected_BD = teacher(images.to(device)).cpu()
    features = backbone.features(images)
    for pooling in backbone.poolings:
        if _same(features.pooled(pooling), expected_BD):
            return pooling
    raise BundleError(
        f"timm's {name} holds the teacher's weights and gives other embeddings, with every pooling of "
        f"{', '.join(backbone.poolings)}: choose the hidden_layer that ends the network before its classifier"
    )


def _same(ours_BD: Tensor, expected_BD: Tensor) -> bool:
    if ours_BD.shape != expected_BD.shape:
        return False
    return bool((ours_BD - expected_BD).norm() <= RELATIVE_TOLERANCE * expected_BD.norm())


def _card(name: str, backbone: Backbone, preprocessing: Preprocessing) -> str:
    return (
        f"# {name}\n\n"
        f"A {backbone.architecture} trained without labels, by DINO self-distillation; these are the "
        f"teacher's weights. It gives embeddings of {backbone.embed_dim} numbers for pictures of "
        f"{preprocessing.crop_px} px.\n\n"
        "Nobody has written down yet what it was trained on, what it is good for and how well it does.\n"
    )
