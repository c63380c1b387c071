"""The weighted k-nearest-neighbour classifier that self-supervised papers report.

It has nothing to train, so its accuracy says how well the embedding space itself is laid out.

Dimension key: N reference images · M queries · D embedding · C classes

Reference: Wu et al. 2018, section 3.4, https://arxiv.org/abs/1805.01978; as in `eval_knn.py` of
https://github.com/facebookresearch/dino, without its limit of at least 100 queries.
"""

import torch
from torch import Tensor

# Bounds the similarity matrix: 512 queries against a million images are 2 GB in float32.
QUERIES_A_CHUNK = 512


@torch.no_grad()
def weighted_knn(
    train_ND: Tensor,
    train_labels_N: Tensor,
    queries_MD: Tensor,
    *,
    k: int,
    num_classes: int,
    temperature: float = 0.07,
) -> Tensor:
    """Ranks the classes of each query by the votes of its nearest neighbours.

        vote of a neighbour = exp(similarity / temperature), for its class

    Args:
        train_ND: Embeddings of length 1, so that a dot product is a cosine.
        train_labels_N: Their classes, int64, from 0 to C - 1.
        queries_MD: Embeddings of length 1.
        k: Neighbours that vote; at most N.
        num_classes: C.
        temperature: Above 0; the papers use 0.07.

    Returns:
        Classes [M,C], best first; column 0 is the prediction. Classes of equal votes come in ascending order.

    Raises:
        ValueError: `k` is not from 1 to N, or the temperature is not positive.
    """
    if not 1 <= k <= len(train_ND):
        raise ValueError(f"k is {k}, and must be from 1 to the number of reference images ({len(train_ND)})")
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}, and must be above 0")
    rankings = []
    for queries_QD in torch.split(queries_MD, QUERIES_A_CHUNK):
        similarities_Qk, neighbours_Qk = (queries_QD @ train_ND.T).topk(k, dim=1)
        votes_QC = torch.zeros(len(queries_QD), num_classes, dtype=train_ND.dtype, device=train_ND.device)
        votes_QC.scatter_add_(1, train_labels_N[neighbours_Qk], (similarities_Qk / temperature).exp())
        rankings.append(votes_QC.argsort(dim=1, descending=True, stable=True))
    return torch.cat(rankings)


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    queries_MD: Tensor,
    query_labels_M: Tensor,
    *,
    k: int,
    temperature: float = 0.07,
) -> tuple[float, float]:
    """Share of queries whose class the neighbours name.

    Args:
        train_ND: Embeddings of length 1.
        train_labels_N: Their classes, int64, from 0.
        queries_MD: Embeddings of length 1; at least one.
        query_labels_M: Their true classes.
        k: Neighbours that vote; at most N.
        temperature: As in `weighted_knn`.

    Returns:
        Top-1 and top-5 accuracy in percent. With fewer than five neighbours, top-5 looks at k classes.
    """
    num_classes = int(torch.maximum(train_labels_N.max(), query_labels_M.max())) + 1
    ranking_MC = weighted_knn(
        train_ND, train_labels_N, queries_MD, k=k, num_classes=num_classes, temperature=temperature
    )
    hits_MC = ranking_MC == query_labels_M[:, None]
    top1 = int(hits_MC[:, 0].sum())
    top5 = int(hits_MC[:, : min(5, k)].sum())
    return 100 * top1 / len(queries_MD), 100 * top5 / len(queries_MD)
