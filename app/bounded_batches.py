"""A long series cut into batches that are bounded in number and in bytes."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def bounded_batches(
    items: Iterable[Item],
    bytes_of: Callable[[Item], int],
    *,
    most_bytes: int,
    most_items: int | None = None,
) -> Iterator[list[Item]]:
    """Cuts a series, in its order; none is above the bounds, but for an item that is above them by itself.

    Args:
        items: Taken one ahead of the batch that is given.
        bytes_of: What an item costs.
        most_bytes: Of a batch.
        most_items: Of a batch; None: any number.
    """
    batch: list[Item] = []
    size_bytes = 0
    for item in items:
        bytes_more = bytes_of(item)
        if batch and (len(batch) == most_items or size_bytes + bytes_more > most_bytes):
            yield batch
            batch, size_bytes = [], 0
        batch.append(item)
        size_bytes += bytes_more
    if batch:
        yield batch
