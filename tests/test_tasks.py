"""Segmentation and classification through the same command, and the ecosystem's own tools on what it writes."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from psaq_mm.engine import quantize
from psaq_mm.engine.compare import over_seeds
from psaq_mm.errors import UserError
from psaq_mm.files import OwnedFolder, read_json
from psaq_mm.report.tables import comparison_rows, plot_comparison

from .conftest import ROOT, run_tool


def tool_of(package, name):
    return Path(package.__file__).parent / '.mim' / 'tools' / name


def run_test_tool(tool, config, checkpoint, work_dir, *options):
    done = run_tool(tool, config, checkpoint, '--work-dir', work_dir, *options, cwd=work_dir.parent)
    return done.stdout + done.stderr


def number(name, text):
    return float(re.findall(rf'{name}: (\S+)', text)[-1])


# -- segmentation ------------------------------------------------------------------------------------------------------


def test_segmentation_table_and_metrics(segmentation_run):
    work_dir, printed = segmentation_run
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    assert metrics['scope'] == ['backbone'] and 0 < metrics['quantized']['mIoU'] <= 100
    assert 'mIoU' in printed and f"{metrics['quantized']['mIoU']:.1f}" in printed
    state = torch.load(work_dir / 'quantized.pth', weights_only=True)['state_dict']
    assert not any(k.startswith('decode_head') and 'quantizer' in k for k in state)


def test_mmsegs_test_tool_takes_both_configs(segmentation_run, segmentation_config):
    import mmseg
    work_dir, _ = segmentation_run
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    maps = []
    for name, config in (('a', work_dir / 'test_config.py'), ('b', segmentation_config)):
        text = run_test_tool(tool_of(mmseg, 'test.py'), config, work_dir / 'quantized.pth', work_dir / name, '--out',
                      work_dir / f'maps_{name}')
        assert number('mIoU', text) == pytest.approx(metrics['quantized']['mIoU'], abs=1e-3)
        maps.append([np.asarray(Image.open(p)) for p in sorted((work_dir / f'maps_{name}').glob('*.png'))])
    assert len(maps[0]) == 6 and all(np.array_equal(a, b) for a, b in zip(*maps))


def test_init_model_and_inferencer_give_the_same_map(segmentation_run, scenes):
    from mmseg.apis import MMSegInferencer, inference_model, init_model
    work_dir, _ = segmentation_run
    config, checkpoint = str(work_dir / 'test_config.py'), str(work_dir / 'quantized.pth')
    path = str(next((scenes / 'val').glob('*.png')))
    model = init_model(config, checkpoint, device='cpu')
    result = inference_model(model, path).pred_sem_seg.data[0].numpy()
    inferencer = MMSegInferencer(config, checkpoint, device='cpu')
    assert np.array_equal(inferencer(path)['predictions'], result)
    assert model.dataset_meta['classes'][0] == 'ground'
    from psaq_mm.quantization import quantizers
    assert all(q.calibrated for q in quantizers(model).values()) and len(quantizers(model)) > 50


def changed(path, work_dir, **stanza):
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({f'quantization.{k}': v for k, v in stanza.items()})
    cfg.work_dir = str(work_dir)
    return cfg


def test_the_decode_head_is_quantized_when_it_is_named(segmentation_config, tmp_path):
    cfg = changed(segmentation_config, tmp_path, targets=['backbone', 'decode_head'],
                  **{'game.steps': 40, 'game.student_lr': 2e-5, 'weight.bits': 4})
    result = quantize(cfg, eval_float=False)
    assert result['scope'] == ['backbone', 'decode_head']
    content = torch.load(tmp_path / 'quantized.pth', weights_only=True)
    state = content['state_dict']
    assert torch.isfinite(state['decode_head.conv_seg.weight_quantizer.scale']).all()
    # the head's weights take part in the game: the logits are among what is compared
    assert content['meta']['game']['best'] < content['meta']['game']['initial']
    before = torch.load(ROOT / 'demo' / 'upernet_swin_mini_scenes.pth', weights_only=True)['state_dict']
    assert not torch.equal(state['decode_head.conv_seg.weight'], before['decode_head.conv_seg.weight'].float())


@pytest.mark.slow
def test_a_game_of_a_single_linear_layer(classification_config, tmp_path):
    """Its input has no gradient, its range does; its name is the target itself."""

    def scales(method, **stanza):
        cfg = changed(classification_config, tmp_path / f'{method}{len(stanza)}', targets=['head'], placement='all', **{
            'synthesis.method': method, 'weight.bits': 3, 'activation.bits': 3, **stanza})
        quantize(cfg, eval_float=False, eval_quantized=False)
        state = torch.load(f'{cfg.work_dir}/quantized.pth', weights_only=True)['state_dict']
        return {k: v for k, v in state.items() if k.endswith('quantizer.scale')}

    plain = scales('psaq_v1')
    searched = scales('psaq_v1', **{'weight.observer': 'mse'})
    learned = scales('psaq_v2', **{'game.range_lr': 0.05, 'game.steps': 40, 'game.weight_ranges': 'calibrated'})
    moved = {k for k, v in plain.items() if not torch.equal(v, learned[k])}
    assert moved == {'head.input_quantizer.scale'}  # not that of the logits, head.output_quantizer
    found = scales('psaq_v2', **{'game.range_lr': 0, 'activation.bits': 4})['head.weight_quantizer.scale']
    assert torch.equal(found, searched['head.weight_quantizer.scale'])
    assert not torch.equal(found, plain['head.weight_quantizer.scale'])


def test_a_head_that_never_predicts_is_refused(segmentation_config, tmp_path):
    with pytest.raises(UserError, match=r"'auxiliary_head\..*never runs when features are computed.*keep_float"):
        quantize(changed(segmentation_config, tmp_path, targets=['backbone', 'auxiliary_head']))


# -- classification ----------------------------------------------------------------------------------------------------


def test_classification_end_to_end(classification_config, tmp_path):
    import mmdet
    import mmseg
    printed = run_tool('tools/dfq.py', classification_config, '--work-dir', tmp_path / 'run').stdout
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert metrics['scope'] == ['backbone', 'head']
    assert 'top-1' in printed and f"{metrics['quantized']['accuracy/top1']:.1f}" in printed
    # any mmengine test tool will do, and either config
    for package, config in ((mmdet, tmp_path / 'run' / 'test_config.py'), (mmseg, classification_config)):
        text = run_test_tool(tool_of(package, 'test.py'), config, tmp_path / 'run' / 'quantized.pth',
                             tmp_path / package.__name__)
        assert 'unexpected key' not in text
        assert number('accuracy/top1', text) == pytest.approx(metrics['quantized']['accuracy/top1'], abs=1e-3)


def test_wrong_evaluation_data_is_found_before_any_work(classification_config, scenes, tmp_path):
    cfg = changed(classification_config, tmp_path / 'run')
    cfg.test_dataloader.dataset.metainfo = dict(classes=('disk', 'square'))
    with pytest.raises(UserError, match='2 class folders, the model has 6 classes'):
        quantize(cfg)
    del cfg.test_dataloader.dataset['metainfo']
    cfg.test_dataloader.dataset.data_prefix = dict(img_path='val/disk')  # a flat folder
    with pytest.raises(UserError, match='no images .* in class folders of .*val/disk'):
        quantize(cfg)
    assert not (tmp_path / 'run').exists()


def test_a_timm_file_is_recognised_and_converted(classification_config, tmp_path):
    """The same weights under timm's own names give the same full-precision accuracy."""
    state = torch.load(ROOT / 'demo' / 'vit_mini_objects.pth', weights_only=True)['state_dict']
    timm_state = {k.removeprefix('backbone.'): v.float() for k, v in state.items() if not k.startswith('data_')}
    torch.save(timm_state, tmp_path / 'timm.pth')
    cfg = changed(classification_config, tmp_path / 'run', **{'synthesis.method': 'noise'})
    own = quantize(cfg)
    cfg.work_dir = str(tmp_path / 'timm')
    other = quantize(cfg, str(tmp_path / 'timm.pth'))
    assert other['full_precision'] == own['full_precision'] and other['quantized'] == own['quantized']
    converted = [(tmp_path / folder / 'full_precision.pth').exists() for folder in ('timm', 'run')]
    assert converted == [True, False]


