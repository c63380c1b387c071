from pathlib import Path

import numpy as np
import pytest

from app.search.reading import file as reading_file
from app.search.reading.file import Array, DamagedReading, Ids, read_kept, write_kept

ARRAYS: dict[str, Array] = {
    "xy": np.arange(6, dtype=np.float32).reshape(3, 2),
    "marks": np.array([2**64 - 1, 0, 7], np.uint64),
    "flags": np.array([True, False, True]),
    "nothing": np.empty((0, 4), np.int32),
}


def test_what_was_written_is_read_with_its_facts_shapes_and_types(tmp_path: Path) -> None:
    write_kept(tmp_path / "a", {"seq": 3, "name": "ü"}, ARRAYS)
    kept = read_kept(tmp_path / "a")
    assert kept is not None
    assert (kept.facts["seq"], kept.facts["name"]) == (3, "ü")
    assert set(kept.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert kept.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(kept.arrays[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_is_replaced_stays_readable_for_those_who_have_it(tmp_path: Path) -> None:
    write_kept(tmp_path / "a", {}, ARRAYS)
    before = read_kept(tmp_path / "a")
    write_kept(tmp_path / "a", {}, {"xy": np.zeros((3, 2), np.float32)})
    assert before is not None
    np.testing.assert_array_equal(before.arrays["xy"], ARRAYS["xy"])


def test_where_there_is_no_file_there_is_nothing(tmp_path: Path) -> None:
    assert read_kept(tmp_path / "none") is None


def test_every_byte_matters(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_kept(path, {"seq": 3}, ARRAYS)
    whole = path.read_bytes()
    for place in range(len(whole)):
        # A blank in place of a blank or a brace may leave the same header; any other change is seen.
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(DamagedReading):
            read_kept(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 60, -1])
def test_a_file_cut_short_is_told(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    write_kept(path, {}, ARRAYS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedReading):
        read_kept(path)


def test_a_file_of_another_version_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(reading_file, "VERSION", 0)
        write_kept(tmp_path / "a", {}, ARRAYS)
    with pytest.raises(DamagedReading, match="version 0"):
        read_kept(tmp_path / "a")


def test_ids_are_taken_by_row_in_the_order_asked() -> None:
    texts = ["a", "", "ä/ö.jpg", "日本"]
    encoded = [text.encode() for text in texts]
    ids = Ids(
        np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(text) for text in encoded], dtype=np.int64)
    )
    assert len(ids) == 4
    assert ids.take([3, 0, 2, 1, 0]) == ["日本", "a", "ä/ö.jpg", "", "a"]
    assert ids.take([]) == []
