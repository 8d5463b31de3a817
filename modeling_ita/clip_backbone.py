"""The frozen CLIP (open_clip): one image tower for features at four strides, one text tower for names.

ConvNeXt and any other timm trunk with four stages, and OpenAI's ModifiedResNets. Everything is frozen and stays in
eval mode; the dense feature is turned into CLIP embeddings by pooling it over masks first and applying CLIP's head
after (FC-CLIP, arXiv 2308.02487, section 3).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import initialization as init
from transformers.image_transforms import to_pil_image

from .configuration_ita import MAX_PARAMETERS
from .ops import mask_mean, valid_cells, with_weights
from .text_cache import Prefixes, encode_prefixes, encode_rest, has_usual_blocks

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STRIDES = (4, 8, 16, 32)
MIN_SHARED_WEIGHTS = 10_000_000
"""Weights of a text tower from which on prompts that begin alike share the work on a CPU."""


@dataclass
class ImageFeatures:
    """What the image tower gives for (B, 3, H, W).

    Attributes:
        levels: res2, res3, res4, res5: (B, C_l, H / s, W / s) at strides 4, 8, 16, 32.
        dense: (B, C_5, H / 32, W / 32), the feature that CLIP's own head understands.
    """

    levels: tuple[Tensor, Tensor, Tensor, Tensor]
    dense: Tensor


class _WithoutFilling(TorchFunctionMode):
    """Skip the initialization of tensors on the meta device: they have no content, and towers spend a second on it."""

    FILLING = frozenset(
        ("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "trunc_normal_", "uniform_", "zero_")
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.FILLING and args and args[0].device.type == "meta":
            return args[0]
        return func(*args, **(kwargs or {}))


def build_backbone(config: dict[str, Any]) -> "ClipBackbone":
    """Build the towers of an open_clip configuration.

    Raises:
        ValueError: the configuration cannot be built.
    """
    try:
        return ClipBackbone(config)
    except (TypeError, AttributeError, AssertionError, KeyError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the CLIP configuration cannot be built: {reason}") from error


class ClipBackbone(nn.Module):
    """Both towers of a frozen CLIP.

    Args:
        config: an open_clip configuration; `custom_text: true` keeps the text tower in a module of its own
            (`open_clip.model.CustomTextCLIP`).

    Raises:
        ValueError: a timm trunk that does not give four levels at strides 4, 8, 16 and 32.
    """

    def __init__(self, config: dict[str, Any]):
        # open_clip and timm take a second to import: it is spent where a network is built, not where one is named.
        from open_clip.model import CLIP, CustomTextCLIP
        from open_clip.modified_resnet import ModifiedResNet
        from open_clip.tokenizer import SimpleTokenizer

        super().__init__()
        config = copy.deepcopy(config)
        custom_text = config.pop("custom_text", False)
        with _WithoutFilling():
            self.clip: Any = (CustomTextCLIP if custom_text else CLIP)(**config)
        self._built_without_memory = any(parameter.is_meta for parameter in self.clip.parameters())
        self.has_text_module: bool = custom_text
        text_config = config["text_cfg"]
        self.tokenizer = SimpleTokenizer(
            context_length=text_config.get("context_length", 77), **text_config.get("tokenizer_kwargs") or {}
        )
        self.embed_dim: int = config["embed_dim"]
        self.image_size: int | tuple[int, int] = config["vision_cfg"].get("image_size", 224)
        self.is_resnet = isinstance(self.clip.visual, ModifiedResNet)
        if self.is_resnet:
            width = config["vision_cfg"].get("width", 64)
            self.channels = [width * 4, width * 8, width * 16, width * 32]
        else:
            self.channels = self._timm_channels()
        self.freeze()

    def _timm_channels(self) -> list[int]:
        from open_clip.timm_model import TimmModel

        visual = self.clip.visual
        if not isinstance(visual, TimmModel) or not hasattr(visual.trunk, "forward_intermediates"):
            raise ValueError(f"{type(visual).__name__} is no image tower with four stages")
        info = visual.trunk.feature_info
        info = info if isinstance(info, list) else info.info
        self.level_indices = [index for index, stage in enumerate(info) if stage["reduction"] in STRIDES]
        if [info[index]["reduction"] for index in self.level_indices] != list(STRIDES):
            reductions = [stage["reduction"] for stage in info]
            raise ValueError(
                f"the trunk's stages have strides {reductions}; strides 4, 8, 16 and 32 are needed"
            )
        return [info[index]["num_chs"] for index in self.level_indices]

    def freeze(self) -> None:
        """Switch gradients off and eval mode on, and tell transformers that nothing in here is its to initialize."""
        self.clip.requires_grad_(False)
        self.clip.eval()
        for module in self.clip.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]

    def train(self, mode: bool = True) -> "ClipBackbone":
        """Stay in eval mode, whatever the rest of the network does."""
        super().train(False)
        return self

    @property
    def is_trained(self) -> bool:
        """Whether a training run has unfrozen anything of the image tower."""
        return any(parameter.requires_grad for parameter in self.clip.visual.parameters())

    @property
    def device(self) -> torch.device:
        """The device on which the towers compute."""
        device, hook = self.text_tower.token_embedding.weight.device, getattr(self, "_hf_hook", None)
        return device if hook is None or device.type != "meta" else torch.device(hook.execution_device)

    @property
    def text_tower(self) -> Any:
        """The module that holds the text transformer: CLIP itself, or its `text` part."""
        return self.clip.text if self.has_text_module else self.clip

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt."""
        return self.clip.context_length

    @property
    @with_weights
    def logit_scale(self) -> Tensor:
        """CLIP's own logit scale: min(exp(logit_scale), 100), a scalar."""
        return self.clip.logit_scale.reshape(()).exp().clamp(max=100)

    # --- images ---

    def forward(self, pixel_values: Tensor) -> ImageFeatures:
        """Extract features of normalized RGB images (B, 3, H, W), H and W multiples of 32, in the tower's dtype.

        Gradients flow only where a training run has unfrozen some of the tower.
        """
        visual = self.clip.visual
        weight = next(visual.parameters(), None)  # a replica of DataParallel has none
        pixel_values = pixel_values if weight is None else pixel_values.to(weight.dtype)
        if pixel_values.device.type != "cpu":  # where convolutions are fastest in channels-last memory
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            if not self.is_resnet:
                dense, levels = visual.trunk.forward_intermediates(pixel_values, indices=self.level_indices)
                return ImageFeatures(tuple(levels), dense)
            levels = [visual.layer1(visual.stem(pixel_values))]
            for layer in (visual.layer2, visual.layer3, visual.layer4):
                levels.append(layer(levels[-1]))
            return ImageFeatures(tuple(levels), levels[-1])  # type: ignore[arg-type]

    def pool_masks(self, dense: Tensor, masks: Tensor) -> Tensor:
        """Pool the dense feature over masks, and apply CLIP's head: CLIP embeddings of regions.

        Args:
            dense: (B, C, h, w), `ImageFeatures.dense`, possibly upsampled.
            masks: (B, Q, h, w) bool. On timm towers an empty mask pools to the embedding of a zero feature, as
                published; on ResNets it attends everywhere.

        Returns:
            (B, Q, D), not normalized.
        """
        if self.is_resnet:
            return self._attention_pool(dense, masks)
        return self.project(mask_mean(dense, masks).to(dense.dtype))

    @with_weights
    def project(self, pooled: Tensor) -> Tensor:
        """Turn pooled dense features into CLIP embeddings by a timm tower's head.

        Args:
            pooled: (..., C), such as a cell or a mean of cells.

        Returns:
            (..., D), not normalized.
        """
        visual = self.clip.visual
        embeds = visual.head(visual.trunk.forward_head(pooled.reshape(-1, pooled.shape[-1], 1, 1)))
        return embeds.reshape(*pooled.shape[:-1], embeds.shape[-1])

    @with_weights
    def _attention_pool(self, dense: Tensor, masks: Tensor) -> Tensor:
        """Apply CLIP's attention pool, its keys limited to each mask, its positions resampled to the feature's size."""
        pool = self.clip.visual.attnpool
        batch, channels, height, width = dense.shape
        positions = pool.positional_embedding.to(dense.dtype)
        side = round((len(positions) - 1) ** 0.5)
        grid = positions[1:].T.reshape(1, channels, side, side)
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        tokens = dense.flatten(2).transpose(1, 2)
        keys = tokens + grid.flatten(2).transpose(1, 2)
        query = tokens.mean(dim=1, keepdim=True) + positions[:1]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

        allowed = masks.flatten(2)
        allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        queries = heads(pool.q_proj(query)).expand(-1, -1, allowed.shape[1], -1)
        attended = F.scaled_dot_product_attention(
            queries, heads(pool.k_proj(keys)), heads(pool.v_proj(keys)), attn_mask=allowed[:, None]
        )
        return pool.c_proj(attended.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def embed_images(self, dense: Tensor, valid: Tensor | None) -> Tensor:
        """Embed whole images, by the mean of the dense feature over the valid area.

        Args:
            dense: (B, C, H / 32, W / 32).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.

        Returns:
            (B, D), not normalized.
        """
        everywhere = torch.ones_like(dense[:, 0], dtype=torch.bool)
        masks = everywhere if valid is None else valid_cells(valid, dense.shape[-2:])
        return self.pool_masks(dense, masks[:, None])[:, 0]

    @torch.no_grad()
    def embed_cells(self, dense: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed each cell of the dense feature by itself.

        Args:
            dense: (B, C, h, w).
            valid: (B, H, W) bool, pixels that are not padding; None where all are.

        Returns:
            (B, h w, D), not normalized, and which cells hold a pixel of the image, (B, h w) bool.
        """
        batch, _, height, width = dense.shape
        cells = torch.eye(height * width, dtype=torch.bool, device=dense.device)
        masks = cells.unflatten(1, (height, width)).expand(batch, -1, -1, -1)
        is_valid = torch.ones_like(dense[:, 0], dtype=torch.bool)
        is_valid = is_valid if valid is None else valid_cells(valid, (height, width))
        return self.pool_masks(dense, masks), is_valid.flatten(1)

    @with_weights
    def embed_thumbnail(self, pixel_values: Tensor) -> Tensor:
        """Embed a whole image by a second pass of CLIP, as the published ITA does.

        The image before normalisation, as an 8-bit RGB image, goes through open_clip's evaluation transform.

        Args:
            pixel_values: (3, H, W), one normalized image without padding.

        Returns:
            (1, D), not normalized.
        """
        from open_clip import image_transform

        mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((pixel_values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        image = to_pil_image(pixels.cpu().numpy(), do_rescale=False, input_data_format="channels_first")
        transform = image_transform(self.image_size, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
        return self.clip.encode_image(transform(image)[None].to(pixel_values))

    # --- text ---

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, int]:
        """Tokenize prompts: (len(prompts), L) int64, L of the longest, and how many prompts were cut to fit."""
        if self.tokenizer.reduction_fn is not None:  # a CLIP with rules of its own for long prompts
            return self.tokenizer(prompts), 0
        start, end, most = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id, self.context_length - 2
        encoded = [self.tokenizer.encode(prompt) for prompt in prompts]
        longest = min(max(map(len, encoded)), most)
        rows = [[start, *codes[:most], end, *[0] * (longest - len(codes))] for codes in encoded]
        return torch.tensor(rows), sum(len(codes) > most for codes in encoded)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Give text embeddings at the end-of-text token, (len(prompts), D), not normalized."""
        return self.encode_tokens(self.tokenize(prompts)[0])

    @with_weights
    def encode_prefixes(self, templates: Sequence[str]) -> Prefixes | None:
        """Encode what stands before the name in templates, for `encode_tokens`; None where that would save nothing.

        An accelerator encodes many names together, and small towers are fast enough.
        """
        tower = self.text_tower
        weights = sum(parameter.numel() for parameter in tower.transformer.parameters())
        is_float = tower.transformer.get_cast_dtype() == torch.float32
        saves_time = self.device.type == "cpu" and weights >= MIN_SHARED_WEIGHTS and is_float
        usual_text = self._attends_causally and self.tokenizer.reduction_fn is None
        if not saves_time or not usual_text or not has_usual_blocks(tower):
            return None
        start, encode = self.tokenizer.sot_token_id, self.tokenizer.encode
        prefixes = [[start, *encode(template.split("{}")[0])] for template in templates]
        return encode_prefixes(tower, prefixes) if max(map(len, prefixes)) < self.context_length else None

    @with_weights
    def encode_tokens(self, tokens: Tensor, prefixes: Prefixes | None = None) -> Tensor:
        """Encode the tokens (n, L) that `tokenize` gives, as `encode_text` does.

        Attention is causal, so the tokens after the longest prompt's end change nothing and need not be there.

        Args:
            tokens: (n, L) int64.
            prefixes: of the n templates that the prompts were made of, to save time; None to do without.
        """
        from open_clip.transformer import text_global_pool

        tower = self.text_tower
        tokens = tokens.to(self.device)
        length = tokens.shape[1]
        if not self._attends_causally:
            return self.clip.encode_text(F.pad(tokens, (0, self.context_length - length)))
        x = None if prefixes is None else encode_rest(tower, tokens, prefixes)
        if x is not None:
            x = tower.ln_final(x)
        else:
            dtype = tower.transformer.get_cast_dtype()
            x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
            mask = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu_(1)
            x = text_global_pool(tower.ln_final(tower.transformer(x, attn_mask=mask)), tokens, "argmax")
        if tower.text_projection is None:
            return x
        if isinstance(tower.text_projection, nn.Linear):
            return tower.text_projection(x)
        return x @ tower.text_projection

    @property
    def _attends_causally(self) -> bool:
        """Whether the text tower is open_clip's usual one: causal, and read at the end-of-text token."""
        tower = self.text_tower
        pool_type = tower.text_pool_type if tower is self.clip else tower.pool_type
        return (
            getattr(tower, "cls_emb", None) is None and tower.attn_mask is not None and pool_type == "argmax"
        )

    @with_weights
    def text_tensors(self) -> list[Tensor]:
        """Give the text tower's weights."""
        tower = self.text_tower
        tensors = [tower.positional_embedding, tower.text_projection, tower.token_embedding.weight]
        tensors += list(tower.transformer.parameters()) + list(tower.ln_final.parameters())
        tensors = [tensor.weight if isinstance(tensor, nn.Linear) else tensor for tensor in tensors]
        return [tensor for tensor in tensors if tensor is not None]

    def text_fingerprint(self) -> tuple:
        """Give a value that changes whenever the text tower's weights may have."""
        return tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device)
            for tensor in self.text_tensors()
        )

    def reset_parameters(self, config: dict[str, Any]) -> None:
        """Give towers that were built without memory the weights that open_clip starts with; restore lost buffers.

        Args:
            config: what the towers were built from.
        """
        loaded = (getattr(parameter, "_is_hf_initialized", False) for parameter in self.clip.parameters())
        if not self._built_without_memory or any(loaded):
            self.restore_buffers(config)
            return
        fresh = ClipBackbone(config).clip
        for tensors, others in (
            (self.clip.parameters(), fresh.parameters()),
            (self.clip.buffers(), fresh.buffers()),
        ):
            for tensor, other in zip(tensors, others, strict=True):
                init.copy_(tensor, other)

    def restore_buffers(self, config: dict[str, Any]) -> None:
        """Make again the buffers that no checkpoint holds: the causal mask, and what a trunk may precompute."""
        kept = self.clip.state_dict()
        lost = [name for name, _ in self.clip.named_buffers() if name not in kept]
        fresh: dict[str, Tensor] = {}
        if any(name.split(".")[-1] != "attn_mask" for name in lost):
            fresh = dict(ClipBackbone(config).clip.named_buffers())
        for name in lost:
            parent, _, attribute = name.rpartition(".")
            if attribute == "attn_mask":
                size = len(self.text_tower.positional_embedding)
                buffer = torch.full((size, size), float("-inf")).triu_(1)
            else:
                buffer = fresh[name]
            setattr(self.clip.get_submodule(parent), attribute, buffer.to(self.device))


