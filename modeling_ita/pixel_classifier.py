"""The best class of each pixel without scoring every class at every pixel; the result is the exhaustive one.

Most classes win nowhere, which bounds show: those of blocks of pixels (`PixelClassifier.candidates`, for
`mask_tiles.fill_map`) or of groups of queries (`_PrunedArgmax`).

Symbols: Q queries, K classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .mask_tiles import split_pixels

GROUP_SIZE = 8  # queries, and classes, that share an upper bound on their scores
ROUNDING = 1e-4  # relative, more than the rounding error of a sum over a few hundred float32 numbers


class PixelClassifier:
    """The class with the highest score at each pixel, from class and mask probabilities of queries.

    Args:
        probabilities: (Q, K), without void; of one image, or of several crops of it, whose scores are added up.

    Attributes:
        queries: (Q') int64, the queries whose mask probabilities the methods take, in this order.
        is_possible: whether any class has a probability above 0.
    """

    def __init__(self, probabilities: Tensor):
        self.queries, self._probabilities = _group_queries(probabilities)
        self._possible = (
            self._probabilities.amax(0).nonzero().flatten() if len(self.queries) else self.queries
        )
        self.is_possible = len(self._possible) > 0
        if self.is_possible:
            self._argmax = _PrunedArgmax(self._probabilities[:, self._possible])

    def best(self, mask_probabilities: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the best class (pixels,) int64 of (pixels, Q') mask probabilities, among `candidates` (K,) bool."""
        if candidates is None:
            return self._possible[self._argmax(mask_probabilities)]
        classes = candidates.nonzero().flatten()
        return classes[_best_class(mask_probabilities, self._probabilities[:, classes])]

    def candidates(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Find which classes can have the highest score, given bounds on the mask probabilities.

        The difference of two classes' scores is a sum over queries, and each summand is largest at one of its bounds.

        Args:
            lower: (blocks, Q').
            upper: (blocks, Q').

        Returns:
            The class with the best lower bound (blocks,) int64; and (blocks, K) bool, the candidates, itself included.
        """
        scores, spread = lower @ self._probabilities, upper - lower
        best = scores.argmax(1)
        candidates = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        for leader in best.unique().tolist():
            where = (best == leader).nonzero().flatten()
            gain = (self._probabilities - self._probabilities[:, leader, None]).clamp_(min=0)
            own = scores[where, leader, None]
            candidates[where] = scores[where] + spread[where] @ gain >= own * (1 - ROUNDING)
        return best, candidates

    def misses(self, mask_probabilities: Tensor, classes: Tensor) -> Tensor:
        """Return the probability (pixels,) that no query shows the given class (pixels,); overwrites its input."""
        return (1 - mask_probabilities.mul_(self._probabilities.T[classes])).prod(1)


def _group_queries(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Order queries for `_PrunedArgmax`: those with the same best class next to each other, in groups of `GROUP_SIZE`.

    Args:
        probabilities: (Q, K), without void.

    Returns:
        Indices of queries (Q') and their probabilities (Q', K). Queries without any probability (padding of a batch)
        are left out. With G groups, the first members of all groups come first, then the second members, and so on:
        Q' = `GROUP_SIZE` G. The last group is filled up with repeated queries of probability zero.
    """
    best = probabilities.max(-1)
    chosen = (best.values > 0).nonzero().flatten()
    chosen = chosen[best.indices[chosen].argsort(stable=True)]
    missing = -len(chosen) % GROUP_SIZE
    grouped = pad(probabilities[chosen], (0, 0, 0, missing))
    grouped = grouped.unflatten(0, (-1, GROUP_SIZE)).transpose(0, 1).flatten(0, 1)
    members = torch.cat([chosen, chosen[-1:].expand(missing)]).view(-1, GROUP_SIZE)
    return members.T.flatten(), grouped


class _PrunedArgmax:
    """The class of the highest score at each pixel, tile by tile, without scoring every class.

    Most classes win nowhere, which upper bounds show: from a group of queries, a class gets at most its highest
    probability among them times their summed mask probabilities. A class is no candidate in a tile if the sum of
    these bounds over all groups stays below the score of some reference class at every pixel. Groups of classes are
    tested first, single ones where many groups remain; the reference classes are those that won in the tile before.
    The result equals the exhaustive one.

    Args:
        probabilities: (Q, K), grouped by `_group_queries`.
    """

    def __init__(self, probabilities: Tensor):
        num_classes = probabilities.shape[1]
        self.probabilities = probabilities
        # On an accelerator, waiting for a tile's result costs more than scoring all classes.
        self.prunes = probabilities.device.type == "cpu" and num_classes >= 4 * GROUP_SIZE
        if not self.prunes:
            return
        self.references = torch.arange(num_classes)
        # (groups of queries, K)
        self.bounds = probabilities.unflatten(0, (GROUP_SIZE, -1)).amax(0) * (1 + ROUNDING)
        frequent_first = probabilities.sum(0).argsort(descending=True)
        padded = pad(frequent_first, (0, -num_classes % GROUP_SIZE), value=num_classes)
        self.class_groups = padded.view(-1, GROUP_SIZE)
        self.group_bounds = pad(self.bounds, (0, 1))[:, self.class_groups].amax(2)

    def __call__(self, mask_probabilities: Tensor) -> Tensor:
        """Return the best class (pixels,) int64 of (pixels, Q) mask probabilities."""
        if not self.prunes:
            return _best_class(mask_probabilities, self.probabilities)
        classes = self._candidates(mask_probabilities)
        best = classes[_best_class(mask_probabilities, self.probabilities[:, classes])]
        self.references = best.bincount().nonzero().flatten()
        return best

    def _candidates(self, mask_probabilities: Tensor) -> Tensor:
        """Return in order the classes that can win a pixel of the tile, and a few more."""
        num_classes = self.probabilities.shape[1]
        if 2 * len(self.references) > num_classes:
            return torch.arange(num_classes)
        to_beat = (mask_probabilities @ self.probabilities[:, self.references]).amax(1, keepdim=True)
        summed = mask_probabilities.unflatten(1, (GROUP_SIZE, -1)).sum(1)
        groups = self.class_groups[_reaches(summed, self.group_bounds, to_beat)]
        classes = torch.cat([groups.flatten(), self.references]).unique()
        classes = classes[classes < num_classes]
        if 4 * len(classes) > num_classes:
            single = classes[_reaches(summed, self.bounds[:, classes], to_beat)]
            classes = torch.cat([single, self.references]).unique()
        return classes


def _best_class(mask_probabilities: Tensor, probabilities: Tensor) -> Tensor:
    parts = split_pixels(mask_probabilities, probabilities.shape[1])
    return torch.cat([(part @ probabilities).argmax(1) for part in parts])


def _reaches(summed: Tensor, bounds: Tensor, to_beat: Tensor) -> Tensor:
    """Tell for each of n classes, (n,) bool, whether its upper bound reaches the score to beat at any pixel.

    Args:
        summed: (pixels, groups), mask probabilities summed over each group of queries.
        bounds: (groups, n), highest class probability within each group.
        to_beat: (pixels, 1).
    """
    pixels = zip(split_pixels(summed, bounds.shape[1]), split_pixels(to_beat, bounds.shape[1]), strict=True)
    highest = [torch.addmm(beat, part, bounds, beta=-1).amax(0) for part, beat in pixels]
    return torch.stack(highest).amax(0) >= 0
