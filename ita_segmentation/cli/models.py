"""List the published checkpoints that `ita convert NAME` downloads and converts.

ita models
ita models fc-clip-convnext-large
"""

from __future__ import annotations

from collections.abc import Sequence

from ita_segmentation.cli.parser import ConfigArgumentParser
from ita_segmentation.hub.registry import PublishedCheckpoint, published_checkpoint, published_checkpoints

NOTE = "Scores: per cent, published by the authors, not measured here. Sizes: of the converted checkpoint, float32."


def build_parser() -> ConfigArgumentParser:
    """Build the parser of the command."""
    parser = ConfigArgumentParser(
        description="List the published checkpoints that can be downloaded and converted."
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show all that is known of one")
    return parser


def models(argv: Sequence[str] | None = None) -> int:
    """List published checkpoints."""
    name = build_parser().parse_command_line(argv).name
    if name is None:
        print("\n".join(_table([_row(checkpoint) for checkpoint in published_checkpoints().values()])))
        print(f"\n{NOTE}")
    else:
        print("\n".join(_details(published_checkpoint(name))))
    return 0


def _row(checkpoint: PublishedCheckpoint) -> dict[str, str]:
    ade = checkpoint.scores.get("ade20k-150", {})
    return {
        "name": checkpoint.name,
        "license": checkpoint.license,
        "size": _gigabytes(checkpoint),
        "A-150 mIoU": str(ade.get("miou", "-")),
        "A-150 PQ": str(ade.get("pq", "-")),
        "PC-459 mIoU": str(checkpoint.scores.get("pascal-context-459", {}).get("miou", "-")),
    }


def _gigabytes(checkpoint: PublishedCheckpoint) -> str:
    return f"{checkpoint.parameters * 4 / 1e9:.1f} GB" if checkpoint.parameters else "-"


def _table(rows: list[dict[str, str]]) -> list[str]:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _details(checkpoint: PublishedCheckpoint) -> list[str]:
    facts = {
        "name": checkpoint.name,
        "system": checkpoint.title,
        "page": checkpoint.homepage,
        "file": checkpoint.url,
        "license": f"{checkpoint.license}; its CLIP's weights: {checkpoint.clip_license}",
        "SHA-256": checkpoint.sha256 or "not known; the first download's is recorded",
        "size": f"{_gigabytes(checkpoint)} converted, in float32",
        "CLIP": checkpoint.clip,
        "trained on": f"{checkpoint.domain}, classes of {checkpoint.train_vocabulary}",
    }
    lines = [f"{key:<12}{value}" for key, value in facts.items()]
    for benchmark, scores in checkpoint.scores.items():
        lines.append(f"{benchmark:<20}" + ", ".join(f"{metric} {score}" for metric, score in scores.items()))
    return [*lines, "", NOTE]
