"""What a user names as data -> the images to train on, and those to measure with.

photos/             a folder, nested or flat; with train/ and val/ in it, val/ measures
photos.txt          a list of files; .csv and .tsv with a column `path`, too
shards/             a folder of tar files; photos.tar, and patterns like shards/train-*.tar, too
birds/              Parquet files as on Hugging Face's hub, or what `save_to_disk` wrote; birds.parquet, too
s3://bucket/train-{000..099}.tar    tar and Parquet files at any address that fsspec knows
"""

import json
import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from training.data.addresses import Where, is_pattern
from training.data.files import StoredFile, files_at
from training.data.folder import find_images
from training.data.images import Images
from training.data.listing import LIST_SUFFIXES, listed_images
from training.data.shards import shard_images
from training.data.tables import Columns, columns_named, is_saved, parquet_images, saved_images
from training.errors import DataError

_TAR, _PARQUET = ".tar", ".parquet"
# What Hugging Face's hub calls splits, in files' and folders' names; a test split measures where nothing else
# does.
_TRAIN = ("train", "training")
_MEASURED = ("validation", "valid", "val", "dev", "test", "testing")


def open_split(data: Where, val_data: Where | None = None) -> tuple[Images, Images | None]:
    """Opens data: `train/` and `val/` of what has both, else all of it.

    Args:
        data: What the user names.
        val_data: What to measure with, in place of `val/`.

    Returns:
        The images to train on, and those to measure with, if there are any.

    Raises:
        DataError: There is no image; the message says what was looked for.
    """
    where, columns = columns_named(data)
    trained, measured = _folders_of(where)
    if measured is None and (tables := _tables_at(where)):
        training_tables, measuring_tables = _by_split(tables)
        images: Images = parquet_images(training_tables, origin=str(where), columns=columns)
        if val_data is None and measuring_tables:
            return images, parquet_images(measuring_tables, origin=str(where), columns=columns)
    else:
        images = _opened(trained, columns)
    if val_data is not None:
        return images, open_images(val_data)
    return images, _opened(measured, columns) if measured is not None else None


def open_images(data: Where) -> Images:
    """Opens all of what a user names.

    Raises:
        DataError: There is no image in it.
    """
    return _opened(*columns_named(data))


def _opened(data: Where, columns: Columns) -> Images:
    if isinstance(data, Path) and data.suffix in LIST_SUFFIXES and not data.is_dir():
        return listed_images(data)
    if isinstance(data, Path) and is_saved(data):
        return saved_images(data, columns=columns)
    if tables := _tables_at(data):
        return parquet_images(tables, origin=str(data), columns=columns)
    shards = files_at(data, (_TAR,))
    holds_others = isinstance(data, Path) and any(path.suffix != _TAR for path in data.glob("*"))
    if shards and not holds_others:
        return shard_images(shards, origin=str(data))
    if isinstance(data, str) or (not shards and is_pattern(data)):
        raise DataError(f"no file fits {data}: give tar or Parquet files, such as shards/train-*.tar")
    return find_images(data)


def _folders_of(data: Where) -> tuple[Where, Where | None]:
    """The folders of a split that a folder holds: what to train on, and what to measure with, if it does."""
    if not isinstance(data, Path):
        return data, None
    if (data / "train").is_dir() and (data / "val").is_dir():
        return data / "train", data / "val"
    try:
        splits = json.loads((data / "dataset_dict.json").read_bytes())["splits"]
    except (FileNotFoundError, NotADirectoryError):
        return data, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{data / 'dataset_dict.json'} cannot be read: save the data set anew") from error
    trained = next((name for name in _TRAIN if name in splits), None)
    measured = next((name for name in _MEASURED if name in splits), None)
    if trained is None:
        raise DataError(f"{data} holds the splits {', '.join(splits)}, and none is called train: name one")
    return data / trained, data / measured if measured else None


def _tables_at(data: Where) -> list[StoredFile]:
    """The Parquet files that a path or an address means; of a folder those in its folders too."""
    if isinstance(data, str) and not data.partition("?")[0].endswith((_TAR, _PARQUET)):
        return files_at(data, (_PARQUET,))
    if not isinstance(data, str) and data.is_dir():
        return files_at(data, (_PARQUET,)) or files_at(
            Path(escape(str(data))) / "*" / f"*{_PARQUET}", (_PARQUET,)
        )
    return files_at(data, (_PARQUET,)) if str(data).partition("?")[0].endswith(_PARQUET) else []


def _by_split(tables: Sequence[StoredFile]) -> tuple[list[StoredFile], list[StoredFile]]:
    """Files to train on, and files to measure with, where their names say which are which."""
    words = [set(re.split(r"[/\\._-]+", _names_of(table))) for table in tables]
    train = [table for table, said in zip(tables, words, strict=True) if said & set(_TRAIN)]
    if not train:
        return list(tables), []
    for split in _MEASURED:
        measured = [table for table, said in zip(tables, words, strict=True) if split in said]
        if measured:
            return train, measured
    return train, []


def _names_of(table: StoredFile) -> str:
    """The file's own name and that of its folder."""
    return "/".join(table.where.lower().rsplit("/", 2)[-2:])
