"""API keys: their file, what each may do, and that no route was forgotten."""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from fastapi import APIRouter

from app.api.keys import ALL_SCOPES, USUAL_SCOPES, KeyRing, KeyScope, first_key, read_api_keys
from app.api.scopes import SCOPES, check_scopes, name_of
from app.settings import SettingsInvalid
from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo, serving

KEYS: dict[KeyScope, str] = {scope: f"a-key-that-may-{scope}-only" for scope in get_args(KeyScope)}
USUAL = "a-key-of-the-old-kind"
HASHED = "a-key-whose-hash-is-kept"
OPEN = ("/", "/docs", "/page/{name}", "/health", "/health/live", "/health/ready")


def write_keys(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def guarded(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("guarded")
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    keys = write_keys(
        folder / "keys",
        "# one for each scope, one without, one hashed",
        *(f"{key} {scope}" for scope, key in KEYS.items()),
        USUAL,
        f"sha256:{digest} embed, search",
    )
    with serving(bundle, folder / "data", api_key_file=keys) as api:
        yield api


def routes_of(api: Api) -> list[tuple[str, str]]:
    document = api.http.get("/openapi.json").json()
    return [
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method in methods
        if path not in OPEN
    ]


def status(api: Api, method: str, path: str, key: str | None) -> tuple[int, str]:
    place = path.replace("{item_id:path}", "x").replace("{", "").replace("}", "")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    answer = api.http.request(method, place, headers=headers)
    if answer.status_code not in {401, 403}:
        return answer.status_code, ""
    problem = answer.json().get("error", answer.json())  # OpenAI's shape, or ours
    return answer.status_code, str(problem["code"])


@pytest.mark.parametrize("route", sorted(SCOPES))
def test_each_route_is_for_holders_of_its_scope_and_for_nobody_else(guarded: Api, route: str) -> None:
    method, path = route.split(" ")
    assert status(guarded, method, path, None)[0] == 401
    assert status(guarded, method, path, "a-key-that-nobody-has")[0] == 401
    needed = SCOPES[route]
    for scope, key in KEYS.items():
        found = status(guarded, method, path, key)
        if needed in {None, scope}:
            assert found[0] not in {401, 403}, (scope, found)
        else:
            assert found == (403, "missing_scope"), scope


def test_no_route_was_forgotten(guarded: Api) -> None:
    shown = {
        name_of(method, path.replace("{item_id}", "{item_id:path}")) for method, path in routes_of(guarded)
    }
    assert shown == set(SCOPES)


def test_a_service_with_a_route_of_unknown_scope_does_not_start() -> None:
    router = APIRouter()
    router.add_api_route("/new", lambda: None, methods=["POST"])
    with pytest.raises(LookupError, match="POST /new"):
        check_scopes(router.routes)


def test_a_key_without_scopes_may_do_all_but_what_reaches_the_process(guarded: Api) -> None:
    assert {"admin"} == ALL_SCOPES - USUAL_SCOPES
    assert status(guarded, "POST", "/admin/reload", USUAL) == (403, "missing_scope")
    headers = {"X-Api-Key": USUAL}
    assert guarded.http.post("/embed", files=multipart([photo(1)]), headers=headers).status_code == 200
    assert guarded.http.delete("/collections/nowhere", headers=headers).status_code == 404


def test_a_key_of_which_the_file_has_only_the_hash_fits(guarded: Api) -> None:
    headers = {"Authorization": f"Bearer {HASHED}"}
    assert guarded.http.post("/similar", files=multipart([photo(1)]), headers=headers).status_code == 200
    refused = guarded.http.post("/collections", json={"name": "x"}, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (403, "missing_scope")
    assert "embed, search" in refused.json()["detail"]
    # The hash itself is no key.
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    for text in (digest, f"sha256:{digest}"):
        assert guarded.http.get("/info", headers={"Authorization": f"Bearer {text}"}).status_code == 401


def test_without_keys_only_this_machine_may_manage_the_process(bundle: Bundle, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "one") as api:
        assert api.http.post("/admin/reload", json={"model": "nobody"}).status_code == 404
    with serving(bundle, tmp_path / "two", host="0.0.0.0", insecure=True) as api:
        assert api.http.post("/embed", files=multipart([photo(1)])).status_code == 200
        refused = api.http.post("/admin/reload", json={})
        assert (refused.status_code, refused.json()["code"]) == (403, "missing_scope")


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("app.api.keys.time.monotonic", lambda: now_s)
    path = write_keys(tmp_path / "keys", USUAL)
    ring = KeyRing(path)
    assert ring.scopes_of(USUAL) == USUAL_SCOPES
    write_keys(path, f"{KEYS['admin']} admin")
    now_s = 2.0
    assert ring.scopes_of(USUAL) is None
    assert ring.scopes_of(KEYS["admin"]) == frozenset({"admin"})


def test_a_file_that_became_unusable_leaves_the_keys_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = itertools.count(step=2)  # every look at the keys is a look at the file
    monkeypatch.setattr("app.api.keys.time.monotonic", lambda: next(clock))
    path = write_keys(tmp_path / "keys", USUAL)
    ring = KeyRing(path)
    for change in (lambda: write_keys(path, "short"), path.unlink):
        change()
        assert ring.scopes_of(USUAL) == USUAL_SCOPES
        assert "the keys stay as they were" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("mode", "warns"), [pytest.param(0o644, True, id="world"), pytest.param(0o640, False, id="group")]
)
def test_a_file_that_everybody_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warns: bool
) -> None:
    path = write_keys(tmp_path / "keys", USUAL)
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        read_api_keys(path)
    assert ("chmod 600" in caplog.text) is warns


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"# nothing\n\n", "has no key", id="empty"),
        pytest.param(b"short\n", "fewer than 16 characters in line 1", id="guessable"),
        pytest.param(b"\xff\xfe\n", "not UTF-8", id="binary"),
        pytest.param(f"{USUAL} embed erase\n".encode(), "the scope 'erase' in line 1", id="unknown scope"),
        pytest.param(f"{USUAL} embed\n{USUAL}\n".encode(), "a key twice", id="twice"),
        pytest.param(b"sha256:abc embed\n", "fewer than 16", id="no hash"),
    ],
)
def test_a_file_of_keys_that_can_not_be_used_says_why(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsInvalid, match=says):
        read_api_keys(path)


def test_commands_send_the_first_key_that_is_not_a_hash(tmp_path: Path) -> None:
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    path = write_keys(tmp_path / "keys", f"sha256:{digest}", f"{USUAL} write")
    assert first_key(path) == USUAL
    with pytest.raises(SettingsInvalid, match="only hashes"):
        first_key(write_keys(tmp_path / "hashes", f"sha256:{digest}"))


@pytest.mark.parametrize("given", [USUAL, HASHED, "nobody's", ""])
def test_every_key_is_compared_whichever_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    ring = KeyRing(write_keys(tmp_path / "keys", USUAL, *KEYS.values(), HASHED))
    monkeypatch.setattr("app.api.keys.hmac.compare_digest", compare)
    ring.scopes_of(given)
    assert len(compared) == len(KEYS) + 2


def test_keys_are_not_in_what_is_printed(tmp_path: Path) -> None:
    (key,) = read_api_keys(write_keys(tmp_path / "keys", USUAL))
    assert USUAL not in repr(key)
