"""The tools as a user runs them, and the ecosystem's own tools on what they write."""
import html
import json
import pickle
import re
import runpy
import shutil
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import DEMO_CHECKPOINT, ROOT, run_tool


def mmdet_tool(name):
    import mmdet
    return Path(mmdet.__file__).parent / '.mim' / 'tools' / name


def test_what_is_written(quantized_run):
    work_dir, printed = quantized_run
    grid = np.asarray(Image.open(work_dir / 'synthetic.png'))
    assert grid.shape == (2 * (64 + 8), 6 * (96 + 4) + 4, 3)  # six images over the noise they came from
    folder = sorted((work_dir / 'synthetic').glob('*.png'))
    assert len(folder) == 6 and Image.open(folder[0]).size == (96, 64)
    notes = json.loads((work_dir / 'calibration_set' / 'preprocessing.json').read_text())
    array = np.load(work_dir / 'calibration_set' / notes['arrays'][0])
    first = np.asarray(Image.open(work_dir / 'calibration_set' / '0000.png'))
    assert array.shape == (6, 3, 64, 96) and notes['channel_order'] == 'RGB' and notes['mean']
    expected = (first.transpose(2, 0, 1) - np.reshape(notes['mean'], (3, 1, 1))) / np.reshape(notes['std'], (3, 1, 1))
    assert np.abs(array[0] - expected).max() < 0.02  # half a pixel value
    content = torch.load(work_dir / 'quantized.pth', weights_only=True)
    meta = content['meta']
    assert meta['quantization']['weight']['bits'] == 8 and meta['quantization']['synthesis']['num_images'] == 6
    assert set(meta['versions']) == {'psaq_mm', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'timm',
                                     'kernels'}
    assert meta['dataset_meta']['classes'] == ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
    assert meta['game']['best'] <= meta['game']['initial']
    for word in ('full precision', 'quantized W8A8 (backbone, neck)', 'box AP', 'mask AP', 'size, MB', 'minutes'):
        assert word in printed
    log = ''.join(path.read_text() for path in work_dir.rglob('*.log'))
    for word in ('Stage 1/3', 'Stage 2/3', 'Stage 3/3', 'eta:', 'entropy:', 'discrepancy:', 'The game is over'):
        assert word in log
    assert list(work_dir.rglob('vis_data/vis_image/synthetic_*.png'))  # through the Visualizer


def test_every_result_names_the_recipe_and_what_is_set_otherwise(quantized_run):
    work_dir, _ = quantized_run
    expected = ['synthesis.num_images=6', 'synthesis.steps=4', 'game.steps=8', 'game.student_patience=3',
                'game.image_patience=2', 'game.evaluate_every=2']
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    meta = torch.load(work_dir / 'quantized.pth', weights_only=True)['meta']
    assert metrics['recipe'] == meta['quantization']['recipe'] == 'paper'
    assert metrics['departures'] == meta['departures'] == expected
    said = f"recipe 'paper', but for {', '.join(expected)}"
    assert any(said in path.read_text() for path in work_dir.rglob('*.log'))
    assert f'{said}; quantized: backbone, neck' in html.unescape((work_dir / 'report.html').read_text())


@pytest.fixture(scope='module')
def by_test_tool(quantized_run):
    """Predictions of mmdet's own tools/test.py with the self-contained test config, and its output."""
    work_dir, _ = quantized_run
    done = run_tool(mmdet_tool('test.py'), work_dir / 'test_config.py', work_dir / 'quantized.pth', '--work-dir',
                    work_dir / 'tested', '--out', work_dir / 'out.pkl', cwd=work_dir)
    return pickle.loads((work_dir / 'out.pkl').read_bytes()), done.stdout + done.stderr


def ap_of(text):
    return float(re.findall(r'coco/bbox_mAP: (\S+)', text)[-1])


def test_mmdets_test_tool_gives_our_metrics(quantized_run, by_test_tool):
    metrics = json.loads((quantized_run[0] / 'metrics.json').read_text())
    assert ap_of(by_test_tool[1]) == metrics['quantized']['coco/bbox_mAP']


