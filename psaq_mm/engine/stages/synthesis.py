"""Synthesis: batch after batch of noise or dead leaves becomes images of high entropy or diversity."""
from __future__ import annotations

import math
import statistics

import torch
from mmengine import dist

from ...models import backbone_of
from ...report import figures
from ...synthesis import ImageOptimizer, learning_rate, objective, similarity_density
from .base import Plot, Stage

RAISED = dict(
    entropy='the entropy of the similarities between patches',
    diversity='the diversity of the images of a batch, as the full-precision model sees them: 0 is the most',
    agreement='the agreement of attention heads: how alike their maps are for each query, 1 where all are the same',
)  # numbers of an update, as far as the settings give them a weight
DENSITIES = 3  # blocks whose densities are drawn: the first, one in the middle, the last
PLATEAU = 0.01  # nats a block: a rise of the entropy that counts for synthesis.patience; our choice


class SynthesisStage(Stage):
    """Takes ``synthesis.steps`` updates for each batch of images."""
    name, title = 'synthesis', 'Synthesis'
    shown = tuple(RAISED)

    def __init__(self, loop):
        super().__init__(loop)
        self.updates = len(loop.dataloader) * self.quantization.synthesis.steps
        self.optimizer = None
        self.plateau = {}

    @classmethod
    def wanted(cls, loop):
        synthesis = loop.quantization.synthesis
        return synthesis.method.startswith('psaq') and not synthesis.reuse

    def start(self):
        images = self.loop.images
        if self.restored is None:
            self.announce(f'synthesis of {sum(map(len, images))} images in batches of '
                          f'{self.quantization.synthesis.batch_size}')
            if self.quantization.synthesis.diversity and any(len(batch) == 1 for batch in images):
                self.loop.runner.logger.warning(
                    'A batch has one image, and diversity is the difference between the images of a batch: let '
                    'quantization.synthesis.batch_size divide num_images, and be 2 or more')
            return
        self.plateau = dict(self.restored['plateau'])
        if self.restored['optimizer'] is not None:
            self.optimizer = self.new_optimizer(images[self.index // self.quantization.synthesis.steps])
            self.optimizer.load_state_dict(self.restored['optimizer'])

    def place(self):
        """By the batch: however many processes share the batches, each becomes what it would."""
        steps = self.quantization.synthesis.steps
        batch, update = divmod(self.index, steps)
        batch = batch * dist.get_world_size() + dist.get_rank()
        return 0, batch * steps + update

    def new_optimizer(self, images):
        """Return an optimiser of a batch (B, C, H, W)."""
        return ImageOptimizer(images, self.loop.low, self.loop.high, self.quantization.synthesis.lr)

    def step(self, rng):
        """Raise the entropy or the diversity of one batch of images by one update."""
        loop, config = self.loop, self.quantization.synthesis
        index, step = divmod(self.index, config.steps)
        if step == 0:
            self.plateau = dict(entropy=-math.inf, since=0)
        if self.has_plateaued():
            return {}  # other processes still work on theirs
        if self.optimizer is None:
            start = loop.images[index]
            if index and config.warm_start and loop.images[index - 1].shape == start.shape:
                start = start.lerp(loop.images[index - 1], config.warm_start)
            self.optimizer = self.new_optimizer(start)
        log = {}

        def lowered(images):
            loss, numbers = objective(images, loop.listen, loop.tap, config, rng)
            log.update(numbers)
            return loss

        self.optimizer.step(lowered, learning_rate(step, config))
        self.follow(next((log[name] for name in RAISED if name in log), 0.0))
        if self.has_plateaued() and dist.get_world_size() == 1:
            loop.skip(config.steps - 1 - step)
        if self.has_plateaued() or step == config.steps - 1:
            loop.images[index] = self.optimizer.images.detach()
            self.optimizer = None
        return log

    def follow(self, entropy):
        """Take note of the entropy of the batch, in nats a block, or without one of its diversity or agreement."""
        if entropy > self.plateau['entropy'] + PLATEAU:
            self.plateau = dict(entropy=entropy, since=0)
        else:
            self.plateau['since'] += 1

    def has_plateaued(self):
        """Return whether the entropy of the batch has ceased to rise."""
        patience = self.quantization.synthesis.patience
        return patience is not None and self.plateau['since'] >= patience

    def summary(self):
        """Return entropy and diversity of the images, each as far as it counts, after the last update of each batch."""
        steps, last = self.quantization.synthesis.steps, {}
        for update in self.loop.history:
            if update['stage'] == self.name:
                last[update['index'] // steps] = update
        return {name: statistics.fmean(update[name] for update in last.values())
                for name in ('entropy', 'agreement', 'diversity') if all(name in update for update in last.values())}

    def plots(self):
        raised = [name for name in RAISED if getattr(self.quantization.synthesis, name)]
        text = f"Synthesis raises {', and '.join(RAISED[name] for name in raised)}. "
        text += f'Drawn is the {raised[0]}. ' if len(raised) > 1 else ''
        text += ('Curves that level out were given enough steps; ones that still rise ask for a larger '
                 '`synthesis.steps`.')
        curve = figures.synthesis_curve(
            self.loop.history, self.quantization.synthesis.steps, raised[0]) if raised else None
        spread = 'On noise all patches are alike; synthesis spreads them.' * ('entropy' in raised)
        return [Plot('synthesis', text, curve),
                Plot('densities', f'The density of the similarities between patches of an image. {spread}',
                     figures.similarity_densities(self.densities()))]

    @torch.no_grad()
    def densities(self):
        """Return densities of patch similarities of the first images and of what they started from, in a few blocks.
        """
        loop, found = self.loop, {}
        for kind, images in (('starts', loop.starts[0][:4]), ('images', loop.images[0][:4])):
            with loop.tap:
                backbone_of(loop.teacher)(images)
            found[kind], loop.tap.tokens = loop.tap.tokens, []
        count = len(found['images'])
        result = []
        for block in sorted({0, count // 2, count - 1})[:DENSITIES]:
            entry = dict(name=f'block {block + 1} of {count}')
            for kind, tokens in found.items():
                points, density = similarity_density(tokens[block], self.quantization.synthesis.bandwidth)
                entry['grid'], entry[kind] = points.numpy(), density.numpy()
            result.append(entry)
        return result

    def images(self):
        batches = super().images()
        if self.optimizer is not None:
            batches[self.index // self.quantization.synthesis.steps] = self.optimizer.images.detach()
        return batches

    def state_dict(self):
        return dict(optimizer=self.optimizer and self.optimizer.state_dict(), plateau=dict(self.plateau))
