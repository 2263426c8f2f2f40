"""Swaps the layers of a model for quantized ones, in place and by rule; calibrates them."""
from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import UserError
from .config import LayerConfig
from .layers import (
    CONTEXT,
    SCORES,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMatMul,
    projections,
    quantize_application,
    quantize_attention,
    quantize_multihead_attention,
)
from .quantizer import FakeQuantizer, Mode
from .recognition import applied_weights, computes_visibly, is_attention
from .weights import redirect

# A layer is what its forward computes: subclasses that inherit it are the same layer.
LAYERS = {
    nn.Linear.forward: QuantizedLinear,
    nn.Conv2d.forward: QuantizedConv2d,
    nn.ConvTranspose2d.forward: QuantizedConvTranspose2d,
}
FloatLayers = Mapping[Callable, type]


class PatternError(UserError):
    """A name pattern or a target of the settings matches nothing in the model."""


def quantizable(model: nn.Module,
                targets: Iterable[str],
                layers: FloatLayers = LAYERS) -> dict[str, nn.Module]:
    """All layers that can be quantized inside the targets, by name.

    The parts of an attention module ``m`` that are no modules themselves map to the attention module: its two products
    ``m.matmul_scores`` and ``m.matmul_context``, and with ``nn.MultiheadAttention`` its input projection ``m.in_proj``
    (or ``m.q_proj``, ``m.k_proj``, ``m.v_proj``).

    Args:
        model (nn.Module): Not converted yet.
        targets (Iterable[str]): Names of submodules.
        layers (Mapping[Callable, type]): Quantized counterpart by the forward function of the float layer.

    Returns:
        dict[str, nn.Module]: In order of definition.

    Raises:
        PatternError: If a target is no submodule of the model.
    """
    modules = dict(model.named_modules())
    found = {}
    for target in targets:
        if target not in modules or not target:
            hint = difflib.get_close_matches(target, modules, 1)
            children = ', '.join(name for name, _ in model.named_children())
            raise PatternError(f"target '{target}' is no submodule of {type(model).__name__}" +
                               (f", did you mean '{hint[0]}'?" if hint else '') + f' (top level: {children})')
        for name, module in modules[target].named_modules(prefix=target, remove_duplicate=False):
            if is_layer(module, layers):
                found[name] = module
            else:
                found.update((f'{name}.{part}', module) for part in attention_parts(module))
    return found


def is_layer(module: nn.Module, layers: FloatLayers = LAYERS) -> bool:
    """Whether a module is a layer that can be quantized: one of those known by their forward function, or a subclass
    with a forward of its own that can be seen computing.
    """
    return type(module).forward in layers or isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and \
        not isinstance(module, QuantizedLayer) and computes_visibly(type(module))


def attention_parts(module: nn.Module) -> tuple[str, ...]:
    """Names of what is quantized inside a float attention module besides its submodules; nothing for any other."""
    if type(module).forward is nn.MultiheadAttention.forward:
        return (*projections(module), SCORES, CONTEXT)
    return (SCORES, CONTEXT) if is_attention(module) else ()


def convert_attention(attention: nn.Module, configs: dict[str, LayerConfig]) -> nn.Module:
    """Makes the parts of an attention quantized, in place.

    Args:
        attention (nn.Module): ``nn.MultiheadAttention``, or one whose forward shows its products.
        configs (dict[str, LayerConfig]): By part; one that is not in here stays in float but becomes a module, which
            the patch similarities can be read from.
    """
    untouched = LayerConfig(weight=None, activation=None)
    if type(attention).forward is nn.MultiheadAttention.forward:
        parts = (*projections(attention), SCORES, CONTEXT)
        return quantize_multihead_attention(attention, {part: configs.get(part, untouched) for part in parts})
    return quantize_attention(attention, configs.get(SCORES, untouched), configs.get(CONTEXT, untouched))


