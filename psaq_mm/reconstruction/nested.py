"""Tensors in nested dicts, tuples and lists."""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..quantization.weights import nested_values


def mapped(nested, function: Callable[[Tensor], Tensor]):
    """Return nested dicts, tuples and lists with a function applied to every tensor in them."""
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {key: mapped(value, function) for key, value in nested.items()}
    if isinstance(nested, (tuple, list)):
        return type(nested)(*(mapped(v, function) for v in nested)) if hasattr(nested, '_fields') else type(nested)(
            mapped(value, function) for value in nested)
    return nested


def floats(nested) -> list[Tensor]:
    """Return all tensors of floating-point numbers in nested dicts, tuples and lists, in order."""
    return [value for value in nested_values(nested) if isinstance(value, Tensor) and value.is_floating_point()]
