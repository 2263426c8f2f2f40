"""Where attention lives in each model family."""
from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from torch import nn

from ..quantization import CONTEXT, LAYERS


@dataclass(frozen=True)
class AttentionSpec:
    """An attention class whose forward makes two matrix products, scores and context.

    Attributes:
        path (str): Dotted path of the class.
        class_tokens (int): Leading tokens that are no patches.
    """
    path: str
    class_tokens: int = 0


# A family is one line here. Window attention has no class token (V1's code drops token 0 of Swin all the same).
ATTENTIONS = [AttentionSpec('mmdet.models.backbones.swin.WindowMSA')]


def _specs() -> dict[type, AttentionSpec]:
    found = {}
    for spec in ATTENTIONS:
        module, _, name = spec.path.rpartition('.')
        try:
            found[getattr(import_module(module), name)] = spec
        except ModuleNotFoundError as error:
            if error.name.split('.')[0] != module.split('.')[0]:
                raise  # the library is there, something it needs is not
    return found


def layer_types() -> dict:
    """Quantized counterparts of torch's layers and of mmcv's wrappers, which differ for empty inputs of old torch."""
    from mmcv.cnn.bricks import wrappers
    return {**LAYERS, wrappers.Linear.forward: LAYERS[nn.Linear.forward],
            wrappers.Conv2d.forward: LAYERS[nn.Conv2d.forward]}


def attention_types() -> tuple[type, ...]:
    """All attention classes of the libraries that are installed."""
    return tuple(_specs())


def attention_taps(model: nn.Module) -> tuple[list[nn.Module], list[int]]:
    """The modules whose outputs are the tokens of patch similarity, and how many class tokens each has.

    Args:
        model (nn.Module): A converted model, or its backbone.
    """
    specs = _specs()
    products, class_tokens = [], []
    for module in model.modules():
        spec = next((s for kind, s in specs.items() if isinstance(module, kind)), None)
        if spec is not None:
            if not hasattr(module, CONTEXT):
                raise ValueError(f'{type(module).__name__} is not converted: the tap needs its products as modules')
            products.append(getattr(module, CONTEXT))
            class_tokens.append(spec.class_tokens)
    return products, class_tokens
