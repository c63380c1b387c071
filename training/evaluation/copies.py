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

from dino_core.embedding import EmbeddingModel
from training.data.folder import ImageList, find_images
from training.errors import DataError
from training.evaluation.folder import embed_images

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


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """How well copies are found.

    Attributes:
        found_M: Whether the original was the nearest of all.
        attacks: What was done to each query.
        micro_ap: Average precision over all pairs of query and gallery in one ranking, 0 to 1: whether one
            threshold serves all queries (the measure of the Image Similarity Challenge, Douze et al. 2021).
    """

    found_M: Tensor
    attacks: tuple[str, ...]
    micro_ap: float

    def by_attack(self) -> dict[str, float]:
        """Share of originals that were the nearest, in %, by attack."""
        return {
            attack: 100 * float(self.found_M[[name == attack for name in self.attacks]].mean())
            for attack in sorted(set(self.attacks))
        }


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
        read = [(row["query"], row["original"], row["attack"]) for row in rows]
    missing = [name for query, original, _ in read for name in (query, original) if name not in places]
    if missing or not read:
        what = f"names {missing[0]}, which is no image below {folder}" if missing else "has no rows"
        raise DataError(f"{table} {what}: correct the table")
    return Copies(
        images=images,
        queries_M=torch.tensor([places[query] for query, _, _ in read]),
        originals_M=torch.tensor([places[original] for _, original, _ in read]),
        attacks=tuple(attack for _, _, attack in read),
    )


def find_copies(
    model: EmbeddingModel,
    copies: Copies,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> CopyReport:
    """Embeds a folder of copies, and looks for each one's original.

    Raises:
        DataError: An image cannot be read: a table with gaps would be another test.
    """
    embedded = embed_images(
        model, copies.images, batch_size=batch_size, workers=workers, on_progress=on_progress
    )
    if embedded.skipped:
        name, reason = next(iter(embedded.skipped.items()))
        raise DataError(f"{name} of {copies.images.origin} cannot be read ({reason}): replace it")
    is_query_N = torch.zeros(len(copies.images), dtype=torch.bool)
    is_query_N[copies.queries_M] = True
    gallery_N = torch.nonzero(~is_query_N).squeeze(1)
    likeness_MN = embedded.features_ND[copies.queries_M] @ embedded.features_ND[gallery_N].T
    is_original_MN = gallery_N[None] == copies.originals_M[:, None]
    return CopyReport(
        found_M=is_original_MN.gather(1, likeness_MN.argmax(dim=1, keepdim=True)).squeeze(1).float(),
        attacks=copies.attacks,
        micro_ap=average_precision(likeness_MN.flatten(), is_original_MN.flatten()),
    )


def average_precision(scores: Tensor, is_right: Tensor) -> float:
    """Mean over the right ones, ranked by score among all, of the share of right ones down to there."""
    hits = is_right[scores.argsort(descending=True, stable=True)].double()
    precisions = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precisions * hits).sum() / hits.sum())
