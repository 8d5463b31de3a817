"""Configuration of ITA, image-text aggregation for open-vocabulary segmentation (Cheng et al., Neurocomputing 2025)."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

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

DOMINANT_CATEGORY_SOURCES = ("features", "thumbnail")


class ITAConfig(PreTrainedConfig):
    r"""Everything that defines an `ITAForOpenVocabSegmentation`.

    The defaults are the paper's model: ConvNeXt-L of open_clip, 20 text queries and 180 learned ones, nine decoder
    layers without self-attention. FC-CLIP (arXiv 2308.02487) is the same network with
    `num_dominant_categories=0, num_learned_queries=250, decoder_self_attention=True`.

    Args:
        clip_model_name (`str`): name of the frozen CLIP in open_clip's registry.
        clip_model_config (`dict`, *optional*): an open_clip model configuration (`embed_dim`, `vision_cfg`,
            `text_cfg`), which takes precedence over the name. The model fills it in, so that a saved checkpoint
            rebuilds its towers without looking anything up.
        vocabulary (`list`, *optional*): the checkpoint's own classes, each a name or a list of synonyms. Without it,
            the names in `id2label` are the classes.
        train_vocabulary (`list`, *optional*): the classes whose masks were seen in training, in the same form.
        stuff_names (`list[str]`): names of amorphous classes; a class with one of them is stuff, any other a thing.
        templates (`list[str]`): prompt templates, each with one `{}`.
        hidden_dim, mask_dim (`int`): widths of the decoder and of the mask features.
        num_learned_queries (`int`): learned queries, beside the text queries.
        num_dominant_categories (`int`): k, the number of text queries; 0 switches dominant category unearthing off.
        dominant_category_source (`str`): where the image's embedding comes from, `"features"` (the dense features
            already computed) or `"thumbnail"` (a second pass of CLIP over the whole image, as published).
        class_shortlist (`int`, *optional*): at inference, classify only among the classes that have one of this many
            names nearest to the image. Faster with thousands of classes, and not exact: a class that is not on an
            image's list cannot be found. None keeps all classes.
        decoder_self_attention (`bool`): self-attention between queries in each decoder layer (FC-CLIP).
        encoder_layers, encoder_ffn_dim, encoder_points (`int`): detail enhancement, deformable attention layers.
        decoder_layers, decoder_ffn_dim (`int`): image-text aggregation decoder.
        num_attention_heads (`int`): heads of every attention.
        ensemble_alpha, ensemble_beta (`float`): weight of CLIP's own opinion for classes seen in training and others.
        ensemble_on_valid_mask (`bool`): leave CLIP's opinion out for a mask without a positive pixel at the dense
            feature's size (FC-CLIP's ResNet configurations).
        dense_upsample (`int`): factor by which the dense CLIP feature is upsampled before masks are thresholded for
            pooling; 1 is the published form, more lets small masks keep a cell.
        class_weight, mask_weight, dice_weight, no_object_weight (`float`): matching and losses.
        train_num_points (`int`), oversample_ratio, importance_sample_ratio (`float`): point-sampled mask losses.
    """

    model_type = "ita"
    keys_to_ignore_at_inference = [
        "loss_dict",
        "dominant_categories",
        "image_sizes",
        "stuff_ids",
        "vocabulary",
    ]

    clip_model_name: str = "convnext_large_d_320"
    clip_model_config: dict[str, Any] | None = None
    vocabulary: list[str | list[str]] | None = None
    train_vocabulary: list[str | list[str]] | None = None
    stuff_names: list[str] | None = None
    templates: list[str] | tuple[str, ...] = VILD_TEMPLATES
    hidden_dim: int = 256
    mask_dim: int = 256
    num_learned_queries: int = 180
    num_dominant_categories: int = 20
    dominant_category_source: str = "features"
    class_shortlist: int | None = None
    decoder_self_attention: bool = False
    num_attention_heads: int = 8
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    encoder_points: int = 4
    decoder_layers: int = 9
    decoder_ffn_dim: int = 2048
    ensemble_alpha: float | int = 0.4
    ensemble_beta: float | int = 0.8
    ensemble_on_valid_mask: bool = False
    dense_upsample: int = 1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75

    def __post_init__(self, **kwargs):
        if self.vocabulary is not None:
            self._label_by_vocabulary()
        elif self.id2label is not None and self.label2id is None:
            self.label2id = {label: int(index) for index, label in self.id2label.items()}
        check_weight("ensemble_alpha", self.ensemble_alpha)
        check_weight("ensemble_beta", self.ensemble_beta)
        self.stuff_names = list(self.stuff_names or [])
        self.templates = list(self.templates)
        if self.dominant_category_source not in DOMINANT_CATEGORY_SOURCES:
            raise ValueError(
                f"dominant_category_source must be one of {DOMINANT_CATEGORY_SOURCES}, "
                f"got {self.dominant_category_source!r}"
            )
        check_shortlist(self.class_shortlist)
        if self.hidden_dim % self.num_attention_heads or self.hidden_dim % 32:
            raise ValueError(
                f"hidden_dim ({self.hidden_dim}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}) and of the 32 groups of its normalisation"
            )
        if self.num_learned_queries + self.num_dominant_categories < 1:
            raise ValueError("a model needs at least one query: learned queries or dominant categories")
        if self.dense_upsample < 1 or 32 % self.dense_upsample:
            raise ValueError(
                f"dense_upsample must divide the dense feature's stride 32, got {self.dense_upsample}"
            )
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        """Keeps labels and vocabulary one: whichever is set later is the checkpoint's own vocabulary."""
        super().__setattr__(key, value)
        if not self.__dict__.get("_post_init_done") or value is None:
            return
        if key == "vocabulary":
            self._label_by_vocabulary()
        elif key == "id2label" and self.vocabulary is not None:
            labels = [label for _, label in sorted((int(index), label) for index, label in value.items())]
            if labels != [primary_name(entry) for entry in self.vocabulary]:
                super().__setattr__("vocabulary", None)

    def _label_by_vocabulary(self) -> None:
        labels = {index: primary_name(entry) for index, entry in enumerate(self.vocabulary or [])}
        super().__setattr__("id2label", labels)
        super().__setattr__("label2id", {label: index for index, label in labels.items()})


def primary_name(entry: str | list[str]) -> str:
    """The first name of a class, given as a name, comma-separated names or a list of names."""
    if not entry:
        raise ValueError("a class of the vocabulary has no name")
    name = entry if isinstance(entry, str) else entry[0]
    return name.split(",")[0].strip()


def check_shortlist(names: int | None) -> int | None:
    """A length of the shortlist. Raises ValueError unless it is positive or None."""
    if names is not None and names < 1:
        raise ValueError(f"class_shortlist must be at least 1, or None for all classes, got {names}")
    return names


def check_weight(name: str, value: float) -> float:
    """An ensemble weight. Raises ValueError unless it is in 0..1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
    return value


__all__ = ["VILD_TEMPLATES", "ITAConfig"]
