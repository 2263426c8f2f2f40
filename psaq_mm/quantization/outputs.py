"""What blocks and layers put out on integers, too: placement 'all', for hardware that keeps every tensor so."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .config import ActivationConfig
from .quantizer import FakeQuantizer

SUMS = ('attention_sum_quantizer', 'mlp_sum_quantizer')
ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


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
        return result if self.calls > 2 else getattr(self.block, SUMS[self.calls - 1])(result)

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


def quantize_residual(block: nn.Module, config: ActivationConfig) -> nn.Module:
    """Makes both residual sums of an attention block quantized, in place.

    Args:
        block (nn.Module): Its forward takes the stream (B, ..., C) first and makes two residual additions.
        config (ActivationConfig): Of both sums, one scale each.
    """
    kind = type(block)
    if kind not in _block_classes:
        _block_classes[kind] = type(f'Residual{kind.__name__}', (QuantizedResidual, kind), dict(__module__=__name__))
    block.__class__ = _block_classes[kind]
    for name in SUMS:
        block.add_module(name, FakeQuantizer(config.model_copy(update=dict(granularity='per_tensor'))))
    return block


def quantize_output(layer: nn.Module, config: ActivationConfig) -> nn.Module:
    """Makes what a layer puts out quantized, in place; one scale."""
    layer.add_module('output_quantizer', FakeQuantizer(config.model_copy(update=dict(granularity='per_tensor'))))
    layer.register_forward_hook(lambda module, inputs, output: module.output_quantizer(output))
    return layer
