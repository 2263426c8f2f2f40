import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PARTS = ('operators', 'boxes', 'dense', 'two_stage', 'transformers', 'masks', 'segmentors')  # modules that replace
REPLACEMENTS: dict[str, Callable] = {}  # by what they replace, 'module:name' or 'module:Class.name'


def replaces(*targets: str) -> Callable:
    """Register the decorated function in place of functions or methods of the libraries.

    Args:
        *targets (str): 'module:name' or 'module:Class.name'. A method is replaced in the class that defines it and in
            those that inherit it.
    """

    def register(function):
        REPLACEMENTS.update(dict.fromkeys(targets, function))
        return function

    return register


@contextmanager
def traceable_library() -> Iterator[None]:
    """Within it, the libraries' functions compute in a way that can be traced, and so do three of torch's."""
    for part in PARTS:
        importlib.import_module(f'{__package__}.{part}')
    changed = []

    def shadow(owner, name, new):
        changed.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, new)

    try:
        for target, new in REPLACEMENTS.items():
            path, name = target.split(':')
            owner = importlib.import_module(path)
            *classes, name = name.split('.')
            for part in classes:
                owner = getattr(owner, part)
            if classes:
                shadow(owner, name, new)
                continue
            old = getattr(owner, name)
            for module in list(sys.modules.values()):  # each that has imported it by name
                for key in [key for key, value in list(vars(module).items()) if value is old] if module else ():
                    shadow(module, key, new)
        shadow(torch, 'squeeze', _squeeze)
        shadow(torch.Tensor, 'squeeze', _squeeze)
        shadow(torch.Tensor, 'split', _split)
        shadow(torch.Tensor, 'new_tensor', _new_tensor)
        shadow(torch.onnx, 'is_in_onnx_export', lambda: False)  # mmdet's branches for it import what is no longer there
        yield
    finally:
        for owner, name, old in reversed(changed):
            if old is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, old)


_SQUEEZE, _SPLIT, _NEW_TENSOR = torch.squeeze, torch.Tensor.split, torch.Tensor.new_tensor


class _Squeezed(torch.autograd.Function):
    """``squeeze`` of one dimension, that the exporter would make a branch of where it does not know its length."""

    @staticmethod
    def forward(ctx, x, dim):
        return _SQUEEZE(x, dim)

    @staticmethod
    def symbolic(g, x, dim):
        return g.op('Squeeze', x, g.op('Constant', value_t=torch.tensor([dim])))


def _squeeze(x, *dims, **named):
    """``squeeze`` of what has a length of 1 in the example: the exporter leaves the question open, or takes the
    example's shape for that of every input.
    """
    chosen = [*dims, *named.values()] or [range(x.dim())]
    chosen = {dim % x.dim() for part in chosen for dim in ((part, ) if isinstance(part, int) else part)}
    for dim in sorted(chosen, reverse=True):
        x = _Squeezed.apply(x, dim) if int(x.shape[dim]) == 1 else x
    return x


def _split(x, size, dim=0):
    """``split`` into lengths counted in Python: one piece is all there is, whatever was counted."""
    if isinstance(size, (tuple, list)) and len(size) == 1:
        return (x, )
    return _SPLIT(x, size, dim)


def _new_tensor(like, data, **settings):
    """``new_tensor`` that keeps traced numbers in nested lists as they are: they would become constants."""
    if isinstance(data, (tuple, list)) and _holds_tensors(data):
        return torch.stack([_new_tensor(like, part, **settings) for part in data])
    if isinstance(data, Tensor):
        return data.to(settings.get('dtype') or like.dtype)
    return _NEW_TENSOR(like, data, **settings)


def _holds_tensors(data):
    """Whether there is a tensor in nested lists."""
    return isinstance(data, Tensor) or isinstance(data, (tuple, list)) and any(map(_holds_tensors, data))


class Traced(tuple):
    """Sizes of an image that a data sample keeps as they are: copies of traced numbers are constants."""

    def __deepcopy__(self, memo):
        return self


def number(value, like: Tensor) -> Tensor:
    """Return a number, traced or not, as a tensor of the type of another."""
    return value.to(like.dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype)
