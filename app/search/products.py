"""Inner products of float32 vectors: of one query by one thread and without copies, of several by BLAS.

One thread, because searches come from many: two that both wanted every core would wait for each other, and
for whatever else computes. faiss gives the interpreter's lock back meanwhile.

Dimension key: N rows · Q queries · D embedding
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from app.search.collection import Vector

Rows = npt.NDArray[np.int64]
_faiss: Any = faiss  # its stubs lack these functions


def products(vectors_ND: Vector, query_D: Vector) -> Vector:
    """The inner products of all rows with a query: float32 [N].

    Args:
        vectors_ND: Contiguous.
        query_D: Contiguous.
    """
    rows, dimensions = vectors_ND.shape
    out_N = np.empty(rows, dtype=np.float32)
    if rows:
        _faiss.fvec_inner_products_ny(
            faiss.swig_ptr(out_N), faiss.swig_ptr(query_D), faiss.swig_ptr(vectors_ND), dimensions, rows
        )
    return out_N


def products_at(vectors_ND: Vector, rows_M: Rows, query_D: Vector) -> Vector:
    """The inner products of some rows with a query: float32 [M].

    Args:
        vectors_ND: Contiguous.
        rows_M: Contiguous; which must be there, as nothing checks them.
        query_D: Contiguous.
    """
    out_M = np.empty(len(rows_M), dtype=np.float32)
    if len(rows_M):
        _faiss.fvec_inner_products_by_idx(
            faiss.swig_ptr(out_M),
            faiss.swig_ptr(query_D),
            faiss.swig_ptr(vectors_ND),
            faiss.swig_ptr(rows_M),
            vectors_ND.shape[1],
            1,
            len(rows_M),
        )
    return out_M


def rounding_error(dimensions: int) -> float:
    """How far two inner products of unit vectors may be from their true order.

    A sum of D products of float32 is off by at most D * 2^-24 for unit vectors, at either of two rows; twice
    that again, for a library that fuses or reorders.
    """
    return 4 * dimensions * 2.0**-24
