"""The model card that a saved checkpoint has: front matter for the Hub, and a text with code that runs.

A card is written from the configuration, the state of the training and the scores that stand in its own front matter
(`model-index`). Its last line holds a digest of its text: where text and digest agree nobody has changed it, and it
may be written anew. Any other text is a person's. It stays as it is, to the byte, and only what its front matter
lacks is added.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from .files import write_whole

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
LIBRARY, TASK = "transformers", "image-segmentation"
TAGS = (
    *(
        "open-vocabulary-segmentation",
        "panoptic-segmentation",
        "semantic-segmentation",
        "instance-segmentation",
    ),
    *("zero-shot-image-segmentation", "vision", "clip", "ita", "custom_code"),
)
LICENCE = "apache-2.0"
# The pretrained CLIPs of the published checkpoints, by open_clip's name of the architecture.
BASE_MODELS = {
    "convnext_large_d_320": "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    "convnext_base_w_320": "laion/CLIP-convnext_base_w_320-laion_aesthetic-s13B-b82K-augreg",
    "convnext_xxlarge": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
}
EXAMPLE_IMAGE = "http://images.cocodataset.org/val2017/000000039769.jpg"  # two cats on a sofa
EXAMPLE_LABELS = ("cat", "remote control", "sofa|couch")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
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
FRONT_MATTER = re.compile(
    r"\A---[ \t]*(?:\r\n|\n|\r)(?P<yaml>.*?)^---[ \t]*(?:\r\n|\n|\r|\Z)", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"\n<!-- Written by ITA from the checkpoint \(([0-9a-f]{16})\)[^\n]*-->\s*\Z")
_SCORES = re.compile(r"<!-- scores -->\n.*?<!-- end of scores -->\n", re.DOTALL)
CITATION = """@article{cheng2025ita,
  title   = {Image-text aggregation for open-vocabulary semantic segmentation},
  author  = {Cheng and Huang and Wang and Huang and Wei},
  journal = {Neurocomputing},
  year    = {2025}
}"""


class CardError(ValueError):
    """A card that cannot be read or changed, said in one line."""


def write_model_card(
    folder: Path,
    config: Mapping[str, Any],
    name: str | None = None,
    source: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint's card, or adds what a person's card lacks in its front matter.

    Args:
        folder: the checkpoint; `examples/` in it holds images for the widget, `trainer_state.json` and
            `training_args.json` say how it was trained.
        config: the configuration's `to_dict()`.
        name: the repository's name on the Hub; without, the folder's.
        source: the folder that the model was loaded from. Its card's licence, data sets and base model hold for this
            one too; its scores do not, as the weights may have changed since.
        metadata: front matter that goes before everything else, such as {"license": "mit", "datasets": ["x/y"]}.

    Returns:
        the card's path. A card that cannot be read is left alone, with a warning.

    Raises:
        CardError: `metadata` or the scores are not what the Hub takes.
    """
    path = folder / CARD_FILE
    name = name or folder.resolve().name or "model"
    inherited = _inherited(source / CARD_FILE if source is not None and source != folder else None)
    try:
        earlier = _read(path)
        matter = front_matter(earlier)
        if earlier.strip() and not may_be_replaced(earlier):
            additions = _missing(matter, {**_defaults(folder, config, name), **inherited, **(metadata or {})})
            text = with_keys(earlier, {**additions, **(metadata or {})}) if additions or metadata else earlier
        else:
            kept = {key: value for key, value in matter.items() if key not in ("widget", "tags")}
            merged = {**_defaults(folder, config, name), **inherited, **kept, **(metadata or {})}
            merged["tags"] = _union(merged.get("tags"), matter.get("tags"), TAGS)
            text = _generated(merged, folder, config, name)
    except CardError as error:
        if metadata:
            raise CardError(f"the model card {path}: {error}") from error
        logger.warning(f"the model card {path} stays as it is: {error}")
        return path
    if text != earlier:
        write_whole(path, text.encode())
    return path


def is_generated(text: str) -> bool:
    """Whether this card's text is one of ours that nobody has changed (its front matter may have been)."""
    body = _body(text)
    found = _MARK.search(body)
    return found is not None and found.group(1) == _digest(body[: found.start()])


def may_be_replaced(text: str) -> bool:
    """Whether nobody wrote this card: it is one of ours, or transformers' form for a first push, not filled in."""
    if is_generated(text):
        return True
    mark = "what-the-form-is-asked-for"
    form = ModelCard.from_template(ModelCardData(), model_description=mark).text.strip()
    before, _, after = form.partition(mark)
    body = _body(text).strip()
    told = body[len(before) : len(body) - len(after)]
    return body.startswith(before) and body.endswith(after) and "automatically generated" in told


