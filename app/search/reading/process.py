"""What runs in a process of its own: `python -m app.search.reading.process ORDER`, from a spool to one file.

On stdout it says what share is done, a line each. It ends when its stdin does, so that it doesn't outlive the
service, however that ends.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from app.search.reading.file import Array, DamagedReading, Kept, read_kept, write_kept
from app.search.reading.spool import Spool, open_spool
from app.search.reading.work import Order

_NICE: Final = 10
_OUT_OF_MEMORY_SCORE: Final = "500"  # of 1,000: whom Linux ends first
_LEAST_STEP: Final = 0.005


def main(order_text: str) -> None:
    """Does what an order says, behind everything else that the machine has to do."""
    os.nice(_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_SCORE)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    carry_out(Order.from_json(order_text), report=_reporter())


def carry_out(order: Order, *, report: Callable[[float], None]) -> None:
    """Computes, and writes the result.

    Args:
        order: What to do.
        report: Told what share is done.
    """
    spool = open_spool(Path(order.spool), dimensions=order.dimensions)
    arrays, found = _computed(order, spool, report=report)
    arrays = {**arrays, "ids": spool.ids.text, "id_ends": spool.ids.ends}
    write_kept(Path(order.result), {**order.facts, "items": len(spool), **found}, arrays)


def _computed(
    order: Order, spool: Spool, *, report: Callable[[float], None]
) -> tuple[Mapping[str, Array], Mapping[str, int]]:
    # Imported here, as a process needs one of them, and scikit-learn takes a second and 150 MB.
    match order.kind:
        case "map":
            from app.search.reading.map2d import compute_map  # noqa: PLC0415

            return compute_map(spool, previous=_previous(order), threads=order.threads, report=report)
        case "duplicates":
            from app.search.reading.duplicates import duplicate_links  # noqa: PLC0415

            return duplicate_links(spool, report=report), {}
        case "clusters":
            from app.search.reading.clusters import find_clusters  # noqa: PLC0415

            return find_clusters(spool, count=order.clusters, report=report), {}


def _previous(order: Order) -> Kept | None:
    if order.previous is None:
        return None
    try:
        return read_kept(Path(order.previous))
    except DamagedReading:
        return None


def _reporter() -> Callable[[float], None]:
    said = 0.0

    def report(share: float) -> None:
        nonlocal said
        if share >= said + _LEAST_STEP:
            said = share
            sys.stdout.write(f"{share:.3f}\n")
            sys.stdout.flush()

    return report


def _end_with_stdin() -> None:
    # Not through sys.stdin, whose lock this thread would still hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
