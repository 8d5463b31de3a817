"""Other models as baselines: which label is which class, and checkpoints that cannot be scored."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.tiny_baselines import CLASSES, IS_THING, checkpoint_maker
from ita_segmentation.errors import ITAError
from ita_segmentation.evaluation.baselines.labels import match_labels
from ita_segmentation.evaluation.baselines.loading import is_baseline, load_baseline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_maker(tmp_path_factory)


def semantic_of(predictor) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    return predictor([Image.fromarray(noise)], [(60, 90)], frozenset({"semantic"}))[0].semantic


@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("Dog ", ["dog"]),
        ("road, route", ["road", "street"]),
        ("wall-other-merged", ["wall"]),
        ("door-stuff", ["door"]),
        ("traffic_light", ["traffic light"]),
        ("diningtable", ["table", "dining table"]),
        ("couch", ["sofa", "couch"]),
        ("__background__", ["background"]),
    ],
)
def test_spellings_of_one_class_are_matched(label, names):
    match = match_labels(["zebra", label], [names])
    assert (match.labels, match.classes, match.missing) == ((1,), (0,), ())


@pytest.mark.parametrize("label", ["brick wall", "sea", "other", "wallpaper"])
def test_names_that_merely_resemble_a_class_are_not_matched(label):
    match = match_labels([label, "dog"], [["wall"], ["dog"]])
    assert (match.labels, match.missing) == ((1,), (0,))


def test_the_strictest_match_wins():
    """The label "screen" is the class whose first name it is, not those that have it as a synonym."""
    classes = [["screen door", "screen"], ["blind", "screen"], ["screen"], ["mirror"]]
    match = match_labels(["mirror-stuff", "screen", "mirror", "blind", "screen door"], classes)
    assert dict(zip(match.labels, match.classes, strict=True)) == {1: 2, 2: 3, 3: 1, 4: 0}


def test_a_label_that_names_two_classes_is_neither_and_two_labels_may_be_one_class():
    match = match_labels(
        ["bag", "water-other", "water-merged"], [["handbag", "bag"], ["suitcase", "bag"], ["water"]]
    )
    assert dict(zip(match.labels, match.classes, strict=True)) == {1: 2, 2: 2}
    assert match.missing == (0, 1)


def test_the_last_labels_of_a_list_in_the_same_order_are_matched_by_place():
    shared = [f"thing {letter}" for letter in "abcdefghi"]
    match = match_labels([*shared, "windowpane"], [*([name] for name in shared), ["window"]])
    assert match.missing == ()
    assert match.notes == ("1 of 10 labels are matched by their index: 'windowpane' is 'window'",)


@pytest.mark.parametrize(
    "labels",
    [
        ["thing a", "thing b", "thing c", "windowpane"],  # too few agree
        [*(f"thing {letter}" for letter in "abcdefgih"), "windowpane"],  # another order
        [*(f"thing {letter}" for letter in "abcdefghi"), "windowpane", "zebra"],  # more labels than classes
    ],
)
def test_nothing_is_matched_by_place_in_another_list(labels):
    shared = [f"thing {letter}" for letter in "abcdefghi"[: max(3, len(labels[:10]) - 1)]]
    match = match_labels(labels, [*([name] for name in shared), ["window"]])
    assert match.missing == (len(shared),)


def test_labels_without_a_class_are_background_where_the_benchmark_has_it():
    match = match_labels(["wall", "cat", "sky"], [["background"], ["cat"]])
    assert (match.labels, match.classes, match.missing) == ((0, 1, 2), (0, 1, 0), ())
    match = match_labels(["wall", "cat", "background"], [["background"], ["cat"]])
    assert (match.labels, match.classes) == ((1, 2), (1, 0))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["LABEL_0", "LABEL_1"], "2 labels are placeholders such as 'LABEL_0'"),
        (["zebra", "lion"], r"none of its 2 labels \('zebra', 'lion'\) is one of the 1 classes \('dog'\)"),
    ],
)
def test_lists_that_have_nothing_in_common_are_an_error(labels, message):
    with pytest.raises(ValueError, match=message):
        match_labels(labels, [["dog"]])


def test_a_class_without_a_label_is_an_error_unless_allowed(checkpoint):
    folder = checkpoint("segformer")
    classes = [*CLASSES, ["zebra"], ["lion"]]
    with pytest.raises(ITAError, match="has no label for 2 of the 7 classes: 'zebra', 'lion'"):
        load_baseline(folder, classes, None, "cpu")
    with pytest.warns(UserWarning, match="'zebra', 'lion'; they are scored as never predicted"):
        predictor = load_baseline(folder, classes, None, "cpu", allow_missing=True)
    assert (semantic_of(predictor) == semantic_of(load_baseline(folder, CLASSES, None, "cpu"))).all()


def test_baselines_are_told_from_ita_by_their_config(checkpoint, tmp_path):
    assert is_baseline(checkpoint("segformer"))
    assert not is_baseline(Path(__file__).parents[2] / "models" / "ita-tiny")
    assert not is_baseline(tmp_path / "nowhere")
    assert not is_baseline(Path("nobody/nowhere"))
    assert not is_baseline(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_baseline(tmp_path)


def broken(folder: Path, how: str) -> Path:
    """A copy's files, damaged."""
    weights = folder / "model.safetensors"
    if how in ("config.json", "preprocessor_config.json", "model.safetensors", "tokenizer.json"):
        (folder / how).unlink()
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "lacking":
        kept = {key: value for key, value in load_file(weights).items() if "classifier" not in key}
        save_file(kept, weights, metadata={"format": "pt"})
    elif how == "placeholders":
        change_config(folder, id2label={str(index): f"LABEL_{index}" for index in range(5)})
    elif how == "another kind":
        change_config(folder, model_type="bert")
    elif how == "not JSON":
        (folder / "config.json").write_text("{")
    return folder


