"""Convert checkpoints of the published implementations of ITA, FC-CLIP, MAFT+ and Mask-Adapter.

The published code saves detectron2 checkpoints, `{"model": {name: tensor}}` or the tensors alone. Which system it is,
and every size, is read off the names and shapes of its tensors; nothing pickled is executed. FC-CLIP's published files
lack the frozen CLIP, whose own release has it: `clip_weights`.
"""

import dataclasses
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ita_segmentation.errors import ITAError, one_line
from modeling_ita.clip_backbone import resolve_clip_config
from modeling_ita.configuration_ita import ITAConfig
from modeling_ita.modeling_ita import ITAForOpenVocabSegmentation
from modeling_ita.text import Vocabulary, normalize_vocabulary

_CLIP = "backbone.clip_model."
_PIXEL_DECODER = "sem_seg_head.pixel_decoder."
_PREDICTOR = "sem_seg_head.predictor."
_HEADS = 8  # of every attention in both published systems; no tensor shows it

_ENCODER = rf"^{_PIXEL_DECODER}transformer\.encoder\.layers\.(\d+)\."
_CROSS = rf"^{_PREDICTOR}transformer_cross_attention_layers\.(\d+)\."
_SELF = rf"^{_PREDICTOR}transformer_self_attention_layers\.(\d+)\."
_FFN = rf"^{_PREDICTOR}transformer_ffn_layers\.(\d+)\."
_RENAMES: tuple[tuple[str, str], ...] = (
    (rf"^{_CLIP}", "clip_backbone.clip."),
    (r"^backbone\.add_tgt_em\.weight$", "dominant_categories.projection"),
    (r"^void_embedding\.weight$", "void_embedding"),
    (rf"^{_PIXEL_DECODER}input_proj\.", "detail_enhancement.input_projections."),
    (rf"^{_PIXEL_DECODER}transformer\.level_embed$", "detail_enhancement.level_embedding"),
    (rf"{_ENCODER}self_attn\.", r"detail_enhancement.layers.\1.attention."),
    (rf"{_ENCODER}norm1\.", r"detail_enhancement.layers.\1.attention_norm."),
    (rf"{_ENCODER}norm2\.", r"detail_enhancement.layers.\1.ffn_norm."),
    (rf"{_ENCODER}linear", r"detail_enhancement.layers.\1.linear"),
    (rf"^{_PIXEL_DECODER}adapter_1\.norm\.", "detail_enhancement.lateral.1."),
    (rf"^{_PIXEL_DECODER}adapter_1\.", "detail_enhancement.lateral.0."),
    (rf"^{_PIXEL_DECODER}layer_1\.norm\.", "detail_enhancement.output.1."),
    (rf"^{_PIXEL_DECODER}layer_1\.", "detail_enhancement.output.0."),
    (rf"^{_PIXEL_DECODER}mask_features\.", "detail_enhancement.mask_features."),
    (rf"{_CROSS}multihead_attn\.", r"image_text_aggregation.layers.\1.cross_attention."),
    (rf"{_CROSS}norm\.", r"image_text_aggregation.layers.\1.cross_attention_norm."),
    (rf"{_SELF}self_attn\.", r"image_text_aggregation.layers.\1.self_attention."),
    (rf"{_SELF}norm\.", r"image_text_aggregation.layers.\1.self_attention_norm."),
    (rf"{_FFN}norm\.", r"image_text_aggregation.layers.\1.ffn_norm."),
    (rf"{_FFN}", r"image_text_aggregation.layers.\1."),
    (rf"^{_PREDICTOR}decoder_norm\.", "image_text_aggregation.norm."),
    (rf"^{_PREDICTOR}query_feat\.weight$", "image_text_aggregation.learned_queries"),
    (rf"^{_PREDICTOR}query_embed\.weight$", "image_text_aggregation.query_positions"),
    (rf"^{_PREDICTOR}level_embed\.weight$", "image_text_aggregation.level_embedding"),
    (rf"^{_PREDICTOR}mask_embed\.", "image_text_aggregation.mask_embedding."),
    (rf"^{_PREDICTOR}_mask_pooling_proj\.", "image_text_aggregation.pooled_projection."),
    (rf"^{_PREDICTOR}class_embed\.", "image_text_aggregation.class_embedding."),
    (rf"^{_PREDICTOR}logit_scale$", "image_text_aggregation.logit_scale"),
    (r"^mask_adapter\.mask_downscaling\.6\.", "mask_classifier.pooling.adapter.mask_projection."),
    (r"^mask_adapter\.mask_downscaling\.", "mask_classifier.pooling.adapter.mask_tokens."),
    (r"^mask_adapter\.fuse\.", "mask_classifier.pooling.adapter.fuse."),
    (r"^mask_adapter\.cnext([123])\.dwconv\.", r"mask_classifier.pooling.adapter.block\1.depthwise."),
    (r"^mask_adapter\.cnext([123])\.norm\.", r"mask_classifier.pooling.adapter.block\1.norm."),
    (r"^mask_adapter\.cnext([123])\.pwconv([12])\.", r"mask_classifier.pooling.adapter.block\1.linear\2."),
    (r"^mask_adapter\.cnext([123])\.gamma$", r"mask_classifier.pooling.adapter.block\1.scale"),
    (r"^mask_adapter\.norm\.", "mask_classifier.pooling.adapter.norm."),
    (r"^mask_adapter\.final\.", "mask_classifier.pooling.adapter.maps."),
    (r"^cdt\.cross_atten\.multihead_attn\.", "mask_classifier.text_transfer.attention."),
    (r"^cdt\.cross_atten\.MLP\.", "mask_classifier.text_transfer.linear."),
    (r"^cdt\.cross_atten\.norm\.", "mask_classifier.text_transfer.norm."),
)

