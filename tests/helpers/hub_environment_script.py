"""Use a checkpoint as its users do, in an environment without this package: see test_hub_environment.py.

    python hub_environment_script.py CHECKPOINT IMAGE OUTPUT

Loads the checkpoint by every Auto class and both pipelines, saves it again and loads that; writes the results to
OUTPUT, so that environments can be compared.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    pipeline,
)

VOCABULARY = ["water", ["teddy bear", "teddy"], "concrete"]
EVERYTHING = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
AUTO_MODELS = (
    AutoModel,
    AutoModelForUniversalSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForImageSegmentation,
)


@torch.no_grad()
def outputs_of(model, processor, image) -> dict[str, torch.Tensor]:
    """Outputs and semantic maps, with the checkpoint's own vocabulary and another one."""
    answers = {}
    for name, classes in (("own", None), ("typed", VOCABULARY)):
        outputs = model(**processor(images=image, return_tensors="pt"), vocabulary=classes)
        size = [image.size[::-1]]
        answers[f"{name} classes"] = outputs.class_queries_logits
        answers[f"{name} masks"] = outputs.masks_queries_logits
        answers[f"{name} map"] = processor.post_process_semantic_segmentation(outputs, target_sizes=size)[0]
    return answers


def segments_of(found) -> list[tuple]:
    return [(one["score"], one["label"], one["mask"].tobytes()) for one in found]


def load_everything(folder: str, image) -> dict:
    """The answers of the model under every Auto class (which must agree), and of the pipelines."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    answers: dict = {}
    for auto in AUTO_MODELS:
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        assert model.config.vocabulary == config.vocabulary
        tensors = outputs_of(model, processor, image)
        assert not answers or all(torch.equal(answers[key], tensors[key]) for key in tensors), auto
        answers = tensors
    for task in ("image-segmentation", "zero-shot-image-segmentation"):
        segment: Any = pipeline(task, model=folder, trust_remote_code=True)  # type: ignore[call-overload]
        for subtask in ("semantic", "panoptic", "instance"):
            options = (
                {} if subtask == "semantic" else EVERYTHING if subtask == "panoptic" else {"threshold": 0.0}
            )
            found = segment(image, candidate_labels=["water", "teddy bear|teddy"], subtask=subtask, **options)
            assert {one["label"] for one in found} <= {"water", "teddy bear"}
            answers[f"{task} {subtask}"] = segments_of(found)
    return answers


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def main(folder: str, pil_image: str, output: str) -> None:
    torch.set_num_threads(1)
    image = Image.open(pil_image)
    answers = load_everything(folder, image)
    again = str(Path(output).with_suffix("")) + "-saved-again"
    AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    saved = load_everything(again, image)
    assert saved.keys() == answers.keys()
    assert all(same(answers[key], saved[key]) for key in answers), "saved again, it computes something else"
    torch.save(answers, output)
    facts = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "package": importlib.util.find_spec("modeling_ita") is not None,
        "files": sorted(path.name for path in Path(again).iterdir()),
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
