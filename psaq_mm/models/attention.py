"""Where attention lives in each model family."""
from __future__ import annotations

import sys

from torch import nn

from ..quantization import CONTEXT, LAYERS, attention_parts

# Classes whose forward makes two matrix products, scores and context, or a fused attention. A family is one line here;
# nn.MultiheadAttention, inside mmseg's ViT and mmcv's MultiheadAttention, is known to the quantization itself.
ATTENTIONS = (
    'mmdet.models.backbones.swin.WindowMSA',
    'mmseg.models.backbones.swin.WindowMSA',
    'timm.layers.attention.Attention',
    'timm.models.vision_transformer.Attention',  # where older releases of timm have it
    'timm.models.swin_transformer.WindowAttention',
)


def layer_types() -> dict:
    """Quantized counterparts of torch's layers and of mmcv's wrappers, which differ for empty inputs of old torch."""
    from mmcv.cnn.bricks import wrappers
    same = {getattr(wrappers, kind.__name__).forward: LAYERS[kind.forward]
            for kind in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)}
    return {**LAYERS, **same}


def attention_types() -> tuple[type, ...]:
    """All known attention classes that any model in this process can have: those whose module is imported."""
    found = []
    for path in ATTENTIONS:
        module, _, name = path.rpartition('.')
        if hasattr(sys.modules.get(module), name):
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def prefix_tokens(backbone: nn.Module) -> int:
    """How many leading tokens of a backbone are no patches: class token, distillation token, registers.

    Window attention has none (V1's code drops token 0 of Swin all the same).
    """
    if hasattr(backbone, 'num_prefix_tokens'):  # timm
        return backbone.num_prefix_tokens
    return int(getattr(backbone, 'with_cls_token', False))  # mmseg


def attention_taps(backbone: nn.Module) -> tuple[list[nn.Module], list[int]]:
    """The modules whose outputs are the tokens of patch similarity, and how many leading tokens of each are no patches.

    Args:
        backbone (nn.Module): Of a converted model.

    Raises:
        ValueError: If it is not converted.
    """
    kinds = attention_types()
    products = []
    for module in backbone.modules():
        if hasattr(module, CONTEXT):
            products.append(getattr(module, CONTEXT))
        elif attention_parts(module, kinds):
            raise ValueError(f'{type(module).__name__} is not converted: the tap needs its products as modules')
    return products, [prefix_tokens(backbone)] * len(products)
