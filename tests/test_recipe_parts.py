"""Each part of recipe 'low_bit', switched off alone: what a run then does not do, seen from inside."""
import copy

import pytest
import torch
from mmengine.config import Config

from psaq_mm.engine import stages
from psaq_mm.engine.config import data_free_config
from psaq_mm.engine.pipeline import build_runner, name_visualizer
from psaq_mm.quantization import FakeQuantizer, quantized_layers, quantizers
from psaq_mm.quantization.observers import affine_parameters
from psaq_mm.reconstruction import UnitReconstruction
from psaq_mm.stanza import QuantizationConfig
from psaq_mm.synthesis import Game, start_image

from .conftest import DEMO_CHECKPOINT
from .test_reconstruction import QUICK

TINY = QUICK | {'synthesis.batch_size': 2, 'synthesis.steps': 2, 'keep_float': [
    'neck.*', 'backbone.stages.0.blocks.1.*', *(f'backbone.stages.{stage}.*' for stage in (1, 2, 3))]}
GAME = {'game.steps': 4, 'game.student_patience': 4, 'game.evaluate_every': 1, 'game.student_lr': 1e-5,
        'game.range_lr': 1e-3, 'game.gain': 0.9, 'synthesis.num_images': 4}  # rates that gain a little, and not enough


class Watched:
    """A run, and what it did on the way.

    Attributes:
        loop (DataFreeLoop): Done.
        meta (dict): Of the quantized checkpoint.
        calibrated (dict[str, Tensor]): Scales right after the calibration, by the quantizers' names.
        extremes (dict[str, Tensor]): What these would be with the ends of all values.
        parameters (dict[str, Tensor]): Of the student, right after the calibration.
        units (list[UnitReconstruction]): Those that learned.
        mixed (list[bool]): Of each, whether its updates see other inputs than those of the quantized model.
        searches, gradients (int): How often ranges were searched, and final features asked for their gradients.
        taught (int): Images that teach the blocks.
        before_game (dict[str, Tensor]): Parameters of the student where the game begins.
    """

    def __init__(self, cfg, patch):
        self.units, self.mixed, self.searches, self.gradients, self.taught = [], [], 0, 0, 0
        self.extremes, self.calibrated, self.parameters, self.before_game = {}, {}, {}, {}
        ends = {}
        before = dict(calibrate=FakeQuantizer.calibrate, finish=stages.CalibrationStage.finish,
                      start=UnitReconstruction.start, search=UnitReconstruction.search, game=Game.start,
                      views=stages.ReconstructionStage.make_views, importance=stages.reconstruction.importance)

        def calibrate(quantizer, reduce=None):
            if quantizer.observer is not None:
                ends[quantizer] = quantizer.observer.low, quantizer.observer.high
            return before['calibrate'](quantizer, reduce)

        def finish(stage):
            before['finish'](stage)
            student = stage.loop.student
            self.calibrated = {name: q.scale.clone() for name, q in quantizers(student).items()}
            self.extremes = {name: affine_parameters(*ends[q], q.config.bits, q.config.symmetric)[0]
                             for name, q in quantizers(student).items()}
            self.parameters = {name: p.detach().clone() for name, p in student.named_parameters()}

        def start(unit, *args):
            sample = unit.samples[0]
            with torch.no_grad():
                alone, seen = unit.loss(sample)[0], unit.loss(sample, torch.Generator().manual_seed(0))[0]
            self.units.append(unit)
            self.mixed.append(not torch.equal(alone, seen))
            before['start'](unit, *args)

        def search(unit):
            self.searches += 1
            return before['search'](unit)

        def importance(*args):
            self.gradients += 1
            return before['importance'](*args)

        def views(stage, images, count):
            self.taught = sum(map(len, images))
            return before['views'](stage, images, count)

        def game(played, progress):
            self.before_game = {name: p.detach().clone() for name, p in played.parameters.items()}
            before['game'](played, progress)

        patch.setattr(FakeQuantizer, 'calibrate', calibrate)
        patch.setattr(stages.CalibrationStage, 'finish', finish)
        patch.setattr(UnitReconstruction, 'start', start)
        patch.setattr(UnitReconstruction, 'search', search)
        patch.setattr(stages.reconstruction, 'importance', importance)
        patch.setattr(stages.ReconstructionStage, 'make_views', views)
        patch.setattr(Game, 'start', game)
        patch.setattr(Config, 'pretty_text', '')  # formatting a config takes as long as all the rest
        run = data_free_config(cfg, QuantizationConfig.parse(cfg.quantization), str(DEMO_CHECKPOINT), {})
        name_visualizer(run, cfg.work_dir.replace('/', '_'))
        runner = build_runner(run)
        runner.train()
        self.loop = runner.train_loop
        self.meta = torch.load(f'{cfg.work_dir}/quantized.pth', weights_only=True)['meta']

    @property
    def scales(self):
        """Of the quantized model, by the quantizers' names."""
        return {name: q.scale for name, q in quantizers(self.loop.student).items()}

    def of_activations(self, scales):
        """Those of them that are no weight's."""
        return {name: scale for name, scale in scales.items() if not name.endswith('weight_quantizer')}

    def of_weights(self, scales):
        """Those of them that are a weight's."""
        return {name: scale for name, scale in scales.items() if name.endswith('weight_quantizer')}

    @property
    def on_integers(self):
        """For each quantized weight, whether all of its elements lie on integers."""
        return [torch.equal(layer.weight, layer.weight_quantizer(layer.weight))
                for layer in quantized_layers(self.loop.student).values() if hasattr(layer, 'weight')]

    def numbers(self, stage):
        """Names of what the history holds of a stage."""
        return {name for update in self.loop.history if update['stage'] == stage for name in update}

    @property
    def learned(self):
        """Whether parameters of the student are others than after the calibration."""
        return not same(self.parameters, dict(self.loop.student.named_parameters()))


