"""The data-free loop: noise -> images -> calibration -> game -> quantized model, one mmengine iteration an update.

Read :meth:`DataFreeLoop.run` from top to bottom for the whole method.
"""
from __future__ import annotations

import datetime
import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from mmengine import dist
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop

from ..compat import keep_freed_memory
from ..errors import UserError
from ..models import (
    backbone_of,
    beyond_features,
    checkpoint_blocks,
    copy_model,
    extract_features,
    extract_inner,
    similarity_taps,
)
from ..quantization import Mode, calibrate, quantizers, search_weight_ranges, set_mode, unused_quantizers
from ..registry import LOOPS
from ..stanza import ROOT, QuantizationConfig, reads_pixels
from ..synthesis import Game, ImageOptimizer, PatchSimilarityTap, learning_rate, objective, valid_range
from .checkpoint import load_float, load_safely, read_checkpoint

QUANTIZER_STATE = ('_quantizer.scale', '_quantizer.zero_point')  # ends of names
OPERANDS = ('input_quantizer', 'a_quantizer', 'b_quantizer')  # whose ranges the game may learn
SILENCE = 30  # seconds after which a line says how far a stage without iterations is; our choice
PLATEAU = 0.01  # nats a block: a rise of the entropy that counts for synthesis.patience; our choice


def reduce_range(low, high, merge):
    """Joins the ranges that the processes observed: their extremes or their mean."""
    if dist.get_world_size() == 1:
        return low, high
    low, high = low.clone(), high.clone()
    dist.all_reduce(low, 'min' if merge == 'extreme' else 'mean')
    dist.all_reduce(high, 'max' if merge == 'extreme' else 'mean')
    return low, high


def mean_over_processes(value: float) -> float:
    """The mean of a number over all processes."""
    if dist.get_world_size() == 1:
        return value
    value = torch.tensor(value, device=dist.get_comm_device())
    dist.all_reduce(value, 'mean')
    return value.item()


def read_images(path: str, key: str = f'{ROOT}.synthesis.reuse', name: str = 'synthetic.pt') -> list[torch.Tensor]:
    """Image batches of an earlier run, (B, 3, H, W) each.

    Args:
        path (str): The file.
        key, name (str): For errors: where the path was given, and what such a file is called.

    Raises:
        UserError: If the file is not there or is none of ours.
    """
    try:
        images = load_safely(Path(path))['images']
        if all(torch.is_tensor(b) and b.dim() == 4 and torch.isfinite(b).all() for b in images) and images:
            return images
    except Exception as error:
        raise UserError(f'{key} = {path!r} cannot be read ({type(error).__name__}: {error}): it must be the '
                        f'{name!r} of an earlier run') from None
    raise UserError(f"{key} = {path!r} holds no images: it must be an earlier run's {name!r}")


