"""The page as people meet it: in Chromium, against a real service."""

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FilePayload, Page, Route, expect, sync_playwright

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo, serving

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
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached[:5] == ["skip", "mark", "whole-link", "top-link", "choose"]
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
    explained = (
        page.locator("#post-embed")
        .get_by_text("Whether embeddings have length 1, and so each patch.")
        .bounding_box()
    )
    assert explained is not None
    assert explained["x"] + explained["width"] <= 390


READING_MS = 120_000  # it is computed behind everything else that the machine does


@pytest.fixture(scope="module")
def read(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Thirty pictures and two copies; their map, clusters and duplicates are computed once for all tests."""
    with serving(bundle, tmp_path_factory.mktemp("read")) as api:
        seeds = [*range(30), 4, 4]
        form = {"ids": [f"photos/{number:02}.jpg" for number in range(32)]}
        api.http.post(
            "/collections/default/items", files=multipart([photo(seed) for seed in seeds]), data=form
        )
        yield api


def open_map(page: Page, api: Api) -> None:
    page.goto(api.url)
    page.locator("#whole-link").click()
    expect(page.locator("#map-say")).to_have_text("32 pictures", timeout=READING_MS)
    expect(page.locator("#clusters > li").first).to_be_visible(timeout=READING_MS)
    expect(page.locator("#groups-say")).to_contain_text("in all", timeout=READING_MS)


def place_of(page: Page, api: Api, item_id: str) -> tuple[float, float]:
    """Where an item is drawn, in the window, as long as nobody went nearer."""
    found = api.http.get("/collections/default/map").json()
    index = found["ids"].index(item_id)
    box = page.locator("#map").bounding_box()
    assert box is not None
    # Within its border of a pixel.
    scale = (min(box["width"], box["height"]) - 2) / 2 - 18
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    return middle[0] + found["x"][index] * scale, middle[1] - found["y"][index] * scale


def drawn(page: Page) -> list[int]:
    """The colours on the canvas, of which the first is none at all."""
    pixels = """canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [...new Set(new Uint32Array(data.buffer))];
    }"""
    colours: list[int] = page.locator("#map").evaluate(pixels)
    return colours


@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_a_collection_is_seen_as_a_map_in_parts_and_by_its_duplicates(
    page: Page, read: Api, width_px: int
) -> None:
    page.set_viewport_size({"width": width_px, "height": 844})
    open_map(page, read)
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    expect(page.locator("#main")).to_be_hidden()
    expect(page.locator("#clusters > li")).to_have_count(4)  # the root of half of 32
    expect(page.locator("#clusters .card img").first).not_to_have_js_property("naturalWidth", 0)
    page.locator("#threshold").fill("1")  # below, much looks alike to random weights
    expect(page.locator("#groups-say")).to_have_text("1 group of 3 pictures in all, the surest first")
    group = page.locator("#groups > li")
    expect(group).to_contain_text("the same file")
    assert {card.get_attribute("title") for card in group.locator(".card").all()} == {
        "photos/04.jpg",
        "photos/30.jpg",
        "photos/31.jpg",
    }
    expect(group.locator(".badge")).to_have_text(["keep"])
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile("A map of 32 pictures"))
    # Dots in the clusters' colours, and thumbnails.
    page.wait_for_timeout(300)
    assert len(drawn(page)) > 1_000


def test_a_picture_on_the_map_is_seen_and_leads_to_its_neighbours(page: Page, read: Api) -> None:
    open_map(page, read)
    page.mouse.move(*place_of(page, read, "photos/11.jpg"))
    card = page.locator("#map-card .card")
    expect(card).to_have_attribute("title", "photos/11.jpg")
    expect(card.locator("img")).not_to_have_js_property("naturalWidth", 0)
    page.mouse.move(3, 3)
    expect(card).to_be_hidden()
    page.mouse.click(*place_of(page, read, "photos/11.jpg"))
    expect(page.locator("#query-name")).to_have_text("photos/11.jpg")
    expect(page.locator("#whole")).to_be_hidden()
    page.go_back()
    expect(page.locator("#whole")).to_be_visible()
    expect(page.locator("#map-say")).to_have_text("32 pictures")
    page.reload()  # the address holds the view
    expect(page.locator("#map-say")).to_have_text("32 pictures")
    page.keyboard.press("Escape")
    expect(page.locator("#results-title")).to_have_text("In the collection")


def test_a_finger_sees_a_picture_before_it_opens_it(browser: Browser, read: Api) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    open_map(page, read)
    page.touchscreen.tap(*place_of(page, read, "photos/11.jpg"))
    card = page.locator("#map-card .card")
    expect(card).to_have_attribute("title", "photos/11.jpg")
    card.tap()
    expect(page.locator("#query-name")).to_have_text("photos/11.jpg")
    context.close()


def test_the_map_is_gone_nearer_to_by_button_key_and_drag(page: Page, read: Api) -> None:
    open_map(page, read)
    x, y = place_of(page, read, "photos/11.jpg")
    card = page.locator("#map-card .card")
    box = page.locator("#map").bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.locator("#map-nearer").click()
    page.locator("#map").focus()
    page.keyboard.press("+")
    for factor in (1.6**2, 1.6, 1.0):
        # What lay to the right of the middle lies farther to the right, and comes back.
        at = middle[0] + (x - middle[0]) * factor, middle[1] + (y - middle[1]) * factor
        if box["x"] < at[0] < box["x"] + box["width"] and box["y"] < at[1] < box["y"] + box["height"]:
            page.mouse.move(*at)
            expect(card).to_have_attribute("title", "photos/11.jpg")
        page.keyboard.press("-")
    page.locator("#map-nearer").click()
    at = middle[0] + (x - middle[0]) * 1.6, middle[1] + (y - middle[1]) * 1.6
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 30, middle[1] + 20, steps=4)
    page.mouse.up()
    page.mouse.move(at[0] - 30, at[1] + 20)
    expect(card).to_have_attribute("title", "photos/11.jpg")


def test_the_slider_says_how_alike_duplicates_are(page: Page, read: Api) -> None:
    open_map(page, read)
    slider = page.locator("#threshold")
    slider.fill("0.9")
    expect(page.locator("#threshold-value")).to_have_text("0.900")
    loose = read.http.get("/collections/default/duplicates", params={"threshold": 0.9}).json()
    expect(page.locator("#groups-say")).to_contain_text(f"of {loose['total_items']} pictures")
    slider.fill("1")
    expect(page.locator("#groups-say")).to_have_text("1 group of 3 pictures in all, the surest first")


def test_a_part_of_the_collection_leads_to_its_pictures(page: Page, read: Api) -> None:
    open_map(page, read)
    first = page.locator("#clusters .card").first
    name = first.get_attribute("title")
    first.click()
    expect(page.locator("#query-name")).to_have_text(name or "")
    assert "photos/" in (name or "")


def test_with_keys_the_map_is_drawn_with_them(page: Page, start: StartApi, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("correct-horse-battery\n")
    api = start(api_key_file=keys)
    api.http.headers["Authorization"] = "Bearer correct-horse-battery"
    api.http.post("/collections/default/items", files=multipart([photo(seed) for seed in range(5)]))
    page.goto(f"{api.url}/?view=map")
    page.locator("#key").fill("correct-horse-battery")
    page.locator("#key-use").click()
    expect(page.locator("#map-say")).to_have_text("5 pictures", timeout=READING_MS)
    page.wait_for_timeout(300)
    assert len(drawn(page)) > 1_000


def test_a_collection_without_pictures_has_an_empty_map(page: Page, start: StartApi) -> None:
    page.goto(f"{start().url}/?view=map")
    expect(page.locator("#map-say")).to_have_text("0 pictures", timeout=READING_MS)
    expect(page.locator("#groups-say")).to_have_text(
        "No two pictures are that much alike.", timeout=READING_MS
    )
    assert len(drawn(page)) == 1
