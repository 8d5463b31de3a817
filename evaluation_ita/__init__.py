"""The evaluation room: scores that are counted image by image, their reports, and overlay pictures.

`evaluation_ita.metric_modules` has the scores as modules of `evaluate`. Names are imported when they are asked for: a
door that only draws need not wait for what counts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "ConfusionMatrix": "semantic",
    "MaskAveragePrecision": "instance",
    "PanopticQuality": "panoptic",
    "color_of": "overlay",
    "draw_overlay": "overlay",
    "markdown_table": "report",
    "write_results": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
