"""From arguments to a finished run: model and data, the checkpoint to resume, training, and the final model."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ita_segmentation.checkpoints import resolve_checkpoint
from ita_segmentation.data.training import ITADataArguments, TrainingClasses, TrainingCollator, load_data
from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.files import atomic_path
from ita_segmentation.training.arguments import ITAModelArguments, ITATrainingArguments, changed_arguments
from ita_segmentation.training.checkpoints import find_checkpoint, in_first_process, output_lock
from ita_segmentation.training.clip_tuning import prepare_clip, read_clip
from ita_segmentation.training.mask_adapter import MaskAdapterTrainer
from ita_segmentation.training.name_tuning import load_tuned_names, tune_class_names
from ita_segmentation.training.pseudo_labels import kept_classes
from ita_segmentation.training.results import RESULTS
from ita_segmentation.training.trainer import ITATrainer
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor
from modeling_ita.configuration_ita import ITAConfig
from modeling_ita.text import normal_form, normalize_vocabulary

logger = logging.get_logger(__name__)

Arguments = tuple[ITAModelArguments, ITADataArguments, ITATrainingArguments]
ARGUMENTS = "arguments.yaml"
MAX_IMAGES_WITHOUT_LABELS = 200
"""Images at the start of the training data of which at least one must have a labeled, seen class."""


def load_model(
    arguments: ITAModelArguments, classes: TrainingClasses, data: ITADataArguments
) -> tuple[ITAForOpenVocabSegmentation, ITAImageProcessor]:
    """Build a new model on a CLIP, or load a checkpoint for fine-tuning, with the dataset's classes as its own.

    The processor resizes to the size of training; a checkpoint that is fine-tuned on other data keeps its own size.

    Raises:
        UsageError: The arguments contradict each other, or what they name cannot be used.
    """
    if (arguments.clip is None) == (arguments.model is None):
        raise UsageError("give one of --clip CLIP (a new model) and --model DIR (fine-tuning)")
    if arguments.keep_vocabulary and arguments.model is None:
        raise UsageError("--keep_vocabulary is for --model: a new model has no classes to keep")
    changes = arguments.config_changes
    unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(ITAConfig)})
    if unknown:
        raise UsageError(f"model_config: ITAConfig has no field {', '.join(map(repr, unknown))}")
    image_size = {"shortest_edge": data.image_size, "longest_edge": 4 * data.image_size}
    if arguments.model is not None:
        model = _load_checkpoint(arguments, changes, classes)
        size: dict[str, Any] = {"size": image_size} if data.dataset == "scenes" else {}
        return model, ITAImageProcessor.from_pretrained(arguments.model, **size)

    clip_config, weights = read_clip(arguments.clip or "")
    fields: dict[str, Any] = {
        "clip_model_name": clip_config["name"],
        "clip_model_config": clip_config["model_cfg"],
        "vocabulary": classes.classes,
        "train_vocabulary": classes.seen_classes,
        "stuff_names": classes.stuff_names,
        **changes,
    }
    model = ITAForOpenVocabSegmentation.from_clip(ITAConfig(**fields), weights)
    preprocessing = clip_config.get("preprocess_cfg") or {}
    normalization = {f"image_{key}": preprocessing[key] for key in ("mean", "std") if key in preprocessing}
    return model, ITAImageProcessor(size=image_size, **normalization)


def _load_checkpoint(
    arguments: ITAModelArguments, changes: dict[str, Any], classes: TrainingClasses
) -> ITAForOpenVocabSegmentation:
    folder = resolve_checkpoint(arguments.model or "")
    config = ITAConfig.from_pretrained(folder, **changes)
    try:
        model = ITAForOpenVocabSegmentation.from_pretrained(folder, config=config)
    except (SafetensorError, RuntimeError) as error:
        raise UsageError(f"--model: the weights in {folder} cannot be read: {one_line(error)}") from error
    kept = kept_classes(model, classes.classes) if arguments.keep_vocabulary else []
    model.set_vocabulary([*kept, *classes.classes])
    model.config.stuff_names = sorted({*(model.config.stuff_names or []), *classes.stuff_names})
    known = list(model.config.train_vocabulary or [])
    forms = [_forms(names) for names in known]
    model.config.train_vocabulary = known + [one for one in classes.seen_classes if _forms(one) not in forms]
    return model


def _forms(names: list[str]) -> list[str]:
    return [normal_form(name) for name in names]


def build_trainer(
    model_arguments: ITAModelArguments, data: ITADataArguments, training: ITATrainingArguments
) -> tuple[ITATrainer, Path | None]:
    """Build the trainer, and find the checkpoint to resume from (None: a new run): all that wrong arguments break.

    Raises:
        UsageError: What is wrong, in one line.
    """
    try:
        return _build_trainer(model_arguments, data, training)
    except (ITAError, ValueError, OSError) as error:
        raise UsageError(str(error) if isinstance(error, ITAError) else one_line(error)) from error


def _build_trainer(
    model_arguments: ITAModelArguments, data: ITADataArguments, training: ITATrainingArguments
) -> tuple[ITATrainer, Path | None]:
    find = partial(find_checkpoint, training.resume_from_checkpoint, Path(training.output_dir or "."))
    checkpoint = in_first_process(training.process_index == 0, find)
    set_seed(training.seed)
    classes, train_dataset, eval_dataset = load_data(data, training)
    if eval_dataset is None and training.eval_strategy != "no":
        raise UsageError(f"eval_strategy is not 'no', but {data.dataset} has no {data.eval_split}")
    check_labels(train_dataset, data.dataset)
    model, processor = load_model(model_arguments, classes, data)
    if checkpoint is not None:
        check_classes(model.config, checkpoint)
    if model_arguments.tune_class_names and model.mask_classifier.needs_cell_embeds:
        refused = "not for a mask adapter or a text transfer"
        raise UsageError(f"tune_class_names compares names with hard masks: {refused}")
    prepare_clip(model, training.train_clip, training.lora_rank, training.clip_dtype, training.channels_last)
    tuned = model_arguments.model
    had = None if tuned is None else ITAConfig.from_pretrained(resolve_checkpoint(tuned)).mask_pooling
    if model.config.mask_pooling == "adapter" and had != "adapter":
        if training.train_adapter == "none":
            raise UsageError(
                "the mask adapter is new and would stay untrained: train one with train_adapter, on a segmenter that "
                'was trained with mask_pooling "hard"'
            )
        if training.train_adapter == "mixed":
            logger.warning("the mask adapter is new: train it with train_adapter ground_truth first")
    trainer_class: Any = ITATrainer
    if training.train_adapter != "none":
        if training.train_clip != "none" or training.lora_rank or model_arguments.keep_vocabulary:
            raise UsageError(
                "train_adapter freezes all else: it goes with no train_clip, lora_rank, keep_vocabulary"
            )
        trainer_class = partial(MaskAdapterTrainer, mixed=training.train_adapter == "mixed")
    trainer = trainer_class(
        model=model,
        args=training,
        classes=classes,
        eval_resize=data.dataset != "scenes",
        keep_vocabulary=model_arguments.keep_vocabulary,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=TrainingCollator(processor),
        processing_class=processor,
    )
    if model_arguments.tune_class_names and trainer.pseudo_labeler is not None:
        new, labeler = normalize_vocabulary(classes.seen_classes), trainer.pseudo_labeler
        if checkpoint is not None:
            load_tuned_names(trainer.network, checkpoint)
        else:
            tune_class_names(trainer.network, new, labeler, train_dataset, trainer.data_collator)
    return trainer, checkpoint


def check_classes(config: ITAConfig, checkpoint: Path) -> None:
    """Raise UsageError, naming a class that differs, unless a checkpoint to resume was trained on the same classes."""
    before = ITAConfig.from_pretrained(checkpoint)
    for name in ("vocabulary", "train_vocabulary"):
        old, new = (list(map(_forms, getattr(one, name) or [])) for one in (before, config))
        if old != new:
            differing = [names for names in (*new, *old) if (names in old) != (names in new)]
            example = f"such as {' | '.join(differing[0])!r}" if differing else "in their order"
            what = "classes" if name == "vocabulary" else "seen classes"
            raise UsageError(
                f"--resume_from_checkpoint: {checkpoint} was trained on {len(old)} {what}, the dataset has "
                f"{len(new)}; they differ, {example}"
            )


def check_labels(dataset: Any, name: str) -> None:
    """Raise UsageError if in none of the first training images a class is labeled and seen."""
    count = min(len(dataset), MAX_IMAGES_WITHOUT_LABELS)
    if not any(len(dataset[index]["class_labels"]) for index in range(count)):
        raise UsageError(
            f"the first {count} training images of {name} have no labels to learn: every pixel is ignored or of an "
            "unseen class"
        )


def run_training(trainer: ITATrainer, checkpoint: Path | None, arguments: Arguments) -> None:
    """Train, evaluate once more, save the model, and say where everything is.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint to resume from; None for a new run.
        arguments: The run's arguments, recorded in `arguments.yaml`.

    Raises:
        ITAError: The output folder is in use, or a file could not be read or written; a `TrainingStoppedError` if a
            loss was not finite, or a signal came.
    """
    with output_lock(trainer.output, is_owner=trainer.is_world_process_zero()):
        if trainer.is_world_process_zero():
            with atomic_path(trainer.output / ARGUMENTS) as file:
                file.write_text(
                    yaml.safe_dump(changed_arguments(*arguments), sort_keys=False), encoding="utf-8"
                )
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.finish()
            log, step = trainer.state.log_history, trainer.state.global_step
            scores = next((e for e in reversed(log) if "eval_runtime" in e and e["step"] == step), None)
            if scores is None and trainer.eval_dataset is not None:
                scores = trainer.evaluate()
            else:
                trainer.save_results([])
            if scores is not None:
                trainer.save_metrics("eval", scores, combined=False)
            trainer.save_model()
        except (ValueError, OSError, SafetensorError) as error:
            text = str(error).strip()  # a data loader's worker sends its traceback along
            raise ITAError(text.splitlines()[-1] if "Traceback" in text else one_line(text)) from error
    if trainer.is_world_process_zero():
        report_to = trainer.args.report_to or []
        lines = [f"model     {trainer.output}", f"results   {trainer.output / RESULTS}, {TRAINER_STATE_NAME}"]
        if "tensorboard" in report_to:
            lines.append(f"curves    tensorboard --logdir {trainer.output}")
        sys.stdout.write("\n".join(lines) + "\n")
