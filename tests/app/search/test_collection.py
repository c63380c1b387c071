"""What every engine promises, asked through the seam only; `conftest` has the engines."""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from app.errors import (
    CollectionExists,
    FingerprintMismatch,
    InvalidCollection,
    InvalidFilter,
    InvalidItem,
    InvalidQuery,
    InvalidVector,
    PredecessorChanged,
    SuccessorExists,
    UnknownCollection,
)
from app.search.collection import Catalogue, Collection, Item
from tests.app.search.samples import MODEL, D, ids_found, items, vectors


def test_an_item_is_found_by_the_next_search_with_its_metadata_and_its_cosine(pictures: Collection) -> None:
    batch = items(50)
    assert pictures.upsert(batch, fingerprint=MODEL) == ["added"] * 50
    (neighbours,) = pictures.search(7.5 * batch[3].vector[None], k=2)
    assert neighbours[0].id == "album/0003"
    assert neighbours[0].metadata == {"number": 3, "even": False}
    assert neighbours[0].score == 1.0
    query, second = batch[3].vector, batch[int(neighbours[1].id[-4:])].vector
    cosine = query @ second / np.linalg.norm(query) / np.linalg.norm(second)
    assert neighbours[1].score == pytest.approx(cosine, abs=1e-6)


def test_adding_again_what_is_there_changes_nothing(pictures: Collection) -> None:
    batch = items(3)
    pictures.upsert(batch, fingerprint=MODEL)
    # The same image embedded in another batch may differ in its last bits; its hash says that it is the same.
    again = [
        Item(id=i.id, vector=i.vector * 1.001, metadata=dict(i.metadata), sha256=i.sha256) for i in batch
    ]
    assert pictures.upsert(again, fingerprint=MODEL) == ["unchanged"] * 3


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"metadata": {"number": 1}}, id="metadata"),
        pytest.param({"metadata": {"number": 0.0, "even": True}}, id="an integer that becomes a float"),
        pytest.param({"sha256": "f" * 64}, id="image"),
        pytest.param({"source": "elsewhere.jpg"}, id="source"),
        pytest.param({"thumbnail": b"webp"}, id="a thumbnail where there was none"),
    ],
)
def test_whatever_differs_updates_the_item(pictures: Collection, change: dict[str, Any]) -> None:
    (item,) = items(1)
    pictures.upsert([item], fingerprint=MODEL)
    changed = Item(
        **(
            {
                "id": item.id,
                "vector": item.vector,
                "metadata": item.metadata,
                "sha256": item.sha256,
                "source": None,
            }
            | change
        )
    )
    assert pictures.upsert([changed], fingerprint=MODEL) == ["updated"]
    assert pictures.upsert([changed], fingerprint=MODEL) == ["unchanged"]
    (stored,) = pictures.get([item.id])
    assert stored is not None
    assert (stored.metadata, stored.sha256, stored.source) == (
        changed.metadata,
        changed.sha256,
        changed.source,
    )
    assert pictures.count() == 1


def test_a_vector_without_an_image_is_the_same_only_if_its_numbers_are(pictures: Collection) -> None:
    first, second = vectors(2)
    assert pictures.upsert([Item(id="a", vector=first, metadata={})], fingerprint=MODEL) == ["added"]
    assert pictures.upsert([Item(id="a", vector=first, metadata={})], fingerprint=MODEL) == ["unchanged"]
    assert pictures.upsert([Item(id="a", vector=second, metadata={})], fingerprint=MODEL) == ["updated"]
    (neighbours,) = pictures.search(second[None], k=5)
    assert [(n.id, n.score) for n in neighbours] == [("a", 1.0)]


def test_of_two_items_with_one_id_in_a_batch_the_later_stays(pictures: Collection) -> None:
    first, second = vectors(2)
    batch = [Item(id="a", vector=v, metadata={"n": n}) for n, v in enumerate([first, second, second])]
    batch[2] = Item(id="a", vector=second, metadata={"n": 1})
    assert pictures.upsert(batch, fingerprint=MODEL) == ["added", "updated", "unchanged"]
    (neighbours,) = pictures.search(second[None], k=5)
    assert [(n.id, n.metadata) for n in neighbours] == [("a", {"n": 1})]


