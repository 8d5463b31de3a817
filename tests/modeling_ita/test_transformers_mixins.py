"""transformers' own common tests of models and configurations, run against ITA.

They need transformers' source (see `helpers.transformers_source`); without it the module is skipped.
"""

import unittest
from unittest import mock

import pytest
import torch

from helpers.tiny_checkpoint import tiny_clip, tiny_config
from helpers.transformers_source import common_tests, why_not_here
from modeling_ita import ITAConfig, ITAForOpenVocabSegmentation

if reason := why_not_here():
    pytest.skip(reason, allow_module_level=True)

ConfigTester = common_tests("test_configuration_common").ConfigTester
ModelTesterMixin = common_tests("test_modeling_common").ModelTesterMixin


class ITAModelTester:
    """What the mixin asks of a model's tester: a small configuration and inputs, and the sizes in them."""

    is_training = True
    batch_size = 2
    image_size = 64
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 32
    seq_length = encoder_seq_length = 9  # queries
    key_length = (image_size // 32) ** 2  # cells of the coarsest level
    num_hidden_states_types = 4  # of the image tower, the pixel decoder, and the decoder under two names

    def get_config(self) -> ITAConfig:
        clip = tiny_clip("modified_resnet", width=8)
        return tiny_config(clip_model_config=clip, decoder_layers=self.num_hidden_layers)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return self.get_config(), {"pixel_values": pixel_values}


class ITAModelTest(ModelTesterMixin, unittest.TestCase):  # type: ignore[valid-type, misc]
    all_model_classes = (ITAForOpenVocabSegmentation,)
    test_resize_embeddings = False  # the vocabulary is a list of names, not of tokens

    def setUp(self):
        self.model_tester = ITAModelTester()
        self.config_tester = ConfigTester(
            self, config_class=ITAConfig, has_text_modality=False, hidden_dim=64
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            batch, size = self.model_tester.batch_size, self.model_tester.image_size
            inputs["mask_labels"] = [torch.ones(1, size, size)] * batch
            inputs["class_labels"] = [torch.zeros(1, dtype=torch.int64)] * batch
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_outputs_equivalence(self):
        """The losses read masks at random points: here at the same ones in every call."""

        def draw_points(masks, count, device):
            return torch.rand(masks, count, 2, generator=torch.Generator().manual_seed(0))

        with mock.patch("modeling_ita.set_criterion.draw_points", draw_points):
            super().test_model_outputs_equivalence()

    @unittest.skip("a checkpoint without its frozen CLIP is refused, not filled up with random weights")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass

    @unittest.skip("the same; test_modeling.py has what is initialized in a checkpoint of the CLIP alone")
    def test_can_init_all_missing_weights(self):
        pass

    @unittest.skip("the network has no embeddings of tokens: images and names are its inputs")
    def test_model_get_set_embeddings(self):
        pass
