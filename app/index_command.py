"""`dino-serve index`: what the command line says is done, and answered with an exit status."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.index_report import DEFAULT_REPORT, Report
from app.indexing import add_pictures
from app.ledger import Ledger
from app.sinks import Place, open_directory, open_sink, service_at
from app.sources.opening import open_sources
from app.users_cache import users_cache

_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def index_add(
    sources: Sequence[Path],
    *,
    collection: str = "default",
    place: Place,
    report: Path = DEFAULT_REPORT,
    ledger: Path | None = None,
    rehash: bool = False,
) -> int:
    """Adds every picture of some sources that the collection hasn't got; run again, it goes on where it was.

    Args:
        sources: Folders, tar files, lists and Parquet files, one after the other.
        collection: Made if it isn't there.
        place: A running service, or a directory and a model.
        report: JSON lines, one for each picture that failed.
        ledger: Where hashes of files are remembered; None: nowhere.
        rehash: Whether files are read again whose size and times are as they were.

    Returns:
        The exit status: 0 if every picture is there now, 1 if some failed, 130 if Ctrl-C stopped it.

    Raises:
        NoPictures: There is nothing to add.
        SettingsInvalid: The report can't be written.
        ClientError: The service doesn't answer, or refuses.
        ServiceError: The data directory can't be used, or the collection is another model's.
        DinoError: The model can't be loaded.
    """
    # Before a directory is made and a model loaded for it.
    source, failures = open_sources(sources), Report(report)
    source.count()
    try:
        with open_sink(place, collection=collection) as sink, Ledger(ledger, rereads=rehash) as hashes:
            return add_pictures(source, sink, ledger=hashes, report=failures).exit_code
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where this one was")
        return _INTERRUPTED


def default_ledger() -> Path | None:
    """In the user's cache; None where the user has no home."""
    cache = users_cache()
    return cache and cache / "files.sqlite"


def index_stats(place: Place) -> int:
    """Shows a table of the collections, of a running service or of a directory.

    Args:
        place: A running service, or a directory; its model isn't needed.

    Returns:
        The exit status: 0.

    Raises:
        ClientError: The service doesn't answer, or refuses.
        ServiceError: The data directory can't be used.
    """
    table = Table("collection", "items", "dimensions", "fingerprint")
    for name, items, dimensions, fingerprint in _stats(place):
        table.add_row(name, f"{items:,}", str(dimensions), fingerprint)
    Console().print(table)
    return 0


def _stats(place: Place) -> list[tuple[str, int, int, str]]:
    with contextlib.ExitStack() as stack:
        client = service_at(place, stack)
        if client is not None:
            return [(c.name, c.items, c.dimensions, c.fingerprint) for c in client.collections()]
        catalogue = stack.enter_context(open_directory(place))
        return [(c.name, c.items, c.dimensions, c.fingerprint) for c in catalogue.list()]
