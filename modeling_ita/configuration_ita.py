"""Configuration of ITA, image-text aggregation for open-vocabulary segmentation (Cheng et al., Neurocomputing 2025)."""

import math
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from .text import check_templates, normalize_vocabulary

if TYPE_CHECKING:
    # transformers keeps one class of configuration for each version of the code that this file imports, and finds the
    # model's class by it. Without this import, two checkpoints with different code would share the model's class.
    from .modeling_ita import ITAForOpenVocabSegmentation  # noqa: F401

VILD_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)
"""The prompt templates of ViLD's evaluation (arXiv 2104.13921), as FC-CLIP uses them."""

CHOICES = {
    "dominant_category_source": ("features", "thumbnail", "cells"),
    "mask_pooling": ("hard", "adapter"),
    "text_query_matching": ("any", "own_class"),
    "text_query_class_bias": (False, True),
    "text_query_regions": (False, True),
    "text_transfer": (None, "post_norm", "res_post_norm"),
}

INTEGER_RANGES = {
    "hidden_dim": (32, 8192),
    "mask_dim": (1, 8192),
    "num_learned_queries": (0, 100_000),
    "num_dominant_categories": (0, 100_000),
    "num_attention_heads": (1, 1024),
    "encoder_layers": (0, 256),
    "encoder_ffn_dim": (1, 65_536),
    "encoder_points": (1, 256),
    "decoder_layers": (0, 256),
    "decoder_ffn_dim": (1, 65_536),
    "dense_upsample": (1, 32),
    "adapter_mask_channels": (4, 8192),
    "adapter_dim": (1, 65_536),
    "adapter_num_maps": (1, 8192),
    "text_transfer_heads": (1, 1024),
    "train_num_points": (1, 10_000_000),
}
MAX_PARAMETERS = 20_000_000_000
"""Of the head, and of each tower of the CLIP: beyond this a size is a mistake."""
NUMBER_RANGES = {
    "ensemble_alpha": (0, 1),
    "ensemble_beta": (0, 1),
    "objectness_weight": (0, 1),
    "adapter_mask_threshold": (0, 1),
    "adapter_min_score": (0, 1),
    "class_weight": (0, math.inf),
    "mask_weight": (0, math.inf),
    "dice_weight": (0, math.inf),
    "no_object_weight": (0, math.inf),
    "oversample_ratio": (1, 1000),
    "importance_sample_ratio": (0, 1),
}