def test_mmdets_test_tool_takes_the_config_with_the_stanza_too(quantized_run, small_config, by_test_tool):
    work_dir, _ = quantized_run
    done = run_tool(mmdet_tool('test.py'), small_config, work_dir / 'quantized.pth', '--work-dir', work_dir / 'tested2',
                    '--out', work_dir / 'out2.pkl', cwd=work_dir)
    assert ap_of(done.stdout + done.stderr) == ap_of(by_test_tool[1])
    for a, b in zip(by_test_tool[0], pickle.loads((work_dir / 'out2.pkl').read_bytes())):
        assert torch.equal(a['pred_instances']['bboxes'], b['pred_instances']['bboxes'])


def equal(instances, expected):
    assert torch.allclose(instances.scores, expected['scores'], atol=1e-4)
    assert torch.allclose(instances.bboxes, expected['bboxes'], atol=1e-2)
    assert torch.equal(instances.labels, expected['labels'])


def test_init_detector_and_inferencer_predict_the_same(quantized_run, by_test_tool, scenes):
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    work_dir, _ = quantized_run
    config, checkpoint = str(work_dir / 'test_config.py'), str(work_dir / 'quantized.pth')
    images = [str(p) for p in sorted((scenes / 'val').glob('*.png'))]
    model = init_detector(config, checkpoint, device='cpu')
    inferencer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
    inferred = inferencer(images, return_datasamples=True, no_save_vis=True)['predictions']
    assert len(images) == len(inferred) == len(by_test_tool[0]) == 6
    assert sum(len(e['pred_instances']['scores']) for e in by_test_tool[0]) > 6
    for path, sample, expected in zip(images, inferred, by_test_tool[0]):
        equal(inference_detector(model, path).pred_instances, expected['pred_instances'])
        equal(sample.pred_instances, expected['pred_instances'])
    assert tuple(model.dataset_meta['classes'])[0] == 'disk'


def test_float_weights_in_the_quantized_model_refuse_to_predict(quantized_run, scenes):
    from mmdet.apis import inference_detector, init_detector

    from psaq_mm.quantization import UncalibratedError
    model = init_detector(str(quantized_run[0] / 'test_config.py'), str(DEMO_CHECKPOINT), device='cpu')
    with pytest.raises(UncalibratedError, match='full-precision checkpoint has no scales'):
        inference_detector(model, np.zeros((64, 64, 3), np.uint8))


def test_another_bit_width_in_the_config_is_refused(quantized_run):
    from mmdet.apis import init_detector

    from psaq_mm.quantization import QuantizerMismatchError
    with pytest.raises(QuantizerMismatchError, match='8 bits.*config says.*4 bits'):
        init_detector(str(quantized_run[0] / 'test_config.py'), str(quantized_run[0] / 'quantized.pth'), device='cpu',
                      cfg_options={'model.quantization.weight.bits': 4, 'model.backbone.init_cfg': None})


def test_command_line_options_reach_the_run(small_config, tmp_path):
    done = run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path, '--checkpoint', DEMO_CHECKPOINT, '--no-eval',
                    '--seed', '5', '--device', 'cpu', '--json', tmp_path / 'j.json', '--cfg-options',
                    'quantization.weight.bits=4', 'quantization.synthesis.method=psaq_v1',
                    'quantization.synthesis.size=(64,64)', "quantization.keep_float=['neck.*']")
    result = json.loads((tmp_path / 'j.json').read_text())
    assert result == json.loads((tmp_path / 'metrics.json').read_text())
    assert result['bits'] == dict(weight=4, activation=8) and result['seed'] == 5
    assert result['method'] == 'psaq_v1' and result['quantized'] == {}
    state = torch.load(tmp_path / 'quantized.pth', weights_only=True)['state_dict']
    assert not any(k.startswith('neck') and 'quantizer' in k for k in state)
    assert Image.open(tmp_path / 'synthetic' / '0000.png').size == (64, 64)
    assert 'W4A8' in done.stdout


