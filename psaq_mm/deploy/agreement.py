"""How well a graph agrees with the model that it was made from, and what must hold before it is delivered.

Two comparisons, each at every size that is claimed and in every runtime that is installed:

- A float graph from the same trace against the float model. Both compute the same, so that a difference of more than
  rounding (:data:`SAME_DB`) means a wrong trace, or an operator that the runtime computes wrongly.
- The int8 graph against the fake-quantized model. A difference in the last bit of a float now and then moves a value to
  the next integer. In deep networks this adds up until graph and fake-quantized model are as far from each other as two
  independent roundings of one float model are: 3 dB below the SQNR of quantization itself. :func:`required` allows for
  that, and no more than that and some spread. Below 8 bits quantization changes much, and that says little: there the
  fake-quantized model itself tells what last bits do, with layers that are :func:`disturbed`.

The module also knows how to repeat the second comparison where the model is not at hand: a :class:`Probe`.
"""
from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..models.features import tensors
from ..quantization import Mode, hooked, quantized_layers, quantizer_mode
from ..reconstruction.nested import mapped

SAME_DB = 60.0  # what float graph and float model must reach; rounding alone leaves 80 and more
MARGIN_DB = 6.0  # below the SQNR of quantization: 3 for two independent errors, 3 for the spread of small maps
CEILING_DB = 40.0  # a graph this good is good, however little quantization itself changes
DISTURBANCE = 1e-5  # of what a layer puts out: last bits of long sums, and biases on integers; our choice
FLOOR_DB = 3.0  # an output of zeros has 0 dB
LIMIT_DB = 200.0  # what stands for infinity, so that numbers stay valid JSON
SAMPLES = 1024  # values of each output that a probe keeps
PROBE_MARGIN_DB = 2.0  # a sample of an output spreads more than all of it
PROBE_BYTES = 2**18  # of all inputs of a graph's probes together


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Return the signal-to-noise ratio of a tensor to its reference, dB, within +-LIMIT_DB.

    Other shapes and values that are not finite count as the lowest.
    """
    if reference.shape != other.shape or not torch.isfinite(other).all():
        return -LIMIT_DB
    signal = reference.double().square().sum()
    noise = (reference.double() - other.double()).square().sum()
    if not noise:
        return LIMIT_DB
    return float((10 * torch.log10(signal / noise)).clamp(-LIMIT_DB, LIMIT_DB))


def required(quantization_db: float, disturbed_db: float = FLOOR_DB) -> float:
    """Return the SQNR that an int8 graph must reach, dB.

    Args:
        quantization_db (float): That of the fake-quantized model to the float one.
        disturbed_db (float): That of the disturbed fake-quantized model to itself. Defaults to one that demands
            nothing.
    """
    return max(min(max(quantization_db, disturbed_db), CEILING_DB) - MARGIN_DB, FLOOR_DB)


@contextmanager
def disturbed(model: nn.Module) -> Iterator[None]:
    """Within it, each quantized layer of a model puts out values a little off, as another way to sum makes them.

    Every value is multiplied by 1 + e, where e is Gaussian with a deviation of :data:`DISTURBANCE`.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(module, args, output):
        return mapped(output, lambda x: x * (1 + DISTURBANCE * torch.randn(x.shape, generator=generator)))

    with hooked([layer.register_forward_hook(disturb) for layer in quantized_layers(model).values()]):
        yield


class Reference(NamedTuple):
    """What a model computes for one input.

    Args:
        inputs (tuple): What the part of the model was called with, nested tuples of tensors.
        full (list[Tensor]): The float model's outputs, flat.
        quantized (list[Tensor]): The fake-quantized model's.
        disturbed (list[Tensor]): The fake-quantized model's with layers that are disturbed; none where the graph rounds
            what the model does not.
    """
    inputs: tuple
    full: list[Tensor]
    quantized: list[Tensor]
    disturbed: list[Tensor]

    @property
    def required(self) -> list[float]:
        """What an int8 graph must reach, for each output, dB."""
        return marks(self.full, self.quantized, self.disturbed)


def marks(full: list[Tensor], quantized: list[Tensor], disturbed: list[Tensor]) -> list[float]:
    """Return what an int8 graph must reach, for each output, dB; see :class:`Reference`."""
    own = [sqnr(a, b) for a, b in zip(quantized, disturbed)] or [FLOOR_DB] * len(full)
    return [required(sqnr(a, b), c) for a, b, c in zip(full, quantized, own)]


@torch.no_grad()
def reference(model: nn.Module, part: Callable, inputs: tuple, same_roundings: bool = True) -> Reference:
    """Compute the reference of a part of a quantized model.

    Args:
        model (nn.Module): Holds the part.
        part (Callable): Takes the inputs.
        inputs (tuple): Nested tuples of tensors.
        same_roundings (bool): Whether the graph rounds what the fake-quantized model does, and no more. Defaults to
            True.
    """
    with quantizer_mode(model, Mode.FLOAT):
        full = list(tensors(part(*inputs)))
    quantized = list(tensors(part(*inputs)))
    with disturbed(model):
        return Reference(inputs, full, quantized, list(tensors(part(*inputs))) if same_roundings else [])


