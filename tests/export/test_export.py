"""The exported network gives what the model gives, on sizes, batches and vocabularies it was not exported with."""

import errno
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.cli.export import export
from ita_segmentation.errors import ITAError
from ita_segmentation.export.network import INPUTS, OUTPUTS, ExportableNetwork
from ita_segmentation.export.onnx_predictor import OnnxPredictor, write_vocabulary
from modeling_ita import ITAForOpenVocabSegmentation

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    checkpoint = save_tiny_checkpoint(folder / "model", encoder_layers=1, decoder_layers=2)
    export(["--model", str(checkpoint), "--output", str(folder / "exported")])
    return checkpoint, folder / "exported"


def assert_same(found, expected):
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert found[name].shape == expected[name].shape
        assert (found[name] - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max()
    assert found.dominant_categories == expected.dominant_categories
    assert found.stuff_ids == expected.stuff_ids
    assert found.vocabulary == expected.vocabulary


@torch.no_grad()
def test_onnxruntime_gives_what_the_model_gives(exported):
    checkpoint, folder = exported
    model = ITAForOpenVocabSegmentation.from_pretrained(checkpoint).eval()
    predictor = OnnxPredictor(folder)
    for batch, height, width in ((1, 64, 96), (3, 96, 64)):
        pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
        mask = torch.ones(batch, height, width, dtype=torch.int64)
        mask[:, -5:] = 0
        assert_same(predictor.outputs(pixels * mask[:, None], mask), model(pixels, pixel_mask=mask))


@torch.no_grad()
@pytest.mark.parametrize("classes", ["cat,wall|brick,tree", "cat", "cat,dog"])
def test_another_vocabulary_serves_the_same_network_also_one_with_fewer_names_than_text_queries(
    exported, classes
):
    checkpoint, folder = exported
    common = ["--model", str(checkpoint), "--output", str(folder)]
    export([*common, "--vocabulary_only", "--classes", classes])
    model = ITAForOpenVocabSegmentation.from_pretrained(checkpoint).eval()
    pixels, mask = torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.int64)
    expected = model(pixels, vocabulary=[names.split("|") for names in classes.split(",")])
    assert_same(OnnxPredictor(folder).outputs(pixels, mask), expected)


class EagerSession:
    """In the place of onnxruntime's: runs the network that would have been exported, which takes no minute."""

    def __init__(self, model):
        self.network = ExportableNetwork(model)

    def get_outputs(self):
        return [SimpleNamespace(name=name) for name in OUTPUTS]

    def run(self, names, inputs):
        return [
            output.numpy() for output in self.network(*(torch.from_numpy(inputs[name]) for name in INPUTS))
        ]


@torch.no_grad()
@pytest.mark.parametrize("source", ["features", "cells"])
def test_any_way_to_select_dominant_categories_takes_vocabularies_of_any_length(
    tmp_path, monkeypatch, source
):
    checkpoint = save_tiny_checkpoint(tmp_path, decoder_layers=1, dominant_category_source=source)
    model = ITAForOpenVocabSegmentation.from_pretrained(checkpoint).eval()
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *arguments, **options: EagerSession(model))
    (tmp_path / "model.onnx").touch()
    pixels, mask = torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.int64)
    for classes in (["cat"], [["cat", "kitty"]], [["cat", "kitty"], "dog"], ["cat", "dog", "tree", "car"]):
        write_vocabulary(model, tmp_path, classes)
        assert_same(OnnxPredictor(tmp_path).outputs(pixels, mask), model(pixels, vocabulary=classes))


def test_few_names_are_refused_where_queries_attend_to_each_other(tmp_path):
    checkpoint = save_tiny_checkpoint(tmp_path / "model", decoder_self_attention=True)
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "out"), "--vocabulary_only"]
    with pytest.raises(ITAError, match="vocabularies of at least 3 names"):
        export([*arguments, "--classes", "cat"])
    export([*arguments, "--classes", "cat,dog,tree"])


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(exported, tmp_path, monkeypatch):
    checkpoint, _ = exported

    def full(model, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ita_segmentation.export.network.to_onnx", full)
    with pytest.raises(ITAError, match="cannot be exported: .*No space left on device"):
        export(["--model", str(checkpoint), "--output", str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []


def test_an_image_becomes_a_map_of_its_own_size(exported):
    predictor = OnnxPredictor(exported[1])
    found = predictor(Image.new("RGB", (50, 40), "green"))
    assert found.shape == (40, 50)
    assert int(found.min()) >= 0 and int(found.max()) < len(predictor.vocabulary)


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path):
    with pytest.raises(ITAError, match="no such checkpoint folder"):
        export(["--model", str(tmp_path / "missing"), "--output", str(tmp_path / "out")])
    checkpoint = save_tiny_checkpoint(tmp_path / "thumbnail", dominant_category_source="thumbnail")
    with pytest.raises(ITAError, match="thumbnail cannot be exported"):
        export(["--model", str(checkpoint), "--output", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.onnx"))


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(ITAError, match=r"not an exported folder: it has no model\.onnx"):
        OnnxPredictor(tmp_path)
