"""The folder that `ita export` writes: networks, tokenizer, vocabulary, settings, and what runs them without torch."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from ita_segmentation.export.ita_onnx import images
from ita_segmentation.export.ita_onnx.predictor import (
    EMBEDDINGS,
    IMAGE_NETWORK,
    NAMES,
    PROCESSOR,
    SETTINGS,
    TEXT_NETWORK,
    TOKENIZER,
)
from ita_segmentation.export.network import check_exportable, text_to_onnx, to_onnx
from ita_segmentation.export.tokenizer import build_tokenizer
from ita_segmentation.files import atomic_path, json_bytes, write_files
from modeling_ita import normalize_vocabulary
from modeling_ita.text import OTHER

RUNTIME = Path(images.__file__).parent
"""The package that a copy of goes into each folder."""
DOCKER_FILES = Path(__file__).parent / "docker"


def write_onnx_folder(model: Any, processor: Any, folder: Path, vocabulary: Any | None = None) -> None:
    """Write all that `ita_onnx.OnnxPredictor` takes, and a copy of that package.

    Args:
        model: an `ITAForOpenVocabSegmentation`.
        processor: its `ITAImageProcessor`.
        folder: where to write.
        vocabulary: the classes of calls that name none; None for the model's own.

    Raises:
        ITAError: a file cannot be written.
        OSError: the same.
        ValueError: the model, its tokenizer or the processor's settings cannot be exported.
    """
    write_settings(model, processor, folder)
    write_graph(folder, IMAGE_NETWORK, lambda path: to_onnx(model, path))
    write_graph(folder, TEXT_NETWORK, lambda path: text_to_onnx(model, path))
    write_vocabulary(model, folder, vocabulary)


def write_settings(model: Any, processor: Any, folder: Path) -> None:
    """Write what does not depend on a vocabulary: tokenizer, the processor's settings, and the package that reads them.

    Args:
        model: an `ITAForOpenVocabSegmentation`.
        processor: its `ITAImageProcessor`.
        folder: where to write.

    Raises:
        ITAError: a file cannot be written.
        ValueError: the model, its tokenizer or the processor's settings cannot be exported.
    """
    check_exportable(model)
    settings = {key: value for key, value in processor.to_dict().items() if key != "auto_map"}
    images.check_settings(settings)
    tokenizer = build_tokenizer(model).to_str()
    write_files({folder / TOKENIZER: tokenizer.encode(), folder / PROCESSOR: json_bytes(settings)})
    with atomic_path(folder / RUNTIME.name) as copy:
        shutil.copytree(RUNTIME, copy, ignore=shutil.ignore_patterns("__pycache__"))


def write_docker_files(folder: Path) -> None:
    """Write a Dockerfile for CPUs and one for CUDA, which run the package in the folder."""
    write_files({folder / file.name: file.read_bytes() for file in DOCKER_FILES.iterdir()})


def write_graph(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """Write a graph that may have a file of weights beside it, all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".exporting-") as temporary:
        write(Path(temporary) / name)
        # The weights of large models (model.onnx.data) come first.
        for file in sorted(Path(temporary).iterdir(), reverse=True):
            os.replace(file, folder / file.name)


def write_vocabulary(model: Any, folder: Path, vocabulary: Any | None = None) -> None:
    """Write the settings of a folder, the classes of calls that name none, and the names that are encoded already.

    These are the names of the classes, and of the model's own and those it was trained on, which compete with others.

    Args:
        model: the checkpoint that is exported.
        folder: where to write.
        vocabulary: classes; None takes the model's own.

    Raises:
        ITAError: a file cannot be written.
        ValueError: a malformed vocabulary, or one with too few names for a model whose queries attend to each other.
    """
    config = model.config
    own = model.default_vocabulary or []
    classes = own if vocabulary is None else normalize_vocabulary(vocabulary)
    trained = normalize_vocabulary(config.train_vocabulary) if config.train_vocabulary else []
    names = list(
        dict.fromkeys([name for part in (classes, own, trained) for entry in part for name in entry])
    )
    names = list(dict.fromkeys([*names, OTHER]))
    if config.decoder_self_attention and classes:
        _check_length(config, classes)
    with torch.no_grad():
        embeds = {
            kind: model.text_encoder.embed_names(names, config.templates, in_prompts=kind == "prompt_embeds")
            for kind in ("prompt_embeds", "name_embeds")
        }
    arrays = {kind: np.ascontiguousarray(values.float().cpu().numpy()) for kind, values in embeds.items()}
    settings = {
        "format": 1,
        "classes": [list(entry) for entry in classes],
        "own_classes": [list(entry) for entry in own],
        "train_vocabulary": [list(entry) for entry in trained],
        "stuff_names": list(config.stuff_names or ()),
        "templates": list(config.templates),
        "context_length": model.clip_backbone.context_length,
        "pads_tokens": not model.clip_backbone._attends_causally,
        "num_dominant_categories": config.num_dominant_categories,
        "dominant_category_source": config.dominant_category_source,
        "decoder_self_attention": config.decoder_self_attention,
        "domain": config.domain,
    }
    write_files(
        {
            folder / EMBEDDINGS: save(arrays),
            folder / NAMES: json_bytes(names),
            folder / SETTINGS: json_bytes(settings),
        }
    )


def _check_length(config: Any, classes: Any) -> None:
    by_class = config.dominant_category_source == "cells"
    count = len(classes) if by_class else len(classes.candidate_names)
    if count < config.num_dominant_categories:
        raise ValueError(
            f"the exported network of this model takes vocabularies of at least {config.num_dominant_categories} names"
        )
