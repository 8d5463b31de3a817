"""Learning rates over a run, by steps or by the clock."""

import math
import time
from collections.abc import Sequence

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

STEP_MILESTONES = (0.89, 0.96)
"""Shares of the run after each of which "step" divides by ten (Mask2Former's)."""
POLY_POWER = 0.9


def learning_rate_factor(
    schedule: str, progress: float, milestones: Sequence[float] = STEP_MILESTONES
) -> float:
    """Compute the factor of the learning rate after a share (0..1) of the run, warm-up aside.

    Schedules are "step" (divides by ten at each milestone), "cosine", "linear", "poly" (linear to the power 0.9; these
    three end at 0) and "constant"; ValueError for another one.
    """
    left = 1.0 - min(progress, 1.0)
    factors = {
        "step": 0.1 ** sum(progress >= milestone for milestone in milestones),
        "cosine": 0.5 * (1.0 - math.cos(math.pi * left)),
        "linear": left,
        "poly": left**POLY_POWER,
        "constant": 1.0,
    }
    if schedule not in factors:
        raise ValueError(
            f"no learning rate schedule is called {schedule!r}; choose from {', '.join(factors)}"
        )
    return factors[schedule]


class MinuteBudget:
    """Wall-clock minutes of a run as of the last `read_clock`, including its parts before a resume."""

    def __init__(self, max_minutes: float | None) -> None:
        self.max_minutes = max_minutes
        self.minutes = 0.0
        self._minutes_before = 0.0
        self._started = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the budget that is spent; 0 without a budget."""
        return self.minutes / self.max_minutes if self.max_minutes else 0.0

    @property
    def is_spent(self) -> bool:
        """Whether the budget is spent."""
        return self.progress >= 1.0

    def start(self, minutes_before: float = 0.0) -> None:
        """Start the clock of a run that has already taken `minutes_before`."""
        self._minutes_before, self._started = minutes_before, time.monotonic()
        self.read_clock()

    def read_clock(self) -> None:
        """Update `minutes`; with a budget, all processes take the first one's clock, so that they stop together."""
        minutes = self._minutes_before + (time.monotonic() - self._started) / 60.0
        if self.max_minutes and torch.distributed.is_available() and torch.distributed.is_initialized():
            shared = torch.tensor(minutes, dtype=torch.float64)
            if torch.distributed.get_backend() == "nccl":
                shared = shared.cuda()
            torch.distributed.broadcast(shared, src=0)
            minutes = shared.item()
        self.minutes = minutes


def build_scheduler(
    optimizer: Optimizer,
    schedule: str,
    num_steps: int,
    warmup_steps: int,
    milestones: Sequence[float],
    budget: MinuteBudget,
) -> LambdaLR:
    """Build a linear warm-up followed by a schedule over the steps or the minutes, whichever are further."""

    def factor(step: int) -> float:
        progress = max(step / max(num_steps, 1), budget.progress)
        warm = min((step + 1) / (warmup_steps + 1), 1.0)
        return warm * learning_rate_factor(schedule, progress, milestones)

    return LambdaLR(optimizer, factor)
