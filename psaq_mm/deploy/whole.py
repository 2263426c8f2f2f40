"""A whole model as one graph: written, and held against the model before it is delivered.

Three comparisons, in every runtime that is installed and at sizes that stand for all:

- what the library predicts and what :class:`Predictor` computes with the library's functions replaced: the same;
- a float graph from the same trace: the same feature maps within rounding, and the same answers;
- the int8 graph: feature maps as close to the fake-quantized model's as :mod:`psaq_mm.deploy.agreement` demands of a
  graph of features, and answers about as close as the fake-quantized model's are to the float model's.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..errors import UserError
from ..models.features import tensors
from ..quantization import Mode, quantizer_mode
from .adapters import traceable
from .agreement import CEILING_DB, SAME_DB, compare, first_line, required, sqnr
from .answers import agreement
from .extras import need
from .graph import exportable, write
from .library import traceable_library
from .packing import pack_weights
from .predictor import Predictor
from .runtime import SESSIONS

INPUT = 'images'
SAME = 0.98  # agreement of answers that only rounding tells apart: two equal scores may swap at the limit
MARGIN = 0.1  # by which an int8 graph may agree less with the fake-quantized model than that does with the float one
GOOD = 0.95  # an agreement that is good whatever quantization itself does


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the list holds the feature maps of the latest pass, flat."""
    found, owner = [], model
    name = 'extract_feat' if hasattr(model, 'extract_feat') else 'logits'
    computed = getattr(owner, name)

    def show(*args, **named):
        features = computed(*args, **named)
        found[:] = tensors(features)
        return features

    setattr(owner, name, show)
    try:
        yield found
    finally:
        delattr(owner, name)


class Watched(nn.Module):
    """A predictor that puts out its answers, then the feature maps that they come from."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, images):
        with watched(self.predictor.model) as features:
            answers = self.predictor(images)
            return (*answers, *features)


class Expected(NamedTuple):
    """What a predictor computes for an image.

    Args:
        answers (list[np.ndarray]): As the predictor names them.
        features (list[Tensor]): Flat.
    """
    answers: list[np.ndarray]
    features: list[Tensor]


@torch.no_grad()
def expected(predictor: Predictor, images: Tensor) -> Expected:
    """Return what a predictor computes, by the library's code or the one that takes its place."""
    with watched(predictor.model) as features:
        answers = predictor(images)
        return Expected([value.numpy() for value in answers], [value.clone() for value in features])


@contextmanager
def as_traced(predictor: Predictor) -> Iterator[None]:
    """Within it, a predictor computes what its graph will."""
    with traceable(predictor.model), traceable_library():
        yield


class Difference(NamedTuple):
    """One comparison of answers.

    Args:
        place (str): Size of the image, e.g. '480 x 640'.
        graph (str): 'int8', 'float' or 'replaced' (no graph yet).
        runtime (str): The runtime, or 'PyTorch'.
        agreement (float): From 0 to 1, see :func:`psaq_mm.deploy.answers.agreement`.
        required (float): What it must reach.
        error (str): Why there is nothing to compare, or ''.
    """
    place: str
    graph: str
    runtime: str
    agreement: float
    required: float
    error: str = ''

    @property
    def passed(self) -> bool:
        """Whether the answers are as close as they must be."""
        return not self.error and self.agreement >= self.required

    def __str__(self):
        if self.error:
            return f'{self.runtime} does not compute the {self.graph} graph for {self.place} ({self.error})'
        other = 'fake-quantized' if self.graph == 'int8' else 'float'
        return (f'in {self.runtime} the answers of the {self.graph} graph agree with those of the {other} model by '
                f'{self.agreement:.3f} for {self.place}, and need {self.required:.3f}')


def write_graph(predictor: Predictor, path: Path, images: Tensor, dynamic: bool, preset: str, integers: bool,
                notes: dict | None = None) -> int:
    """Write the graph of a predictor, which puts out feature maps after its answers: see :func:`without_features`.

    Args:
        predictor (Predictor): Of a quantized model, on CPU.
        path (Path): The file.
        images (Tensor): To trace with, (1, H, W, C) uint8.
        dynamic (bool): Whether the graph takes images of other sizes.
        preset (str): 'asymmetric' or 'symmetric'.
        integers (bool): Whether to export what quantizers do.
        notes (dict, optional): For the graph's metadata.

    Returns:
        int: How many feature maps there are.
    """
    model, whole = predictor.model, Watched(predictor).eval()
    with as_traced(predictor), exportable(model, preset) if integers else quantizer_mode(model, Mode.FLOAT):
        found = whole(images)
        names = [*predictor.names, *(f'feature_{i}' for i in range(len(found) - len(predictor.names)))]
        axes = {INPUT: {1: 'height', 2: 'width'}} if dynamic else {}
        axes.update({name: predictor.axes(name) for name in predictor.names if predictor.axes(name)})
        if dynamic:
            axes.update({name: {i: f'{name}_{i}' for i in range(2, value.dim())}
                         for name, value in zip(names, found) if name not in predictor.names})
        write(whole, (images, ), path, [INPUT], names, axes or None, notes or {}, type(model).__name__)
    return len(names) - len(predictor.names)


def without_features(path: Path, answers: int) -> None:
    """Take the feature maps from the outputs of a graph, and pack its weights, in place."""
    onnx = need('onnx')
    graph = onnx.load_model_from_string(Path(path).read_bytes())
    del graph.graph.output[answers:]
    pack_weights(graph)
    onnx.checker.check_model(graph)
    Path(path).write_bytes(graph.SerializeToString())


def hold(run, images: dict[str, Tensor], aims: dict[str, Expected], marks: dict, names, **where) -> list:
    """Hold what a graph answers against what it should, image by image.

    Args:
        run (Callable): Takes an array (1, H, W, C); returns arrays.
        images (dict[str, Tensor]): By place.
        aims (dict[str, Expected]): By place.
        marks (dict[str, float]): The agreement to reach, by place.
        names (Sequence[str]): Of the answers.
        **where: ``graph`` and ``runtime``.
    """
    found = []
    for place, image in images.items():
        try:
            answers = run(image.numpy())[:len(names)]
            found.append(Difference(place, agreement=agreement(names, aims[place].answers, answers),
                                    required=marks[place], **where))
        except Exception as error:  # whatever a runtime raises
            found.append(Difference(place, agreement=0.0, required=marks[place], error=first_line(error), **where))
    return found
