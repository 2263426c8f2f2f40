"""The loop under mmengine's Runner: what it writes, resume, determinism, methods; configs; checkpoints."""
import copy
import json
import pickle
import re
import socket

import numpy as np
import pytest
import torch
from mmdet.models import SwinTransformer
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, TRANSFORMS
from mmengine.runner import Runner

from psaq_mm.engine import CheckpointError, StartDataset, evaluation_gap, quantize, read_checkpoint
from psaq_mm.engine.checkpoint import float_checkpoint, load_float
from psaq_mm.engine.config import default_scope, without_pretrained
from psaq_mm.engine.pipeline import RUN
from psaq_mm.errors import UserError
from psaq_mm.models import quantize_model
from psaq_mm.quantization import (
    Mode,
    QuantizerMismatchError,
    hooked,
    quantizer_mode,
    quantizers,
    search_weight_ranges,
)
from psaq_mm.registry import HOOKS
from psaq_mm.stanza import StanzaError
from psaq_mm.synthesis import Game, valid_range
from psaq_mm.version import __version__

from .conftest import DEMO_CHECKPOINT, DEMO_CONFIG, ROOT, run_tool
from .test_converters import old_layout


def config(path, work_dir, **stanza):
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({f'quantization.{k}': v for k, v in stanza.items()})
    cfg.work_dir = str(work_dir)
    return cfg


def weights(work_dir):
    return torch.load(work_dir / 'quantized.pth', weights_only=True)['state_dict']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@HOOKS.register_module()
class KillHook(Hook):
    """Ends the run at an iteration, as a kill would: after the checkpoint of that iteration."""
    priority = 'LOWEST'

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def killed_at(monkeypatch):
    """Makes the next runs save a checkpoint at a given iteration and die there."""
    import psaq_mm.engine.pipeline as pipeline
    original = pipeline.data_free_config

    def arrange(at):

        def patched(*args, **kwargs):
            run = original(*args, **kwargs)
            if at:
                run.default_hooks['checkpoint']['interval'] = at
                run.custom_hooks.append(dict(type='psaq_mm.KillHook', at=at))
            return run

        monkeypatch.setattr(pipeline, 'data_free_config', patched)

    return arrange


def run(cfg, **kwargs):
    return quantize(cfg, eval_float=False, eval_quantized=False, **kwargs)


def run_in(work_dir, config_file, **stanza):
    run(config(config_file, work_dir, **stanza))
    return work_dir


@pytest.mark.parametrize('at', [2, 8, 11, 15])  # in the first batch, at the end of synthesis, in turns of the game
def test_resume_gives_the_same_checkpoint(small_config, tmp_path, killed_at, at, uninterrupted):
    killed_at(at)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    assert not (tmp_path / 'quantized.pth').exists()
    killed_at(None)
    run(config(small_config, tmp_path), resume=True)
    assert same(weights(tmp_path), uninterrupted)


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_killed(small_config, tmp_path, killed_at, uninterrupted):
    from psaq_mm.engine import compare

    def compared():
        return compare(config(small_config, tmp_path), ['psaq_v2'], [(8, 8)], tmp_path)

    killed_at(8)
    with pytest.raises(KeyboardInterrupt):
        compared()
    folder = tmp_path / 'W8A8_psaq_v2'
    assert (folder / RUN / 'iter_8.pth').exists() and not (folder / 'quantized.pth').exists()
    first = folder / RUN / 'iter_8.pth'
    stamp = first.stat().st_mtime_ns
    killed_at(None)
    compared()
    assert first.stat().st_mtime_ns == stamp  # not done again
    assert same(weights(folder), uninterrupted)
    (folder / 'synthetic.pt').unlink()  # a finished run whose files are gone is no finished run
    compared()
    assert (folder / 'synthetic.pt').exists()


@pytest.mark.slow
def test_a_batch_ends_early_when_its_entropy_ceases_to_rise(small_config, tmp_path, monkeypatch, killed_at):
    from psaq_mm.engine.stages import SynthesisStage
    monkeypatch.setattr('psaq_mm.engine.stages.synthesis.PLATEAU', 1e9)  # no rise counts
    steps, original = [], SynthesisStage.step

    def counted(self, rng):
        steps.append(self.index)
        return original(self, rng)

    monkeypatch.setattr(SynthesisStage, 'step', counted)
    stanza = {'synthesis.steps': 20, 'synthesis.patience': 2}
    run(config(small_config, tmp_path / 'whole', **stanza))
    assert steps == [0, 1, 2, 20, 21, 22]
    killed_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path / 'killed', **stanza))
    killed_at(None)
    run(config(small_config, tmp_path / 'killed', **stanza), resume=True)
    assert steps[6:] == [0, 1, 2, 20, 21, 22]
    assert same(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))


def images_of(work_dir):
    return torch.load(work_dir / 'synthetic.pt', weights_only=True)['images']


