"""Trains ITA on the Scenes world or on a `datasets` data set, from a CLIP or from a checkpoint.

    accelerate launch run_train.py --config recipes/scenes_ita_tiny.yaml --clip CLIP_DIR --output_dir OUT
    accelerate launch run_train.py --config ... --model_config.decoder_self_attention true --max_minutes 30

A configuration file (YAML or JSON) holds the same arguments; what the command line says goes before. The end of
a run leaves in `output_dir` a checkpoint that loads through transformers' Auto classes.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import HfArgumentParser, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ita_segmentation.data.training import ITADataArguments, TrainingClasses, TrainingCollator, load_data
from ita_segmentation.errors import ITAError
from ita_segmentation.training.arguments import (
    BadInput,
    ITAModelArguments,
    ITATrainingArguments,
    read_mapping,
)
from ita_segmentation.training.checkpoints import checkpoints_of, damage, flush, last_complete, unfinished
from ita_segmentation.training.clip_source import read_clip
from ita_segmentation.training.clip_tuning import prepare_clip
from ita_segmentation.training.name_tuning import learn_words_of, take_words
from ita_segmentation.training.pseudo_labels import kept_classes
from ita_segmentation.training.report_callback import RunReport
from ita_segmentation.training.stopping import FAILED, RunStopped
from ita_segmentation.training.trainer import ITATrainer
from ita_segmentation.training.weights import on_host
from modeling_ita import ITAForOpenVocabSegmentation, ITAImageProcessor
from modeling_ita.configuration_ita import ITAConfig
from modeling_ita.vocabulary import normalize_vocabulary

Arguments = tuple[ITAModelArguments, ITADataArguments, ITATrainingArguments]
ARGUMENT_CLASSES: tuple[Any, ...] = (ITAModelArguments, ITADataArguments, ITATrainingArguments)


# ------------------------------------------------------------------------------------------------------------
# Arguments


class OneLineParser(HfArgumentParser):
    """Says what is wrong without the names of all arguments before it."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def parse_arguments(argv: list[str]) -> Arguments:
    """Command line, over the file that `--config` names, over the defaults.

    Raises:
        BadInput: an argument that does not exist or has a value that cannot be, or the file cannot be read or says
            what is no argument.
        SystemExit: `--help`.
    """
    parser = OneLineParser(ARGUMENT_CLASSES, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="YAML or JSON file of the arguments below.")
    arguments, config_file, model_config = [], None, {}
    rest = iter(expand_equals(argv))
    for word in rest:
        following = next(rest, None) if word == "--config" or word.startswith("--model_config") else None
        if word == "--config":
            config_file = following
        elif word == "--model_config":
            model_config.update(read_mapping(following or "", "--model_config"))
        elif word.startswith("--model_config."):
            model_config[word.removeprefix("--model_config.")] = yaml.safe_load(following or "")
        else:
            arguments.append(word)
    from_file = read_config(config_file) if config_file else {}
    model_config = {**(from_file.pop("model_config", None) or {}), **model_config}
    arguments = [*as_words(from_file), *bare_resume(arguments), "--model_config", json.dumps(model_config)]
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        args=arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise BadInput(f"unknown argument {unknown[0]!r} (see --help)")
    model, data, training = parsed
    return model, data, training


