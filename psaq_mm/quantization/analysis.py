"""Where a quantized model loses precision: layer by layer, on images.

SQNR, the signal-to-quantization-noise ratio, is the usual measure: 10 log10(sum of squares / sum of squared errors), in
dB; a bit more is about 6 dB more. A layer's own is that of its output when it alone rounds, its input being what it is
in the quantized model.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .conversion import quantized_layers, quantizer_mode, quantizers
from .hooks import hooked
from .layers import QuantizedMatMul
from .quantizer import FakeQuantizer, Mode

WEIGHT, ACTIVATION = 'weight', 'activation'
OPERANDS = ('input_quantizer', 'weight_quantizer', 'a_quantizer', 'b_quantizer')
CEILING = 120.0  # dB; float32 itself has about 150, and nothing that is rounded comes near


def sqnr(power: float, noise: float) -> float:
    """Decibels of two sums of squares, at most 120."""
    if power <= 0:
        return CEILING if noise <= 0 else 0.0
    return CEILING if noise <= 0 else min(CEILING, 10 * math.log10(power / noise))


@dataclass
class OperandError:
    """What one quantizer does to what it sees: its range, what it saw, and how much of that lies outside."""
    bits: int
    low: float
    high: float
    seen_low: float = math.inf
    seen_high: float = -math.inf
    power: float = 0.0
    noise: float = 0.0
    outside: int = 0
    count: int = 0

    @property
    def sqnr(self) -> float:
        """dB."""
        return sqnr(self.power, self.noise)

    @property
    def clipped(self) -> float:
        """Share of the values beyond the ends of the range."""
        return self.outside / max(self.count, 1)

    def see(self, before: Tensor, after: Tensor, low: Tensor, high: Tensor) -> None:
        """Takes note of values before and after rounding; the range's ends are of the same shape or broadcast."""
        before, after = before.detach().float(), after.detach().float()
        self.seen_low = min(self.seen_low, before.min().item())
        self.seen_high = max(self.seen_high, before.max().item())
        self.power += before.square().sum(dtype=torch.float64).item()
        self.noise += (after - before).square().sum(dtype=torch.float64).item()
        self.outside += int(((before < low) | (before > high)).sum())
        self.count += before.numel()


@dataclass
class LayerError:
    """One quantized layer or product."""
    name: str
    kind: str
    power: float = 0.0
    noise: float = 0.0
    operands: dict[str, OperandError] = field(default_factory=dict)

    @property
    def sqnr(self) -> float:
        """Of the output, in dB, when this layer alone rounds."""
        return sqnr(self.power, self.noise)

    def to_dict(self) -> dict:
        """Plain numbers: what goes to JSON and to the report."""
        operands = {key: dict(bits=o.bits, low=o.low, high=o.high, seen_low=o.seen_low, seen_high=o.seen_high,
                              sqnr=round(o.sqnr, 2), clipped=o.clipped) for key, o in self.operands.items()}
        return dict(name=self.name, kind=self.kind, sqnr=round(self.sqnr, 2), operands=operands)


