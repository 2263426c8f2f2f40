"""Which parts of the libraries cannot be a part of a graph, known before anything is traced."""
from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...errors import UserError

REFUSED: dict[str, str] = {  # by name of the class, or of one it inherits: why
    'CenterNetHead': 'it looks for peaks of a map',
    'CornerHead': 'it matches corners',
    'GridHead': 'it refines boxes in Python',
    'GuidedAnchorHead': 'it makes its anchors from the image',
    'MaskPointHead': 'it refines masks point by point',
    'MultiInstanceBBoxHead': 'it suppresses sets of boxes in Python',
    'SOLOHead': 'its masks are suppressed as matrices',
    'YOLACTHead': 'its suppression has no ONNX operator',
}


def refuse(model: nn.Module) -> None:
    """Raise if a model has a part that cannot be traced.

    Raises:
        UserError: If so.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in REFUSED:
                raise UserError(f'model.{name}: {kind.__name__} cannot be one graph with the rest, '
                                f'{REFUSED[kind.__name__]}; export the parts of the model instead')
    for settings in dicts(getattr(model, 'test_cfg', None)):
        suppression = settings.get('nms')
        kind = suppression.get('type', 'nms') if isinstance(suppression, dict) else 'nms'
        if kind != 'nms':
            raise UserError(no_suppression(kind))


def dicts(settings) -> Iterator[dict]:
    """Return all dicts in a nested config."""
    if isinstance(settings, dict):
        yield settings
        for value in settings.values():
            yield from dicts(value)


def no_suppression(kind: str) -> str:
    """Return what to tell of a suppression that cannot be exported."""
    return f"test_cfg: nms of type '{kind}' has no ONNX operator; set type='nms' and see what it costs"
