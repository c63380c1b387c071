"""What may follow pooling: centring, the strongest directions, whitening; fitted on images without labels.

Dimension key: N images · B images of a batch · D embedding before · E embedding after
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_core.errors import ProjectionError

# Of the strongest direction's variance, added to all: noise in the weakest is not blown up to signal.
_FLOOR = 1e-2


class Projection(nn.Module):
    """An affine map of embeddings of length 1.

        y = (x / |x| - mean) @ matrix

    Args:
        mean_D: float32, what all images have in common.
        matrix_DE: float32, the directions that are kept, as columns.

    Raises:
        ProjectionError: The shapes don't fit, or a value is not finite.
    """

    def __init__(self, mean_D: Tensor, matrix_DE: Tensor) -> None:
        super().__init__()
        if mean_D.ndim != 1 or matrix_DE.ndim != 2 or len(mean_D) != len(matrix_DE):
            raise ProjectionError(
                f"mean {list(mean_D.shape)} and matrix {list(matrix_DE.shape)} are no projection: "
                "expected [D] and [D, E]"
            )
        if not (torch.isfinite(mean_D).all() and torch.isfinite(matrix_DE).all()):
            raise ProjectionError("the projection has NaN or infinite values: fit it again")
        self.register_buffer("mean_D", mean_D.float().contiguous())
        self.register_buffer("matrix_DE", matrix_DE.float().contiguous())

    @property
    def input_dimensions(self) -> int:
        """D, the length of what it takes."""
        return int(self.get_buffer("matrix_DE").shape[0])

    @property
    def dimensions(self) -> int:
        """E, the length of what it gives."""
        return int(self.get_buffer("matrix_DE").shape[1])

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        """Gives float32 [B, E]; not of length 1."""
        unit_BD = functional.normalize(embeddings_BD.float(), dim=1)
        projected_BE: Tensor = (unit_BD - self.get_buffer("mean_D")) @ self.get_buffer("matrix_DE")
        return projected_BE


@torch.no_grad()
def fit_projection(embeddings_ND: Tensor, *, dimensions: int, whitening: float = 0.0) -> Projection:
    """Fits a projection to embeddings: principal components, optionally evened out.

        matrix = V[:, :E] * (variance[:E] + floor) ** (-whitening / 2)

    Args:
        embeddings_ND: Of images that are like those to come; no labels are needed.
        dimensions: E, of which the strongest are kept.
        whitening: 0 keeps cosines between centred embeddings as they are (but for what is cut off); 1 gives
            all directions the same variance; between them it is a compromise.

    Returns:
        The projection; the sign of each direction is fixed, so that equal data give equal tensors.

    Raises:
        ProjectionError: More directions than there can be, or another number out of its bounds.

    Reference: Jégou and Chum 2012, "Negative evidences and co-occurrences in image retrieval", section 3.
    """
    count, input_dimensions = embeddings_ND.shape
    if not 0 <= whitening <= 1:
        raise ProjectionError(f"whitening is {whitening}, and must be from 0 to 1")
    if not 1 <= dimensions <= input_dimensions:
        raise ProjectionError(
            f"{dimensions} dimensions cannot be kept of {input_dimensions}: give 1 to {input_dimensions}"
        )
    if count <= dimensions:
        raise ProjectionError(
            f"{count} images span fewer than {dimensions} directions: give more than {dimensions} images, or "
            "keep fewer dimensions"
        )
    unit_ND = functional.normalize(embeddings_ND.double(), dim=1)
    mean_D = unit_ND.mean(dim=0)
    variances_D, directions_DD = torch.linalg.eigh((unit_ND - mean_D).T @ (unit_ND - mean_D) / count)
    variances_E = variances_D.flip(0)[:dimensions].clamp(min=0)
    directions_DE = directions_DD.flip(1)[:, :dimensions]
    largest = directions_DE.abs().argmax(dim=0, keepdim=True)
    directions_DE = directions_DE * directions_DE.gather(0, largest).sign()
    scale_E = (variances_E + _FLOOR * variances_E[0]) ** (-whitening / 2)
    return Projection(mean_D.float(), (directions_DE * scale_E).float())


@torch.no_grad()
def kept_variance(embeddings_ND: Tensor, projection: Projection) -> float:
    """Gives the share, from 0 to 1, of the embeddings' variance that the projection's directions hold."""
    centred_ND = functional.normalize(embeddings_ND.float(), dim=1) - projection.get_buffer("mean_D")
    matrix_DE = projection.get_buffer("matrix_DE")
    kept_NE = centred_ND @ functional.normalize(matrix_DE, dim=0)
    return float(kept_NE.square().sum() / centred_ND.square().sum())
