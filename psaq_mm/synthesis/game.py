"""The teacher-student game of PSAQ-ViT V2: images and quantized student evolve against each other.

Facts (abstract and published description): the discrepancy is the mean absolute error between the features of the
full-precision teacher and the quantized student; images raise it, the student lowers it, in adaptive alternation.
Ours: everything that makes this concrete. The discrepancy is taken relative to the teacher's features and to its
value for the plainly calibrated student; a turn ends when its moving average has fallen (student) or risen (images) by
a set factor since the turn began, or when patience ends; what images can gain by it is capped, so that they stay
images; the student learns by squared errors, by outputs of attention blocks besides, and from views that vary
far more than the images; the one that wins is the best on held-back images that never evolve.
"""
from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..quantization.kernels import CHUNK
from .config import GameConfig, SynthesisConfig
from .entropy import PatchSimilarityTap
from .images import ImageOptimizer, augment, lesson_view
from .synthesize import image_loss, listening

Features = Sequence[Tensor]
IMAGES, STUDENT = 'images', 'student'
SMOOTHING = 0.3  # weight of the newest discrepancy in the average that turns are decided on


def discrepancy(teacher: Features, student: Features, images: int) -> Tensor:
    """Mean absolute error between two lists of feature maps, relative to the teacher's mean magnitude.

    Args:
        teacher, student (Sequence[Tensor]): Maps (B, ...), the same shapes pairwise. One that begins otherwise, such as
            the outputs of all decoder layers of a DETR, (layers, B, queries, C), counts for all images alike.
        images (int): B.

    Returns:
        Tensor: (B,), mean over the maps.
    """
    terms = []
    for p, q in zip(teacher, student):
        p, q = p.float(), q.float()
        error = (p - q).abs() / p.abs().mean().clamp(min=1e-12)
        terms.append(error.flatten(1).mean(1) if len(p) == images else error.mean().expand(images))
    return torch.stack(terms).mean(0)


class _RelativeErrors(torch.autograd.Function):
    """Of two tensors of a shape: squared error over the first's square, absolute error over its magnitude.

    The former has a gradient for the second argument. Keeps its arguments and nothing else.
    """

    @staticmethod
    def pieces(*tensors):
        """Flat pieces of tensors of one shape, which on CPU stay in the cache from pass to pass."""
        size = CHUNK if tensors[0].device.type == 'cpu' else tensors[0].numel()
        return zip(*(tensor.reshape(-1).split(size) for tensor in tensors))

    @staticmethod
    def forward(ctx, teacher, student):
        sums = []
        for aim, found in _RelativeErrors.pieces(teacher, student):
            aim = aim.float()
            error = found.float() - aim
            squares = torch.dot(error, error), torch.dot(aim, aim)
            sums.append(torch.stack([*squares, error.abs_().sum(), aim.abs().sum()]))
        squared, power, absolute, magnitude = torch.stack(sums).sum(0)
        ctx.save_for_backward(teacher, student, power.clamp_(min=1e-12 * student.numel()))
        gap = absolute / magnitude.clamp_(min=1e-12 * student.numel())
        ctx.mark_non_differentiable(gap)
        return squared / power, gap

    @staticmethod
    def backward(ctx, grad, _):
        teacher, student, power = ctx.saved_tensors
        out, factor = torch.empty_like(student, memory_format=torch.contiguous_format), 2 * grad / power
        for piece, aim, found in _RelativeErrors.pieces(out, teacher, student):
            piece.copy_((found.float() - aim.float()).mul_(factor))
        return None, out