def front_matter(text: str) -> dict[str, Any]:
    """A card's front matter; {} without one.

    Raises:
        CardError: it is no YAML mapping, or `huggingface_hub` does not take it.
    """
    found = FRONT_MATTER.match(text.removeprefix("\ufeff"))
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found.group("yaml"))
        ModelCard(found.group())
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise CardError(f"the front matter cannot be read: {' '.join(str(error).split())[:240]}") from error
    return content or {}


def with_keys(text: str, values: Mapping[str, Any]) -> str:
    """The card with these keys of its front matter set: each in its place, or at the end; the rest to the byte.

    Raises:
        CardError: the front matter is not lines "key: value".
    """
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix(mark)
    line_end = "\r\n" if "\r\n" in text else "\n"
    for key, value in values.items():
        block = dump({key: value}).replace("\n", line_end)
        found = FRONT_MATTER.match(text)
        if found is None:
            text = f"---{line_end}{block}---{line_end}{text and line_end + text}"
            continue
        matter = found.group("yaml")
        if matter.lstrip().startswith("{"):
            raise CardError("the front matter must be lines 'key: value'")
        start, end = _place_of(matter, key)
        text = text[: found.start("yaml")] + matter[:start] + block + matter[end:] + text[found.end("yaml") :]
    return mark + text


def with_scores(text: str) -> str:
    """A card of ours with the table of scores that its front matter has; any other text as it is."""
    if not is_generated(text):
        return text
    body = _body(text)
    start = len(text) - len(body)
    body = _SCORES.sub(lambda _: _score_block(front_matter(text)), _MARK.sub("", body))
    return text[:start] + _marked(body)


def dump(matter: Mapping[str, Any]) -> str:
    """Front matter as YAML lines."""
    return yaml.safe_dump(dict(matter), sort_keys=False, allow_unicode=True, width=1000)


def _read(path: Path | None) -> str:
    """The text with its line ends as they are; "" without a card."""
    if path is None or not path.is_file():
        return ""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CardError("it is not a UTF-8 text file") from error


def _body(text: str) -> str:
    text = text.removeprefix("\ufeff")
    found = FRONT_MATTER.match(text)
    return text if found is None else text[found.end() :]


def _digest(body: str) -> str:
    """Of the text without the table of scores, which is renewed with them."""
    return hashlib.sha256(_SCORES.sub("", body).strip().encode()).hexdigest()[:16]


def _marked(body: str) -> str:
    note = "change anything above and it stays as you leave it"
    return f"{body.rstrip()}\n\n<!-- Written by ITA from the checkpoint ({_digest(body)}); {note}. -->\n"


def _place_of(matter: str, key: str) -> tuple[int, int]:
    """Where a key's block starts and ends in front matter; its end twice if there is none."""
    document = yaml.compose(matter)
    for node, value in document.value if isinstance(document, yaml.MappingNode) else []:
        if node.value != key:
            continue
        block = matter[node.start_mark.index : value.end_mark.index]
        # The block ends with its last line that says something: comments after it belong to what follows.
        lines = block.splitlines(keepends=True)
        while len(lines) > 1 and lines[-1].strip()[:1] in ("", "#"):
            lines.pop()
        end = node.start_mark.index + sum(map(len, lines))
        if not lines[-1].endswith(("\n", "\r")):
            end = matter.find("\n", end) + 1 or len(matter)
        return node.start_mark.index, end
    return len(matter), len(matter)


# ------------------------------------------------------------------------------------------------------------
# What a card says


def _inherited(path: Path | None) -> dict[str, Any]:
    """What the card of the checkpoint that was loaded says of this one too."""
    try:
        matter = front_matter(_read(path))
    except CardError:
        return {}
    wanted = ("license", "license_name", "license_link", "datasets", "base_model", "language")
    return {key: matter[key] for key in wanted if key in matter}


