"""What may be kept: vectors, ids, metadata."""

from typing import Any

import numpy as np
import pytest

from app.errors import InvalidItem, InvalidVector
from app.search.collection import Item
from app.search.rows import check_items, unit_vectors


def item(**changes: Any) -> Item:  # noqa: ANN401 - fields of several types
    fields: dict[str, Any] = {"id": "a", "vector": np.ones(4, dtype=np.float32), "metadata": {}}
    return Item(**(fields | changes))


def deep(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(levels - 1):
        inner = {"a": inner}
    return inner


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_only_the_direction_is_kept_however_long_the_vector(scale: float) -> None:
    vectors = unit_vectors(np.array([[3.0, 4.0]]) * scale, dimensions=2)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [[0.6, 0.8]], rtol=1e-7)


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        pytest.param([1.0, 2.0, 3.0], "3 dimensions; this collection's have 2", id="too long"),
        pytest.param([1.0, np.nan], "1 has NaN", id="NaN"),
        pytest.param([np.inf, 0.0], "1 has NaN or infinite", id="infinite"),
        pytest.param([0.0, -0.0], "1 is zero", id="zero"),
        pytest.param([[1.0, 1.0]], r"the shape \[1, 2\]", id="a matrix"),
        pytest.param(1.0, r"the shape \[\]", id="a number"),
    ],
)
def test_a_vector_without_a_direction_is_refused(vector: object, says: str) -> None:
    good = np.ones(2, dtype=np.float32)
    with pytest.raises(InvalidVector, match=says):
        check_items([item(vector=good), item(vector=np.array(vector, dtype=np.float32))], dimensions=2)


def test_a_vector_of_text_is_refused() -> None:
    with pytest.raises(InvalidVector, match="numbers"):
        unit_vectors(np.array([["1", "2"]]), dimensions=2)


@pytest.mark.parametrize(
    "item_id",
    ["a", "album/2024/IMG 1.jpg", "../x", "ü" * 128, "\U0001f600", "a" * 256, "'; DROP TABLE items; --", " "],
)
def test_ids_with_slashes_spaces_and_any_script_are_kept(item_id: str) -> None:
    check_items([item(id=item_id)], dimensions=4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"id": ""}, "id of item 0", id="empty id"),
        pytest.param({"id": "a" * 257}, "257 bytes", id="id one byte over"),
        pytest.param({"id": "ü" * 129}, "258 bytes", id="id of few but wide characters"),
        pytest.param({"id": "a" * 10_240}, "10240 bytes", id="id of 10 kB"),
        pytest.param({"id": "a\nb"}, "control", id="newline in id"),
        pytest.param({"id": "a\0b"}, "control", id="NUL in id"),
        pytest.param({"id": "\x85"}, "control", id="C1 control in id"),
        pytest.param({"id": ".."}, "no URL can name", id="the folder above as id"),
        pytest.param({"id": "\udc80"}, "id of item 0", id="half a surrogate pair in id"),
        pytest.param({"sha256": "ABC"}, "64 lower-case hex", id="hash"),
        pytest.param({"source": "a\0"}, "NUL", id="NUL in source"),
        pytest.param({"source": "a" * 4_097}, "4096", id="long source"),
        pytest.param({"thumbnail": b""}, "0 bytes", id="empty thumbnail"),
        pytest.param({"thumbnail": b"x" * 262_145}, "262145 bytes", id="large thumbnail"),
        pytest.param({"metadata": []}, "JSON object", id="metadata that is a list"),
        pytest.param({"metadata": {"a": "x" * 16_000}}, "at most 16,000", id="large metadata"),
        pytest.param({"metadata": {"a": "x" * 10_000_000}}, "at most 16,000", id="10 MB of metadata"),
        pytest.param({"metadata": deep(9)}, "more than 8 deep", id="deep metadata"),
        pytest.param({"metadata": {"a": float("nan")}}, "NaN", id="NaN in metadata"),
        pytest.param({"metadata": {"a": [float("inf")]}}, "infinite", id="infinity in metadata"),
        pytest.param({"metadata": {"a": 2**63}}, "64 bits", id="large integer in metadata"),
        pytest.param({"metadata": {"a": "\ud800"}}, "surrogate", id="half a surrogate pair in metadata"),
        pytest.param({"metadata": {"a\0": 1}}, "key", id="NUL in a key"),
        pytest.param({"metadata": {1: 1}}, "key", id="key that is a number"),
        pytest.param({"metadata": {"a": b"x"}}, "bytes, which JSON has not", id="bytes in metadata"),
    ],
)
def test_an_item_that_cannot_be_kept_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidItem, match=says):
        check_items([item(**changes)], dimensions=4)


def test_equal_metadata_are_equal_texts() -> None:
    checked = check_items(
        [item(metadata={"a": 1, "b": {"d": 2, "c": "ü"}}), item(metadata={"b": {"c": "ü", "d": 2}, "a": 1})],
        dimensions=4,
    )
    assert checked.metadata[0] == checked.metadata[1] == '{"a":1,"b":{"c":"ü","d":2}}'


def test_metadata_at_the_limits_are_kept() -> None:
    checked = check_items([item(metadata=deep(8)), item(metadata={"a": "x" * 15_992})], dimensions=4)
    assert len(checked.metadata[1]) == 16_000
