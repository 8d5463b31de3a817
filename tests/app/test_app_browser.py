"""The page in a headless Chromium: what a person does, and what they get. Screenshots go to $ITA_ARTEFACTS."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.app_server import ROOT, shared_page

pytest.importorskip("gradio", reason="the page needs gradio")
pytest.importorskip("pycocotools", reason="the page needs pycocotools")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need Chromium"),
]

NAMES = ("water", "teddy bear|teddy", "concrete", "french fries")
RESULT = '.ita-viewer[data-state="result"]'
PATIENCE = 45_000  # milliseconds


@pytest.fixture(scope="module")
def address() -> str:
    return shared_page().address


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> Path:
    named = os.environ.get("ITA_ARTEFACTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def visit(address, chromium):
    """Opens the page as somebody new: a page of their own, with what it asked for and what went wrong."""
    contexts = []

    def new_visitor(options_of_address="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.asked, page.broken = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.broken.append(str(error)))
        page.goto(address + options_of_address)
        page.wait_for_selector(".ita-help:not(:empty)")
        return page

    yield new_visitor
    for context in contexts:
        context.close()


def upload(page, path: Path) -> None:
    page.set_input_files("#ita-upload input[type=file]", str(path))
    page.wait_for_selector("#ita-upload img")


def take_example(page, place: int) -> None:
    page.click(f"#ita-examples button >> nth={place}")
    page.wait_for_selector("#ita-upload img")


def type_names(page, names) -> None:
    for name in names:
        page.fill(".ita-input", name)
        page.press(".ita-input", "Enter")


def segment(page) -> None:
    """Presses the button and waits for an answer that was not there before."""
    before = page.get_attribute(".ita-viewer", "data-run")
    page.click("#ita-run")
    page.wait_for_function(
        "before => document.querySelector('.ita-viewer').dataset.run !== (before || undefined)"
        " && document.querySelector('.ita-viewer').dataset.run",
        arg=before,
    )


def classes_of(page) -> list[str]:
    return page.locator(".ita-legend .ita-name").all_text_contents()


def download(page, what: str) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.click(f'[data-what="{what}"]')
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def place_of(page, labels: np.ndarray, index: int) -> tuple[float, float]:
    """Where on the screen is a pixel of that id, in the middle of the others of its row."""
    rows, columns = np.nonzero(labels == index)
    row = int(np.bincount(rows).argmax())
    column = int(np.median(columns[rows == row]))
    assert labels[row, column] == index
    page.locator(".ita-marks").scroll_into_view_if_needed()
    box = page.locator(".ita-marks").bounding_box()
    scale = box["width"] / labels.shape[1]
    return box["x"] + (column + 0.5) * scale, box["y"] + (row + 0.5) * scale


def alpha_at(page, layer: str, row: int, column: int) -> int:
    return page.evaluate(
        "([layer, x, y]) => document.querySelector(layer).getContext('2d').getImageData(x, y, 1, 1).data[3]",
        [layer, column, row],
    )


def test_a_person_uploads_types_segments_looks_and_downloads(visit, artefacts, address, tmp_path):
    page = visit(accept_downloads=True)
    page.screenshot(path=artefacts / "app_start.png", full_page=True)
    upload(page, ROOT / "examples" / "scene_1.png")
    type_names(page, NAMES)
    segment(page)
    assert set(classes_of(page)) <= {"water", "teddy bear", "concrete", "french fries"}
    assert len(classes_of(page)) >= 3

    name, content = download(page, "labels")
    labels = np.array(Image.open(io.BytesIO(content)))
    assert name == "scene_1_labels.png" and labels.shape == (192, 192)
    name, content = download(page, "coco")
    (tmp_path / name).write_bytes(content)
    from pycocotools.coco import COCO

    coco = COCO(str(tmp_path / name))
    masks = {one["category_id"] - 1: coco.annToMask(one) for one in coco.loadAnns(coco.getAnnIds())}
    assert all(np.array_equal(mask, labels == index) for index, mask in masks.items())
    name, content = download(page, "python")
    assert name == "scene_1_segment.py" and b"teddy bear" in content
    compile(content, name, "exec")

    first = next(index for index in np.unique(labels) if (labels == index).sum() > 2000)
    label = NAMES[first].split("|")[0]
    page.mouse.move(*place_of(page, labels, first))
    page.wait_for_selector(".ita-tip:not([hidden])")
    assert page.text_content(".ita-tip strong") == label
    assert "score " in page.text_content(".ita-tip span")
    page.screenshot(path=artefacts / "app_result.png", full_page=True)

    other = next(index for index in np.unique(labels) if index != first)
    row, column = (int(place[0]) for place in np.nonzero(labels == other))
    assert alpha_at(page, ".ita-colors", row, column) == 255
    page.mouse.click(*place_of(page, labels, first))
    assert page.get_attribute(".ita-viewer", "data-isolated") == label
    assert alpha_at(page, ".ita-colors", row, column) == 0, "other classes lose their color"
    page.screenshot(path=artefacts / "app_isolated.png", full_page=True)
    page.mouse.click(*place_of(page, labels, first))
    assert page.get_attribute(".ita-viewer", "data-isolated") == ""
    assert alpha_at(page, ".ita-colors", row, column) == 255, "a second click shows them again"

    assert page.broken == []
    outside = [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]
    assert outside == [], "nothing is fetched from elsewhere"


def test_opacity_is_instant_and_goes_into_the_overlay(visit):
    page = visit(accept_downloads=True)
    upload(page, ROOT / "examples" / "scene_1.png")
    type_names(page, ["water"])
    segment(page)
    asked = len(page.asked)
    page.evaluate("() => { const one = document.querySelector('#ita-opacity'); one.value = 25;"
                  " one.dispatchEvent(new Event('input', { bubbles: true })); }")  # fmt: skip
    assert page.evaluate("() => getComputedStyle(document.querySelector('.ita-colors')).opacity") == "0.25"
    assert len(page.asked) == asked, "no request was needed"
    overlay = np.array(Image.open(io.BytesIO(download(page, "overlay")[1])).convert("RGB")).astype(float)
    before = np.array(Image.open(ROOT / "examples" / "scene_1.png").convert("RGB")).astype(float)
    from ita_segmentation.visualization import color_of

    expected = 0.75 * before + 0.25 * np.array(color_of(0))
    assert overlay.shape[0] > 192, "a legend stands beneath"
    assert np.abs(overlay[:60, :60] - expected[:60, :60]).max() <= 2, "there is water there"


def test_tags_come_by_enter_comma_and_paste_and_go_by_their_button(visit):
    page = visit()
    page.locator(".ita-input").press_sequentially("cat,sofa|couch,")
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.setData('text', 'wall, 猫\\n🐧, , CAT');
        document.querySelector('.ita-input').dispatchEvent(new ClipboardEvent('paste', { clipboardData: data }));
    }""")
    tags = page.locator(".ita-tag")
    assert [" ".join(one.locator("span").all_text_contents()) for one in tags.all()] == [
        *("cat", "sofa couch", "wall", "猫", "🐧")
    ]
    assert "already" in page.text_content(".ita-remark"), "a repeated class is not added"
    page.get_by_label("Remove sofa or couch").click()
    assert tags.count() == 4
    page.press(".ita-input", "Backspace")
    assert tags.count() == 3
    page.fill(".ita-input", ";".join(f"name {number}" for number in range(1000)))
    page.press(".ita-input", "Enter")
    assert tags.count() == 1000 and "3 left out" in page.text_content(".ita-remark")
    page.click(".ita-clear")
    assert tags.count() == 0


