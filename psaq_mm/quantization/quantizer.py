"""The fake-quantizer: rounds a tensor to an integer grid in the forward pass, lets gradients through inside it."""
from __future__ import annotations

from enum import Enum

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from .kernels import fake_quantize, fake_quantize_backward
from .observers import affine_parameters, build_observer, quantization_grid


class UncalibratedError(UserError):
    """A quantizer was asked to quantize before it knew its scale."""


class QuantizerMismatchError(UserError):
    """A checkpoint's quantizers are not the ones the model was built with."""


def describe(grid, scales: int) -> str:
    """An integer grid in words."""
    low, high = grid
    return f'{low}..{high} ({(high - low).bit_length()} bits, {scales} scale{"s" * (scales > 1)})'


class Rounding:
    """Rounds one tensor inside an autograd function, and finds the gradients of its values and of a learned range.

    The function keeps the values as they came (of a weight that is no memory at all) and rounds them again in the
    backward pass.

    Args:
        quantizer (FakeQuantizer | None): Without one, or with one that does not round at present, nothing happens.
        x (Tensor): With as many dimensions as the values.
    """

    def __init__(self, quantizer, x: Tensor):
        self.quantizer, self.grid, self.stretch = quantizer, None, None
        if quantizer is not None and quantizer.mode is Mode.QUANTIZE:
            if quantizer.stretch is not None and quantizer.stretch.requires_grad:
                self.stretch = quantizer.stretch  # an argument of the function, which finds its gradient
            with torch.no_grad():
                self.grid = quantizer.parameters_for(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded values; what to keep of them."""
        if self.quantizer is None or not self.quantizer.rounds(x):
            return x, x
        x = x.contiguous()  # what is kept is no part of something larger
        return fake_quantize(x, *self.grid), x

    def again(self, kept: Tensor) -> Tensor:
        """The rounded values, in the backward pass."""
        return kept if self.grid is None else fake_quantize(kept, *self.grid)

    def gradients(self, grad: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the values and the range, see :func:`fake_quantize_backward`.

        Args:
            grad (Tensor): Of the rounded values, contiguous; overwritten.
            kept (Tensor): From :meth:`forward`.
        """
        if self.grid is None:
            return grad, None
        learned = self.stretch is not None
        of_grid = fake_quantize_backward(grad, kept, *self.grid, learned)
        return grad, self.quantizer.stretch_gradient(*of_grid) if learned else None


class _StraightThrough(torch.autograd.Function):
    """:func:`fake_quantize` with gradient 1 inside the grid and 0 outside, and those of :class:`Rounding`."""

    @staticmethod
    def forward(ctx, x, rounding, stretch):
        rounded, kept = rounding.forward(x)
        ctx.rounding = rounding
        ctx.save_for_backward(kept)
        return rounded

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # that which comes in is not ours to change
        grad, of_range = ctx.rounding.gradients(grad, *ctx.saved_tensors)
        return grad, None, of_range


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
        optional (bool): Whether one scale for all serves where tensors turn out to have no such axis of so many
            channels; calibration finds out, and a checkpoint says. Defaults to False.

    State: ``scale`` (channels,) float32, NaN until calibrated; ``zero_point`` (channels,) int32; ``grid`` (2,) int32,
    quant_min and quant_max.
    """

    def __init__(self, config, channels: int = 1, axis: int = 0, optional: bool = False):
        super().__init__()
        self.config = config
        self.axis = axis
        self.optional = optional
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
            value = _StraightThrough.apply(value, rounding, rounding.stretch)
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
        if self.stretch.device.type == 'cpu' and not torch.is_grad_enabled():
            scale, zero_point = self.stretched(*self.as_arrays())
            return torch.from_numpy(scale), torch.from_numpy(zero_point.round())
        scale, zero_point = self.stretched(self.stretch.exp(), self.scale, self.zero_point.float())
        return scale, zero_point + (zero_point.round() - zero_point).detach()

    def as_arrays(self) -> tuple:
        """Factors of the ends, scale and zero point for NumPy, which takes a tenth of torch's time on so few values."""
        return np.exp(self.stretch.detach().numpy()), self.scale.numpy(), self.zero_point.numpy().astype(np.float32)

    def stretched(self, factors, scale, zero_point) -> tuple:
        """Scale and zero point, not rounded, of a range whose ends move by factors; arrays or tensors."""
        if self.config.symmetric:
            return scale * factors[0], zero_point
        low, high = ((end - zero_point) * factor for end, factor in zip((self.quant_min, self.quant_max), factors))
        growth = (high - low) / (self.quant_max - self.quant_min)  # low and high in units of the old scale
        return scale * growth, self.quant_min - low / growth

    def stretch_gradient(self, of_scale: Tensor, of_zero_point: Tensor) -> Tensor:
        """From gradients of :meth:`affine`, (channels,) each, to that of ``stretch``; on CPU."""
        factors, scale, zero_point = self.as_arrays()
        of_scale, of_zero_point = of_scale.numpy() * scale, of_zero_point.numpy()
        if self.config.symmetric:
            return torch.from_numpy((of_scale * factors[0])[None])
        steps = self.quant_max - self.quant_min
        low, high = (self.quant_min - zero_point) * factors[0], (self.quant_max - zero_point) * factors[1]
        of_scale, of_zero_point = of_scale / steps, of_zero_point * steps / (high - low)**2
        return torch.from_numpy(np.stack([-low * (of_scale + of_zero_point * high),
                                          high * (of_scale + of_zero_point * low)]))

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
        if self.per_channel and self.optional and (x.dim() <= -self.axis or x.shape[self.axis] != len(self.scale)):
            self.keep_one_scale()
        rows = x.movedim(self.axis % x.dim(), 0).flatten(1) if self.per_channel else x.reshape(1, -1)
        self.observer.update(rows.float())

    @property
    def merged(self) -> bool:
        """Whether one scale serves all channels where the settings ask for one each."""
        return self.optional and self.config.granularity == 'per_channel' and not self.per_channel

    def keep_one_scale(self) -> None:
        """Go on with one scale for all channels."""
        self.per_channel = False
        self.scale, self.zero_point = self.scale[:1].clone(), self.zero_point[:1].clone()

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
        if self.optional and self.per_channel and state_dict[keys[0]].numel() == 1:
            self.keep_one_scale()
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
        granularity = 'per_channel' if self.per_channel else 'per_tensor'
        return f'bits={self.config.bits}, {granularity}, {kind}, calibrated={self.calibrated}'