@pytest.mark.slow
def test_a_warm_start_takes_its_share_of_the_previous_batch(small_config, tmp_path):
    stanza = {'synthesis.method': 'psaq_v1', 'synthesis.steps': 1, 'synthesis.lr': 1e-6}
    run(config(small_config, tmp_path / 'cold', **stanza))
    run(config(small_config, tmp_path / 'warm', **{'synthesis.warm_start': 0.25, **stanza}))
    cold, warm = images_of(tmp_path / 'cold'), images_of(tmp_path / 'warm')
    torch.testing.assert_close(warm[0], cold[0])
    torch.testing.assert_close(warm[1], 0.75 * cold[1] + 0.25 * cold[0], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_checkpointing_and_the_exact_density_change_next_to_nothing(small_config, tmp_path, uninterrupted):
    stanza = {'synthesis.method': 'psaq_v1', 'synthesis.steps': 2}
    found = []
    for name, more in (('plain', {}), ('checkpointing', {'synthesis.checkpointing': True}),
                       ('exact', {'synthesis.density': 'exact'})):
        run(config(small_config, tmp_path / name, **stanza, **more))
        found.append(torch.cat(images_of(tmp_path / name)))
    starts, pixels = StartDataset(6, [(64, 96)], 3), Config.fromfile(small_config).model.data_preprocessor
    starts.valid_range = valid_range(pixels.mean, pixels.std)
    change = found[0] - torch.cat([b['inputs'][None] for b in starts])
    for other in found[1:]:  # Adam's first steps make a difference of every rounding error whose sign matters
        assert (other - found[0]).abs().mean() < 0.1 * change.abs().mean()
    whole = run(config(small_config, tmp_path / 'game', **{'synthesis.checkpointing': True}))
    assert whole['quantized'] == {} and weights(tmp_path / 'game').keys() == uninterrupted.keys()


@pytest.fixture(scope='module')
def uninterrupted(small_config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('whole')
    run(config(small_config, work_dir))
    return weights(work_dir)


@pytest.mark.slow
def test_seed_decides(small_config, tmp_path, uninterrupted):
    run(config(small_config, tmp_path / 'same'))
    assert same(weights(tmp_path / 'same'), uninterrupted)
    cfg = config(small_config, tmp_path / 'other')
    cfg.randomness = dict(seed=7)
    run(cfg)
    assert not same(weights(tmp_path / 'other'), uninterrupted)


@pytest.mark.slow
def test_another_number_of_threads_changes_next_to_nothing(small_config, tmp_path, quantized_run):
    """Bit-equal it is with the same number; torch's sums have another order with another."""
    run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path, '--no-eval', threads=2)
    two, one = weights(tmp_path), weights(quantized_run[0])
    assert two.keys() == one.keys()
    for key in one:
        if key.endswith('_quantizer.scale'):
            assert (two[key] / one[key]).log().abs().max() < 0.05, key
        elif one[key].is_floating_point():
            assert (two[key] - one[key]).abs().max() < 1e-4, key


def test_versions_that_do_not_fit_are_named():
    from psaq_mm.compat import check_versions
    check_versions()
    check_versions({'a-package-that-nobody-has': '>=1'})
    with pytest.raises(ImportError) as caught:
        check_versions({'torch': '<1', 'mmcv': '>=1', 'mmdet': '>=99,<100'})
    assert str(caught.value).startswith(f'torch {torch.__version__} is installed, psaq_mm works with torch<1; mmdet ')
    assert str(caught.value).endswith("pip install 'torch<1' 'mmdet>=99,<100'")


def test_resume_without_anything_to_resume_starts_afresh(small_config, tmp_path, uninterrupted):
    run(config(small_config, tmp_path), resume=True)
    assert same(weights(tmp_path), uninterrupted)


@pytest.mark.slow
def test_methods_differ_and_v1_is_v2_before_the_game(small_config, tmp_path):
    results = {}
    for method in ('noise', 'psaq_v1', 'psaq_v2', 'real'):
        result = run(config(small_config, tmp_path / method, **{
            'synthesis.method': method, 'game.range_lr': 0, 'game.weight_ranges': 'calibrated'}))
        assert result['method'] == method
        results[method] = weights(tmp_path / method)
    scale = 'backbone.stages.1.blocks.0.attn.w_msa.proj.input_quantizer.scale'
    assert len({results[m][scale].item() for m in ('noise', 'psaq_v1', 'real')}) == 3
    assert results['psaq_v1'][scale] == results['psaq_v2'][scale]
    weight = 'backbone.stages.1.blocks.0.attn.w_msa.proj.weight'
    float_weights = read_checkpoint(str(DEMO_CHECKPOINT))['state_dict'][weight].float()
    for method in ('noise', 'psaq_v1', 'real'):
        assert torch.equal(results[method][weight], float_weights)


@pytest.mark.slow
def test_the_game_moves_ranges_unless_told_not_to(small_config, tmp_path):
    """At few bits, where the images agree that it helps."""
    bits, states = {'weight.bits': 3, 'activation.bits': 4}, {}
    for name, stanza in dict(plain={'synthesis.method': 'psaq_v1'}, searched={'game.range_lr': 0},
                             learned={'game.range_lr': 0.05}).items():
        run(config(small_config, tmp_path / name, **bits, **stanza))
        states[name] = {k: v for k, v in weights(tmp_path / name).items() if k.endswith('quantizer.scale')}
    for name, scale in states['plain'].items():
        weight = 'weight_quantizer' in name
        if 'patch_embed' not in name:  # 8 bits
            assert ((states['searched'][name] < scale).float().mean() > 0.3) == weight, name
        if weight:
            assert torch.equal(states['searched'][name], states['learned'][name])
    inputs = [name for name in states['plain'] if 'weight_quantizer' not in name]
    moved = [name for name in inputs if not torch.equal(states['learned'][name], states['plain'][name])]
    assert len(moved) > 0.8 * len(inputs)


@pytest.mark.slow
def test_heads_that_nothing_compared_depends_on_stay_as_calibrated(small_config, tmp_path):
    stanza = {'targets': ['backbone', 'neck', 'roi_head.bbox_head'], 'weight.bits': 3, 'activation.bits': 4}
    results = [weights(run_in(tmp_path / name, small_config, **stanza, **{'synthesis.method': name}))
               for name in ('psaq_v1', 'psaq_v2')]
    changed = {key for key in results[0] if not torch.equal(results[0][key], results[1][key])}
    assert any(key.endswith('weight_quantizer.scale') for key in changed)
    assert not any(key.startswith('roi_head') for key in changed)
    assert any(key.startswith('roi_head') and key.endswith('weight_quantizer.scale') for key in results[0])


def test_weight_ranges_that_the_images_disagree_with_are_put_back(small_config, tmp_path, monkeypatch):
    from psaq_mm.engine.stages import game

    def ruin(model, parameters, progress):
        restore = search_weight_ranges(model, parameters)
        for name, quantizer in quantizers(model).items():
            if name.endswith('weight_quantizer'):
                quantizer.scale.mul_(0.1)
        return restore

    stanza = {'game.range_lr': 0, 'game.steps': 1}
    run(config(small_config, tmp_path / 'a', **stanza, **{'game.weight_ranges': 'calibrated'}))
    monkeypatch.setattr(game, 'search_weight_ranges', ruin)
    run(config(small_config, tmp_path / 'b', **stanza))
    assert same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


@pytest.mark.slow
def test_reused_images_give_what_synthesising_gave(small_config, tmp_path):
    stanza = {'weight.bits': 3, 'activation.bits': 4}
    for method in ('psaq_v1', 'psaq_v2'):
        run(config(small_config, tmp_path / method, **stanza, **{'synthesis.method': method}))
        images = str(tmp_path / 'psaq_v1' / 'synthetic.pt')
        result = run(config(small_config, tmp_path / f'{method}_reused', **stanza, **{
            'synthesis.method': method, 'synthesis.reuse': images}))
        assert same(weights(tmp_path / method), weights(tmp_path / f'{method}_reused')), method
        assert result['synthesis_minutes'] == 0
    assert not same(weights(tmp_path / 'psaq_v1'), weights(tmp_path / 'psaq_v2'))
    with pytest.raises(UserError, match='quantization.synthesis.reuse'):
        run(config(small_config, tmp_path / 'c', **{'synthesis.reuse': str(small_config)}))


@pytest.mark.slow
def test_each_run_of_a_process_shows_its_own_images(small_config, tmp_path):
    for name in 'ab':
        run(config(small_config, tmp_path / name, **{'synthesis.method': 'psaq_v1', 'synthesis.steps': 1}))
    assert all(list((tmp_path / name).rglob('vis_data/vis_image/synthetic_*.png')) for name in 'ab')


def test_several_sizes_take_turns(small_config, tmp_path):
    run(config(small_config, tmp_path, **{'synthesis.method': 'psaq_v1', 'synthesis.size': ((64, 64), (48, 80)),
                                          'synthesis.steps': 1}))
    images = torch.load(tmp_path / 'synthetic.pt', weights_only=True)['images']
    assert [tuple(batch.shape) for batch in images] == [(3, 3, 64, 64), (3, 3, 48, 80)]


def test_images_stay_in_the_valid_range_of_the_preprocessor(small_config, tmp_path):
    run(config(small_config, tmp_path, **{'synthesis.method': 'psaq_v1', 'synthesis.lr': 3.0}))
    preprocessor = Config.fromfile(small_config).model.data_preprocessor
    mean, std = (torch.tensor(preprocessor[k]).view(3, 1, 1) for k in ('mean', 'std'))
    for batch in torch.load(tmp_path / 'synthetic.pt', weights_only=True)['images']:
        pixels = batch * std + mean
        assert pixels.min() > -0.01 and pixels.max() < 255.01
        assert pixels.min() < 1 and pixels.max() > 254  # and uses it


def test_amp_runs_and_changes_little(small_config, tmp_path, uninterrupted):
    run(config(small_config, tmp_path, **{'synthesis.method': 'psaq_v1'}), amp=True)
    key = 'backbone.stages.0.blocks.0.attn.w_msa.qkv.input_quantizer.scale'
    assert weights(tmp_path)[key].item() == pytest.approx(uninterrupted[key].item(), rel=0.1)
    assert weights(tmp_path)[key].item() != uninterrupted[key].item()  # bfloat16 really was used


@pytest.mark.parametrize('num_images', [12, 20])
def test_noise_dataset_is_the_same_however_it_is_sharded(num_images):
    from mmengine.dataset import DefaultSampler
    sizes = [(8, 8), (4, 12)]
    whole = StartDataset(num_images, sizes, 3, seed=5)
    assert [tuple(whole[i]['inputs'].shape[1:]) for i in range(12)] == ([(8, 8)] * 3 + [(4, 12)] * 3) * 2
    assert torch.equal(whole[3]['inputs'], StartDataset(num_images, sizes, 3, seed=5)[3]['inputs'])
    assert not torch.equal(whole[0]['inputs'], whole[1]['inputs'])
    parts = StartDataset(num_images, sizes, 3, 2, seed=5)
    shards = [list(range(rank, num_images, 2)) for rank in (0, 1)]
    assert list(DefaultSampler(parts, shuffle=False)) == list(range(num_images))  # processes take turns in that
    seen = set()
    for rank, shard in enumerate(shards):
        for turn in range(0, len(shard), 3):
            batch = [parts[index]['inputs'] for index in shard[turn:turn + 3]]
            assert len({image.shape for image in batch}) == 1
            first = (turn // 3 * 2 + rank) * 3
            if turn + 3 <= len(shard) and first + 3 <= 12:
                assert all(torch.equal(image, whole[first + i]['inputs']) for i, image in enumerate(batch))
            seen.update(parts.place(index)[0] for index in shard)
    assert seen == set(range(num_images))


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def state():
    return torch.load(DEMO_CHECKPOINT, weights_only=True)['state_dict']


def build():
    return MODELS.build(without_pretrained(Config.fromfile(DEMO_CONFIG).model))


@pytest.mark.parametrize('spoil,words', [
    (lambda s: s.pop('backbone.patch_embed.projection.weight'), 'lacks backbone.patch_embed.projection.weight'),
    (lambda s: s.update({'roi_head.bbox_head.fc_cls.weight': torch.zeros(81, 256)}),
     r'fc_cls.weight is \(81, 256\).*\(7, 256\).*number of classes'),
    (lambda s: s.update({'rpn_head.rpn_cls.weight': torch.zeros(3, 128, 1, 1)}), 'heads are set otherwise'),
    (lambda s: s.update({'backbone.stages.2.blocks.9.norm1.weight': torch.zeros(4)}), 'deeper'),
    (lambda s: s['neck.fpn_convs.0.conv.bias'].fill_(float('nan')), 'NaN or infinite.*neck.fpn_convs.0.conv.bias'),
    (lambda s: s.update({'backbone.x.weight_quantizer.scale': torch.ones(1)}), 'quantized already'),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith('backbone')] and s.update({'foo': torch.ones(1)}),
     'another architecture'),
])
def test_unfitting_checkpoints_are_explained(state, tmp_path, spoil, words):
    spoiled = copy.deepcopy(state)
    spoil(spoiled)
    path = tmp_path / 'c.pth'
    torch.save(dict(state_dict=spoiled), path)
    for model in (build(), quantize_model(build(), {})):
        with pytest.raises(CheckpointError, match=words) as caught:
            load_float(model, read_checkpoint(str(path)))
        assert str(path) in str(caught.value)