def test_pretrained_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    """No network in tests: timm's failure becomes a message that says what to do."""
    import timm

    def refuse(*args, pretrained=False, **kwargs):
        assert pretrained
        raise OSError('no route to host')

    monkeypatch.setattr(timm, 'create_model', refuse)
    cfg = Config.fromfile(ROOT / 'configs' / 'deit_t_w8a8.py')
    cfg.work_dir = str(tmp_path / 'run')
    with pytest.raises(UserError, match='cannot fetch the weights.*no route to host.*--checkpoint'):
        quantize(cfg)


def test_pretrained_weights_of_timm_are_used(tmp_path, monkeypatch):
    """pretrained=True, with timm's download played by a stand-in: exactly those weights are quantized."""
    import timm
    original, fetched = timm.create_model, []

    def create(name, pretrained=False, **kwargs):
        model = original(name, **dict(kwargs, embed_dim=32, depth=1, num_heads=2))
        if pretrained:
            fetched.append({k: v.clone() for k, v in model.state_dict().items()})
        return model

    monkeypatch.setattr(timm, 'create_model', create)
    cfg = Config.fromfile(ROOT / 'configs' / 'deit_t_w8a8.py')
    cfg.quantization.merge(dict(synthesis=dict(method='noise', num_images=2)))
    cfg.work_dir = str(tmp_path / 'run')
    quantize(cfg)
    state = torch.load(tmp_path / 'run' / 'quantized.pth', weights_only=True)['state_dict']
    assert len(fetched) == 1
    for key, value in fetched[0].items():
        assert torch.equal(state[key if key.startswith('head.') else f'backbone.{key}'], value)


