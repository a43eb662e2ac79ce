"""The page in a real Chromium, over the real app with the nano model."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Request, Route, expect, sync_playwright
from pycocotools import mask as coco_mask

from jobs import embed
from tests.conftest import CELLS, App

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")

COINS = 384, 303  # width, height of coins_grey8.png
COIN, OTHER, GROUND = (155, 52), (335, 50), (200, 5)  # on a coin, on another one, on none
BESIDE = 178, 80  # outside COIN's coin
WAIT_MS = 30_000  # at most
MARGIN = 16  # CSS pixels that the page leaves around an image


@dataclass
class Screen:
    """The page with an image of `size` (width, height), fitted. Points are image pixels."""

    page: Page
    url: str
    size: tuple[int, int] = COINS
    asked: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    expected: str = "$^"  # complaints that a test causes

    def open(self, path: Path, size: tuple[int, int] = COINS) -> None:
        self.size = size
        self.page.locator("#file").set_input_files(path)
        self.is_open(path.name)

    def is_open(self, name: str) -> None:
        expect(self.page).to_have_title(f"{name} – Cellray")
        expect(self.page.locator("#busy")).to_be_hidden()

    def at(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where an image point is in the window, CSS pixels."""
        box = self.page.locator("#canvas").bounding_box()
        assert box
        width, height = self.size
        scale = min((box["width"] - 2 * MARGIN) / width, (box["height"] - 2 * MARGIN) / height)
        return (
            box["x"] + box["width"] / 2 + (point[0] - width / 2) * scale,
            box["y"] + box["height"] / 2 + (point[1] - height / 2) * scale,
        )

    def click(self, point: tuple[float, float], **options: Any) -> None:
        modifier = options.get("holding")
        if modifier:
            self.page.keyboard.down(modifier)
        self.page.mouse.click(*self.at(point))
        if modifier:
            self.page.keyboard.up(modifier)

    def drag(self, start: tuple[float, float], end: tuple[float, float], button: Any = "left") -> None:
        self.page.mouse.move(*self.at(start))
        self.page.mouse.down(button=button)
        self.page.mouse.move(*self.at(end), steps=4)
        self.page.mouse.up(button=button)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def pixel(self, point: tuple[float, float]) -> np.ndarray:
        """[3] int, as the screen shows it."""
        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        x, y = self.at(point)
        return np.array(shot.getpixel((round(x), round(y))), int)

    @property
    def rows(self) -> Locator:
        return self.page.locator("#list li")

    def has(self, objects: int) -> None:
        """That many objects, each with its mask."""
        expect(self.rows).to_have_count(objects, timeout=2 * WAIT_MS)
        expect(self.page.locator("#list .asking")).to_have_count(0)

    def area(self, row: int = 0) -> int:
        return int(re.sub(r"\D", "", self.rows.nth(row).locator(".area").inner_text()))

    def sent(self, path: str = "segment") -> list[dict[str, Any]]:
        """The JSON bodies of the requests so far."""
        return [one.post_data_json for one in self.asked if one.url.endswith(f"/v1/{path}")]

    def download(self, name: str) -> tuple[str, bytes]:
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=name).click()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()

    def once(self, path: str, answer: Callable[[Route], None]) -> None:
        """The next request to a path of the service gets this answer; the later ones the real one's."""
        self.page.route(re.compile(f"/v1/{path}"), answer, times=1)


@pytest.fixture(scope="module")
def embedded(app: App, sample_images: Path) -> str:
    """The data set `app.dataset`, with embeddings of all sample images."""
    arguments = [str(sample_images), app.dataset, "--max-error-rate", "0.5", "--shard-images", "12"]
    assert embed.main([*arguments, "--model", "nano", "--config", app.config]) == 0
    return app.dataset


@pytest.fixture(scope="module")
def browser(shown: str, embedded: str) -> Iterator[Browser]:
    """After the data sets: Playwright keeps an event loop running, in which Ray would not wait."""
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else []
        )
        yield browser
        browser.close()


@pytest.fixture
def screen(browser: Browser, app: App, request: pytest.FixtureRequest) -> Iterator[Screen]:
    """A fresh page. At the end: it made no complaint in its console, and asked no other host."""
    width, height = getattr(request, "param", (1280, 800))
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
    page = context.new_page()
    screen = Screen(page, app.http)
    page.on("request", lambda one: screen.asked.append(one))
    page.on("console", lambda said: said.type in ("error", "warning") and screen.complaints.append(said.text))
    page.on("pageerror", lambda error: screen.complaints.append(str(error)))
    page.goto(app.http)
    expect(page.locator("#model")).to_have_value("nano")
    yield screen
    page.unroute_all(behavior="ignoreErrors")
    context.close()
    assert [text for text in screen.complaints if not re.search(screen.expected, text)] == []
    hosts = [one.url for one in screen.asked if not one.url.startswith((app.http, "blob:", "data:"))]
    assert hosts == []


