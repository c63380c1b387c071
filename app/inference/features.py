"""What else a bundle's network says of pictures: other poolings, patches, attention.

Computed by torch on the device thread, whatever computes the embeddings: these are rare beside them.

Dimension key: B images · C channels · H W pixels · N patches · D features · A attention heads · Y X patches
"""

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.errors import OutputUnavailable
from app.inference.batcher import DeviceLost
from dino_core.backbones import Features, Pooling
from dino_core.bundle import Bundle, fingerprint_of
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BackboneError

Reading: TypeAlias = Literal["cls", "mean", "cls+mean", "patches", "attention"]
Array: TypeAlias = NDArray[np.float32]

# Attention over all pairs of tokens is large: at 518 px and 14 px a patch, 12 heads have 90 MB an image.
_AT_ONCE: Final = 8


class FeatureReader:
    """Reads features of pictures out of a bundle's network. One thread at a time calls `warm_up` and `read`.

    Poolings are the network's own: without what a bundle does to its embedding after pooling.

    Args:
        bundle: Loaded.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._network = bundle.model
        self._device = next(bundle.model.parameters()).device
        self._fingerprints: dict[tuple[Pooling, bool], str] = {}
        self._shapes: dict[Reading, tuple[int, ...]] = {}
        self._reasons: dict[Reading, str] = {}
        self.grid_hw: tuple[int, int] | None = None  # of the patches, once warm

    def warm_up(self) -> None:
        """Learns from a black picture what the network can say, and in which shape."""
        crop_px = self._network.preprocessing.crop_px
        black_BCHW = torch.zeros((1, 3, crop_px, crop_px), dtype=torch.uint8, device=self._device)
        with torch.inference_mode():
            try:
                self._learn(self._network.features(black_BCHW))
            except BackboneError as error:
                self._reasons |= dict.fromkeys(("patches", *get_args(Pooling)), str(error))
            try:
                self._shapes["attention"] = self._network.attention_maps(black_BCHW).shape[1:]
            except BackboneError as error:
                self._reasons["attention"] = str(error)

    def _learn(self, features: Features) -> None:
        self.grid_hw = features.grid_hw
        self._shapes["patches"] = features.patches_BND.shape[1:]
        for pooling in get_args(Pooling):
            try:
                self._shapes[pooling] = features.pooled(pooling).shape[1:]
            except BackboneError as error:
                self._reasons[pooling] = str(error)

    def shape_of(self, reading: Reading) -> tuple[int, ...]:
        """Shape of one picture's values: [D], [N, D] of patches, [A, Y, X] of attention.

        Raises:
            OutputUnavailable: The network has no such thing.
        """
        if reading not in self._shapes:
            raise OutputUnavailable(self._reasons.get(reading, "the model is not warmed up"))
        return self._shapes[reading]

    def read(self, reading: Reading, chunks: Sequence[Tensor]) -> Array:
        """Computes at once.

        Args:
            reading: What is asked for.
            chunks: As of `Embedder.launch`.

        Returns:
            float32 [B, …], see `shape_of`.

        Raises:
            BackboneError: The network has no such thing.
            DeviceLost: The device reports an error after which it does nothing more in this process.
        """
        parts = torch.cat(list(chunks)).split(_AT_ONCE)  # type: ignore[no-untyped-call]
        try:
            with torch.inference_mode():
                values = [self._values(reading, part.to(self._device)).float().cpu() for part in parts]
        except torch.AcceleratorError as error:
            raise DeviceLost from error
        joined: Array = torch.cat(values).numpy()
        return joined

    def fingerprint(self, pool: Pooling, *, normalise: bool) -> str:
        """The fingerprint of a bundle of the same network that pools so; reads all weights the first time."""
        key = (pool, normalise)
        if key not in self._fingerprints:
            model = EmbeddingModel(
                self._network.backbone,
                preprocessing=self._network.preprocessing,
                pooling=pool,
                normalise=normalise,
            )
            self._fingerprints[key] = fingerprint_of(model)
        return self._fingerprints[key]

    def _values(self, reading: Reading, pixels_BCHW: Tensor) -> Tensor:
        if reading == "attention":
            return self._network.attention_maps(pixels_BCHW)
        features = self._network.features(pixels_BCHW)
        return features.patches_BND if reading == "patches" else features.pooled(reading)
