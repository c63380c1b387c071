"""Names on a Milvus server: reversible, short enough, and nobody else's."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidCollection
from app.search.milvus.names import MAX_SERVER_NAME, Names, Stand, new_token

NAMES = Names("dinoserve")
ours = st.from_regex("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@given(name=ours, fingerprint=st.text(min_size=1, max_size=40), dimensions=st.integers(1, 32_768))
def test_names_can_be_read_again_and_are_what_servers_take(
    name: str, fingerprint: str, dimensions: int
) -> None:
    fingerprint = fingerprint.encode("utf-8", "ignore").decode()[:20] or "f"
    stand = Stand(new_token(), name)
    generation = NAMES.new_generation(stand.token, dimensions=dimensions, fingerprint=fingerprint)
    assert NAMES.to_stand(NAMES.stand(stand)) == stand
    assert NAMES.to_generation(generation.server_name) == generation
    assert (generation.dimensions, generation.fingerprint) == (dimensions, fingerprint)
    assert NAMES.to_name(NAMES.name(name)) == name
    for server_name in (
        NAMES.stand(stand),
        generation.server_name,
        NAMES.name(name),
        NAMES.current(stand.token),
    ):
        assert re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", server_name)
        assert len(server_name) <= MAX_SERVER_NAME


def test_a_generation_knows_when_it_was_made() -> None:
    before = time.time()
    generation = NAMES.new_generation(new_token(), dimensions=3, fingerprint="f")
    assert before - 0.001 <= generation.created_at <= time.time()


@pytest.mark.parametrize("name", ["", "photos", "dinoserve_c_photos", "dinoserve2_c_0", "dinoserve_d_x"])
def test_the_names_of_others_are_nothing_to_us(name: str) -> None:
    assert NAMES.to_stand(name) is None
    assert NAMES.to_generation(name) is None
    assert Names("other").to_stand(NAMES.stand(Stand(new_token(), "a"))) is None


def test_a_fingerprint_that_no_name_can_hold_is_refused() -> None:
    NAMES.new_generation(new_token(), dimensions=32_768, fingerprint="sha256:" + "f" * 64)
    with pytest.raises(InvalidCollection, match="300 characters"):
        NAMES.new_generation(new_token(), dimensions=3, fingerprint="f" * 300)


@pytest.mark.parametrize("space", ["", "a_b", "1a", "ä", "a" * 21])
def test_a_space_that_is_none_is_refused(space: str) -> None:
    with pytest.raises(ValueError, match="space"):
        Names(space)
