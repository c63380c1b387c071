"""Vectors as a model gives them: clusters of very different sizes, spread unlike in their directions."""

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


def unit(vectors: npt.NDArray[np.floating]) -> Vectors:
    """Of length 1."""
    wide = vectors.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=-1, keepdims=True), dtype=np.float32)


def clustered(
    rows: int, *, seed: int, dimensions: int = 64, clusters: int = 200
) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """Rows and their clusters; ask for queries and rows at once, so that they are of the same clusters."""
    rng = np.random.default_rng(seed)
    inner = dimensions // 4
    shares = rng.pareto(1.2, clusters) + 0.05
    centres = rng.normal(size=(clusters, inner))
    spreads = np.abs(rng.normal(size=(clusters, inner))) * 0.35
    turned = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0][:inner]
    cluster = rng.choice(clusters, rows, p=shares / shares.sum())
    signal = (centres[cluster] + spreads[cluster] * rng.normal(size=(rows, inner))) @ turned
    noise = rng.normal(size=(rows, dimensions)) / np.sqrt(dimensions)
    return unit(signal + 0.3 * np.linalg.norm(signal, axis=1, keepdims=True) * noise), cluster
