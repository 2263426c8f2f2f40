"""Quantized counterparts of Linear, Conv2d, ConvTranspose2d, MultiheadAttention and of attention's matrix products."""
from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .config import LayerConfig
from .quantizer import FakeQuantizer, Mode, Rounding
from .weights import AppliedWeights, layers_own


class QuantizedLayer:
    """What quantized Linear, Conv2d and ConvTranspose2d share: one quantizer for the input, one for the weight."""
    input_quantizer: FakeQuantizer | None
    weight_quantizer: FakeQuantizer | None

    def __call__(self, *args, **kwargs):
        with layers_own():
            return super().__call__(*args, **kwargs)

    def add_quantizers(self, config: LayerConfig, in_channels: int, out_channels: int, input_axis: int,
                       weight_axis: int = 0):
        self.input_quantizer = self.weight_quantizer = None
        if config.activation is not None:
            self.input_quantizer = FakeQuantizer(config.activation, in_channels, input_axis)
        if config.weight is not None:
            self.weight_quantizer = FakeQuantizer(config.weight, out_channels, weight_axis)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear(q(x), q(weight), bias)``."""
        if _rounds(self.input_quantizer, self.weight_quantizer) and _trains(x, weight):
            return _with(_LinearFunction, (x, weight, bias), (self.input_quantizer, x), (self.weight_quantizer, weight))
        x, weight = self.quantized(x)
        return F.linear(x, weight, bias)

    def convolution(self, x: Tensor, padding, transposed: bool, output_padding) -> Tensor | None:
        """What :class:`_ConvolutionFunction` computes where it is to be used, else None."""
        if not (_rounds(self.input_quantizer, self.weight_quantizer) and _trains(x, self.weight)):
            return None
        arguments = self.stride, padding, self.dilation, transposed, output_padding, self.groups
        return _with(_ConvolutionFunction, (x, self.weight, self.bias, arguments), (self.input_quantizer, x),
                     (self.weight_quantizer, self.weight))

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


def _rounds(*quantizers):
    """Whether any quantizer rounds in its present mode."""
    return any(q is not None and q.mode is Mode.QUANTIZE for q in quantizers)


def _trains(*tensors):
    """Whether the functions below, which know both a product and its quantizers, are to be used.

    They keep less and compute less for the backward pass than autograd would of the parts. Elsewhere (inference, GPU,
    autocast) the parts are as good.
    """
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and all(
        t.device.type == 'cpu' and t.dtype == torch.float32 for t in tensors) and not torch.is_autocast_enabled('cpu')


def _with(function, inputs, *operands):
    """Applies one of the functions below to its inputs and a :class:`Rounding` for each (quantizer, tensor)."""
    roundings = [Rounding(*operand) for operand in operands]
    return function.apply(*inputs, roundings, *(rounding.stretch for rounding in roundings))


def _no_view(output: Tensor) -> Tensor:
    """A function's output as no view of what it forgets: autograd would forbid to change it in place, as ReLUs do."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


class _LinearFunction(torch.autograd.Function):
    """``F.linear(q(x), q(weight), bias)`` with straight-through gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, roundings, *stretches):
        ctx.roundings, ctx.shape = roundings, x.shape
        x, kept_x = roundings[0].forward(x)
        weight, kept_weight = roundings[1].forward(weight)
        ctx.save_for_backward(kept_x, kept_weight)
        return _no_view(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (of_x, of_weight) = ctx.saved_tensors, ctx.roundings
        rows = grad.reshape(-1, grad.shape[-1])
        needed = ctx.needs_input_grad
        x_grad = weight_grad = bias_grad = x_range = weight_range = None
        if needed[1] or needed[5]:
            weight_grad, weight_range = of_weight.gradients(rows.T @ of_x.again(x).reshape(-1, x.shape[-1]), weight)
        if needed[0] or needed[4]:
            x_grad, x_range = of_x.gradients((rows @ of_weight.again(weight)).view(ctx.shape), x)
        if needed[2]:
            bias_grad = rows.sum(0)
        return x_grad, weight_grad, bias_grad, None, x_range, weight_range


class _ConvolutionFunction(torch.autograd.Function):
    """A convolution, transposed or not, of q(x) with q(weight), with straight-through gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, arguments, roundings, *stretches):
        ctx.arguments, ctx.roundings, ctx.bias = arguments, roundings, None if bias is None else list(bias.shape)
        x, kept_x = roundings[0].forward(x)
        weight, kept_weight = roundings[1].forward(weight)
        ctx.save_for_backward(kept_x, kept_weight)
        return torch.convolution(x, weight, bias, *arguments)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (of_x, of_weight) = ctx.saved_tensors, ctx.roundings
        rounded_x, rounded_weight = of_x.again(x), of_weight.again(weight)
        needed = ctx.needs_input_grad
        wanted = needed[0] or needed[5], needed[1] or needed[6], needed[2]
        x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
            grad, rounded_x, rounded_weight, ctx.bias, *ctx.arguments, wanted)
        x_range = weight_range = None
        if wanted[0]:
            x_grad, x_range = of_x.gradients(x_grad.contiguous(), x)
        if wanted[1]:
            weight_grad, weight_range = of_weight.gradients(weight_grad.contiguous(), weight)
        return x_grad, weight_grad, bias_grad, None, None, x_range, weight_range


