"""Vectors in fewer bits: turned so that no dimension stands out, and rounded to 8 bits.

A search in codes only chooses candidates; they are compared again in full.

Dimension key: N rows · D embedding · E turned embedding, a multiple of 16
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from app.search.collection import Vector
from app.search.products import products

MAX_CODED_DIMENSIONS = 4_096  # a rotation has D * D numbers: 64 MB here
_ROWS_AT_ONCE = 4_096
_SEED = 20_261_123
_faiss: Any = faiss  # its stubs know neither arrays nor members as arguments


class Rotation:
    """Turns vectors at random and leaves their inner products as they are.

    Features have dimensions with far larger numbers than the others. A step of 8 bits that fits those would
    leave the others a few values, and a sign tells little of them; turned at random, all are alike.

    Args:
        matrix_ED: float32; its columns are orthonormal.
    """

    def __init__(self, matrix_ED: Vector) -> None:
        self.matrix_ED = np.ascontiguousarray(matrix_ED)
        turned, dimensions = matrix_ED.shape
        self._transform = faiss.LinearTransform(dimensions, turned, False)
        faiss.copy_array_to_vector(self.matrix_ED.ravel(), self._transform.A)
        self._transform.is_trained = True

    @classmethod
    def random(cls, dimensions: int) -> "Rotation":
        """A rotation to E dimensions: the next multiple of 16, as SIMD works on 16 numbers at a time."""
        turned = -(-dimensions // 16) * 16
        gaussian = np.random.default_rng(_SEED).normal(size=(turned, turned))
        orthogonal, _ = np.linalg.qr(gaussian)
        return cls(orthogonal[:, :dimensions].astype(np.float32))

    def of_one(self, vector_D: Vector) -> Vector:
        """A vector turned: float32 [E]."""
        return products(self.matrix_ED, vector_D)

    def of_many(self, vectors_ND: Vector) -> Vector:
        """Vectors turned, by as many threads as faiss has here: float32 [N, E]."""
        turned: Vector = self._transform.apply(np.ascontiguousarray(vectors_ND))
        return turned


def only_these(bits: npt.NDArray[np.uint8]) -> dict[str, faiss.IDSelectorBitmap]:
    """What lets faiss find only the rows whose bits are set; it keeps the array for as long as it lives."""
    return {"sel": _faiss.IDSelectorBitmap(bits)}


class ByteCodes:
    """The rows of a full chunk in 8 bits a dimension: searched at a quarter of the memory's traffic.

    Args:
        vectors_ND: Of length 1.
        rotation: What to turn them by.
    """

    def __init__(self, vectors_ND: Vector, rotation: Rotation) -> None:
        self._rotation = rotation
        blocks = [
            vectors_ND[start : start + _ROWS_AT_ONCE] for start in range(0, len(vectors_ND), _ROWS_AT_ONCE)
        ]
        scale = np.float32(127.0 / max(float(np.abs(rotation.of_many(block)).max()) for block in blocks))
        self._index = faiss.IndexScalarQuantizer(
            len(rotation.matrix_ED), faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        )
        for block in blocks:
            self._index.add(np.round(rotation.of_many(block) * scale))

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return int(self._index.ntotal) * int(self._index.d)

    def nearest(
        self, query_D: Vector, *, depth: int, alive: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.int64]:
        """The rows that are nearest to a query as far as 8 bits tell, in no order.

        Args:
            query_D: Of length 1.
            depth: How many.
            alive: Those to choose from; None for all.
        """
        query_1E = self._rotation.of_one(query_D)[None]
        query_1E = np.round(query_1E * (np.float32(127.0) / np.abs(query_1E).max()))
        parameters = None
        if alive is not None:
            parameters = _faiss.SearchParameters(**only_these(np.packbits(alive, bitorder="little")))
        _, rows_1K = self._index.search(query_1E, min(depth, self._index.ntotal), params=parameters)
        found: npt.NDArray[np.int64] = rows_1K[0]
        return found[found >= 0]
