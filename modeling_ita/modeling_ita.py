"""ITA: image-text aggregation for open-vocabulary segmentation (Cheng et al., Neurocomputing 2025).

One frozen CLIP; dominant category unearthing turns the image's nearest category names into queries; detail
enhancement gives multi-scale features; the image-text aggregation decoder makes masks and classes in a single stage.
`ITAForOpenVocabSegmentation.segment` is the paper in order.

Symbols in shapes: B images, Q queries, K classes, N names (a class has one or more), M candidate names, D CLIP's
embedding width, C the decoder's width, k text queries.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batching import (
    HIDDEN_STATES,
    Group,
    ITAForOpenVocabSegmentationOutput,
    SegmentOutput,
    batch_vocabularies,
    check_dominant_categories,
    check_images,
    check_mask_labels,
    class_ids_of,
    dominant_names,
    group_images,
    matched_mask_logits,
    merge,
    padded_size,
    valid_sizes,
)
from .checkpoint_code import RemoteCodeMixin, check_weights_index
from .class_examples import ClassExamples, ExamplesMixin, check_examples
from .classification import ConvNeXtBlock, MaskClassifier, class_logits, ensemble_log_probs
from .clip_backbone import ClipBackbone, build_backbone, resolve_clip_config
from .configuration_ita import ITAConfig
from .deformable_attention import DeformableAttention
from .detail_enhancement import DetailEnhancement
from .dominant_categories import DominantCategories, classes_of_names, no_text_queries
from .image_text_aggregation import Attention, ImageTextAggregation
from .ops import load_blocks_at_once
from .set_criterion import SetCriterion
from .text import TextEmbeddings, TextEncoder, Vocabulary, VocabularyKey, VocabularyLike, normalize_vocabulary

CLIP_MODULES = r"clip_backbone\..*"
"""A pattern of the names of all of CLIP's modules, for `exclude_modules` of a peft configuration."""


