"""A whole model as one graph: written, and held against the model before it is delivered.

Four comparisons, in every runtime that is installed and at sizes that stand for all:

- the library's own test step behind the config's own pipeline, once: the same as :class:`Predictor` computes;
- what the library predicts and what :class:`Predictor` computes with the library's functions replaced: the same;
- a float graph from the same trace: the same feature maps within rounding, and the same answers;
- the int8 graph: feature maps as close to the fake-quantized model's as :mod:`psaq_mm.deploy.agreement` demands of a
  graph of features, and answers about as close as those of the float model, or of the fake-quantized one with layers
  that are disturbed a little.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
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
from .agreement import LIMIT_DB, SAME_DB, Finding, compare, disturbed, first_line, marks
from .answers import agreement, agreements, anything, single
from .batches import loop_over_images
from .by_library import library_answers
from .compact import compact
from .extras import need
from .graph import ASYMMETRIC, INPUT, Form, exportable, write
from .library import traceable_library
from .packing import pack_weights
from .predictor import Predictor
from .runtime import SESSIONS
from .tensorrt import check_for_tensorrt

MODEL = 'model.onnx'
PYTORCH = 'PyTorch'
SAME = 0.98  # agreement of answers that only rounding tells apart: two equal scores may swap at the limit
MARGIN = 0.1  # by which an int8 graph may agree less with the fake-quantized model than that does with the float one
SPREAD = 0.2  # and less than that does with itself disturbed: single answers come and go by chance
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
        graph (str): 'int8', 'float', 'replaced' (no graph yet) or 'library' (neither that: the library's own test step
            behind the config's pipeline).
        runtime (str): The runtime, or 'PyTorch'.
        agreement (float): From 0 to 1, see :func:`psaq_mm.deploy.answers.agreement`.
        required (float): What it must reach.
        error (str): Why there is nothing to compare, or ''.
        answer (str): Which answer agrees worst, or ''.
    """
    place: str
    graph: str
    runtime: str
    agreement: float
    required: float
    error: str = ''
    answer: str = ''

    @property
    def passed(self) -> bool:
        """Whether the answers are as close as they must be."""
        return not self.error and self.agreement >= self.required

    def __str__(self):
        if self.graph == 'library' and self.error:
            return f"the library's own test step does not run for {self.place} ({self.error})"
        if self.error:
            return f'{self.runtime} does not compute the {self.graph} graph for {self.place} ({self.error})'
        if self.graph == 'library':
            return (f"the library's own test step, behind the config's pipeline, gives other {self.answer} than the "
                    f'predictor for {self.place}: they agree by {self.agreement:.3f}, and need {self.required:.3f}')
        other = 'fake-quantized' if self.graph == 'int8' else 'float'
        return (f'in {self.runtime} the answers of the {self.graph} graph agree with those of the {other} model by '
                f'{self.agreement:.3f} for {self.place}, and need {self.required:.3f}: {self.answer} the least')


@torch.no_grad()
def write_graph(predictor: Predictor, path: Path, images: Tensor, dynamic: bool, form: Form = ASYMMETRIC,
                integers: bool = True) -> int:
    """Write the graph of a predictor, which puts out feature maps after its answers: see :func:`complete`.

    Args:
        predictor (Predictor): Of a quantized model, on CPU.
        path (Path): The file.
        images (Tensor): To trace with, (1, H, W, C) uint8.
        dynamic (bool): Whether the graph takes images of other sizes.
        form (Form): What the graph is to be like. As far as answers are computed one by one, it takes several images
            at once only up to the feature maps.
        integers (bool): Whether to export what quantizers do. Defaults to True.

    Returns:
        int: How many feature maps there are.
    """
    model, whole = predictor.model, Watched(predictor).eval()
    with as_traced(predictor), exportable(model, form.preset) if integers else quantizer_mode(
            model, Mode.FLOAT):
        found = whole(images)
        names = [*predictor.names, *(f'feature_{i}' for i in range(len(found) - len(predictor.names)))]
        rows, sides = {0: 'batch'} if form.batch else {}, {1: 'height', 2: 'width'} if dynamic else {}
        axes = {INPUT: {**rows, **sides}}
        for name, value in zip(names, found):
            if name in predictor.names:
                axes[name] = {**({} if predictor.one_by_one else rows), **predictor.axes(name)}
            else:
                axes[name] = {**rows, **({i: f'{name}_{i}' for i in range(2, value.dim())} if dynamic else {})}
        axes = {name: found for name, found in axes.items() if found}
        write(whole, (images, ), path, [INPUT], names, axes or None, {}, type(model).__name__, form)
    return len(names) - len(predictor.names)


