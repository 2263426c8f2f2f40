from torch import nn

from ..models import backbone_of


def image_channels(model):
    return next(m for m in backbone_of(model).modules() if isinstance(m, nn.Conv2d)).in_channels


def own_size(model):
    backbone = backbone_of(model)
    size = getattr(getattr(backbone, 'patch_embed', None), 'img_size', None)
    if size is None and getattr(backbone, 'pretrained_cfg', None):
        size = backbone.pretrained_cfg['input_size'][1:]
    return tuple(size) if isinstance(size, (tuple, list)) else None
