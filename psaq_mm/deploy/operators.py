"""What quantizers and quantized layers become in a graph: QuantizeLinear, DequantizeLinear, stored integers.

The tracer takes nothing but tensors and plain Python values: scales and zero points come as tuples.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..quantization.quantizer import FakeQuantizer, Mode


class Grid(NamedTuple):
    """The integers of an activation.

    Args:
        scale (tuple[float]): One, or one for each channel.
        zero_point (tuple[int]): As many.
        axis (int): Of the channels, not negative.
        low, high (int): The smallest and the largest integer.
    """
    scale: tuple
    zero_point: tuple
    axis: int
    low: int
    high: int

    @property
    def integers(self) -> tuple:
        """All but the scale: tensors that have it in common can be moved about as one."""
        return self[1:]


def _grid(quantizer, axis):
    # The same values on other integers. Marked as unsigned, signed ones are moved up by half their number; marked as
    # signed, those of fewer than 8 bits are moved so that 0 stands for 0.
    shift = 0
    if getattr(quantizer, 'unsigned', False) and quantizer.quant_min < 0:
        shift = -quantizer.quant_min
    elif getattr(quantizer, 'signed', False) and quantizer.config.bits < 8:
        shift = -int(quantizer.zero_point[0]) if quantizer.zero_point.unique().numel() == 1 else 0
    return Grid(tuple(quantizer.scale.tolist()), tuple((quantizer.zero_point + shift).tolist()), axis,
                quantizer.quant_min + shift, quantizer.quant_max + shift)


def grid_of(quantizer: FakeQuantizer | None) -> Grid | None:
    """The grid of a quantizer with one scale and 8 bits, which an activation can be stored on; None of any other.

    None, too, of one that is marked as ``paired``: what it quantizes is to be dequantized at once.
    """
    if quantizer is None or quantizer.mode is not Mode.QUANTIZE or getattr(quantizer, 'paired', False):
        return None
    if quantizer.config.bits < 8 or len(quantizer.scale) > 1:
        return None
    return _grid(quantizer, 0)


def _along(values, kind, axis, dim):
    """Values to be multiplied with a tensor of so many dimensions."""
    value = torch.tensor(values, dtype=kind)
    return value.view([-1 if i == axis else 1 for i in range(dim)]) if len(values) > 1 else value


def _constant(g, values, kind):
    value = torch.tensor(values, dtype=kind)
    return g.op('Constant', value_t=value if len(values) > 1 else value[0])


def _attributes(scale, zero_point, axis, low):
    """Name of the integer type, and the attribute that tells the axis where there is one."""
    return torch.int8 if low < 0 else torch.uint8, dict(axis_i=axis) if len(scale) > 1 else {}


def _rounded(x, scale, zero_point, axis, low, high):
    """The integers that a fake-quantizer rounds to, int8 or uint8."""
    inverse = _along(scale, torch.float32, axis, x.dim()).reciprocal()
    integers = (x * inverse).round() + _along(zero_point, torch.float32, axis, x.dim())
    return integers.clamp(low, high).to(_attributes(scale, zero_point, axis, low)[0])


class Operator(torch.autograd.Function):
    """A function that is an operator of its own in the graph."""

    @classmethod
    def apply(cls, *args):
        """Call it where a mode watches torch's functions, too (placement 'all'): a trace fails there otherwise."""
        with torch._C.DisableTorchFunction():
            return super().apply(*args)


class _Quantize(Operator):

    @staticmethod
    def forward(ctx, x, positive, *grid):
        return _rounded(x, *grid)

    @staticmethod
    def symbolic(g, x, positive, scale, zero_point, axis, low, high):
        if high - low < 255:
            ends = [_constant(g, [scale[0] * (end - zero_point[0])], torch.float32) for end in (low, high)]
            x = g.op('Min', x, ends[1]) if positive else g.op('Clip', x, *ends)
        kind, along = _attributes(scale, zero_point, axis, low)
        return g.op('QuantizeLinear', x, _constant(g, scale, torch.float32), _constant(g, zero_point, kind), **along)


class _DequantizeActivation(Operator):

    @staticmethod
    def forward(ctx, integers, scale, zero_point, axis, low):
        shifted = integers.float() - _along(zero_point, torch.float32, axis, integers.dim())
        return shifted * _along(scale, torch.float32, axis, integers.dim())

    @staticmethod
    def symbolic(g, integers, scale, zero_point, axis, low):
        kind, along = _attributes(scale, zero_point, axis, low)
        return g.op('DequantizeLinear', integers, _constant(g, scale, torch.float32), _constant(g, zero_point, kind),
                    **along)


def quantize(x: Tensor, grid: Grid, positive: bool = False) -> Tensor:
    """The integers of an activation, int8 or uint8; with fewer than 8 bits it is clipped before.

    Args:
        x (Tensor): The activation.
        grid (Grid): Its integers.
        positive (bool): Whether it is never below 0, so that only its upper end is clipped. Defaults to False.
    """
    return _Quantize.apply(x, positive, *grid)


