"""The page without a browser: class names, limits, answers, downloads, uploads, and the folder of a Space."""

import ast
import base64
import fcntl
import io
import json
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")
pytest.importorskip("pycocotools", reason="the page needs pycocotools")

from helpers.app_server import CHECKPOINT, ROOT
from ita_segmentation.app import images, server
from ita_segmentation.app.class_names import NameLimits, read_class_list
from ita_segmentation.app.code_snippet import python_lines
from ita_segmentation.app.segmenter import GradioSegmenter, Limits
from ita_segmentation.app.space import write_space
from ita_segmentation.app.uploads import LOCK, PREFIX, upload_folder
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.cli import app as app_command
from ita_segmentation.errors import ITAError
from ita_segmentation.images import read_image

NAMES = ["water", "teddy bear|teddy", "concrete", "french fries"]
VOCABULARY = [["water"], ["teddy bear", "teddy"], ["concrete"], ["french fries"]]
SCENE = ROOT / "examples" / "scene_1.png"
LIMITS = NameLimits(names=10, characters=200, total_characters=1_000)


@pytest.fixture(scope="module")
def segmenter() -> GradioSegmenter:
    model, processor = load_checkpoint(CHECKPOINT, "cpu")
    limits = Limits(max_pixels=2_000_000, names=NameLimits(names=50))
    return GradioSegmenter(model, processor, "models/ita-tiny", limits)


def array_of(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def error_of(segmenter: GradioSegmenter, *request) -> str:
    last = list(segmenter.answer(*request))[-1]
    assert last is not None
    return last["error"]


# Tiles


def test_a_large_image_is_cut_into_tiles_whose_number_is_limited(segmenter):
    whole = segmenter.segment(SCENE, NAMES, "panoptic", 0.3)
    tiled = segmenter.segment(SCENE, NAMES, "panoptic", 0.3, None, 128)
    assert tiled["segments"] != whole["segments"]
    assert "tiles=128" in tiled["python"]
    assert "tiles" not in whole["python"]
    ast.parse(tiled["python"])
    assert "at least 32 pixels" in error_of(segmenter, SCENE, NAMES, "panoptic", 0.3, None, 5)
    few = GradioSegmenter(segmenter.model, segmenter.processor, "models/ita-tiny", Limits(tiles=3))
    assert "up to 3" in error_of(few, SCENE, NAMES, "panoptic", 0.3, None, 64)


# Class names


def test_a_tag_is_a_class_and_bars_join_its_synonyms():
    assert read_class_list(NAMES, LIMITS) == (VOCABULARY, [])
    assert read_class_list("water; teddy bear|teddy ,concrete\nfrench fries", LIMITS) == (VOCABULARY, [])
    assert read_class_list(["猫", "🐧|pingüino"], LIMITS)[0] == [["猫"], ["🐧", "pingüino"]]
    for nothing in ([], None, "", [""]):
        assert read_class_list(nothing, LIMITS) == (None, [])


def test_repeated_classes_are_left_out_and_the_user_is_told():
    classes, remarks = read_class_list(["Cat", "sofa|couch", "cat", "couch | sofa"], LIMITS)
    assert classes == [["Cat"], ["sofa", "couch"]]
    assert remarks == ["2 repeated classes were left out."]


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        (["cat", "a||b"], "Class 2 cannot be used: .*empty name"),
        (["cat|"], "empty name"),
        (["cat", "d\udc80g"], "Class 2 cannot be used"),
        (list("abcdefghijk"), "11 class names; this page takes up to 10"),
        (["|".join("abcdefghijk")], "11 class names; this page takes up to 10"),
        (["x" * 201], "longer than 200 characters"),
        (["x" * 199] * 6, "1,194 characters; this page takes up to 1,000"),
        ([1], "must be a list of texts"),
        ({"a": 1}, "must be a list of texts"),
    ],
)
def test_names_that_cannot_be_used_are_refused_in_a_sentence(tags, sentence):
    with pytest.raises(ITAError, match=sentence):
        read_class_list(tags, LIMITS)


