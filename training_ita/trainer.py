"""transformers' Trainer, told what is particular here: loss parts, budgets in minutes, mIoU while training.

Optimisation is Mask2Former's (arXiv 2112.01527, section 4.1): AdamW, weight decay on everything but norms and
embeddings, the whole model's gradient clipped, learning rate in steps.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from data_ita.training import ENDLESS, EvaluationCollator, TrainingClasses
from evaluation_ita.semantic import ConfusionMatrix
from modeling_ita.vocabulary import normalize_vocabulary

LOSS_PARTS = ("loss_ce", "loss_mask", "loss_dice")
STEP_MILESTONES = (0.89, 0.96)  # shares of the run after each of which the learning rate falls to a tenth
EMBEDDINGS = ("embedding", "queries", "positions")  # how the names of plain parameters of that kind end
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def learning_rate_factor(schedule: str, progress: float) -> float:
    """What multiplies the learning rate after a share `progress` (0..1) of the run, warm-up aside.

    Args:
        schedule: "step" (a tenth after 89% and again after 96%), "cosine", "linear" (both to 0) or "constant".
    """
    if schedule == "step":
        return 0.1 ** sum(progress >= milestone for milestone in STEP_MILESTONES)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    if schedule == "linear":
        return max(1.0 - progress, 0.0)
    if schedule == "constant":
        return 1.0
    raise ValueError(f"no learning rate schedule is called {schedule!r}")


class MinuteBudget(TrainerCallback):
    """Wall-clock minutes of a run, over its resumed parts too; the run ends when its budget is spent.

    Args:
        max_minutes: the budget; None: no end.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.max_minutes = max_minutes
        self.minutes = 0.0
        self._minutes_before = 0.0
        self._started: float | None = None

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 without a budget."""
        return self.minutes / self.max_minutes if self.max_minutes else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._minutes_before = max((entry.get("minutes", 0.0) for entry in state.log_history), default=0.0)
        self._started = time.monotonic()
        self._read_clock()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._read_clock()  # just before the schedule asks

    def on_step_end(self, args, state, control, **kwargs):
        if self.max_minutes and self.minutes >= self.max_minutes:
            control.should_training_stop = True

    def _read_clock(self) -> None:
        """All processes go by the first one's clock, so that they stop together."""
        assert self._started is not None
        minutes = torch.tensor(self._minutes_before + (time.monotonic() - self._started) / 60.0)
        if self.max_minutes and torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.cuda.is_available():
                minutes = minutes.cuda()
            torch.distributed.broadcast(minutes, src=0)
        self.minutes = minutes.item()


class ITATrainer(Trainer):
    """Trains the trainable part of an `ITAForOpenVocabSegmentation` and scores it by mIoU.

    Args:
        classes: the data set's classes. Training uses the seen ones as vocabulary, evaluation all of them.
        eval_resize: in evaluation, resize pictures as the processor says.
        **kwargs: as of `Trainer`; `processing_class` is the `ITAImageProcessor`, and `args` may have `max_minutes`.
    """

    def __init__(self, *, classes: TrainingClasses, eval_resize: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = classes
        self.train_vocabulary = normalize_vocabulary(classes.seen_classes)
        self.eval_vocabulary = normalize_vocabulary(classes.classes)
        self.processor: Any = self.processing_class
        self.eval_collator = EvaluationCollator(self.processor, eval_resize)
        self.budget = MinuteBudget(getattr(self.args, "max_minutes", None))
        self.add_callback(self.budget)
        self._part_sums: Tensor | None = None
        self._num_summed = 0

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
            if id(parameter) not in exempt and parameter.ndim > 0 and not name.endswith(EMBEDDINGS)
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Warm-up, then the schedule over the share of the steps or of the minutes, whichever is further."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                progress = max(step / max(num_training_steps, 1), self.budget.progress)
                warm = min((step + 1) / (warmup + 1), 1.0)
                return warm * learning_rate_factor(self.args.lr_scheduler_type, progress)

            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None):
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if dataset is not None and len(dataset) == ENDLESS:
            return SequentialSampler(dataset)  # every picture is new: there is nothing to shuffle
        if hasattr(dataset, "epoch_sampler"):
            return dataset.epoch_sampler()  # its indices carry the epoch, which decides the augmentation
        return super()._get_train_sampler(dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("image_names", [])
        inputs.pop("skipped_images", [])
        outputs = model(**inputs, vocabulary=self.train_vocabulary)
        parts = torch.stack(
            [outputs.loss_dict[part].detach() for part in LOSS_PARTS]
            + [
                sum(loss.detach() for name, loss in outputs.loss_dict.items() if name.startswith(part))
                for part in LOSS_PARTS
            ]
        )
        self._part_sums = parts if self._part_sums is None else self._part_sums + parts
        self._num_summed += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss: the last prediction's, and `_sum` over all predictions; and the minutes."""
        if "loss" in logs and self._part_sums is not None:
            means = self.accelerator.reduce(self._part_sums / self._num_summed, reduction="mean").tolist()
            names = [*LOSS_PARTS, *(f"{part}_sum" for part in LOSS_PARTS)]
            logs.update(zip(names, means, strict=True))
            self._part_sums, self._num_summed = None, 0
        if "loss" in logs or "eval_miou" in logs:
            logs["minutes"] = self.budget.minutes
        super().log(logs, start_time)

    # ---------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """mIoU from one confusion matrix over the evaluation pictures; logits are never kept or gathered.

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
        )
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        confusion = ConfusionMatrix(len(self.classes.classes), self.classes.ignore_index)
        self.callback_handler.eval_dataloader = loader
        for batch in loader:
            with self.accelerator.autocast():
                outputs = model(**self._prepare_inputs(batch["inputs"]), vocabulary=self.eval_vocabulary)
            sizes = [label.shape for label in batch["labels"]]
            maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            for predicted, label in zip(maps, batch["labels"], strict=True):
                confusion.update(predicted, label)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        matrix = torch.from_numpy(confusion.matrix).to(self.args.device)
        confusion.matrix = self.accelerator.reduce(matrix, reduction="sum").cpu().numpy()
        model.train(was_training)

        scores = confusion.compute(seen=self.classes.seen)
        wanted = ("miou", "miou_seen", "miou_unseen", "fwiou", "macc", "pacc")
        metrics = {
            f"{metric_key_prefix}_{name}": scores[name] for name in wanted if not math.isnan(scores[name])
        }
        metrics.update(speed_metrics(metric_key_prefix, started, num_samples=len(dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
