"""`ita predict` for images: what it writes, and one clear line for everything that is wrong."""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ita_segmentation import checkpoints
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli.main import run_by_name
from ita_segmentation.errors import ITAError
from ita_segmentation.files import write_files
from ita_segmentation.prediction.segmenter import Segmenter
from modeling_ita.class_examples import encode_class_examples


@pytest.fixture
def command(loaded, checkpoint, monkeypatch, capsys):
    """Runs `ita predict` with this model (by default the tiny one); gives its status, stdout and lines of stderr."""
    load = checkpoints.load_checkpoint
    monkeypatch.setattr(
        "ita_segmentation.cli.predict.load_checkpoint",
        lambda path, device, dtype: (
            loaded
            if (str(path), device, dtype) == (str(checkpoint), None, "float32")
            else load(path, device, dtype)
        ),
    )

    def run(*arguments, model=checkpoint) -> tuple[int, str, list[str]]:
        given = ["--model", model, *arguments] if model else arguments
        monkeypatch.setattr("sys.argv", ["ita predict", *map(str, given)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run_by_name("predict")
        printed = capsys.readouterr()
        return (
            int(exit_info.value.code or 0),
            printed.out,
            [one for one in printed.err.splitlines() if one.strip()],
        )

    return run


def document_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_each_image_gets_an_overlay_a_label_map_and_a_segments_file(task, tmp_path, command, noise):
    path, output = noise(tmp_path / "a.png"), tmp_path / "out"
    given = ["--classes", "cat, sofa|couch; wall", "--task", task, "--threshold", 0]
    assert command("--images", path, "--output", output, *given)[::2] == (0, [])
    assert sorted(file.name for file in output.iterdir()) == [
        "a_labels.png",
        "a_overlay.png",
        "a_segments.json",
    ]
    document = document_of(output / "a_segments.json")
    labels = np.array(Image.open(output / "a_labels.png"))
    assert (labels.shape, labels.dtype) == ((40, 48), np.uint8)
    assert (document["width"], document["height"], document["task"]) == (48, 40, task)
    assert document["vocabulary"] == [["cat"], ["sofa", "couch"], ["wall"]]
    nothing = {255} if task == "semantic" else {0}
    assert {segment["id"] for segment in document["segments"]} | nothing == set(
        labels.ravel().tolist()
    ) | nothing
    for segment in document["segments"]:
        assert segment["label"] == document["vocabulary"][segment["label_id"]][0]
        x, y, width, height = segment["bbox"]
        mask = labels == segment["id"]
        assert mask.sum() == segment["area"] == mask[y : y + height, x : x + width].sum()
        assert 0 <= segment["score"] <= 1
    assert Image.open(output / "a_overlay.png").height >= 40


def test_without_classes_the_checkpoints_own_are_used(tmp_path, command, noise):
    path = noise(tmp_path / "a.png")
    assert command("--images", path, "--output", tmp_path / "out", "--format", "segments")[0] == 0
    document = document_of(tmp_path / "out" / "a_segments.json")
    assert [names[0] for names in document["vocabulary"]] == ["sky", "dog", "grass", "car"]


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 3000)])
def test_an_image_of_any_shape_is_segmented_at_its_own_size(size, tmp_path, command, noise):
    path = noise(tmp_path / "a.png", size)
    assert command("--images", path, "--output", tmp_path / "out")[::2] == (0, [])
    assert Image.open(tmp_path / "out" / "a_labels.png").size == size


def test_a_turned_grey_image_gives_maps_as_a_person_sees_it(tmp_path, command):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert command("--images", tmp_path / "a.jpg", "--output", tmp_path / "out")[0] == 0
    assert Image.open(tmp_path / "out" / "a_labels.png").size == (20, 30)


def test_more_than_255_classes_need_a_label_map_of_16_bits(tmp_path, command, noise):
    (tmp_path / "many.json").write_text(json.dumps([f"thing {number}" for number in range(257)]))
    given = ["--images", noise(tmp_path / "a.png"), "--vocabulary", tmp_path / "many.json"]
    assert command(*given, "--output", tmp_path / "out")[0] == 0
    document = document_of(tmp_path / "out" / "a_segments.json")
    labels = np.array(Image.open(tmp_path / "out" / "a_labels.png"))
    found = set(labels.ravel().tolist())
    assert {segment["id"] for segment in document["segments"]} == found - {255, 65_535}
    assert labels.dtype == (np.uint16 if max(found - {255}, default=0) > 255 else np.uint8)


