"""A whole model as one graph: written, and held against the model before it is delivered.

Three comparisons, in every runtime that is installed and at sizes that stand for all:

- what the library predicts and what :class:`Predictor` computes with the library's functions replaced: the same;
- a float graph from the same trace: the same feature maps within rounding, and the same answers;
- the int8 graph: feature maps as close to the fake-quantized model's as :mod:`psaq_mm.deploy.agreement` demands of a
  graph of features, and answers about as close as the fake-quantized model's are to the float model's.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.features import tensors
from ..quantization import Mode, quantizer_mode
from .adapters import traceable
from .agreement import SAME_DB, compare, first_line, required, sqnr
from .answers import agreement
from .extras import need
from .graph import exportable, write
from .library import traceable_library
from .packing import pack_weights
from .predictor import Predictor
from .runtime import SESSIONS

MODEL, INPUT = 'model.onnx', 'images'
PYTORCH = 'PyTorch'
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


class Whole(NamedTuple):
    """A graph that was written, and what was measured of it.

    Args:
        file (Path): The graph.
        size (tuple[int, int] | None): (H, W) of the images that it takes; None: any.
        differences (list[Difference]): Of answers.
        findings (list[Finding]): Of feature maps.
        answers (list[dict]): ``size`` of each image that was measured, and the shapes of its ``answers`` by name.
        reason (str | None): Why it takes one size though every size was wanted.
    """
    file: Path
    size: tuple[int, int] | None
    differences: list[Difference]
    findings: list
    answers: list[dict]
    reason: str | None

    def failures(self, runtime: str) -> list:
        """Return what did not pass in a runtime, feature maps first: answers come of them."""
        return [item for item in (*self.findings, *self.differences)
                if item.runtime in (runtime, PYTORCH) and not item.passed]



def in_pixels(predictor: Predictor, images: Tensor) -> Tensor:
    """Return images of the model's input space as the graph takes them, (B, H, W, C) uint8 from (B, C, H, W)."""
    pixels = predictor.pixels
    if pixels.mean is not None:
        images = images * pixels.std + pixels.mean
    if pixels.reverse:
        images = images.flip(1)
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def enlarged(images: Tensor, size) -> Tensor:
    """Return images (B, H, W, C) uint8 in another size."""
    found = nn.functional.interpolate(images.permute(0, 3, 1, 2).float(), tuple(size), mode='bilinear',
                                      align_corners=False)
    return found.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def sizes_of(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return sizes that stand for all: the one of the trace, a flat one, a tall one, of odd sides."""
    height, width = size
    return [size, (height * 3 // 4 + 1, width + 37), (height + 55, width * 2 // 3 + 1)]


@torch.no_grad()
def export_whole(predictor: Predictor, folder: Path, images: Tensor, fixed: bool, runtimes: list[str],
                 preset: str = 'asymmetric', notes: dict | None = None) -> Whole:
    """Write ``model.onnx``: for images of every size if that is right in the chosen runtime, otherwise for one size.

    Args:
        predictor (Predictor): Of a quantized model, on CPU.
        folder (Path): Where to.
        images (Tensor): To check with, (1, H, W, C) uint8; its size is that of the trace.
        fixed (bool): Whether a graph for this one size is wanted.
        runtimes (list[str]): To measure in, the chosen one first.
        preset (str): 'asymmetric' or 'symmetric'. Defaults to 'asymmetric'.
        notes (dict, optional): For the graph's metadata.

    Raises:
        UserError: If no graph is right in the chosen runtime.
    """
    reason = None
    for dynamic in (False, ) if fixed else (True, False):
        sizes = sizes_of(tuple(images.shape[1:3])) if dynamic else [tuple(images.shape[1:3])]
        examples = {f'{h} x {w}': enlarged(images, (h, w)) for h, w in sizes}
        try:
            found = _written(predictor, Path(folder) / MODEL, examples, dynamic, preset, runtimes, notes)
        except Exception as error:  # the exporter's or the model's, which traces what it never did
            if isinstance(error, UserError) and not dynamic:
                raise
            failure = f'it cannot be traced ({first_line(error)})'
        else:
            failed = found.failures(runtimes[0])
            if not failed:
                return found._replace(reason=reason)
            failure = str(failed[0])
        reason = f'no graph for every size is right: {failure}'
    raise UserError(f'{type(predictor.model).__name__} cannot be exported whole: {failure}')


def _written(predictor, path, examples, dynamic, preset, runtimes, notes):
    """Write and measure a graph; see :func:`export_whole`."""
    model, names, first = predictor.model, predictor.names, next(iter(examples.values()))
    with quantizer_mode(model, Mode.FLOAT):
        full = {place: expected(predictor, image) for place, image in examples.items()}
        with as_traced(predictor):
            ours = {place: expected(predictor, image) for place, image in examples.items()}
    comparable = [i for i, name in enumerate(names) if name not in predictor.unlike_the_library]
    named = [names[i] for i in comparable]
    differences = [Difference(place, 'replaced', PYTORCH, agreement(
        named, [full[place].answers[i] for i in comparable], [ours[place].answers[i] for i in comparable]), SAME)
        for place in examples]
    with as_traced(predictor):
        aims = {place: expected(predictor, image) for place, image in examples.items()}
    findings = []
    for graph in ('float', 'int8'):
        integers = graph == 'int8'
        target = path if integers else path.with_suffix('.float.onnx')
        write_graph(predictor, target, first, dynamic, preset, integers, notes)
        wanted = aims if integers else ours
        marks = {place: max(min(agreement(names, ours[place].answers, wanted[place].answers), GOOD) - MARGIN, 0.0)
                 if integers else SAME for place in examples}
        for runtime in runtimes:
            where = dict(graph=graph, runtime=runtime)
            try:
                session = SESSIONS[runtime](str(target), 0)
            except Exception as error:
                differences.append(Difference(next(iter(examples)), agreement=0.0, required=1.0,
                                              error=first_line(error), **where))
                continue
            for place, image in examples.items():
                required_db = [required(sqnr(a, b)) for a, b in zip(ours[place].features, wanted[place].features)]
                findings.append(compare(
                    lambda x, session=session: [torch.from_numpy(value) for value in session.run({INPUT: x.numpy()})
                                                [len(names):]], (image, ), wanted[place].features,
                    required_db if integers else [SAME_DB] * len(required_db), place=place, **where))
            if not integers:
                differences += hold(lambda x, session=session: session.run({INPUT: x}), examples, wanted, marks, names,
                                    **where)
        if not integers:
            target.unlink()
    without_features(path, len(names))
    for runtime in runtimes:
        session = SESSIONS[runtime](str(path), 0)
        differences += hold(lambda x, session=session: session.run({INPUT: x}), examples, aims, marks, names,
                            graph='int8', runtime=runtime)
    answers = [dict(size=list(image.shape[1:3]), answers={name: list(value.shape) for name, value in zip(
        names, aims[place].answers)}) for place, image in examples.items()]
    return Whole(path, None if dynamic else tuple(first.shape[1:3]), differences, findings, answers, None)

