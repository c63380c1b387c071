"""Paths, addresses, and what braces stand for."""

from pathlib import Path

import pytest

from training.data.addresses import expanded, is_pattern, name_of, where
from training.errors import DataError


def test_text_with_a_protocol_stays_text_and_all_else_is_a_path() -> None:
    assert where("s3://bucket//x.tar") == "s3://bucket//x.tar"
    assert where("shards/x.tar") == Path("shards/x.tar")


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("s3://b/{008..011}.tar", ["s3://b/008.tar", "s3://b/009.tar", "s3://b/010.tar", "s3://b/011.tar"]),
        ("memory://{8..10}.tar", ["memory://8.tar", "memory://9.tar", "memory://10.tar"]),
        ("s3://{a,b}/{0..1}.tar", ["s3://a/0.tar", "s3://a/1.tar", "s3://b/0.tar", "s3://b/1.tar"]),
        ("s3://b/x.tar", ["s3://b/x.tar"]),
    ],
)
def test_braces_stand_for_every_name_in_their_order(written: str, names: list[str]) -> None:
    assert expanded(where(written)) == names


def test_braces_of_a_path_are_paths() -> None:
    assert expanded(Path("a/{1,2}.tar")) == [Path("a/1.tar"), Path("a/2.tar")]


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("s3://b/{9..3}.tar", r"the range {9\.\.3} of .* goes down: write {3\.\.9}"),
        ("s3://b/{0..999}{0..9999}.tar", "more than 1,000,000 files"),
    ],
)
def test_braces_that_make_no_sense_are_refused(written: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        expanded(written)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("s3://bucket/birds/train-{000..099}.tar", "birds"),
        ("memory://birds.tar", "birds"),
        ("http://127.0.0.1:80/{0..1}.tar", "127.0.0.1-80"),
        ("/data/birds/train", "birds"),
        ("/data/birds/*.tar", "birds"),
        ("/data/birds.parquet", "birds"),
    ],
)
def test_data_has_a_name_for_people(written: str, name: str) -> None:
    assert name_of(where(written)) == name


def test_a_question_mark_of_the_web_is_no_pattern() -> None:
    assert not is_pattern("https://example.org/x.tar?token=1")
    assert is_pattern("https://example.org/*.tar")
    assert is_pattern(Path("shards/?.tar"))
