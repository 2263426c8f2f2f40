"""What modules hide from the conversion, brought to light: one function for each class that needs it.

A layer must be applied by calling it, and an attention must show its two products (see
:mod:`psaq_mm.quantization.recognition`). A class that computes otherwise gets an adapter, here or in any package of the
user's that the config imports (``custom_imports``)::

    @adapts('my_package.MyAttention')
    def show(module):
        module.__class__ = MyVisibleAttention
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_adapters: dict[str, Callable[[nn.Module], None]] = {}


def adapts(path: str) -> Callable:
    """Registers a function that changes a module of exactly this class, in place, before the conversion.

    Args:
        path (str): Module and name of the class.
    """

    def register(adapter):
        _adapters[path] = adapter
        return adapter

    return register


def adapt(model: nn.Module) -> None:
    """Applies the adapters to all modules they are meant for, in place."""
    for module in list(model.modules()):
        adapter = _adapters.get(f'{type(module).__module__}.{type(module).__qualname__}')
        if adapter is not None:
            adapter(module)


class _Applied(TorchFunctionMode):
    """Where ``F.linear`` is given a layer's weight, the layer itself computes it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input, weight, bias=None):  # noqa: A002, as F.linear names them
        if weight is not self.layer.weight:
            return F.linear(input, weight, bias)
        out = self.layer(input)
        return out if bias is None else out + bias


class WithoutBias:
    """Mixed in front of an attention class that adds a bias of its own to what the layer ``qkv`` has none for."""

    def forward(self, *args, **kwargs):
        with _Applied(self.qkv):
            return super().forward(*args, **kwargs)


@adapts('mmseg.models.backbones.beit.BEiTAttention')
def show_qkv(attention: nn.Module) -> None:
    """BEiT's keys have no bias, so the layer has none, and its forward passes the layer by to add the others'."""
    if attention.bias == 'qv_bias':
        attention.__class__ = _without_bias(type(attention))


@cache
def _without_bias(kind: type) -> type:
    return type(kind.__name__, (WithoutBias, kind), dict(__module__=__name__))
