"""States that merge, go to disk and are gathered across processes; the metrics as modules of `evaluate`."""

import socket
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

from ita_segmentation.evaluation import (
    ConfusionMatrix,
    MaskAP,
    MaskAveragePrecision,
    MeanIoU,
    PanopticQuality,
    PanopticQualityMetric,
)

NUM_CLASSES = 4
SEEN = [True, False, True, False]
SCRIPTS = Path(__file__).parents[2] / "ita_segmentation" / "evaluation" / "metrics" / "modules"
OPTIONS: dict[type, dict[str, Any]] = {MeanIoU: {}, PanopticQualityMetric: {"is_thing": SEEN}, MaskAP: {}}
MODULES = list(OPTIONS)
METRICS = [ConfusionMatrix, PanopticQuality, MaskAveragePrecision]


@pytest.fixture(autouse=True)
def no_cache_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluate.module.config.HF_METRICS_CACHE", str(tmp_path))


def examples(module: type, count: int, seed: int = 0) -> tuple[list, list]:
    """Predictions and references of so many small images of different sizes, as the module takes them."""
    rng = np.random.default_rng(seed)
    predictions: list[Any] = []
    references: list[Any] = []
    for index in range(count):
        shape = (10, int(rng.integers(10, 20)))
        segments = rng.integers(1, 5, shape[1]).repeat(10).reshape(shape[1], 10).T  # one id a column
        moved = np.roll(segments, 1, axis=1)
        ids = np.unique(segments).tolist()
        masks = segments == np.array(ids)[:, None, None]
        if module is MeanIoU:
            predictions.append(moved - 1)
            references.append(np.where(rng.random(shape) < 0.1, 255, segments - 1))
        elif module is PanopticQualityMetric:
            found = [{"id": i, "label_id": i - 1, "score": 0.5} for i in ids]
            known = [{"id": i, "category_id": i - 1, "iscrowd": i == 4} for i in ids]
            predictions.append({"segmentation": moved, "segments_info": found})
            references.append({"segmentation": segments, "segments_info": known})
        else:
            labels = [i - 1 for i in ids]
            scores = rng.integers(0, 3, len(ids)) / 2
            predictions.append({"scores": scores, "labels": labels, "masks": np.roll(masks, 1, axis=2)})
            references.append({"image_id": seed * 1000 + index, "labels": labels, "masks": masks})
    return predictions, references


def new(module: type, **kwargs):
    return module(num_classes=NUM_CLASSES, **OPTIONS[module], **kwargs)


def state_of(module: type, part: slice = slice(None)):
    """The metric behind a module, with some of seven examples."""
    metric = new(module)
    predictions, references = examples(module, 7)
    metric.add_batch(predictions=predictions[part], references=references[part])
    return metric.state


@pytest.mark.parametrize("module", MODULES)
def test_parts_merge_to_the_whole_in_any_order_and_through_arrays(module):
    whole = state_of(module).compute(SEEN)
    first, second, third = (state_of(module, part) for part in (slice(0, 2), slice(2, 6), slice(6, 7)))
    third.merge_state(first)
    total = new(module).state
    total.merge_arrays(third.arrays())
    total.merge_arrays(second.arrays())
    assert repr(total.compute(SEEN)) == repr(whole)
    assert (
        whole[{MeanIoU: "miou_unseen", PanopticQualityMetric: "pq_unseen", MaskAP: "ap_unseen"}[module]] < 1
    )


@pytest.mark.parametrize("module", MODULES)
def test_computing_with_other_flags_is_not_answered_from_a_cache_and_a_reset_forgets(module):
    metric = state_of(module)
    one, other = metric.compute(SEEN), metric.compute([not flag for flag in SEEN])
    names = [name for name in one if name.endswith("_seen") and not name.startswith("num")]
    assert [one[name] for name in names] == [other[name.replace("_seen", "_unseen")] for name in names]
    metric.reset()
    assert not any(array.any() for array in metric.arrays().values())


@pytest.mark.parametrize("metric", METRICS)
def test_states_of_other_classes_or_metrics_are_refused(metric):
    with pytest.raises(ValueError, match="of 2 classes"):
        metric(2).merge_arrays({"matrix": np.zeros((3, 3), int)})
    with pytest.raises(ValueError, match="do not merge"):
        metric(2).merge_state(metric(3))


