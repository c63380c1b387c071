"""What routes share: writes reach the collection that has the name, whatever took its place meanwhile."""

from pathlib import Path
from typing import cast

import numpy as np

from app.api.state import State, write_to_current
from app.search.collection import Collection, Item
from app.search.embedded.library import Collections


def test_a_write_beside_a_switch_reaches_the_collection_that_has_the_name_now(tmp_path: Path) -> None:
    item = Item(id="x", vector=np.ones(4, dtype=np.float32), metadata={})
    with Collections.open(tmp_path) as collections:
        collections.create("photos", fingerprint="f", dimensions=4)
        asked: list[str] = []

        def write(collection: Collection) -> None:
            asked.append(collection.key)
            collection.upsert([item], fingerprint="f")
            if len(asked) == 1:  # a restored copy of the same model, just now
                collections.begin_successor("photos", fingerprint="f", dimensions=4)
                collections.finish_successor("photos")

        write_to_current(cast("State", {"catalogue": collections}), "photos", write)
        assert len(set(asked)) == 2
        assert collections.get("photos").count() == 1
