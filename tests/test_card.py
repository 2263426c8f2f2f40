"""model.json, and predict.py, which runs a whole model where there is neither PyTorch nor any mm library."""
import base64
import importlib
import io
import json
import os
import subprocess
import sys

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from psaq_mm.deploy.adapters import traceable
from psaq_mm.deploy.card import SCRIPTS, deliver, describe, kind_of, limits, loading_of, quantization_of
from psaq_mm.deploy.check import check_of, held, packed
from psaq_mm.deploy.graph import write
from psaq_mm.deploy.library import traceable_library
from psaq_mm.deploy.predictor import predictor_of
from psaq_mm.deploy.session import agreement
from psaq_mm.engine import read_config
from psaq_mm.engine.checkpoint import read_checkpoint
from psaq_mm.engine.config import dataset_meta, default_scope
from psaq_mm.engine.pipeline import build_float
from psaq_mm.errors import UserError
from psaq_mm.files import digest
from psaq_mm.models import quantize_model

from .conftest import ROOT

DEMOS = dict(detection='mask_rcnn_swin_mini_scenes', segmentation='upernet_swin_mini_scenes',
             classification='vit_mini_objects')
# Runs a script as Python does, and fails where it has imported what people who only run a model do not have.
ALONE = '''import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name='__main__')
finally:
    absent = 'torch', 'cv2', 'psaq_mm', 'timm', 'mmengine', 'mmcv', 'mmdet', 'mmseg'
    heavy = [name for name in sys.modules if name.split('.')[0] in absent]
    assert not heavy, heavy
'''


def model_of(task):
    cfg = read_config(ROOT / 'demo' / f'{DEMOS[task]}.py')
    default_scope(cfg)
    model = build_float(cfg)
    content = read_checkpoint(str(ROOT / 'demo' / f'{DEMOS[task]}.pth'))
    state = content.get('state_dict', content)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if not name.startswith('auxiliary')]
    return cfg, model.eval()


