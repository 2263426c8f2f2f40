"""Quantizes layers whose weight is applied by somebody else than their own forward.

An attention may compute ``F.linear(x, self.qkv.weight, bias)``, or a subclass of ``nn.Conv2d`` standardise its weight
first. Inside :class:`AppliedWeights` each product of such a weight, or of another form of it (transposed, sliced,
scaled), is one of the layer: input and weight pass through the layer's quantizers. Source: our choice.
"""
from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LINEAR, SUMS = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d), (torch.addmm, torch.baddbmm, Tensor.addmm)
MATMULS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
           Tensor.__rmatmul__)
PRODUCTS = frozenset((*LINEAR, *MATMULS, *SUMS, torch.einsum, torch.tensordot, torch.convolution))
# Functions that make another form of a weight, by name: the same numbers, or the same ones scaled, shifted, joined.
SAME = frozenset(('to', 'float', 'contiguous', 'clone', 'detach', 'type', 'type_as', 'data', 'requires_grad_'))
TRANSPOSED = frozenset(('T', 't', 'mT', 'transpose', 'swapaxes', 'swapdims', 'permute', 'movedim'))
FORMS = SAME | TRANSPOSED | frozenset((
    'view', 'reshape', 'reshape_as', 'view_as', 'flatten', 'unflatten', 'squeeze', 'unsqueeze', 'half', 'bfloat16',
    'double', 'chunk', 'split', 'split_with_sizes', 'tensor_split', 'narrow', 'select', 'index_select', '__getitem__',
    'unbind', 'expand', 'expand_as', 'repeat', 'mul', '__mul__', '__rmul__', 'multiply', 'div', '__truediv__',
    'true_divide', 'add', '__add__', '__radd__', 'sub', '__sub__', '__rsub__', 'neg', '__neg__', 'cat', 'concat',
    'stack', 'normalize', 'batch_norm', 'layer_norm', 'roll', 'flip', 'rot90', 'pad', 'where', 'masked_fill', 'tril',
    'triu', 'mean', 'var', 'std', 'var_mean', 'std_mean', 'norm', 'sum', 'amax', 'amin', 'abs', 'square', 'sqrt',
    'rsqrt', 'pow', 'clamp'))
_open = threading.local()


def _modes() -> list:
    if not hasattr(_open, 'modes'):
        _open.modes = []
    return _open.modes


@contextmanager
def layers_own() -> Iterator[None]:
    """Within it, in a quantized layer's own forward, products are the layer's business."""
    modes = _modes()
    outside = modes[:]
    modes.clear()
    try:
        yield
    finally:
        modes[:] = outside


def function_name(function) -> str:
    """Return the name of a torch function; of a property's getter, that of the property."""
    name = getattr(function, '__name__', '')
    return getattr(getattr(function, '__self__', None), '__name__', name) if name == '__get__' else name


class _Form:
    """A tensor made of the weights of some layers; ``kind`` says whether of one layer's as it is, or transposed."""

    def __init__(self, tensor: Tensor, layers: list[nn.Module], kind: str = ''):
        self.tensor, self.layers, self.kind = tensor, layers, kind


