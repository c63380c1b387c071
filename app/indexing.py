"""A folder of pictures into a collection: resumable, several requests in flight, every failure named.

    find_pictures   walk the folder, in an order that is always the same
    Sink            where pictures go: a running service, or the engine in this process (`app.sinks`)
    add_folder      skip what is there (same id, same bytes), send the rest, say what became of it

There is no ledger: what is done is what the collection has. A run that was killed is begun again by the same
command, which reads and hashes the files, and sends only what is missing or has changed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from app.client import Added, Failure, Upload
from app.search.collection import Json

IMAGE_SUFFIXES: Final = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
MAX_ID_BYTES: Final = 256
DEFAULT_REPORT: Final = Path("index-failures.jsonl")
_SHOWN_FAILURES: Final = 5
_UNFIT_FOR_ID = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Picture:
    """A file to add.

    Attributes:
        id: Its path below the folder, with slashes; see `id_of`.
        path: Where it is.
        relative: Its path below the folder, as it is.
        size_bytes: Of the file.
    """

    id: str
    path: Path
    relative: str
    size_bytes: int

    @property
    def metadata(self) -> dict[str, Json]:
        """What a filter can ask for: `path`, `folder`, and `class`, the first of the folders."""
        folder, _, _ = self.relative.rpartition("/")
        metadata: dict[str, Json] = {"path": _clean(self.relative)}
        if folder:
            metadata |= {"folder": _clean(folder), "class": _clean(folder.partition("/")[0])}
        return metadata


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may hold."""

    images: int
    request_bytes: int
    image_bytes: int


class Sink(Protocol):
    """Where pictures go. Safe to use from many threads."""

    @property
    def description(self) -> str:
        """Where that is, for people."""
        ...

    @property
    def limits(self) -> RequestLimits:
        """What `add` takes at once."""
        ...

    def known(self) -> dict[str, str]:
        """Of everything that is there, id -> SHA-256 of the image's bytes."""
        ...

    def add(self, uploads: Sequence[Upload]) -> list[Added | Failure]:
        """Adds pictures, durably; it may wait where the engine is busy.

        Raises:
            BatchRefused: The pictures as a whole are refused; fewer may pass.
        """
        ...


class BatchRefused(Exception):
    """A batch as a whole is refused for what is in it; its pictures may pass alone.

    Attributes:
        failure: What to say of a picture that is refused alone.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.title)
        self.failure = failure


class NoPictures(Exception):
    """There is nothing to add; the message says what was looked for and found."""


@dataclass(frozen=True)
class FailedPicture:
    """A picture that could not be added, and why."""

    id: str
    path: Path
    failure: Failure


@dataclass
class Outcome:
    """What became of a folder.

    Attributes:
        counts: "added", "updated", "unchanged" and "failed".
        failures: In the order in which they happened.
        report: The file that names the failures; None where there is none.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[FailedPicture] = field(default_factory=list)
    report: Path | None = None

    @property
    def exit_code(self) -> int:
        """0 if every picture is there now, else 1."""
        return 1 if self.failures else 0


