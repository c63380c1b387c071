"""Pictures into a sink: what is looked up, skipped, batched, named; here the sink is a dict."""

import hashlib
import io
import json
import os
import re
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from app.client import NoService
from app.client.items import Added, Failure, StoredItem, Upload
from app.index_report import Report
from app.indexing import BatchRefused, RequestLimits, Sink, add_pictures
from app.ledger import Ledger
from app.settings import SettingsInvalid
from app.sources.folder import FolderSource
from app.sources.opening import open_sources
from app.sources.picture import Entry, NoPictures, Picture
from tests.app.sources.entries import write
from tests.app.sources.test_tar import pack


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

    def stored(self, ids: Sequence[str]) -> list[StoredItem | None]:
        return [self._stored(id) for id in ids]

    def _stored(self, id: str) -> StoredItem | None:
        if (upload := self.uploads.get(id)) is None:
            return None
        sha256 = hashlib.sha256(upload.data).hexdigest()
        return StoredItem(id=id, sha256=sha256, metadata=dict(upload.metadata), source=upload.source)

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


def add(
    root: Path,
    sink: Sink,
    *,
    report: Path,
    ledger: Path | None = None,
    rehash: bool = False,
    requests_in_flight: int = 4,
    console: Console | None = None,
) -> Report:
    with Ledger(ledger, rereads=rehash) as hashes:
        return add_pictures(
            open_sources([root]),
            sink,
            ledger=hashes,
            report=Report(report),
            requests_in_flight=requests_in_flight,
            console=console or quiet(),
        )


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_everything_is_added_once_and_a_second_run_sends_nothing(folder: Path, tmp_path: Path) -> None:
    sink = DictSink()
    outcome = add(folder, sink, report=tmp_path / "report")
    assert (dict(outcome.counts), outcome.exit_code) == ({"added": 4}, 0)
    assert sink.uploads["cats/a.jpg"].data == b"2"
    assert sink.uploads["cats/a.jpg"].source == str(folder / "cats" / "a.jpg")
    batches = list(sink.batches)
    again = add(folder, sink, report=tmp_path / "report")
    assert (dict(again.counts), sink.batches) == ({"unchanged": 4}, batches)


def test_a_changed_file_is_sent_again_and_a_new_one_joins(folder: Path, tmp_path: Path) -> None:
    sink = DictSink()
    add(folder, sink, report=tmp_path / "report")
    write(folder, **{"b.png": "changed", "e.jpg": "new"})
    outcome = add(folder, sink, report=tmp_path / "report")
    assert dict(outcome.counts) == {"added": 1, "updated": 1, "unchanged": 3}
    assert sink.uploads["b.png"].data == b"changed"