@pytest.mark.parametrize('arguments,words', [
    (['--cfg-options', 'quantization.weight.bit=4'], ['quantization.weight.bit = 4', "did you mean 'bits'"]),
    (['--cfg-options', "quantization.keep_float=['nek.*']"], ["'nek.*' matches none", 'neck.']),
    (['--cfg-options', "quantization.targets=['bakbone']"], ["did you mean 'backbone'"]),
    (['--cfg-options', 'model.roi_head.bbox_head.num_classes=80'], ['fc_cls', 'number of classes', '(7, ']),
    (['--cfg-options', 'foo'], ['--cfg-options foo', 'KEY=VALUE']),
    (['--checkpoint', 'nowhere.pth'], ['nowhere.pth does not exist', '--checkpoint']),
])
def test_mistakes_end_in_one_clear_message(small_config, tmp_path, arguments, words):
    done = run_tool('tools/dfq.py', small_config, '--work-dir', tmp_path / 'w', *arguments, check=False)
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr and 'error: ' in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / 'w').exists()


def test_a_config_that_is_missing_or_broken_is_named(tmp_path):
    done = run_tool('tools/dfq.py', tmp_path / 'none.py', check=False)
    assert done.returncode == 2 and 'none.py does not exist' in done.stderr
    broken = tmp_path / 'broken.py'
    broken.write_text('a = (')
    done = run_tool('tools/dfq.py', broken, check=False)
    assert done.returncode == 2 and 'broken.py cannot be read' in done.stderr and 'Traceback' not in done.stderr
    plain = tmp_path / 'plain.py'
    plain.write_text("_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'\n")
    done = run_tool('tools/dfq.py', plain, '--work-dir', tmp_path / 'w', check=False)
    assert done.returncode == 2 and "no 'quantization' stanza" in done.stderr


def test_scenes_are_deterministic_and_in_coco_format(scenes):
    import hashlib

    from pycocotools.coco import COCO
    # The scenes the shipped checkpoint was trained and is evaluated on: if this changes, its AP means nothing.
    digest = hashlib.sha256(np.asarray(Image.open(scenes / 'val' / '00003.png')).tobytes()).hexdigest()
    assert digest == SCENE_DIGEST
    coco = COCO(str(scenes / 'val.json'))
    assert len(coco.imgs) == 6 and {c['name'] for c in coco.cats.values()} >= {'disk', 'cross'}
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        y, x = np.nonzero(mask)
        left, top, width, height = annotation['bbox']
        assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == (left, top, left + width, top + height)
        assert mask.sum() == annotation['area'] > 20
        labels = np.asarray(Image.open(scenes / 'val_maps' / coco.imgs[annotation['image_id']]['file_name']))
        assert (labels[mask > 0] == sorted(coco.cats).index(annotation['category_id']) + 1).all()  # 0 is the ground
    assert (labels == 0).any()


def test_objects_are_those_the_shipped_classifier_knows(scenes):
    import hashlib
    folders = sorted(p for p in (scenes / 'objects' / 'val').iterdir() if p.is_dir())
    pixels = hashlib.sha256()
    for folder in folders:
        pixels.update(folder.name.encode() + np.asarray(Image.open(min(folder.glob('*.png')))).tobytes())
    assert pixels.hexdigest() == OBJECT_DIGEST


OBJECT_DIGEST = '6df829e204ad568908dc63e7894de4873f47fd238bf4b52dd8a4b15dd5f6d5c2'
SCENE_DIGEST = 'bbaa9d07490cc52ee0709ae1fe6f4df7dbd1b4843390862137070c4765b44d8b'


def test_demo_and_benchmark_are_commands(tmp_path):
    benchmarks = ('benchmarks/nuclei.py', 'benchmarks/deit_tiny.py')
    more = sorted(path.relative_to(ROOT) for folder in ('tools', 'benchmarks') for path in (ROOT / folder).glob('*.py')
                  if path.stem != 'common')
    for script in ('demo/run.py', 'demo/scenes.py', 'demo/train.py', *more):
        assert 'usage' in run_tool(script, '--help').stdout
    for script in benchmarks:
        done = run_tool(script, '--bench', tmp_path, check=False)
        assert done.returncode == 2 and '--bench names the folder' in done.stderr
    assert 'choose from detection' in run_tool('demo/run.py', 'tracking', check=False).stderr


def test_tools_take_the_recipes_that_the_stanza_knows():
    from psaq_mm.stanza import QuantizationConfig
    names = typing.get_args(typing.get_args(QuantizationConfig.model_fields['recipe'].annotation)[0])
    coverage = runpy.run_path(str(ROOT / 'tools' / 'coverage.py'))
    assert names == coverage['common'].RECIPES == tuple(coverage['WORK'])
    done = run_tool('tools/grid.py', 'none.py', '--recipes', 'best', check=False)
    assert done.returncode == 2 and all(name in done.stderr for name in names)