def require_folder(root: Path) -> None:
    """Refuses what is no folder.

    Raises:
        NoPictures: It isn't one, or isn't there.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise NoPictures(f"{root} {what}; name a folder of pictures")


def find_pictures(root: Path) -> list[Picture]:
    """Walks a folder, flat or nested, in order of path; names that begin with a dot are passed over.

    Links to folders are followed, but not in circles.

    Raises:
        NoPictures: There is no such folder, or no picture in it.
    """
    require_folder(root)
    found_suffixes: Counter[str] = Counter()
    pictures: list[Picture] = []
    for relative, entry in _files_below(root, "", inside=frozenset()):
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            pictures.append(Picture(id_of(relative), Path(entry.path), relative, entry.stat().st_size))
        else:
            found_suffixes[suffix or "no suffix"] += 1
    if not pictures:
        found = (
            ", ".join(f"{count} {suffix}" for suffix, count in found_suffixes.most_common(4)) or "no files"
        )
        raise NoPictures(f"no pictures below {root}: looked for {', '.join(IMAGE_SUFFIXES)}; found {found}")
    return pictures


def _files_below(
    folder: Path, prefix: str, *, inside: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in inside:
        return
    try:
        with os.scandir(folder) as listing:
            entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise NoPictures(f"the folder {folder} can't be read: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(Path(entry.path), f"{prefix}{entry.name}/", inside=inside | {here})
        elif entry.is_file():
            yield f"{prefix}{entry.name}", entry


def id_of(relative: str) -> str:
    """The id of a file: its path, as it is wherever that can be an id.

    A path that is too long, or has characters that no id may have, keeps its end, behind a hash of the whole.
    """
    cleaned = _clean(relative)
    if cleaned == relative and len(relative.encode()) <= MAX_ID_BYTES:
        return relative
    digest = hashlib.sha256(os.fsencode(relative)).hexdigest()[:16]
    end = cleaned.encode()[-(MAX_ID_BYTES - len(digest) - 1) :].decode(errors="ignore")
    return f"{digest}~{end}"


def _clean(text: str) -> str:
    return _UNFIT_FOR_ID.sub("\N{REPLACEMENT CHARACTER}", text)


def add_folder(
    root: Path,
    sink: Sink,
    *,
    requests_in_flight: int = 4,
    batch_images: int = 32,
    report: Path = DEFAULT_REPORT,
    console: Console | None = None,
) -> Outcome:
    """Adds every picture below a folder that the collection hasn't got, and shows how far it is.

    Args:
        root: Flat or nested. A picture's id is its path below it.
        sink: Where pictures go.
        requests_in_flight: How many batches wait for their answers at once, so that the model never waits.
        batch_images: Of a request; the sink may want fewer.
        report: JSON lines, one for each picture that failed; written only if some did, and a report of an
            earlier run is removed if none did.
        console: Where progress is shown; standard error by default.

    Returns:
        What became of the pictures; its `exit_code` is the command's.

    Raises:
        NoPictures: There is nothing to add.
        ClientError: The service went away or refuses everything; what was sent is kept. So ServiceError.
    """
    console = console or Console(stderr=True)
    pictures = find_pictures(root)
    console.print(
        f"{len(pictures):,} pictures below {root}; adding them to {sink.description}", highlight=False
    )
    known = sink.known()
    outcome = Outcome()
    batches = _batches(pictures, limits=sink.limits, batch_images=batch_images)
    try:
        with _progress(console) as progress:
            task = progress.add_task("adding", total=len(pictures), failed=0)
            for batch, results in _each_done(
                lambda batch: _add_batch(batch, sink, known), batches, in_flight=requests_in_flight
            ):
                _record(outcome, batch, results)
                progress.update(task, advance=len(batch), failed=len(outcome.failures))
    finally:
        _finish(outcome, report, console)  # also where the service went away: what was done is done
    return outcome


def _batches(
    pictures: Iterable[Picture], *, limits: RequestLimits, batch_images: int
) -> Iterator[list[Picture]]:
    """In order; none above the limits, but for a picture that is above them by itself."""
    most_images = min(batch_images, limits.images)
    # A part's headers, id, metadata and source come on top of the file.
    most_bytes = limits.request_bytes - 4_096
    batch: list[Picture] = []
    size_bytes = 0
    for picture in pictures:
        cost = min(picture.size_bytes, limits.image_bytes) + 4_096
        if batch and (len(batch) == most_images or size_bytes + cost > most_bytes):
            yield batch
            batch, size_bytes = [], 0
        batch.append(picture)
        size_bytes += cost
    if batch:
        yield batch


_Result = str | Failure  # a status, or why there is none


def _each_done(
    work: Callable[[list[Picture]], list[_Result]], batches: Iterator[list[Picture]], *, in_flight: int
) -> Iterator[tuple[list[Picture], list[_Result]]]:
    """Runs batches on threads, never more than so many at once, and gives each when it is done."""
    waiting: dict[Future[list[_Result]], list[Picture]] = {}
    with ThreadPoolExecutor(in_flight, thread_name_prefix="index") as pool:
        try:
            for batch in batches:
                waiting[pool.submit(work, batch)] = batch
                if len(waiting) >= in_flight:
                    yield from _take_done(waiting)
            while waiting:
                yield from _take_done(waiting)
        finally:
            for future in waiting:
                future.cancel()


def _take_done(
    waiting: dict[Future[list[_Result]], list[Picture]],
) -> Iterator[tuple[list[Picture], list[_Result]]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        yield waiting.pop(future), future.result()


def _add_batch(batch: list[Picture], sink: Sink, known: dict[str, str]) -> list[_Result]:
    results: dict[int, _Result] = {}
    uploads: dict[int, Upload] = {}
    for index, picture in enumerate(batch):
        data = _read(picture, max_bytes=sink.limits.image_bytes)
        if isinstance(data, Failure):
            results[index] = data
        elif known.get(picture.id) == hashlib.sha256(data).hexdigest():
            results[index] = "unchanged"
        else:
            uploads[index] = _upload(picture, data)
    for index, answer in zip(uploads, _add(list(uploads.values()), sink), strict=True):
        results[index] = answer if isinstance(answer, Failure) else answer.status
    return [results[index] for index in range(len(batch))]


def _add(uploads: list[Upload], sink: Sink) -> list[Added | Failure]:
    if not uploads:
        return []
    try:
        return sink.add(uploads)
    except BatchRefused as refused:
        if len(uploads) == 1:
            return [refused.failure]
        half = len(uploads) // 2
        return _add(uploads[:half], sink) + _add(uploads[half:], sink)


def _read(picture: Picture, *, max_bytes: int) -> bytes | Failure:
    try:
        size_bytes = picture.path.stat().st_size
        if size_bytes > max_bytes:
            return Failure(
                code="image_too_large",
                title=f"the file has {size_bytes:,} bytes; at most {max_bytes:,} are taken",
                limit=max_bytes,
                actual=size_bytes,
            )
        return picture.path.read_bytes()
    except OSError as error:
        return Failure(code="unreadable_file", title=f"the file can't be read: {error.strerror}")


def _upload(picture: Picture, data: bytes) -> Upload:
    return Upload(
        id=picture.id, data=data, metadata=picture.metadata, source=_clean(str(picture.path.absolute()))
    )


def _record(outcome: Outcome, batch: list[Picture], results: list[_Result]) -> None:
    for picture, result in zip(batch, results, strict=True):
        if isinstance(result, Failure):
            outcome.failures.append(FailedPicture(picture.id, picture.path, result))
        outcome.counts["failed" if isinstance(result, Failure) else result] += 1


def _finish(outcome: Outcome, report: Path, console: Console) -> None:
    """Writes the report of failures, and says what there is to say."""
    counts = ", ".join(
        f"{outcome.counts[name]:,} {name}" for name in ("added", "updated", "unchanged", "failed")
    )
    console.print(counts, highlight=False)
    if not outcome.failures:
        with contextlib.suppress(FileNotFoundError):
            report.unlink()
        return
    lines = [
        {
            "id": failed.id,
            "path": _clean(str(failed.path)),
            "code": failed.failure.code,
            "title": failed.failure.title,
        }
        for failed in outcome.failures
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    report.write_text(text, encoding="utf-8")
    outcome.report = report
    for line in lines[:_SHOWN_FAILURES]:
        console.print(f"  {line['path']}: {line['title']}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"All {len(lines):,} failures are in {report}", markup=False, highlight=False, soft_wrap=True
    )


class _Rate(ProgressColumn):
    """Pictures per second."""

    def render(self, task: Task) -> Text:
        """The mean so far, as text. Rich's own speed leaves the first batch out, which may be half of all."""
        seconds = task.finished_time or task.elapsed
        return Text(f"{task.completed / seconds:,.1f} images/s" if seconds else "")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=console,
    )
