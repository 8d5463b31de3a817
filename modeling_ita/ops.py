"""Small functions that several parts share: tensors of the network, sizes, label maps, offloading."""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import pad
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def const_matrix(rows: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a small matrix on the device; in an exported graph its entries may depend on the image's size."""
    return torch.stack(
        [torch.stack([torch.full((), one, dtype=dtype, device=device) for one in row]) for row in rows]
    )


def integer_matrix(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Make a small int64 matrix on the device, of as many columns as the first row has; also in a graph."""
    if torch.compiler.is_compiling() and rows[0]:
        return const_matrix(rows, torch.int64, device)
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), len(rows[0]))


def sine_position_embedding(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Encode the positions of a (height, width) grid by sines (DETR, arXiv 2005.12872).

    1-based rows and columns over the size, times 2 pi; temperature 10000; the first half of the channels encodes y,
    the second x, sine and cosine interleaved.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        channels: C, a multiple of 4.
        like: a tensor that gives device and dtype.

    Returns:
        (C, height, width).
    """
    half = channels // 2
    index = torch.arange(half, device=like.device, dtype=torch.float32)
    frequency = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def encode(size: int) -> Tensor:
        steps = torch.arange(1, size + 1, device=like.device, dtype=torch.float32)
        angles = (steps / (size + 1e-6) * 2 * math.pi)[:, None] / frequency
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1)

    y = encode(height).T[:, :, None].expand(-1, -1, width)
    x = encode(width).T[:, None, :].expand(-1, height, -1)
    return torch.cat([y, x]).to(like.dtype)


def mask_mean(features: Tensor, masks: Tensor) -> Tensor:
    """Average features inside masks; zero for an empty mask.

    In float32 whatever surrounds it: half precision can hold neither the sum over a large mask nor its area.

    Args:
        features: (B, C, h, w).
        masks: (B, Q, h, w) bool.

    Returns:
        (B, Q, C) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        weights = masks.flatten(2).float()
        # An epsilon would do as well, but ONNX's optimizer drops its addition.
        areas = weights.sum(dim=-1, keepdim=True).clamp(min=1)
        return weights @ features.float().flatten(2).transpose(1, 2) / areas


def valid_cells(valid: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Find the cells of a coarser grid that hold at least one valid pixel.

    Args:
        valid: (B, H, W) bool.
        size: (h, w), divisors of (H, W).

    Returns:
        (B, h, w) bool.
    """
    height, width = valid.shape[-2:]
    return F.max_pool2d(valid[:, None].float(), (height // size[0], width // size[1]))[:, 0] > 0


# --- sizes of images, and label maps ---

MASK_STRIDE = 4
"""A mask logit covers 4 x 4 pixels of the network input."""
IMAGE_STRIDE = 32
"""An image is segmented as if padded to multiples of this; a batch may pad it further."""
MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own limit for what it calls a decompression bomb."""


def output_size(image_size: Sequence[int], size: SizeDict) -> tuple[int, int]:
    """Return the size (height, width) that `size` demands for an image of `image_size`, at least one pixel each way.

    Raises:
        ValueError: if `size` has no known pair of keys, or the result has more than `MAX_IMAGE_PIXELS` pixels.
    """
    height, width = image_size
    if size.shortest_edge and size.longest_edge:
        result = get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    elif size.shortest_edge:
        scale = size.shortest_edge / min(height, width)
        result = (round(height * scale), round(width * scale))
    elif size.longest_edge:
        scale = size.longest_edge / max(height, width)
        result = (round(height * scale), round(width * scale))
    elif size.max_height and size.max_width:
        result = get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    elif size.height and size.width:
        result = (size.height, size.width)
    else:
        pairs = "'height' and 'width', 'max_height' and 'max_width', 'shortest_edge' or 'longest_edge'"
        raise ValueError(f"`size` has {pairs}, got {dict(size)}")
    if result[0] * result[1] > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"an image of {height} x {width} would be resized to {result[0]} x {result[1]} pixels"
        )
    return max(1, result[0]), max(1, result[1])


def common_size(sizes: Sequence[Sequence[int]], pad_size: SizeDict | None, divisor: int) -> tuple[int, int]:
    """Return the size (height, width), a multiple of `divisor`, that all images of a batch are padded to.

    Raises:
        ValueError: if `pad_size` is smaller than an image, or the result has more than `MAX_IMAGE_PIXELS` pixels.
    """
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    if pad_size is not None:
        padded = pad_size.height or 0, pad_size.width or 0
        if padded[0] < height or padded[1] < width:
            raise ValueError(f"`pad_size` {dict(pad_size)} is smaller than an image of ({height}, {width})")
        height, width = padded
    height, width = (math.ceil(side / divisor) * divisor for side in (height, width))
    if height * width > MAX_IMAGE_PIXELS:
        raise ValueError(f"images would be padded to {height} x {width} pixels")
    return height, width


def pad_to(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad (..., h, w) to (..., *size) with zeros at the bottom and on the right."""
    return pad(values, (0, size[1] - values.shape[-1], 0, size[0] - values.shape[-2]))


def resize_label_map(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels (h, w) to (*size); each pixel gets the label nearest to its center, exact for any integer."""
    rows, columns = (
        ((torch.arange(new, device=labels.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for old, new in zip(labels.shape, size, strict=True)
    )
    return labels[rows][:, columns]


def label_masks(
    labels: Tensor,
    instance_id_to_semantic_id: Mapping[int, int] | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Split a label map into binary masks.

    Args:
        labels: (H, W) int64.
        instance_id_to_semantic_id: class of each label, before any reduction; by default labels are classes.
        ignore_index: label without a mask.
        do_reduce_labels: label 0 is background, and all classes are decremented by 1.

    Returns:
        Masks (n, H, W) float32 of 0 and 1 and their classes (n,) int64, in the order of the labels.

    Raises:
        ValueError: if a label has no class, or labels are to be reduced and there is no `ignore_index`.
    """
    if do_reduce_labels and ignore_index is None:
        raise ValueError("`do_reduce_labels` needs an `ignore_index`")
    found = [one for one in labels.unique().tolist() if one != ignore_index and (one or not do_reduce_labels)]
    class_of = instance_id_to_semantic_id
    if class_of is None:
        class_of = {label: label for label in found}
    missing = [label for label in found if label not in class_of]
    if missing:
        raise ValueError(f"`instance_id_to_semantic_id` lacks the labels {missing}")
    kept = [label for label in found if class_of[label] or not do_reduce_labels]
    wanted = torch.tensor(kept, dtype=torch.int64, device=labels.device)
    classes = [class_of[label] - int(do_reduce_labels) for label in kept]
    masks = (labels[None] == wanted[:, None, None]).float()
    return masks, torch.tensor(classes, dtype=torch.int64, device=labels.device)


# --- weights that accelerate keeps on another device or on the disk until they are needed (`device_map`) ---


def with_weights(method: Callable) -> Callable:
    """Decorate a method of a module that needs the module's weights outside of `forward`.

    Where weights are offloaded to another device or the disk, accelerate brings them in around `forward` only.
    """

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is None:
            return method(self, *args, **kwargs)
        args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return hook.post_forward(self, method(self, *args, **kwargs))

    return run


def load_blocks_at_once(model: nn.Module) -> None:
    """Bring in the offloaded weights of each child of a dispatched model together, not module by module.

    open_clip and `nn.MultiheadAttention` read weights of modules that they do not call, where accelerate's hooks are.
    """
    for name, block in model.named_children():
        hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]
        offloading = next((hook for hook in hooks if getattr(hook, "offload", False)), None)
        if offloading is None:
            continue
        accelerate: Any = importlib.import_module("accelerate.hooks")
        accelerate.remove_hook_from_submodules(block)
        hook = accelerate.AlignDevicesHook(
            execution_device=offloading.execution_device,
            offload=True,
            weights_map=accelerate.PrefixedDataset(offloading.weights_map.dataset, f"{name}."),
            offload_buffers=offloading.offload_buffers,
            place_submodules=True,
            skip_keys=offloading.skip_keys,
            tied_params_map=offloading.tied_params_map,
        )
        accelerate.add_hook_to_module(block, hook)
