"""Forwards of library modules written so that a trace of them holds for every image size.

The libraries compute paddings, window masks and position embeddings in Python numbers, which a trace freezes. Ours
compute the same in traced ones. A module is recognised by the function it computes, so that the copies of one class in
mmdet, mmseg and mmcv, and subclasses that inherit its forward, need one entry.

Where what follows is quantized, activations are moved about - padded, shifted, divided into windows and heads - as the
integers that they will be: the same numbers, a quarter of the bytes.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..quantization import CONTEXT, SCORES, QuantizedLinear
from ..quantization.layers import QuantizedAttention
from .operators import already_quantized, dequantize, grid_of, head_product, in_units, quantize

ADAPTERS: dict[Callable, dict[str, Callable]] = {}  # by the library's forward: replacements by name of the method


def adapts(forward: Callable, method: str = 'forward'):
    """Registers the decorated function in place of a method of all modules with a forward.

    Args:
        forward (Callable): The library's, e.g. ``ShiftWindowMSA.forward``.
        method (str): What is replaced.
    """

    def register(function):
        ADAPTERS.setdefault(forward, {})[method] = function
        return function

    return register


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Within it, modules of a model compute in a way that can be traced for all sizes."""
    _register()
    patched = []
    for module in model.modules():
        for method, function in ADAPTERS.get(_computed(module), {}).items():
            setattr(module, method, function.__get__(module))  # shadows the class's
            patched.append((module, method))
    try:
        yield
    finally:
        for module, method in patched:
            delattr(module, method)


class ConstantResizing(TorchFunctionMode):
    """Makes what antialiased resizing yields a constant of a trace, where it depends on no image: ONNX has no such
    operator in our opset, and position embeddings need it once for each size.

    Run the model within it on two images, then trace it.
    """

    def __init__(self):
        super().__init__()
        self.runs = []

    def __enter__(self):
        self.runs.append([])
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.interpolate or not kwargs.get('antialias'):
            return func(*args, **kwargs)
        *earlier, now = self.runs
        values = [run[len(now)] for run in earlier if len(run) > len(now)]
        if len(values) > 1 and all(torch.equal(values[0], value) for value in values[1:]):
            result = values[0].clone()
        else:
            result = func(*args, **kwargs)
        now.append(result.detach().clone())
        return result


def _computed(module):
    """The library's forward that a module computes, converted or not."""
    kind = type(module)
    return inspect.unwrap((kind.__mro__[2] if issubclass(kind, QuantizedAttention) else kind).forward)


def pad_to(x: Tensor, height, width, multiple_of, value=0) -> Tensor:
    """A value, 0 or what stands for it, at the lower and right end of (B, H, W, C), up to the next multiples."""
    pads = [-side % multiple for side, multiple in zip((height, width), multiple_of)]
    if all(isinstance(p, int) and p == 0 for p in pads):
        return x
    return F.pad(x, (0, 0, 0, pads[1], 0, pads[0]), value=value)