class Finding(NamedTuple):
    """One comparison.

    Args:
        place (str): Where, e.g. '64 x 96'.
        graph (str): 'int8' or 'float'.
        runtime (str): The runtime.
        sqnr (float): Of the output that misses its mark by most, or holds it most narrowly, dB.
        required (float): What that output must reach, dB.
        error (str): Why the runtime could not run the graph, or ''.
    """
    place: str
    graph: str
    runtime: str
    sqnr: float
    required: float
    error: str = ''

    @property
    def passed(self) -> bool:
        """Whether the graph is as good as it must be."""
        return not self.error and self.sqnr >= self.required

    def __str__(self):
        if self.error:
            return f'{self.runtime} does not compute the {self.graph} graph for {self.place} ({self.error})'
        reference = 'fake-quantized' if self.graph == 'int8' else 'float'
        return (f'in {self.runtime} the {self.graph} graph has an SQNR of {self.sqnr:.1f} dB against the {reference} '
                f'model for {self.place}, and needs {self.required:.1f}')


def compare(run: Callable[..., Iterable[Tensor]], inputs: tuple, expected: list[Tensor], marks: list[float],
            **where) -> Finding:
    """Run a graph and hold its outputs against what is expected.

    Args:
        run (Callable): Takes the inputs.
        inputs (tuple): Of the graph.
        expected (list[Tensor]): Outputs, flat.
        marks (list[float]): What each must reach, dB.
        **where: ``place``, ``graph`` and ``runtime`` of the :class:`Finding`.
    """
    try:
        found = list(tensors(run(*inputs)))
    except Exception as error:  # whatever a runtime raises
        return Finding(sqnr=-LIMIT_DB, required=min(marks), error=first_line(error), **where)
    if len(found) != len(expected):
        return Finding(sqnr=-LIMIT_DB, required=min(marks), **where,
                       error=f'it has {len(found)} outputs instead of {len(expected)}')
    shapes = [(list(theirs.shape), list(ours.shape)) for ours, theirs in zip(expected, found)
              if ours.shape != theirs.shape]
    if shapes:
        return Finding(sqnr=-LIMIT_DB, required=min(marks), **where,
                       error=f'it puts out {shapes[0][0]} instead of {shapes[0][1]}')
    measured = [(sqnr(ours, theirs), mark) for ours, theirs, mark in zip(expected, found, marks)]
    worst = min(measured, key=lambda pair: pair[0] - pair[1])
    return Finding(sqnr=worst[0], required=worst[1], **where)


def first_line(error: Exception) -> str:
    """Return kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f'{type(error).__name__}: {text[0]}' if text else type(error).__name__


class Probe(NamedTuple):
    """An input of a graph and some of the values that it has to yield, to be stored in the graph.

    Args:
        place (str): As of :class:`Finding`.
        inputs (tuple[Tensor]): Flat; values on an 8-bit grid, see :func:`eight_bits`.
        samples (list[Tensor]): Values of each output, evenly spread.
        required (list[float]): What the graph must reach on them, dB.
    """
    place: str
    inputs: tuple[Tensor, ...]
    samples: list[Tensor]
    required: list[float]

    def check(self, run: Callable, runtime: str) -> Finding:
        """Hold what a runtime computes against the samples."""
        return compare(lambda *inputs: [spread(out) for out in tensors(run(*inputs))], self.inputs, self.samples,
                       self.required, place=self.place, graph='int8', runtime=runtime)


def spread(output: Tensor) -> Tensor:
    """Return up to SAMPLES values of a tensor, evenly spread."""
    flat = output.detach().float().flatten()
    return flat[torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).long()]


def _codes(x: Tensor):
    low, high = (float(end) for end in torch.aminmax(x))
    step = np.float32(max((high - low) / 255, 1e-12))
    return ((x.numpy() - np.float32(low)) / step).round().clip(0, 255).astype(np.uint8), np.float32([low, step])


def _values(codes, grid) -> Tensor:
    return torch.from_numpy(codes.astype(np.float32) * grid[1] + grid[0])


def eight_bits(x: Tensor) -> Tensor:
    """Round a tensor to 256 values between its ends, with which it can be stored in a probe exactly."""
    codes, grid = _codes(x.detach().float())
    return _values(codes, grid)


def probes(references: dict[str, Reference]) -> list[Probe]:
    """Choose what to store in a graph: the smallest references, one at least."""
    sizes = {place: sum(x.numel() for x in tensors(item.inputs)) for place, item in references.items()}
    chosen, total = [], 0
    for place in sorted(sizes, key=sizes.get):
        total += sizes[place]
        if chosen and total > PROBE_BYTES:
            break
        item = references[place]
        chosen.append(Probe(place, tuple(tensors(item.inputs)), [spread(x) for x in item.quantized],
                            [mark - PROBE_MARGIN_DB for mark in item.required]))
    return chosen


def packed(chosen: list[Probe]) -> str:
    """Write probes as text for the notes of a graph."""
    arrays = {}
    for i, probe in enumerate(chosen):
        arrays[f'place_{i}'], arrays[f'required_{i}'] = np.array(probe.place), np.float32(probe.required)
        for j, x in enumerate(probe.inputs):
            arrays[f'input_{i}_{j}'], arrays[f'grid_{i}_{j}'] = _codes(x)
        for j, x in enumerate(probe.samples):
            arrays[f'output_{i}_{j}'] = x.numpy()
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return base64.b64encode(stream.getvalue()).decode()


def unpacked(text: str) -> list[Probe]:
    """Read what :func:`packed` wrote."""
    arrays = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)

    def numbered(kind, i):
        return [name for name in arrays.files if name.startswith(f'{kind}_{i}_')]

    return [Probe(str(arrays[f'place_{i}']),
                  tuple(_values(arrays[name], arrays[name.replace('input', 'grid')]) for name in numbered('input', i)),
                  [torch.from_numpy(arrays[name]) for name in numbered('output', i)],
                  arrays[f'required_{i}'].tolist())
            for i in range(sum(name.startswith('place_') for name in arrays.files))]
