"""Runs a model over a benchmark, on one process or several, into one confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from tqdm import tqdm

from evaluation_ita.benchmarks import Benchmark
from evaluation_ita.semantic import ConfusionMatrix
from modeling_ita.vocabulary import normalize_vocabulary


@torch.inference_mode()
def evaluate_semantic(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    batch_size: int = 4,
    limit: int | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Scores of a model on a benchmark, at the labels' own size.

    Batches are cut before they are dealt out to processes, so that any number of processes gives the same result.

    Args:
        model: in eval mode, on the device of `PartialState`.
        limit: only so many pictures, from the first; None for all.
        title: what the progress bar is called.

    Returns:
        what `ConfusionMatrix.compute` gives, without `per_class_iou` and with `num_images` and `classes`: for each
        class {"name", "seen", "iou"} (nan where not counted); on every process.

    Raises:
        ValueError: if labels are neither classes nor `ignore_index`.
    """
    state = PartialState()
    count = len(benchmark.pictures) if limit is None else min(limit, len(benchmark.pictures))
    starts = range(0, count, batch_size)[state.process_index :: state.num_processes]
    confusion = ConfusionMatrix(len(benchmark.classes), benchmark.ignore_index)
    vocabulary = normalize_vocabulary(benchmark.classes)
    for start in tqdm(starts, desc=title, unit="batch", disable=not state.is_main_process):
        rows = [benchmark.pictures[index] for index in range(start, min(start + batch_size, count))]
        references = [np.array(row["label"]) for row in rows]
        inputs = processor(images=[row["image"] for row in rows], return_tensors="pt").to(model.device)
        outputs = model(**inputs, vocabulary=vocabulary)
        sizes = [reference.shape for reference in references]
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        for prediction, reference in zip(maps, references, strict=True):
            confusion.update(prediction, reference)
    matrices = gather(torch.from_numpy(confusion.matrix)[None].to(state.device))
    confusion.matrix = matrices.sum(0).cpu().numpy()
    scores = confusion.compute(benchmark.seen)
    rows_of_classes = zip(
        benchmark.classes, benchmark.seen, scores.pop("per_class_iou").tolist(), strict=True
    )
    scores["num_images"] = count
    scores["classes"] = [{"name": names[0], "seen": seen, "iou": iou} for names, seen, iou in rows_of_classes]
    return scores
