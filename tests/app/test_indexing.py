"""Folders into a sink: what is walked, skipped, batched, named; here the sink is a dict."""

import hashlib
import io
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from app.client import Added, Failure, NoService, Upload
from app.indexing import (
    MAX_ID_BYTES,
    BatchRefused,
    NoPictures,
    RequestLimits,
    add_folder,
    find_pictures,
    id_of,
)


class DictSink:
    """Keeps what it is given, and refuses pictures that say so."""

    description = "a dict"

    def __init__(self, *, images: int = 8, request_bytes: int = 100_000, image_bytes: int = 1_000) -> None:
        self.limits = RequestLimits(images=images, request_bytes=request_bytes, image_bytes=image_bytes)
        self.uploads: dict[str, Upload] = {}
        self.batches: list[int] = []
        self.busiest = 0
        self.dies_after: int | None = None
        self.answers_after_s = 0.005
        self._in_flight = 0
        self._lock = threading.Lock()

    def known(self) -> dict[str, str]:
        return {id: hashlib.sha256(upload.data).hexdigest() for id, upload in self.uploads.items()}

    def add(self, uploads: Sequence[Upload]) -> list[Added | Failure]:
        with self._lock:
            if self.dies_after is not None and len(self.batches) >= self.dies_after:
                raise NoService("it went away")
            self._in_flight += 1
            self.busiest = max(self.busiest, self._in_flight)
            self.batches.append(len(uploads))
        time.sleep(self.answers_after_s)
        with self._lock:
            self._in_flight -= 1
        if any(b"poison" in upload.data for upload in uploads):
            raise BatchRefused(Failure(code="poison", title="the batch is poisoned"))
        return [self._add_one(upload) for upload in uploads]

    def _add_one(self, upload: Upload) -> Added | Failure:
        if b"broken" in upload.data:
            return Failure(code="undecodable_image", title="the picture is damaged")
        status = "updated" if upload.id in self.uploads else "added"
        self.uploads[upload.id] = upload
        return Added(id=upload.id, status="updated" if status == "updated" else "added")


def write(root: Path, **files: str) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    write(
        root,
        **{
            "b.png": "1",
            "cats/a.jpg": "2",
            "cats/old/tom.JPEG": "3",
            "dogs/rex.webp": "4",
            "readme.txt": "no picture",
            ".hidden.jpg": "no",
            ".git/x.jpg": "no",
        },
    )
    return root


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_folder_is_walked_in_order_and_paths_are_ids(folder: Path) -> None:
    assert [picture.id for picture in find_pictures(folder)] == [
        "b.png",
        "cats/a.jpg",
        "cats/old/tom.JPEG",
        "dogs/rex.webp",
    ]


def test_metadata_say_path_folder_and_class(folder: Path) -> None:
    by_id = {picture.id: picture.metadata for picture in find_pictures(folder)}
    assert by_id["b.png"] == {"path": "b.png"}
    assert by_id["cats/old/tom.JPEG"] == {"path": "cats/old/tom.JPEG", "folder": "cats/old", "class": "cats"}


def test_links_to_folders_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", **{"c.gif": "5"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "cats" / "circle").symlink_to(folder)
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere")
    ids = [picture.id for picture in find_pictures(folder)]
    assert ids == ["b.png", "cats/a.jpg", "cats/old/tom.JPEG", "dogs/rex.webp", "linked/c.gif"]


