"""Where attention lives in each model family."""
from __future__ import annotations

import functools
import sys

from torch import nn
from torch.utils.checkpoint import checkpoint

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


def attention_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks that hold the attentions of a backbone, converted or not: members of a ModuleList or Sequential."""
    modules, kinds = dict(backbone.named_modules()), attention_types()
    blocks = {}
    for name, module in modules.items():
        if not hasattr(module, CONTEXT) and not attention_parts(module, kinds):
            continue
        while '.' in name:
            owner = name.rpartition('.')[0]
            if isinstance(modules[owner], (nn.ModuleList, nn.Sequential)):
                blocks[name] = modules[name]
                break
            name = owner
    return list(blocks.values())


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Makes attention blocks recompute their activations in the backward pass, in place.

    Not the last one, in which a pass for patch similarities ends.
    """
    for block in attention_blocks(backbone)[:-1]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


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
            products.append(getattr(module, CONTEXT).output)
        elif attention_parts(module, kinds):
            raise ValueError(f'{type(module).__name__} is not converted: the tap needs its products as modules')
    return products, [prefix_tokens(backbone)] * len(products)
