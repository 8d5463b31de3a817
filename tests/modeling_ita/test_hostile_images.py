"""Unusual images and class names: each is right, or refused in one clear line, in pipeline and command line."""

import base64
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from transformers import AutoImageProcessor, AutoModel

import modeling_ita  # noqa: F401  (registers the Auto classes)
from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.cli.main import run_by_name
from ita_segmentation.errors import ITAError
from ita_segmentation.images import read_image
from modeling_ita import image_processing_ita
from modeling_ita.image_io import IMAGE_FORMATS, MAX_IMAGE_PIXELS
from modeling_ita.image_io import read_image as read_bytes
from modeling_ita.image_processing_ita import ITAImageProcessor
from modeling_ita.pipeline_ita import ITAImageSegmentationPipeline

CLASSES = ["sky", "dog|puppy", "grass"]
EVERY_PIXEL = {"threshold": 0.0, "distractors": False}  # has a class
HALVES = np.zeros((24, 40, 3), np.uint8)  # red on the left, blue on the right, a white corner at the top left
HALVES[:, :20, 0], HALVES[:, 20:, 2], HALVES[:6, :6] = 255, 255, 255


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def segment(checkpoint):
    return ITAImageSegmentationPipeline(
        model=AutoModel.from_pretrained(checkpoint).eval(),
        image_processor=AutoImageProcessor.from_pretrained(checkpoint),
        task="image-segmentation",
    )