class AppliedWeights(TorchFunctionMode):
    """Where a product is given a layer's weight, quantizes it as the layer would.

    Args:
        owner (nn.Module): The module whose method runs; its submodules' weights, and its own, are meant.
    """

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner = owner
        self.forms: dict[int, _Form] = {}
        self.rounded: dict[nn.Module, Tensor] = {}
        for layer in owner.modules():
            if hasattr(layer, 'weight_quantizer') and 'weight' in layer._parameters:
                self.forms[id(layer.weight)] = _Form(layer.weight, [layer], 'weight')

    def __enter__(self):
        _modes().append(self)
        return super().__enter__()

    def __exit__(self, *raised):
        _modes().remove(self)
        return super().__exit__(*raised)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self not in _modes():
            return func(*args, **kwargs)
        if func in PRODUCTS:
            return self.product(func, args, kwargs)
        name = function_name(func)
        if name in FORMS and any(self.form(value) for value in nested_values((args, kwargs))):
            return self.other_form(func, name, args, kwargs)
        return func(*args, **kwargs)

    def form(self, value) -> _Form | None:
        """What is known of a tensor that is made of weights; None for any other value."""
        return self.forms.get(id(value)) if isinstance(value, Tensor) else None

    def weight(self, layer: nn.Module) -> Tensor:
        """A layer's weight as the integers represent it."""
        if layer not in self.rounded:
            quantizer = layer.weight_quantizer
            self.rounded[layer] = layer.weight if quantizer is None else quantizer(layer.weight)
        return self.rounded[layer]

    def values(self, nested):
        """Arguments with weights in them as the integers represent them."""
        form = self.form(nested)
        if form is not None:
            return self.weight(form.layers[0]) if form.kind == 'weight' and form.tensor is form.layers[0].weight \
                else form.tensor
        if isinstance(nested, (tuple, list)):
            return type(nested)(map(self.values, nested))
        if isinstance(nested, dict):
            return {key: self.values(value) for key, value in nested.items()}
        return nested

    def other_form(self, func, name, args, kwargs):
        used = [form for value in nested_values((args, kwargs)) if (form := self.form(value))]
        layers = list(dict.fromkeys(layer for form in used for layer in form.layers))
        result = func(*self.values(args), **self.values(kwargs))
        kind = ''
        if len(used) == 1 and used[0].tensor.dim() == 2:
            kind = used[0].kind
            shape = tuple(layers[0].weight.shape)
            if name in TRANSPOSED and isinstance(result, Tensor) and kind:
                kind = _turned(kind, result, used[0].tensor)
            elif name not in SAME or not isinstance(result, Tensor) or result.dtype != layers[0].weight.dtype:
                kind = ''
            if kind and tuple(result.shape) != (shape if kind == 'weight' else shape[::-1]):
                kind = ''
        for tensor in nested_values(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in self.forms:
                self.forms[id(tensor)] = _Form(tensor, layers, kind)
        return result

    def product(self, func, args, kwargs):
        """The product of an input and a weight; any other is left alone."""
        named = dict(zip(('input', 'weight', 'bias'), args), **kwargs) if func in LINEAR else {}
        if func in LINEAR:
            inputs, weights = [named['input']], [named['weight']]
        else:
            operands = [v for v in nested_values((args[1:] if func in SUMS else args, kwargs)) if isinstance(v, Tensor)]
            inputs = [value for value in operands if not self.form(value)]
            weights = [value for value in operands if self.form(value)]
        forms = [form for weight in weights if (form := self.form(weight))]
        if not forms or not inputs:
            return func(*args, **kwargs)
        form = forms[0]
        layer, transposed = form.layers[0], form.kind == 'transposed'
        direct = func is F.linear and form.kind == 'weight' or func in MATMULS and transposed and args[1] is form.tensor
        if direct and isinstance(layer, nn.Linear) and layer is not self.owner:
            return _linear(layer, inputs[0], named.get('bias'))
        replaced = {id(value): self.quantized(value, form.layers) for value in inputs}

        def operand(nested):
            if isinstance(nested, (tuple, list)):
                return type(nested)(map(operand, nested))
            return replaced.get(id(nested), nested) if isinstance(nested, Tensor) else self.values(nested)

        with torch._C.DisableTorchFunction():  # it is no product of anybody else's
            return func(*self.values(operand(args)), **self.values({k: operand(v) for k, v in kwargs.items()}))

    @staticmethod
    def quantized(value: Tensor, layers: list[nn.Module]) -> Tensor:
        """An input as the first layer's integers represent it; all of the layers see it."""
        found = [value if layer.input_quantizer is None else layer.input_quantizer(value) for layer in layers]
        return found[0]


def _turned(kind, result, source):
    """Kind of a weight or a transposed weight after its axes were moved, or not."""
    if result.shape == source.shape and result.stride() == source.stride():
        return kind
    return 'transposed' if kind == 'weight' else 'weight'


def _linear(layer, x, bias):
    """What ``F.linear`` gives with a layer's weight and any bias, computed by the layer."""
    if bias is layer.bias:
        return layer(x)
    out = layer(x) if layer.bias is None else layer.linear(x, layer.weight, None)
    return out if bias is None else out + bias


def nested_values(nested) -> Iterator:
    """All values in nested dicts, tuples and lists, in order."""
    if isinstance(nested, dict):
        nested = nested.values()
    if isinstance(nested, (tuple, list, type({}.values()))):
        for item in nested:
            yield from nested_values(item)
    else:
        yield nested


@functools.cache
def _redirecting(kind: type, methods: frozenset[str]) -> type:
    """A subclass whose methods apply weights as :class:`AppliedWeights` does; all else is the class's own."""
    made = {}

    def redirected(name):
        original = getattr(kind, name)

        @functools.wraps(original)
        def method(self, *args, **kwargs):
            with AppliedWeights(self):
                return original(self, *args, **kwargs)

        return method

    made.update({name: redirected(name) for name in methods})
    return type(kind.__name__, (kind, ), dict(made, __module__=kind.__module__))


def redirect(module: nn.Module, methods: Iterable[str]) -> None:
    """Makes methods of a module that apply weights apply quantized ones, in place."""
    module.__class__ = _redirecting(type(module), frozenset(methods))
