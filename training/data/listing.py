"""A list of images: one path a line, or a table with a column `path`; with labels, if it has them.

    photos.txt              a/1.jpg  or  a/1.jpg<tab>cat
    photos.csv, photos.tsv  a first line with `path` and, if there are labels, `label`

Paths are below the folder of the list, or absolute.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from training.data.folder import ImageList
from training.data.names import PackedNames
from training.errors import DataError

LIST_SUFFIXES = (".txt", ".csv", ".tsv")


def listed_images(path: Path) -> ImageList:
    """Opens a list, in its own order; that its files are there is found out when they are read.

    Raises:
        DataError: It cannot be read, names nothing, names an image twice, or has labels for some only.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(_lines(file) if path.suffix == ".txt" else _table(file, path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read: {error}") from error
    if not rows:
        raise DataError(f"the list {path} names no image: write one path a line")
    names = PackedNames(name for name, _ in rows)
    counts = Counter(name for name, _ in rows)
    if len(counts) < len(names):
        twice = counts.most_common(1)[0][0]
        raise DataError(f"the list {path} names {twice} twice: remove one of the lines")
    labels = [label for _, label in rows]
    if not any(labels):
        return ImageList(path.parent, names, listed_in=path)
    if not all(labels):
        raise DataError(
            f"the list {path} has no label for {names[labels.index('')]} and labels for others: give all "
            "or none"
        )
    class_names = tuple(sorted(set(labels)))
    place = {name: label for label, name in enumerate(class_names)}
    labels_N = torch.tensor([place[label] for label in labels], dtype=torch.int64)
    return ImageList(path.parent, names, labels_N, class_names, listed_in=path)


def _lines(file: Iterator[str]) -> Iterator[tuple[str, str]]:
    for line in file:
        name, _, label = line.strip("\r\n").partition("\t")
        if name.strip():
            yield name.strip(), label.strip()


def _table(file: Iterator[str], path: Path) -> Iterator[tuple[str, str]]:
    rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    if "path" not in (rows.fieldnames or ()):
        raise DataError(f"the table {path} has the columns {rows.fieldnames}: one must be called path")
    for row in rows:
        yield row["path"], (row.get("label") or "").strip()