class _MatMulFunction(torch.autograd.Function):
    """``q(a) @ q(b)`` with straight-through gradients; b may be a transposed view, its memory is taken as it lies."""

    @staticmethod
    def forward(ctx, a, b, roundings, *stretches):
        ctx.transposed, ctx.roundings = b.stride(-2) < b.stride(-1), roundings
        a, kept_a = roundings[0].forward(a)
        b, kept_b = roundings[1].forward(b.mT if ctx.transposed else b)
        ctx.save_for_backward(kept_a, kept_b)
        return _no_view(a @ (b.mT if ctx.transposed else b))

    @staticmethod
    def backward(ctx, grad):
        (a, b), (of_a, of_b) = ctx.saved_tensors, ctx.roundings
        rounded_a, rounded_b = of_a.again(a), of_b.again(b)
        a_grad = grad @ (rounded_b if ctx.transposed else rounded_b.mT)
        b_grad = grad.mT @ rounded_a if ctx.transposed else rounded_a.mT @ grad
        a_grad, a_range = of_a.gradients(a_grad, a)
        b_grad, b_range = of_b.gradients(b_grad, b)
        return a_grad, b_grad.mT if ctx.transposed else b_grad, None, a_range, b_range


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``F.linear(q(x), q(weight), bias)``; x is (..., in_features)."""

    @classmethod
    def from_float(cls, layer: nn.Linear, config: LayerConfig):
        new = _adopt(cls.__new__(cls), layer)
        new.add_quantizers(config, layer.in_features, layer.out_features, -1)
        return new

    def forward(self, x):
        return self.linear(x, self.weight, self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """``conv2d(q(x), q(weight), bias)``; x is (B, in_channels, H, W)."""

    @classmethod
    def from_float(cls, layer: nn.Conv2d, config: LayerConfig):
        new = _adopt(cls.__new__(cls), layer)
        new.add_quantizers(config, layer.in_channels, layer.out_channels, 1)
        return new

    def forward(self, x):
        if self.padding_mode == 'zeros' and not isinstance(self.padding, str) and x.dim() == 4:
            out = self.convolution(x, self.padding, False, (0, 0))
            if out is not None:
                return out
        x, weight = self.quantized(x)
        return self._conv_forward(x, weight, self.bias)


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """``conv_transpose2d(q(x), q(weight), bias)``; x is (B, in_channels, H, W).

    Its weight is (in_channels, out_channels / groups, h, w): with groups, the channels at one place of each group share
    a scale.
    """

    @classmethod
    def from_float(cls, layer: nn.ConvTranspose2d, config: LayerConfig):
        new = _adopt(cls.__new__(cls), layer)
        new.add_quantizers(config, layer.in_channels, layer.weight.shape[1], 1, weight_axis=1)
        return new

    def forward(self, x, output_size=None):
        padding = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        out = self.convolution(x, self.padding, True, padding) if x.dim() == 4 else None
        if out is not None:
            return out
        x, weight = self.quantized(x)
        return F.conv_transpose2d(x, weight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation)


class QuantizedApplication(QuantizedLayer):
    """Mixed in front of a Linear, Conv2d or ConvTranspose2d with a forward of its own, which keeps computing."""

    def forward(self, *args, **kwargs):
        with AppliedWeights(self):
            return super().forward(*args, **kwargs)


_application_classes: dict[type, type] = {}


def quantize_application(layer: nn.Module, config: LayerConfig) -> nn.Module:
    """Makes a layer with a forward of its own quantized, in place.

    Args:
        layer (nn.Module): Of a subclass of Linear, Conv2d or ConvTranspose2d.
        config (LayerConfig): Its quantizers.
    """
    kind = type(layer)
    if kind not in _application_classes:
        _application_classes[kind] = type(f'Quantized{kind.__name__}', (QuantizedApplication, kind),
                                          dict(__module__=__name__))
    layer.__class__ = _application_classes[kind]
    if isinstance(layer, nn.Linear):
        layer.add_quantizers(config, layer.in_features, layer.out_features, -1)
    elif isinstance(layer, nn.ConvTranspose2d):
        layer.add_quantizers(config, layer.in_channels, layer.weight.shape[1], 1, weight_axis=1)
    else:
        layer.add_quantizers(config, layer.in_channels, layer.out_channels, 1)
    return layer


class QuantizedMatMul(nn.Module):
    """``q(a) @ q(b)``: both operands are activations, one scale each.

    The product passes through ``output``, an identity: hooks on it see it however it was computed.

    Args:
        config (LayerConfig): For both operands.
        weights (bool): Whether a is attention weights, which are not negative. Defaults to False.
        heads (int): Of the attention; attention weights are (..., heads, queries, keys). Defaults to 1.
    """

    def __init__(self, config: LayerConfig, weights: bool = False, heads: int = 1):
        super().__init__()
        self.a_quantizer = self.b_quantizer = None
        if config.activation is not None:
            operand = config.activation.of_products
            self.a_quantizer = FakeQuantizer(config.activation.of_softmax, heads, HEADS, optional=True) if weights \
                else FakeQuantizer(operand)
            self.b_quantizer = FakeQuantizer(operand)
        self.output = nn.Identity()

    @property
    def is_float(self) -> bool:
        """Whether this is a plain product at the moment."""
        return all(q is None or q.mode is Mode.FLOAT for q in (self.a_quantizer, self.b_quantizer))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.a_quantizer is not None:
            if _rounds(self.a_quantizer, self.b_quantizer) and _trains(a, b):
                return self.output(_with(_MatMulFunction, (a, b), (self.a_quantizer, a), (self.b_quantizer, b)))
            a, b = self.a_quantizer(a), self.b_quantizer(b)
        return self.output(torch.matmul(a, b))


MATMULS = (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm)
SCORES, CONTEXT = 'matmul_scores', 'matmul_context'  # q @ k^T and softmax(scores) @ v
HEADS = -3  # axis of the heads in attention weights, (..., heads, queries, keys)


def head_count(attention: nn.Module) -> int:
    """Return how many heads an attention says it has; 1 if it says nothing."""
    heads = getattr(attention, 'num_heads', 1)
    return heads if isinstance(heads, int) else 1


def _masked(scores, mask):
    return scores.masked_fill(mask, float('-inf')) if mask.dtype == torch.bool else scores + mask


def _attend(scores, context, query, key, value, masks=(), dropout=0.0):
    """Attention out of two modules for its products.

    Args:
        scores, context (QuantizedMatMul): The products.
        query, key, value (Tensor): (B, heads, N, d); the query is scaled.
        masks (Sequence[Tensor]): Added to the scores; True means masked in boolean ones.
        dropout (float): Of the weights.

    Returns:
        tuple[Tensor, Tensor]: (B, heads, N, d) and the weights, (B, heads, N, keys).
    """
    out = scores(query, key.transpose(-2, -1))
    for mask in masks:
        out = _masked(out, mask)
    weights = F.dropout(out.softmax(-1), dropout, dropout > 0)
    return context(weights, value), weights


class _AttentionFunction(torch.autograd.Function):
    """:func:`_attend` without dropout, for training: as torch's fused kernels do, it keeps nothing of the size of the
    scores and computes them again in the backward pass.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, roundings, *stretches):
        ctx.roundings = of_query, of_key, of_value, of_weights = roundings
        query, kept_query = of_query.forward(query)
        key, kept_key = of_key.forward(key)
        value, kept_value = of_value.forward(value)
        ctx.save_for_backward(kept_query, kept_key, kept_value, mask)
        return _no_view(of_weights.forward(_AttentionFunction.weights(query, key, mask))[0] @ value)

    @staticmethod
    def weights(query, key, mask):
        scores = query @ key.mT
        return (scores if mask is None else _masked(scores, mask)).softmax(-1)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mask = ctx.saved_tensors
        of_query, of_key, of_value, of_weights = ctx.roundings
        rounded_query, rounded_key, rounded_value = of_query.again(query), of_key.again(key), of_value.again(value)
        weights = _AttentionFunction.weights(rounded_query, rounded_key, mask)
        value_grad = of_weights.again(weights).mT @ grad
        grad = grad @ rounded_value.mT
        value_grad, value_range = of_value.gradients(value_grad, value)
        grad, weights_range = of_weights.gradients(grad, weights)
        grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
        mask_grad = grad.sum_to_size(mask.shape) if ctx.needs_input_grad[3] else None
        query_grad, key_grad = grad @ rounded_key, grad.mT @ rounded_query
        query_grad, query_range = of_query.gradients(query_grad, query)
        key_grad, key_range = of_key.gradients(key_grad, key)
        return (query_grad, key_grad, value_grad, mask_grad, None, query_range, key_range, value_range, weights_range)