def test_unreadable_checkpoints_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist.*--checkpoint'):
        read_checkpoint(str(tmp_path / 'nowhere.pth'))
    path = tmp_path / 'c.pth'
    path.write_bytes(DEMO_CHECKPOINT.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match='truncated'):
        read_checkpoint(str(path))
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match='list'):
        read_checkpoint(str(path))
    torch.save(dict(state_dict={}), path)
    with pytest.raises(CheckpointError, match='no weights'):
        read_checkpoint(str(path))


class Evil:

    def __reduce__(self):
        return (exec, ('raise SystemExit("code from a checkpoint ran")', ))


def test_code_in_a_checkpoint_never_runs(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=dict(a=torch.ones(1)), meta=Evil()), path)
    with pytest.raises(CheckpointError, match='does not load'):
        read_checkpoint(str(path))


def test_mmengines_own_checkpoints_load_safely(small_config, tmp_path, killed_at):
    """HistoryBuffer, NumPy values and all: by mmengine's own loader, weights_only at torch's default."""
    from mmengine.runner import load_checkpoint
    killed_at(3)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    path = tmp_path / RUN / 'iter_3.pth'
    assert b'HistoryBuffer' in path.read_bytes()
    content = load_checkpoint(build(), str(path))
    assert content['meta']['iter'] == 3
    history = content['message_hub']['log_scalars']['train/entropy']
    assert len(history.data[0]) == 3 and isinstance(history.mean(), float)


