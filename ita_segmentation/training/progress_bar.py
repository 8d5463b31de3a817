"""One line for each log entry, and a bar with the time that is left."""

import datetime
import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

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
    """`step 50/1000  loss 31.204  lr 1.00e-04  ...  3:12:05 left`, or the scores of an evaluation."""
    parts = [f"step {step}/{num_steps}"]
    if "loss" in logs:
        parts += [form.format(logs[name]) for name, form in SHOWN if logs.get(name)]
        parts += [f"{datetime.timedelta(seconds=round(60 * logs['eta_minutes']))} left"]
    else:
        parts += [
            f"{name} {value:.4g}" for name, value in logs.items() if name not in ("epoch", "total_flos")
        ]
    return "  ".join(parts)


class ProgressLine(TrainerCallback):
    """Writes to the standard error stream of the first process; the bar can be switched off (`disable_tqdm`)."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            tqdm.write(progress_line(state.global_step, state.max_steps, logs), file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None
