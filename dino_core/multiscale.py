"""One embedding of several sizes of a picture: the mean of the embeddings at each, of length 1.

Reference: the retrieval and copy detection of the official code (facebookresearch/dino, `multi_scale` in
`utils.py`), which adds up what the network gives; here each size has the same say.

Dimension key: B images · C channels · H W pixels · D embedding · S scales
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_core.embedding import EmbeddingModel
from dino_core.errors import BackboneError
from dino_core.preprocess import Preprocessing


class MultiScale(nn.Module):
    """A model that looks at each picture at several sizes; costs the sum of the squares of the scales. Final.

        normalise(mean over S of normalise(model(resized(pixels, scale))))

    Sizes are made of the model's own input, so nothing is seen beyond its crop; a ViT's are rounded to whole
    patches.

    Args:
        model: Shared, not copied.
        scales: Of the side of its input, above 0, each once.

    Raises:
        BackboneError: The scales are none, or not above 0, or two of them make the same size.
    """

    def __init__(self, model: EmbeddingModel, scales: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        patch_px = _patch_px(model.backbone.network)
        side_px = model.preprocessing.crop_px
        self.sides_px = [patch_px * round(side_px * scale / patch_px) for scale in scales]
        if not self.sides_px or min(self.sides_px) <= 0 or len(set(self.sides_px)) < len(self.sides_px):
            raise BackboneError(
                f"scales {tuple(scales)} make sides of {self.sides_px} px of {side_px}: give numbers above 0 "
                "that make different sizes, such as 0.71 1 1.41"
            )

    @property
    def preprocessing(self) -> Preprocessing:
        """The model's."""
        return self.model.preprocessing

    @property
    def dimensions(self) -> int:
        """Length of an embedding."""
        return self.model.dimensions

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Embeds uint8 pixels, as the model takes them: float32 [B, D] of length 1."""
        embeddings_SBD = torch.stack([self.model(resized(pixels_BCHW, side)) for side in self.sides_px])
        return functional.normalize(functional.normalize(embeddings_SBD, dim=2).mean(dim=0), dim=1)


def resized(pixels_BCHW: Tensor, side_px: int) -> Tensor:
    """Square uint8 pictures at another size: bicubic, antialiased, as the preprocessing resizes."""
    if pixels_BCHW.shape[-1] == side_px:
        return pixels_BCHW
    # Through float32, as CUDA has no such resize of bytes.
    other_BCHW = functional.interpolate(
        pixels_BCHW.float(), size=(side_px, side_px), mode="bicubic", antialias=True
    )
    return other_BCHW.round().clamp(0, 255).to(torch.uint8)


def _patch_px(network: nn.Module) -> int:
    """Side of a ViT's patch; 1 for networks that take any size."""
    patch_size = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return int(patch_size[0] if isinstance(patch_size, tuple) else patch_size)