def test_the_safe_getattr_refuses_everything_else(tmp_path):
    from psaq_mm.compat import _statistic
    with pytest.raises(ValueError, match='refused'):
        _statistic(torch, 'load')
    from mmengine.logging import HistoryBuffer
    assert _statistic(HistoryBuffer, 'mean') is HistoryBuffer.mean
    path = tmp_path / 'c.pth'
    torch.save(dict(state_dict=dict(a=torch.ones(1)), x=dict.fromkeys), path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_nothing_is_fetched_that_a_model_config_names():
    file = dict(type='Pretrained', checkpoint='torchvision://x')
    model = dict(backbone=dict(init_cfg=dict(checkpoint='https://x/pvt.pth'), pretrained='x.pth'),
                 neck=dict(init_cfg=[dict(type='Xavier'), file]), heads=[dict(init_cfg=file)],
                 teacher_ckpt='https://x/teacher.pth', text=dict(ckpt_path='torchvision://x', checkpoint='own.pth'))
    assert without_pretrained(model) == dict(
        backbone=dict(init_cfg=None, pretrained=None), neck=dict(init_cfg=[dict(type='Xavier')]),
        heads=[dict(init_cfg=None)], teacher_ckpt=None, text=dict(ckpt_path=None, checkpoint='own.pth'))


def test_wrong_stanza_and_wrong_checkpoint_end_before_any_work(small_config, tmp_path):
    with pytest.raises(StanzaError):
        run(config(small_config, tmp_path / 'a', **{'weight.bits': 77}))
    with pytest.raises(CheckpointError):
        run(config(small_config, tmp_path / 'b'), checkpoint='nowhere.pth')
    assert not (tmp_path / 'a').exists() and not (tmp_path / 'b').exists()


def test_missing_evaluation_data_is_named(small_config, tmp_path):
    cfg = config(small_config, tmp_path, **{'synthesis.method': 'noise'})
    assert evaluation_gap(cfg) is None
    cfg.test_dataloader.dataset.data_root = '/nowhere/'
    result = quantize(cfg)
    assert result['not_evaluated'] == 'test_dataloader.dataset.ann_file: /nowhere/val.json does not exist'
    assert (tmp_path / 'quantized.pth').exists() and result['quantized'] == {}


def learning_rates(monkeypatch, cfg, **kwargs):
    """The student's learning rate at every iteration of a run."""
    import psaq_mm.engine.loop as loop
    rates = []
    original = loop.DataFreeLoop.iteration

    def watched(self):
        rates.append(self.runner.optim_wrapper.get_lr()['lr'][0])
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.DataFreeLoop, 'iteration', watched)
        run(cfg, **kwargs)
    return rates


@pytest.mark.slow
def test_the_students_learning_rate_falls_over_the_game(small_config, tmp_path, monkeypatch):
    rates = learning_rates(monkeypatch, config(small_config, tmp_path / 'a'))
    assert len(rates) == 2 * 4 + 8 and rates[:9] == [6e-6] * 9
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 0.2 * rates[0]
    images = str(tmp_path / 'a' / 'synthetic.pt')
    reused = learning_rates(monkeypatch, config(small_config, tmp_path / 'b', **{'synthesis.reuse': images}))
    assert reused == pytest.approx(rates[8:])