def distillation(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """What the student minimises, for one map, and the discrepancy beside it.

    Source: ours; the discrepancy has magnitudes.

    Args:
        teacher, student (Tensor): The same shape; the teacher's has no gradient.

    Returns:
        tuple[Tensor, Tensor]: Scalars: mean squared error relative to the teacher's mean square; without a gradient,
        what :func:`discrepancy` says of this map.
    """
    return _RelativeErrors.apply(teacher, student)


def head_dissimilarity(teacher: Tensor, student: Tensor) -> Tensor:
    """Return how far what the heads of an attention put out is from what the teacher's heads put out.

    Each head and query counts the same, however large its values are. Facts (MimiQ, AAAI 2025): the student learns from
    the structural dissimilarity of each head's output. Ours: the form, 1 - 2 <t, s> / (<t, t> + <s, s>), an SSIM of the
    d values whose mean is taken as 0.

    Args:
        teacher, student (Tensor): The same shape, (..., N, d).

    Returns:
        Tensor: Scalar, from 0 (the same) to 2.
    """
    teacher, student = teacher.float(), student.float()
    power = teacher.square().sum(-1) + student.square().sum(-1)
    return ((teacher - student).square().sum(-1) / power.clamp(min=1e-12)).mean()


class Game:
    """Plays update by update; all of its state can be saved and restored.

    Args:
        config (GameConfig): Rules.
        synthesis (SynthesisConfig): Priors and augmentation of the images.
        teacher, student (Callable): Feature extractors, (B, C, H, W) to a list of maps. With a function as second
            argument they call it with each inner map that the student is to learn besides, as soon as it exists. With a
            function as third argument they call it with what the heads of attentions put out.
        tap (PatchSimilarityTap): On the teacher.
        parameters (dict[str, Tensor]): What the student may change, by name.
        update (Callable): ``update(loss)`` takes one optimiser step on the student.
        images (list[Tensor]): Batches that evolve, (B, C, H, W).
        holdout (list[Tensor]): Batches that don't, to choose the best student by.
        low, high (Tensor): Valid pixel range.
        mean (Callable, optional): Averages a float over processes.
        telling (Callable, optional): Returns, for images, the context of a teacher's pass on them. It gives a function
            from the features to those that the diversity of the images is measured by.
    """

    def __init__(self, config: GameConfig, synthesis: SynthesisConfig, teacher: Callable[[Tensor], Features],
                 student: Callable[[Tensor], Features], tap: PatchSimilarityTap, parameters: dict[str, Tensor],
                 update: Callable[[Tensor], None], images: list[Tensor], holdout: list[Tensor], low: Tensor,
                 high: Tensor, mean: Callable[[float], float] = float,
                 telling: Callable = lambda images: nullcontext(lambda features: features)):
        self.config, self.synthesis = config, synthesis
        self.teacher, self.student, self.tap = teacher, student, tap
        self.parameters, self.update, self.mean, self.telling = parameters, update, mean, telling
        self.optimizers = [ImageOptimizer(batch, low, high, config.image_lr) for batch in images]
        self.low, self.high = low, high
        self.holdout = holdout
        self.turn, self.turns, self.turn_updates, self.student_updates, self.image_updates = STUDENT, 1, 0, 0, 0
        self.reference = self.average = self.student_average = self.turn_start = None
        self.lesson = self.seed = None
        self.lessons = self.uses = 0  # lessons begun; uses of the present one
        self.vain = 0  # looks at the held-back images since the best student

    def start(self, progress: Callable[[], None] = lambda: None) -> None:
        """Measure the student as it is: the reference of the game and the first candidate for the best.

        Args:
            progress (Callable): Called after each batch of images, evolving and held back.
        """
        self.reference = self.mean(
            sum(self.measure(o.images, progress) for o in self.optimizers) / len(self.optimizers)) or 1e-12
        self.best = self.initial = self.evaluate(progress)
        self.best_parameters = self._copy()
        self.parameters_before = self.best_parameters if self.config.gain else None

    def _copy(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def measure(self, images: Tensor, progress: Callable[[], None] = lambda: None) -> float:
        """Return the mean discrepancy on a batch (B, C, H, W); call ``progress`` when it is known."""
        found = discrepancy(self.teacher(images), self.student(images), len(images)).mean().item()
        progress()
        return found

    def evaluate(self, progress: Callable[[], None] = lambda: None) -> float:
        """Return the mean discrepancy on the held-back images; call ``progress`` after each batch."""
        return self.mean(sum(self.measure(batch, progress) for batch in self.holdout) / len(self.holdout))

    def step(self, rng: random.Random) -> dict:
        """One update of the side whose turn it is; then decides whose turn is next.

        Returns:
            dict: Numbers for the log: ``discrepancy`` (relative to the teacher's magnitude), ``ratio`` (to that of the
            student before the game on images as they are), what :func:`image_loss` logs when images moved, ``holdout``
            when it was measured.
        """
        fresh = self.turn == IMAGES or self.uses == 0  # a view seen before says less about the student
        log = self._image_update(rng) if self.turn == IMAGES else self.student_update(rng)
        ratio = self.mean(log['discrepancy']) / self.reference
        if self.turn_updates == 0:
            # Lessons differ more from each other than a turn changes them: the student's average goes on from turn to
            # turn. That of the images starts anew, as the student has moved meanwhile.
            self.average = self.student_average if self.turn == STUDENT and self.student_average else ratio
            self.turn_start = self.average
        if fresh:
            self.average += SMOOTHING * (ratio - self.average)
        self.turn_updates += 1
        if self.turn == STUDENT:
            self.student_updates += 1
            if self.student_updates % self.config.evaluate_every == 0:
                best, log['holdout'] = self.best, self.consider()
                self.vain = 0 if self.best < best else self.vain + 1
        else:
            self.image_updates += 1
        if self.turn == IMAGES and (self.turn_updates >= self.config.image_patience
                                    or self.average > self.config.upper * self.turn_start):
            self._switch(STUDENT)
        elif self.turn == STUDENT and (self.turn_updates >= self.config.student_patience
                                       or self.average < self.config.lower * self.turn_start):
            self.student_average = self.average
            self._switch(IMAGES)
        log['ratio'] = ratio
        return log

    def _switch(self, turn):
        self.turn, self.turn_updates = turn, 0
        self.turns += 1
        self.uses, self.lesson = 0, None

    def _image_update(self, rng):
        log = {}

        def objective(images):
            view = augment(images, self.synthesis, rng)
            with listening(self.tap, self.synthesis), self.telling(view) as of:
                teacher = self.teacher(view)
            loss, numbers = image_loss(view, of(teacher), self.tap, self.synthesis)
            gap = discrepancy(teacher, self.student(view), len(view))
            log.update(numbers, discrepancy=gap.mean().item())
            gain = (gap / self.reference).clamp(max=self.config.bound)
            return (loss - self.config.weight * gain).mean()

        for parameter in self.parameters.values():  # images alone need gradients
            parameter.requires_grad_(False)
        try:
            self.optimizers[self.image_updates % len(self.optimizers)].step(objective)
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_()
        return log

    def new_lesson(self, seed: int) -> tuple[Tensor, Features, Features, Features]:
        """A view of the batch whose turn it is, and the teacher's features, inner maps and outputs of heads of it."""
        images = self.optimizers[(self.lessons - 1) % len(self.optimizers)].images.detach()
        others = [image for o in self.optimizers if o.images.shape[1:] == images.shape[1:]
                  for image in o.images.detach()]
        view = lesson_view(images, others, self.synthesis, self.config, self.low, self.high, random.Random(seed))
        limit = torch.finfo(torch.float16).max
        inner, heads = [], []

        def keep(place, value):  # for as long as the lesson lasts, and exact to 0.05 %
            place.append(value.clamp(-limit, limit).half() if value.dtype == torch.float32 else value)

        with torch.no_grad():
            return view, self.teacher(view, functools.partial(keep, inner), self.hear(
                functools.partial(keep, heads))), inner, heads

    def hear(self, visit: Callable) -> Callable | None:
        """Return the function if outputs of heads count, else None."""
        return visit if self.config.heads else None

    def student_update(self, rng: random.Random) -> dict:
        """One update of the student; as :meth:`step`, without the rules.

        The images do not change during its turn, so the teacher does not need to run for each update: a lesson serves
        ``view_updates`` of them. One lesson is kept at a time.
        """
        if self.uses == 0:
            self.seed = rng.getrandbits(32)  # all that a checkpoint has to hold
            self.lessons += 1
        if self.lesson is None:
            self.lesson = self.new_lesson(self.seed)
        view, teacher, inner, heads = self.lesson
        self.uses = (self.uses + 1) % self.config.view_updates
        if self.uses == 0:
            self.lesson = None
        # An error computed when its map appears has its gradient computed when that is needed, and not kept till then.
        inner, heads, errors, of_heads = iter(inner), iter(heads), [], []
        student = self.student(view, lambda value: errors.append(distillation(next(inner), value)[0]), self.hear(
            lambda value: of_heads.append(head_dissimilarity(next(heads), value))))
        of_features, gaps = zip(*map(distillation, teacher, student))
        loss = torch.stack([*errors, *of_features]).mean()
        if of_heads:
            loss = loss + self.config.heads * torch.stack(of_heads).mean()
        self.update(loss)
        return dict(discrepancy=torch.stack(gaps).mean().item())

    def consider(self) -> float:
        """Looks at the student on the held-back images and remembers it if it is the best so far.

        Returns:
            float: Its discrepancy.
        """
        value = self.evaluate()
        if value < self.best:
            self.best, self.best_parameters = value, self._copy()
        return value

    @property
    def over(self) -> bool:
        """Whether so many looks as patience allows have found no better student."""
        return self.config.patience is not None and self.vain >= self.config.patience

    @property
    def gained(self) -> bool:
        """Whether the best student is so much better than the one before the game that it takes its place."""
        return self.best <= (1 - self.config.gain) * self.initial

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the student with the best parameters seen; with those before the game where too little was gained."""
        if self.student_updates % self.config.evaluate_every:
            self.consider()
        kept = self.best_parameters if self.gained else self.parameters_before
        for name, parameter in self.parameters.items():
            parameter.copy_(kept[name])

    PLAIN = ('turn', 'turns', 'turn_updates', 'turn_start', 'student_updates', 'image_updates', 'reference', 'average',
             'student_average', 'best', 'initial', 'best_parameters', 'parameters_before', 'lessons', 'uses', 'seed',
             'vain')

    def state_dict(self):
        return dict({name: getattr(self, name) for name in self.PLAIN},
                    optimizers=[o.state_dict() for o in self.optimizers])

    def load_state_dict(self, state):
        for name in self.PLAIN:
            setattr(self, name, state[name])
        for optimizer, saved in zip(self.optimizers, state['optimizers']):
            optimizer.load_state_dict(saved)
