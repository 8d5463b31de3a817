"""transformers' Trainer for this model: frozen CLIP, loss parts, mIoU during training, safe checkpoints.

Optimization is Mask2Former's (arXiv 2112.01527, section 4.1): AdamW, weight decay on everything but norms and
embeddings, the norm of the whole gradient clipped, a learning rate in steps.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from ita_segmentation.data.training import INFINITE_LENGTH, EvaluationCollator, TrainingClasses
from ita_segmentation.errors import ITAError, UsageError, one_line
from ita_segmentation.evaluation.metrics.confusion_matrix import ConfusionMatrix
from ita_segmentation.files import write_files
from ita_segmentation.training import callbacks, checkpoints, clip_tuning, fsdp
from ita_segmentation.training.arguments import ITATrainingArguments
from ita_segmentation.training.ema import WeightAverage
from ita_segmentation.training.metrics import MetricAccumulator
from ita_segmentation.training.pseudo_labels import PseudoLabeler
from ita_segmentation.training.results import take_sample, write_results
from ita_segmentation.training.schedules import MinuteBudget, build_scheduler
from modeling_ita.text import normalize_vocabulary

logger = logging.get_logger(__name__)

SCORES = ("miou", "miou_seen", "miou_unseen", "fwiou", "macc", "pacc")


class RunCallback(TrainerCallback):
    """Call the trainer where the training loop has no public method to override."""

    def __init__(self, trainer: "ITATrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what a run has beside the Trainer's own state."""
        self.trainer.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradient; with a loss scaler, one that overflows is skipped and the scale reduced."""
        if self.trainer.accelerator.scaler is None:
            self.trainer.guard.record_gradient(state.global_step + 1, self.trainer.network)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock just before the schedule does."""
        self.trainer.budget.read_clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the average, and decide whether to stop."""
        self.trainer.end_step(control)


class ITATrainer(Trainer):
    """Trains the trainable part of an `ITAForOpenVocabSegmentation` and scores it by mIoU.

    Args:
        classes: The dataset's classes. Training uses the seen ones as vocabulary, evaluation all of them.
        eval_resize: Whether evaluation images are resized as the processor says.
        keep_vocabulary: Least score of the model's own segments that become pseudo-labels, so that it keeps the other
            classes of its vocabulary; 0 turns this off. Like `ema_decay`, it does not work with FSDP (UsageError).
        **kwargs: As for `Trainer`; `args` are `ITATrainingArguments`, `processing_class` is the `ITAImageProcessor`.
    """

    args: ITATrainingArguments

    def __init__(
        self,
        *,
        classes: TrainingClasses,
        eval_resize: bool = False,
        keep_vocabulary: float = 0.0,
        **kwargs: Any,
    ) -> None:
        model: Any = kwargs["model"]
        learning = clip_tuning.trainable(model)
        # Each process reads the frozen weights from the same file: DDP need not broadcast them.
        model._ddp_params_and_buffers_to_ignore = [
            name
            for name, _ in (*model.named_parameters(), *model.named_buffers())
            if name.startswith(clip_tuning.CLIP) and name not in learning
        ]
        train_dataset: Any = kwargs.get("train_dataset")
        if hasattr(train_dataset, "__len__") and len(train_dataset) == INFINITE_LENGTH:
            kwargs["args"].train_sampling_strategy = "sequential"  # every image is new: nothing to shuffle
        super().__init__(**kwargs)
        self.classes = classes
        self.train_vocabulary = normalize_vocabulary(classes.seen_classes)
        self.eval_vocabulary = normalize_vocabulary(classes.classes)
        self.processor: Any = self.processing_class
        self.eval_collator = EvaluationCollator(self.processor, eval_resize)
        self.output = Path(self.args.output_dir or ".")
        self.budget = MinuteBudget(self.args.max_minutes)
        self.metrics = MetricAccumulator()
        self.average: WeightAverage | None = None
        self.signals = callbacks.StopSignals()
        self.was_interrupted = False
        self.last_checkpoint: Path | None = None
        every = 1 if self.args.device.type == "cpu" else callbacks.STEPS_BETWEEN_CHECKS
        self.guard = callbacks.NonFiniteGuard(self.args.device, self.args.gradient_accumulation_steps, every)
        if self.is_fsdp_enabled and (self.args.ema_decay or keep_vocabulary):
            raise UsageError("ema_decay and keep_vocabulary do not work with FSDP's sharded weights: use DDP")
        if self.is_fsdp_enabled:
            fsdp.prepare_for_fsdp(model, self.accelerator.state.fsdp_plugin, self.args.device)
        self.pseudo_labeler: PseudoLabeler | None = None
        if keep_vocabulary:
            own = self.train_vocabulary
            labeler = PseudoLabeler(model, self.processor, classes.classes, len(own), keep_vocabulary)
            self.train_vocabulary = normalize_vocabulary([*own, *labeler.classes])
            self.pseudo_labeler = labeler
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(callbacks.ProgressLine())
        self.add_callback(RunCallback(self))

    @property
    def network(self) -> Any:
        """The `ITAForOpenVocabSegmentation` within DDP, FSDP or compiled wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # --------------------------------------------------------------------------------------------- a run

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train as `Trainer` does. Raises TrainingStoppedError after a non-finite step, SIGTERM or Ctrl-C."""
        self.last_checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.is_world_process_zero() and self.output.is_dir():
            checkpoints.clear_temporary(self.output)
        self.accelerator.wait_for_everyone()
        with self.signals:
            try:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except callbacks.TrainingStoppedError:
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                self.save_results([])
                raise
        if self.was_interrupted:
            self.save_results([])
            step = self.state.global_step
            folder = checkpoints.checkpoint_folder(self.output, step)
            saved = f"{folder} is saved" if self.last_checkpoint == folder else f"{folder} could not be saved"
            name, status = "SIGTERM", 143
            if self.signals.received is not None:
                name, status = self.signals.received.name, 128 + self.signals.received
            raise callbacks.TrainingStoppedError(f"stopped by {name} after step {step}; {saved}", status)
        return result

    def begin(self) -> None:
        """Start or restore what a run has beside the Trainer's own state: the average, unlogged sums, minutes."""
        if self.args.ema_decay:
            self.average = WeightAverage(clip_tuning.trainable(self.network), self.args.ema_decay)
        resumed, minutes = self.last_checkpoint, 0.0
        if resumed is not None:
            if (resumed / self._run_state_name).is_file():
                state = torch.load(resumed / self._run_state_name, weights_only=True)
                self.metrics.load_state(state["metrics"], self.args.device)
                minutes = state["minutes"]
            has_average = (resumed / checkpoints.AVERAGED).is_file()
            if has_average != (self.average is not None):
                has = "averaged weights" if has_average else "no averaged weights"
                raise ITAError(f"{resumed} has {has}: use the ema_decay of its run")
            if self.average is not None:
                try:
                    self.average.load(resumed / checkpoints.AVERAGED)
                except (KeyError, RuntimeError, SafetensorError) as error:
                    raise ITAError(f"{resumed} has an average of other weights") from error
        self.budget.start(minutes)

    def end_step(self, control: Any) -> None:
        """Update the average after an optimizer step, and decide whether the run must stop."""
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.update()
        if self.budget.is_spent:
            control.should_training_stop = True
        if control.should_training_stop:
            control.should_log = True  # the last step is logged, however short the run
        due = control.should_save or control.should_log or control.should_evaluate
        if due or self.state.global_step % self.guard.every == 0:
            self.was_interrupted = self._check()
        if self.was_interrupted and not control.should_training_stop:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # a scheduler that sends SIGTERM does not wait long

    def _check(self) -> bool:
        """Tell whether any process was asked to stop. Raises TrainingStoppedError after a non-finite step."""
        bad_step, stop_requested = self.guard.check(self.signals.received is not None)
        if bad_step is None:
            return stop_requested
        processes = gather_object([self.guard.batches_of(bad_step, self.metrics.loss_names)])
        if self.is_world_process_zero():
            scheduler: Any = self.lr_scheduler
            rate = float(scheduler.get_last_lr()[0])
            document = {"step": bad_step, "learning_rate": rate, "processes": processes}
            text = json.dumps(document, indent=1)
            write_files({self.output / callbacks.NON_FINITE_BATCH: text.encode()})
        names = [name for process in processes for batch in process for name in batch["image_names"]]
        raise callbacks.TrainingStoppedError(
            f"the loss or its gradient is not finite at step {bad_step}, with {', '.join(names[:8])}"
            f"{' and others' if len(names) > 8 else ''}; see {self.output / callbacks.NON_FINITE_BATCH}"
        )

    def finish(self) -> None:
        """Put the averaged weights into the model after the run, and merge adapters."""
        if self.average is not None:
            self.average.swap()
            self.average = None
        clip_tuning.merge_adapters(self.network)

    # -------------------------------------------------------------------------------------- optimization

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """List all parameters but those of norms, embeddings and scales."""
        return clip_tuning.decayed_parameters(model)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer, with CLIP's trained weights in groups with a learning rate of their own."""
        if self.optimizer is None:
            optimizer: Any = super().create_optimizer(model)
            rate = self.args.learning_rate * self.args.clip_learning_rate_factor
            network: Any = self.model if model is None else model
            clip_tuning.separate_clip(optimizer, network, rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule: warm-up, then by the share of the steps or of the minutes, whichever is larger."""
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            kind, milestones = self.args.lr_scheduler_type, self.args.lr_milestones
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = build_scheduler(
                chosen, kind, num_training_steps, warmup, milestones, self.budget
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if hasattr(dataset, "epoch_sampler"):
            return dataset.epoch_sampler()  # its indices carry the epoch, which decides the augmentation
        return super()._get_train_sampler(dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Get the batches of an optimizer step, with pseudo-labels, and tell the criterion their number of masks."""
        if self.state.global_step >= self.state.max_steps:  # resumed after the last step
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.pseudo_labeler is not None:
            with self.accelerator.autocast():
                batches = [self.pseudo_labeler.add_pseudo_labels(batch) for batch in batches]
        counts = [[len(labels) for labels in batch["class_labels"]] for batch in batches]
        self.network.criterion.begin_step(counts)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch and record its parts."""
        names, skipped = inputs.pop("image_names", []), inputs.pop("skipped_images", [])
        if self.args.channels_last:
            pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
            inputs = {**inputs, "pixel_values": pixels}
        outputs = model(**inputs, vocabulary=self.train_vocabulary)
        matches = self.network.criterion.matches
        losses = self.metrics.add(outputs, matches, inputs["class_labels"], len(skipped))
        self.guard.record(self.state.global_step + 1, names, losses)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of the batches since the last entry, and the time spent and left."""
        if "loss" in logs:
            num_processes = self.accelerator.num_processes
            steps_left = self.state.max_steps - self.state.global_step
            per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * num_processes

            def total(tensor: Tensor) -> Any:
                return self.accelerator.reduce(tensor, reduction="sum")

            logs |= self.metrics.flush(total, num_processes)
            logs["eta_minutes"] = steps_left * per_step / logs["images_per_second"] / 60.0
            if self.args.max_minutes:
                minutes_left = max(self.args.max_minutes - self.budget.minutes, 0.0)
                logs["eta_minutes"] = min(logs["eta_minutes"], minutes_left)
        if "loss" in logs or "eval_miou" in logs:
            logs["minutes"] = self.budget.minutes
        super().log(logs, start_time)

    # --------------------------------------------------------------------------------------- checkpoints

    @property
    def _run_state_name(self) -> str:
        return f"run_state_{self.args.process_index}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, or none: if it cannot be written the run continues, and earlier checkpoints stay."""
        self._check()
        folder = checkpoints.checkpoint_folder(self.output, self.state.global_step)
        written = checkpoints.temporary_folder(folder)

        def commit() -> None:
            if self.is_world_process_zero():
                checkpoints.commit(folder)
                best = self.state.best_model_checkpoint
                checkpoints.keep_latest(self.output, self.args.save_total_limit, best)

        with self.metrics.exclude_time():
            if self.is_world_process_zero():
                shutil.rmtree(written, ignore_errors=True)
                with contextlib.suppress(OSError):  # writing into it reports this
                    written.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            for part in (partial(self._write_checkpoint, written), commit):
                failures = [reason for reason in gather_object([checkpoints.failure_of(part)]) if reason]
                if failures:
                    if self.is_world_process_zero():
                        shutil.rmtree(written, ignore_errors=True)
                        logger.error(f"{folder.name} could not be written, the run continues: {failures[0]}")
                    return
        self.last_checkpoint = folder

    def _write_checkpoint(self, folder: Path) -> None:
        """Write this process's files of a checkpoint."""
        self.store_flos()
        if self.is_fsdp_enabled:
            self.save_model(str(folder))
        elif self.is_world_process_zero():
            checkpoints.save_weights(self.network, self.average, folder, self.last_checkpoint)
            self.processor.save_pretrained(folder)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            (folder / fsdp.SHARDED_WEIGHTS).unlink(missing_ok=True)
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            state = {"metrics": self.metrics.state(), "minutes": self.budget.minutes}
            torch.save(state, folder / self._run_state_name)
        if self.is_world_process_zero():
            if self.state.best_global_step:
                best = checkpoints.checkpoint_folder(self.output, self.state.best_global_step)
                is_there = best.exists() or self.state.best_global_step == self.state.global_step
                self.state.best_model_checkpoint = str(best) if is_there else None
            states: Any = self.state.stateful_callbacks
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    states[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            fsdp.load_full_weights(self.network, Path(resume_from_checkpoint))
        else:
            checkpoints.load_weights(self.network, Path(resume_from_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the complete model, each file of it written or left unchanged, with `half_weights` in float16."""
        weights = fsdp.full_weights(self.network)
        if not self.is_world_process_zero():
            return
        if self.args.half_weights:
            weights = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
        with fsdp.class_before_sharding(self.network):
            checkpoints.write_model(self.network, self.processor, weights, Path(output_dir or self.output))

    # ---------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute mIoU from one confusion matrix over the evaluation images; no logits are kept or gathered.

        The averaged weights are scored if there is an average. The run's random state is left unchanged.

        Returns:
            `eval_miou`, `eval_miou_seen`, `eval_miou_unseen`, `eval_fwiou`, `eval_macc`, `eval_pacc` in 0..1 (those
            that have a value), and the time it took.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        started = time.time()
        indices = range(self.args.process_index, len(dataset), self.args.world_size)
        loader: DataLoader = DataLoader(
            Subset(dataset, indices),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),
        )
        confusion = ConfusionMatrix(len(self.classes.classes), self.classes.ignore_index).to(self.args.device)
        with self.metrics.exclude_time():
            with contextlib.nullcontext() if self.average is None else self.average.in_place():
                samples = self._score(loader, confusion, indices)
            samples = dict(gather_object(list(samples.items())))
        scores = confusion.compute(seen=self.classes.seen)  # summed over all processes
        metrics = {
            f"{metric_key_prefix}_{name}": scores[name] for name in SCORES if not math.isnan(scores[name])
        }
        if not scores["num_classes_counted"]:
            logger.warning("no evaluation image has a labeled pixel: there is nothing to score")
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=len(dataset)))
        self.log(metrics)
        with self.metrics.exclude_time():
            self.save_results([samples[index] for index in sorted(samples)])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score(
        self, loader: DataLoader, confusion: ConfusionMatrix, indices: Sequence[int]
    ) -> dict[int, Any]:
        """Count the evaluation images of this process; return those among the first of all, drawn, by their index."""
        model, samples = self.network, {}
        was_training = model.training
        model.eval()
        remaining = iter(indices)
        for batch in loader:
            with self.accelerator.autocast():
                inputs = send_to_device(batch["inputs"], self.args.device)
                outputs = model(**inputs, vocabulary=self.eval_vocabulary)
            sizes = [label.shape for label in batch["labels"]]
            maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            for place, (predicted, label) in enumerate(zip(maps, batch["labels"], strict=True)):
                confusion.update(predicted, label)
                index = next(remaining)
                if index < self.args.sample_images:
                    samples[index] = take_sample(batch, place, predicted, self.processor, self.classes)
        model.train(was_training)
        return samples

    def save_results(self, samples: Sequence[Any]) -> None:
        """Write the log, `results.png` and sample predictions; a disk that cannot be written costs only these."""
        if self.is_world_process_zero():
            boards = [one for one in self.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
            try:
                write_results(self.output, self.state, samples, [one.tb_writer for one in boards])
            except (OSError, ITAError) as error:
                logger.error(f"the results could not be written, the run continues: {one_line(error)}")
