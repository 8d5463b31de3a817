"""Watches for a loss or a gradient that is no number, without waiting for the device at every step."""

import json
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ita_segmentation.training.checkpoints import unfinished

NAN_BATCH = "nan_batch.json"
NEVER = 2**62
STEPS_BETWEEN_CHECKS = (
    10  # on an accelerator, where a check waits for the device; on a CPU every step is checked
)


@dataclass
class Batch:
    """One batch of one process."""

    step: int
    image_names: list[str]
    losses: Tensor


class BatchWatch:
    """Remembers the latest batches, and the first step that was no number.

    Args:
        batches_per_step: of gradient accumulation.
        every: check every so many steps; batches are remembered for longer.
    """

    def __init__(self, device: torch.device, batches_per_step: int, every: int) -> None:
        self.every = every
        self.recent: deque[Batch] = deque(maxlen=2 * every * batches_per_step)
        self._first_bad = torch.tensor(NEVER, device=device)

    @torch.no_grad()
    def record(self, step: int, image_names: list[str], losses: Tensor) -> None:
        """Takes in a batch of an optimiser's step (the first is 1) and its losses, on the device."""
        self.recent.append(Batch(step, image_names, losses))
        self._record(step, torch.isfinite(losses).all())

    @torch.no_grad()
    def record_gradient(self, step: int, norm: Tensor | float) -> None:
        """Takes in the norm of a step's gradient."""
        self._record(step, torch.isfinite(torch.as_tensor(norm, device=self._first_bad.device)))

    def _record(self, step: int, is_finite: Tensor) -> None:
        self._first_bad = torch.where(is_finite, self._first_bad, self._first_bad.clamp(max=step))

    def verdict(self, is_asked_to_stop: bool) -> tuple[int | None, bool]:
        """The first step that was no number on any process (None: there was none), and whether any was asked to stop.

        All processes call this together. It waits for the device.
        """
        asked = self._first_bad.new_tensor(0 if is_asked_to_stop else 1)
        both = torch.stack([self._first_bad, asked])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MIN)
        first_bad, not_asked = both.tolist()
        return (None if first_bad == NEVER else first_bad), not not_asked

    def batches_of(self, step: int, loss_names: list[str]) -> list[dict[str, Any]]:
        """This process' batches of a step, for a file; a number that is none becomes a string."""
        return [
            {
                "image_names": batch.image_names,
                "losses": {
                    name: value if abs(value) < float("inf") else str(value)
                    for name, value in zip(loss_names, batch.losses.tolist(), strict=True)
                },
            }
            for batch in self.recent
            if batch.step == step
        ]


def write_nan_batch(
    output: Path, step: int, learning_rate: float, processes: list[list[dict[str, Any]]]
) -> Path:
    """Saves which images made a step that is no number: `NAN_BATCH`, a list of batches for each process."""
    file = output / NAN_BATCH
    text = json.dumps({"step": step, "learning_rate": learning_rate, "processes": processes}, indent=1)
    unfinished(file).write_text(text, encoding="utf-8")
    os.replace(unfinished(file), file)
    return file
