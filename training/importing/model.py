"""What an import finds out about somebody else's model, before anything is written."""

from dataclasses import dataclass, field

from torch import Tensor

from dino_core.preprocess import Preprocessing
from dino_core.vit import PositionInterpolation
from training.importing.architecture import Architecture
from training.importing.heads import Heads


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model that others made, as a network of timm's.

    Attributes:
        source: As the user named it.
        kind: What it is, for people.
        fingerprint: Which weights exactly: "sha256:…" of the file, or the name of published ones.
        architecture: timm's network.
        network: Exactly its tensors, in float32.
        heads: Projection heads that came along.
        ignored: Tensors that were left out, each with the reason.
        renamed: How many tensors have another name now, or are part of another.
        position_interpolation: How the source resamples its positions.
        preprocessing: From a picture to the network's input.
        notes: What the user should know: what was assumed, and what is other than in the source.
        licence: What is known of the weights' terms, in a sentence.
    """

    source: str
    kind: str
    fingerprint: str
    architecture: Architecture
    network: dict[str, Tensor]
    heads: Heads = field(default_factory=lambda: Heads(teacher={}, student={}))
    ignored: dict[str, str]
    renamed: int
    position_interpolation: PositionInterpolation
    preprocessing: Preprocessing
    notes: tuple[str, ...]
    licence: str
