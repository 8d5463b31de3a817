"""ITA: image-text aggregation for open-vocabulary segmentation.

Importing this package registers its classes with transformers' Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .classification import TextEmbeddings
from .configuration_ita import ITAConfig
from .image_processing_ita import ITAImageProcessor
from .modeling_ita import (
    ITAForOpenVocabSegmentation,
    ITAForOpenVocabSegmentationOutput,
    ITAPreTrainedModel,
)
from .pipeline_ita import ITAZeroShotImageSegmentationPipeline
from .vocabulary import Vocabulary, normal_form, normalize_vocabulary, parse_classes

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
    "ITAImageProcessor",
    "ITAPreTrainedModel",
    "TextEmbeddings",
    "Vocabulary",
    "normal_form",
    "normalize_vocabulary",
    "parse_classes",
]
