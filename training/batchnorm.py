"""BatchNorm in a teacher: it normalises by the batch, as the student does, and keeps statistics of its own.

In evaluation mode it would normalise by running statistics that belong to other weights, at first even to
none: the answers of a fresh ResNet then hardly depend on the image, and training goes straight to the uniform
answer. Dropout and drop path stay off, which is why the teacher as a whole is in evaluation mode.

Reference: facebookresearch/dino, `main_dino.py`, whose teacher is in training mode
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def normalising_by_batch(network: nn.Module) -> Iterator[None]:
    """Lets only the BatchNorm layers of a network see the batch; afterwards they are in evaluation mode."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


@contextlib.contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Puts back the running statistics of BatchNorm after a block that overwrites them."""
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, _BatchNorm)
        for buffer in module.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
