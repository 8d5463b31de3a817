"""The file formats of `ita predict`: those of `ita_segmentation.prediction`, COCO's and Label Studio's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ita_segmentation.files import json_bytes, path_text
from ita_segmentation.integrations.coco import coco_document, coco_results
from ita_segmentation.integrations.label_studio import label_studio_task
from ita_segmentation.prediction import formats
from ita_segmentation.prediction.formats import ImageFormat, Source
from ita_segmentation.prediction.segmenter import SegmentedImage


def run_length_entries(result: SegmentedImage) -> list[dict[str, Any]]:
    """Return COCO's entries of an image without its id; "counts" stands beside "segmentation", too."""
    entries = coco_results(result.result, image_id=0)
    for entry in entries:
        del entry["image_id"]
        entry["counts"] = entry["segmentation"]["counts"]
    return entries


def _coco(polygons: bool) -> Callable[[SegmentedImage, Source], bytes]:
    def encode(result: SegmentedImage, source: Source) -> bytes:
        name = source.item.base.name
        size = {"width": result.width, "height": result.height}
        images = [{"id": name, "file_name": path_text(source.item.path), **size}]
        entries = coco_results(result.result, image_id=name, polygons=polygons)
        stuff_ids = source.settings.get("stuff_ids") or ()
        return json_bytes(coco_document(images, entries, result.vocabulary, stuff_ids=stuff_ids))

    return encode


def _label_studio(polygons: bool) -> Callable[[SegmentedImage, Source], bytes]:
    def encode(result: SegmentedImage, source: Source) -> bytes:
        image, model = path_text(source.item.path), str(source.settings["model"])
        return json_bytes([label_studio_task(result, image, model, polygons)])

    return encode


FORMATS: Mapping[str, ImageFormat] = {
    **formats.FORMATS,
    "coco": ImageFormat("_coco.json", _coco(polygons=False), keeps_overlaps=True),
    "coco-polygons": ImageFormat("_coco_polygons.json", _coco(polygons=True), keeps_overlaps=True),
    "label-studio": ImageFormat("_label_studio.json", _label_studio(polygons=False), keeps_overlaps=True),
    "label-studio-polygons": ImageFormat(
        "_label_studio_polygons.json", _label_studio(polygons=True), keeps_overlaps=True
    ),
}
"""By the names that `ita predict --format` takes."""
