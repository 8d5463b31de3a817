"""The evaluation room: scores that are counted image by image, their reports, and overlay pictures.

`evaluation_ita.metric_modules` has the scores as modules of `evaluate`.
"""

from evaluation_ita.instance import MaskAveragePrecision
from evaluation_ita.overlay import color_of, draw_overlay
from evaluation_ita.panoptic import PanopticQuality
from evaluation_ita.report import markdown_table, write_results
from evaluation_ita.semantic import ConfusionMatrix

__all__ = [
    "ConfusionMatrix",
    "MaskAveragePrecision",
    "PanopticQuality",
    "color_of",
    "draw_overlay",
    "markdown_table",
    "write_results",
]
