"""The product of training: uint8 pixels in, embedding out, in one module.

All that follows the host's work happens here, on the device: normalise, network, pooling, projection, length.
The module
is what a bundle holds and what the service captures, compiles or exports, so its forward asks nothing of the
values that it computes.

Dimension key: B images · C channels · H W pixels · D embedding
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_core.backbones import Backbone, Features, Pooling
from dino_core.errors import BackboneError, ProjectionError
from dino_core.preprocess import Preprocessing, normalise
from dino_core.projection import Projection


class EmbeddingModel(nn.Module):
    """A backbone with everything that decides its embedding. Always in evaluation mode; final.

    For half precision convert `model.backbone`, not the model: pixels are normalised and lengths computed in
    float32.

    Args:
        backbone: Shared, not copied, and put into evaluation mode: give a copy of one that is being trained.
        preprocessing: What its images go through.
        pooling: One of `backbone.poolings`.
        normalise: Whether embeddings get length 1.
        projection: What follows the pooling; shared, not copied.

    Raises:
        BackboneError: The backbone cannot pool so, or takes other channels than the preprocessing gives.
        ProjectionError: The projection takes embeddings of another length.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        preprocessing: Preprocessing,
        pooling: Pooling,
        normalise: bool = True,
        projection: Projection | None = None,
    ) -> None:
        super().__init__()
        if pooling not in backbone.poolings:
            raise BackboneError(
                f"{backbone.architecture} cannot pool by {pooling!r}, but by {', '.join(backbone.poolings)}"
            )
        if backbone.in_channels != preprocessing.channels:
            raise BackboneError(
                f"{backbone.architecture} takes {backbone.in_channels} channels, pictures have "
                f"{preprocessing.channels}"
            )
        pooled_dimensions = backbone.dimensions(pooling)
        if projection is not None and projection.input_dimensions != pooled_dimensions:
            raise ProjectionError(
                f"the projection takes {projection.input_dimensions} dimensions, {backbone.architecture} "
                f"gives {pooled_dimensions}: fit it to this network's embeddings"
            )
        self.backbone = backbone
        self.projection = projection
        self.preprocessing = preprocessing
        self.pooling: Pooling = pooling
        self.normalise = normalise
        # Not part of the weights: they are in the preprocessing.
        self.register_buffer("mean_C", torch.tensor(preprocessing.mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(preprocessing.std), persistent=False)
        self.train(False)

    @property
    def dimensions(self) -> int:
        """Length of an embedding."""
        if self.projection is not None:
            return self.projection.dimensions
        return self.backbone.dimensions(self.pooling)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: an embedding must not depend on its neighbours in the batch."""
        del mode
        return super().train(False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Embeds a batch.

        Args:
            pixels_BCHW: uint8, as `load_pixels` gives them, on the model's device.

        Returns:
            float32 [B, D], of length 1 if `normalise`.
        """
        images_BCHW = self._images(pixels_BCHW)
        if self.pooling == self.backbone.default_pooling:
            pooled_BD = self.backbone(images_BCHW)
        else:
            pooled_BD = self.backbone.features(images_BCHW).pooled(self.pooling)
        embeddings_BD: Tensor = pooled_BD.float() if self.projection is None else self.projection(pooled_BD)
        return functional.normalize(embeddings_BD, dim=1) if self.normalise else embeddings_BD

    def features(self, pixels_BCHW: Tensor) -> Features:
        """Gives class token and patches of a batch of uint8 pixels, before any scaling to length 1."""
        return self.backbone.features(self._images(pixels_BCHW))

    def attention(self, pixels_BCHW: Tensor) -> Tensor:
        """Gives the last block's attention [B, heads, tokens, tokens] for a batch of uint8 pixels."""
        return self.backbone.attention(self._images(pixels_BCHW))

    def attention_maps(self, pixels_BCHW: Tensor) -> Tensor:
        """Gives how much each patch is looked at [B, heads, rows, columns]; see `Backbone.attention_maps`."""
        return self.backbone.attention_maps(self._images(pixels_BCHW))

    def _images(self, pixels_BCHW: Tensor) -> Tensor:
        if pixels_BCHW.dtype != torch.uint8:
            raise TypeError(f"pixels are {pixels_BCHW.dtype}, expected torch.uint8 from 0 to 255")
        images_BCHW = normalise(pixels_BCHW, mean=self.get_buffer("mean_C"), std=self.get_buffer("std_C"))
        return images_BCHW.to(self.backbone.dtype)
