"""`POST /admin/reload`: another bundle in a served model's place, without dropping a request."""

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import answers
from app.api.admin_schemas import ReloadAnswer, ReloadParameters
from app.api.body import read_json
from app.api.embed import model_answer
from app.api.openapi import answer_of, example, json_body_of
from app.api.schemas import parse
from app.api.state import StateDep

router = APIRouter(prefix="/admin", tags=["operation"])


@router.post(
    "/reload",
    summary="Replace a model",
    responses={200: answer_of(ReloadAnswer)},
    openapi_extra=json_body_of(ReloadParameters)
    | example("""curl {origin}/admin/reload --json '{"model": "default", "path": "better"}'"""),
)
async def reload(request: Request, state: StateDep) -> Response:
    """Loads a bundle beside the model whose place it takes, warms it up, checks it, and switches at once.

    Requests that began with the old model end with it; then it is freed. A bundle that can't be loaded, or
    doesn't reproduce its reference embeddings, leaves the old model where it is, and the answer says why.
    Collections stay as they are: those of a model that is served no more answer 409 until they are reindexed.
    """
    asked = parse(ReloadParameters, await read_json(request, state))
    started_s = time.monotonic()
    done = await state["models"].reload(asked.model, asked.path)
    content = {
        "model": model_answer(done.model.info),
        "replaced": model_answer(done.replaced),
        "requests_with_replaced": done.holders,
        "seconds": round(time.monotonic() - started_s, 3),
    }
    return answers.structured(content, answers.JSON)
