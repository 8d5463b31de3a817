"""The page without a browser: words, limits, answers, downloads, and the folder of a Space."""

import ast
import base64
import io
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")
pytest.importorskip("pycocotools", reason="the page needs pycocotools")

from helpers.app_server import CHECKPOINT, ROOT
from ita_segmentation.app import images as images
from ita_segmentation.app.class_names import vocabulary_of_chips
from ita_segmentation.app.class_scores import mean_class_scores
from ita_segmentation.app.code_snippet import python_lines
from ita_segmentation.app.page import build_page, example_images
from ita_segmentation.app.segmenter import Limits, PageSegmenter
from ita_segmentation.app.space import write_space
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.cli import app as run_app
from ita_segmentation.errors import ITAError
from ita_segmentation.images import read_image

WORDS = ["water", "teddy bear|teddy", "concrete", "french fries"]
VOCABULARY = [["water"], ["teddy bear", "teddy"], ["concrete"], ["french fries"]]
SCENE = ROOT / "examples" / "scene_1.png"


@pytest.fixture(scope="module")
def segmenter() -> PageSegmenter:
    model, processor = load_checkpoint(CHECKPOINT, "cpu")
    return PageSegmenter(model, processor, "models/ita-tiny", Limits(max_pixels=2_000_000, max_classes=50))