def test_a_deleted_item_is_gone_everywhere_and_may_come_back_as_new(pictures: Collection) -> None:
    batch = items(5)
    pictures.upsert(batch, fingerprint=MODEL)
    assert pictures.delete(["album/0002", "album/0002", "unknown", "\ud800", "album/0003\0"]) == 1
    assert pictures.delete(["album/0002"]) == 0
    assert pictures.count() == 4
    assert pictures.get(["album/0002"]) == [None]
    assert pictures.thumbnail("album/0002") is None
    assert "album/0002" not in ids_found(pictures, batch[2].vector)
    assert "album/0002" not in ids_found(pictures, batch[2].vector, filter={"field": "number", "eq": 2})
    assert "album/0002" not in [item.id for item in pictures.scroll(cursor=None, limit=10).items]
    assert pictures.upsert([batch[2]], fingerprint=MODEL) == ["added"]
    assert ids_found(pictures, batch[2].vector)[0] == "album/0002"


def test_get_answers_in_the_order_asked(pictures: Collection) -> None:
    batch = items(3)
    pictures.upsert(batch, fingerprint=MODEL)
    second, nothing, first = pictures.get(["album/0001", "album", "album/0000"])
    assert second is not None
    assert first is not None
    assert (second.id, nothing, first.id) == ("album/0001", None, "album/0000")
    np.testing.assert_allclose(first.vector, batch[0].vector / np.linalg.norm(batch[0].vector), atol=1e-7)
    assert first.vector.dtype == np.float32
    assert first.sha256 == batch[0].sha256


def test_a_thumbnail_is_what_was_given_and_goes_with_its_item(pictures: Collection) -> None:
    (vector,) = vectors(1)
    pictures.upsert([Item(id="a", vector=vector, metadata={}, thumbnail=b"webp\0\xff")], fingerprint=MODEL)
    assert pictures.thumbnail("a") == b"webp\0\xff"
    assert pictures.thumbnail("b") is None
    pictures.upsert([Item(id="a", vector=vector, metadata={"new": 1}, thumbnail=b"other")], fingerprint=MODEL)
    assert pictures.thumbnail("a") == b"other"


