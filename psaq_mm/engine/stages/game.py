"""The game of PSAQ-ViT V2: images and student evolve against each other."""
from __future__ import annotations

import functools
import math

import torch

from ...errors import UserError
from ...models import backbone_of, telling
from ...quantization import FakeQuantizer, search_weight_ranges
from ...report import figures
from ...stanza import ROOT
from ...synthesis import Game
from .base import Plot, Stage, counted, listed
from .learning import annealing, average_gradients, learnable_ranges, mean_over_processes, split, trainable


class GameStage(Stage):
    """Takes ``game.steps`` updates of images and student together, and keeps the best student.

    There is no game where nothing that is compared depends on what may change, as with the heads of two-stage
    detectors alone as targets.
    """
    name, title = 'game', 'The game'
    shown = 'discrepancy', 'ratio'

    def __init__(self, loop):
        super().__init__(loop)
        self.updates = self.quantization.game.steps
        self.game = self.searched = None
        self.ranges, self.uncached = {}, []

    @classmethod
    def wanted(cls, loop):
        return loop.quantization.synthesis.method == 'psaq_v2' and loop.quantization.game.steps > 0

    def prepare(self):
        if sum(map(len, self.loop.images)) < 2:
            raise UserError(f'{ROOT}.synthesis: each process needs at least 2 images for the game, one evolves and one '
                            'is held back: raise num_images or start fewer processes')
        if self.quantization.game.heads and not self.head_outputs():
            raise UserError(f'{ROOT}.game.heads compares what attention heads put out, and '
                            f'{type(backbone_of(self.loop.teacher)).__name__} has no attention: leave it out')

    @torch.no_grad()
    def head_outputs(self):
        """Return what the heads of the teacher's attentions put out, as far as the game compares it, for one image."""
        found = []
        self.loop.features(self.loop.teacher)(self.loop.images[0][:1], None, found.append)
        return found

    def start(self):
        loop, student = self.loop, self.loop.student
        config, synthesis = self.quantization.game, self.quantization.synthesis
        evolving, held = split(loop.images, config.holdout)
        parameters = trainable(student, loop.targets)
        parameters.update(self.learn_ranges())
        compared = self.depended_on(parameters)
        if compared:
            compared |= self.uncache({n: p for n, p in parameters.items() if p not in compared})
        if not compared:
            loop.runner.logger.warning('No game: features and raw outputs do not depend on any weight of the targets '
                                       f'({", ".join(loop.targets)}), which stay as they are')
            self.updates = 0
            self.fix_ranges()
            return
        self.game = Game(config, synthesis, loop.features(loop.teacher), loop.features(student), loop.tap,
                         parameters, self.update_student, evolving, held, loop.low, loop.high, mean_over_processes,
                         functools.partial(telling, loop.teacher))
        if self.restored is not None:
            self.game.load_state_dict(self.restored['game'])
            self.searched = self.restored.get('searched')
            return
        self.game.start(loop.progress('comparison', len(evolving) + len(held)))
        if not math.isfinite(self.game.initial):
            raise UserError('the teacher or the calibrated student gives features that are no finite numbers on '
                            'the synthetic images. Try without --amp; check the checkpoint')
        if config.weight_ranges == 'mse' and not loop.find('reconstruction'):  # which leaves weights on integers
            self.choose_weight_ranges(compared)
        self.announce(f'game, discrepancy on held-back images before it {self.game.initial:.4f}')

    def choose_weight_ranges(self, weights):
        """Give weights the ranges of least squared error, unless these are worse on the held-back images."""
        restore = search_weight_ranges(self.loop.student, weights, self.loop.progress)
        found = self.searched = self.game.consider()
        worse = found > self.game.best
        if worse:
            restore()
        self.loop.runner.logger.info(
            f'Weight ranges of least squared error {"tried and dropped, as they are worse" if worse else "taken"}: '
            f'discrepancy on held-back images {self.game.initial:.4f} -> {found:.4f}')

    def depended_on(self, parameters):
        """Return those that anything compared depends on; the rest of the targets stays as calibrated."""
        student, image = self.loop.features(self.loop.student), self.loop.images[0][:1]
        maps = []
        maps.extend(student(image, maps.append))
        maps = [m for m in maps if m.requires_grad]
        if not maps:
            return set()
        parameters = list(parameters.values())
        grads = torch.autograd.grad([m.float().sum() for m in maps], parameters, allow_unused=True)
        return {p for p, grad in zip(parameters, grads) if grad is not None}

    def uncache(self, parameters):
        """Make modules that keep what they computed of a parameter, while they do not train, compute it each time.

        A module is told that it trains, and keeps to that only if nothing it puts out changes. What the features do not
        depend on even then stays as calibrated, and the log says so.

        Args:
            parameters (dict[str, Tensor]): That features do not depend on, by name.

        Returns:
            set[Tensor]: Those that they depend on now.
        """
        names = {name.rpartition('.')[0] for name in parameters}
        owners, found = {}, set()
        for name, module in self.loop.student.named_modules():
            if name in names and not isinstance(module, (torch.nn.modules.batchnorm._BatchNorm, FakeQuantizer)):
                owners.setdefault(type(module), []).append(module)
        image, features = self.loop.images[0][:1], self.loop.features(self.loop.student)
        for modules in owners.values():
            with torch.no_grad():
                expected = features(image)
                for module in modules:
                    module.training = True
                same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(expected, features(image)))
            reached = self.depended_on(parameters) - found if same else set()
            found |= reached
            if reached:
                self.uncached += modules
            else:
                for module in modules:
                    module.training = False
        left = [name for name, p in parameters.items() if p not in found and not name.endswith('.stretch')]
        if left:
            self.loop.runner.logger.info(
                f'{len(left)} parameters of the targets stay as they are, since neither features '
                f'nor raw outputs depend on them: {listed(left)}')
        return found

    def learn_ranges(self):
        """Make the ranges of activations trainable where the stanza wants it.

        Returns:
            dict[str, Tensor]: What the game trains, by name.
        """
        lr, names = self.quantization.game.range_lr, tuple(f'{target}.' for target in self.loop.targets)
        self.ranges = learnable_ranges(self.loop.student, names) if lr else {}
        if not self.ranges:
            return {}
        stretches = {f'{name}.stretch': q.learn_range() for name, q in self.ranges.items()}
        self.range_adam = torch.optim.Adam(stretches.values(), lr=lr, fused=True)
        if self.restored is not None and self.restored['ranges'] is not None:
            for stretch, saved in zip(stretches.values(), self.restored['ranges']['stretches']):
                stretch.data.copy_(saved)
            self.range_adam.load_state_dict(self.restored['ranges']['adam'])
        return stretches

    def fix_ranges(self):
        """Make the learned ranges those of the model."""
        for quantizer in self.ranges.values():
            quantizer.fix_range()
        self.ranges = {}

    def update_student(self, loss):
        """Take one optimiser step on the student, gradients averaged over processes."""
        wrapper = self.loop.runner.optim_wrapper
        wrapper.backward(loss)
        average_gradients(list(self.game.parameters.values()))
        wrapper.step()
        wrapper.zero_grad()
        if self.ranges:
            self.range_adam.step()
            self.range_adam.zero_grad()

    def step(self, rng):
        """Make one update of the game, the student's learning rates by :func:`annealing`."""
        loop = self.loop
        share = annealing(self.index / self.updates)
        for group in loop.runner.optim_wrapper.param_groups:
            group['lr'] = self.quantization.student_lr * share
        if self.ranges:
            self.range_adam.param_groups[0]['lr'] = self.quantization.game.range_lr * share
        log = self.game.step(rng)
        if not math.isfinite(log['ratio']):
            loop.runner.logger.warning(
                f'The game ends early, at update {self.index + 1}: the discrepancy became '
                f"{log['ratio']}. The best student until then is kept. If it is not good enough, try without --amp, or "
                f'a smaller {ROOT}.game.student_lr or {ROOT}.game.range_lr')
            loop.skip(self.updates - 1 - self.index)
        elif self.game.over and self.index < self.updates - 1:
            loop.runner.logger.info(f'The game ends early, at update {self.index + 1}: {self.game.vain} looks at the '
                                    f'held-back images have found no better student ({ROOT}.game.patience)')
            loop.skip(self.updates - 1 - self.index)
        return log

    def tags(self):
        return dict(turn=self.game.turn)

    def finish(self):
        """Keep the best student, or the one before the game."""
        if self.game is None:
            return
        game = self.game
        game.finish()
        self.fix_ranges()
        for module in self.uncached:  # as at the end of a training: what was kept is forgotten
            module.train()
            module.eval()
        self.loop.runner.logger.info(
            f'The game is over after {counted(game.turns, "turn")}, {game.student_updates} student and '
            f'{game.image_updates} image updates: discrepancy on held-back images '
            f'{game.initial:.4f} -> {game.best:.4f}')
        if not game.gained:
            self.loop.runner.logger.info('The student before the game stays: the discrepancy is to be lower by '
                                         f'{game.config.gain:.0%} ({ROOT}.game.gain)')

    def images(self):
        if self.game is None:
            return super().images()
        return [o.images.detach() for o in self.game.optimizers] + list(self.game.holdout)

    def summary(self):
        game = self.game
        return game and dict(initial=game.initial, searched=self.searched, best=game.best, gained=game.gained,
                             turns=game.turns, student=game.student_updates, images=game.image_updates)

    def plots(self):
        found = self.loop.summaries.get(self.name)
        if found is None:
            return []
        kept = 'the student with the lowest was kept.' if found['gained'] else \
            'the student before the game was kept, as too little was gained (`game.gain`).'
        text = (
            'Student and images take turns: the student lowers its discrepancy from the teacher, images raise it. On '
            f"held-back images it went from {found['initial']:.4f} to {found['best']:.4f} in {found['turns']} turns, "
            f"{found['student']} updates of the student and {found['images']} of the images; {kept}")
        return [Plot('game', text, figures.game_curve(self.loop.history, found['initial']))]

    def state_dict(self):
        return dict(game=self.game.state_dict(), searched=self.searched,
                    ranges=self.ranges and dict(stretches=[q.stretch.detach() for q in self.ranges.values()],
                                                adam=self.range_adam.state_dict()) or None)
