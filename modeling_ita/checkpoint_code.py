"""What a checkpoint holds beside weights and configuration, so that it works where this package is not installed.

When a model is saved, transformers copies its module and all modules that this one imports relatively, directly or
not (`custom_object_save`). Because of the imports below, the pipelines, the image processor and the handler of an
Inference Endpoint are among them.
"""

import contextlib
import copy
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from .configuration_ita import ITAConfig
from .handler import EndpointHandler
from .image_processing_ita import ITAImageProcessor
from .pipeline_ita import ITAImageSegmentationPipeline, ITAZeroShotImageSegmentationPipeline

__all__ = ["EndpointHandler", "RemoteCodeMixin", "check_weights_index"]

AUTO_MODELS = (
    "AutoModel",
    "AutoModelForUniversalSegmentation",
    "AutoModelForSemanticSegmentation",
    "AutoModelForImageSegmentation",
)
CUSTOM_PIPELINES = {
    task: {"impl": f"pipeline_ita.{pipeline.__name__}", "pt": ["AutoModelForImageSegmentation"]}
    for task, pipeline in (
        ("image-segmentation", ITAImageSegmentationPipeline),
        ("zero-shot-image-segmentation", ITAZeroShotImageSegmentationPipeline),
    )
}
ENDPOINT_REQUIREMENTS = "transformers>=5.22\nopen_clip_torch>=3.3\ntimm>=1.0.20\npillow>=11\n"

ITAConfig.register_for_auto_class()