class ITAConfig(PreTrainedConfig):
    r"""Everything that defines an `ITAForOpenVocabSegmentation`.

    The defaults are the paper's model: ConvNeXt-L of open_clip, 20 text queries and 180 learned ones, nine decoder
    layers without self-attention. FC-CLIP (arXiv 2308.02487) is the same network with
    `num_dominant_categories=0, num_learned_queries=250, decoder_self_attention=True`. Mask-Adapter (arXiv 2412.04533)
    and MAFT+ (arXiv 2408.00744) are FC-CLIP with `mask_pooling="adapter"` and with `text_transfer`.

    Args:
        clip_model_name (`str`): name of the frozen CLIP in open_clip's registry.
        clip_model_config (`dict`, *optional*): an open_clip model configuration (`embed_dim`, `vision_cfg`,
            `text_cfg`), which takes precedence over the name. The model fills it in, so that a saved checkpoint
            rebuilds its towers without looking anything up.
        vocabulary (`list`, *optional*): the checkpoint's own classes, each a name or a list of synonyms. Without it,
            the names in `id2label` are the classes. Whichever of the two is set later holds.
        train_vocabulary (`list`, *optional*): the classes whose masks were seen in training, in the same form.
        stuff_names (`list[str]`, *optional*): names of amorphous classes; a class with one of them is stuff, any other
            a thing.
        domain (`str`, *optional*): what the checkpoint was trained on, in a few words such as "photographs".
        templates (`list[str]`): prompt templates, each with one `{}`.
        hidden_dim (`int`): width of the pixel decoder and of the decoder, a multiple of 32; also `hidden_size`.
        mask_dim (`int`): channels of the mask features.
        num_learned_queries (`int`): learned queries, beside the text queries.
        num_dominant_categories (`int`): k, the number of text queries; 0 switches dominant category unearthing off.
        dominant_category_source (`str`): what dominant categories are selected by: `"features"` (the mean of the dense
            features already computed), `"thumbnail"` (a second pass of CLIP over the whole image, as published) or
            `"cells"` (each cell of the dense features by itself; one name for each class).
        text_query_matching (`str`): `"own_class"`: in training, a text query is matched with segments of the class that
            it was selected for, and with others only where learned queries run out; `"any"` as published. This and the
            next two are for `"cells"`.
        text_query_class_bias (`bool`): add a learned bias to the logit of the class that a text query was selected for.
        text_query_regions (`bool`): let text queries look, in the decoder's first layer, at the cells of the dense
            feature that show their class.
        decoder_self_attention (`bool`): self-attention between queries in each decoder layer (FC-CLIP).
        num_attention_heads (`int`): heads of every attention.
        encoder_layers (`int`): deformable attention layers of detail enhancement.
        encoder_ffn_dim (`int`): width of their feed-forward networks.
        encoder_points (`int`): sampled points per head and level.
        decoder_layers (`int`): layers of the image-text aggregation decoder; also `num_hidden_layers`.
        decoder_ffn_dim (`int`): width of their feed-forward networks.
        ensemble_alpha (`float`): weight of CLIP's class logits for classes seen in training, 0..1.
        ensemble_beta (`float`): weight of CLIP's class logits for other classes, 0..1.
        objectness_weight (`float`): how far CLIP's classification of a mask, rather than the decoder, says that a query
            with an unseen class is not void, 0..1; 0 as published.
        ensemble_on_valid_mask (`bool`): leave CLIP's class logits out for a mask without a positive pixel at the dense
            feature's size (FC-CLIP's ResNet configurations).
        dense_upsample (`int`): factor by which the dense CLIP feature is upsampled before masks are thresholded for
            hard pooling; 1 is the published form, more lets small masks keep a cell.
        mask_padding (`bool`): leave padding up to a multiple of 32 out of attention and pooling. The published FC-CLIP,
            MAFT+ and Mask-Adapter treat it like the rest of the image; checkpoints of the last two are converted so.
        mask_pooling (`str`): how the dense CLIP feature is pooled over a mask: `"hard"`, the mean over the cells that
            it covers, or `"adapter"`, Mask-Adapter's learned weights.
        adapter_mask_channels (`int`): width of the adapter's mask tokens, a multiple of 4.
        adapter_dim (`int`): width of the adapter's blocks.
        adapter_num_maps (`int`): activation maps for each mask.
        adapter_mask_threshold (`float`): mask probability above which the adapter takes a pixel for the mask's.
        adapter_min_score (`float`): run the adapter only for queries that can add more than this to the score of a
            class in a pixel, and pool the others hard; 0 runs it for all, as published.
        text_transfer (`str`, *optional*): form of MAFT+'s transfer of text embeddings to the image: `"post_norm"` as
            in its semantic checkpoints, `"res_post_norm"` as in its panoptic ones; it has nothing to do with the
            outputs asked for. None for no transfer.
        text_transfer_heads (`int`): attention heads of the transfer.
        class_weight (`float`): weight of the classification loss and matching cost.
        mask_weight (`float`): weight of the binary cross-entropy of masks.
        dice_weight (`float`): weight of the dice loss of masks.
        no_object_weight (`float`): weight of void in the classification loss.
        train_num_points (`int`): points at which masks are read in the losses.
        oversample_ratio (`float`): candidates per uncertain point.
        importance_sample_ratio (`float`): share of the points chosen by uncertainty.

    Raises:
        ValueError: a field of the wrong type or outside its range, or fields that do not go together.
    """

    model_type = "ita"
    attribute_map = {"hidden_size": "hidden_dim", "num_hidden_layers": "decoder_layers"}
    keys_to_ignore_at_inference = [
        "loss_dict",
        "dominant_categories",
        "image_sizes",
        "stuff_ids",
        "vocabulary",
        "encoder_hidden_states",
        "pixel_decoder_hidden_states",
        "transformer_decoder_hidden_states",
    ]

    clip_model_name: str = "convnext_large_d_320"
    clip_model_config: dict[str, Any] | None = None
    vocabulary: list[str | list[str]] | None = None
    train_vocabulary: list[str | list[str]] | None = None
    stuff_names: list[str] | None = None
    domain: str | None = None
    templates: list[str] | tuple[str, ...] = VILD_TEMPLATES
    hidden_dim: int = 256
    mask_dim: int = 256
    num_learned_queries: int = 180
    num_dominant_categories: int = 20
    dominant_category_source: str = "features"
    text_query_matching: str = "any"
    text_query_class_bias: bool = False
    text_query_regions: bool = False
    decoder_self_attention: bool = False
    num_attention_heads: int = 8
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    encoder_points: int = 4
    decoder_layers: int = 9
    decoder_ffn_dim: int = 2048
    ensemble_alpha: float | int = 0.4
    ensemble_beta: float | int = 0.8
    objectness_weight: float | int = 0.0
    ensemble_on_valid_mask: bool = False
    dense_upsample: int = 1
    mask_padding: bool = True
    mask_pooling: str = "hard"
    adapter_mask_channels: int = 16
    adapter_dim: int = 768
    adapter_num_maps: int = 16
    adapter_mask_threshold: float | int = 0.5
    adapter_min_score: float | int = 0.0
    text_transfer: str | None = None
    text_transfer_heads: int = 8
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration as `PreTrainedConfig.from_dict`.

        Where this package is imported, its own pipelines serve the model, and those that the checkpoint carries are
        not needed.

        Raises:
            ValueError: a field of the wrong type or outside its range, or fields that do not go together.
        """
        dtype = config_dict.get("dtype")
        if isinstance(dtype, int | float | list):
            raise ValueError(f"dtype must be a name such as 'float32', got {dtype!r:.100}")
        if not cls.__module__.startswith("transformers_modules."):
            config_dict = {key: value for key, value in config_dict.items() if key != "custom_pipelines"}
        # All changes at once: one after the other, as transformers sets them, fields that go together would not fit.
        changes = {
            name: kwargs.pop(name) for name in cls.__annotations__.keys() & kwargs if name != "vocabulary"
        }
        return super().from_dict(config_dict | changes, **kwargs)

    def __post_init__(self, **kwargs):
        self._check_fields()
        num_labels = kwargs.get("num_labels")
        if self.id2label is not None:
            self.id2label = _checked_labels(self.id2label)
        if num_labels is not None and self.vocabulary is not None and num_labels != len(self.vocabulary):
            super().__setattr__("vocabulary", None)
            super().__setattr__("id2label", None)
        if self.vocabulary is not None:
            self._label_by_vocabulary()
        elif self.id2label is not None:
            super().__setattr__("label2id", {label: index for index, label in self.id2label.items()})
        self.stuff_names = list(self.stuff_names or [])
        self.templates = list(self.templates)
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, LookupError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"a field of every configuration has a wrong value: {reason:.200}") from error

    def ensemble_weights(self, alpha: float | None = None, beta: float | None = None) -> tuple[float, float]:
        """Give the weights of CLIP's class logits for seen and unseen classes, of a call where it says, 0..1 each."""
        return (
            check_number("ensemble_alpha", self.ensemble_alpha if alpha is None else alpha, 0, 1),
            check_number("ensemble_beta", self.ensemble_beta if beta is None else beta, 0, 1),
        )

    def _check_fields(self) -> None:
        """Check types and ranges before anything is computed of them."""
        for name, (least, most) in INTEGER_RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r:.100}")
        for name, limits in NUMBER_RANGES.items():
            check_number(name, getattr(self, name), *limits)
        for name in ("vocabulary", "train_vocabulary"):
            if getattr(self, name):
                normalize_vocabulary(getattr(self, name))
        if not isinstance(self.stuff_names, list | tuple | None) or not all(
            isinstance(name, str) for name in self.stuff_names or ()
        ):
            raise ValueError(f"stuff_names must be a list of names, got {self.stuff_names!r:.100}")
        check_templates(self.templates)
        if self.clip_model_config is not None and not isinstance(self.clip_model_config, dict):
            raise ValueError(f"clip_model_config must be a mapping, got {self.clip_model_config!r:.100}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r:.100}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Check that fields go together."""
        if self.mask_pooling == "adapter" and (self.dense_upsample > 1 or self.ensemble_on_valid_mask):
            raise ValueError(
                'dense_upsample and ensemble_on_valid_mask are for mask_pooling="hard": set them to 1 and False'
            )
        grounded = self.text_query_matching != "any" or self.text_query_class_bias or self.text_query_regions
        if grounded and self.dominant_category_source != "cells":
            raise ValueError(
                "text_query_matching, text_query_class_bias and text_query_regions need "
                'dominant_category_source="cells"'
            )
        if self.text_query_matching == "own_class" and not self.num_learned_queries:
            raise ValueError(
                'text_query_matching="own_class" needs learned queries for what is not among the categories'
            )
        if self.adapter_mask_channels % 4:
            raise ValueError(
                f"adapter_mask_channels must be a multiple of 4, got {self.adapter_mask_channels}"
            )
        if self.hidden_dim % self.num_attention_heads or self.hidden_dim % 32:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}) and of the 32 groups of its normalization"
            )
        width, queries = self.hidden_dim, self.num_learned_queries + self.num_dominant_categories
        parameters = self.encoder_layers * width * (4 * width + 2 * self.encoder_ffn_dim)
        parameters += self.decoder_layers * width * (8 * width + 2 * self.decoder_ffn_dim)
        parameters += 2 * queries * width
        if parameters > MAX_PARAMETERS:
            raise ValueError(f"the sizes make a network of {parameters:.0e} parameters, which is too large")
        if queries < 1:
            raise ValueError("a model needs at least one query: learned queries or dominant categories")
        if 32 % self.dense_upsample:
            raise ValueError(
                f"dense_upsample must divide the dense feature's stride 32, got {self.dense_upsample}"
            )

    def __setattr__(self, key: str, value: Any) -> None:
        """Keep labels and vocabulary one: whichever is set later is the checkpoint's own vocabulary."""
        if key == "id2label" and value is not None:
            value = _checked_labels(value)
        super().__setattr__(key, value)
        if not self.__dict__.get("_post_init_done") or value is None:
            return
        if key in INTEGER_RANGES or key in NUMBER_RANGES or key in CHOICES:
            self._check_fields()
        elif key == "vocabulary":
            self._label_by_vocabulary()
        elif key == "id2label":
            super().__setattr__("label2id", {label: index for index, label in value.items()})
            own = None if self.vocabulary is None else normalize_vocabulary(self.vocabulary)
            if own is not None and list(value.values()) != [synonyms[0] for synonyms in own]:
                super().__setattr__("vocabulary", None)

    def _label_by_vocabulary(self) -> None:
        labels = dict(enumerate(synonyms[0] for synonyms in normalize_vocabulary(self.vocabulary or [])))
        super().__setattr__("id2label", labels)
        super().__setattr__("label2id", {label: index for index, label in labels.items()})

    @property
    def own_classes(self) -> list[Any] | None:
        """The checkpoint's own classes: `vocabulary`, or else the names in `id2label`; None if there are none."""
        if self.vocabulary is not None:
            return self.vocabulary
        labels = self.id2label or {}
        if all(label == f"LABEL_{index}" for index, label in labels.items()):
            return None
        return list(labels.values())


def _checked_labels(id2label: Any) -> dict[int, str]:
    """Give labels in the order of their indices, which JSON turns into strings."""
    try:
        labels = {int(index): label for index, label in id2label.items()}
        if not all(isinstance(label, str) for label in labels.values()):
            raise TypeError("a label is no string")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"id2label must map integers to names, got {id2label!r:.100}") from error
    return dict(sorted(labels.items()))


def check_number(name: str, value: float, least: float, most: float) -> float:
    """Check that a number is finite and within a range; else raise ValueError."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least} to {most}, got {value!r:.100}")
    return value


__all__ = ["VILD_TEMPLATES", "ITAConfig"]