def test_images_of_one_name_in_different_folders_do_not_overwrite_each_other(tmp_path, command, noise):
    paths = [noise(tmp_path / folder / "a.png", seed=index) for index, folder in enumerate("xyz")]
    paths.append(noise(tmp_path / "x" / "a_2.png"))
    output = tmp_path / "out"
    assert command("--images", *paths, paths[0], "--output", output)[0] == 0
    images = [document_of(file)["image"] for file in output.glob("*_segments.json")]
    assert sorted(images) == sorted(map(str, paths))
    assert len(list(output.iterdir())) == 12


@pytest.mark.parametrize("batch_size", [1, 3])
def test_images_that_fail_are_named_and_the_others_are_done(batch_size, tmp_path, command, noise):
    folder, output = tmp_path / "in", tmp_path / "out"
    noise(folder / "good.png")
    (folder / "bad.jpg").write_text("this is no image")
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not looked at")
    given = ["--images", folder, "--output", output, "--batch_size", batch_size, "--format", "labels"]
    status, out, errors = command(*given)
    assert status == 1
    assert "1 image segmented" in out
    text = "\n".join(errors)
    assert "ita predict: error: 2 of 3 images failed" in text
    assert "bad.jpg is not an image" in text
    assert "empty.png is empty" in text
    assert [file.name for file in output.iterdir()] == ["good_labels.png"]


def test_a_config_file_gives_arguments_and_the_command_line_takes_precedence(
    checkpoint, tmp_path, command, noise
):
    content = {
        "model": str(checkpoint),
        "images": [str(noise(tmp_path / "a.png"))],
        "classes": "cat, dog",
        "task": "panoptic",
        "output": str(tmp_path / "from_file"),
    }
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(content))
    given = ["--config", tmp_path / "arguments.yaml", "--output", tmp_path / "out", "--task", "semantic"]
    assert command(*given, model=None)[0] == 0
    document = document_of(tmp_path / "out" / "a_segments.json")
    assert (document["task"], document["vocabulary"]) == ("semantic", [["cat"], ["dog"]])
    assert not (tmp_path / "from_file").exists()


# Bad input: one line, a non-zero status, nothing written


