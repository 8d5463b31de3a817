"""The Python lines that reproduce a result of the page."""

from __future__ import annotations

from collections.abc import Sequence

LINES = """\
import torch
from transformers import AutoImageProcessor, AutoModel

checkpoint = {checkpoint!r}
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)

image = processor.fetch_images({image!r})  # a path
vocabulary = {vocabulary}
with torch.inference_mode():
    outputs = model(**processor(images=image, return_tensors="pt"), vocabulary=vocabulary)
size = (image.height, image.width)
{post_processing}
"""
SEMANTIC = """\
label_map = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]  # (H, W), class indices
for index in label_map.unique().tolist():
    print(outputs.vocabulary[0][index][0])"""
SEGMENTS = """\
result = processor.post_process_{task}_segmentation(outputs, threshold={threshold!r}, target_sizes=[size])[0]
label_map = result["segmentation"]  # (H, W), segment ids; 0: no segment
for segment in result["segments_info"]:
    print(segment["id"], outputs.vocabulary[0][segment["label_id"]][0], round(segment["score"], 3))"""


def python_lines(
    checkpoint: str,
    image: str,
    vocabulary: Sequence[Sequence[str]] | None,
    task: str,
    threshold: float | None,
) -> str:
    """Write a program that makes `label_map`, the same as the page's.

    Args:
        checkpoint: folder or Hub id.
        image: the image's file name.
        vocabulary: classes, each a list of names; None for the checkpoint's own.
        task: "semantic", "panoptic" or "instance".
        threshold: minimum score of a segment.
    """
    names = None if vocabulary is None else [list(synonyms) for synonyms in vocabulary]
    template = SEMANTIC if task == "semantic" else SEGMENTS
    return LINES.format(
        checkpoint=checkpoint,
        image=image,
        vocabulary=f"{names!r}" if names else "None  # the checkpoint's own classes",
        post_processing=template.format(task=task, threshold=threshold),
    )