class _MatMulRedirection(TorchFunctionMode):
    """Sends the two matrix products of an attention's forward through its QuantizedMatMul modules, in order.

    A fused ``scaled_dot_product_attention`` counts as both, and is computed in its two parts.
    """

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention and func not in MATMULS or not self.runs():
            return func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.count(2)
            return self.fused(*args, **(kwargs or {}))
        self.count(1)
        return getattr(self.attention, SCORES if self.calls == 1 else CONTEXT)(*args, **(kwargs or {}))

    def runs(self) -> bool:
        """Whether it is the attention that makes a product, and no module inside it, as for relative positions."""
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_locals.get('self')
            if isinstance(module, nn.Module):
                return module is self.attention
            frame = frame.f_back
        return True

    def fused(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """Compute ``F.scaled_dot_product_attention``, in two products where they are quantized or a hook listens."""
        scores, context = getattr(self.attention, SCORES), getattr(self.attention, CONTEXT)
        heard = bool(context._forward_pre_hooks)  # somebody listens to the weights: they have to exist
        if scores.is_float and context.is_float and not heard:
            return context.output(F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal,
                                                                 scale=scale, enable_gqa=enable_gqa))
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if scale is None:
            scale = query.shape[-1]**-0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        if _trains(query, key, value) and not dropout_p and not heard:
            query = query * scale
            # one head of keys and values may serve all queries
            key, value = (x.expand(*query.shape[:-2], *x.shape[-2:]) for x in (key, value))
            return context.output(_with(
                _AttentionFunction, (query, key, value, attn_mask), (scores.a_quantizer, query),
                (scores.b_quantizer, key), (context.b_quantizer, value), (context.a_quantizer, query)))
        masks = () if attn_mask is None else (attn_mask, )
        return _attend(scores, context, query * scale, key, value, masks, dropout_p)[0]

    def count(self, products):
        self.calls += products
        if self.calls > 2:
            self.fail()

    def __exit__(self, kind, value, traceback):
        super().__exit__(kind, value, traceback)
        if kind is None and self.calls != 2:
            self.fail()

    def fail(self):
        name = type(self.attention).__mro__[2].__name__
        raise UserError(f'{name}.forward makes {self.calls} visible matrix products, an attention makes 2: '
                        'psaq_mm cannot quantize it; keep it in float by its name (keep_float).')