def _defaults(folder: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    base = BASE_MODELS.get(str(config.get("clip_model_name")))
    return {
        "license": LICENCE,
        "library_name": LIBRARY,
        "pipeline_tag": TASK,
        **({"base_model": base} if base else {}),
        "tags": list(TAGS),
        "widget": _widget(folder, config),
    }


def _missing(matter: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that front matter lacks, and its tags where some are missing."""
    missing = {key: value for key, value in wanted.items() if key not in matter}
    tags = _union(matter.get("tags"), wanted.get("tags"))
    if "tags" in matter and tags != _union(matter.get("tags")):
        missing["tags"] = tags
    return missing


def _union(*tags: Any) -> list[str]:
    lists = [[one] if isinstance(one, str) else list(one or ()) for one in tags]
    return list(dict.fromkeys(str(tag) for one in lists for tag in one))


def _examples(folder: Path) -> list[str]:
    images = sorted((folder / "examples").glob("*"))
    return [f"examples/{path.name}" for path in images if path.suffix.lower() in IMAGE_SUFFIXES][:4]


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The first name of each of the checkpoint's own classes; [] where it has none."""
    if config.get("vocabulary"):
        entries = config["vocabulary"]
        return [(one if isinstance(one, str) else one[0]).split(",")[0].strip() for one in entries]
    labels = config.get("id2label") or {}
    names = [str(labels[index]) for index in sorted(labels, key=int)]
    return [] if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _labels(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Candidate labels for the example images."""
    names = class_names(config)
    return names[:5] if names and _examples(folder) else list(EXAMPLE_LABELS)


def _widget(folder: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    labels = _labels(folder, config)
    images = _examples(folder) or [EXAMPLE_IMAGE]
    return [
        {"src": source, "example_title": Path(source).stem, "parameters": {"candidate_labels": [*labels]}}
        for source in images
    ]


def _generated(matter: dict[str, Any], folder: Path, config: Mapping[str, Any], name: str) -> str:
    """A whole card. Raises CardError where `huggingface_hub` does not take the front matter."""
    try:
        data = ModelCardData(**matter).to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise CardError(f"the Hub does not take this front matter: {error}") from error
    parts = [
        _introduction(config, name),
        _usage(folder, config, name),
        _training(folder),
        _score_block(data),
        f"## Licence and credit\n\nThe code in this repository is under {LICENCE}; the weights of the frozen CLIP are "
        f"under their own licence. Please cite the paper:\n\n```bibtex\n{CITATION}\n```\n",
    ]
    return f"---\n{dump(data)}---\n\n" + _marked("\n".join(part for part in parts if part))


def _introduction(config: Mapping[str, Any], name: str) -> str:
    names = class_names(config)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    own = f"Without words it segments its own {len(names)} classes ({shown})." if names else ""
    queries = (
        f"{config.get('num_dominant_categories', 0)} text and {config.get('num_learned_queries', 0)} learned"
    )
    return (
        f"# {name.rsplit('/', 1)[-1]}\n\n"
        "Open-vocabulary segmentation (semantic, panoptic and instance) by image-text aggregation, ITA: type words, "
        f"get segments. {own}\n\n"
        f"One frozen CLIP (`{config.get('clip_model_name')}`), {queries} queries, "
        f"{config.get('decoder_layers')} decoder layers.\n"
    )


def _usage(folder: Path, config: Mapping[str, Any], name: str) -> str:
    examples = _examples(folder)
    image = f"{name}/{examples[0]}" if examples and "/" not in name else "image.jpg"
    labels = json.dumps(_labels(folder, config), ensure_ascii=False)
    classes = json.dumps([one.split("|") for one in _labels(folder, config)], ensure_ascii=False)
    return f"""## Use

```bash
pip install "transformers>=5.21" torch torchvision "open_clip_torch>=3.3" pillow
```

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{name}", trust_remote_code=True)
segments = segment("{image}", candidate_labels={labels}, subtask="panoptic", threshold=0.5)
```

`candidate_labels` are classes, with `|` between synonyms; `subtask` is `panoptic`, `instance` or `semantic`. The task
`zero-shot-image-segmentation` is the same and always asks for them. Or by hand:

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
image = Image.open("{image}")
outputs = model(**processor(images=image, return_tensors="pt"), vocabulary={classes})
classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]
```

`handler.py` and `requirements.txt` serve it as an Inference Endpoint:
`{{"inputs": "<base64 or URL>", "parameters": {{"candidate_labels": {labels}}}}}`.
"""


def _training(folder: Path) -> str:
    """How the checkpoint was trained, of what stands beside it."""
    arguments, state = (_json(folder / f"{stem}.json") for stem in ("training_args", "trainer_state"))
    rows = [
        (title, arguments[key])
        for key, title in TRAINING_ARGUMENTS.items()
        if _worth_telling(arguments.get(key))
    ]
    if isinstance(state.get("global_step"), int):
        rows.append(("steps taken", state["global_step"]))
    history = [entry for entry in state.get("log_history") or [] if isinstance(entry, dict)]
    losses = [entry["loss"] for entry in history if isinstance(entry.get("loss"), (int, float))]
    if losses:
        rows.append(("last loss logged", round(losses[-1], 4)))
    if not rows:
        return ""
    return "## Training\n\n" + _table(("what", "value"), rows)


def _worth_telling(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and value is not False and value != -1


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _score_block(matter: Mapping[str, Any]) -> str:
    """The table of the scores in the front matter, between its two comments."""
    data = ModelCardData(**matter) if matter.get("model-index") else ModelCardData()
    rows = [
        (
            result.dataset_name,
            result.dataset_split or "",
            result.metric_name or result.metric_type,
            _value(result),
        )
        for result in data.eval_results or []
    ]
    table = "## Scores\n\n" + _table(("data set", "split", "score", "value"), rows) if rows else ""
    return f"<!-- scores -->\n{table}<!-- end of scores -->\n"


def _value(result: Any) -> str:
    value = result.metric_value
    return f"{100 * value:.2f} %" if isinstance(value, float) and 0 <= value <= 1 else str(value)


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines) + "\n"
