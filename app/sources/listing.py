"""A list of pictures: text with a path on each line, or a table (CSV, JSON lines) with a column `path`.

Its columns:

    path        below the list's own folder, or absolute
    id          the item's; without it, the path as it is written
    metadata    a JSON object
    and others  each is metadata under its own name; in CSV all are text, and an empty one is left out
"""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, cast

import orjson

from app.client.items import Failure
from app.search.collection import Json
from app.sources.picture import (
    Entry,
    FailedPicture,
    NoPictures,
    clean,
    file_entry,
    id_of,
    path_metadata,
    unreadable,
)

LIST_SUFFIXES: Final = (".txt", ".csv", ".jsonl", ".ndjson")


class ListSource:
    """The pictures that a list names, in its order.

    Args:
        path: Of the list; its suffix says what it is.

    Raises:
        NoPictures: It can't be read, or is a table without a column `path`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = clean(str(path))
        self._suffix = path.suffix.lower()
        try:
            if self._suffix == ".csv":
                with self._opened() as file:
                    _require_path_column(self._name, csv.DictReader(file).fieldnames or [])
            else:
                path.open("rb").close()
        except OSError as error:
            raise NoPictures(f"the list {self._name} can't be read: {error.strerror}") from None
        except csv.Error as error:
            raise NoPictures(f"the list {self._name} is not CSV: {error}") from None

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"the list {self._name}"

    def count(self) -> int:
        """How many lines it has.

        Raises:
            NoPictures: None.
        """
        with self._opened() as file:
            lines = sum(1 for line in file if line.strip()) - (self._suffix == ".csv")
        if lines < 1:
            raise NoPictures(f"the list {self._name} is empty: write a path on each line")
        return lines

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        """The pictures; see `Source.entries`."""
        del max_image_bytes  # nothing is held
        try:
            with self._opened() as file:
                for number, row in self._rows(file):
                    where = f"{self._name}, line {number}"
                    if isinstance(row, Failure):
                        yield FailedPicture("", where, row)
                    else:
                        yield listed_entry(row, beside=self._path, where=where)
        except (OSError, csv.Error) as error:
            yield FailedPicture("", self._name, unreadable(error))

    def _opened(self) -> io.TextIOWrapper:
        # A path may be any bytes; the byte order mark is what spreadsheets begin a CSV with.
        newline = "" if self._suffix == ".csv" else None
        return self._path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)

    def _rows(self, file: io.TextIOWrapper) -> Iterator[tuple[int, Mapping[str, object] | Failure]]:
        if self._suffix == ".csv":
            table = csv.DictReader(file)
            for row in table:
                # Cells without a name are in a list under None; cells that are missing are None.
                yield table.line_num, {name: cell for name, cell in row.items() if name and cell}
            return
        for number, line in enumerate(file, 1):
            text = line.strip() if self._suffix != ".txt" else line.rstrip("\r\n")
            if not text.strip():
                continue
            yield number, {"path": text} if self._suffix == ".txt" else _json_row(text)


def listed_entry(row: Mapping[str, object], *, beside: Path, where: str) -> Entry:
    """The picture that a row of a table names.

    Args:
        row: `path`, perhaps `id` and `metadata`, and what else is metadata.
        beside: The table's own file; paths are relative to its folder.
        where: The row is, for people.
    """
    path = row.get("path")
    if not isinstance(path, str) or not path:
        return FailedPicture("", where, _bad_row("it has no `path`"))
    if path.startswith(("http://", "https://")):
        return FailedPicture(
            clean(path), where, _bad_row("its path is an address: fetch the picture, and name the file")
        )
    item_id = id_of(str(row["id"])) if row.get("id") not in (None, "") else id_of(path)
    try:
        metadata = path_metadata(path) | row_metadata(row)
    except ValueError as error:
        return FailedPicture(item_id, where, Failure(code="invalid_metadata", title=f"the row's {error}"))
    return file_entry(beside.parent / path, id=item_id, metadata=metadata, where=clean(path))


def row_metadata(row: Mapping[str, object]) -> dict[str, Json]:
    """What a row says of its picture, beside `path` and `id`.

    Raises:
        ValueError: Its `metadata` is no JSON object.
    """
    others = {name: value for name, value in row.items() if name not in ("path", "id", "metadata")}
    said = row.get("metadata")
    if isinstance(said, str) and said:
        try:
            said = orjson.loads(said)
        except orjson.JSONDecodeError:
            raise ValueError("`metadata` is not JSON") from None
    if said in (None, ""):
        said = {}
    if not isinstance(said, dict):
        raise ValueError("`metadata` is not a JSON object")
    return cast("dict[str, Json]", {**others, **said})


def _json_row(text: str) -> Mapping[str, object] | Failure:
    try:
        row = orjson.loads(text.encode("utf-8", errors="surrogateescape"))
    except orjson.JSONDecodeError:
        return _bad_row("it is not JSON")
    return row if isinstance(row, dict) else _bad_row("it is not a JSON object")


def _bad_row(reason: str) -> Failure:
    return Failure(code="invalid_row", title=f"the row can't be used: {reason}")


def _require_path_column(name: str, columns: "list[str] | tuple[str, ...] | object") -> None:
    found = [str(column) for column in columns] if isinstance(columns, (list, tuple)) else []
    if "path" not in found:
        listed = ", ".join(repr(clean(column)[:40]) for column in found[:8]) or "none"
        raise NoPictures(f"the list {name} has no column `path`; its columns are {listed}")