_ADAPTER = "mask_adapter."
_TRANSFER = "cdt.cross_atten."
_TRANSFER_BY_TRAINING = {172: "post_norm", 134: "res_post_norm"}
"""MAFT+'s form of the transfer, by the rows of `criterion.empty_weight`: COCO-Stuff's or COCO panoptic's classes and
void. Mask-Adapter's checkpoints have no such tensor, but are known by their width."""
_PUBLISHED_SETTINGS: dict[tuple[str, int], dict[str, Any]] = {
    ("MAFT+", 640): {"text_transfer": "post_norm"},
    ("MAFT+ with Mask-Adapter", 640): {
        "text_transfer": "post_norm",
        "adapter_mask_threshold": 0.45,
        "ensemble_alpha": 0.7,
        "ensemble_beta": 1.0,
    },
    ("MAFT+ with Mask-Adapter", 768): {
        "text_transfer": "res_post_norm",
        "adapter_mask_threshold": 0.40,
        "ensemble_alpha": 0.8,
        "ensemble_beta": 1.0,
    },
}
"""What no tensor shows, by system and embedding width, where one public checkpoint has these."""

# Buffers and constants that real checkpoints hold and no network needs.
_PASSED_OVER = re.compile(
    r"^(backbone_t\..*|criterion\.empty_weight|pixel_mean|pixel_std|sem_seg_head\.predictor\.static_query.*"
    r"|backbone\.clip_model\.(attn_mask|input_resolution|context_length|vocab_size|visual\.input_resolution)"
    r"|.*\.num_batches_tracked|category_tensor|.*\.category_tensor)$"
)
_SHOWN = 6  # tensors of a kind that a message names


class ConversionError(ITAError):
    """A checkpoint that cannot be converted.

    Attributes:
        problems: one line for each tensor that does not fit; the message names the first of each kind.
    """

    def __init__(self, message: str, problems: Mapping[str, list[str]] | None = None):
        self.problems = [f"{kind} {name}" for kind, names in (problems or {}).items() for name in names]
        for kind, names in (problems or {}).items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            message += f"; {kind} {', '.join(names[:_SHOWN])}{more}"
        super().__init__(message)