def to_windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) to (B * windows, size * size, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def from_windows(windows: Tensor, batch, height, width, size: int) -> Tensor:
    """Back from :func:`to_windows`."""
    x = windows.view(batch, height // size, width // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


def shifted_window_mask(height, width, size: int, shift: int) -> Tensor:
    """Which places of a window see each other after the cyclic shift: 0, or -100 where they don't.

    Args:
        height, width (int): Of the padded map.
        size, shift (int): Of the window.

    Returns:
        Tensor: (windows, size * size, size * size).
    """

    def regions(length):
        place = torch.arange(length)
        return (place >= length - size).float() + (place >= length - shift).float()

    region = 3 * regions(height)[:, None] + regions(width)[None]
    windows = to_windows(region[None, :, :, None], size)[..., 0]
    return torch.where(windows[:, None] == windows[:, :, None], 0.0, -100.0)


def operand_quantizers(attention) -> list:
    """Of query, key, value, and attention weights; None for what is not quantized."""
    places = (SCORES, 'a_quantizer'), (SCORES, 'b_quantizer'), (CONTEXT, 'b_quantizer'), (CONTEXT, 'a_quantizer')
    return [getattr(getattr(attention, product, None), name, None) for product, name in places]


def quantized(x: Tensor, quantizer) -> Tensor:
    """What a quantizer makes of an operand, if there is one."""
    return x if quantizer is None else quantizer(x)


def heads_of(attention, x: Tensor, layer: nn.Module, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of an attention's products, as these are quantized.

    Args:
        attention (nn.Module): With ``num_heads``, converted or not.
        x (Tensor): (B, N, channels).
        layer (nn.Module): Makes queries, keys and values of all heads of it, (B, N, 3 * C).
        factor (float): Of the queries.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Scaled queries (B, heads, N, d), keys (B, heads, d, N), values (B, heads, N, d).
    """
    quantizers = operand_quantizers(attention)[:3]
    grids = [grid_of(quantizer) for quantizer in quantizers]
    stored = isinstance(layer, QuantizedLinear) and hasattr(layer, 'integers') and all(
        grid is not None and grid.integers == grids[0].integers for grid in grids)
    if stored:  # the layer counts in steps of the three grids, so that one rounding serves all
        steps = [grid.scale[0] / (1 if i else factor) for i, grid in enumerate(grids)]
        with in_units(layer, [step for step in steps for _ in range(layer.out_features // 3)]):
            qkv = quantize(layer(x), grids[0]._replace(scale=(1.0, )))
    else:
        qkv = layer(x)
    query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if stored:
        query, key, value = map(dequantize, (query, key, value), grids)
        return query, key.transpose(-2, -1), value
    return tuple(map(quantized, (query * factor, key.transpose(-2, -1), value), quantizers))


def merge_heads(context: Tensor, layer: nn.Module) -> Tensor:
    """What an output projection makes of the heads, (B, heads, N, d)."""
    grid = grid_of(getattr(layer, 'input_quantizer', None))
    if grid is None:
        return layer(context.transpose(1, 2).flatten(2))
    stored = quantize(context, grid).transpose(1, 2).flatten(2)
    with already_quantized(layer.input_quantizer):
        return layer(dequantize(stored, grid))


def _register():
    """Fills ADAPTERS; the libraries are imported when they are needed."""
    if ADAPTERS:
        return
    from mmcv.cnn.bricks import transformer as mmcv_transformer
    from mmdet.models.backbones import swin as mmdet_swin
    from mmdet.models.layers.transformer import utils as mmdet_utils
    from mmseg.models.backbones import swin as mmseg_swin
    from mmseg.models.backbones import vit as mmseg_vit
    from mmseg.models.utils import embed as mmseg_embed

    def shifted_window_attention(self, query, hw_shape):
        (batch, _, channels), (height, width) = query.shape, hw_shape
        size, shift = self.window_size, self.shift_size
        quantizer = getattr(self.w_msa.qkv, 'input_quantizer', None)
        grid = grid_of(quantizer)
        x = query.view(batch, height, width, channels)
        if grid is not None:
            x = quantize(x, grid)
        x = pad_to(x, height, width, (size, size), grid.zero_point[0] if grid else 0)
        full_height, full_width = x.shape[1:3]
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        mask = shifted_window_mask(full_height, full_width, size, shift) if shift else None
        x = to_windows(x, size)
        with nullcontext() if grid is None else already_quantized(quantizer):
            x = self.w_msa(x if grid is None else dequantize(x, grid), mask=mask)
        x = from_windows(x, batch, full_height, full_width, size)
        if shift:
            x = torch.roll(x, (shift, shift), (1, 2))
        return self.drop(x[:, :height, :width].reshape(batch, height * width, channels))

    def window_attention(self, x, mask=None):
        query, key, value = heads_of(self, x, self.qkv, self.scale)
        side = self.window_size[0] * self.window_size[1]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = query @ key + bias.view(side, side, -1).permute(2, 0, 1)[None]
        if mask is not None:
            shape = self.num_heads, side, side
            scores = (scores.view(-1, mask.shape[0], *shape) + mask[:, None]).view(-1, *shape)
        return merge_heads(head_product(scores.softmax(-1), operand_quantizers(self)[3], value), self.proj)

    def patch_merging(self, x, input_size):
        sampler, padding = self.sampler, self.adap_padding
        if (sampler.kernel_size, sampler.stride, sampler.dilation, sampler.padding) != ((2, 2), ) * 2 + (
                (1, 1), (0, 0)) or padding is not None and padding.padding != 'corner':
            return type(self).forward(self, x, input_size)
        (batch, _, channels), (height, width) = x.shape, input_size
        x = x.view(batch, height, width, channels)
        if padding is not None:
            x = pad_to(x, height, width, (2, 2))
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x.view(batch, height, 2, width, 2, channels).permute(0, 1, 3, 5, 2, 4)
        x = x.reshape(batch, height * width, 4 * channels)  # the order of nn.Unfold: channel, row, column
        return self.reduction(x if self.norm is None else self.norm(x)), (height, width)

    def adaptive_padding(self, x):
        if self.padding != 'corner' or tuple(self.kernel_size) != tuple(self.stride) or tuple(self.dilation) != (1, 1):
            return type(self).forward(self, x)
        return pad_to(x.permute(0, 2, 3, 1), *x.shape[2:], self.stride).permute(0, 3, 1, 2)

    def position_embedding(self, patched_img, hw_shape, pos_embed):
        sides = [side // self.patch_size for side in self.img_size]
        if not isinstance(hw_shape[0], Tensor) and list(hw_shape) == sides:
            return patched_img + pos_embed
        return patched_img + self.resize_pos_embed(pos_embed, hw_shape, sides, self.interpolate_mode)

    def adaptive_average(self, x):
        size = self.output_size
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if sides == (1, 1) or None in sides:
            return type(self).forward(self, x)

        def shares(length, bins):
            """Of each place in each bin, (bins, length)."""
            numbers, places = torch.arange(bins)[:, None], torch.arange(length)[None]
            first = torch.div(numbers * length, bins, rounding_mode='floor')
            behind = torch.div((numbers + 1) * length + bins - 1, bins, rounding_mode='floor')
            inside = ((places >= first) & (places < behind)).float()
            return inside / inside.sum(1, keepdim=True)

        return shares(x.shape[2], sides[0]) @ x @ shares(x.shape[3], sides[1]).T

    adapts(nn.AdaptiveAvgPool2d.forward)(adaptive_average)
    for module in (mmdet_swin, mmseg_swin):
        adapts(module.ShiftWindowMSA.forward)(shifted_window_attention)
        adapts(module.WindowMSA.forward)(window_attention)
    for module in (mmdet_utils, mmseg_embed, mmcv_transformer):
        adapts(module.PatchMerging.forward)(patch_merging)
        adapts(module.AdaptivePadding.forward)(adaptive_padding)
    adapts(mmseg_vit.VisionTransformer.forward, '_pos_embeding')(position_embedding)
