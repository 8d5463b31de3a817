"""The evaluation room: scores from confusion matrices, their reports, and overlay pictures."""

from evaluation_ita.overlay import color_of, draw_overlay
from evaluation_ita.report import markdown_table, write_results
from evaluation_ita.semantic import ConfusionMatrix

__all__ = ["ConfusionMatrix", "color_of", "draw_overlay", "markdown_table", "write_results"]
