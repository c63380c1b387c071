"""Memory for decoded pictures, allocated once: slot numbers travel, pixels stay.

Free slots are also the back-pressure between decoders and device: with none free, decoders wait.

Dimension key: R slots · B images · C channels · H W pixels
"""

import queue
from collections.abc import Iterable

import torch
from torch import Tensor

_CLOSED = -1


class RingClosed(Exception):
    """The ring gives no more slots: the engine stops."""


class PixelRing:
    """A fixed number of slots for pictures of one size.

    Args:
        slots: How many pictures can be between decoding and the device.
        size_px: Side of the square pictures.
        pinned: Page-locked, so that a CUDA device copies from it without waiting for the host.
    """

    def __init__(self, slots: int, size_px: int, *, pinned: bool = False) -> None:
        # Channels last, as decoders write: a copy into a slot, or out of it, moves whole rows.
        self.pixels_RCHW = torch.empty(
            (slots, 3, size_px, size_px),
            dtype=torch.uint8,
            pin_memory=pinned,
            memory_format=torch.channels_last,
        )
        # First in, first out, so that slots of neighbouring pictures are mostly neighbours: see `chunks`.
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)

    def acquire(self) -> int:
        """Waits for a free slot.

        Raises:
            RingClosed: `close` was called.
        """
        slot = self._free.get()
        if slot == _CLOSED:
            self._free.put(_CLOSED)  # for the next one who waits
            raise RingClosed
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back; its pixels may be overwritten at once."""
        self._free.put(slot)

    def close(self) -> None:
        """Wakes all who wait for a slot, now and later, once the free ones are used up."""
        self._free.put(_CLOSED)

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self._free.qsize()

    def chunks(self, slots: Iterable[int]) -> list[Tensor]:
        """Views of the slots, one for each run of consecutive numbers, so that a copy takes few calls.

        Args:
            slots: Ascending slot numbers.

        Returns:
            uint8 [B, C, H, W] each, sharing the ring's memory.
        """
        runs: list[tuple[int, int]] = []
        for slot in slots:
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        return [self.pixels_RCHW[start:stop] for start, stop in runs]