def match(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that a shell-style pattern matches.

    Raises:
        PatternError: If there are none.
    """
    names = list(names)
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        hint = difflib.get_close_matches(pattern, names, 1, 0.3)
        raise PatternError(f"pattern '{pattern}' matches none of the {len(names)} quantizable layers" +
                           (f", the closest name is '{hint[0]}'" if hint else ''))
    return matched


def convert(model: nn.Module,
            layers: dict[str, nn.Module],
            configs: dict[str, LayerConfig],
            counterparts: FloatLayers = LAYERS) -> nn.Module:
    """Replaces layers by their quantized counterparts, in place; parameters stay the same objects.

    Args:
        model (nn.Module): The model to change.
        layers (dict[str, nn.Module]): From :func:`quantizable`.
        configs (dict[str, LayerConfig]): What each layer gets; one that is not in here stays in float.
        counterparts (Mapping[Callable, type]): As ``layers`` of :func:`quantizable`.

    Returns:
        nn.Module: The same model.
    """
    converted = {}  # a layer that is used in two places is converted once
    for name, module in layers.items():
        if name not in configs or id(module) in converted and converted[id(module)] is module:
            continue
        owner_name, _, attribute = name.rpartition('.')
        if module is model.get_submodule(owner_name):  # a part of an attention: all of its parts at once
            parts = {part: configs[key] for part, key in _siblings(layers, owner_name, module) if key in configs}
            converted[id(module)] = convert_attention(module, parts)
            continue
        if id(module) not in converted:
            known = counterparts.get(type(module).forward)
            converted[id(module)] = known.from_float(module, configs[name]) if known else \
                quantize_application(module, configs[name])
        setattr(model.get_submodule(owner_name), attribute, converted[id(module)])
    return settle(model)


def show_applied_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Prepares modules that compute with the weights of layers inside them, in place, before the conversion.

    Args:
        model (nn.Module): Not converted yet.
        layers (dict[str, nn.Module]): From :func:`quantizable`.
    """
    quantized = {id(layer) for layer in layers.values()}
    owners = {name.rpartition('.')[0] for name in layers}
    while added := {name.rpartition('.')[0] for name in owners if name} - owners:
        owners |= added
    for owner in {id(module): module for module in map(model.get_submodule, sorted(owners))}.values():
        parts = dict(owner.named_modules())
        methods = {name for name, paths in applied_weights(type(owner)).items() if any(
            path is None or path and (path not in parts or id(parts[path]) in quantized) for path in paths)}
        if methods and not is_layer(owner):
            redirect(owner, methods)


def settle(model: nn.Module) -> nn.Module:
    """Tells quantizers that were added to a model their names, for errors, and moves them to its device."""
    device = next(model.parameters()).device
    for name, quantizer in quantizers(model).items():
        quantizer.name = name
        quantizer.to(device)
    return model


def _siblings(layers, owner_name, module):
    prefix = f'{owner_name}.'
    return [(name.removeprefix(prefix), name) for name, other in layers.items()
            if other is module and name.startswith(prefix)]


def quantizers(model: nn.Module, every_name: bool = False) -> dict[str, FakeQuantizer]:
    """Return all fake-quantizers of a model by name.

    Args:
        model (nn.Module): The model.
        every_name (bool): Whether a quantizer in a module that the model holds in several places comes under each of
            its names, as in state dicts. Defaults to False: under the first one.
    """
    return {name: m for name, m in model.named_modules(remove_duplicate=not every_name)
            if isinstance(m, FakeQuantizer)}


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All quantized layers and matrix products of a model by name."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, QuantizedLayer) or isinstance(m, QuantizedMatMul) and m.a_quantizer is not None}


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Sets what every quantizer of the model does from now on."""
    for quantizer in quantizers(model).values():
        quantizer.mode = mode


@contextmanager
def quantizer_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Sets the mode of all quantizers and restores each one's own afterwards."""
    before = {quantizer: quantizer.mode for quantizer in quantizers(model).values()}
    set_mode(model, mode)
    try:
        yield
    finally:
        for quantizer, old in before.items():
            quantizer.mode = old


@torch.no_grad()
def calibrate(model: nn.Module, run: Callable[[], None], reduce=None) -> None:
    """Chooses every scale: weights from the weights, activations from what flows through the float model.

    Args:
        model (nn.Module): A converted model.
        run (Callable): Feeds the calibration images through the model.
        reduce (callable, optional): See :meth:`FakeQuantizer.calibrate`.

    Raises:
        UserError: If the images never reached one of the layers.
        UserError: If the model produced NaN or infinite values.
    """
    with quantizer_mode(model, Mode.OBSERVE):
        for layer in quantized_layers(model).values():
            weight_quantizer = getattr(layer, 'weight_quantizer', None)
            if weight_quantizer is not None:  # seen once: it does not change from batch to batch
                weight_quantizer.mode = Mode.FLOAT
                weight_quantizer.observe(layer.weight)
        run()
    for name, quantizer in quantizers(model).items():
        if not quantizer.calibrate(reduce):
            raise UserError(f"'{name}' saw no data during calibration: the layer is not used when features are "
                               'extracted. Keep it in float (keep_float) or take it out of the targets.')


@torch.no_grad()
def search_weight_ranges(model: nn.Module, weights: Collection[Tensor],
                         progress: Callable[[str, int], Callable[[], None]] | None = None) -> Callable[[], None]:
    """Give weights that were calibrated by min-max the ranges of least squared error, see :class:`MSEObserver`.

    Args:
        model (nn.Module): Calibrated.
        weights (Collection[Tensor]): The parameters that are meant.
        progress (Callable, optional): Gets a title and the number of weights; returns what is called after each.

    Returns:
        Callable: Puts the ranges back as they were.
    """
    before, wanted = {}, {id(weight) for weight in weights}
    layers = [layer for layer in quantized_layers(model).values()
              if getattr(layer, 'weight_quantizer', None) is not None and id(layer.weight) in wanted
              and layer.weight_quantizer.config.observer == 'minmax']
    step = progress('weights', len(layers)) if progress else lambda: None
    for layer in layers:
        quantizer = layer.weight_quantizer
        before[quantizer] = quantizer.scale.clone(), quantizer.zero_point.clone()
        quantizer.observe(layer.weight, 'mse')
        quantizer.calibrate()
        step()

    def restore():
        for quantizer, (scale, zero_point) in before.items():
            quantizer.scale.copy_(scale)
            quantizer.zero_point.copy_(zero_point)

    return restore


@torch.no_grad()
def unused_quantizers(model: nn.Module, run: Callable[[], None]) -> list[str]:
    """Names of activation quantizers that see nothing while ``run`` feeds the model; leaves no trace."""
    with quantizer_mode(model, Mode.OBSERVE):
        run()
    unused = []
    for name, quantizer in quantizers(model).items():
        if quantizer.observer is None and not name.endswith('weight_quantizer'):
            unused.append(name)
        quantizer.observer = None
    return unused


def model_bits(model: nn.Module) -> int:
    """Bits that the parameters take when quantized weights are stored as integers, the rest as float32.

    Scales and zero points count as 32 bits each.
    """
    bits = 32 * sum(p.numel() for p in model.parameters())
    for layer in quantized_layers(model).values():
        quantizer = getattr(layer, 'weight_quantizer', None)
        if quantizer is not None:
            bits -= (32 - quantizer.config.bits) * layer.weight.numel()
    return bits + 32 * sum(q.scale.numel() + q.zero_point.numel() for q in quantizers(model).values())
