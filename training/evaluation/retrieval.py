"""Category retrieval: how far up the images of the query's class are among all others.

Dimension key: N gallery · M queries · Q queries of a chunk · D embedding
"""

import torch
from torch import Tensor

from dino_core.ranking import cosines, expected_precisions, membership

# Bounds the similarity matrix: 256 queries against a million images are 2 GB in float64.
QUERIES_A_CHUNK = 256


@torch.no_grad()
def retrieval(
    gallery_ND: Tensor,
    gallery_labels_N: Tensor,
    queries_MD: Tensor | None = None,
    query_labels_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Precision of the first neighbour, and average precision, of each query, by `expected_precisions`.

    Args:
        gallery_ND: Embeddings of length 1.
        gallery_labels_N: int64.
        queries_MD: None: each image of the gallery asks for the others.
        query_labels_M: With queries only.

    Returns:
        P@1 and AP, float64 [M], from 0 to 1; NaN for a query that has no image of its class in the gallery.
    """
    alone = queries_MD is None or query_labels_M is None
    gallery_ND = gallery_ND.double()
    queries_MD = gallery_ND if queries_MD is None else queries_MD
    labels_M = gallery_labels_N if query_labels_M is None else query_labels_M
    firsts, averages = [], []
    for start in range(0, len(queries_MD), QUERIES_A_CHUNK):
        chunk = slice(start, start + QUERIES_A_CHUNK)
        cosines_QN = cosines(queries_MD[chunk], gallery_ND)
        same_QN = labels_M[chunk, None] == gallery_labels_N
        if alone:  # itself comes last, and counts for nothing
            rows = torch.arange(len(cosines_QN))
            cosines_QN[rows, rows + start] = -torch.inf
            same_QN[rows, rows + start] = False
        first_Q, average_Q = expected_precisions(cosines_QN, same_QN)
        asked_Q = same_QN.any(dim=1)
        firsts.append(torch.where(asked_Q, first_Q, torch.nan))
        averages.append(torch.where(asked_Q, average_Q, torch.nan))
    return torch.cat(firsts), torch.cat(averages)


@torch.no_grad()
def neighbour_overlap(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, k: int, alone: bool = False
) -> Tensor:
    """How many of the k nearest are the same by two embeddings of the same images, as a share of k.

    Where several tie for the last places, it is the share to be expected: of two rankings that know nothing,
    k / N.

    Args:
        first: Queries [M, D] and gallery [N, D], of length 1.
        second: The same images by other vectors, of any dimension, of length 1.
        k: At most N, or N - 1 if `alone`.
        alone: Whether the queries are the gallery, and an image is no neighbour of its own.

    Returns:
        float64 [M], from 0 to 1.
    """
    galleries = (first[1].double(), second[1].double())
    shares = []
    for start in range(0, len(first[0]), QUERIES_A_CHUNK):
        likely = []
        for (queries_MD, _), gallery_ND in zip((first, second), galleries, strict=True):
            cosines_QN = cosines(queries_MD[start : start + QUERIES_A_CHUNK], gallery_ND)
            if alone:
                rows = torch.arange(len(cosines_QN))
                cosines_QN[rows, rows + start] = -torch.inf
            likely.append(membership(cosines_QN, k))
        shares.append((likely[0] * likely[1]).sum(dim=1) / k)
    return torch.cat(shares)