@pytest.fixture
def predict(checkpoint, tmp_path, monkeypatch, capsys):
    """The command line on one image: its exit status, the lines it says, its label map and its document."""

    def run(path: Path, classes: str = ", ".join(CLASSES), *more: str):
        output = tmp_path / "out"
        arguments = ["--model", checkpoint, "--images", path, "--classes", classes, "--output", output, *more]
        monkeypatch.setattr(sys, "argv", ["run_predict.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_by_name("predict")
        said = [ended.value.code] if isinstance(ended.value.code, str) else []
        said += capsys.readouterr().err.splitlines()
        status = ended.value.code if isinstance(ended.value.code, int) else 1
        if status:
            return status, said, None, None
        labels = np.array(Image.open(output / f"{path.stem}_labels.png"))
        return status, said, labels, json.loads((output / f"{path.stem}_segments.json").read_text("utf-8"))

    return run


def heif(path: Path) -> Path:
    """The head of an image from a telephone; no decoder gets further."""
    path.write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(2000))
    return path


def turned(path: Path) -> Path:
    """Lies on its side, with the note that a viewer turns it by."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(HALVES).rotate(90, expand=True).save(path, exif=exif)
    return path


def sixteen_bits(path: Path) -> Path:
    gray = HALVES.mean(-1).round().astype(np.uint16)
    Image.fromarray(gray * 257).save(path)
    return path


def cmyk(path: Path) -> Path:
    Image.fromarray(HALVES).convert("CMYK").save(path, quality=100, subsampling=0)
    return path


def moving(path: Path) -> Path:
    other = Image.new("RGB", (40, 24), "yellow")
    Image.fromarray(HALVES).save(path, save_all=True, append_images=[other], duration=50, loop=0)
    return path


def seen(path: Path) -> np.ndarray:
    return np.asarray(read_image(path)).astype(int)


KINDS = {
    "EXIF rotation": (turned, "turned.png", HALVES, 0),
    "16 bits": (sixteen_bits, "deep.png", np.repeat(HALVES.mean(-1).round()[..., None], 3, -1), 0),
    "CMYK": (cmyk, "print.jpg", HALVES, 12),
    "animated GIF": (moving, "moving.gif", HALVES, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_as_a_person_sees_it(kind, tmp_path):
    make, name, expected, tolerance = KINDS[kind]
    image = seen(make(tmp_path / name))
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_and_command_line_see_what_the_plain_image_shows(kind, segment, predict, tmp_path):
    make, name, _, _ = KINDS[kind]
    path = make(tmp_path / name)
    plain = tmp_path / "plain" / name.replace(".jpg", ".png").replace(".gif", ".png")
    plain.parent.mkdir()
    Image.fromarray(seen(path).astype(np.uint8)).save(plain)
    for source in (str(path), path.read_bytes()):
        found, expected = (
            segment(one, candidate_labels=CLASSES, subtask="semantic") for one in (source, str(plain))
        )
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        assert all(np.array_equal(a["mask"], b["mask"]) for a, b in zip(found, expected, strict=True))
    status, said, labels, _ = predict(path)
    assert (status, said) == (0, [])
    assert np.array_equal(labels, predict(plain)[2])


def test_an_inverted_cmyk_file_of_adobe_is_not_a_negative(tmp_path):
    """Adobe's programs store CMYK inverted and say so in a marker of their own, as Pillow does in its files."""
    cmyk(tmp_path / "print.jpg")
    data = (tmp_path / "print.jpg").read_bytes()
    assert b"Adobe" in data
    red, blue = seen(tmp_path / "print.jpg")[12, [10, 30]]
    assert red[0] > 240 > 20 > red[2]
    assert blue[2] > 240 > 20 > blue[0]


def test_dark_sixteen_bits_stay_dark_and_light_ones_light(tmp_path):
    """Scaled, not clipped: 512 of 65,535 is nearly black, and 65,535 white."""
    values = np.array([[0, 512, 32_896, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        assert seen(tmp_path / name)[0, :, 0].tolist() == [0, 2, 128, 255]


def test_sixteen_bits_given_as_text_or_bytes_are_scaled_too(segment, tmp_path):
    path = sixteen_bits(tmp_path / "deep.png")
    inputs = [segment.preprocess(one)["pixel_values"] for one in (str(path), path.read_bytes())]
    assert (inputs[0] == inputs[1]).all()
    assert (
        inputs[0][..., :24, :20] - inputs[0][..., :24, 25:45]
    ).abs().max() < 10  # gray levels, not all white


REFUSED = {
    "HEIC": (heif, "photo.heic", "is a HEIC image, which Pillow reads with the package pillow-heif only"),
    "cut off": (lambda path: path.write_bytes(_jpeg()[:400]), "cut.jpg", "cannot be read as an image"),
    "empty": (lambda path: path.write_bytes(b""), "empty.png", "is empty"),
    "text": (lambda path: path.write_text("hello " * 20), "text.png", "is not an image"),
    "LAB": (
        lambda path: Image.new("LAB", (4, 4)).save(path),
        "color.tif",
        "LAB image cannot be shown without its color profile",
    ),
}


def _jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_one_line_that_names_it(kind, segment, predict, tmp_path):
    make, name, message = REFUSED[kind]
    path = tmp_path / name
    make(path)
    with pytest.raises(ValueError, match=message) as error:
        segment(str(path), candidate_labels=CLASSES)
    assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        segment(path.read_bytes(), candidate_labels=CLASSES)
    status, said, _, _ = predict(path)
    assert status == 1
    assert len(said) == 1 and message in said[0] and name in said[0]
    assert not list((tmp_path / "out").glob("*"))


def test_a_folders_heic_is_named_and_not_passed_over(predict, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    heif(folder / "IMG_1.HEIC")
    Image.fromarray(HALVES).save(folder / "IMG_2.png")
    status, said, _, _ = predict(folder)
    assert status == 1 and "IMG_1.HEIC is a HEIC image" in "\n".join(said)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
0 0 20 20 rectfill
%%EOF
"""


def test_an_eps_file_starts_no_program_whatever_it_is_called(segment, predict, tmp_path, monkeypatch):
    def started(*arguments, **options):
        pytest.fail("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    path = tmp_path / "image.png"
    path.write_bytes(EPS)
    for source in (str(path), EPS, Image.open(path), base64.b64encode(EPS).decode()):
        with pytest.raises(ValueError, match="is not an image, or not in a format that is read"):
            segment(source, candidate_labels=CLASSES)
        with pytest.raises(ValueError, match="is not an image, or not in a format that is read"):
            segment.image_processor(source if isinstance(source, str) else path)
    with pytest.raises(ValueError, match="segmentation map"):
        segment.image_processor(HALVES, [str(path)])
    status, said, _, _ = predict(path)
    assert status == 1 and "image.png is not an image" in said[0]


def files_of_each_format() -> dict[str, bytes]:
    """A small image in each format that this Pillow reads and writes."""
    files = {}
    for name in IMAGE_FORMATS:
        if name in Image.OPEN and name in Image.SAVE:
            stream = io.BytesIO()
            Image.fromarray(HALVES).save(stream, name)
            files[name] = stream.getvalue()
    return files


def damaged(content: bytes, choose: random.Random) -> bytes:
    """Content with some bytes changed, mostly of its head, and sometimes cut, doubled or with a piece moved."""
    changed = bytearray(content)
    for _ in range(choose.randint(1, 8)):
        reach = len(changed) if choose.random() < 0.3 else min(96, len(changed))
        changed[choose.randrange(reach)] = choose.choice([0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)])
    start, stop = sorted(choose.sample(range(len(changed)), 2))
    kind = choose.randrange(6)
    if kind == 0:
        return bytes(changed[:stop])
    if kind == 1:
        return bytes(changed[:start] + changed[stop:])
    if kind == 2:
        return bytes(changed[:stop] + changed[start:])
    return bytes(changed)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed else ()) for seed in range(20)]
)
def test_a_damaged_file_gives_an_image_or_one_line(seed):
    choose = random.Random(seed)
    refused = 0
    for name, content in files_of_each_format().items():
        for _ in range(60):
            message = None
            try:
                image = read_bytes(damaged(content, choose))
            except ValueError as error:
                message = str(error)
            if message is None:
                assert image.mode == "RGB" and image.width * image.height <= MAX_IMAGE_PIXELS
            else:
                refused += 1
                assert "\n" not in message and 0 < len(message) < 400, name
    assert refused > 100


# --- size -----------------------------------------------------------------------------------------------------


def test_an_image_beyond_the_limit_is_refused_before_it_is_decoded(segment, predict, tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 10_000)).save(path)
    with pytest.raises(ValueError, match="more than the 178,956,970 pixels allowed"):
        segment(str(path), candidate_labels=CLASSES)
    status, said, _, _ = predict(path)
    assert status == 1 and "178,956,970 pixels" in said[0]


def test_large_images_reach_the_network_without_floats_of_their_own_size(tmp_path, monkeypatch):
    """An image beyond `REDUCED_PIXELS` is first brought to a whole fraction; what the network sees stays the same."""
    ramp = np.linspace(0, 255, 640, dtype=np.uint8)
    pil_image = Image.fromarray(np.stack(np.broadcast_arrays(ramp, ramp[:480, None], np.uint8(90)), -1))
    processor = ITAImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    whole = processor(pil_image, return_tensors="pt")
    taken = []
    resize = ITAImageProcessor.resize

    def note(self, image, *arguments, **options):
        taken.append(tuple(image.shape[-2:]))
        return resize(self, image, *arguments, **options)

    monkeypatch.setattr(ITAImageProcessor, "resize", note)
    monkeypatch.setattr(image_processing_ita, "REDUCED_PIXELS", 1000)
    reduced = processor(pil_image, return_tensors="pt")
    assert taken == [(96, 128)]  # twice the 48 x 64 asked for
    assert reduced["pixel_mask"].shape == whole["pixel_mask"].shape
    assert (reduced["pixel_values"] - whole["pixel_values"]).abs().max() < 0.06  # of a range of about 4


def test_ordinary_images_are_not_reduced():
    image = Image.new("RGB", (5000, 4000))
    assert image_processing_ita._reduced(image, (100, 125)) is image


# --- classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "classes", [["猫", "沙发|長椅", "天空"], ["🐱", "🛋️", "👩‍👩‍👧 family"], ["größe", "naïve"]]
)
def test_names_in_any_script_come_back_as_they_were_typed(classes, segment, predict, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(HALVES).save(path)
    names = [name.split("|")[0] for name in classes]
    found = segment(str(path), candidate_labels=classes, subtask="semantic", **EVERY_PIXEL)
    assert found and {one["label"] for one in found} <= set(names)
    status, said, _, document = predict(path, ", ".join(classes))
    assert (status, said) == (0, [])
    assert [names_of_class[0] for names_of_class in document["vocabulary"]] == names
    assert {one["label"] for one in document["segments"]} <= set(names)


def test_different_names_in_another_script_are_different_to_the_network(segment):
    embeds = segment.model.encode_vocabulary(["猫", "犬", "🐱", "🐶"]).prompt_embeds
    similarity = embeds @ embeds.T
    assert (similarity - similarity.diag().diag()).max() < 0.99999


def test_two_thousand_names(segment, predict, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(HALVES).save(path)
    classes = [f"thing number {index}" for index in range(2000)]
    found = segment(str(path), candidate_labels=classes, subtask="semantic", **EVERY_PIXEL)
    assert sum(int((np.asarray(one["mask"]) == 255).sum()) for one in found) == 24 * 40
    assert {one["label"] for one in found} <= set(classes)
    status, said, labels, document = predict(path, ", ".join(classes))
    assert (status, said) == (0, [])
    assert len(document["vocabulary"]) == 2000
    assert labels.max() < 2000


@pytest.mark.parametrize("classes", ["cat,, dog", "cat||dog", " "])
def test_names_that_are_none_are_refused_in_one_line(classes, segment, predict, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(HALVES).save(path)
    with pytest.raises(ValueError, match="candidate") as error:
        segment(str(path), candidate_labels=classes)
    assert "\n" not in str(error.value)
    status, said, _, _ = predict(path, classes)
    assert status == 2 and len(said) == 1 and "--classes" in said[0]


def test_a_missing_image_is_named(segment, tmp_path):
    with pytest.raises(ITAError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")