@pytest.mark.slow
def test_memory_of_a_step_is_near_that_of_a_bare_one(tmp_path):
    """Times are for people to look at; allocations are the same every time."""
    run_tool('benchmarks/step_cost.py', '--cases', 'deit_t', '--repeats', '1', '--json', tmp_path / 'j.json')
    found = json.loads((tmp_path / 'j.json').read_text())
    assert found['deit_t synthesis']['memory'] <= 1.15 and found['deit_t student']['memory'] <= 1.25
    assert all(v > 0 for case in found.values() for v in case['seconds'] + case['bytes'])


@pytest.mark.slow
def test_the_coverage_tool_takes_a_config_through_the_recipe_below_8_bits(tmp_path):
    name = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    run_tool('tools/coverage.py', '--match', name, '--recipe', 'low_bit', '--export', '--markdown', tmp_path / 'low.md',
             '--json', tmp_path / 'low.json', '--logs', tmp_path / 'logs')
    (found, result), = json.loads((tmp_path / 'low.json').read_text()).items()
    assert (found, result['result'], result['attentions']) == (name, 'pass', 4)
    text = (tmp_path / 'low.md').read_text()
    assert '--recipe low_bit --export --markdown docs/low.md' in text and 'reconstruction' in text and \
        '1 of 1 pass' in text and '1 of these 1 are one graph' in text
    assert result['export'] == 'any size' and result['sqnr'] > 15


@pytest.mark.slow
def test_the_density_benchmark_ranks_the_estimators(tmp_path):
    run_tool('benchmarks/density.py', '--repeats', '1', '--json', tmp_path / 'j.json')
    found = json.loads((tmp_path / 'j.json').read_text())
    for kind in ('rendered', 'noise'):
        binned, exact, ten = (found[f'{kind}, {n}'] for n in ('binned (default)', 'exact', 'ten points (V1)'))
        assert exact['entropy_error'] < 1e-3 and binned['entropy_error'] < 2e-3 < ten['entropy_error']
        assert exact['gradient_error'] < 1e-2 and binned['gradient_error'] < 5e-2 < ten['gradient_error']
        assert binned['peak_mb'] < ten['peak_mb']


@pytest.mark.slow
@pytest.mark.parametrize('of', ['synthesis', 'game'])
def test_accuracy_against_steps(of, tmp_path):
    command = ('benchmarks/steps.py', '--of', of, '--tasks', 'classification', '--steps', '0', '20', '--out', tmp_path)
    run_tool(*command, '--cfg-options', *('quantization.synthesis.steps=10', ) * (of == 'game'),
             'quantization.game.evaluate_every=5')
    found = json.loads((tmp_path / 'steps.json').read_text())['classification']
    start, end = found['0'], found['20']
    if of == 'game':
        assert end['guide'] < start['guide'] == 1
    else:  # noise has no entropy worth the name, and calibrates badly
        assert abs(end['guide']) < 10 and end['value'] > start['value'] + 5
    assert end['value'] > 40 and start['metric'] == 'accuracy/top1'
    assert np.asarray(Image.open(tmp_path / 'steps.png')).std() > 10


@pytest.mark.slow
def test_int8_speed_measures_files_and_memory(tmp_path):
    pytest.importorskip('openvino', reason="needs pip install 'psaq_mm[deploy]'")
    run_tool('benchmarks/int8_speed.py', '--cases', 'deit_s', '--repeats', '1', '--peak', '--json', tmp_path / 'j.json')
    found = json.loads((tmp_path / 'j.json').read_text())['deit_s']
    ours, plain = (found[f'OpenVINO {kind}'] for kind in ('int8, psaq_mm', 'float'))
    assert ours['size_mb'] < 0.3 * plain['size_mb'] and 0 < ours['peak_mb'] < plain['peak_mb']
    assert all(run['peak_mb'] > 0 and run['seconds'] > 0 for run in found.values())


