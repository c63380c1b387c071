"""Places for all items of a collection in a square: neighbours in the embedding are neighbours on the map.

    fit      PCA to 50 dimensions, then t-SNE, begun from the first two; of at most MAX_FITTED different
             vectors, drawn with a fixed seed. These are the map's reference, and never move again.
    place    every other vector is put among its nearest of the reference, and moved by t-SNE's gradient
             while the reference stands still.

Equal vectors have one place. A later map keeps every place of the one before, places what is new and leaves
out what is gone, until the collection has grown by half, or lost half, since the fit; then it is fitted anew.

The same vectors, threads aside, give the same map with the same versions of the libraries.

Dimension key: N items, in order of id · U different vectors · M of the reference · D embedding · P of the PCA
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt
from openTSNE import TSNE, TSNEEmbedding
from openTSNE.affinity import PerplexityBasedNN
from openTSNE.nearest_neighbors import KNNIndex
from sklearn.decomposition import PCA

from app.search.collection import Vector
from app.search.reading.file import Array, Kept
from app.search.reading.marks import vector_marks
from app.search.reading.neighbours import Vectors
from app.search.reading.spool import Spool

MAX_FITTED: Final = 20_000  # half a minute of a core; more shows nothing that a screen can
REFIT_SHARE: Final = 0.5

_SEED: Final = 0
_PCA_DIMENSIONS: Final = 50
_PERPLEXITY: Final = 30.0
_MIN_TSNE: Final = 5  # fewer have no neighbourhoods: the PCA is the map
_FFT_ABOVE: Final = 6_000  # below, Barnes-Hut takes less time than the interpolation's grid
_ITERATIONS: Final = 250 + 500  # openTSNE's, with and without early exaggeration
_REPORT_EVERY: Final = 25
_PLACED_AT_ONCE: Final = 8_192
_MAX_FIT_BYTES: Final = 1 << 29

Positions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """What was fitted.

    Attributes:
        items: N of the collection at the fit.
        mean_D: Of the vectors.
        axes_PD: Of the PCA.
        coordinates_MP: Of the reference's vectors on these axes.
        xy_M2: Where t-SNE put them, around 0.
        half: Of the greater side of their bounding box, which the map scales to 1.
    """

    items: int
    mean_D: Vector
    axes_PD: Vector
    coordinates_MP: Vector
    xy_M2: Positions
    half: float

    def coordinates_of(self, vectors_ND: Vector) -> Vector:
        """Vectors on the PCA's axes."""
        return np.ascontiguousarray((vectors_ND - self.mean_D) @ self.axes_PD.T, np.float32)


class FaissNeighbours(KNNIndex):  # type: ignore[misc] # openTSNE has no types
    """Exact Euclidean neighbours for openTSNE, the same in every run; its own are approximate."""

    VALID_METRICS = ("euclidean",)

    def build(self) -> tuple[npt.NDArray[np.int64], Positions]:
        """The k nearest of each vector, without itself."""
        squares, found = _nearest(self.data, self.data, self.k + 1)
        squares[found == np.arange(len(found))[:, None]] = np.inf
        best = np.argsort(squares, axis=1, kind="stable")[:, : self.k]
        return np.take_along_axis(found, best, axis=1), np.sqrt(np.take_along_axis(squares, best, axis=1))

    def query(self, query: Vector, k: int) -> tuple[npt.NDArray[np.int64], Positions]:
        """The k nearest of other vectors."""
        squares, found = _nearest(query, self.data, k)
        return found, np.sqrt(squares)


