"""ITA: image-text aggregation for open-vocabulary segmentation.

Importing this package registers its classes with transformers' Auto classes and pipelines, so that neither needs
`trust_remote_code`; other models are not affected.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY, ImageSegmentationPipeline

from .batching import ITAForOpenVocabSegmentationOutput
from .configuration_ita import ITAConfig
from .image_processing_ita import ITAImageProcessor
from .modeling_ita import ITAForOpenVocabSegmentation, ITAPreTrainedModel
from .pipeline_ita import ITAImageSegmentationPipeline, ITAZeroShotImageSegmentationPipeline
from .text import (
    TextEmbeddings,
    Vocabulary,
    normal_form,
    normalize_vocabulary,
    parse_classes,
    with_distractors,
)

AutoConfig.register(ITAConfig.model_type, ITAConfig, exist_ok=True)
AutoImageProcessor.register(
    ITAConfig, image_processor_classes={"torchvision": ITAImageProcessor}, exist_ok=True
)
for _auto_class in (
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
):
    _auto_class.register(ITAConfig, ITAForOpenVocabSegmentation, exist_ok=True)
MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[ITAConfig.model_type] = ITAForOpenVocabSegmentation.__name__


class _ImageSegmentationPipeline(ImageSegmentationPipeline):
    """`ITAImageSegmentationPipeline` for an ITA model, transformers' own pipeline for any other."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs["model"]
        is_ita = model.config.model_type == ITAConfig.model_type
        return (ITAImageSegmentationPipeline if is_ita else ImageSegmentationPipeline)(*args, **kwargs)


PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = _ImageSegmentationPipeline
if "zero-shot-image-segmentation" not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        "zero-shot-image-segmentation",
        pipeline_class=ITAZeroShotImageSegmentationPipeline,
        pt_model=AutoModelForImageSegmentation,
    )

__all__ = [
    "ITAConfig",
    "ITAForOpenVocabSegmentation",
    "ITAForOpenVocabSegmentationOutput",
    "ITAImageSegmentationPipeline",
    "ITAImageProcessor",
    "ITAPreTrainedModel",
    "ITAZeroShotImageSegmentationPipeline",
    "TextEmbeddings",
    "Vocabulary",
    "normal_form",
    "normalize_vocabulary",
    "parse_classes",
    "with_distractors",
]