class QuantizedAttention:
    """Mixed in front of an attention class whose forward computes ``softmax(q @ k^T) @ v``, fused or in two products.

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
        attention (nn.Module): Its forward makes two matrix products, scores then context, or a fused one.
        scores (LayerConfig): For ``q @ k^T``.
        context (LayerConfig): For ``softmax(scores) @ v``.
    """
    kind = type(attention)
    if kind not in _attention_classes:
        _attention_classes[kind] = type(f'Quantized{kind.__name__}', (QuantizedAttention, kind),
                                        dict(__module__=__name__))
    attention.__class__ = _attention_classes[kind]
    attention.add_module(SCORES, QuantizedMatMul(scores))
    attention.add_module(CONTEXT, QuantizedMatMul(context, weights=True, heads=head_count(attention)))
    return attention


class QuantizedProjection(QuantizedLayer, nn.Module):
    """A linear layer whose weight belongs to a MultiheadAttention.

    Args:
        owner (nn.MultiheadAttention): Holds the weight and, in ``in_proj_bias``, the bias.
        parameter (str): Name of the weight in the owner.
        config (LayerConfig): Its quantizers.
    """

    def __init__(self, owner, parameter, config):
        super().__init__()
        object.__setattr__(self, 'owner', owner)  # no submodule: the owner holds this one
        self.parameter = parameter
        self.add_quantizers(config, self.weight.shape[1], self.weight.shape[0], -1)

    @property
    def weight(self):
        return getattr(self.owner, self.parameter)

    def forward(self, inputs, biases):
        """Applies an equal share of the weight's rows to each input.

        Args:
            inputs (list[Tensor]): (B, N_i, in_features) each; they share a scale.
            biases (list[Tensor | None]): As many.

        Returns:
            list[Tensor]: (B, N_i, out_features / len(inputs)) each.
        """
        if len(inputs) == 1:
            return [self.linear(inputs[0], self.weight, biases[0])]
        x, weight = self.quantized(torch.cat(inputs, 1))
        parts = x.split([i.shape[1] for i in inputs], 1)
        return [F.linear(p, w, b) for p, w, b in zip(parts, weight.chunk(len(inputs)), biases)]


