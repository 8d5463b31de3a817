"""The door that segments images: what it writes, and one clear line for everything that is wrong."""

import functools
import io
import json
import logging
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.tiny_checkpoint import CLASSES, save_tiny_checkpoint
from ita_segmentation.checkpoints import load_checkpoint
from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.cli import predict as run_predict
from ita_segmentation.errors import ITAError
from ita_segmentation.files import write_files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


load_once = functools.cache(load_checkpoint)


@pytest.fixture
def door_run(monkeypatch, capsys):
    """Runs the door as the command line does; gives its status, stdout and the lines of stderr."""
    monkeypatch.setattr(run_predict, "load_checkpoint", load_once)

    def run(*arguments) -> tuple[int, str, list[str]]:
        monkeypatch.setattr("sys.argv", ["run_predict.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run_predict.main()
        status = exit_info.value.code
        printed = capsys.readouterr()
        lines = (
            printed.err.splitlines() if isinstance(status, int) else [str(status), *printed.err.splitlines()]
        )
        return (
            (status if isinstance(status, int) else 1),
            printed.out,
            [line for line in lines if line.strip()],
        )

    return run


def image(path: Path, size=(48, 40), seed=0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_each_image_gets_an_overlay_a_label_map_and_a_segments_file(task, checkpoint, tmp_path, door_run):
    path, output = image(tmp_path / "a.png"), tmp_path / "out"
    threshold = [] if task == "semantic" else ["--threshold", "0"]
    status, _, errors = door_run(
        *("--model", checkpoint, "--images", path, "--classes", "cat, sofa|couch, wall"),
        *("--task", task, "--output", output, *threshold),
    )
    assert (status, errors) == (0, [])
    assert sorted(file.name for file in output.iterdir()) == [
        "a_labels.png",
        "a_overlay.png",
        "a_segments.json",
    ]
    document = json.loads((output / "a_segments.json").read_text())
    labels = np.array(Image.open(output / "a_labels.png"))
    assert labels.shape == (40, 48)
    assert labels.dtype == np.uint8
    assert (document["width"], document["height"], document["task"]) == (48, 40, task)
    assert document["vocabulary"] == [["cat"], ["sofa", "couch"], ["wall"]]
    assert {segment["id"] for segment in document["segments"]} | {0} == set(labels.ravel().tolist()) | {0}
    for segment in document["segments"]:
        assert segment["label"] == document["vocabulary"][segment["label_id"]][0]
        x, y, width, height = segment["bbox"]
        mask = labels == segment["id"]
        assert mask.sum() == segment["area"] == mask[y : y + height, x : x + width].sum()
        assert (segment["score"] is None) == (task == "semantic")
    assert Image.open(output / "a_overlay.png").height >= 40


def test_without_classes_the_checkpoints_own_are_used(checkpoint, tmp_path, door_run):
    path = image(tmp_path / "a.png")
    assert door_run("--model", checkpoint, "--images", path, "--output", tmp_path / "out")[0] == 0
    document = json.loads((tmp_path / "out" / "a_segments.json").read_text())
    assert [names[0] for names in document["vocabulary"]] == ["sky", "dog", "grass", "car"]
    assert len(CLASSES) == 4


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 3000)])
def test_an_image_of_any_shape_is_segmented_at_its_own_size(size, checkpoint, tmp_path, door_run):
    path = image(tmp_path / "a.png", size)
    status, _, errors = door_run("--model", checkpoint, "--images", path, "--output", tmp_path / "out")
    assert (status, errors) == (0, [])
    assert Image.open(tmp_path / "out" / "a_labels.png").size == size


def test_a_turned_grey_image_gives_maps_as_a_person_sees_it(checkpoint, tmp_path, door_run):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert (
        door_run("--model", checkpoint, "--images", tmp_path / "a.jpg", "--output", tmp_path / "out")[0] == 0
    )
    assert Image.open(tmp_path / "out" / "a_labels.png").size == (20, 30)


