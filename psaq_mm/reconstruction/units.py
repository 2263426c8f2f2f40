"""What is reconstructed together: attention blocks, and the layers between them in groups."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..quantization import Mode, hooked, quantized_layers, quantizer_mode

LARGEST = 12  # quantized layers and products in a unit that is no attention block; our choice


@dataclass(frozen=True)
class Unit:
    """A module that is reconstructed as a whole.

    Attributes:
        name (str): In the model.
        calls (int): How often a pass of the model runs it.
    """
    name: str
    calls: int


@torch.no_grad()
def find_units(model: nn.Module, targets: Iterable[str], blocks: Collection[nn.Module],
               run: Callable[[], object]) -> list[Unit]:
    """Find the units of a model, in the order in which it runs them.

    An attention block is a unit. Everything else inside the targets is one together with its siblings, as a neck, a
    stem or a merging of patches, up to a dozen quantized layers. A layer that no module's call shows has no unit.

    Args:
        model (nn.Module): Converted.
        targets (Iterable[str]): Names of the submodules that are quantized.
        blocks (Collection[nn.Module]): Its attention blocks.
        run (Callable): Runs it on an image.
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
    return [unit for _, unit in sorted(found.items(), key=lambda item: places[item[0]])]
