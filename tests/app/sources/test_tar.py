import io
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from app.sources.picture import Picture
from app.sources.tar import TarSource, is_tar
from tests.app.sources.entries import ENOUGH_BYTES, failures, taken

MODES = pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])


def pack(path: Path, members: dict[str, bytes], *, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


SAMPLES = {
    "a/0001.jpg": b"one",
    "a/0001.json": b'{"caption": "first", "width": 3}',
    "a/0001.cls": b"7\n",
    "a/0002.txt": b" second \n",  # what is said of a picture may come first
    "a/0002.png": b"two",
    "b/0001.webp": b"three",
    "b/notes.md": b"nothing",
}


@MODES
def test_members_of_one_stem_are_one_picture_and_its_metadata(tmp_path: Path, mode: str) -> None:
    pictures = taken(TarSource(pack(tmp_path / "s.tar", SAMPLES, mode=mode)))
    assert [(picture.id, picture.read()) for picture in pictures] == [
        ("a/0001.jpg", b"one"),
        ("a/0002.png", b"two"),
        ("b/0001.webp", b"three"),
    ]
    place = {"folder": "a", "class": "a"}
    assert pictures[0].metadata == {"path": "a/0001.jpg", **place, "class": 7, "caption": "first", "width": 3}
    assert pictures[1].metadata == {"path": "a/0002.png", **place, "text": "second"}
    assert pictures[2].metadata == {"path": "b/0001.webp", "folder": "b", "class": "b"}


@MODES
def test_several_pictures_of_one_stem_share_their_metadata(tmp_path: Path, mode: str) -> None:
    members = {"7.left.jpg": b"l", "7.right.jpg": b"r", "7.json": b'{"pair": 7}'}
    pictures = taken(TarSource(pack(tmp_path / "s.tar", members, mode=mode)))
    assert [(picture.id, picture.metadata["pair"]) for picture in pictures] == [
        ("7.left.jpg", 7),
        ("7.right.jpg", 7),
    ]


def test_a_plain_tar_is_read_at_its_places_and_stamped(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", SAMPLES)
    first, second, _ = taken(TarSource(path))
    assert first.held_bytes == 0
    assert first.stamp is not None
    assert first.stamp != second.stamp
    assert [picture.stamp for picture in taken(TarSource(path))][:2] == [first.stamp, second.stamp]
    packed = taken(TarSource(pack(tmp_path / "s.tar.gz", SAMPLES, mode="w:gz")))
    assert (packed[0].stamp, packed[0].held_bytes) == (None, 3)


@MODES
def test_names_are_ids_and_not_paths(tmp_path: Path, mode: str) -> None:
    members = {"/etc/passwd.jpg": b"1", "../../up.jpg": b"2", "./here.jpg": b"3", "a\nb.jpg": b"4"}
    pictures = taken(TarSource(pack(tmp_path / "s.tar", members, mode=mode)))
    assert [picture.id for picture in pictures][:3] == ["/etc/passwd.jpg", "../../up.jpg", "here.jpg"]
    assert pictures[3].id.endswith("b.jpg")
    assert not (tmp_path.parent.parent / "up.jpg").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_and_what_is_no_file_fail_in_their_place(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.jpg"))
        for name, kind in [
            ("s.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
            ("d.jpg", tarfile.CHRTYPE),
            ("f.jpg", tarfile.FIFOTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("._a.jpg"))
    entries = list(TarSource(path).entries(max_image_bytes=ENOUGH_BYTES))
    assert [(entry.id, isinstance(entry, Picture)) for entry in entries] == [
        ("a.jpg", True),
        ("s.jpg", False),
        ("h.jpg", False),
        ("d.jpg", False),
        ("f.jpg", False),
    ]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (b"{", "1.json"),
        (b"[1]", "1.json"),
        (b"\xff\xfe", "1.txt"),
        (b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "1.json"),
        (b'"' + b"x" * 70_000 + b'"', "1.json"),
    ],
    ids=["cut", "no object", "no text", "deep", "large"],
)
def test_metadata_that_can_not_be_read_fail_their_picture_alone(
    tmp_path: Path, said: bytes, name: str
) -> None:
    path = pack(tmp_path / "s.tar", {"1.jpg": b"1", name: said, "2.jpg": b"2"})
    assert [(failed.id, failed.failure.code) for failed in failures(TarSource(path))] == [
        ("1.jpg", "invalid_metadata")
    ]


@MODES
@pytest.mark.parametrize("cut", [0.3, 0.5, 0.9])
def test_what_is_cut_short_gives_what_is_before_the_cut_and_says_so(
    tmp_path: Path, mode: str, cut: float
) -> None:
    noise = random.Random(0)
    members = {f"{number:02}.jpg": noise.randbytes(3_000) for number in range(60)}
    path = pack(tmp_path / "s.tar", members, mode=mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    entries = list(TarSource(path).entries(max_image_bytes=ENOUGH_BYTES))
    whole: list[str] = []
    for entry in entries[:-1]:
        assert isinstance(entry, Picture)
        try:
            assert entry.read() == members[entry.id]
            whole.append(entry.id)
        except OSError as error:  # the last one of a plain tar: its header is there, the rest isn't
            assert "ends after" in str(error.strerror)  # noqa: PT017
            assert entry is entries[-2]
    assert whole == sorted(members)[: len(whole)]
    assert not isinstance(entries[-1], Picture)
    assert entries[-1].failure.code == "damaged_tar"
    assert len(whole) > 10 or mode not in {"w", "w:gz"}  # the others pack all of it as one block


def test_garbage_in_the_middle_is_no_end_of_the_file(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", {"1.jpg": b"1", "2.jpg": b"2", "3.jpg": b"3"})
    data = bytearray(path.read_bytes())
    data[2 * 512 : 3 * 512] = b"\x07" * 512  # the second member's header
    path.write_bytes(data)
    entries = list(TarSource(path).entries(max_image_bytes=ENOUGH_BYTES))
    assert [entry.id for entry in entries] == ["1.jpg", ""]


def test_a_picture_of_a_compressed_tar_above_the_limit_is_not_held(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar.gz", {"1.jpg": b"x" * 5_000, "2.jpg": b"2"}, mode="w:gz")
    large, small = TarSource(path).entries(max_image_bytes=100)
    assert isinstance(large, Picture)
    assert isinstance(small, Picture)
    assert (large.size_bytes, large.held_bytes) == (5_000, 0)
    assert small.read() == b"2"


def test_memory_does_not_grow_with_the_tar(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(20_000):
            archive.addfile(tarfile.TarInfo(f"{number:05}.jpg"))
            archive.members.clear()  # type: ignore[attr-defined]
    tracemalloc.start()
    try:
        count = sum(1 for _ in TarSource(path).entries(max_image_bytes=ENOUGH_BYTES))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak_bytes < 2_000_000  # a TarInfo has about 1 kB: 20 MB


def test_a_tar_is_told_by_what_it_is(tmp_path: Path) -> None:
    assert is_tar(pack(tmp_path / "no-suffix", SAMPLES, mode="w:gz"))
    (tmp_path / "text").write_text("no tar at all " * 100)
    assert not is_tar(tmp_path / "text")
    (tmp_path / "empty.tar").write_bytes(b"")
    assert not is_tar(tmp_path / "empty.tar")