def same(a, b):
    """Return whether two dicts hold the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope='module')
def watched(small_config, tmp_path_factory):
    """Runs the tiny recipe with some changes."""
    plain = Config.fromfile(small_config)
    plain = Config({key: plain[key] for key in ('default_scope', 'model', 'quantization', 'default_hooks')})

    def run(changes):
        cfg = copy.deepcopy(plain)
        cfg.merge_from_dict({f'quantization.{key}': value for key, value in (TINY | changes).items()})
        cfg.work_dir = str(tmp_path_factory.mktemp('part'))
        with pytest.MonkeyPatch.context() as patch:
            return Watched(cfg, patch)

    return run


@pytest.fixture(scope='module')
def whole(watched):
    """The recipe without its game."""
    return watched({})


@pytest.fixture(scope='module')
def played(watched):
    """The recipe with its game, too."""
    return watched(GAME)


def no_norms(off, on):
    assert on.meta['calibration']['norms']['reparameterized'] and 'calibration' not in off.meta
    assert same(off.parameters, dict(off.loop.teacher.named_parameters()))
    assert not same(on.parameters, dict(on.loop.teacher.named_parameters()))


def no_ranges_of_least_error(off, on):
    assert same(*map(off.of_activations, (off.calibrated, off.extremes)))
    assert not same(*map(on.of_activations, (on.calibrated, on.extremes)))


def one_range_for_all_heads(off, on):
    assert [[scale.numel() for name, scale in run.scales.items() if name.endswith('matmul_context.a_quantizer')]
            for run in (off, on)] == [[1], [2]]


def no_dead_leaves(off, on):
    for run, kind in ((off, 'noise'), (on, 'dead_leaves')):
        assert torch.equal(run.loop.starts[0][1], start_image(kind, 0, 1, (64, 96), run.loop.low, run.loop.high))


def no_diversity(off, on):
    assert 'diversity' in on.numbers('synthesis') and 'diversity' in on.meta['synthesis']
    assert off.numbers('synthesis') and 'diversity' not in off.numbers('synthesis') | off.meta['synthesis'].keys()


def no_blocks(off, on):
    assert 'reconstruction' in on.meta and on.numbers('reconstruction') and any(on.on_integers)
    assert 'reconstruction' not in off.meta and not off.numbers('reconstruction')
    assert not off.units and not off.learned and not any(off.on_integers)


def no_final_features(off, on):
    assert on.gradients == len(on.units) == len(off.units) and not off.gradients
    assert all(unit.combined(torch.tensor(0.0), torch.tensor(1.0)) == 0 for unit in off.units)


def no_exact_inputs(off, on):
    assert any(on.mixed) and off.mixed and not any(off.mixed)


def no_rounding(off, on):
    assert any(on.on_integers) and not any(off.on_integers)
    assert not any(unit.roundings for unit in off.units) and off.learned


def no_ranges_of_weights(off, on):
    assert same(*map(off.of_weights, (off.scales, off.calibrated))) and off.learned
    assert not same(*map(on.of_weights, (on.scales, on.calibrated)))


def no_learned_ranges(off, on):
    assert same(*map(off.of_activations, (off.scales, off.calibrated))) and off.learned
    assert not same(*map(on.of_activations, (on.scales, on.calibrated)))


def no_search(off, on):
    def found(unit):
        return [kept.any().item() for kept in unit.before[len(unit.parameters):]]  # logarithms of shares

    assert on.searches == len(on.units) == len(off.units) and not off.searches
    assert any(any(found(unit)) for unit in on.units) and not any(any(found(unit)) for unit in off.units)
    assert not same(*map(off.of_activations, (off.scales, off.calibrated)))  # they learn all the same


@pytest.mark.parametrize('changes, check', [
    ({'reparameterize': False}, no_norms), ({'activation.observer': 'minmax'}, no_ranges_of_least_error),
    ({'activation.softmax': 'per_tensor'}, one_range_for_all_heads), ({'synthesis.start': 'noise'}, no_dead_leaves),
    ({'synthesis.diversity': 0.0}, no_diversity), ({'reconstruction.steps': 0}, no_blocks),
    ({'reconstruction.final': 0.0}, no_final_features), ({'reconstruction.mix': 0.0}, no_exact_inputs),
    ({'reconstruction.weights': 'free'}, no_rounding),
    ({'reconstruction.weight_ranges': 'calibrated'}, no_ranges_of_weights),
    ({'reconstruction.range_lr': 0.0}, no_learned_ranges), ({'reconstruction.search': False}, no_search),
], ids=lambda value: getattr(value, '__name__', None) or next(iter(value)))
def test_a_part_is_off_and_the_others_are_not(watched, whole, changes, check):
    off = watched(changes)
    check(off, whole)
    changed = {said.partition('=')[0] for said in {*off.meta['departures']} ^ {*whole.meta['departures']}}
    assert changed == changes.keys() and off.meta['quantization']['recipe'] == 'low_bit'


def test_without_the_game_all_images_teach(whole, played):
    assert 'game' in played.meta and played.numbers('game') and played.taught == 3
    assert 'game' not in whole.meta and not whole.numbers('game') and whole.taught == 2
    assert len(torch.cat(whole.loop.images)) == 2 and len(torch.cat(played.loop.images)) == 4


def test_without_a_wanted_gain_any_better_student_of_the_game_is_kept(watched, played):
    off = watched(GAME | {'game.gain': 0.0})
    for run in (played, off):
        assert run.meta['game']['best'] < run.meta['game']['initial']
    assert not played.meta['game']['gained'] and same(played.before_game, played.loop.stage.game.parameters)
    assert off.meta['game']['gained'] and not same(off.before_game, off.loop.stage.game.parameters)