@pytest.mark.slow
def test_int8_speed_of_whole_graphs(tmp_path):
    pytest.importorskip('openvino', reason="needs pip install 'psaq_mm[deploy]'")
    done = run_tool('benchmarks/int8_speed.py', '--cases', 'deit_s', '--complete', '--repeats', '1', '--peak', '--json',
                    tmp_path / 'j.json')
    found = json.loads((tmp_path / 'j.json').read_text())['deit_s']
    assert 'answers of the float graph: [(1, 1000)]' in done.stdout
    assert {'eager float', 'ONNX Runtime int8, its own PTQ', 'OpenVINO int8, psaq_mm',
            'ONNX Runtime int8, psaq_mm, preset onnxruntime'} < found.keys()
    assert found['OpenVINO int8, psaq_mm']['size_mb'] < 0.3 * found['eager float']['size_mb']
    assert all(run['peak_mb'] > 0 and run['seconds'] > 0 for run in found.values())


@pytest.mark.slow
def test_end_to_end_benchmark_runs_every_variant(small_config, tmp_path):
    run_tool('benchmarks/end_to_end.py', '--tasks', '--configs', small_config, '--variant=', '--variant=--amp',
             '--json', tmp_path / 'j.json')
    found = json.loads((tmp_path / 'j.json').read_text())
    assert len(found) == 2 and [key.endswith('--amp') for key in found] == [False, True]
    assert all(run['minutes'] > run['quantization_minutes'] > 0 and run['peak_gb'] > 0.1 and run['quantized']
               for run in found.values())


def load_end_to_end(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import end_to_end
    return end_to_end


def test_end_to_end_benchmark_gives_recipes_their_own_defaults(small_config, tmp_path, monkeypatch):
    from mmengine.config import Config

    from psaq_mm.stanza import QuantizationConfig
    benchmark = load_end_to_end(monkeypatch)
    for recipe, images in (('paper', 32), ('low_bit', 96)):
        path = benchmark.recipe_config(small_config, recipe, (4, 6), tmp_path / f'{recipe}.py')
        cfg = Config.fromfile(path)
        found = QuantizationConfig.parse(cfg.quantization)
        assert (found.recipe, found.departures, found.synthesis.num_images) == (recipe, [], images)
        assert (found.weight.bits, found.activation.bits, found.report.images) == (4, 6, 0)
        assert (found.synthesis.size, found.synthesis.batch_size) == (((64, 96), ), 3)  # the config's
        assert cfg.model == Config.fromfile(small_config).model


def test_end_to_end_benchmark_runs_both_recipes_and_shows_ratios(small_config, tmp_path, monkeypatch, capsys):
    benchmark = load_end_to_end(monkeypatch)
    cost = dict(paper=(2.0, 0.5), low_bit=(5.0, 0.7))

    def timed(command, repo, log):
        recipe = re.search(r"'recipe': '(\w+)'", Path(command[2]).read_text())[1]
        minutes, peak = cost[recipe]
        Path(command[command.index('--json') + 1]).write_text(json.dumps(dict(
            minutes=minutes - 1, full_precision={'coco/bbox_mAP': 0.6}, quantized={'coco/bbox_mAP': 0.5})))
        return minutes, peak

    monkeypatch.setattr(benchmark, 'timed', timed)
    monkeypatch.setattr(sys, 'argv', ['end_to_end.py', '--tasks', '--configs', str(small_config), '--json',
                                      str(tmp_path / 'j.json')])
    assert benchmark.main() == 0
    paper, low_bit, ratios = json.loads((tmp_path / 'j.json').read_text()).values()
    assert (paper['minutes'], low_bit['minutes'], low_bit['peak_gb']) == (2.0, 5.0, 0.7)
    assert list(ratios.values()) == [dict(time=2.5, quantization=4.0, memory=pytest.approx(1.4))]
    printed = capsys.readouterr().out
    assert 'low_bit / paper: 2.50 times the minutes, 4.00 times those of quantization, 1.40 times the peak' in printed
    monkeypatch.setattr(sys, 'argv', ['end_to_end.py', '--variant=--amp', '--bits', 'W4A8'])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert '--bits are those of --recipes' in capsys.readouterr().err


@pytest.mark.slow
def test_comparison_is_not_done_twice(small_config, tmp_path, monkeypatch):
    from mmengine.config import Config

    from psaq_mm.engine import compare
    cfg = Config.fromfile(small_config)
    methods = ['noise', 'psaq_v1', 'psaq_v2', 'real']
    first = compare(cfg, methods, [(8, 8)], tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('quantized.pth')}
    assert len(stamps) == 4
    assert compare(cfg, methods, [(8, 8)], tmp_path) == first
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('quantized.pth')}
    v1, v2 = (torch.load(tmp_path / f'W8A8_psaq_v{n}' / 'synthetic.pt', weights_only=True)['images'] for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(v1, v2))
    shutil.rmtree(tmp_path / 'W8A8_noise')
    assert compare(cfg, ['noise'], [(8, 8)], tmp_path)['runs'].keys() == {'W8A8 noise'}
    stamp = (tmp_path / 'W8A8_noise' / 'quantized.pth').stat().st_mtime_ns
    monkeypatch.setattr(sys.modules['psaq_mm.engine.compare'], '_software', lambda cfg: dict(torch='another'))
    compare(cfg, ['noise'], [(8, 8)], tmp_path)
    assert (tmp_path / 'W8A8_noise' / 'quantized.pth').stat().st_mtime_ns > stamp