@LOOPS.register_module()
class DataFreeLoop(BaseLoop):
    """Quantizes the runner's model without data, as ``runner.train()``.

    Needs :class:`QuantizationHook` (converts the model before the run). Iterations: first ``steps`` for each batch of
    images, then those of the game.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader | dict): Of :class:`NoiseDataset`; with method 'real', of images to calibrate on.
        quantization (dict): The stanza.
        checkpoint (str): Full-precision weights.
        amp (bool): Run features in bfloat16. Defaults to False.
    """

    def __init__(self, runner, dataloader, quantization, checkpoint, amp=False):
        super().__init__(runner, dataloader)
        self.quantization = QuantizationConfig.parse(quantization)
        self.checkpoint = checkpoint
        self.amp = amp
        self._epoch = self._iter = 0
        synthesis = self.quantization.synthesis
        self.synthesized = synthesis.method.startswith('psaq')
        wanted = self.synthesized and not synthesis.reuse
        self.synthesis_iters = len(self.dataloader) * synthesis.steps if wanted else 0
        self.game_iters = self.quantization.game.steps if synthesis.method == 'psaq_v2' else 0
        self.images, self.noise = [], []
        self.history = []  # what the report draws: the numbers of each update, its stage and number in it
        self.optimizer = self.game = self.restored = None
        self.plateau, self.ranges = {}, {}
        self.minutes = dict(synthesis=0.0, calibration=0.0, game=0.0)

    epoch = property(lambda self: self._epoch)
    iter = property(lambda self: self._iter)
    max_epochs = property(lambda self: 1)
    max_iters = property(lambda self: self.synthesis_iters + self.game_iters)

    # -- the method ------------------------------------------------------------------------------------------------

    def run(self):
        """Runs what is left of all stages.

        Returns:
            nn.Module: The quantized model.
        """
        self.prepare()
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        if self.synthesis_iters:
            self.announce(f'synthesis of {sum(map(len, self.images))} images in {len(self.images)} batches', 1)
            while self._iter < self.synthesis_iters:
                self.iteration(self.synthesis_step)
        if not self.is_calibrated():
            self.announce(f'calibration on {sum(map(len, self.images))} images', 2)
            self.calibrate()
        if self.game_iters:
            self.start_game()
        if self.game_iters:
            while self._iter < self.max_iters:
                self.iteration(self.game_step)
            self.finish_game()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def announce(self, what, stage):
        if self._iter < (self.synthesis_iters if stage == 1 else self.max_iters) or stage == 2:
            self.runner.logger.info(f'Stage {stage}/3: {what}')

    def iteration(self, step):
        """One update, between mmengine's hooks."""
        self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=None)
        stage = 'synthesis' if self._iter < self.synthesis_iters else 'game'
        # counted within the stage: with images of an earlier run the game is the same
        if stage == 'game':
            rank, index = dist.get_rank(), self._iter - self.synthesis_iters
        else:  # by the batch: however many processes share the batches, each becomes what it would
            batch, update = divmod(self._iter, self.quantization.synthesis.steps)
            batch = batch * dist.get_world_size() + dist.get_rank()
            rank, index = 0, batch * self.quantization.synthesis.steps + update
        rng = random.Random(f'{self.runner.seed}-{rank}-{index}')
        started = time.perf_counter()
        turn = self.game and self.game.turn
        outputs = step(rng)
        self.remember(stage, index, turn, outputs)
        self.minutes[stage] += (time.perf_counter() - started) / 60
        self.runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=None, outputs=outputs)
        self._iter += 1

    def progress(self, stage: str, total: int) -> Callable[[], None]:
        """Return a function to call after each of so many steps that are no iterations.

        It moves the bar, and where there is none a line with the time left appears in the log every half a minute.

        Args:
            stage (str): What the bar and the line say.
            total (int): Steps.
        """
        done, started = 0, time.monotonic()
        said = started

        def step():
            nonlocal done, said
            done += 1
            self.runner.call_hook('after_stage_step', stage=stage, done=done, total=total)
            now = time.monotonic()
            if now - said > SILENCE:
                said = now
                left = datetime.timedelta(seconds=round((now - started) / done * (total - done)))
                self.runner.logger.info(f'{stage}: {done} of {total}, eta: {left}')

        return step

    def remember(self, stage, index, turn, numbers):
        """Adds an update to the history."""
        if numbers:
            known = {key: value for key, value in numbers.items() if isinstance(value, (int, float))}
            self.history.append(dict(known, stage=stage, index=index, **(dict(turn=turn) if turn else {})))

    def prepare(self):
        """Student in place, teacher beside it, images at their start or where the interrupted run left them."""
        model = self.runner.model
        self.student = model.module if is_model_wrapper(model) else model
        if not quantizers(self.student):
            raise RuntimeError('the model is not converted: DataFreeLoop needs psaq_mm.QuantizationHook')
        self.student.eval()
        for module in self.student.modules():  # reentrant checkpointing would hide the tokens from the gradient
            if getattr(module, 'with_cp', False):
                module.with_cp = False
        self.device = next(self.student.parameters()).device
        self.teacher = copy_model(self.student)
        load_float(self.teacher, read_checkpoint(self.checkpoint), self.quantization.targets)
        set_mode(self.teacher, Mode.FLOAT)
        self.teacher.requires_grad_(False)
        if self.device.type == 'cpu':
            keep_freed_memory()
        if self.quantization.synthesis.checkpointing:
            for player in (self.teacher, self.student):
                checkpoint_blocks(backbone_of(player))
        preprocessor = self.student.data_preprocessor
        channels = next(p for p in self.student.parameters() if p.dim() == 4).shape[1]
        self.low, self.high = (v.to(self.device) for v in valid_range(
            getattr(preprocessor, 'mean', torch.zeros(channels)).flatten().cpu(),
            getattr(preprocessor, 'std', torch.ones(channels)).flatten().cpu()))
        self.tap = None
        if self.synthesized:
            self.tap = PatchSimilarityTap(*similarity_taps(backbone_of(self.teacher)))
        self.load_images()
        if self.game_iters and sum(map(len, self.images)) < 2:
            raise UserError(f'{ROOT}.synthesis: each process needs at least 2 images for the game, one evolves and one '
                            'is held back: raise num_images or start fewer processes')
        self.heads = beyond_features(self.quantization.targets)
        unused = unused_quantizers(self.student, self.first_features)
        if unused:
            raise UserError(f"'{unused[0]}' (and {len(unused) - 1} more) never runs in a prediction, so it cannot be "
                            f'calibrated: keep it in float ({ROOT}.keep_float) or take it out of the targets')
        if self.restored is not None:
            for image, saved in zip(self.images, self.restored['images']):
                image.copy_(saved)
        else:
            self.compare_weights()

    def compare_weights(self):
        """Compare the student's weights with the teacher's, which psaq_mm itself has read, before the first step.

        Raises:
            UserError: If mmengine loaded anything else into the student.
        """
        theirs = self.teacher.state_dict()
        other = [name for name, value in self.student.state_dict().items()
                 if not name.endswith(QUANTIZER_STATE) and not torch.equal(value, theirs[name])]
        if other:
            raise UserError(f'{self.checkpoint}: the model to quantize did not get its weights ({other[0]} and '
                            f'{len(other) - 1} more differ). Write them anew with torch.save(dict(state_dict=...), '
                            'FILE) and pass that file with --checkpoint')

    def first_features(self):
        """Features of one image: whatever a model cannot do with images of this size shows here.

        Raises:
            UserError: Instead of what the model raises.
        """
        image = self.images[0][:1]
        try:
            return extract_features(self.student, image, self.heads)
        except UserError:
            raise
        except Exception as error:
            size = ' x '.join(map(str, image.shape[-2:]))
            raise UserError(f'{type(self.student).__name__} cannot compute features of an image of {size} '
                            f'({type(error).__name__}: {error}). Where the size is wrong, set {ROOT}.synthesis.size') \
                from error

    def load_images(self):
        """Noise from the data set, or with method 'real' the images of the calibration data loader."""
        if self.quantization.synthesis.method == 'real':
            for data in self.dataloader:
                left = self.quantization.synthesis.num_images - sum(map(len, self.images))
                if left <= 0:
                    break
                self.images.append(self.student.data_preprocessor(data, False)['inputs'][:left])
                if not torch.isfinite(self.images[-1]).all():
                    raise UserError(f'batch {len(self.images)} of calib_dataloader holds pixels that are no finite '
                                    'numbers: check its images and pipeline')
            return
        for data in self.dataloader:
            batch = data['inputs'].to(self.device)
            self.images.append(batch.maximum(self.low).minimum(self.high))
        self.noise = [batch.clone() for batch in self.images]
        if self.quantization.synthesis.reuse:
            shard = read_images(self.quantization.synthesis.reuse)[dist.get_rank()::dist.get_world_size()]
            if not shard:
                raise UserError(f'{ROOT}.synthesis.reuse holds fewer batches than there are processes '
                                f'({dist.get_world_size()}): start fewer')
            self.images, self.noise = [batch.to(self.device) for batch in shard], []

    def precision(self):
        """The context in which features are computed: bfloat16 where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()

    def features(self, model):
        """A feature extractor on a model, in the precision of the run."""

        def extract(images, visit=None):
            with self.precision():
                return extract_inner(model, images, self.heads, visit)

        return extract

    def run_teacher(self, images, tap=None):
        """The teacher's backbone as far as the last block of a tap (default: the run's), in its precision."""
        with self.precision():
            (tap or self.tap).run(backbone_of(self.teacher), images)

    def synthesis_step(self, rng):
        """One update of one batch of images towards higher patch-similarity entropy."""
        config = self.quantization.synthesis
        index, step = divmod(self._iter, config.steps)
        if step == 0:
            self.plateau = dict(entropy=-math.inf, since=0)
        if self.has_plateaued():
            return {}  # other processes still work on theirs
        if self.optimizer is None:
            start = self.images[index]
            if index and config.warm_start and self.images[index - 1].shape == start.shape:
                start = start.lerp(self.images[index - 1], config.warm_start)
            self.optimizer = ImageOptimizer(start, self.low, self.high, config.lr)
            if self.restored is not None and self.restored['optimizer'] is not None:
                self.optimizer.load_state_dict(self.restored['optimizer'])
                self.restored['optimizer'] = None
        log = {}

        def lowered(images):
            loss, numbers = objective(images, self.run_teacher, self.tap, config, rng)
            log.update(numbers)
            return loss

        self.optimizer.step(lowered, learning_rate(step, config))
        self.follow(log['entropy'])
        if self.has_plateaued() and dist.get_world_size() == 1:
            self._iter += config.steps - 1 - step  # the steps that are left do not take place
        if self.has_plateaued() or step == config.steps - 1:
            self.images[index] = self.optimizer.images.detach()
            self.optimizer = None
        return log

    def follow(self, entropy):
        """Takes note of the entropy of the batch, in nats a block."""
        if entropy > self.plateau['entropy'] + PLATEAU:
            self.plateau = dict(entropy=entropy, since=0)
        else:
            self.plateau['since'] += 1

    def has_plateaued(self):
        """Whether the entropy of the batch has ceased to rise."""
        patience = self.quantization.synthesis.patience
        return patience is not None and self.plateau['since'] >= patience

    def is_calibrated(self):
        return all(q.calibrated for q in quantizers(self.student).values())

    def calibrate(self):
        """Choose all scales from the images, as the float student sees them."""
        step = self.progress('calibration', len(self.images))

        def run():
            for batch in self.images:
                extract_features(self.student, batch, self.heads)  # in float32 even with amp, as inference will be
                step()

        started = time.perf_counter()
        calibrate(self.student, run, reduce_range)
        self.minutes['calibration'] = (time.perf_counter() - started) / 60

    def start_game(self):
        """Sets the players up; a resumed run takes its seat where it left.

        There is no game where nothing that is compared depends on what may change, as with the heads of two-stage
        detectors alone as targets.
        """
        started = time.perf_counter()
        config, synthesis = self.quantization.game, self.quantization.synthesis
        evolving, held = self.split(config.holdout)
        names = tuple(f'{t}.' for t in self.quantization.targets)
        parameters = {n: p for n, p in self.student.named_parameters() if n.startswith(names) and p.requires_grad}
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in parameters)
        parameters.update(self.learn_ranges(names))
        compared = self.depended_on(parameters)
        if not compared:
            self.runner.logger.warning('No game: features and raw outputs do not depend on any weight of the targets '
                                       f'({", ".join(self.quantization.targets)}), which stay as they are')
            self.game_iters = 0
            self.fix_ranges()
            return
        self.game = Game(config, synthesis, self.features(self.teacher), self.features(self.student), self.tap,
                         parameters, self.update_student, evolving, held, self.low, self.high, mean_over_processes)
        if self.restored is not None and self.restored['game'] is not None:
            self.game.load_state_dict(self.restored['game'])
        else:
            self.game.start(self.progress('comparison', len(evolving) + len(held)))
            if not math.isfinite(self.game.initial):
                raise UserError('the teacher or the calibrated student gives features that are no finite numbers on '
                                'the synthetic images. Try without --amp; check the checkpoint')
            if config.weight_ranges == 'mse':
                restore = search_weight_ranges(self.student, compared, self.progress)
                found = self.game.consider()
                worse = found > self.game.best
                if worse:
                    restore()
                self.runner.logger.info(
                    f'Weight ranges of least squared error {"put back" if worse else "kept"}: '
                    f'discrepancy on held-back images {self.game.initial:.4f} -> {found:.4f}')
            self.minutes['game'] += (time.perf_counter() - started) / 60
            self.announce(f'game, discrepancy of the plain calibration {self.game.initial:.4f} on held-back images', 3)

    def depended_on(self, parameters):
        """Those that anything compared depends on; the rest of the targets stays as calibrated."""
        maps = []
        maps.extend(self.features(self.student)(self.images[0][:1], maps.append))
        maps = [m for m in maps if m.requires_grad]
        if not maps:
            return set()
        parameters = list(parameters.values())
        grads = torch.autograd.grad([m.float().sum() for m in maps], parameters, allow_unused=True)
        return {p for p, grad in zip(parameters, grads) if grad is not None}

    def learn_ranges(self, targets):
        """Makes the ranges of activations trainable where the stanza wants it.

        Only those of operands of products: residual sums and logits carry outliers that synthetic images may lack. Not
        that of the pixels, which is known.

        Args:
            targets (tuple[str]): Beginnings of names.

        Returns:
            dict[str, Tensor]: What the game trains, by name.
        """
        lr = self.quantization.game.range_lr
        self.ranges = {name: quantizer for name, quantizer in quantizers(self.student).items()
                       if lr and name.startswith(targets) and name.rpartition('.')[2] in OPERANDS
                       and not reads_pixels(self.student.get_submodule(name.rpartition('.')[0]))}
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
        """Makes the learned ranges those of the model."""
        for quantizer in self.ranges.values():
            quantizer.fix_range()
        self.ranges = {}

    def split(self, holdout):
        """Divides the images into evolving and held-back batches."""
        total = sum(map(len, self.images))
        hold = min(max(1, round(holdout * total)), total - 1)
        evolving, held = [], []
        for batch in reversed(self.images):
            take = min(hold, len(batch))
            hold -= take
            if take:
                held.insert(0, batch[len(batch) - take:])
            if take < len(batch):
                evolving.insert(0, batch[:len(batch) - take])
        return evolving, held

    def update_student(self, loss):
        """One optimiser step on the student, gradients averaged over processes."""
        wrapper = self.runner.optim_wrapper
        wrapper.backward(loss)
        dist.all_reduce_params([p.grad for p in self.game.parameters.values() if p.grad is not None], op='mean')
        wrapper.step()
        wrapper.zero_grad()
        if self.ranges:
            self.range_adam.step()
            self.range_adam.zero_grad()

    def game_step(self, rng):
        """One update of the game, the student's learning rates on half a cosine down to a hundredth."""
        done = (self._iter - self.synthesis_iters) / self.game_iters
        share = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.runner.optim_wrapper.param_groups:
            group['lr'] = self.quantization.student_lr * share
        if self.ranges:
            self.range_adam.param_groups[0]['lr'] = self.quantization.game.range_lr * share
        log = self.game.step(rng)
        if not math.isfinite(log['ratio']):
            self.runner.logger.warning(
                f'The game ends early, at update {self._iter - self.synthesis_iters + 1}: the discrepancy became '
                f"{log['ratio']}. The best student until then is kept. If it is not good enough, try without --amp, or "
                f'a smaller {ROOT}.game.student_lr or {ROOT}.game.range_lr')
            self._iter = self.max_iters - 1
        if 'entropy' in log:
            log['entropy'] /= self.tap.count
        return log

    def finish_game(self):
        """Keeps the best student."""
        game = self.game
        game.finish()
        self.fix_ranges()
        self.runner.logger.info(
            f'Game over after {game.turns} turns, {game.student_updates} student and '
            f'{game.image_updates} image updates: discrepancy on held-back images '
            f'{game.initial:.4f} -> {game.best:.4f}')

    # -- resume ----------------------------------------------------------------------------------------------------

    def state_dict(self):
        """All that the model's and the optimiser's state don't hold."""
        return dict(
            images=[batch.detach().cpu() for batch in self.images],
            optimizer=self.optimizer and self.optimizer.state_dict(),
            plateau=dict(self.plateau),
            ranges=self.ranges and dict(stretches=[q.stretch.detach() for q in self.ranges.values()],
                                        adam=self.range_adam.state_dict()) or None,
            game=self.game and self.game.state_dict(),
            minutes=dict(self.minutes),
            history=list(self.history),
            settings=self.settings())

    def settings(self):
        """What an interrupted run and the one that goes on from it must share: all but memory and the report."""
        stanza = self.quantization.to_dict()
        stanza['synthesis'].pop('checkpointing')
        stanza.pop('report')
        return dict(stanza, checkpoint=self.checkpoint, seed=self.runner.seed, amp=self.amp)

    def load_state_dict(self, state):
        """Takes the state in; :meth:`prepare` and the stages put it in place.

        Raises:
            UserError: If the interrupted run had other settings.
        """
        theirs, ours = state['settings'], self.settings()
        changed = sorted(key for key in ours if ours[key] != theirs.get(key))
        if changed:
            raise UserError('--resume: the interrupted run in this work dir had other settings ('
                            + '; '.join(f'{key} was {theirs.get(key)!r}, is {ours[key]!r}' for key in changed)
                            + '). Restore them, or start afresh without --resume or with another --work-dir')
        self.restored = state
        self.plateau = dict(state['plateau'])
        self.minutes = dict(state['minutes'])
        self.history = list(state['history'])