def test_resume_with_other_settings_is_refused(small_config, tmp_path, killed_at):
    killed_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    with pytest.raises(UserError, match=r'--resume.*\(synthesis\.steps was 4, is 5\)'):
        run(config(small_config, tmp_path, **{'synthesis.steps': 5}), resume=True)


def test_resume_in_another_precision_is_refused(small_config, tmp_path, killed_at):
    killed_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    with pytest.raises(UserError, match='--resume.*amp was False, is True'):
        run(config(small_config, tmp_path), resume=True, amp=True)


def test_resume_of_what_another_version_began_says_so(small_config, tmp_path, killed_at):
    killed_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(config(small_config, tmp_path))
    killed_at(None)
    path = tmp_path / RUN / 'iter_2.pth'
    content = torch.load(path, weights_only=True)

    def resumed(change, words):
        spoiled = copy.deepcopy(content)
        change(spoiled['data_free'][0])
        torch.save(spoiled, path)
        with pytest.raises(UserError, match=f'--resume: psaq_mm {words}.*Finish the run with the psaq_mm that began'):
            run(config(small_config, tmp_path), resume=True)

    resumed(lambda state: state.update(version='0.0.9'), rf'0.0.9 began .*, this is psaq_mm {__version__}\. ')
    resumed(lambda state: state.pop('version'), 'of an earlier version began')
    resumed(lambda state: state['settings']['game'].pop('gain'), rf'{__version__} began .* with other settings\. ')


def test_a_size_that_the_model_cannot_take_is_explained(small_config, tmp_path, monkeypatch):
    original = SwinTransformer.forward

    def refuses(self, x):
        if x.shape[-1] == 96:
            raise ValueError('no 96')
        return original(self, x)

    monkeypatch.setattr(SwinTransformer, 'forward', refuses)
    with pytest.raises(UserError, match=r'an image of 64 x 96 \(ValueError: no 96\).*set quantization.synthesis.size'):
        run(config(small_config, tmp_path, **{'synthesis.method': 'noise'}))


def test_an_error_of_ours_is_not_taken_for_one_of_the_model(small_config, tmp_path, monkeypatch):
    """Whatever probe it comes from: of the first one, or of one that looks for what a stage works on."""
    def broken(module, *unused):
        raise RuntimeError('a mistake of ours')

    def probe(model, run):
        with hooked([model.backbone.register_forward_hook(broken)]), quantizer_mode(model, Mode.FLOAT):
            return run()

    for place, more in (('psaq_mm.engine.loop.unused_quantizers', {}),
                        ('psaq_mm.quantization.reparameterization.find_sites', {'reparameterize': True})):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='^a mistake of ours$'):
            patch.setattr(place, probe)
            run(config(small_config, tmp_path, **{'synthesis.method': 'noise', **more}))


def test_placement_all_goes_all_the_way(small_config, tmp_path, uninterrupted):
    """Stanza to evaluated checkpoint, the game in bfloat16; neither placement takes the other's checkpoint."""
    stanza = dict(placement='all', keep_float=['backbone.stages.0.blocks.1.mlp_sum'],
                  overrides=[dict(pattern='*.stages.1.*_sum', activation=dict(bits=6))])
    result = quantize(config(small_config, tmp_path, **stanza), amp=True, eval_float=False)
    assert result['placement'] == 'all' and 'coco/bbox_mAP' in result['quantized']
    state = weights(tmp_path)
    sums = {name.removesuffix('_sum_quantizer.scale') for name in state if name.endswith('_sum_quantizer.scale')}
    blocks = [f'backbone.stages.{stage}.blocks.{block}' for stage, depth in enumerate((2, 2, 4, 2))
              for block in range(depth)]
    assert sums == {f'{b}.{part}' for b in blocks for part in ('attention', 'mlp')} - {f'{blocks[1]}.mlp'}
    for block in blocks:
        assert state[f'{block}.attention_sum_quantizer.grid'][1] == (63 if 'stages.1' in block else 255)
    assert not same({k: v for k, v in state.items() if k in uninterrupted}, uninterrupted)
    for ours, theirs, words in ((dict(), state, 'quantizes .*_sum.*keeps it in float.*placement'),
                                (stanza, uninterrupted, 'keeps in float .*_sum.*quantizes it.*placement')):
        with pytest.raises(QuantizerMismatchError, match=words):
            quantize_model(build(), ours).load_state_dict(theirs)


def test_heads_that_nothing_compared_depends_on_are_calibrated_without_a_game(small_config, tmp_path):
    run(config(small_config, tmp_path, targets=['roi_head.mask_head']))
    state, source = weights(tmp_path), torch.load(DEMO_CHECKPOINT, weights_only=True)['state_dict']
    assert torch.isfinite(state['roi_head.mask_head.conv_logits.weight_quantizer.scale']).all()
    assert all(torch.equal(state[key], source[key]) for key in source)
    assert 'No game: ' in ''.join(path.read_text() for path in tmp_path.rglob('*.log'))


def test_the_game_ends_when_patience_does(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Game, 'over', property(lambda game: game.student_updates == 2))
    result = run(config(small_config, tmp_path, **{'game.patience': 1, 'report.images': 0}))
    assert result['stages']['game']['student'] == 2
    assert 'have found no better student (quantization.game.patience)' in ''.join(
        path.read_text() for path in tmp_path.rglob('*.log'))


