"""`GET /info`: which model a service has, and its limits."""

from dataclasses import dataclass

import httpx

from app.client.calls import Call, json_of, not_ours


@dataclass(frozen=True, kw_only=True)
class ServiceInfo:
    """Which model a service has, and what one request may ask of it."""

    model_id: str
    fingerprint: str
    dimensions: int
    max_images: int
    max_request_bytes: int
    max_image_bytes: int


def info(*, retry: bool) -> Call[ServiceInfo]:
    """Asks which model the service has, and its limits."""
    return Call(method="GET", path="/info", read=_info_of, retry=retry)


def _info_of(response: httpx.Response) -> ServiceInfo:
    answer = json_of(response)
    try:
        model, limits = answer["model"], answer["limits"]
        return ServiceInfo(
            model_id=model["id"],
            fingerprint=model["fingerprint"],
            dimensions=model["dimensions"],
            max_images=limits["images_per_request"],
            max_request_bytes=limits["request_bytes"],
            max_image_bytes=limits["image_bytes"],
        )
    except (KeyError, TypeError):
        raise not_ours(response, "its /info is another") from None
