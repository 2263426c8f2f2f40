"""Quantizers between layers: of the residual sums of attention blocks, and of what a layer puts out."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .config import ActivationConfig
from .quantizer import FakeQuantizer

SUMS = ('attention_sum', 'mlp_sum')
OUTPUT = 'output'
ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


def quantizer_of(part: str) -> str:
    """Name of the attribute that quantizes a part."""
    return f'{part}_quantizer'


class _SumRedirection(TorchFunctionMode):
    """Sends what a block's two residual additions yield through its quantizers, in order.

    They are told from other additions by their operands: both hold as many values as the block's input, in as many
    channels.
    """

    def __init__(self, block, stream):
        super().__init__()
        self.block, self.size, self.channels = block, stream.numel(), stream.shape[-1]
        self.calls = 0

    def is_stream(self, value):
        return isinstance(value, Tensor) and value.numel() == self.size and value.shape[-1] == self.channels

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in ADDITIONS or not all(map(self.is_stream, args[:2])):
            return result
        self.calls += 1
        quantizer = getattr(self.block, quantizer_of(SUMS[self.calls - 1]), None) if self.calls <= 2 else None
        return result if quantizer is None else quantizer(result)

    def __exit__(self, kind, value, traceback):
        super().__exit__(kind, value, traceback)
        if kind is None and self.calls != 2:
            raise UserError(f'{type(self.block).__mro__[2].__name__}.forward makes {self.calls} visible residual '
                            'additions, an attention block makes 2: psaq_mm cannot quantize them; set '
                            "quantization.placement = 'operands'.")


class QuantizedResidual:
    """Mixed in front of a block's class: both sums are rounded in the library's own forward."""

    def forward(self, x, *args, **kwargs):
        with _SumRedirection(self, x):
            return super().forward(x, *args, **kwargs)


_block_classes: dict[type, type] = {}


def quantize_residual(block: nn.Module, configs: dict[str, ActivationConfig]) -> nn.Module:
    """Makes residual sums of an attention block quantized, in place.

    Args:
        block (nn.Module): Its forward takes the stream (B, ..., C) first and makes two residual additions.
        configs (dict[str, ActivationConfig]): By part, of SUMS; one that is not in here stays in float.
    """
    kind = type(block)
    if kind not in _block_classes:
        _block_classes[kind] = type(f'Residual{kind.__name__}', (QuantizedResidual, kind), dict(__module__=__name__))
    block.__class__ = _block_classes[kind]
    for part, config in configs.items():
        block.add_module(quantizer_of(part), _per_tensor(config))
    return block


def quantize_output(layer: nn.Module, config: ActivationConfig) -> nn.Module:
    """Makes what a layer puts out quantized, in place."""
    layer.add_module(quantizer_of(OUTPUT), _per_tensor(config))
    layer.register_forward_hook(_round_output)
    return layer


def _round_output(layer, inputs, output):
    return getattr(layer, quantizer_of(OUTPUT))(output)


def _per_tensor(config):
    return FakeQuantizer(config.model_copy(update=dict(granularity='per_tensor')))