def compute_map(
    spool: Spool, *, previous: Kept | None, threads: int, report: Callable[[float], None]
) -> tuple[dict[str, Array], dict[str, int]]:
    """Makes a map, or goes on with the one before.

    Args:
        spool: The items.
        previous: What this function made earlier of the same collection, or None.
        threads: That t-SNE may use; the map doesn't depend on them.
        report: Told what share is done.

    Returns:
        Arrays, of which `xy` float32 [N, 2] in [-1, 1] is the map and the others are for the next one; and
        facts about it.
    """
    marks, first, inverse = np.unique(vector_marks(spool.vectors_ND), return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    reference, places_U2, is_fitted_U = _known(previous, marks)
    if reference is None or _is_outgrown(reference, is_fitted_U[inverse]):
        reference, rows = _fit(spool, np.sort(first), threads=threads, report=lambda s: report(0.5 * s))
        places_U2 = np.full((len(marks), 2), np.nan)
        is_fitted_U = np.ones(len(marks), np.bool_)
        where = np.searchsorted(marks, vector_marks(spool.vectors_ND[rows])) if len(rows) else rows
        places_U2[where] = _scaled(reference, reference.xy_M2)
    missing = np.flatnonzero(np.isnan(places_U2[:, 0]))
    places_U2[missing] = _placed(
        reference,
        Vectors(spool.vectors_ND, first[missing]),
        threads=threads,
        report=lambda share: report(0.5 + 0.5 * share),
    )
    arrays: dict[str, Array] = {
        "xy": places_U2[inverse].astype(np.float32).reshape(-1, 2),
        "marks": marks[inverse],
        "is_fitted": is_fitted_U[inverse],
        "mean": reference.mean_D,
        "axes": reference.axes_PD,
        "reference": reference.coordinates_MP,
        "reference_xy": reference.xy_M2,
        "half": np.array([reference.half]),
    }
    return arrays, {"fitted_items": reference.items, "placed_items": int((~arrays["is_fitted"]).sum())}


def _known(
    previous: Kept | None, marks: npt.NDArray[np.uint64]
) -> tuple[Reference | None, Positions, npt.NDArray[np.bool_]]:
    """What the map before says: its reference, and of each vector its place (NaN: it is new)."""
    places_U2 = np.full((len(marks), 2), np.nan)
    is_fitted_U = np.zeros(len(marks), np.bool_)
    if previous is None:
        return None, places_U2, is_fitted_U
    arrays = previous.arrays
    known, first = np.unique(arrays["marks"], return_index=True)
    if len(known):
        at = np.minimum(np.searchsorted(known, marks), len(known) - 1)
        there = known[at] == marks
        places_U2[there] = arrays["xy"][first[at[there]]]
        is_fitted_U[there] = arrays["is_fitted"][first[at[there]]]
    reference = Reference(
        items=int(previous.facts["fitted_items"]),
        mean_D=arrays["mean"],
        axes_PD=arrays["axes"],
        coordinates_MP=np.ascontiguousarray(arrays["reference"]),
        xy_M2=arrays["reference_xy"],
        half=float(arrays["half"][0]),
    )
    return reference, places_U2, is_fitted_U


def _is_outgrown(reference: Reference, is_fitted_N: npt.NDArray[np.bool_]) -> bool:
    there = int(is_fitted_N.sum())
    came = len(is_fitted_N) - there
    return came >= REFIT_SHARE * reference.items or there < REFIT_SHARE * reference.items


def _fit(
    spool: Spool, rows: npt.NDArray[np.int64], *, threads: int, report: Callable[[float], None]
) -> tuple[Reference, npt.NDArray[np.int64]]:
    """The reference, and the rows that it is made of; `rows` are those of all different vectors."""
    dimensions = spool.vectors_ND.shape[1]
    most = max(1, min(MAX_FITTED, _MAX_FIT_BYTES // (4 * dimensions)))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(_SEED).choice(rows, most, replace=False))
    vectors_MD = np.ascontiguousarray(spool.vectors_ND[rows])
    components = min(_PCA_DIMENSIONS, dimensions, len(rows) - 1)
    if components < 1:
        mean_D = vectors_MD.mean(axis=0) if len(rows) else np.zeros(dimensions, np.float32)
        nothing = np.zeros((1, dimensions), np.float32)
        coordinates = np.zeros((len(rows), 1), np.float32)
        return Reference(len(spool), mean_D, nothing, coordinates, np.zeros((len(rows), 2)), 1.0), rows
    pca = PCA(components, random_state=_SEED).fit(vectors_MD)
    plain = Reference(
        len(spool),
        pca.mean_.astype(np.float32),
        pca.components_.astype(np.float32),
        np.empty((0, components), np.float32),
        np.empty((0, 2)),
        1.0,
    )
    coordinates = plain.coordinates_of(vectors_MD)
    xy_M2 = _tsne(coordinates, threads=threads, report=report)
    xy_M2 -= (xy_M2.max(axis=0) + xy_M2.min(axis=0)) / 2
    half = float(np.abs(xy_M2).max()) or 1.0
    return Reference(plain.items, plain.mean_D, plain.axes_PD, coordinates, xy_M2, half), rows


def _tsne(coordinates_MP: Vector, *, threads: int, report: Callable[[float], None]) -> Positions:
    count = len(coordinates_MP)
    begin_M2 = np.zeros((count, 2))
    begin_M2[:, : coordinates_MP.shape[1]] = coordinates_MP[:, :2]
    if count < _MIN_TSNE:
        return begin_M2
    # As openTSNE scales its own beginnings: small, so that early exaggeration can move everything.
    begin_M2 *= 1e-4 / (np.std(begin_M2[:, 0]) or 1.0)
    begin_M2 += np.random.default_rng(_SEED).normal(0, 1e-6, begin_M2.shape)
    done = 0

    def callback(*_: Any) -> None:  # noqa: ANN401 - iteration, error, embedding
        nonlocal done
        done += _REPORT_EVERY
        report(min(1.0, done / _ITERATIONS))

    tsne = TSNE(
        n_jobs=threads,
        random_state=_SEED,
        negative_gradient_method=_method(count),
        callbacks=callback,
        callbacks_every_iters=_REPORT_EVERY,
    )
    affinities = _affinities(coordinates_MP, threads=threads)
    return np.array(tsne.fit(affinities=affinities, initialization=begin_M2))


def _placed(
    reference: Reference, vectors_ND: Vectors, *, threads: int, report: Callable[[float], None]
) -> Positions:
    """Places in the map for vectors that aren't of the reference."""
    places_N2 = np.zeros((len(vectors_ND), 2))
    if len(vectors_ND) == 0:
        return places_N2
    fitted = len(reference.xy_M2)
    embedding = None
    if fitted >= _MIN_TSNE:
        embedding = TSNEEmbedding(
            reference.xy_M2,
            _affinities(reference.coordinates_MP, threads=threads),
            negative_gradient_method=_method(fitted),
            n_jobs=threads,
            random_state=_SEED,
        )
    for start in range(0, len(vectors_ND), _PLACED_AT_ONCE):
        block = slice(start, start + _PLACED_AT_ONCE)
        coordinates_NP = reference.coordinates_of(vectors_ND.take(block))
        if embedding is None:
            _, nearest = _nearest(coordinates_NP, reference.coordinates_MP, 1)
            places_N2[block] = reference.xy_M2[nearest[:, 0]]
        else:
            places_N2[block] = embedding.transform(coordinates_NP)
        report(min(1.0, (start + _PLACED_AT_ONCE) / len(vectors_ND)))
    return np.clip(_scaled(reference, places_N2), -1.0, 1.0)


def _affinities(coordinates_MP: Vector, *, threads: int) -> PerplexityBasedNN:
    count = len(coordinates_MP)
    perplexity = min(_PERPLEXITY, (count - 1) / 3)
    index = FaissNeighbours(coordinates_MP, k=min(count - 1, int(3 * perplexity)), n_jobs=threads)
    return PerplexityBasedNN(perplexity=perplexity, knn_index=index, n_jobs=threads)


def _method(count: int) -> str:
    return "fft" if count > _FFT_ABOVE else "bh"


def _scaled(reference: Reference, xy_N2: Positions) -> Positions:
    return xy_N2 / reference.half


def _nearest(queries_QP: Vector, others_MP: Vector, k: int) -> tuple[Positions, npt.NDArray[np.int64]]:
    """Squares of distances, and rows."""
    squares, found = faiss.knn(queries_QP, others_MP, k, metric=faiss.METRIC_L2)
    return np.maximum(np.asarray(squares, np.float64), 0.0), np.asarray(found, np.int64)
