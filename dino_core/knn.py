"""The weighted k-nearest-neighbour classifier that self-supervised papers report.

It has nothing to train, so its accuracy says how well the embedding space itself is laid out. Neighbours that
tie for the last places share them, and classes with equal votes share the prediction (`dino_core.ranking`):
no number depends on the order of the images.

Dimension key: N reference images · M queries · Q queries of a chunk · D embedding · C classes

Reference: Wu et al. 2018, section 3.4, https://arxiv.org/abs/1805.01978; as in `eval_knn.py` of
https://github.com/facebookresearch/dino, without its limit of at least 100 queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_core.ranking import cosines, membership

# Bounds the similarity matrix: 256 queries against a million images are 2 GB in float64.
QUERIES_A_CHUNK = 256
# Sums of the same votes in another order differ in the last of 53 bits; so many are kept.
_MANTISSA = 2.0**36


@torch.no_grad()
def knn_votes(
    train_ND: Tensor,
    train_labels_N: Tensor,
    queries_MD: Tensor,
    *,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
) -> list[Tensor]:
    """Votes of the nearest neighbours for the classes, for several numbers of neighbours at once.

        vote of a neighbour = exp(cosine / temperature), for its class

    Where n neighbours have equal cosines and only s places are left for them, each votes with weight s/n.

    Args:
        train_ND: Embeddings of length 1, so that a dot product is a cosine.
        train_labels_N: Their classes, int64, from 0 to C - 1.
        queries_MD: Embeddings of length 1.
        ks: Numbers of neighbours that vote; each at most N.
        num_classes: C.
        temperature: Above 0; the papers use 0.07.

    Returns:
        For each k float64 [M, C], in units of the nearest neighbour's vote. Equal votes are equal numbers.

    Raises:
        ValueError: A `k` is not from 1 to N, or the temperature is not positive.
    """
    for k in ks:
        if not 1 <= k <= len(train_ND):
            raise ValueError(
                f"k is {k}, and must be from 1 to the number of reference images ({len(train_ND)})"
            )
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}, and must be above 0")
    train_ND = train_ND.double()
    votes: list[list[Tensor]] = [[] for _ in ks]
    for queries_QD in torch.split(queries_MD, QUERIES_A_CHUNK):
        cosines_QN = cosines(queries_QD, train_ND)
        for place, k in enumerate(ks):
            votes[place].append(_votes(cosines_QN, train_labels_N, k, num_classes, temperature))
    return [torch.cat(chunks) for chunks in votes]


def weighted_knn(
    train_ND: Tensor,
    train_labels_N: Tensor,
    queries_MD: Tensor,
    *,
    k: int,
    num_classes: int,
    temperature: float = 0.07,
) -> Tensor:
    """Ranks the classes of each query by `knn_votes`.

    Returns:
        Classes [M,C], best first; column 0 is the prediction. Classes of equal votes come in ascending order.

    Raises:
        ValueError: As `knn_votes`.
    """
    (votes_MC,) = knn_votes(
        train_ND, train_labels_N, queries_MD, ks=(k,), num_classes=num_classes, temperature=temperature
    )
    return votes_MC.argsort(dim=1, descending=True, stable=True)


def knn_hits(
    train_ND: Tensor,
    train_labels_N: Tensor,
    queries_MD: Tensor,
    query_labels_M: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> list[Tensor]:
    """How likely each query gets its own class, where classes of equal votes are drawn by chance.

    Args:
        train_ND: Embeddings of length 1.
        train_labels_N: Their classes, int64, from 0.
        queries_MD: Embeddings of length 1; at least one.
        query_labels_M: Their true classes.
        ks: Numbers of neighbours that vote; each at most N.
        temperature: As in `knn_votes`.

    Returns:
        For each k float64 [M], 1 and 0 where nothing ties.

    Raises:
        ValueError: As `knn_votes`.
    """
    votes = knn_votes(
        train_ND,
        train_labels_N,
        queries_MD,
        ks=ks,
        num_classes=_classes_of(train_labels_N, query_labels_M),
        temperature=temperature,
    )
    return [_expected_hits(votes_MC, query_labels_M) for votes_MC in votes]


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
        temperature: As in `knn_votes`.

    Returns:
        Top-1 and top-5 accuracy in percent; top-1 as `knn_hits` expects it. For top-5 classes of equal votes,
        none included, come in ascending order, as in the official code; with fewer than five neighbours it
        looks at k classes.
    """
    (votes_MC,) = knn_votes(
        train_ND,
        train_labels_N,
        queries_MD,
        ks=(k,),
        num_classes=_classes_of(train_labels_N, query_labels_M),
        temperature=temperature,
    )
    top1 = float(_expected_hits(votes_MC, query_labels_M).sum())
    ranking_MC = votes_MC.argsort(dim=1, descending=True, stable=True)
    top5 = int((ranking_MC[:, : min(5, k)] == query_labels_M[:, None]).sum())
    return 100 * top1 / len(queries_MD), 100 * top5 / len(queries_MD)


def _classes_of(train_labels_N: Tensor, query_labels_M: Tensor) -> int:
    return int(torch.maximum(train_labels_N.max(), query_labels_M.max())) + 1


def _expected_hits(votes_MC: Tensor, labels_M: Tensor) -> Tensor:
    """1 / (classes with as many votes as the right one), where no class has more."""
    is_first_MC = votes_MC == votes_MC.amax(dim=1, keepdim=True)
    return is_first_MC.gather(1, labels_M[:, None]).squeeze(1) / is_first_MC.sum(dim=1).clamp_min(1).double()


def _votes(cosines_QN: Tensor, labels_N: Tensor, k: int, num_classes: int, temperature: float) -> Tensor:
    """The votes of one chunk, relative to that of the nearest neighbour."""
    # One neighbour more tells where the last place is shared, which is rare.
    nearest_Qk, places_Qk = cosines_QN.topk(min(k + 1, cosines_QN.shape[1]), dim=1)
    # Relative to the nearest: no temperature overflows.
    votes_Qk = ((nearest_Qk[:, :k] - nearest_Qk[:, :1]).double() / temperature).exp()
    votes_QC = votes_Qk.new_zeros(len(cosines_QN), num_classes)
    votes_QC.scatter_add_(1, labels_N[places_Qk[:, :k]], votes_Qk)
    if k < cosines_QN.shape[1]:
        shared_R = torch.nonzero(nearest_Qk[:, k] == nearest_Qk[:, k - 1]).squeeze(1)
        if len(shared_R):
            rows_RN = cosines_QN[shared_R]
            votes_RN = ((rows_RN - nearest_Qk[shared_R, :1]).double() / temperature).exp()
            votes_RN *= membership(rows_RN, k)
            empty_RC = votes_QC.new_zeros(len(shared_R), num_classes)
            votes_QC[shared_R] = empty_RC.scatter_add_(1, labels_N.expand_as(rows_RN), votes_RN)
    mantissa_QC, exponent_QC = torch.frexp(votes_QC)
    return torch.ldexp(mantissa_QC.mul(_MANTISSA).round().div(_MANTISSA), exponent_QC)
