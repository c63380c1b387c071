"""Names in one block: the same as the strings, in much less memory."""

import sys
import tracemalloc

import pytest

from training.data.names import PackedNames

STRANGE = ["a/1.jpg", "", "größe/名前.png", b"not\xff text.jpg".decode("utf-8", "surrogateescape")]


def test_packed_names_are_the_names() -> None:
    names = PackedNames(STRANGE)
    assert list(names) == STRANGE
    assert [names[index] for index in range(4)] == STRANGE
    assert names[-1] == STRANGE[-1]
    assert names[1:3] == STRANGE[1:3]
    assert len(names) == 4
    assert STRANGE[2] in names
    for outside in (4, -5):
        with pytest.raises(IndexError):
            names[outside]
    assert list(PackedNames([])) == []


def test_two_hundred_thousand_names_take_their_letters_and_eight_bytes_each() -> None:
    count, length = 200_000, len("n01440764/n01440764_000000.JPEG")
    tracemalloc.start()
    try:
        names = PackedNames(f"n01440764/n01440764_{number:06}.JPEG" for number in range(count))
        kept_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert names[199_999] == "n01440764/n01440764_199999.JPEG"
    # A growing array has up to an eighth to spare; as strings they would take over twice as much.
    assert kept_bytes < count * (length + 8 * 9 / 8) + 50_000
    assert kept_bytes < 0.5 * count * (sys.getsizeof(names[0]) + 8)
