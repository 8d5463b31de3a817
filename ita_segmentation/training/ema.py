"""Exponential moving average of the weights that learn; the frozen ones are kept once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

COUNT = "num_averaged"  # the name, in a file, of how many steps have been averaged


def decay_after(num_averaged: int, decay: float) -> float:
    """The decay of a step: rises from 2 / 11 to `decay`, so that the random start is forgotten soon."""
    return min(decay, (1 + num_averaged) / (10 + num_averaged))


class WeightAverage:
    """The moving average of some named parameters.

    Args:
        parameters: by name; all that learn.
        decay: what remains of the average at each step, below 1; warms up as `decay_after` says.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.names = list(parameters)
        self.parameters = nn.ParameterList(parameters.values())

        @torch.no_grad()
        def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
            torch._foreach_lerp_(averaged, current, 1.0 - decay_after(int(num_averaged), decay))

        self.average = AveragedModel(self.parameters, multi_avg_fn=average)  # type: ignore[arg-type]

    @property
    def averages(self) -> list[nn.Parameter]:
        return list(self.average.module.parameters())

    def update(self) -> None:
        """Takes in the parameters as they are now; the first time, copies them."""
        self.average.update_parameters(self.parameters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """The averaged weights and the others change places; nothing is copied."""
        for parameter, averaged in zip(self.parameters.parameters(), self.averages, strict=True):
            parameter.data, averaged.data = averaged.data, parameter.data

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        return {name: tensor.detach() for name, tensor in zip(self.names, self.averages, strict=True)}

    def save(self, file: Path) -> None:
        count = self.average.n_averaged.reshape(1).cpu()
        save_file({**self.state(), COUNT: count}, file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Raises KeyError if `file` is of other parameters."""
        tensors = load_file(file)
        self.average.n_averaged.fill_(int(tensors[COUNT]))
        for name, averaged in zip(self.names, self.averages, strict=True):
            averaged.copy_(tensors[name])
