"""`dino-serve index`: what the command line says is done, and answered with an exit status."""

import contextlib
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.errors import StorageError
from app.indexing import DEFAULT_REPORT, add_folder, require_folder
from app.search.library import Collections
from app.sinks import Place, open_sink, service_at

_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def index_add(
    directory: Path, *, collection: str = "default", place: Place, report: Path = DEFAULT_REPORT
) -> int:
    """Adds every picture below a folder that the collection hasn't got; run again, it goes on where it was.

    Args:
        directory: Flat or nested.
        collection: Made if it isn't there.
        place: A running service, or a directory and a model.
        report: JSON lines, one for each picture that failed.

    Returns:
        The exit status: 0 if every picture is there now, 1 if some failed, 130 if Ctrl-C stopped it.

    Raises:
        NoPictures: There is nothing to add.
        ClientError: The service doesn't answer, or refuses.
        ServiceError: The data directory can't be used, or the collection is another model's.
        DinoError: The model can't be loaded.
    """
    require_folder(directory)  # before a directory is made and a model loaded for it
    try:
        with open_sink(place, collection=collection) as sink:
            return add_folder(directory, sink, report=report).exit_code
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where this one was")
        return _INTERRUPTED


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
        if not place.data_dir.is_dir():
            raise StorageError(
                f"no service runs at the default address, and there is no directory {place.data_dir}: "
                "name one of the two"
            )
        catalogue = stack.enter_context(Collections.open(place.data_dir))
        return [(c.name, c.items, c.dimensions, c.fingerprint) for c in catalogue.list()]