# Answers


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_an_answer_is_what_the_model_says_and_its_downloads_agree(segmenter, task, tmp_path, monkeypatch):
    from pycocotools.coco import COCO

    view = segmenter.segment(SCENE, NAMES, task, 0.3)
    labels = array_of(view["labels"])
    shown = array_of(view["ids"])
    assert np.array_equal(shown[..., 0] + 256 * shown[..., 1].astype(int), labels)
    assert np.array_equal(array_of(view["image"]), np.array(read_image(SCENE)))
    shares = {one["id"]: one["share"] for one in view["segments"]}
    assert shares == {index: (labels == index).mean() for index in shares} != {}
    assert {entry["name"] for entry in view["classes"]} <= {names[0] for names in VOCABULARY}
    assert len({tuple(entry["color"]) for entry in view["classes"]}) == len(view["classes"])
    assert all(0 < entry["score"] <= 1 for entry in view["classes"])
    assert view["absent_count"] == len(NAMES) - len(view["classes"])
    # The COCO file holds the masks that are shown.
    (tmp_path / "coco.json").write_text(view["coco"], encoding="utf-8")
    coco = COCO(str(tmp_path / "coco.json"))
    annotations = coco.loadAnns(coco.getAnnIds())
    masks = {coco.annToMask(one).tobytes() for one in annotations}
    if task != "instance":  # there the map hides what one instance covers of another
        assert masks == {(labels == index).astype(np.uint8).tobytes() for index in shares}
    assert coco.loadImgs(1)[0]["file_name"] == "scene_1.png"
    # The Python lines find the same segments.
    for part in (segmenter.model, segmenter.processor):
        part.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = view["python"].replace("'scene_1.png'", repr(str(SCENE)))
    exec(code.replace("'models/ita-tiny'", "'checkpoint'"), names)
    assert {(np.array(one["mask"]) > 0).astype(np.uint8).tobytes() for one in names["segments"]} == masks


def test_names_in_the_python_lines_stay_text():
    evil = "'); raise SystemExit('"
    code = python_lines(evil, evil, [[evil]], "semantic", 0.5)
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert texts.count(evil) == 3, "checkpoint, image and class: constants, and nothing else"


def test_a_request_that_lacks_something_is_answered_in_words(segmenter):
    assert "no image yet" in error_of(segmenter, None, NAMES, "semantic", None)
    assert "The task is one of" in error_of(segmenter, SCENE, NAMES, "depth", None)
    assert "number from 0 to 1" in error_of(segmenter, SCENE, NAMES, "panoptic", 7)
    assert "takes up to 50" in error_of(segmenter, SCENE, [str(one) for one in range(51)], "semantic", None)


def test_nothing_found_is_said_with_the_best_guesses(segmenter):
    view = segmenter.segment(SCENE, ["purple submarine"], "panoptic", 0.99)
    assert view["segments"] == []
    assert view["remarks"][0].startswith("0 segments above 0.99; best guesses: purple submarine 0.")


def test_a_request_is_answered_in_steps_so_that_it_can_be_given_up(segmenter, monkeypatch):
    encoded: list[int] = []
    encode = type(segmenter.model).encode_vocabulary
    monkeypatch.setattr(
        type(segmenter.model),
        "encode_vocabulary",
        lambda self, classes, *rest: encoded.append(len(classes)) or encode(self, classes, *rest),
    )
    steps = segmenter.answer(SCENE, [f"thing {number}" for number in range(40)], "semantic", None)
    assert [next(steps), next(steps)] == [None, None]
    steps.close()
    assert sum(encoded) < 40
    assert segmenter.segment(SCENE, ["water"], "semantic", None)["segments"], "the next request is answered"


def test_the_documents_of_an_answer_are_json(segmenter):
    view = segmenter.segment(SCENE, ["<img src=x onerror=alert(1)>", "猫"], "panoptic", 0.1)
    assert json.loads(json.dumps(view)) == view
    assert "<img src=x onerror=alert(1)>" in [one["name"] for one in json.loads(view["coco"])["categories"]]


# Images


