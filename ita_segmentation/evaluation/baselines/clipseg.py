"""CLIPSeg (Lüddecke and Ecker, arXiv 2112.10003) as an open-vocabulary baseline: class names are its prompts.

CLIPSeg answers one prompt with one map of logits. Each name of each class is a prompt; a class has the best logit of
its names, the map is resized to the image, and a pixel gets the class with the highest logit. Prompts are encoded
once, the image tower runs once an image, and only the small decoder runs for every prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ita_segmentation.evaluation.baselines.labels import background_class
from ita_segmentation.evaluation.baselines.postprocessing import (
    BaselinePredictor,
    Network,
    best_labels,
    to_device,
    to_float32,
)
from ita_segmentation.evaluation.predictors import ImagePrediction

TEMPLATE = "a photo of a {}."  # the one that the code of CLIPSeg's authors calls `fixed`

BACKGROUND_LOGIT = 0.0  # a pixel whose classes are all below this is background: probability 1/2

PROMPTS_AT_ONCE = 32


class ClipSegPredictor(BaselinePredictor):
    """CLIPSeg, with its tokenizer, for one vocabulary.

    A class named "background" is no prompt: it is where no other class has a logit of `BACKGROUND_LOGIT` or more.
    """

    def __init__(self, network: Network, tokenizer: Any, classes: Sequence[Sequence[str]]) -> None:
        self.network = network
        self.background = background_class(classes)
        self.foreground = [index for index in range(len(classes)) if index != self.background]
        prompts = [TEMPLATE.format(name) for index in self.foreground for name in classes[index]]
        positions = [position for position, index in enumerate(self.foreground) for _ in classes[index]]
        self.position_of_prompt = torch.tensor(positions, dtype=torch.int64)
        self.embeddings = self._encode(tokenizer, prompts)
        self.notes = (f"prompts: {TEMPLATE!r} with every name of a class",)

    @torch.inference_mode()
    def _encode(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        """Return the conditional embeddings of prompts, (N, D) float32."""
        model = self.network.model
        parts = [torch.zeros(0, model.config.projection_dim, device=model.device)]
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = list(prompts[start : start + PROMPTS_AT_ONCE])
            tokens = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            tokens = {name: to_device(value, model.device) for name, value in tokens.items()}
            with self.network.precision():
                parts.append(to_float32(model.get_conditional_embeddings(batch_size=len(some), **tokens)))
        return torch.cat(parts)

    def _predict(self, image: Image.Image, size: tuple[int, int], tasks: frozenset[str]) -> ImagePrediction:
        model, inputs = self.network.model, self.network.inputs(image)
        with self.network.precision():
            features = model.clip.get_image_features(**inputs, output_hidden_states=True)
        activations = [features.hidden_states[layer + 1] for layer in model.extract_layers]
        height, width = inputs["pixel_values"].shape[-2:]

        def scores_of(positions: Sequence[int]) -> Tensor:
            logits = self._class_logits(activations, positions)
            return interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]

        positions, scores = best_labels(
            scores_of, range(len(self.foreground)), size, model.device, intermediate_pixels=height * width
        )
        labels = torch.tensor(self.foreground or [0], device=positions.device)[positions]
        if self.background is not None:
            labels[scores < BACKGROUND_LOGIT] = self.background
        return ImagePrediction(semantic=labels.to(torch.int32).cpu().numpy())

    def _class_logits(self, activations: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
        """Return the logits of consecutive foreground classes, (n, h, w): each the best of its names."""
        first, end = positions[0], positions[-1] + 1
        rows = ((self.position_of_prompt >= first) & (self.position_of_prompt < end)).nonzero()[:, 0]
        maps = [self._decode(activations, self.embeddings[some]) for some in rows.split(PROMPTS_AT_ONCE)]
        prompts = torch.cat(maps)
        index = (self.position_of_prompt[rows] - first).to(prompts.device)[:, None, None].expand_as(prompts)
        logits = prompts.new_full((len(positions), *prompts.shape[1:]), -torch.inf)
        return logits.scatter_reduce(0, index, prompts, "amax")

    def _decode(self, activations: Sequence[Tensor], embeddings: Tensor) -> Tensor:
        """Return the decoder's logits for prompts, (n, h, w) float32."""
        repeated = [activation.expand(len(embeddings), -1, -1) for activation in activations]
        with self.network.precision():
            return to_float32(self.network.model.decoder(repeated, embeddings).logits)
