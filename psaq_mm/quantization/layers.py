"""Quantized counterparts of Linear, Conv2d and the matrix products of attention."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .config import LayerConfig
from .quantizer import FakeQuantizer


class QuantizedLayer:
    """What quantized Linear and Conv2d share: one quantizer for the input, one for the weight."""
    input_quantizer: FakeQuantizer | None
    weight_quantizer: FakeQuantizer | None

    def add_quantizers(self, config: LayerConfig, in_channels: int, out_channels: int, input_axis: int):
        self.input_quantizer = self.weight_quantizer = None
        if config.activation is not None:
            self.input_quantizer = FakeQuantizer(config.activation, in_channels, input_axis)
        if config.weight is not None:
            self.weight_quantizer = FakeQuantizer(config.weight, out_channels, 0)

    def quantized(self, x: Tensor):
        """Input and weight as the integers represent them."""
        weight = self.weight
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight)
        return x, weight


def _adopt(new: nn.Module, old: nn.Module):
    """Gives ``new`` everything ``old`` holds: the same Parameter objects, attributes, hooks, training flag."""
    new.__dict__.update(old.__dict__)
    for store in ('_parameters', '_buffers', '_modules', '_forward_hooks', '_forward_pre_hooks'):
        new.__dict__[store] = type(old.__dict__[store])(old.__dict__[store])
    return new


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``F.linear(q(x), q(weight), bias)``; x is (..., in_features)."""

    @classmethod
    def from_float(cls, layer: nn.Linear, config: LayerConfig):
        new = _adopt(cls.__new__(cls), layer)
        new.add_quantizers(config, layer.in_features, layer.out_features, -1)
        return new

    def forward(self, x):
        x, weight = self.quantized(x)
        return nn.functional.linear(x, weight, self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """``conv2d(q(x), q(weight), bias)``; x is (B, in_channels, H, W)."""

    @classmethod
    def from_float(cls, layer: nn.Conv2d, config: LayerConfig):
        new = _adopt(cls.__new__(cls), layer)
        new.add_quantizers(config, layer.in_channels, layer.out_channels, 1)
        return new

    def forward(self, x):
        x, weight = self.quantized(x)
        return self._conv_forward(x, weight, self.bias)


class QuantizedMatMul(nn.Module):
    """``q(a) @ q(b)``: both operands are activations, one scale each."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.a_quantizer = self.b_quantizer = None
        if config.activation is not None:
            self.a_quantizer = FakeQuantizer(config.activation)
            self.b_quantizer = FakeQuantizer(config.activation)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.a_quantizer is not None:
            a, b = self.a_quantizer(a), self.b_quantizer(b)
        return torch.matmul(a, b)


MATMULS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm)
SCORES, CONTEXT = 'matmul_scores', 'matmul_context'  # q @ k^T and softmax(scores) @ v


class _MatMulRedirection(TorchFunctionMode):
    """Sends the two matrix products of an attention's forward through its QuantizedMatMul modules, in order."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in MATMULS:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls > 2:
            self.fail()
        return getattr(self.attention, SCORES if self.calls == 1 else CONTEXT)(*args, **(kwargs or {}))

    def __exit__(self, kind, value, traceback):
        super().__exit__(kind, value, traceback)
        if kind is None and self.calls != 2:
            self.fail()

    def fail(self):
        name = type(self.attention).__mro__[2].__name__
        raise UserError(f'{name}.forward makes {self.calls} visible matrix products, an attention makes 2: '
                                  'psaq_mm cannot quantize it; keep it in float by its name (keep_float).')


class QuantizedAttention:
    """Mixed in front of an attention class whose forward computes ``softmax(q @ k^T) @ v`` with two matrix products.

    The forward itself stays the library's; only its products are redirected. Source: our choice (PSAQ-ViT V1 copies
    every model file to put modules in place of the products).
    """

    def forward(self, *args, **kwargs):
        with _MatMulRedirection(self):
            return super().forward(*args, **kwargs)


_attention_classes: dict[type, type] = {}


def quantize_attention(attention: nn.Module, scores: LayerConfig, context: LayerConfig) -> nn.Module:
    """Makes an attention module's two products quantized, in place.

    Args:
        attention (nn.Module): Its forward makes two matrix products: scores, then context.
        scores (LayerConfig): For ``q @ k^T``.
        context (LayerConfig): For ``softmax(scores) @ v``.
    """
    kind = type(attention)
    if kind not in _attention_classes:
        _attention_classes[kind] = type(f'Quantized{kind.__name__}', (QuantizedAttention, kind),
                                        dict(__module__=__name__))
    attention.__class__ = _attention_classes[kind]
    attention.add_module(SCORES, QuantizedMatMul(scores))
    attention.add_module(CONTEXT, QuantizedMatMul(context))
    return attention