def test_more_than_256_classes_need_a_label_map_of_16_bits(checkpoint, tmp_path, door_run):
    vocabulary = tmp_path / "many.json"
    vocabulary.write_text(json.dumps([f"thing {number}" for number in range(257)]))
    path = image(tmp_path / "a.png")
    arguments = (
        "--model",
        checkpoint,
        "--images",
        path,
        "--vocabulary",
        vocabulary,
        "--output",
        tmp_path / "out",
    )
    assert door_run(*arguments)[0] == 0
    document = json.loads((tmp_path / "out" / "a_segments.json").read_text())
    labels = np.array(Image.open(tmp_path / "out" / "a_labels.png"))
    assert labels.dtype == np.uint16
    assert {segment["id"] for segment in document["segments"]} == set(labels.ravel().tolist())


def test_images_of_one_name_in_different_folders_do_not_overwrite_each_other(checkpoint, tmp_path, door_run):
    paths = [image(tmp_path / folder / "a.png", seed=index) for index, folder in enumerate("xyz")]
    paths.append(image(tmp_path / "x" / "a_2.png"))
    output = tmp_path / "out"
    assert door_run("--model", checkpoint, "--images", *paths, paths[0], "--output", output)[0] == 0
    documents = [json.loads(file.read_text()) for file in output.glob("*_segments.json")]
    assert sorted(document["image"] for document in documents) == sorted(map(str, paths))
    assert len(list(output.iterdir())) == 12


def test_names_are_told_apart_whatever_their_case_and_suffix():
    paths = [Path("x/a.png"), Path("y/A.jpg"), Path("z/a.png"), Path("a_2.png")]
    assert run_predict.output_names(paths) == ["a", "A_3", "a_4", "a_2"]


def test_images_that_fail_are_named_and_the_others_are_done(checkpoint, tmp_path, door_run):
    folder, output = tmp_path / "in", tmp_path / "out"
    image(folder / "good.png")
    (folder / "bad.jpg").write_text("this is no image")
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not looked at")
    status, out, errors = door_run("--model", checkpoint, "--images", folder, "--output", output)
    assert status == 1
    assert "1 image segmented" in out
    text = "\n".join(errors)
    assert "2 of 3 images failed" in text
    assert "bad.jpg is not an image" in text
    assert "empty.png is empty" in text
    assert sorted(file.name for file in output.iterdir()) == [
        "good_labels.png",
        "good_overlay.png",
        "good_segments.json",
    ]


def test_a_config_file_gives_arguments_and_the_command_line_goes_before_it(checkpoint, tmp_path, door_run):
    config = tmp_path / "arguments.yaml"
    content = {
        "model": str(checkpoint),
        "images": [str(image(tmp_path / "a.png"))],
        "classes": "cat, dog",
        "task": "panoptic",
        "output": str(tmp_path / "from_file"),
    }
    config.write_text(yaml.safe_dump(content))
    assert door_run("--config", config, "--output", tmp_path / "out", "--task", "semantic")[0] == 0
    document = json.loads((tmp_path / "out" / "a_segments.json").read_text())
    assert document["task"] == "semantic"
    assert document["vocabulary"] == [["cat"], ["dog"]]
    assert not (tmp_path / "from_file").exists()


