from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.errors import InvalidQuery
from app.search.collection import Collection, Item, Json, Vector
from app.search.embedded.library import Collections
from app.search.reading import duplicate_groups
from app.search.reading.duplicate_groups import DuplicatePage, duplicate_page
from app.search.reading.duplicates import duplicate_links
from app.search.reading.file import Kept
from app.search.reading.jobs import Result
from app.search.reading.spool import open_spool, write_spool
from tests.app.search.planted import MODEL, at_cosine, directions, ignore

D = 64


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collections.open(tmp_path / "data") as collections:
        yield collections.create("default", fingerprint=MODEL, dimensions=D)


def result_of(collection: Collection, tmp_path: Path) -> Result:
    spool = tmp_path / f"spool-{collection.seq}"
    spool.mkdir()
    write_spool(collection, spool, report=ignore, is_cancelled=lambda: False)
    items = open_spool(spool, dimensions=D)
    return Result(Kept({}, duplicate_links(items, report=ignore)), items.ids, collection.seq, len(items), 0.0)


def put(
    collection: Collection,
    item_id: str,
    vector: Vector,
    *,
    sha256: str = "",
    metadata: dict[str, Json] | None = None,
) -> None:
    item = Item(id=item_id, vector=vector, metadata=metadata or {}, sha256=sha256)
    collection.upsert([item], fingerprint=MODEL)


def page(
    collection: Collection,
    result: Result,
    *,
    threshold: float = 0.95,
    limit: int = 20,
    cursor: str | None = None,
) -> DuplicatePage:
    return duplicate_page(collection, result, threshold=threshold, limit=limit, cursor=cursor)


def test_groups_are_found_exactly_at_every_threshold_the_surest_first(
    collection: Collection, tmp_path: Path
) -> None:
    singles = directions(20, D)
    for i, vector in enumerate(singles):
        put(collection, f"{i:02}", vector)
    for i, cosine in enumerate((0.999, 0.97, 0.93)):
        put(collection, f"{i:02}-copy", at_cosine(singles[i], cosine, seed=i))
    put(collection, "03-same", singles[3])
    result = result_of(collection, tmp_path)

    def groups(threshold: float) -> list[set[str]]:
        return [set(group.ids) for group in page(collection, result, threshold=threshold).groups]

    assert groups(1.0) == [{"03", "03-same"}]
    assert groups(0.99) == [{"03", "03-same"}, {"00", "00-copy"}]
    assert groups(0.95) == [{"03", "03-same"}, {"00", "00-copy"}, {"01", "01-copy"}]
    assert groups(0.90) == [{"03", "03-same"}, {"00", "00-copy"}, {"01", "01-copy"}, {"02", "02-copy"}]
    everything = page(collection, result, threshold=0.9)
    assert (everything.total_groups, everything.total_items) == (4, 8)
    assert [group.size for group in everything.groups] == [2, 2, 2, 2]
    for group, cosine in zip(everything.groups, (1, 0.999, 0.97, 0.93), strict=True):
        assert group.min_score == pytest.approx(cosine, abs=1e-5)
        assert group.mean_score == pytest.approx(cosine, abs=1e-5)


def test_a_group_says_its_middle_its_scores_and_its_weakest_pair(
    collection: Collection, tmp_path: Path
) -> None:
    middle = directions(1, D)[0]
    put(collection, "z-middle", middle)
    ends = [at_cosine(middle, 0.97, seed=seed) for seed in range(4)]
    for i, end in enumerate(ends):
        put(collection, f"end-{i}", end)
    (group,) = page(collection, result_of(collection, tmp_path)).groups
    assert group.ids[0] == "z-middle"
    assert group.keep == "z-middle"
    assert group.scores[0] == pytest.approx(1)
    np.testing.assert_allclose(group.scores[1:], 0.97, atol=1e-5)
    pairs = [float(a @ b) for i, a in enumerate(ends) for b in ends[:i]]
    assert group.min_score == pytest.approx(min(pairs), abs=1e-5)
    assert group.mean_score == pytest.approx(np.mean([*pairs, *[0.97] * 4]), abs=1e-5)


def test_equal_bytes_are_said_to_be_equal(collection: Collection, tmp_path: Path) -> None:
    one, two = directions(2, D)
    for name in "ab":
        put(collection, f"exact-{name}", one, sha256="11" * 32)
    put(collection, "near-a", two, sha256="22" * 32)
    put(collection, "near-b", two, sha256="22" * 32)
    put(collection, "near-c", at_cosine(two, 0.98), sha256="33" * 32)
    put(collection, "near-d", at_cosine(two, 0.98, seed=1))
    exact, near = page(collection, result_of(collection, tmp_path)).groups
    assert (exact.ids, exact.is_exact) == (["exact-a", "exact-b"], True)
    assert exact.same_bytes == [["exact-a", "exact-b"]]
    assert (near.size, near.is_exact, near.same_bytes) == (4, False, [["near-a", "near-b"]])


