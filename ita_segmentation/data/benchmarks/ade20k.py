"""ADE20K: the 150 classes of the scene parsing challenge (ADEChallengeData2016), and 847 of the full dataset.

Follows the preparation of the published evaluations: panoptic maps are stuff from the semantic annotation with the
instances on top (Mask2Former), and images of the full dataset are resized to a shortest side of at most 512 pixels
(MaskFormer).
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ita_segmentation.data.benchmarks import readers
from ita_segmentation.data.benchmarks.base import ImageEntry, LabeledImage, SourceDataset
from ita_segmentation.data.categories import category_ids, load_categories
from ita_segmentation.errors import ITAError, one_line
from ita_segmentation.images import DECODING_ERRORS

FOLDERS = {"train": "training", "validation": "validation"}


# ------------------------------------------------------------------------------------------------------------
# 150 classes


class Ade20k150(SourceDataset):
    """ADEChallengeData2016: 150 classes, 100 of them things.

    Semantic labels are `annotations/*.png`: 0 is any other class, 1..150 the classes. `annotations_instance/*.png`,
    a separate download, has the instances: R (1..100) is the number of the thing class, and G that of the instance
    within the image, 0 for none. Without that folder the images have no panoptic maps.
    """

    categories = load_categories("ade20k-150")
    layout = (
        "ADEChallengeData2016: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png "
        "and, for instances, annotations_instance/{training,validation}/*.png"
    )

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split; see `SourceDataset.index`."""
        folder = FOLDERS[split]
        images, labels, instances = (
            f"{part}/{folder}" for part in ("images", "annotations", "annotations_instance")
        )
        readers.require_folder(source, [images, labels], self.layout)
        stems = (
            readers.files_by_stem(source / images, (".jpg",)).keys()
            | readers.files_by_stem(source / labels, (".png",)).keys()
        )
        if not stems:
            raise ITAError(f"{source / images} has no images (*.jpg)")
        has_instances = (source / instances).is_dir()
        return [
            ImageEntry(
                image_id=stem,
                image=f"{images}/{stem}.jpg",
                label=f"{labels}/{stem}.png",
                instances=f"{instances}/{stem}.png" if has_instances else None,
                has_segments=has_instances,
            )
            for stem in sorted(stems)
        ]

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        image, annotation = readers.read_pair(source, entry)
        values = {0: self.ignore_index} | {index + 1: index for index in range(len(self.categories))}
        label = readers.relabel(annotation, values, self.ignore_index, source / str(entry.label))
        if entry.instances is None:
            return LabeledImage(entry.image_id, image, label)
        path = source / entry.instances
        instances = readers.read_color_png(path)
        readers.check_same_size(readers.image_size(image), instances, source / entry.image, path)
        panoptic, segments = self._panoptic(label, instances, path)
        return LabeledImage(entry.image_id, image, label, panoptic, segments)

    def _panoptic(
        self, label: np.ndarray, instances: np.ndarray, path: Path
    ) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Put the instances (H, W, 3) on top of the stuff of the labels (H, W); things without an instance become void.

        As published, a stuff class that instances cover completely keeps its segment, without pixels. Returns (H, W)
        int32 ids from 1, stuff before things, and the segments.
        """
        present = np.flatnonzero(np.bincount(label.ravel(), minlength=256)[: len(self.categories)]).tolist()
        stuff = [index for index in present if not self.categories[index].is_thing]
        things = _class_of_instances(instances, path)
        thing_classes = [index for index, category in enumerate(self.categories) if category.is_thing]

        stuff_ids, thing_ids = np.zeros((2, 256), np.int32)
        stuff_ids[stuff] = np.arange(len(stuff)) + 1
        thing_ids[list(things)] = np.arange(len(things)) + 1 + len(stuff)
        numbers = instances[..., 1]
        panoptic = np.where(numbers > 0, thing_ids[numbers], stuff_ids[label])
        classes = stuff + [thing_classes[number - 1] for number in things.values()]
        segments = [
            {"id": position + 1, "category_id": index, "isthing": position >= len(stuff), "iscrowd": False}
            for position, index in enumerate(classes)
        ]
        return panoptic, segments


def _class_of_instances(instances: np.ndarray, path: Path) -> dict[int, int]:
    """Read the thing class (R, 1..100) of each instance (G, from 1) of a map (H, W, 3) uint8, by instance."""
    pairs = np.bincount((instances[..., 1].astype(np.int64) * 256 + instances[..., 0]).ravel())
    classes: dict[int, int] = {}
    for pair in np.flatnonzero(pairs).tolist():
        number, thing_class = divmod(pair, 256)
        if number == 0:
            continue
        if number in classes:
            raise ITAError(
                f"{path}: instance {number} (G) has two classes (R): {classes[number]} and {thing_class}"
            )
        if not 1 <= thing_class <= 100:
            raise ITAError(f"{path}: instance {number} (G) has the class (R) {thing_class}, not 1..100")
        classes[number] = thing_class
    return classes


# ------------------------------------------------------------------------------------------------------------
# 847 classes


class Ade20k847(SourceDataset):
    """ADE20K_2021_17_01: 847 of its more than 3,000 classes, the others ignored.

    `index_ade20k.pkl` lists the images; in their `_seg.png` a class is (R // 10) * 256 + G. Images and labels
    whose shortest side is above 512 pixels are resized to 512, images bilinearly without antialiasing, labels by the
    nearest pixel. Resized images are stored as PNG; all others keep their file content.
    """

    categories = load_categories("ade20k-847")
    ignore_index = 65535
    layout = (
        "ADE20K_2021_17_01: index_ade20k.pkl and images/ADE/{training,validation}/**/*.jpg "
        "with *_seg.png beside them"
    )

    def index(self, source: Path, split: str) -> list[ImageEntry]:
        """List the images of a split; see `SourceDataset.index`."""
        readers.require_folder(source, ["index_ade20k.pkl", "images"], self.layout)
        path = source / "index_ade20k.pkl"
        content = _load_plain_pickle(path)
        names, folders = _strings(content, "filename", path), _strings(content, "folder", path)
        if len(names) != len(folders):
            raise ITAError(f"{path} has {len(names):,} names ('filename') but {len(folders):,} folders")
        entries = []
        for folder, name in zip(folders, names, strict=True):
            if name.startswith("ADE_val_") == (split == "validation"):
                image = _inside_release(folder, name, path)
                entries.append(ImageEntry(Path(image).stem, image, image.removesuffix(".jpg") + "_seg.png"))
        if not entries:
            raise ITAError(f"{path} lists no images of {split} (ADE_val_* are those of validation)")
        return entries

    def read(self, source: Path, entry: ImageEntry) -> LabeledImage:
        """Read one image; see `SourceDataset.read`."""
        image_path, label_path = source / entry.image, source / str(entry.label)
        image = readers.read_bytes(image_path)
        pil_image = readers.decode(image, image_path)
        encoded = readers.read_color_png(label_path)
        readers.check_same_size(pil_image.size, encoded, image_path, label_path)
        size = _reduced_size(*encoded.shape[:2])
        if size is not None:
            image = _png(_resize_bilinear(np.asarray(pil_image.convert("RGB")), size))
            encoded = _resize_nearest(encoded, size)
        full_index = encoded[..., 0].astype(np.uint16) // 10 * 256 + encoded[..., 1]
        if full_index.max() > NUM_OBJECTS:
            raise ITAError(
                f"{label_path} has the class {full_index.max()}, above the {NUM_OBJECTS:,} of the full list"
            )
        return LabeledImage(entry.image_id, image, _FULL_TO_847[full_index])


NUM_OBJECTS = 3688  # object classes of the full dataset; labels are 0 (none) to this number


_FULL_TO_847 = np.full(26 * 256, Ade20k847.ignore_index, np.uint16)
_FULL_TO_847[list(category_ids("ade20k-847"))] = np.arange(847)


def _inside_release(folder: str, name: str, path: Path) -> str:
    """Path of a listed image relative to the source; the list puts the name of the release before each folder."""
    parts = PurePosixPath(folder).parts
    inside = PurePosixPath(*parts[parts[:1] == ("ADE20K_2021_17_01",) :], name)
    if inside.is_absolute() or ".." in inside.parts or "/" in name or inside.suffix != ".jpg":
        raise ITAError(f"{path} lists something that is not an image of the release: {folder}/{name}")
    return str(inside)


def _strings(content: Any, key: str, path: Path) -> list[str]:
    """Read the list of strings under a key of the index."""
    if not isinstance(content, Mapping) or key not in content:
        raise ITAError(f"{path} is not ADE20K's index: it has no {key!r}")
    values = content[key].tolist() if isinstance(content[key], np.ndarray) else content[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ITAError(f"{path} is not ADE20K's index: its {key!r} is not a list of strings")
    return values


# ------------------------------------------------------------------------------------------------------------
# Pickles


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles plain values and numpy arrays; refuses to import anything else."""

    ALLOWED = {
        *("_codecs.encode", "numpy.dtype", "numpy.ndarray"),  # the first for bytes of the old protocols
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Import a class or function, if it is allowed."""
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a list of images does not need")
        return super().find_class(module, name)


def _load_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain values and numpy arrays; ITAError if it is damaged or would run code."""
    content = io.BytesIO(readers.read_bytes(path))
    others = (pickle.UnpicklingError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError)
    try:
        return _PlainUnpickler(content).load()
    except (*DECODING_ERRORS, *others) as error:
        raise ITAError(f"{path} is refused or damaged: {one_line(error, 160)}") from error


# ------------------------------------------------------------------------------------------------------------
# Sizes


def _reduced_size(height: int, width: int, shortest: int = 512) -> tuple[int, int] | None:
    """(height, width) with the shortest side at `shortest` pixels; None if it is not longer than that."""
    if min(height, width) <= shortest:
        return None
    if width >= height:
        return shortest, round(width / height * shortest)
    return round(height / width * shortest), shortest


def _resize_nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) to (h, w, C) as OpenCV's INTER_NEAREST does, by the reciprocal of a rounded quotient."""
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(np.int64), old - 1)
        for old, new in zip(pixels.shape, size, strict=False)
    )
    return pixels[rows[:, None], columns]


def _resize_bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) uint8 to (h, w, C) as OpenCV's INTER_LINEAR does: without antialiasing."""
    reduced = pixels
    for axis, new in enumerate(size):
        old = pixels.shape[axis]
        centers = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        low = np.floor(centers).astype(np.int64)
        weights = (
            (centers - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(pixels.ndim)])
        )
        before, after = (
            reduced.take(np.minimum(index, old - 1), axis).astype(np.float32) for index in (low, low + 1)
        )
        reduced = before * (1 - weights) + after * weights
    return np.floor(reduced + 0.5).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