@pytest.fixture(scope="module")
def coins(sample_images: Path) -> Path:
    return sample_images / "coins_grey8.png"


def planes(masks: list[dict[str, Any]]) -> list[np.ndarray]:
    return [coco_mask.decode(one["segmentation"]).astype(bool) for one in masks]


def test_its_files_are_served_under_strict_headers(app: App) -> None:
    with httpx.Client(base_url=app.http) as http:
        page = http.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        names = re.findall(r'(?:href|src)="(web/[\w.]+)"', page.text)
        assert {"web/page.js", "web/page.css"} <= set(names)
        for path in ("/", *(f"/{name}" for name in names)):
            answer = http.get(path)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            again = http.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        for path in ("/web/pages.py", "/web/..%2fpages.py", "/web/nothing.js"):
            assert http.get(path).status_code == 404


def test_masks_are_decoded_as_pycocotools_does(screen: Screen) -> None:
    rng = np.random.default_rng(5)
    shapes = [(1, 1), (1, 9), (9, 1), (40, 33), (700, 900)]
    drawn = [rng.random(shape) < share for shape in shapes for share in (0.0, 0.02, 0.5, 1.0)]
    blob = np.hypot(*np.indices((500, 640)) - np.array([[[230]], [[300]]])) < 180
    for plane in [*drawn, blob, ~blob]:
        rle = coco_mask.encode(np.asfortranarray(plane, np.uint8))
        mask = {
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            "bbox": coco_mask.toBbox(rle).tolist(),
        }
        found = screen.page.evaluate(
            """async (mask) => {
                const {x, y, width, height, plane} = (await import("/web/rle.js")).decode(mask);
                return [x, y, width, height, plane.join("")];
            }""",
            mask,
        )
        x, y, width, height = map(int, found[:4])
        whole = np.zeros_like(plane)
        whole[y : y + height, x : x + width] = np.array([*found[4]], "U1").reshape(height, width) == "1"
        np.testing.assert_array_equal(whole, plane)


def test_a_click_shows_a_mask_and_its_download_is_the_services_answer(screen: Screen, coins: Path, app: App) -> None:
    screen.open(coins)
    before = {point: screen.pixel(point) for point in (OTHER, (140, 45))}
    screen.click(COIN)
    screen.has(1)
    assert np.abs(screen.pixel((140, 45)) - before[(140, 45)]).max() > 30
    np.testing.assert_array_equal(screen.pixel(OTHER), before[OTHER])
    expect(screen.rows.locator(".score")).to_have_text(re.compile(r"0\.\d\d"))
    screen.press("Enter")
    screen.click(OTHER)
    screen.has(2)

    name, content = screen.download("COCO JSON")
    assert name == "coins_grey8.json"
    made = json.loads(content)
    assert (made["images"][0]["width"], made["images"][0]["height"]) == COINS
    assert [one["category_id"] for one in made["annotations"]] == [1, 1]
    with httpx.Client(base_url=app.http, timeout=60) as http:
        for sent, annotation in zip(screen.sent(), made["annotations"], strict=True):
            response = http.post("/v1/segment", json=sent)
            (answer,) = response.json()["masks"]
            mine, theirs = planes([annotation, answer])
            np.testing.assert_array_equal(mine, theirs)
            assert mine.sum() == annotation["area"] == answer["area"]
            assert annotation["bbox"] == answer["bbox"]
    for point, annotation in zip((COIN, OTHER), made["annotations"], strict=True):
        assert planes([annotation])[0][point[1], point[0]]
    for place, header in (("encoder", "inference"), ("decoder", "inference"), ("queue", "queue"), ("network", "total")):
        there = f"x-{header}-time" in response.headers
        expect(screen.page.locator(f"#{place}")).to_have_text(re.compile(r"\d ms" if there else "–"))


