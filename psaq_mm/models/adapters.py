"""Brings to light what modules hide from the conversion: one function for each class that needs it.

An attention must show its two products (see :mod:`psaq_mm.quantization.recognition`). A class that computes otherwise
gets an adapter in any package of the user's that the config imports (``custom_imports``)::

    @adapts('my_package.MyAttention')
    def show(module):
        module.__class__ = MyVisibleAttention
"""
from __future__ import annotations

from collections.abc import Callable

from torch import nn

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
