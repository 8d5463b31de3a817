"""The scores as modules of `evaluate`: batches, flat memory, several processes, nothing half counted."""

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from ita_segmentation.evaluation import ConfusionMatrix, MaskAveragePrecision, PanopticQuality
from ita_segmentation.evaluation.metrics.evaluate_modules import MaskAP, MeanIoU, PanopticQualityMetric

NUM_CLASSES = 4
SCRIPTS = Path(__file__).parents[2] / "ita_segmentation" / "evaluation" / "metrics" / "modules"
OPTIONS: dict[type, dict[str, Any]] = {
    MeanIoU: {},
    PanopticQualityMetric: {"is_thing": [True, False, True, False]},
    MaskAP: {},
}
MODULES = list(OPTIONS)


@pytest.fixture(autouse=True)
def no_cache_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
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


@pytest.mark.parametrize("module", MODULES)
def test_batches_of_any_size_one_by_one_and_all_at_once_give_the_same_scores(module):
    predictions, references = examples(module, 7)
    at_once = new(module).compute(predictions=predictions, references=references)
    metric = new(module)
    metric.add_batch(predictions=predictions[:4], references=references[:4])
    for prediction, reference in zip(predictions[4:6], references[4:6], strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert len(metric) == 6
    assert repr(metric.compute(predictions=predictions[6:], references=references[6:])) == repr(at_once)


@pytest.mark.parametrize("module", MODULES)
def test_scores_are_those_of_the_state_with_seen_and_unseen_means(module):
    predictions, references = examples(module, 5)
    seen = [True, True, False, False]
    scores = new(module).compute(predictions=predictions, references=references, seen=seen)
    if module is MeanIoU:
        state = ConfusionMatrix(NUM_CLASSES)
        for pair in zip(predictions, references, strict=True):
            state.update(*pair)
    elif module is PanopticQualityMetric:
        state = PanopticQuality(NUM_CLASSES, OPTIONS[module]["is_thing"])
        for found, known in zip(predictions, references, strict=True):
            state.update(
                *(example[key] for example in (found, known) for key in ("segmentation", "segments_info"))
            )
    else:
        state = MaskAveragePrecision(NUM_CLASSES)
        for found, known in zip(predictions, references, strict=True):
            parts = (found["scores"], found["labels"], found["masks"], known["labels"], known["masks"])
            state.update(known["image_id"], *parts)
    assert repr(scores) == repr(state.compute(seen=seen))
    assert any(name.endswith("_unseen") for name in scores)


@pytest.mark.parametrize("module", MODULES)
def test_computing_starts_afresh(module):
    predictions, references = examples(module, 3)
    metric = new(module)
    first = metric.compute(predictions=predictions, references=references)
    assert len(metric) == 0
    assert repr(metric.compute(predictions=predictions, references=references)) == repr(first)


def test_evaluate_loads_each_module_by_its_path_and_combines_it_with_others(monkeypatch, tmp_path):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        monkeypatch.delitem(sys.modules, name)
    for script, module in zip(("mean_iou", "panoptic_quality", "mask_ap"), MODULES, strict=True):
        loaded = evaluate.load(
            str(SCRIPTS / f"{script}.py"), num_classes=NUM_CLASSES, cache_dir=str(tmp_path), **OPTIONS[module]
        )
        predictions, references = examples(module, 3)
        expected = new(module).compute(predictions=predictions, references=references)
        together = evaluate.combine([loaded])
        together.add_batch(predictions=predictions[:2], references=references[:2])
        together.add(prediction=predictions[2], reference=references[2])
        assert repr(together.compute()) == repr(expected)
        assert "references" in repr(loaded)
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]


def test_maps_may_come_as_a_stack_a_tensor_images_or_nested_lists():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, NUM_CLASSES, (2, 3, 8, 9)).astype(np.uint8)
    expected = new(MeanIoU).compute(predictions=list(predictions), references=list(references))
    for give in (
        np.asarray,
        torch.from_numpy,
        np.ndarray.tolist,
        lambda maps: list(map(Image.fromarray, maps)),
    ):
        scores = new(MeanIoU).compute(predictions=give(predictions), references=give(references))
        assert repr(scores) == repr(expected)


@pytest.mark.parametrize("module", MODULES)
def test_a_batch_with_one_bad_example_counts_nothing_of_it(module):
    predictions, references = examples(module, 3)
    metric = new(module)
    metric.add_batch(predictions=predictions, references=references)
    before = {name: array.tobytes() for name, array in metric.state.state_dict().items()}
    good_predictions, good_references = examples(module, 3, seed=1)
    if module is MeanIoU:
        good_references[2] = good_references[2] + 7
    else:
        del good_references[2][{PanopticQualityMetric: "segments_info", MaskAP: "image_id"}[module]]
    with pytest.raises(ValueError, match="label|has no segments_info|has no image_id"):
        metric.add_batch(predictions=good_predictions, references=good_references)
    assert {name: array.tobytes() for name, array in metric.state.state_dict().items()} == before
    assert len(metric) == 3


def test_what_does_not_belong_to_a_batch_is_refused():
    metric = new(MaskAP)
    predictions, references = examples(MaskAP, 2)
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metric.add_batch(predictions=predictions, references=references[:1])
    with pytest.raises(ValueError, match="only one of them"):
        metric.compute(predictions=predictions)
    with pytest.raises(ValueError, match="no weights"):
        metric.add_batch(predictions=predictions, references=references, weights=[1, 1])
    references[1]["image_id"] = references[0]["image_id"]
    with pytest.raises(ValueError, match="several times in one batch"):
        metric.add_batch(predictions=predictions, references=references)
    with pytest.raises(ValueError, match="initialised torch.distributed group"):
        new(MeanIoU, num_process=2, process_id=0).compute()


@pytest.mark.parametrize("module", [MeanIoU, PanopticQualityMetric])
def test_memory_does_not_grow_with_the_number_of_batches(module):
    metric = new(module)
    predictions, references = examples(module, 4)
    tracemalloc.start()
    for _ in range(10):
        metric.add_batch(predictions=predictions, references=references)
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(50):
        metric.add_batch(predictions=predictions, references=references)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(metric) == 240
    assert after - before < 200 * 100  # bytes; the smallest of the 200 maps takes 800


def count_on_one_of_two(rank: int, folder: str) -> None:
    """A process of the test below: counts its share of the images, which is not as large for both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for module in MODULES:
        predictions, references = examples(module, 7)
        metric = new(module, num_process=2, process_id=rank, cache_dir=folder)
        share = slice(0, 5) if rank == 0 else slice(5, 7)
        metric.add_batch(predictions=predictions[share], references=references[share])
        scores = metric.compute(seen=[True, False, True, False])
        Path(folder, f"{module.__name__}-{rank}.txt").write_text(repr(scores))
    dist.destroy_process_group()


def test_two_processes_give_the_scores_of_one_on_the_first_of_them(tmp_path):
    arguments = {"args": (str(tmp_path),), "nprocs": 2, "join": False}
    processes = torch.multiprocessing.start_processes(count_on_one_of_two, start_method="fork", **arguments)
    try:
        assert any(processes.join(timeout=60) for _ in range(3))  # it returns when one of them has ended
    finally:
        for process in processes.processes:
            process.kill()
    for module in MODULES:
        predictions, references = examples(module, 7)
        alone = new(module).compute(
            predictions=predictions, references=references, seen=[True, False, True, False]
        )
        written = [(tmp_path / f"{module.__name__}-{rank}.txt").read_text() for rank in (0, 1)]
        assert written == [repr(alone), "None"]