def test_an_image_can_be_dropped(screen: Screen, coins: Path) -> None:
    data = screen.page.evaluate_handle(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "coins.png", {type: "image/png"}));
            return data;
        }""",
        list(coins.read_bytes()),
    )
    screen.page.dispatch_event("#start", "dragover", {"dataTransfer": data})
    expect(screen.page.locator("body")).to_have_class("over")
    screen.page.dispatch_event("#start", "drop", {"dataTransfer": data})
    screen.is_open("coins.png")
    screen.click(COIN)
    screen.has(1)


def test_clicks_refine_one_object_and_undo_takes_each_back(screen: Screen, coins: Path) -> None:
    screen.open(coins)
    screen.click(COIN)
    screen.has(1)
    first = screen.area()
    screen.click(BESIDE, holding="Shift")
    screen.has(1)
    (points,), (labels,) = screen.sent()[-1]["points"], screen.sent()[-1]["labels"]
    assert labels == [1, 0]
    np.testing.assert_allclose(points, [COIN, BESIDE], atol=0.6)
    expect(screen.rows.locator(".area")).not_to_have_text(f"{first:,} px")
    second, asked = screen.area(), len(screen.sent())

    screen.press("Control+z")
    assert screen.area() == first
    screen.press("Control+y")
    assert screen.area() == second
    screen.press("Delete")
    screen.has(0)
    screen.page.get_by_role("button", name="Undo").click()
    assert screen.area() == second
    screen.press("Control+z", "Control+z")
    screen.has(0)
    screen.press("Control+Shift+z", "Control+Shift+z")
    assert screen.area() == second
    assert len(screen.sent()) == asked, "what was answered is not asked again"


def test_a_drag_is_a_box_and_a_second_one_the_next_object(screen: Screen, coins: Path) -> None:
    screen.open(coins)
    screen.drag((130, 25), (182, 80))
    screen.has(1)
    np.testing.assert_allclose(screen.sent()[0]["boxes"], [[130, 25, 182, 80]], atol=0.6)
    screen.click(COIN)
    screen.has(1)
    assert len(screen.sent()[1]["boxes"]) == len(screen.sent()[1]["points"]) == 1
    screen.drag((350, 90), (290, 10))
    screen.has(2)
    np.testing.assert_allclose(screen.sent()[2]["boxes"], [[290, 10, 350, 90]], atol=0.6)
    screen.drag((380, 200), (500, 290))
    screen.has(3)
    assert screen.sent()[3]["boxes"][0][2] == COINS[0], "a box ends with the image"


def test_everything_is_found_and_taken_home(screen: Screen, coins: Path) -> None:
    screen.open(coins)
    screen.page.locator(".grid summary").click()
    screen.page.get_by_label("Points a side").fill("12")
    screen.page.get_by_role("button", name="Segment everything").click()
    expect(screen.page.locator("#status")).to_have_text(re.compile(r"\d+ objects found"), timeout=2 * WAIT_MS)
    count = screen.rows.count()
    assert count > 5
    assert screen.sent("automask")[0]["points_per_side"] == 12

    made = json.loads(screen.download("COCO JSON")[1])["annotations"]
    assert len(made) == count
    name, content = screen.download("Label map")
    assert name == "coins_grey8-labels.png"
    labels = np.asarray(Image.open(io.BytesIO(content)))
    assert labels.dtype == np.uint16
    expected = np.zeros(COINS[::-1], np.uint16)
    for one, plane in sorted(zip(made, planes(made), strict=True), key=lambda pair: -pair[0]["area"]):
        expected[plane] = one["id"]
    np.testing.assert_array_equal(labels, expected)

    overlay = np.asarray(Image.open(io.BytesIO(screen.download("Overlay")[1])).convert("RGB"), int)
    picture = np.asarray(Image.open(coins).convert("RGB"), int)
    assert overlay.shape == picture.shape
    far = np.abs(overlay - picture).max(axis=2) > 20
    inside = labels > 0
    assert far[inside].mean() > 0.9
    assert far[~inside].mean() < 0.1

    screen.press("a")
    expect(screen.page.get_by_role("button", name="Segment everything")).to_be_visible(timeout=2 * WAIT_MS)
    assert screen.rows.count() == count, "a second time they are the same ones"
    screen.press("Control+z", "Control+z")
    screen.has(0)


def test_every_cell_is_found_by_a_model_for_that(screen: Screen, coins: Path, app: App) -> None:
    screen.open(coins)
    screen.page.locator("#model").select_option(CELLS)
    screen.page.locator(".cells summary").click()
    options = {"bbox_threshold": 0.82, "block_size": 256, "overlap": 32}
    for label, value in zip(
        ("Least score of boxes", "Tile, pixels", "Overlap of tiles"), options.values(), strict=True
    ):
        screen.page.get_by_label(label).fill(str(value))
    screen.page.get_by_role("button", name="Segment every cell").click()
    expect(screen.page.locator("#status")).to_have_text(re.compile(r"\d+ cells found"), timeout=2 * WAIT_MS)

    request = json.dumps({"model": CELLS, "prompts": "cells", **options})
    answer = httpx.post(
        f"{app.http}/v1/segment", files={"image": coins.read_bytes()}, data={"request": request}, timeout=60
    )
    wanted = planes(answer.json()["masks"])
    found = planes(json.loads(screen.download("COCO JSON")[1])["annotations"])
    assert len(found) == len(wanted) == screen.rows.count() > 1
    np.testing.assert_array_equal(found, wanted)
    screen.page.locator("#model").select_option("nano")
    expect(screen.page.get_by_role("button", name="Segment everything")).to_be_visible()


def test_an_image_of_a_data_set_is_picked(screen: Screen) -> None:
    tile = screen.page.get_by_role("button", name="coins_grey8.png").first
    more = screen.page.get_by_role("button", name="More")
    expect(screen.page.locator("#gallery li").first).to_be_visible()
    while not tile.count() and more.is_visible():
        shown = screen.page.locator("#gallery li").count()
        more.click()
        expect(screen.page.locator("#gallery li").nth(shown)).to_be_attached()
    tile.click()
    screen.is_open("coins_grey8.png")
    screen.click(COIN)
    screen.has(1)
    assert np.ptp(screen.pixel((140, 45))) > 15, "coloured"
    assert not [one for one in screen.asked if "/v1/embed?" in one.url], "its embedding is there already"
    made = json.loads(screen.download("COCO JSON")[1])
    assert made["images"][0]["file_name"] == "coins_grey8.png"
    assert planes(made["annotations"])[0][COIN[1], COIN[0]]


def test_the_keyboard_is_enough(screen: Screen, coins: Path) -> None:
    with screen.page.expect_file_chooser() as chooser:
        screen.press("o")
        screen.page.get_by_role("button", name="choose a file").focus()
        screen.press("Enter")
    chooser.value.set_files(coins)
    screen.is_open(coins.name)
    place = screen.page.locator("#place")

    def move(target: tuple[int, int]) -> None:
        for axis, (less, more) in enumerate((("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))):
            for step, keys in ((19, ("", "")), (2, ("Shift+", "Shift+"))):
                for _ in range(60):
                    screen.press("Shift+ArrowLeft", "Shift+ArrowRight")
                    here = [int(value) for value in place.inner_text().split(",")][axis]
                    if abs(here - target[axis]) <= step:
                        break
                    screen.press(keys[0] + (less if here > target[axis] else more))

    move(COIN)
    screen.press("p")
    screen.has(1)
    move(BESIDE)
    screen.press("Shift+p")
    screen.has(1)
    np.testing.assert_allclose(screen.sent()[-1]["points"], [[COIN, BESIDE]], atol=4)
    assert screen.sent()[-1]["labels"] == [[1, 0]]
    screen.press("n")
    move((295, 12))
    screen.press("b")
    move((355, 90))
    screen.press("b")
    screen.has(2)
    np.testing.assert_allclose(screen.sent()[-1]["boxes"], [[295, 12, 355, 90]], atol=4)

    screen.press("[", "r")
    screen.page.keyboard.type("coin")
    screen.press("Enter")
    expect(screen.page.get_by_label("Label of object 1")).to_have_value("coin")
    screen.press("h")
    expect(screen.rows.first).to_have_class("hidden")
    screen.press("h", "]", "Delete")
    screen.has(1)
    screen.press("Control+z")
    screen.has(2)
    screen.press("?")
    expect(screen.page.get_by_role("dialog", name="Help")).to_be_visible()
    expect(screen.page.get_by_text("segment everything", exact=True)).to_be_visible()
    screen.press("Escape")
    expect(screen.page.get_by_role("dialog", name="Help")).to_be_hidden()
    button = screen.page.get_by_role("button", name="COCO JSON")
    button.focus()
    assert button.evaluate("one => getComputedStyle(one).outlineStyle") == "solid", "focus is seen"
    with screen.page.expect_download() as download:
        screen.press("Enter")
    made = json.loads(Path(download.value.path()).read_text())
    assert [one["name"] for one in made["categories"]] == ["coin", "object"]


def test_zoom_and_pan_keep_points_where_they_are(screen: Screen, coins: Path) -> None:
    screen.open(coins)
    x, y = screen.at((155.5, 52.5))
    place = screen.page.locator("#place")
    screen.page.mouse.move(x, y)
    expect(place).to_have_text("155, 52")
    screen.page.mouse.wheel(0, -400)
    screen.page.mouse.move(x + 0.4, y)
    expect(place).to_have_text(re.compile("15[45], 5[12]"))
    before = screen.page.locator("#zoom").inner_text()
    screen.page.keyboard.down("Space")
    screen.drag((200, 150), (150, 100))
    screen.page.keyboard.up("Space")
    screen.drag((200, 150), (150, 100), button="middle")
    screen.has(0)
    assert screen.page.locator("#zoom").inner_text() == before
    screen.page.mouse.move(x, y)
    expect(place).not_to_have_text(re.compile("15[45], 5[12]"))
    screen.press("0")
    screen.page.mouse.move(x, y + 0.4)
    expect(place).to_have_text("155, 52")


def test_another_model_is_chosen(screen: Screen, coins: Path) -> None:
    def two(route: Route) -> None:
        nano, *_ = route.fetch().json()
        other = {"name": "other", "trained": False, "note": "untrained: random", "licence": "MIT", "image_size": 1024}
        route.fulfill(json=[nano, {**nano, **other}])

    screen.expected = "404"  # this model is not really there
    screen.once("models", two)
    screen.page.reload()
    facts, side = screen.page.locator("#facts"), screen.page.locator("[name=points_per_side]")
    expect(facts).to_contain_text("trainedApache-2.0256 px")
    expect(side).to_have_value("16")
    screen.page.get_by_label("Model").select_option("other")
    expect(facts).to_contain_text("untrained: randomMIT1024 px")
    expect(side).to_have_value("32")
    screen.page.locator("#file").set_input_files(coins)
    expect(screen.page.get_by_role("alert")).to_contain_text("model 'other' is not served here")
    screen.page.get_by_label("Model").select_option("nano")
    screen.click(COIN)
    screen.has(1)
    assert screen.sent()[-1]["model"] == "nano"


@pytest.mark.parametrize("screen", [(360, 740)], indirect=True)
def test_a_narrow_window_under_fingers(screen: Screen, coins: Path) -> None:
    screen.open(coins)
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= 360
    tap = screen.page.touchscreen.tap
    tap(*screen.at(COIN))
    screen.has(1)
    for height in (40, 740):  # no room for the image, and room again
        screen.page.set_viewport_size({"width": 360, "height": height})
    screen.page.get_by_text("Background", exact=True).tap()
    tap(*screen.at(BESIDE))
    screen.has(1)
    assert screen.sent()[-1]["labels"] == [[1, 0]]
    screen.page.get_by_role("button", name="Delete object 1").tap()
    screen.has(0)
    for name in ("Undo", "Next object", "Help and keys", "Segment everything", "Label map"):
        expect(screen.page.get_by_role("button", name=name)).to_be_visible()


def test_a_file_that_is_no_image(screen: Screen, sample_images: Path, coins: Path) -> None:
    screen.expected = "415"
    screen.page.locator("#file").set_input_files(sample_images / "broken" / "not_an_image.png")
    error = screen.page.get_by_role("alert")
    expect(error).to_contain_text("cannot read this file: choose an image")
    expect(screen.page.get_by_role("button", name="Try again")).to_be_hidden()
    screen.page.get_by_role("button", name="Close").click()
    expect(error).to_be_hidden()
    screen.open(coins)
    screen.click(COIN)
    screen.has(1)


def test_a_format_that_the_browser_cannot_draw(screen: Screen, sample_images: Path, tmp_path: Path) -> None:
    image = tmp_path / "mine.tif"
    Image.open(sample_images / "coins_grey8.png").crop((0, 0, 200, 150)).save(image)
    screen.expected = "404"  # of a preview
    screen.open(image, (200, 150))
    expect(screen.page.locator("#status")).to_contain_text("cannot draw this format")
    screen.click((155, 52))
    screen.has(1)
    assert np.ptp(screen.pixel((140, 45))) > 15


def test_a_tiff_of_a_data_set_is_shown_by_its_preview(screen: Screen, sample_images: Path) -> None:
    screen.open(sample_images / "coins_grey8.tif")
    expect(screen.page.locator("#status")).to_have_text("coins_grey8.tif · 384 × 303")
    expected = np.array(Image.open(sample_images / "coins_grey8.tif").convert("RGB"), int)
    assert np.abs(screen.pixel((155, 52)) - expected[52, 155]).max() < 40


def test_a_newer_click_takes_back_the_older_question(screen: Screen, coins: Path) -> None:
    screen.open(coins)
    gone: list[Request] = []
    screen.page.on("requestfailed", lambda one: gone.append(one))
    screen.once("segment", lambda route: None)  # never answered
    screen.click(COIN)
    expect(screen.page.locator("#list .asking")).to_have_count(1)
    screen.click((150, 45))
    screen.has(1)
    assert [one.post_data_json["labels"] for one in gone] == [[[1]]]
    assert screen.sent()[-1]["labels"] == [[1, 1]]


def refusal(status: int, **headers: str) -> Callable[[Route], None]:
    body = json.dumps({"error": "no", "error_type": "Refused"})
    return lambda route: route.fulfill(status=status, body=body, content_type="application/json", headers=headers)


def test_an_embedding_that_is_gone_is_made_again(screen: Screen, coins: Path) -> None:
    screen.expected = "404"
    screen.open(coins)
    screen.once("segment", refusal(404))
    before = len(screen.asked)
    screen.click(COIN)
    screen.has(1)
    posted = [one.url.split("/v1/")[1] for one in screen.asked[before:] if one.method == "POST"]
    assert [path.split("?")[0] for path in posted] == ["segment", "embed", "segment"]
    expect(screen.page.get_by_role("alert")).to_be_hidden()


def test_a_busy_service_is_waited_for(screen: Screen, coins: Path) -> None:
    screen.expected = "429"
    screen.open(coins)
    screen.once("segment", refusal(429, **{"retry-after": "1"}))
    screen.click(COIN)
    expect(screen.page.locator("#status")).to_contain_text("trying again in 1 s")
    screen.has(1)
    assert len(screen.sent()) == 2


def test_a_key_is_asked_for_and_kept_for_the_tab(screen: Screen, coins: Path) -> None:
    screen.expected = "401"
    screen.open(coins)
    screen.once("segment", refusal(401))
    screen.click(COIN)
    dialog = screen.page.get_by_role("dialog", name="Key")
    dialog.get_by_role("textbox").fill("secret")
    screen.press("Enter")
    screen.has(1)
    segments = [one for one in screen.asked if one.url.endswith("/v1/segment")]
    assert [one.headers.get("authorization") for one in segments] == [None, "Bearer secret"]
    assert screen.page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]


def test_a_service_that_is_down_is_tried_again(screen: Screen, coins: Path) -> None:
    screen.expected = "ERR_CONNECTION_REFUSED|413"
    screen.open(coins)
    screen.once("segment", lambda route: route.abort("connectionrefused"))
    screen.click(COIN)
    error = screen.page.get_by_role("alert")
    expect(error).to_contain_text("does not answer")
    screen.page.get_by_role("button", name="Try again").click()
    screen.has(1)
    expect(error).to_be_hidden()
    screen.once("segment", refusal(413))
    screen.click(BESIDE)
    expect(error).to_contain_text("too large")


def test_the_docs_show_every_route_and_load_nothing_from_elsewhere(screen: Screen) -> None:
    screen.page.goto(f"{screen.url}/docs")
    expect(screen.page.get_by_text("/v1/segment", exact=True)).to_be_visible()
    screen.page.get_by_text("Masks from boxes, points and earlier masks").click()
    expect(screen.page.get_by_role("button", name="Try it out")).to_be_visible()


def test_objects_are_not_lost_unasked(screen: Screen, coins: Path) -> None:
    screen.open(coins)
    screen.click(COIN)
    screen.has(1)
    screen.page.locator("#file").set_input_files(coins)
    dialog = screen.page.get_by_role("dialog", name="Open another image?")
    dialog.get_by_role("button", name="Cancel").click()
    screen.has(1)
    asked: list[str] = []

    def leave(accept: bool) -> None:
        screen.page.once("dialog", lambda one: (asked.append(one.type), one.accept() if accept else one.dismiss()))

    leave(False)
    with pytest.raises(Exception, match="ERR_ABORTED"):
        screen.page.goto(f"{screen.url}/docs")
    assert asked == ["beforeunload"]
    screen.has(1)
    screen.download("COCO JSON")
    screen.page.goto(f"{screen.url}/healthz")
    assert asked == ["beforeunload"], "what is downloaded is not asked about"