def expand_equals(argv: list[str]) -> list[str]:
    """`--key=value` -> `--key value`."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]


def bare_resume(words: list[str]) -> list[str]:
    """`--resume_from_checkpoint` without a value means the last checkpoint of the output folder."""
    flag, result = "--resume_from_checkpoint", []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        result += [word, "last"] if word == flag and following.startswith("--") else [word]
    return result


def read_config(path: str) -> dict[str, Any]:
    """The arguments in a YAML or JSON file, checked by name."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the configuration {path}: {error}") from error
    values = read_mapping(text, path)
    known = {f.name for arguments in ARGUMENT_CLASSES for f in dataclasses.fields(arguments)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise BadInput(f"{path}: unknown argument {', '.join(map(repr, unknown))}")
    if not isinstance(values.get("model_config") or {}, dict):
        raise BadInput(f"{path}: model_config must be a mapping of ITAConfig fields")
    return values


def as_words(values: dict[str, Any]) -> list[str]:
    """Values of a file as words of a command line, so that both are read by the same rules."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


# ------------------------------------------------------------------------------------------------------------
# Model


def load_model(
    arguments: ITAModelArguments, classes: TrainingClasses, data: ITADataArguments
) -> tuple[ITAForOpenVocabSegmentation, ITAImageProcessor]:
    """Network and image processor: new on a CLIP, or a checkpoint's with these classes as its own.

    The processor feeds images at the size of training; a checkpoint fine-tuned on other data keeps its own size.
    """
    image_size = {"shortest_edge": data.image_size, "longest_edge": 4 * data.image_size}
    if (arguments.clip is None) == (arguments.model is None):
        raise BadInput("give one of --clip CLIP (a new model) and --model DIR (fine-tuning)")
    if arguments.keep_vocabulary and arguments.model is None:
        raise BadInput("--keep_vocabulary is for --model: a new model has no words to keep")
    changes = arguments.config_changes
    unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(ITAConfig)})
    if unknown:
        raise BadInput(f"model_config: ITAConfig has no field {', '.join(map(repr, unknown))}")
    if arguments.model is not None:
        folder = existing_folder(arguments.model, "model")
        config = ITAConfig.from_pretrained(folder, **changes)
        try:
            model = ITAForOpenVocabSegmentation.from_pretrained(folder, config=config)
        except (SafetensorError, RuntimeError) as error:
            raise BadInput(f"--model: the weights in {folder} cannot be read: {error}") from error
        kept = kept_classes(model, classes.classes) if arguments.keep_vocabulary else []
        model.set_vocabulary([*kept, *classes.classes])
        model.config.stuff_names = sorted({*(model.config.stuff_names or []), *classes.stuff_names})
        known = list(model.config.train_vocabulary or [])
        model.config.train_vocabulary = known + [c for c in classes.seen_classes if c not in known]
        if data.dataset == "scenes":
            return model, ITAImageProcessor.from_pretrained(folder, size=image_size)
        return model, ITAImageProcessor.from_pretrained(folder)

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
    colours = clip_config.get("preprocess_cfg") or {}
    processor = ITAImageProcessor(
        size=image_size,
        **{f"image_{key}": colours[key] for key in ("mean", "std") if key in colours},
    )
    return model, processor


def existing_folder(path: str, name: str) -> Path:
    if not Path(path).is_dir():
        raise BadInput(f"--{name}: there is no folder {path}")
    return Path(path)


# ------------------------------------------------------------------------------------------------------------


def checkpoint_to_resume(training: ITATrainingArguments) -> str | None:
    """The folder to resume from; None for a new run.

    "last" is the latest checkpoint of the output folder that is whole, "auto" the same or a new run if there is none.
    The first process looks, and the others do as it says.

    Raises:
        BadInput: there is no such checkpoint, it is damaged, or a new run would mix its checkpoints with others.
    """
    found: list[Any] = [None, None]
    if training.process_index == 0:
        try:
            found[0] = find_checkpoint(training.resume_from_checkpoint, Path(training.output_dir or "."))
        except BadInput as error:
            found[1] = str(error)
    checkpoint, problem = broadcast_object_list(found)
    if problem is not None:
        raise BadInput(problem)
    return checkpoint


def find_checkpoint(wanted: str | None, output: Path) -> str | None:
    """As `checkpoint_to_resume`, in the process that looks."""
    if wanted is None:
        present = checkpoints_of(output)
        if present:
            raise BadInput(
                f"{output} has checkpoints of an earlier run, such as {present[0].name}: go on with "
                "--resume_from_checkpoint, or name another --output_dir"
            )
        return None
    if wanted.lower() in ("last", "true", "auto"):
        last, damaged = last_complete(output)
        for line in damaged:
            sys.stderr.write(f"run_train: {line}; the one before it is taken\n")
        if last is None and (wanted.lower() != "auto" or damaged):
            raise BadInput(
                f"--resume_from_checkpoint: there is no {'whole ' * bool(damaged)}checkpoint in {output}"
            )
        return None if last is None else str(last)
    if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        raise BadInput(f"--resume_from_checkpoint: {wanted} is no checkpoint of a training run")
    reason = damage(Path(wanted))
    if reason is not None:
        raise BadInput(f"--resume_from_checkpoint: {wanted} is damaged: {reason}")
    return wanted


def build_trainer(arguments: Arguments) -> tuple[Any, str | None]:
    """Everything that can fail on what the user gave: data, model, trainer, and the checkpoint to resume."""
    model_arguments, data, training = arguments
    resume = checkpoint_to_resume(training)
    set_seed(training.seed)
    classes, train_dataset, eval_dataset = load_data(data, training)
    if eval_dataset is None and training.eval_strategy != "no":
        raise BadInput(f"eval_strategy is not 'no', but {data.dataset} has no {data.eval_split}")
    model, processor = load_model(model_arguments, classes, data)
    prepare_clip(model, training.train_clip, training.lora_rank, training.clip_dtype, training.channels_last)
    trainer = ITATrainer(
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
    trainer.add_callback(RunReport(trainer, arguments, data.dataset))
    if model_arguments.learn_words and trainer.kept is not None:
        if resume is not None:
            take_words(trainer.network, Path(resume))
        else:
            new = normalize_vocabulary(classes.seen_classes)
            learn_words_of(train_dataset, trainer.data_collator, trainer.kept, trainer.network, new)
    return trainer, resume


def main(argv: list[str] | None = None) -> None:
    """Parses, trains, evaluates once more and saves."""
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        trainer, resume = build_trainer(arguments)
    except (ITAError, BadInput, ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"run_train: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error
    try:
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.finish()
        trainer.log_metrics("train", result.metrics)
        if trainer.eval_dataset is not None:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics, combined=False)
        trainer.save_state()
        save(trainer)
    except RunStopped as error:  # all processes stop, and one says so
        if trainer.is_world_process_zero():
            sys.stderr.write(f"run_train: {error}\n")
        raise SystemExit(error.status) from error
    except (ITAError, ValueError, OSError, SafetensorError) as error:
        sys.stderr.write(f"run_train: {in_one_line(error)}\n")
        raise SystemExit(FAILED) from error


def in_one_line(error: Exception) -> str:
    """The message of an error, without the traceback that a worker process sends along with it."""
    lines = str(error).strip().splitlines()
    return lines[-1] if "Traceback" in str(error) else " ".join(" ".join(lines).split())


def save(trainer: ITATrainer) -> None:
    """The complete checkpoint, each file of it whole or as it was before.

    Weights written in half precision still load, and compute, in float32.
    """
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model)
    else:
        weights = trainer.network.state_dict()
    if not trainer.is_world_process_zero():
        return
    if trainer.args.half_weights:
        weights = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    written = unfinished(trainer.output / "model")
    shutil.rmtree(written, ignore_errors=True)
    try:
        trainer.network.save_pretrained(written, state_dict=on_host(weights))
        trainer.processor.save_pretrained(written)
        for file in [path for path in written.rglob("*") if path.is_file()]:
            flush(file)
            target = trainer.output / file.relative_to(written)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(written, ignore_errors=True)
