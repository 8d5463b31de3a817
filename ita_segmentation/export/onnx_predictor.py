"""An exported folder at work: images in, segments out, with onnxruntime in the place of the network.

predictor = OnnxPredictor("exported")
label_map = predictor(image)  # (H, W) int64, indices into predictor.vocabulary
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ita_segmentation.export.network import text_of
from modeling_ita import ITAForOpenVocabSegmentationOutput, ITAImageProcessor, normalize_vocabulary

NETWORK, EMBEDDINGS, CLASSES = "model.onnx", "vocabulary.safetensors", "vocabulary.json"
TEXT_INPUTS = ("prompt_embeds", "class_of_name", "name_embeds", "is_seen", "is_duplicate")


def write_vocabulary(model: Any, folder: Path, vocabulary: Any | None = None) -> None:
    """Writes what a graph needs of a vocabulary (None: the model's own) into a folder that is there.

    Raises:
        ValueError: no vocabulary, a malformed one, or fewer names than the model has text queries.
    """
    text, classes, candidates = text_of(model, vocabulary)
    least = model.config.num_dominant_categories
    if len(candidates) < least:
        raise ValueError(
            f"an exported network takes vocabularies of at least {least - 1} different names, got {len(candidates) - 1}"
        )
    document = {
        "vocabulary": classes,
        "candidates": candidates,
        "stuff_ids": model.stuff_ids(normalize_vocabulary(classes)),
    }
    tensors = {name: getattr(text, name).detach().cpu().contiguous().clone() for name in TEXT_INPUTS}
    temporary = folder / f".{EMBEDDINGS}.tmp"
    save_file(tensors, temporary)
    temporary.replace(folder / EMBEDDINGS)
    temporary = folder / f".{CLASSES}.tmp"
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(folder / CLASSES)


class OnnxPredictor:
    """Segments images by an exported network and vocabulary.

    Args:
        folder: what `run_export.py` wrote.
        providers: of onnxruntime, such as ["CUDAExecutionProvider"]; the CPU by default.

    Raises:
        FileNotFoundError: a file of the folder is missing.
    """

    def __init__(self, folder: str | Path, providers: list[str] | None = None):
        folder = Path(folder)
        for name in (NETWORK, EMBEDDINGS, CLASSES, "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no exported folder: it has no {name}")
        import onnxruntime

        self.session = onnxruntime.InferenceSession(
            str(folder / NETWORK), providers=providers or ["CPUExecutionProvider"]
        )
        self.processor = ITAImageProcessor.from_pretrained(folder)
        document = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        self.vocabulary: list[list[str]] = document["vocabulary"]
        self._candidates, self._stuff_ids = document["candidates"], document["stuff_ids"]
        self._words = {name: tensor.numpy() for name, tensor in load_file(folder / EMBEDDINGS).items()}

    def outputs(self, pixel_values: Tensor, pixel_mask: Tensor) -> ITAForOpenVocabSegmentationOutput:
        """What the model gives for images (B, 3, H, W), padded to multiples of 32; for the processor's read-out.

        Images of a batch share the batch's padded size, which the model's own `forward` crops to each one's own.
        """
        names = [value.name for value in self.session.get_outputs()]
        found = dict(
            zip(
                names,
                self.session.run(
                    None,
                    {
                        "pixel_values": pixel_values.float().numpy(),
                        "valid": pixel_mask.bool().numpy(),
                        **self._words,
                    },
                ),
                strict=True,
            )
        )
        sizes = [[int(mask.any(1).sum()), int(mask.any(0).sum())] for mask in pixel_mask.bool()]
        dominant = found.get("dominant", np.zeros((len(sizes), 0), dtype=np.int64))
        return ITAForOpenVocabSegmentationOutput(
            class_queries_logits=torch.from_numpy(found["class_log_probabilities"]),
            masks_queries_logits=torch.from_numpy(found["mask_logits"]),
            dominant_categories=[[self._candidates[index] for index in row] for row in dominant],
            image_sizes=torch.tensor(sizes),
            stuff_ids=[self._stuff_ids] * len(sizes),
            vocabulary=[self.vocabulary] * len(sizes),
        )

    def __call__(self, image: Any, task: str = "semantic", **options: Any) -> Any:
        """Segments one image: a path, an address or a PIL image.

        Args:
            task: "semantic", "panoptic" or "instance"; options: of the processor's read-out.

        Returns: the processor's read-out at the image's own size: a map (H, W) int64 of classes, or a dictionary.
        """
        image = self.processor.fetch_images(image)
        inputs = self.processor(images=image, return_tensors="pt")
        outputs = self.outputs(inputs["pixel_values"], inputs["pixel_mask"])
        read_out = getattr(self.processor, f"post_process_{task}_segmentation")
        return read_out(outputs, target_sizes=[(image.height, image.width)], **options)[0]
