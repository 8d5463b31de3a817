"""transformers' common tests, which come with its source distribution and not with the wheel.

`TRANSFORMERS_SOURCE` names the unpacked source of the installed version:

    pip download --no-deps --no-binary :all: transformers==VERSION && tar xzf transformers-VERSION.tar.gz
    TRANSFORMERS_SOURCE=transformers-VERSION pytest tests/modeling_ita/test_transformers_mixins.py
"""

import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import transformers.utils

SOURCE_VARIABLE = "TRANSFORMERS_SOURCE"
PACKAGE = "transformers_source_tests"
MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "torch_compile_test",
)
LEFT_OUT: dict[str, dict[str, Any]] = {
    # What the source distribution leaves out of `tests/` although the common tests import it.
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "problem_type": "regression",
        }
    },
}


def why_not_here() -> str | None:
    """Say why the common tests cannot be imported here; None if they can."""
    source = os.environ.get(SOURCE_VARIABLE)
    if not source:
        return f"{SOURCE_VARIABLE} does not name an unpacked source distribution of transformers"
    if not (Path(source) / "tests" / "test_modeling_common.py").is_file():
        return f"{SOURCE_VARIABLE}={source} holds no tests/test_modeling_common.py"
    for line in (Path(source) / "src" / "transformers" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__") and transformers.__version__ not in line:
            return f"{SOURCE_VARIABLE} is not the source of the installed transformers {transformers.__version__}"
    return None


def common_tests(name: str) -> types.ModuleType:
    """Import a module of transformers' `tests/`, such as `test_modeling_common`."""
    if PACKAGE not in sys.modules:
        folder = Path(os.environ[SOURCE_VARIABLE]).resolve() / "tests"
        _add_module(PACKAGE, {"__path__": [str(folder)]})
        for path, content in LEFT_OUT.items():
            if not (folder / f"{path.replace('.', '/')}.py").is_file():
                _add_module(f"{PACKAGE}.{path.split('.')[0]}", {"__path__": []})
                _add_module(f"{PACKAGE}.{path}", content)
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


def _add_module(name: str, content: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