# -- the grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grid_continues_and_repeats_itself(classification_config, tmp_path):
    def grid(folder, *options):
        return run_tool('tools/grid.py', classification_config, '--work-dir', folder, '--methods', 'noise', 'psaq_v2',
                        '--bits', 'W8A8', 'W4A4', '--seed', '3', '--title', 'Test', *options).stdout

    printed = grid(tmp_path / 'a', '--json', tmp_path / 'j.json')
    table = (tmp_path / 'a' / 'table.md').read_text()
    assert table.startswith('Test: backbone and head quantized')
    assert len(re.findall(r'^\| (full precision|W8A8 noise|W8A8 psaq_v2|W4A4 noise|W4A4 psaq_v2) ', table, re.M)) == 5
    assert 'minutes' not in table and 'minutes' in printed and 'top-1' in table
    assert np.asarray(Image.open(tmp_path / 'a' / 'grid.png')).std() > 10
    results = json.loads((tmp_path / 'j.json').read_text())
    for axes, metric in zip(plot_comparison(results, 'Test').axes, ('accuracy/top1', 'accuracy/top2'), strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert lines.keys() == {'full precision', 'noise', 'psaq_v2'}
        for method in ('noise', 'psaq_v2'):
            assert list(lines[method]) == [results['runs'][f'{bits} {method}']['quantized'][metric]
                                           for bits in ('W8A8', 'W4A4')]
    assert results['runs'].keys() == {'W8A8 noise', 'W8A8 psaq_v2', 'W4A4 noise', 'W4A4 psaq_v2'}
    # interrupted: one run was under way, the others are kept
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('quantized.pth')}
    unfinished = OwnedFolder(tmp_path / 'a' / 'W4A4_psaq_v2')  # as the grid writes it: a changed file is the user's
    state = read_json(unfinished.path / 'compared.json')
    del state['result']
    unfinished.write_json('compared.json', state)
    grid(tmp_path / 'a')
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('quantized.pth')}
    assert [p.parent.name for p in stamps if stamps[p] != again[p]] == ['W4A4_psaq_v2']
    assert (tmp_path / 'a' / 'table.md').read_text() == table
    grid(tmp_path / 'b')
    assert (tmp_path / 'b' / 'table.md').read_text() == table


