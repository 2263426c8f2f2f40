"""What a run says about itself: the page, its numbers, and what is shown while it works."""
import argparse
import io
import json
import math
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, VISBACKENDS
from mmengine.structures import InstanceData, PixelData
from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env
from rich.console import Console
from torch import nn

from psaq_mm.engine.checkpoint import load_safely, read_checkpoint
from psaq_mm.engine.config import evaluation_config
from psaq_mm.engine.display import Display, DisplayHook
from psaq_mm.engine.runner import WITHOUT
from psaq_mm.errors import UserError
from psaq_mm.quantization import LayerConfig, calibrate, convert, layer_errors, quantizable
from psaq_mm.quantization.config import ActivationConfig, WeightConfig
from psaq_mm.report import figures, page
from psaq_mm.report.fidelity import compared, fidelity, objects
from psaq_mm.stanza import QuantizationConfig
from psaq_mm.synthesis import patch_similarity_entropy, similarity_density

from .conftest import DEMO_CHECKPOINT, DEMO_CONFIG, ROOT, run_tool


def float_model(config, checkpoint):
    model = MODELS.build(Config.fromfile(config).model).eval()
    model.load_state_dict(read_checkpoint(str(checkpoint))['state_dict'])
    return model


def damaged(model, amount):
    """The model with noise on the weights of its backbone, relative to each one's spread."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.dim() > 1:
                parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


TASKS = dict(
    detection=(DEMO_CONFIG, DEMO_CHECKPOINT, 'box AP'),
    segmentation=(ROOT / 'demo/upernet_swin_mini_scenes.py', ROOT / 'demo/upernet_swin_mini_scenes.pth', 'mIoU'),
    classification=(ROOT / 'demo/vit_mini_objects.py', ROOT / 'demo/vit_mini_objects.pth', 'top-1 agreement'))


@pytest.mark.parametrize('task', TASKS)
def test_fidelity_falls_from_100_as_the_model_departs_from_full_precision(task, scenes):
    from mmengine.registry import init_default_scope
    config, checkpoint, name = TASKS[task]
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    try:
        teacher = float_model(config, checkpoint)
        size = (96, 96) if task == 'classification' else (96, 128)
        batches = [torch.nn.functional.interpolate(torch.randn(4, 3, 12, 16), size, mode='bicubic') for _ in range(2)]
        found = [fidelity(teacher, damaged(float_model(config, checkpoint), amount), batches)
                 for amount in (0, 0.02, 0.9)]
    finally:
        init_default_scope('mmdet')
    assert all('problem' not in f and f['views'] == 8 for f in found), found
    assert found[0]['predictions'][name] == pytest.approx(100)
    values = [f['predictions'][name] for f in found]
    cosines = [f['cosine'] for f in found]
    assert values[0] >= values[1] > values[2] and cosines[0] > cosines[1] > cosines[2], (values, cosines)
    assert cosines[0] == pytest.approx(1, abs=1e-6) and values[2] < 90
    if task == 'detection':
        assert found[0]['objects'] >= 3 * 8 and found[0]['predictions']['mask AP'] == pytest.approx(100)


def test_a_model_whose_predictions_nobody_can_ask_for_is_compared_by_features():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Identity()

        def extract_feat(self, images):
            return [images.mean(1, keepdim=True)]

        def forward(self, images, samples, mode):
            raise RuntimeError('no captions')

    found = fidelity(Model(), Model(), [torch.rand(2, 3, 8, 8)])
    assert found['cosine'] == pytest.approx(1) and found['predictions'] == {} and 'no captions' in found['problem']


def detections(scores, boxes=None, masks=None, **other):
    """What a detector says about an image of 20 x 20."""
    from mmdet.structures import DetDataSample
    count = len(scores)
    found = InstanceData(scores=torch.tensor(scores), labels=torch.zeros(count, dtype=torch.long),
                         bboxes=torch.zeros(count, 4) if boxes is None else torch.tensor(boxes, dtype=torch.float))
    if masks is not None:
        found.masks = masks
    sample = DetDataSample(metainfo=dict(ori_shape=(20, 20)))
    sample.pred_instances = found
    for name, value in other.items():
        setattr(sample, name, value)
    return sample


def squares(*places):
    """Masks of 5 x 5, (N, 20, 20)."""
    masks = torch.zeros(len(places), 20, 20, dtype=torch.bool)
    for mask, place in zip(masks, places):
        mask[place:place + 5, place:place + 5] = True
    return masks


def test_masks_are_compared_where_boxes_mean_nothing():
    """SOLO gives all its instances the box (0, 0, 0, 0)."""
    full = [detections([0.9, 0.8], masks=squares(0, 10))]
    assert compared(nn.Module(), full, full) == ({'mask AP': 100}, None)
    half = [detections([0.9, 0.8], masks=squares(0, 15))]
    found, _ = compared(nn.Module(), full, half)
    assert found.keys() == {'mask AP'} and 40 < found['mask AP'] < 60
    assert page.verdict(dict(fidelity=dict(predictions=found)))[0] == 'bad'
    assert page.verdict(dict(fidelity=dict(predictions={'mask AP': 100})))[0] == 'good'
    both = [detections([0.9, 0.8], [[0, 0, 5, 5], [10, 10, 15, 15]], squares(0, 10))]
    assert compared(nn.Module(), both, both)[0] == {'box AP': 100, 'mask AP': 100}


@pytest.mark.parametrize('samples, words', [
    ([detections([])], 'predicts nothing'), ([detections([0.9])], 'nothing that has an area'),
    ([detections([0.9], masks=torch.zeros(1, 20, 20))], 'nothing that has an area'),
    ([detections([0.9], [[0, 0, 5, 5]], pred_panoptic_seg=PixelData())], 'panoptic maps are not compared'),
    ([detections([0.9], [[0, 0, 5, 5]], pred_track_instances=InstanceData())], 'tracks are not compared')])
def test_what_cannot_be_compared_gets_a_reason_and_no_number(samples, words):
    found, why = compared(nn.Module(), samples, samples)
    assert found == {} and words in why


def test_a_copy_has_100_whatever_the_scores_and_numbers_are():
    generator = torch.Generator().manual_seed(0)
    samples = []
    for scale in (1.0, 0.1, 0.01):  # one image of weak detections beside one of strong ones
        corners = 30 * torch.rand(150, 2, generator=generator)
        boxes = torch.cat([corners, corners + 10 * torch.rand(150, 2, generator=generator)], 1)
        boxes[::10, 2:] = boxes[::10, :2]  # some without an area
        samples.append(detections((scale * torch.rand(150, generator=generator)).tolist(), boxes.tolist()))
    assert compared(nn.Module(), samples, samples)[0]['box AP'] == pytest.approx(100)
    empty = [detections([]) for _ in samples]
    assert compared(nn.Module(), samples, empty)[0]['box AP'] == 0


ZOO = ['mmdet::solov2/solov2_r50_fpn_1x_coco.py', 'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
       'mmdet::detr/detr_r50_8xb2-150e_coco.py', 'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
       'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
       'mmdet::rpn/rpn_r50_fpn_1x_coco.py', 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
       'mmseg::mask2former/mask2former_swin-t_8xb2-90k_cityscapes-512x1024.py',
       'mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py']


@pytest.mark.parametrize('name', [pytest.param(name, marks=[pytest.mark.slow] * (number not in (0, 7)))
                                  for number, name in enumerate(ZOO)])
def test_a_model_of_any_kind_compared_with_itself_has_100_or_a_reason(name):
    from mmengine.hub import get_config
    from mmengine.registry import init_default_scope

    from psaq_mm.engine.config import without_pretrained
    from psaq_mm.zoo.check import initialise, shrink
    from psaq_mm.zoo.standins import without_language
    cfg = get_config(name)
    for key in ('score_thr', 'filter_thr'):  # random weights are sure of nothing
        if key in (cfg.model.get('test_cfg') or {}):
            cfg.model.test_cfg[key] = 0.0
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    try:
        model = MODELS.build(without_language(without_pretrained(shrink(cfg.model, 64)))).eval()
        initialise(model)
        found = fidelity(model, model, [torch.randn(2, 3, 64, 64)])
    finally:
        init_default_scope('mmdet')
    assert found['cosine'] == pytest.approx(1, abs=1e-5)
    assert bool(found['predictions']) != ('problem' in found)
    assert all(value == pytest.approx(100) for value in found['predictions'].values()), found
    if 'solov2' in name:
        assert found['predictions'].keys() == {'mask AP'}


def test_what_counts_as_an_object():
    assert objects(torch.tensor([0.9, 0.5, 0.3, 0.29])).tolist() == [True, True, True, False]
    assert objects(torch.tensor([0.1, 0.9, 0.2, 0.05])).tolist() == [True, True, True, False]  # the three best
    assert objects(torch.tensor([])).tolist() == []


def quantized_linear(bits, x, observer='minmax'):
    model = nn.ModuleDict(dict(layer=nn.Linear(64, 32, bias=False)))
    layers = quantizable(model, ['layer'])
    convert(model, layers, dict(layer=LayerConfig(weight=WeightConfig(bits=bits), activation=ActivationConfig(
        bits=bits, observer=observer))))
    calibrate(model, lambda: model.layer(x))
    return model


def test_sqnr_is_that_of_its_definition_and_6_db_a_bit():
    x = torch.rand(256, 64) * 2 - 1
    found = {}
    for bits in (8, 7, 4):
        model = quantized_linear(bits, x)
        error, = layer_errors(model, lambda model=model: model.layer(x))
        quantizer = model.layer.input_quantizer
        exact, rounded = x @ model.layer.weight.T, model.layer(x)
        assert error.sqnr == pytest.approx(10 * math.log10(exact.square().sum() / (rounded - exact).square().sum()),
                                           abs=1e-3)
        assert error.operands['input'].sqnr == pytest.approx(
            10 * math.log10(x.square().sum() / (quantizer(x) - x).square().sum()), abs=1e-3)
        assert error.operands['input'].seen_low == x.min() and error.operands['input'].clipped < 0.01
        assert set(error.operands) == {'input', 'weight'} and error.kind == 'linear'
        found[bits] = error.sqnr
    assert found[8] - found[7] == pytest.approx(6, abs=1) and found[8] - found[4] == pytest.approx(24, abs=2)


def test_values_outside_the_range_are_counted():
    x = torch.rand(256, 64)
    model = quantized_linear(8, x)
    error, = layer_errors(model, lambda: model.layer(torch.cat([x, 3 * torch.ones(256, 64)])))
    assert error.operands['input'].clipped == pytest.approx(0.5, abs=1e-3)
    assert error.operands['input'].seen_high == 3 and error.operands['input'].high == pytest.approx(1, abs=0.01)


def test_measuring_leaves_the_model_as_it_was():
    x = torch.rand(8, 64)
    model = quantized_linear(4, x)
    before = model.layer(x)
    layer_errors(model, lambda: model.layer(x))
    assert torch.equal(model.layer(x), before) and not model.layer._forward_hooks
    assert not model.layer.input_quantizer._forward_hooks


def layer(name='backbone.a', sqnr=10.0, bits=8, clipped=0.0, part='input'):
    return dict(name=name, kind='linear', sqnr=sqnr, operands={
        'weight': dict(bits=8, sqnr=40.0, clipped=0.0, low=-1, high=1, seen_low=-1, seen_high=1),
        part: dict(bits=bits, sqnr=sqnr, clipped=clipped, low=-1, high=1, seen_low=-2, seen_high=1)})


def test_advice_is_a_stanza_that_parses():
    entries = [layer('backbone.a', 9.0, bits=4), layer('backbone.b', 8.0, bits=4, part='weight'),
               layer('backbone.c', 7.0, clipped=0.2), layer('backbone.d', sqnr=30.0)]
    found = page.advice(entries)
    assert [item['name'] for item in found] == ['backbone.c', 'backbone.b', 'backbone.a']
    assert '20.0 % of its values lie outside' in found[0]['why']
    stanza = QuantizationConfig.parse(eval(page.stanza_of(found).removeprefix('quantization = ')))
    assert stanza.keep_float == ('backbone.c', )
    assert [(o.pattern, o.weight, o.activation) for o in stanza.overrides] == [
        ('backbone.b', dict(bits=8), None), ('backbone.a', None, dict(bits=8))]
    assert page.advice(entries[3:]) == []


@pytest.mark.parametrize('name', page.LIMITS)
def test_the_verdict_follows_the_fidelity(name):
    good, bad = page.LIMITS[name]
    for value, word in ((good, 'good'), (good - 0.1, 'doubtful'), (bad, 'doubtful'), (bad - 0.1, 'bad')):
        assert page.verdict(dict(fidelity=dict(predictions={name: value})))[0] == word
    noise = dict(method='noise', fidelity=dict(predictions={name: good}))
    assert page.verdict(noise)[0] == 'doubtful' and 'noise' in page.verdict(noise)[1]
    assert page.verdict(dict(fidelity=dict(problem='no patches'))) == ('unknown', 'no patches')


def test_a_density_is_one_and_has_the_entropy_that_synthesis_raises():
    tokens = torch.randn(3, 20, 4)
    points, density = similarity_density(tokens)
    step = points[1] - points[0]
    assert points[0] == pytest.approx(-1, abs=0.003) and points[-1] == pytest.approx(1, abs=0.003)
    # What the kernel spreads beyond 1 is not drawn: half of the diagonal's.
    assert density.sum() * step == pytest.approx(1 - 0.5 / 20, abs=5e-3)
    off = tokens.new_tensor([1.0, 0.2, -0.3]).view(1, 3, 1) * torch.eye(3).view(1, 3, 3)  # pairwise at right angles
    points, density = similarity_density(off)
    assert points[density.argmax()] == pytest.approx(0, abs=0.003)
    assert patch_similarity_entropy(tokens, 1) > patch_similarity_entropy(off, 1)


def test_figures_take_the_colours_of_the_page():
    history = [dict(stage='synthesis', index=i, entropy=i / 10) for i in range(8)] + [
        dict(stage='game', index=i, ratio=1 - i / 20, turn='images' if i in (3, 4) else 'student',
             **(dict(holdout=0.1) if i % 2 else {})) for i in range(8)]
    drawn = [figures.synthesis_curve(history, 4, 'entropy'), figures.game_curve(history, 0.1),
             figures.stage_curve(history, 'game', 'holdout'),
             figures.block_errors({'backbone.blocks.0': [0.3, 0.1], 'neck': [0.2, 0.2]}),
             figures.layer_bars([layer(), layer('b', 30.0)]), figures.range_bars([layer()], 'weight')]
    for figure in drawn:
        text = figures.svg(figure)
        assert text.startswith('<svg') and 'var(--ink)' in text and '#010203' not in text
        image = figures.pixels(figure)
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 5
    assert figures.synthesis_curve(history, 4, 'diversity') is None and figures.game_curve([], None) is None
    assert figures.stage_curve(history, 'game', 'entropy') is None
    assert figures.block_errors({}) is None


def test_every_run_leaves_a_page_that_needs_nothing_else(quantized_run):
    work_dir, printed = quantized_run
    text = (work_dir / 'report.html').read_text()
    found = json.loads((work_dir / 'metrics.json').read_text())
    assert found['report'] == str(work_dir / 'report.html') and found['report'] in printed.replace('\n', '')
    assert not re.search(r'<(script|link|iframe)|@import|(src|href)="(?!data:|#)', text)
    assert text.count('<svg') == 6 and text.count('data:image/jpeg') == 12  # 6 images, the noise beside each
    for words in ('Synthesis', 'similarities between patches', 'The game', 'On real data', 'box AP', 'tools/dfq.py',
                  'torch 2', 'backbone.stages.0.blocks.0.attn.w_msa.matmul_context'):
        assert words in text, words
    assert ('What to try' in text) != ('None is below' in text)
    assert {'box AP', 'mask AP'} == set(found['fidelity']['predictions']) and found['fidelity']['images'] == 2
    assert found['fidelity']['views'] == 8
    assert 0 < found['fidelity']['predictions']['box AP'] <= 100 and found['fidelity']['cosine'] > 0.9
    fresh, seen = (load_safely(work_dir / name)['images'] for name in ('fresh.pt', 'synthetic.pt'))
    assert sum(map(len, fresh)) == 2
    assert not any(torch.equal(a, b) for a in torch.cat(fresh) for b in torch.cat(seen))


def test_the_same_goes_to_tensorboard_and_nothing_is_printed_if_quiet(small_config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{small_config}'\nquantization = dict(report=dict(images=4))\n"
                      "visualizer = dict(vis_backends=[dict(type='TensorboardVisBackend')])\n")
    done = run_tool('tools/dfq.py', config, '--work-dir', tmp_path, '--quiet', '--no-eval')
    assert done.stdout == ''
    assert not [line for line in done.stderr.splitlines() if ' - INFO - ' in line]
    events, = {path.parent for path in tmp_path.rglob('events.out.tfevents*')}
    log = EventAccumulator(str(events), size_guidance=dict(scalars=0, images=0))
    log.Reload()
    tags = log.Tags()
    assert {'entropy', 'discrepancy', 'ratio', 'fidelity/box AP', 'fidelity/cosine'} <= set(tags['scalars'])
    assert {'synthetic'} | {f'report/{name}' for name in (
        'synthesis', 'densities', 'game', 'layers', 'weights', 'activations')} <= set(tags['images'])
    value = log.Scalars('fidelity/box AP')[-1].value
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert value == pytest.approx(metrics['fidelity']['predictions']['box AP'])


def test_a_terminal_shows_a_bar_with_entropy_and_discrepancy(small_config, tmp_path):
    main, terminal = pty.openpty()
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', COLUMNS='120', TERM='xterm')
    process = subprocess.Popen(
        [sys.executable, 'tools/dfq.py', small_config, '--work-dir', tmp_path, '--cfg-options',
         'quantization.report.images=3'], cwd=ROOT, env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b''
    while True:
        try:
            shown += os.read(main, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0, shown[-2000:]
    shown = re.sub(r'\x1b\[[\d;?]*[a-zA-Z]', '', shown.decode())
    for stage, number in (('synthesis', 'entropy'), ('game', 'discrepancy'), ('report', ''), ('evaluation', '')):
        assert re.search(rf'{stage} +━+ *\d+/\d+ +[\d:]+ eta [\d:]+ +{number}', shown), stage
    assert 'Iter(train)' not in shown and 'Stage 1/3' in shown
    assert any('Iter(train)' in path.read_text() for path in tmp_path.rglob('*.log'))


def test_what_stands_between_backticks_is_code():
    assert page.marked('`a<b` & `c`') == '<code>a&lt;b</code> &amp; <code>c</code>'


def bars(display):
    """Names of the bars in a terminal, and how far each is."""
    return [(task.description, task.completed, task.total) for task in display.progress.tasks if task.visible]


def test_a_stage_has_one_bar_whatever_lies_between_its_updates():
    """All bars stay within the terminal, and the present one says how long the stage takes with what lies between."""
    console, clock = Console(force_terminal=True, file=io.StringIO(), height=24, width=120), [0.0]
    with Display(console=console) as display:
        display.progress.get_time = lambda: clock[0]
        for unit in range(40):
            for done in (1, 2):
                clock[0] += 60
                display.show('recording', done, 2)
            for done in range(5):
                clock[0] += 1
                display.show('reconstruction', 5 * unit + done + 1, 200)
            assert bars(display) == [('recording', 2, 2), ('reconstruction', 5 * unit + 5, 200)]
            if unit == 19:
                left = display.progress.tasks[1].time_remaining
        display.show('game', 1, 9)
    assert left == pytest.approx(20 * 125, rel=0.1)
    last = console.file.getvalue().rpartition('recording')[2]
    assert 'reconstruction' in last and 'game' in last


def test_each_evaluation_has_a_bar():
    runner = argparse.Namespace(test_dataloader=[0] * 3)
    with Display(console=Console(force_terminal=True, file=io.StringIO())) as display:
        hook = DisplayHook(display)
        for _ in range(2):
            for batch in range(3):
                hook.after_test_iter(runner, batch)
            hook.after_test_epoch(runner)
    assert bars(display) == [('evaluation', 3, 3)] * 2


def test_a_report_that_fails_loses_nothing(small_config, tmp_path, monkeypatch):
    from psaq_mm.engine import pipeline, quantize
    cfg = Config.fromfile(small_config)
    cfg.work_dir = str(tmp_path)

    def fails(*unused):
        raise RuntimeError('no fonts')

    monkeypatch.setattr(pipeline, 'write_report', fails)
    result = quantize(cfg, eval_float=False, eval_quantized=False)
    assert 'report' not in result and result['fidelity']['images'] == 2
    assert (tmp_path / 'quantized.pth').exists() and not (tmp_path / 'report.html').exists()
    assert json.loads((tmp_path / 'metrics.json').read_text())['fidelity'] == result['fidelity']


class Experiment(BaseVisBackend):
    """An experiment logger as they are: set up once a process, closed once, of no use afterwards."""
    begun, ended, told, broken = 0, 0, [], None

    def _init_env(self):
        if type(self).broken == 'login':
            raise SystemExit('api_key not configured')
        assert type(self).begun == 0, 'an experiment runs already'
        type(self).begun += 1

    @property
    @force_init_env
    def experiment(self):
        return self

    def tell(self, name):
        if type(self).broken == 'network':
            raise OSError('no route to host')
        assert not type(self).ended, f'{name} comes after the end'
        type(self).told.append(name)

    @force_init_env
    def add_image(self, name, image, step=0, **kwargs):
        self.tell(name)

    @force_init_env
    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        for name in scalar_dict:
            self.tell(name)

    def close(self):
        if hasattr(self, '_env_initialized') and self._env_initialized:
            type(self).ended += 1


@pytest.fixture
def experiment():
    """A fresh class of experiment loggers, registered."""
    kind = type('Experiment', (Experiment, ), dict(told=[]))
    VISBACKENDS.register_module('Experiment', force=True, module=kind)
    yield kind
    VISBACKENDS.module_dict.pop('Experiment')


def tracked_run(small_config, work_dir, backends=('Experiment', ), **kwargs):
    from psaq_mm.engine import quantize
    cfg = Config.fromfile(small_config)
    cfg.work_dir = str(work_dir)
    cfg.quantization.merge(dict(synthesis=dict(method='noise', num_images=2), report=dict(images=0)))
    cfg.visualizer = dict(type='DetLocalVisualizer', name='visualizer', vis_backends=[
        dict(type='LocalVisBackend'), *(dict(type=name) for name in backends)])
    return quantize(cfg, **kwargs)


def test_an_experiment_logger_is_set_up_once_and_told_everything(small_config, tmp_path, experiment):
    result = tracked_run(small_config, tmp_path)
    assert (experiment.begun, experiment.ended) == (1, 1)
    assert 'report' in result and 0 < result['full_precision']['coco/bbox_mAP']
    shown = {'synthetic', 'report/layers', 'full_precision/coco/bbox_mAP', 'quantized/coco/segm_mAP'}
    assert shown <= set(experiment.told)


@pytest.mark.parametrize('broken', ['login', 'package', 'type'])
def test_an_experiment_logger_that_cannot_start_ends_the_command_before_the_work(small_config, tmp_path, experiment,
                                                                                 monkeypatch, broken):
    from psaq_mm.engine import DataFreeLoop
    monkeypatch.setattr(DataFreeLoop, 'run', lambda self: pytest.fail('the work has begun'))
    experiment.broken = broken
    backend, words = dict(login=('Experiment', 'Experiment cannot start.*api_key not configured'),
                          package=('NeptuneVisBackend', 'NeptuneVisBackend cannot start.*pip install -U neptune'),
                          type=('Expriment', 'Expriment is not in'))[broken]
    with pytest.raises(UserError, match=f"(?s)visualizer.*{words}.*do without it: --cfg-options visualizer=None$"):
        tracked_run(small_config, tmp_path, [backend], eval_float=False, eval_quantized=False)


def test_a_run_does_without_its_visualizer(small_config):
    """What the errors above recommend."""
    cfg = Config.fromfile(small_config)
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg.merge_from_dict(parser.parse_args(WITHOUT.split()).cfg_options)
    assert cfg.visualizer is None and evaluation_config(cfg, 'name').visualizer is None


@pytest.mark.slow
def test_an_experiment_logger_that_fails_on_the_way_loses_nothing(small_config, tmp_path, experiment, capfd):
    experiment.broken = 'network'
    result = tracked_run(small_config, tmp_path, eval_float=False, eval_quantized=False)
    printed = ''.join(capfd.readouterr())
    assert printed.count('nothing more goes to Experiment, which fails in add_') == 1
    assert 'no route to host' in printed and (tmp_path / 'report.html').exists() and 'report' in result
    assert experiment.ended == 0  # what has failed is left alone


@pytest.mark.slow
def test_a_visualizer_that_cannot_show_the_report_loses_nothing(small_config, tmp_path, monkeypatch, capfd):
    from psaq_mm.engine import pipeline

    def fails(*unused):
        raise RuntimeError('no colours')

    monkeypatch.setattr(pipeline, 'show_report', fails)
    result = tracked_run(small_config, tmp_path, [], eval_float=False, eval_quantized=False)
    assert result['report'] == str(tmp_path / 'report.html') and (tmp_path / 'report.html').exists()
    assert 'no colours' in ''.join(capfd.readouterr())
    assert json.loads((tmp_path / 'metrics.json').read_text())['report'] == result['report']


@pytest.mark.slow
def test_a_run_that_was_interrupted_reports_all_of_itself(small_config, tmp_path, monkeypatch):
    from psaq_mm.engine import quantize, reporting
    from psaq_mm.engine.stages import GameStage
    cfg = Config.fromfile(small_config)
    cfg.work_dir = str(tmp_path)
    cfg.quantization.report = dict(images=0)
    cfg.default_hooks.checkpoint = dict(by_epoch=False, interval=3)
    histories, play = [], GameStage.step

    def stops(self, rng):
        if self.loop.iter == 13:
            raise KeyboardInterrupt
        return play(self, rng)

    monkeypatch.setattr(reporting.figures, 'synthesis_curve', lambda history, *args: histories.append(history))
    with monkeypatch.context() as context:
        context.setattr(GameStage, 'step', stops)
        with pytest.raises(KeyboardInterrupt):
            quantize(cfg, eval_float=False, eval_quantized=False)
    quantize(cfg, resume=True, eval_float=False, eval_quantized=False)
    history, = histories
    for stage in ('synthesis', 'game'):
        assert [update['index'] for update in history if update['stage'] == stage] == [*range(8)]
    assert all('entropy' in update for update in history if update['stage'] == 'synthesis')
    assert {update['turn'] for update in history if update['stage'] == 'game'} == {'student', 'images'}


def test_pairs_that_real_data_tells_apart():
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    try:
        from fidelity import ordered
    finally:
        sys.path.pop(0)
    assert ordered([50, 51, 51.5, 40], [1, 2, 0, 0.5]) == '3 of 5'  # 51 and 51.5 do not count