def test_scrolling_lists_every_item_once_in_order_of_id(pictures: Collection) -> None:
    pictures.upsert(items(25)[::-1], fingerprint=MODEL)
    seen: list[str] = []
    cursor = None
    while True:
        page = pictures.scroll(cursor=cursor, limit=10)
        seen += [item.id for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
        pictures.delete(["album/0000"])  # what is deleted behind the cursor moves nothing
    assert seen == [f"album/{i:04}" for i in range(25)]


def test_a_page_that_ends_the_list_says_so(pictures: Collection) -> None:
    pictures.upsert(items(10), fingerprint=MODEL)
    assert pictures.scroll(cursor=None, limit=10).next_cursor is None
    assert pictures.scroll(cursor=None, limit=9).next_cursor is not None


def test_pages_of_a_search_follow_each_other_and_equal_scores_are_in_order_of_id(
    pictures: Collection,
) -> None:
    (vector,) = vectors(1)
    names = [f"{i:03}" for i in range(60)]
    shuffled = np.random.default_rng(1).permutation(names)
    pictures.upsert([Item(id=str(name), vector=vector, metadata={}) for name in shuffled], fingerprint=MODEL)
    pages = [ids_found(pictures, vector, k=7, offset=offset) for offset in range(0, 70, 7)]
    assert [name for page in pages for name in page] == names


def test_several_queries_get_one_answer_each(pictures: Collection) -> None:
    batch = items(40)
    pictures.upsert(batch, fingerprint=MODEL)
    answers = pictures.search(np.stack([item.vector for item in batch]), k=1)
    assert [neighbours[0].id for neighbours in answers] == [item.id for item in batch]
    assert pictures.search(np.empty((0, D), dtype=np.float32), k=1) == []


def test_a_filter_keeps_only_what_matches_and_never_too_few(pictures: Collection) -> None:
    batch = items(200)
    pictures.upsert(batch, fingerprint=MODEL)
    rare = {"field": "number", "in": [5, 100, 199]}
    assert set(ids_found(pictures, batch[0].vector, filter=rare)) == {
        "album/0005",
        "album/0100",
        "album/0199",
    }
    even = ids_found(pictures, batch[1].vector, k=150, filter={"field": "even", "eq": True})
    assert set(even) == {f"album/{i:04}" for i in range(0, 200, 2)}
    assert ids_found(pictures, batch[0].vector, filter={"field": "missing", "exists": True}) == []


def test_a_threshold_cuts_and_excluded_ids_are_passed_over(pictures: Collection) -> None:
    batch = items(100)
    pictures.upsert(batch, fingerprint=MODEL)
    (everything,) = pictures.search(batch[0].vector[None], k=100)
    (near,) = pictures.search(batch[0].vector[None], k=100, threshold=0.3)
    assert near == [neighbour for neighbour in everything if neighbour.score >= 0.3]
    assert 0 < len(near) < 100
    excluded = [everything[0].id, everything[2].id, "unknown"]
    assert ids_found(pictures, batch[0].vector, k=2, exclude_ids=excluded) == [
        everything[1].id,
        everything[3].id,
    ]


def test_asking_for_exact_search_is_allowed_and_agrees(pictures: Collection) -> None:
    batch = items(30)
    pictures.upsert(batch, fingerprint=MODEL)
    query = batch[0].vector[None]
    assert pictures.search(query, k=5, exact=True) == pictures.search(query, k=5)


def test_vectors_of_another_model_are_refused_with_both_fingerprints(pictures: Collection) -> None:
    with pytest.raises(FingerprintMismatch, match=r"sha256:model.*sha256:other") as refused:
        pictures.upsert(items(1), fingerprint="sha256:other")
    assert (refused.value.expected, refused.value.found) == (MODEL, "sha256:other")
    assert pictures.count() == 0


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        pytest.param({"vector": np.zeros(D, dtype=np.float32)}, InvalidVector, id="zero"),
        pytest.param({"vector": np.full(D, np.nan, dtype=np.float32)}, InvalidVector, id="NaN"),
        pytest.param({"vector": np.full(D, np.inf, dtype=np.float32)}, InvalidVector, id="infinite"),
        pytest.param({"vector": np.ones(D + 1, dtype=np.float32)}, InvalidVector, id="dimensions"),
        pytest.param({"id": "a" * 10_240}, InvalidItem, id="id of 10 kB"),
        pytest.param({"metadata": {"a": "x" * 10_000_000}}, InvalidItem, id="metadata of 10 MB"),
    ],
)
def test_one_bad_item_leaves_the_collection_untouched(
    pictures: Collection, bad: dict[str, Any], error: type[Exception]
) -> None:
    first, second = items(2)
    pictures.upsert([first], fingerprint=MODEL)
    spoilt = Item(**({"id": "bad", "vector": second.vector, "metadata": {}} | bad))
    with pytest.raises(error):
        pictures.upsert([second, spoilt], fingerprint=MODEL)
    assert pictures.count() == 1
    assert ids_found(pictures, second.vector) == [first.id]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        pytest.param({"k": 0}, InvalidQuery, id="k of 0"),
        pytest.param({"k": 1_000_000}, InvalidQuery, id="k of a million"),
        pytest.param({"k": 10, "offset": 991}, InvalidQuery, id="too deep a page"),
        pytest.param({"k": 10, "offset": -1}, InvalidQuery, id="offset below 0"),
        pytest.param({"k": 1, "threshold": 1.01}, InvalidQuery, id="threshold above 1"),
        pytest.param({"k": 1, "threshold": float("nan")}, InvalidQuery, id="threshold that is NaN"),
        pytest.param({"k": 1, "filter": {"field": "a"}}, InvalidFilter, id="filter without operator"),
        pytest.param({"k": 1, "filter": []}, InvalidFilter, id="filter that is a list"),
    ],
)
def test_a_query_out_of_bounds_is_refused(
    pictures: Collection, asked: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        pictures.search(vectors(1), **asked)


def test_the_deepest_page_allowed_is_answered(pictures: Collection) -> None:
    pictures.upsert(items(1_001), fingerprint=MODEL)
    assert len(ids_found(pictures, vectors(1)[0], k=10, offset=990)) == 10


@pytest.mark.parametrize(
    "query", [np.zeros((1, D)), np.full((1, D), np.nan), np.ones((1, D - 1)), np.ones(D)], ids=str
)
def test_a_query_without_a_direction_is_refused(pictures: Collection, query: npt.NDArray[np.float64]) -> None:
    with pytest.raises(InvalidVector):
        pictures.search(query, k=1)


@pytest.mark.parametrize("limit", [0, 1_001])
def test_a_page_of_no_or_too_many_items_is_refused(pictures: Collection, limit: int) -> None:
    with pytest.raises(InvalidQuery, match="1 to 1000"):
        pictures.scroll(cursor=None, limit=limit)


@pytest.mark.parametrize("cursor", ["not base64!", "ü", "/w==", "abc"])
def test_a_cursor_that_is_not_ours_is_refused(pictures: Collection, cursor: str) -> None:
    with pytest.raises(InvalidQuery, match="cursor"):
        pictures.scroll(cursor=cursor, limit=10)


def test_collections_keep_apart_what_has_the_same_id(catalogue: Catalogue) -> None:
    first = catalogue.create("first", fingerprint=MODEL, dimensions=D)
    second = catalogue.create("second", fingerprint="other", dimensions=D + 1)
    first.upsert(items(3), fingerprint=MODEL)
    second.upsert(
        [Item(id="album/0000", vector=np.ones(D + 1, dtype=np.float32), metadata={"n": 2})],
        fingerprint="other",
    )
    assert second.delete(["album/0001"]) == 0
    assert first.delete(["album/0000"]) == 1
    (kept,) = second.get(["album/0000"])
    assert kept is not None
    assert kept.metadata == {"n": 2}
    assert [(c.name, c.items, c.fingerprint, c.dimensions) for c in catalogue.list()] == [
        ("first", 2, MODEL, D),
        ("second", 1, "other", D + 1),
    ]


def test_a_dropped_collection_is_unknown_to_all_who_held_it(
    catalogue: Catalogue, pictures: Collection
) -> None:
    pictures.upsert(items(3), fingerprint=MODEL)
    catalogue.drop("pictures")
    assert catalogue.list() == []
    for call in (
        lambda: catalogue.get("pictures"),
        lambda: catalogue.drop("pictures"),
        lambda: pictures.search(vectors(1), k=1),
        lambda: pictures.upsert(items(3), fingerprint=MODEL),
        lambda: pictures.upsert([], fingerprint=MODEL),
        lambda: pictures.delete(["album/0000"]),
        lambda: pictures.get(["album/0000"]),
        lambda: pictures.thumbnail("album/0000"),
        lambda: pictures.scroll(cursor=None, limit=1),
    ):
        with pytest.raises(UnknownCollection):
            call()
    again = catalogue.create("pictures", fingerprint=MODEL, dimensions=D)
    assert (again.count(), again.get(["album/0000"])) == (0, [None])


def test_a_name_is_taken_once(catalogue: Catalogue, pictures: Collection) -> None:
    with pytest.raises(CollectionExists, match="pictures"):
        catalogue.create("pictures", fingerprint=MODEL, dimensions=D)
    assert catalogue.get("pictures").fingerprint == MODEL


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "-x", "a b", "ü", "a" * 65, "a\n"])
def test_a_name_that_is_no_name_is_refused(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidCollection, match="1 to 64"):
        catalogue.create(name, fingerprint=MODEL, dimensions=D)


