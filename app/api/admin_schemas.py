"""The wire contract of `/admin`."""

from pydantic import BaseModel, ConfigDict

from app.api.schemas import Model


class ReloadParameters(BaseModel):
    """`POST /admin/reload`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    """Whose place the bundle takes, one of those that `/info` lists; without it the first."""
    path: str | None = None
    """Of the bundle, below the service's directory of bundles, say `better`; without it the model's own
    bundle is read again."""


class ReloadAnswer(BaseModel):
    """Of `POST /admin/reload`: every request from now on is answered by the new model."""

    model: Model
    replaced: Model
    requests_with_replaced: int
    """That the old model has still to answer; with 0 it is freed. While there are any, no other model is
    loaded."""
    seconds: float