def complete(path: Path, predictor: Predictor, form: Form = ASYMMETRIC) -> None:
    """Take the feature maps from the outputs of a graph, pack its weights and make it small, in place.

    Args:
        path (Path): What :func:`write_graph` wrote.
        predictor (Predictor): Of the model.
        form (Form): What the graph is to be like. With preset 'symmetric' weights are not packed: TensorRT's parser
            wants them stored as int8.

    Raises:
        UserError: If TensorRT does not take the graph, and the preset is 'symmetric'.
    """
    onnx, answers = need('onnx'), len(predictor.names)
    graph = onnx.load_model_from_string(Path(path).read_bytes())
    features = [output.name for output in graph.graph.output[answers:]]
    del graph.graph.output[answers:]
    if form.preset != 'symmetric':
        pack_weights(graph)
    if form.batch and predictor.one_by_one:
        loop_over_images(graph, features, list(predictor.names), predictor.limit())
    if form.preset == 'symmetric':
        check_for_tensorrt(graph)
    compact(graph)
    onnx.checker.check_model(graph)
    Path(path).write_bytes(graph.SerializeToString())


def hold(run, images: Tensor, aims, names, **where) -> Difference:
    """Hold what a graph answers against what it should.

    Args:
        run (Callable): Takes images; returns answers to each one.
        images (Tensor): (B, H, W, C).
        aims (list | Callable): Answers to each image, or what returns them.
        names (Sequence[str]): Of the answers.
        **where: ``place``, ``graph``, ``runtime`` and ``required`` of the :class:`Difference`.
    """
    try:
        aims = aims() if callable(aims) else aims
        pairs = list(zip(aims, run(images), strict=True))
        return differing(names, pairs, **where)
    except Exception as error:  # whatever a runtime raises
        return Difference(agreement=0.0, error=first_line(error), **where)


def differing(names, pairs, **where) -> Difference:
    """Return the difference of two sets of answers to each of some images.

    Args:
        names (Sequence[str]): Of the answers.
        pairs (list[tuple]): Two sets of answers each.
        **where: As of :func:`hold`.
    """
    value, answer = min((value, name) for pair in pairs for name, value in agreements(names, *pair).items())
    return Difference(agreement=value, answer=answer, **where)


class Whole(NamedTuple):
    """A graph that was written, and what was measured of it.

    Args:
        file (Path): The graph.
        size (tuple[int, int] | None): (H, W) of the images that it takes; None: any.
        differences (list[Difference]): Of answers.
        findings (list[Finding]): Of feature maps.
        answers (list[dict]): ``size`` of each image that was measured, and the shapes of its ``answers`` by name.
        image (Tensor): The first of them, (1, H, W, C) uint8.
        anything (bool): Whether the model finds an object in any of them. Otherwise answers were compared on none.
        reason (str | None): Why it takes one size though every size was wanted.
    """
    file: Path
    size: tuple[int, int] | None
    differences: list[Difference]
    findings: list[Finding]
    answers: list[dict]
    image: Tensor
    anything: bool
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


@torch.no_grad()
def with_objects(predictor: Predictor, images: Tensor) -> Tensor:
    """Return the first image in which a model finds an object, (1, H, W, C) uint8, otherwise the first of all.

    Args:
        predictor (Predictor): Of the model.
        images (Tensor): (N, H, W, C) uint8.
    """
    for image in images.split(1):
        if anything(predictor.names, [value.numpy() for value in predictor(image)]):
            return image
    return images[:1]