# --- open_clip's configuration: found by name, and checked before anything is built of it ---

LARGEST_CLIP_SIZE = 100_000
CLIP_COUNTS = ("embed_dim", "width", "layers", "heads", "context_length", "vocab_size")
CLIP_LIMITS = {"layers": 1000, "vocab_size": 10_000_000}


def resolve_clip_config(name: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Give the open_clip configuration to build, a copy of `config` or else from open_clip's registry.

    Args:
        name: of a CLIP in open_clip's registry.
        config: an open_clip model configuration, which takes precedence.

    Raises:
        ValueError: an unknown name, or a configuration that cannot serve: no tower with four stages, or a text tower
            that would have to be downloaded.
    """
    if config is None:
        from open_clip import get_model_config, list_models

        config = get_model_config(name) if ":" not in name else None
        if config is None:
            close = [
                known for known in list_models() if known.split("_")[0] == name.split("_", maxsplit=1)[0]
            ][:8]
            hint = f"; did you mean one of {', '.join(close)}?" if close else ""
            raise ValueError(f"open_clip knows no CLIP named {name!r}{hint}")
    config = copy.deepcopy(config)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"the CLIP configuration lacks {', '.join(missing)}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part, sizes in (("", {"embed_dim": config["embed_dim"]}), ("vision_cfg", vision), ("text_cfg", text)):
        _check_clip_sizes(part, sizes)
    _check_clip_parameters(config["embed_dim"], vision, text)
    if ":" in str(vision.get("timm_model_name")):
        raise ValueError("timm_model_name must name an architecture of timm, not a model on the Hub")
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise ValueError(
            f"CLIP {name!r} has a text tower from the Hub, which is not supported: use an open_clip one"
        )
    if not vision.get("timm_model_name") and not isinstance(vision.get("layers"), list | tuple):
        raise ValueError(f"CLIP {name!r} has a plain vision transformer; a tower with four stages is needed")
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
    return config


def _check_clip_sizes(part: str, sizes: Any) -> None:
    """Check that no size in a part of an open_clip configuration is negative or absurd.

    Raises:
        ValueError: one is, or the part is not a mapping.
    """
    if not isinstance(sizes, dict):
        raise ValueError(f"{part} of the CLIP configuration must be a mapping, got {sizes!r:.60}")
    for name, value in sizes.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if name in CLIP_COUNTS and not is_count and not (part == "vision_cfg" and name == "layers"):
            raise ValueError(f"{name} of the CLIP configuration must be an integer, got {value!r:.60}")
        most = CLIP_LIMITS.get(name, LARGEST_CLIP_SIZE)
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, int | float) and not 0 <= number <= most for number in numbers):
            raise ValueError(f"{name} of the CLIP configuration must be from 0 to {most}, got {value!r:.60}")


def _check_clip_parameters(embed_dim: int, vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Check, by rough numbers of parameters, that sizes which are possible each are not absurd together.

    Raises:
        ValueError: they are, or one is not a number.
    """
    layers = vision.get("layers", 12)
    try:
        of_text = text.get("vocab_size", 49408) + text.get("context_length", 77) + embed_dim
        of_text = text.get("width", 512) * (of_text + 12 * text.get("layers", 12) * text.get("width", 512))
        side = vision.get("image_size", 224)
        cells = max(side if isinstance(side, list | tuple) else [side]) ** 2 // 32**2
        depth, width = sum(layers) if isinstance(layers, list | tuple) else 0, vision.get("width", 64)
        of_vision = depth * 20 * (8 * width) ** 2 + 32 * width * (cells + embed_dim)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sizes of the CLIP configuration must be integers: {error!s:.200}") from error
    if not max(of_text, of_vision) <= MAX_PARAMETERS:
        raise ValueError(
            "the sizes of the CLIP configuration make a tower of more than 20 billion parameters"
        )