PACKED, SEPARATE = ('in_proj', ), ('q_proj', 'k_proj', 'v_proj')


def projections(attention: nn.MultiheadAttention) -> tuple[str, ...]:
    """Names of the input projections: one for all, or three where key or value have another width than the query."""
    return PACKED if attention.in_proj_weight is not None else SEPARATE


def _same(a, b):
    """Whether two tensors are one, also where a library has transposed it into two objects."""
    return a is b or a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with projections and both products quantized; same parameters, same names.

    torch computes all of it in one function that shows no layer and no product, so the forward is written out here.
    The input projection has one input scale for query, key and value, which mostly are one tensor.
    """

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):
        """As :meth:`torch.nn.MultiheadAttention.forward`; ``is_causal`` is a hint there and needs ``attn_mask``."""
        same = _same(query, key) and _same(query, value)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.project(query, key, value, same)
        images, targets, heads = len(q), q.shape[1], self.num_heads
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(images, heads, targets, -1)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None]
        if self.bias_k is not None:
            k, v = (torch.cat([x, b.expand(images, -1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        masks = [F.pad(mask, (0, k.shape[2] - mask.shape[-1])) for mask in (attn_mask, key_padding_mask)
                 if mask is not None]  # added keys are never masked
        out, weights = _attend(getattr(self, SCORES), getattr(self, CONTEXT), q * q.shape[-1]**-0.5, k, v, masks,
                               self.dropout if self.training else 0.0)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not need_weights:
            weights = None
        elif average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def project(self, query, key, value, same):
        """Queries, keys and values of all heads, (B, N, embed_dim) each."""
        bias = self.in_proj_bias
        biases = (None, ) * 3 if bias is None else bias.chunk(3)
        if projections(self) == SEPARATE:
            return [getattr(self, name)([x], [b])[0] for name, x, b in zip(SEPARATE, (query, key, value), biases)]
        if same:
            return self.in_proj([query], [bias])[0].chunk(3, -1)
        return self.in_proj([query, key, value], biases)


def quantize_multihead_attention(attention: nn.MultiheadAttention, configs: dict[str, LayerConfig]) -> nn.Module:
    """Makes input projections and both products of a MultiheadAttention quantized, in place.

    Its ``out_proj`` is a Linear like any other and converted as such.

    Args:
        attention (nn.MultiheadAttention): The module to change.
        configs (dict[str, LayerConfig]): By part: :func:`projections`, SCORES and CONTEXT.
    """
    for name in projections(attention):
        parameter = 'in_proj_weight' if name == 'in_proj' else f'{name}_weight'
        attention.add_module(name, QuantizedProjection(attention, parameter, configs[name]))
    for name in (SCORES, CONTEXT):
        attention.add_module(name, QuantizedMatMul(configs[name], weights=name == CONTEXT, heads=head_count(attention)))
    attention.__class__ = QuantizedMultiheadAttention
    return attention