def dequantize(integers: Tensor, grid: Grid) -> Tensor:
    """Back from :func:`quantize`, to float32."""
    return _DequantizeActivation.apply(integers, *grid[:4])


def activation(quantizer: FakeQuantizer, x: Tensor) -> Tensor:
    """What a quantizer computes, as a pair of operators.

    Raises:
        UserError: If they cannot express it.
    """
    if len(quantizer.scale) > 1 and quantizer.quant_max - quantizer.quant_min < 255:
        raise UserError(f"'{quantizer.name}': activations of fewer than 8 bits with a scale for each channel cannot be "
                        'exported, use granularity per_tensor')
    grid = _grid(quantizer, quantizer.axis % x.dim())
    return dequantize(quantize(x, grid), grid)


def head_product(weights: Tensor, quantizer: FakeQuantizer | None, value: Tensor) -> Tensor:
    """The product of attention weights and values, the weights quantized.

    ONNX Runtime has no product of integers with a scale for each head. So the weights are brought to one scale before
    they are quantized, and the product takes that back: plain operators that both runtimes compute in integers.

    Args:
        weights (Tensor): (..., heads, queries, keys).
        quantizer (FakeQuantizer | None): Of the weights.
        value (Tensor): Quantized, (..., heads, keys, d).

    Raises:
        UserError: If scales for each head have different zero points.
    """
    if quantizer is None:
        return weights @ value
    if quantizer.mode is not Mode.QUANTIZE or len(quantizer.scale) == 1:
        return quantizer(weights) @ value
    if quantizer.zero_point.unique().numel() > 1:
        raise UserError(f"'{quantizer.name}': ranges of attention weights that begin below 0 cannot be exported with a "
                        "scale for each head, use quantization.activation.softmax = 'per_tensor'")
    scales, width = quantizer.scale.tolist(), int(value.shape[-1])
    grid = _grid(quantizer, 0)
    grid = grid._replace(scale=(1.0, ), zero_point=grid.zero_point[:1])
    # OpenVINO 2026.4.1 computes a factor for each head followed by Clip and QuantizeLinear wrongly, not one by Min.
    integers = quantize(weights * torch.tensor([[[1 / scale]] for scale in scales]), grid, positive=True)
    # One factor for each head and column: OpenVINO 2026 cannot load an int8 product followed by one for each head.
    return dequantize(integers, grid) @ value * torch.tensor([[[scale] * width] for scale in scales])


@contextmanager
def already_quantized(quantizer: FakeQuantizer) -> Iterator[None]:
    """Within it, a quantizer passes on what it gets: that was stored on its grid before."""
    before = quantizer.__dict__.get('forward')
    quantizer.forward = lambda x: x
    try:
        yield
    finally:
        del quantizer.forward
        if before is not None:
            quantizer.forward = before


@contextmanager
def in_units(layer, units: list[float]) -> Iterator[None]:
    """Within it, a quantized linear layer puts out its values divided by a unit for each output channel, for nothing:
    scales of weight and bias take them in.
    """
    layer.units = torch.tensor(units)
    try:
        yield
    finally:
        del layer.units


def _dequantized(g, integers, scale, axis):
    kind = torch.int32 if integers.type().scalarType() == 'Int' else torch.int8
    grid = torch.tensor(scale), torch.zeros(len(scale), dtype=kind)
    return g.op('DequantizeLinear', integers, *(g.op('Constant', value_t=value) for value in grid), axis_i=axis)


class Dequantize(Operator):
    """A weight, which is stored as integers, through DequantizeLinear."""

    @staticmethod
    def forward(ctx, integers, scale, axis):
        return integers.float() * _along(scale, torch.float32, axis, integers.dim())

    @staticmethod
    def symbolic(g, integers, scale, axis):
        return _dequantized(g, integers, scale, axis)


class Linear(Operator):
    """A linear layer on integers: the weight is stored as the product takes it, (in, out), not to be transposed.

    ``one_layer`` is whether product and bias are to be written as MatMul and Add, whatever the type of the bias.
    """

    @staticmethod
    def forward(ctx, x, integers, scale, bias, one_layer):
        return F.linear(x, integers.T.float() * torch.tensor(scale)[:, None], bias)

    @staticmethod
    def symbolic(g, x, integers, scale, bias, one_layer):
        product = g.op('MatMul', x, _dequantized(g, integers, scale, 1))
        if bias is None:
            return product
        if one_layer or bias.node().kind() == 'onnx::DequantizeLinear':
            return g.op('Add', product, bias)
        # ONNX Runtime makes a sum with a bias in float one operator with the product, which then runs in float.
        return g.op('Sub', product, g.op('Neg', bias))


def integers_of(quantizer: FakeQuantizer, weight: Tensor) -> Tensor:
    """A weight on its symmetric grid, int8."""
    return _rounded(weight, *_grid(quantizer, quantizer.axis))