@pytest.mark.slow
def test_recipes_side_by_side(classification_config, tmp_path):
    def compare(recipes, *options):
        return run_tool('tools/grid.py', classification_config, '--methods', 'psaq_v1', 'psaq_v2', '--bits', 'W4A4',
                        '--recipes', *recipes, '--work-dir', tmp_path, '--cfg-options', *options,
                        'quantization.reconstruction.steps=1', 'quantization.reconstruction.views=1')

    compare(['paper', 'low_bit'])
    runs = json.loads((tmp_path / 'metrics.json').read_text())['runs']
    assert {label: run['recipe'] for label, run in runs.items()} == {
        f'W4A4 {method} {recipe}': recipe for method in ('psaq_v1', 'psaq_v2') for recipe in ('paper', 'low_bit')}
    paper, paper2, low, low2 = (torch.load(tmp_path / f'W4A4_{method}_{recipe}' / 'synthetic.pt', weights_only=True)[
        'images'] for recipe in ('paper', 'low_bit') for method in ('psaq_v1', 'psaq_v2'))
    assert all(map(torch.equal, paper, paper2)) and all(map(torch.equal, low, low2))
    assert not torch.equal(paper[0], low[0])
    assert 'psaq_v2 low_bit' in (tmp_path / 'table.md').read_text()
    done = compare(['low_bit'], 'quantization.game.steps=0')
    assert 'W4A4 psaq_v2 low_bit is left out' in done.stdout + done.stderr
    assert json.loads((tmp_path / 'metrics.json').read_text())['runs'].keys() == {'W4A4 psaq_v1 low_bit'}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_shipped_checkpoints_are_good_and_w8a8_keeps_it(tmp_path):
    """All evaluation images of the demos: good models in full precision, about as good without data."""
    run_tool('demo/run.py', '--methods', 'psaq_v2', '--work-dir', tmp_path, '--json', tmp_path / 'j.json', timeout=1800)
    results = json.loads((tmp_path / 'j.json').read_text())
    at_least = {'detection': ('coco/bbox_mAP', 0.5, 0.01), 'segmentation': ('mIoU', 50, 1),
                'classification': ('accuracy/top1', 55, 2)}  # metric, full precision, loss allowed
    for task, (metric, least, loss) in at_least.items():
        full, quantized = results[task]['full_precision'], results[task]['runs']['W8A8 psaq_v2']['quantized']
        assert full[metric] >= least, task
        assert quantized[metric] > full[metric] - loss, task
        assert np.asarray(Image.open(tmp_path / task / 'predictions.png')).std() > 10
    pytest.importorskip('openvino', reason="needs pip install 'psaq_mm[deploy]'")
    run_tool('benchmarks/int8_accuracy.py', tmp_path / 'detection' / 'W8A8_psaq_v2',
             tmp_path / 'segmentation' / 'W8A8_psaq_v2', '--runtimes', 'openvino', '--out', tmp_path / 'int8')
    compared = json.loads((tmp_path / 'int8' / 'int8_accuracy.json').read_text())
    for label, unit in (('detection/W8A8_psaq_v2', 100), ('segmentation/W8A8_psaq_v2', 1)):
        fake, int8 = (compared[label][kind]['metrics'] for kind in ('fake-quantized', 'openvino'))
        for key, rounding in (('coco/bbox_mAP', 0.1), ('coco/segm_mAP', 0.1), ('mIoU', 0.01)):
            if key in fake:  # each is rounded by mmdet (to 0.1) or mmseg: twice half a unit on top of 0.2
                assert abs(fake[key] - int8[key]) * unit < 0.2 + rounding + 1e-6, (label, key)
        assert min(compared[label]['openvino']['sqnr_db'].values()) >= 30, label


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_real_images_keep_the_real_models_accuracy():
    """../shared/bench, where it exists: the quantizer alone, calibrated on real nuclei, loses next to nothing."""
    bench = ROOT.parent / 'shared' / 'bench'
    if not (bench / 'nuclei').is_dir():
        pytest.skip(f'{bench} is not here: nothing real to measure on')
    import tempfile
    with tempfile.TemporaryDirectory() as out:
        run_tool('benchmarks/nuclei.py', '--bench', bench, '--methods', 'real', '--bits', 'W4A8', '--out', out,
                 '--json', f'{out}/j.json', '--recipes', 'paper', '--cfg-options', 'quantization.report.images=0',
                 timeout=1800)
        results = json.loads(Path(f'{out}/j.json').read_text())
    full, quantized = results['full_precision'], results['runs']['W4A8 real paper']['quantized']
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert quantized[name] > full[name] - 0.01


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_real_weights_of_deit_tiny_keep_their_accuracy(tmp_path):
    """../shared/bench, where it exists: full precision is what timm reports, and no data is needed to come near it.

    docs/results.md says what was measured.
    """
    bench = ROOT.parent / 'shared' / 'bench'
    if not (bench / 'deit_tiny').is_dir():
        pytest.skip(f'{bench} is not here: nothing real to measure on')

    def top1(results, run):
        return results['runs'][run]['quantized']['accuracy/top1']

    def benchmark(*options):
        run_tool('benchmarks/deit_tiny.py', '--bench', bench, '--out', tmp_path, '--json', tmp_path / 'j.json',
                 *options, 'quantization.report.images=0', timeout=2700)
        return json.loads((tmp_path / 'j.json').read_text())

    def both(bits, loss, *options):
        results = benchmark('--methods', 'psaq_v1', 'psaq_v2', '--bits', bits, '--cfg-options',
                            'quantization.recipe=paper', *options)
        assert results['full_precision']['accuracy/top1'] == pytest.approx(77.8, abs=0.21)
        first, second = (top1(results, f'{bits} psaq_v{version}') for version in (1, 2))
        assert second >= 77.8 - loss and second > first - 0.5  # one photograph is 0.2

    both('W4A8', 4.0, 'quantization.game.steps=150')
    run_tool('benchmarks/agreement.py', '--grid', tmp_path)
    fidelity = json.loads((tmp_path / 'agreement.json').read_text())
    shown = run_tool('benchmarks/agreement.py', '--grid', tmp_path, '--runs', tmp_path / 'W4A8_psaq_v1').stdout
    assert f"W4A8_psaq_v1 | {fidelity['W4A8 psaq_v1']['agreement']:.1f} |" in shown and 'v2 |' not in shown
    assert fidelity['W4A8 psaq_v2']['kl'] < 0.9 * fidelity['W4A8 psaq_v1']['kl']
    assert fidelity['W4A8 psaq_v2']['agreement'] > fidelity['W4A8 psaq_v1']['agreement']
    game = json.loads((tmp_path / 'W4A8_psaq_v2' / 'metrics.json').read_text())['stages']['game']
    assert game['best'] < 0.9 * game['searched']  # what the game itself adds to the ranges it starts from
    both('W8A8', 1.0, f'quantization.synthesis.reuse={tmp_path}/W4A8_psaq_v1/synthetic.pt')
    # A third of the steps of ours below 8 bits; the paper's recipe is at 23.
    low = benchmark('--methods', 'psaq_v1', '--bits', 'W4A4', '--cfg-options', 'quantization.reconstruction.steps=100')
    assert low['runs']['W4A4 psaq_v1']['recipe'] == 'low_bit' and top1(low, 'W4A4 psaq_v1') > 55