@pytest.mark.parametrize(("fingerprint", "dimensions"), [("", D), (MODEL, 0), (MODEL, 65_537)])
def test_a_collection_needs_a_model_and_dimensions(
    catalogue: Catalogue, fingerprint: str, dimensions: int
) -> None:
    with pytest.raises(InvalidCollection):
        catalogue.create("c", fingerprint=fingerprint, dimensions=dimensions)


def test_searches_see_one_state_while_others_write(pictures: Collection) -> None:
    """Every item flips between two vectors and labels; a search must never see a mixture."""
    left, right = vectors(2)
    names = [f"{i:02}" for i in range(20)]

    def flip(vector: npt.NDArray[np.float32], side: str) -> None:
        batch = [Item(id=name, vector=vector, metadata={"side": side}) for name in names]
        pictures.upsert(batch, fingerprint=MODEL)

    flip(left, "left")
    stop = threading.Event()
    failures: list[str] = []

    def write() -> None:
        while not stop.is_set():
            flip(right, "right")
            flip(left, "left")

    def read() -> None:
        for _ in range(60):
            (neighbours,) = pictures.search(
                left[None], k=20, filter={"field": "side", "in": ["left", "right"]}
            )
            sides = {neighbour.metadata["side"] for neighbour in neighbours}
            at_one = {neighbour.score == 1.0 for neighbour in neighbours}
            if len(neighbours) != 20 or len(sides) != 1 or at_one != {sides == {"left"}}:
                failures.append(f"{len(neighbours)} {sides} {at_one}")

    writer = threading.Thread(target=write)
    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    writer.join()
    assert failures == []


