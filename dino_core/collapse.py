"""Measures of collapse: is the network still telling images apart?

Healthy runs keep the teacher's entropy between 0 and log K, use many prototypes, and spread features in many
directions. None of these needs labels.

Dimension key: N images (or rows) · K prototypes · D embedding
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

# Garrido et al. add it to the normalised singular values so that the logarithm of a zero is finite.
RANK_EPSILON = 1e-7


def mean_entropy(probs_NK: Tensor) -> Tensor:
    """Mean entropy of rows, as a share of its maximum.

    Args:
        probs_NK: Rows that sum to 1, any leading axes; K at least 2.

    Returns:
        A scalar from 0 (each row is one prototype: sharpening without centring) to 1 (each row is uniform:
        centring without sharpening); both ends are collapse.

    Reference: Caron et al. 2021, section 5.3, https://arxiv.org/abs/2104.14294
    """
    entropies_N: Tensor = torch.special.entr(probs_NK).sum(dim=-1)
    return entropies_N.mean() / math.log(probs_NK.shape[-1])


def prototype_usage(probs_NK: Tensor) -> Tensor:
    """Share of the prototypes that the batch as a whole makes use of.

        exp(entropy of the mean row) / K

    Args:
        probs_NK: Rows that sum to 1, any leading axes.

    Returns:
        A scalar from 1/K (one prototype takes all images) to 1 (all are used alike). N rows of one prototype
        each can use at most N / K.
    """
    mean_K = probs_NK.flatten(0, -2).float().mean(dim=0)
    entropy: Tensor = torch.special.entr(mean_K).sum()
    return entropy.exp() / probs_NK.shape[-1]


def feature_std(features_ND: Tensor) -> Tensor:
    """Spread of the embeddings' directions.

    Args:
        features_ND: One row an image; lengths don't matter. At least 2 rows.

    Returns:
        Mean over dimensions of the standard deviation over images of the rows at length 1, times sqrt(D):
        about 1 when directions fill the sphere, 0 when all images share one.

    Reference: Chen and He 2021, section 4.1, https://arxiv.org/abs/2011.10566
    """
    directions_ND = functional.normalize(features_ND.float(), dim=-1)
    return directions_ND.std(dim=0).mean() * math.sqrt(features_ND.shape[-1])


def rank_me(features_ND: Tensor) -> Tensor:
    """Effective number of directions that the embeddings use.

        exp(entropy of the singular values, divided by their sum)

    Args:
        features_ND: One row an image; best with more rows than dimensions.

    Returns:
        A scalar from 1 (all images on one line) to min(N, D).

    Reference: Garrido et al. 2023, eq. 1, https://arxiv.org/abs/2210.02885
    """
    singular_values = torch.linalg.svdvals(features_ND.float())
    shares = singular_values / singular_values.sum().clamp_min(RANK_EPSILON) + RANK_EPSILON
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()
