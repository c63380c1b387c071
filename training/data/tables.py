"""Images in the rows of Parquet or Arrow files, as Hugging Face's hub and `save_to_disk` have them.

    image   the encoded image: a struct of `bytes` and `path`, or plain bytes
    label   a number, with names where the file's metadata has a ClassLabel, or a word; or there is none

Columns of other names are found where there is no choice; else they are named behind a `#`:
`photos.parquet#image=img,label=fine_label`.

Dimension key: N images · G groups of rows over all files
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.addresses import Where
from training.data.files import LocalFile, StoredFile, local_file
from training.data.images import UnreadableImage
from training.data.row_files import ArrowRows, GroupCache, ParquetRows, RowFile
from training.errors import DataError

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels")
_OPENED_AT_ONCE = 8
_NAMED = re.compile(r"(.*)#((?:image|label)=.*)", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """Which columns the user named."""

    image: str | None = None
    label: str | None = None


class RowNames(Sequence[str]):
    """`train-0.parquet/17`, the file and the row; made when asked for: millions would take room."""

    def __init__(self, file_names: Sequence[str], rows_F: Sequence[int]) -> None:
        self._file_names = tuple(file_names)
        self._ends_F = np.cumsum(rows_F, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends_F[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        file = int(np.searchsorted(self._ends_F, place, side="right"))
        start = int(self._ends_F[file - 1]) if file else 0
        return f"{self._file_names[file]}/{place - start}"


@dataclass(frozen=True, kw_only=True)
class TableImages:
    """The images of some files of rows, in their order."""

    origin: str
    names: RowNames
    labels_N: Tensor | None
    class_names: tuple[str, ...]
    files: tuple[RowFile, ...]
    column: str
    """Of the images."""
    places_G3: NDArray[np.int64]
    """File and group within it, and how many rows come before the group."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The encoded image of a row."""
        file, group, first = map(int, self.places_G3[self._group_of(index)])
        value: object = self.files[file].column(group, self.column)[index - first].as_py()
        content: object = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(content, bytes):
            return content
        path = value.get("path") if isinstance(value, Mapping) else None
        if not path:
            raise UnreadableImage("the row holds no image")
        beside = self.files[file].file
        folder = beside.path.parent if isinstance(beside, LocalFile) else Path()
        return (folder / str(path)).read_bytes()

    def stamp(self, index: int) -> str:
        """Size and time of its file, and its row."""
        file, _, first = map(int, self.places_G3[self._group_of(index)])
        return f"{self.files[file].file.stamp} {index - first} {first}"

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.places_G3[:, 2], index, side="right")) - 1


def columns_named(data: Where) -> tuple[Where, Columns]:
    """Data without what is behind its `#`, and the columns that are named there.

    Raises:
        DataError: Something else is named there.
    """
    named = _NAMED.fullmatch(str(data))
    if named is None:
        return data, Columns()
    pairs = [pair.partition("=")[::2] for pair in named[2].split(",")]
    unknown = [key for key, value in pairs if key not in ("image", "label") or not value]
    if unknown:
        raise DataError(f"{data} names the column {unknown[0]!r}: write #image=NAME,label=NAME")
    rest = Path(named[1]) if isinstance(data, Path) else named[1]
    return rest, Columns(**dict(pairs))


def parquet_images(files: Sequence[StoredFile], *, origin: str, columns: Columns) -> TableImages:
    """Opens Parquet files, several at once; images are read when they are asked for.

    Raises:
        DataError: One is no Parquet file; there is no row, or no such column; or some have labels only.
    """
    groups = GroupCache()
    with ThreadPoolExecutor(_OPENED_AT_ONCE, thread_name_prefix="open") as pool:
        opened = list(pool.map(lambda file: ParquetRows(file, groups), files))
    return _images_in(opened, origin=origin, columns=columns)


