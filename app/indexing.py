"""Pictures into a collection: resumable, several requests in flight, every failure named.

    Source    where pictures come from (`app.sources`)
    Ledger    the hashes of files that have not changed since they were read (`app.ledger`)
    Sink      where they go: a running service, or the engine in this process (`app.sinks`)

    entries ─► known already? ─► batches ─► read, hash, send (threads) ─► report

What is done is what the collection has; nothing else is believed. A run that was killed is begun again by the
same command, which asks for the items of each picture's id and sends what is missing or has changed.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Console

from app.bounded_batches import bounded_batches
from app.client.items import Added, Failure, StoredItem, Upload
from app.errors import InvalidItem
from app.index_report import Report, progress_bar
from app.ledger import Ledger, SeenIds
from app.search.rows import check_id, check_words
from app.sources.picture import (
    IMAGE_SUFFIXES,
    Entry,
    FailedPicture,
    NoPictures,
    Picture,
    Source,
    unreadable,
)

_LOOKED_UP_AT_ONCE: Final = 256
_HELD_BYTES: Final = 64 * 2**20  # of pictures that came with a stream, while they are looked up
_WORDS_BYTES: Final = 4_096  # a part's headers, id, metadata and source come on top of the file


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

    def stored(self, ids: Sequence[str]) -> list[StoredItem | None]:
        """The items that are there, in the order of their ids."""
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


@dataclass(frozen=True, slots=True)
class _Job:
    """A picture that has to be read, and the item that has its id."""

    picture: Picture
    there: StoredItem | None


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of a job: a status or a failure, and the hash of what was read."""

    result: str | Failure
    sha256: str | None = None


def add_pictures(
    source: Source,
    sink: Sink,
    *,
    ledger: Ledger,
    report: Report,
    requests_in_flight: int = 4,
    batch_images: int = 32,
    console: Console | None = None,
) -> Report:
    """Adds every picture of a source that the collection hasn't got, and shows how far it is.

    Needs memory for the batches under way, however many pictures there are.

    Args:
        source: Where they come from.
        sink: Where they go.
        ledger: Of files; this adds to it.
        report: New; takes what becomes of each.
        requests_in_flight: How many batches wait for their answers at once, so that the model never waits.
        batch_images: Of a request; the sink may want fewer.
        console: Where progress is shown; standard error by default.

    Returns:
        The report, finished; its `exit_code` is the command's.

    Raises:
        NoPictures: There is nothing to add.
        ClientError: The service went away or refuses everything; what was sent is kept. So ServiceError.
    """
    console = console or Console(stderr=True)
    total = source.count()
    counted = "" if total is None else f"{total:,} in "
    console.print(
        f"{counted}{source.description}; adding to {sink.description}", markup=False, highlight=False
    )
    try:
        with progress_bar(console) as progress, contextlib.closing(SeenIds()) as seen:
            task = progress.add_task("adding", total=total, failed=0)

            def tell(entry: Entry, result: str | Failure) -> None:
                if isinstance(result, Failure):
                    report.fail(FailedPicture(entry.id, entry.where, result))
                else:
                    report.count(result)
                progress.update(task, advance=1, failed=report.counts["failed"])

            entries = source.entries(max_image_bytes=sink.limits.image_bytes)
            jobs = _jobs(entries, sink, ledger=ledger, seen=seen, tell=tell)
            batches = _batches(jobs, limits=sink.limits, batch_images=batch_images)
            for batch, done in _each_done(
                lambda batch: _add_batch(batch, sink), batches, in_flight=requests_in_flight
            ):
                ledger.remember(_read_in(batch, done))
                for job, one in zip(batch, done, strict=True):
                    tell(job.picture, one.result)
    finally:
        report.finish(console)  # also where the service went away: what was done is done
        if ledger.problem:
            console.print(ledger.problem, markup=False, highlight=False)
    if not report.counts:
        raise NoPictures(f"no pictures in {source.description}: looked for {', '.join(IMAGE_SUFFIXES)}")
    return report


