import pytest

from app.sources.picture import MAX_ID_BYTES, id_of


@pytest.mark.parametrize("relative", ["a.jpg", "a b/ü.jpg", "\U0001f600.png", "a" * 252 + ".jpg"])
def test_a_path_that_can_be_an_id_is_the_id(relative: str) -> None:
    assert id_of(relative) == relative


@pytest.mark.parametrize("relative", ["ü" * 127 + ".jpg", "x/" * 300 + "a.jpg", "a\nb.jpg", "a\udcff.jpg"])
def test_a_path_that_cannot_be_an_id_keeps_its_end_behind_a_hash(relative: str) -> None:
    made = id_of(relative)
    assert len(made.encode()) <= MAX_ID_BYTES
    assert made.isprintable()
    assert made.endswith(".jpg")
    assert made == id_of(relative)
    assert made != id_of("other" + relative)
