"""The data-free loop: starts -> images -> calibration -> reconstruction -> game, one mmengine iteration an update.

:mod:`psaq_mm.engine.stages` holds what happens; the loop takes the stages one after the other.
"""
from __future__ import annotations

import datetime
import random
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop

from ..compat import keep_freed_memory
from ..errors import UserError, is_out_of_memory
from ..models import (
    backbone_of,
    beyond_features,
    checkpoint_blocks,
    copy_model,
    extract_features,
    extract_inner,
    head_tap,
    pixel_statistics,
    scope,
    similarity_taps,
    telling_features,
)
from ..quantization import Mode, quantizers, set_mode, unused_quantizers
from ..registry import LOOPS
from ..stanza import ROOT, QuantizationConfig, flat
from ..synthesis import PatchSimilarityTap, listening, valid_range
from ..version import __version__
from .checkpoint import load_float, read_checkpoint
from .images import real_images, reused_images
from .stages import STAGES, Stage

QUANTIZER_STATE = ('_quantizer.scale', '_quantizer.zero_point')  # ends of names
SILENCE = 30  # seconds after which a line says how far a stage without iterations is; our choice


@LOOPS.register_module()
class DataFreeLoop(BaseLoop):
    """Quantizes the runner's model without data, as ``runner.train()``.

    Needs :class:`QuantizationHook` (converts the model before the run). Iterations are the updates of the stages, one
    stage after the other.

    Attributes:
        stages (list[Stage]): Those that the stanza asks for, in their order.
        stage (Stage): The present one; after the run the last one.
        student, teacher (nn.Module): The model to quantize, and its full-precision copy.
        images, starts (list[Tensor]): Batches, (B, C, H, W) each, in the model's input space; what they came from.
        low, high (Tensor): Valid pixel range, (1, C, 1, 1).
        tap (PatchSimilarityTap | None): On the teacher's backbone, where images are synthesised.
        heads (bool): Whether features go on to the heads' raw outputs.
        history (list[dict]): What the report draws: the numbers of each update, its stage and number in it.
        minutes (dict[str, float]): Of each stage.
        summaries (dict[str, dict]): What finished stages say of themselves.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader | dict): Of :class:`StartDataset`; with method 'real', of images to calibrate on.
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
        self.synthesized = self.quantization.synthesis.method.startswith('psaq')
        self.images, self.starts, self.history = [], [], []
        self.tap = self.restored = None
        self.stages = [kind(self) for kind in STAGES if kind.wanted(self)]
        self.stage = self.stages[0]
        self.minutes = {kind.name: 0.0 for kind in STAGES}
        self.summaries = {}

    epoch = property(lambda self: self._epoch)
    iter = property(lambda self: self._iter)
    max_epochs = property(lambda self: 1)
    max_iters = property(lambda self: sum(stage.updates for stage in self.stages))

    # -- the method ------------------------------------------------------------------------------------------------

    def run(self):
        """Run what is left of all stages.

        Returns:
            nn.Module: The quantized model.
        """
        self.prepare()
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        for stage in self.stages[self.stages.index(self.stage):]:
            self.stage = stage
            self.forget_numbers()
            with self.clock():
                stage.start()
            stage.restored = None
            while stage.index < stage.updates:
                self.iteration()
            stage.finish()
            summary = stage.summary()
            if summary is not None:
                self.summaries[stage.name] = summary
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def forget_numbers(self):
        """Take the numbers of earlier stages out of mmengine's log lines."""
        known = self.runner.message_hub.log_scalars
        for name in {name for update in self.history for name in update}:
            known.pop(f'train/{name}', None)

    def iteration(self):
        """Make one update of the present stage, between mmengine's hooks."""
        stage = self.stage
        self.runner.call_hook('before_train_iter', batch_idx=self._iter, data_batch=None)
        (rank, index), tags = stage.place(), stage.tags()
        with self.clock():
            outputs = stage.step(random.Random(f'{self.runner.seed}-{rank}-{index}'))
        if outputs:
            self.history.append(dict(outputs, stage=stage.name, index=index, **tags))
        self.runner.call_hook('after_train_iter', batch_idx=self._iter, data_batch=None, outputs=outputs)
        self._iter += 1

    def skip(self, updates: int) -> None:
        """Leave out so many of the next updates."""
        self._iter += updates

    def updates_before(self, stage: Stage) -> int:
        """Return how many updates precede a stage."""
        return sum(other.updates for other in self.stages[:self.stages.index(stage)])

    def find(self, name: str) -> Stage | None:
        """Return the stage of a name, or None if the run has none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @contextmanager
    def clock(self):
        """Add the time within to the minutes of the present stage."""
        started = time.perf_counter()
        yield
        self.minutes[self.stage.name] += (time.perf_counter() - started) / 60

    def progress(self, stage: str, total: int, part: str = '') -> Callable[[], None]:
        """Return a function to call after each of so many steps that are no iterations.

        It moves the bar, and where there is none a line with the time left appears in the log every half a minute.

        Args:
            stage (str): What the bar and the line say. What is done again and again, as for each block, has one name
                and so one bar.
            total (int): Steps.
            part (str): What the line says besides.
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
                self.runner.logger.info(f'{stage}{part and f" {part}"}: {done} of {total}, eta: {left}')

        return step

    def prepare(self):
        """Put the student in place, the teacher beside it, images at their start or where an interrupted run left them.
        """
        model = self.runner.model
        self.student = model.module if is_model_wrapper(model) else model
        if not quantizers(self.student):
            raise RuntimeError('the model is not converted: DataFreeLoop needs psaq_mm.QuantizationHook')
        self.student.eval()
        for module in self.student.modules():  # reentrant checkpointing would hide the tokens from the gradient
            if getattr(module, 'with_cp', False):
                module.with_cp = False
        self.device = next(self.student.parameters()).device
        self.targets = scope(self.student, self.quantization)
        self.teacher = copy_model(self.student)
        load_float(self.teacher, read_checkpoint(self.checkpoint), self.targets)
        set_mode(self.teacher, Mode.FLOAT)
        self.teacher.requires_grad_(False)
        if self.device.type == 'cpu':
            keep_freed_memory()
        if self.quantization.synthesis.checkpointing:
            for player in (self.teacher, self.student):
                checkpoint_blocks(backbone_of(player))
        self.low, self.high = (v.to(self.device) for v in valid_range(*pixel_statistics(self.student)))
        self.load_images()
        self.heads = beyond_features(self.targets)
        try:
            unused = unused_quantizers(self.student, self.first_features)
        except Exception as error:
            self.explain(error)
            raise
        if unused:
            raise UserError(f"'{unused[0]}' (and {len(unused) - 1} more) never runs when features are computed, so it "
                            f'cannot be calibrated: keep it in float ({ROOT}.keep_float) or take it out of the targets')
        if self.synthesized:
            self.tap = self.new_tap()
        for stage in self.stages:
            stage.prepare()
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

    def new_tap(self):
        """Return a tap on the teacher's backbone.

        Raises:
            UserError: If heads are to agree and there are none.
        """
        backbone, image = backbone_of(self.teacher), self.images[0][:1]
        sources, readers, model = similarity_taps(backbone, image)
        heads = head_tap(backbone, sources) if self.quantization.synthesis.agreement else None
        if heads is not None:
            with torch.no_grad(), heads:
                backbone(image)
            if not heads.found:
                raise UserError(f'{ROOT}.synthesis.agreement is the agreement of attention heads, and '
                                f'{type(backbone).__name__} has no attention of several heads: leave it out')
        return PatchSimilarityTap(sources, readers, model, heads)

    def first_features(self):
        """Return what the student makes of one image: what shows which of its modules run."""
        return extract_features(self.student, self.images[0][:1], self.heads)

    def explain(self, error):
        """Say what to do about an error of :meth:`first_features`, if the full-precision model by itself has one, too.

        Raises:
            UserError: Instead of what the model raised.
        """
        if isinstance(error, UserError) or is_out_of_memory(error):
            return
        image = self.images[0][:1]
        try:
            extract_features(self.teacher, image, self.heads)
        except Exception as found:
            size = ' x '.join(map(str, image.shape[-2:]))
            mend = f'set {ROOT}.synthesis.size'
            if self.quantization.synthesis.reuse:
                mend = f'{ROOT}.synthesis.reuse is of another model: leave it out, or give that of a run on this one'
            raise UserError(f'{type(self.student).__name__} cannot compute features of an image of {size} '
                            f'({type(found).__name__}: {found}). Where the size is wrong, {mend}') from found

    def load_images(self):
        """Take starts from the data set, images of an earlier run, or with method 'real' those of the data loader."""
        config = self.quantization.synthesis
        if config.method == 'real':
            self.images = real_images(self.dataloader, self.student, config.num_images)
            return
        self.dataloader.dataset.valid_range = self.low.cpu(), self.high.cpu()
        self.images = [data['inputs'].to(self.device) for data in self.dataloader]
        self.starts = [batch.clone() for batch in self.images]
        if config.reuse:
            shard = reused_images(config.reuse, self.low.shape[1])
            self.images, self.starts = [batch.to(self.device) for batch in shard], []

    def precision(self):
        """The context in which features are computed: bfloat16 where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()

    def features(self, model):
        """A feature extractor on a model, in the precision of the run."""

        def extract(images, visit=None, visit_heads=None):
            with self.precision():
                return extract_inner(model, images, self.heads, visit, visit_heads)

        return extract

    def listen(self, images, tap=None):
        """Run the teacher while a tap (default: the run's) listens, as far as the objective of synthesis needs it.

        Returns:
            list[Tensor]: Its :func:`telling_features` where diversity counts, else none: it runs to the last tapped
            block.
        """
        tap = tap or self.tap
        with self.precision():
            if not self.quantization.synthesis.diversity:
                tap.run(backbone_of(self.teacher), images)
                return []
            with listening(tap, self.quantization.synthesis):
                return telling_features(self.teacher, images)

    # -- resume ----------------------------------------------------------------------------------------------------

    def state_dict(self):
        """Return all that the model's and the optimiser's state don't hold."""
        return dict(
            version=__version__,
            images=[batch.detach().cpu() for batch in self.images],
            stage=self.stage.name,
            state=self.stage.state_dict(),
            updates={stage.name: stage.updates for stage in self.stages},
            minutes=dict(self.minutes),
            summaries=dict(self.summaries),
            history=list(self.history),
            settings=self.settings())

    def settings(self):
        """Return what an interrupted run and the one that goes on from it must share: all but memory and the report."""
        stanza = self.quantization.to_dict()
        stanza['synthesis'].pop('checkpointing')
        stanza.pop('report')
        return dict(stanza, checkpoint=self.checkpoint, seed=self.runner.seed, amp=self.amp)

    def load_state_dict(self, state):
        """Take the state in; :meth:`prepare` and the stages put it in place.

        Raises:
            UserError: If the interrupted run had other settings, or another version of psaq_mm.
        """
        theirs, ours = dict(flat(state.get('settings', {}))), dict(flat(self.settings()))
        began = state.get('version', 'of an earlier version')
        if began != __version__ or theirs.keys() != ours.keys():  # of one number while it is developed
            raise UserError(f'--resume: psaq_mm {began} began the run in this work dir, this is psaq_mm {__version__}'
                            f'{" with other settings" * (began == __version__)}. Finish the run with the psaq_mm that '
                            'began it, or start afresh without --resume or with another --work-dir')
        changed = sorted(key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key))
        if changed:
            raise UserError('--resume: the interrupted run in this work dir had other settings ('
                            + '; '.join(f'{key} was {theirs.get(key)!r}, is {ours.get(key)!r}' for key in changed)
                            + '). Restore them, or start afresh without --resume or with another --work-dir')
        self.restored = state
        self.stage = self.find(state['stage'])
        self.stage.restored = state['state']
        for stage in self.stages:
            stage.updates = state['updates'][stage.name]
        self.minutes, self.summaries = dict(state['minutes']), dict(state['summaries'])
        self.history = list(state['history'])