def test_writers_in_several_threads_lose_nothing(pictures: Collection) -> None:
    batches = [items(40, seed=seed) for seed in range(4)]

    def write(number: int) -> None:
        for item in batches[number]:
            renamed = Item(id=f"{number}/{item.id}", vector=item.vector, metadata=item.metadata)
            pictures.upsert([renamed], fingerprint=MODEL)
            assert ids_found(pictures, item.vector, k=1) == [renamed.id]

    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            write(number)
        except BaseException as error:  # a thread's failure must fail the test
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pictures.count() == 160


def test_what_was_deleted_can_be_brought_back_unless_it_was_added_again(pictures: Collection) -> None:
    batch = items(5)
    pictures.upsert(batch, fingerprint=MODEL)
    pictures.delete(["album/0001", "album/0002"])
    replacement = Item(id="album/0002", vector=batch[0].vector, metadata={"new": True})
    pictures.upsert([replacement], fingerprint=MODEL)
    assert pictures.undelete(["album/0001", "album/0002", "album/0003", "unknown"]) == 1
    assert pictures.undelete(["album/0001"]) == 0
    assert pictures.count() == 5
    back, new = pictures.get(["album/0001", "album/0002"])
    assert back is not None
    assert new is not None
    assert (back.metadata, new.metadata) == (batch[1].metadata, {"new": True})
    assert ids_found(pictures, batch[1].vector, k=1) == ["album/0001"]
    assert ids_found(pictures, batch[1].vector, filter={"field": "number", "eq": 1}) == ["album/0001"]


def test_what_matches_is_counted_listed_and_deleted(pictures: Collection) -> None:
    pictures.upsert(items(50), fingerprint=MODEL)
    even: dict[str, Any] = {"field": "even", "eq": True}
    assert (pictures.count(), pictures.count(even)) == (50, 25)
    first = pictures.scroll(cursor=None, limit=20, filter=even)
    second = pictures.scroll(cursor=first.next_cursor, limit=20, filter=even)
    assert [item.id for item in [*first.items, *second.items]] == [f"album/{i:04}" for i in range(0, 50, 2)]
    assert second.next_cursor is None
    assert pictures.delete_where({"and": [even, {"field": "number", "lt": 10}]}) == 5
    assert pictures.delete_where({"field": "number", "eq": -1}) == 0
    assert (pictures.count(), pictures.count(even)) == (45, 20)
    assert pictures.undelete([f"album/{i:04}" for i in range(10)]) == 5
    for call in (
        lambda: pictures.count({"field": "even"}),
        lambda: pictures.delete_where({}),
        lambda: pictures.scroll(cursor=None, limit=1, filter={"xor": []}),
        lambda: pictures.explain(filter={"field": 3, "eq": 1}),
    ):
        with pytest.raises(InvalidFilter):
            call()
    assert pictures.count() == 50


