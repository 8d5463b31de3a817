"""int8 towers: dynamic quantisation of the frozen CLIP's linear layers through torchao.

Weights become int8 with a scale for each output channel, activations are quantised as they come; convolutions,
norms and everything that was trained for segmentation stay as they are. ConvNeXt's blocks are mostly linear layers;
a ResNet's image tower has none, and only its text tower changes. Needs torchao (`pip install torchao`).
"""

from typing import Any

from torch import nn


def quantize_towers(model: Any, image: bool = True, text: bool = True) -> list[str]:
    """Quantises the linear layers of a model's towers, in place; what was encoded before is encoded anew.

    Args:
        image, text: which towers.

    Returns: the names of the layers that were quantised.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ImportError("int8 towers need torchao: pip install torchao") from error
    backbone = model.clip_backbone
    visual = "clip_backbone.clip.visual."
    chosen = {
        name
        for name, module in model.named_modules()
        if name.startswith("clip_backbone.clip.")
        # torch's own attention takes its weights apart, and they have to stay as they are.
        and isinstance(module, nn.Linear)
        and type(module) is nn.Linear
        and (image if name.startswith(visual) else text)
    }
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)
    backbone.freeze()
    return sorted(chosen)
