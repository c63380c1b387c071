"""A collection's vectors made anew by another model, beside the old ones, from the pictures that it knows.

    source      read again, if its bytes are still those that the item was made of
    thumbnail   otherwise; a smaller picture gives a slightly other vector, so this is counted and said
    neither     the item fails, and is named

The new vectors are a successor that nobody searches until it is whole. There is no ledger: what is done is
what the successor has. Each pass compares it with the collection and does what is missing, so that a run that
was killed is begun again by the same call, and what was written to the collection meanwhile joins.
"""

import contextlib
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final, Literal

from app.errors import NothingToReindex, PredecessorChanged, ServiceError
from app.inference.blocking import Stopped
from app.inference.results import ImageEmbedding, ImageFailure, ModelInfo
from app.search.collection import Catalogue, Collection, Item
from app.thumbnails import make_thumbnail
from dino_core.errors import ImageError

State = Literal["none", "running", "done", "failed", "stopped", "interrupted", "cancelled"]
Embed = Callable[[Sequence[bytes], threading.Event], list[ImageEmbedding | ImageFailure]]

_PAGE_ITEMS: Final = 256
_NAMED_FAILURES: Final = 100


@dataclass(frozen=True, kw_only=True)
class FailedItem:
    """An item that the new model has no picture of."""

    id: str
    code: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a reindexing is.

    Attributes:
        state: "none" (there never was one), "running", "done" (switched), "failed" (see `failed` or `error`;
            it can be begun again), "stopped" (at shutdown, likewise), "interrupted" (the process ended,
            likewise), "cancelled".
        done: Items that the successor has.
        of: Items that the collection has.
        from_source: Made from their sources, since this run began; so from_thumbnails.
        failed: Items without a picture, in the present pass.
        failures: The first hundred of them.
        images_per_s: Since this run began.
        eta_s: Until all items are there, at that rate; None where nothing tells.
        previous: Which name the collection has that had the name before; None until the switch.
        error: Why it ended, where that was no item's fault.
    """

    collection: str
    state: State
    from_fingerprint: str
    to_fingerprint: str
    done: int = 0
    of: int = 0
    from_source: int = 0
    from_thumbnails: int = 0
    failed: int = 0
    failures: tuple[FailedItem, ...] = ()
    images_per_s: float = 0.0
    eta_s: float | None = None
    previous: str | None = None
    error: str | None = None

    @property
    def warnings(self) -> list[str]:
        """What somebody should know before relying on the new vectors."""
        found = []
        if self.from_thumbnails:
            found.append(
                f"made from thumbnails: {self.from_thumbnails:,}, whose sources aren't there or have other "
                "bytes. Such vectors differ slightly from those of the pictures"
            )
        if self.failed:
            found.append(
                f"without a picture that can be embedded: {self.failed:,} (see failures). Add them again, or "
                "begin again and skip them (skip_failed); the collection before keeps them"
            )
        return found


@dataclass
class _Pass:
    """One comparison of the successor with the collection."""

    seq: int
    failures: list[FailedItem] = field(default_factory=list)


class Reindex:
    """One collection and the model that its vectors shall be of. `run` it in a thread, once.

    Args:
        catalogue: Of any engine.
        name: The collection's own name.
        model: That `embed` is.
        embed: Gives each image its embedding or failure; blocks, waits where the engine is busy, and raises
            `Stopped` soon after the event is set.
        batch_images: How many to embed at once: few, so that those who ask meanwhile don't wait for this.
        max_image_bytes: Of a source.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        name: str,
        model: ModelInfo,
        embed: Embed,
        *,
        batch_images: Callable[[], int] = lambda: 16,
        max_image_bytes: int = 20 * 2**20,
    ) -> None:
        self._catalogue = catalogue
        self._name = name
        self._model = model
        self._embed = embed
        self._batch_images = batch_images
        self._max_image_bytes = max_image_bytes
        self._old = catalogue.get(name)
        if self._old.fingerprint == model.fingerprint:
            raise NothingToReindex(
                f"the collection {name!r} holds vectors of the model {model.fingerprint} already: serve the "
                "other model (--model), then reindex"
            )
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._started_s = time.monotonic()
        self._new = catalogue.begin_successor(
            name, fingerprint=model.fingerprint, dimensions=model.dimensions
        )
        self._progress = Progress(
            collection=name,
            state="running",
            from_fingerprint=self._old.fingerprint,
            to_fingerprint=model.fingerprint,
            of=self._old.count(),
        )

    @property
    def progress(self) -> Progress:
        """How far it is, at this moment."""
        with self._lock:
            progress = self._progress
        if progress.state != "running":
            return progress
        made = progress.from_source + progress.from_thumbnails
        rate = made / max(1e-3, time.monotonic() - self._started_s)
        left = max(0, progress.of - progress.done - progress.failed)
        return replace(progress, images_per_s=rate, eta_s=left / rate if made else None)

    def stop(self) -> None:
        """Lets `run` end soon; it can be begun again."""
        self._stop.set()

    def run(self, *, skip_failed: bool = False) -> Progress:
        """Builds the successor and switches to it.

        Args:
            skip_failed: Whether items without a picture are left out; otherwise they keep it from switching.

        Returns:
            How it ended: "done", "failed" or "stopped".

        Raises:
            ServiceError: Something else than an item failed, say the disk; the progress has it, too.
        """
        try:
            while not self._attempt(skip_failed=skip_failed):
                pass
        except Stopped:
            self._end("stopped")
        except ServiceError as error:
            self._end("failed", error=error.title)
            raise
        except BaseException as error:
            self._end("failed", error=f"a fault of dinoserve ({type(error).__name__}): its log says more")
            raise
        return self.progress

    def _attempt(self, *, skip_failed: bool) -> bool:
        """One pass, and the switch if nothing is in its way; whether that was the end."""
        done = self._pass()
        if done.failures and not skip_failed:
            self._end("failed")
            return True
        try:
            previous = self._catalogue.finish_successor(self._name, expected_seq=done.seq)
        except PredecessorChanged:
            return False
        self._end("done", previous=previous)
        return True

    def _end(self, state: State, *, previous: str | None = None, error: str | None = None) -> None:
        progress = self.progress
        with self._lock:
            self._progress = replace(progress, state=state, eta_s=None, previous=previous, error=error)

    def _advance(self, *, done: int = 0, from_source: int = 0, from_thumbnails: int = 0) -> None:
        with self._lock:
            now = self._progress
            self._progress = replace(
                now,
                done=now.done + done,
                from_source=now.from_source + from_source,
                from_thumbnails=now.from_thumbnails + from_thumbnails,
            )

    # One pass

    def _pass(self) -> _Pass:
        """Does what is missing, as far as it can be done."""
        this = _Pass(seq=self._old.seq)
        with self._lock:
            self._progress = replace(self._progress, done=0, failed=0, failures=(), of=self._old.count())
        # Two batches: the files of one are read while the model has the other.
        with ThreadPoolExecutor(2, thread_name_prefix="reindex") as pool:
            waiting: set[Future[list[FailedItem]]] = set()
            try:
                for batch in self._outstanding():
                    waiting.add(pool.submit(self._make, batch))
                    if len(waiting) == 2:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        self._note(this, done)
                self._note(this, waiting)
            except BaseException:
                self._stop.set()  # for the batches under way, on which the pool waits
                raise
        self._delete_what_is_gone(this)
        return this

    def _note(self, this: _Pass, finished: set[Future[list[FailedItem]]]) -> None:
        for future in finished:
            this.failures += future.result()
        with self._lock:
            self._progress = replace(
                self._progress,
                failed=len(this.failures),
                failures=tuple(this.failures[:_NAMED_FAILURES]),
            )

    def _outstanding(self) -> Iterator[list[Item]]:
        """Items that the successor hasn't got as they are, some at a time."""
        items = self._missing_items()
        while batch := list(islice(items, self._batch_images())):
            yield batch

    def _missing_items(self) -> Iterator[Item]:
        for page in _pages(self._old):
            if self._stop.is_set():
                raise Stopped
            there = self._new.get([item.id for item in page])
            missing = [item for item, made in zip(page, there, strict=True) if not self._is_made(item, made)]
            self._advance(done=len(page) - len(missing))
            yield from missing

    def _is_made(self, item: Item, made: Item | None) -> bool:
        """Whether the successor has an item as it is now."""
        if made is None or (made.sha256, made.metadata, made.source) != (
            item.sha256,
            item.metadata,
            item.source,
        ):
            return False
        # Without a hash it was made from the thumbnail, which may be another by now.
        return item.sha256 != "" or self._new.thumbnail(item.id) == self._old.thumbnail(item.id)

    def _delete_what_is_gone(self, this: _Pass) -> None:
        """Deletes from the successor what the collection hasn't got any more."""
        if self._new.count() == self._old.count() - len(this.failures):
            return  # all that the collection has is there, so there is nothing more
        for page in _pages(self._new):
            ids = [item.id for item in page]
            gone = [item_id for item_id, found in zip(ids, self._old.get(ids), strict=True) if found is None]
            if gone:
                self._new.delete(gone)

    # One batch

    def _make(self, items: list[Item]) -> list[FailedItem]:
        """Embeds items and writes them; returns those that failed, none of which the successor has then."""
        pictures: list[_Picture] = []
        failures: list[FailedItem] = []
        for item in items:
            if self._stop.is_set():
                raise Stopped
            picture = self._picture(item)
            if picture is None:
                failures.append(FailedItem(id=item.id, code="no_picture", title=_NO_PICTURE))
            else:
                pictures.append(picture)
        results = self._embed([picture.data for picture in pictures], self._stop) if pictures else []
        made: list[Item] = []
        from_source = 0
        for picture, result in zip(pictures, results, strict=True):
            if isinstance(result, ImageFailure):
                failures.append(FailedItem(id=picture.item.id, code=result.code, title=result.title))
            else:
                made.append(_made(picture, result))
                from_source += picture.is_source
        if failures:
            self._new.delete([failure.id for failure in failures])
        if made:
            self._new.upsert(made, fingerprint=self._model.fingerprint)
        self._advance(done=len(made), from_source=from_source, from_thumbnails=len(made) - from_source)
        return failures

    def _picture(self, item: Item) -> "_Picture | None":
        thumbnail = self._old.thumbnail(item.id)
        if item.source is not None and item.sha256:
            data = read_source(item.source, sha256=item.sha256, max_bytes=self._max_image_bytes)
            if data is not None:
                return _Picture(item, data, thumbnail, is_source=True)
        return None if thumbnail is None else _Picture(item, thumbnail, thumbnail, is_source=False)