@pytest.mark.slow
def test_grid_over_seeds(classification_config, tmp_path):
    run_tool('tools/grid.py', classification_config, '--work-dir', tmp_path, '--methods', 'noise', '--bits', 'W4A4',
             '--seeds', '1', '2', '--cfg-options', 'quantization.report.images=0')
    run = read_json(tmp_path / 'metrics.json')['runs']['W4A4 noise']
    for seed in (1, 2):
        alone = read_json(tmp_path / f'W4A4_noise_seed_{seed}' / 'metrics.json')
        assert alone['seed'] == seed and run['seeds'][str(seed)]['quantized'] == alone['quantized']
    calibrated = [torch.load(tmp_path / f'W4A4_noise_seed_{seed}' / 'quantized.pth', weights_only=True)['state_dict']
                  for seed in (1, 2)]
    assert any(not torch.equal(a, b) for a, b in zip(*(state.values() for state in calibrated)))
    assert ' ± ' in (tmp_path / 'table.md').read_text()


def test_several_seeds_become_their_mean_and_standard_deviation():
    runs = {seed: dict(quantized={'accuracy/top1': top1}, minutes=minutes, synthesis_minutes=0.0, scope=['backbone'],
                       checkpoint='a.pth', fidelity=dict(predictions={'top-1 agreement': top1 + 10}))
            for seed, top1, minutes in ((0, 60.0, 1.0), (1, 63.0, 2.0), (2, 66.0, 3.0))}
    merged = over_seeds(runs)
    assert merged['quantized'] == {'accuracy/top1': 63.0} and merged['deviation'] == {'accuracy/top1': 3.0}
    assert merged['minutes'] == 2.0 and merged['seeds'] == runs and 'checkpoint' not in merged
    header, rows = comparison_rows(dict(full_precision={'accuracy/top1': 70.0}, runs={'W4A4 psaq_v1': merged}))
    assert dict(zip(header, rows[1])) == {'calibration': 'W4A4 psaq_v1', 'top-1': '63.0 ± 3.0', 'top-1 - FP': '-7.0',
                                          'fidelity': '73.0', 'minutes': '2.0'}


def test_mistakes_on_the_grids_command_line(classification_config, tmp_path):
    done = run_tool('tools/grid.py', classification_config, '--bits', 'W9A8', check=False)
    assert done.returncode == 2 and "'W9A8' is not like W8A8" in done.stderr
    done = run_tool('tools/grid.py', classification_config, '--work-dir', tmp_path, '--methods', 'real',
                    '--cfg-options', 'calib_dataloader=None', check=False)
    assert done.returncode == 2 and 'needs calib_dataloader' in done.stderr and 'Traceback' not in done.stderr


# -- importing beside another torch ------------------------------------------------------------------------------------


def test_torchvision_imports_beside_a_torch_it_was_not_built_for(tmp_path):
    """Its compiled part taken away, torchvision still imports after psaq_mm; mmengine's Runner needs that."""
    script = tmp_path / 'script.py'
    script.write_text("""
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
source = Path(find_spec('torchvision').origin).parent
shutil.copytree(source, Path('copy') / 'torchvision', ignore=shutil.ignore_patterns('_C*', '*.pyc'))
sys.path.insert(0, 'copy')
import psaq_mm
import torchvision, timm
assert 'copy' in torchvision.__file__
from mmengine.utils.dl_utils import collect_env
print(collect_env()['TorchVision'])
""")
    assert re.match(r'\d+\.\d+', run_tool(script, cwd=tmp_path).stdout.splitlines()[-1])
