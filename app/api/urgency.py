"""How urgent a request is: its lane and its deadline, by headers, parameters and settings."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Header, Request

from app.api.state import State, StateDep
from app.inference.lanes import Lane


@dataclass(frozen=True)
class Urgency:
    """How a request's images go through the engine.

    Attributes:
        lane: Which.
        deadline_s: From now.
    """

    lane: Lane
    deadline_s: float


async def read_urgency(
    state: StateDep,
    priority: Annotated[
        Lane | None,
        Header(
            alias="X-Priority",
            description="`bulk`: others' interactive requests go first, and this one gets what they leave.",
        ),
    ] = None,
    timeout_ms: Annotated[
        float | None,
        Header(
            alias="X-Request-Timeout-Ms",
            gt=0,
            description="Milliseconds until the answer is of no use any more, as the parameter `timeout`.",
        ),
    ] = None,
) -> None:
    """Keeps what a request's headers say of its urgency, for `urgency`."""
    if priority is not None:
        state["priority_said"] = priority
    if timeout_ms is not None:
        state["timeout_said_s"] = timeout_ms / 1000


def urgency(state: State, *, priority: Lane | None = None, timeout_s: float | None = None) -> Urgency:
    """A request's lane and deadline.

    Of two times that are said the shorter counts: a proxy may have less patience than the caller it asks for.

    Args:
        state: Of the request.
        priority: As its parameters say; before what the header says.
        timeout_s: Likewise.
    """
    settings = state["settings"]
    said = [given for given in (timeout_s, state.get("timeout_said_s")) if given is not None]
    return Urgency(
        lane=priority or state.get("priority_said") or "interactive",
        deadline_s=min([*(said or [settings.request_timeout_s]), settings.max_request_timeout_s]),
    )


def expect_room(request: Request, state: State) -> None:
    """Refuses a request that needs the engine before its body is read, if it would be refused after.

    So that refusing costs little where more comes than can be served: no body is kept or parsed for nothing.

    Raises:
        Overloaded: There is no room for even one image, or it could not be answered in time.
        NotReady: See `Engine.embed`.
        UnknownModel: The query names a model that isn't served.
    """
    query, models = request.query_params, state["models"]
    if "model" not in query and len(models.all()) > 1:
        return  # the body may name it
    priority: Lane | None = "bulk" if query.get("priority") == "bulk" else None
    urgent = urgency(state, priority=priority, timeout_s=_seconds(query.get("timeout")))
    # Where neither query nor headers say, a form or a JSON body may allow more time than the default.
    is_said = "timeout" in query or "timeout_said_s" in state
    longest_s = urgent.deadline_s if is_said else state["settings"].max_request_timeout_s
    models.get(query.get("model")).engine.expect_room(lane=urgent.lane, deadline_s=longest_s)


def _seconds(text: str | None) -> float | None:
    """A time that a query says, if it says one; what is no number is refused with the other parameters."""
    try:
        seconds = float(text) if text is not None else None
    except ValueError:
        return None
    return seconds if seconds is not None and seconds > 0 else None
