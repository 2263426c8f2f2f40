"""The fake-quantizer: rounds a tensor to an integer grid in the forward pass, lets gradients through inside it."""
from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from ..errors import UserError
from .observers import affine_parameters, build_observer, quantization_grid

CHUNK = 1 << 18  # values at a time, which stay in the cache from pass to pass; measured, our choice


class UncalibratedError(UserError):
    """A quantizer was asked to quantize before it knew its scale."""


class QuantizerMismatchError(UserError):
    """A checkpoint's quantizers are not the ones the model was built with."""


def describe(grid, scales: int) -> str:
    """An integer grid in words."""
    low, high = grid
    return f'{low}..{high} ({(high - low).bit_length()} bits, {scales} scale{"s" * (scales > 1)})'


_library = torch.library.Library('psaq_mm', 'FRAGMENT')
_library.define('fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max) '
                '-> Tensor')


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

    def total(self, a, b):
        """Sum of a product over what shares a scale."""
        return torch.dot(a, b) if self.per_tensor else (a * b).sum(self.others, keepdim=True)


def _fake_quantize(x, scale, zero_point, axis, quant_min, quant_max):
    x = x.contiguous()
    rounded, grid = torch.empty_like(x), _Grid(scale, zero_point, axis, quant_min, quant_max, x.shape)
    for source, target, scale, inverse, low, high in grid.pieces(x, rounded):
        torch.mul(source, inverse, out=target).round_().clamp_(low, high).mul_(scale)
    return rounded


_library.impl('fake_quantize', _fake_quantize, 'CPU')


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:
    """What torch's fused ``fake_quantize_*`` ops compute, bit for bit, in vectorised passes over what fits the cache.

    On CPU torch's own (2.13) work value by value, several times slower. Has no gradient of its own. Source: our choice.

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
                           quant_max: int, learned: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradient of the rounded values to that of the values and, where they are learned, of the range.

    With ``v = scale * (clamp(round(x / scale + zero_point)) - zero_point)`` and straight-through rounding, the gradient
    passes inside the grid and is 0 outside; the derivative by the scale is ``(v - x) / scale`` inside and ``v / scale``
    outside, by the zero point ``-scale`` outside. In passes without booleans, which torch does not vectorise.
    Source: LSQ and LSQ+.

    Args:
        grad (Tensor): Of the rounded values, contiguous; overwritten with that of the values.
        x (Tensor): The values, contiguous.
        scale, zero_point, axis, quant_min, quant_max: As of :func:`fake_quantize`.
        learned (bool): Whether scale and zero point need gradients.

    Returns:
        tuple[Tensor, Tensor | None, Tensor | None]: Gradients of values, scale and zero point.
    """
    grid = _Grid(scale, zero_point, axis, quant_min, quant_max, x.shape)
    errors, beyond = torch.zeros_like(grid.scale), torch.zeros_like(grid.scale)
    scratch = None
    for grads, values, scale, inverse, low, high, error, out in grid.pieces(grad, x, sums=(errors, beyond)):
        if scratch is None:
            scratch = [torch.empty_like(values) for _ in range(3 if learned else 2)]
        integers, rounded, *rest = (buffer[:len(values)] for buffer in scratch)
        torch.mul(values, inverse, out=integers).round_()
        torch.clamp(integers, low, high, out=rounded)
        clipped = integers.sub_(rounded).view(-1)
        all_inside = torch.dot(clipped, clipped).item() == 0
        inside = integers if all_inside else integers.eq_(0)
        if learned:
            error += grid.total(grads, rounded.mul_(scale).sub_(values))
        if not all_inside and learned:
            inside = torch.mul(grads, inside, out=rest[0])
            grads -= inside
            error += grid.total(grads, values)
            out += grads.sum() if grid.per_tensor else grads.sum(grid.others, keepdim=True)
            grads.copy_(inside)
        elif not all_inside:
            grads *= inside
    if not learned:
        return grad, None, None
    return grad, (errors / grid.scale).view(-1), (-grid.scale * beyond).view(-1)


