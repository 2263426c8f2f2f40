"""Parts of a model as graphs, each in int8 and in float, held against the model: backbone and neck, and heads."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import backbone_of
from ..models.features import tensors
from ..quantization import Mode, quantizer_mode
from .agreement import SAME_DB, Finding, Reference, compare, eight_bits, first_line, packed, probes, reference
from .graph import ASYMMETRIC, Features, Form, annotate, export_graph
from .heads import export_head, head_inputs, head_names
from .runtime import Graph, HeadGraph, host

PROPOSALS = 16  # that a head's graph keeps to check itself with


@dataclass
class Part:
    """A graph that was written.

    Args:
        file (Path): The graph.
        findings (list[Finding]): All comparisons that were made.
        products (dict[str, bool]): Products in the chosen runtime, and whether they run in int8.
    """
    file: Path
    findings: list[Finding]
    products: dict[str, bool] = field(default_factory=dict)

    def failures(self, runtime: str) -> list[Finding]:
        """Return what did not pass in a runtime, the worst first."""
        failed = [item for item in self.findings if item.runtime == runtime and not item.passed]
        return sorted(failed, key=lambda item: (item.graph == 'int8', item.sqnr - item.required))

    def passed(self, runtime: str) -> bool:
        """Whether the graph was measured in a runtime and found right."""
        return any(item.runtime == runtime for item in self.findings) and not self.failures(runtime)

    def note(self, references: dict[str, Reference], **claims: str) -> None:
        """Write into the graph what was measured, and what to repeat that with."""
        runtimes = {item.runtime for item in self.findings}
        annotate(self.file, dict(claims, probes=packed(probes(references)), measured=json.dumps({
            name: dict(host=host(name), wrong=str(self.failures(name)[0]) if self.failures(name) else None)
            for name in runtimes})))


@torch.no_grad()
def write_part(file: Path, write: Callable, kind: type[Graph], references: dict[str, Reference],
               runtimes: list[str]) -> Part:
    """Write a graph in int8 and in float, hold both against the model, and keep the one in int8.

    Args:
        file (Path): The graph.
        write (Callable): Takes a path and ``integers``, as :func:`export_graph` does.
        kind (type[Graph]): What runs it.
        references (dict[str, Reference]): By place, e.g. '64 x 96'.
        runtimes (list[str]): To measure in; the first one is the chosen.
    """
    part = Part(file, [])
    for graph, path in (('float', file.with_suffix('.float.onnx')), ('int8', file)):
        write(path, integers=graph == 'int8')
        for runtime in runtimes:
            try:
                session = kind(str(path), runtime)
            except UserError as error:
                part.findings.append(Finding(next(iter(references)), graph, runtime, 0.0, SAME_DB, str(error)))
                continue
            for place, item in references.items():
                expected, marks = (item.full, [SAME_DB] * len(item.full)) if graph == 'float' else (
                    item.quantized, item.required)
                part.findings.append(compare(session.compute, tuple(tensors(item.inputs)), expected, marks, place=place,
                                             graph=graph, runtime=runtime))
            if path == file and runtime == runtimes[0]:
                part.products = session.session.products()
            del session
        if path != file:
            path.unlink()
    return part


def resized(image: Tensor, size) -> Tensor:
    """Return an image in another size, (1, C, H, W)."""
    return eight_bits(nn.functional.interpolate(image, tuple(size), mode='bilinear', align_corners=False))


def place_of(size) -> str:
    """Name a size."""
    return f'{size[0]} x {size[1]}'


@torch.no_grad()
def refusal(model: nn.Module, image: Tensor) -> str | None:
    """Return why a model itself cannot take an image, or None."""
    try:
        with quantizer_mode(model, Mode.FLOAT):
            Features(model)(image)
    except UserError:
        raise
    except Exception as error:  # whatever a forward raises at a size that it was not made for
        return first_line(error)
    return None


def sizes_to_measure(model: nn.Module, image: Tensor, traced: tuple[int, int]) -> tuple[list, int, str | None]:
    """Choose sizes that stand for all: small with narrow maps, large, flat and tall, not of even strides.

    Args:
        model (nn.Module): Quantized.
        image (Tensor): To be enlarged and reduced.
        traced (tuple[int, int]): (H, W) of the trace.

    Returns:
        tuple[list[tuple[int, int]], int, str | None]: The sizes, the traced one first; what the model wants sides to be
        multiples of; if it takes no other size, why.
    """
    height, width = traced
    kinds = (((130, 70), (height // 2 + 1, width // 2 + 3), (height - 7, width - 9)),  # the first that it takes counts
             ((height + 24, width + 72), ), ((height * 5 // 4, width), ), ((height + 104, width - width // 4), ))
    reason = None
    for unit in (1, 2, 4, 8, 16, 32, 64, 128):
        found = [traced]
        if any(side % unit for side in traced):
            break
        for choices in kinds:
            for size in choices:
                size = tuple(max(side // unit, 1) // 2 * 2 * unit + unit for side in size)  # odd multiples
                why = None if size in found else refusal(model, resized(image, size))
                reason = reason or why
                if why is None:
                    found.append(size)
                    break
            else:
                break
        else:
            return list(dict.fromkeys(found)), unit, None
    return [traced], 1, reason


def export_features(model, folder: Path, image: Tensor, traced: tuple[int, int], fixed: bool, runtimes: list[str],
                    form: Form = ASYMMETRIC) -> dict:
    """Write ``features.onnx``: for every size if that is right in the chosen runtime, otherwise for the traced one.

    Args:
        model (nn.Module): Quantized.
        folder (Path): Where to.
        image (Tensor): To check with, (1, C, H, W).
        traced (tuple[int, int]): (H, W).
        fixed (bool): Whether a graph for the traced size is wanted.
        runtimes (list[str]): To measure in, the chosen one first.
        form (Form): As of :func:`export_graph`.

    Returns:
        dict: ``part``, ``sizes``, ``size`` (None for every size), ``multiple_of``, ``at_least``, and ``reason``: why
        the graph is for one size though every size was wanted, or None.

    Raises:
        UserError: If no graph is right in the chosen runtime.
    """
    why = refusal(model, resized(image, traced))
    if why is not None:
        raise UserError(f'{type(backbone_of(model)).__name__} cannot take images of {place_of(traced)} ({why}): give '
                        'a size that it takes with --size H W')
    sizes, unit, reason = ([traced], 1, None) if fixed else sizes_to_measure(model, image, traced)
    reason = reason and f'the model itself takes no other size ({reason})'
    for dynamic in (True, False):
        if dynamic and len(sizes) == 1:
            continue
        sizes = sizes if dynamic else [traced]
        inputs = {place_of(size): resized(image, size) for size in sizes}
        if form.batch:
            one = inputs[place_of(traced)]
            inputs[f'3 images of {place_of(traced)}'] = torch.cat([one, one.flip(3), eight_bits(-one)])
        references = {place: reference(model, Features(model), (value, ), form.same_roundings)
                      for place, value in inputs.items()}
        try:
            part = write_part(folder / 'features.onnx', lambda path, integers, dynamic=dynamic: export_graph(
                model, path, traced, dynamic, form, integers), Graph, references, runtimes)
        except Exception as error:  # the exporter's or the model's, which traces what it never did
            if isinstance(error, UserError) and not dynamic:
                raise
            failure = f'it cannot be traced ({first_line(error)})'
        else:
            failed = part.failures(runtimes[0])
            failure = str(failed[0]) if failed else None
        if failure is None:
            least = min(min(size) for size in sizes)
            part.note(references, multiple_of=str(unit), at_least=str(least))
            return dict(part=part, sizes=sizes, size=None if dynamic else traced, multiple_of=unit, at_least=least,
                        reason=reason)
        if dynamic:
            reason = f'no graph for every size is right: {failure}'
    hint = ''.join(f'; {name} computes it rightly, use --runtime {name}' for name in runtimes[1:]
                   if 'cannot be traced' not in failure and part.passed(name))
    raise UserError(f'{type(backbone_of(model)).__name__} cannot be exported for images of {place_of(traced)}: '
                    f'{failure}{hint or ". Try another --size H W"}')


@torch.no_grad()
def export_heads(model, folder: Path, images: dict[str, Tensor], runtimes: list[str], dynamic: bool,
                 form: Form = ASYMMETRIC):
    """Write the heads whose graphs are right in the chosen runtime.

    Args:
        model (nn.Module): Quantized.
        folder (Path): Where to.
        images (dict[str, Tensor]): By place, that of the trace first, (1, C, H, W).
        runtimes (list[str]): To measure in, the chosen one first.
        dynamic (bool): Whether heads shall take maps of every size.
        form (Form): What their graphs are to be like; ``images`` are those of the model, (1, C, H, W).

    Returns:
        tuple[dict[str, Part], dict[str, str]]: By name of the head; of those that stay fake-quantized, why.
    """
    done, failed = {}, {}
    names = head_names(model)
    seen = {place: head_inputs(model, names, image) for place, image in images.items()} if names else {}
    more = [head_inputs(model, names, image) for image in form.images] if names else []
    for name in names:
        inputs = {place: tuple_of_bytes(found[name]) for place, found in seen.items() if name in found}
        if not inputs:
            failed[name] = 'is not run in prediction, or not by positional arguments'
            continue
        path = folder / f'{name}.onnx'
        try:
            references = {f'{name}, {place}': reference(
                model, model.get_submodule(name), value, form.same_roundings)
                          for place, value in inputs.items() if all(x.numel() for x in tensors(value))}
            traced = next(iter(references.values())).inputs
            own = form._replace(images=tuple(found[name] for found in more if name in found))
            part = write_part(path, lambda file, integers, name=name, traced=traced, own=own: export_head(
                model, name, traced, file, dynamic, own, integers), HeadGraph, references, runtimes)
            if part.failures(runtimes[0]):
                raise UserError(str(part.failures(runtimes[0])[0]))
            if '.' in name:  # any number of proposals: a few are enough to repeat the measurement with
                references = {place: reference(model, model.get_submodule(name), tuple_of_bytes(
                    item.inputs, PROPOSALS), form.same_roundings) for place, item in references.items()}
            part.note(references)
            done[name] = part
        except Exception as error:  # the exporter's, the runtime's or the head's own: there is a way on without it
            path.unlink(missing_ok=True)
            path.with_suffix('.float.onnx').unlink(missing_ok=True)
            failed[name] = str(error) if isinstance(error, UserError) else first_line(error)
    return done, failed


def tuple_of_bytes(nested, count: int | None = None):
    """Return nested tensors, or the first so many rows of each, on 8-bit grids, so that they can be stored."""
    if isinstance(nested, Tensor):
        return eight_bits(nested[:count]) if nested.numel() else nested
    return type(nested)(tuple_of_bytes(item, count) for item in nested)