@dataclass(frozen=True)
class _Picture:
    """What an item is made from. The thumbnail is read once: an item may change while it is embedded."""

    item: Item
    data: bytes
    thumbnail: bytes | None
    is_source: bool


def _made(picture: _Picture, result: ImageEmbedding) -> Item:
    thumbnail = picture.thumbnail
    if thumbnail is None:
        with contextlib.suppress(ImageError):  # an item without a thumbnail is better than none
            thumbnail = make_thumbnail(picture.data)
    return Item(
        id=picture.item.id,
        vector=result.embedding,
        metadata=picture.item.metadata,
        sha256=picture.item.sha256,
        source=picture.item.source,
        thumbnail=thumbnail,
    )


_NO_PICTURE: Final = (
    "its source is no file with the bytes that the item was made of (addresses aren't fetched), and it has "
    "no thumbnail"
)


def read_source(source: str, *, sha256: str, max_bytes: int) -> bytes | None:
    """Reads a file, if its bytes are those that are expected.

    Sources are what clients said, so this must not tell them anything of other files, nor hang on a pipe: the
    answer is the same whether there is no file, or another, or it can't be read.

    Args:
        source: An absolute path; anything else has no file.
        sha256: Of the bytes, in hex.
        max_bytes: A larger file isn't read.

    Returns:
        The bytes, or None.
    """
    path = Path(source)
    if not path.is_absolute():
        return None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None  # opening a device may do something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
                return None
            data = file.read(max_bytes + 1)
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _pages(collection: Collection) -> Iterator[list[Item]]:
    cursor: str | None = None
    while True:
        page = collection.scroll(cursor=cursor, limit=_PAGE_ITEMS)
        yield page.items
        cursor = page.next_cursor
        if cursor is None:
            return