HEIC_START = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "heic", "svg"])
def test_files_that_are_no_images_are_refused_in_words_that_name_them(segmenter, kind, tmp_path):
    path = tmp_path / "holiday.jpg"
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(stream, "JPEG")
    contents = {
        "text": b"not an image at all",
        "empty": b"",
        "cut": stream.getvalue()[: len(stream.getvalue()) // 2],
        "heic": HEIC_START,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    }
    path.write_bytes(contents[kind])
    error = error_of(segmenter, path, NAMES, "semantic", None)
    assert "holiday.jpg" in error
    assert str(tmp_path) not in error, "where the server keeps its files is nobody's business"


def test_an_image_that_is_no_longer_there_is_asked_for_again(segmenter, tmp_path):
    error = error_of(segmenter, tmp_path / "gone.png", NAMES, "semantic", None)
    assert error == "gone.png is no longer on the server, which keeps no images. Please drop it again."


def test_an_image_of_100_megapixels_is_refused_before_it_is_decoded(segmenter, tmp_path, monkeypatch):
    path = tmp_path / "huge.jpg"
    Image.new("L", (10_000, 10_000)).save(path)

    def decoded(self):
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    error = error_of(segmenter, path, NAMES, "semantic", None)
    assert error.startswith(
        "huge.jpg has 10,000 x 10,000 pixels, which are 100.0 megapixels; this page takes up to 2."
    )


def test_large_images_are_shown_smaller_and_ids_above_255_survive():
    assert images.shown_size((4000, 1000)) == (1600, 400)
    assert images.shown_size((1600, 3)) == (1600, 3)
    assert images.image_data(Image.new("RGB", (900, 900))).startswith("data:image/jpeg")
    ids = np.array([[0, 255], [256, 65_535]], np.uint16)
    channels = array_of(images.id_map_data(ids)).astype(int)
    assert np.array_equal(channels[..., 0] + 256 * channels[..., 1], ids)


# The server


def test_uploads_are_deleted_at_the_end_and_those_of_a_killed_server_at_the_next_start(tmp_path):
    killed, running = (tmp_path / f"{PREFIX}{name}" for name in ("killed", "running"))
    for folder in (killed, running):
        folder.mkdir()
        (folder / "holiday.jpg").touch()
    with (running / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with upload_folder(tmp_path) as folder:
            (folder / "cat.jpg").touch()
            assert not killed.exists()
            assert (running / "holiday.jpg").exists()
            with upload_folder(tmp_path) as other:
                assert (folder / "cat.jpg").exists()
                assert other != folder
        assert list(tmp_path.iterdir()) == [running]


def test_the_page_names_its_one_public_endpoint_and_keeps_no_name_on_disk(segmenter):
    examples = server.find_examples(CHECKPOINT / "examples", ROOT / "examples")
    options = server.ServerOptions(max_waiting=8, examples=examples)
    page = server.build(segmenter.model, segmenter.processor, "a", segmenter.limits, options)
    assert "/segment" in page.get_api_info()["named_endpoints"]
    [step] = [one for one in page.fns.values() if one.api_name == "segment"]
    assert (step.concurrency_limit, page._queue.max_size) == (2, 8)
    assert not segmenter.model.text_encoder.use_disk


def test_examples_bring_their_classes_and_the_checkpoints_own_come_first(tmp_path):
    shipped = server.find_examples(tmp_path, ROOT / "examples")
    assert [one.path.name for one in shipped][:2] == ["scene_1.png", "scene_2.jpg"]
    assert all(one.class_list for one in shipped)
    assert "teddy bear" in shipped[0].class_list
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "mine.png")
    assert server.find_examples(tmp_path / "mine", ROOT / "examples") == [
        server.Example(tmp_path / "mine" / "mine.png")
    ]


def test_no_name_is_ever_written_as_html():
    for path in (ROOT / "ita_segmentation" / "app" / "web").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
        if path.suffix == ".html":
            assert "${" not in text, "the templates are never filled in"
            assert "{{" not in text, "the templates are never filled in"


def test_bad_arguments_end_in_one_line(tmp_path):
    with pytest.raises(ITAError, match="none"):
        app_command.serve(["--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        app_command.serve(["--model", str(CHECKPOINT), "--max_pixels", "0"])


# A Space


def test_a_space_is_complete_and_runs_on_its_own_code(tmp_path):
    from huggingface_hub import SpaceCard

    space = tmp_path / "space"
    app_command.serve(["--model", str(CHECKPOINT), "--model_name", "some/one", "--write_space", str(space)])
    card = SpaceCard.load(space / "README.md")
    assert (card.data.sdk, card.data.app_file, card.data.sdk_version) == (
        "gradio",
        "app.py",
        version("gradio"),
    )
    assert len(card.data.short_description) <= 60, "the hub's limit"
    app = (space / "app.py").read_text(encoding="utf-8")
    compile(app, "app.py", "exec")
    assert "\"--model_name\", 'some/one'," in app
    code = (
        "import pathlib, modeling_ita\n"
        "from ita_segmentation.app import server\n"
        "files = [server.__file__, modeling_ita.__file__]\n"
        "assert all(pathlib.Path.cwd() in pathlib.Path(one).parents for one in files), files\n"
        "assert server.find_examples(pathlib.Path('model/examples'))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=space, check=True, capture_output=True, timeout=300)
    assert not list(tmp_path.glob(".space-*"))
    needed = (space / "requirements.txt").read_text(encoding="utf-8")
    for package in ("torch", "transformers", "open_clip_torch", "pycocotools"):
        assert re.search(rf"^{package}[<>=]", needed, re.MULTILINE)


def test_a_space_takes_the_place_of_nothing(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ITAError, match="is not empty"):
        write_space(tmp_path, CHECKPOINT, ROOT)
    with pytest.raises(ITAError, match="is not a checkpoint folder"):
        write_space(tmp_path / "new", tmp_path, ROOT)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
