"""What compression and small sizes do to embeddings, on pictures of any folder, changed here.

    jpeg 90 … 10    decoded, and compressed again by Pillow with that quality
    128, 64, 32 px  shrunk until the shorter side is so long; only pictures that are larger

The queries are changed and the gallery is not, as when a thumbnail looks for its picture.

Dimension key: M queries · N gallery · D embedding · C H W pixels
"""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dino_core.knn import knn_hits
from dino_core.preprocess import Preprocessing, decode, load_pixels, resize_and_crop
from training.data.images import Images
from training.evaluation.embedding import Embedder, embed_pixels
from training.evaluation.intervals import Estimate, Resampling
from training.evaluation.measures import TEMPERATURE
from training.evaluation.retrieval import neighbour_overlap
from training.machine import usable_cores

JPEG_QUALITIES = (90, 70, 50, 30, 10)
SHORTER_SIDES_PX = (128, 64, 32)
CHANGES = (*(f"jpeg {q}" for q in JPEG_QUALITIES), *(f"{side} px" for side in SHORTER_SIDES_PX))
_NEIGHBOURS_COMPARED = 10
_VOTERS = 20


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Pictures to change.

    Attributes:
        images: The list that they are in.
        places: Where.
        features_MD: Their embeddings as they are.
        labels_M: int64, if there are classes.
    """

    images: Images
    places: Sequence[int]
    features_MD: Tensor
    labels_M: Tensor | None


def robustness(
    model: Embedder,
    queries: Queries,
    gallery_ND: Tensor,
    gallery_labels_N: Tensor | None,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, Estimate]]:
    """Changes pictures in every way, embeds them, and compares.

    Args:
        model: On any device.
        queries: All readable.
        gallery_ND: Embeddings of other pictures, unchanged.
        gallery_labels_N: int64, if there are classes.
        batch_size: Images that go through the network together.
        workers: Threads that change pictures; none takes one for each core.
        on_progress: Told how many more files are done.

    Returns:
        By change: `cosine` with the unchanged picture, the mean in %; `neighbours`, how many of the ten
        nearest stay; `top1_k20`, k-NN accuracy, where there are classes and 20 images. `unchanged` comes
        first, and has the last alone.
    """
    changed: dict[str, list[Tensor]] = {change: [] for change in CHANGES}
    kept: dict[str, list[int]] = {change: [] for change in CHANGES}
    waiting: list[tuple[str, Tensor]] = []

    def embed_waiting() -> None:
        if waiting:
            vectors_BD = embed_pixels(
                model, torch.stack([pixels for _, pixels in waiting]), batch_size=batch_size
            )
            for (change, _), vector_D in zip(waiting, vectors_BD, strict=True):
                changed[change].append(vector_D)
            waiting.clear()

    for place, versions in enumerate(_versions(queries, model.preprocessing, workers=workers)):
        for change, pixels in versions.items():
            kept[change].append(place)
            waiting.append((change, pixels))
        if len(waiting) >= batch_size:
            embed_waiting()
        on_progress(1)
    embed_waiting()
    everything = list(range(len(queries.places)))
    found = {"unchanged": _voted(queries.features_MD, everything, queries, gallery_ND, gallery_labels_N)}
    for change, vectors in changed.items():
        if vectors:
            changed_KD = torch.stack(vectors)
            found[change] = _compared(changed_KD, kept[change], queries, gallery_ND)
            found[change] |= _voted(changed_KD, kept[change], queries, gallery_ND, gallery_labels_N)
    return {change: measures for change, measures in found.items() if measures}


def jpeg_again(rgb_CHW: Tensor, quality: int) -> bytes:
    """A picture as Pillow's JPEG, colours at half the resolution."""
    buffer = io.BytesIO()
    Image.fromarray(rgb_CHW.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def shrunk(rgb_CHW: Tensor, side_px: int) -> Tensor:
    """A picture with a shorter side so long (bicubic, antialias)."""
    height_px, width_px = rgb_CHW.shape[1:]
    shorter_px = min(height_px, width_px)
    size = (height_px * side_px // shorter_px, width_px * side_px // shorter_px)
    return functional.interpolate(rgb_CHW[None], size=size, mode="bicubic", antialias=True)[0]


def _versions(
    queries: Queries, preprocessing: Preprocessing, *, workers: int | None
) -> Iterator[dict[str, Tensor]]:
    """All changes of each picture, ready for the model; some pictures are read ahead."""

    def made(place: int) -> dict[str, Tensor]:
        rgb_CHW = decode(queries.images.read(place))
        versions = {
            f"jpeg {quality}": load_pixels(jpeg_again(rgb_CHW, quality), preprocessing)
            for quality in JPEG_QUALITIES
        }
        shorter_px = min(rgb_CHW.shape[1:])
        return versions | {
            f"{side} px": resize_and_crop(shrunk(rgb_CHW, side), preprocessing)
            for side in SHORTER_SIDES_PX
            if side < shorter_px
        }

    with ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="change") as pool:
        for start in range(0, len(queries.places), 32):
            yield from pool.map(made, queries.places[start : start + 32])


def _compared(
    vectors_KD: Tensor, kept: Sequence[int], queries: Queries, gallery_ND: Tensor
) -> dict[str, Estimate]:
    """K changed pictures, which are the `kept` of the queries, against what they were."""
    changed_KD = functional.normalize(vectors_KD, dim=1)
    before_KD = functional.normalize(queries.features_MD[list(kept)], dim=1)
    gallery_ND = functional.normalize(gallery_ND, dim=1)
    resampling = Resampling(torch.tensor(kept))
    found = resampling.estimates({"cosine": (changed_KD * before_KD).sum(dim=1)}, shares=False)
    if len(gallery_ND) < _NEIGHBOURS_COMPARED:
        return found
    overlap_K = neighbour_overlap((before_KD, gallery_ND), (changed_KD, gallery_ND), k=_NEIGHBOURS_COMPARED)
    return found | resampling.estimates({"neighbours": overlap_K}, shares=False)


def _voted(
    vectors_KD: Tensor,
    kept: Sequence[int],
    queries: Queries,
    gallery_ND: Tensor,
    gallery_labels_N: Tensor | None,
) -> dict[str, Estimate]:
    """k-NN accuracy of K pictures, changed or not."""
    if gallery_labels_N is None or queries.labels_M is None or len(gallery_ND) < _VOTERS:
        return {}
    (hits_K,) = knn_hits(
        functional.normalize(gallery_ND, dim=1),
        gallery_labels_N,
        functional.normalize(vectors_KD, dim=1),
        queries.labels_M[list(kept)],
        ks=(_VOTERS,),
        temperature=TEMPERATURE,
    )
    return Resampling(torch.tensor(kept)).estimates({f"top1_k{_VOTERS}": hits_K}, shares=True)
