"""The example photographs as a collection of a real service, for tests that leave it as it is."""

import base64
from typing import Any

from tests.app.api.serving import Api
from tests.app.running import ROOT

PHOTOS = sorted((ROOT / "examples/photos").rglob("*.jpg"))
IDS = [f"{path.parent.name}/{path.name}" for path in PHOTOS]
D = 48  # of the tiny bundle


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def fill(api: Api) -> None:
    """Puts the photographs under `default`, each with its class; the alias `photos` leads there too."""
    items = [
        {
            "id": item_id,
            "image": as_text(path.read_bytes()),
            "metadata": {"class": path.parent.name, "shot": {"number": int(path.stem)}, "tags": ["a"]},
        }
        for item_id, path in zip(IDS, PHOTOS, strict=True)
    ]
    answer = api.http.post("/collections/default/items", json={"items": items}).json()
    assert [item["status"] for item in answer["data"]] == ["added"] * len(PHOTOS)
    api.catalogue.set_alias("photos", "default")


def ask(api: Api, **body: Any) -> dict[str, Any]:  # noqa: ANN401
    answer = api.http.post("/similar", json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content
