"""What a run has logged, read back: the entries of `trainer_state.json`, in the run's folder and in each checkpoint."""

from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """All entries in order, each with its `step`. docs/training.md says what they hold.

    Raises:
        FileNotFoundError: the folder is of no run, or the run has saved nothing yet.
    """
    return TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME)).log_history


def curve(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged number; both empty if it was never logged."""
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [step for step, _ in points], [value for _, value in points]