def saved_images(folder: Path, *, columns: Columns) -> TableImages:
    """Opens a data set that Hugging Face's `save_to_disk` wrote.

    Raises:
        DataError: Files are missing or damaged; else as `parquet_images`.
    """
    try:
        listed = json.loads((folder / "state.json").read_bytes())["_data_files"]
        paths = [folder / str(entry["filename"]) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} cannot be read: save the data set anew") from error
    opened = [ArrowRows(local_file(path)) for path in paths]
    return _images_in(opened, origin=str(folder), columns=columns)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a data set here."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _images_in(files: Sequence[RowFile], *, origin: str, columns: Columns) -> TableImages:
    files = [file for file in files if sum(file.rows_G)]
    if not files:
        raise DataError(f"{origin} has no rows: give files with images in them")
    first = files[0]
    image = _image_column(first, columns.image)
    label = _label_column(first, columns.label)
    for file in files[1:]:
        if missing := {image, *([label] if label else [])} - set(file.schema.names):
            raise DataError(
                f"{file.file.where} has no column {missing.pop()}, which {first.file.where} has: give files "
                "of one data set"
            )
    labels_N, class_names = _labels(files, label) if label else (None, ())
    places = [
        (number, group, rows)
        for number, file in enumerate(files)
        for group, rows in enumerate(file.rows_G)
        if rows
    ]
    rows_G = np.array([rows for _, _, rows in places], dtype=np.int64)
    firsts_G = np.cumsum(rows_G) - rows_G
    return TableImages(
        origin=origin,
        names=RowNames(_short_names([file.file for file in files]), [sum(file.rows_G) for file in files]),
        labels_N=labels_N,
        class_names=class_names,
        files=tuple(files),
        column=image,
        places_G3=np.stack([[p[0] for p in places], [p[1] for p in places], firsts_G], axis=1).astype(
            np.int64
        ),
    )


def _short_names(files: Sequence[StoredFile]) -> list[str]:
    """The last parts of the files' names, as many as tell them apart."""
    parts = [re.split(r"[/\\]+", file.where) for file in files]
    count = 1
    while len({tuple(each[-count:]) for each in parts}) < len({tuple(each) for each in parts}):
        count += 1
    return ["/".join(each[-count:]) for each in parts]


def _image_column(file: RowFile, asked: str | None) -> str:
    names = [field.name for field in file.schema if _holds_images(field.type)]
    if asked is not None:
        _check_named(file, asked)
        if asked not in names:
            raise DataError(
                f"the column {asked} of {file.file.where} holds {file.schema.field(asked).type}: images are "
                "bytes, or structs of bytes and path"
            )
        return asked
    usual = [name for name in _IMAGE_COLUMNS if name in names]
    if usual or len(names) == 1:
        return (usual or names)[0]
    if names:
        raise DataError(
            f"{file.file.where} has several columns that may hold images ({', '.join(names)}): name one "
            f"behind it, as #image={names[0]}"
        )
    listed = ", ".join(f"{field.name} ({field.type})" for field in list(file.schema)[:8]) or "none"
    raise DataError(
        f"{file.file.where} has no column of images (bytes, or structs of bytes and path); its columns are "
        f"{listed}"
    )


def _label_column(file: RowFile, asked: str | None) -> str | None:
    if asked is not None:
        _check_named(file, asked)
        return asked
    usual = [name for name in _LABEL_COLUMNS if name in file.schema.names]
    classes = [name for name in _class_labels(file) if name in file.schema.names]
    return usual[0] if usual else classes[0] if len(classes) == 1 else None


def _check_named(file: RowFile, asked: str) -> None:
    names = list(file.schema.names)
    if asked not in names:
        near = get_close_matches(asked, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(
            f"{file.file.where} has no column {asked}: {hint}its columns are {', '.join(names[:20])}"
        )


def _holds_images(kind: Any) -> bool:  # noqa: ANN401  pyarrow ships no types
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_images(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_labels(file: RowFile) -> dict[str, list[str]]:
    """Columns that Hugging Face's metadata calls ClassLabel, with the names of their classes."""
    features: dict[str, Any] = {}
    try:
        features = json.loads((file.schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        stored = file.file
        beside = stored.path.parent / "dataset_info.json" if isinstance(stored, LocalFile) else Path()
        if beside.is_file():
            features = json.loads(beside.read_bytes()).get("features") or {}
    return {
        column: [str(name) for name in feature["names"]]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _labels(files: Sequence[RowFile], column: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels of all rows as places among the sorted names of the classes; none where no row has one."""
    named = _class_labels(files[0]).get(column)
    values = list(_values(files, column))
    words = [None if value is None or value == -1 else _word(value, named) for value in values]
    if all(word is None for word in words):
        return None, ()
    if None in words:
        raise DataError(
            f"row {words.index(None)}, counted from the start of {files[0].file.where}, has no {column} and "
            "others have: give all or none"
        )
    class_names = tuple(sorted(set(named or []) | {word for word in words if word is not None}))
    place = {name: label for label, name in enumerate(class_names)}
    return torch.tensor([place[str(word)] for word in words], dtype=torch.int64), class_names


def _values(files: Sequence[RowFile], column: str) -> Iterator[object]:
    for file in files:
        for group in range(len(file.rows_G)):
            try:
                yield from file.column(group, column).to_pylist()
            except UnreadableImage as error:
                raise DataError(
                    f"the labels cannot be read: {error}; fetch or write the file anew"
                ) from error


def _word(value: object, names: Sequence[str] | None) -> str:
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(value)
