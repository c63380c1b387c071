"""Collections back out of snapshots: one of them while all are in use, or a whole directory.

A collection is built from the snapshot as a successor, which nobody searches, and takes its place at once; a
restore that fails has changed nothing.
"""

import contextlib
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from app.errors import CollectionExists, NotReady, StorageError, SuccessorExists, UnknownCollection
from app.search.collection import Catalogue, CollectionInfo
from app.search.embedded.directory import DATABASE_NAME, LOCK_NAME, lock_directory
from app.search.embedded.snapshot_files import SNAPSHOTS_FOLDER, SnapshotFile
from app.search.whole_file import whole_file


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A collection that came out of a snapshot.

    Attributes:
        collection: Its name now.
        previous: The name that the collection has now that had the name before; None where there was none.
    """

    collection: str
    fingerprint: str
    items: int
    previous: str | None


def restore_collection(
    catalogue: Catalogue,
    snapshot: Path,
    name: str,
    *,
    as_name: str | None = None,
    stop: threading.Event | None = None,
) -> Restored:
    """Reads a collection from a snapshot, and puts it in the place of the one that has its name.

    That one stays under another name; what was written to it during the restore stays with it.

    Args:
        catalogue: Of any engine.
        snapshot: The file.
        name: Of the collection, in the snapshot.
        as_name: Of a collection that is made for it instead.
        stop: Once it is set, the restore ends, and nothing was changed.

    Raises:
        StorageError: The snapshot is damaged or no snapshot, or the collection can't be written.
        UnknownCollection: The snapshot has no such collection.
        CollectionExists: `as_name` is taken.
        InvalidCollection: `as_name` can't be a name.
        SuccessorExists: Something else is being built to take the collection's place.
        NotReady: It was stopped.
    """
    with SnapshotFile.open(snapshot) as opened:
        opened.check()
        info = opened.collection(name)
        target, made = _target(catalogue, info, as_name)
        try:
            items = _fill(catalogue, opened, info, target, stop)
            previous = catalogue.finish_successor(target)
        except BaseException:
            with contextlib.suppress(UnknownCollection):  # dropped meanwhile, perhaps
                catalogue.cancel_successor(target)
                if made:
                    _drop_if_empty(catalogue, target)
            raise
    is_gone = made and _drop_if_empty(catalogue, previous)
    return Restored(
        collection=target, fingerprint=info.fingerprint, items=items, previous=None if is_gone else previous
    )


def _drop_if_empty(catalogue: Catalogue, name: str) -> bool:
    """Drops a collection that was made to be taken the place of; not if somebody has added to it since."""
    if catalogue.get(name).count():
        return False
    catalogue.drop(name)
    return True


def _target(catalogue: Catalogue, info: CollectionInfo, as_name: str | None) -> tuple[str, bool]:
    """Whose place the restored collection takes, and whether it was made for that."""
    wanted = as_name or info.name
    try:
        target = catalogue.get(wanted).name
    except UnknownCollection:
        catalogue.create(wanted, fingerprint=info.fingerprint, dimensions=info.dimensions)
        return wanted, True
    if as_name is not None:
        raise CollectionExists(f"the name {as_name!r} is taken: name another collection to make")
    begun = {there.name: there.successor for there in catalogue.list()}.get(target)
    if begun is not None:
        raise SuccessorExists(
            f"a successor of {target!r} is being built, or was and stopped: finish it, or cancel it with "
            f"DELETE /collections/{target}/reindex",
            expected=begun.fingerprint,
            found=info.fingerprint,
        )
    return target, False


def _fill(
    catalogue: Catalogue,
    snapshot: SnapshotFile,
    info: CollectionInfo,
    target: str,
    stop: threading.Event | None,
) -> int:
    successor = catalogue.begin_successor(target, fingerprint=info.fingerprint, dimensions=info.dimensions)
    items = 0
    for batch in snapshot.batches(info):
        if stop is not None and stop.is_set():
            raise NotReady("the restore was stopped before its end; nothing was changed")
        successor.upsert(batch, fingerprint=info.fingerprint)
        items += len(batch)
    return items


def restore_directory(snapshot: Path, data_dir: Path) -> list[CollectionInfo]:
    """Makes a directory of collections from a snapshot.

    Args:
        snapshot: Of the whole of another one.
        data_dir: Without collections; made if it isn't there.

    Returns:
        What it has now.

    Raises:
        StorageError: The snapshot is damaged or no snapshot, or the directory has collections.
        DirectoryInUse: A process has the directory.
    """
    with SnapshotFile.open(snapshot) as opened:
        opened.check()
        collections = opened.collections()
    lock_descriptor = lock_directory(data_dir)
    try:
        # What belongs to another database would be taken for this one's: its journal, its search structures.
        found = sorted({path.name for path in data_dir.iterdir()} - {LOCK_NAME, SNAPSHOTS_FOLDER})
        if found:
            raise StorageError(
                f"{data_dir} is not empty ({', '.join(found[:5])}): name an empty directory, or one "
                "collection to restore"
            )
        with snapshot.open("rb") as source, whole_file(data_dir / DATABASE_NAME) as file:
            shutil.copyfileobj(source, file, 2**20)
    finally:
        os.close(lock_descriptor)
    return collections
