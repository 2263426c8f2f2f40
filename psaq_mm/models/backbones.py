"""Where in a model the backbone lives, and with it the neck: the parts that are quantized by default."""
from __future__ import annotations

import torch
from torch import nn

from ..errors import UserError

BACKBONES = ('backbone', 'image_encoder')  # what the libraries call it; the latter beside a text encoder
NECK = 'neck'
FEATURE_PARTS = (*BACKBONES, NECK)


class _Seen(Exception):
    """Tells which backbone saw an image first."""

    def __init__(self, name):
        super().__init__(name)
        self.name = name


def backbone_name(model: nn.Module) -> str:
    """Name of the submodule that turns images into features.

    A model may hold its backbone in a model inside it, and it may hold several, as a student and a teacher: then the
    one is meant that ``extract_feat`` runs, else the first.

    Raises:
        UserError: If there is none.
    """
    for name in BACKBONES:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    found = [name for name, _ in model.named_modules() if name.rpartition('.')[2] in BACKBONES
             and not set(name.split('.')[:-1]) & set(FEATURE_PARTS)]
    if not found:
        raise UserError(f"{type(model).__name__} holds no {' or '.join(BACKBONES)}: psaq_mm does not know what in it "
                        f"sees images (top level: {', '.join(name for name, _ in model.named_children())})")
    return _first_to_see(model, found) if len(found) > 1 and hasattr(model, 'extract_feat') else found[0]


def _first_to_see(model, names):

    def tell(name):
        def hook(*unused):
            raise _Seen(name)
        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(tell(name)) for name in names]
    try:
        model.extract_feat(torch.zeros(1, 3, 64, 64))
    except _Seen as seen:
        return seen.name
    except Exception:  # extract_feat does something with the image first that this one is not fit for
        pass
    finally:
        for handle in handles:
            handle.remove()
    return names[0]


def backbone_of(model: nn.Module) -> nn.Module:
    """The submodule that turns images into features.

    Raises:
        UserError: If there is none.
    """
    return model.get_submodule(backbone_name(model))


def predictor_of(model: nn.Module) -> nn.Module:
    """The model whose features and predictions are meant: the model itself, or the one inside it that holds the
    backbone, as the teacher of a semi-supervised model.
    """
    return model.get_submodule(backbone_name(model).rpartition('.')[0])


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that are quantized unless the stanza says otherwise: backbone and neck."""
    backbone = backbone_name(model)
    owner, _, name = backbone.rpartition('.')
    neck = f'{owner}.{NECK}' if owner else NECK
    holder = model.get_submodule(owner)
    if name != NECK and isinstance(getattr(holder, NECK, None), nn.Module) and getattr(holder, 'with_neck', True):
        return backbone, neck
    return backbone,
