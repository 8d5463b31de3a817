"""The exported network gives what the model gives, on sizes, batches and vocabularies it was not exported with."""

import pytest
import torch

from helpers.tiny_checkpoint import save_tiny_checkpoint
from ita_segmentation.cli.export import export
from ita_segmentation.errors import ITAError
from ita_segmentation.export.onnx_predictor import OnnxPredictor
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
def test_another_vocabulary_serves_the_same_network(exported):
    checkpoint, folder = exported
    export(
        [
            "--model",
            str(checkpoint),
            "--output",
            str(folder),
            "--vocabulary_only",
            "--classes",
            "cat,wall|brick,tree",
        ]
    )
    model = ITAForOpenVocabSegmentation.from_pretrained(checkpoint).eval()
    pixels, mask = torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.int64)
    expected = model(pixels, vocabulary=["cat", ["wall", "brick"], "tree"])
    assert_same(OnnxPredictor(folder).outputs(pixels, mask), expected)


def test_an_image_becomes_a_map_of_its_own_size(exported):
    from PIL import Image

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
    with pytest.raises(FileNotFoundError, match=r"no exported folder: it has no model\.onnx"):
        OnnxPredictor(tmp_path)
