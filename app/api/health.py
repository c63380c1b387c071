"""`/health` and `/metrics`: what supervisors, load balancers and Prometheus ask."""

from fastapi import APIRouter
from starlette.responses import Response

from app.api import answers
from app.api.state import StateDep
from app.errors import NotReady

router = APIRouter(tags=["operation"])

_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/health/live", summary="Alive?")
async def live(state: StateDep) -> Response:
    """Answers 200 while every thread of every engine runs; anything else means: restart the process."""
    if not state["models"].alive:
        raise NotReady("a thread of an engine has died or hangs: the service must be restarted")
    return answers.structured({"status": "alive"}, answers.JSON)


@router.get("/health/ready", summary="Ready?")
@router.get("/health", include_in_schema=False)
async def ready(state: StateDep) -> Response:
    """Answers 200 while requests are taken, and will be for longer than a moment."""
    if state["departure"].leaving:
        raise NotReady("the service is leaving: it answers for a while yet, and new requests go elsewhere")
    if not state["models"].ready:
        raise NotReady("the service is starting or stopping")
    return answers.structured({"status": "ready"}, answers.JSON)


@router.get("/metrics", summary="Metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(state: StateDep) -> Response:
    """Answers in Prometheus's text format."""
    return Response(state["metrics"].exposition(), media_type=_EXPOSITION)