def test_a_name_longer_than_the_context_is_a_warning_that_names_it(checkpoint, tmp_path, door_run, caplog):
    name = "a very long name of a thing that goes on and on and never seems to come to any end at all"
    path = image(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        status = door_run(
            "--model", checkpoint, "--images", path, "--classes", f"cat, {name}", "--output", tmp_path / "out"
        )[0]
    assert status == 0
    assert any(name in record.getMessage() for record in caplog.records)


# Bad input: one line, a non-zero status, nothing written


def truncated(path: Path) -> Path:
    image(path, (200, 200))
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


def text_file(path: Path) -> Path:
    path.write_text("hello")
    return path


def zero_bytes(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda path: path, "missing.jpg", "no such image or folder"),
        (truncated, "cut.png", "cannot be read as an image"),
        (truncated, "cut.jpg", "cannot be read as an image"),
        (zero_bytes, "zero.png", "is empty"),
        (empty_folder, "folder", "no images in the folder"),
        (text_file, "text.jpg", "is not an image"),
        (bomb, "bomb.png", "178,956,970 pixels"),
    ],
)
def test_a_bad_image_is_one_line_and_leaves_nothing(make, name, message, checkpoint, tmp_path, door_run):
    path, output = make(tmp_path / name), tmp_path / "out"
    status, out, errors = door_run("--model", checkpoint, "--images", path, "--output", output)
    assert status != 0
    assert len(errors) == 1
    assert message in errors[0]
    assert name in errors[0]
    assert out == ""
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", ""], "empty"),
        (["--classes", " , cat"], "empty name"),
        (["--classes", "cat, sofa||couch"], "empty name"),
        (["--vocabulary", "{tmp}/none.json"], "cannot read"),
        (["--vocabulary", "{tmp}/not.json"], "is not JSON"),
        (["--vocabulary", "{tmp}/empty.json"], "empty"),
        (["--vocabulary", "{tmp}/mapping.json"], "must hold a list"),
        (["--vocabulary", "{tmp}/prose.txt"], "neither JSON nor lines"),
        (["--vocabulary", "{tmp}/binary.txt"], "not a UTF-8 text file"),
        (["--vocabulary", "{tmp}/nothing.txt"], "empty"),
        (["--classes", "cat", "--vocabulary", "{tmp}/not.json"], "not allowed with"),
        (["--task", "depth"], "invalid choice"),
        (["--task", "panoptic", "--threshold", "2"], "between 0 and 1"),
        (["--threshold", "0.5"], "panoptic and instance"),
        (["--device", "abacus"], "cannot be loaded"),
        (["--size", "0"], "at least 1"),
        (["--output", "{tmp}/not.json"], "is not a folder"),
        (["--config", "{tmp}/mapping.json"], "unknown argument 'cat'"),
        (["--config", "{tmp}/prose.txt"], "must hold arguments"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(arguments, message, checkpoint, tmp_path, door_run):
    (tmp_path / "not.json").write_text("[cat, dog")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "mapping.json").write_text('{"cat": 1}')
    (tmp_path / "prose.txt").write_text("cats and dogs")
    (tmp_path / "nothing.txt").write_text("0:invalid_class_id\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    path, output = image(tmp_path / "a.png"), tmp_path / "out"
    status, _, errors = door_run(
        *("--model", checkpoint, "--images", path, "--output", output),
        *(argument.format(tmp=tmp_path) for argument in arguments),
    )
    assert status != 0
    assert len(errors) == 1, errors
    assert message in errors[0]
    assert not output.exists()


def test_a_checkpoint_that_is_none_is_one_line(checkpoint, tmp_path, door_run):
    path, output = image(tmp_path / "a.png"), tmp_path / "out"

    def error_of(folder: Path) -> str:
        status, _, errors = door_run("--model", folder, "--images", path, "--output", output)
        assert status == 1
        assert len(errors) == 1, errors
        return errors[0]

    assert "no such checkpoint folder" in error_of(tmp_path / "nowhere")
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


def test_a_checkpoint_that_lacks_some_weights_is_refused(checkpoint, tmp_path, door_run):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("void_embedding")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = image(tmp_path / "a.png")
    status, _, errors = door_run("--model", folder, "--images", path, "--output", tmp_path / "out")
    assert status == 1
    assert "lacks 1 of its weights, such as void_embedding" in errors[-1]


def test_a_result_never_takes_the_place_of_an_image_given(checkpoint, tmp_path, door_run):
    paths = [image(tmp_path / name) for name in ("a.png", "a_overlay.png")]
    status, _, errors = door_run("--model", checkpoint, "--images", *paths, "--output", tmp_path)
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
