"""What is known of a run beside its log: arguments, machine, versions, data, and what happened when (`run.json`)."""

import dataclasses
import datetime
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ita_segmentation.training.checkpoints import checkpoints_of, unfinished

RUN_RECORD = "run.json"


@dataclasses.dataclass
class RunRecord:
    """What `run.json` holds.

    Attributes:
        arguments: those that are not the default.
        machine, versions, data: names and what there is to say of them.
        classes: names of the data set's classes, and whether each is seen in training.
        events: `{"time", "step", "what"}` in the order in which they happened, over all parts of the run.
    """

    arguments: dict[str, str] = dataclasses.field(default_factory=dict)
    machine: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    classes: list[tuple[str, bool]] = dataclasses.field(default_factory=list)
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def happened(self, step: int, what: str) -> None:
        """Adds an event of now."""
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        self.events.append({"time": now, "step": step, "what": what})


def write_whole(file: Path, content: str | bytes) -> None:
    """The file has all of the content, or is as it was."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished(file).write_bytes(data)
        os.replace(unfinished(file), file)
    finally:
        unfinished(file).unlink(missing_ok=True)


def write_record(output: Path, record: RunRecord) -> None:
    write_whole(output / RUN_RECORD, json.dumps(dataclasses.asdict(record), indent=1))


def read_record(output: Path) -> RunRecord:
    """An empty record if the run has none.

    Raises:
        ValueError: it is damaged.
    """
    file = output / RUN_RECORD
    if not file.is_file():
        return RunRecord()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        record = RunRecord(**values)
        record.classes = [(str(name), bool(seen)) for name, seen in record.classes]
        record.events = [
            {"time": str(e["time"]), "step": int(e["step"]), "what": str(e["what"])} for e in record.events
        ]
        for table in (record.arguments, record.machine, record.versions, record.data):
            table.items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from error
    return record


def read_state(output: Path) -> TrainerState:
    """The state of a run that is furthest on: the folder's, or a checkpoint's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    folders = [output, *checkpoints_of(output)[:1]]
    files = [folder / TRAINER_STATE_NAME for folder in folders if (folder / TRAINER_STATE_NAME).is_file()]
    if not files:
        raise FileNotFoundError(f"{output} is the folder of no run, or of one that has saved nothing yet")
    return max(map(_read_state, files), key=lambda state: state.global_step)


def _read_state(file: Path) -> TrainerState:
    try:
        state = TrainerState.load_from_json(str(file))
        steps = [entry["step"] for entry in state.log_history]
        if not all(isinstance(step, int) for step in [state.global_step, state.max_steps, *steps]):
            raise TypeError("a step is no whole number")
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"{file} is damaged: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return state


# ------------------------------------------------------------------------------------------------------------


def changed_arguments(*groups: Any) -> dict[str, str]:
    """The arguments of dataclasses that are not the default, as text. Secrets are left out."""
    changed = {}
    for group in groups:
        for field in dataclasses.fields(group):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            value = getattr(group, field.name, None)
            if field.init and value != default and not field.name.endswith("_token"):
                changed[field.name] = str(getattr(value, "value", value))
    return changed


def machine_facts(num_processes: int, device: torch.device) -> dict[str, str]:
    """Where a run is, in words."""
    facts = {"system": platform.platform(), "processor": _processor(), "cores": str(os.cpu_count())}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    facts["processes"] = f"{num_processes} on {device.type}, {torch.get_num_threads()} threads each"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
