"""What is on its way through the engine: requests, their pictures, and the work that pictures may share."""

import asyncio
from dataclasses import dataclass, field

from torch import Tensor

from app.errors import ServiceError
from app.inference.admission import Cost
from app.inference.features import Array, Reading
from app.inference.lanes import Lane
from app.inference.results import ImageFailure
from app.inference.stages import Stages
from dino_core.preprocess import ImageHeader

Row = Array | ImageFailure  # how a picture's work ends, if it ends


class Request:
    """One caller's images and the one future that the caller awaits.

    Only the event loop's thread changes it; other threads ask `wanted`.

    Args:
        answered: Set when no image is missing any more.
        images: How many.
        deadline_s: On the monotonic clock; infinity for none.
        lane: How urgent it is.
    """

    __slots__ = ("answered", "deadline_s", "lane", "last", "left", "missing", "rows")

    def __init__(
        self,
        answered: asyncio.Future[None],
        *,
        images: int,
        deadline_s: float,
        lane: Lane = "interactive",
    ) -> None:
        self.answered = answered
        self.deadline_s = deadline_s
        self.lane = lane
        self.rows: list[Row | None] = [None] * images
        self.missing = images
        self.left = False
        self.last: Stages | None = None  # of the picture that was settled last
        if images == 0:
            answered.set_result(None)

    def wanted(self, now_s: float) -> bool:
        """Whether the caller is still there and still has time."""
        return not self.left and now_s < self.deadline_s

    def answer(self, index: int, row: Row) -> None:
        """Takes the outcome of one image; the last one wakes the caller."""
        self.rows[index] = row
        self.missing -= 1
        if self.missing == 0 and not self.answered.done():
            self.answered.set_result(None)

    def fail(self, error: ServiceError) -> None:
        """Ends the whole request; the caller gets the error."""
        self.left = True
        if not self.answered.done():
            self.answered.set_exception(error)


@dataclass(slots=True, eq=False)
class Picture:
    """One image of one request.

    Attributes:
        request: Whose.
        index: Its place among the request's images.
        cost: What admission holds for it.
        data: The file, or empty where pixels were sent.
        header: None where pixels were sent.
        sha256: Of the file; filled in by the decoder.
        reading: What is wanted of it; None for the embedding.
        stages: Of its work, once that is done.
    """

    request: Request
    index: int
    cost: Cost
    data: bytes = b""
    header: ImageHeader | None = None
    sha256: bytes = b""
    reading: Reading | None = None
    stages: Stages | None = None


@dataclass(slots=True, eq=False)
class Work:
    """One image to compute, for all pictures that have the same bytes.

    Attributes:
        pictures: Who gets the row. `EmbeddingCache` adds to it while the work is open to others.
        lane: The most urgent of theirs.
        slot: Of the ring, once its pixels are there.
        begun_as_bulk: Whether it counts among the bulk works that a decoder has begun.
        pixels_CHW: Pixels that were sent instead of a file.
        stages: Where it is.
    """

    pictures: list[Picture]
    lane: Lane = field(init=False)
    slot: int | None = None
    begun_as_bulk: bool = False
    pixels_CHW: Tensor | None = field(default=None, repr=False)
    stages: Stages = field(default_factory=Stages)

    def __post_init__(self) -> None:
        self.lane = self.pictures[0].request.lane

    @property
    def reading(self) -> Reading | None:
        """What is wanted of the image, the same by all pictures."""
        return self.pictures[0].reading