def _jobs(
    entries: Iterable[Entry],
    sink: Sink,
    *,
    ledger: Ledger,
    seen: SeenIds,
    tell: Callable[[Entry, str | Failure], None],
) -> Iterator[_Job]:
    """The pictures that have to be read; of the others it is told at once what became of them."""
    for chunk in _chunks(entries):
        pictures: list[Picture] = []
        for entry in chunk:
            problem = entry.failure if isinstance(entry, FailedPicture) else _problem_of(entry, seen)
            if problem is not None:
                tell(entry, problem)
            elif isinstance(entry, Picture):
                pictures.append(entry)
        there = sink.stored([picture.id for picture in pictures]) if pictures else []
        for picture, item, sha256 in zip(pictures, there, ledger.hashes(pictures), strict=True):
            if sha256 is not None and _says_the_same(picture, sha256, item):
                tell(picture, "unchanged")
            else:
                yield _Job(picture, item)


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Some entries at a time, fewer where they hold their bytes."""
    chunk: list[Entry] = []
    held_bytes = 0
    for entry in entries:
        chunk.append(entry)
        held_bytes += entry.held_bytes if isinstance(entry, Picture) else 0
        if len(chunk) == _LOOKED_UP_AT_ONCE or held_bytes >= _HELD_BYTES:
            yield chunk
            chunk, held_bytes = [], 0
    if chunk:
        yield chunk


def _problem_of(picture: Picture, seen: SeenIds) -> Failure | None:
    """Why a picture can't become an item, whatever is in its file."""
    try:
        check_id(picture.id, where="the picture")
        check_words(metadata=picture.metadata, source=picture.source, where="the picture")
    except InvalidItem as error:
        return Failure(code=error.code, title=error.title)
    first = seen.first_place(picture.id, picture.where)
    if first is None:
        return None
    title = f"another picture of this run has the id {picture.id!r}: {first}; give each its own"
    return Failure(code="duplicate_id", title=title)


def _says_the_same(picture: Picture, sha256: str, there: StoredItem | None) -> bool:
    return (
        there is not None
        and there.sha256 == sha256
        and there.metadata == picture.metadata
        and there.source == picture.source
    )


def _batches(jobs: Iterable[_Job], *, limits: RequestLimits, batch_images: int) -> Iterator[list[_Job]]:
    """In order; none above the limits, but for a picture that is above them by itself."""
    return bounded_batches(
        jobs,
        lambda job: min(job.picture.size_bytes, limits.image_bytes) + _WORDS_BYTES,
        most_bytes=limits.request_bytes - _WORDS_BYTES,
        most_items=min(batch_images, limits.images),
    )


def _each_done(
    work: Callable[[list[_Job]], list[_Done]], batches: Iterator[list[_Job]], *, in_flight: int
) -> Iterator[tuple[list[_Job], list[_Done]]]:
    """Runs batches on threads, never more than so many at once, and gives each when it is done."""
    waiting: dict[Future[list[_Done]], list[_Job]] = {}
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
    waiting: dict[Future[list[_Done]], list[_Job]],
) -> Iterator[tuple[list[_Job], list[_Done]]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        yield waiting.pop(future), future.result()


def _add_batch(batch: list[_Job], sink: Sink) -> list[_Done]:
    done: dict[int, _Done] = {}
    uploads: dict[int, Upload] = {}
    hashes: dict[int, str] = {}
    for index, job in enumerate(batch):
        data = _read(job.picture, max_bytes=sink.limits.image_bytes)
        if isinstance(data, Failure):
            done[index] = _Done(data)
            continue
        hashes[index] = hashlib.sha256(data).hexdigest()
        if _says_the_same(job.picture, hashes[index], job.there):
            done[index] = _Done("unchanged", hashes[index])
        else:
            uploads[index] = _upload(job.picture, data)
    for index, answer in zip(uploads, _add(list(uploads.values()), sink), strict=True):
        result = answer if isinstance(answer, Failure) else answer.status
        done[index] = _Done(result, hashes[index])
    return [done[index] for index in range(len(batch))]


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
    if picture.size_bytes > max_bytes:
        return _too_large(picture.size_bytes, max_bytes)
    try:
        data = picture.read()
    except OSError as error:
        return unreadable(error)
    # It may have grown since it was looked at.
    return data if len(data) <= max_bytes else _too_large(len(data), max_bytes)


def _too_large(size_bytes: int, max_bytes: int) -> Failure:
    return Failure(
        code="image_too_large",
        title=f"the file has {size_bytes:,} bytes; at most {max_bytes:,} are taken",
        limit=max_bytes,
        actual=size_bytes,
    )


def _upload(picture: Picture, data: bytes) -> Upload:
    return Upload(id=picture.id, data=data, metadata=picture.metadata, source=picture.source)


def _read_in(batch: list[_Job], done: list[_Done]) -> Iterator[tuple[Picture, str]]:
    for job, one in zip(batch, done, strict=True):
        if one.sha256 is not None:
            yield job.picture, one.sha256
