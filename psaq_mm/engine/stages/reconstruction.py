"""Reconstruction: block after block learns to put out what its full-precision original does."""
from __future__ import annotations

import math
import random

import torch
from mmengine import dist

from ...errors import UserError
from ...models import attention_blocks, backbone_of
from ...quantization import quantized_layers, search_weight_ranges
from ...reconstruction import (
    Recorder,
    Sample,
    UnitReconstruction,
    find_units,
    importance,
    settled_share,
    unrelated,
    without_unit,
)
from ...report import figures
from ...synthesis import lesson_view
from .base import Plot, Stage, counted, listed
from .learning import annealing, average_gradients, learnable_ranges, mean_over_processes, split, trainable


class ReconstructionStage(Stage):
    """Takes ``reconstruction.steps`` updates for each block, and for each group of layers between blocks."""
    name, title = 'reconstruction', 'Blocks'
    shown = ('error', )

    def __init__(self, loop):
        super().__init__(loop)
        self.units, self.views, self.recorders, self.parameters, self.errors = [], [], (), {}, {}
        self.current = self.initial = None
        self.ranges = {}
        self.unlearned, self.outside = [], []  # names of what stays as calibrated

    @classmethod
    def wanted(cls, loop):
        return loop.quantization.reconstruction.steps > 0

    def prepare(self):
        loop = self.loop
        found = find_units(loop.student, loop.targets, attention_blocks(backbone_of(loop.student)), loop.first_features)
        self.parameters = trainable(loop.student, loop.targets)
        self.units = [unit for unit in found if self.learns(unit)]
        self.unlearned = [unit.name for unit in found if unit not in self.units]
        self.outside = without_unit(loop.student, loop.targets, found)
        self.updates = len(self.units) * self.quantization.reconstruction.steps

    def learns(self, unit):
        """Return whether a unit has parameters that may change, or ranges."""
        inside = f'{unit.name}.'
        return any(name.startswith(inside) for name in self.parameters) or bool(
            self.quantization.reconstruction.range_lr and learnable_ranges(self.loop.student, (inside, )))

    def tell_left_out(self):
        """Say what of the targets stays as calibrated."""
        log = self.loop.runner.logger.info
        if self.unlearned:
            log(f'{counted(len(self.unlearned), "block")} not reconstructed, since nothing in it may change: '
                f'{listed(self.unlearned)}')
        if self.outside:
            log(f'{counted(len(self.outside), "layer")} not reconstructed, since the model calls neither them nor a '
                f'small module around them: {listed(self.outside)}')

    def start(self):
        loop, config = self.loop, self.quantization.reconstruction
        if not self.units:
            loop.runner.logger.warning('No reconstruction: features depend on no quantized layer of the targets '
                                       f'({", ".join(loop.targets)})')
            return
        self.views = self.make_views(self.lessons(), config.views_of_each(
            sum(map(len, loop.images)) * dist.get_world_size()))
        self.recorders = [Recorder(model, self.units, loop.features(model), self.views, loop.precision, self.say_once)
                          for model in (loop.teacher, loop.student)]
        if self.restored is None:
            self.announce(f'reconstruction of {len(self.units)} units from {sum(map(len, self.views))} views')
            self.tell_left_out()
            return
        self.errors = dict(self.restored['errors'])
        if self.restored['current'] is not None:
            self.initial = self.restored['initial']
            self.begin(self.index // config.steps, self.restored['current'])

    def lessons(self):
        """Return the image batches that units learn from, (B, C, H, W) each.

        Images that choose the best student of a later game are none of them: it would look worse than it is beside the
        reconstructed one.
        """
        game = self.quantization.game
        return split(self.loop.images, game.holdout)[0] if self.loop.find('game') else self.loop.images

    def make_views(self, images, count):
        """Return so many random views of each image, in batches (B, C, H, W)."""
        loop, views = self.loop, list(images)
        rng = random.Random(f'{loop.runner.seed}-{dist.get_rank()}-reconstruction')
        for _ in range(count - 1):
            for batch in images:
                others = [image for other in images if other.shape[1:] == batch.shape[1:] for image in other]
                views.append(lesson_view(batch, others, self.quantization.synthesis, self.quantization.game, loop.low,
                                         loop.high, rng))
        return views

    def begin(self, number, restored=None):
        """Set up the reconstruction of one unit.

        Args:
            number (int): Of the unit.
            restored (dict, optional): Where an interrupted run left it.

        Raises:
            UserError: If the unit puts out no finite numbers.
        """
        loop, config, unit = self.loop, self.quantization.reconstruction, self.units[number]
        student, teacher = (model.get_submodule(unit.name) for model in (loop.student, loop.teacher))
        run_teacher = loop.features(loop.teacher)
        generator = torch.Generator().manual_seed(number)
        samples, weights, sizes = [], {}, {}
        for view in self.views:
            sizes.setdefault(view.shape[2:], []).append(view)
        for size, views in sizes.items():
            weights[size] = importance(teacher, [lambda view=view: run_teacher(view) for view in views[:config.probes]],
                                       generator) if config.final else [None] * unit.calls
        step = loop.progress('recording', len(self.views), unit.name)
        for view, exact, found in zip(self.views, *(recorder.record(number) for recorder in self.recorders)):
            step()
            samples += [Sample(a[0], b[0], a[1], w) for a, b, w in zip(exact, found, weights[view.shape[2:]])]
        apart = not unit.felt or unrelated([s.exact for s in samples], [s.quantized for s in samples])
        if mean_over_processes(float(apart)):  # what one process finds is so for all: they share the student
            self.say_once(f'{unit.name} learns from full-precision inputs alone: those of the quantized model may be '
                          'of other things, as boxes or queries that each model chooses for itself')
            samples = [sample._replace(quantized=sample.exact) for sample in samples]
        inside = (f'{unit.name}.', )
        parameters = {n: p for n, p in self.parameters.items() if n.startswith(inside)}
        self.ranges = learnable_ranges(loop.student, inside) if config.range_lr else {}
        stretches = [quantizer.learn_range() for quantizer in self.ranges.values()]
        self.current = UnitReconstruction(
            student, samples, list(parameters.values()), stretches, self.quantization.reconstruction_lr, config,
            loop.precision, average_gradients, mean_over_processes, lambda what: self.say_once(f'{unit.name}: {what}'))
        rounded = list(quantized_layers(student).values()) if config.weights == 'rounding' else []
        if restored is not None:
            self.current.load_state_dict(restored, rounded)
        else:
            self.initial, error = self.current.search() if config.search else [self.current.measure()] * 2
            if not math.isfinite(error):
                raise UserError(f"'{unit.name}' puts out numbers that are not finite, in full precision or as "
                                'calibrated: it cannot be reconstructed. Check the checkpoint; try without --amp')
            if config.weight_ranges == 'mse':
                error = self.choose_weight_ranges(student, list(parameters.values()), error)
            self.current.start(rounded, error)

    def choose_weight_ranges(self, unit, weights, error):
        """Give weights the ranges of least squared error, unless the unit's output is worse with them.

        Args:
            unit (nn.Module): In the student.
            weights (list[Tensor]): Its parameters.
            error (float): Its error as it is.

        Returns:
            float: Its error now.
        """
        restore = search_weight_ranges(unit, weights)
        found = self.current.measure()
        if found < error:
            return found
        restore()
        return error

    def step(self, rng):
        """Make one update of one unit, the learning rates by :func:`annealing`."""
        config = self.quantization.reconstruction
        number, step = divmod(self.index, config.steps)
        if self.current is None:
            self.begin(number)
        log = self.current.step(annealing(step / config.steps), settled_share(step / config.steps), rng,
                                self.loop.device)
        if step == config.steps - 1:
            started, now = self.current.finish()
            self.errors[self.units[number].name] = self.initial, now
            for quantizer in self.ranges.values():
                quantizer.fix_range()
            self.current, self.ranges = None, {}
            self.loop.runner.logger.info(
                f"{self.units[number].name}: error of its output, squared, over the output's power: "
                f'{self.initial:.4g} as calibrated, {started:.4g} as it began to learn, {now:.4g} learned')
        return log

    def finish(self):
        self.views, self.recorders = [], ()

    def summary(self):
        return dict(errors={name: list(pair) for name, pair in self.errors.items()}) if self.errors else None

    def plots(self):
        return [Plot('blocks', 'Block after block learned to put out what it does in full precision. The error of the '
                     'inputs, which come from the quantized blocks before, is part of each.',
                     figures.block_errors(self.loop.summaries.get(self.name, {}).get('errors', {})))]

    def state_dict(self):
        return dict(errors=dict(self.errors), initial=self.initial, current=self.current and self.current.state_dict())
