"""`dino-serve index export|import|snapshot|restore|rescue|reindex`: of a running service, or of a directory.

Each function here is a command: what it was told comes in, and where the collections are; an exit status goes
out. 0 is done, 1 is done in part, 130 is stopped by Ctrl-C.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from app.client import Client
from app.client.lifecycle import LifecycleClient
from app.errors import StorageError
from app.inference.blocking import blocking_engine
from app.inference.config import InferenceConfig
from app.reindexing import FailedItem, Reindex
from app.reindexing import Progress as Reindexing
from app.search.embedded.library import Collections
from app.search.embedded.rescue import rescue
from app.search.embedded.restoring import restore_collection, restore_directory
from app.search.embedded.snapshot_files import SNAPSHOTS_FOLDER, Snapshots
from app.search.parquet import export_collection
from app.search.parquet_import import import_collection
from app.settings import (
    AnySettings,
    IndexExportSettings,
    IndexImportSettings,
    IndexPlaceSettings,
    IndexReindexSettings,
    IndexRescueSettings,
    IndexRestoreSettings,
    IndexSnapshotSettings,
    load,
)
from app.sinks import Place, service_at
from dino_core.bundle import load_bundle

_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells say it
_POLL_S: Final = 0.5
_SHOWN_FAILURES: Final = 5
_BATCH_IMAGES: Final = 32

PlaceOf = Callable[[IndexPlaceSettings], Place]


def index_export(told: IndexExportSettings, place: Place) -> int:
    """Writes a collection to a Parquet file."""
    with _service_or_none(place) as client:
        if client is not None:
            size_bytes = LifecycleClient(client).export(
                told.collection, told.file, thumbnails=told.thumbnails
            )
        else:
            with _directory(place) as catalogue:
                export_collection(catalogue.get(told.collection), told.file, thumbnails=told.thumbnails)
            size_bytes = told.file.stat().st_size
    _say(f"{told.file} has the collection {told.collection!r} now ({size_bytes:,} bytes)")
    return 0


def index_import(told: IndexImportSettings, place: Place) -> int:
    """Reads a Parquet file into a collection."""
    with _service_or_none(place) as client:
        if client is not None:
            with _bytes_shown(told.file) as sent:
                done = LifecycleClient(client).import_file(told.collection, told.file, sent=sent)
        else:
            with Collections.open(place.data_dir) as catalogue:
                done = import_collection(catalogue, told.collection, told.file)
    _say(
        f"collection {done.collection!r}: {done.added:,} added, {done.updated:,} updated, "
        f"{done.unchanged:,} unchanged"
    )
    return 0


def index_snapshot(told: IndexSnapshotSettings, place: Place) -> int:
    """Copies all collections into a file."""
    with _service_or_none(place) as client:
        if client is not None:
            lifecycle = LifecycleClient(client)
            made = lifecycle.make_snapshot()
            _say(f"the service has the snapshot {made.name} ({made.size_bytes:,} bytes)")
            if told.to is not None:
                lifecycle.fetch_snapshot(made.name, told.to)
                _say(f"{told.to} is a copy of it")
            return 0
        with _directory(place) as catalogue:
            if told.to is None:
                folder = place.data_dir / SNAPSHOTS_FOLDER
                path = folder / Snapshots(folder).make(catalogue).name
            else:
                path = told.to
                catalogue.snapshot(path)
    _say(f"{path} has all collections ({path.stat().st_size:,} bytes)")
    return 0


def index_restore(told: IndexRestoreSettings, place: Place) -> int:
    """Puts one collection of a snapshot in place, or makes a directory of it all."""
    with _service_or_none(place) as client:
        if client is not None:
            return _restore_in_service(told, LifecycleClient(client))
    kept = place.data_dir / SNAPSHOTS_FOLDER / told.file
    file = kept if not told.file.exists() and kept.is_file() else told.file
    if told.collection is None:
        for info in restore_directory(file, place.data_dir):
            _say(f"collection {info.name!r}: {info.items:,} items")
        return 0
    with Collections.open(place.data_dir) as catalogue:
        restored = restore_collection(catalogue, file, told.collection, as_name=told.as_name)
    _say_restored(restored.collection, restored.items, restored.previous)
    return 0


def _restore_in_service(told: IndexRestoreSettings, lifecycle: LifecycleClient) -> int:
    if told.collection is None:
        raise StorageError(
            "a running service restores one collection at a time: name it with --collection, or stop the "
            "service to make a new directory with --data-dir"
        )
    there = [snapshot.name for snapshot in lifecycle.snapshots()]
    if told.file.name not in there:
        raise StorageError(
            f"the service has no snapshot {told.file.name}; it has: {', '.join(there) or 'none'}. Copy the "
            f"file into the folder {SNAPSHOTS_FOLDER} of its data directory"
        )
    restored = lifecycle.restore(told.file.name, told.collection, as_name=told.as_name)
    _say_restored(restored.collection, restored.items, restored.previous)
    return 0


def _say_restored(collection: str, items: int, previous: str | None) -> None:
    _say(f"collection {collection!r} has {items:,} items of the snapshot")
    if previous is not None:
        _say(f"what had the name before is the collection {previous!r} now")


def index_reindex(told: IndexReindexSettings, place: Place) -> int:
    """Embeds a collection anew, and shows how far it is; run again, it goes on where it was."""
    with _service_or_none(place) as client:
        if client is not None:
            return _reindex_in_service(told, LifecycleClient(client))
    with (
        _directory(place) as catalogue,
        blocking_engine(
            load_bundle(place.model, device=place.device),
            InferenceConfig(backend=place.backend, timeout_s=None),
        ) as engine,
    ):
        reindex = Reindex(
            catalogue,
            catalogue.get(told.collection).name,
            engine.model,
            engine.embed,
            batch_images=lambda: _BATCH_IMAGES,
        )
        thread = threading.Thread(target=_run_quietly, args=(reindex, told.skip_failed), name="reindexing")
        thread.start()
        try:
            return _followed(lambda: reindex.progress)
        except KeyboardInterrupt:
            _say("stopped; the same command goes on where this one was")
            return _INTERRUPTED
        finally:
            reindex.stop()
            thread.join()


def _run_quietly(reindex: Reindex, skip_failed: bool) -> None:
    with contextlib.suppress(Exception):  # its progress has it
        reindex.run(skip_failed=skip_failed)


def _reindex_in_service(told: IndexReindexSettings, lifecycle: LifecycleClient) -> int:
    begun = lifecycle.begin_reindex(told.collection, skip_failed=told.skip_failed)

    def progress() -> Reindexing:
        answer = lifecycle.reindexing(begun.collection)
        fields = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
        del fields["warnings"]
        fields["failures"] = tuple(
            FailedItem(id=item_id, code="", title=title) for item_id, title in answer.failures.items()
        )
        return Reindexing(**fields)

    try:
        return _followed(progress)
    except KeyboardInterrupt:
        _say(
            "the service goes on with it; the same command shows it again, and DELETE "
            f"/collections/{begun.collection}/reindex cancels it"
        )
        return _INTERRUPTED


def _followed(progress: Callable[[], Reindexing]) -> int:
    """Shows a reindexing until it ends; returns the exit status."""
    with _items_shown() as bar:
        task = bar.add_task("reindexing", total=None, failed=0, thumbnails=0)
        while True:
            now = progress()
            bar.update(
                task, total=now.of, completed=now.done, failed=now.failed, thumbnails=now.from_thumbnails
            )
            if now.state != "running":
                break
            time.sleep(_POLL_S)
    for warning in now.warnings:
        _say(warning)
    for failed in now.failures[:_SHOWN_FAILURES]:
        _say(f"  {failed.id}: {failed.title}")
    match now.state:
        case "done":
            _say(
                f"collection {now.collection!r} has the embeddings of the new model; the old ones are "
                f"the collection {now.previous!r} now"
            )
            return 0
        case "failed" if now.error is None:
            _say(
                "the collection is searched with its old embeddings until then; --skip-failed goes on without"
            )
        case _:
            _say(f"it ended ({now.state}){f': {now.error}' if now.error else ''}")
    return 1


def index_rescue(told: IndexRescueSettings, _: Place) -> int:
    """Copies what can be read of a damaged directory into a new one."""
    report = rescue(told.directory, told.to)
    for complaint in report.complaints[:_SHOWN_FAILURES]:
        _say(f"SQLite: {complaint}")
    for saved in report.collections:
        lost = "nobody knows how many are" if saved.lost is None else f"{len(saved.lost):,}"
        _say(f"collection {saved.name!r}: {saved.items:,} items saved, {lost} lost")
        for item_id in (saved.lost or [])[:_SHOWN_FAILURES]:
            _say(f"  lost: {item_id}")
    return 1 if any(saved.lost != [] for saved in report.collections) else 0


@contextlib.contextmanager
def _service_or_none(place: Place) -> Iterator[Client | None]:
    with contextlib.ExitStack() as stack:
        yield service_at(place, stack)


@contextlib.contextmanager
def _directory(place: Place) -> Iterator[Collections]:
    """The directory's collections; one that isn't there is not made."""
    if not place.data_dir.is_dir():
        raise StorageError(
            f"no service runs at the default address, and there is no directory {place.data_dir}: name one "
            "of the two"
        )
    with Collections.open(place.data_dir) as catalogue:
        yield catalogue


@contextlib.contextmanager
def _bytes_shown(file: Path) -> Iterator[Callable[[int], None]]:
    try:
        size_bytes = file.stat().st_size
    except OSError as error:
        raise StorageError(f"{file} can't be read: {error.strerror}") from None
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sending", total=size_bytes)
        yield lambda count: bar.advance(task, count)


def _items_shown() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[thumbnails]} from thumbnails, {task.fields[failed]} failed"),
        console=Console(stderr=True),
    )


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(text)


_Command = Callable[[Sequence[str], PlaceOf], int]


def _command(kind: type[AnySettings], name: str, run: Callable[[AnySettings, Place], int]) -> _Command:
    def command(flags: Sequence[str], place_of: PlaceOf) -> int:
        told = load(kind, [_spelled(flag) for flag in flags], prog=f"dino-serve index {name}")
        assert isinstance(told, IndexPlaceSettings)
        return run(told, place_of(told))

    return command


def _spelled(flag: str) -> str:
    """`--as` can't be a setting's name: it is a word of the language."""
    return flag.replace("--as", "--as-name", 1) if flag == "--as" or flag.startswith("--as=") else flag


LIFECYCLE_COMMANDS: Final[Mapping[str, _Command]] = {
    "export": _command(IndexExportSettings, "export", index_export),
    "import": _command(IndexImportSettings, "import", index_import),
    "snapshot": _command(IndexSnapshotSettings, "snapshot", index_snapshot),
    "restore": _command(IndexRestoreSettings, "restore", index_restore),
    "rescue": _command(IndexRescueSettings, "rescue", index_rescue),
    "reindex": _command(IndexReindexSettings, "reindex", index_reindex),
}