def change_config(folder: Path, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("segformer", "config.json", "is not a checkpoint folder: it has no config.json"),
        ("segformer", "not JSON", "config.json of .* cannot be read"),
        ("segformer", "preprocessor_config.json", "has no image processor"),
        ("segformer", "model.safetensors", "cannot be loaded: .*model.safetensors"),
        ("segformer", "cut off", "cannot be loaded"),
        ("segformer", "lacking", r"lacks 2 of its weights, such as decode_head\.classifier"),
        ("segformer", "placeholders", "cannot be scored here: its 5 labels are placeholders"),
        ("segformer", "another kind", "is a bert model"),
        ("clipseg", "tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_bad_checkpoint_is_one_line(name, how, message, checkpoint, tmp_path):
    folder = broken(shutil.copytree(checkpoint(name), tmp_path / "copy"), how)
    with pytest.raises(ITAError, match=message) as caught:
        load_baseline(folder, CLASSES, IS_THING, "cpu")
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere", "nobody/nowhere"])
def test_a_checkpoint_that_is_not_there_is_one_line(path):
    with pytest.raises(ITAError, match=f"no (such )?checkpoint folder:? {path}"):
        load_baseline(Path(path), CLASSES, IS_THING, "cpu")


def test_weights_that_dpt_never_uses_may_be_missing(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("dpt"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    unused = [key for key in weights if key.startswith("neck.fusion_stage.layers.0.residual_layer1.")]
    assert unused
    save_file(
        {k: v for k, v in weights.items() if k not in unused}, folder / "model.safetensors", {"format": "pt"}
    )
    predictor = load_baseline(folder, CLASSES, IS_THING, "cpu")
    whole = load_baseline(checkpoint("dpt"), CLASSES, IS_THING, "cpu")
    assert (semantic_of(predictor) == semantic_of(whole)).all()


def test_loading_says_nothing(checkpoint, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_baseline(checkpoint("segformer"), CLASSES, IS_THING, "cpu")
    assert capfd.readouterr() == ("", "")