class Rounding:
    """Rounds one tensor inside an autograd function, and finds the gradients of its values, scale and zero point.

    The function keeps the values as they came (of a weight that is no memory at all) and rounds them again in the
    backward pass.

    Args:
        quantizer (FakeQuantizer | None): Without one, or with one that does not round at present, nothing happens.
        x (Tensor): With as many dimensions as the values.
    """

    def __init__(self, quantizer, x: Tensor):
        self.quantizer = quantizer
        rounds = quantizer is not None and quantizer.mode is Mode.QUANTIZE
        self.grid = quantizer.parameters_for(x) if rounds else None
        self.learned = self.grid is not None and self.grid[0].requires_grad

    @property
    def parameters(self) -> tuple:
        """Scale and zero point, which the autograd function takes as arguments, to be able to give them gradients."""
        return self.grid[:2] if self.grid else (None, None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded values; what to keep of them."""
        if self.quantizer is None or not self.quantizer.rounds(x):
            return x, x
        x = x.contiguous()  # what is kept is no part of something larger
        return fake_quantize(x, *self.grid), x

    def again(self, kept: Tensor) -> Tensor:
        """The rounded values, in the backward pass."""
        return kept if self.grid is None else fake_quantize(kept, *self.grid)

    def gradients(self, grad: Tensor, kept: Tensor) -> tuple:
        """Gradients of the values, the scale and the zero point, see :func:`fake_quantize_backward`.

        Args:
            grad (Tensor): Of the rounded values, contiguous; overwritten.
            kept (Tensor): From :meth:`forward`.
        """
        if self.grid is None:
            return grad, None, None
        grad, scale_grad, zero_grad = fake_quantize_backward(grad, kept, *self.grid, self.learned)
        return grad, scale_grad, zero_grad if self.grid[1].requires_grad else None


class _StraightThrough(torch.autograd.Function):
    """:func:`fake_quantize` with gradient 1 inside the grid and 0 outside, and those of :class:`Rounding`."""

    @staticmethod
    def forward(ctx, x, rounding, *parameters):
        rounded, kept = rounding.forward(x)
        ctx.rounding = rounding
        ctx.save_for_backward(kept)
        return rounded

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # that which comes in is not ours to change
        grad, *parameters = ctx.rounding.gradients(grad, *ctx.saved_tensors)
        return grad, None, *parameters


class Mode(Enum):
    """What a quantizer does with a tensor."""
    FLOAT = 'float'  # nothing: the full-precision model
    OBSERVE = 'observe'  # nothing, but its observer looks on
    QUANTIZE = 'quantize'  # round to the grid


class FakeQuantizer(nn.Module):
    """Simulates integers of 2 to 8 bits on torch's fused ``fake_quantize_*`` ops, on CPU on :func:`fake_quantize`.

    ``forward(x) == scale * (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point)``, with gradient 1
    for x inside the grid and 0 outside (straight-through estimator).

    Args:
        config (WeightConfig | ActivationConfig): Bits, granularity, symmetry, observer.
        channels (int): Number of scales: 1 for per-tensor.
        axis (int): The axis that scales run along when ``channels > 1``. Defaults to 0.

    State: ``scale`` (channels,) float32, NaN until calibrated; ``zero_point`` (channels,) int32; ``grid`` (2,) int32,
    quant_min and quant_max.
    """

    def __init__(self, config, channels: int = 1, axis: int = 0):
        super().__init__()
        self.config = config
        self.axis = axis
        self.per_channel = config.granularity == 'per_channel' and channels > 1
        self.quant_min, self.quant_max = quantization_grid(config.bits, config.symmetric)
        self.mode = Mode.QUANTIZE
        self.name = ''  # the quantizer's path in the model, for errors; set by the conversion
        self.observer = None
        self.calibrated = False
        self.stretch = None  # see learn_range
        count = channels if self.per_channel else 1
        self.register_buffer('scale', torch.full((count, ), float('nan')))
        self.register_buffer('zero_point', torch.zeros(count, dtype=torch.int32))
        self.register_buffer('grid', torch.tensor([self.quant_min, self.quant_max], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape.

        Raises:
            UncalibratedError: In mode QUANTIZE without a scale.
        """
        if not self.rounds(x):
            return x
        value = x.float()  # the kernels want float32; under autocast x may be bfloat16
        if value.device.type == 'cpu':
            rounding = Rounding(self, value)
            value = _StraightThrough.apply(value, rounding, *rounding.parameters)
        else:
            value = self.torchs(value)
        return value.to(x.dtype)

    def torchs(self, x: Tensor) -> Tensor:
        """:meth:`forward` on float32 by torch's own ops: on any device, on CPU slower than ours."""
        scale, zero_point, axis, quant_min, quant_max = self.parameters_for(x)
        if self.stretch is not None:
            axes, kind = ((axis, ), 'channel') if self.per_channel else ((), 'tensor')
            op = getattr(torch, f'_fake_quantize_learnable_per_{kind}_affine')
            return op(x, scale, zero_point.float(), *axes, quant_min, quant_max)
        if self.per_channel:
            return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, quant_min, quant_max)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)

    def rounds(self, x: Tensor) -> bool:
        """Whether values are to be rounded in the present mode; lets the observer see them if not.

        Raises:
            UncalibratedError: In mode QUANTIZE without a scale.
        """
        if self.mode is Mode.OBSERVE:
            self.observe(x)
        if self.mode is not Mode.QUANTIZE:
            return False
        if not self.calibrated:
            raise UncalibratedError(
                f"'{self.name}' is quantized but not calibrated: its scale is unknown, so predictions would be "
                'meaningless. Run tools/dfq.py on the config and load the quantized checkpoint it writes '
                '(a full-precision checkpoint has no scales).')
        return True

    def parameters_for(self, x: Tensor) -> tuple:
        """Arguments of :func:`fake_quantize` behind the tensor."""
        return *self.affine(), self.axis % x.dim(), self.quant_min, self.quant_max

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point in force, (channels,) each; functions of ``stretch`` while the range is learned."""
        if self.stretch is None:
            return self.scale, self.zero_point
        factors = self.stretch.exp()
        if self.config.symmetric:
            return self.scale * factors[0], self.zero_point
        low, high = ((end - self.zero_point) * factor for end, factor in zip((self.quant_min, self.quant_max), factors))
        growth = (high - low) / (self.quant_max - self.quant_min)  # low and high in units of the old scale
        zero_point = self.quant_min - low / growth
        return self.scale * growth, zero_point + (zero_point.round() - zero_point).detach()

    def learn_range(self) -> Tensor:
        """Makes the ends of the range trainable, until :meth:`fix_range`.

        Returns:
            Tensor: ``stretch``, logarithms of the factors that the ends move by: (2, channels), low and high, zeros at
            first; (1, channels) for symmetric quantization. No part of the state dict.
        """
        self.stretch = self.scale.new_zeros(1 if self.config.symmetric else 2, len(self.scale)).requires_grad_()
        return self.stretch

    @torch.no_grad()
    def fix_range(self) -> None:
        """Makes scale and zero point what was learned."""
        scale, zero_point = self.affine()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.stretch = None

    @torch.no_grad()
    def observe(self, x: Tensor, observer: str | None = None) -> None:
        """Shows the observer one batch, any shape.

        Args:
            x (Tensor): The batch.
            observer (str, optional): Another one than the config's.
        """
        if self.observer is None:
            self.observer = build_observer(self.config, observer)
        x = x.detach()
        rows = x.movedim(self.axis % x.dim(), 0).flatten(1) if self.per_channel else x.reshape(1, -1)
        self.observer.update(rows.float())

    @torch.no_grad()
    def calibrate(self, reduce=None) -> bool:
        """Turns what the observer saw into scale and zero point, and forgets it.

        Args:
            reduce (callable, optional): ``reduce(low, high, merge) -> (low, high)`` joins the ranges of several
                processes; ``merge`` is the observer's 'extreme' or 'mean'.

        Returns:
            bool: Whether there was anything to turn.

        Raises:
            UserError: If the range is not finite.
        """
        if self.observer is None:
            return False
        low, high = self.observer.range()
        if reduce is not None:
            low, high = reduce(low, high, self.observer.merge)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise UserError(f"'{self.name}' saw NaN or infinite values during calibration: the full-precision model "
                             'produces them on the calibration images. Check the checkpoint.')
        scale, zero_point = affine_parameters(low, high, self.config.bits, self.config.symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.observer = None
        self.calibrated = True
        return True

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs):
        # A full-precision checkpoint has none of these keys: it loads cleanly and leaves the quantizer uncalibrated.
        keys = [prefix + name for name in ('scale', 'zero_point', 'grid')]
        if not any(key in state_dict for key in keys):
            return
        missing = [key for key in keys if key not in state_dict]
        if missing:
            raise QuantizerMismatchError(f'the checkpoint is damaged: it lacks {missing[0]}')
        theirs, ours = ((state[keys[2]].tolist(), state[keys[0]].numel())
                        for state in (state_dict, {prefix + k: v for k, v in self.state_dict().items()}))
        if theirs != ours:
            raise QuantizerMismatchError(
                f"the checkpoint quantizes '{self.name or prefix[:-1]}' to the integers {describe(*theirs)}, the "
                f'config says {describe(*ours)}: use the test config beside the checkpoint, or correct quantization.')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)
        self.calibrated = bool(torch.isfinite(self.scale).all())

    def extra_repr(self):
        kind = 'symmetric' if self.config.symmetric else 'asymmetric'
        return f'bits={self.config.bits}, {self.config.granularity}, {kind}, calibrated={self.calibrated}'
