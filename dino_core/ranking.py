"""Rankings in which several may have the same place: what is expected when ties are broken by chance.

A sort breaks ties by the order of the files, and then a network that answers all pictures alike looks as good
as the order is lucky. Here every number is the mean over all orders of those that tie, in closed form; so it
does not depend on the order of anything.

Scores count as equal where they are equal numbers. Cosines are put on a grid first, as two roundings of one
cosine are no ranking.

Dimension key: Q queries · N ranked · D embedding · P pairs · G groups that tie · C sources · B resamples

Reference: McSherry and Najork 2008, "Computing Information Retrieval Performance Measures Efficiently in the
Presence of Tied Scores", https://doi.org/10.1007/978-3-540-78646-7_38
"""

import torch
from torch import Tensor

# Cosines of a picture's embeddings in two batches differ by some 1e-7; the grid is a little coarser.
COSINE_GRID = 2.0**-20


def cosines(queries_QD: Tensor, gallery_ND: Tensor) -> Tensor:
    """Dot products in float64, rounded to multiples of 2^-20.

    Args:
        queries_QD: Embeddings of length 1.
        gallery_ND: Embeddings of length 1.

    Returns:
        float32 [Q, N], exact.
    """
    products_QN = queries_QD.double() @ gallery_ND.double().T
    return products_QN.div_(COSINE_GRID).round_().mul_(COSINE_GRID).float()


def expected_precisions(scores_QN: Tensor, relevant_QN: Tensor) -> tuple[Tensor, Tensor]:
    """Precision of the first, and average precision, of each row; ties broken by chance.

        for each row: rank by score, the highest first
            P@1 = whether the first is relevant
            AP  = mean over the relevant of (relevant ones down to there) / rank

        of n that tie after `start` others, r relevant, and `before` relevant ones ahead of them:
            P@1 is r/n for the first group
            each rank i of 1..n is relevant with probability r/n, and then has before + 1 + (i-1)(r-1)/(n-1)
            relevant ones down to it

    Args:
        scores_QN: Higher is nearer; -inf for what is not ranked.
        relevant_QN: bool, at least one in each row; none that is not ranked.

    Returns:
        Both float64 [Q], from 0 to 1.
    """
    sorted_QN, order_QN = scores_QN.sort(dim=1, descending=True)
    hits_QN = relevant_QN.gather(1, order_QN).double()
    ends_QN = torch.ones_like(sorted_QN, dtype=torch.bool)
    ends_QN[:, :-1] = sorted_QN[:, :-1] != sorted_QN[:, 1:]
    places_N = torch.arange(scores_QN.shape[1], device=scores_QN.device)
    begins_QN = torch.ones_like(ends_QN)
    begins_QN[:, 1:] = ends_QN[:, :-1]
    start_QN = torch.where(begins_QN, places_N, 0).cummax(dim=1).values
    down_QN = hits_QN.cumsum(dim=1)
    before_QN = (down_QN - hits_QN).gather(1, start_QN)
    terms_QN = _precisions_of_group(
        count=places_N + 1 - start_QN,
        relevant=down_QN - before_QN,
        start=start_QN,
        before=before_QN,
        harmonic=_harmonic(scores_QN.shape[1], scores_QN.device),
    )
    average_Q = (terms_QN * ends_QN).sum(dim=1) / down_QN[:, -1]
    first_end_Q1 = ends_QN.double().argmax(dim=1, keepdim=True)
    first_Q = (down_QN.gather(1, first_end_Q1) / (first_end_Q1 + 1)).squeeze(1)
    return first_Q, average_Q


def average_precision(scores_P: Tensor, relevant_P: Tensor) -> float:
    """Average precision of one ranking; see `expected_precisions`."""
    return float(expected_precisions(scores_P[None], relevant_P[None])[1])


def resampled_average_precision(
    scores_P: Tensor, relevant_P: Tensor, sources_P: Tensor, draws_BC: Tensor
) -> Tensor:
    """Average precision of one ranking in which each pair counts as often as its source was drawn.

    Copies of a pair tie with it.

    Args:
        scores_P: Higher is nearer.
        relevant_P: bool.
        sources_P: int64, of which source each pair is, from 0 to C - 1.
        draws_BC: int64, how often each source was drawn, in each resample.

    Returns:
        float64 [B]; NaN where nothing relevant was drawn.
    """
    # Only scores that something relevant has count; of the rest, how many are above each of these.
    levels_G: Tensor = torch.unique(scores_P[relevant_P])
    places_P = torch.searchsorted(levels_G, scores_P)  # of the lowest level that is not below
    at_P = levels_G[places_P.clamp_max(len(levels_G) - 1)] == scores_P
    sources = draws_BC.shape[1]

    def counted(chosen_P: Tensor) -> Tensor:
        """How many pairs of each source have each place, float64 [C, G + 1]."""
        flat = sources_P[chosen_P] * (len(levels_G) + 1) + places_P[chosen_P]
        counts = torch.bincount(flat, minlength=sources * (len(levels_G) + 1))
        return counts.reshape(sources, -1).double()

    def above(counts_CG: Tensor) -> Tensor:
        return counts_CG.flip(1).cumsum(dim=1).flip(1)[:, 1:]

    everything_CG, relevant_CG = counted(torch.ones_like(relevant_P)), counted(relevant_P)
    draws_BC = draws_BC.double()
    relevant_BG = draws_BC @ relevant_CG[:, :-1]
    terms_BG = _precisions_of_group(
        count=(draws_BC @ counted(at_P)[:, :-1]).long(),
        relevant=relevant_BG,
        start=(draws_BC @ above(everything_CG)).long(),
        before=draws_BC @ above(relevant_CG),
        harmonic=_harmonic(int((draws_BC @ everything_CG).sum(dim=1).max()), scores_P.device),
    )
    return terms_BG.sum(dim=1) / relevant_BG.sum(dim=1)


def membership(scores_QN: Tensor, k: int) -> Tensor:
    """How likely each is among the k first of its row; ties broken by chance.

    Args:
        scores_QN: Higher is nearer.
        k: From 1 to N.

    Returns:
        float64 [Q, N], from 0 to 1; each row sums to k.
    """
    last_Q1 = scores_QN.topk(k, dim=1).values[:, -1:]
    above_QN, tied_QN = scores_QN > last_Q1, scores_QN == last_Q1
    share_Q1 = (k - above_QN.sum(dim=1, keepdim=True)).double() / tied_QN.sum(dim=1, keepdim=True)
    return above_QN.double() + tied_QN * share_Q1


def _precisions_of_group(
    *, count: Tensor, relevant: Tensor, start: Tensor, before: Tensor, harmonic: Tensor
) -> Tensor:
    """The sum of expected precisions at the relevant ones of groups that tie; 0 for empty groups.

    sum over i of r/n * (before + 1 + (i-1)(r-1)/(n-1)) / (start + i), with sums of 1/(start + i) looked up
    """
    inverse_ranks = harmonic[start + count] - harmonic[start]
    growth = (relevant - 1) / (count - 1).clamp_min(1)
    inner = (before + 1) * inverse_ranks + growth * (count - (start + 1) * inverse_ranks)
    return relevant / count.clamp_min(1) * inner


def _harmonic(count: int, device: torch.device) -> Tensor:
    """1 + 1/2 + ... + 1/i at place i, from 0 to count."""
    inverses = 1 / torch.arange(1, count + 1, dtype=torch.float64, device=device)
    return torch.cat([inverses.new_zeros(1), inverses.cumsum(dim=0)])
