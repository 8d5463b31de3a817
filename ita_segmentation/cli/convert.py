"""Converts an original ITA or FC-CLIP checkpoint into one that `AutoModel.from_pretrained` loads."""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from ita_segmentation.class_names import read_vocabulary
from ita_segmentation.errors import ITAError

OVERVIEW = """
Example: python run_convert.py --checkpoint fcclip_cocopan.pth --clip_model convnext_large_d_320
         --vocabulary ade20k_150.txt --train_vocabulary coco_133.txt --output models/fcclip
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=OVERVIEW)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="original checkpoint: .pth, .pkl or .safetensors"
    )
    parser.add_argument(
        "--clip_model",
        required=True,
        help="open_clip's name of its CLIP (convnext_large_d_320, RN50-quickgelu, ...), or a JSON file with an "
        "open_clip configuration",
    )
    parser.add_argument(
        "--vocabulary", required=True, type=Path, help="classes, as JSON or lines 'id:name,synonym,...'"
    )
    parser.add_argument(
        "--train_vocabulary", type=Path, help="classes seen in training (default: --vocabulary)"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the converted checkpoint")
    return parser.parse_args(arguments)


def convert(arguments: argparse.Namespace) -> str:
    """Converts and saves; returns a line that says what it was. The output folder is complete or absent."""
    from ita_segmentation.conversion import convert_checkpoint
    from modeling_ita.image_processing_ita import ITAImageProcessor

    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise ValueError(f"{arguments.output} exists and is not empty")
    clip_model: str | dict = arguments.clip_model
    if arguments.clip_model.endswith(".json"):
        path = Path(arguments.clip_model)
        if not path.is_file():
            raise ValueError(f"no such CLIP configuration: {path}")
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path.name} is not JSON: {error}") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{path.name} does not hold an open_clip configuration")
        clip_model = loaded.get("model_cfg", loaded)
    vocabulary = read_vocabulary(arguments.vocabulary)
    train_vocabulary = read_vocabulary(arguments.train_vocabulary) if arguments.train_vocabulary else None
    model = convert_checkpoint(arguments.checkpoint, clip_model, vocabulary, train_vocabulary)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent, prefix=".converting-") as folder:
        target = Path(folder) / "checkpoint"
        model.save_pretrained(target)
        ITAImageProcessor().save_pretrained(target)
        if arguments.output.exists():
            arguments.output.rmdir()
        shutil.move(target, arguments.output)
    kind = "ITA" if model.config.num_dominant_categories else "FC-CLIP"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{arguments.output}: {kind}, {parameters / 1e6:.1f} M parameters, {len(vocabulary)} classes"


def main(arguments: list[str] | None = None) -> int:
    try:
        print(convert(parse_arguments(arguments)))
    except (ITAError, ValueError, OSError) as error:
        print(f"run_convert: {error}", file=sys.stderr)
        return 1
    return 0