def test_diversity_of_batches_of_one_image_is_warned_of(small_config, tmp_path):
    cfg = config(small_config, tmp_path, **{
        'synthesis.method': 'psaq_v1', 'synthesis.batch_size': 1, 'synthesis.steps': 1, 'synthesis.num_images': 2,
        'synthesis.diversity': 1.0, 'report.images': 0})
    quantize(cfg, eval_float=False, eval_quantized=False)
    assert 'A batch has one image' in ''.join(path.read_text() for path in tmp_path.rglob('*.log'))


def test_attention_in_float_is_still_tapped(small_config, tmp_path):
    run(config(small_config, tmp_path, keep_float=['backbone.stages.0.*', '*.matmul_context']))
    names = [k for k in weights(tmp_path) if 'quantizer' in k]
    assert names and not any('stages.0.' in n or 'matmul_context' in n for n in names)


def test_checkpointed_activations_do_not_hide_the_tokens(small_config, tmp_path, uninterrupted):
    cfg = config(small_config, tmp_path)
    cfg.model.backbone.with_cp = True
    run(cfg)
    assert same(weights(tmp_path), uninterrupted)


def test_heads_of_a_detector_are_quantized_when_they_are_named(small_config, tmp_path):
    targets = ['backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head']
    result = run(config(small_config, tmp_path, targets=targets))
    assert result['scope'] == targets
    state = weights(tmp_path)
    for layer in ('rpn_head.rpn_conv', 'roi_head.bbox_head.fc_cls', 'roi_head.mask_head.conv_logits'):
        assert torch.isfinite(state[f'{layer}.weight_quantizer.scale']).all()
        assert torch.isfinite(state[f'{layer}.input_quantizer.scale']).all()


@pytest.mark.parametrize('holdout', [0.9, 0.01])
def test_both_sides_of_the_game_have_images(small_config, tmp_path, holdout):
    run(config(small_config, tmp_path, **{'synthesis.num_images': 2, 'game.holdout': holdout, 'synthesis.steps': 1}))
    assert len(torch.load(tmp_path / 'synthetic.pt', weights_only=True)['images'][0]) == 2


def test_the_shipped_checkpoints_are_small():
    assert sum(p.stat().st_size for p in (ROOT / 'demo').glob('*.pth')) <= 40e6


def test_real_takes_no_more_images_than_asked(small_config, tmp_path):
    cfg = config(small_config, tmp_path, **{'synthesis.method': 'real', 'synthesis.num_images': 3})
    seen = []
    import psaq_mm.engine.hooks as hooks
    original = hooks.QuantizedCheckpointHook.after_train
    hooks.QuantizedCheckpointHook.after_train = lambda self, runner: seen.extend(runner.train_loop.images)
    try:
        run(cfg)
    finally:
        hooks.QuantizedCheckpointHook.after_train = original
    assert sum(map(len, seen)) == 3
    cfg.calib_dataloader.dataset.data_root = '/nowhere/'
    with pytest.raises(UserError, match='calib_dataloader.dataset.ann_file: /nowhere/.* does not exist'):
        run(cfg)


def test_real_needs_a_loader(small_config, tmp_path):
    cfg = config(small_config, tmp_path, **{'synthesis.method': 'real'})
    cfg.pop('calib_dataloader')
    with pytest.raises(UserError, match='calib_dataloader'):
        run(cfg)


