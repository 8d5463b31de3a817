"""What ends a run early (signals, non-finite losses), and the progress that it shows."""

import datetime
import math
import os
import signal
import sys
from collections import deque
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from ita_segmentation.errors import ITAError

NON_FINITE_BATCH = "non_finite_batch.json"
NEVER = 2**62
STEPS_BETWEEN_CHECKS = 10
"""On an accelerator, where a check waits for the device; on a CPU every step is checked."""


class TrainingStoppedError(ITAError):
    """A run that must stop before its end, and why.

    `exit_status` is that of the process: 1 for a failure, 128 plus the number of a signal.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class StopSignals:
    """Context that keeps SIGTERM or Ctrl-C as `received`, to stop after the step; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._handlers[signal.SIGINT])
            os.write(2, b"\nFinishing the step and saving a checkpoint; Ctrl-C again to stop at once.\n")


class NonFiniteGuard:
    """Remember the latest batches, and the first step with a non-finite loss or gradient.

    Nothing waits for the device but `check`, which is due every `every` steps; batches are remembered for longer.
    """

    def __init__(self, device: torch.device, batches_per_step: int, every: int) -> None:
        self.every = every
        self.recent: deque[tuple[int, list[str], Tensor]] = deque(maxlen=2 * every * batches_per_step)
        self._first_bad = torch.tensor(NEVER, device=device)

    @torch.no_grad()
    def record(self, step: int, image_names: list[str], losses: Tensor) -> None:
        """Record the losses (n,) of a batch of an optimizer step, counted from 1."""
        self.recent.append((step, image_names, losses))
        self._record(step, losses)

    @torch.no_grad()
    def record_gradient(self, step: int, model: torch.nn.Module) -> None:
        """Record the gradients of an optimizer step."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        self._record(step, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _record(self, step: int, values: Tensor) -> None:
        is_finite = torch.isfinite(values).all()
        self._first_bad = torch.where(is_finite, self._first_bad, self._first_bad.clamp(max=step))

    def check(self, stop_requested: bool) -> tuple[int | None, bool]:
        """Give the first non-finite step of any process, or None, and whether any was asked to stop."""
        asked = self._first_bad.new_tensor(0 if stop_requested else 1)
        both = torch.stack([self._first_bad, asked])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MIN)
        first_bad, not_asked = both.tolist()
        return (None if first_bad == NEVER else first_bad), not not_asked

    def batches_of(self, step: int, loss_names: list[str]) -> list[dict[str, Any]]:
        """Describe this process's batches of a step for a JSON file; non-finite losses become strings."""
        batches = []
        for _, image_names, losses in (batch for batch in self.recent if batch[0] == step):
            values = [value if math.isfinite(value) else str(value) for value in losses.tolist()]
            batches.append({"image_names": image_names, "losses": dict(zip(loss_names, values, strict=True))})
        return batches


SHOWN = (
    ("loss", "loss {:.3f}"),
    ("learning_rate", "lr {:.2e}"),
    ("grad_norm", "gradient {:.3g}"),
    ("images_per_second", "{:.1f} images/s"),
    ("memory_gib", "{:.1f} GiB"),
    ("cuda_memory_gib", "CUDA {:.1f} GiB"),
    ("skipped_images", "{:.0f} skipped"),
)


def progress_line(step: int, num_steps: int, logs: dict[str, Any]) -> str:
    """Format a log entry: `step 50/1000  loss 31.204  lr 1.00e-04 ... 3:12:05 left`, or an evaluation's scores."""
    parts = [f"step {step}/{num_steps}"]
    if "loss" in logs:
        parts += [form.format(logs[name]) for name, form in SHOWN if logs.get(name)]
        parts += [f"{datetime.timedelta(seconds=round(60 * logs['eta_minutes']))} left"]
    else:
        hidden = ("epoch", "total_flos", "minutes")
        parts += [f"{name} {value:.4g}" for name, value in logs.items() if name not in hidden]
    return "  ".join(parts)


class ProgressLine(TrainerCallback):
    """Write log entries to stderr, and a progress bar unless `disable_tqdm`; the first process only."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write an entry above the bar."""
        if state.is_world_process_zero and logs:
            tqdm.write(progress_line(state.global_step, state.max_steps, logs), file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
