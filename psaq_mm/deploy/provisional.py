"""What export must know of a model's images, until :mod:`psaq_mm.models` tells it."""
from __future__ import annotations

from torch import nn

from ..models import backbone_of


def image_channels(model: nn.Module) -> int:
    """Return how many channels the images of a model have: what its first convolution reads."""
    return next(module for module in backbone_of(model).modules() if isinstance(module, nn.Conv2d)).in_channels


def own_size(model: nn.Module) -> tuple[int, int] | None:
    """Return the image size, (H, W), that a backbone names as its own, or None."""
    backbone = backbone_of(model)
    size = getattr(getattr(backbone, 'patch_embed', None), 'img_size', None)
    if size is None and getattr(backbone, 'pretrained_cfg', None):
        size = backbone.pretrained_cfg['input_size'][1:]
    return tuple(size) if isinstance(size, (tuple, list)) else None
