"""Quantized heads as graphs of their own: each maps tensors to tensors, what lies between them stays the library's."""
from __future__ import annotations

import json
from functools import partial

import torch
from torch import nn

from ..classification import Classifier
from ..models.features import FEATURE_PARTS, data_samples, tensors
from ..quantization import Mode, quantized_layers, quantizer_mode
from .adapters import traceable
from .graph import ASYMMETRIC, Form, check_form, exportable, nested, nesting, write


class Head(nn.Module):
    """A head with its inputs and outputs in flat lists; ``outputs`` tells how they were nested, once it has run.

    Args:
        module (nn.Module): The head.
        inputs (tuple): Example of its positional arguments, nested tuples and lists of tensors.
    """

    def __init__(self, module, inputs):
        super().__init__()
        self.module, self.inputs, self.outputs = module, nesting(inputs), None

    def forward(self, *flat):
        found = self.module(*nested(self.inputs, flat))
        self.outputs = nesting(found)
        return tuple(tensors(found))


def head_names(model: nn.Module) -> list[str]:
    """Return names of the heads that hold quantized layers and map tensors to tensors; of a two-stage detector's second
    stage those for boxes, masks and the like, each of a cascade's.
    """
    found = {}
    for name, child in model.named_children():
        if name in FEATURE_PARTS or isinstance(model, Classifier):
            continue
        second_stage = hasattr(child, 'bbox_head') or hasattr(child, 'mask_head')
        parts = {f'{name}.{key}': part for key, part in child.named_children()} if second_stage else {name: child}
        for path, part in parts.items():
            stages = part.named_children() if isinstance(part, nn.ModuleList) else ()
            found.update({f'{path}.{stage}': module for stage, module in stages} or {path: part})
    return [name for name, module in found.items() if quantized_layers(module)]


@torch.no_grad()
def head_inputs(model: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, tuple]:
    """Return what each head gets when a model predicts; those that are not run, or with named arguments, are left out.

    Args:
        model (nn.Module): Quantized.
        names (list[str]): Of the heads.
        images (Tensor): (1, C, H, W).
    """
    seen = {}

    def record(name, forward, *inputs, **named):
        if not named:
            seen[name] = inputs
        return forward(*inputs, **named)

    heads = {name: model.get_submodule(name) for name in names}
    for name, head in heads.items():
        head.forward = partial(record, name, head.forward)  # no hook: mmseg calls the method itself
    try:
        model(images, data_samples(images), mode='tensor')
    finally:
        for head in heads.values():
            del head.forward
    return seen


@torch.no_grad()
def export_head(model: nn.Module, name: str, inputs: tuple, path, dynamic: bool = False,
                form: Form = ASYMMETRIC, integers: bool = True) -> None:
    """Write a head as ONNX. Those of a second stage, whose names have a dot, take any number of proposals.

    Args:
        model (nn.Module): Quantized and calibrated, on CPU.
        name (str): Of :func:`head_names`.
        inputs (tuple): Of :func:`head_inputs`.
        path (str | Path): The file to write.
        dynamic (bool): Whether feature maps may have other sizes. Defaults to False.
        form (Form): What the graph is to be like; ``images`` are more inputs, of one structure with ``inputs``.
        integers (bool): As of :func:`export_graph`.

    Raises:
        UserError: If the head cannot be exported.
    """
    if integers:
        check_form(model, form)
    head = Head(model.get_submodule(name), inputs).eval()
    flat = tuple(tensors(inputs))
    proposals = '.' in name
    values = dict(input=flat, output=head(*flat))
    names = {kind: [f'{kind}_{i}' for i in range(len(value))] for kind, value in values.items()}
    axes = {n: {0: 'proposals'} if proposals else {2: f'{n}_height', 3: f'{n}_width'} for kind in values
            for n, value in zip(names[kind], values[kind]) if proposals or value.dim() == 4}
    notes = dict(head=name, inputs=json.dumps([list(value.shape[1:]) for value in flat]),
                 outputs=json.dumps(head.outputs), preset=form.preset, proposals=str(proposals), dynamic=str(dynamic))
    with traceable(model), exportable(model, form.preset) if integers else quantizer_mode(model, Mode.FLOAT):
        write(head, flat, path, *names.values(), axes if dynamic or proposals else None, notes, name,
              form._replace(images=tuple(tuple(tensors(item)) for item in form.images)))
