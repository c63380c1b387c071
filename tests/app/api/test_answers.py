import pytest
from fastapi import Request

from app.api import answers
from app.api.refusals import NotAcceptable

OFFERS = (answers.JSON, answers.NPY, answers.MSGPACK)


def request(*accept: str) -> Request:
    headers = [(b"accept", value.encode()) for value in accept]
    return Request({"type": "http", "method": "POST", "path": "/embed", "headers": headers})


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        pytest.param([], answers.JSON, id="nothing said"),
        pytest.param([""], answers.JSON, id="empty"),
        pytest.param(["*/*"], answers.JSON, id="anything"),
        pytest.param(["application/*"], answers.JSON, id="any of a kind"),
        pytest.param(["application/x-npy"], answers.NPY, id="named"),
        pytest.param(["APPLICATION/X-NPY; version=1"], answers.NPY, id="capitals and parameters"),
        pytest.param(["application/x-msgpack"], answers.MSGPACK, id="another name"),
        pytest.param(["text/html, application/x-npy;q=0.1"], answers.NPY, id="what there is of it"),
        pytest.param(["application/json;q=0.5, application/msgpack"], answers.MSGPACK, id="liked better"),
        pytest.param(["*/*;q=0.9, application/x-npy;q=0.5"], answers.JSON, id="all better than one"),
        pytest.param(["*/*, application/x-npy"], answers.NPY, id="named before all"),
        pytest.param(["application/x-npy, application/json"], answers.NPY, id="first named"),
        pytest.param(["application/json;q=0, */*"], answers.NPY, id="all but one"),
        pytest.param(["*/*", "application/json;q=0"], answers.NPY, id="in two headers"),
        pytest.param(["application/*;q=0, application/msgpack"], answers.MSGPACK, id="one of a kind only"),
    ],
)
def test_the_form_that_is_liked_best_is_chosen(accept: list[str], chosen: str) -> None:
    assert answers.negotiate(request(*accept), *OFFERS) == chosen


@pytest.mark.parametrize(
    "accept", ["text/html", "image/*", "*/*;q=0", "application/json;q=none", "application", "json"]
)
def test_what_fits_nothing_is_refused_with_what_there_is(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="application/json or application/x-npy"):
        answers.negotiate(request(accept), *OFFERS)
