"""Copy detection: which picture of a collection is this one a changed copy of?

A folder of copies holds pictures and a table of what was made from what:

    groundtruth.csv     query,original,attack   with paths below the folder
    …                   everything that is no query is searched: the originals, and others that distract

Dimension key: N gallery · M queries · D embedding
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dino_core.ranking import (
    average_precision,
    cosines,
    expected_precisions,
    resampled_average_precision,
)
from training.data.folder import ImageList, find_images
from training.errors import DataError
from training.evaluation.embedding import Embedder, embed_images
from training.evaluation.intervals import Estimate, Resampling, estimate_of

TABLE = "groundtruth.csv"
_COLUMNS = ("query", "original", "attack")


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Which image of a list is a copy of which, and by what change."""

    images: ImageList
    queries_M: Tensor
    """int64, places in the list."""
    originals_M: Tensor
    """int64, places in the list."""
    attacks: tuple[str, ...]

    @property
    def gallery_N(self) -> Tensor:
        """int64, the places of all that is no query."""
        is_query_N = torch.zeros(len(self.images), dtype=torch.bool)
        is_query_N[self.queries_M] = True
        return torch.nonzero(~is_query_N).squeeze(1)


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """How well copies are found; intervals are over originals, whose copies fail together.

    Attributes:
        measures: By name: `copies_p_at_1`, whether the original was the nearest; `copies_map`, the mean of
            average precision, which is 1 / (rank of the original); `copies_micro_ap`, average precision over
            all pairs of query and gallery in one ranking: whether one threshold serves all queries (that of
            the Image Similarity Challenge, Douze et al. 2021).
        by_attack: The first two by what was done to the query.
    """

    measures: dict[str, Estimate]
    by_attack: dict[str, dict[str, Estimate]]


def read_copies(folder: Path) -> Copies:
    """Reads a folder of copies.

    Raises:
        DataError: The table is missing, or names what is not there.
    """
    table = folder / TABLE
    if not table.is_file():
        raise DataError(
            f"{table} is not there: a folder of copies needs this table, with the columns "
            f"{','.join(_COLUMNS)}"
        )
    images = find_images(folder)
    places = {name: place for place, name in enumerate(images.names)}
    with table.open(newline="") as file:
        rows = csv.DictReader(file)
        if not set(_COLUMNS) <= set(rows.fieldnames or ()):
            raise DataError(f"{table} has the columns {rows.fieldnames}: expected {','.join(_COLUMNS)}")
        read = sorted(tuple(row[column] or "" for column in _COLUMNS) for row in rows)
    missing = [name for query, original, _ in read for name in (query, original) if name not in places]
    if missing or not read:
        what = f"names {missing[0]}, which is no image below {folder}" if missing else "has no rows"
        raise DataError(f"{table} {what}: correct the table")
    queries = {query for query, _, _ in read}
    both = [original for _, original, _ in read if original in queries]
    if both:
        raise DataError(f"{table} has {both[0]} as a query and as an original: nothing finds itself")
    return Copies(
        images=images,
        queries_M=torch.tensor([places[query] for query, _, _ in read]),
        originals_M=torch.tensor([places[original] for _, original, _ in read]),
        attacks=tuple(attack for _, _, attack in read),
    )


def embed_copies(
    model: Embedder,
    copies: Copies,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Embeds a folder of copies.

    Returns:
        float32 [N, D], in the order of the list.

    Raises:
        DataError: An image cannot be read: a table with gaps would be another test.
    """
    embedded = embed_images(
        model, copies.images, batch_size=batch_size, workers=workers, on_progress=on_progress
    )
    if embedded.skipped:
        name, reason = next(iter(embedded.skipped.items()))
        raise DataError(f"{name} of {copies.images.origin} cannot be read ({reason}): replace it")
    return embedded.features_ND[embedded.indices_N.argsort()]


def find_copies(features_ND: Tensor, copies: Copies) -> CopyReport:
    """Looks for each copy's original among all that is no copy.

    Args:
        features_ND: Embeddings of length 1, in the order of the list.
        copies: What is a copy of what.
    """
    gallery_N = copies.gallery_N
    cosines_MN = cosines(features_ND[copies.queries_M], features_ND[gallery_N])
    is_original_MN = gallery_N[None] == copies.originals_M[:, None]
    first_M, average_M = expected_precisions(cosines_MN, is_original_MN)
    resampling = Resampling(copies.originals_M)
    found = resampling.estimates({"copies_p_at_1": first_M}, shares=True)
    found |= resampling.estimates({"copies_map": average_M}, shares=False)
    found["copies_micro_ap"] = _micro_ap(cosines_MN, is_original_MN, resampling)
    by_attack = {}
    for attack in sorted(set(copies.attacks)):
        of_it_M = torch.tensor([name == attack for name in copies.attacks])
        part = Resampling(copies.originals_M[of_it_M])
        by_attack[attack] = part.estimates({"p_at_1": first_M[of_it_M]}, shares=True) | part.estimates(
            {"map": average_M[of_it_M]}, shares=False
        )
    return CopyReport(measures=found, by_attack=by_attack)


def _micro_ap(cosines_MN: Tensor, is_original_MN: Tensor, resampling: Resampling) -> Estimate:
    scores_P, relevant_P = cosines_MN.flatten(), is_original_MN.flatten()
    sources_P = resampling.places_M.repeat_interleave(cosines_MN.shape[1])
    resampled = [
        resampled_average_precision(scores_P, relevant_P, sources_P, draws_bC)
        for draws_bC in resampling.draws()
    ]
    return estimate_of(average_precision(scores_P, relevant_P), torch.cat(resampled), resampling)