def quantizer_range(quantizer: FakeQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of a calibrated quantizer's range, half a step beyond the outermost integers, to broadcast to x."""
    scale, zero_point = quantizer.affine()
    low, high = (scale * (end + side - zero_point) for end, side in ((quantizer.quant_min, -0.5),
                                                                      (quantizer.quant_max, 0.5)))
    if quantizer.per_channel:
        shape = [1] * x.dim()
        shape[quantizer.axis % x.dim()] = -1
        low, high = low.view(shape), high.view(shape)
    return low, high


@torch.no_grad()
def layer_errors(model: nn.Module, run: Callable[[], None]) -> list[LayerError]:
    """Measures every quantized layer and product while ``run`` feeds the model.

    Args:
        model (nn.Module): Converted and calibrated; quantizers in mode QUANTIZE.
        run (Callable): Feeds images through the model.

    Returns:
        list[LayerError]: In order of definition; without those that saw nothing. Source: ours.
    """
    found = {name: LayerError(name, 'product' if isinstance(layer, QuantizedMatMul) else _kind(layer))
             for name, layer in quantized_layers(model).items()}
    handles = []

    def of_layer(error):
        def hook(layer, inputs, output):
            with quantizer_mode(layer, Mode.FLOAT):
                exact = type(layer).forward(layer, *inputs)
            exact, output = _joined(exact).float(), _joined(output).float()
            error.power += exact.square().sum(dtype=torch.float64).item()
            error.noise += (output - exact).square().sum(dtype=torch.float64).item()
        return hook

    def of_operand(error, key):
        def hook(quantizer, inputs, output):
            if quantizer.mode is not Mode.QUANTIZE:
                return
            low, high = quantizer_range(quantizer, inputs[0])
            if key not in error.operands:
                error.operands[key] = OperandError(quantizer.config.bits, low.min().item(), high.max().item())
            elif key == 'weight':  # does not change from image to image
                return
            error.operands[key].see(inputs[0], output, low, high)
        return hook

    layers = quantized_layers(model)
    for name, quantizer in quantizers(model).items():
        owner, _, part = name.rpartition('.')
        if owner in found and part in OPERANDS:
            handles.append(quantizer.register_forward_hook(of_operand(found[owner], part.removesuffix('_quantizer'))))
    handles += [layer.register_forward_hook(of_layer(found[name])) for name, layer in layers.items()]
    with hooked(handles):
        run()
    return [error for error in found.values() if error.operands]


def _joined(output) -> Tensor:
    """Return the output of a layer as one tensor; the input projection of a MultiheadAttention has one for each input.
    """
    return output if isinstance(output, Tensor) else torch.cat([part.flatten() for part in output])


def _kind(layer):
    return 'convolution' if layer.weight.dim() == 4 else 'linear'


def parts_of(model: nn.Module) -> dict[tuple[str, str], list[FakeQuantizer]]:
    """Quantizers by (layer or product, 'weight' or 'activation'), in order of definition."""
    parts = {}
    for name, layer in quantized_layers(model).items():
        for key, quantizer in layer.named_children():
            if isinstance(quantizer, FakeQuantizer) and key in OPERANDS:
                side = WEIGHT if key == 'weight_quantizer' else ACTIVATION
                parts.setdefault((name, side), []).append(quantizer)
    return parts


def relative_error(reference: list[Tensor], found: list[Tensor]) -> float:
    """Squared error over squares of each map, mean over the maps."""
    terms = [((p.float() - q.float()).square().sum() / p.float().square().sum().clamp(min=1e-30)).item()
             for p, q in zip(reference, found)]
    return sum(terms) / len(terms)


@torch.no_grad()
def sensitivities(model: nn.Module, outputs: Callable[[Tensor], list[Tensor]], batches: list[Tensor],
                  skip: Collection[tuple[str, str]] = ()) -> Iterator[tuple[tuple[str, str], float]]:
    """What rounding one side of one layer costs the outputs, everything else in float.

    Args:
        model (nn.Module): Converted and calibrated.
        outputs (Callable): Images (B, C, H, W) to the maps that count.
        batches (list[Tensor]): Images.
        skip (Collection): Parts that are known already.

    Yields:
        tuple[tuple[str, str], float]: (layer, 'weight' or 'activation') and :func:`relative_error`, mean over batches.
        Source: the usual one-at-a-time analysis of mixed-precision work; the measure is our choice.
    """
    parts = {key: own for key, own in parts_of(model).items() if key not in skip}
    if not parts:
        return
    with quantizer_mode(model, Mode.FLOAT):
        references = [outputs(batch) for batch in batches]
        for key, own in parts.items():
            for quantizer in own:
                quantizer.mode = Mode.QUANTIZE
            error = sum(relative_error(reference, outputs(batch)) for reference, batch in zip(references, batches))
            for quantizer in own:
                quantizer.mode = Mode.FLOAT
            yield key, error / len(batches)


@torch.no_grad()
def output_error(model: nn.Module, outputs: Callable[[Tensor], list[Tensor]], batches: list[Tensor]) -> float:
    """:func:`relative_error` of the whole quantized model, mean over batches."""
    errors = []
    for batch in batches:
        found = outputs(batch)
        with quantizer_mode(model, Mode.FLOAT):
            errors.append(relative_error(outputs(batch), found))
    return sum(errors) / len(errors)


@torch.no_grad()
def multiplications(model: nn.Module, run: Callable[[], None]) -> dict[str, int]:
    """Multiply-accumulate operations of each quantized layer and product while ``run`` feeds the model."""
    counts, handles = {}, []

    def hook_of(name):
        def hook(layer, inputs, output):
            if isinstance(layer, QuantizedMatMul):
                inner = inputs[0].shape[-1]
            elif layer.weight.dim() == 4:
                # of a transposed convolution the weight is (in, out / groups, h, w), and each input takes part so often
                transposed = isinstance(layer, nn.ConvTranspose2d)
                inner = layer.weight[0].numel()
                output = inputs[0] if transposed else output
            else:
                inner = layer.weight.shape[1]
            counts[name] = counts.get(name, 0) + _joined(output).numel() * inner
        return hook

    for name, layer in quantized_layers(model).items():
        handles.append(layer.register_forward_hook(hook_of(name)))
    with hooked(handles):
        run()
    return counts