def test_a_greatest_score_passes_over_what_is_nearer(pictures: Collection) -> None:
    batch = items(300)
    pictures.upsert(batch, fingerprint=MODEL)
    (everything,) = pictures.search(batch[0].vector[None], k=300)
    (range_found,) = pictures.search(batch[0].vector[None], k=5, offset=2, max_score=0.2, threshold=-0.2)
    between = [neighbour for neighbour in everything if -0.2 <= neighbour.score <= 0.2]
    assert range_found == between[2:7]
    (all_below,) = pictures.search(batch[0].vector[None], k=500, max_score=0.0)
    assert all_below == [neighbour for neighbour in everything if neighbour.score <= 0.0]
    bad: list[dict[str, Any]] = [
        {"max_score": 1.5},
        {"max_score": float("nan")},
        {"max_score": 0.1, "threshold": 0.2},
    ]
    for asked in bad:
        with pytest.raises(InvalidQuery, match="max_score"):
            pictures.search(batch[0].vector[None], k=5, **asked)


def test_neighbours_carry_their_vectors_if_asked(pictures: Collection) -> None:
    batch = items(20)
    pictures.upsert(batch, fingerprint=MODEL)
    (plain,) = pictures.search(batch[0].vector[None], k=3)
    (neighbours,) = pictures.search(batch[0].vector[None], k=3, with_vectors=True)
    assert [n.vector for n in plain] == [None] * 3
    for neighbour in neighbours:
        assert neighbour.vector is not None
        assert neighbour.vector.dtype == np.float32
        vector = batch[int(neighbour.id[-4:])].vector
        np.testing.assert_allclose(neighbour.vector, vector / np.linalg.norm(vector), atol=1e-6)


def test_the_sequence_number_moves_with_whatever_is_written_only(pictures: Collection) -> None:
    seen = [pictures.seq]
    pictures.upsert(items(3), fingerprint=MODEL)
    seen.append(pictures.seq)
    pictures.delete(["album/0000"])
    seen.append(pictures.seq)
    pictures.undelete(["album/0000"])
    seen.append(pictures.seq)
    pictures.delete_where({"field": "number", "eq": 0})
    seen.append(pictures.seq)
    assert len(set(seen)) == 5
    pictures.search(vectors(1), k=1)
    assert pictures.seq == seen[-1]


def test_statistics_and_explanations_count_what_is_there(pictures: Collection) -> None:
    pictures.upsert(items(30), fingerprint=MODEL)
    pictures.delete(["album/0000", "album/0001"])
    stats = pictures.stats()
    assert (stats.items, stats.deleted) == (28, 2)
    explanation = pictures.explain(filter={"field": "even", "eq": True})
    assert (explanation.items, explanation.matched) == (28, 14)
    assert pictures.explain().matched is None


def test_an_alias_leads_to_a_collection_until_it_leads_elsewhere(
    catalogue: Catalogue, pictures: Collection
) -> None:
    other = catalogue.create("other", fingerprint=MODEL, dimensions=D)
    other.upsert(items(3), fingerprint=MODEL)
    catalogue.set_alias("current", "pictures")
    catalogue.set_alias("best", "pictures")
    assert catalogue.get("current").count() == 0
    assert [(c.name, c.aliases) for c in catalogue.list()] == [
        ("other", ()),
        ("pictures", ("best", "current")),
    ]
    catalogue.set_alias("current", "other")
    assert catalogue.get("current").count() == 3
    with pytest.raises(CollectionExists):
        catalogue.create("current", fingerprint=MODEL, dimensions=D)
    with pytest.raises(CollectionExists):
        catalogue.set_alias("pictures", "other")
    with pytest.raises(UnknownCollection):
        catalogue.set_alias("current", "nowhere")
    with pytest.raises(UnknownCollection):
        catalogue.set_alias("new", "current")
    with pytest.raises(InvalidCollection):
        catalogue.set_alias("a/b", "other")
    with pytest.raises(UnknownCollection):
        catalogue.drop("current")
    catalogue.drop_alias("current")
    for call in (lambda: catalogue.get("current"), lambda: catalogue.drop_alias("current")):
        with pytest.raises(UnknownCollection):
            call()
    catalogue.drop("pictures")
    with pytest.raises(UnknownCollection):
        catalogue.get("best")


