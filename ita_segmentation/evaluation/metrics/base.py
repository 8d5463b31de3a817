"""What the metrics share: states that merge and travel as arrays, and checks of their input."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ArrayStateMetric(Metric):
    """A `torchmetrics.Metric` of K classes whose state is a set of arrays, summed or concatenated across processes.

    `compute` takes arguments, so its result is not cached. Raises ValueError if there is no class.
    """

    full_state_update = False

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        super().__init__(compute_with_cache=False, **kwargs)
        self.num_classes = num_classes
        self._row_types: dict[str, Tensor] = {}

    @abstractmethod
    def compute(self, seen: Sequence[bool] | None = None) -> dict[str, Any]:
        """Return all scores; with `seen` (K,) also the means over seen and unseen classes."""

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state of integers that is summed across processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def add_rows(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """Add a state of rows of this shape that is concatenated across processes."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._row_types[name] = torch.zeros((0, *shape), dtype=dtype)
        getattr(self, name).append(self._row_types[name])

    def reset(self) -> None:
        """Forget everything that was counted."""
        super().reset()
        for name, empty in self._row_types.items():  # a process without images still sends the right dtype
            setattr(self, name, [empty.to(self.device)])

    def append_rows(self, name: str, rows: np.ndarray) -> None:
        """Append to a state of rows."""
        getattr(self, name).append(torch.from_numpy(rows).to(self.device))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state as arrays, which `merge_arrays` takes."""
        states = {name: getattr(self, name) for name in self._defaults}
        return {n: (dim_zero_cat(s) if isinstance(s, list) else s).cpu().numpy() for n, s in states.items()}

    def merge_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add another metric's state, given as `arrays` returns it; ValueError if it does not fit."""
        own = self.arrays()
        fits = own.keys() == arrays.keys() and all(
            arrays[name].dtype == array.dtype
            and (arrays[name].shape[1:] if name in self._row_types else arrays[name].shape)
            == (array.shape[1:] if name in self._row_types else array.shape)
            for name, array in own.items()
        )
        if not fits:
            raise ValueError(
                f"this is not the state of a {type(self).__name__} of {self.num_classes} classes"
            )
        tensors = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in arrays.items()}
        self.merge_state({name: [t] if name in self._row_types else t for name, t in tensors.items()})

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add another metric's state, as in `torchmetrics`; a merged metric counts as updated."""
        if isinstance(incoming_state, ArrayStateMetric) and incoming_state.num_classes != self.num_classes:
            raise ValueError(
                f"metrics of {self.num_classes} and {incoming_state.num_classes} classes do not merge"
            )
        super().merge_state(incoming_state)
        self._update_count += 1


def as_integers(labels: Any, role: str) -> np.ndarray:
    """Return integers (array, tensor, image or lists) as an array in native byte order; ValueError for others."""
    array = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{role} must hold integer labels, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def check_labels(labels: np.ndarray | Tensor, num_classes: int, role: str, hint: str = "") -> None:
    """Raise ValueError for class indices outside [0, num_classes), naming the lowest or highest of them."""
    if not len(labels):
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"{role} holds label {lowest if lowest < 0 else highest}, outside the {num_classes} classes "
            f"0..{num_classes - 1}{hint}"
        )


def class_flags(flags: Sequence[bool], num_classes: int, role: str) -> np.ndarray:
    """Return one flag for each class as a (K,) bool array; ValueError if there are not so many."""
    array = np.asarray(flags, dtype=bool)
    if array.shape != (num_classes,):
        raise ValueError(f"{role} has {array.size} entries for {num_classes} classes")
    return array


def class_groups(seen: Sequence[bool] | None, num_classes: int) -> dict[str, np.ndarray]:
    """Return (K,) bool masks of the seen and the unseen classes; empty if that is not known."""
    if seen is None:
        return {}
    is_seen = class_flags(seen, num_classes, "seen")
    return {"seen": is_seen, "unseen": ~is_seen}