def truncated(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    return path


def bomb(path: Path) -> Path:
    """A PNG whose header claims 30,000 x 30,000 pixels."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    return path


def empty_folder(path: Path) -> Path:
    path.mkdir()
    (path / "readme.txt").write_text("no image here")
    return path


def file_of(content: bytes):
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda path: path, "missing.jpg", "no such image or folder"),
        (truncated, "cut.png", "cannot be read as an image"),
        (truncated, "cut.jpg", "cannot be read as an image"),
        (file_of(b""), "zero.png", "is empty"),
        (empty_folder, "folder", "no images in the folder"),
        (file_of(b"hello"), "text.jpg", "is not an image"),
        (bomb, "bomb.png", "178,956,970 pixels"),
    ],
)
def test_a_bad_image_is_one_line_and_leaves_nothing(make, name, message, tmp_path, command):
    path, output = make(tmp_path / name), tmp_path / "out"
    status, out, errors = command("--images", path, "--output", output)
    assert (status, out, len(errors)) == (1, "", 1)
    assert errors[0].startswith("ita predict: error: ")
    assert message in errors[0]
    assert name in errors[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--classes", ""], 2, "empty"),
        (["--classes", " , cat"], 2, "empty name"),
        (["--classes", "cat, sofa||couch"], 2, "empty name"),
        (["--classes", "cat, d\udc80g"], 2, "d\\udc80g"),
        (["--stuff", "horse"], 1, "not among the classes"),
        (["--vocabulary", "{tmp}/none.json"], 1, "cannot read"),
        (["--vocabulary", "{tmp}/not.json"], 1, "is not JSON"),
        (["--vocabulary", "{tmp}/empty.json"], 1, "empty"),
        (["--vocabulary", "{tmp}/mapping.json"], 1, "must hold a list"),
        (["--vocabulary", "{tmp}/prose.txt"], 1, "neither JSON nor lines"),
        (["--vocabulary", "{tmp}/binary.txt"], 1, "not a UTF-8 text file"),
        (["--vocabulary", "{tmp}/nothing.txt"], 1, "empty"),
        (["--classes", "cat", "--vocabulary", "{tmp}/not.json"], 2, "not allowed with"),
        (["--task", "depth"], 2, "invalid choice"),
        (["--threshold", "2"], 2, "between 0 and 1"),
        (["--device", "abacus"], 1, "cannot be loaded"),
        (["--size", "0"], 2, "at least 1"),
        (["--output", "{tmp}/not.json"], 1, "is not a folder"),
        (["--config", "{tmp}/mapping.json"], 2, "unknown argument 'cat'"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(arguments, status, message, tmp_path, command, noise):
    (tmp_path / "not.json").write_text("[cat, dog")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "mapping.json").write_text('{"cat": 1}')
    (tmp_path / "prose.txt").write_text("cats and dogs")
    (tmp_path / "nothing.txt").write_text("0:invalid_class_id\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    output = tmp_path / "out"
    given = (argument.format(tmp=tmp_path) for argument in arguments)
    found, _, errors = command("--images", noise(tmp_path / "a.png"), "--output", output, *given)
    assert (found, len(errors)) == (status, 1), errors
    assert message in errors[0]
    assert not output.exists()


def test_a_checkpoint_folder_that_lacks_something_is_one_line(checkpoint, tmp_path, command, noise):
    path, output = noise(tmp_path / "a.png"), tmp_path / "out"

    def error_of(folder: Path) -> str:
        status, _, errors = command("--images", path, "--output", output, model=folder)
        assert status == 1
        assert len(errors) == 1, errors
        return errors[0]

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    assert "no config.json" in error_of(folder)
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    assert "no weights" in error_of(folder)
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    assert "no image processor" in error_of(folder)
    shutil.copy(checkpoint / "preprocessor_config.json", folder)
    assert "cannot be loaded" in error_of(folder)
    config["clip_model_config"], config["clip_model_name"] = None, "no_such_clip"
    (folder / "config.json").write_text(json.dumps(config))
    assert "no_such_clip" in error_of(folder)
    assert not output.exists()


def test_a_result_never_takes_the_place_of_an_image_given(tmp_path, command, noise):
    paths = [noise(tmp_path / name) for name in ("a.png", "a_overlay.png")]
    status, _, errors = command("--images", *paths, "--output", tmp_path)
    assert status == 1
    assert "would be overwritten" in errors[0]


def test_files_that_cannot_all_be_written_leave_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ITAError, match="cannot write"):
        write_files({tmp_path / "a" / "one": b"1", tmp_path / "folder": b"2"})
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name.startswith(".")]


def test_published_lists_and_json_make_the_same_vocabulary(tmp_path):
    lines, as_json = tmp_path / "list.txt", tmp_path / "list.json"
    lines.write_text("0:invalid_class_id\n1:wall,walls\n\n2:sky,clouds\n")
    as_json.write_text(json.dumps([["wall", "walls"], "sky, clouds"]))
    expected = [["wall", "walls"], ["sky", "clouds"]]
    assert read_vocabulary(lines) == read_vocabulary(as_json) == expected
    lines.write_text("1:wall\n1:sky\n")
    with pytest.raises(ITAError, match="twice"):
        read_vocabulary(lines)


def test_tiles_are_in_what_is_written_and_bad_ones_are_refused_in_a_line(command, noise, tmp_path):
    image, output = noise(tmp_path / "noise.png", (150, 90)), tmp_path / "out"
    arguments = ("--images", image, "--output", output, "--threshold", 0, "--task")
    for task in ("semantic", "panoptic", "instance"):
        status, _, _ = command(*arguments, task, "--tiles", 64, "--tile_overlap", 20, "--batch_size", 3)
        document = json.loads((output / "noise_segments.json").read_text())
        assert (status, document["tiles"]) == (0, {"size": 64, "stride": 44})
        label_map = np.array(Image.open(output / "noise_labels.png"))
        assert label_map.shape == (90, 150)
        for segment in document["segments"]:
            rows, columns = (np.flatnonzero((label_map == segment["id"]).any(axis)) for axis in (1, 0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert segment["bbox"] == box
            assert segment["area"] == (label_map == segment["id"]).sum()
    for options in (("--tiles", 8), ("--tiles", 64, "--tile_overlap", 64), ("--tile_overlap", 8)):
        status, _, errors = command(*arguments, "semantic", *options)
        assert (status, len(errors)) == (2, 1)


def test_bfloat16_weights_give_nearly_the_labels_of_float32(tmp_path, command):
    root, labels = Path(__file__).parents[2], []
    for dtype in ("float32", "bfloat16"):
        arguments = ["--images", root / "examples" / "scene_1.png", "--format", "labels", "--dtype", dtype]
        output = tmp_path / dtype
        assert command(*arguments, "--output", output, model=root / "models" / "ita-tiny")[0] == 0
        labels.append(np.array(Image.open(next(output.glob("*.png")))))
    assert 0.98 < (labels[0] == labels[1]).mean() < 1


def test_resume_repeats_what_another_checkpoint_or_dtype_has_made(checkpoint, command, noise, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    given = ["--images", noise(tmp_path / "noise.png"), "--output", tmp_path / "out", "--resume"]

    def segments(*more):
        return "1 image segmented" in command(*given, *more, model=model)[1]

    assert segments()
    assert not segments()
    assert segments("--dtype", "bfloat16")
    # Trained further: the same names and sizes.
    weights = {name: 1.01 * tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert segments("--dtype", "bfloat16")
    assert not segments("--dtype", "bfloat16")


def test_examples_of_a_file_are_what_the_model_takes_and_part_of_what_is_written(
    command, noise, tmp_path, loaded
):
    image, output = noise(tmp_path / "noise.png", (90, 60)), tmp_path / "out"
    Image.fromarray(np.pad(np.full((20, 30), 255, np.uint8), ((5, 35), (10, 50)))).save(tmp_path / "mask.png")
    boxes = [{"image": "noise.png", "box": [10, 5, 40, 25]}]
    arguments = ("--images", image, "--output", output, "--classes", "mug, wall", "--threshold", 0)
    documents = []
    for name, entries in (("box", boxes), ("mask", [{"image": "noise.png", "mask": "mask.png"}])):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"Mug": entries}))
        status, _, errors = command(*arguments, "--examples", path, "--example_weight", 1)
        assert (status, errors) == (0, [])
        documents.append((output / "noise_segments.json").read_text())
    assert documents[0] == documents[1]
    assert json.loads(documents[0])["examples"]["weight"] == 1
    rows = encode_class_examples(*loaded, {"mug": [(Image.open(image), (10, 5, 40, 25))]})
    segmenter = Segmenter(*loaded, [["mug"], ["wall"]], threshold=0, example_weight=1)
    segmenter._example_options = {"examples": rows, "example_weight": 1}
    [result] = segmenter.segment_images([Image.open(image)])
    assert np.array_equal(result.label_map, np.array(Image.open(output / "noise_labels.png")))
    assert command(*arguments, "--resume", "--examples", path)[1].count("1 image segmented") == 1


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (
            '{"dog": [{"image": "a.png", "box": [0, 0, 99, 9]}]}',
            1,
            "is not inside the image of 48 x 40 pixels",
        ),
        ('{"dog": [{"image": "a.png", "box": [0, 0, 9]}]}', 1, "a box is (left, top, right, bottom)"),
        ('{"dog": [{"image": "a.png", "mask": "small.png"}]}', 1, "the mask is 20 x 20 pixels"),
        ('{"dog": [{"image": "a.png", "mask": "none.png"}]}', 1, "example 1 of 'dog': the segmentation map"),
        ('{"dog": [{"image": "none.png", "box": [0, 0, 9, 9]}]}', 1, "example 1 of 'dog': no such image"),
        ('{"dog": [{"image": "a.png"}]}', 1, "example 1 of 'dog' is {"),
        ('{"dog": []}', 1, "'dog' needs a list of examples"),
        (
            '{"elephant": [{"image": "a.png", "box": [0, 0, 9, 9]}]}',
            1,
            "'elephant', which is not among the classes",
        ),
        ("{}", 1, "is empty"),
        ("[1]", 1, "must be a mapping"),
        (None, 2, "--example_weight is for --examples"),
    ],
)
def test_bad_examples_are_one_line_and_leave_nothing(content, status, message, tmp_path, command, noise):
    Image.new("L", (20, 20), 255).save(tmp_path / "small.png")
    options = ["--example_weight", 0.5]
    if content is not None:
        (tmp_path / "examples.json").write_text(content)
        options = ["--examples", tmp_path / "examples.json"]
    output = tmp_path / "out"
    found, _, errors = command("--images", noise(tmp_path / "a.png"), "--output", output, *options)
    assert (found, len(errors)) == (status, 1), errors
    assert message in errors[0]
    assert not output.exists()
