"""The model on a CUDA device: bfloat16, one graph per batch size, copies beside the computation.

Dimension key: B images · C channels · H W pixels · D embedding
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.inference.batcher import DeviceLost
from app.inference.embedder import Collect, batch_sizes, model_info
from app.inference.results import Matrix
from dino_core.bundle import Bundle
from dino_core.embedding import EmbeddingModel

_WARM_UP_RUNS = 3  # before a capture: cuBLAS and cuDNN choose their kernels and allocate their workspaces


@dataclass(frozen=True)
class _Lane:
    """Buffers of one batch on its way through the device."""

    pixels_BCHW: Tensor  # on the device
    rows_BD: Tensor  # page-locked, on the host
    copied: torch.cuda.Event
    consumed: torch.cuda.Event
    done: torch.cuda.Event


@dataclass(frozen=True)
class _Graph:
    """A recorded forward pass with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    pixels_BCHW: Tensor
    rows_BD: Tensor


class CudaEmbedder:
    """The model on one CUDA device.

    A batch is padded to the next of `batch_sizes(max_batch)`; what is in the padding is never returned.
    Batches have lanes, so that the next batch's pixels are copied while the present one is computed, and
    nothing waits for the whole device: only for events.

    Args:
        bundle: Loaded on the device.
        max_batch: The largest batch.
    """

    in_flight = 2
    pinned = True

    def __init__(self, bundle: Bundle, *, max_batch: int = 64) -> None:
        self.model = model_info(bundle)
        self.preprocessing = bundle.manifest.preprocessing
        self.max_batch = max_batch
        self._network: EmbeddingModel = bundle.model
        self._device = next(bundle.model.parameters()).device
        self._sizes = batch_sizes(max_batch)
        self._graphs: dict[int, _Graph] = {}
        self._compute = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # One more than batches in flight: a failed batch's halves run while its follower is under way. A lane
        # is free again when its rows were collected, so that no batch ever writes over another's.
        self._free_lanes = [self._make_lane() for _ in range(self.in_flight + 1)]

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        """Queues copies and a graph; see `Embedder.launch`.

        Raises:
            DeviceLost: The device reports an error after which it does nothing more in this process.
            torch.OutOfMemoryError: There is no memory for a graph of this size; smaller ones may have it.
        """
        try:
            return self._launch(chunks)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # of what the try allocated before it failed
            raise
        except torch.AcceleratorError as error:
            raise DeviceLost from error

    def _launch(self, chunks: Sequence[Tensor]) -> Collect:
        count = sum(len(chunk) for chunk in chunks)
        graph = self._graph(next(size for size in self._sizes if size >= count))
        lane = self._free_lanes.pop()
        try:
            self._queue(chunks, lane, graph, count)
        except BaseException:
            self._free_lanes.append(lane)
            raise
        return lambda: self._collect(lane, count)

    def _queue(self, chunks: Sequence[Tensor], lane: _Lane, graph: _Graph, count: int) -> None:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(lane.consumed)
            start = 0
            for chunk in chunks:
                lane.pixels_BCHW[start : start + len(chunk)].copy_(chunk, non_blocking=True)
                start += len(chunk)
            lane.copied.record(self._copies)
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(lane.copied)
            graph.pixels_BCHW.copy_(lane.pixels_BCHW[: len(graph.pixels_BCHW)], non_blocking=True)
            lane.consumed.record(self._compute)
            graph.graph.replay()
            lane.rows_BD[:count].copy_(graph.rows_BD[:count], non_blocking=True)
            lane.done.record(self._compute)

    def _collect(self, lane: _Lane, count: int) -> Matrix:
        try:
            lane.done.synchronize()
            rows_BD: Matrix = lane.rows_BD[:count].numpy().copy()  # the lane is used again
        except torch.AcceleratorError as error:
            raise DeviceLost from error
        finally:
            self._free_lanes.append(lane)
        return rows_BD

    def _make_lane(self) -> _Lane:
        return _Lane(
            pixels_BCHW=self._pixels(self.max_batch),
            rows_BD=torch.empty((self.max_batch, self.model.dimensions), pin_memory=True),
            copied=torch.cuda.Event(),  # type: ignore[no-untyped-call]
            consumed=torch.cuda.Event(),  # type: ignore[no-untyped-call]
            # Sleeps while it waits, and leaves the core to a decoder.
            done=torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
        )

    def _graph(self, size: int) -> _Graph:
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        return self._graphs[size]

    def _capture(self, size: int) -> _Graph:
        pixels_BCHW = self._pixels(size)
        self._compute.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._compute):
            for _ in range(_WARM_UP_RUNS):
                self._forward(pixels_BCHW)
        self._compute.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._compute):
            rows_BD = self._forward(pixels_BCHW)
        return _Graph(graph, pixels_BCHW, rows_BD)

    def _pixels(self, size: int) -> Tensor:
        crop_px = self.preprocessing.crop_px
        black_BCHW = torch.zeros((size, 3, crop_px, crop_px), dtype=torch.uint8, device=self._device)
        # The memory order of the host's pixels, so that copies are plain.
        return black_BCHW.contiguous(memory_format=torch.channels_last)

    def _forward(self, pixels_BCHW: Tensor) -> Tensor:
        # Autocast's cache of cast weights must not outlive a capture: a replay would read freed memory.
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            rows_BD: Tensor = self._network(pixels_BCHW)
            return rows_BD.float()
