"""What is reconstructed together: attention blocks, and the layers between them in groups."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..quantization import Mode, hooked, quantized_layers, quantizer_mode
from .nested import mapped

LARGEST = 12  # quantized layers and products in a unit that is no attention block; our choice


@dataclass(frozen=True)
class Unit:
    """A module that is reconstructed as a whole.

    Attributes:
        name (str): In the model.
        calls (int): How often a pass of the model runs it.
        felt (bool): Whether the model's features depend on it. Those of a two-stage head do not: its inputs are boxes
            that each model chooses for itself.
    """
    name: str
    calls: int
    felt: bool = True


def felt_modules(modules: Collection[nn.Module], run: Callable[[], Iterable[Tensor]]) -> set[nn.Module]:
    """Return the modules that features depend on.

    Args:
        modules (Collection[nn.Module]): In a model.
        run (Callable): Runs the model and returns its features.
    """
    if not modules:
        return set()
    marks = {module: torch.zeros((), requires_grad=True) for module in modules}

    def mark(module, args, output):
        return mapped(output, lambda value: value + marks[module].to(value) if value.is_floating_point() else value)

    with hooked([module.register_forward_hook(mark) for module in modules]), torch.enable_grad():
        score = sum(feature.float().sum() for feature in run() if feature.requires_grad)
        if not isinstance(score, Tensor):
            return set()
        grads = torch.autograd.grad(score, list(marks.values()), allow_unused=True)
    return {module for module, grad in zip(marks, grads) if grad is not None}


@torch.no_grad()
def find_units(model: nn.Module, targets: Iterable[str], blocks: Collection[nn.Module],
               run: Callable[[], Iterable[Tensor]]) -> list[Unit]:
    """Find the units of a model, in the order in which it runs them.

    An attention block is a unit. Everything else inside the targets is one together with its siblings, as a neck, a
    stem or a merging of patches, up to a dozen quantized layers. A layer that no module's call shows has no unit, see
    :func:`without_unit`.

    Args:
        model (nn.Module): Converted.
        targets (Iterable[str]): Names of the submodules that are quantized.
        blocks (Collection[nn.Module]): Its attention blocks.
        run (Callable): Runs it on an image and returns its features.
    """
    layers, blocks, order = set(quantized_layers(model)), set(blocks), {}
    handles = [module.register_forward_pre_hook(lambda m, *unused: order.__setitem__(m, order.pop(m, 0) + 1))
               for module in model.modules()]
    with hooked(handles), quantizer_mode(model, Mode.FLOAT):
        run()
    found = {}

    def inside(name):
        return sum(layer == name or layer.startswith(f'{name}.') for layer in layers)

    def search(module, name):
        count = inside(name)
        if not count:
            return
        if module in order and (module in blocks or count <= LARGEST and blocks.isdisjoint(module.modules())):
            found.setdefault(module, Unit(name, order[module]))
            return
        for child, part in module.named_children():
            search(part, f'{name}.{child}')

    for target in targets:
        search(model.get_submodule(target), target)
    places = {module: place for place, module in enumerate(order)}
    with quantizer_mode(model, Mode.FLOAT):
        felt = felt_modules(found, run)
    return [replace(unit, felt=module in felt)
            for module, unit in sorted(found.items(), key=lambda item: places[item[0]])]


def without_unit(model: nn.Module, targets: Iterable[str], units: Iterable[Unit]) -> list[str]:
    """Return the names of the quantized layers and products in the targets that no unit holds.

    Args:
        model (nn.Module): Converted.
        targets (Iterable[str]): Names of the submodules that are quantized.
        units (Iterable[Unit]): From :func:`find_units`.
    """
    def inside(name, parents):
        return any(name == parent or name.startswith(f'{parent}.') for parent in parents)

    held = [unit.name for unit in units]
    return [name for name in quantized_layers(model) if inside(name, targets) and not inside(name, held)]
