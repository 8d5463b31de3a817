"""ITA: image-text aggregation for open-vocabulary segmentation (Cheng et al., Neurocomputing 2025).

One frozen CLIP; dominant category unearthing turns the image's nearest category names into queries; detail
enhancement gives multi-scale features; the image-text aggregation decoder makes masks and classes in a single stage.

Symbols in shapes: B images, Q queries, K classes, N names (a class has one or more), D CLIP's embedding width,
C the decoder's width, k text queries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .batching import (
    DominantNames,
    channels_last,
    check_labels,
    crop,
    dominant_of_batch,
    image_sizes_of,
    mark_sizes,
    merge_classes,
    merge_masks,
    pad_labels,
    remake_masks,
    round_up,
    scatter,
    valid_pixels,
)
from .checkpoint_code import RemoteCodeMixin
from .classification import Opinions, masks_on_dense_feature
from .clip_backbone import ClipBackbone, ImageFeatures, resolve_clip_config
from .configuration_ita import ITAConfig, check_shortlist, check_weight
from .detail_enhancement import DeformableAttention, DetailEnhancement
from .dominant_categories import DominantCategories
from .image_text_aggregation import Attention, ImageTextAggregation, Prediction
from .outputs import ITAForOpenVocabSegmentationOutput, NetworkResult, Request
from .set_criterion import Matches, SetCriterion
from .text import VocabularyEncoder
from .vocabulary import TextClassifier, Vocabulary, WordTensors, normalize_vocabulary, vocabularies_of_batch


class ITAForOpenVocabSegmentation(RemoteCodeMixin, PreTrainedModel):
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

    config_class = ITAConfig
    config: ITAConfig
    base_model_prefix = "ita"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    supports_gradient_checkpointing = True  # of the head's layers

    def __init__(self, config: ITAConfig):
        super().__init__(config)
        config.clip_model_config = resolve_clip_config(config.clip_model_name, config.clip_model_config)
        self.clip_backbone = ClipBackbone(config.clip_model_config)
        embed_dim = self.clip_backbone.embed_dim
        self.dominant_categories = (
            DominantCategories(embed_dim, config.hidden_dim, config.num_dominant_categories)
            if config.num_dominant_categories
            else None
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
        self.void_embedding = nn.Parameter(torch.empty(1, embed_dim))
        self.criterion = SetCriterion(config)
        self.vocabulary_encoder = VocabularyEncoder(self.clip_backbone)
        self._compiled_network: Any = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.normal_(self.void_embedding)
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
            | ImageTextAggregation,
        ):
            module.reset_parameters()

    # --- vocabulary ---

    @property
    def default_vocabulary(self) -> Vocabulary | None:
        """The checkpoint's own vocabulary, or what `set_vocabulary` made of it; None for a model that has none."""
        if self.config.vocabulary is not None:
            return normalize_vocabulary(self.config.vocabulary)
        labels = self.config.id2label
        if not labels or all(label == f"LABEL_{index}" for index, label in labels.items()):
            return None
        return normalize_vocabulary([label for _, label in sorted(labels.items())])

    def set_vocabulary(self, classes: Sequence[str | Sequence[str]]) -> None:
        """Makes `classes` the vocabulary of calls that name none, and of the saved checkpoint.

        Raises:
            ValueError: an empty vocabulary or an empty name.
        """
        vocabulary = normalize_vocabulary(classes)
        self.config.vocabulary = [list(synonyms) for synonyms in vocabulary]  # brings id2label along

    def text_classifier(
        self, classes: Sequence[str | Sequence[str]] | None = None, templates: Sequence[str] | None = None
    ) -> TextClassifier:
        """A vocabulary's embeddings, encoded at the first call and kept."""
        vocabulary = (
            vocabularies_of_batch(None, self.default_vocabulary, 1)[0] if classes is None else classes
        )
        return self.vocabulary_encoder.classifier(
            normalize_vocabulary(vocabulary), self.config.templates if templates is None else templates
        )

    # --- the way through the house ---

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """From now on the network runs compiled by `torch.compile(**options)`: all but the handling of words.

        With `dynamic=True` one graph serves all sizes and batches of more than one; without, each padded size has its
        own until torch takes it for variable. Vocabularies of any length share a graph.
        """
        self._compiled_network = torch.compile(self._network, fullgraph=True, **options)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickled model is not compiled."""
        return self.__dict__ | {"_compiled_network": None}

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        vocabulary: Sequence | None = None,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        dominant_categories: Sequence | None = None,
        templates: Sequence[str] | None = None,
        train_vocabulary: Sequence | None = None,
        ensemble_alpha: float | None = None,
        ensemble_beta: float | None = None,
        class_shortlist: int | None = None,
        return_dict: bool | None = None,
    ) -> ITAForOpenVocabSegmentationOutput | tuple:
        """Segments images by the words of a vocabulary.

        Images of a batch that differ in size (by `pixel_mask`) or in vocabulary go through the network in groups of
        their own, each cropped to its size rounded up to a multiple of 32: padding to a common size changes nothing.

        Args:
            pixel_values: (B, 3, H, W) float, normalised RGB, padded at the bottom and on the right.
            pixel_mask: (B, H, W), 1 for pixels and 0 for padding; None if nothing is padded.
            vocabulary: a list of classes, each a name or a list of synonyms; or one such list per image; or None for
                the checkpoint's own.
            mask_labels: for each image (n, H, W), its n ground-truth masks; with
            class_labels: for each image (n,) int64, their classes: losses are computed.
            dominant_categories: names that take the place of the k nearest: a list for all images or one per image.
            templates, train_vocabulary, ensemble_alpha, ensemble_beta, class_shortlist: in the place of the config's.
            return_dict: False gives a tuple.

        Raises:
            ValueError: no vocabulary, a malformed one, labels without masks, or inputs whose shapes do not fit.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must be (batch, 3, height, width), got {tuple(pixel_values.shape)}"
            )
        batch, _, height, width = pixel_values.shape
        if pixel_mask is not None and pixel_mask.shape != (batch, height, width):
            raise ValueError(f"pixel_mask must be {(batch, height, width)}, got {tuple(pixel_mask.shape)}")
        if not pixel_values.is_floating_point() or not batch:
            raise ValueError(
                f"pixel_values must be floats of at least one image, got {pixel_values.dtype} x {batch}"
            )
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("losses need both mask_labels and class_labels")
        config = self.config
        train_vocabulary = config.train_vocabulary if train_vocabulary is None else train_vocabulary
        request = Request(
            templates=config.templates if templates is None else templates,
            train_vocabulary=normalize_vocabulary(train_vocabulary) if train_vocabulary else None,
            alpha=check_weight(
                "ensemble_alpha", config.ensemble_alpha if ensemble_alpha is None else ensemble_alpha
            ),
            beta=check_weight(
                "ensemble_beta", config.ensemble_beta if ensemble_beta is None else ensemble_beta
            ),
            shortlist=check_shortlist(config.class_shortlist if class_shortlist is None else class_shortlist),
            with_loss=mask_labels is not None,
        )
        vocabularies = vocabularies_of_batch(vocabulary, self.default_vocabulary, batch)
        dominant = dominant_of_batch(dominant_categories, batch) if self.dominant_categories else None
        sizes = image_sizes_of(pixel_values, pixel_mask)
        canvas = (round_up(height), round_up(width))

        groups: dict[tuple[tuple[int, int], tuple, int | None], list[int]] = {}
        for index, (size, classes) in enumerate(zip(sizes, vocabularies, strict=True)):
            padded = (round_up(size[0]), round_up(size[1]))
            given = None if dominant is None else len(dominant[index])
            groups.setdefault((padded, classes.key, given), []).append(index)
        results, names = [], []
        for (padded, _, _), group in groups.items():
            own_sizes = [sizes[index] for index in group]
            own_dominant = None if dominant is None else [dominant[index] for index in group]
            classifier = self.vocabulary_encoder.classifier(vocabularies[group[0]], request.templates)
            result = self._segment(
                crop(pixel_values if len(group) == batch else pixel_values[group], own_sizes, padded),
                valid_pixels(own_sizes, padded, pixel_values.device),
                own_sizes,
                classifier,
                own_dominant,
                request,
            )
            results.append(result)
            names.append(DominantNames(own_dominant, result.nearest, classifier.candidate_names, len(group)))
        members = list(groups.values())
        class_logits = [
            merge_classes(list(parts), members)
            for parts in zip(*(r.class_logits for r in results), strict=True)
        ]
        mask_logits = [
            merge_masks([prediction.mask_logits for prediction in parts], members, canvas)
            for parts in zip(*(r.predictions for r in results), strict=True)
        ]
        if self.training:
            final = class_logits[-1]
        else:
            final = merge_classes(
                [r.log_probabilities for r in results if r.log_probabilities is not None], members
            )

        output = ITAForOpenVocabSegmentationOutput(
            class_queries_logits=final,
            masks_queries_logits=mask_logits[-1],
            dominant_categories=scatter([part.read() for part in names], members),
            image_sizes=torch.tensor(sizes, device=pixel_values.device),
            stuff_ids=[self._stuff_ids(classes) for classes in vocabularies],
            vocabulary=[[list(synonyms) for synonyms in classes] for classes in vocabularies],
        )
        if mask_labels is not None and class_labels is not None:
            check_labels(mask_labels, class_labels, sizes, (height, width), [len(v) for v in vocabularies])
            labels = [pad_labels(masks, canvas) for masks in mask_labels]

            def matched_masks(matches: Matches) -> Tensor:
                factors = [([p.mask_embeddings for p in r.predictions], r.mask_features) for r in results]
                queries = [matches.of(image)[0] for image in range(batch)]
                return remake_masks(factors, members, queries, canvas)

            output.loss_dict = self.criterion(class_logits, mask_logits, labels, class_labels, matched_masks)
            output.loss = torch.stack(list(output.loss_dict.values())).sum()
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _segment(
        self,
        pixel_values: Tensor,
        valid: Tensor | None,
        sizes: list[tuple[int, int]],
        classifier: TextClassifier,
        given: list[list[str]] | None,
        request: Request,
    ) -> NetworkResult:
        """Images of one padded size with one vocabulary: around the network, what is no tensor.

        Args:
            pixel_values: (B, 3, H, W), H and W multiples of 32. valid: (B, H, W) bool or None.
            sizes: each image's own height and width. given: dominant categories from outside, or None.
        """
        words = classifier.tensors(request.train_vocabulary)
        unearths = self.dominant_categories is not None and given is None
        bare = None if given is None else self._embed_given(given, classifier)
        whole = None
        if self.config.dominant_category_source == "thumbnail" and (unearths or request.shortlist):
            images = [image[:, :h, :w] for image, (h, w) in zip(pixel_values, sizes, strict=True)]
            with torch.no_grad():
                whole = torch.cat([self.clip_backbone.embed_thumbnail(pil_image) for pil_image in images])
        network = self._network
        if self._compiled_network is not None:
            network, valid = self._compiled_network, mark_sizes(pixel_values, valid, words)
        result = network(
            pixel_values,
            valid,
            words,
            bare,
            whole,
            weights=(request.alpha, request.beta),
            unearths=unearths,
            with_loss=request.with_loss,
            shortlisted=request.shortlist is not None,
        )
        if request.shortlist and result.opinions is not None:
            assert result.whole is not None
            shortlists = classifier.nearest_classes(result.whole, request.shortlist)
            result.log_probabilities = result.opinions.classify_shortlists(
                classifier, request.train_vocabulary, shortlists
            )
        return result

    def _network(
        self,
        pixel_values: Tensor,
        valid: Tensor | None,
        words: WordTensors,
        bare: Tensor | None,
        whole: Tensor | None,
        weights: tuple[float, float],
        unearths: bool = True,
        with_loss: bool = False,
        shortlisted: bool = False,
    ) -> NetworkResult:
        """The network: tensors in, tensors out, nothing that waits for them. This is what compiling compiles.

        Args:
            pixel_values: (B, 3, H, W), H and W multiples of 32. valid: (B, H, W) bool or None.
            bare: (B, k, D), unit embeddings of dominant categories from outside, or None.
            whole: (B, D), CLIP's embeddings of the images if they were made already.
            weights: alpha and beta of the ensemble. unearths: look for dominant categories.
            with_loss: give the decoder's logits of all predictions, as in training.
            shortlisted: leave the classes to be made of the opinions.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.clip_backbone.is_trained):
            features = self.clip_backbone(channels_last(pixel_values))
        if whole is None and (unearths or shortlisted):
            whole = self._embed_images(pixel_values, valid, features)
        nearest, text_queries = self._unearth(whole if unearths else None, words.candidates, bare)
        mask_features, levels = self.detail_enhancement(features.levels)
        with_loss = with_loss or self.training
        predictions = self.image_text_aggregation(
            text_queries, mask_features, levels, valid, every_layer=with_loss
        )
        scale = self.image_text_aggregation.scale
        class_logits = [
            words.logits(prediction.class_embeddings, self.void_embedding, scale)
            for prediction in predictions
            if with_loss
        ]
        opinions, log_probabilities = None, None
        if not self.training:
            opinions = self._opinions(predictions[-1], features, valid, weights)
            log_probabilities = None if shortlisted else opinions.classify(words)
        return NetworkResult(
            predictions, mask_features, class_logits, nearest, whole, opinions, log_probabilities
        )

    def _embed_given(self, given: list[list[str]], classifier: TextClassifier) -> Tensor | None:
        """Unit bare embeddings (B, k, D) of dominant categories from outside; None if there are none to take.

        Raises:
            ValueError: more of them than the network takes.
        """
        unearth = self.dominant_categories
        if unearth is None:
            return None
        if any(len(names) > unearth.num_categories for names in given):
            raise ValueError(
                f"at most {unearth.num_categories} dominant categories per image, got {len(given[0])}"
            )
        if not given[0]:
            return None
        return torch.stack([self.vocabulary_encoder.bare(names, classifier.templates) for names in given])

    def _unearth(
        self, whole: Tensor | None, candidates: Tensor, bare: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Dominant category unearthing: the indices (B, k) of the nearest candidates, the text queries (B, k, C)."""
        unearth = self.dominant_categories
        if unearth is None:
            return None, None
        if whole is None:
            return None, None if bare is None else unearth(bare)
        nearest = unearth.nearest(whole, candidates)
        return nearest, unearth(candidates[nearest])

    @torch.no_grad()
    def _embed_images(self, pixel_values: Tensor, valid: Tensor | None, features: ImageFeatures) -> Tensor:
        """CLIP's embeddings of whole images, (B, D), not normalised, from the dense feature."""
        everything = torch.ones_like(pixel_values[:, :1, ::4, ::4])
        masks = masks_on_dense_feature(everything, features.dense, 1, valid)
        return self.clip_backbone.pool_masks(features.dense, masks)[:, 0]

    def _opinions(
        self,
        prediction: Prediction,
        features: ImageFeatures,
        valid: Tensor | None,
        weights: tuple[float, float],
    ) -> Opinions:
        """What the decoder and CLIP make of the queries."""
        config, dense = self.config, features.dense
        masks = masks_on_dense_feature(prediction.mask_logits, dense, config.dense_upsample, valid)
        if config.dense_upsample > 1:
            dense = F.interpolate(dense, size=masks.shape[-2:], mode="bilinear", align_corners=False)
        return Opinions(
            in_vocab=prediction.class_embeddings,
            out_vocab=self.clip_backbone.pool_masks(dense, masks),
            counts=masks.flatten(2).any(dim=-1) if config.ensemble_on_valid_mask else None,
            void=self.void_embedding,
            scales=(self.image_text_aggregation.scale, self.clip_backbone.logit_scale),
            weights=weights,
        )

    def _stuff_ids(self, vocabulary: Vocabulary) -> list[int]:
        stuff = set(self.config.stuff_names or [])
        return [index for index, synonyms in enumerate(vocabulary) if stuff.intersection(synonyms)]

    # --- checkpoints ---

    @classmethod
    def from_clip(
        cls, config: ITAConfig, clip_state_dict: dict[str, Tensor]
    ) -> "ITAForOpenVocabSegmentation":
        """A new model on a trained CLIP; everything but CLIP starts random.

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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint, as `PreTrainedModel.from_pretrained`, with the frozen CLIP in it.

        Raises:
            ValueError: the checkpoint lacks weights of the frozen CLIP.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if key.startswith("clip_backbone."))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of the frozen CLIP, such as {missing[0]}"
            )
        # The model was built without memory, and what no checkpoint holds has to be made again.
        model.clip_backbone.restore_buffers(model.config.clip_model_config)
        model.clip_backbone.freeze()
        return (model, info) if wants_info else model
