"""What a checkpoint holds beside weights and configuration, so that it works where this package is not installed.

When a model is saved, transformers copies its module and all modules that this one imports relatively, directly or
not (`custom_object_save`). The imports below are therefore also what brings the pipelines, the image processor and the
handler of an Inference Endpoint along.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .configuration_ita import ITAConfig
from .handler import EndpointHandler
from .image_processing_ita import ITAImageProcessor
from .model_card import write_model_card
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
        """Save weights and configuration as `PreTrainedModel.save_pretrained` does, with all that a stranger needs.

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
            _bring_along(source, folder)
            (folder / "requirements.txt").write_text(ENDPOINT_REQUIREMENTS, encoding="utf-8")
            write_model_card(folder, self.config.to_dict(), source=source, metadata=card_metadata)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Write the card again: `push_to_hub` has just replaced it by a blank form or by the card on the Hub."""
        write_model_card(Path(working_dir), self.config.to_dict(), repo_id, self.config._name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def _bring_along(source: str, folder: Path) -> None:
    """Save image processor and example images of the checkpoint `source` (a folder or a Hub id) into `folder`."""
    if not source:
        return
    if not (folder / "preprocessor_config.json").exists():
        with contextlib.suppress(OSError):  # the checkpoint has none
            ITAImageProcessor.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    examples = Path(source) / "examples"
    if examples.is_dir() and not (folder / "examples").exists():
        shutil.copytree(examples, folder / "examples")


def check_weights_index(checkpoint: Any) -> None:
    """Check that the index of a checkpoint folder's weights names files inside the folder only.

    Raises:
        ValueError: it does not.
    """
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
