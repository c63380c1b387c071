"""Principal components: patches as colours, images as places on a map.

Dimension key: N rows · B images · P patches of an image · D embedding
"""

import torch
from torch import Tensor
from torch.nn import functional


def patch_colours(patches_BPD: Tensor) -> Tensor:
    """The first three principal components of all patches together, each scaled to [0, 1].

    Returns:
        [B, P, 3]
    """
    flat = torch.nan_to_num(patches_BPD.flatten(0, 1))
    scores = principal_components(flat, count=3)
    low, high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).reshape(*patches_BPD.shape[:2], -1)


def map_of(features_ND: Tensor) -> Tensor:
    """Two principal components of each image, rounded for a file.

    Returns:
        [N, 2]
    """
    return principal_components(features_ND, count=2).double().mul(1e4).round().div(1e4)


def principal_components(rows_ND: Tensor, *, count: int) -> Tensor:
    """Scores along the first principal components; the skew of each is positive, so that signs stay.

    Returns:
        float32 [N, count]; zeros where there are fewer dimensions.
    """
    centred = rows_ND.double() - rows_ND.double().mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    scores = centred @ directions.flip(1)[:, :count]
    scores = scores * torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)
    return functional.pad(scores, (0, count - scores.shape[1])).float()
