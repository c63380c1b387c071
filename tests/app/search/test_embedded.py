"""The whole engine against a dict and a matrix product, over random histories of calls."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.search.collection import Item, Json
from app.search.library import Collections
from tests.app.search.test_filters import matches

D = 5
names = st.sampled_from([f"{letter}/{number}" for letter in "ab" for number in range(8)])
# Few directions, of small integers: ties and exact cosines are common.
vectors = st.lists(st.integers(-2, 2), min_size=D, max_size=D).filter(any)
labels = st.sampled_from(["dog", "cat", None])
is_dog: dict[str, Json] = {"field": "label", "eq": "dog"}
filters = st.sampled_from(
    [
        is_dog,
        {"not": is_dog},
        {"field": "label", "ne": "dog"},
        {"field": "label", "exists": False},
        {"field": "label", "gte": "cat", "lt": "dog"},
        {"or": [{"field": "label", "in": ["cat"]}, {"not": {"field": "label", "exists": True}}]},
        {"and": [{"not": is_dog}, {"not": {"field": "label", "eq": "cat"}}]},
        {"and": [{"field": "label", "exists": True}, {"not": is_dog}]},
    ]
)
Known = tuple[npt.NDArray[np.float64], dict[str, Json]]
new_items = st.tuples(names, vectors, labels)


class EngineMachine(RuleBasedStateMachine):
    """Each rule does the same to the engine and to the model, and compares what they say."""

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.collections = Collections.open(Path(self.directory.name))
        self.collection = self.collections.create("default", fingerprint="f", dimensions=D)
        self.model: dict[str, Known] = {}
        self.deleted: dict[str, Known] = {}

    def teardown(self) -> None:
        if hasattr(self, "collections"):
            self.collections.close()
            self.directory.cleanup()

    @rule(batch=st.lists(new_items, min_size=1, max_size=6))
    def upsert(self, batch: list[tuple[str, list[int], str | None]]) -> None:
        items, expected = [], []
        for name, vector, label in batch:
            metadata: dict[str, Json] = {} if label is None else {"label": label}
            items.append(Item(id=name, vector=np.array(vector, dtype=np.float32), metadata=metadata))
            direction = np.array(vector) / np.linalg.norm(vector)
            if name not in self.model:
                expected.append("added")
            else:
                known, known_metadata = self.model[name]
                same = bool(np.array_equal(direction, known)) and metadata == known_metadata
                expected.append("unchanged" if same else "updated")
            self.model[name] = (direction, metadata)
            self.deleted.pop(name, None)
        statuses = self.collection.upsert(items, fingerprint="f")
        # Parallel vectors may differ in the last bit of a quotient; both answers are then right.
        assert [s == "added" for s in statuses] == [e == "added" for e in expected]
        assert all(s == "updated" for s, e in zip(statuses, expected, strict=True) if e == "updated")

    @rule(ids=st.lists(names, max_size=5))
    def delete(self, ids: list[str]) -> None:
        assert self.collection.delete(ids) == len(set(ids) & set(self.model))
        self.forget(ids)

    def forget(self, ids: Iterable[str]) -> None:
        for item_id in set(ids) & set(self.model):
            self.deleted[item_id] = self.model.pop(item_id)

    @rule(ids=st.lists(names, max_size=8))
    def undelete(self, ids: list[str]) -> None:
        back = set(ids) & set(self.deleted)
        assert self.collection.undelete(ids) == len(back)
        for item_id in back:
            self.model[item_id] = self.deleted.pop(item_id)

    def kept(self, tree: dict[str, Json]) -> list[str]:
        return sorted(name for name, (_, metadata) in self.model.items() if matches(tree, metadata))

    @rule(tree=filters)
    def delete_where(self, tree: dict[str, Json]) -> None:
        kept = self.kept(tree)
        assert self.collection.delete_where(tree) == len(kept)
        self.forget(kept)

    @rule(tree=filters, limit=st.integers(1, 5))
    def list_where(self, tree: dict[str, Json], limit: int) -> None:
        seen: list[str] = []
        cursor = None
        while True:
            page = self.collection.scroll(cursor=cursor, limit=limit, filter=tree)
            seen += [item.id for item in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert seen == self.kept(tree)
        assert self.collection.count(tree) == len(seen)

    @rule()
    def write_the_index(self) -> None:
        self.collections._store._upkeep._index_some()

    @rule(ids=st.lists(names, max_size=5))
    def get(self, ids: list[str]) -> None:
        for item_id, item in zip(ids, self.collection.get(ids), strict=True):
            if item is None:
                assert item_id not in self.model
            else:
                np.testing.assert_allclose(item.vector, self.model[item_id][0], atol=1e-6)
                assert item.metadata == self.model[item_id][1]

    @rule(
        queries=st.lists(vectors, min_size=1, max_size=3),
        window=st.tuples(st.integers(1, 20), st.integers(0, 10)),
        threshold=st.none() | st.sampled_from([-0.9501, 0.0501, 0.5501]),  # between all that can be
        tree=st.none() | filters,
        excluded=st.lists(names, max_size=3),
    )
    def search(
        self,
        queries: list[list[int]],
        window: tuple[int, int],
        threshold: float | None,
        tree: dict[str, Json] | None,
        excluded: list[str],
    ) -> None:
        k, offset = window
        answers = self.collection.search(
            np.array(queries, dtype=np.float32),
            k=k,
            offset=offset,
            threshold=threshold,
            filter=tree,
            exclude_ids=excluded,
        )
        for query, neighbours in zip(queries, answers, strict=True):
            direction = np.array(query) / np.linalg.norm(query)
            cosines = {
                name: float(vector @ direction)
                for name, (vector, metadata) in self.model.items()
                if (tree is None or matches(tree, metadata)) and name not in excluded
            }
            best = sorted((c for c in cosines.values() if threshold is None or c >= threshold), reverse=True)
            # Right scores, each of its own item, and no item twice: right up to the order of ties.
            scores = [neighbour.score for neighbour in neighbours]
            np.testing.assert_allclose(scores, best[offset : offset + k], atol=1e-6)
            np.testing.assert_allclose(scores, [cosines[n.id] for n in neighbours], atol=1e-6)
            assert len({n.id for n in neighbours}) == len(neighbours)

    @rule()
    def reopen(self) -> None:
        self.collections.close()
        self.collections = Collections.open(Path(self.directory.name))
        self.collection = self.collections.get("default")

    @invariant()
    def lists_what_is_there(self) -> None:
        if not hasattr(self, "collection"):
            return
        assert self.collection.count() == len(self.model)
        assert [item.id for item in self.collection.scroll(cursor=None, limit=100).items] == sorted(
            self.model
        )


EngineMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestEngine = EngineMachine.TestCase