def test_hostile_names_and_file_names_are_text(visit, tmp_path):
    page = visit()
    evil = "<img src=x onerror=document.title='broken'>"
    shutil.copy(ROOT / "examples" / "scene_1.png", tmp_path / f"{evil}.png")
    upload(page, tmp_path / f"{evil}.png")
    type_names(page, [evil, "`${document.title='broken'}` {{value}}", "</script><script>alert(1)</script>"])
    segment(page)
    assert "broken" not in page.title()
    assert page.locator(".ita-viewer img, .ita-names img, .ita-viewer script").count() == 0
    told = page.text_content(".ita-legend") + page.text_content(".ita-absent")
    assert evil in told
    assert page.broken == []


def test_bad_files_are_refused_in_words_and_the_next_one_works(visit, artefacts, tmp_path):
    page = visit()
    page.click("#ita-run")
    page.wait_for_selector('.ita-viewer[data-state="error"]')
    assert "no image yet" in page.text_content(".ita-message")
    take_example(page, 0)
    segment(page)
    assert page.get_attribute(".ita-viewer", "data-state") == "result"
    (tmp_path / "letter.jpg").write_text("Dear model, this is no image.")
    large = Image.new("L", (2000, 1000))
    large.save(tmp_path / "large.png")
    for name, sentence in (("letter.jpg", "letter.jpg"), ("large.png", "2,000 x 1,000 pixels")):
        page.click('#ita-upload button[aria-label="Remove Image"]')
        page.set_input_files("#ita-upload input[type=file]", str(tmp_path / name))
        page.wait_for_selector("#ita-upload img", state="attached")
        segment(page)
        assert page.get_attribute(".ita-viewer", "data-state") == "error"
        message = page.text_content(".ita-message")
        assert sentence in message and "Traceback" not in message
        page.screenshot(path=artefacts / f"app_error_{Path(name).stem}.png", full_page=True)
    page.click('#ita-upload button[aria-label="Remove Image"]')
    noise = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")  # 2.7 MB, and 2 MB are allowed
    page.set_input_files("#ita-upload input[type=file]", str(tmp_path / "heavy.png"))
    page.get_by_text("exceed").first.wait_for()
    page.screenshot(path=artefacts / "app_error_heavy.png", full_page=True)


