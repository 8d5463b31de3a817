"""The code that a saved checkpoint carries, so that it loads where this package is not installed.

transformers' loader takes code from the checkpoint's folder itself, copies it flat and finds further files by
`from .name import ...` alone. Files are therefore written flat, with the imports between them made relative.
"""

import re
from pathlib import Path

CODE_FILES = (
    "configuration_ita.py",
    "image_processing_ita.py",
    "pipeline_ita.py",
    "modeling_ita.py",
    "batch_groups.py",
    "checkpoint_code.py",
    "clip_backbone.py",
    "vocabulary.py",
    "dominant_categories.py",
    "detail_enhancement.py",
    "image_text_aggregation.py",
    "open_vocab_classification.py",
    "set_criterion.py",
)

_TOP_LEVEL_IMPORT = re.compile(
    r"^from (configuration_ita|image_processing_ita|pipeline_ita) import", re.MULTILINE
)
_PACKAGE_IMPORT = re.compile(r"^from modeling_ita\.(\w+) import", re.MULTILINE)


def flatten_imports(source: str) -> str:
    """Source code with imports of this package's modules made relative to one flat folder."""
    source = _TOP_LEVEL_IMPORT.sub(r"from .\1 import", source)
    return _PACKAGE_IMPORT.sub(r"from .\1 import", source)


def copy_code(folder: Path, source: str | None = None) -> None:
    """Writes the code into a checkpoint's folder.

    Args:
        folder: where the checkpoint is.
        source: the folder that the model was loaded from, if any: a model that runs from a checkpoint's own code finds
            there what the loader did not need to copy.

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
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