def array_of(address: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


# Words


def test_a_chip_is_a_class_and_bars_join_its_synonyms():
    assert vocabulary_of_chips(WORDS, 10) == (VOCABULARY, [])
    assert vocabulary_of_chips("water, teddy bear|teddy ,concrete,french fries", 10) == (VOCABULARY, [])


def test_without_words_the_models_own_vocabulary_is_used():
    assert (
        vocabulary_of_chips([], 10)
        == vocabulary_of_chips(None, 10)
        == vocabulary_of_chips(" ", 10)
        == (None, [])
    )


def test_repeated_classes_are_left_out_and_the_person_is_told():
    classes, remarks = vocabulary_of_chips(["Cat", "sofa|couch", "cat", "couch | sofa"], 10)
    assert classes == [["Cat"], ["sofa", "couch"]]
    assert remarks == ["2 repeated classes were left out."]


def test_words_of_any_script_are_words():
    assert vocabulary_of_chips(["猫", "🐧|pingüino"], 10)[0] == [["猫"], ["🐧", "pingüino"]]


@pytest.mark.parametrize(
    ("chips", "sentence"),
    [
        (["cat", " "], "Class word 2 is empty"),
        (["cat|"], "empty synonym"),
        (["a"] * 11, "11 class words; this page takes up to 10"),
        (["x" * 201], "longer than 200 characters"),
        ([1], "must be a list of texts"),
        ({"a": 1}, "must be a list of texts"),
    ],
)
def test_words_that_cannot_be_used_are_refused_in_a_sentence(chips, sentence):
    with pytest.raises(ITAError, match=sentence):
        vocabulary_of_chips(chips, 10)


# Answers


def test_the_answer_is_what_model_and_processor_say(segmenter):
    view = segmenter.segment(SCENE, WORDS, "semantic", None)
    image = read_image(SCENE)
    with torch.inference_mode():
        inputs = segmenter.processor(images=image, return_tensors="pt")
        outputs = segmenter.model(**inputs, vocabulary=VOCABULARY)
    sizes = [(image.height, image.width)]
    [expected] = segmenter.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    labels = array_of(view["labels"])
    assert np.array_equal(labels, expected.numpy())
    shown = array_of(view["ids"])
    assert np.array_equal(shown[..., 0] + 256 * shown[..., 1].astype(int), expected.numpy())
    assert np.array_equal(array_of(view["image"]), np.array(image))
    names = {entry["class"]: entry["name"] for entry in view["classes"]}
    assert names == {index: VOCABULARY[index][0] for index in np.unique(labels).tolist()}
    assert sum(entry["share"] for entry in view["classes"]) == pytest.approx(1)
    assert view["absent_count"] == len(WORDS) - len(names)


def test_a_semantic_score_is_the_classes_mean_share_in_its_pixels(segmenter):
    image = read_image(SCENE)  # smaller than the size at which scores are compared
    with torch.inference_mode():
        inputs = segmenter.processor(images=image, return_tensors="pt")
        outputs = segmenter.model(**inputs, vocabulary=VOCABULARY)
    sizes = [(image.height, image.width)]
    [result] = segmenter.processor.post_process_semantic_segmentation(
        outputs, target_sizes=sizes, return_segmentation_scores=True
    )
    scores, labels = result["segmentation_scores"], result["segmentation"]
    shares = scores / scores.sum(0)
    expected = {index: shares[index][labels == index].mean().item() for index in labels.unique().tolist()}
    found = mean_class_scores(outputs, labels.numpy().astype(np.uint8), list(expected))
    assert found == pytest.approx(expected, abs=1e-4)
    assert all(0 < score <= 1 for score in found.values())


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_the_coco_file_holds_the_masks_that_are_shown(segmenter, task, tmp_path):
    from pycocotools.coco import COCO

    view = segmenter.segment(SCENE, WORDS, task, 0.3)
    path = tmp_path / "coco.json"
    path.write_text(view["coco"], encoding="utf-8")
    coco = COCO(str(path))
    labels = array_of(view["labels"])
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == len(view["segments"]) > 0
    if task != "instance":  # there the map hides what one instance covers of another
        masks = {coco.annToMask(one).tobytes() for one in annotations}
        assert masks == {(labels == one["id"]).astype(np.uint8).tobytes() for one in view["segments"]}
    assert {one["name"] for one in coco.loadCats(coco.getCatIds())} == {names[0] for names in VOCABULARY}
    assert coco.loadImgs(1)[0]["file_name"] == "scene_1.png"


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_the_python_lines_reproduce_the_label_map(segmenter, task, monkeypatch):
    view = segmenter.segment(SCENE, WORDS, task, 0.4)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(view["python"].replace("'scene_1.png'", repr(str(SCENE))), names)
    assert np.array_equal(names["label_map"].numpy(), array_of(view["labels"]))


def test_names_in_the_python_lines_stay_text():
    evil = "'); raise SystemExit('"
    code = python_lines(evil, evil, [[evil]], "semantic", None)
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert texts.count(evil) == 3, "checkpoint, image and class: constants, and nothing else"


def test_a_request_that_lacks_something_is_answered_in_words(segmenter):
    assert "no image yet" in segmenter.answer(None, WORDS, "semantic", None)["error"]
    assert "The task is one of" in segmenter.answer(SCENE, WORDS, "depth", None)["error"]
    assert "number from 0 to 1" in segmenter.answer(SCENE, WORDS, "panoptic", 7)["error"]
    assert (
        "takes up to 50"
        in segmenter.answer(SCENE, [str(one) for one in range(51)], "semantic", None)["error"]
    )


# Images that are difficult


def saved(path: Path, mode: str = "RGB", size: tuple[int, int] = (64, 40), **options) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def difficult_images(folder: Path) -> dict[str, Path]:
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by a quarter
    frames = [Image.new("RGB", (64, 40), color) for color in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((40, 64), 40_000, np.uint16)).save(folder / "deep.png")
    return {
        "turned": saved(folder / "turned.jpg", exif=exif),
        "cmyk": saved(folder / "cmyk.jpg", "CMYK"),
        "moving": folder / "moving.gif",
        "deep": folder / "deep.png",
    }


def test_turned_deep_cmyk_and_moving_images_are_segmented(segmenter, tmp_path):
    for name, path in difficult_images(tmp_path).items():
        view = segmenter.segment(path, ["water", "sand"], "semantic", None)
        assert (view["width"], view["height"]) == ((40, 64) if name == "turned" else (64, 40)), name


HEIC_START = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "heic", "svg"])
def test_files_that_are_no_images_are_refused_in_words_that_name_them(segmenter, kind, tmp_path):
    path = tmp_path / "holiday.jpg"
    whole = saved(tmp_path / "whole.jpg", size=(300, 300)).read_bytes()
    contents = {
        "text": b"not an image at all",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "heic": HEIC_START,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    }
    path.write_bytes(contents[kind])
    error = segmenter.answer(path, WORDS, "semantic", None)["error"]
    assert "holiday.jpg" in error
    assert str(tmp_path) not in error, "where the server keeps its files is nobody's business"
    assert "Traceback" not in error


def test_an_image_that_the_server_has_forgotten_is_asked_for_again(segmenter, tmp_path):
    error = segmenter.answer(tmp_path / "gone.png", WORDS, "semantic", None)["error"]
    assert error == "gone.png is no longer on the server, which forgets images. Please drop it again."


def test_an_image_of_100_megapixels_is_refused_before_it_is_decoded(segmenter, tmp_path, monkeypatch):
    path = tmp_path / "huge.jpg"
    Image.new("L", (10_000, 10_000)).save(path)

    def decoded(self):
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    error = segmenter.answer(path, WORDS, "semantic", None)["error"]
    assert error == (
        "huge.jpg has 10,000 x 10,000 pixels, which are 100.0 megapixels; this page takes up to 2. Please make the "
        "image smaller."
    )


