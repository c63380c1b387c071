"""`python -m tests.app.misbehaving_child run …`: the service, with a model that does what pictures tell it.

A picture of one of four colours makes the model hang, wait for the file that `DINO_TEST_GATE` names, lose its
device, or end its thread; others are embedded.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import app.inference.engine
from app.cli import main
from app.inference.batcher import DeviceLost
from app.inference.embedder import Collect, TorchEmbedder

HANG, WAIT, LOSE_DEVICE, KILL_THREAD = (255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 0, 255)
GATE = "DINO_TEST_GATE"


class Misbehaving(TorchEmbedder):
    """The bundle's model, but for the colours above."""

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        """As told."""
        for chunk in chunks:
            for pixels_CHW in chunk:
                colour = tuple(pixels_CHW[:, 5, 5].tolist())
                if colour == HANG:
                    threading.Event().wait()
                while colour == WAIT and not Path(os.environ[GATE]).exists():
                    time.sleep(0.01)
                if colour == LOSE_DEVICE:
                    raise DeviceLost("an illegal memory access was encountered")
                if colour == KILL_THREAD:
                    sys.exit("the end of a thread")
        return super().launch(chunks)


if __name__ == "__main__":
    app.inference.engine.make_embedder = lambda bundle, **_: Misbehaving(bundle)
    main()
