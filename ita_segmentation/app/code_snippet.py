"""The Python lines that reproduce a result of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_ita.tiling import Tiling

LINES = """\
from transformers import pipeline

segmenter = pipeline("image-segmentation", model={checkpoint!r}, trust_remote_code=True)
segments = segmenter(
    {image!r},  # a path
    candidate_labels={labels},
    subtask={task!r},
    threshold={threshold!r},{tiles}{examples}
)
for number, segment in enumerate(segments):
    print(number, segment["label"], segment["score"])
    segment["mask"].save(f"mask_{{number}}.png")  # 255 where the segment is
"""


def python_lines(
    checkpoint: str,
    image: str,
    vocabulary: Sequence[Sequence[str]] | None,
    task: str,
    threshold: float | None,
    tiling: Tiling | None = None,
    examples: Mapping[str, Sequence[tuple[str, Any]]] | None = None,
) -> str:
    """Write a program that finds the same segments as the page."""
    labels = None if vocabulary is None else ["|".join(names) for names in vocabulary]
    return LINES.format(
        checkpoint=checkpoint,
        image=image,
        labels=repr(labels),
        task=task,
        threshold=threshold,
        tiles="" if tiling is None else f"\n    tiles={tiling.size},",
        examples=""
        if examples is None
        else f"\n    examples={examples!r},  # a path, and a box in its pixels",
    )
