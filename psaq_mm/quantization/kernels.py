"""Rounding on CPU, forward and backward: in C++ where it has been compiled (csrc/), else in passes of torch's own.

Torch's own fused ``fake_quantize_*`` (2.13) work value by value on CPU, several times slower than either.
"""
from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 1 << 18  # values at a time, which stay in the cache from pass to pass; measured, our choice
COMPILED = Path(__file__).with_name('_kernels.so')

_library = torch.library.Library('psaq_mm', 'FRAGMENT')
_GRID = 'Tensor x, Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max'
_library.define(f'fake_quantize({_GRID}) -> Tensor')
_library.define(f'fake_quantize_backward(Tensor(a!) grad, {_GRID}, bool learned) -> (Tensor, Tensor)')


class _Grid:
    """Scales and ends of a grid, and how tensors on it are cut into pieces that stay in the cache.

    Args:
        scale, zero_point (Tensor): (channels,), or (1,) for per-tensor.
        axis (int): The axis that scales run along where there are several.
        quant_min, quant_max (int): Ends, as integers that the zero point was added to.
        shape (torch.Size): Of the tensors.
    """

    def __init__(self, scale, zero_point, axis, quant_min, quant_max, shape):
        self.per_tensor, self.axis = scale.numel() == 1, axis
        along = (1, ) if self.per_tensor else tuple(-1 if dim == axis else 1 for dim in range(len(shape)))
        self.scale = scale.detach().view(along)
        self.inverse = self.scale.reciprocal()
        if zero_point.numel() == 1 or not zero_point.any():  # the latter: of symmetric quantization
            self.low, self.high = (end - zero_point[0].item() for end in (quant_min, quant_max))
        else:
            self.low, self.high = ((end - zero_point.detach()).float().view(along) for end in (quant_min, quant_max))
        self.others = [dim for dim in range(len(shape)) if dim != axis]
        self.rows = CHUNK if self.per_tensor else max(1, CHUNK // max(1, shape[1:].numel()))

    def pieces(self, *tensors, sums=()):
        """Pieces of contiguous tensors, each with scale, inverse, ends and ``sums``, which are shaped as the scale."""
        if self.per_tensor:
            tensors = [tensor.view(-1) for tensor in tensors]
        along = (self.scale, self.inverse, self.low, self.high, *sums)
        split = [tensor.split(self.rows) for tensor in tensors]
        if self.per_tensor or self.axis:
            return ((*parts, *along) for parts in zip(*split))
        along = (x.split(self.rows) if isinstance(x, Tensor) else [x] * len(split[0]) for x in along)
        return zip(*split, *along)

    def total(self, a, b=None):
        """Sum over what shares a scale, of a tensor or of a product."""
        if self.per_tensor:
            return a.sum() if b is None else torch.dot(a, b)
        product = a if b is None else a * b
        return product.sum(self.others, keepdim=True) if self.others else product  # torch sums all of it over no axis


def round_in_passes(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:
    """:func:`fake_quantize` without a compiled kernel."""
    x = x.contiguous()
    rounded, grid = torch.empty_like(x), _Grid(scale, zero_point, axis, quant_min, quant_max, x.shape)
    for source, target, scale, inverse, low, high in grid.pieces(x, rounded):
        torch.mul(source, inverse, out=target).round_().clamp_(low, high).mul_(scale)
    return rounded


def backward_in_passes(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int,
                       quant_max: int, learned: bool) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize_backward` without a compiled kernel; without booleans, which torch does not vectorise."""
    grid = _Grid(scale, zero_point, axis, quant_min, quant_max, x.shape)
    errors, beyond = torch.zeros_like(grid.scale), torch.zeros_like(grid.scale)
    for grads, values, scale, inverse, low, high, error, out in grid.pieces(grad, x, sums=(errors, beyond)):
        integers = torch.mul(values, inverse).round_()
        rounded = torch.clamp(integers, low, high)
        clipped = integers.sub_(rounded).view(-1)
        all_inside = torch.dot(clipped, clipped).item() == 0
        inside = None if all_inside else integers.eq_(0)
        if learned:
            error += grid.total(grads, rounded.mul_(scale).sub_(values))
        if learned and not all_inside:
            outside = grads - torch.mul(grads, inside, out=rounded)
            error += grid.total(outside, values)
            out += grid.total(outside)
            grads.copy_(rounded)
        elif not all_inside:
            grads *= inside
    return (errors / grid.scale).view(-1), (-grid.scale * beyond).view(-1)


def _load() -> bool:
    """Whether the compiled kernels are in use from now on."""
    if not COMPILED.exists():
        return False
    try:
        torch.ops.load_library(COMPILED)
    except OSError as error:
        warnings.warn(f'{COMPILED} was compiled for another torch, so rounding is slower than it could be: install '
                      f'psaq_mm once more (pip install --no-build-isolation). {error}', stacklevel=2)
        return False
    return True


IS_COMPILED = _load()
if not IS_COMPILED:
    _library.impl('fake_quantize', round_in_passes, 'CPU')
    _library.impl('fake_quantize_backward', backward_in_passes, 'CPU')


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:
    """What torch's fused ``fake_quantize_*`` ops compute, bit for bit. Has no gradient of its own.

    Args:
        x (Tensor): float32, on CPU.
        scale, zero_point (Tensor): (channels,), or (1,) for per-tensor.
        axis (int): The axis that scales run along where there are several.
        quant_min, quant_max (int): Ends of the grid.

    Returns:
        Tensor: The rounded values, contiguous.
    """
    return torch.ops.psaq_mm.fake_quantize(x.detach(), scale, zero_point, axis, quant_min, quant_max)


def fake_quantize_backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int,
                           quant_max: int, learned: bool) -> tuple[Tensor, Tensor]:
    """From the gradient of the rounded values to that of the values and, where they are learned, of the range.

    With ``v = scale * (clamp(round(x / scale + zero_point)) - zero_point)`` and straight-through rounding, the gradient
    passes inside the grid and is 0 outside; the derivative by the scale is ``(v - x) / scale`` inside and ``v / scale``
    outside, by the zero point ``-scale`` outside. Source: LSQ and LSQ+.

    Args:
        grad (Tensor): Of the rounded values, contiguous; overwritten with that of the values.
        x (Tensor): The values, contiguous.
        scale, zero_point, axis, quant_min, quant_max: As of :func:`fake_quantize`.
        learned (bool): Whether the gradients of scale and zero point are wanted.

    Returns:
        tuple[Tensor, Tensor]: Gradients of scale and zero point, (channels,) each; meaningless if not wanted.
    """
    return torch.ops.psaq_mm.fake_quantize_backward(grad, x, scale, zero_point, axis, quant_min, quant_max, learned)
