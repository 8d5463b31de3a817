"""Keeps the report of a run while it runs: sample predictions, events, `trainer_state.json`, the page."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ita_segmentation.data.training import INFINITE_LENGTH
from ita_segmentation.evaluation.reporting.report import versions_used
from ita_segmentation.training.report import write_report
from ita_segmentation.training.report_record import (
    RunRecord,
    changed_arguments,
    machine_facts,
    read_record,
    write_record,
    write_whole,
)
from ita_segmentation.training.report_samples import SAMPLES, Sample, as_jpeg, draw_samples, samples_of

if TYPE_CHECKING:
    from ita_segmentation.training.trainer import ITATrainer

logger = logging.get_logger(__name__)


class RunReport(TrainerCallback):
    """At each evaluation and at the end, the first process writes what `ita_segmentation.training.report` shows.

    A disk that cannot be written costs the report, and not the run.

    Args:
        trainer: of the run.
        arguments: dataclasses of all arguments.
        dataset: name or folder of the data set.
    """

    def __init__(self, trainer: "ITATrainer", arguments: tuple[Any, ...], dataset: str) -> None:
        self.trainer = trainer
        self.record = RunRecord(
            arguments=changed_arguments(*arguments),
            machine=machine_facts(trainer.args.world_size, trainer.args.device),
            versions=versions_used(),
            data={
                "data set": dataset,
                "training images": _count(trainer.train_dataset),
                "evaluation images": _count(trainer.eval_dataset),
            },
            classes=[
                (names[0], seen)
                for names, seen in zip(trainer.classes.classes, trainer.classes.seen, strict=True)
            ],
        )
        self._samples: list[Sample] = []
        self._num_seen = 0

    # ------------------------------------------------------------------------------------------------ events

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if state.global_step:
            self._read_events()
        self._happened(f"resumed after step {state.global_step}" if state.global_step else "started")
        self._write(state, with_state=True)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            is_saved = self.trainer.saved_step == state.global_step
            self._happened(
                f"checkpoint-{state.global_step} {'saved' if is_saved else 'could not be written'}"
            )
            self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            is_through = state.global_step >= state.max_steps
            end = (
                "finished" if is_through else "finished: its time is spent" if args.max_minutes else "stopped"
            )
            self._happened(self.trainer.stop_reason or end)
            self._write(state, with_state=True, with_page=True)

    def _happened(self, what: str) -> None:
        self.record.happened(self.trainer.state.global_step, what)

    def _read_events(self) -> None:
        """Those of the parts of the run before this one."""
        try:
            self.record.events = read_record(self.trainer.output).events
        except (ValueError, OSError) as error:
            logger.warning(f"the report begins anew: {error}")

    # ----------------------------------------------------------------------------------------------- samples

    def on_prediction_step(self, args, state, control, batch=None, predictions=None, **kwargs):
        """Keeps the first images: of the whole evaluation, of which each process has every n-th image."""
        if batch is None or predictions is None:
            return
        first, self._num_seen = self._num_seen, self._num_seen + len(predictions)
        places = [args.process_index + args.world_size * place for place in range(first, self._num_seen)]
        wanted = [place for place in places if place < args.sample_images]
        self._samples += samples_of(batch, predictions, wanted, self.trainer.processor)

    def on_evaluate(self, args, state, control, **kwargs):
        samples, self._samples, self._num_seen = self._samples, [], 0
        with self.trainer.numbers.not_counted():
            samples = gather_object(samples) if args.sample_images else []
            if state.is_world_process_zero:
                self._draw(sorted(samples, key=lambda sample: sample.place), state)
                self._write(state, with_state=True, with_page=True)

    def _draw(self, samples: list[Sample], state: Any) -> None:
        if not samples:
            return
        classes = self.trainer.classes
        names = [names[0] for names in classes.classes]
        image = draw_samples(samples, names, classes.ignore_index, f"step {state.global_step:,}")
        try:
            file = self.trainer.output / SAMPLES / f"step-{state.global_step}.jpg"
            write_whole(file, as_jpeg(image))
        except OSError as error:
            logger.error(f"sample images could not be written, the run goes on: {error}")
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(image)
                callback.tb_writer.add_image(SAMPLES, pixels, state.global_step, dataformats="HWC")

    # ------------------------------------------------------------------------------------------------- files

    def _write(self, state: Any, with_state: bool = False, with_page: bool = False) -> None:
        """The record, and perhaps the state and the page; or one line that says why not."""
        output = self.trainer.output
        try:
            write_record(output, self.record)
            if with_state:
                content = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)
                write_whole(output / TRAINER_STATE_NAME, f"{content}\n")
            if with_page:
                write_report(output, state, self.record)
        except OSError as error:
            logger.error(f"the report could not be written, the run goes on: {error}")


def _count(dataset: Any) -> str:
    """How many images a data set has, in words."""
    if dataset is None:
        return "none"
    if not hasattr(dataset, "__len__"):
        return "as many as the stream has"
    return "infinite" if len(dataset) == INFINITE_LENGTH else f"{len(dataset):,}"
