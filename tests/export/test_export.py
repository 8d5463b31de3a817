"""The exported networks give what the model gives, on sizes, batches and vocabularies they were not exported with."""

import errno
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.exported import (
    ROOT,
    assert_same,
    browser_labels,
    onnxruntime_web,
    run_eagerly,
    serve_triton,
    without_torch,
    write_without_graphs,
)
from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.cli.export import export
from ita_segmentation.errors import ITAError
from ita_segmentation.export import OnnxPredictor
from ita_segmentation.export.triton import arrange_for_triton
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor

SHIPPED = ROOT / "models" / "ita-tiny"
EXAMPLE = SHIPPED / "examples" / "scene_1.png"
NEW_CLASSES = ["cat", ["wall", "brick"], "tree", "a thing with a rather long name"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The shipped checkpoint with the page for browsers, which has all that the other formats have."""
    pytest.importorskip("onnxruntime", reason="running ONNX needs onnxruntime")
    pytest.importorskip("onnxscript", reason="exporting needs onnxscript")
    folder = tmp_path_factory.mktemp("export") / "exported"
    options = ["--onnxruntime_web", str(onnxruntime_web())] if onnxruntime_web() else []
    export(["--model", str(SHIPPED), "--output", str(folder), "--target", "web", *options])
    return folder


def load(checkpoint=SHIPPED):
    model = ITAForOpenVocabSegmentation.from_pretrained(checkpoint)
    return model.eval(), ITAImageProcessor.from_pretrained(checkpoint)


def noise(*sizes):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, NEW_CLASSES, ["cat"]])
def test_onnxruntime_gives_what_the_model_gives_alone_for_images_of_different_sizes_and_new_words(
    exported, classes
):
    model, processor = load()
    # The second and the third have one padded size.
    images = [Image.open(EXAMPLE), *noise((196, 250), (192, 240), (300, 200))]
    found = OnnxPredictor(exported).outputs(images, classes)
    for image, one in zip(images, found, strict=True):
        expected = model(**processor(images=image, return_tensors="pt"), vocabulary=classes)
        assert_same(one, expected)


@torch.no_grad()
def test_a_process_that_cannot_import_torch_gives_the_same_segments(exported, tmp_path):
    model, processor = load()
    image = ROOT / "examples" / "scene_2.jpg"
    names = ["sky", "tent", "zebra|striped horse", "a new word"]
    without_torch(exported, image, tmp_path / "found.npz", names)
    found = np.load(tmp_path / "found.npz")
    read = Image.open(image).convert("RGB")
    inputs = processor(images=read, return_tensors="pt")
    outputs = model(**inputs, vocabulary=[name.split("|") for name in names])
    size = [read.size[::-1]]
    semantic = processor.post_process_semantic_segmentation(outputs, size)[0].numpy()
    assert (found["semantic"] == semantic).mean() >= 0.999
    for task in ("panoptic", "instance"):
        post_process = getattr(processor, f"post_process_{task}_segmentation")
        expected = post_process(outputs, target_sizes=size, threshold=0.1)[0]
        assert (found[task] == expected["segmentation"].numpy()).mean() >= 0.999
        scores = [segment["score"] for segment in expected["segments_info"]]
        assert found[f"{task}_scores"] == pytest.approx(scores, abs=1e-4)
        assert len(scores) > 1


def test_the_copy_in_the_folder_is_a_command(exported, tmp_path):
    command = [sys.executable, "-m", "ita_onnx", str(EXAMPLE), "--classes", "water, concrete, unicorn"]
    common = {"cwd": exported, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--output", str(tmp_path / "map.png")], **common)
    assert done.returncode == 0, done.stderr
    assert '{"id": 0, "label": "water", "share": 0.25' in done.stdout
    assert "unicorn" not in done.stdout
    assert set(np.unique(Image.open(tmp_path / "map.png"))) == {0, 1, 255}
    failed = subprocess.run([*command[:-1], "cat,,dog"], **common)
    assert failed.returncode == 1
    assert failed.stderr == "error: class 1 of the vocabulary has an empty name: ['']\n"


@pytest.mark.slow
def test_an_environment_with_onnxruntime_numpy_pillow_and_tokenizers_is_enough(exported, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = ["onnxruntime", "numpy", "pillow", "tokenizers"]
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"packages cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    command = [python, "-m", "ita_onnx", str(EXAMPLE), "--classes", "water, a new word"]
    done = subprocess.run(command, cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"water"' in done.stdout


@pytest.mark.browser
@pytest.mark.parametrize(
    ("task", "classes", "least"),
    [
        ("semantic", ["water", "concrete", "teddy bear|brown toy", "french fries", "unicorn"], 0.99),
        ("panoptic", ["water", "concrete", "teddy bear", "french fries"], 0.99),
        ("instance", ["teddy bear", "french fries", "skateboard"], 0.99),
    ],
)
def test_the_page_finds_in_a_browser_what_python_finds(exported, task, classes, least):
    labels, names = browser_labels(exported, EXAMPLE, classes, task)
    predictor = OnnxPredictor(exported)
    threshold = {"semantic": 0.5, "panoptic": 0.8, "instance": 0.5}[task]
    given = [one.split("|") for one in classes]
    options = {"ignore_index": 65535} if task == "semantic" else {}
    found = predictor(EXAMPLE, given, task, threshold=threshold, distractors=True, **options)
    expected = found if task == "semantic" else found["segmentation"]
    assert len(np.unique(expected)) > 2
    assert (labels.reshape(expected.shape) == expected).mean() >= least
    assert any(one.split("|")[0] in names for one in classes)


def test_a_page_without_a_folder_of_the_runtime_names_its_version_on_the_network(tmp_path):
    from ita_segmentation.export import web_page

    for name in ("model.onnx", "text.onnx"):
        (tmp_path / name).touch()
    web_page.write_web_page(tmp_path, SHIPPED)
    script = (tmp_path / "onnxruntime.js").read_text()
    assert f"onnxruntime-web@{web_page.RUNTIME_VERSION}/dist/" in script
    assert "sdk: static" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "examples" / "scene_1.png").is_file()
    with pytest.raises(ITAError, match="is not the npm package onnxruntime-web"):
        web_page.write_web_page(tmp_path, SHIPPED, tmp_path)


@pytest.fixture(scope="module")
def repository(exported, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("triton") / "folder"
    shutil.copytree(exported, folder)
    arrange_for_triton(folder)
    return folder


def test_the_model_repository_describes_the_networks_in_tritons_own_types(repository):
    types = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format
    from onnxruntime import InferenceSession

    for name in ("ita_image", "ita_text"):
        folder = repository / "model_repository" / name
        config = text_format.Parse((folder / "config.pbtxt").read_text(), types.ModelConfig())
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 0)
        session = InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        for described, values in (
            (config.input, session.get_inputs()),
            (config.output, session.get_outputs()),
        ):
            assert [one.name for one in described] == [value.name for value in values]
            for one, value in zip(described, values, strict=True):
                fixed = [side if isinstance(side, int) else -1 for side in value.shape]
                assert list(one.dims) == fixed
                kind = {"tensor(float)": "FP32", "tensor(int64)": "INT64", "tensor(bool)": "BOOL"}[value.type]
                assert types.DataType.Name(one.data_type) == f"TYPE_{kind}"


def test_a_client_of_triton_finds_what_onnxruntime_finds(exported, repository):
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    from ita_segmentation.export.ita_onnx.triton import TritonRunner

    classes = ["water", "a new word", "concrete"]
    with serve_triton(repository / "model_repository") as address:
        remote = OnnxPredictor(repository, run=TritonRunner(address))
        assert (remote(EXAMPLE, classes) == OnnxPredictor(exported)(EXAMPLE, classes)).all()
        with pytest.raises(ValueError, match="Triton cannot run ita_none"):
            TritonRunner(address)("none", {})


# --- without exporting anything -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"dominant_category_source": "features"},
        {"dominant_category_source": "cells"},
        {"dominant_category_source": "cells", "text_query_class_bias": True, "text_query_regions": True},
    ],
    ids=["features", "cells", "own_class"],
)
def test_any_way_to_select_dominant_categories_takes_vocabularies_of_any_length(tmp_path, options):
    checkpoint = save_tiny_checkpoint(tmp_path, decoder_layers=1, **options)
    model, processor = load(checkpoint)
    write_without_graphs(model, processor, tmp_path / "exported")
    predictor = OnnxPredictor(tmp_path / "exported", run=run_eagerly(model))
    [image] = noise((64, 96))
    for classes in (["cat"], [["cat", "kitty"]], [["cat", "kitty"], "dog"], ["cat", "dog", "tree", "car"]):
        [found] = predictor.outputs([image], classes)
        assert_same(found, model(**processor(images=image, return_tensors="pt"), vocabulary=classes))


def test_few_names_are_refused_where_queries_attend_to_each_other(tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "model", decoder_self_attention=True)
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "out"), "--vocabulary_only"]
    with pytest.raises(ITAError, match="vocabularies of at least 3 names"):
        export([*arguments, "--classes", "cat"])
    model, processor = load(checkpoint)
    write_without_graphs(model, processor, tmp_path / "out")
    predictor = OnnxPredictor(tmp_path / "out", run=run_eagerly(model))
    with pytest.raises(ValueError, match="vocabularies of at least 3 names"):
        predictor.encode(["cat"])
    assert len(predictor.encode(["cat", "dog"]).candidates) == 3


def test_other_default_classes_are_written_without_exporting_again(tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--model", str(checkpoint), "--output", str(out), "--vocabulary_only"]
    export([*arguments, "--classes", "cat, wall|brick"])
    (out / "preprocessor_config.json").write_text("{}")
    predictor = OnnxPredictor(out, run=lambda *inputs: pytest.fail("nothing is left to encode"))
    found = predictor.encode()
    assert found.classes == predictor.vocabulary == [["cat"], ["wall", "brick"]]
    model, _ = load(checkpoint)
    expected = model.encode_vocabulary(predictor.vocabulary)
    assert np.abs(found.inputs["prompt_embeds"] - expected.prompt_embeds.numpy()).max() < 1e-6
    assert found.inputs["is_seen"].tolist() == expected.is_seen.tolist()
    assert predictor.settings["own_classes"] == [list(names) for names in model.default_vocabulary]


def test_the_package_in_the_repository_can_be_imported_without_torch():
    code = "import sys; import ita_segmentation.export.ita_onnx; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_full_disk_is_one_line_and_leaves_no_network_half_written(tmp_path, monkeypatch):
    def full(model, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ita_segmentation.export.folder.to_onnx", full)
    with pytest.raises(ITAError, match="cannot be exported: .*No space left on device"):
        export(["--model", str(SHIPPED), "--output", str(tmp_path / "out")])
    assert not [file for file in (tmp_path / "out").iterdir() if "onnx" in file.name and file.is_file()]
    assert not list((tmp_path / "out").glob(".*"))


def test_graphs_do_not_say_where_they_were_made(exported):
    for name in ("model.onnx", "text.onnx"):
        assert b"site-packages" not in (exported / name).read_bytes()


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path):
    with pytest.raises(ITAError, match="no such checkpoint folder"):
        export(["--model", str(tmp_path / "missing"), "--output", str(tmp_path / "out")])
    with pytest.raises(ITAError, match="--onnxruntime_web is for --target web"):
        export(["--model", str(SHIPPED), "--output", str(tmp_path / "out"), "--onnxruntime_web", "x"])
    checkpoint = save_tiny_checkpoint(tmp_path / "thumbnail", dominant_category_source="thumbnail")
    with pytest.raises(ITAError, match="thumbnail cannot be exported"):
        export(["--model", str(checkpoint), "--output", str(tmp_path / "out")])
    checkpoint = save_tiny_checkpoint(tmp_path / "bicubic")
    ITAImageProcessor(resample=3).save_pretrained(checkpoint)
    with pytest.raises(ITAError, match="bilinearly"):
        export(["--model", str(checkpoint), "--output", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.onnx"))


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"not an exported folder: it has no model\.onnx"):
        OnnxPredictor(tmp_path)