def test_the_one_to_keep_has_the_most_pixels_if_all_say_theirs(
    collection: Collection, tmp_path: Path
) -> None:
    vector, other = directions(2, D)
    for name, width in (("a", 100), ("b", 400), ("c", 200)):
        put(collection, name, vector, metadata={"width": width, "height": 50.0})
    put(collection, "x", other, metadata={"width": 10, "height": 10})
    put(collection, "y", other, metadata={"width": "large", "height": 10})
    kept = [group.keep for group in page(collection, result_of(collection, tmp_path)).groups]
    assert kept == ["b", "x"]


def test_pages_follow_each_other_even_when_the_result_is_replaced(
    collection: Collection, tmp_path: Path
) -> None:
    vectors = directions(12, D)
    for i, vector in enumerate(vectors):
        put(collection, f"{i:02}-a", vector)
        put(collection, f"{i:02}-b", vector if i < 6 else at_cosine(vector, 1 - i / 1_000, seed=i))
    result = result_of(collection, tmp_path)
    seen, cursor = [], None
    while True:
        part = page(collection, result, limit=5, cursor=cursor)
        assert len(part.groups) <= 5
        assert part.total_groups == 12
        seen += [group.ids[0][:2] for group in part.groups]
        cursor = part.next_cursor
        if cursor is None:
            break
    assert seen == [f"{i:02}" for i in range(12)]

    first = page(collection, result, limit=5)
    collection.delete(["00-a", "00-b", "05-a"])
    replaced = result_of(collection, tmp_path)
    after = page(collection, replaced, limit=5, cursor=first.next_cursor)
    assert [group.ids[0][:2] for group in after.groups] == ["06", "07", "08", "09", "10"]


def test_members_that_were_deleted_or_replaced_since_are_left_out(
    collection: Collection, tmp_path: Path
) -> None:
    one, two, three, stranger = directions(4, D)
    for name, vector in (("one", one), ("two", two), ("three", three)):
        for copy in "abc":
            put(collection, f"{name}-{copy}", vector)
    result = result_of(collection, tmp_path)
    collection.delete(["one-a", "two-a", "two-b"])
    put(collection, "three-a", stranger)
    groups = [(group.ids, group.size) for group in page(collection, result).groups]
    assert groups == [(["one-b", "one-c"], 2), (["three-b", "three-c"], 2)]


def test_of_a_large_group_the_first_are_listed(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicate_groups, "MAX_LISTED", 5)
    monkeypatch.setattr(duplicate_groups, "_MAX_LISTED_OF_PAGE", 6)
    for group, vector in enumerate(directions(3, D)):
        for i in range(9):
            put(collection, f"{group}-{i}", vector, sha256=f"{group}1" * 32)
    result = result_of(collection, tmp_path)
    part = page(collection, result)
    assert [(group.size, group.ids) for group in part.groups] == [
        (9, [f"{group}-{i}" for i in range(5)]) for group in range(2)
    ]
    assert part.next_cursor is not None  # a page of large groups has fewer
    assert not part.groups[0].is_exact  # of those that aren't listed nothing is said
    rest = page(collection, result, cursor=part.next_cursor)
    assert [group.ids[0] for group in rest.groups] == ["2-0"]


def test_where_there_are_no_duplicates_there_are_no_groups(collection: Collection, tmp_path: Path) -> None:
    empty = result_of(collection, tmp_path)
    assert page(collection, empty).groups == []
    for i, vector in enumerate(directions(10, D)):
        put(collection, str(i), vector)
    found = page(collection, result_of(collection, tmp_path))
    assert (found.groups, found.total_groups, found.total_items, found.next_cursor) == ([], 0, 0, None)


@pytest.mark.parametrize("cursor", ["", "x", "ü", "e30=", "WzFd", "WyJhIiwxLDJd", "WzEsMWU5OTksImEiXQ=="])
def test_a_cursor_that_is_none_of_ours_is_refused(
    collection: Collection, tmp_path: Path, cursor: str
) -> None:
    with pytest.raises(InvalidQuery, match="cursor"):
        page(collection, result_of(collection, tmp_path), cursor=cursor)