def test_large_images_are_shown_smaller_and_ids_above_255_survive():
    assert images.shown_size((4000, 1000)) == (1600, 400)
    assert images.shown_size((1600, 3)) == (1600, 3)
    assert images.image_data(Image.new("RGB", (900, 900))).startswith("data:image/jpeg")
    ids = np.array([[0, 255], [256, 65_535]], np.uint16)
    channels = array_of(images.id_map_data(ids)).astype(int)
    assert np.array_equal(channels[..., 0] + 256 * channels[..., 1], ids)


# The page and its Space


def test_no_word_is_ever_written_as_html(segmenter):
    for path in (ROOT / "ita_segmentation" / "app" / "web").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text
        if path.suffix == ".html":
            assert "${" not in text and "{{" not in text, "the templates are never filled in"


def test_the_page_names_its_one_public_way_in(segmenter):
    page = build_page(segmenter, example_images(CHECKPOINT, ROOT / "examples"), 2, 8)
    named = page.get_api_info()["named_endpoints"]
    assert "/segment" in named
    [step] = [one for one in page.fns.values() if one.api_name == "segment"]
    assert step.concurrency_limit == 2 and page._queue.max_size == 8


def test_examples_of_the_checkpoint_go_before_those_that_ship(tmp_path):
    shipped = ROOT / "examples"
    assert [path.name for path in example_images(tmp_path, shipped)][:2] == ["scene_1.png", "scene_2.jpg"]
    (tmp_path / "examples").mkdir()
    mine = saved(tmp_path / "examples" / "mine.png")
    assert example_images(tmp_path, shipped) == [mine]


def test_a_space_is_complete_and_runs_on_its_own_code(tmp_path):
    from huggingface_hub import SpaceCard

    space = tmp_path / "space"
    write_space(space, CHECKPOINT, ROOT)
    card = SpaceCard.load(space / "README.md")
    assert card.data.sdk == "gradio" and card.data.app_file == "app.py"
    assert card.data.sdk_version == version("gradio")
    assert len(card.data.short_description) <= 60, "the hub's limit"
    code = (
        "import ita_segmentation.app.page, modeling_ita, pathlib\n"
        "from ita_segmentation.cli import app as run_app\n"
        "files = [ita_segmentation.app.page.__file__, modeling_ita.__file__, run_app.__file__]\n"
        "assert all(pathlib.Path.cwd() in pathlib.Path(one).parents for one in files), files\n"
        "run_app.prepare(run_app.build_parser().parse_command_line(['--model', 'model']))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=space, check=True, capture_output=True, timeout=300)
    assert not list(tmp_path.glob(".space-*"))


def test_the_space_asks_for_what_the_package_asks_for():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = yaml.safe_load("[" + setup.partition("install_requires=[")[2].partition("]")[0] + "]")
    wanted = (
        (ROOT / "ita_segmentation" / "app" / "space_files" / "requirements.txt")
        .read_text(encoding="utf-8")
        .split()
    )
    assert set(required) <= set(wanted)


def test_a_space_takes_the_place_of_nothing(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ITAError, match="is not empty"):
        write_space(tmp_path, CHECKPOINT, ROOT)
    with pytest.raises(ITAError, match="is not a checkpoint folder"):
        write_space(tmp_path / "new", tmp_path, ROOT)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_space_calls_its_checkpoint_as_asked(tmp_path):
    run_app.serve(
        [
            *("--model", str(CHECKPOINT), "--model_name", "someone/segmenter"),
            "--write_space",
            str(tmp_path / "new"),
        ]
    )
    app = (tmp_path / "new" / "app.py").read_text(encoding="utf-8")
    compile(app, "app.py", "exec")
    assert "\"--model_name\", 'someone/segmenter'," in app


def test_bad_arguments_end_in_one_line(tmp_path):
    with pytest.raises(ITAError, match="no such checkpoint folder"):
        run_app.serve(["--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        run_app.serve(["--model", str(CHECKPOINT), "--max_pixels", "0"])


def test_the_documents_of_an_answer_are_json(segmenter):
    view = segmenter.answer(SCENE, ["<img src=x onerror=alert(1)>", "猫"], "panoptic", 0.1)
    assert json.loads(json.dumps(view)) == view
    assert "<img src=x onerror=alert(1)>" in [one["name"] for one in json.loads(view["coco"])["categories"]]