def load_original(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of an original checkpoint: `.pth` / `.pt`, `.pkl` (arrays) or `.safetensors`.

    Args:
        path: the file. Nothing of it is executed.

    Returns:
        Tensor by name.

    Raises:
        ConversionError: no such file, an unknown format, a damaged file, or a pickle that holds anything but tensors,
            arrays and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"no such checkpoint: {path}")
    readers: dict[str, Callable[[Path], Any]] = {".safetensors": load_file, ".pkl": _load_arrays}
    readers.update(dict.fromkeys((".pth", ".pt", ".bin"), _load_torch))
    if path.suffix.lower() not in readers:
        raise ConversionError(f"{path.name}: unknown kind of checkpoint; .pth, .pkl or .safetensors is read")
    try:
        content: Any = readers[path.suffix.lower()](path)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = one_line(error, 160)
        if "Weights only load failed" in reason:
            reason = "it holds something other than tensors, which is refused"
        message = f"{path.name} cannot be read safely as a checkpoint of tensors: {reason}"
        raise ConversionError(message) from error
    content = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path.name} holds no dictionary of tensors")
    tensors = {
        name: value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor | np.ndarray | np.generic)
    }
    if not tensors:
        raise ConversionError(f"{path.name} holds no tensors")
    return tensors


def _load_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle numpy arrays and plain containers, and refuse to look up anything else."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy.core.numeric", "_frombuffer"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def _load_arrays(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if head[:2] == b"PK":  # a torch archive under another name
            return _load_torch(path)
        return _ArrayUnpickler(file, encoding="latin1").load()


def lacks_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a tower of the frozen CLIP is not among the tensors of an original checkpoint."""
    names = [name.removeprefix(_CLIP) for name in tensors if name.startswith(_CLIP)]
    return not all(
        any(name.startswith(tower) for name in names) for tower in ("visual.", ("transformer.", "text."))
    )


def convert_config(
    tensors: Mapping[str, Tensor],
    clip_model: str | dict[str, Any],
    train_vocabulary: Vocabulary | list | None = None,
    **overrides: Any,
) -> ITAConfig:
    """Read the configuration of an original checkpoint off its tensors.

    Args:
        tensors: the original checkpoint, with the tensors of its CLIP.
        clip_model: a name in open_clip's registry, or an open_clip configuration.
        train_vocabulary: the classes it was trained on (COCO's 133 for the published ones).
        **overrides: fields of `ITAConfig` that no tensor shows.

    Raises:
        ConversionError: none of these systems, an unknown CLIP, a ResNet whose activation is not known, a setting that
            no tensor shows is not given, or a field that does not exist or has an impossible value.
    """
    needed = [
        f"{_PREDICTOR}query_feat.weight",
        f"{_PREDICTOR}query_embed.weight",
        f"{_PIXEL_DECODER}mask_features.weight",
    ]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ConversionError(
            f"not a checkpoint of ITA, FC-CLIP, MAFT+ or Mask-Adapter: it lacks {', '.join(missing)}"
        )
    is_ita = "backbone.add_tgt_em.weight" in tensors
    learned, hidden_dim = tensors[f"{_PREDICTOR}query_feat.weight"].shape
    positions = len(tensors[f"{_PREDICTOR}query_embed.weight"])
    offsets = tensors[f"{_PIXEL_DECODER}transformer.encoder.layers.0.self_attn.sampling_offsets.weight"]
    resnet = f"{_CLIP}visual.attnpool.q_proj.weight" in tensors
    name, clip_config = (clip_model, None) if isinstance(clip_model, str) else ("custom", clip_model)
    try:
        clip_config = resolve_clip_config(name, clip_config)
    except ValueError as error:
        raise ConversionError(one_line(error)) from error
    if resnet and isinstance(clip_model, str) and not clip_config.get("quick_gelu"):
        raise ConversionError(
            f"no tensor shows which activation {clip_model} was trained with: OpenAI's ResNets, which FC-CLIP uses, "
            f"have QuickGELU (--clip_model {clip_model}-quickgelu); for GELU give the configuration as a JSON file"
        )
    clip_config["custom_text"] = any(key.startswith(f"{_CLIP}text.") for key in tensors)
    fields: dict[str, Any] = {
        "clip_model_name": name,
        "clip_model_config": clip_config,
        "train_vocabulary": [list(synonyms) for synonyms in normalize_vocabulary(train_vocabulary)]
        if train_vocabulary
        else None,
        "hidden_dim": hidden_dim,
        "mask_dim": len(tensors[f"{_PIXEL_DECODER}mask_features.weight"]),
        "num_learned_queries": learned,
        "num_dominant_categories": positions - learned if is_ita else 0,
        "dominant_category_source": "thumbnail" if is_ita else "features",
        "decoder_self_attention": any("transformer_self_attention_layers" in key for key in tensors),
        "num_attention_heads": _HEADS,
        "encoder_layers": _count(tensors, rf"{_PIXEL_DECODER}transformer\.encoder\.layers"),
        "encoder_ffn_dim": len(tensors[f"{_PIXEL_DECODER}transformer.encoder.layers.0.linear1.weight"]),
        "encoder_points": len(offsets) // (_HEADS * 3 * 2),
        "decoder_layers": _count(tensors, f"{_PREDICTOR}transformer_cross_attention_layers"),
        "decoder_ffn_dim": len(tensors[f"{_PREDICTOR}transformer_ffn_layers.0.linear1.weight"]),
        "ensemble_on_valid_mask": resnet,
        **_family_settings(tensors, overrides),
    }
    unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(ITAConfig)})
    if unknown:
        raise ConversionError(f"ITAConfig has no field {', '.join(unknown)}")
    try:
        return ITAConfig(**{**fields, **overrides})
    except ValueError as error:
        raise ConversionError(one_line(error)) from error


def system_name(tensors: Mapping[str, Tensor]) -> str:
    """Tell which published system a checkpoint is of, by the names of its tensors."""
    parts = []
    if any(name.startswith(_TRANSFER) for name in tensors):
        parts.append("MAFT+")
    else:
        parts.append("ITA" if "backbone.add_tgt_em.weight" in tensors else "FC-CLIP")
    if any(name.startswith(_ADAPTER) for name in tensors):
        parts.append("Mask-Adapter")
    return " with ".join(parts)


def _family_settings(tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields of MAFT+ and Mask-Adapter."""
    fields: dict[str, Any] = {}
    has_adapter = _ADAPTER + "fuse.weight" in tensors
    if has_adapter:
        fields = {
            "mask_pooling": "adapter",
            "mask_padding": False,
            "adapter_dim": len(tensors[_ADAPTER + "fuse.weight"]),
            "adapter_mask_channels": len(tensors[_ADAPTER + "mask_downscaling.3.weight"]),
            "adapter_num_maps": len(tensors[_ADAPTER + "final.weight"]),
        }
    if _TRANSFER + "norm.weight" not in tensors:
        ensemble = {"ensemble_alpha": 0.7, "ensemble_beta": 0.9} if has_adapter else {}
        return fields | ensemble
    system, embed_dim = system_name(tensors), len(tensors[_TRANSFER + "norm.weight"])
    fields |= {"mask_padding": False, "text_transfer_heads": _HEADS}
    fields |= _PUBLISHED_SETTINGS.get((system, embed_dim), {})
    if not has_adapter:  # no ensemble
        fields |= {"ensemble_alpha": 1.0, "ensemble_beta": 1.0}
    trained_on = len(tensors.get("criterion.empty_weight", ()))
    if trained_on in _TRANSFER_BY_TRAINING:
        fields["text_transfer"] = _TRANSFER_BY_TRAINING[trained_on]
    needed = ["text_transfer", "ensemble_alpha", "ensemble_beta", *["adapter_mask_threshold"] * has_adapter]
    missing = [name for name in needed if name not in fields and name not in overrides]
    if missing:
        raise ConversionError(
            f"no tensor of this {system} checkpoint shows {', '.join(missing)}, and it is none of the published ones: "
            'give them (text_transfer is "post_norm" as in the semantic checkpoints or "res_post_norm" as in the '
            "panoptic one)"
        )
    return fields


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"^{prefix}\.(\d+)\.")
    return 1 + max((int(match.group(1)) for name in tensors if (match := pattern.match(name))), default=-1)


def convert_state_dict(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Give tensors this project's names.

    Returns:
        The renamed tensors, and the original names for which there is no new one.
    """
    converted, unknown = {}, []
    for name, tensor in tensors.items():
        if _PASSED_OVER.match(name):
            continue
        renamed = convert_name(name)
        if renamed is None:
            unknown.append(name)
        elif ".in_proj_" in renamed and not renamed.startswith("clip_backbone."):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[renamed.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            converted[renamed] = tensor
    return converted, unknown


def convert_name(name: str) -> str | None:
    """Return a parameter's name here (fused attention projections keep `in_proj_`), or None."""
    for pattern, replacement in _RENAMES:
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            return renamed
    return None


def convert_checkpoint(
    checkpoint: str | Path | Mapping[str, Tensor],
    clip_model: str | dict[str, Any],
    vocabulary: Vocabulary | list | None = None,
    train_vocabulary: Vocabulary | list | None = None,
    clip_weights: Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> ITAForOpenVocabSegmentation:
    """Convert an original checkpoint to a model of this project, in eval mode.

    Args:
        checkpoint: its file, or its tensors by name.
        clip_model: open_clip's name of its CLIP, or an open_clip configuration.
        vocabulary: the classes it segments when a call names none.
        train_vocabulary: the classes whose masks it was trained on; by default the vocabulary.
        clip_weights: state dict of its CLIP, for what the file lacks of it; tensors in the file take precedence.
            MAFT+'s image tower must be in the file.
        **overrides: fields of `ITAConfig` that no tensor shows.

    Raises:
        ConversionError: it cannot be read, lacks its CLIP, or its tensors do not fit; those are listed.
        ValueError: a malformed vocabulary.
    """
    tensors = dict(checkpoint) if isinstance(checkpoint, Mapping) else load_original(checkpoint)
    if clip_weights is not None:
        is_maft = system_name(tensors).startswith("MAFT+")
        if is_maft and not any(name.startswith(f"{_CLIP}visual.") for name in tensors):
            raise ConversionError(
                "the checkpoint lacks MAFT+'s image tower, which differs from the CLIP's release"
            )
        tensors = {f"{_CLIP}{name}": tensor for name, tensor in clip_weights.items()} | tensors
    if lacks_clip(tensors):
        raise ConversionError(
            "the checkpoint lacks the weights of its frozen CLIP: say where they are (--clip)"
        )
    config = convert_config(tensors, clip_model, train_vocabulary or vocabulary, **overrides)
    converted, unknown = convert_state_dict(tensors)
    with torch.device("meta"):  # sizes only: every tensor comes from the checkpoint
        model = ITAForOpenVocabSegmentation(config)
    expected = model.state_dict()
    for name in expected:
        if name.endswith("num_batches_tracked"):
            converted.setdefault(name, torch.zeros((), dtype=torch.long))
    problems = {
        "unknown:": unknown + [name for name in converted if name not in expected],
        "missing:": [name for name in expected if name not in converted],
        "of another shape:": [
            f"{name} {tuple(converted[name].shape)}, needed {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in converted and converted[name].shape != tensor.shape
        ],
        "not finite:": [
            name
            for name, tensor in converted.items()
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
        ],
    }
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        count = sum(map(len, problems.values()))
        raise ConversionError(f"{count} tensors do not fit this CLIP and architecture", problems)
    model.load_state_dict({name: converted[name].contiguous().float() for name in expected}, assign=True)
    model.clip_backbone.restore_buffers(config.clip_model_config or {})
    model.clip_backbone.freeze()
    if vocabulary is not None:
        model.set_vocabulary(vocabulary)
    return model.eval()
