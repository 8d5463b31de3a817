"""How well a model says that an image shows none of the given classes, on Scenes.

    python benchmarks/absent_classes.py [--model models/ita-tiny] [--images 60] [--classes 4]

Every image is segmented with single classes: some that it does not show, of the vocabulary and others, and all that it
shows. Printed are the pixels, segments and instances that absent classes get, and the IoU of present ones
beside the IoU that they have among all classes, where every pixel gets one.
"""

import argparse
import random
from collections import defaultdict
from statistics import mean

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

from ita_segmentation.data.scenes import scene, scenes_vocabulary
from ita_segmentation.data.scenes.dataset import SPLITS
from modeling_ita import with_distractors
from modeling_ita.postprocessing import DEFAULT_THRESHOLDS

FOREIGN = ("unicorn", "zeppelin", "toothbrush", "volcano", "piano", "sword", "astronaut", "wallpaper")
"""Classes that are not in the vocabulary of Scenes."""


class Segmenter:
    """Segments an image by one class, or by all."""

    def __init__(self, model: str):
        self.model = AutoModel.from_pretrained(model).eval()
        self.processor = AutoImageProcessor.from_pretrained(model)

    @torch.inference_mode()
    def all_classes(self, image) -> np.ndarray:
        """Return the class of each pixel by the benchmarks' protocol."""
        outputs = self.model(**self.processor(image, return_tensors="pt"))
        [labels] = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
        return labels.numpy()

    @torch.inference_mode()
    def one_class(self, image, names: list[str]) -> tuple[np.ndarray, int, int]:
        """Return the pixels of a class, and how many segments and instances it has."""
        model, processor = self.model, self.processor
        vocabulary, num_classes = with_distractors(
            [names], model.default_vocabulary, model.config.train_vocabulary
        )
        outputs = model(**processor(image, return_tensors="pt"), vocabulary=vocabulary)
        options = {"target_sizes": [image.size[::-1]], "num_classes": num_classes}
        [labels] = processor.post_process_semantic_segmentation(
            outputs, threshold=DEFAULT_THRESHOLDS["semantic"], **options
        )
        [panoptic] = processor.post_process_panoptic_segmentation(outputs, **options)
        [instance] = processor.post_process_instance_segmentation(outputs, **options)
        return labels.numpy() == 0, len(panoptic["segments_info"]), len(instance["segments_info"])


def iou(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/ita-tiny")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument(
        "--classes", type=int, default=4, help="absent classes of either kind for each image (4)"
    )
    arguments = parser.parse_args()
    vocabulary, choose = scenes_vocabulary(), random.Random(0)
    segmenter = Segmenter(arguments.model)
    absent: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    present: list[tuple[float, float]] = []
    for index in tqdm(range(arguments.images), unit="image"):
        drawn = scene(SPLITS["validation"].seed, index, 192, classes="all")
        shown = set(np.unique(drawn.semantic).tolist())
        everything, valid = segmenter.all_classes(drawn.image), drawn.semantic != 255
        others = [names for number, names in enumerate(vocabulary.classes) if number not in shown]
        for kind, classes in (
            ("of the vocabulary", choose.sample(others, arguments.classes)),
            ("foreign", [[name] for name in choose.sample(FOREIGN, arguments.classes)]),
        ):
            for names in classes:
                pixels, segments, instances = segmenter.one_class(drawn.image, names)
                absent[kind].append((float(pixels.mean()), segments > 0, instances > 0))
        for label in shown - {255}:
            pixels, _, _ = segmenter.one_class(drawn.image, vocabulary.classes[label])
            truth = drawn.semantic[valid] == label
            present.append((iou(pixels[valid], truth), iou((everything == label)[valid], truth)))

    print("absent class          pixels   images with segments   with instances")
    for kind, results in absent.items():
        pixels, segments, instances = (mean(column) for column in zip(*results, strict=True))
        print(f"{kind:18} {pixels:9.2%} {segments:22.2%} {instances:16.2%}")
    alone, among_all = (mean(column) for column in zip(*present, strict=True))
    print(
        f"present class         IoU alone {alone:.3f}   among all {among_all:.3f}   ({len(present)} of them)"
    )


if __name__ == "__main__":
    main()