def sizes_of(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return sizes that stand for all: the one of the trace, a flat one, a tall one, of odd sides."""
    height, width = size
    return [size, (height * 3 // 4 + 1, width + 37), (height + 55, width * 2 // 3 + 1)]


@torch.no_grad()
def check_answers_repeat(predictor: Predictor, image: Tensor) -> None:
    """Raise a UserError if a model answers one image differently each time: no graph can be held against that.

    Args:
        predictor (Predictor): Of the model.
        image (Tensor): (1, H, W, C) uint8.
    """
    first, second = ([value.numpy() for value in predictor(image)] for _ in range(2))
    alike = agreement(predictor.names, first, second)
    if alike < SAME:
        raise UserError(f'{type(predictor.model).__name__} answers the same image differently each time (two answers '
                        f'agree by {alike:.3f}): it draws random numbers when it predicts, and no graph can be '
                        'compared with that. Switch that off in the config, for SegNeXt with '
                        'model.decode_head.ham_kwargs.rand_init=False')


@torch.no_grad()
def export_whole(predictor: Predictor, folder: Path, images: Tensor, fixed: bool, runtimes: list[str],
                 form: Form = ASYMMETRIC) -> Whole:
    """Write ``model.onnx``: for images of every size if that is right in the chosen runtime, otherwise for one size.

    Args:
        predictor (Predictor): Of a quantized model, on CPU.
        folder (Path): Where to.
        images (Tensor): To check with the first in which the model finds an object, (N, H, W, C) uint8; their size is
            that of the trace.
        fixed (bool): Whether a graph for this one size is wanted.
        runtimes (list[str]): To measure in, the chosen one first.
        form (Form): What the graph is to be like.

    Raises:
        UserError: If no graph is right in the chosen runtime.
    """
    check_answers_repeat(predictor, images[:1])
    reason = None
    for dynamic in (False, ) if fixed else (True, False):
        sizes = sizes_of(tuple(images.shape[1:3])) if dynamic else [tuple(images.shape[1:3])]
        try:
            image = with_objects(predictor, images)
            examples = {f'{h} x {w}': enlarged(image, (h, w)) for h, w in sizes}
            found = Trial(predictor, examples, dynamic, form, runtimes).run(Path(folder) / MODEL)
        except Exception as error:  # the model's own at a size that it does not take, or the exporter's
            if isinstance(error, UserError) and not dynamic:
                raise
            failure = f'it does not run, or cannot be traced ({first_line(error)})'
        else:
            failed = found.failures(runtimes[0])
            if not failed:
                return found._replace(reason=reason)
            failure = str(failed[0])
        reason = f'no graph for every size is right: {failure}'
    raise UserError(f'{type(predictor.model).__name__} cannot be exported whole: {failure}')


class Trial:
    """A graph of some kind, to be written and measured.

    Args:
        predictor (Predictor): Of a quantized model, on CPU.
        examples (dict[str, Tensor]): Images (1, H, W, C) uint8 by place, that of the trace first.
        dynamic (bool): Whether the graph takes images of other sizes.
        form (Form): What it is to be like.
        runtimes (list[str]): To measure in.
    """

    def __init__(self, predictor: Predictor, examples: dict[str, Tensor], dynamic: bool, form: Form,
                 runtimes: list[str]):
        self.predictor, self.examples, self.dynamic, self.form = predictor, examples, dynamic, form
        self.runtimes, self.names = runtimes, predictor.names
        model = predictor.model
        with quantizer_mode(model, Mode.FLOAT):
            self.library = {place: expected(predictor, image) for place, image in examples.items()}
            with as_traced(predictor):
                self.full = {place: expected(predictor, image) for place, image in examples.items()}
        with as_traced(predictor):
            self.quantized = {place: expected(predictor, image) for place, image in examples.items()}
            with disturbed(model):
                self.disturbed = {place: expected(predictor, image) for place, image in examples.items()
                                  if form.same_roundings}

    def run(self, path: Path) -> Whole:
        """Write the graph in int8 and in float, hold both against the model, and keep the one in int8."""
        differences, findings = self.replaced(), []
        for graph in ('float', 'int8'):
            target = path if graph == 'int8' else path.with_suffix('.float.onnx')
            first = next(iter(self.examples.values()))
            write_graph(self.predictor, target, first, self.dynamic, self.form, graph == 'int8')
            findings += self.hold_features(target, graph)
            complete(target, self.predictor, self.form)
            differences += self.hold_answers(target, graph)
            if graph == 'float':
                target.unlink()
        measured = [dict(size=list(image.shape[1:3]), answers={name: list(value.shape) for name, value in zip(
            self.names, self.quantized[place].answers)}) for place, image in self.examples.items()]
        found = any(anything(self.names, item.answers) for item in self.quantized.values())
        return Whole(path, None if self.dynamic else tuple(first.shape[1:3]), differences, findings, measured, first,
                     found, None)

    def replaced(self) -> list[Difference]:
        """Hold the answers with the library's functions replaced against the library's own, and once these against
        those of its own test step.
        """
        chosen = [i for i, name in enumerate(self.names) if name not in self.predictor.unlike_the_library]
        found = [differing([self.names[i] for i in chosen], [tuple(
            [side[place].answers[i] for i in chosen] for side in (self.library, self.full))], place=place,
            graph='replaced', runtime=PYTORCH, required=SAME) for place in self.examples]
        place, image = next(iter(self.examples.items()))

        def test_step(image):
            with quantizer_mode(self.predictor.model, Mode.FLOAT):
                return [library_answers(self.predictor, image)]

        return [hold(test_step, image, [self.library[place].answers], self.names, place=place, graph='library',
                     runtime=PYTORCH, required=SAME), *found]

    def aims(self, graph: str) -> dict[str, Expected]:
        """Return what a graph shall compute, by place."""
        return self.full if graph == 'float' else self.quantized

    def running(self, path: Path, graph: str, missed: Callable) -> Iterator[tuple[dict, Callable]]:
        """Yield where a graph runs, and what runs it: from images to arrays.

        Args:
            path (Path): The graph.
            graph (str): 'float' or 'int8'.
            missed (Callable): Is told of each runtime that cannot load it: ``place``, ``error``, and where.
        """
        for runtime in self.runtimes:
            where = dict(graph=graph, runtime=runtime)
            try:
                session = SESSIONS[runtime](str(path), 0)
            except Exception as error:
                missed(place=next(iter(self.examples)), error=first_line(error), **where)
                continue
            yield where, lambda images, session=session: session.run({INPUT: images.numpy()})

    def hold_features(self, path: Path, graph: str) -> list[Finding]:
        """Hold the feature maps of a graph, which are its last outputs, against the model's."""
        found = []
        for where, run in self.running(path, graph, lambda **missed: found.append(
                Finding(sqnr=-LIMIT_DB, required=SAME_DB, **missed))):

            def features(images, run=run):
                return [torch.from_numpy(x) for x in run(images)[len(self.names):]]

            for place, image in self.examples.items():
                full, quantized = self.full[place].features, self.quantized[place].features
                found.append(compare(
                    features, (image, ), self.aims(graph)[place].features, [SAME_DB] * len(full) if graph == 'float'
                    else marks(full, quantized, self.disturbed[place].features if self.disturbed else []),
                    place=place, **where))
        return found

    def hold_answers(self, path: Path, graph: str) -> list[Difference]:
        """Hold the answers of a graph against the model's, and those to a batch against those to its images."""
        found = []
        for where, run in self.running(path, graph, lambda **missed: found.append(
                Difference(agreement=0.0, required=1.0, **missed))):

            def answers(images, run=run):
                return single(self.names, run(images))

            for place, image in self.examples.items():
                mark = SAME
                if graph == 'int8':
                    margins = [(self.full, MARGIN)] + [(self.disturbed, SPREAD)] * bool(self.disturbed)
                    mark = max(0.0, *(min(GOOD, agreement(
                        self.names, other[place].answers, self.quantized[place].answers)) - margin
                        for other, margin in margins))
                found.append(hold(answers, image, [self.aims(graph)[place].answers], self.names, place=place,
                                  required=mark, **where))
            if self.form.batch:
                place, image = next(iter(self.examples.items()))
                several = torch.cat([image, image.flip(2), 255 - image])
                found.append(hold(answers, several, lambda images=several, run=answers: [
                    run(image[None])[0] for image in images], self.names,
                    place=f'{len(several)} images of {place}', required=SAME, **where))
        return found
