"""The page as people meet it: in Chromium, against a real service."""

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FilePayload, Page, Route, expect, sync_playwright

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]

CHROMIUM = Path("/usr/bin/chromium")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WIDTHS_PX = [390, 1440]

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test for an error in its console, or for a request to another host."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        # The browser itself reports answers such as 401 and 415; the page shows them.
        lambda message: (
            complaints.append(message.text)
            if message.type == "error" and "Failed to load resource" not in message.text
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("http://127.0.0.1:", "blob:")) else complaints.append(request.url)
        ),
    )
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def filled(start: StartApi) -> Api:
    api = start()
    form = {"ids": [f"photos/{seed}.jpg" for seed in range(30)]}
    api.http.post(
        "/collections/default/items", files=multipart([photo(seed) for seed in range(30)]), data=form
    )
    return api


def upload(seed: int) -> FilePayload:
    return {"name": f"{seed}.jpg", "mimeType": "image/jpeg", "buffer": photo(seed)}


def cards(page: Page) -> list[str]:
    return [card.get_attribute("title") or "" for card in page.locator(".card").all()]


@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_a_chosen_picture_shows_its_neighbours_nearest_first(page: Page, filled: Api, width_px: int) -> None:
    page.set_viewport_size({"width": width_px, "height": 844})
    page.goto(filled.url)
    page.locator("#search-file").set_input_files(upload(7))
    expect(page.locator("#results-title")).to_have_text("Neighbours")
    expect(page.locator(".card")).to_have_count(24)
    assert cards(page)[0] == "photos/7.jpg"
    assert page.locator(".card .score").first.inner_text() == "1.00"
    scores = [float(text) for text in page.locator(".card .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    expect(page.locator("#spoken")).to_contain_text("24 neighbours. Nearest: photos/7.jpg, similarity 1.00")
    # Everything fits the width, and the first thumbnail is really drawn.
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    # Not `wait_for_function`: where it has to wait it evaluates a string, which the page's policy forbids.
    expect(page.locator(".card img").first).not_to_have_js_property("naturalWidth", 0)


def test_a_picture_chosen_before_the_page_knows_its_collections_keeps_its_neighbours(
    page: Page, filled: Api
) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/collections", hold)
    page.goto(filled.url)
    page.locator("#search-file").set_input_files(upload(7))
    expect(page.locator("#results-title")).to_have_text("Neighbours")
    (route,) = held
    route.continue_()
    expect(page.locator("#foot-items")).to_contain_text("pictures in")
    expect(page.locator("#results-title")).to_have_text("Neighbours")
    assert cards(page)[0] == "photos/7.jpg"


@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_an_empty_collection_says_how_to_fill_it(page: Page, start: StartApi, width_px: int) -> None:
    page.set_viewport_size({"width": width_px, "height": 844})
    page.goto(start().url)
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#command")).to_contain_text("dino-serve index add path/to/pictures")
    expect(page.locator("#foot-items")).to_have_text("0 pictures in “default”")
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px


def test_pictures_are_added_and_bad_ones_named(page: Page, start: StartApi) -> None:
    api = start()
    page.goto(api.url)
    bad: FilePayload = {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"text"}
    page.locator("#add-files").set_input_files([upload(1), bad, upload(2)])
    expect(page.locator("#added-say")).to_have_text("2 pictures added, 1 left out.")
    expect(page.locator("#added-failures")).to_contain_text("notes.jpg: ")
    expect(page.locator(".card")).to_have_count(2)
    expect(page.locator("#foot-items")).to_have_text("2 pictures in “default”")
    assert api.http.get("/collections/default").json()["items"] == 2


def test_a_neighbour_is_searched_by_with_a_click_and_back_returns(page: Page, filled: Api) -> None:
    page.goto(filled.url)
    page.locator("#search-file").set_input_files(upload(7))
    expect(page.locator("#results-title")).to_have_text("Neighbours")
    second = cards(page)[1]
    page.locator(".card").nth(1).click()
    expect(page.locator("#query-name")).to_have_text(second)
    expect(page.locator("#query-note")).to_have_text("from the collection")
    # It is the question, and not an answer.
    expect(page.locator(f'.card[title="{second}"]')).to_have_count(0)
    assert "id=" in page.url
    page.reload()  # the address holds the search
    expect(page.locator("#query-name")).to_have_text(second)
    page.locator("#clear").click()
    expect(page.locator("#results-title")).to_have_text("In the collection")
    page.go_back()
    expect(page.locator("#query-name")).to_have_text(second)


def test_the_keyboard_reaches_everything(page: Page, filled: Api) -> None:
    page.goto(filled.url)
    expect(page.locator(".card")).to_have_count(24)
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached[:4] == ["skip", "mark", "top-link", "choose"]
    assert "add" in reached
    assert "card" in reached
    page.keyboard.press("Enter")  # on a card
    expect(page.locator("#results-title")).to_have_text("Neighbours")
    page.keyboard.press("Escape")
    expect(page.locator("#results-title")).to_have_text("In the collection")


def test_every_control_and_picture_has_a_name_for_those_who_listen(page: Page, filled: Api) -> None:
    page.goto(filled.url)
    page.locator("#search-file").set_input_files(upload(3))
    expect(page.locator("#results-title")).to_have_text("Neighbours")
    tree = page.locator("body").aria_snapshot()
    assert re.search(r'button "photos/3\.jpg, similarity 1\.00\. Find its neighbours"', tree)
    assert 'heading "Find pictures that look alike" [level=1]' in tree
    assert 'img "Your picture"' in tree
    assert not re.search(r"- button(:|\s*$)", tree, re.MULTILINE)  # a button without a name


def test_a_dropped_picture_searches_and_several_ask(page: Page, filled: Api) -> None:
    drop = """([files]) => {
        const data = new DataTransfer();
        for (const [name, text] of files) {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            data.items.add(new File([bytes], name, { type: "image/jpeg" }));
        }
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    }"""

    def files(*seeds: int) -> list[list[str]]:
        return [[f"{seed}.jpg", base64.b64encode(photo(seed)).decode()] for seed in seeds]

    page.goto(filled.url)
    expect(page.locator(".card")).to_have_count(24)
    page.evaluate(drop, [files(5)])
    expect(page.locator("#query-name")).to_have_text("5.jpg")
    expect(page.locator(".card").first).to_have_attribute("title", "photos/5.jpg")
    page.evaluate(drop, [files(40, 41)])
    expect(page.locator("#several-say")).to_contain_text("2 pictures")
    page.locator("#several-add").click()
    expect(page.locator("#added-say")).to_have_text("2 pictures added.")
    expect(page.locator("#foot-items")).to_have_text("32 pictures in “default”")


def test_what_the_service_refuses_is_said_in_its_words(page: Page, filled: Api) -> None:
    page.goto(filled.url)
    page.locator("#search-file").set_input_files(
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"text"}
    )
    expect(page.locator("#message")).to_be_visible()
    problem = filled.http.post("/similar", content=b"text", headers={"Content-Type": "image/png"}).json()
    expect(page.locator("#message")).to_have_text(problem["detail"])


def test_more_neighbours_come_when_asked_for(page: Page, filled: Api) -> None:
    page.goto(filled.url)
    page.locator("#search-file").set_input_files(upload(7))
    expect(page.locator("#results-title")).to_have_text("Neighbours")
    page.locator("#more").click()
    expect(page.locator(".card")).to_have_count(30)
    assert len(set(cards(page))) == 30
    expect(page.locator("#more")).to_be_hidden()


def test_a_collection_of_another_model_explains_itself(
    page: Page, start: StartApi, tmp_path: Path, other_bundle: Bundle
) -> None:
    api = start()
    api.http.post("/collections/default/items", files=multipart([photo(1)]))
    api.catalogue.drop("default")
    api.catalogue.create("default", fingerprint=other_bundle.manifest.fingerprint, dimensions=48)
    page.goto(api.url)
    expect(page.locator("#foreign")).to_be_visible()
    expect(page.locator("#foreign-say")).to_contain_text("another model")


def test_with_keys_the_page_asks_for_one_and_then_shows_thumbnails(
    page: Page, start: StartApi, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("correct-horse-battery\n")
    api = start(api_key_file=keys)
    api.http.headers["Authorization"] = "Bearer correct-horse-battery"
    api.http.post("/collections/default/items", files=multipart([photo(1)]))
    page.goto(api.url)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.locator("#key").fill("correct-horse-battery")
    page.locator("#key-use").click()
    expect(page.locator(".card")).to_have_count(1)
    expect(page.locator(".card img").first).not_to_have_js_property("naturalWidth", 0)


def test_the_description_of_the_api_is_drawn(page: Page, api: Api) -> None:
    page.goto(f"{api.url}/docs#overloaded")
    expect(page.locator("#overloaded")).to_contain_text("429")
    expect(page.locator("#post-embed")).to_contain_text(
        f"curl -F images=@cat.jpg -F images=@dog.jpg {api.url}/embed"
    )
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    explained = page.locator("#post-embed").get_by_text("Whether embeddings have length 1.").bounding_box()
    assert explained is not None
    assert explained["x"] + explained["width"] <= 390
