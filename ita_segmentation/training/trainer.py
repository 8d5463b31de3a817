"""transformers' Trainer, told what is particular here: frozen CLIP, loss parts, mIoU while training, safe checkpoints.

Optimisation is Mask2Former's (arXiv 2112.01527, section 4.1): AdamW, weight decay on everything but norms and
embeddings, the whole model's gradient clipped, learning rate in steps.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from ita_segmentation.data.training import INFINITE_LENGTH, EvaluationCollator, TrainingClasses
from ita_segmentation.evaluation.metrics.confusion_matrix import ConfusionMatrix
from ita_segmentation.training import checkpoints
from ita_segmentation.training.arguments import ITATrainingArguments
from ita_segmentation.training.clip_tuning import NORMS, merge_adapters
from ita_segmentation.training.ema import WeightAverage
from ita_segmentation.training.metrics import RunNumbers
from ita_segmentation.training.non_finite import STEPS_BETWEEN_CHECKS, BatchWatch, write_nan_batch
from ita_segmentation.training.progress_bar import ProgressLine
from ita_segmentation.training.pseudo_labels import KeptVocabulary
from ita_segmentation.training.schedules import MinuteBudget, build_scheduler
from ita_segmentation.training.stopping import PREEMPTED, Preemption, RunStopped
from ita_segmentation.training.weights import AVERAGED, FrozenFile, load_weights, save_weights, trainable
from modeling_ita.vocabulary import normalize_vocabulary

logger = logging.get_logger(__name__)

CLIP = "clip_backbone."
EMBEDDINGS = ("embedding", "queries", "positions")  # how the names of plain parameters of that kind end
TORCH_CANNOT_WRITE = (
    "inline_container",
    "PytorchStreamWriter",
    "iostream error",
)  # in what torch.save raises
SCORES = ("miou", "miou_seen", "miou_unseen", "fwiou", "macc", "pacc")


class RunCallback(TrainerCallback):
    """Calls the trainer back where the loop has no method of its own to override."""

    def __init__(self, trainer: "ITATrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.budget.read_clock()  # just before the schedule asks

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step(control)


class ITATrainer(Trainer):
    """Trains the trainable part of an `ITAForOpenVocabSegmentation` and scores it by mIoU.

    During an evaluation, callbacks' `on_prediction_step` gets `batch` (`inputs`, `labels`) and `predictions`, a list
    of (H, W) label maps; `on_evaluate` follows when all are through.

    Args:
        classes: the data set's classes. Training uses the seen ones as vocabulary, evaluation all of them.
        eval_resize: in evaluation, resize images as the processor says.
        keep_vocabulary: least score of the model's own segments that are learned beside the labels, so that it keeps
            the other classes of its vocabulary; 0: none are.
        **kwargs: as of `Trainer`; `args` are `ITATrainingArguments`, `processing_class` is the `ITAImageProcessor`.
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
        learning = trainable(model)
        # Each process reads the frozen weights from the same file: they need not be sent to each other.
        model._ddp_params_and_buffers_to_ignore = [
            name
            for name, _ in (*model.named_parameters(), *model.named_buffers())
            if name.startswith(CLIP) and name not in learning
        ]
        super().__init__(**kwargs)
        self.classes = classes
        self.train_vocabulary = normalize_vocabulary(classes.seen_classes)
        self.eval_vocabulary = normalize_vocabulary(classes.classes)
        self.processor: Any = self.processing_class
        self.eval_collator = EvaluationCollator(self.processor, eval_resize)
        self.output = Path(self.args.output_dir or ".")
        self.budget = MinuteBudget(self.args.max_minutes)
        self.numbers = RunNumbers()
        self.average: WeightAverage | None = None
        self.preemption = Preemption()
        self.preempted = False
        self.saved_step: int | None = None
        self.stop_reason: str | None = None
        self._frozen: FrozenFile | None = None
        self._resumed_from: Path | None = None
        every = 1 if self.args.device.type == "cpu" else STEPS_BETWEEN_CHECKS
        self.watch = BatchWatch(self.args.device, self.args.gradient_accumulation_steps, every)
        if self.args.ema_decay and self.is_fsdp_enabled:
            raise ValueError("ema_decay does not work with FSDP, which shards the weights: use DDP")
        self.kept: KeptVocabulary | None = None
        if keep_vocabulary:
            self._keep(model, keep_vocabulary)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(ProgressLine())
        self.add_callback(RunCallback(self))

    def _keep(self, model: Any, threshold: float) -> None:
        """From now on the classes of the model that the data set lacks are learned as it knows them now."""
        if self.is_fsdp_enabled:
            raise ValueError("keep_vocabulary does not work with FSDP, which shards the weights: use DDP")
        first_label = len(self.train_vocabulary)
        self.kept = KeptVocabulary(model, self.processor, self.classes.classes, first_label, threshold)
        self.train_vocabulary = normalize_vocabulary([*self.train_vocabulary, *self.kept.classes])

    @property
    def network(self) -> Any:
        """The `ITAForOpenVocabSegmentation` within whatever wraps it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # --------------------------------------------------------------------------------------------- a run

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of `Trainer`.

        Raises:
            RunStopped: a loss or a gradient was no number; or SIGTERM came, and a checkpoint was saved.
            ValueError: the checkpoint is of another run.
        """
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.is_world_process_zero() and self.output.is_dir():
            checkpoints.clear_leftovers(self.output)
        self.accelerator.wait_for_everyone()
        with self.preemption:
            try:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except RunStopped as error:
                self.stop_reason = str(error)
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise
        if self.preempted:
            step = self.state.global_step
            state = "saved" if self.saved_step == step else "could not be saved"
            raise RunStopped(f"SIGTERM after step {step}; checkpoint-{step} is {state}", PREEMPTED)
        return result

    def begin(self) -> None:
        """The state that a run has beside the Trainer's: new, or the resumed checkpoint's."""
        if self.args.ema_decay:
            self.average = WeightAverage(trainable(self.network), self.args.ema_decay)
        minutes = 0.0
        file = self._resumed_from and self._resumed_from / self._run_state_name
        if file and file.is_file():
            state = torch.load(file, weights_only=True)
            self.numbers.load_state(state["numbers"], self.args.device)
            self._tr_loss = state["loss"].to(self.args.device)
            self._globalstep_last_logged, minutes = state["last_logged"], state["minutes"]
        if self.average is not None and self._resumed_from is not None:
            try:
                self.average.load(self._resumed_from / AVERAGED)
            except (OSError, KeyError, SafetensorError) as error:
                raise ValueError(
                    f"{self._resumed_from} has no average of these weights (ema_decay)"
                ) from error
        elif self._resumed_from is not None and (self._resumed_from / AVERAGED).is_file():
            raise ValueError(
                f"{self._resumed_from} has averaged weights: go on with the ema_decay of its run"
            )
        self.budget.start(minutes)

    def end_step(self, control: Any) -> None:
        """After the optimiser's step: the average, the budget, and what may end the run."""
        if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
            self.average.update()
        if self.budget.is_spent:
            control.should_training_stop = True
        due = control.should_save or control.should_log or control.should_training_stop
        if due or control.should_evaluate or self.state.global_step % self.watch.every == 0:
            self.preempted = self._check()
        if self.preempted:
            self.stop_reason = f"stopped by SIGTERM after step {self.state.global_step}"
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # whoever sends SIGTERM does not wait long

    def _check(self) -> bool:
        """Whether any process was asked to stop. Raises RunStopped if a step was no number."""
        bad_step, asked = self.watch.verdict(self.preemption.requested)
        if bad_step is None:
            return asked
        processes = gather_object([self.watch.batches_of(bad_step, self.numbers.loss_names)])
        rate = self._get_learning_rate()
        if self.is_world_process_zero():
            write_nan_batch(self.output, bad_step, rate, processes)
        names = [name for process in processes for batch in process for name in batch["image_names"]]
        raise RunStopped(
            f"the loss or its gradient is no number at step {bad_step}, of {', '.join(names[:8])}"
            f"{' and others' if len(names) > 8 else ''}; see {self.output / 'nan_batch.json'}"
        )

    def finish(self) -> None:
        """After the run: the model has the averaged weights, and no adapters."""
        if self.average is not None:
            self.average.swap()
            self.average = None
        merge_adapters(self.network)

    # -------------------------------------------------------------------------------------- optimisation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of all parameters but those of norms, embeddings and scales."""
        exempt = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, (*NORMS, nn.Embedding))
            for parameter in module.parameters(recurse=False)
        }
        return [
            name
            for name, parameter in model.named_parameters()
            if id(parameter) not in exempt
            and parameter.ndim > (1 if name.startswith(CLIP) else 0)  # CLIP's own: biases and layer scales
            and not name.endswith(EMBEDDINGS)
        ]

    def create_optimizer(self, model: Any = None) -> Any:
        """Weights of CLIP, where they learn, are in groups with a learning rate of their own."""
        if self.optimizer is None:
            optimizer: Any = super().create_optimizer(model)
            network: Any = self.model if model is None else model
            of_clip = {id(p) for name, p in network.named_parameters() if CLIP in name and p.requires_grad}
            for group in list(optimizer.param_groups) if of_clip else []:
                clip = [p for p in group["params"] if id(p) in of_clip]
                group["params"] = [p for p in group["params"] if id(p) not in of_clip]
                lr = self.args.learning_rate * self.args.clip_learning_rate_factor
                optimizer.add_param_group({**group, "params": clip, "lr": lr})
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Warm-up, then the schedule over the share of the steps or of the minutes, whichever is further."""
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = build_scheduler(
                chosen,
                self.args.lr_scheduler_type,
                num_training_steps,
                self.args.get_warmup_steps(num_training_steps),
                self.args.lr_milestones,
                self.budget,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None):
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if hasattr(dataset, "__len__") and len(dataset) == INFINITE_LENGTH:
            return SequentialSampler(dataset)  # every image is new: there is nothing to shuffle
        if hasattr(dataset, "epoch_sampler"):
            return dataset.epoch_sampler()  # its indices carry the epoch, which decides the augmentation
        return super()._get_train_sampler(dataset)

    def _run_epoch(self, *arguments, **keywords):
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **keywords)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step of the optimiser; the criterion learns how many masks they have together."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.kept is not None:
            with self.accelerator.autocast():
                batches = [self.kept.complete(batch) for batch in batches]
        counts = [[len(labels) for labels in batch["class_labels"]] for batch in batches]
        self.network.criterion.begin_step(counts)
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names, skipped = inputs.pop("image_names", []), inputs.pop("skipped_images", [])
        if self.args.channels_last:
            pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
            inputs = {**inputs, "pixel_values": pixels}
        outputs = model(**inputs, vocabulary=self.train_vocabulary)
        matches = self.network.criterion.matches
        losses = self.numbers.add(outputs, matches, inputs["class_labels"], len(skipped))
        self.watch.record(self.state.global_step + 1, names, losses)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if self.accelerator.scaler is None:  # with one, a gradient that overflows is skipped and scaled down
            self.watch.record_gradient(self.state.global_step + 1, norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the numbers of the batches since the last entry, and the time that went and is left."""
        if "loss" in logs:
            steps_left = self.state.max_steps - self.state.global_step
            num_processes = self.accelerator.num_processes
            per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * num_processes

            def total(tensor: torch.Tensor) -> torch.Tensor:
                return self.accelerator.reduce(tensor, reduction="sum")  # type: ignore[return-value]

            logs.update(self.numbers.take(total, num_processes))
            self.numbers.restart()
            logs["eta_minutes"] = steps_left * per_step / logs["images_per_second"] / 60.0
            if self.args.max_minutes:
                minutes_left = max(self.args.max_minutes - self.budget.minutes, 0.0)
                logs["eta_minutes"] = min(logs["eta_minutes"], minutes_left)
        if "loss" in logs or "eval_miou" in logs:
            logs["minutes"] = self.budget.minutes
        super().log(logs, start_time)

    # --------------------------------------------------------------------------------------- checkpoints

    @property
    def frozen(self) -> FrozenFile:
        """The file of the frozen weights; their fingerprint is computed once."""
        if self._frozen is None:
            self._frozen = FrozenFile(self.network, self.output)
        return self._frozen

    @property
    def _run_state_name(self) -> str:
        return f"run_state_{self.args.process_index}.pt"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint, or none: if it cannot be written the run goes on, and the checkpoints before it stay."""
        self._check()
        folder = checkpoints.checkpoint_folder(self.output, self.state.global_step)
        written = checkpoints.unfinished(folder)
        digests: dict[str, str] = {}

        def write() -> None:
            digests.update(self._write_checkpoint(written))

        def publish() -> None:
            if self.is_world_process_zero():
                checkpoints.publish(folder, digests)
                best = self.state.best_model_checkpoint
                checkpoints.keep_latest(self.output, self.args.save_total_limit, best)

        with self.numbers.not_counted():
            if self.is_world_process_zero():
                shutil.rmtree(written, ignore_errors=True)
                with contextlib.suppress(OSError):  # writing into it tells
                    written.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            for part in (write, publish):
                failures = [reason for reason in gather_object([failure_of(part)]) if reason]
                if failures:
                    if self.is_world_process_zero():
                        shutil.rmtree(written, ignore_errors=True)
                        logger.error(f"{folder.name} could not be written, the run goes on: {failures[0]}")
                    return
        self.saved_step = self.state.global_step

    def _write_checkpoint(self, folder: Path) -> dict[str, str]:
        """This process' files of a checkpoint. Returns the SHA-256 of files that need not be read for it."""
        self.store_flos()
        digests: dict[str, str] = {}
        if self.is_fsdp_enabled:
            self.save_model(str(folder), _internal_call=True)
        elif self.is_world_process_zero():
            digests = save_weights(self.network, self.average, self.frozen, folder)
            self.processor.save_pretrained(folder)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
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
        return digests

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {
            "numbers": self.numbers.state(),
            "loss": self._tr_loss.cpu(),
            "last_logged": self._globalstep_last_logged,
            "minutes": self.budget.minutes,
        }
        torch.save(state, Path(output_dir) / self._run_state_name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.network, self.frozen, Path(resume_from_checkpoint))

    # ---------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """MIoU from one confusion matrix over the evaluation images; logits are never kept or gathered.

        The averaged weights are scored if there is an average. No random number of the run is used up.

        Returns:
            `eval_miou`, `eval_miou_seen`, `eval_miou_unseen`, `eval_fwiou`, `eval_macc`, `eval_pacc` in 0..1
            (those that have a value), and the time it took.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        started = time.time()
        shard = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        loader: DataLoader = DataLoader(
            shard,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),
        )
        confusion = ConfusionMatrix(len(self.classes.classes), self.classes.ignore_index).to(self.args.device)
        self.callback_handler.eval_dataloader = loader
        weights = contextlib.nullcontext() if self.average is None else self.average.in_place()
        with self.numbers.not_counted(), weights:
            self._score(loader, confusion)
        scores = confusion.compute(seen=self.classes.seen)  # summed over all processes
        metrics = {
            f"{metric_key_prefix}_{name}": scores[name] for name in SCORES if not math.isnan(scores[name])
        }
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=len(dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score(self, loader: DataLoader, confusion: ConfusionMatrix) -> None:
        """Counts the evaluation images of this process."""
        model = self.network
        was_training = model.training
        model.eval()
        for batch in loader:
            with self.accelerator.autocast():
                outputs = model(**self._prepare_inputs(batch["inputs"]), vocabulary=self.eval_vocabulary)
            sizes = [label.shape for label in batch["labels"]]
            maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            for predicted, label in zip(maps, batch["labels"], strict=True):
                confusion.update(predicted, label)
            self.control = self.callback_handler.call_event(
                "on_prediction_step", self.args, self.state, self.control, batch=batch, predictions=maps
            )
        model.train(was_training)


def failure_of(action: Any) -> str | None:
    """Why a disk could not be written, in one line; None if it was."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return " ".join(str(error).split())
    except RuntimeError as error:  # what torch makes of a disk that is full
        if not any(sign in str(error) for sign in TORCH_CANNOT_WRITE):
            raise
        return "torch could not write a file (is the disk full?)"
    return None
