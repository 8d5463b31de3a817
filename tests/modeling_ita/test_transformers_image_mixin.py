"""transformers' own common tests of image processors, run against ITA's.

They need transformers' source (see `helpers.transformers_source`); without it the module is skipped.
"""

import sys
import types
import unittest
from typing import Any
from unittest import mock

import pytest
import torch

from helpers.transformers_source import common_tests, why_not_here
from modeling_ita import ITAForOpenVocabSegmentationOutput, ITAImageProcessor

if reason := why_not_here():
    pytest.skip(reason, allow_module_level=True)

downloads = types.ModuleType("fetch_hub_objects_for_ci")  # which the source distribution leaves out
downloads.url_to_local_path = None  # type: ignore[attr-defined]
with mock.patch.dict(sys.modules, {downloads.__name__: downloads}):
    common: Any = common_tests("test_image_processing_common")


class ITAImageProcessingTester(common.ImageProcessingTester):
    """What the mixins ask of a processor's tester: settings, inputs, and the model's outputs."""

    num_queries, num_labels = 3, 4
    mask_size = (5, 6)

    def __init__(self, parent, **settings):
        settings = {"size": {"shortest_edge": 32, "longest_edge": 64}, "size_divisor": 32, **settings}
        super().__init__(parent, batch_size=3, min_resolution=20, max_resolution=100, **settings)

    def _get_image_processing_classes(self):
        return {"torchvision": ITAImageProcessor}

    def expected_output_image_shape(self, images):
        channels, *sides = super().expected_output_image_shape(images)
        return (channels, *(-(-side // self.size_divisor) * self.size_divisor for side in sides))

    def prepare_post_process_semantic_segmentation_inputs(self):
        random = torch.Generator().manual_seed(0)
        outputs = ITAForOpenVocabSegmentationOutput(
            class_queries_logits=torch.randn(
                self.batch_size, self.num_queries, self.num_labels + 1, generator=random
            ),
            masks_queries_logits=torch.randn(
                self.batch_size, self.num_queries, *self.mask_size, generator=random
            ),
        )
        height, width = (4 * side for side in self.mask_size)
        return {"outputs": outputs}, {"num_labels": self.num_labels, "height": height, "width": width}


class ITAImageProcessingTest(
    common.ImageProcessingTestMixin, common.PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    image_processor_tester_class = ITAImageProcessingTester

    def setUp(self):
        super().setUp()
        self.image_processor_tester = ITAImageProcessingTester(self)

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    @unittest.skip("a fourth channel is alpha, and the network takes RGB")
    def test_call_numpy_4_channels(self):
        pass
