"""CLIPSeg (Lüddecke and Ecker, arXiv 2112.10003) as an open-vocabulary baseline: class names are its prompts.

CLIPSeg answers one prompt with one map of logits: how much each pixel is what the prompt says. Each name of each class
is a prompt; a class has the best logit of its names, the map is brought to the image's size, and a pixel is of the
class with the highest logit. Prompts are encoded once, the image's tower runs once an image, and only the small
decoder runs for every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ita_segmentation.evaluation.baselines.labels import background_class
from ita_segmentation.evaluation.baselines.postprocessing import Network, as_float32, best_labels, on_device
from ita_segmentation.evaluation.predictors import Prediction

TEMPLATE = "a photo of a {}."
"""The one that the code of CLIPSeg's authors calls `fixed`."""

BACKGROUND_LOGIT = 0.0
"""A pixel whose classes all stay below this is background: probability 1/2, where a prompt's answer turns to "no"."""

PROMPTS_AT_ONCE = 32


class ClipSegPredictor:
    """A `Predictor` (see `predictors.py`) for one vocabulary.

    A class named "background" is no prompt: it is where no other class has a logit of `BACKGROUND_LOGIT` or more.

    Args:
        network: a `CLIPSegForImageSegmentation` and its image processor.
        tokenizer: of its text tower.
        classes: K classes, each a list of names.
    """

    tasks = frozenset({"semantic"})
    seen: list[bool] | None = None

    def __init__(self, network: Network, tokenizer: Any, classes: Sequence[Sequence[str]]):
        self.network = network
        self.background = background_class(classes)
        self.named = [index for index in range(len(classes)) if index != self.background]
        prompts = [TEMPLATE.format(name) for index in self.named for name in classes[index]]
        owners = [place for place, index in enumerate(self.named) for _ in classes[index]]
        self.owners = torch.tensor(owners, dtype=torch.int64)
        self.embeddings = self._encode(tokenizer, prompts)
        self.notes = (f"prompts: {TEMPLATE!r} with every name of a class",)

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], tasks: frozenset[str]
    ) -> list[Prediction]:
        """See `Predictor`.

        Raises:
            ValueError: a task that the model cannot do.
        """
        if not tasks <= self.tasks:
            raise ValueError(f"this model cannot do {', '.join(sorted(tasks - self.tasks))} segmentation")
        return [self._predict(image, size) for image, size in zip(images, sizes, strict=True)]

    @torch.inference_mode()
    def _encode(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        """Conditional embeddings of prompts, (N, D) float32."""
        model = self.network.model
        parts = [torch.zeros(0, model.config.projection_dim, device=model.device)]
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = list(prompts[start : start + PROMPTS_AT_ONCE])
            tokens = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
            tokens = {name: on_device(value, model.device) for name, value in tokens.items()}
            with self.network.precision():
                parts.append(as_float32(model.get_conditional_embeddings(batch_size=len(some), **tokens)))
        return torch.cat(parts)

    def _predict(self, image: Image.Image, size: tuple[int, int]) -> Prediction:
        model, inputs = self.network.model, self.network.inputs(image)
        with self.network.precision():
            seen = model.clip.get_image_features(**inputs, output_hidden_states=True)
        activations = [seen.hidden_states[layer + 1] for layer in model.extract_layers]
        height, width = inputs["pixel_values"].shape[-2:]

        def scores_of(places: Sequence[int]) -> Tensor:
            logits = self._class_logits(activations, places)
            return interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]

        places = range(len(self.named))
        where, scores = best_labels(scores_of, places, size, model.device, pixels_at_once=height * width)
        labels = torch.tensor(self.named or [0], device=where.device)[where]
        if self.background is not None:
            labels[scores < BACKGROUND_LOGIT] = self.background
        return Prediction(semantic=labels.to(torch.int32).cpu().numpy().astype(np.int32))

    def _class_logits(self, activations: Sequence[Tensor], places: Sequence[int]) -> Tensor:
        """The decoder's logits of some of the named classes, (n, h, w): each the best of its names."""
        first, past = places[0], places[-1] + 1
        rows = ((self.owners >= first) & (self.owners < past)).nonzero()[:, 0]
        logits: Tensor | None = None
        for some in rows.split(PROMPTS_AT_ONCE):
            answers = self._answers(activations, self.embeddings[some.to(self.embeddings.device)])
            if logits is None:
                logits = answers.new_full((len(places), *answers.shape[1:]), -torch.inf)
            for place, answer in zip((self.owners[some] - first).tolist(), answers, strict=True):
                torch.maximum(logits[place], answer, out=logits[place])
        assert logits is not None  # every class has a name
        return logits

    def _answers(self, activations: Sequence[Tensor], embeddings: Tensor) -> Tensor:
        """The decoder's logits for prompts, (n, h, w) float32."""
        repeated = [activation.expand(len(embeddings), -1, -1) for activation in activations]
        with self.network.precision():
            return self.network.model.decoder(repeated, embeddings).logits.float()