# tools/dfq.py, each process of which keeps its student beside its command's own output.
EVERY_RANK = '''
import runpy, sys, torch
from mmengine.dist import get_rank
from psaq_mm.engine import DataFreeLoop
original = DataFreeLoop.run

def run(self):
    model = original(self)
    torch.save(self.student.state_dict(), f'{self.runner.work_dir}/rank{get_rank()}.pth')
    return model

DataFreeLoop.run = run
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, sys.argv[0].rpartition('/')[0])
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def torchrun(config_file, work_dir, *options, script=('tools/dfq.py', ), check=True):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    return run_tool('-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_addr=127.0.0.1',
                    f'--master_port={port}', *script, config_file, '--work-dir', work_dir,
                    '--launcher', 'pytorch', '--device', 'cpu', *options, check=check)


@pytest.mark.slow
def test_two_processes_see_what_one_sees(small_config, tmp_path):
    """torchrun with gloo: each rank calibrates on its shard, the extremes are those of all images."""
    options = ['--no-eval', '--cfg-options', 'quantization.synthesis.method=noise',
               'quantization.activation.observer=minmax']
    torchrun(small_config, tmp_path / 'two', *options)
    run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path / 'one', *options)
    two, one = weights(tmp_path / 'two'), weights(tmp_path / 'one')
    assert two.keys() == one.keys()
    for key in one:
        assert torch.allclose(two[key].float(), one[key].float(), rtol=1e-5), key


def test_two_processes_make_what_one_makes(small_config, tmp_path):
    """The same images; scales from all of them; a student as good."""
    options = ['--no-eval', '--cfg-options', 'quantization.activation.observer=minmax']
    torchrun(small_config, tmp_path / 'two', *options)
    run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path / 'one', *options)
    for two, one in zip(images_of(tmp_path / 'two'), images_of(tmp_path / 'one'), strict=True):
        assert torch.equal(two, one)
    two, one = (torch.load(tmp_path / name / 'quantized.pth', weights_only=True) for name in ('two', 'one'))
    assert two['meta']['game']['best'] == pytest.approx(one['meta']['game']['best'], rel=0.2)
    two, one = two['state_dict'], one['state_dict']
    assert two.keys() == one.keys()
    for key in one:
        if key.endswith('_quantizer.scale'):  # lessons differ, so learned ranges do
            assert (two[key] / one[key]).log().abs().max() < 0.2, key
        elif one[key].is_floating_point():
            assert (two[key] - one[key]).abs().max() < 1e-3, key


@pytest.mark.slow
def test_two_processes_that_lose_patience_at_different_steps_stay_together(small_config, tmp_path):
    """A batch that is done early waits for the other process's; the images are those that one process makes."""
    options = ['--no-eval', '--cfg-options', 'quantization.synthesis.method=psaq_v1', 'quantization.synthesis.steps=12',
               'quantization.synthesis.patience=1', 'quantization.report.images=0']
    torchrun(small_config, tmp_path / 'two', *options)
    run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path / 'one', *options)
    two, one = (torch.load(tmp_path / name / 'synthetic.pt', weights_only=True)['images'] for name in ('two', 'one'))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert torch.equal(a, b)


def test_two_processes_play_and_evaluate(small_config, tmp_path):
    (tmp_path / 'every_rank.py').write_text(EVERY_RANK)
    done = torchrun(small_config, tmp_path, '--cfg-options', 'quantization.weight.bits=3',
                    'quantization.activation.bits=4', script=(tmp_path / 'every_rank.py', ROOT / 'tools' / 'dfq.py'))
    assert 'quantized W3A4' in done.stdout
    first, second = (torch.load(tmp_path / RUN / f'rank{rank}.pth', weights_only=True) for rank in (0, 1))
    assert same(first, second) and same({k: first[k] for k in weights(tmp_path)}, weights(tmp_path))
    start = torch.load(DEMO_CHECKPOINT, weights_only=True)['state_dict']
    key = 'backbone.stages.0.blocks.0.attn.w_msa.qkv.weight'
    assert not torch.equal(first[key], start[key])  # they did play
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert 0 <= metrics['quantized']['coco/bbox_mAP'] <= 1
    assert all(torch.isfinite(v.float()).all() for v in weights(tmp_path).values())
    assert len(list((tmp_path / 'synthetic').glob('*.png'))) == 6


# -- configs ---------------------------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
# Blocks of the backbone, and quantized weights beside four in each block: patch embedding, merging, neck, head.
DEPTH = dict(swin_t=12, swin_s=24, deit_t=12, deit_s=12, deit_b=12)
BESIDE = dict(mask=1 + 3 + 8, cascade=1 + 3 + 8, upernet_swin=1 + 3, upernet_deit=1 + 8, swin=1 + 3 + 1, deit=1 + 1)
MISSING = dict(mask='annotations/instances_val2017.json', cascade='annotations/instances_val2017.json',
               upernet='images/validation', swin='data/imagenet/val', deit='data/imagenet/val')
FAST = ('mask_rcnn_swin_t_w8a8', 'deit_t_w8a8')  # the others are slow: the same code


def starting_with(table, stem):
    return next(value for key, value in table.items() if stem.startswith(key))


def smaller(path):
    """The config of a model of the same blocks, but fewer of them or narrower ones, or None."""
    twin = path.with_name(re.sub('_[sb]_', '_t_', path.name))
    return twin if twin != path and twin.exists() else None


@pytest.mark.parametrize('path', [p for p in CONFIGS if '_w4' in p.stem and smaller(p)], ids=lambda p: p.stem)
def test_paper_configs_below_8_bits_are_those_at_8_bits_with_the_stanza_of_the_smaller_model(path):
    """Both of which the next test runs."""
    files = path, path.with_name(path.name.replace('_w4', '_w8')), smaller(path)
    config, same_model, same_bits = (Config.fromfile(file).to_dict() for file in files)
    stanza = config.pop('quantization')
    assert stanza == same_bits['quantization'] != same_model.pop('quantization')
    assert {**config, 'work_dir': ''} == {**same_model, 'work_dir': ''}


@pytest.mark.parametrize('path', [
    pytest.param(p, marks=[] if p.stem in FAST else [pytest.mark.slow]) for p in CONFIGS
    if '_w8' in p.stem or not smaller(p)
], ids=lambda p: p.stem)
def test_paper_configs_build_and_run_complete_steps_at_full_size(path, tmp_path):
    """The full model, its weights from a file of the official layout; a small image, two steps of synthesis, one for
    each side of the game."""
    cfg = Config.fromfile(path)
    default_scope(cfg)
    model = MODELS.build(without_pretrained(copy.deepcopy(cfg.model)))
    state = model.state_dict()
    size = (64, 64)
    if cfg.model.type == 'TimmClassifier':
        assert cfg.model.pretrained is True and not cfg.get('load_from')
        size = (224, 224)
        head = 'head.fc.' if 'swin' in path.stem else 'head.'
        state = {k.replace('head.', head) if k.startswith('head.') else k.removeprefix('backbone.'): v
                 for k, v in state.items()}
    elif path.stem.startswith('upernet_deit'):  # written by mmseg 0, whose patch embedding always has a bias
        assert state['backbone.patch_embed.projection.bias'].shape == (384, )
        assert cfg.load_from.startswith('https://download.openmmlab.com/mmseg')
    elif path.stem.startswith('cascade'):
        assert cfg.load_from.startswith('https://github.com/SwinTransformer/storage/releases/download/v1.0.2/cascade')
        state = old_layout(state)
    else:
        assert cfg.load_from.startswith('https://download.openmmlab.com/mm')
    torch.save(dict(state_dict=state), tmp_path / 'full.pth')
    del model, state
    cfg.quantization.merge(dict(synthesis=dict(num_images=2, batch_size=1, size=size, steps=2), report=dict(images=0),
                                game=dict(steps=2, evaluate_every=1, student_patience=1, image_patience=1)))
    if cfg.quantization.weight.bits < 8:
        cfg.quantization.merge(dict(reconstruction=dict(steps=1, views=1)))
    cfg.work_dir = str(tmp_path / 'run')
    result = quantize(cfg, str(tmp_path / 'full.pth'))
    log = ''.join(file.read_text() for file in (tmp_path / 'run').rglob('*.log'))
    assert '1 student and 1 image updates' in log
    bits = int(path.stem.split('_w')[-1][0])
    assert result['bits'] == dict(weight=bits, activation=8) and result['recipe'] == ('paper', 'low_bit')[bits < 8]
    assert f'{starting_with(MISSING, path.stem)} does not exist' in result['not_evaluated']
    depth = next(d for name, d in DEPTH.items() if name in path.stem)
    scales = [k for k in weights(tmp_path / 'run') if k.endswith('weight_quantizer.scale')]
    assert len(scales) == depth * 4 + starting_with(BESIDE, path.stem)
    assert result['size_mb']['quantized'] < result['size_mb']['full_precision']
    assert result['scope'] == dict(upernet_swin=['backbone'], swin=['backbone', 'head'], deit=['backbone', 'head']).get(
        re.match('upernet_swin|swin|deit|', path.stem)[0], ['backbone', 'neck'])
    if path.stem in ('cascade_mask_rcnn_swin_t_w8a8', 'upernet_deit_s_w8a8'):  # the others have demos
        predicts(cfg, tmp_path)


def predicts(cfg, folder):
    """The written files give the ecosystem's own functions a model that computes what full precision does, nearly."""
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    test = Config.fromfile(folder / 'run' / 'test_config.py')
    for step in test.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (96, 64)
    if cfg.model.type == 'CascadeRCNN':
        from mmdet.apis import inference_detector, init_detector
        test.model.test_cfg.rcnn.score_thr = 0.0  # random weights are sure of nothing
        model = init_detector(test, str(folder / 'run' / 'quantized.pth'), device='cpu')
        found = inference_detector(model, image).pred_instances
        assert len(found) > 10 and found.masks.shape[1:] == (64, 96) and torch.isfinite(found.bboxes).all()
    else:
        from mmseg.apis import inference_model, init_model
        model = init_model(test, str(folder / 'run' / 'quantized.pth'), device='cpu')
        found = inference_model(model, image).pred_sem_seg.data
        assert found.shape == (1, 64, 96) and 0 <= found.min() and found.max() < 150
    full = MODELS.build(without_pretrained(copy.deepcopy(cfg.model))).eval()
    load_float(full, float_checkpoint(full, str(folder / 'full.pth')))
    inputs = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(full.extract_feat(inputs), model.extract_feat(inputs)):
            assert 0 < (a - b).norm() < 0.1 * a.norm()


def test_w4a8_configs_are_their_siblings_with_other_bits():
    for path in CONFIGS:
        if path.stem.endswith('w4a8'):
            four, eight = (Config.fromfile(p).to_dict() for p in (path, path.with_name(path.name.replace('w4', 'w8'))))
            assert four['quantization'].pop('weight') == dict(bits=4) != eight['quantization'].pop('weight')
            assert four == eight


def test_every_config_names_images_for_method_real():
    for path in CONFIGS:
        cfg = Config.fromfile(path)
        default_scope(cfg)
        assert 'train' in str(cfg.calib_dataloader.dataset) and 'val' not in str(cfg.calib_dataloader.dataset)
        for step in cfg.calib_dataloader.dataset.pipeline:
            TRANSFORMS.build(step)


@pytest.mark.parametrize('stanza', [dict(keep_float=['*']), dict(targets=['backbone'], keep_float=['backbone.*'])])
def test_nothing_to_quantize_is_refused_before_any_work(small_config, tmp_path, stanza):
    with pytest.raises(UserError, match='nothing to quantize: targets backbone'):
        run(config(small_config, tmp_path / 'w', **stanza))
    assert not (tmp_path / 'w').exists()


def test_every_system_of_the_paper_has_its_configs():
    detectors = [f'{kind}_swin_{size}' for kind in ('mask_rcnn', 'cascade_mask_rcnn') for size in 'ts']
    segmentors = ['upernet_swin_t', 'upernet_swin_s', 'upernet_deit_s']
    classifiers = ['deit_t', 'deit_s', 'deit_b', 'swin_t', 'swin_s']
    assert {p.stem for p in CONFIGS} == {
        f'{system}_w{bits}a8' for system in detectors + segmentors + classifiers for bits in (8, 4)}


def test_cascade_is_built_as_it_was_trained():
    cfg = Config.fromfile(ROOT / 'configs' / 'cascade_mask_rcnn_swin_s_w8a8.py')
    assert cfg.model.type == 'CascadeRCNN' and cfg.model.backbone.depths == [2, 2, 18, 2]
    heads = cfg.model.roi_head.bbox_head
    assert [h.bbox_coder.target_stds for h in heads] == [[.1, .1, .2, .2], [.05, .05, .1, .1], [.033, .033, .067, .067]]
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('ConvFCBBoxHead', 4, 1)
        assert head.norm_cfg.type == 'SyncBN' and head.loss_bbox.type == 'GIoULoss' and head.reg_decoded_bbox
    scales = cfg.train_pipeline[3].transforms[0][0].scales
    assert (scales[0], scales[-1], len(scales)) == ((480, 1333), (800, 1333), 11)


def test_the_runner_type_of_base_dfq_converts_for_the_ecosystems_test_tool(small_config, tmp_path):
    from mmengine.registry import RUNNERS
    cfg = config(small_config, tmp_path)
    cfg.load_from = None
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'):
        cfg[key] = None
    runner = RUNNERS.build(cfg)
    assert isinstance(runner, Runner)
    runner.call_hook('before_run')
    assert quantizers(runner.model)


def test_metrics_file(quantized_run):
    work_dir, printed = quantized_run
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    assert set(metrics) >= {'full_precision', 'quantized', 'size_mb', 'minutes', 'scope', 'versions'}
    for side in ('full_precision', 'quantized'):
        for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
            assert f'{metrics[side][name] * 100:.1f}' in printed
    assert metrics['scope'] == ['backbone', 'neck']
