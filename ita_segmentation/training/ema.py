"""Exponential moving average of the trained weights; frozen weights are kept once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

COUNT = "num_averaged"  # key, in a file, of the number of averaged steps


def decay_after(num_averaged: int, decay: float) -> float:
    """Compute the decay of a step: it rises from 2 / 11 to `decay`, so the random start is forgotten soon."""
    return min(decay, (1 + num_averaged) / (10 + num_averaged))


class WeightAverage:
    """The moving average of trainable parameters, by name; the decay warms up to `decay` as in `decay_after`."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.names = list(parameters)
        self.parameters = nn.ParameterList(parameters.values())

        @torch.no_grad()
        def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
            torch._foreach_lerp_(averaged, current, 1.0 - decay_after(int(num_averaged), decay))

        self.average = AveragedModel(self.parameters, multi_avg_fn=average)  # type: ignore[arg-type]

    def update(self) -> None:
        """Add the current parameters to the average; the first time, copy them."""
        self.average.update_parameters(self.parameters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights in this context."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Swap the averaged and the current weights without a copy."""
        for parameter, averaged in zip(self.parameters.parameters(), self._averages(), strict=True):
            parameter.data, averaged.data = averaged.data, parameter.data

    def state(self) -> dict[str, Tensor]:
        """Return the averaged weights by name."""
        return {name: tensor.detach() for name, tensor in zip(self.names, self._averages(), strict=True)}

    def save(self, file: Path) -> None:
        """Write the average to a safetensors file."""
        count = self.average.n_averaged.reshape(1).cpu()
        save_file({**self.state(), COUNT: count}, file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Read the average from a safetensors file; raises KeyError if it is of other parameters."""
        tensors = load_file(file)
        self.average.n_averaged.fill_(int(tensors[COUNT]))
        for name, averaged in zip(self.names, self._averages(), strict=True):
            averaged.copy_(tensors[name])

    def _averages(self) -> list[nn.Parameter]:
        return list(self.average.module.parameters())
