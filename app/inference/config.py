"""Bounds of the engine, and what the machine fills in where they are left open."""

from dataclasses import dataclass, field
from typing import Literal

from dino_core.preprocess import ImageLimits

Backend = Literal["auto", "torch", "onnxruntime", "openvino"]


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Bounds of the engine; None is "by the machine".

    Attributes:
        cores: That the engine may keep busy: all of the process's.
        backend: What computes the model on a CPU; "auto" measures those that are installed, in some seconds.
        max_batch: Images of a launch; 8 on a CPU, 64 on CUDA.
        decode_threads: Every core where the model has a device of its own; half of them where it shares them.
        compute_threads: Native threads of the model on a CPU.
        max_images_per_request: More are refused, for all of the request.
        max_image_bytes: A larger file is its own failure.
        max_images_in_flight: Between arrival and answer, of all requests.
        max_bytes_in_flight: Of their files.
        max_pixels_in_flight: As their headers declare, which is what decoding costs.
        limits: What one picture may be.
        timeout_s: A request's deadline if it names none; None for no deadline.
        cache_rows: Embeddings to keep by content, each of 4 bytes a dimension and about 300 more; 0 for none.
        drain_s: How long `stop` waits for requests that are under way.
        stall_s: A batch that is longer on the device than this means that the device hangs.
    """

    cores: int | None = None
    backend: Backend = "torch"
    max_batch: int | None = None
    decode_threads: int | None = None
    compute_threads: int | None = None
    max_images_per_request: int = 256
    max_image_bytes: int = 20 * 2**20
    max_images_in_flight: int = 1024
    max_bytes_in_flight: int = 512 * 2**20
    max_pixels_in_flight: int = 2_000_000_000  # 160 photographs of 12 megapixels; about 40 core-seconds
    limits: ImageLimits = field(default_factory=ImageLimits)
    timeout_s: float | None = 30.0
    cache_rows: int = 4096
    drain_s: float = 20.0
    stall_s: float = 120.0

    def __post_init__(self) -> None:
        if self.max_images_per_request > self.max_images_in_flight:
            raise ValueError(
                f"max_images_per_request ({self.max_images_per_request}) is above max_images_in_flight "
                f"({self.max_images_in_flight}): such a request could never enter"
            )
        if self.limits.max_pixels > self.max_pixels_in_flight:
            raise ValueError(
                f"limits.max_pixels ({self.limits.max_pixels}) is above max_pixels_in_flight "
                f"({self.max_pixels_in_flight}): such a picture could never enter"
            )