def gather(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for module in MODULES:
        for name, part in (
            ("uneven", slice(0, 5) if rank == 0 else slice(5, 7)),
            ("one", slice(7 * (1 - rank))),
        ):
            scores = state_of(module, part).compute(SEEN)
            Path(folder, f"{module.__name__}-{name}-{rank}.txt").write_text(repr(scores))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one_also_when_one_has_no_image(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(gather, (port, str(tmp_path)), nprocs=2)
    for module in MODULES:
        expected = repr(state_of(module).compute(SEEN))
        written = {path.name: path.read_text() for path in tmp_path.glob(f"{module.__name__}-*.txt")}
        assert len(written) == 4
        assert set(written.values()) == {expected}, module


# Modules of `evaluate`


@pytest.mark.parametrize("module", MODULES)
def test_batches_of_any_size_give_the_same_scores_and_computing_starts_over(module):
    predictions, references = examples(module, 7)
    at_once = new(module).compute(predictions=predictions, references=references, seen=SEEN)
    metric = new(module)
    for _ in range(2):
        metric.add_batch(predictions=predictions[:4], references=references[:4])
        for prediction, reference in zip(predictions[4:6], references[4:6], strict=True):
            metric.add(prediction=prediction, reference=reference)
        assert len(metric) == 6
        scores = metric.compute(predictions=predictions[6:], references=references[6:], seen=SEEN)
        assert repr(scores) == repr(at_once)
        assert len(metric) == 0


def test_evaluate_loads_each_module_by_its_path_and_combines_it_with_others(monkeypatch, tmp_path):
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(folder)  # before any other folder that holds a package `evaluate_modules`
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        monkeypatch.delitem(sys.modules, name)
    for script, module in zip(("mean_iou", "panoptic_quality", "mask_ap"), MODULES, strict=True):
        loaded = evaluate.load(
            str(SCRIPTS / f"{script}.py"), num_classes=NUM_CLASSES, cache_dir=str(tmp_path), **OPTIONS[module]
        )
        predictions, references = examples(module, 3)
        together = evaluate.combine([loaded])
        together.add_batch(predictions=predictions[:2], references=references[:2])
        together.add(prediction=predictions[2], reference=references[2])
        assert repr(together.compute()) == repr(
            new(module).compute(predictions=predictions, references=references)
        )
        assert "references" in repr(loaded)


@pytest.mark.parametrize(
    "form", [np.asarray, torch.from_numpy, np.ndarray.tolist, lambda m: list(map(Image.fromarray, m))]
)
def test_maps_may_come_as_a_stack_a_tensor_images_or_nested_lists(form):
    predictions, references = np.random.default_rng(0).integers(0, 4, (2, 3, 8, 9)).astype(np.uint8)
    expected = new(MeanIoU).compute(predictions=list(predictions), references=list(references))
    scores = new(MeanIoU).compute(predictions=form(predictions), references=form(references))
    assert repr(scores) == repr(expected)


@pytest.mark.parametrize("module", MODULES)
def test_a_batch_with_one_bad_example_counts_nothing_of_it(module):
    predictions, references = examples(module, 3)
    metric = new(module)
    metric.add_batch(predictions=predictions, references=references)
    before = {name: array.tobytes() for name, array in metric.state.arrays().items()}
    predictions, references = examples(module, 3, seed=1)
    if module is MeanIoU:
        references[2] = references[2] + 7
    else:
        del references[2][{PanopticQualityMetric: "segments_info", MaskAP: "image_id"}[module]]
    with pytest.raises(ValueError, match="label|has no segments_info|has no image_id"):
        metric.add_batch(predictions=predictions, references=references)
    assert {name: array.tobytes() for name, array in metric.state.arrays().items()} == before
    assert len(metric) == 3
    with pytest.raises(ValueError, match="3 predictions and 1 references"):
        metric.add_batch(predictions=predictions, references=references[:1])
    with pytest.raises(ValueError, match="only one of them"):
        metric.compute(predictions=predictions)
