"""Canvases on disk, memory-mapped: a folder is decoded once, not once an epoch.

A cache is a folder `canvases-<key>` with

    canvases.u8     uint8 [N, C, canvas_px, canvas_px], nothing else in the file
    sizes.npy       int64 [N, 2], height and width of each original
    cache.json      version, channels, canvas side, and which images could not be read, with the reason

The key is a hash of the names, sizes and times of the files and of the canvas side, so a cache is of exactly
these files or of others. Memory stays flat however many images there are: the pages belong to the system.
The same folder in the system's shared memory is the cache in memory: one for all processes of a machine, and
gone when the last of them ends, however it ends.

Dimension key: N images of the data set · C channels
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dino_core.planes import Planes
from training.data.canvases import Canvas, load_canvas
from training.data.images import Images, UnreadableImage
from training.errors import DataError
from training.machine import usable_cores

_VERSION = 2
_CHUNK = 256  # images handed to the threads at a time: enough to keep them busy, few enough to stop soon


SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps files in memory


class CachedCanvases:
    """Canvases read from a finished cache; made by `open_cache`."""

    def __init__(self, folder: Path, images: Images) -> None:
        """Maps the files of a cache.

        Raises:
            DataError: The files don't fit each other; the message says what to delete.
        """
        description = json.loads((folder / "cache.json").read_text())
        side = int(description["canvas_px"])
        shape = (len(images), int(description["channels"]), side, side)
        canvases = folder / "canvases.u8"
        if canvases.stat().st_size != np.prod(shape, dtype=np.int64):
            raise DataError(f"{canvases} has another size than {len(images)} canvases: delete {folder}")
        self._names = images.names
        self._pixels: NDArray[np.uint8] = np.memmap(canvases, dtype=np.uint8, mode="r", shape=shape)
        self._sizes = np.load(folder / "sizes.npy")
        self.channels = shape[1]
        self.skipped: dict[str, str] = description["skipped"]
        """Images that could not be read when the cache was built, with the reason."""

    def read(self, index: int) -> Canvas:
        """Copies one canvas out of the file; UnreadableImage where there was none to be had."""
        if (reason := self.skipped.get(self._names[index])) is not None:
            raise UnreadableImage(reason)
        height_px, width_px = self._sizes[index].tolist()
        return Canvas(torch.from_numpy(np.array(self._pixels[index])), (height_px, width_px))


def open_cache(
    images: Images,
    *,
    canvas_px: int,
    cache_dir: Path,
    planes: Planes | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> CachedCanvases:
    """Opens the cache of these images, and builds it first if it isn't there.

    Of several processes one builds and the others wait. A build that was killed leaves nothing that is taken
    for a cache, and the next one clears it away.

    Args:
        images: Such as `training.data.folder.find_images` finds.
        canvas_px: Both sides of a canvas.
        cache_dir: Folder for caches, made if it isn't there; one serves many data sets.
        planes: What images are that are no RGB pictures.
        workers: Threads that decode while building; None: one for each core.
        on_progress: Called now and then with the number of images done.

    Raises:
        DataError: The disk is too small, or the cache is damaged.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    form = _Form(canvas_px, planes)
    key = _key(images, form)
    folder = cache_dir / f"canvases-{key}"
    with _only_one(cache_dir / f".{key}.lock"):
        if not folder.exists():
            unfinished = cache_dir / f".building-{key}"
            shutil.rmtree(unfinished, ignore_errors=True)
            _check_space(images, form, cache_dir=cache_dir)
            unfinished.mkdir()
            _build(images, unfinished, form, workers=workers, on_progress=on_progress)
            unfinished.rename(folder)
    return CachedCanvases(folder, images)


def memory_cache_dir() -> Path:
    """Where a cache in memory is built; its name is forgotten with `forget`.

    Raises:
        DataError: This system has no files in memory.
    """
    if not SHARED_MEMORY.is_dir():
        raise DataError(
            f"loading.cache memory needs {SHARED_MEMORY}, which this system lacks: take disk or off"
        )
    return SHARED_MEMORY / f"dinoserve-{os.getuid()}"


def forget(images: Images, *, canvas_px: int, cache_dir: Path, planes: Planes | None = None) -> None:
    """Removes a cache's files; processes that have opened it keep what is in it until they end."""
    shutil.rmtree(cache_dir / f"canvases-{_key(images, _Form(canvas_px, planes))}", ignore_errors=True)


@dataclass(frozen=True)
class _Form:
    """What a canvas is, whatever image it is of."""

    canvas_px: int
    planes: Planes | None

    @property
    def shape_CHW(self) -> tuple[int, int, int]:
        return (3 if self.planes is None else self.planes.channels, self.canvas_px, self.canvas_px)


def _key(images: Images, form: _Form) -> str:
    """A hash of what the canvases depend on."""
    digest = hashlib.sha256(f"{_VERSION} {form}\n".encode())
    for index, name in enumerate(images.names):
        digest.update(f"{images.stamp(index)} ".encode() + os.fsencode(name) + b"\n")
    return digest.hexdigest()[:16]


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Waits until no other process holds this lock; the system frees the lock of a process that dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_space(images: Images, form: _Form, *, cache_dir: Path) -> None:
    needed_bytes = len(images) * math.prod(form.shape_CHW)
    free_bytes = shutil.disk_usage(cache_dir).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"the cache of {len(images)} canvases takes {needed_bytes / 1e9:.1f} GB and {cache_dir} has "
            f"{free_bytes / 1e9:.1f} GB free: use another folder, a smaller canvas, or no cache"
        )


def _build(
    images: Images,
    folder: Path,
    form: _Form,
    *,
    workers: int | None,
    on_progress: Callable[[int], None],
) -> None:
    """Decodes every image into the files of a cache, and has them on the disk when it returns."""
    shape = (len(images), *form.shape_CHW)
    _reserve(folder / "canvases.u8", size_bytes=int(np.prod(shape, dtype=np.int64)))
    pixels_NCHW = np.memmap(folder / "canvases.u8", dtype=np.uint8, mode="r+", shape=shape)
    sizes_N2 = np.zeros((len(images), 2), dtype=np.int64)
    skipped: dict[str, str] = {}

    def store(index: int) -> None:
        try:
            canvas = load_canvas(images, index, canvas_px=form.canvas_px, planes=form.planes)
        except UnreadableImage as error:
            skipped[images.names[index]] = str(error)
            return
        pixels_NCHW[index] = canvas.pixels_CHW.numpy()
        sizes_N2[index] = canvas.size_px

    with ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="canvas-cache") as pool:
        for start in range(0, len(images), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(images)))
            for _ in pool.map(store, chunk):
                pass
            on_progress(chunk.stop)
    pixels_NCHW.flush()
    np.save(folder / "sizes.npy", sizes_N2)
    description = {
        "version": _VERSION,
        "channels": form.shape_CHW[0],
        "canvas_px": form.canvas_px,
        "skipped": dict(sorted(skipped.items())),
    }
    (folder / "cache.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def _reserve(file: Path, *, size_bytes: int) -> None:
    """Makes a file of this size whose blocks exist.

    In a sparse file a disk that fills up meanwhile would kill the process at the next write to the mapping.
    """
    with file.open("wb") as handle:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size_bytes)
        else:
            handle.truncate(size_bytes)
