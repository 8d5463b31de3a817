"""What a saved checkpoint carries beside its weights, so that it works where this package is not installed.

transformers' loader takes code from the checkpoint's folder itself, copies it flat and finds further files by
`from .name import ...` alone. Files are therefore written flat, with the imports between them made relative.
"""

import copy
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_whole
from .model_card import write_model_card

AUTO_MAP = {
    "AutoConfig": "configuration_ita.ITAConfig",
    "AutoModel": "modeling_ita.ITAForOpenVocabSegmentation",
    "AutoModelForUniversalSegmentation": "modeling_ita.ITAForOpenVocabSegmentation",
    "AutoModelForSemanticSegmentation": "modeling_ita.ITAForOpenVocabSegmentation",
    "AutoModelForImageSegmentation": "modeling_ita.ITAForOpenVocabSegmentation",
}

CUSTOM_PIPELINES = {
    "image-segmentation": {
        "impl": "pipeline_ita.ITAImageSegmentationPipeline",
        "pt": ["AutoModelForImageSegmentation"],
    },
    "zero-shot-image-segmentation": {
        "impl": "pipeline_ita.ITAZeroShotImageSegmentationPipeline",
        "pt": ["AutoModelForImageSegmentation"],
    },
}

CODE_FILES = (
    "configuration_ita.py",
    "image_processing_ita.py",
    "pipeline_ita.py",
    "modeling_ita.py",
    "batching.py",
    "checkpoint_code.py",
    "model_card.py",
    "files.py",
    "handler.py",
    "clip_backbone.py",
    "vocabulary.py",
    "text.py",
    "text_store.py",
    "dominant_categories.py",
    "detail_enhancement.py",
    "deformable_triton.py",
    "image_text_aggregation.py",
    "outputs.py",
    "classification.py",
    "set_criterion.py",
)

CARRIED_ALONG = (
    "from .image_processing_ita import ITAImageProcessor  # noqa: E402, F401",
    "from .pipeline_ita import ITAImageSegmentationPipeline  # noqa: E402, F401",
    "from .handler import EndpointHandler  # noqa: E402, F401",
)
"""End the flat `modeling_ita.py`: the loader copies what is imported, so that a loaded model can be saved again."""

TELLS_VERSIONS_APART = """
if False:  # Never run. The loader reads it and takes this class anew for every version of the code.
    from .modeling_ita import ITAForOpenVocabSegmentation
"""
"""Ends the flat `configuration_ita.py`. Auto classes find a model's class by its configuration's, so that two
folders whose code differs need two classes of configuration, even where this file is the same in both."""

ENDPOINT_REQUIREMENTS = "transformers>=5.21\nopen_clip_torch>=3.3\ntimm>=1.0.20\npillow>=11\n"
COMPANIONS = ("preprocessor_config.json", "examples")

_TOP_LEVEL_IMPORT = re.compile(
    r"^from (configuration_ita|image_processing_ita|pipeline_ita) import", re.MULTILINE
)
_PACKAGE_IMPORT = re.compile(r"^from modeling_ita\.(\w+) import", re.MULTILINE)


def flatten_imports(source: str) -> str:
    """Source code with imports of this package's modules made relative to one flat folder."""
    source = _TOP_LEVEL_IMPORT.sub(r"from .\1 import", source)
    return _PACKAGE_IMPORT.sub(r"from .\1 import", source)


def collect_code(source: str | None = None) -> dict[str, str]:
    """The files of code that a checkpoint's folder needs, their text by name.

    Args:
        source: the folder that the model was loaded from, if any, as a last place to look.

    Raises:
        FileNotFoundError: a file of the code is nowhere to be found.
    """
    here = Path(__file__).resolve().parent
    places = [here, here.parent]
    if source and Path(source).is_dir():
        places.append(Path(source))
    texts = {}
    for name in CODE_FILES:
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{name}, which the checkpoint needs, is in none of {[str(p) for p in places]}"
            )
        texts[name] = flatten_imports(found.read_text(encoding="utf-8"))
    if TELLS_VERSIONS_APART not in texts["configuration_ita.py"]:
        texts["configuration_ita.py"] += TELLS_VERSIONS_APART
    missing = [line for line in CARRIED_ALONG if line not in texts["modeling_ita.py"]]
    texts["modeling_ita.py"] += "".join(f"{line}\n" for line in missing)
    return texts


def write_companions(
    folder: Path,
    code: Mapping[str, str],
    config: Mapping[str, Any],
    source: str | None = None,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes the code, the requirements of an endpoint and the card into a checkpoint's folder.

    Args:
        code: of `collect_code`. config: the configuration's `to_dict()`.
        source: the folder that the model was loaded from, if any: its image processor and its example images come
            along, where `folder` has none.
        name, metadata: as for `write_model_card`.
    """
    loaded_from = Path(source) if source and Path(source).is_dir() else None
    if loaded_from is not None and loaded_from.resolve() != folder.resolve():
        for companion in COMPANIONS:
            _copy_missing(loaded_from / companion, folder / companion)
    for file, text in code.items():
        write_whole(folder / file, text.encode())
    write_whole(folder / "requirements.txt", ENDPOINT_REQUIREMENTS.encode())
    write_model_card(folder, config, name, loaded_from, metadata)


def _copy_missing(source: Path, target: Path) -> None:
    if target.exists():
        return
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        write_whole(target, source.read_bytes())


class SavesItsCode:
    """Lets a model's folder have all that it needs, on disk and on the Hub. Goes before `PreTrainedModel`."""

    config: Any

    def save_pretrained(
        self, save_directory: Any, *args: Any, card_metadata: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Saves weights, configuration, code, model card and an endpoint's handler, as
        `PreTrainedModel.save_pretrained` saves the first two; the folder loads where this package is not installed.

        The image processor and the example images of the folder that the model was loaded from come along.
        card_metadata: front matter for the card, such as {"license": "mit", "datasets": ["someone/images"]}.
        """
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        code = collect_code(self.config._name_or_path)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            self._write_companions(save_directory, code, metadata=card_metadata)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Just before a push: the base class has put a form, or the Hub's card, in the place of the card."""
        self._write_companions(working_dir, collect_code(self.config._name_or_path), name=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    def _write_companions(self, folder: Any, code: Mapping[str, str], **options: Any) -> None:
        write_companions(Path(folder), code, self.config.to_dict(), self.config._name_or_path, **options)