class RemoteCodeMixin:
    """Save a model with its code, card and endpoint files. Goes before `PreTrainedModel` among the base classes."""

    config: Any
    _auto_class: Any = "AutoModel"  # makes `save_pretrained` copy the code

    def save_pretrained(
        self, save_directory: Any, *args: Any, card_metadata: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, with all that is needed where this package is not installed.

        The image processor and the example images of the checkpoint that the model was loaded from are saved too,
        where `save_directory` has none.

        Args:
            save_directory: folder of the checkpoint.
            *args: as for `PreTrainedModel.save_pretrained`.
            card_metadata: front matter of the model card, such as {"license": "mit", "datasets": ["someone/images"]}.
            **kwargs: as for `PreTrainedModel.save_pretrained`.
        """
        self.config.auto_map = {name: f"modeling_ita.{type(self).__name__}" for name in AUTO_MODELS}
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            folder, source = Path(save_directory), self.config._name_or_path
            _copy_processor_and_examples(source, folder)
            (folder / "requirements.txt").write_text(ENDPOINT_REQUIREMENTS, encoding="utf-8")
            write_model_card(folder, self.config.to_dict(), source=source, metadata=card_metadata)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Write the card again: `push_to_hub` has just replaced it by a blank form or by the card on the Hub."""
        write_model_card(Path(working_dir), self.config.to_dict(), repo_id, self.config._name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def _copy_processor_and_examples(source: str, folder: Path) -> None:
    """Copy image processor and example images of the checkpoint `source` (a folder or a Hub id) into `folder`."""
    if not source:
        return
    if not (folder / "preprocessor_config.json").exists():
        with contextlib.suppress(OSError):  # the checkpoint has none
            ITAImageProcessor.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    examples = Path(source) / "examples"
    if examples.is_dir() and not (folder / "examples").exists():
        shutil.copytree(examples, folder / "examples")


def check_weights_index(checkpoint: Any) -> None:
    """Check that the index of a checkpoint folder's weights names only files inside it; else raise ValueError."""
    index = Path(str(checkpoint)) / "model.safetensors.index.json"
    if checkpoint is None or not index.is_file():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} does not say which file holds which weight") from error
    for name in files:
        path = PurePosixPath(str(name).replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in str(name):
            raise ValueError(f"{index} names a file outside of its folder: {name!r}")


# --- the model card: front matter for the Hub, and a text with code that runs ---
#
# The last line of a generated card holds a digest of its text. While they agree, the text is as it was generated, and
# may be generated anew. Any other card has an author: its text stays, and only keys that its front matter lacks are
# added.

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
TAGS = (
    "open-vocabulary-segmentation",
    "panoptic-segmentation",
    "semantic-segmentation",
    "instance-segmentation",
    "zero-shot-image-segmentation",
    "vision",
    "clip",
    "ita",
    "custom_code",
)
LICENSE = "apache-2.0"
# The pretrained CLIPs of the published checkpoints, by open_clip's name of the architecture.
BASE_MODELS = {
    "convnext_large_d_320": "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    "convnext_base_w_320": "laion/CLIP-convnext_base_w_320-laion_aesthetic-s13B-b82K-augreg",
    "convnext_xxlarge": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
}
INHERITED = ("license", "license_name", "license_link", "datasets", "base_model", "language")
EXAMPLE_IMAGE = "http://images.cocodataset.org/val2017/000000039769.jpg"  # two cats on a sofa
EXAMPLE_LABELS = ("cat", "remote control", "sofa|couch")
EXAMPLE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TRAINING_ARGUMENTS = {
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient clipping",
    "per_device_train_batch_size": "batch size per device",
    "gradient_accumulation_steps": "gradient accumulation",
    "num_train_epochs": "epochs",
    "max_steps": "steps at most",
    "max_minutes": "minutes at most",
    "bf16": "bfloat16",
    "fp16": "float16",
    "seed": "seed",
}

CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

Open-vocabulary segmentation (semantic, panoptic and instance) by image-text aggregation (ITA): name classes, get
segments.
{%- if classes %} By default it segments its own {{ classes | length }} classes: {{ classes[:12] | join(", ") }}
{{- ", ..." if classes | length > 12 else "." }}{% endif %}
{% if config.domain %}
Trained on {{ config.domain }}.
{% endif %}
One frozen CLIP (`{{ config.clip_model_name }}`), {{ config.num_dominant_categories }} text and \
{{ config.num_learned_queries }} learned queries, {{ config.decoder_layers }} decoder layers.

## Use

```bash
pip install "transformers>=5.22" torch torchvision "open_clip_torch>=3.3" pillow
```

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{{ name }}", trust_remote_code=True)
segments = segment("{{ image }}", candidate_labels={{ labels }}, subtask="panoptic", threshold=0.5)
```

`candidate_labels` are classes, with `|` between synonyms; `subtask` is `panoptic`, `instance` or `semantic`. The task
`zero-shot-image-segmentation` is the same and requires them. Without the pipeline:

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{{ name }}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{{ name }}", trust_remote_code=True)
image = Image.open("{{ image }}")
outputs = model(**processor(images=image, return_tensors="pt"), vocabulary={{ vocabulary }})
classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]
```

`handler.py` and `requirements.txt` serve it as an Inference Endpoint:
`{"inputs": "<base64>", "parameters": {"candidate_labels": {{ labels }}}}`.
{% if training %}
## Training

| what | value |
| --- | --- |
{% for what, value in training -%}
| {{ what }} | {{ value }} |
{% endfor %}{% endif %}{% if scores %}
## Scores

| dataset | split | score | value |
| --- | --- | --- | --- |
{% for score in scores -%}
| {{ score.dataset_name }} | {{ score.dataset_split or "" }} | {{ score.metric_name or score.metric_type }} | \
{{ "%.2f %%" | format(100 * score.metric_value) if score.metric_value is float else score.metric_value }} |
{% endfor %}{% endif %}
## License and citation

The code in this repository is under {{ code_license }}; the weights of the frozen CLIP are under their own license. \
Please cite the paper:

```bibtex
@article{cheng2025ita,
  title   = {Image-text aggregation for open-vocabulary semantic segmentation},
  author  = {Cheng and Huang and Wang and Huang and Wei},
  journal = {Neurocomputing},
  year    = {2025}
}
```
"""

_MARK = re.compile(r"\n<!-- Written by ITA from the checkpoint \(([0-9a-f]{16})\)[^\n]*-->\s*\Z")
_BLANK = "[More Information Needed]"


class CardError(ValueError):
    """A model card that cannot be read or changed."""


def write_model_card(
    folder: Path,
    config: Mapping[str, Any],
    name: str | None = None,
    source: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model card of a checkpoint, or add to the front matter of a card that was written by hand.

    Args:
        folder: the checkpoint. Images in `examples/` are the widget's; `trainer_state.json` and `training_args.json`
            say how it was trained.
        config: the configuration's `to_dict()`.
        name: the repository's name on the Hub; None takes the folder's.
        source: folder of the checkpoint that the model was loaded from. License, datasets and base model of its card
            hold for this one too; its scores do not, because the weights may have changed since.
        metadata: front matter that takes precedence over everything else, such as {"license": "mit"}.

    Returns:
        The card's path. A card that cannot be read is left alone, with a warning.

    Raises:
        CardError: `metadata` is not what the Hub takes, or was given for a card that cannot be read.
    """
    path, given = folder / CARD_FILE, dict(metadata or {})
    try:
        earlier = read_card(path)
        matter = earlier.data.to_dict() if earlier else {}
        defaults = _defaults(folder, config) | _inherited(source, folder)
        if earlier is None or may_be_replaced(earlier.text):
            kept = {key: value for key, value in matter.items() if key not in ("widget", "tags")}
            merged = defaults | kept | given
            merged["tags"] = _union(merged.get("tags"), matter.get("tags"), TAGS)
            card = _render(ModelCardData(**merged), folder, config, name)
        else:
            card = earlier
            tags = _union(matter.get("tags"), TAGS)
            lacking = {key: value for key, value in defaults.items() if key not in matter} | {"tags": tags}
            for key, value in (lacking | given).items():
                card.data[key] = value
            if card.data.to_dict() == matter:
                return path
    except (ValueError, TypeError, KeyError) as error:
        if given:
            raise CardError(f"the model card {path}: {error}") from error
        logger.warning(f"the model card {path} is left as it is: {error}")
        return path
    card.save(path)
    return path


def read_card(path: Path) -> ModelCard | None:
    """Read a model card; None if there is none.

    Raises:
        CardError: it is not UTF-8 text, or its front matter is not what the Hub takes.
    """
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except UnicodeDecodeError as error:
        raise CardError("it is not a UTF-8 text file") from error
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:240]
        raise CardError(f"the front matter cannot be read: {reason}") from error


def is_generated(text: str) -> bool:
    """Tell whether a card's text (without front matter) was written here and has not been changed since."""
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def may_be_replaced(text: str) -> bool:
    """Tell whether a card has no author: generated here, or transformers' form that was not filled in."""
    if is_generated(text):
        return True
    form = ModelCard.from_template(ModelCardData(), model_description="").text
    return "automatically generated" in text and text.count(_BLANK) == form.count(_BLANK)


def own_class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the first name of each of the checkpoint's own classes; [] if it has none."""
    if config.get("vocabulary"):
        entries = config["vocabulary"]
        return [(one if isinstance(one, str) else one[0]).split(",")[0].strip() for one in entries]
    labels = config.get("id2label") or {}
    names = [str(labels[index]) for index in sorted(labels, key=int)]
    return [] if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _union(*tags: Any) -> list[str]:
    lists = [[one] if isinstance(one, str) else list(one or ()) for one in tags]
    return list(dict.fromkeys(str(tag) for one in lists for tag in one))


def _inherited(source: str | Path | None, folder: Path) -> dict[str, Any]:
    """What the card of the checkpoint that was loaded says of this one too."""
    if not source or not Path(source).is_dir() or Path(source).resolve() == folder.resolve():
        return {}
    try:
        card = read_card(Path(source) / CARD_FILE)
    except CardError:
        return {}
    matter = card.data.to_dict() if card else {}
    return {key: matter[key] for key in INHERITED if key in matter}


def _defaults(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    base = BASE_MODELS.get(str(config.get("clip_model_name")))
    labels = _labels(folder, config)
    return {
        "license": LICENSE,
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        **({"base_model": base} if base else {}),
        "tags": list(TAGS),
        "widget": [
            {"src": source, "example_title": Path(source).stem, "parameters": {"candidate_labels": [*labels]}}
            for source in _examples(folder) or [EXAMPLE_IMAGE]
        ],
    }


def _examples(folder: Path) -> list[str]:
    images = sorted((folder / "examples").glob("*"))
    return [f"examples/{path.name}" for path in images if path.suffix.lower() in EXAMPLE_SUFFIXES][:4]


def _labels(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Candidate labels for the example images."""
    names = own_class_names(config)
    return names[:5] if names and _examples(folder) else list(EXAMPLE_LABELS)


def _render(data: ModelCardData, folder: Path, config: Mapping[str, Any], name: str | None) -> ModelCard:
    name = name or folder.resolve().name or "model"
    examples, labels = _examples(folder), _labels(folder, config)
    card = ModelCard.from_template(
        data,
        template_str=CARD_TEMPLATE,
        name=name,
        title=name.rpartition("/")[2],
        config=config,
        classes=own_class_names(config),
        image=f"{name}/{examples[0]}" if examples and "/" not in name else "image.jpg",
        labels=json.dumps(labels, ensure_ascii=False),
        vocabulary=json.dumps([label.split("|") for label in labels], ensure_ascii=False),
        training=_training(folder),
        scores=data.eval_results or [],
        code_license=LICENSE,
    )
    note = "change anything above and it stays as you leave it"
    text = card.text.rstrip()
    card.text = f"{text}\n\n<!-- Written by ITA from the checkpoint ({_digest(text)}); {note}. -->\n"
    return card


def _training(folder: Path) -> list[tuple[str, Any]]:
    """Rows on how the checkpoint was trained, read from the files that the trainer leaves beside it."""
    arguments, state = (_json(folder / f"{stem}.json") for stem in ("training_args", "trainer_state"))
    rows = [
        (title, arguments[key])
        for key, title in TRAINING_ARGUMENTS.items()
        if isinstance(arguments.get(key), (int, float, str)) and arguments[key] not in (False, -1)
    ]
    if isinstance(state.get("global_step"), int):
        rows.append(("steps taken", state["global_step"]))
    history = [entry for entry in state.get("log_history") or [] if isinstance(entry, dict)]
    losses = [entry["loss"] for entry in history if isinstance(entry.get("loss"), (int, float))]
    if losses:
        rows.append(("last loss logged", round(losses[-1], 4)))
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
