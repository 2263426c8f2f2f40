"""Where attention lives in a backbone, and the tokens that patch similarity is taken from."""
from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..quantization import CONTEXT, LAYERS, attention_parts
from ..synthesis import attention_tokens, map_tokens

BACKBONES = ('backbone', 'image_encoder')  # what the libraries call it; the latter beside a text encoder


def backbone_of(model: nn.Module) -> nn.Module:
    """The submodule that turns images into features.

    Raises:
        UserError: If there is none.
    """
    for name in BACKBONES:
        if isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    raise UserError(f"{type(model).__name__} has no {' or '.join(BACKBONES)}: psaq_mm does not know what in it sees "
                    f"images (top level: {', '.join(name for name, _ in model.named_children())})")


def layer_types() -> dict:
    """Quantized counterparts of torch's layers and of mmcv's wrappers, which differ for empty inputs of old torch."""
    from mmcv.cnn.bricks import wrappers
    same = {getattr(wrappers, kind.__name__).forward: LAYERS[kind.forward]
            for kind in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)}
    return {**LAYERS, **same}


def attention_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks that hold the attentions of a backbone, converted or not: members of a ModuleList or Sequential."""
    modules = dict(backbone.named_modules())
    blocks = {}
    for name, module in modules.items():
        if not hasattr(module, CONTEXT) and not attention_parts(module):
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
    # mmseg; where nothing says that the class token can be left out, it is there if it exists
    return int(getattr(backbone, 'with_cls_token', isinstance(getattr(backbone, 'cls_token', None), nn.Parameter)))


def similarity_taps(backbone: nn.Module) -> tuple[list[nn.Module], list]:
    """The modules whose outputs hold the tokens of patch similarity, and how to read those of each.

    A backbone without attention, convolutional or of a kind that shows no products, is read at its feature maps: every
    position is a token.

    Args:
        backbone (nn.Module): Of a converted model.

    Raises:
        ValueError: If it is not converted.
    """
    skip, products, readers = prefix_tokens(backbone), [], []
    for module in backbone.modules():
        if hasattr(module, CONTEXT):
            products.append(getattr(module, CONTEXT).output)
            readers.append(functools.partial(attention_tokens, skip=skip, heads=getattr(module, 'num_heads', 1)))
        elif attention_parts(module):
            raise ValueError(f'{type(module).__name__} is not converted: the tap needs its products as modules')
    return (products, readers) if products else ([backbone], [map_tokens])
