"""The page as a program asks it, over HTTP: difficult images are right or refused in a sentence."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.app_server import ROOT, shared_page

gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
pytest.importorskip("pycocotools", reason="the page needs pycocotools")

SIZE = (64, 40)
COLOR = (200, 60, 30)


@pytest.fixture(scope="module")
def client():
    return gradio_client.Client(shared_page().address, verbose=False)


def ask(client, path: Path, names=("water", "sand")) -> dict:
    image = gradio_client.handle_file(str(path))
    return client.predict(image, list(names), "semantic", 0.5, api_name="/segment")


def shown(view: dict) -> np.ndarray:
    """(H, W, 3), the image that the answer shows."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(view["image"].partition(",")[2])))).astype(int)


def test_a_turned_image_is_shown_and_segmented_upright(client, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by a quarter
    halves = np.zeros((40, 64, 3), np.uint8)
    halves[:, :32] = 255
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    view = ask(client, tmp_path / "turned.png")
    assert (view["width"], view["height"]) == (40, 64)
    assert np.array_equal(shown(view), np.array(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))))


def test_deep_cmyk_and_moving_images_are_shown_as_a_person_sees_them(client, tmp_path):
    Image.fromarray(np.full((40, 64), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", SIZE, COLOR).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    gray = round(40_000 / 65_535 * 255)
    for name, expected in (("deep.png", (gray,) * 3), ("cmyk.jpg", COLOR), ("moving.gif", (255, 0, 0))):
        view = ask(client, tmp_path / name)
        assert (view["width"], view["height"]) == SIZE, name
        assert np.abs(shown(view) - np.array(expected)).max() <= 4, name


def test_cut_foreign_and_false_images_are_refused_in_a_sentence_with_their_name(client, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photo.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200))
    (tmp_path / "letter.png").write_text("Dear model, this is no image.")
    for name, sentence in (("cut.jpg", "cut"), ("photo.heic", "HEIC"), ("letter.png", "not an image")):
        error = ask(client, tmp_path / name)["error"]
        assert name in error and sentence in error and "/" not in error, error


def test_an_image_of_100_megapixels_is_refused_in_a_sentence(client, tmp_path):
    Image.new("L", (10_000, 10_000)).save(tmp_path / "huge.jpg", optimize=True)
    assert ask(client, tmp_path / "huge.jpg")["error"].startswith("huge.jpg has 10,000 x 10,000 pixels")


def test_chinese_names_and_emoji_are_classes(client):
    view = ask(client, ROOT / "examples" / "scene_1.png", ["猫|狗", "🐧", "water"])
    assert {one["name"] for one in view["classes"]} <= {"猫", "🐧", "water"}
    assert '"猫"' in view["coco"] and "猫" in view["python"] and "🐧" in view["python"]


def test_more_names_than_allowed_are_refused_in_a_sentence(client):
    tag = "|".join(f"name {number}" for number in range(1001))
    error = ask(client, ROOT / "examples" / "scene_1.png", [tag])["error"]
    assert error == "These are 1,001 class names; this page takes up to 1,000."


def test_an_example_of_a_class_joins_its_name_and_a_bad_one_is_refused_in_a_sentence(client):
    path = ROOT / "examples" / "scene_1.png"
    image = gradio_client.handle_file(str(path))

    def by_example(*fields) -> dict:
        request = (image, ["teddy bear", "water"], "semantic", 0.3, 0, *fields)
        return client.predict(*request, api_name="/segment")

    plain, view = by_example(), by_example(image, "teddy bear", "20, 30, 90 100")
    assert plain["classes"] != view["classes"]
    assert "examples={'teddy bear': [('scene_1.png', (20, 30, 90, 100))]}" in view["python"]
    assert "examples" not in plain["python"]
    assert "error" not in by_example(image, "teddy bear", "")
    for fields, sentence in (
        ((image, "", ""), "which of the classes the example shows"),
        ((image, "elephant", ""), "'elephant', which is not among the classes"),
        ((image, "teddy bear", "left"), "four numbers, left, top, right, bottom; got “left”"),
        ((image, "teddy bear", "0 0 9000 9"), "is not inside the image"),
    ):
        error = by_example(*fields)["error"]
        assert sentence in error and "/" not in error, error
