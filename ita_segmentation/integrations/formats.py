"""COCO's and Label Studio's file formats, for `ita predict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ita_segmentation.files import json_bytes, path_text
from ita_segmentation.integrations.coco import coco_document, coco_results
from ita_segmentation.integrations.label_studio import label_studio_task
from ita_segmentation.prediction.formats import Encode, ResultFormat
from ita_segmentation.prediction.segmenter import SegmentedImage
from ita_segmentation.prediction.sources import InputFile


def run_length_entries(result: SegmentedImage) -> list[dict[str, Any]]:
    """Return COCO's entries of an image without its id; "counts" stands beside "segmentation", too."""
    entries = coco_results(result.result, image_id=0)
    for entry in entries:
        del entry["image_id"]
        entry["counts"] = entry["segmentation"]["counts"]
    return entries


def _coco(polygons: bool) -> Encode:
    def encode(result: SegmentedImage, file: InputFile, image: Any, settings: Mapping[str, Any]) -> bytes:
        name, size = file.base.name, {"width": result.width, "height": result.height}
        entries = coco_results(result.result, image_id=name, polygons=polygons)
        images = [{"id": name, "file_name": path_text(file.path), **size}]
        stuff_ids = settings.get("stuff_ids") or ()
        return json_bytes(coco_document(images, entries, result.vocabulary, stuff_ids=stuff_ids))

    return encode


def _label_studio(polygons: bool) -> Encode:
    def encode(result: SegmentedImage, file: InputFile, image: Any, settings: Mapping[str, Any]) -> bytes:
        return json_bytes([label_studio_task(result, path_text(file.path), str(settings["model"]), polygons)])

    return encode


EXCHANGE_FORMATS: Mapping[str, ResultFormat] = {
    "coco": ResultFormat("_coco.json", _coco(False), keeps_overlaps=True),
    "coco-polygons": ResultFormat("_coco_polygons.json", _coco(True), keeps_overlaps=True),
    "label-studio": ResultFormat("_label_studio.json", _label_studio(False), keeps_overlaps=True),
    "label-studio-polygons": ResultFormat(
        "_label_studio_polygons.json", _label_studio(True), keeps_overlaps=True
    ),
}
"""By the names that `ita predict --format` takes, beside those of `ita_segmentation.prediction`."""