def test_a_folder_without_pictures_says_what_was_found(tmp_path: Path) -> None:
    write(tmp_path, **{"a.txt": "1", "b.txt": "2", "c": "3"})
    with pytest.raises(NoPictures, match=r"looked for .*\.jpg.*; found 2 \.txt, 1 no suffix"):
        find_pictures(tmp_path)
    with pytest.raises(NoPictures, match="does not exist"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(NoPictures, match="is not a folder"):
        find_pictures(tmp_path / "c")


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


def test_everything_is_added_once_and_a_second_run_sends_nothing(folder: Path, tmp_path: Path) -> None:
    sink = DictSink()
    outcome = add_folder(folder, sink, report=tmp_path / "report", console=quiet())
    assert (dict(outcome.counts), outcome.exit_code) == ({"added": 4}, 0)
    assert sink.uploads["cats/a.jpg"].data == b"2"
    assert sink.uploads["cats/a.jpg"].source == str(folder / "cats" / "a.jpg")
    batches = list(sink.batches)
    again = add_folder(folder, sink, report=tmp_path / "report", console=quiet())
    assert (dict(again.counts), sink.batches) == ({"unchanged": 4}, batches)


def test_a_changed_file_is_sent_again_and_a_new_one_joins(folder: Path, tmp_path: Path) -> None:
    sink = DictSink()
    add_folder(folder, sink, report=tmp_path / "report", console=quiet())
    write(folder, **{"b.png": "changed", "e.jpg": "new"})
    outcome = add_folder(folder, sink, report=tmp_path / "report", console=quiet())
    assert dict(outcome.counts) == {"added": 1, "updated": 1, "unchanged": 3}
    assert sink.uploads["b.png"].data == b"changed"


def test_failures_are_named_counted_and_reported_and_the_rest_is_added(folder: Path, tmp_path: Path) -> None:
    write(
        folder,
        **{"bad/1.jpg": "broken", "bad/2.jpg": "poison", "bad/3.jpg": "x" * 1_001, "bad/4.jpg": "fine"},
    )
    console = quiet()
    sink = DictSink()
    outcome = add_folder(folder, sink, report=tmp_path / "report.jsonl", console=console)
    assert dict(outcome.counts) == {"added": 5, "failed": 3}
    assert outcome.exit_code == 1
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert {line["id"]: line["code"] for line in lines} == {
        "bad/1.jpg": "undecodable_image",
        "bad/2.jpg": "poison",
        "bad/3.jpg": "image_too_large",
    }
    assert lines[0]["path"].startswith(str(folder))
    assert "bad/4.jpg" in sink.uploads
    assert "5 added, 0 updated, 0 unchanged, 3 failed" in said(console)
    assert str(tmp_path / "report.jsonl") in said(console)


def test_the_report_of_an_earlier_run_goes_when_nothing_fails_any_more(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    write(folder, **{"bad.jpg": "broken"})
    assert add_folder(folder, DictSink(), report=report, console=quiet()).report == report
    write(folder, **{"bad.jpg": "mended"})
    assert add_folder(folder, DictSink(), report=report, console=quiet()).report is None
    assert not report.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_a_failure(folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").chmod(0)
    outcome = add_folder(folder, DictSink(), report=tmp_path / "report", console=quiet())
    assert [failed.failure.code for failed in outcome.failures] == ["unreadable_file"]
    assert outcome.counts["added"] == 3


def test_a_file_that_vanishes_after_the_walk_is_a_failure(folder: Path, tmp_path: Path) -> None:
    class Vanishing(DictSink):
        def known(self) -> dict[str, str]:
            (folder / "b.png").unlink()
            return {}

    outcome = add_folder(folder, Vanishing(), report=tmp_path / "report", console=quiet())
    assert [(failed.id, failed.failure.code) for failed in outcome.failures] == [("b.png", "unreadable_file")]


def test_requests_keep_to_the_limits_and_several_are_in_flight(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write(root, **{f"{i:03}.jpg": f"{i:03}" + "x" * 900 for i in range(60)})
    few_images = DictSink(images=5)
    add_folder(root, few_images, requests_in_flight=3, report=tmp_path / "report", console=quiet())
    assert max(few_images.batches) == 5
    assert 1 < few_images.busiest <= 3
    few_bytes = DictSink(images=50, request_bytes=4_096 + 3 * (903 + 4_096))
    add_folder(root, few_bytes, report=tmp_path / "report", console=quiet())
    assert max(few_bytes.batches) == 3
    assert len(few_images.uploads) == len(few_bytes.uploads) == 60


def test_the_speed_shown_counts_every_picture_and_all_of_the_time(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write(root, **{f"{i}.jpg": f"{i}" for i in range(8)})
    sink = DictSink(images=4)
    sink.answers_after_s = 0.2
    console = quiet()
    add_folder(root, sink, report=tmp_path / "report", console=console)  # both batches end at the same time
    shown = re.search(r"([\d,.]+) images/s", said(console))
    assert shown is not None
    assert 1 < float(shown[1].replace(",", "")) <= 8 / 0.2


def test_a_service_that_goes_away_ends_the_run_and_the_next_goes_on_where_it_was(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write(root, **{f"{i:03}.jpg": f"{i}" for i in range(40)})
    sink = DictSink(images=4)
    sink.dies_after = 3
    console = quiet()
    with pytest.raises(NoService):
        add_folder(root, sink, requests_in_flight=2, report=tmp_path / "report", console=console)
    assert len(sink.uploads) == 12
    assert "added" in said(console)
    sink.dies_after = None
    outcome = add_folder(root, sink, report=tmp_path / "report", console=quiet())
    assert dict(outcome.counts) == {"unchanged": 12, "added": 28}