@pytest.fixture(scope='module')
def delivered(tmp_path_factory, pictures):
    """Folder, config and model of each task."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip('openvino')
    found = {}
    for task in DEMOS:
        folder, (cfg, model) = tmp_path_factory.mktemp(task), model_of(task)
        predictor = predictor_of(model, cfg).eval()
        sizes = dict(classification=[(96, 96)]).get(task, [(128, 160), (96, 112)])
        image = torch.randint(0, 255, (1, *sizes[0], 3), dtype=torch.uint8)
        with torch.no_grad(), traceable(model), traceable_library():
            shapes = [{name: list(value.shape) for name, value in zip(predictor.names, predictor(
                image[:, :height, :width]))} for height, width in sizes]
            batch = {} if task == 'detection' else {0: 'B'}
            axes = {'images': batch if task == 'classification' else {**batch, 1: 'H', 2: 'W'}}
            axes.update(boxes={1: 'N'}, scores={1: 'N'}, labels={1: 'N'}, masks={1: 'N'}, probabilities=batch,
                        label_map={**batch, 1: 'H', 2: 'W'})
            axes = {name: axes[name] for name in ('images', *predictor.names)}
            write(predictor, (image, ), folder / 'model.onnx', ['images'], list(predictor.names), axes, {}, task)
        measured = [dict(size=size, answers=shape) for size, shape in zip(sizes, shapes)]
        with Image.open(pictures['object' if task == 'classification' else 'scene']) as picture:
            image = torch.from_numpy(np.array(picture.convert('RGB').resize(sizes[0][::-1])))[None]
        deliver(describe(predictor, cfg, dataset_meta(cfg, {}), folder / 'model.onnx', measured,
                         ['onnxruntime', 'openvino'], image), folder)
        found[task] = folder, cfg, model
    return found


@pytest.fixture(scope='module')
def pictures(scenes):
    """An image of a scene, and of an object."""
    return dict(scene=sorted((scenes / 'val').glob('*.png'))[0],
                object=sorted((scenes / 'objects' / 'val').rglob('*.png'))[0])


def run(folder, *arguments, script=None):
    return subprocess.run([sys.executable, '-c', ALONE, str(script or folder / 'predict.py'), *map(str, arguments)],
                          capture_output=True, text=True, cwd=folder, timeout=120,
                          env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})


def asked(folder, path, *options):
    done = run(folder, folder / 'model.onnx', path, '--json', folder / 'answers.json', *options)
    assert done.returncode == 0, done.stderr
    answer, = json.loads((folder / 'answers.json').read_text())
    return answer, done.stdout


@torch.no_grad()
def by_library(cfg, model, path):
    """What the library predicts for an image, by its own pipeline and preprocessor."""
    from mmengine.dataset import Compose, pseudo_collate
    default_scope(cfg)
    steps = [step for step in cfg.test_dataloader.dataset.pipeline if not step.type.startswith('LoadAnn')]
    data = Compose(steps)(dict(img_path=str(path), img_id=0, gt_label=0, reduce_zero_label=False, seg_fields=[]))
    return model.test_step(pseudo_collate([data]))[0]


@pytest.mark.parametrize('runtime', ('onnxruntime', 'openvino'))
def test_a_detector_in_a_process_of_its_own(delivered, pictures, runtime):
    folder, cfg, model = delivered['detection']
    answer, text = asked(folder, pictures['scene'], '--runtime', runtime, '--out', folder / 'out.png')
    expected = by_library(cfg, model, pictures['scene']).pred_instances
    expected = expected[expected.scores >= 0.3]
    assert len(expected) and len(answer['objects']) == len(expected)
    for found, box, label, score in zip(answer['objects'], expected.bboxes, expected.labels, expected.scores):
        x, y, width, height = found['bbox']
        assert np.allclose([x, y, x + width, y + height], box, atol=0.05) and abs(found['score'] - score) < 1e-3
        assert found['category_id'] == label and found['category'] == cfg.metainfo.classes[label]
        assert f"{found['category']} {found['score']:.2f}" in text
    drawn, image = (np.asarray(Image.open(path)).astype(int) for path in (folder / 'out.png', pictures['scene']))
    assert drawn.shape == image.shape
    masks = expected.masks.numpy()
    beside, right = written(drawn.shape[:2], expected.bboxes), []
    for mask, label in zip(masks, expected.labels):
        inside, colour = mask & (masks.sum(0) == 1) & ~beside, np.array(cfg.metainfo.palette[label])
        right += (np.abs(drawn[inside] - (image[inside] + colour) / 2).max(1) <= 1).tolist()
    assert len(right) > 300 and np.mean(right) > 0.97  # only outlines of masks may differ from the library's
    assert (drawn == image).all(2)[~masks.any(0) & ~beside].mean() > 0.97


def written(size, boxes):
    """Where outlines of boxes are drawn, and the text in them, (H, W)."""
    found = np.zeros(size, bool)
    for x1, y1, x2, y2 in boxes.round().int().tolist():
        around, within = np.zeros((2, *size), bool)
        around[max(y1 - 3, 0):y2 + 4, max(x1 - 3, 0):x2 + 4] = True
        within[max(y1 + 4, 0):max(y2 - 3, 0), max(x1 + 4, 0):max(x2 - 3, 0)] = True
        found |= around & ~within
        found[max(y1, 0):y1 + 14, max(x1, 0):x1 + 80] = True
    return found


@pytest.fixture(scope='module')
def predict(delivered):
    """The delivered script as a module."""
    sys.path.insert(0, str(delivered['detection'][0]))
    try:
        import predict
    finally:
        sys.path.pop(0)
    return predict


def test_masks_are_pasted_as_the_library_does(predict):
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(40, 28, 28, generator=generator)
    corners = torch.rand(40, 2, 2, generator=generator) * torch.tensor([120.0, 90.0]) - 10
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    boxes[0] = torch.tensor([5.0, 5.0, 5.0, 9.0])  # empty
    for threshold in (0.5, 0.3):
        card = dict(mask_form='box', mask_threshold=threshold)
        for mask, box in zip(masks[1:], boxes[1:]):
            whole = _do_paste_mask(mask[None, None], box[None], 80, 100, skip_empty=False)[0][0]
            found = predict.paste(mask.numpy(), box.tolist(), (80, 100), card)
            assert (found != (whole >= threshold).numpy())[(whole - threshold).abs().numpy() > 1e-4].sum() == 0
        assert not predict.paste(masks[0].numpy() * 0, boxes[0].tolist(), (80, 100), card).any()


@pytest.mark.parametrize('box', ([-50, -50, -5, -5], [-50.0, 10, -5, 30], [10, -50, 30, -5], [200, 200, 240, 240]))
def test_a_mask_beside_the_image_is_empty(predict, box):
    card = dict(mask_form='box', mask_threshold=0.5)
    found = predict.paste(np.ones((28, 28), np.float32), box, (80, 100), card)
    assert found.shape == (80, 100) and not found.any()


@pytest.mark.parametrize('runtime', ('onnxruntime', 'openvino'))
def test_a_segmentor_in_a_process_of_its_own(delivered, pictures, runtime):
    folder, cfg, model = delivered['segmentation']
    answer, text = asked(folder, pictures['scene'], '--runtime', runtime)
    expected = by_library(cfg, model, pictures['scene']).pred_sem_seg.data[0]
    for item in answer['areas']:
        assert abs(item['share'] - (expected == item['category_id']).float().mean()) < 0.002
        assert item['category'] == cfg.metainfo.classes[item['category_id']] and f"{item['category']}: " in text
    assert abs(sum(item['share'] for item in answer['areas']) - 1) < 1e-6


@pytest.mark.parametrize('runtime', ('onnxruntime', 'openvino'))
def test_a_classifier_in_a_process_of_its_own(delivered, pictures, runtime):
    folder, cfg, model = delivered['classification']
    answer, text = asked(folder, pictures['object'], '--runtime', runtime)
    expected = by_library(cfg, model, pictures['object'])
    best = answer['classes'][0]
    assert len(answer['classes']) == 5 and best['category_id'] == expected.pred_label
    assert all(abs(item['score'] - expected.pred_score[item['category_id']]) < 1e-4 for item in answer['classes'])
    assert text.splitlines()[1].strip() == f"{best['category']}: {best['score']:.3f}"


def test_several_images_have_a_picture_each(delivered, pictures):
    folder = delivered['segmentation'][0]
    other = folder / 'other.png'
    Image.open(pictures['scene']).crop((0, 0, 100, 90)).save(other)
    done = run(folder, folder / 'model.onnx', pictures['scene'], other, '--out', folder / 'all.png')
    assert done.returncode == 0, done.stderr
    for path, image in ((folder / 'all_other.png', other),
                        (folder / f"all_{pictures['scene'].stem}.png", pictures['scene'])):
        drawn, image = (np.asarray(Image.open(item)).astype(int) for item in (path, image))
        expected = by_library(*delivered['segmentation'][1:], other if len(image) == 90 else pictures['scene'])
        labels = expected.pred_sem_seg.data[0].numpy()
        colours = np.array(delivered['segmentation'][1].metainfo.palette)[labels]
        assert drawn.shape == image.shape and len(np.unique(labels)) > 1
        assert (np.abs(drawn - (image + colours) / 2).max(2) <= 1).mean() > 0.99


def test_equal_names_have_a_picture_each(delivered, pictures, tmp_path):
    folder, paths = delivered['segmentation'][0], []
    for name, size in (('x', (100, 90)), ('y', (90, 100))):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / '1.png')
        Image.open(pictures['scene']).crop((0, 0, *size)).save(paths[-1])
    done = run(folder, folder / 'model.onnx', *paths, '--out', tmp_path / 's.png')
    assert done.returncode == 0, done.stderr
    assert [Image.open(tmp_path / f's_{i}_1.png').size for i in (1, 2)] == [(100, 90), (90, 100)]


def test_an_image_that_fails_costs_no_other_answers(delivered, pictures, tmp_path):
    folder, target = delivered['classification'][0], tmp_path / 'answers.json'
    done = run(folder, folder / 'model.onnx', pictures['object'], 'none.png', '--json', target)
    assert done.returncode == 1 and 'none.png cannot be read' in done.stderr
    answer, = json.loads(target.read_text())
    assert answer['file'] == str(pictures['object']) and len(answer['classes']) == 5


@pytest.mark.parametrize('option, target, words', [
    ('--out', 'nope/x.png', 'nope/x.png cannot be written: name a file in a folder that exists'),
    ('--json', 'nope/x.json', 'nope/x.json cannot be written'), ('--json', '.', '. cannot be written'),
    ('--out', 'x.xyz', 'x.xyz is no picture that Pillow writes: let its name end in .png'),
    ('--out', 'x', 'x is no picture'), ('--out', 'x.eps2', 'x.eps2 is no picture')])
def test_targets_are_checked_before_anything_is_read(delivered, option, target, words):
    folder = delivered['classification'][0]
    done = run(folder, 'none.onnx', 'none.png', option, target)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1


def loading(channels, **more):
    """What a card says of the image that goes in."""
    return dict(dict(input=dict(shape=[1, 'H', 'W', len(channels)], channels=channels), sizes=dict(at_least=1),
                     upright=True, unchanged=False), **more)


@pytest.mark.parametrize('backend', ('cv2', 'pillow'))
def test_channels_are_in_the_order_of_the_library(predict, tmp_path, backend):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
    Image.fromarray(array).save(tmp_path / 'four.png')
    step = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend=backend)
    found = loading_of(Config(dict(test_dataloader=dict(dataset=dict(pipeline=[step])))), 4)
    assert found.channels == 'BGRA' and found.unchanged and 'B, G, R, A' in found.steps[2]
    card = loading(found.channels, unchanged=True, classes=['a', 'b'], palette=[[0, 0, 0]] * 2)
    pixels = predict.read_image(tmp_path / 'four.png', card)
    assert np.array_equal(pixels[0], mmcv.imread(str(tmp_path / 'four.png'), 'unchanged', backend=backend))
    picture = predict.understand(dict(probabilities=np.float32([[0.5, 0.5]])), pixels, card, 0.3)[2]
    assert np.array_equal(np.asarray(picture)[-1], array[-1, :, :3])
    for mode in ('RGB', 'CMYK', 'L', 'P'):
        Image.fromarray(array[..., :3]).convert(mode).save(tmp_path / 'other.tif')
        with pytest.raises(SystemExit, match=f'pixels in {mode}, the model takes W x H in BGRA only'):
            predict.read_image(tmp_path / 'other.tif', card)
    Image.fromarray(np.full((6, 8), 900, np.uint16)).save(tmp_path / 'deep.png')
    with pytest.raises(SystemExit, match='16 bits'):
        predict.read_image(tmp_path / 'deep.png', card)


def test_an_image_is_turned_as_the_library_turns_it(predict, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    card = loading('RGB')
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f'{orientation}.jpg'
        Image.fromarray(array).save(path, quality=95, exif=exif)
        found = predict.read_image(path, card)[0].astype(int)
        assert np.abs(found - mmcv.imread(str(path), channel_order='rgb')).max() <= 3
        stored = predict.read_image(path, dict(card, upright=False))[0].astype(int)
        assert np.abs(stored - mmcv.imread(str(path), 'color_ignore_orientation')[..., ::-1]).max() <= 3
    for mode in ('L', 'RGBA', 'P', 'I;16', '1'):
        path = tmp_path / f'{mode.replace(";", "")}.png'
        image = Image.fromarray(array[..., 0].astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(
            array).convert(mode)
        image.save(path)
        assert np.array_equal(predict.read_image(path, card)[0], mmcv.imread(str(path), channel_order='rgb'))
    assert predict.read_image(path, loading('L')).shape == (1, 48, 64, 1)


def test_images_that_would_become_black_are_refused(predict, tmp_path, monkeypatch, capsys):
    card = loading('RGB')
    array = np.full((6, 8), 200)
    for kind in (np.int32, np.float32):
        Image.fromarray(array.astype(kind)).save(tmp_path / 'deep.tif')
        with pytest.raises(SystemExit, match='deep.tif cannot be read as an image .its numbers have 32 bits'):
            predict.read_image(tmp_path / 'deep.tif', card)
    path = tmp_path / 'flat.png'
    Image.fromarray(array.astype(np.uint8)).save(path)
    assert predict.read_image(path, card).max() == 200
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20)
    with pytest.raises(SystemExit, match='flat.png cannot be read as an image .*exceeds limit of 40 pixels'):
        predict.read_image(path, card)
    content = bytearray(path.read_bytes())
    content[content.index(b'IDAT') + 1] = 1
    path.write_bytes(content)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match='flat.png cannot be read as an image'):
        predict.read_image(path, card)


def test_what_a_model_finds_nowhere_is_nothing(predict):
    card = dict(loading('RGB'), classes=['sky', 'car'], palette=None, nothing=2, mask_form=None)
    pixels = np.zeros((1, 2, 3, 3), np.uint8)
    found, words, _ = predict.understand(dict(panoptic_map=np.array([[[0, 1001, 2002], [2, 2, 3]]])), pixels, card, 0.3)
    assert [item['category'] for item in found['areas']] == ['sky', 'car', 'nothing', 'class 3']
    assert 'nothing: 50.0% of the pixels' in words


def test_failures_of_a_runtime_are_one_line(delivered, pictures, tmp_path):
    folder = delivered['classification'][0]
    for name in ('predict.py', 'session.py', 'model.onnx'):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    card = json.loads((folder / 'model.json').read_text())
    card['input']['shape'][1:3] = 'H', 'W'
    (tmp_path / 'model.json').write_text(json.dumps(card))
    for runtime in ('onnxruntime', 'openvino'):
        done = run(tmp_path, tmp_path / 'model.onnx', pictures['scene'], '--runtime', runtime)
        assert done.returncode == 1 and f"{pictures['scene']} could not be computed (" in done.stderr
        assert ('96' in done.stderr or 'tensor' in done.stderr) and len(done.stderr.splitlines()) == 1
    onnx = pytest.importorskip('onnx')
    graph = onnx.load(str(folder / 'model.onnx'))
    graph.graph.node[0].op_type = 'OfALaterVersion'
    onnx.save(graph, str(tmp_path / 'model.onnx'))
    (tmp_path / 'model.json').write_text(json.dumps(dict(card, sha256=digest(tmp_path / 'model.onnx'))))
    for runtime in ('onnxruntime', 'openvino'):
        done = run(tmp_path, tmp_path / 'model.onnx', pictures['scene'], '--runtime', runtime)
        assert done.returncode == 1 and f'pip install --upgrade {runtime}' in done.stderr
        assert f'cannot load {tmp_path}/model.onnx' in done.stderr and len(done.stderr.splitlines()) == 1
    for text in ('{}', '[]', '3', 'no JSON'):
        (tmp_path / 'model.json').write_text(text)
        done = run(tmp_path, tmp_path / 'model.onnx', pictures['scene'])
        assert done.returncode == 1 and 'model.json in the same folder' in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.fixture()
def moved(delivered, tmp_path):
    """Copy a delivered folder, with another card; a function."""
    def move(task, change):
        folder = delivered[task][0]
        for name in (*SCRIPTS, 'model.onnx'):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        card = json.loads((folder / 'model.json').read_text())
        change(card['check'])
        (tmp_path / 'model.json').write_text(json.dumps(card))
        return tmp_path
    return move


def elsewhere(check):
    """As if the export had been on another machine."""
    for item in check['measured'].values():
        item['host'] += ' avx1024'


@pytest.mark.parametrize('task', DEMOS)
def test_a_card_holds_a_check(delivered, task):
    folder = delivered[task][0]
    check = json.loads((folder / 'model.json').read_text())['check']
    assert set(check['measured']) == {'onnxruntime', 'openvino'} and len(check['content']) < 2**17
    assert max(check['size']) <= 160 and 0.5 < check['at_least'] < 0.9
    for runtime, item in check['measured'].items():
        assert item['agreement'] > 0.95 and item['host'].startswith(f'{runtime} ')
        done = run(folder, folder / 'model.onnx', '--check', '--runtime', runtime)
        assert done.returncode == 0, done.stderr
        assert f"agree with those of the export by {item['agreement']:.2f}" in done.stdout


def test_an_unknown_machine_is_checked(moved, pictures):
    def otherwise(check):
        elsewhere(check)
        arrays = dict(np.load(io.BytesIO(base64.b64decode(check['content']))))
        check['content'] = packed(dict(arrays, **{name: value[:, ::-1] for name, value in arrays.items()
                                                  if name in ('boxes', 'label_map')}))

    for task in ('detection', 'segmentation'):
        for change, good in ((elsewhere, True), (otherwise, False)):
            folder = moved(task, change)
            done = run(folder, folder / 'model.onnx', pictures['scene'], '--runtime', 'onnxruntime')
            assert done.returncode == (not good), done.stderr
            if not good:
                assert 'computes' in done.stderr and 'wrongly on this machine' in done.stderr
                assert 'or --runtime openvino' in done.stderr and len(done.stderr.splitlines()) == 1
    folder = moved('classification', lambda check: check.update(at_least=1.01))  # on the machine of the export
    done = run(folder, folder / 'model.onnx', pictures['object'], '--runtime', 'onnxruntime')
    assert done.returncode == 0, done.stderr
    done = run(folder, folder / 'model.onnx', pictures['object'], '--runtime', 'onnxruntime', '--check')
    assert done.returncode == 1 and 'must by 1.01' in done.stderr
    done = run(folder, folder / 'model.onnx')
    assert done.returncode == 2 and 'give an image, or --check' in done.stderr


def test_answers_agree_as_far_as_they_are_alike():
    generator = np.random.default_rng(0)
    corners = np.sort(generator.random((1, 8, 2, 2)) * 60, 2)
    corners[:, :, 1] += 20
    found = dict(boxes=corners.reshape(1, 8, 4), scores=np.linspace(0.9, 0.2, 8)[None], labels=np.arange(8)[None],
                 masks=generator.random((1, 8, 28, 28)))
    card = dict(mask_threshold=0.5)
    aims = held(found, 'box', card)
    assert agreement(aims, found, card) == pytest.approx(1)
    order = generator.permutation(8)
    assert agreement(aims, {name: value[:, order] for name, value in found.items()}, card) == pytest.approx(1)
    for other in (dict(boxes=found['boxes'] + 30), dict(labels=found['labels'] + 1), dict(scores=found['scores'] / 2),
                  dict(masks=found['masks'] * 0), dict(masks=1 - found['masks'])):
        assert agreement(aims, dict(found, **other), card) == 0
    assert agreement(aims, {name: value[:, :0] for name, value in found.items()}, card) == 0
    twice = {name: np.repeat(value[:, :1], 2, 1) for name, value in found.items()}
    assert agreement(held(twice, 'box', card), {name: value[:, :1] for name, value in twice.items()}, card) == 0.5
    maps = dict(label_map=generator.integers(0, 5, (1, 300, 200)), depth=generator.random((1, 300, 200)) + 1)
    for name, value in maps.items():
        aims = held({name: value}, None, {})
        assert max(aims[name].shape) <= 128 and agreement(aims, {name: value}, {}) > 0.999
        assert agreement(aims, {name: value[:, ::-1].copy()}, {}) < (0.3 if name == 'label_map' else 0.9)
    numbers = dict(probabilities=np.float32([[0.7, 0.2, 0.1]]))
    assert agreement(held(numbers, None, {}), dict(probabilities=np.float32([[0.1, 0.2, 0.7]])), {}) < 0.1
    assert not agreement(held(numbers, None, {}), dict(probabilities=numbers['probabilities'] * np.nan), {}) >= 0.1
    panoptic = np.array([[[3, 1001, 2001], [3, 133, 133]]])
    other = np.where(panoptic > 999, 5001, panoptic)  # other numbers of instances
    assert agreement(dict(panoptic_map=panoptic[0]), dict(panoptic_map=other), {}) == 1


def test_a_model_that_is_not_sure_gives_no_check(delivered):
    folder, cfg, model = delivered['detection']
    image = torch.full((1, 128, 160, 3), 114, dtype=torch.uint8)
    predictor = predictor_of(model, cfg).eval()
    card = json.loads((folder / 'model.json').read_text())
    assert check_of(predictor, folder / 'model.onnx', image, [(64, 80)], ['onnxruntime'], card) is None


def test_grey_masks_are_refused():
    cfg, model = model_of('detection')
    model.test_cfg.rcnn.mask_thr_binary = -1
    with pytest.raises(UserError, match='mask_thr_binary=-1 makes grey masks'):
        predictor_of(model, cfg)


def test_smaller_images_than_were_measured_are_refused(delivered, tmp_path):
    folder = delivered['detection'][0]
    for size in ((63, 200), (200, 63), (1, 1)):
        Image.new('RGB', size).save(tmp_path / 'small.png')
        done = run(folder, folder / 'model.onnx', tmp_path / 'small.png', '--runtime', 'onnxruntime')
        assert done.returncode == 1 and 'with sides of 64 and more only' in done.stderr
        assert len(done.stderr.splitlines()) == 1
    Image.new('RGB', (64, 64)).save(tmp_path / 'small.png')
    done = run(folder, folder / 'model.onnx', tmp_path / 'small.png', '--runtime', 'onnxruntime')
    assert done.returncode == 0, done.stderr


def test_errors_are_one_line_that_says_what_to_do(delivered, pictures, tmp_path):
    folder = delivered['classification'][0]
    model, text, other = folder / 'model.onnx', tmp_path / 'text.jpg', tmp_path / 'alone.onnx'
    text.write_text('no image')
    other.write_bytes(b'')
    changed = tmp_path / 'changed'
    changed.mkdir()
    (changed / 'model.onnx').write_bytes(model.read_bytes() + b' ')
    (changed / 'model.json').write_bytes((folder / 'model.json').read_bytes())
    for arguments, words in (
            ((model, 'none.jpg'), 'none.jpg cannot be read as an image'), ((model, text), 'cannot be read as an image'),
            ((folder / 'none.onnx', text), 'none.onnx'), ((other, text), 'model.json in the same folder'),
            ((changed / 'model.onnx', pictures['object']), 'copy both from the same export'),
            ((model, pictures['scene']), 'the model takes 96 x 96 in RGB only')):
        done = run(folder, *arguments)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_runtime_that_is_wrong_is_not_taken(delivered, pictures, tmp_path):
    folder = delivered['classification'][0]
    for name in ('model.onnx', 'predict.py', 'session.py'):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    card = json.loads((folder / 'model.json').read_text())
    (tmp_path / 'model.json').write_text(json.dumps(dict(card, runtimes=['openvino'])))
    done = run(tmp_path, tmp_path / 'model.onnx', pictures['object'], '--runtime', 'onnxruntime')
    assert done.returncode == 1 and 'onnxruntime was not found to compute this graph rightly: take openvino' in \
        done.stderr
    assert run(tmp_path, tmp_path / 'model.onnx', pictures['object']).returncode == 0


def test_a_missing_package_is_named(delivered, pictures, tmp_path):
    folder = delivered['classification'][0]
    script = tmp_path / 'predict.py'
    (tmp_path / 'session.py').write_bytes((folder / 'session.py').read_bytes())
    script.write_text('import sys\nsys.modules.update({"onnxruntime": None, "PIL.ImageOps": None})\n'
                      + (folder / 'predict.py').read_text())
    done = run(folder, folder / 'model.onnx', pictures['object'], script=script)
    assert done.returncode == 1 and 'pip install Pillow' in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_scripts_are_short_and_stand_alone():
    for name in SCRIPTS:
        source = (ROOT / 'psaq_mm' / 'deploy' / name).read_text()
        assert len(source.splitlines()) < 150 and 'torch' not in source


def test_a_card_says_what_a_graph_takes_and_gives(delivered):
    cards = {task: json.loads((item[0] / 'model.json').read_text()) for task, item in delivered.items()}
    card = cards['detection']
    assert card['kind'] == 'instance segmentation' and card['quantized'] is None
    assert card['input'] == dict(name='images', type='uint8', shape=[1, 'H', 'W', 3], range=[0, 255], channels='RGB')
    shapes = {port['name']: (port['type'], port['shape']) for port in card['outputs']}
    assert shapes['boxes'] == ('float32', [1, 'N', 4]) and shapes['labels'] == ('int64', [1, 'N'])
    assert card['mask_form'] == 'box' and card['mask_threshold'] == 0.5 and card['score_thr'] == 0.05
    assert card['inside'][0] == 'Resize(scale=(192, 192), keep_ratio=True)' and len(card['outside']) == 3
    assert card['sizes']['any'] and card['sizes']['measured'][1]['size'] == [96, 112]
    assert card['sizes']['at_least'] == min(card['sizes']['measured'][2]['size']) == 64
    assert cards['classification']['sizes']['at_least'] == 96
    assert len(card['classes']) == len(card['palette']) == 6 and card['versions']['onnx']
    assert cards['segmentation']['outputs'][0]['type'] == 'uint8' and 'mask_form' not in cards['segmentation']
    assert cards['classification']['kind'] == 'classification' and not cards['classification']['sizes']['any']


def test_a_card_says_what_is_quantized():
    model = model_of('classification')[1]
    quantize_model(model, dict(weight=dict(bits=4), patch_embed_bits=8))
    found = quantization_of(model)
    assert found['parts'] == ['backbone', 'head'] or found['parts'] == ['backbone']
    assert set(found['bits_of_weights']) == {'4', '8'} and set(found['bits_of_activations']) == {'8'}
    assert found['layers'] > found['linear_layers'] > 0


def test_limits_are_those_of_the_second_stage():
    model = torch.nn.Module()
    model.test_cfg = dict(rpn=dict(max_per_img=1000), rcnn=dict(score_thr=0.05, max_per_img=100, mask_thr_binary=0.4))
    assert limits(model) == dict(score_thr=0.05, max_per_img=100, mask_threshold=0.4)
    model.test_cfg = dict(max_per_image=30)
    assert limits(model) == dict(max_per_img=30)


@pytest.mark.parametrize('settings, upright', [
    (dict(), True), (dict(imdecode_backend='pillow'), True), (dict(imdecode_backend='turbojpeg'), False),
    (dict(color_type='unchanged'), False), (dict(color_type='color_ignore_orientation'), False)])
def test_orientation_is_what_the_loader_makes_of_it(settings, upright):
    step = dict(type='LoadImageFromFile', **settings)
    assert loading_of(Config(dict(test_dataloader=dict(dataset=dict(pipeline=[step])))), 3).upright == upright


def test_kinds():
    assert kind_of(('boxes', 'scores', 'labels')) == 'detection' and kind_of(('depth', )) == 'depth'
    assert kind_of(('panoptic_map', 'boxes', 'scores', 'labels', 'masks')) == 'panoptic'


def test_an_export_warns_of_what_is_missing(monkeypatch, tmp_path):
    """Of a test pipeline, first, and of a check."""
    export = importlib.import_module('psaq_mm.deploy.export')
    from psaq_mm.deploy.graph import Form
    from psaq_mm.deploy.whole import Whole
    cfg, model = model_of('classification')
    cfg.pop('test_dataloader')
    (tmp_path / 'model.onnx').write_bytes(b'')
    found = Whole(tmp_path / 'model.onnx', None, [], [], [], None, True, None)
    monkeypatch.setattr(export, 'export_whole', lambda *unused: found)
    monkeypatch.setattr(export, 'describe', lambda *unused: dict(check=None, sizes=dict(at_least=64)))
    monkeypatch.setattr(export, 'deliver', lambda *unused: None)
    result = export.deliver_whole(predictor_of(model, cfg), cfg, {}, tmp_path, [torch.zeros(1, 3, 96, 96)], (96, 96),
                                  True, [], Form())
    first, second = result['warnings']
    assert 'no test_dataloader: model.onnx takes images as they are' in first and 'no check' in second
    assert result['at_least'] == 64
