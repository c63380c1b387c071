"""What keeps the collections of a service: exports, snapshots, aliases, reindexing. A part of the client.

    with Client("http://127.0.0.1:8000") as client:
        LifecycleClient(client).export("default", Path("default.parquet"))

Files that it fetches are whole, or aren't there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import quote

import httpx

from app.client.blocking import Client
from app.client.collections import path_of
from app.search.embedded.restoring import Restored
from app.search.parquet import MEDIA_TYPE
from app.search.parquet_import import Imported
from app.search.whole_file import whole_file

_CHUNK_BYTES: Final = 2**20
# How long such work takes is for the service to say: it is never cut off here.
_PATIENT: Final = httpx.Timeout(None, connect=5.0)


@dataclass(frozen=True, kw_only=True)
class StoredSnapshot:
    """A snapshot that a service keeps.

    Attributes:
        created_at: In seconds since 1970.
        collections: Name -> items.
        problem: Why it can't be read, or None.
    """

    name: str
    size_bytes: int
    created_at: float
    collections: dict[str, int]
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Reindexing:
    """How far a reindexing is; see `app.reindexing.Progress`.

    Attributes:
        failures: Ids of items without a picture, and why; the first hundred.
    """

    collection: str
    state: str
    from_fingerprint: str
    to_fingerprint: str
    done: int
    of: int
    from_source: int
    from_thumbnails: int
    failed: int
    failures: dict[str, str]
    images_per_s: float
    eta_s: float | None
    warnings: list[str]
    previous: str | None
    error: str | None


class LifecycleClient:
    """Asks a service to keep its collections.

    All methods raise `NoService` where nobody answers, and `ServiceRefused` where the service won't.

    Args:
        client: Open; who opened it closes it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def export(self, collection: str, to: Path, *, thumbnails: bool = True) -> int:
        """Fetches a collection as a Parquet file, which is whole or isn't there.

        Returns:
            Its bytes.

        Raises:
            StorageError: The file can't be written.
        """
        params = {"thumbnails": str(thumbnails).lower()}
        return self._fetch(f"{path_of(collection)}/export", to, params=params)

    def import_file(
        self, collection: str, file: Path, *, sent: Callable[[int], object] = lambda _: None
    ) -> Imported:
        """Sends a Parquet file; the collection is made if it isn't there.

        Args:
            collection: A name or an alias.
            file: As `export` writes it.
            sent: Told the bytes of each part that went out.

        Raises:
            OSError: The file can't be read.
        """
        with file.open("rb") as opened:
            answer = self._client.ask(
                "POST",
                f"{path_of(collection)}/import",
                retry=False,  # a file that is half gone can't be sent again from here
                content=_parts(opened, sent),
                headers={"Content-Type": MEDIA_TYPE, "Content-Length": str(file.stat().st_size)},
                timeout=_PATIENT,
            )
        return Imported(**{name: answer[name] for name in Imported.__dataclass_fields__})

    def make_snapshot(self) -> StoredSnapshot:
        """Copies all collections into a file that the service keeps."""
        return _snapshot(self._client.ask("POST", "/snapshots", retry=False, timeout=_PATIENT))

    def snapshots(self) -> list[StoredSnapshot]:
        """All snapshots, the oldest first."""
        return [_snapshot(one) for one in self._client.ask("GET", "/snapshots")["data"]]

    def fetch_snapshot(self, name: str, to: Path) -> int:
        """Fetches a snapshot's file, which is whole or isn't there; says its bytes.

        Raises:
            StorageError: The file can't be written.
        """
        return self._fetch(f"/snapshots/{quote(name, safe='')}", to)

    def delete_snapshot(self, name: str) -> None:
        """Deletes a snapshot."""
        self._client.ask("DELETE", f"/snapshots/{quote(name, safe='')}")

    def restore(self, snapshot: str, collection: str, *, as_name: str | None = None) -> Restored:
        """Puts a collection of a snapshot in place of the one that has its name, or makes another of it.

        Args:
            snapshot: Its name.
            collection: Its name in the snapshot.
            as_name: Of the collection to make; None to replace.
        """
        answer = self._client.ask(
            "POST",
            f"/snapshots/{quote(snapshot, safe='')}/restore",
            retry=False,
            json={"collection": collection} | ({} if as_name is None else {"as": as_name}),
            timeout=_PATIENT,
        )
        return Restored(**{name: answer[name] for name in Restored.__dataclass_fields__})

    def aliases(self) -> dict[str, str]:
        """Alias -> collection."""
        return {one["alias"]: one["collection"] for one in self._client.ask("GET", "/aliases")["data"]}

    def set_alias(self, alias: str, collection: str) -> None:
        """Leads an alias to a collection, at once."""
        self._client.ask("PUT", f"/aliases/{quote(alias, safe='')}", json={"collection": collection})

    def drop_alias(self, alias: str) -> None:
        """Forgets an alias."""
        self._client.ask("DELETE", f"/aliases/{quote(alias, safe='')}")

    def begin_reindex(self, collection: str, *, skip_failed: bool = False) -> Reindexing:
        """Begins to embed a collection's items with the model that is served, or goes on with it."""
        path = f"{path_of(collection)}/reindex"
        return _reindexing(self._client.ask("POST", path, json={"skip_failed": skip_failed}))

    def reindexing(self, collection: str) -> Reindexing:
        """How far it is."""
        return _reindexing(self._client.ask("GET", f"{path_of(collection)}/reindex"))

    def cancel_reindex(self, collection: str) -> Reindexing:
        """Stops it and deletes what it made."""
        return _reindexing(self._client.ask("DELETE", f"{path_of(collection)}/reindex"))

    def _fetch(self, path: str, to: Path, **request: Any) -> int:  # noqa: ANN401 - httpx's arguments
        size_bytes = 0
        with (
            self._client.stream(path, timeout=_PATIENT, **request) as pieces,
            whole_file(to) as file,
        ):
            for piece in pieces:
                file.write(piece)
                size_bytes += len(piece)
        return size_bytes


def _parts(file: BinaryIO, sent: Callable[[int], object]) -> Iterator[bytes]:
    while part := file.read(_CHUNK_BYTES):
        yield part
        sent(len(part))


def _snapshot(answer: Mapping[str, Any]) -> StoredSnapshot:
    return StoredSnapshot(
        name=answer["name"],
        size_bytes=answer["bytes"],
        created_at=answer["created_at"],
        collections={one["name"]: one["items"] for one in answer["collections"]},
        problem=answer["problem"],
    )


def _reindexing(answer: Mapping[str, Any]) -> Reindexing:
    plain = {name: answer[name] for name in Reindexing.__dataclass_fields__ if name != "failures"}
    return Reindexing(**plain, failures={one["id"]: one["title"] for one in answer["failures"]})
