"""Category retrieval: how far up the images of the query's class are among all others.

Dimension key: N gallery · M queries · Q queries of a chunk · D embedding
"""

import torch
from torch import Tensor

# Bounds the similarity matrix: 256 queries against a million images are 1 GB in float32.
QUERIES_A_CHUNK = 256


@torch.no_grad()
def retrieval(
    gallery_ND: Tensor,
    gallery_labels_N: Tensor,
    queries_MD: Tensor | None = None,
    query_labels_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Precision of the first neighbour, and average precision, of each query.

        for each query: rank the gallery by cosine
            P@1 = whether the first has the query's class
            AP  = mean over ranks r of images of its class of (images of its class among the first r) / r

    Args:
        gallery_ND: Embeddings of length 1.
        gallery_labels_N: int64.
        queries_MD: None: each image of the gallery asks for the others.
        query_labels_M: With queries only.

    Returns:
        P@1 (0 or 1) and AP, float32, of the queries that have an image of their class in the gallery; mean AP
        is the mean of the second.
    """
    alone = queries_MD is None or query_labels_M is None
    queries_MD = gallery_ND if queries_MD is None else queries_MD
    labels_M = gallery_labels_N if query_labels_M is None else query_labels_M
    firsts, averages = [], []
    for start in range(0, len(queries_MD), QUERIES_A_CHUNK):
        chunk = slice(start, start + QUERIES_A_CHUNK)
        likeness_QN = queries_MD[chunk] @ gallery_ND.T
        same_QN = labels_M[chunk, None] == gallery_labels_N
        if alone:  # itself comes last, and counts for nothing
            rows = torch.arange(len(likeness_QN))
            likeness_QN[rows, rows + start] = -torch.inf
            same_QN[rows, rows + start] = False
        hits_QN = same_QN.gather(1, likeness_QN.argsort(dim=1, descending=True, stable=True)).float()
        ranks_N = torch.arange(1, len(gallery_ND) + 1, dtype=torch.float32)
        precisions_QN = hits_QN.cumsum(dim=1) / ranks_N
        relevant_Q = hits_QN.sum(dim=1)
        asked = relevant_Q > 0
        firsts.append(hits_QN[asked, 0])
        averages.append(((precisions_QN * hits_QN).sum(dim=1)[asked]) / relevant_Q[asked])
    return torch.cat(firsts), torch.cat(averages)
