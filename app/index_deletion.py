"""`dino-serve index delete`: which items, a question, and that they are gone."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Console

from app.client import Client
from app.errors import InvalidFilter, UnknownCollection
from app.search.collection import Json
from app.search.embedded.library import Collections
from app.settings import SettingsInvalid
from app.sinks import Place, open_directory, service_at

_SAID_NO: Final = 1
_IDS_AT_ONCE: Final = 1_000


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to delete: exactly one of the three.

    Attributes:
        ids: Some items.
        filter: JSON text: the items whose metadata match.
        everything: The collection itself.

    Raises:
        SettingsInvalid: It is none of them, or several.
        InvalidFilter: The filter is not a JSON object.
    """

    ids: tuple[str, ...] = ()
    filter: str | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        if bool(self.ids) + (self.filter is not None) + self.everything != 1:
            raise SettingsInvalid("say what to delete: --id ID (again for more), --filter JSON, or --all")
        _ = self.parsed_filter

    @property
    def parsed_filter(self) -> Mapping[str, Json] | None:
        """The filter as the engines take it."""
        if self.filter is None:
            return None
        try:
            parsed = json.loads(self.filter)
        except (ValueError, RecursionError):
            raise InvalidFilter("the filter is not JSON", path="") from None
        if not isinstance(parsed, dict):
            raise InvalidFilter("the filter is JSON, and not an object: {…}", path="")
        return parsed


class _Keeper(Protocol):
    """Where the collection is."""

    def count(self, collection: str) -> int:
        """How many items it has."""
        ...

    def delete(
        self,
        collection: str,
        *,
        ids: Sequence[str] | None,
        filter: Mapping[str, Json] | None,
        dry_run: bool,
    ) -> int:
        """Deletes items, or counts them."""
        ...

    def drop(self, collection: str) -> None:
        """Deletes the collection."""
        ...


class _Service:
    def __init__(self, client: Client) -> None:
        self.delete: Callable[..., int] = client.delete
        self.drop = client.drop_collection
        self._client = client

    def count(self, collection: str) -> int:
        found = self._client.collection(collection)
        if found is None:
            raise UnknownCollection(f"there is no collection {collection!r}: see dino-serve index stats")
        return found.items


class _Directory:
    def __init__(self, catalogue: Collections) -> None:
        self.drop = catalogue.drop
        self._catalogue = catalogue

    def count(self, collection: str) -> int:
        return self._catalogue.get(collection).count()

    def delete(
        self,
        collection: str,
        *,
        ids: Sequence[str] | None,
        filter: Mapping[str, Json] | None,
        dry_run: bool,
    ) -> int:
        kept = self._catalogue.get(collection)
        if filter is not None:
            return kept.count(filter) if dry_run else kept.delete_where(filter)
        assert ids is not None, "a selection has ids or a filter: this is a bug"
        return sum(item is not None for item in kept.get(ids)) if dry_run else kept.delete(ids)


def index_delete(
    selection: Selection, *, collection: str, place: Place, dry_run: bool = False, asks: bool = True
) -> int:
    """Deletes items, which can be brought back for seven days, or a whole collection, which can't.

    Args:
        selection: What.
        collection: Whose.
        place: A running service, or a directory; its model isn't needed.
        dry_run: Only say how many items would go.
        asks: Whether to ask first, on standard error.

    Returns:
        The exit status: 0, or 1 where the user said no.

    Raises:
        SettingsInvalid: There is nobody to ask.
        InvalidFilter: The filter is malformed.
        ClientError: The service doesn't answer, or refuses.
        ServiceError: The data directory can't be used, or there is no such collection.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with _keeper(place) as keeper:
        count = _apply(selection, keeper, collection, dry_run=True)
        if dry_run:
            console.print(f"{count:,} items of {collection!r} would be deleted")
            return 0
        if asks and not _agreed(_question(selection, collection, count)):
            console.print("nothing was deleted")
            return _SAID_NO
        count = _apply(selection, keeper, collection, dry_run=False)
    console.print(f"{count:,} items of {collection!r} were deleted")
    return 0


def _apply(selection: Selection, keeper: _Keeper, collection: str, *, dry_run: bool) -> int:
    if selection.everything:
        count = keeper.count(collection)
        if not dry_run:
            keeper.drop(collection)
        return count
    if selection.filter is not None:
        return keeper.delete(collection, ids=None, filter=selection.parsed_filter, dry_run=dry_run)
    ids = list(dict.fromkeys(selection.ids))
    return sum(
        keeper.delete(collection, ids=ids[start : start + _IDS_AT_ONCE], filter=None, dry_run=dry_run)
        for start in range(0, len(ids), _IDS_AT_ONCE)
    )


def _question(selection: Selection, collection: str, count: int) -> str:
    if selection.everything:
        return f"Delete the collection {collection!r} with its {count:,} items, for good? [y/N] "
    return f"Delete {count:,} items of {collection!r}? They can be brought back for seven days. [y/N] "


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise SettingsInvalid("there is nobody to ask whether to delete: say --yes")
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


@contextlib.contextmanager
def _keeper(place: Place) -> Iterator[_Keeper]:
    with contextlib.ExitStack() as stack:
        client = service_at(place, stack)
        if client is not None:
            yield _Service(client)
        else:
            yield _Directory(stack.enter_context(open_directory(place)))
