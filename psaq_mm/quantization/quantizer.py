"""The fake-quantizer: rounds a tensor to an integer grid in the forward pass, lets gradients through inside it."""
from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from ..errors import UserError
from .observers import affine_parameters, build_observer, quantization_grid

CHUNK = 1 << 17  # values at a time, which stay in the cache from pass to pass; measured, our choice


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
                '-> (Tensor, Tensor)')


def _fake_quantize(x, scale, zero_point, axis, quant_min, quant_max):
    shape = [1] * x.dim()
    if scale.numel() > 1:
        shape[axis] = -1
    x, scale = x.contiguous(), scale.view(shape)
    if zero_point.numel() == 1 or not zero_point.any():  # the latter: of symmetric quantization
        low, high = (end - zero_point[0].item() for end in (quant_min, quant_max))
    else:
        low, high = ((end - zero_point).float().view(shape) for end in (quant_min, quant_max))
    rounded, outside = torch.empty_like(x), []
    if scale.numel() > 1:  # a weight, mostly: small
        parts = [(x, rounded)]
    else:
        parts, scale = list(zip(x.view(-1).split(CHUNK), rounded.view(-1).split(CHUNK))), scale.view(1)
    inverse, integers = scale.reciprocal(), torch.empty_like(parts[0][0])
    for number, (source, target) in enumerate(parts):
        part = torch.mul(source, inverse, out=integers[:len(source)]).round_()
        lowest, highest = torch.aminmax(part)
        if isinstance(low, Tensor) or not (lowest >= low and highest <= high):
            torch.clamp(part, low, high, out=target)
            outside.append(target.ne(part).flatten().nonzero().flatten() + number * CHUNK)
            target.mul_(scale)
        else:
            torch.mul(part, scale, out=target)
    return rounded, torch.cat(outside) if outside else torch.empty(0, dtype=torch.int64)


_library.impl('fake_quantize', _fake_quantize, 'CPU')


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int,
                  quant_max: int) -> tuple[Tensor, Tensor]:
    """What torch's fused ``fake_quantize_*`` ops compute, bit for bit, in vectorised passes over what fits the cache.

    On CPU torch's own (2.13) work value by value, several times slower. Has no gradient of its own. Source: our choice.

    Args:
        x (Tensor): float32, on CPU.
        scale, zero_point (Tensor): (channels,), or (1,) for per-tensor.
        axis (int): The axis that scales run along where there are several.
        quant_min, quant_max (int): Ends of the grid.

    Returns:
        tuple[Tensor, Tensor]: The rounded values, contiguous, and the places of those outside the grid, mostly few or
        none: (K,) int64, counted along the flattened tensor.
    """
    return torch.ops.psaq_mm.fake_quantize(x.detach(), scale, zero_point, axis, quant_min, quant_max)


class _StraightThrough(torch.autograd.Function):
    """:func:`fake_quantize` with gradient 1 inside the grid and 0 outside."""

    @staticmethod
    def forward(ctx, x, *parameters):
        rounded, outside = fake_quantize(x, *parameters)
        ctx.save_for_backward(outside)
        return rounded

    @staticmethod
    def backward(ctx, grad):
        outside, = ctx.saved_tensors
        if len(outside):  # the gradient that comes in is not ours to change
            grad = zero_at(grad.clone(memory_format=torch.contiguous_format), outside)
        return grad, None, None, None, None, None


def zero_at(grad: Tensor, outside: Tensor) -> Tensor:
    """Sets a contiguous gradient to zero at places counted along the flattened tensor, in place."""
    if len(outside):
        grad.view(-1).index_fill_(0, outside, 0)
    return grad


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
            value = _StraightThrough.apply(value, *self.parameters_for(x))
        elif self.per_channel:
            value = torch.fake_quantize_per_channel_affine(value, *self.parameters_for(x))
        else:
            value = torch.fake_quantize_per_tensor_affine(value, self.scale, self.zero_point, self.quant_min,
                                                          self.quant_max)
        return value.to(x.dtype)

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
        return self.scale, self.zero_point, self.axis % x.dim(), self.quant_min, self.quant_max

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Shows the observer one batch, any shape."""
        if self.observer is None:
            self.observer = build_observer(self.config)
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
