"""Metrics of a run between two log entries: summed on the device, copied to the host once per entry."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling_ita.set_criterion import Matches
from modeling_ita.text import normalize_vocabulary

LOSS_PARTS = ("loss_ce", "loss_mask", "loss_dice")
_GIB = 2.0**30


def count_text_queries(matches: Matches, num_text_queries: int) -> Tensor:
    """Count the matched queries, over all predictions, that are text queries (the first of each image): a scalar."""
    return (matches.queries % matches.num_queries < num_text_queries).sum()


def count_dominant_classes(
    dominant: Sequence[Sequence[str]],
    vocabulary: Sequence[Sequence[Sequence[str]]],
    class_labels: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Count the classes in the images, and those with a name among their image's dominant categories: two scalars."""
    shown, found = [], []
    for names, classes, labels in zip(dominant, vocabulary, class_labels, strict=True):
        is_dominant = torch.tensor(normalize_vocabulary(classes).shares_name_with(names))
        is_shown = torch.zeros(len(classes), dtype=torch.bool, device=labels.device)
        is_shown[labels] = True
        shown.append(is_shown.sum())
        found.append((is_shown & is_dominant.to(labels.device, non_blocking=True)).sum())
    return torch.stack(shown).sum(), torch.stack(found).sum()


def peak_memory() -> dict[str, float]:
    """Measure the peak memory of this process so far, and of its CUDA device, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"memory_gib": peak * (1 if sys.platform == "darwin" else 1024) / _GIB}
    if torch.cuda.is_available():
        memory["cuda_memory_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return memory


class MetricAccumulator:
    """Sums over this process's batches since the last log entry; `skipped` is of the whole run."""

    def __init__(self) -> None:
        self.loss_names: list[str] = []
        self.sums: Tensor | None = None
        self.batches = self.images = self.skipped = 0
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._started, self._excluded = time.monotonic(), 0.0

    @contextlib.contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Exclude the time in this context (evaluations, checkpoints) from the throughput."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._excluded += time.monotonic() - started

    @torch.no_grad()
    def add(self, outputs: Any, matches: Matches, class_labels: list[Tensor], skipped: int) -> Tensor:
        """Add a batch without waiting for the device; return its losses (n,) float32 in the order of `loss_names`."""
        self.loss_names = list(outputs.loss_dict)
        losses = torch.stack([outputs.loss_dict[name].detach().float() for name in self.loss_names])
        shown, found = count_dominant_classes(outputs.dominant_categories, outputs.vocabulary, class_labels)
        text = count_text_queries(matches, len(outputs.dominant_categories[0]))
        counts = torch.stack([text.new_tensor(matches.queries.numel()), text, shown, found]).float()
        both = torch.cat([losses, counts])
        self.sums = both if self.sums is None else self.sums + both
        self.batches += 1
        self.images += len(class_labels)
        self.skipped += skipped
        return losses

    def flush(self, total: Callable[[Tensor], Tensor], num_processes: int) -> dict[str, float]:
        """Compute a log entry's metrics, means over batches that `total` sums over processes, and start again."""
        if self.sums is None:
            return {}
        skipped = self.sums.new_tensor([self.batches, self.skipped])
        *sums, batches, num_skipped = total(torch.cat([self.sums, skipped])).tolist()
        losses = {name: value / batches for name, value in zip(self.loss_names, sums, strict=False)}
        parts = {
            f"{part}_sum": sum(value for name, value in losses.items() if name.startswith(part))
            for part in LOSS_PARTS
        }
        matched, text, shown, found = sums[len(losses) :]
        seconds = max(time.monotonic() - self._started - self._excluded, 1e-9)
        metrics = {
            "loss": sum(losses.values()),
            **losses,
            **parts,
            "matched_text_queries": text / max(matched, 1.0),
            "true_classes_dominant": found / max(shown, 1.0),
            "skipped_images": num_skipped,
            "images_per_second": self.images * num_processes / seconds,
            **peak_memory(),
        }
        self.sums, self.batches, self.images = None, 0, 0
        self._restart_clock()
        return metrics

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to log the same next entry, times aside."""
        sums = None if self.sums is None else self.sums.cpu()
        return {"sums": sums, "batches": self.batches, "skipped": self.skipped, "names": self.loss_names}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned."""
        self.sums = None if state["sums"] is None else state["sums"].to(device)
        self.batches, self.skipped, self.loss_names = state["batches"], state["skipped"], state["names"]
        self._restart_clock()
