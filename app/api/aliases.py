"""`/aliases`: other names of collections, which can be led elsewhere at once."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import answers
from app.api.body import read_json
from app.api.lifecycle_schemas import AliasAnswer, AliasesAnswer, AliasTarget
from app.api.openapi import answer_of, json_body_of
from app.api.schemas import parse
from app.api.state import StateDep, in_worker

router = APIRouter(prefix="/aliases", tags=["aliases"])


@router.get("", summary="List aliases", responses={200: answer_of(AliasesAnswer)})
async def list_aliases(state: StateDep) -> Response:
    """Lists all aliases. An alias can stand wherever a collection's name can, but for deleting it."""
    infos = await in_worker(state, state["catalogue"].list)
    pairs = sorted((alias, info.name) for info in infos for alias in info.aliases)
    content = {"data": [_answer(alias, collection) for alias, collection in pairs]}
    return answers.structured(content, answers.JSON)


@router.put(
    "/{alias}",
    summary="Lead an alias to a collection",
    responses={200: answer_of(AliasAnswer)},
    openapi_extra=json_body_of(AliasTarget),
)
async def set_alias(request: Request, alias: str, state: StateDep) -> Response:
    """Makes an alias, or leads it elsewhere at once: no search sees both collections, or none."""
    target = parse(AliasTarget, await read_json(request, state))
    await in_worker(state, state["catalogue"].set_alias, alias, target.collection)
    return answers.structured(_answer(alias, target.collection), answers.JSON)


@router.delete("/{alias}", status_code=204, summary="Forget an alias")
async def drop_alias(alias: str, state: StateDep) -> Response:
    """Forgets an alias; its collection stays."""
    await in_worker(state, state["catalogue"].drop_alias, alias)
    return Response(status_code=204)


def _answer(alias: str, collection: str) -> dict[str, Any]:
    return {"alias": alias, "collection": collection}