class ITAPreTrainedModel(RemoteCodeMixin, PreTrainedModel):
    """Initialization of weights, loading and saving."""

    config_class = ITAConfig
    config: ITAConfig
    base_model_prefix = "ita"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    _supports_sdpa = True
    _no_split_modules = ["ClipBackbone", "DetailEnhancement", "ImageTextAggregation", "MaskClassifier"]
    _skip_keys_device_placement = ["clip"]
    supports_gradient_checkpointing = True  # of the head's layers

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For custom code transformers passes over modules that have no weights of their own, such as attention, because
        # custom code may overwrite weights that were loaded. All that is called below keeps those.
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ITAForOpenVocabSegmentation):
            nn.init.normal_(module.void_embedding)
        elif isinstance(module, ClipBackbone):
            module.reset_parameters(self.config.clip_model_config or {})
        elif isinstance(
            module,
            nn.Linear
            | nn.Conv2d
            | nn.GroupNorm
            | nn.LayerNorm
            | Attention
            | DeformableAttention
            | DominantCategories
            | DetailEnhancement
            | ImageTextAggregation
            | ConvNeXtBlock,
        ):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, as `PreTrainedModel.from_pretrained`, with the frozen CLIP in it.

        Raises:
            ValueError: weights of the frozen CLIP are missing, weights are NaN or infinite, or an index names files
                outside of its folder.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        check_weights_index(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if key.startswith("clip_backbone."))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of the frozen CLIP, such as {missing[0]}"
            )
        for name, tensor in model.state_dict().items():
            finite = tensor.is_meta or not tensor.is_floating_point() or not tensor.numel()
            if not finite and not bool(torch.stack(tensor.detach().aminmax()).isfinite().all()):
                raise ValueError(f"the checkpoint has weights that are NaN or infinite, such as {name}")
        load_blocks_at_once(model)
        # The model was built without memory, and what no checkpoint holds has to be made again.
        model.clip_backbone.restore_buffers(model.config.clip_model_config)
        model.clip_backbone.freeze()
        model.mask_classifier.freeze()
        return (model, info) if wants_info else model

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add a peft adapter, as `PreTrainedModel.add_adapter`.

        `target_modules="all-linear"` leaves out the frozen CLIP, unless the configuration's `exclude_modules` says
        otherwise. `peft.get_peft_model` has no such hook: give it `exclude_modules=CLIP_MODULES`.

        Args:
            adapter_config: a `peft.PeftConfig`.
            adapter_name: name of the adapter; None for peft's default.
        """
        targets = getattr(adapter_config, "target_modules", None)
        if targets == "all-linear" and adapter_config.exclude_modules is None:
            adapter_config.exclude_modules = CLIP_MODULES
        super().add_adapter(adapter_config, adapter_name)


class ITAForOpenVocabSegmentation(ExamplesMixin, ITAPreTrainedModel):
    """Open-vocabulary segmentation by image-text aggregation.

    Example:
        ```python
        model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        outputs = model(**processor(images=image, return_tensors="pt"), vocabulary=["cat", ["sofa", "couch"], "wall"])
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
        ```

    Raises:
        ValueError: an unknown CLIP, or one whose image tower does not have four stages.
    """

    def __init__(self, config: ITAConfig):
        super().__init__(config)
        config.clip_model_config = resolve_clip_config(config.clip_model_name, config.clip_model_config)
        self.clip_backbone = build_backbone(config.clip_model_config)
        embed_dim = self.clip_backbone.embed_dim
        self.dominant_categories = (
            DominantCategories(config, embed_dim) if config.num_dominant_categories else None
        )
        self.detail_enhancement = DetailEnhancement(
            self.clip_backbone.channels,
            config.hidden_dim,
            config.mask_dim,
            layers=config.encoder_layers,
            heads=config.num_attention_heads,
            points=config.encoder_points,
            ffn_dim=config.encoder_ffn_dim,
        )
        self.image_text_aggregation = ImageTextAggregation(
            config.hidden_dim,
            config.mask_dim,
            embed_dim,
            num_text_queries=config.num_dominant_categories,
            num_learned_queries=config.num_learned_queries,
            layers=config.decoder_layers,
            heads=config.num_attention_heads,
            ffn_dim=config.decoder_ffn_dim,
            self_attention=config.decoder_self_attention,
        )
        self.mask_classifier = MaskClassifier(config, self.clip_backbone)
        self.void_embedding = nn.Parameter(torch.empty(1, embed_dim))
        self.criterion = SetCriterion(config)
        self.text_encoder = TextEncoder(self.clip_backbone)
        self._compiled_segment: Callable[..., SegmentOutput] | None = None
        self.post_init()

    # --- vocabulary ---

    @property
    def default_vocabulary(self) -> Vocabulary | None:
        """The checkpoint's own vocabulary, or what `set_vocabulary` made of it; None for a model that has none."""
        classes = self.config.own_classes
        return None if classes is None else normalize_vocabulary(classes)

    def set_vocabulary(self, classes: Sequence[str | Sequence[str]]) -> None:
        """Make `classes` the vocabulary of calls that name none, and of the saved checkpoint.

        Args:
            classes: each a name or a list of synonyms.

        Raises:
            ValueError: an empty vocabulary or an empty name.
        """
        self.config.vocabulary = [list(synonyms) for synonyms in normalize_vocabulary(classes)]

    def encode_vocabulary(
        self,
        vocabulary: Sequence[str | Sequence[str]] | None = None,
        templates: Sequence[str] | None = None,
        train_vocabulary: Sequence[str | Sequence[str]] | None = None,
    ) -> TextEmbeddings:
        """Encode a vocabulary as calls with it do; it is kept, so that such a call encodes nothing.

        Args:
            vocabulary: each class a name or a list of synonyms; None for the checkpoint's own.
            templates: prompt templates instead of the configuration's.
            train_vocabulary: classes seen in training instead of the configuration's.

        Raises:
            ValueError: no vocabulary, a malformed one, or a template without exactly one `{}`.
        """
        [checked] = batch_vocabularies(vocabulary, None, self.config.own_classes, 1)
        return self._encode(checked, templates, train_vocabulary)

    def selectable_names(self, vocabulary: Vocabulary) -> list[str]:
        """Give the names that the indices of selected dominant categories mean."""
        in_cells = self.config.dominant_category_source == "cells"
        return vocabulary.names if in_cells else vocabulary.candidate_names

    def stuff_ids(self, vocabulary: Vocabulary) -> list[int]:
        """Give the indices of the classes that are stuff by the configuration's `stuff_names`."""
        return class_ids_of(vocabulary.key, self.config.stuff_names or ())

    # --- the network ---

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        vocabulary: Sequence[str | Sequence[str]] | None = None,
        vocabularies: Sequence[Sequence[str | Sequence[str]]] | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        dominant_categories: Sequence[str] | Sequence[Sequence[str]] | None = None,
        templates: Sequence[str] | None = None,
        train_vocabulary: Sequence[str | Sequence[str]] | None = None,
        ensemble_alpha: float | None = None,
        ensemble_beta: float | None = None,
        examples: Mapping[str, Tensor] | None = None,
        example_weight: float | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ITAForOpenVocabSegmentationOutput | tuple:
        """Segment images by the names of a vocabulary.

        Images of a batch that differ in size (by `pixel_mask`) or in vocabulary go through the network in groups of
        their own, each cropped to its size rounded up to a multiple of 32: padding to a common size changes nothing.

        Args:
            pixel_values: (B, 3, H, W) float, normalized RGB, padded at the bottom and on the right.
            pixel_mask: (B, H, W), 1 for pixels and 0 for padding; None if nothing is padded.
            vocabulary: the classes of all images, each a name or a list of synonyms; None for the checkpoint's own.
            vocabularies: one vocabulary for each image, instead of `vocabulary`.
            mask_labels: for each image (n, H, W), its n ground-truth masks; losses are computed.
            class_labels: for each image (n,) int64, the classes of its masks.
            dominant_categories: names instead of the k nearest: one list for all images, or one for each.
            templates: prompt templates instead of the configuration's.
            train_vocabulary: classes seen in training instead of the configuration's.
            ensemble_alpha: weight of CLIP's class logits for seen classes instead of the configuration's.
            ensemble_beta: weight of CLIP's class logits for unseen classes instead of the configuration's.
            examples: class name -> (n, D), of `encode_examples`, that join the class's names.
            example_weight: of n examples beside the names, 0..1 (n / (n + 4)); at 1 the names say nothing.
            output_hidden_states: whether to return hidden states.
            output_attentions: whether to return the decoder's attention weights.
            return_dict: False gives a tuple.

        Raises:
            ValueError: no vocabulary or a malformed one, or labels, examples or inputs that do not fit.
        """
        config, padded = self.config, padded_size(pixel_values.shape[-2:])
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        sizes = check_images(pixel_values, pixel_mask)
        classes = batch_vocabularies(vocabulary, vocabularies, config.own_classes, len(sizes))
        counts = [len(own) for own in classes]
        masks = check_mask_labels(mask_labels, class_labels, sizes, pixel_values.shape[-2:], counts)
        given = check_dominant_categories(dominant_categories, len(sizes), config.num_dominant_categories)
        shown = check_examples(examples, example_weight, classes, self.clip_backbone.embed_dim)
        options = {
            "ensemble_weights": config.ensemble_weights(ensemble_alpha, ensemble_beta),
            "every_layer": masks is not None or self.training,
            "output_hidden_states": bool(wants_states),
            "output_attentions": bool(wants_attentions),
        }

        groups = group_images(pixel_values, pixel_mask, sizes, classes, given)
        segment = self.segment if self._compiled_segment is None else self._compiled_segment
        inputs = (self._group_inputs(group, templates, train_vocabulary, shown) for group in groups)
        parts = [segment(**of_group, **options) for of_group in inputs]
        merged = merge(parts, groups, padded)

        loss_dict = None
        if masks is not None and class_labels is not None:
            matched = matched_mask_logits(parts, groups, padded)
            own = merged.query_classes if config.text_query_matching == "own_class" else None
            predicted = merged.class_logits, merged.mask_logits
            loss_dict = self.criterion(*predicted, masks, class_labels, matched, own)
        output = ITAForOpenVocabSegmentationOutput(
            loss=torch.stack(list(loss_dict.values())).sum() if loss_dict else None,
            class_queries_logits=merged.class_logits[-1] if merged.log_probs is None else merged.log_probs,
            masks_queries_logits=merged.mask_logits[-1],
            loss_dict=loss_dict,
            dominant_categories=dominant_names(parts, groups, self.selectable_names),
            image_sizes=valid_sizes(pixel_mask, sizes, pixel_values.device),
            stuff_ids=[class_ids_of(own, config.stuff_names or ()) for own in classes],
            vocabulary=[[list(synonyms) for synonyms in own] for own in classes],
            attentions=merged.attentions,
            **merged.hidden_state_fields(),
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def segment(
        self,
        pixel_values: Tensor,
        text: TextEmbeddings,
        valid: Tensor | None = None,
        given_embeds: Tensor | None = None,
        given_classes: Tensor | None = None,
        image_embeds: Tensor | None = None,
        ensemble_weights: tuple[float, float] | None = None,
        every_layer: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> SegmentOutput:
        """Segment images of one size with one vocabulary: tensors in, tensors out, nothing that waits for them.

        Args:
            pixel_values: (B, 3, H, W), H and W multiples of 32.
            text: the vocabulary, of `encode_vocabulary`.
            valid: (B, H, W) bool, pixels that are not padding; None where all are.
            given_embeds: (B, k', D), unit embeddings of dominant categories from outside; None to select them.
            given_classes: (B, k') int64, their classes, negative for names that are not in the vocabulary.
            image_embeds: (B, D), CLIP's embeddings of the images, to select by; None for those of the dense feature.
            ensemble_weights: alpha and beta; None for the configuration's.
            every_layer: give the decoder's predictions of all layers, as training needs them.
            output_hidden_states: give hidden states.
            output_attentions: give the decoder's attention weights.
        """
        config, clip, decoder = self.config, self.clip_backbone, self.image_text_aggregation
        valid, void = valid if config.mask_padding else None, self.void_embedding
        # Section 0: one frozen CLIP.
        features = clip(pixel_values)
        dense = features.dense
        # Section 2, DCU: the names nearest to the image become text queries.
        select = self.dominant_categories or no_text_queries
        text_queries = select(dense, text, valid, image_embeds, given_embeds, given_classes, clip=clip)
        # Section 3, DEM: multi-scale features and mask features.
        mask_features, enhanced = self.detail_enhancement(features.levels)
        # Section 4, ITA: text queries and learned queries make masks and class embeddings.
        eager = output_attentions or config._attn_implementation == "eager"
        queries, regions = text_queries.queries, text_queries.regions
        predictions, hidden_states, attentions = decoder(
            queries, mask_features, enhanced, valid, every_layer=every_layer, eager=eager, regions=regions
        )
        masks = predictions[-1].mask_logits
        # Section 1: class logits, in-vocabulary.
        in_vocab = [class_logits(p.class_embeds, text, void, decoder.scale) for p in predictions]
        in_vocab = list(map(text_queries.add_class_bias, in_vocab))
        # Section 5: out-of-vocabulary logits of the pooled CLIP feature, and the ensemble.
        log_probs = None
        if not self.training:
            pooled = dense, masks, valid, text, void, in_vocab[-1]
            out_vocab, has_pixels = self.mask_classifier(*pooled, clip=clip)
            out_vocab = text_queries.add_class_bias(out_vocab)
            weights = *(ensemble_weights or config.ensemble_weights()), has_pixels, config.objectness_weight
            log_probs = ensemble_log_probs(in_vocab[-1], out_vocab, text, *weights)
        states = dict(zip(HIDDEN_STATES, (features.levels, tuple(enhanced), hidden_states), strict=True))
        return SegmentOutput(
            class_logits=in_vocab,
            mask_logits=[p.mask_logits for p in predictions],
            mask_embeds=[p.mask_embeds for p in predictions],
            mask_features=mask_features,
            log_probs=log_probs,
            dominant=text_queries.names,
            query_classes=text_queries.query_classes(masks.shape[1]),
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """From now on run the network compiled by `torch.compile(**options)`: all but the encoding of names.

        With `dynamic=True` one graph serves all sizes and batches of more than one; without, each padded size has its
        own until torch takes it for variable. Vocabularies of any length share a graph.
        """
        compiled = torch.compile(self.segment, fullgraph=True, **options)

        def segment(
            pixel_values: Tensor, text: TextEmbeddings, valid: Tensor | None, **others: Any
        ) -> SegmentOutput:
            for tensor in vars(text).values():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            if valid is None:  # images with and without padding share a graph
                valid = torch.ones_like(pixel_values[:, 0], dtype=torch.bool)
            return compiled(pixel_values, text, valid, **others)

        self._compiled_segment = segment

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled network out of copies and pickles."""
        return self.__dict__ | {"_compiled_segment": None}

    # --- parts of forward ---

    def _group_inputs(
        self,
        group: Group,
        templates: Sequence[str] | None,
        train_vocabulary: VocabularyLike | None,
        examples: ClassExamples | None,
    ) -> dict[str, Any]:
        """Give what `segment` takes of the images of one size with one vocabulary."""
        device = group.pixel_values.device
        return {
            "pixel_values": group.pixel_values,
            "text": self._encode(group.vocabulary, templates, train_vocabulary, examples),
            "valid": group.valid,
            "given_embeds": self._embed_given(group, templates),
            "given_classes": classes_of_names(group.vocabulary, group.dominant_categories, device),
            "image_embeds": self._embed_thumbnails(group),
        }

    def _encode(
        self,
        vocabulary: VocabularyKey,
        templates: Sequence[str] | None,
        train_vocabulary: VocabularyLike | None,
        examples: ClassExamples | None = None,
    ) -> TextEmbeddings:
        config = self.config
        templates = config.templates if templates is None else templates
        seen = config.train_vocabulary if train_vocabulary is None else train_vocabulary
        text = self.text_encoder.encode(vocabulary, templates, seen)
        return text if examples is None else examples.add_to(text, vocabulary, self.clip_backbone.logit_scale)

    def _embed_given(self, group: Group, templates: Sequence[str] | None) -> Tensor | None:
        """Embed dominant categories from outside, (B, k', D); None if there are none."""
        given = group.dominant_categories
        if given is None:
            return None
        if not given[0]:
            return self.void_embedding.new_zeros(len(given), 0, self.clip_backbone.embed_dim)
        templates = self.config.templates if templates is None else templates
        in_prompts = self.config.dominant_category_source == "cells"
        return torch.stack([self.text_encoder.embed_names(own, templates, in_prompts) for own in given])

    @torch.no_grad()
    def _embed_thumbnails(self, group: Group) -> Tensor | None:
        """Embed whole images by a second pass of CLIP, (B, D), if dominant categories are to be selected by it."""
        selects = self.dominant_categories is not None and group.dominant_categories is None
        if self.config.dominant_category_source != "thumbnail" or not selects:
            return None
        if torch.compiler.is_compiling():
            raise ValueError(
                'dominant_category_source="thumbnail" reads images outside of the graph: not traceable'
            )
        images = [image[:, :h, :w] for image, (h, w) in zip(group.pixel_values, group.sizes, strict=True)]
        return torch.cat([self.clip_backbone.embed_thumbnail(image) for image in images])

    # --- checkpoints ---

    @classmethod
    def from_clip(
        cls, config: ITAConfig, clip_state_dict: dict[str, Tensor]
    ) -> "ITAForOpenVocabSegmentation":
        """Make a new model on a trained CLIP; everything but CLIP starts random.

        Args:
            config: names or holds the CLIP's open_clip configuration.
            clip_state_dict: the weights of that CLIP (`open_clip.model.CLIP` or `CustomTextCLIP`).

        Raises:
            ValueError: the weights do not fit the configuration.
        """
        clip_config = resolve_clip_config(config.clip_model_name, config.clip_model_config)
        clip_config["custom_text"] = any(key.startswith("text.") for key in clip_state_dict)
        config.clip_model_config = clip_config
        model = cls(config)
        try:
            model.clip_backbone.clip.load_state_dict(clip_state_dict)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise ValueError(f"the CLIP weights do not fit the configuration: {reason}") from error
        return model