def test_a_successor_is_filled_unseen_and_takes_the_place_at_once(
    catalogue: Catalogue, pictures: Collection
) -> None:
    pictures.upsert(items(5), fingerprint=MODEL)
    catalogue.set_alias("current", "pictures")
    successor = catalogue.begin_successor("pictures", fingerprint="new", dimensions=D + 1)
    assert successor.name == "pictures"
    again = [Item(id=i.id, vector=np.ones(D + 1, dtype=np.float32), metadata=i.metadata) for i in items(3)]
    successor.upsert(again, fingerprint="new")
    resumed = catalogue.begin_successor("pictures", fingerprint="new", dimensions=D + 1)
    assert resumed.count() == 3
    (info,) = catalogue.list()
    assert (info.name, info.fingerprint, info.items) == ("pictures", MODEL, 5)
    assert info.successor is not None
    assert (info.successor.fingerprint, info.successor.dimensions, info.successor.items) == ("new", D + 1, 3)
    assert catalogue.get("pictures").count() == catalogue.get("current").count() == 5
    with pytest.raises(SuccessorExists) as refused:
        catalogue.begin_successor("pictures", fingerprint="other", dimensions=D)
    assert (refused.value.expected, refused.value.found) == ("new", "other")

    expected_seq = pictures.seq
    pictures.delete(["album/0004"])
    with pytest.raises(PredecessorChanged):
        catalogue.finish_successor("pictures", expected_seq=expected_seq)
    assert catalogue.get("pictures").fingerprint == MODEL
    retired = catalogue.finish_successor("pictures", expected_seq=pictures.seq)
    for name in ("pictures", "current"):
        assert (catalogue.get(name).fingerprint, catalogue.get(name).count()) == ("new", 3)
    assert (catalogue.get(retired).fingerprint, catalogue.get(retired).count()) == (MODEL, 4)
    assert catalogue.get(retired).name == retired
    assert [(c.name, c.aliases, c.successor) for c in catalogue.list()] == sorted(
        [("pictures", ("current",), None), (retired, (), None)]
    )
    with pytest.raises(UnknownCollection):
        catalogue.finish_successor("pictures")


def test_a_retired_collection_gets_a_free_name_each_time(catalogue: Catalogue) -> None:
    name = "n" * 64
    catalogue.create(name, fingerprint=MODEL, dimensions=D)
    retired = []
    for _ in range(3):
        catalogue.begin_successor(name, fingerprint=MODEL, dimensions=D)
        retired.append(catalogue.finish_successor(name))
    assert len(set(retired)) == 3
    assert {info.name for info in catalogue.list()} == {name, *retired}
    assert all(len(one) <= 64 for one in retired)


def test_a_successor_can_be_cancelled_and_goes_with_its_predecessor(
    catalogue: Catalogue, pictures: Collection
) -> None:
    pictures.upsert(items(2), fingerprint=MODEL)
    successor = catalogue.begin_successor("pictures", fingerprint="new", dimensions=D)
    successor.upsert(items(1), fingerprint="new")
    catalogue.cancel_successor("pictures")
    with pytest.raises(UnknownCollection):
        successor.upsert(items(1), fingerprint="new")
    with pytest.raises(UnknownCollection):
        catalogue.cancel_successor("pictures")
    assert pictures.count() == 2
    other = catalogue.begin_successor("pictures", fingerprint="other", dimensions=D)
    assert other.count() == 0
    catalogue.drop("pictures")
    for call in (
        lambda: other.upsert(items(1), fingerprint="other"),
        lambda: catalogue.begin_successor("pictures", fingerprint="other", dimensions=D),
        lambda: catalogue.cancel_successor("pictures"),
        lambda: catalogue.finish_successor("pictures"),
    ):
        with pytest.raises(UnknownCollection):
            call()
    with pytest.raises(InvalidCollection):
        catalogue.begin_successor("pictures", fingerprint="", dimensions=D)