def test_two_people_at_once_get_their_own_answers(visit):
    first, second = visit(), visit()
    upload(first, ROOT / "examples" / "scene_1.png")
    upload(second, ROOT / "examples" / "scene_2.jpg")
    type_names(first, ["water", "concrete"])
    type_names(second, ["sky", "tent"])
    for page in (first, second):
        page.click("#ita-run")
    for page, names, name in (
        (first, {"water", "concrete"}, "scene_1"),
        (second, {"sky", "tent"}, "scene_2"),
    ):
        page.wait_for_selector(RESULT)
        assert set(classes_of(page)) <= names and classes_of(page)
        assert name in page.get_attribute(".ita-image", "aria-label")


def test_an_example_brings_its_classes_and_changed_inputs_mark_the_result_as_outdated(visit):
    page = visit(viewport={"width": 1280, "height": 800})
    take_example(page, 0)
    page.wait_for_selector(".ita-tag")
    assert "teddy bear" in page.locator(".ita-tag .ita-name").all_text_contents()
    button = page.locator("#ita-run").bounding_box()
    assert button["y"] + button["height"] <= 800, "the button is above the fold"
    segment(page)
    note = page.locator(".ita-stale")
    assert not note.is_visible()
    page.click(".ita-tag button >> nth=0")
    note.wait_for(state="visible")
    segment(page)
    note.wait_for(state="hidden")
    page.locator("label", has_text="Panoptic").click()
    note.wait_for(state="visible")


def test_what_has_the_focus_is_seen(visit):
    page = visit()
    page.wait_for_selector("#ita-task label")
    outline = "() => getComputedStyle(document.querySelector('#ita-task label')).outlineStyle"
    assert page.evaluate(outline) == "none"
    page.focus("#ita-task input")
    assert page.evaluate(outline) == "solid"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_has_enough_contrast(theme, visit):
    page = visit(f"/?__theme={theme}", color_scheme=theme)
    contrast = (ROOT / "tests" / "helpers" / "contrast.js").read_text(encoding="utf-8")
    assert page.evaluate(contrast)[0][0] >= 4.5, page.evaluate(contrast)[:3]
    take_example(page, 0)
    segment(page)
    page.mouse.move(0, 0)
    page.click("summary >> nth=-1")
    lowest = page.evaluate(contrast)[0]
    assert lowest[0] >= 4.5, lowest


def test_keyboard_dark_mode_and_a_narrow_screen(visit, artefacts):
    page = visit("/?__theme=dark", viewport={"width": 390, "height": 844}, color_scheme="dark")
    take_example(page, 1)
    page.locator("label", has_text="Panoptic").click()
    type_names(page, ["sky", "tent", "zebra"])
    page.focus("#ita-run")
    page.keyboard.press("Enter")
    page.wait_for_selector(RESULT)
    page.focus(".ita-legend button")
    page.keyboard.press("Enter")
    assert page.get_attribute(".ita-viewer", "data-isolated") == classes_of(page)[0]
    assert page.get_attribute(".ita-legend button", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert page.get_attribute(".ita-viewer", "data-isolated") == ""
    wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, "nothing is wider than the screen"
    page.screenshot(path=artefacts / "app_narrow_dark.png", full_page=True)
    unnamed = page.evaluate("""() => [...document.querySelectorAll('.ita-names input, .ita-viewer input')]
        .filter((one) => !one.labels.length).length""")
    assert unnamed == 0
    assert json.dumps(page.broken) == "[]"
