"""The wire contract of `POST /embed/stream` and `POST /attention`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas import EmbeddingForm, Grid, ImageError, Model, Parameters, SentText


class EmbedStreamParameters(EmbeddingForm):
    """`POST /embed/stream`."""

    model: str | None = None
    """One of those that `/info` lists; without it the first."""


class EmbedLine(BaseModel):
    """A line of `POST /embed/stream`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image: SentText
    """Base64, a data URI, or {"url": …} where the service takes that."""
    id: str | int | None = None
    """Comes back with the result."""


class StreamedEmbedding(BaseModel):
    """A line of the answer: an embedding, patches, or an error; one without `index` ends the stream."""

    index: int | None = None
    id: str | int | None = None
    embedding: list[float] | str | None = None
    patches: list[list[float]] | str | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    sha256: str | None = None
    error: ImageError | None = None


class AttentionParameters(Parameters):
    """`POST /attention`."""

    head: Literal["mean"] | Annotated[int, Field(ge=0)] | None = None
    """Of the last block, from 0; `mean` of all. Without it, a picture shows the mean, and arrays have all."""
    overlay: bool = True
    """Whether a picture shows the image under the map, or the map alone."""


class AttentionAnswer(BaseModel):
    """Of `POST /attention`."""

    model: Model
    heads: int
    """How many there are in `attention`."""
    grid: Grid
    attention: list[list[list[float]]]
    """For each head, row by row, how much the class token looks at each patch; the sum over the patches is 1
    less what it looks at itself and at registers."""
    width: int
    height: int
    format: str
    sha256: str
