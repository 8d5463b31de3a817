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

CARRIED_ALONG = (
    "from .image_processing_ita import ITAImageProcessor  # noqa: E402, F401",
    "from .pipeline_ita import ITAImageSegmentationPipeline  # noqa: E402, F401",
)
"""End the flat `modeling_ita.py`: the loader copies what is imported, so that a loaded model can be saved again."""

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
    missing = [line for line in CARRIED_ALONG if line not in texts["modeling_ita.py"]]
    texts["modeling_ita.py"] += "".join(f"{line}\n" for line in missing)
    return texts
