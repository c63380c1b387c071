import re
from importlib.resources import files

import pytest

from tests.app.api.serving import Api

PAGE = files("app").joinpath("page")
NAMES = sorted(entry.name for entry in PAGE.iterdir() if entry.is_file())


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/page/app.js", "/page/docs.js", "/page/style.css", "/page/icon.svg"]
)
def test_a_page_comes_with_a_strict_policy_and_is_asked_for_again(api: Api, path: str) -> None:
    answer = api.http.get(path)
    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    again = api.http.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "index", "..%2Fmain.py", "__init__.py"])
def test_nothing_else_is_served(api: Api, name: str) -> None:
    answer = api.http.get(f"/page/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_route")


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_the_pages_names_another_host(name: str) -> None:
    text = PAGE.joinpath(name).read_text(encoding="utf-8")
    addresses = [url for url in re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text) if "www.w3.org" not in url]
    assert addresses == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".html")])
def test_no_page_has_script_or_style_inside(name: str) -> None:
    html = PAGE.joinpath(name).read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)", html)
    assert not re.search(r"<style|\sstyle=|\son\w+=", html)
    assert '<html lang="en">' in html


def test_every_file_that_a_page_names_is_there(api: Api) -> None:
    for path in ("/", "/docs"):
        for name in re.findall(r'(?:src|href)="(/page/[^"]+)"', api.http.get(path).text):
            assert api.http.get(name).status_code == 200, name


def test_the_description_names_every_route_and_its_kinds_of_body(api: Api) -> None:
    description = api.http.get("/openapi.json").json()
    paths = description["paths"]
    assert {"/embed", "/similar", "/collections", "/collections/{name}/items", "/info", "/metrics"} <= set(
        paths
    )
    kinds = paths["/embed"]["post"]["requestBody"]["content"]
    assert set(kinds) == {"multipart/form-data", "application/json", "image/*", "application/x-npy"}
    new = paths["/collections"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(new["properties"]) == {"name", "model"}
    assert "HTTPValidationError" not in str(description)