def test_failures_are_named_counted_and_reported_and_the_rest_is_added(folder: Path, tmp_path: Path) -> None:
    write(
        folder,
        **{"bad/1.jpg": "broken", "bad/2.jpg": "poison", "bad/3.jpg": "x" * 1_001, "bad/4.jpg": "fine"},
    )
    console = quiet()
    sink = DictSink()
    outcome = add(folder, sink, report=tmp_path / "report.jsonl", console=console)
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
    assert add(folder, DictSink(), report=report).exit_code == 1
    assert report.exists()
    write(folder, **{"bad.jpg": "mended"})
    assert add(folder, DictSink(), report=report).exit_code == 0
    assert not report.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_a_failure(folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").chmod(0)
    outcome = add(folder, DictSink(), report=tmp_path / "report")
    assert [failed.failure.code for failed in outcome.first_failures] == ["unreadable_file"]
    assert outcome.counts["added"] == 3


def test_a_file_that_vanishes_after_the_walk_is_a_failure(folder: Path, tmp_path: Path) -> None:
    class Vanishing(DictSink):
        def stored(self, ids: Sequence[str]) -> list[StoredItem | None]:
            (folder / "b.png").unlink()
            return super().stored(ids)

    outcome = add(folder, Vanishing(), report=tmp_path / "report")
    assert [(failed.id, failed.failure.code) for failed in outcome.first_failures] == [
        ("b.png", "unreadable_file")
    ]


def test_requests_keep_to_the_limits_and_several_are_in_flight(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write(root, **{f"{i:03}.jpg": f"{i:03}" + "x" * 900 for i in range(60)})
    few_images = DictSink(images=5)
    add(root, few_images, requests_in_flight=3, report=tmp_path / "report")
    assert max(few_images.batches) == 5
    assert 1 < few_images.busiest <= 3
    few_bytes = DictSink(images=50, request_bytes=4_096 + 3 * (903 + 4_096))
    add(root, few_bytes, report=tmp_path / "report")
    assert max(few_bytes.batches) == 3
    assert len(few_images.uploads) == len(few_bytes.uploads) == 60


def test_the_speed_shown_counts_every_picture_and_all_of_the_time(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write(root, **{f"{i}.jpg": f"{i}" for i in range(8)})
    sink = DictSink(images=4)
    sink.answers_after_s = 0.2
    console = quiet()
    add(root, sink, report=tmp_path / "report", console=console)  # both batches end at the same time
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
        add(root, sink, requests_in_flight=2, report=tmp_path / "report", console=console)
    assert len(sink.uploads) == 12
    assert "added" in said(console)
    sink.dies_after = None
    outcome = add(root, sink, report=tmp_path / "report")
    assert dict(outcome.counts) == {"unchanged": 12, "added": 28}


class Reading:
    """A source that counts what is read of another."""

    def __init__(self, root: Path) -> None:
        self._folder = FolderSource(root)
        self.description = "a folder"
        self.read: list[str] = []

    def count(self) -> int:
        return self._folder.count()

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        for entry in self._folder.entries(max_image_bytes=max_image_bytes):
            yield self._watched(entry) if isinstance(entry, Picture) else entry

    def _watched(self, picture: Picture) -> Picture:
        def read() -> bytes:
            self.read.append(picture.id)
            return picture.read()

        return Picture(
            **{name: getattr(picture, name) for name in Picture.__dataclass_fields__} | {"read": read}
        )


@pytest.fixture
def old_folder(folder: Path) -> Path:
    """Its files changed long ago, as files that are resumed have."""
    deadline_s = time.time() + 2.1  # the time of an inode can't be set
    while time.time() < deadline_s:
        time.sleep(0.05)
    return folder


def test_a_second_run_reads_no_file_that_has_not_changed(old_folder: Path, tmp_path: Path) -> None:
    sink, ledger = DictSink(), tmp_path / "cache" / "ledger.sqlite"

    def read_by_a_run(
        *, rehash: bool = False, path: Path | None = ledger
    ) -> tuple[list[str], dict[str, int]]:
        source = Reading(old_folder)
        with Ledger(path, rereads=rehash) as hashes:
            report = add_pictures(
                source, sink, ledger=hashes, report=Report(tmp_path / "report"), console=quiet()
            )
        return sorted(source.read), dict(report.counts)

    every = ["b.png", "cats/a.jpg", "cats/old/tom.JPEG", "dogs/rex.webp"]
    assert read_by_a_run() == (every, {"added": 4})
    assert read_by_a_run() == ([], {"unchanged": 4})
    write(old_folder, **{"b.png": "9"})
    assert read_by_a_run() == (["b.png"], {"updated": 1, "unchanged": 3})
    # It changed a moment ago, so that its times may be those of another change, too.
    assert read_by_a_run() == (["b.png"], {"unchanged": 4})
    assert read_by_a_run(rehash=True) == (every, {"unchanged": 4})
    assert read_by_a_run(path=None) == (every, {"unchanged": 4})


def test_what_the_collection_has_lost_is_sent_again_whatever_the_ledger_knows(
    old_folder: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    add(old_folder, DictSink(), report=tmp_path / "report", ledger=ledger)
    other = DictSink()
    assert dict(add(old_folder, other, report=tmp_path / "report", ledger=ledger).counts) == {"added": 4}
    del other.uploads["b.png"]
    outcome = add(old_folder, other, report=tmp_path / "report", ledger=ledger)
    assert dict(outcome.counts) == {"added": 1, "unchanged": 3}


def test_new_metadata_of_the_same_picture_are_sent(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.jsonl"
    sink = DictSink()
    for year, status in [(1999, "added"), (1999, "unchanged"), (2000, "updated")]:
        listed.write_text(json.dumps({"path": str(folder / "b.png"), "year": year}))
        assert dict(add(listed, sink, report=tmp_path / "report").counts) == {status: 1}


def test_a_ledger_that_can_not_be_used_costs_time_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    broken, nowhere = tmp_path / "broken", tmp_path / "report" / "below a file"
    broken.write_text("no database " * 1_000)
    (tmp_path / "report").write_text("")
    for ledger in (broken, nowhere):
        console = quiet()
        outcome = add(folder, DictSink(), report=tmp_path / "failures", ledger=ledger, console=console)
        assert dict(outcome.counts) == {"added": 4}
        assert ("can't be used" in said(console)) is (ledger is nowhere)


def test_a_picture_that_could_not_be_read_is_added_when_it_can(folder: Path, tmp_path: Path) -> None:
    listed, sink = tmp_path / "list.txt", DictSink()
    listed.write_text(f"{folder}/b.png\n{folder}/later.jpg\n{folder}/never.jpg\n")
    report = tmp_path / "report.jsonl"
    assert dict(add(listed, sink, report=report).counts) == {"added": 1, "failed": 2}
    write(folder, **{"later.jpg": "here now"})
    assert dict(add(listed, sink, report=report).counts) == {"added": 1, "unchanged": 1, "failed": 1}
    (line,) = map(json.loads, report.read_text().splitlines())
    assert (line["path"], line["code"]) == (f"{folder}/never.jpg", "unreadable_file")
    assert "No such file" in line["title"]


def test_failures_are_in_the_report_while_the_run_goes_on(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    write(folder, **{"a.jpg": "broken"})
    seen: list[str] = []

    class Watching(DictSink):
        def add(self, uploads: Sequence[Upload]) -> list[Added | Failure]:
            if self.batches:
                deadline_s = time.monotonic() + 10
                while not report.exists() and time.monotonic() < deadline_s:
                    time.sleep(0.01)
                seen.append(report.read_text())
            return super().add(uploads)

    sink = Watching(images=1)
    add(folder, sink, requests_in_flight=1, report=report)
    assert json.loads(seen[0])["id"] == "a.jpg"


def test_two_pictures_of_one_id_are_not_made_one_in_silence(tmp_path: Path) -> None:
    pack(tmp_path / "1.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    pack(tmp_path / "2.tar", {"a.jpg": b"3"})
    with Ledger(None) as ledger:
        report = add_pictures(
            open_sources([tmp_path / "1.tar", tmp_path / "2.tar"]),
            sink := DictSink(),
            ledger=ledger,
            report=Report(tmp_path / "report"),
            console=quiet(),
        )
    assert dict(report.counts) == {"added": 2, "failed": 1}
    assert report.first_failures[0].failure.code == "duplicate_id"
    assert f"{tmp_path}/1.tar#a.jpg" in report.first_failures[0].failure.title
    assert sink.uploads["a.jpg"].data == b"1"


def test_metadata_that_no_item_can_keep_fail_alone_and_before_anything_is_sent(tmp_path: Path) -> None:
    write(tmp_path, **{"a.jpg": "1"})
    rows = [
        {"path": "a.jpg", "id": "large", "text": "x" * 20_000},
        {"path": "a.jpg", "id": ".."},
        {"path": "a.jpg", "id": "fine"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sink = DictSink()
    outcome = add(tmp_path / "list.jsonl", sink, report=tmp_path / "report")
    assert [failed.failure.code for failed in outcome.first_failures] == ["invalid_item"] * 2
    assert list(sink.uploads) == ["fine"]


def test_a_tar_without_pictures_says_so(tmp_path: Path) -> None:
    pack(tmp_path / "s.tar", {"readme.md": b"1"})
    with pytest.raises(NoPictures, match=r"no pictures in the tar file .*s\.tar: looked for \.avif"):
        add(tmp_path / "s.tar", DictSink(), report=tmp_path / "report")


def test_a_report_that_can_not_be_written_is_said_before_anything_is_done(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "report"):
        with pytest.raises(SettingsInvalid, match="name another with --report"):
            Report(path)


class Endless:
    """Pictures that are made when they are asked for."""

    description = "many pictures"

    def __init__(self, pictures: int, held_bytes: int) -> None:
        self._pictures = pictures
        self._held_bytes = held_bytes

    def count(self) -> int:
        return self._pictures

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        for number in range(self._pictures):
            data = bytes(self._held_bytes)
            yield Picture(
                id=f"{number}",
                where=f"{number}",
                source=f"{number}",
                metadata={"number": number},
                size_bytes=len(data),
                read=lambda data=data: data,  # type: ignore[misc]
                held_bytes=len(data),
            )


class Forgetful(DictSink):
    """Keeps nothing."""

    answers_after_s = 0.0

    def _add_one(self, upload: Upload) -> Added | Failure:
        return Added(id=upload.id, status="added")


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    def peak_bytes(pictures: int, held_bytes: int) -> int:
        sink = Forgetful(images=64, request_bytes=2**30, image_bytes=2**30)
        tracemalloc.start()
        try:
            with Ledger(tmp_path / f"ledger{pictures}") as ledger:
                add_pictures(
                    Endless(pictures, held_bytes),
                    sink,
                    ledger=ledger,
                    report=Report(tmp_path / "report"),
                    console=quiet(),
                )
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small = peak_bytes(2_000, 10)
    assert peak_bytes(10_000, 10) < small + 300_000
    assert peak_bytes(400, 2**20) < 300 * 2**20  # 400 MiB of pictures: 64 looked up, 32 in each of 4 requests
